//! Which operators of the engine are measured: sizes that every profile needs, shapes of released models, and draws from the
//! distribution of use. No measuring here. Law: what does not fit the part of the cache that hot keys have is cold.

use std::collections::BTreeMap;

use cotk_kernels::cpu::noise::Width;
use cotk_latency::work::{AttentionKey, Block, DenseKey, ExpertKey, GlueKey, Heat, Key, Path};
use cotk_model::layers::cache::KvKind;
use cotk_run::seeds::Stream;
use rand::RngExt;

use super::{EngineProbe, HOT_BYTES};

/// Bits of a weight and weights per scale of the forms that dense matrices are held in: routers, checkpoints, containers.
const FORMS: [(u32, u32); 3] = [(32, 0), (16, 0), (8, 32)];

/// A matrix of more takes a second to make.
const QUICK_BYTES: f64 = 128e6;

impl EngineProbe {
    /// What every profile needs: each width of experts from memory and from cache, dense matrices, attention and rest, at
    /// sizes between which models lie.
    pub fn seeds(&self) -> Vec<Key> {
        let mut keys = Vec::new();
        for &threads in &self.threads {
            for width in Width::all() {
                let expert = |(hidden, inner, experts, heat): (u32, u32, u32, Heat)| {
                    Key::Expert(ExpertKey {
                        hidden,
                        inner,
                        bits: width.bits(),
                        planes: width.planes(),
                        group: 32,
                        rank: 0,
                        experts,
                        tokens: 1,
                        threads,
                        heat,
                    })
                };
                let shapes = [
                    (1024, 512, 4, Heat::Cold),
                    (2048, 1408, 4, Heat::Cold),
                    (256, 96, 4, Heat::Hot),
                ];
                keys.extend(shapes.map(expert));
                if width.planes() == 1 && [2, 4, 8].contains(&width.bits()) {
                    keys.extend([(2048, 768, 8, Heat::Cold), (2048, 1024, 8, Heat::Cold)].map(expert));
                }
                // A shared expert of codes.
                if (width.bits(), width.planes()) == (8, 1) {
                    keys.push(expert((2048, 5632, 1, Heat::Cold)));
                    keys.push(expert((256, 192, 1, Heat::Hot)));
                }
            }
            let dense = |(inputs, outputs, tokens, heat): (u32, u32, u32, Heat), (bits, group): (u32, u32)| {
                Key::Dense(DenseKey {
                    inputs,
                    outputs,
                    bits,
                    group,
                    tokens,
                    threads,
                    heat,
                })
            };
            for form in FORMS {
                let shapes = [
                    (256, 256, 1, Heat::Hot),
                    (512, 2048, 1, Heat::Cold),
                    (2048, 2048, 1, Heat::Cold),
                    (2048, 8192, 1, Heat::Cold),
                    (2048, 512, 6, Heat::Cold),
                    (512, 2048, 48, Heat::Cold),
                ];
                keys.extend(shapes.map(|shape| dense(shape, form)));
            }
            // Routers; heads: often the largest matrix that a step reads; projections and shared experts of released models.
            keys.extend([64, 128].map(|outputs| dense((2048, outputs, 1, Heat::Cold), (32, 0))));
            keys.extend([50_304, 151_936].map(|outputs| dense((2048, outputs, 1, Heat::Cold), (8, 32))));
            let halves = [
                (2048, 50_304),
                (2048, 151_936),
                (2048, 512),
                (2048, 4096),
                (4096, 2048),
                (2048, 5632),
                (5632, 2048),
            ];
            keys.extend(halves.map(|(inputs, outputs)| dense((inputs, outputs, 1, Heat::Cold), (16, 0))));
            let attention = |(heads, kv_heads, head_dim, keys, tokens, heat): (u32, u32, u32, u32, u32, Heat)| {
                Key::Attention(AttentionKey {
                    heads,
                    kv_heads,
                    head_dim,
                    value_dim: head_dim,
                    values_in_keys: false,
                    kv_bits: KvKind::default().bits(),
                    keys,
                    tokens,
                    sequences: 1,
                    threads,
                    heat,
                })
            };
            let shapes = [
                (8, 4, 32, 64, 1, Heat::Hot),
                (8, 4, 32, 512, 1, Heat::Hot),
                (16, 16, 128, 128, 1, Heat::Cold),
                (16, 16, 128, 512, 1, Heat::Cold),
                (32, 4, 128, 256, 1, Heat::Cold),
                (32, 8, 64, 1024, 1, Heat::Cold),
                (16, 16, 128, 128, 128, Heat::Cold),
            ];
            keys.extend(shapes.map(attention));
        }
        for (hidden, experts, top_k, inner) in [
            (256, 32, 4, 192),
            (1024, 8, 2, 0),
            (2048, 64, 8, 0),
            (2048, 60, 4, 5632),
        ] {
            keys.push(Key::Glue(GlueKey {
                hidden,
                experts,
                top_k,
                inner,
                tokens: 1,
                threads: 1,
            }));
        }
        keys
    }

    /// Every second seed of each kernel path, the first one at least, of what is built in little time: for measurements of a
    /// minute.
    pub fn quick_seeds(&self) -> Vec<Key> {
        let is_small = |key: &Key| match key {
            Key::Dense(d) => d.weight_bytes() <= QUICK_BYTES,
            _ => true,
        };
        let mut seen: BTreeMap<Path, usize> = BTreeMap::new();
        let mut is_wanted = |key: &Key| {
            // No path of the engine depends on the blocks of another runtime.
            let count = seen.entry(key.path(Block(1))).or_default();
            *count += 1;
            *count % 2 == 1
        };
        let mut keys = self.seeds();
        keys.retain(|key| is_small(key) && is_wanted(key));
        keys
    }

    /// One key of the distribution of use. What does not fit the part of the cache that hot keys have is cold.
    pub(super) fn draw(&self, rng: &mut Stream) -> Key {
        let hot_bytes = if self.cache_bytes == 0 {
            HOT_BYTES as u64
        } else {
            self.cache_bytes / 4
        };
        #[expect(clippy::cast_precision_loss, reason = "a size of a cache")]
        let fits = |bytes: f64| bytes <= hot_bytes as f64;
        match self.draw_any(rng) {
            Key::Expert(e) if !fits(e.weight_bytes() * f64::from(e.experts)) => {
                Key::Expert(ExpertKey { heat: Heat::Cold, ..e })
            }
            Key::Dense(d) if !fits(d.weight_bytes()) => Key::Dense(DenseKey { heat: Heat::Cold, ..d }),
            Key::Attention(a) if !fits(a.cache_bytes() * f64::from(a.sequences)) => {
                Key::Attention(AttentionKey { heat: Heat::Cold, ..a })
            }
            other => other,
        }
    }

    fn draw_any(&self, rng: &mut Stream) -> Key {
        let threads = self.threads[rng.random_range(0..self.threads.len())];
        let heat = if rng.random_bool(0.65) { Heat::Cold } else { Heat::Hot };
        let tokens = match rng.random_range(0..10) {
            0..6 => 1,
            6..8 => rng.random_range(2..9),
            _ => log_uniform(rng, 8, 65),
        };
        match rng.random_range(0..20) {
            0..12 => {
                let widths = Width::all();
                let width = widths[rng.random_range(0..widths.len())];
                let (hidden, inner) = (32 * log_uniform(rng, 6, 97), 32 * log_uniform(rng, 2, 57));
                Key::Expert(ExpertKey {
                    hidden,
                    inner,
                    bits: width.bits(),
                    planes: width.planes(),
                    group: [32, 32, 64, 128][rng.random_range(0..4)],
                    rank: if rng.random_bool(0.2) {
                        16 * rng.random_range(1..=hidden.min(inner).div_ceil(32))
                    } else {
                        0
                    },
                    experts: [1, 2, 3, 4, 6, 8][rng.random_range(0..6)],
                    tokens,
                    threads,
                    heat,
                })
            }
            12..17 => {
                let (bits, group) = FORMS[[0, 1, 1, 2, 2, 2][rng.random_range(0..6)]];
                Key::Dense(DenseKey {
                    inputs: 32 * log_uniform(rng, 4, 193),
                    outputs: 16 * log_uniform(rng, 2, 1025),
                    bits,
                    group,
                    tokens: if tokens > 8 { 4 * tokens } else { tokens },
                    threads,
                    heat,
                })
            }
            17..19 => {
                let kv_heads = [2, 4, 8, 16][rng.random_range(0..4)];
                let keys = log_uniform(rng, 8, 2049);
                // Decoding, or a prefill from nothing.
                let is_prefill = tokens > 8;
                let keys = if is_prefill { keys.min(512) } else { keys };
                let head_dim = [32, 64, 128][rng.random_range(0..3)];
                let (own, shared) = (rng.random_range(0..8) > 0, [128, 256, 512][rng.random_range(0..3)]);
                // Latent attention: one key head for all, whose beginning is the value.
                let (kv_heads, head_dim, value_dim, heads) = if own {
                    (
                        kv_heads,
                        head_dim,
                        head_dim,
                        kv_heads * [1, 1, 2, 4][rng.random_range(0..4)],
                    )
                } else {
                    (1, shared + 64, shared, kv_heads)
                };
                Key::Attention(AttentionKey {
                    heads,
                    kv_heads,
                    head_dim,
                    value_dim,
                    values_in_keys: !own,
                    kv_bits: if rng.random_range(0..8) == 0 {
                        [8, 32][rng.random_range(0..2)]
                    } else {
                        KvKind::default().bits()
                    },
                    keys,
                    tokens: if is_prefill { keys } else { 1 },
                    sequences: if is_prefill {
                        1
                    } else {
                        [1, 1, 1, 4][rng.random_range(0..4)]
                    },
                    threads,
                    heat,
                })
            }
            _ => Key::Glue(GlueKey {
                hidden: 32 * log_uniform(rng, 6, 97),
                experts: log_uniform(rng, 4, 129),
                top_k: rng.random_range(1..5),
                inner: if rng.random_bool(0.5) {
                    32 * log_uniform(rng, 4, 177)
                } else {
                    0
                },
                tokens,
                threads: 1,
            }),
        }
    }
}

/// Whole numbers in `low..high`, the logarithm uniform.
fn log_uniform(rng: &mut Stream, low: u32, high: u32) -> u32 {
    let (a, b) = (f64::from(low), f64::from(high));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "inside low..high"
    )]
    let value = (a * (rng.random_range(0.0..1.0) * (b / a).ln()).exp()) as u32;
    value.clamp(low, high - 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::mix::Cpu;

    #[test]
    fn a_quick_profile_has_every_path_of_a_full_ones_seeds() {
        let probe = EngineProbe::new(Cpu::selected().unwrap(), vec![1, 2], 0).unwrap();
        let paths = |keys: &[Key]| -> BTreeSet<Path> { keys.iter().map(|key| key.path(Block(1))).collect() };
        let (all, quick) = (probe.seeds(), probe.quick_seeds());
        assert_eq!(paths(&all), paths(&quick));
        assert!(quick.len() < 2 * all.len() / 3, "{} of {}", quick.len(), all.len());
    }
}
