//! One step of a mixture-of-experts model under a placement: decoding a batch of tokens, or a prefill. A step is a sum of
//! operators that are measured (dense matrices, attention, what is left of a layer, touched experts) and, where experts are
//! not in memory, of the schedule over the distribution of their misses (`schedule`). Pure. Law: with everything in memory
//! it is the sum of its operators; each expert moved away makes it slower or leaves it as it is.

use std::collections::BTreeMap;

use crate::predict::{Flag, Model, Origin, Part, Prediction, Terms};
use crate::schedule::{in_order_equal, poisson_binomial, touched};
use crate::work::{AttentionKey, DenseKey, ExpertKey, Heat, Key, ReadKey, Term, Tier};
use crate::{Error, Result};

pub(crate) mod fit;
#[cfg(test)]
mod laws;
pub(crate) mod neighbours;

/// Where an expert's weights are when its token comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Home {
    Memory,
    /// Read as a record of so many bytes.
    Disk {
        bytes: u64,
    },
}

/// One routed expert of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoutedExpert {
    /// For one token alone: `experts` and `tokens` of the key are the step's to say.
    pub key: ExpertKey,
    /// Share of tokens that use it, 0..1: the shares of a layer add up to its experts per token.
    pub share: f64,
    pub home: Home,
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerStep {
    /// What every token runs: norms, attention, matrices, router, shared expert.
    pub keys: Vec<Key>,
    /// Empty in a dense layer.
    pub experts: Vec<RoutedExpert>,
    /// Experts per token.
    pub top_k: u32,
}

/// One pass of all layers over `tokens` tokens, at most one row of logits per sequence.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MoeStep {
    pub layers: Vec<LayerStep>,
    /// Final norm and head.
    pub ends: Vec<Key>,
    /// New tokens of all sequences.
    pub tokens: u32,
    pub threads: u32,
    /// Weights and cache that steps come back to: what decides how much of them is still in the last-level cache.
    pub working_set_bytes: u64,
}

/// Bytes that a step moves at least, and the time that they need: no schedule is faster.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Floor {
    /// Expected bytes from memory: dense weights, cache, touched experts.
    pub memory_bytes: f64,
    /// Expected bytes from disk.
    pub disk_bytes: f64,
    /// The larger of both over their bandwidths.
    pub ms: f64,
}

/// What a step takes, in all and by layer.
#[derive(Debug, Clone, PartialEq)]
pub struct StepPrediction {
    pub whole: Prediction,
    /// In order.
    pub layers: Vec<LayerPrediction>,
    /// Final norm and head.
    pub ends: Prediction,
    pub floor: Floor,
    /// Expected experts that are touched, and of those not in memory, summed over layers.
    pub touched: f64,
    pub missed: f64,
}

/// One layer of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPrediction {
    pub prediction: Prediction,
    /// Of that, its routed experts.
    pub experts_ms: f64,
    /// Experts that are expected to be touched, and of those not in memory.
    pub touched: f64,
    pub missed: f64,
}

/// Parts with how often they come.
type Parts = Vec<(Part, f64)>;

/// Fewer than this many in a million are not worth a prediction.
const NEGLIGIBLE: f64 = 1e-6;

impl Model {
    /// The step, by layer.
    ///
    /// # Errors
    /// [`Error::NotMeasured`]: no experts of this width at all, no disk for experts on disk.
    pub fn step(&self, step: &MoeStep) -> Result<StepPrediction> {
        let cold = self.cold_share(step.working_set_bytes);
        let mut floor = Floor {
            memory_bytes: 0.0,
            disk_bytes: 0.0,
            ms: 0.0,
        };
        let (mut all, mut flags) = (Parts::new(), Vec::new());
        let mut layers = Vec::with_capacity(step.layers.len());
        let (mut distinct, mut missed) = (0.0, 0.0);
        for layer in &step.layers {
            let mut own = Vec::new();
            let mut parts = self.dense(&layer.keys, step.threads, cold, &mut own)?;
            let (mut experts_ms, mut layer_touched, mut layer_missed) = (0.0, 0.0, 0.0);
            floor.memory_bytes += layer.keys.iter().map(bytes).sum::<f64>();
            if !layer.experts.is_empty() && step.tokens > 0 {
                let routed = Routed::of(layer, step);
                let experts = routed.parts(self, step.threads, cold, &mut own)?;
                experts_ms = experts.iter().map(|(part, times)| part.ms * times).sum();
                parts.extend(experts);
                for expert in &layer.experts {
                    let p = touched(expert.share, f64::from(step.tokens));
                    match expert.home {
                        Home::Memory => floor.memory_bytes += p * expert.key.weight_bytes(),
                        Home::Disk { bytes } => {
                            #[expect(clippy::cast_precision_loss, reason = "sizes of records stay far below 2^52")]
                            let bytes = bytes as f64;
                            floor.memory_bytes += p * expert.key.weight_bytes();
                            floor.disk_bytes += p * bytes;
                            layer_missed += p;
                        }
                    }
                    layer_touched += p;
                }
            }
            layers.push(LayerPrediction {
                prediction: self.sum(&parts, own.clone()),
                experts_ms,
                touched: layer_touched,
                missed: layer_missed,
            });
            (distinct, missed) = (distinct + layer_touched, missed + layer_missed);
            all.extend(parts);
            flags.extend(own);
        }
        let mut own = Vec::new();
        let parts = self.dense(&step.ends, step.threads, cold, &mut own)?;
        floor.memory_bytes += step.ends.iter().map(bytes).sum::<f64>();
        let ends = self.sum(&parts, own.clone());
        all.extend(parts);
        flags.extend(own);
        let over = |bytes: f64, tier| -> Result<f64> {
            if bytes > 0.0 {
                Ok(bytes / self.bytes_per_s(tier, step.threads)? * 1e3)
            } else {
                Ok(0.0)
            }
        };
        floor.ms = over(floor.memory_bytes, Tier::Memory)
            .unwrap_or(0.0)
            .max(over(floor.disk_bytes, self.disk_tier())?);
        Ok(StepPrediction {
            whole: self.sum(&all, flags),
            layers,
            ends,
            floor,
            touched: distinct,
            missed,
        })
    }

    /// Share of the weights that come from memory and not from the last-level cache (reference 2.4): none where what steps
    /// come back to fills half of the cache or less, all from one and a half caches on, between them linear in ln.
    fn cold_share(&self, working_set_bytes: u64) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a ratio")]
        let (working_set, cache) = (working_set_bytes.max(1) as f64, self.cache_bytes() as f64);
        if cache == 0.0 {
            return 1.0;
        }
        ((working_set / (0.5 * cache)).ln() / 3f64.ln()).clamp(0.0, 1.0)
    }

    /// Where disk times were measured: direct reads, else through the page cache.
    fn disk_tier(&self) -> Tier {
        if self.bytes_per_s(Tier::Disk, 1).is_ok() {
            Tier::Disk
        } else {
            Tier::DiskBuffered
        }
    }

    fn dense(&self, keys: &[Key], threads: u32, cold: f64, flags: &mut Vec<Flag>) -> Result<Parts> {
        let mut parts = Parts::new();
        for key in keys {
            self.by_heat(key, cold, 1.0, threads, flags, &mut parts)?;
        }
        Ok(parts)
    }

    /// `times` calls of an operator, `cold` of them from memory.
    fn by_heat(
        &self,
        key: &Key,
        cold: f64,
        times: f64,
        threads: u32,
        flags: &mut Vec<Flag>,
        parts: &mut Parts,
    ) -> Result<()> {
        let shares: &[(Heat, f64)] = match key {
            Key::Glue(_) => &[(Heat::Hot, 1.0)],
            _ => &[(Heat::Cold, cold), (Heat::Hot, 1.0 - cold)],
        };
        for &(heat, share) in shares {
            if share * times > NEGLIGIBLE {
                parts.push((self.one(&heated(key, heat), threads, flags)?, share * times));
            }
        }
        Ok(())
    }

    /// One operator. What was never measured from cache is taken from memory; a dense operator of one token that was not
    /// measured at all goes by its bytes at the speed of memory; both are said. Of many tokens bytes say nothing.
    fn one(&self, key: &Key, threads: u32, flags: &mut Vec<Flag>) -> Result<Part> {
        let before = flags.len();
        let refused = match self.known(key, flags) {
            Err(Error::NotMeasured { path, .. }) => path,
            other => return other,
        };
        flags.truncate(before);
        let cold = heated(key, Heat::Cold);
        if cold != *key {
            let part = self.one(&cold, threads, flags)?;
            flags.push(Flag::StandIn {
                path: refused,
                by: cold.path(self.block()).to_string(),
            });
            return Ok(part);
        }
        let tokens = match key {
            Key::Dense(dense) => dense.tokens,
            Key::Attention(attention) => attention.tokens,
            _ => 1,
        };
        if matches!(key, Key::Expert(_)) || tokens > 1 {
            return Err(self.not_measured(key));
        }
        flags.push(Flag::StandIn {
            path: refused,
            by: "its bytes from memory".to_owned(),
        });
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "sizes of matrices"
        )]
        let bytes = bytes(key).max(1.0) as u64;
        let read = Key::Read(ReadKey {
            tier: Tier::Memory,
            bytes,
            threads,
        });
        let mut unsaid = Vec::new();
        let mut part = self.part(&read, &mut unsaid)?;
        // Bandwidth is a slope: other sizes of the same memory are no extrapolation, and a matrix is not a read.
        part.ms -= part.terms.launch_ms;
        part.terms.launch_ms = 0.0;
        Ok(part)
    }

    /// As `part`; but experts of a width that was never measured are not known, although their path is: what unpacking
    /// costs is each width's own.
    fn known(&self, key: &Key, flags: &mut Vec<Flag>) -> Result<Part> {
        if let Key::Expert(_) = key
            && !self.has(key)
        {
            let mut unsaid = Vec::new();
            let fit = self.fit(key, &mut unsaid)?;
            let features = key.features(self.block());
            let is_unpacked = |term: Term| term.name().starts_with("mega_weights");
            let mut own = features.terms().iter().filter(|(term, _)| is_unpacked(*term));
            if own.any(|(term, _)| !fit.coefficients.iter().any(|c| c.term == *term && c.max > 0.0)) {
                return Err(self.not_measured(key));
            }
        }
        self.part(key, flags)
    }
}

/// Bytes of weights or of a cache that an operator reads.
fn bytes(key: &Key) -> f64 {
    match key {
        Key::Dense(dense) => dense.weight_bytes(),
        Key::Attention(attention) => f64::from(attention.sequences.max(1)) * attention.cache_bytes(),
        Key::Expert(expert) => f64::from(expert.experts.max(1)) * expert.weight_bytes(),
        _ => 0.0,
    }
}

fn heated(key: &Key, heat: Heat) -> Key {
    match *key {
        Key::Dense(dense) => Key::Dense(DenseKey { heat, ..dense }),
        Key::Attention(attention) => Key::Attention(AttentionKey { heat, ..attention }),
        Key::Expert(expert) => Key::Expert(ExpertKey { heat, ..expert }),
        other => other,
    }
}

/// The experts of one layer, as far as their time goes.
struct Routed {
    /// Kinds of experts with their share of what is touched.
    kinds: Vec<(ExpertKey, f64)>,
    /// P(so many are touched and in memory).
    hits: Vec<f64>,
    /// P(so many are touched and elsewhere), where hits and misses are independent; of a single token, whose experts are a
    /// fixed number, see `joint`.
    misses: Vec<f64>,
    /// A single token: the number of its experts is given, and a hit is what is no miss.
    fixed: Option<usize>,
    /// Mean tokens at a touched expert.
    tokens: f64,
    /// Mean bytes of a fetch.
    fetch_bytes: f64,
}

impl Routed {
    fn of(layer: &LayerStep, step: &MoeStep) -> Self {
        let tokens = f64::from(step.tokens);
        let weights: Vec<f64> = layer.experts.iter().map(|e| touched(e.share, tokens)).collect();
        let distinct: f64 = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let mut kinds: BTreeMap<ExpertKey, f64> = BTreeMap::new();
        let (mut away, mut fetch_bytes) = (0.0, 0.0);
        for (expert, p) in layer.experts.iter().zip(&weights) {
            *kinds.entry(expert.key).or_default() += p / distinct;
            if let Home::Disk { bytes } = expert.home {
                #[expect(clippy::cast_precision_loss, reason = "sizes of records stay far below 2^52")]
                let bytes = bytes as f64;
                away += p;
                fetch_bytes += p * bytes;
            }
        }
        let slots = layer.top_k.min(u32::try_from(layer.experts.len()).unwrap_or(u32::MAX)) as usize;
        let (hits, misses, fixed) = if step.tokens == 1 {
            // Exactly `slots` of them; each is a miss as often as routing chooses one that is away.
            (Vec::new(), poisson_binomial(&vec![away / distinct; slots]), Some(slots))
        } else {
            let of = |is_away: bool| -> Vec<f64> {
                let those = layer.experts.iter().zip(&weights);
                let those = those.filter(|(e, _)| matches!(e.home, Home::Disk { .. }) == is_away);
                poisson_binomial(&those.map(|(_, p)| *p).collect::<Vec<_>>())
            };
            (of(false), of(true), None)
        };
        Self {
            kinds: kinds.into_iter().collect(),
            hits,
            misses,
            fixed,
            tokens: match fixed {
                Some(_) => 1.0,
                None => tokens * f64::from(layer.top_k) / distinct,
            },
            fetch_bytes: if away > 0.0 { fetch_bytes / away } else { 0.0 },
        }
    }

    /// `(hits, misses, probability)`.
    fn joint(&self) -> Vec<(usize, usize, f64)> {
        let mut joint = Vec::new();
        for (misses, p) in self.misses.iter().enumerate() {
            match self.fixed {
                Some(slots) => joint.push((slots - misses, misses, *p)),
                None => joint.extend(self.hits.iter().enumerate().map(|(hits, q)| (hits, misses, p * q))),
            }
        }
        joint.retain(|(hits, misses, p)| *p > NEGLIGIBLE && hits + misses > 0);
        joint
    }

    /// So many experts in one call, over kinds and over whole numbers of tokens around the mean.
    fn call(&self, model: &Model, count: usize, times: f64, at: (u32, f64), flags: &mut Vec<Flag>) -> Result<Parts> {
        let (threads, cold) = at;
        let mut parts = Parts::new();
        let low = self.tokens.max(1.0).floor();
        let above = self.tokens.max(1.0) - low;
        for (kind, share) in &self.kinds {
            for (tokens, weight) in [(low, 1.0 - above), (low + 1.0, above)] {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "at least 1, at most a prompt"
                )]
                let key = Key::Expert(ExpertKey {
                    experts: u32::try_from(count).unwrap_or(u32::MAX),
                    tokens: tokens as u32,
                    threads,
                    ..*kind
                });
                model.by_heat(&key, cold, times * share * weight, threads, flags, &mut parts)?;
            }
        }
        Ok(parts)
    }

    fn parts(&self, model: &Model, threads: u32, cold: f64, flags: &mut Vec<Flag>) -> Result<Parts> {
        let at = (threads, cold);
        let joint = self.joint();
        let mut all = Parts::new();
        if self.fetch_bytes == 0.0 {
            for (hits, _, p) in joint {
                all.extend(self.call(model, hits, p, at, flags)?);
            }
            return Ok(all);
        }
        let tier = model.disk_tier();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "size of a record"
        )]
        let read = Key::Read(ReadKey {
            tier,
            bytes: self.fetch_bytes as u64,
            threads: 1,
        });
        let fetch = model.part(&read, flags)?;
        let total = |parts: &Parts| parts.iter().map(|(part, times)| part.ms * times).sum::<f64>();
        let one = self.call(model, 1, 1.0, at, flags)?;
        let one_ms = total(&one);
        // What waits on the link, beyond all computing.
        let mut exposed_ms = 0.0;
        let mut resident: BTreeMap<usize, f64> = BTreeMap::new();
        for (hits, misses, p) in joint {
            let resident_ms = match resident.get(&hits) {
                Some(ms) => *ms,
                None if hits == 0 => 0.0,
                None => {
                    let ms = total(&self.call(model, hits, 1.0, at, flags)?);
                    resident.insert(hits, ms);
                    ms
                }
            };
            let count = u32::try_from(misses).unwrap_or(u32::MAX);
            let computed = resident_ms + f64::from(count) * one_ms;
            exposed_ms += p * (in_order_equal(resident_ms, count, fetch.ms, one_ms) - computed).max(0.0);
            if hits > 0 {
                all.extend(self.call(model, hits, p, at, flags)?);
            }
            if misses > 0 {
                all.extend(self.call(model, 1, p * f64::from(count), at, flags)?);
            }
        }
        if exposed_ms > 0.0 {
            all.push((
                Part {
                    ms: exposed_ms,
                    terms: Terms {
                        link_ms: exposed_ms,
                        ..Terms::default()
                    },
                    origin: fetch.origin.max(Origin::Fit),
                    ..fetch
                },
                1.0,
            ));
        }
        Ok(all)
    }
}
