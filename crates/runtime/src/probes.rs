//! The engine's operators for `cotk profile`, each run as a decoder layer runs it: experts side by side, dense matrices,
//! attention over a cache, what is left of a layer. No clock here: that is `cotk_latency::probe`'s. Cold keys rotate over
//! more memory than the caches hold, hot ones over a part of the last-level cache (one expert again and again is nothing
//! that a model does).

use std::collections::BTreeMap;
use std::sync::Arc;

use cotk_kernels::cpu::noise::{self, NoiseExpert, NoiseShape, Width};
use cotk_latency::probe::{Prepared, Probe, refused};
use cotk_latency::work::{AttentionKey, DenseKey, ExpertKey, GlueKey, Heat, Key};
use cotk_model::layers::attention::{Heads, Rows, Span};
use cotk_model::layers::cache::{KvKind, LayerCache};
use cotk_model::layers::linear::Linear;
use cotk_model::layers::norm::rms_norm;
use cotk_model::layers::rope::Rope;
use cotk_model::layers::router::softmax;
use cotk_model::layers::silu;
use cotk_model::moe::{Alive, RouterScores, RoutingRule, route};
use cotk_run::seeds::Stream;
use rand::RngExt;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::mix::{Cpu, run_groups};
use crate::synthetic;

/// Least bytes that a cold key rotates over: beyond most last-level caches even where their size is not known.
const LEAST_BYTES: usize = 64 << 20;
/// Most, unless one call takes more.
const MOST_BYTES: usize = 256 << 20;
/// Most that one call may take.
const CALL_BYTES: usize = 3 << 29;
/// Bytes that a hot key rotates over where the cache is not known.
const HOT_BYTES: usize = 4 << 20;

/// Measures experts, dense matrices, attention and the rest of a layer.
pub struct EngineProbe {
    cpu: Cpu,
    threads: Vec<u32>,
    pools: BTreeMap<u32, Arc<ThreadPool>>,
    cache_bytes: u64,
}

/// What one call does.
type Call = Box<dyn FnMut() + Send>;

impl EngineProbe {
    /// For these numbers of threads; `cache_bytes` is the largest cache, 0 if not known.
    ///
    /// # Errors
    /// [`cotk_latency::Error::Probe`]: a thread pool that cannot be started.
    pub fn new(cpu: Cpu, threads: Vec<u32>, cache_bytes: u64) -> cotk_latency::Result<Self> {
        let mut pools = BTreeMap::new();
        for &count in &threads {
            let pool = ThreadPoolBuilder::new().num_threads(count.max(1) as usize).build();
            let pool = pool.map_err(|e| refused("engine", &Key::Session { threads: count }, &e.to_string()))?;
            pools.insert(count, Arc::new(pool));
        }
        Ok(Self {
            cpu,
            threads,
            pools,
            cache_bytes,
        })
    }

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
                    keys.push(expert((2048, 768, 8, Heat::Cold)));
                }
            }
            let dense = |(inputs, outputs, heat): (u32, u32, Heat)| {
                Key::Dense(DenseKey {
                    inputs,
                    outputs,
                    bits: 32,
                    group: 0,
                    tokens: 1,
                    threads,
                    heat,
                })
            };
            let shapes = [
                (256, 256, Heat::Hot),
                (256, 4096, Heat::Hot),
                (512, 2048, Heat::Cold),
                (2048, 64, Heat::Cold),
                (2048, 512, Heat::Cold),
                (2048, 2048, Heat::Cold),
                (2048, 8192, Heat::Cold),
                (5632, 2048, Heat::Cold),
                // Heads: often the largest matrix that a step reads.
                (2048, 50_304, Heat::Cold),
                (2048, 151_936, Heat::Cold),
            ];
            keys.extend(shapes.map(dense));
            for (inputs, outputs, tokens) in [(512, 2048, 8), (512, 2048, 64), (2048, 2048, 16), (2048, 512, 128)] {
                keys.push(Key::Dense(DenseKey {
                    inputs,
                    outputs,
                    bits: 32,
                    group: 0,
                    tokens,
                    threads,
                    heat: Heat::Cold,
                }));
            }
            let attention = |(heads, kv_heads, head_dim, tokens, heat): (u32, u32, u32, u32, Heat)| {
                Key::Attention(AttentionKey {
                    heads,
                    kv_heads,
                    head_dim,
                    value_dim: head_dim,
                    values_in_keys: false,
                    kv_bits: 32,
                    keys: tokens,
                    tokens: 1,
                    sequences: 1,
                    threads,
                    heat,
                })
            };
            let shapes = [
                (8, 4, 32, 64, Heat::Hot),
                (8, 4, 32, 512, Heat::Hot),
                (16, 16, 128, 128, Heat::Cold),
                (16, 16, 128, 512, Heat::Cold),
                (32, 4, 128, 256, Heat::Cold),
                (32, 8, 64, 1024, Heat::Cold),
            ];
            // One query block is one thread's work.
            if threads == 1 {
                keys.extend(shapes.map(attention));
            }
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

    /// One key of the distribution of use. What does not fit the part of the cache that hot keys have is cold.
    fn draw(&self, rng: &mut Stream) -> Key {
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
            12..17 => Key::Dense(DenseKey {
                inputs: 16 * log_uniform(rng, 8, 385),
                outputs: 8 * log_uniform(rng, 4, 1025),
                bits: 32,
                group: 0,
                tokens: if tokens > 8 { 8 * tokens } else { tokens },
                threads,
                heat,
            }),
            17..19 => {
                let kv_heads = [2, 4, 8, 16][rng.random_range(0..4)];
                let keys = log_uniform(rng, 8, 2049);
                // Decoding, or a prefill from nothing.
                let is_prefill = tokens > 8;
                let keys = if is_prefill { keys.min(512) } else { keys };
                let head_dim = [32, 64, 128][rng.random_range(0..3)];
                Key::Attention(AttentionKey {
                    heads: kv_heads * [1, 1, 2, 4][rng.random_range(0..4)],
                    kv_heads,
                    head_dim,
                    value_dim: head_dim,
                    values_in_keys: false,
                    kv_bits: 32,
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

impl Probe for EngineProbe {
    fn name(&self) -> &str {
        "engine"
    }

    fn candidates(&self, count: usize, rng: &mut Stream) -> Vec<Key> {
        let mut keys = self.seeds();
        while keys.len() < count {
            keys.push(self.draw(rng));
        }
        keys.truncate(count);
        keys
    }

    fn measures(&self, key: &Key) -> bool {
        match key {
            Key::Expert(e) => Width::find(e.bits, e.planes).is_some() && self.pools.contains_key(&e.threads),
            Key::Dense(DenseKey { threads, .. }) | Key::Attention(AttentionKey { threads, .. }) => {
                self.pools.contains_key(threads)
            }
            Key::Glue(_) => true,
            _ => false,
        }
    }

    fn prepare(&self, key: &Key, session: u32) -> cotk_latency::Result<Box<dyn Prepared>> {
        let wrong = |detail: String| refused(self.name(), key, &detail);
        let (call, threads) = match key {
            Key::Expert(e) => (self.experts(e, session).map_err(wrong)?, e.threads),
            Key::Dense(d) => (self.dense(d, session).map_err(wrong)?, d.threads),
            Key::Attention(a) => (self.attention(a, session).map_err(wrong)?, a.threads),
            Key::Glue(g) => (glue(g), g.threads),
            _ => return Err(wrong("not an operator of the engine".to_owned())),
        };
        let pool = match self.pools.get(&threads) {
            Some(pool) => pool.clone(),
            None => {
                let pool = ThreadPoolBuilder::new().num_threads(threads.max(1) as usize).build();
                Arc::new(pool.map_err(|e| wrong(e.to_string()))?)
            }
        };
        Ok(Box::new(Ready::new(pool, threads, call, expected_us(key))))
    }
}

/// Roughly: decides how many calls make one piece, nothing else.
fn expected_us(key: &Key) -> f64 {
    let (bytes, macs) = match *key {
        Key::Expert(e) => {
            let n = f64::from(e.experts);
            (
                n * e.weight_bytes(),
                n * f64::from(e.tokens) * 3.0 * f64::from(e.hidden) * f64::from(e.inner),
            )
        }
        Key::Dense(d) => (d.weight_bytes(), f64::from(d.tokens) * d.weight_bytes() / 4.0),
        Key::Attention(a) => {
            let sequences = f64::from(a.sequences) * f64::from(a.tokens);
            (
                f64::from(a.sequences) * a.cache_bytes(),
                sequences * f64::from(a.keys) * f64::from(a.heads * a.head_dim),
            )
        }
        Key::Glue(g) => (
            48.0 * f64::from(g.hidden),
            f64::from(g.tokens) * 20.0 * f64::from(g.inner + g.experts),
        ),
        _ => (0.0, 0.0),
    };
    2.0 + bytes / 30e3 + macs / 60e3
}

impl EngineProbe {
    /// How many copies of something a key rotates over.
    fn copies(&self, bytes: usize, heat: Heat) -> usize {
        let cache = usize::try_from(self.cache_bytes).unwrap_or(MOST_BYTES);
        let over = match heat {
            Heat::Cold => (4 * cache).clamp(LEAST_BYTES, MOST_BYTES),
            Heat::Hot if cache == 0 => HOT_BYTES,
            Heat::Hot => cache / 4,
        };
        match heat {
            // What is larger than all caches evicts itself.
            Heat::Cold if bytes >= over => 1,
            Heat::Cold => over.div_ceil(bytes.max(1)).max(2),
            Heat::Hot => (over / bytes.max(1)).max(1),
        }
    }

    fn experts(&self, key: &ExpertKey, session: u32) -> Result<Call, String> {
        let width = Width::find(key.bits, key.planes).ok_or("no kernel reads this width")?;
        let shape = NoiseShape {
            hidden: key.hidden as usize,
            inner: key.inner as usize,
            width,
            group: key.group as usize,
            rank: key.rank as usize,
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "compared with a limit"
        )]
        let call_bytes = (key.weight_bytes() * f64::from(key.experts)) as usize;
        if call_bytes > CALL_BYTES {
            return Err(format!("{call_bytes} bytes a call, at most {CALL_BYTES}"));
        }
        let one = NoiseExpert::new(&shape, u64::from(session)).map_err(|e| e.to_string())?;
        let (count, tokens) = (key.experts.max(1) as usize, key.tokens.max(1) as usize);
        let copies = self
            .copies(one.len(), key.heat)
            .max(count * if key.heat == Heat::Cold { 2 } else { 1 });
        let experts: Vec<NoiseExpert> = (0..copies).map(|_| one.again()).collect();
        let hidden: Vec<f32> = noise_floats(tokens * shape.hidden);
        let pairs: Vec<Vec<usize>> = (0..count)
            .map(|e| (0..tokens).map(|t| t * count + e).collect())
            .collect();
        let gates = vec![0.1; tokens * count];
        let mut out = vec![0.0; tokens * shape.hidden];
        let (cpu, mut next) = (self.cpu, 0);
        Ok(Box::new(move || {
            let groups: Vec<_> = pairs
                .iter()
                .enumerate()
                .map(|(i, pairs)| (experts[(next + i) % experts.len()].expert(), pairs.as_slice()))
                .collect();
            next = (next + count) % experts.len();
            out.fill(0.0);
            run_groups(cpu, &groups, &hidden, count, &gates, &mut out);
            std::hint::black_box(&out);
        }))
    }

    fn dense(&self, key: &DenseKey, session: u32) -> Result<Call, String> {
        let (inputs, outputs) = (key.inputs as usize, key.outputs as usize);
        let bytes = 4 * inputs * outputs;
        if bytes > CALL_BYTES {
            return Err(format!("{bytes} bytes a call, at most {CALL_BYTES}"));
        }
        let make = |copy: usize| {
            let mut weights = vec![0.0; inputs * outputs];
            noise::floats(&mut weights, (u64::from(session) << 32) + copy as u64);
            Linear::new(weights, outputs, inputs)
        };
        let matrices: Vec<Linear> = (0..self.copies(bytes, key.heat)).map(make).collect();
        let x = noise_floats(key.tokens.max(1) as usize * inputs);
        let mut next = 0;
        Ok(Box::new(move || {
            std::hint::black_box(matrices[next].apply(&x));
            next = (next + 1) % matrices.len();
        }))
    }

    fn attention(&self, key: &AttentionKey, session: u32) -> Result<Call, String> {
        let (tokens, keys) = (key.tokens.clamp(1, key.keys.max(1)) as usize, key.keys.max(1) as usize);
        let (heads, kv_heads, head_dim) = (key.heads as usize, key.kv_heads as usize, key.head_dim as usize);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err("heads that no model has".to_owned());
        }
        let sequences = key.sequences.max(1) as usize;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "compared with a limit"
        )]
        let bytes = (key.cache_bytes() * f64::from(key.sequences.max(1))) as usize;
        if bytes > CALL_BYTES {
            return Err(format!("{bytes} bytes a call, at most {CALL_BYTES}"));
        }
        let mut spec = synthetic::spec("ref-qwen2moe", Some(1))
            .map_err(|e| e.to_string())?
            .attention;
        (spec.heads, spec.kv_heads, spec.head_dim, spec.rope.dim) = (heads, kv_heads, head_dim, head_dim);
        let attention = Heads::new(&spec, None);
        let rope = Rope::new(&spec.rope);
        let rows = |count: usize| Rows {
            queries: noise_floats(count * heads * head_dim),
            keys: noise_floats(count * kv_heads * head_dim),
            values: noise_floats(count * kv_heads * head_dim + session as usize)[session as usize..].to_vec(),
        };
        let mut filled = LayerCache::new(&spec, KvKind::default());
        if keys > tokens {
            let mut span = [Span {
                tokens: keys - tokens,
                cache: &mut filled,
            }];
            attention.attend(&rows(keys - tokens), &mut span);
        }
        let mut caches: Vec<Vec<LayerCache>> = (0..self.copies(bytes, key.heat))
            .map(|_| vec![filled.clone(); sequences])
            .collect();
        let template = rows(sequences * tokens);
        let mut next = 0;
        Ok(Box::new(move || {
            let mut rows = Rows {
                queries: template.queries.clone(),
                keys: template.keys.clone(),
                values: template.values.clone(),
            };
            for (turned, width) in [
                (&mut rows.queries, heads * head_dim),
                (&mut rows.keys, kv_heads * head_dim),
            ] {
                for row in turned.chunks_exact_mut(tokens * width) {
                    rope.turn(row, keys - tokens, width, head_dim);
                }
            }
            let mut spans: Vec<Span<'_>> = caches[next].iter_mut().map(|cache| Span { tokens, cache }).collect();
            std::hint::black_box(attention.attend(&rows, &mut spans));
            for cache in &mut caches[next] {
                cache.truncate(keys - tokens);
            }
            next = (next + 1) % caches.len();
        }))
    }
}

fn noise_floats(count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    noise::floats(&mut values, count as u64);
    values
}

/// Two norms, scores, the choice of experts, an MLP's activation and three sums: what `Layer::forward` does besides.
fn glue(key: &GlueKey) -> Call {
    let (tokens, hidden, inner) = (
        key.tokens.max(1) as usize,
        key.hidden.max(1) as usize,
        key.inner as usize,
    );
    let experts = key.experts.max(1) as usize;
    let mut rule: RoutingRule = synthetic::spec("ref-qwen2moe", Some(1))
        .expect("one of our own shapes")
        .routing;
    (rule.experts, rule.top_k) = (experts, key.top_k.max(1) as usize);
    let (x, weight) = (noise_floats(tokens * hidden), vec![1.0; hidden]);
    let (logits, wide) = (noise_floats(tokens * experts), noise_floats(tokens * inner));
    let mut state = x.clone();
    Box::new(move || {
        let normed = rms_norm(&x, &weight, 1e-6);
        let mixed = rms_norm(&normed, &weight, 1e-6);
        let mut scores = logits.clone();
        softmax(&mut scores, experts);
        let router = RouterScores::new(&scores, &rule).expect("as many scores as experts");
        std::hint::black_box(route(&router, Alive::All));
        let mut activated = wide.clone();
        for (gate, up) in activated.iter_mut().zip(&wide) {
            *gate = silu(*gate) * up;
        }
        std::hint::black_box(&activated);
        state.copy_from_slice(&x);
        for from in [&normed, &mixed, &x] {
            state.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
        std::hint::black_box(&state);
    })
}

/// Calls inside the pool, as a step runs them: entering it wakes a thread and costs as much as a small operator, so that
/// entering it for nothing is timed, too, and taken off.
struct Ready {
    pool: Arc<ThreadPool>,
    threads: u32,
    call: Call,
    /// Calls of the first piece; the second has none.
    times: u32,
    is_long: bool,
}

/// µs of one piece, so that few slices are preempted.
const PIECE_US: f64 = 300.0;
/// µs from which entering the pool does not show.
const LONG_US: f64 = 5000.0;

impl Ready {
    /// `us` is what one call is thought to take.
    fn new(pool: Arc<ThreadPool>, threads: u32, call: Call, us: f64) -> Self {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let times = (PIECE_US / us).ceil().clamp(1.0, 128.0) as u32;
        Self {
            pool,
            threads,
            call,
            times,
            is_long: us >= LONG_US,
        }
    }
}

impl Prepared for Ready {
    fn weights(&self) -> Vec<f64> {
        let share = 1.0 / f64::from(self.times);
        if self.is_long { vec![share] } else { vec![share, -share] }
    }

    fn threads(&self) -> u32 {
        self.threads
    }

    fn run(&mut self, piece: usize) -> cotk_latency::Result<()> {
        let (call, times) = (&mut self.call, if piece == 0 { self.times } else { 0 });
        self.pool.install(|| (0..times).for_each(|_| call()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;

    use super::*;

    #[test]
    fn seeds_hold_every_width_and_kind_and_all_candidates_are_measured() {
        let probe = EngineProbe::new(Cpu::selected().unwrap(), vec![1, 2], 1 << 20).unwrap();
        let seeds = probe.seeds();
        for width in Width::all() {
            let is_it = |k: &Key| matches!(k, Key::Expert(e) if (e.bits, e.planes) == (width.bits(), width.planes()));
            assert!(seeds.iter().any(is_it), "{width:?}");
        }
        let keys = probe.candidates(seeds.len() + 300, &mut Seeds::new(1).stream("probe"));
        assert_eq!(
            (keys.len(), &keys[..seeds.len()]),
            (seeds.len() + 300, seeds.as_slice())
        );
        assert!(keys.iter().all(|key| probe.measures(key)));
        assert!(!probe.measures(&Key::Session { threads: 1 }));
        assert!(probe.prepare(&Key::Session { threads: 1 }, 0).is_err());
    }

    #[test]
    fn small_keys_of_every_kind_run() {
        let probe = EngineProbe::new(Cpu::selected().unwrap(), vec![1, 2], 1 << 20).unwrap();
        let expert = ExpertKey {
            hidden: 64,
            inner: 40,
            bits: 3,
            planes: 1,
            group: 32,
            rank: 16,
            experts: 3,
            tokens: 2,
            threads: 2,
            heat: Heat::Hot,
        };
        let dense = DenseKey {
            inputs: 70,
            outputs: 600,
            bits: 32,
            group: 0,
            tokens: 2,
            threads: 2,
            heat: Heat::Hot,
        };
        let attention = AttentionKey {
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            value_dim: 8,
            values_in_keys: false,
            kv_bits: 32,
            keys: 70,
            tokens: 1,
            sequences: 2,
            threads: 2,
            heat: Heat::Hot,
        };
        let glue = GlueKey {
            hidden: 64,
            experts: 8,
            top_k: 2,
            inner: 30,
            tokens: 2,
            threads: 1,
        };
        for key in [
            Key::Expert(expert),
            Key::Expert(ExpertKey {
                rank: 0,
                bits: 16,
                ..expert
            }),
            Key::Dense(dense),
            Key::Attention(attention),
            Key::Attention(AttentionKey {
                tokens: 70,
                ..attention
            }),
            Key::Glue(glue),
        ] {
            let mut ready = probe.prepare(&key, 0).unwrap();
            let weights = ready.weights();
            // Entering the pool is taken off as often as it is in.
            assert!(weights.len() > 1 && weights.iter().sum::<f64>().abs() < 1e-9, "{key}");
            for piece in 0..weights.len() {
                ready.run(piece).unwrap();
            }
        }
    }
}
