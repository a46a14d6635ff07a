//! The engine's operators for `cotk profile`, each run as a decoder layer runs it: experts side by side, dense matrices,
//! attention over a cache, what is left of a layer. No clock here: that is `cotk_latency::probe`'s. Cold keys rotate over
//! more memory than the caches hold, hot ones over a part of the last-level cache (one expert again and again is nothing
//! that a model does).

use std::collections::BTreeMap;

use cotk_container::dense::plain_matrix;
use cotk_kernels::cpu::noise::{self, NoiseExpert, NoiseShape, Width};
use cotk_kernels::cpu::team::Team;
use cotk_latency::probe::{Prepared, Probe, refused};
use cotk_latency::work::{AttentionKey, Block, DenseKey, ExpertKey, Form, GlueKey, Heat, Key};
use cotk_model::layers::attention::{Heads, Rows, Span};
use cotk_model::layers::cache::{KvKind, LayerCache};
use cotk_model::layers::linear::Linear;
use cotk_model::layers::norm::rms_norm_to;
use cotk_model::layers::rope::{Angles, Rope};
use cotk_model::layers::router::softmax;
use cotk_model::layers::silu;
use cotk_model::moe::{Alive, Routed, RouterScores, RoutingRule, route_to};
use cotk_model::spec::AttentionKind;
use cotk_run::seeds::Stream;

use crate::mix::{Cpu, run_groups};
use crate::synthetic;

mod draw;

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
    teams: BTreeMap<u32, Team>,
    cache_bytes: u64,
}

/// Draws among which every path should have its keys.
const SPREAD_DRAWS: usize = 3000;

/// What one call does.
type Call = Box<dyn FnMut() + Send>;

impl EngineProbe {
    /// For these numbers of threads; `cache_bytes` is the largest cache, 0 if not known.
    ///
    /// # Errors
    /// None today: threads that the system refuses make a smaller team.
    pub fn new(cpu: Cpu, threads: Vec<u32>, cache_bytes: u64) -> cotk_latency::Result<Self> {
        Ok(Self {
            cpu,
            teams: threads.iter().map(|&count| (count, team(count))).collect(),
            threads,
            cache_bytes,
        })
    }
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

    fn spread(&self, per_path: usize, rng: &mut Stream) -> Vec<Key> {
        let per_path = per_path.div_ceil(2); // all paths of a kernel are fitted together
        let path = |key: &Key| key.path(Block(16)); // paths of ours have no blocks of channels
        let mut counts: BTreeMap<_, usize> = BTreeMap::new();
        for key in self.seeds() {
            *counts.entry(path(&key)).or_default() += 1;
        }
        let mut keys = Vec::new();
        for _ in 0..SPREAD_DRAWS {
            let key = self.draw(rng);
            // A cache of another width than usual is a path of its own, and hardly anybody's.
            let is_usual = !matches!(key, Key::Attention(a) if a.kv_bits != KvKind::default().bits());
            let count = counts.entry(path(&key)).or_default();
            if is_usual && *count < per_path && !keys.contains(&key) {
                *count += 1;
                keys.push(key);
            }
        }
        keys
    }

    fn measures(&self, key: &Key) -> bool {
        match key {
            Key::Expert(e) => Width::find(e.bits, e.planes).is_some() && self.teams.contains_key(&e.threads),
            Key::Dense(DenseKey { threads, .. }) | Key::Attention(AttentionKey { threads, .. }) => {
                self.teams.contains_key(threads)
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
        let team = self.teams.get(&threads).cloned().unwrap_or_else(|| team(threads));
        Ok(Box::new(Ready::new(team, threads, call, expected_us(key))))
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
        Key::Dense(d) => (
            d.weight_bytes(),
            f64::from(d.tokens) * f64::from(d.inputs) * f64::from(d.outputs),
        ),
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
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "compared with a limit"
        )]
        let bytes = key.weight_bytes() as usize;
        if bytes > CALL_BYTES {
            return Err(format!("{bytes} bytes a call, at most {CALL_BYTES}"));
        }
        let seed = u64::from(session) << 32;
        let copies = 0..self.copies(bytes, key.heat);
        // The same weights again and again, each in memory of its own.
        let matrices: Vec<Linear> = match key.form() {
            Form::Codes => {
                let matrix = plain_matrix(outputs, inputs, key.bits).map_err(|e| e.to_string())?;
                if matrix.format.group() != key.group as usize {
                    return Err(format!("groups of {}, not of {}", matrix.format.group(), key.group));
                }
                let plane = noise::matrix(matrix.format, seed).planes.swap_remove(0);
                let made = copies.map(|_| Linear::coded(matrix.clone(), plane.clone()));
                made.collect::<Result<_, _>>().map_err(|e| e.to_string())?
            }
            form => {
                let mut weights = vec![0.0; inputs * outputs];
                noise::floats(&mut weights, seed);
                if form == Form::Half {
                    // bf16: the upper half of an f32.
                    let halves: Vec<u8> = weights
                        .iter()
                        .flat_map(|w| (w.to_bits() >> 16).to_le_bytes()[..2].to_vec())
                        .collect();
                    copies
                        .map(|_| Linear::half(true, halves.clone(), outputs, inputs))
                        .collect()
                } else {
                    copies.map(|_| Linear::new(weights.clone(), outputs, inputs)).collect()
                }
            }
        };
        let tokens = key.tokens.max(1) as usize;
        let (x, mut y) = (noise_floats(tokens * inputs), vec![0.0; tokens * outputs]);
        let mut next = 0;
        Ok(Box::new(move || {
            matrices[next].apply_to(&x, &mut y);
            std::hint::black_box(&y);
            next = (next + 1) % matrices.len();
        }))
    }

    fn attention(&self, key: &AttentionKey, session: u32) -> Result<Call, String> {
        let (tokens, keys) = (key.tokens.clamp(1, key.keys.max(1)) as usize, key.keys.max(1) as usize);
        let (heads, kv_heads, head_dim) = (key.heads as usize, key.kv_heads as usize, key.head_dim as usize);
        let value_dim = key.value_dim as usize;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err("heads that no model has".to_owned());
        }
        let kind = KvKind::ALL.into_iter().find(|kind| kind.bits() == key.kv_bits);
        let kind = kind.ok_or("a cache that the engine does not have")?;
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
        if key.values_in_keys {
            if kv_heads != 1 || value_dim + 2 > head_dim {
                return Err("a latent head that no model has".to_owned());
            }
            spec.rope.dim = (head_dim - value_dim).next_multiple_of(2);
            spec.kind = AttentionKind::Latent {
                q_rank: None,
                kv_rank: head_dim - spec.rope.dim,
                value_dim: spec.rope.dim,
                bias: false,
                norm_eps: 1e-6,
            };
        } else if value_dim != head_dim {
            return Err("values of another width than keys".to_owned());
        }
        let attention = Heads::new(&spec, None);
        let values_of = if key.values_in_keys { 0 } else { kv_heads * value_dim };
        let rows = |count: usize| Rows {
            queries: noise_floats(count * heads * head_dim),
            keys: noise_floats(count * kv_heads * head_dim),
            values: noise_floats(count * values_of + session as usize)[session as usize..].to_vec(),
        };
        let mut filled = LayerCache::new(&spec, kind);
        if keys > tokens {
            let mut span = [Span {
                tokens: keys - tokens,
                cache: &mut filled,
            }];
            attention.attend(&rows(keys - tokens), &mut span);
        }
        let copy = |cache: &LayerCache| {
            let mut cache = cache.clone();
            cache.reserve(tokens);
            cache
        };
        let mut caches: Vec<Vec<LayerCache>> = (0..self.copies(bytes, key.heat))
            .map(|_| (0..sequences).map(|_| copy(&filled)).collect())
            .collect();
        let template = rows(sequences * tokens);
        let mut turned = rows(sequences * tokens);
        let mut angles = Angles::default();
        let positions = (0..sequences).flat_map(|_| keys - tokens..keys);
        Rope::new(&spec.rope).angles(positions, &mut angles);
        let (mut mixed, mut next) = (Vec::new(), 0);
        Ok(Box::new(move || {
            turned.queries.copy_from_slice(&template.queries);
            turned.keys.copy_from_slice(&template.keys);
            angles.turn(&mut turned.queries, heads * head_dim, head_dim);
            angles.turn(&mut turned.keys, kv_heads * head_dim, head_dim);
            let mut spans: Vec<Span<'_>> = caches[next].iter_mut().map(|cache| Span { tokens, cache }).collect();
            attention.attend_to(&turned, spans.as_mut_slice(), &mut mixed);
            std::hint::black_box(&mixed);
            for cache in &mut caches[next] {
                cache.truncate(keys - tokens);
            }
            next = (next + 1) % caches.len();
        }))
    }
}

fn team(threads: u32) -> Team {
    Team::new(threads.max(1) as usize)
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
    let (mut state, mut normed, mut mixed) = (x.clone(), x.clone(), x.clone());
    let (mut scores, mut activated) = (logits.clone(), wide.clone());
    let mut routed = Routed::default();
    Box::new(move || {
        rms_norm_to(&x, &weight, 1e-6, &mut normed);
        rms_norm_to(&normed, &weight, 1e-6, &mut mixed);
        scores.copy_from_slice(&logits);
        softmax(&mut scores, experts);
        let router = RouterScores::new(&scores, &rule).expect("as many scores as experts");
        route_to(&router, Alive::All, &mut routed);
        std::hint::black_box(&routed);
        activated.copy_from_slice(&wide);
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

/// Calls on this thread and its team, as a step makes them: one behind the other, so that the team stays awake.
struct Ready {
    team: Team,
    threads: u32,
    call: Call,
    times: u32,
}

/// µs of one piece, so that few slices are preempted.
const PIECE_US: f64 = 300.0;

impl Ready {
    /// `us` is what one call is thought to take.
    fn new(team: Team, threads: u32, call: Call, us: f64) -> Self {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let times = (PIECE_US / us).ceil().clamp(1.0, 128.0) as u32;
        Self {
            team,
            threads,
            call,
            times,
        }
    }
}

impl Prepared for Ready {
    fn weights(&self) -> Vec<f64> {
        vec![1.0 / f64::from(self.times)]
    }

    fn threads(&self) -> u32 {
        self.threads
    }

    fn run(&mut self, _piece: usize) -> cotk_latency::Result<()> {
        let (call, times) = (&mut self.call, self.times);
        self.team.install(|| (0..times).for_each(|_| call()));
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
        let probe = EngineProbe::new(Cpu::selected().unwrap(), vec![1, 2], 32 << 20).unwrap();
        let spread = probe.spread(18, &mut Seeds::new(1).stream("spread"));
        let of = |wanted: &str| {
            let all = seeds.iter().chain(&spread);
            all.filter(|key| key.path(Block(16)).to_string() == wanted).count()
        };
        for path in [
            "dense.half.gemv.cold/t2",
            "dense.f32.gemv.hot/t1",
            "expert.floats.hot/t2",
            "attention.f16.cold/t2",
        ] {
            assert!(of(path) >= 9, "{path}: {}", of(path));
        }
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
            kv_bits: 16,
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
            Key::Dense(DenseKey { bits: 16, ..dense }),
            Key::Dense(DenseKey {
                bits: 8,
                group: 32,
                tokens: 20,
                ..dense
            }),
            Key::Attention(AttentionKey {
                kv_heads: 1,
                head_dim: 96,
                value_dim: 64,
                values_in_keys: true,
                kv_bits: 8,
                ..attention
            }),
            Key::Attention(attention),
            Key::Attention(AttentionKey {
                tokens: 70,
                ..attention
            }),
            Key::Glue(glue),
        ] {
            let mut ready = probe.prepare(&key, 0).unwrap();
            let weights = ready.weights();
            assert!(weights.iter().all(|w| *w > 0.0), "{key}");
            for piece in 0..weights.len() {
                ready.run(piece).unwrap();
            }
        }
    }
}
