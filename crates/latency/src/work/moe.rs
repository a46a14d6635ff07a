//! Operators of a mixture-of-experts decoder as our engine runs them: routed experts, dense f32 matrices, attention over a
//! cache, and what is left of a layer. Keys and their counts (reference 2.2, 2.3); the engine's own rules of who works
//! stand here as constants, so that a key names the work that is really done.

use serde::{Deserialize, Serialize};

use super::{Family, Features, Heat, Term};

/// Distinct experts of one layer, side by side on the threads, each for `tokens` tokens: gate and up `[inner, hidden]`,
/// down `[hidden, inner]`, quantizing the tokens and summing the outputs included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExpertKey {
    pub hidden: u32,
    pub inner: u32,
    /// Bits of the prefix that is read: 2, 3, 4 or 8; 16: f16 or bf16.
    pub bits: u32,
    /// Planes that this prefix touches; 1 for a plain code.
    pub planes: u32,
    /// Weights per scale, along the input; 16-bit weights have no scales.
    pub group: u32,
    /// 0: whole matrices; else each is a product of two factors of this rank.
    pub rank: u32,
    /// Distinct experts of the call.
    pub experts: u32,
    /// Tokens at each of them.
    pub tokens: u32,
    pub threads: u32,
    pub heat: Heat,
}

/// A dense matrix `[outputs, inputs]` of the engine, for `tokens` rows of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DenseKey {
    pub inputs: u32,
    pub outputs: u32,
    /// Bits of a weight in memory: 32 (f32), 16 (f16 or bf16), 8 and fewer are group codes.
    pub bits: u32,
    /// Weights per f16 scale, along the input; 0 of floats.
    pub group: u32,
    pub tokens: u32,
    pub threads: u32,
    pub heat: Heat,
}

/// What weights are in memory: a kernel each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Form {
    F32,
    /// f16 or bf16.
    Half,
    /// Group codes.
    Codes,
}

/// Attention between its projections: rotary positions, the cache's new rows, scores, softmax, mix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttentionKey {
    pub heads: u32,
    pub kv_heads: u32,
    /// Width of a key and of a query of one head.
    pub head_dim: u32,
    /// Width of a value.
    pub value_dim: u32,
    /// A value is the beginning of its key and is not cached again (latent attention).
    pub values_in_keys: bool,
    /// Bits of a cached number: 32, 16, or 8 with a scale of 32 bits per head and position.
    pub kv_bits: u32,
    /// Keys that the last token sees, its own among them.
    pub keys: u32,
    /// New tokens of each sequence, at most `keys`.
    pub tokens: u32,
    pub sequences: u32,
    pub threads: u32,
    pub heat: Heat,
}

/// What a decoder layer does beside matrices, attention and experts: two norms, the router's softmax and choice, the
/// activation of a dense or shared MLP, sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GlueKey {
    pub hidden: u32,
    /// Of the router; 1 in a layer without one.
    pub experts: u32,
    /// Experts per token.
    pub top_k: u32,
    /// Inner width of the dense or shared MLP; 0 without one.
    pub inner: u32,
    pub tokens: u32,
    pub threads: u32,
}

/// Tokens that one pass over codes serves, and the widths of a last pass that has fewer.
const PANEL_TOKENS: u32 = 12;
const PANEL_WIDTHS: [u32; 5] = [1, 2, 4, 8, PANEL_TOKENS];
/// Tokens that one pass over floats serves: 8, 4, 2 and 1, as many of each as it takes; more tokens go another way.
const PASS_TOKENS: u32 = 8;
/// Bytes of codes of one part of the work when few tokens meet them.
const PART_BYTES: f64 = 65_536.0;
/// Bytes of codes times tokens below which one thread runs all of it.
const CODES_ALONE: f64 = 49_152.0;
/// Multiply-adds below which one thread runs a matrix of floats, and outputs of one part of it.
const FLOATS_ALONE: u64 = 1 << 16;
const FLOATS_PART: u32 = 128;
/// Queries of one job of attention, keys of one of a lone query's, multiply-adds below which one thread runs all.
const QUERY_BLOCK: u32 = 64;
const KEY_CHUNK: u32 = 256;
const ATTENTION_ALONE: f64 = 262_144.0;
/// Times that a layer's state is read or written by what is not a matrix.
const GLUE_PASSES: f64 = 12.0;

/// Passes over the codes of a matrix, and the tokens that they have room for.
fn panels(tokens: u32) -> (f64, f64) {
    let (full, rest) = (tokens / PANEL_TOKENS, tokens % PANEL_TOKENS);
    if rest == 0 {
        return (f64::from(full), f64::from(tokens));
    }
    let last = PANEL_WIDTHS.into_iter().find(|width| *width >= rest);
    let room = full * PANEL_TOKENS + last.expect("fewer than a full panel");
    (f64::from(full + 1), f64::from(room))
}

/// Passes over a matrix of floats.
fn passes(tokens: u32) -> f64 {
    f64::from(tokens / PASS_TOKENS + (tokens % PASS_TOKENS).count_ones())
}

/// The busiest thread's share of so many equal parts, and how many threads have any.
fn shared(parts: u32, threads: u32) -> (f64, u32) {
    let (parts, threads) = (parts.max(1), threads.max(1));
    let busy = parts.min(threads);
    (f64::from(parts.div_ceil(busy)) / f64::from(parts), busy)
}

/// Whole parts of so many bytes.
fn parts(bytes: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
    let parts = (bytes / PART_BYTES).ceil().clamp(1.0, 1e6) as u32;
    parts
}

/// What unpacking costs is each width's own; all else they share.
fn unpacked(bits: u32, planes: u32) -> Term {
    match (bits, planes) {
        (2, 1) => Term::MegaWeightsB2,
        (3, 1) => Term::MegaWeightsB3,
        (4, 1) => Term::MegaWeightsB4,
        (8, 1) => Term::MegaWeightsB8,
        (4, 2) => Term::MegaWeightsB4P2,
        (8, 2) => Term::MegaWeightsB8P2,
        (8, 3) => Term::MegaWeightsB8P3,
        _ => Term::MegaWeights,
    }
}

/// Weights, rows and scales of a matrix of codes, padded as it is laid out: 16 rows, 32 columns.
fn padded(rows: u32, columns: u32, group: u32) -> (f64, f64, f64) {
    let (r, c) = (
        f64::from(rows.next_multiple_of(16)),
        f64::from(columns.next_multiple_of(32)),
    );
    (r * c, r, r * f64::from(columns.div_ceil(group.max(1))))
}

impl ExpertKey {
    /// Bytes of codes and f16 scales of one expert (reference 2.3): every one is read once per call.
    pub fn weight_bytes(&self) -> f64 {
        let of = |(rows, columns): (u32, u32)| {
            let (n, k) = (f64::from(rows), f64::from(columns));
            let scales = if self.bits == 16 {
                0.0
            } else {
                2.0 * n * f64::from(columns.div_ceil(self.group.max(1)))
            };
            n * k * f64::from(self.bits) / 8.0 + scales
        };
        self.matrices().iter().copied().map(of).sum()
    }

    /// `(rows, columns)` of gate, up and down; with a rank of their factors. Empty places are `(0, 0)`.
    fn matrices(&self) -> [(u32, u32); 6] {
        let (h, i, r) = (self.hidden, self.inner, self.rank);
        if r == 0 {
            [(i, h), (i, h), (h, i), (0, 0), (0, 0), (0, 0)]
        } else {
            [(r, h), (i, r), (r, h), (i, r), (r, i), (h, r)]
        }
    }

    /// The busiest thread's share, and how many the engine puts to work.
    fn shared(&self) -> (f64, u32) {
        let (experts, bytes) = (f64::from(self.experts.max(1)), self.weight_bytes());
        if experts * bytes * f64::from(self.tokens.max(1)) < CODES_ALONE {
            return (1.0, 1);
        }
        // Gate and up of every expert are parts of their own, and so are rows of all experts' down together.
        let (up, down) = (
            self.experts.max(1) * parts(2.0 / 3.0 * bytes),
            parts(experts * bytes / 3.0),
        );
        let (of_up, threads) = shared(up, self.threads);
        let (of_down, others) = shared(down, self.threads);
        ((2.0 * of_up + of_down) / 3.0, threads.max(others))
    }

    /// Threads that the engine puts to work.
    pub fn working_threads(&self) -> u32 {
        self.shared().1
    }

    pub(super) fn features(&self) -> Features {
        let (share, threads) = self.shared();
        let (passes, room) = panels(self.tokens.max(1));
        let experts = f64::from(self.experts.max(1));
        let (n, h, i) = (
            f64::from(self.tokens.max(1)),
            f64::from(self.hidden),
            f64::from(self.inner),
        );
        let (mut weights, mut rows, mut groups) = (0.0, 0.0, 0.0);
        for (r, c) in self.matrices() {
            let (w, r, g) = padded(r, c, self.group);
            weights += w;
            rows += r;
            groups += if self.bits == 16 { 0.0 } else { g };
        }
        let family = Family::Expert {
            codes: self.bits != 16,
            heat: self.heat,
        };
        let each = share * experts;
        // Gate with up, down; of two factors the right ones before them.
        let calls = if self.rank == 0 { 2.0 } else { 5.0 };
        Features::new(
            family,
            threads,
            &[
                (Term::Call, 1.0),
                (Term::KernelCalls, if threads > 1 { calls } else { 0.0 }),
                (unpacked(self.bits, self.planes), each * passes * weights / 1e6),
                (Term::MegaMacsPointwise, each * room * weights / 1e6),
                (Term::KiloRows, each * passes * rows / 1e3),
                (Term::KiloGroups, each * passes * groups / 1e3),
                // Tokens in and out once, the middle of each expert.
                (Term::ActivationKib, n * 4.0 * (h + experts * (2.0 * i + h)) / 1024.0),
                // Threads share the memory: all bytes, not those of one thread.
                (Term::WeightKib, experts * self.weight_bytes() / 1024.0),
            ],
        )
    }
}

impl DenseKey {
    /// What its weights are.
    pub fn form(&self) -> Form {
        match self.bits {
            32.. => Form::F32,
            16..32 => Form::Half,
            _ => Form::Codes,
        }
    }

    /// Bytes of its weights and scales (reference 2.3).
    pub fn weight_bytes(&self) -> f64 {
        let (n, k) = (f64::from(self.outputs), f64::from(self.inputs));
        let scales = match self.form() {
            Form::Codes => 2.0 * n * f64::from(self.inputs.div_ceil(self.group.max(1))),
            Form::F32 | Form::Half => 0.0,
        };
        n * k * f64::from(self.bits) / 8.0 + scales
    }

    /// The busiest thread's share, and how many the engine puts to work.
    fn shared(&self) -> (f64, u32) {
        let tokens = self.tokens.max(1);
        let is_little = match self.form() {
            Form::Codes => self.weight_bytes() * f64::from(tokens) < CODES_ALONE,
            Form::F32 | Form::Half => {
                u64::from(tokens) * u64::from(self.inputs) * u64::from(self.outputs) < FLOATS_ALONE
            }
        };
        let parts = match self.form() {
            Form::Codes => parts(self.weight_bytes()),
            Form::F32 | Form::Half => self.outputs.div_ceil(FLOATS_PART),
        };
        shared(parts, if is_little { 1 } else { self.threads })
    }

    pub(super) fn features(&self) -> Features {
        let tokens = self.tokens.max(1);
        let (share, threads) = self.shared();
        let is_coded = self.form() == Form::Codes;
        let (passes, room) = if is_coded {
            panels(tokens)
        } else {
            // More tokens: weights are widened once.
            (
                if tokens > PASS_TOKENS { 1.0 } else { passes(tokens) },
                f64::from(tokens),
            )
        };
        let (n, k, m) = (f64::from(tokens), f64::from(self.inputs), f64::from(self.outputs));
        let (weights, rows, groups) = if is_coded {
            padded(self.outputs, self.inputs, self.group)
        } else {
            (k * m, m, 0.0)
        };
        Features::new(
            Family::Dense {
                form: self.form(),
                // Another way through.
                many: !is_coded && tokens > PASS_TOKENS,
                heat: self.heat,
            },
            threads,
            &[
                (Term::Call, 1.0),
                (Term::KernelCalls, if threads > 1 { 1.0 } else { 0.0 }),
                (
                    if is_coded {
                        unpacked(self.bits, 1)
                    } else {
                        Term::MegaWeights
                    },
                    share * passes * weights / 1e6,
                ),
                (Term::MegaMacsPointwise, share * room * weights / 1e6),
                (Term::KiloRows, share * passes * rows / 1e3),
                (Term::KiloGroups, share * passes * groups / 1e3),
                (Term::ActivationKib, n * 4.0 * (k + m) / 1024.0),
                (Term::WeightKib, self.weight_bytes() / 1024.0),
            ],
        )
    }
}

impl AttentionKey {
    /// Bytes of keys and values that one sequence's last token reads.
    pub fn cache_bytes(&self) -> f64 {
        let (width, rows) = if self.values_in_keys {
            (self.head_dim, 1.0)
        } else {
            (self.head_dim + self.value_dim, 2.0)
        };
        let scales = if self.kv_bits == 8 { 4.0 * rows } else { 0.0 };
        let bytes = f64::from(self.kv_bits) / 8.0 * f64::from(width) + scales;
        bytes * f64::from(self.keys) * f64::from(self.kv_heads)
    }

    pub(super) fn features(&self) -> Features {
        let (tokens, sequences) = (self.tokens.clamp(1, self.keys.max(1)), self.sequences.max(1));
        let blocks = tokens.div_ceil(QUERY_BLOCK);
        // A job has one key head: a lone query's sees some keys, a block's all.
        let chunks = self.keys.max(1).div_ceil(KEY_CHUNK);
        let jobs = sequences * self.kv_heads.max(1) * if tokens == 1 { chunks } else { blocks };
        let (n, past) = (f64::from(tokens), f64::from(self.keys.max(tokens) - tokens));
        let seen = f64::from(sequences) * (n * past + n * (n + 1.0) / 2.0);
        let both = f64::from(self.head_dim) + f64::from(self.value_dim);
        let macs = seen * f64::from(self.heads) * both;
        let (share, threads) = shared(jobs, if macs < ATTENTION_ALONE { 1 } else { self.threads });
        // Queries of a group meet the same keys together, a few at a time.
        let group = self.heads.max(1).div_ceil(self.kv_heads.max(1));
        let meets = passes(group.saturating_mul(tokens.min(QUERY_BLOCK)));
        let key_reads = seen / n * f64::from(blocks) * f64::from(self.kv_heads) * both;
        let width = f64::from(self.heads) * both;
        let kv_width = f64::from(self.kv_heads) * both;
        let rows = f64::from(sequences) * n;
        Features::new(
            Family::Attention {
                kv_bits: self.kv_bits,
                heat: self.heat,
            },
            threads,
            &[
                (Term::Call, 1.0),
                (Term::KernelCalls, if threads > 1 { 1.0 } else { 0.0 }),
                (
                    Term::KiloRows,
                    share * f64::from(jobs) * f64::from(if tokens == 1 { 1 } else { chunks }) / 1e3,
                ),
                (Term::MegaMacs, share * macs / 1e6),
                (Term::MegaWeights, share * meets * key_reads / 1e6),
                (Term::KiloScores, share * seen * f64::from(self.heads) / 1e3),
                (Term::ActivationKib, rows * 4.0 * (width + 2.0 * kv_width) / 1024.0),
                (
                    Term::WeightKib,
                    f64::from(sequences * blocks) * self.cache_bytes() / 1024.0,
                ),
            ],
        )
    }
}

impl GlueKey {
    pub(super) fn features(&self) -> Features {
        let (n, h) = (f64::from(self.tokens.max(1)), f64::from(self.hidden));
        Features::new(
            Family::Glue,
            // No thread shares this work, however many there are.
            1,
            &[
                (Term::Call, 1.0),
                (Term::ActivationKib, n * 4.0 * GLUE_PASSES * h / 1024.0),
                // One exponential each.
                (
                    Term::KiloScores,
                    n * (f64::from(self.experts) + f64::from(self.inner)) / 1e3,
                ),
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::work::{Block, Key};

    pub(crate) fn expert() -> ExpertKey {
        ExpertKey {
            hidden: 512,
            inner: 256,
            bits: 4,
            planes: 1,
            group: 32,
            rank: 0,
            experts: 1,
            tokens: 1,
            threads: 1,
            heat: Heat::Cold,
        }
    }

    #[test]
    fn bytes_of_an_expert_follow_the_formula() {
        // 4 bits and a 16-bit scale per 32 weights: 4.5 bits each.
        assert!((expert().weight_bytes() - 3.0 * 512.0 * 256.0 * 4.5 / 8.0).abs() < 1e-9);
        let half = ExpertKey { bits: 16, ..expert() };
        assert!((half.weight_bytes() - 3.0 * 512.0 * 256.0 * 2.0).abs() < 1e-9);
        // Two factors of rank r: r·(rows + columns) weights each.
        let factors = ExpertKey { rank: 64, ..expert() };
        assert!((factors.weight_bytes() - 3.0 * 64.0 * (512.0 + 256.0) * 4.5 / 8.0).abs() < 1e-9);
    }

    #[test]
    fn what_is_little_is_one_threads_work() {
        let large = ExpertKey {
            threads: 2,
            hidden: 2048,
            inner: 1024,
            ..expert()
        };
        assert_eq!(large.working_threads(), 2);
        let small = ExpertKey {
            threads: 2,
            hidden: 64,
            inner: 32,
            experts: 4,
            ..expert()
        };
        assert_eq!(small.working_threads(), 1);
        // Three parts for two threads: one of them has two.
        assert_eq!((shared(3, 2), shared(1, 2)), ((2.0 / 3.0, 2), (1.0, 1)));
        assert_eq!(
            [0, 1, 3, 9, 12, 15, 25].map(panels),
            [
                (0.0, 0.0),
                (1.0, 1.0),
                (1.0, 4.0),
                (1.0, 12.0),
                (1.0, 12.0),
                (2.0, 16.0),
                (3.0, 25.0)
            ]
        );
    }

    proptest! {
        /// Law: every count grows with every size but tokens (eight are one pass, seven are three), within a path.
        #[test]
        fn features_are_monotone_within_a_path(
            (hidden, inner, rank, experts, tokens) in (32u32..3000, 32u32..2000, 0u32..200, 1u32..9, 1u32..9),
            grow in 0usize..5, by in 1u32..200, bits in prop::sample::select(vec![2u32, 3, 4, 8, 16]),
        ) {
            let small = ExpertKey { hidden, inner, rank, experts, tokens, bits, ..expert() };
            let mut large = small;
            match grow {
                0 => large.hidden += by,
                1 => large.inner += by,
                2 if rank > 0 => large.rank += by,
                3 => large.tokens = 8 * tokens,
                _ => large.experts += by,
            }
            let (a, b) = (Key::Expert(small).features(Block(16)), Key::Expert(large).features(Block(16)));
            prop_assert_eq!(a.path, b.path);
            for (x, y) in a.terms().iter().zip(b.terms()) {
                prop_assert!(y.1 >= x.1, "{:?} {:?}", x, y);
            }
        }

        #[test]
        fn dense_and_attention_are_monotone(
            (inputs, outputs, tokens, keys) in (1u32..4000, 1u32..9000, 1u32..600, 1u32..3000), grow in 0usize..4, by in 1u32..500,
        ) {
            let dense = DenseKey { inputs, outputs, bits: 32, group: 0, tokens, threads: 1, heat: Heat::Cold };
            let attention = AttentionKey { heads: 8, kv_heads: 2, head_dim: 64, value_dim: 64, values_in_keys: false, kv_bits: 32, keys, tokens: 1, sequences: 1, threads: 1, heat: Heat::Hot };
            let (mut wide, mut long) = (dense, attention);
            match grow {
                0 => wide.inputs += by,
                1 => wide.outputs += by,
                2 if tokens > PASS_TOKENS => wide.tokens += by,
                _ => long.keys += by,
            }
            for (a, b) in [(Key::Dense(dense), Key::Dense(wide)), (Key::Attention(attention), Key::Attention(long))] {
                let (a, b) = (a.features(Block(16)), b.features(Block(16)));
                prop_assert_eq!(a.path, b.path);
                for (x, y) in a.terms().iter().zip(b.terms()) {
                    prop_assert!(y.1 >= x.1 - 1e-12, "{:?} {:?}", x, y);
                }
            }
        }
    }
}
