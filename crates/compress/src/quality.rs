//! What the compression cost: both models' last states meet the head and are scored as `cotk eval` scores them.
//! Law: equal to evaluating the finished container against its source.

use std::sync::Arc;

use cotk_model::checkpoint::TensorSource;
use cotk_model::eval::{Evaluation, Target, Window, score, summary, windows};
use cotk_model::generate::MoeTotals;
use cotk_model::model::Model;
use cotk_model::moe::MoeShape;
use cotk_model::reference::{Absent, PlainMoe};
use cotk_model::spec::ModelSpec;
use cotk_run::cancel::Cancel;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::states::Stream;

/// Rows whose logits are in memory at once, per model.
const LOGIT_ROWS: usize = 512;

/// Before and after, on one text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// What was read.
    pub text: String,
    /// Targets scored.
    pub tokens: usize,
    pub window: usize,
    pub stride: usize,
    pub perplexity_before: f64,
    pub perplexity_after: f64,
    pub perplexity_after_ci95: [f64; 2],
    /// KL(before ‖ after), mean over targets.
    pub kl_nats: f64,
    pub kl_ci95: [f64; 2],
    pub top1_agreement: f64,
}

/// How the quality text is cut: window and stride as in `cotk eval`.
pub fn plan(spec: &ModelSpec, tokens: usize) -> (usize, usize, Vec<Window>) {
    let window = spec.context.min(1024);
    let stride = (window / 2).max(1);
    (window, stride, windows(tokens, window, stride))
}

/// Embedding, final norm and head of a model, and none of its layers.
///
/// # Errors
/// Missing or ill-shaped tensors.
pub fn ends(spec: &ModelSpec, source: &dyn TensorSource) -> Result<Model> {
    let spec = ModelSpec {
        layers: Vec::new(),
        ..spec.clone()
    };
    let shape = MoeShape {
        hidden: spec.hidden,
        rule: spec.routing,
        layers: Vec::new(),
    };
    let nobody = PlainMoe::from_experts(shape, Vec::new(), Absent::Masked);
    Ok(Model::load(spec, source, Arc::new(nobody))?)
}

/// Scores the states that left the last layer; `ends` are those of the source and of the compressed model.
///
/// # Errors
/// The file system's, Ctrl-C.
pub fn measure(
    [source, compressed]: [&Model; 2],
    tokens: &[u32],
    text: &str,
    teacher: &Stream,
    student: &Stream,
    layers: usize,
    cancel: &Cancel,
) -> Result<Quality> {
    let spec = source.spec();
    let (window, stride, windows) = plan(spec, tokens.len());
    // Scored rows of both are small next to logits: one row of states per target.
    let before = scored_states(teacher, &windows, layers, spec.hidden, cancel)?;
    let after = scored_states(student, &windows, layers, spec.hidden, cancel)?;
    let mut targets: Vec<Target> = Vec::with_capacity(tokens.len());
    for (chunk, next) in tokens[1..].chunks(LOGIT_ROWS).enumerate() {
        cancel.check()?;
        let rows = chunk * LOGIT_ROWS * spec.hidden..(chunk * LOGIT_ROWS + next.len()) * spec.hidden;
        let truth = source.logits(&before[rows.clone()]);
        targets.extend(score(&compressed.logits(&after[rows]), Some(&truth), next, spec.vocab));
    }
    let evaluation: Evaluation = summary(&targets, window, stride, &MoeTotals::default(), 0.0);
    let against = evaluation.reference.expect("every target has a truth");
    Ok(Quality {
        text: text.to_owned(),
        tokens: evaluation.tokens,
        window,
        stride,
        perplexity_before: against.perplexity,
        perplexity_after: evaluation.perplexity,
        perplexity_after_ci95: evaluation.perplexity_ci95,
        kl_nats: against.kl_nats,
        kl_ci95: against.kl_ci95,
        top1_agreement: against.top1_agreement,
    })
}

/// Rows of the scored positions, `[targets, hidden]`.
fn scored_states(
    stream: &Stream,
    windows: &[Window],
    layers: usize,
    hidden: usize,
    cancel: &Cancel,
) -> Result<Vec<f32>> {
    let mut scored = Vec::new();
    let mut windows = windows.iter();
    stream.read(layers, cancel, |rows, batch| {
        let mut end = 0;
        for (&tokens, window) in batch.iter().zip(windows.by_ref()) {
            end += tokens;
            let count = window.scored.len();
            scored.extend_from_slice(&rows[(end - count) * hidden..end * hidden]);
        }
        Ok(())
    })?;
    Ok(scored)
}
