//! Stages: each sees one layer and returns proposals with measured loss, bytes and predicted time. They propose, they do
//! not decide (`decide`) and write nothing.

use cotk_container::manifest::Prefix;
use cotk_container::writer::CodedExpert;
use cotk_latency::predict::CostModel;
use cotk_latency::work::{Key, Work};
use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_quant::code::Code;
use cotk_quant::encode::encode;
use cotk_quant::layout::MatrixFormat;
use cotk_run::units::ExpertId;
use cotk_runtime::cost::expert_key;
use cotk_runtime::mix::{Cpu, run_expert};
use cotk_runtime::store::{CodedLayer, ExpertStore};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::layer::{LayerView, Sample};
use crate::{CompressError, Result};

/// What may become of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    Drop,
    /// All three matrices in this code.
    Code(Code),
}

/// One candidate for one expert.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    pub expert: ExpertId,
    pub change: Change,
    /// Comparable between experts and layers, see [`LayerView::loss`].
    pub loss: f64,
    /// Of its record, with what aligning it may cost; of a drop 0: what going means is for `decide` to count.
    pub bytes: u64,
    /// Predicted time that one token at this expert takes; 0 without a profile.
    pub ms: f64,
}

impl Proposal {
    /// Without loss, bytes and time.
    pub(crate) fn free(expert: ExpertId, change: Change) -> Self {
        Self {
            expert,
            change,
            loss: 0.0,
            bytes: 0,
            ms: 0.0,
        }
    }
}

/// Proposes changes of one layer.
pub trait Stage: Sync {
    /// In reports and errors.
    fn name(&self) -> &'static str;

    /// # Errors
    /// Weights that cannot be read or coded.
    fn propose(&self, layer: &LayerView<'_>) -> Result<Vec<Proposal>>;
}

/// Proposes to drop the experts that the fewest calibration tokens chose.
#[derive(Debug, Clone, Copy)]
pub struct DropLeastUsed {
    pub count: usize,
}

impl Stage for DropLeastUsed {
    fn name(&self) -> &'static str {
        "drop least used"
    }

    fn propose(&self, layer: &LayerView<'_>) -> Result<Vec<Proposal>> {
        let mut dropped = layer.usage.least_used();
        dropped.truncate(self.count);
        dropped.sort();
        dropped
            .into_par_iter()
            .map(|expert| {
                // Masked experts leave a hole of their own output: losses of several nearly add up.
                let sample = layer.samples.at_least_pooled(expert);
                let lost = layer.weights(expert)?.apply(&sample.rows);
                let errors: Vec<f64> = lost.chunks_exact(layer.spec.hidden).map(square).collect();
                Ok(Proposal {
                    expert,
                    change: Change::Drop,
                    loss: layer.loss(expert, &sample.gates, &errors),
                    bytes: 0,
                    ms: 0.0,
                })
            })
            .collect()
    }
}

/// Proposes each code, rounded to the nearest, for each expert.
pub struct RoundToNearest<'a> {
    pub codes: &'a [Code],
    pub group: usize,
    pub cpu: Cpu,
    pub cost: Option<&'a dyn CostModel>,
    pub threads: u32,
}

impl Stage for RoundToNearest<'_> {
    fn name(&self) -> &'static str {
        "round to nearest"
    }

    fn propose(&self, layer: &LayerView<'_>) -> Result<Vec<Proposal>> {
        let of_expert = |expert| -> Result<Vec<Proposal>> {
            let sample = layer.samples.at_least_pooled(expert);
            let weights = layer.weights(expert)?;
            let truth = weights.apply(&sample.rows);
            let of_code = |&code: &Code| {
                let coded = code_expert(layer, expert, &weights, code, self.group)?;
                let output = run_coded(self.cpu, layer, coded, code.full().get(), &sample.rows);
                let errors = squared_errors(&output, &truth, layer.spec.hidden);
                Ok(Proposal {
                    expert,
                    change: Change::Code(code),
                    loss: layer.loss(expert, &sample.gates, &errors),
                    bytes: record_bytes(layer.spec.hidden, layer.spec.moe_intermediate, code, self.group),
                    ms: self.predicted_ms(layer, code),
                })
            };
            self.codes.iter().map(of_code).collect()
        };
        let proposals: Vec<Vec<Proposal>> = layer.experts().into_par_iter().map(of_expert).collect::<Result<_>>()?;
        Ok(proposals.into_iter().flatten().collect())
    }
}

impl RoundToNearest<'_> {
    /// 0 where nothing is known: no budget weighs it then, and the report says that nothing was predicted.
    fn predicted_ms(&self, layer: &LayerView<'_>, code: Code) -> f64 {
        let (hidden, inner) = (layer.spec.hidden, layer.spec.moe_intermediate);
        let key = expert_key(
            hidden,
            inner,
            code.full().get(),
            code.planes(),
            self.group,
            self.threads,
        );
        let predict = |cost: &dyn CostModel| cost.predict(&Work::Operator(Key::Expert(key))).ok();
        self.cost.and_then(predict).map_or(0.0, |prediction| prediction.ms)
    }
}

/// Bytes of a record of this code, and what aligning it costs at most.
pub fn record_bytes(hidden: usize, inner: usize, code: Code, group: usize) -> u64 {
    let format = |rows, cols| MatrixFormat::try_new(rows, cols, code, group).expect("a model's sizes are in bounds");
    let (wide, down) = (format(inner, hidden), format(hidden, inner));
    cotk_container::layout::aligned_record_bytes(wide, wide, down)
}

/// Codes all three matrices, rounded to the nearest; prefixes are not measured yet.
///
/// # Errors
/// [`CompressError::Weights`]: a weight that no f16 scale reaches.
pub fn code_expert(
    layer: &LayerView<'_>,
    expert: ExpertId,
    weights: &Mlp,
    code: Code,
    group: usize,
) -> Result<CodedExpert> {
    let matrix = |name, linear: &Linear| {
        let coded = MatrixFormat::try_new(linear.outputs(), linear.inputs(), code, group)
            .and_then(|format| encode(&linear.weights(), format));
        coded.map_err(|source| CompressError::Weights {
            file: layer.source.file("").to_owned(),
            layer: layer.layer,
            expert,
            matrix: name,
            source,
        })
    };
    Ok(CodedExpert::new(
        matrix("gate", &weights.gate)?,
        matrix("up", &weights.up)?,
        matrix("down", &weights.down)?,
    ))
}

/// Measures what each prefix loses on the rows that were routed here.
///
/// The codes were not fitted to these rows: rounding to the nearest sees weights alone, so they are held out.
pub fn measure_prefixes(
    cpu: Cpu,
    layer: &LayerView<'_>,
    coded: CodedExpert,
    weights: &Mlp,
    sample: &Sample,
) -> CodedExpert {
    let widths = cotk_container::layout::prefixes([coded.gate.format, coded.up.format, coded.down.format]);
    let hidden = layer.spec.hidden;
    let truth = weights.apply(&sample.rows);
    let weigh = |squares: &mut dyn Iterator<Item = f64>| -> f64 {
        let gates = sample.gates.iter().map(|&g| f64::from(g) * f64::from(g));
        gates.zip(squares).map(|(g, s)| g * s).sum()
    };
    let size = weigh(&mut truth.chunks_exact(hidden).map(square));
    let store = [Some(coded)];
    let mut prefixes = Vec::with_capacity(widths.len());
    for bits in widths {
        let output = run_stored(cpu, layer, &store, bits, &sample.rows);
        let error = weigh(&mut squared_errors(&output, &truth, hidden).into_iter());
        let own = weigh(&mut output.chunks_exact(hidden).map(square));
        let relative = |x: f64| (size > 0.0).then(|| (x / size).sqrt());
        prefixes.push(Prefix {
            bits,
            delta: relative(error),
            rho: relative(own),
            tokens: sample.gates.len() as u64,
        });
    }
    let [coded] = store;
    CodedExpert {
        prefixes,
        ..coded.expect("put in above")
    }
}

fn run_coded(cpu: Cpu, layer: &LayerView<'_>, coded: CodedExpert, bits: u32, rows: &[f32]) -> Vec<f32> {
    run_stored(cpu, layer, &[Some(coded)], bits, rows)
}

fn run_stored(
    cpu: Cpu,
    layer: &LayerView<'_>,
    experts: &[Option<CodedExpert>; 1],
    bits: u32,
    rows: &[f32],
) -> Vec<f32> {
    let store = CodedLayer {
        layer: layer.layer,
        experts,
        constants: &[],
    };
    let view = store.expert(layer.layer, ExpertId(0), bits);
    let view = view.expect("nothing is read from a file").expect("put in above");
    run_expert(cpu, &view, rows)
}

fn square(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// ‖output − truth‖² of each row.
fn squared_errors(output: &[f32], truth: &[f32], hidden: usize) -> Vec<f64> {
    let difference = |(a, b): (&[f32], &[f32])| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
            .sum()
    };
    output
        .chunks_exact(hidden)
        .zip(truth.chunks_exact(hidden))
        .map(difference)
        .collect()
}
