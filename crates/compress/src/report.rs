//! What a compression did: the `result` of `--json`, the facts for the ledger, and `report.md`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use cotk_run::facts::Fact;
use cotk_run::units::{Bytes, ExpertId, LayerId, significant};
use serde::{Deserialize, Serialize};

use crate::attention::NarrowedAttention;
use crate::joint::points::Tried;
use crate::layer::Usage;
use crate::prune::plan::Pruned;
use crate::quality::Quality;
use crate::{CompressError, Result};

/// One MoE layer of the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    pub layer: u32,
    pub experts: usize,
    pub experts_kept: usize,
    /// Of its records.
    pub bytes: u64,
    /// ‖student − teacher‖ / ‖teacher‖ of the experts' mixed output on calibration tokens.
    pub relative_error: f64,
    /// What the kept down projections were multiplied by.
    pub gain: f32,
    /// Share of the calibration tokens' selections that went to experts that were dropped.
    pub dropped_share: f64,
}

/// An expert that too few calibration tokens chose for its figures to mean much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Starved {
    pub layer: u32,
    pub expert: ExpertId,
    pub tokens: u64,
    /// To [`ENOUGH_TOKENS`].
    pub lacks: u64,
}

/// Tokens from which on an expert's means are taken at their word.
pub const ENOUGH_TOKENS: u64 = 64;

/// Experts that are listed by name where a text is too short.
const NAMED: usize = 16;

/// Whether a text is long enough for statistics of experts: in every layer, at least half of them saw
/// [`ENOUGH_TOKENS`]. The others lean on their layer, and are counted.
///
/// # Errors
/// [`CompressError::FewTokens`] with what each expert of the first such layer lacks.
pub(crate) fn enough<'u>(calibration: &Path, usages: impl IntoIterator<Item = (LayerId, &'u Usage)>) -> Result<()> {
    for (layer, usage) in usages {
        let lacking: Vec<(usize, u64)> = usage
            .experts
            .iter()
            .map(|expert| ENOUGH_TOKENS.saturating_sub(expert.tokens))
            .enumerate()
            .filter(|(_, lacks)| *lacks > 0)
            .collect();
        if 2 * lacking.len() <= usage.experts.len() {
            continue;
        }
        let mut named: Vec<String> = lacking
            .iter()
            .take(NAMED)
            .map(|(expert, lacks)| format!("expert {expert} lacks {lacks}"))
            .collect();
        if lacking.len() > NAMED {
            named.push(format!("{} more lack some", lacking.len() - NAMED));
        }
        let chosen: u64 = usage.experts.iter().map(|expert| expert.tokens).sum();
        // Twice what would do if all experts were chosen alike: they are not.
        let wanted = 2 * ENOUGH_TOKENS * usage.experts.len() as u64;
        return Err(CompressError::FewTokens {
            file: calibration.to_owned(),
            layer,
            tokens: usage.tokens,
            experts: usage.experts.len(),
            starved: lacking.len(),
            named: named.join(", "),
            expected: (wanted * usage.tokens).div_ceil(chosen.max(1)),
        });
    }
    Ok(())
}

/// The whole result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub input: String,
    pub output: String,
    pub bytes_before: u64,
    /// All files but the report.
    pub bytes_after: u64,
    /// Of `dense.safetensors` and `experts.bin`: what `[budget] bytes` limits.
    pub weight_bytes_after: u64,
    pub expert_bytes_before: u64,
    /// Of `experts.bin`, headers and padding included.
    pub expert_bytes_after: u64,
    /// Codes, scales and zero points over the weights of all experts of the source.
    pub bits_per_expert_weight: f64,
    pub experts_kept: Vec<usize>,
    pub perplexity_before: f64,
    pub perplexity_after: f64,
    pub kl_nats: f64,
    pub top1_agreement: f64,
    pub quality: Quality,
    pub layers: Vec<LayerReport>,
    pub calibration_tokens: usize,
    /// Experts that no calibration token chose.
    pub experts_without_tokens: usize,
    /// All below [`ENOUGH_TOKENS`], by name.
    pub starved: Vec<Starved>,
    /// Experts whose Hessians leaned on others', with the tokens let in.
    #[serde(default)]
    pub hessians_shrunk: usize,
    /// Stored matrices of experts by form, `plain2 g64`.
    #[serde(default)]
    pub matrices: BTreeMap<String, usize>,
    /// Joint allocations that were measured end to end, in order; the one with the least KL was built, or, under a target
    /// of KL, the smallest that met it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tried: Vec<Tried>,
    /// What `[compress.attention]` made narrower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<NarrowedAttention>,
    /// What `[compress.prune]` chose, and what it costs; absent where use alone decided.
    pub pruned: Option<Pruned>,
    pub seed: u64,
    pub recipe_hash: String,
    /// Of this process: an interrupted run counts from its last start.
    pub seconds: f64,
    pub peak_rss_bytes: u64,
    /// One token with every weight in memory; absent without a profile.
    pub predicted_decode_ms: Option<f64>,
    pub resumed: bool,
    pub warnings: Vec<String>,
}

impl Report {
    /// What was measured, for the ledger.
    #[expect(clippy::cast_precision_loss, reason = "byte counts are far below 2^53")]
    pub fn facts(&self, subject: &str) -> Vec<Fact> {
        let half = |ci: [f64; 2]| (ci[1] - ci[0]) / 2.0;
        let tokens = self.quality.tokens as u64;
        let fact = |metric: &str, value: f64, unit: &str| Fact::new(subject, metric, value, unit);
        let mut facts = vec![
            fact("bytes_before", self.bytes_before as f64, "bytes"),
            fact("bytes_after", self.bytes_after as f64, "bytes"),
            fact("weight_bytes_after", self.weight_bytes_after as f64, "bytes"),
            fact("expert_bytes_before", self.expert_bytes_before as f64, "bytes"),
            fact("expert_bytes_after", self.expert_bytes_after as f64, "bytes"),
            fact("bits_per_expert_weight", self.bits_per_expert_weight, "bits"),
            fact("experts_kept", self.experts_kept.iter().sum::<usize>() as f64, "count"),
            fact("perplexity_before", self.perplexity_before, "perplexity").count(tokens),
            fact("perplexity_after", self.perplexity_after, "perplexity")
                .spread(half(self.quality.perplexity_after_ci95))
                .count(tokens),
            fact("kl_nats", self.kl_nats, "nats")
                .spread(half(self.quality.kl_ci95))
                .count(tokens),
            fact("top1_agreement", self.top1_agreement, "fraction").count(tokens),
            fact("seconds", self.seconds, "s"),
            fact("peak_rss_bytes", self.peak_rss_bytes as f64, "bytes"),
        ];
        facts.extend(self.predicted_decode_ms.map(|ms| fact("predicted_decode_ms", ms, "ms")));
        for layer in &self.layers {
            let subject = format!("{subject}:layer-{}", layer.layer);
            facts.push(Fact::new(&subject, "experts_kept", layer.experts_kept as f64, "count"));
            facts.push(Fact::new(&subject, "expert_bytes_after", layer.bytes as f64, "bytes"));
            facts.push(Fact::new(&subject, "relative_error", layer.relative_error, "fraction"));
        }
        facts
    }

    /// `report.md`.
    pub fn markdown(&self) -> String {
        let mut text = String::from("# Compression report\n\n");
        let number = |x: f64| significant(x, 4);
        let rows = [
            (
                "all files",
                Bytes(self.bytes_before).to_string(),
                Bytes(self.bytes_after).to_string(),
            ),
            (
                "routed experts",
                Bytes(self.expert_bytes_before).to_string(),
                Bytes(self.expert_bytes_after).to_string(),
            ),
            (
                "experts",
                self.layers.iter().map(|l| l.experts).sum::<usize>().to_string(),
                self.experts_kept.iter().sum::<usize>().to_string(),
            ),
            (
                "perplexity",
                number(self.perplexity_before),
                number(self.perplexity_after),
            ),
            ("KL (nats)", "0".to_owned(), number(self.kl_nats)),
            ("top-1 agreement", "1".to_owned(), number(self.top1_agreement)),
        ];
        let _ = writeln!(text, "`{}` → `{}`\n", self.input, self.output);
        let _ = writeln!(text, "| | before | after |\n|---|---:|---:|");
        for (what, before, after) in rows {
            let _ = writeln!(text, "| {what} | {before} | {after} |");
        }
        let quality = &self.quality;
        let _ = writeln!(
            text,
            "\n{} bits per expert weight of the source. Quality on {} tokens of {} (window {}, stride {}; 95 %: perplexity \
             {} to {}, KL {} to {}). Calibrated on {} tokens; {} experts saw none of them. Seed {}, recipe {}. \
             {} s, {} peak memory{}.",
            number(self.bits_per_expert_weight),
            quality.tokens,
            quality.text,
            quality.window,
            quality.stride,
            number(quality.perplexity_after_ci95[0]),
            number(quality.perplexity_after_ci95[1]),
            number(quality.kl_ci95[0]),
            number(quality.kl_ci95[1]),
            self.calibration_tokens,
            self.experts_without_tokens,
            self.seed,
            self.recipe_hash,
            number(self.seconds),
            Bytes(self.peak_rss_bytes),
            if self.resumed { ", resumed" } else { "" },
        );
        if let Some(ms) = self.predicted_decode_ms {
            let _ = writeln!(
                text,
                "\nPredicted time of one token with every weight in memory: {} ms.",
                number(ms)
            );
        }
        let _ = writeln!(
            text,
            "\n| layer | experts kept | bytes | relative error | gain | selections dropped |\n|---:|---:|---:|---:|---:|---:|"
        );
        for layer in &self.layers {
            let _ = writeln!(
                text,
                "| {} | {} of {} | {} | {} | {} | {} |",
                layer.layer,
                layer.experts_kept,
                layer.experts,
                Bytes(layer.bytes),
                number(layer.relative_error),
                number(f64::from(layer.gain)),
                number(layer.dropped_share),
            );
        }
        self.allocation(&mut text);
        if let Some(attention) = &self.attention {
            text += &attention.markdown();
        }
        self.pruning(&mut text);
        if !self.warnings.is_empty() {
            let _ = writeln!(text, "\nWarnings:\n");
            for warning in &self.warnings {
                let _ = writeln!(text, "- {warning}");
            }
        }
        text
    }

    /// What the joint allocation tried and what it chose.
    fn allocation(&self, text: &mut String) {
        let number = |x: f64| significant(x, 3);
        if !self.tried.is_empty() {
            let _ = writeln!(
                text,
                "\nAllocations tried end to end, codes fitted to a part of the calibration text, KL on held-out sections of it. \
                 Trust: the power that measured sensitivities were raised to. Expected: Σ of measured errors × traffic × sensitivities; \
                 the prior on traffic is in it: it ranks, KL says.\n"
            );
            let _ = writeln!(
                text,
                "| trust | bytes of codes | expected | KL, nats |\n|---:|---:|---:|---:|"
            );
            for tried in &self.tried {
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {} |",
                    tried.trust,
                    tried
                        .record_bytes
                        .map_or_else(String::new, |bytes| Bytes(bytes).to_string()),
                    number(tried.expected_loss),
                    number(tried.kl_nats),
                );
            }
        }
        if self.matrices.len() > 1 {
            let _ = writeln!(text, "\n| form | matrices |\n|---|---:|");
            for (form, count) in &self.matrices {
                let _ = writeln!(text, "| {form} | {count} |");
            }
        }
        if self.hessians_shrunk > 0 {
            let _ = writeln!(
                text,
                "\n{} experts had too few tokens for a Hessian of their own: theirs lean on tokens that would have come next, \
                 and on the layer's (λ in `cotk inspect --expert`).",
                self.hessians_shrunk
            );
        }
    }

    /// Why these experts and so many per layer, and which figures rest on few tokens.
    fn pruning(&self, text: &mut String) {
        let number = |x: f64| significant(x, 3);
        let list = |experts: &mut dyn Iterator<Item = String>| experts.collect::<Vec<_>>().join(" ");
        if let Some(pruned) = &self.pruned {
            let _ = writeln!(
                text,
                "\nExperts were dropped by {}, counts per layer {}; dropped means {}. Loss: ‖change of the mixed output‖² over \
                 its size, on the half of the sample that chose and on the other. Cost: KL of the model in nats per unit of \
                 the layer's loss, measured with that layer alone pruned.\n",
                pruned.method.name(),
                pruned.spread.name(),
                pruned.semantics.name()
            );
            let _ = writeln!(
                text,
                "| layer | dropped | loss, chosen | loss | cost | masks tried | experts |\n|---:|---:|---:|---:|---:|---:|---|"
            );
            for layer in &pruned.layers {
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {} | {} | {} | {} |",
                    layer.layer.0,
                    layer.mask.count(),
                    number(layer.chosen_loss),
                    number(layer.loss),
                    layer.kl_per_loss.map_or_else(String::new, number),
                    layer.tried,
                    list(&mut layer.mask.dropped().iter().map(usize::to_string)),
                );
            }
        }
        if !self.starved.is_empty() {
            let named = |s: &Starved| format!("{}.{} ({}, lacks {})", s.layer, s.expert.0, s.tokens, s.lacks);
            let _ = writeln!(
                text,
                "\nExperts that fewer than {ENOUGH_TOKENS} calibration tokens chose, as layer.expert (tokens): {}.",
                list(&mut self.starved.iter().map(named)),
            );
        }
    }
}
