//! Models with the shape of real ones and noise for weights, made in memory: how fast a machine runs a model does not depend
//! on what its weights say. Routing is drawn anew for every token, since a router of noise repeats itself and what it
//! repeats would come from cache. Nothing here speaks sense. Law: the same seed is the same model and the same routing.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cotk_kernels::cpu::noise::{self, NoiseExpert, NoiseShape, Width};
use cotk_model::ModelError;
use cotk_model::checkpoint::{CheckpointError, DType, TensorInfo, TensorSource};
use cotk_model::families::{self, LayerTensor, Tensor};
use cotk_model::inventory;
use cotk_model::model::Model;
use cotk_model::moe::{
    Alive, ExpertUse, Mode, MoeRecord, MoeRuntime, MoeShape, Precision, RouterScores, RuntimeError, route,
};
use cotk_model::spec::ModelSpec;
use cotk_run::units::{ExpertId, LayerId};

use crate::mix::{Cpu, run_groups};
use crate::{Error, Result};

/// Shapes by name: their published configs, as far as they say something about shape.
static SHAPES: [(&str, &str); 4] = [
    (
        "olmoe-1b-7b",
        r#"{"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "vocab_size": 50304, "hidden_size": 2048,
        "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": false, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false}"#,
    ),
    (
        "qwen1.5-moe-a2.7b",
        r#"{"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": false,
        "decoder_sparse_step": 1, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": false}"#,
    ),
    (
        "qwen3-30b-a3b",
        r#"{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": false}"#,
    ),
    (
        "ref-qwen2moe",
        r#"{"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 4096,
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": false,
        "decoder_sparse_step": 1, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": true}"#,
    ),
];

/// Names of the shapes.
pub fn names() -> Vec<&'static str> {
    SHAPES.iter().map(|(name, _)| *name).collect()
}

/// Shape of a real model; with `layers` of another depth.
///
/// # Errors
/// [`Error::Synthetic`] with the known names.
pub fn spec(name: &str, layers: Option<usize>) -> Result<ModelSpec> {
    let unknown = || Error::Synthetic {
        what: "shape",
        found: name.to_owned(),
        expected: names().join(", "),
    };
    let (_, config) = SHAPES.iter().find(|(known, _)| *known == name).ok_or_else(unknown)?;
    let mut spec = families::parse_config(Path::new(name), config).map_err(ModelError::from)?;
    if let Some(layers) = layers {
        let all = spec.layers.len();
        let last = spec.layers[all - 1].clone();
        spec.layers.resize(layers.max(1), last);
    }
    Ok(spec)
}

/// The dense tensors of a shape: noise, norms of 1, made when they are asked for.
struct Source {
    name: PathBuf,
    shapes: BTreeMap<String, Vec<usize>>,
    seed: u64,
}

impl Source {
    fn new(spec: &ModelSpec, seed: u64) -> Self {
        let family = families::of(spec);
        let is_dense =
            |(tensor, _): &(Tensor, Vec<usize>)| !matches!(tensor, Tensor::Layer(_, LayerTensor::Expert(..)));
        let shapes = inventory::tensors(spec).into_iter().filter(is_dense);
        Self {
            name: PathBuf::from(format!("synthetic {}", spec.family)),
            shapes: shapes
                .map(|(tensor, shape)| (family.tensor_name(tensor), shape))
                .collect(),
            seed,
        }
    }

    fn values(&self, name: &str) -> Option<Vec<f32>> {
        let shape = self.shapes.get(name)?;
        let index = self.shapes.range(..name.to_owned()).count() as u64;
        let mut values = vec![1.0; shape.iter().product()];
        if shape.len() > 1 {
            noise::floats(&mut values, self.seed.wrapping_mul(65_537).wrapping_add(index));
        }
        Some(values)
    }
}

impl TensorSource for Source {
    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.shapes.get(name).map(|shape| TensorInfo {
            dtype: DType::F32,
            shape: shape.clone(),
        })
    }

    fn file(&self, _name: &str) -> &Path {
        &self.name
    }

    fn raw(&self, name: &str) -> std::result::Result<Cow<'_, [u8]>, CheckpointError> {
        let values = self.values(name).ok_or_else(|| CheckpointError::Missing {
            file: self.name.clone(),
            tensor: name.to_owned(),
            nearest: None,
        })?;
        Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into())
    }

    fn load_f32(&self, name: &str, expected: &[usize]) -> std::result::Result<Vec<f32>, CheckpointError> {
        self.require(name, expected)?;
        Ok(self.values(name).expect("required above"))
    }
}

/// Width of all experts of a synthetic model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    pub bits: u32,
    /// Planes of the prefix; 1 for plain codes.
    pub planes: u32,
    pub group: usize,
    /// 0: whole matrices.
    pub rank: usize,
}

impl Experts {
    /// Plain codes in groups of 32.
    pub fn plain(bits: u32) -> Self {
        Self {
            bits,
            planes: 1,
            group: 32,
            rank: 0,
        }
    }
}

/// Every width, for messages.
fn width_names() -> String {
    let name = |w: Width| format!("{} in {}", w.bits(), w.planes());
    Width::all().into_iter().map(name).collect::<Vec<_>>().join(", ")
}

/// Experts of noise in memory, with routing drawn per token.
#[derive(Debug)]
pub struct Synthetic {
    shape: MoeShape,
    /// Per MoE layer, per expert.
    experts: Vec<Vec<NoiseExpert>>,
    bits: u8,
    seed: u64,
    /// Tokens that each layer has routed.
    routed: Vec<AtomicU64>,
    cpu: Cpu,
}

impl Synthetic {
    /// Makes all experts of a shape.
    ///
    /// # Errors
    /// [`Error::Synthetic`]: no kernel reads this width; [`Error::Kernel`].
    pub fn new(spec: &ModelSpec, experts: Experts, seed: u64) -> Result<Self> {
        use rayon::prelude::*;
        let width = Width::find(experts.bits, experts.planes).ok_or_else(|| Error::Synthetic {
            what: "width",
            found: format!("{} bits in {} planes", experts.bits, experts.planes),
            expected: width_names(),
        })?;
        let shape = NoiseShape {
            hidden: spec.hidden,
            inner: spec.moe_intermediate,
            width,
            group: experts.group,
            rank: experts.rank,
        };
        let layers = spec.moe_layers();
        let count = spec.routing.experts;
        let made = |layer: usize| -> Result<Vec<NoiseExpert>> {
            (0..count)
                .into_par_iter()
                .map(|expert| {
                    let seed = seed.wrapping_add(((layer * count + expert) as u64) << 8);
                    NoiseExpert::new(&shape, seed).map_err(|source| Error::Synthetic {
                        what: "matrix",
                        found: source.to_string(),
                        expected: "sizes and groups that a format has".to_owned(),
                    })
                })
                .collect()
        };
        Ok(Self {
            experts: (0..layers.len()).map(made).collect::<Result<_>>()?,
            routed: layers.iter().map(|_| AtomicU64::new(0)).collect(),
            shape: MoeShape {
                hidden: spec.hidden,
                rule: spec.routing,
                layers,
            },
            bits: u8::try_from(experts.bits).expect("at most 16"),
            seed,
            cpu: Cpu::selected()?,
        })
    }

    /// Bytes of all experts.
    pub fn bytes(&self) -> u64 {
        self.experts.iter().flatten().map(|e| e.len() as u64).sum()
    }

    /// The experts that token number `token` of a layer is sent to, distinct and in random order.
    fn draw(&self, layer: usize, token: u64) -> Vec<usize> {
        let (count, slots) = (
            self.shape.rule.experts,
            self.shape.rule.top_k.min(self.shape.rule.experts),
        );
        // splitmix64 (Steele, Lea and Flood, 2014) over a partial shuffle.
        let mut state = self.seed ^ (layer as u64) << 48 ^ token.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        };
        let mut order: Vec<usize> = (0..count).collect();
        for slot in 0..slots {
            #[expect(clippy::cast_possible_truncation, reason = "below the number of experts")]
            let other = slot + (next() % (count - slot) as u64) as usize;
            order.swap(slot, other);
        }
        order.truncate(slots);
        order
    }

    /// Distinct expert bytes of the next 100 tokens: many times the last-level cache, or experts were not read from memory.
    pub fn distinct_bytes_per_100_tokens(&self) -> u64 {
        let layers = self.experts.iter().zip(&self.routed).enumerate();
        let of = |(layer, (experts, routed)): (usize, (&Vec<NoiseExpert>, &AtomicU64))| -> u64 {
            let from = routed.load(Ordering::Relaxed);
            let touched: BTreeSet<usize> = (from..from + 100).flat_map(|token| self.draw(layer, token)).collect();
            touched.iter().map(|&e| experts[e].len() as u64).sum()
        };
        layers.map(of).sum()
    }
}

impl MoeRuntime for Synthetic {
    fn shape(&self) -> &MoeShape {
        &self.shape
    }

    fn modes(&self) -> &[Mode] {
        &[Mode::Exact]
    }

    fn forward(
        &self,
        layer: LayerId,
        hidden: &[f32],
        router: RouterScores<'_>,
        mode: Mode,
        out: &mut [f32],
    ) -> std::result::Result<MoeRecord, RuntimeError> {
        let tokens = self.check_call(layer, hidden, &router, mode, out)?;
        let at = self
            .shape
            .layers
            .iter()
            .position(|&l| l == layer)
            .expect("checked above");
        // What routing costs is paid, and its gates are used; whom they weigh is drawn.
        let routed = route(&router, Alive::All);
        let slots = routed.slots;
        let first = self.routed[at].fetch_add(tokens as u64, Ordering::Relaxed);
        let mut pairs: Vec<(usize, usize)> = Vec::with_capacity(tokens * slots);
        for token in 0..tokens {
            let drawn = self.draw(at, first + token as u64);
            pairs.extend(drawn.into_iter().enumerate().map(|(slot, e)| (e, token * slots + slot)));
        }
        pairs.sort_unstable();
        let order: Vec<usize> = pairs.iter().map(|(_, pair)| *pair).collect();
        let mut groups = Vec::new();
        let mut from = 0;
        for group in pairs.chunk_by(|a, b| a.0 == b.0) {
            groups.push((self.experts[at][group[0].0].expert(), &order[from..from + group.len()]));
            from += group.len();
        }
        out.fill(0.0);
        run_groups(self.cpu, &groups, hidden, slots, &routed.gates, out);
        let mut uses = vec![
            ExpertUse {
                expert: ExpertId(0),
                gate: 0.0,
                bits: self.bits,
                precision: Precision::Full,
            };
            pairs.len()
        ];
        for (expert, pair) in pairs {
            uses[pair].expert = ExpertId(u32::try_from(expert).expect("expert counts fit 32 bits"));
            uses[pair].gate = routed.gates[pair];
        }
        Ok(MoeRecord { slots, uses })
    }
}

/// A whole synthetic model.
pub struct SyntheticModel {
    pub model: Model,
    pub experts: Arc<Synthetic>,
}

/// Makes a model of a shape in memory.
///
/// # Errors
/// As [`Synthetic::new`].
pub fn model(spec: &ModelSpec, experts: Experts, seed: u64) -> Result<SyntheticModel> {
    let runtime = Arc::new(Synthetic::new(spec, experts, seed)?);
    let source = Source::new(spec, seed);
    let model = Model::load(spec.clone(), &source, runtime.clone()).map_err(ModelError::from)?;
    Ok(SyntheticModel {
        model,
        experts: runtime,
    })
}

#[cfg(test)]
mod tests {
    use cotk_model::model::{Logits, Sequence};

    use super::*;

    fn tiny() -> ModelSpec {
        let mut spec = spec("ref-qwen2moe", Some(2)).unwrap();
        spec.routing.experts = 8;
        spec
    }

    #[test]
    fn every_shape_has_a_spec_and_others_are_refused_with_the_list() {
        for name in names() {
            let full = spec(name, None).unwrap();
            assert!(full.routing.experts >= 8 && !full.moe_layers().is_empty(), "{name}");
            assert_eq!(spec(name, Some(3)).unwrap().layers.len(), 3);
        }
        let text = spec("olmoe", None).unwrap_err().to_string();
        assert!(text.contains("olmoe-1b-7b"), "{text}");
    }

    #[test]
    fn a_seed_is_a_model_and_its_routing_and_logits_are_finite() {
        let run = |seed| {
            let made = model(&tiny(), Experts::plain(4), seed).unwrap();
            let mut cache = made.model.new_cache();
            let mut step = |tokens: &[u32]| {
                let mut sequences = [Sequence {
                    tokens,
                    cache: &mut cache,
                }];
                made.model.forward(&mut sequences, Mode::Exact, Logits::Last).unwrap()
            };
            let first = step(&[1, 2, 3]);
            let second = step(&[4]);
            assert!(second.logits.iter().all(|l| l.is_finite()));
            let experts = |f: &cotk_model::model::Forward| -> Vec<u32> {
                f.records
                    .iter()
                    .flat_map(|(_, r)| r.uses.iter().map(|u| u.expert.0))
                    .collect()
            };
            (experts(&first), experts(&second), second.logits)
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1).0, run(2).0);
    }

    #[test]
    fn routing_is_distinct_within_a_token_and_uniform_over_tokens() {
        let experts = Synthetic::new(&tiny(), Experts::plain(2), 3).unwrap();
        let mut counts = [0u32; 8];
        for token in 0..1000 {
            let drawn = experts.draw(1, token);
            assert_eq!(drawn.iter().collect::<BTreeSet<_>>().len(), 4);
            drawn.iter().for_each(|&e| counts[e] += 1);
        }
        assert!(counts.iter().all(|&c| (430..570).contains(&c)), "{counts:?}");
        assert_eq!(experts.distinct_bytes_per_100_tokens(), experts.bytes());
    }

    #[test]
    fn a_width_that_no_kernel_reads_is_refused() {
        let text = Synthetic::new(&tiny(), Experts::plain(5), 3).unwrap_err().to_string();
        assert!(text.contains("5 bits"), "{text}");
    }
}
