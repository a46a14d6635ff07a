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
/// Rows of codes that lie together, columns that they are padded to.
const BLOCK_ROWS: u32 = 16;
const STEP: u32 = 32;
/// Bytes of codes of one part of the work when few tokens meet them, when many do, and from how many on.
const STREAM_BYTES: u32 = 64 << 10;
const CACHED_BYTES: u32 = 256 << 10;
const MANY_TOKENS: u32 = 16;
/// Pairs of a token and an expert beyond which the parts of the last matrix are single blocks.
const MANY_PAIRS: u32 = 64;
/// Bytes of codes times tokens below which one thread runs all of it.
const CODES_ALONE: f64 = 49_152.0;
/// Bytes of a matrix of floats, once per eight tokens, up to which one thread runs it, and outputs of one part of it.
const FLOATS_ALONE: f64 = 262_144.0;
const FLOATS_PART: u32 = 128;
/// Bytes of a row of floats up to which sixteen of them side by side are one run, and from which each is its own.
const SHORT_ROW: f64 = 256.0;
const LONG_ROW: f64 = 1024.0;
/// Rows of f32 a multiple of so many apart fall on the same lines of a cache.
const ALIASED_FLOATS: u32 = 512;
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

/// How much a row of so many bytes is a run of its own: a block of short rows is one run of memory.
fn scattered(row_bytes: f64) -> f64 {
    ((row_bytes - SHORT_ROW) / (LONG_ROW - SHORT_ROW)).clamp(0.0, 1.0)
}

/// The busiest thread's share of so many equal parts, and how many threads have any.
fn shared(parts: u32, threads: u32) -> (f64, u32) {
    let (parts, threads) = (parts.max(1), threads.max(1));
    let busy = parts.min(threads);
    (f64::from(parts.div_ceil(busy)) / f64::from(parts), busy)
}

/// Bytes of a block of rows of codes, scales included.
fn block_bytes(columns: u32, bits: u32, group: u32) -> u32 {
    let codes = columns
        .div_ceil(STEP)
        .saturating_mul(STEP * BLOCK_ROWS / 8)
        .saturating_mul(bits);
    let scales = if bits == 16 { 0 } else { columns.div_ceil(group.max(1)) };
    codes.saturating_add(scales.saturating_mul(2 * BLOCK_ROWS))
}

/// How many blocks (of so many bytes) one part has.
fn blocks_of_a_part(block_bytes: u32, tokens: u32) -> u32 {
    let bytes = if tokens < MANY_TOKENS {
        STREAM_BYTES
    } else {
        CACHED_BYTES
    };
    (bytes / block_bytes.max(1)).max(1)
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

/// How a call is cut into parts that threads take.
#[derive(Debug, Clone, Copy, Default)]
struct Cut {
    threads: u32,
    /// Calls of the team.
    calls: f64,
    weights: f64,
    /// Weights of the busiest thread.
    busiest: f64,
}

impl Cut {
    /// So many equal parts for so many threads, with so many weights in all.
    fn add(&mut self, parts: u32, team: u32, weights: f64) {
        self.add_all(1, parts, team, weights);
    }

    /// The same several times, one after the other.
    fn add_all(&mut self, times: u32, parts: u32, team: u32, weights: f64) {
        let (share, threads) = shared(parts, team);
        let times = f64::from(times);
        self.threads = self.threads.max(threads);
        self.calls += if team > 1 { times } else { 0.0 };
        self.weights += times * weights;
        self.busiest += times * share * weights;
    }

    /// The busiest thread's share of all.
    fn share(&self) -> f64 {
        if self.weights > 0.0 {
            self.busiest / self.weights
        } else {
            1.0
        }
    }
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

    /// How the engine cuts it up.
    fn cut(&self) -> Cut {
        let (experts, tokens) = (self.experts.max(1), self.tokens.max(1));
        let is_little = f64::from(experts) * self.weight_bytes() * f64::from(tokens) < CODES_ALONE;
        let team = if is_little { 1 } else { self.threads.max(1) };
        let mut cut = Cut::default();
        let weights = |rows: u32, columns: u32| f64::from(rows) * f64::from(columns);
        // Of two factors the left ones, and all of a whole matrix: gate with up of every expert, parts of its own each.
        let (of_up, of_down) = if self.rank == 0 {
            (self.hidden, self.inner)
        } else {
            (self.rank, self.rank)
        };
        let step = block_bytes(of_up, self.bits, self.group).saturating_mul(2 * STEP / BLOCK_ROWS);
        let up = self.inner.div_ceil(STEP).div_ceil(blocks_of_a_part(step, tokens));
        let each = f64::from(experts);
        cut.add(
            experts.saturating_mul(up),
            team,
            2.0 * each * weights(self.inner, of_up),
        );
        // Of each expert's down as long a stream as any.
        let block = block_bytes(of_down, self.bits, self.group);
        let blocks = if experts.saturating_mul(tokens) > MANY_PAIRS {
            1
        } else {
            blocks_of_a_part(block, 1)
        };
        let down = self.hidden.div_ceil(BLOCK_ROWS.saturating_mul(blocks));
        cut.add(down, team, each * weights(self.hidden, of_down));
        if self.rank > 0 {
            // The right factors, one after the other: each is little or not by itself.
            for (columns, count) in [(self.hidden, experts.saturating_mul(2)), (self.inner, experts)] {
                let block = block_bytes(columns, self.bits, self.group);
                let blocks = self.rank.div_ceil(BLOCK_ROWS);
                let is_little = f64::from(block) * f64::from(blocks) * f64::from(tokens) < CODES_ALONE;
                let parts = blocks.div_ceil(blocks_of_a_part(block, tokens));
                let team = if is_little { 1 } else { team };
                cut.add_all(count, parts, team, weights(self.rank, columns));
            }
        }
        cut
    }

    /// Threads that the engine puts to work.
    pub fn working_threads(&self) -> u32 {
        self.cut().threads
    }

    pub(super) fn features(&self) -> Features {
        let cut = self.cut();
        let (share, threads) = (cut.share(), cut.threads);
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
        Features::new(
            family,
            threads,
            &[
                (Term::Call, 1.0),
                (Term::KernelCalls, cut.calls),
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

    /// How the engine cuts it up.
    fn cut(&self) -> Cut {
        let tokens = self.tokens.max(1);
        let (parts, is_little) = match self.form() {
            Form::Codes => {
                let block = block_bytes(self.inputs, self.bits, self.group);
                let blocks = self.outputs.div_ceil(BLOCK_ROWS);
                (
                    blocks.div_ceil(blocks_of_a_part(block, tokens)),
                    f64::from(blocks) * f64::from(block) * f64::from(tokens) < CODES_ALONE,
                )
            }
            Form::F32 | Form::Half => (
                self.outputs.div_ceil(FLOATS_PART),
                self.weight_bytes() * f64::from(tokens.div_ceil(PASS_TOKENS)) <= FLOATS_ALONE,
            ),
        };
        let mut cut = Cut::default();
        let weights = f64::from(self.inputs) * f64::from(self.outputs);
        cut.add(parts, if is_little { 1 } else { self.threads.max(1) }, weights);
        cut
    }

    pub(super) fn features(&self) -> Features {
        let tokens = self.tokens.max(1);
        let cut = self.cut();
        let (share, threads) = (cut.share(), cut.threads);
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
        // Another way through.
        let many = !is_coded && tokens > PASS_TOKENS;
        let row_bytes = k * f64::from(self.bits) / 8.0;
        // Many tokens meet f32 rows, widened or not, several at a time.
        let is_aliased = many && self.inputs.is_multiple_of(ALIASED_FLOATS);
        Features::new(
            Family::Dense {
                form: self.form(),
                many,
                heat: self.heat,
            },
            threads,
            &[
                (Term::Call, 1.0),
                (Term::KernelCalls, cut.calls),
                (
                    if is_coded {
                        unpacked(self.bits, 1)
                    } else {
                        Term::MegaWeights
                    },
                    share * passes * weights / 1e6,
                ),
                (Term::MegaMacsPointwise, share * room * weights / 1e6),
                (
                    Term::MegaMacsStrided,
                    if is_aliased { share * room * weights / 1e6 } else { 0.0 },
                ),
                (Term::KiloRows, share * passes * rows / 1e3),
                (Term::KiloGroups, share * passes * groups / 1e3),
                (Term::ActivationKib, n * 4.0 * (k + m) / 1024.0),
                (Term::WeightKib, self.weight_bytes() / 1024.0),
                // Rows of floats lie one after the other, and a block of them is read side by side.
                (
                    Term::KiloRuns,
                    if is_coded { 0.0 } else { m * scattered(row_bytes) / 1e3 },
                ),
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

    #[test]
    fn work_is_cut_as_the_engine_cuts_it() {
        // OLMoE at 4 bits: 2048 columns are 18,432 bytes a block of 16 rows, two of gate and two of up more than a part
        // should have: a part for each 32 of 1,024 inner channels and of each expert.
        let olmoe = ExpertKey {
            hidden: 2048,
            inner: 1024,
            experts: 8,
            threads: 2,
            ..expert()
        };
        assert_eq!(block_bytes(2048, 4, 32), 16 * (2048 / 2 + 2 * 64));
        assert_eq!((olmoe.cut().threads, olmoe.cut().calls), (2, 2.0));
        // Down: 19 parts of seven blocks, ten of them on one thread.
        assert!((olmoe.cut().share() - (2.0 / 3.0 * 0.5 + 1.0 / 3.0 * (10.0 / 19.0))).abs() < 1e-12);
        // Three experts of one part each on two threads: one thread has two of them; all of down is one part.
        let small = ExpertKey {
            hidden: 512,
            inner: 32,
            experts: 3,
            threads: 2,
            ..expert()
        };
        let up = 2.0 * 3.0 * 512.0 * 32.0;
        let cut = small.cut();
        assert_eq!((cut.threads, cut.weights), (2, 1.5 * up));
        assert!((cut.busiest - (2.0 / 3.0 * up + 0.5 * up)).abs() < 1e-6, "{cut:?}");
        // Right factors of a small rank are one thread's work, three of each expert, whatever the others do.
        let thin = ExpertKey { rank: 16, ..olmoe };
        let serial = 8.0 * 16.0 * (2.0 * 2048.0 + 1024.0);
        let cut = thin.cut();
        assert!((cut.weights - 8.0 * 3.0 * 16.0 * 3072.0).abs() < 1e-6, "{cut:?}");
        assert!(cut.busiest >= serial + 0.5 * (cut.weights - serial) - 1e-6, "{cut:?}");
        // All weights are somebody's.
        for key in [olmoe, small, thin] {
            let whole: f64 = key.matrices().iter().map(|(r, c)| f64::from(*r) * f64::from(*c)).sum();
            assert!((key.cut().weights - f64::from(key.experts) * whole).abs() < 1e-6);
        }
        // Floats: by bytes, once per eight tokens.
        let dense = DenseKey {
            inputs: 1024,
            outputs: 64,
            bits: 32,
            group: 0,
            tokens: 8,
            threads: 2,
            heat: Heat::Hot,
        };
        assert_eq!(dense.cut().threads, 1);
        let outputs = 256;
        assert_eq!(DenseKey { outputs, ..dense }.cut().threads, 2);
        assert_eq!(
            DenseKey {
                bits: 16,
                outputs: 128,
                ..dense
            }
            .cut()
            .threads,
            1
        );
        assert_eq!(
            [100.0, 256.0, 640.0, 1024.0, 8192.0].map(scattered),
            [0.0, 0.0, 0.5, 1.0, 1.0]
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
