//! One file per family, nothing about a family outside it: config to [`ModelSpec`], tensor names. This file only
//! finds the family of a config; what all of them share of configs (rotary positions) is read here too.

use std::path::Path;

use cotk_run::units::{ExpertId, LayerId};

use crate::config::{ConfigError, Keys};
use crate::spec::{ModelSpec, RopeScaling, RopeSpec};

mod qwen2_moe;

/// Largest sizes that a config may ask for: far above every model, far below overflow.
pub(crate) mod limits {
    pub(crate) const WIDTH: usize = 1 << 17;
    pub(crate) const VOCAB: usize = 1 << 22;
    pub(crate) const LAYERS: usize = 1 << 10;
    pub(crate) const EXPERTS: usize = 1 << 12;
    pub(crate) const CONTEXT: usize = 1 << 26;
}

/// What a family knows: its name, how its config reads, what its tensors are called.
pub trait Family: Send + Sync {
    /// `model_type` in the config.
    fn model_type(&self) -> &'static str;

    /// The name in `architectures`.
    fn architecture(&self) -> &'static str;

    /// The typed form of a config's text.
    ///
    /// # Errors
    /// A missing shape key, a value that is not supported, a key that nobody knows.
    fn parse_config(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError>;

    /// The name of a tensor in a Hugging Face checkpoint.
    fn tensor_name(&self, tensor: Tensor) -> String;
}

/// The tensors of a decoder, by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tensor {
    /// `[vocab, hidden]`
    Embedding,
    /// `[hidden]`
    FinalNorm,
    /// `[vocab, hidden]`, absent when tied
    Head,
    /// One of a layer.
    Layer(LayerId, LayerTensor),
}

/// The tensors of one layer. Matrices are `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerTensor {
    AttentionNorm,
    MixerNorm,
    Query,
    QueryBias,
    Key,
    KeyBias,
    Value,
    ValueBias,
    Output,
    /// The MLP of a dense layer.
    Dense(Matrix),
    /// `[experts, hidden]`
    Router,
    Expert(ExpertId, Matrix),
    Shared(Matrix),
    /// `[1, hidden]`: its sigmoid scales the shared expert.
    SharedGate,
}

/// The three matrices of an MLP: `down(silu(gate(x)) · up(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Matrix {
    /// `[intermediate, hidden]`
    Gate,
    /// `[intermediate, hidden]`
    Up,
    /// `[hidden, intermediate]`
    Down,
}

impl Matrix {
    /// In the order of records.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// `[rows, columns]` for these widths.
    pub fn shape(self, hidden: usize, intermediate: usize) -> [usize; 2] {
        match self {
            Self::Gate | Self::Up => [intermediate, hidden],
            Self::Down => [hidden, intermediate],
        }
    }
}

/// Every family that can be run.
pub static FAMILIES: [&dyn Family; 1] = [&qwen2_moe::Qwen2Moe];

/// The family of this `model_type`.
pub fn by_model_type(model_type: &str) -> Option<&'static dyn Family> {
    FAMILIES.iter().copied().find(|f| f.model_type() == model_type)
}

/// The family of a parsed model.
pub fn of(spec: &ModelSpec) -> &'static dyn Family {
    by_model_type(spec.family).expect("a spec is made by its family")
}

/// Reads a config by its `model_type`, or by `architectures` where that is absent.
///
/// # Errors
/// [`ConfigError`]: not JSON, an unknown architecture, and whatever the family refuses.
pub fn parse_config(file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
    let mut keys = Keys::parse(file, text)?;
    let model_type = keys.text("model_type")?;
    let architecture = keys.texts("architectures")?.and_then(|names| names.into_iter().next());
    let family = match (&model_type, &architecture) {
        (Some(name), _) => by_model_type(name),
        (None, Some(name)) => FAMILIES.iter().copied().find(|f| f.architecture() == name),
        (None, None) => {
            return Err(ConfigError::Missing {
                file: file.to_owned(),
                key: "model_type".into(),
            });
        }
    };
    // A type of the same name with another head (a classifier) is another architecture.
    let found = match (&family, architecture, model_type) {
        (Some(family), Some(architecture), _) if architecture != family.architecture() => architecture,
        (Some(family), ..) => return family.parse_config(file, text),
        (None, architecture, model_type) => architecture.or(model_type).unwrap_or_default(),
    };
    Err(ConfigError::Architecture {
        file: file.to_owned(),
        found,
        known: FAMILIES.iter().map(|f| f.architecture()).collect(),
    })
}

/// `rope_theta` and `rope_scaling` of published configs, or `rope_parameters` as transformers 5 writes it.
pub(crate) fn rope(keys: &mut Keys, default_theta: f64, context: usize) -> Result<RopeSpec, ConfigError> {
    let flat_theta = keys.positive("rope_theta")?;
    let scaling = keys.object("rope_scaling")?;
    let parameters = keys.object("rope_parameters")?;
    if let (Some(_), Some(_)) = (&scaling, &parameters) {
        return Err(keys.wrong("rope_scaling", "beside `rope_parameters`", "one of the two"));
    }
    let Some(mut rope) = parameters.or(scaling) else {
        return Ok(RopeSpec {
            theta: flat_theta.unwrap_or(default_theta),
            scaling: RopeScaling::None,
        });
    };
    let theta = rope.positive("rope_theta")?.or(flat_theta).unwrap_or(default_theta);
    let old_name = rope.text("type")?;
    let kind = rope
        .text("rope_type")?
        .or(old_name)
        .unwrap_or_else(|| "default".to_owned());
    if let Some(share) = rope.positive("partial_rotary_factor")?
        && share != 1.0
    {
        return Err(rope.wrong("partial_rotary_factor", share, "1"));
    }
    #[expect(clippy::cast_precision_loss, reason = "contexts are far below 2^53")]
    let context = context as f64;
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: rope.required_positive("factor")?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: rope.required_positive("factor")?,
            original_context: rope.positive("original_max_position_embeddings")?.unwrap_or(context),
            low_freq_factor: rope.required_positive("low_freq_factor")?,
            high_freq_factor: rope.required_positive("high_freq_factor")?,
        },
        "yarn" => yarn(&mut rope, context)?,
        _ => return Err(rope.wrong("rope_type", kind, "default, linear, yarn or llama3")),
    };
    rope.finish()?;
    Ok(RopeSpec { theta, scaling })
}

/// YaRN with the defaults of transformers; its factor on cos and sin is resolved here.
fn yarn(rope: &mut Keys, context: f64) -> Result<RopeScaling, ConfigError> {
    let original_context = rope.positive("original_max_position_embeddings")?.unwrap_or(context);
    let factor = rope.positive("factor")?.unwrap_or(context / original_context);
    let scale = |m: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * m * factor.ln() + 1.0
        }
    };
    let (mscale, all_dim) = (rope.positive("mscale")?, rope.positive("mscale_all_dim")?);
    let attention_factor = rope.positive("attention_factor")?.unwrap_or(match (mscale, all_dim) {
        (Some(mscale), Some(all_dim)) => scale(mscale) / scale(all_dim),
        _ => scale(1.0),
    });
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: rope.positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: rope.positive("beta_slow")?.unwrap_or(1.0),
        truncate: rope.flag("truncate")?.unwrap_or(true),
        attention_factor,
    })
}
