//! What each matrix of each expert of a layer could become, and what it would lose: codes fitted to some tokens, errors
//! measured on others. Law: rounding to nearest under diag(H) leaves out what is far above the lower hull of bytes and
//! error; what stays, and what is asked for by name, is solved and measured as it would be built.

use cotk_container::low_rank::{Factors, LowRank};
use cotk_latency::work::{ExpertKey, Key, Work};
use cotk_model::layers::linear::Linear;
use cotk_model::layers::{Mlp, silu};
use cotk_quant::QuantError;
use cotk_quant::decode::decode;
use cotk_quant::encode::encode;
use cotk_quant::gptq::{Factor, weighted_square};
use cotk_quant::hessian::{Accumulator, Moment};
use cotk_run::units::{ExpertId, LayerId};
use cotk_runtime::cost::expert_key;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::code::{self, HessianNote, How, times};
use super::recipe::Rounding;
use super::rows::{LayerRows, Picked, Traffic};
use super::stored::Stored;
use super::variants::Others;
use crate::choice::{Form, Kind, LayerOffers, MatrixChoice, Offer, Variant};
use crate::pipeline::Job;
use crate::{CompressError, Result};

/// Held-out rows that gate and up are judged by.
const JUDGE_ROWS: usize = 512;
/// Held-out rows that down is judged by.
const JUDGE_DOWN_ROWS: usize = 2048;
/// Below as many held-out rows, tokens that would have come judge too.
const FEW_ROWS: usize = 32;
/// Rows of a matrix that stand for it where forms are compared by rounding to nearest.
const PROXY_ROWS: usize = 16;
/// What rounding to nearest may lose above the hull for a form to be solved.
const SLACK: f64 = 1.15;

/// What the first pass keeps of a layer in the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offered {
    /// Errors per unit of an expert's traffic.
    pub offers: LayerOffers,
    /// Of each expert.
    pub traffic: Vec<Traffic>,
    /// For gate, up and down: Σ over experts of the error of `probe_form` rounded to nearest, times their mean traffic.
    pub probed: [f64; 3],
    pub notes: Vec<HessianNote>,
    /// Forms that were solved, of all experts and matrices.
    pub solved: usize,
    /// Experts that no held-out token came to or would have: judged on tokens that their codes were fitted to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub judged_by_fit: Vec<ExpertId>,
}

impl Offered {
    /// The offers with each error times what its expert counts: its mean traffic, `spread` times the deviation of that
    /// between sections of the text, and `prior` times the mean over the layer's experts.
    ///
    /// Text to come is another mix of kinds, and holds kinds that calibration lacks. Over all mixes within a χ² distance
    /// of `spread`² of the calibration's, mean + `spread` · deviation bounds what an expert gets; the prior stands for
    /// kinds that no section shows.
    pub(crate) fn weighed(&self, prior: f64, spread: f64) -> LayerOffers {
        let all: f64 = self.traffic.iter().map(|traffic| traffic.mean).sum();
        let mean = all / count(self.traffic.len().max(1) as u64);
        let mut offers = self.offers.clone();
        let counts: Vec<f64> = (self.traffic.iter())
            .map(|own| own.mean + spread * own.deviation + prior * mean)
            .collect();
        let weigh = |offer: &mut Offer| offer.error *= counts[offer.expert.index()];
        offers.offers.iter_mut().for_each(weigh);
        for variant in &mut offers.variants {
            variant.error *= counts[variant.expert.index()];
            variant.offers.iter_mut().for_each(weigh);
        }
        offers
    }
}

/// What sensitivities are measured with: an error that is small, and large against the noise of 8-bit activations.
pub(crate) fn probe_form() -> Form {
    Form::plain(cotk_quant::code::Code::Plain(cotk_quant::code::Bits::B3), 32)
}

/// What to offer.
#[derive(Debug, Clone)]
pub(crate) struct Menu {
    pub(crate) forms: Vec<Form>,
    /// Offered wherever they lie.
    pub(crate) always: Vec<Form>,
    /// Ranks of corrections to offer on top of each form's codes.
    pub(crate) ranks: Vec<usize>,
    pub(crate) others: Others,
    pub(crate) how: How,
}

/// What was found of one expert.
struct Found {
    offers: Vec<Offer>,
    variants: Vec<Variant>,
    probed: [f64; 3],
    note: HessianNote,
    is_judged_by_fit: bool,
}

/// One expert while it is judged.
pub(super) struct Judge<'a> {
    weights: &'a Mlp,
    hidden: usize,
    /// Weights of rows.
    pub(super) picked: Picked,
    /// No held-out token says anything.
    is_by_fit: bool,
    /// `gate·x` and `up·x`, `[rows, inner]`.
    gate: Vec<f32>,
    up: Vec<f32>,
    pub(super) inputs: Vec<f32>,
    /// `downᵀ·down`, `[inner, inner]`.
    down_square: Array2<f64>,
    /// Second moments of what down sees.
    middle: Moment,
}

impl Job<'_> {
    /// Solves and measures the menu for all experts of a layer.
    pub(crate) fn layer_offers(&self, layer: LayerId, rows: &LayerRows, menu: &Menu) -> Result<Offered> {
        let hidden = self.source.files.spec.hidden;
        let pool = code::pool(rows, hidden)?;
        let windows = self.texts.calibration.iter().zip(&self.texts.sections);
        let sections: Vec<u64> = windows.flat_map(|(window, &of)| vec![of; window.len()]).collect();
        let traffic = rows.traffic(&sections);
        let experts: Vec<ExpertId> = (0..).map(ExpertId).take(rows.usage.experts.len()).collect();
        let of = |expert| self.expert_offers(layer, expert, rows, pool.as_ref(), menu);
        let found: Vec<_> = experts.into_par_iter().map(of).collect::<Result<_>>()?;
        let mut probed = [0.0; 3];
        let by_fit = found.iter().filter(|found| found.is_judged_by_fit);
        let judged_by_fit = by_fit.map(|found| found.note.expert).collect();
        let (mut offers, mut variants, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for (found, traffic) in found.into_iter().zip(&traffic) {
            offers.extend(found.offers);
            variants.extend(found.variants);
            notes.push(found.note);
            let sums = probed.iter_mut().zip(found.probed);
            sums.for_each(|(sum, error)| *sum += error * traffic.mean);
        }
        Ok(Offered {
            solved: offers.len(),
            offers: LayerOffers {
                layer,
                usage: rows.usage.clone(),
                offers,
                variants,
                sensitivity: [1.0; 3],
            },
            traffic,
            probed,
            notes,
            judged_by_fit,
        })
    }

    fn expert_offers(
        &self,
        layer: LayerId,
        expert: ExpertId,
        rows: &LayerRows,
        pool: Option<&Moment>,
        menu: &Menu,
    ) -> Result<Found> {
        self.with.cancel.check()?;
        let hidden = self.source.files.spec.hidden;
        let weights = self.kept_weights(layer, expert, None)?;
        let (gate, up) = (weights.gate.weights(), weights.up.weights());
        let mut outer = code::outer(rows, expert, hidden, pool, &menu.how)?;
        let inner = code::inner(rows, &mut outer.fed, hidden, (&gate, &up), &menu.how)?;
        let judge = Judge::new(&weights, expert, rows, hidden)?;
        let mut probed = [0.0; 3];
        for kind in Kind::ALL {
            let matrix = of_kind(&weights, kind).weights();
            let (height, width) = kind.shape(hidden, weights.gate.outputs());
            let fail = |source| self.unfit(layer, expert, kind, source);
            let format = probe_form().format(height, width).map_err(fail)?;
            let coded = encode(&matrix, format).map_err(fail)?;
            let probe = decode(&coded.prefix(probe_form().code.full()).expect("its full width"));
            probed[kind as usize] = judge.error(kind, &probe)?;
        }
        let place = (layer, expert);
        let factors = [&outer.factor, &inner];
        Ok(Found {
            offers: self.matrix_offers(place, &weights, factors, &judge, menu)?,
            variants: self.variants(place, &weights, rows, (&judge, factors), menu)?,
            probed,
            note: outer.fed.note,
            is_judged_by_fit: judge.is_by_fit,
        })
    }

    /// Solves and measures the menu for the matrices of one expert, or of what stays of it; by kind, then bytes.
    pub(super) fn matrix_offers(
        &self,
        (layer, expert): (LayerId, ExpertId),
        weights: &Mlp,
        [outer, inner]: [&Factor; 2],
        judge: &Judge<'_>,
        menu: &Menu,
    ) -> Result<Vec<Offer>> {
        let hidden = self.source.files.spec.hidden;
        let mut offers = Vec::new();
        for kind in Kind::ALL {
            let factor = if kind == Kind::Down { inner } else { outer };
            let matrix = of_kind(weights, kind).weights();
            let (height, width) = kind.shape(hidden, weights.gate.outputs());
            let fail = |source| self.unfit(layer, expert, kind, source);
            for form in shortlist(&matrix, width, factor, menu).map_err(fail)? {
                let format = form.format(height, width).map_err(fail)?;
                let coded = code::code_matrix(&matrix, height, form, factor, &menu.how).map_err(fail)?;
                for &rank in [0].iter().chain(&menu.ranks) {
                    let stored = Stored::corrected(coded.clone(), &matrix, factor, rank)?;
                    let factors = stored.factors.as_ref().map(Factors::low_rank);
                    offers.push(Offer {
                        expert,
                        kind,
                        choice: MatrixChoice { form, rank },
                        error: judge.error(kind, &stored.decoded())?,
                        bytes: matrix_bytes(&format) + factors.map_or(0, |factors| factors.bytes()),
                        ms: self.matrix_ms(form, weights.gate.outputs(), factors),
                    });
                }
            }
        }
        offers.sort_by_key(|offer| (offer.kind, offer.bytes));
        Ok(offers)
    }

    /// A matrix that cannot be coded, by name.
    pub(super) fn unfit(&self, layer: LayerId, expert: ExpertId, kind: Kind, source: QuantError) -> CompressError {
        CompressError::Weights {
            file: self.source.files.source.file("").to_owned(),
            layer,
            expert,
            matrix: kind.name(),
            source,
        }
    }

    /// A third of what an expert of this form and inner size takes, and of one that is such a correction, as the prediction
    /// of a container counts it; 0 without a profile: no budget weighs it then.
    fn matrix_ms(&self, form: Form, inner: usize, factors: Option<LowRank>) -> f64 {
        let spec = &self.source.files.spec;
        let Some(cost) = self.with.cost else { return 0.0 };
        let threads = u32::try_from(self.with.threads).unwrap_or(u32::MAX);
        let key = expert_key(
            spec.hidden,
            inner,
            form.code.full().get(),
            form.code.planes(),
            form.group,
            threads,
        );
        let corrected = factors.map(|factors| ExpertKey {
            rank: u32::try_from(factors.rank()).expect("ranks fit 32 bits"),
            bits: factors.left.code().full().get(),
            planes: 1,
            group: u32::try_from(factors.left.group()).expect("groups fit 32 bits"),
            ..key
        });
        let ms = |key| {
            let predicted = cost.predict(&Work::Operator(Key::Expert(key))).ok();
            predicted.map_or(0.0, |prediction| prediction.ms / 3.0)
        };
        ms(key) + corrected.map_or(0.0, ms)
    }
}

/// Of a matrix in a record: planes and zero points.
pub fn matrix_bytes(format: &cotk_quant::layout::MatrixFormat) -> u64 {
    (format.total_bytes() + 4 * format.code().planes()) as u64
}

fn of_kind(mlp: &Mlp, kind: Kind) -> &Linear {
    match kind {
        Kind::Gate => &mlp.gate,
        Kind::Up => &mlp.up,
        Kind::Down => &mlp.down,
    }
}

impl<'a> Judge<'a> {
    pub(super) fn new(weights: &'a Mlp, expert: ExpertId, rows: &LayerRows, hidden: usize) -> Result<Self> {
        let (picked, is_by_fit) = rows.judging(expert, FEW_ROWS);
        let (gate, up) = (weights.gate.weights(), weights.up.weights());
        let inner = weights.gate.outputs();
        let many = sorted(picked.clone()).thinned(JUDGE_DOWN_ROWS);
        let mut middle = Accumulator::new(inner);
        middle.add(
            &code::middle(&rows.inputs(&many.tokens)?, &gate, &up, hidden),
            &many.weights,
        )?;
        let picked = sorted(picked).thinned(JUDGE_ROWS);
        let inputs = rows.inputs(&picked.tokens)?;
        let down = weights.down.weights();
        let down = ArrayView2::from_shape((hidden, inner), &down)
            .expect("a down projection")
            .mapv(f64::from);
        Ok(Self {
            weights,
            hidden,
            gate: times(&inputs, &gate, hidden),
            up: times(&inputs, &up, hidden),
            inputs,
            down_square: down.t().dot(&down),
            middle: middle.finish(),
            picked,
            is_by_fit,
        })
    }

    /// As [`error`](Self::error), with other outputs `[tokens, hidden]` in the place of the expert's own.
    pub(super) fn whole_error(&self, others: &[f32]) -> f64 {
        let middle: Vec<f32> = self.gate.iter().zip(&self.up).map(|(g, u)| silu(*g) * u).collect();
        let own = times(&middle, &self.weights.down.weights(), self.weights.gate.outputs());
        let rows = own.chunks_exact(self.hidden).zip(others.chunks_exact(self.hidden));
        let square = |(a, b): (&[f32], &[f32])| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum() };
        let sum: f64 = rows.map(square).zip(&self.picked.weights).map(|(x, w)| x * w).sum();
        let weights: f64 = self.picked.weights.iter().sum();
        if weights > 0.0 {
            sum / weights / count(self.hidden as u64)
        } else {
            0.0
        }
    }

    /// Squared error of the expert's output with one matrix in the place of another, per value: its mean over held-out
    /// tokens, weighted. (How much these weigh is the traffic's to say: a few held-out tokens know the error that a form
    /// makes, but not how often the expert is used.)
    fn error(&self, kind: Kind, matrix: &[f32]) -> Result<f64> {
        let inner = self.weights.gate.outputs();
        let mean = match kind {
            Kind::Down => {
                let down = self.weights.down.weights();
                let difference: Vec<f32> = matrix.iter().zip(&*down).map(|(a, b)| a - b).collect();
                weighted_square(&difference, self.middle.second.view())?
            }
            Kind::Gate | Kind::Up => {
                let other = times(&self.inputs, matrix, self.hidden);
                let mut difference = Array2::<f64>::zeros((self.picked.tokens.len(), inner));
                let cells = difference.iter_mut().zip(&other).zip(self.gate.iter().zip(&self.up));
                for ((cell, &other), (&gate, &up)) in cells {
                    let changed = if kind == Kind::Gate {
                        silu(other) * up
                    } else {
                        silu(gate) * other
                    };
                    *cell = f64::from(changed - silu(gate) * up);
                }
                let seen = difference.dot(&self.down_square);
                let rows = difference.rows().into_iter().zip(seen.rows()).zip(&self.picked.weights);
                let sum: f64 = rows.map(|((d, s), w)| w * d.dot(&s)).sum();
                let weights: f64 = self.picked.weights.iter().sum();
                if weights > 0.0 { sum / weights } else { 0.0 }
            }
        };
        Ok(mean / count(self.hidden as u64))
    }
}

/// Tokens ascending.
fn sorted(picked: Picked) -> Picked {
    let mut order: Vec<usize> = (0..picked.tokens.len()).collect();
    order.sort_by_key(|&i| picked.tokens[i]);
    Picked {
        tokens: order.iter().map(|&i| picked.tokens[i]).collect(),
        gates: order.iter().map(|&i| picked.gates[i]).collect(),
        weights: order.iter().map(|&i| picked.weights[i]).collect(),
    }
}

/// Forms on or next to the lower hull of bytes and rounding errors, and those that are asked for by name.
fn shortlist(
    matrix: &[f32],
    width: usize,
    factor: &Factor,
    menu: &Menu,
) -> std::result::Result<Vec<Form>, cotk_quant::QuantError> {
    let mut all = menu.forms.clone();
    all.extend(menu.always.iter().filter(|form| !menu.forms.contains(form)));
    if all.len() <= 2 || menu.how.rounding == Rounding::Nearest {
        return Ok(all);
    }
    let height = matrix.len() / width;
    let count = height.min(PROXY_ROWS);
    let sample: Vec<f32> = (0..count)
        .flat_map(|i| &matrix[(2 * i + 1) * height / (2 * count) * width..][..width])
        .copied()
        .collect();
    let diagonal = factor.hessian().diag().to_vec();
    let mut points = Vec::with_capacity(all.len());
    for &form in &all {
        let format = form.format(count, width)?;
        let coded = encode(&sample, format)?;
        let seen = decode(&coded.prefix(form.code.full())?);
        let squares = sample.iter().zip(&seen).zip(diagonal.iter().cycle());
        let error: f64 = squares.map(|((a, b), h)| h * f64::from(a - b).powi(2)).sum();
        points.push((matrix_bytes(&form.format(height, width)?), error));
    }
    let near = near_hull(&points, SLACK);
    let kept = all
        .iter()
        .zip(near)
        .filter(|(form, near)| *near || menu.always.contains(form));
    Ok(kept.map(|(form, _)| *form).collect())
}

/// Which points (bytes, error) no other beats in both, and lie at most `slack` times above the lower convex hull.
fn near_hull(points: &[(u64, f64)], slack: f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| points[a].0.cmp(&points[b].0).then(points[a].1.total_cmp(&points[b].1)));
    let at = |i: usize| (count(points[i].0), points[i].1);
    let mut hull: Vec<usize> = Vec::new();
    for &i in &order {
        let (x, y) = at(i);
        if hull.last().is_some_and(|&last| y >= at(last).1) {
            continue;
        }
        while let [.., a, b] = hull[..] {
            let ((xa, ya), (xb, yb)) = (at(a), at(b));
            if (ya - yb) * (x - xb) > (yb - y) * (xb - xa) {
                break;
            }
            hull.pop();
        }
        hull.push(i);
    }
    let height = |x: f64| {
        let next = hull.partition_point(|&i| at(i).0 < x);
        match (next.checked_sub(1), hull.get(next)) {
            (Some(before), Some(&after)) => {
                let ((xa, ya), (xb, yb)) = (at(hull[before]), at(after));
                ya + (yb - ya) * (x - xa) / (xb - xa)
            }
            (None, Some(&first)) => at(first).1,
            (_, None) => hull.last().map_or(0.0, |&last| at(last).1),
        }
    };
    // Of equals the first stays.
    let is_beaten = |at: usize, (bytes, error): (u64, f64)| {
        let mut others = points.iter().enumerate();
        others.any(|(other, &(b, e))| b <= bytes && e <= error && (b < bytes || e < error || other < at))
    };
    let near = |(at, &(bytes, error)): (usize, &(u64, f64))| {
        error <= slack * height(count(bytes)) && !is_beaten(at, (bytes, error))
    };
    points.iter().enumerate().map(near).collect()
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn count(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beaten_or_far_above_the_hull_is_left_out() {
        let points = [
            (10, 8.0),
            (20, 2.0),
            (20, 2.5),
            (30, 1.9),
            (40, 0.5),
            (50, 0.6),
            (31, 1.3),
        ];
        assert_eq!(near_hull(&points, 1.3), [true, true, false, false, true, false, true]);
        assert_eq!(near_hull(&points, 1.0), [true, true, false, false, true, false, false]);
        assert_eq!(near_hull(&[(1, 1.0), (1, 1.0)], 1.0), [true, false]);
        assert!(near_hull(&[], 1.0).is_empty());
    }
}
