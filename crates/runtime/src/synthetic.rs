//! Models with the shape of real ones and noise for weights, made in memory: how fast a machine runs a model does not depend
//! on what its weights say. Routing is drawn anew for every token, since a router of noise repeats itself and what it
//! repeats would come from cache. Nothing here speaks sense. Law: the same seed is the same model and the same routing.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cotk_container::dense;
use cotk_container::manifest::Matrix;
use cotk_kernels::cpu::noise::{self, NoiseExpert, NoiseShape, Width};
use cotk_model::ModelError;
use cotk_model::checkpoint::{CheckpointError, DType, TensorInfo, TensorSource};
use cotk_model::families::{self, LayerTensor, Tensor};
use cotk_model::inventory;
use cotk_model::model::Model;
use cotk_model::moe::MoeRuntime;
use cotk_model::spec::ModelSpec;

use crate::coded_dense::is_coded;
use crate::in_memory::{InMemory, Routing};
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

fn shape(name: &str) -> Result<&'static str> {
    let unknown = || Error::Synthetic {
        what: "shape",
        found: name.to_owned(),
        expected: names().join(", "),
    };
    let found = SHAPES.iter().find(|(known, _)| *known == name);
    Ok(found.ok_or_else(unknown)?.1)
}

/// `config.json` of a real model's shape; with `layers` of another depth.
///
/// # Errors
/// As [`spec`].
pub fn config(name: &str, layers: Option<usize>) -> Result<serde_json::Value> {
    let mut config: serde_json::Value = serde_json::from_str(shape(name)?).expect("written above");
    if let Some(layers) = layers {
        config["num_hidden_layers"] = layers.max(1).into();
    }
    Ok(config)
}

/// Shape of a real model; with `layers` of another depth.
///
/// # Errors
/// [`Error::Synthetic`] with the known names.
pub fn spec(name: &str, layers: Option<usize>) -> Result<ModelSpec> {
    let config = shape(name)?;
    let mut spec = families::parse_config(Path::new(name), config).map_err(ModelError::from)?;
    if let Some(layers) = layers {
        let all = spec.layers.len();
        let last = spec.layers[all - 1].clone();
        spec.layers.resize(layers.max(1), last);
    }
    Ok(spec)
}

/// Width of the dense matrices of a synthetic model, in plain codes of groups of 32; routers and gates of shared experts
/// are f32.
pub const DENSE_BITS: u32 = 8;

/// The dense tensors of a shape: noise, norms of 1, made when they are asked for.
pub struct Source {
    name: PathBuf,
    shapes: BTreeMap<String, Vec<usize>>,
    codes: BTreeMap<String, Matrix>,
    seed: u64,
}

impl Source {
    /// The same seed gives the same tensors.
    pub fn new(spec: &ModelSpec, seed: u64) -> Self {
        let family = families::of(spec);
        let mut shapes = BTreeMap::new();
        let mut codes = BTreeMap::new();
        for (tensor, shape) in inventory::tensors(spec) {
            if matches!(tensor, Tensor::Layer(_, LayerTensor::Expert(..))) {
                continue;
            }
            let name = family.tensor_name(tensor);
            if is_coded(tensor, &shape) {
                let (rows, cols) = (shape[0], shape[1]);
                let bits = dense::dense_bits(DENSE_BITS).expect("a width of dense matrices");
                let format = dense::plain_format(rows, cols, bits).expect("models' matrices are far below the limit");
                let zero_points = noise::zero_points(format);
                codes.insert(name.clone(), Matrix::new(format, zero_points));
            }
            shapes.insert(name, shape);
        }
        Self {
            name: PathBuf::from(format!("synthetic {}", spec.family)),
            shapes,
            codes,
            seed,
        }
    }

    fn seed_of(&self, name: &str) -> u64 {
        let index = self.shapes.range(..name.to_owned()).count() as u64;
        self.seed.wrapping_mul(65_537).wrapping_add(index)
    }

    /// Stored bytes: the plane of a coded matrix, else f32.
    fn made(&self, name: &str) -> std::result::Result<Vec<u8>, CheckpointError> {
        let shape = self.shapes.get(name).ok_or_else(|| CheckpointError::Missing {
            file: self.name.clone(),
            tensor: name.to_owned(),
            nearest: None,
        })?;
        let seed = self.seed_of(name);
        if let Some(matrix) = self.codes.get(name) {
            return Ok(noise::matrix(matrix.format, seed).planes.swap_remove(0));
        }
        let mut values = vec![1.0; shape.iter().product()];
        if shape.len() > 1 {
            noise::floats(&mut values, seed);
        }
        Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
}

impl TensorSource for Source {
    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.shapes.get(name).map(|shape| TensorInfo {
            dtype: if self.codes.contains_key(name) {
                DType::U8
            } else {
                DType::F32
            },
            shape: shape.clone(),
        })
    }

    fn file(&self, _name: &str) -> &Path {
        &self.name
    }

    fn raw(&self, name: &str) -> std::result::Result<Cow<'_, [u8]>, CheckpointError> {
        Ok(self.made(name)?.into())
    }

    fn codes(&self, name: &str) -> Option<&Matrix> {
        self.codes.get(name)
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

/// Makes all experts of a shape, per MoE layer, per expert.
///
/// # Errors
/// [`Error::Synthetic`]: no kernel reads this width, or no format has these sizes.
pub fn experts(spec: &ModelSpec, experts: Experts, seed: u64) -> Result<Vec<Vec<NoiseExpert>>> {
    use rayon::prelude::*;
    let layer = |layer: usize| {
        let ids = (0..spec.routing.experts).into_par_iter();
        ids.map(|expert| one_expert(spec, experts, seed, layer, expert))
            .collect()
    };
    (0..spec.moe_layers().len()).map(layer).collect()
}

/// The seed of one expert's noise.
pub(crate) fn expert_seed(spec: &ModelSpec, seed: u64, layer: usize, expert: usize) -> u64 {
    seed.wrapping_add(((layer * spec.routing.experts + expert) as u64) << 8)
}

/// Expert number `expert` of MoE layer number `layer`: the same by itself as among all.
///
/// # Errors
/// As [`experts`].
pub fn one_expert(spec: &ModelSpec, experts: Experts, seed: u64, layer: usize, expert: usize) -> Result<NoiseExpert> {
    // Of one plane: a code of its own rather than the beginning of a wider one, which costs the same.
    let plain = if experts.planes == 1 {
        Width::plain(experts.bits)
    } else {
        None
    };
    let width = plain.or_else(|| Width::find(experts.bits, experts.planes));
    let width = width.ok_or_else(|| Error::Synthetic {
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
    NoiseExpert::new(&shape, expert_seed(spec, seed, layer, expert)).map_err(|source| Error::Synthetic {
        what: "matrix",
        found: source.to_string(),
        expected: "sizes and groups that a format has".to_owned(),
    })
}

/// A whole synthetic model.
pub struct SyntheticModel {
    pub model: Model,
    pub experts: Arc<InMemory>,
}

/// Makes a model of a shape in memory, its routing drawn.
///
/// # Errors
/// As [`experts`]; [`Error::Kernel`].
pub fn model(spec: &ModelSpec, experts: Experts, seed: u64) -> Result<SyntheticModel> {
    let routing = Routing::drawn(seed, spec.moe_layers().len());
    routed_model(spec, experts, seed, routing)
}

/// The same with routing as asked for.
///
/// # Errors
/// As [`model`].
pub fn routed_model(spec: &ModelSpec, experts: Experts, seed: u64, routing: Routing) -> Result<SyntheticModel> {
    let made = self::experts(spec, experts, seed)?;
    let runtime = Arc::new(InMemory::new(spec, made, experts.bits, routing)?);
    Ok(SyntheticModel {
        model: dense_part(spec, seed, runtime.clone())?,
        experts: runtime,
    })
}

/// A model of noise over a runtime.
///
/// # Errors
/// Those of loading, which noise does not meet.
pub fn dense_part(spec: &ModelSpec, seed: u64, runtime: Arc<dyn MoeRuntime>) -> Result<Model> {
    let source = Source::new(spec, seed);
    Ok(Model::load(spec.clone(), &source, runtime).map_err(ModelError::from)?)
}

#[cfg(test)]
mod tests {
    use cotk_model::model::{Logits, Sequence};
    use cotk_model::moe::Mode;

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
    fn dense_matrices_are_codes_and_routers_are_not() {
        let source = Source::new(&tiny(), 1);
        let coded = |name: &str| source.codes(name).map(|m| (m.format.rows(), m.format.cols()));
        assert_eq!(coded("model.embed_tokens.weight"), Some((4096, 256)));
        assert_eq!(coded("model.layers.1.self_attn.k_proj.weight"), Some((128, 256)));
        for exact in [
            "model.layers.0.mlp.gate.weight",
            "model.layers.0.self_attn.k_proj.bias",
            "model.norm.weight",
        ] {
            assert_eq!(coded(exact), None, "{exact}");
        }
        let name = "model.layers.0.self_attn.o_proj.weight";
        let weights = source.load_f32(name, &[256, 256]).unwrap();
        assert_eq!(weights, Source::new(&tiny(), 1).load_f32(name, &[256, 256]).unwrap());
        assert_ne!(weights, Source::new(&tiny(), 2).load_f32(name, &[256, 256]).unwrap());
        let variance = weights.iter().map(|w| w * w).sum::<f32>() / 65536.0;
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.05, "{variance}");
    }

    #[test]
    fn a_width_that_no_kernel_reads_is_refused() {
        let text = experts(&tiny(), Experts::plain(5), 3).unwrap_err().to_string();
        assert!(text.contains("5 bits"), "{text}");
    }
}
