//! After the last layer: quality, the container's other files, the report and what it predicts.

use std::collections::BTreeMap;

use cotk_container::dense::{PLANES, write_dense};
use cotk_container::manifest::{self, Checksum, DENSE, EXPERTS, Manifest, Origin, State};
use cotk_container::writer::{ContainerWriter, Head};
use cotk_latency::work::Work;
use cotk_model::moe::Mode;
use cotk_run::files;
use cotk_run::recipe as recipes;
use cotk_run::units::{ExpertId, significant};
use cotk_runtime::cost::decode_step;

use crate::choice::Form;
use crate::joint::recipe::Share;
use crate::layer::ExpertUsage;
use crate::partial::{BuiltMoe, Entry, Partial};
use crate::pipeline::{Job, Streams};
use crate::quality::{self, Quality};
use crate::report::{ENOUGH_TOKENS, LayerReport, Report, Starved};
use crate::{CompressError, Result};

impl Job<'_> {
    pub(crate) fn score(&self, partial: &mut Partial, streams: &Streams) -> Result<Quality> {
        if let Some(quality) = partial.scored() {
            return Ok(quality.clone());
        }
        self.with.progress.begin("scoring", 0, "tokens");
        let quality = quality::measure(
            [&self.ends, &self.student_ends],
            &self.texts.quality,
            &self.texts.quality_name,
            &streams.teacher,
            &streams.student,
            self.layers(),
            self.with.cancel,
        )?;
        self.with.progress.advance(quality.tokens as u64);
        self.with.progress.end();
        partial.finished(Entry::Scored(quality.clone()))?;
        Ok(quality)
    }

    /// Dense part, copied files, manifest. Repeatable: each file appears whole.
    pub(crate) fn finish_container(&self, partial: &Partial) -> Result<Manifest> {
        self.with.cancel.check()?;
        let out = partial.out();
        let tensors = self.source.student.as_ref();
        let routers = self.kept_routers(partial)?;
        write_dense(&out.join(DENSE), &self.source.dense, |tensor| {
            self.with.cancel.check()?;
            let name = tensor.name.strip_suffix(PLANES).unwrap_or(&tensor.name);
            if let Some((_, rows)) = routers.iter().find(|(router, _)| router == name) {
                return Ok(rows.clone());
            }
            Ok::<_, CompressError>(tensors.raw(name)?.into_owned())
        })?;
        let copied = self.source.copied();
        for name in &copied {
            let bytes = files::read(self.source.files.path.join(name), 1 << 30)?;
            files::write_atomic(out.join(name), &bytes)?;
        }
        let recipe = &self.request.recipe;
        let entries: Vec<_> = partial
            .built()
            .iter()
            .filter_map(|b| b.moe.as_ref().map(|m| m.entry.clone()))
            .collect();
        let little = recipe.compress.little().get();
        let has_little = entries
            .iter()
            .flat_map(|layer: &manifest::Layer| &layer.experts)
            .any(|e| match &e.state {
                State::Kept(record) => {
                    let widths = record.prefixes.iter().map(|p| p.bits);
                    widths.clone().any(|b| b == little) && widths.max() > Some(little)
                }
                State::Constant(_) | State::Dropped => false,
            });
        let head = Head {
            source: self.source.origin.clone(),
            config: self.source.config.clone(),
            recipe: Origin {
                hash: Checksum(recipes::hash(recipe)?),
                seed: recipe.seed,
                calibration: Checksum(files::checksum_file(&self.request.calibration)?),
                calibration_tokens: self.texts.calibration_tokens() as u64,
            },
            little_bits: has_little.then_some(little),
            dropped: recipe.compress.dropped,
            hidden: self.source.files.spec.hidden,
            dense: self.source.coded.clone(),
        };
        let writer = ContainerWriter::resume(&out, entries)?;
        let extra: Vec<&str> = copied.into_iter().chain([DENSE]).collect();
        Ok(writer.finish(head, &extra)?)
    }

    pub(crate) fn report(
        &self,
        partial: &Partial,
        manifest: &Manifest,
        quality: Quality,
        mut warnings: Vec<String>,
    ) -> Result<Report> {
        let spec = &self.source.files.spec;
        let built: Vec<&BuiltMoe> = partial.built().into_iter().filter_map(|b| b.moe.as_ref()).collect();
        let layers: Vec<LayerReport> = built.iter().map(|moe| layer_report(moe)).collect();
        let manifest_bytes = manifest.to_bytes().len() as u64;
        let without: usize = built
            .iter()
            .map(|m| m.usage.experts.iter().filter(|e| e.tokens == 0).count())
            .sum();
        if without > 0 {
            warnings.push(format!(
                "{without} experts saw no calibration token: their figures rest on their neighbours'"
            ));
        }
        let starved: Vec<Starved> = built.iter().flat_map(|moe| starved(moe)).collect();
        if starved.len() > without {
            warnings.push(format!(
                "{} experts saw fewer than {ENOUGH_TOKENS} calibration tokens (named in the report): give more calibration text",
                starved.len()
            ));
        }
        warnings.extend(judged_by_fit(partial));
        let predicted_decode_ms = self.predict(manifest, &mut warnings)?;
        let target = self.request.recipe.budget.target_ms.map(Share::get);
        warnings.extend(above_target(predicted_decode_ms, target));
        let counts: Vec<usize> = layers.iter().map(|l| l.experts_kept).collect();
        if counts.windows(2).any(|w| w[0] != w[1]) || counts.iter().any(|&c| c != spec.routing.experts) {
            warnings.push(
                "experts were dropped: other engines demand all of them, this container runs in cotk alone".to_owned(),
            );
        }
        Ok(Report {
            input: self.request.model.display().to_string(),
            output: self.request.out.display().to_string(),
            bytes_before: self.source.bytes,
            bytes_after: manifest.files.values().map(|f| f.bytes).sum::<u64>() + manifest_bytes,
            weight_bytes_after: manifest.files[DENSE].bytes + manifest.files[EXPERTS].bytes,
            expert_bytes_before: self.source.origin.expert_bytes,
            expert_bytes_after: manifest.files[EXPERTS].bytes,
            bits_per_expert_weight: bits_per_expert_weight(manifest),
            experts_kept: counts,
            perplexity_before: quality.perplexity_before,
            perplexity_after: quality.perplexity_after,
            kl_nats: quality.kl_nats,
            top1_agreement: quality.top1_agreement,
            quality,
            layers,
            calibration_tokens: self.texts.calibration_tokens(),
            experts_without_tokens: without,
            starved,
            hessians_shrunk: (built.iter().flat_map(|moe| &moe.hessians))
                .filter(|note| note.is_shrunk())
                .count(),
            matrices: forms(manifest),
            tried: partial.tried(),
            attention: partial.attention().cloned(),
            pruned: partial.pruned().cloned(),
            seed: self.request.recipe.seed,
            recipe_hash: String::from(manifest.recipe.hash),
            seconds: 0.0,
            peak_rss_bytes: 0,
            predicted_decode_ms,
            resumed: false,
            warnings,
        })
    }

    /// The time of one token at full width, every weight in memory.
    fn predict(&self, manifest: &Manifest, warnings: &mut Vec<String>) -> Result<Option<f64>> {
        let Some(cost) = self.with.cost else { return Ok(None) };
        let threads = u32::try_from(self.with.threads).unwrap_or(u32::MAX);
        let step = decode_step(manifest, &self.source.student_spec, Mode::Exact, threads);
        match cost.predict(&Work::Step(&step)) {
            Ok(prediction) => Ok(Some(prediction.ms)),
            Err(error) => {
                warnings.push(format!("the time of decoding is not predicted: {error}"));
                Ok(None)
            }
        }
    }
}

/// Experts whose errors were measured on tokens that their codes were fitted to, by name.
fn judged_by_fit(partial: &Partial) -> Option<String> {
    let measured = partial.measured();
    let offered = measured.iter().filter_map(|m| m.offered.as_deref());
    let named = offered.flat_map(|o| o.judged_by_fit.iter().map(|e| format!("{}.{}", o.offers.layer.0, e.0)));
    let named: Vec<String> = named.collect();
    (!named.is_empty()).then(|| {
        format!(
            "{} experts saw no held-out token that says anything of them: their errors were measured on tokens that their \
             codes were fitted to, too low (layer.expert: {})",
            named.len(),
            named.join(" ")
        )
    })
}

/// A target bounds the routed experts; attention, norms and the head come on top.
fn above_target(predicted: Option<f64>, target: Option<f64>) -> Option<String> {
    let (predicted, target) = (predicted?, target?);
    (predicted > target).then(|| {
        format!(
            "one token is predicted to take {} ms, above the target of {target} ms: that bounds its routed experts, the rest \
             of the model comes on top",
            significant(predicted, 4)
        )
    })
}

/// Experts whose figures rest on few tokens.
fn starved(moe: &BuiltMoe) -> Vec<Starved> {
    let few = |(expert, usage): (ExpertId, &ExpertUsage)| {
        (usage.tokens < ENOUGH_TOKENS).then(|| Starved {
            layer: moe.entry.layer.0,
            expert,
            tokens: usage.tokens,
            lacks: ENOUGH_TOKENS - usage.tokens,
        })
    };
    (0..).map(ExpertId).zip(&moe.usage.experts).filter_map(few).collect()
}

fn layer_report(moe: &BuiltMoe) -> LayerReport {
    let records = moe.entry.experts.iter().map(|e| match &e.state {
        State::Kept(record) => (record.bytes, 0.0),
        State::Constant(record) => (record.bytes, e.why.share),
        State::Dropped => (0, e.why.share),
    });
    let (bytes, dropped_share) = records.fold((0, 0.0), |(b, s), (bytes, share)| (b + bytes, s + share));
    LayerReport {
        layer: moe.entry.layer.0,
        experts: moe.entry.experts.len(),
        experts_kept: moe.entry.kept(),
        bytes,
        relative_error: moe.relative_error,
        gain: moe.entry.gain,
        dropped_share,
    }
}

/// Stored matrices by form.
fn forms(manifest: &Manifest) -> BTreeMap<String, usize> {
    let mut forms = BTreeMap::new();
    for expert in manifest.layers.iter().flat_map(|layer| &layer.experts) {
        if let State::Kept(record) = &expert.state {
            for format in record.formats() {
                let form = Form {
                    code: format.code(),
                    group: format.group(),
                    scales: format.scales(),
                };
                *forms.entry(form.to_string()).or_default() += 1;
            }
        }
    }
    forms
}

/// Codes, scales, zero points, factors and constants over the weights of all experts of the source.
#[expect(clippy::cast_precision_loss, reason = "byte counts are far below 2^53")]
pub(crate) fn bits_per_expert_weight(manifest: &Manifest) -> f64 {
    let experts = manifest.layers.iter().flat_map(|layer| &layer.experts);
    let bytes = experts.map(|expert| match &expert.state {
        State::Kept(record) => [&record.gate, &record.up, &record.down].iter().map(|m| m.bytes()).sum(),
        State::Constant(record) => record.section.bytes,
        State::Dropped => 0,
    });
    let bytes: u64 = bytes.sum();
    8.0 * bytes as f64 / manifest.source.expert_weights.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prediction_above_the_target_is_said_with_both_numbers() {
        let said = above_target(Some(2.5), Some(2.0)).unwrap();
        assert!(said.contains("2.500 ms") && said.contains("2 ms"), "{said}");
        for (predicted, target) in [(Some(2.0), Some(2.0)), (None, Some(2.0)), (Some(2.5), None)] {
            assert_eq!(above_target(predicted, target), None);
        }
    }
}
