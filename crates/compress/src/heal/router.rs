//! Router recalibration: what experts became after compression is not what the router learnt to choose among, so its rows
//! are fitted to the layer's target by gradient descent with frozen experts, selection made anew in each step (reference:
//! moe-compression 7). Law: rows are judged as they will be stored, and where held-out tokens do not gain they stay as they
//! are, bit for bit.

use cotk_model::layers::router::softmax;
use cotk_model::layers::{Mlp, sigmoid};
use cotk_model::moe::{Alive, Routed, RouterScores, RoutingRule, Scoring, route};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::pairs::gather;
use super::{HealOptions, HealTokens, Part, Step};
use crate::Result;

/// Tokens that are fitted to, and tokens that judge, at most, spread evenly.
const TOKENS: [usize; 2] = [4096, 4096];
/// Bytes that inner products of experts' answers may take, of both together.
const GRAM_BYTES: usize = 256 << 20;
/// Tokens of one piece of work.
const BLOCK: usize = 64;
/// Steps of gradient descent at each rate, and how often they are judged.
const STEPS: usize = 60;
const JUDGED_EVERY: usize = 15;
/// First steps of a weight, as shares of its row's root mean square.
const RATES: [f32; 2] = [0.01, 0.03];
/// Share of the way back to the rows as they were that the first step takes; later ones fall to zero as rates do.
const PULL: f32 = 0.01;

/// A router as it stands.
#[derive(Clone, Copy)]
pub struct Router<'a> {
    /// `[experts, hidden]`
    pub rows: &'a [f32],
    /// Added to scores for the choice alone, `[experts]`; empty where there is none.
    pub bias: &'a [f32],
    pub rule: &'a RoutingRule,
    pub alive: Alive<'a>,
    /// What a weight is once it is stored.
    pub stored: &'a (dyn Fn(f32) -> f32 + Sync),
}

/// Rows `[experts, hidden]` that bring the layer nearest to its targets; as they were where the step is not kept. How
/// `tokens` are routed now is not read: it follows from the rows.
///
/// # Errors
/// What routing refuses.
///
/// # Panics
/// Rows that do not fit each other.
pub fn heal_router(
    tokens: &HealTokens<'_>,
    router: &Router<'_>,
    parts: &[Part<'_>],
    options: &HealOptions,
) -> Result<(Vec<f32>, Step)> {
    let experts = router.rule.experts;
    assert_eq!(router.rows.len(), experts * tokens.hidden, "a row for each expert");
    assert_eq!(parts.len(), experts, "a part for each expert");
    let [fitted, held_out] = samples(tokens, parts);
    let held = |rows: &[f32]| -> Result<Vec<f64>> {
        let rows: Vec<f32> = rows.iter().map(|&w| (router.stored)(w)).collect();
        held_out.errors(&rows, router, tokens.windows.len())
    };
    let before = held_out.errors(router.rows, router, tokens.windows.len())?;
    let mut best: Option<(f64, f32, Vec<f32>)> = None;
    if !fitted.of.is_empty() && !held_out.of.is_empty() {
        for rate in RATES {
            let mut descent = Descent::new(router.rows, tokens.hidden, rate);
            for step in 1..=STEPS {
                descent.step(step, &fitted.gradient(&descent.rows, router)?);
                if step % JUDGED_EVERY == 0 {
                    let error: f64 = held(&descent.rows)?.iter().sum();
                    if best.as_ref().is_none_or(|(least, ..)| error < *least) {
                        best = Some((error, rate, descent.rows.clone()));
                    }
                }
            }
        }
    }
    let (rate, after) = match &best {
        Some((_, rate, rows)) => (Some(f64::from(*rate)), held(rows)?),
        None => (None, before.clone()),
    };
    let size = held_out.of.iter().map(|token| token.size).sum();
    let step = Step::judged("router", &before, &after, size, options, rate);
    let rows = match best {
        Some((.., rows)) if step.is_kept => rows.into_iter().map(router.stored).collect(),
        _ => router.rows.to_vec(),
    };
    Ok((rows, step))
}

/// One token: every expert's answer against every other's, and against the target.
struct Seen {
    weight: f64,
    window: usize,
    /// w‖target‖².
    size: f64,
}

/// Tokens with what their experts would say.
pub(super) struct Sample {
    experts: usize,
    hidden: usize,
    of: Vec<Seen>,
    /// `[tokens, hidden]`
    inputs: Vec<f32>,
    /// Lower triangles of ⟨y_i, y_j⟩, `[tokens, experts · (experts + 1) / 2]`.
    gram: Vec<f32>,
    /// ⟨y_i, target⟩, `[tokens, experts]`.
    cross: Vec<f32>,
}

/// Of the tokens that are fitted to, of those that judge.
pub(super) fn samples(tokens: &HealTokens<'_>, parts: &[Part<'_>]) -> [Sample; 2] {
    let window_of = tokens.window_of();
    let (experts, triangle) = (parts.len(), parts.len() * (parts.len() + 1) / 2);
    [false, true].map(|judges| {
        let all: Vec<usize> = (0..tokens.weights.len())
            .filter(|&token| tokens.held_out[token] == judges && tokens.weights[token] > 0.0)
            .collect();
        let most = TOKENS[usize::from(judges)].min((GRAM_BYTES / 2 / 4 / triangle.max(1)).max(1));
        let count = all.len().min(most);
        let chosen: Vec<usize> = (0..count).map(|at| all[at * all.len() / count]).collect();
        let blocks: Vec<(Vec<f32>, Vec<f32>)> = chosen.par_chunks(BLOCK).map(|c| products(tokens, parts, c)).collect();
        let (mut gram, mut cross) = (
            Vec::with_capacity(count * triangle),
            Vec::with_capacity(count * experts),
        );
        for (own_gram, own_cross) in blocks {
            gram.extend(own_gram);
            cross.extend(own_cross);
        }
        let seen = |&token: &usize| {
            let target = &tokens.targets[token * tokens.hidden..][..tokens.hidden];
            Seen {
                weight: tokens.weights[token],
                window: window_of[token],
                size: tokens.weights[token] * dot(target, target),
            }
        };
        Sample {
            experts,
            hidden: tokens.hidden,
            of: chosen.iter().map(seen).collect(),
            inputs: gather(tokens.inputs, tokens.hidden, &chosen),
            gram,
            cross,
        }
    })
}

/// Gram triangles and products with targets of a few tokens.
fn products(tokens: &HealTokens<'_>, parts: &[Part<'_>], chosen: &[usize]) -> (Vec<f32>, Vec<f32>) {
    let hidden = tokens.hidden;
    let x = gather(tokens.inputs, hidden, chosen);
    let answers: Vec<Option<Vec<f32>>> = parts.iter().map(|part| answer(part, &x, chosen.len())).collect();
    let (mut gram, mut cross) = (Vec::new(), Vec::new());
    for (at, &token) in chosen.iter().enumerate() {
        let target = &tokens.targets[token * hidden..][..hidden];
        let of = |expert: usize| answers[expert].as_ref().map(|all| &all[at * hidden..][..hidden]);
        for expert in 0..parts.len() {
            let own = of(expert);
            #[expect(clippy::cast_possible_truncation, reason = "products of f32")]
            let with = |other: Option<&[f32]>| match (own, other) {
                (Some(own), Some(other)) => dot(own, other) as f32,
                _ => 0.0,
            };
            gram.extend((0..=expert).map(|other| with(of(other))));
            cross.push(with(Some(target)));
        }
    }
    (gram, cross)
}

/// What an expert says to rows `x`, `[rows, hidden]`; `None`: nothing.
fn answer(part: &Part<'_>, x: &[f32], rows: usize) -> Option<Vec<f32>> {
    match part {
        Part::Mlp(mlp) => Some(Mlp::apply(mlp, x)),
        Part::LowRank { gate, up, right, left } => {
            let mut middle = gate.apply(x);
            let up = up.apply(x);
            (middle.iter_mut().zip(up)).for_each(|(g, u)| *g = cotk_model::layers::silu(*g) * u);
            Some(left.apply(&right.apply(&middle)))
        }
        Part::Constant(constant) => Some(constant.repeat(rows)),
        Part::Absent => None,
    }
}

impl Sample {
    /// Scores `[tokens, experts]` of some tokens.
    fn scores(&self, rows: &[f32], router: &Router<'_>, range: std::ops::Range<usize>) -> Array2<f32> {
        let x = &self.inputs[range.start * self.hidden..range.end * self.hidden];
        let x = ArrayView2::from_shape((range.len(), self.hidden), x).expect("whole rows");
        let rows = ArrayView2::from_shape((self.experts, self.hidden), rows).expect("a row an expert");
        let mut scores = x.dot(&rows.t());
        let flat = scores.as_slice_mut().expect("products are contiguous");
        match router.rule.scoring {
            Scoring::Softmax => softmax(flat, self.experts),
            Scoring::Sigmoid => flat.iter_mut().for_each(|s| *s = sigmoid(*s)),
        }
        scores
    }

    fn routed(scores: &Array2<f32>, router: &Router<'_>) -> Result<Routed> {
        let flat = scores.as_slice().expect("products are contiguous");
        let scores = RouterScores::new(flat, router.rule)?;
        Ok(match router.bias {
            [] => route(&scores, router.alive),
            bias => route(&scores.with_bias(bias)?, router.alive),
        })
    }

    fn gram(&self, token: usize, i: usize, j: usize) -> f64 {
        let (row, column) = (i.max(j), i.min(j));
        let triangle = self.experts * (self.experts + 1) / 2;
        f64::from(self.gram[token * triangle + row * (row + 1) / 2 + column])
    }

    /// Half the derivative of a token's squared error by its chosen gates, and the error.
    fn pulls(&self, token: usize, experts: &[usize], gates: &[f32]) -> (Vec<f64>, f64) {
        let cross = &self.cross[token * self.experts..][..self.experts];
        let mut error = self.of[token].size / self.of[token].weight;
        let pulls = experts.iter().zip(gates).map(|(&i, &gate)| {
            let together: f64 = (experts.iter().zip(gates))
                .map(|(&j, &other)| f64::from(other) * self.gram(token, i, j))
                .sum();
            error += f64::from(gate) * (together - 2.0 * f64::from(cross[i]));
            together - f64::from(cross[i])
        });
        (pulls.collect(), error)
    }

    /// Squared error of each window.
    pub(super) fn errors(&self, rows: &[f32], router: &Router<'_>, windows: usize) -> Result<Vec<f64>> {
        let mut errors = vec![None; windows];
        for (token, (_, error, _)) in self.each(rows, router)?.into_iter().enumerate() {
            let seen = &self.of[token];
            *errors[seen.window].get_or_insert(0.0) += seen.weight * error;
        }
        Ok(errors.into_iter().flatten().collect())
    }

    /// Of each token: derivative of its squared error by all logits, the error, and the token's number.
    fn each(&self, rows: &[f32], router: &Router<'_>) -> Result<Vec<(Vec<f32>, f64, usize)>> {
        let starts: Vec<usize> = (0..self.of.len()).step_by(BLOCK).collect();
        let of = |&start: &usize| -> Result<Vec<(Vec<f32>, f64, usize)>> {
            let range = start..(start + BLOCK).min(self.of.len());
            let scores = self.scores(rows, router, range.clone());
            let routed = Self::routed(&scores, router)?;
            let token = |at: usize| {
                let experts = &routed.experts[at * routed.slots..][..routed.slots];
                let experts: Vec<usize> = experts.iter().map(|expert| expert.index()).collect();
                let gates = &routed.gates[at * routed.slots..][..routed.slots];
                let (pulls, error) = self.pulls(range.start + at, &experts, gates);
                let own = scores.row(at);
                let slope = slopes(own.as_slice().expect("rows are contiguous"), &experts, &pulls, router);
                (slope, error, range.start + at)
            };
            Ok((0..range.len()).map(token).collect())
        };
        let blocks: Vec<_> = starts.par_iter().map(of).collect::<Result<_>>()?;
        Ok(blocks.into_iter().flatten().collect())
    }

    /// Derivative of the weighted error by the rows, `[experts, hidden]`.
    pub(super) fn gradient(&self, rows: &[f32], router: &Router<'_>) -> Result<Vec<f32>> {
        let each = self.each(rows, router)?;
        let blocks: Vec<Array2<f32>> = each
            .par_chunks(BLOCK)
            .map(|tokens| {
                let mut slopes = Array2::zeros((tokens.len(), self.experts));
                for (mut row, (slope, _, token)) in slopes.rows_mut().into_iter().zip(tokens) {
                    #[expect(clippy::cast_possible_truncation, reason = "a weight of a row in f32")]
                    let weight = self.of[*token].weight as f32;
                    row.iter_mut().zip(slope).for_each(|(to, slope)| *to = slope * weight);
                }
                let from = tokens[0].2;
                let x = &self.inputs[from * self.hidden..(from + tokens.len()) * self.hidden];
                slopes
                    .t()
                    .dot(&ArrayView2::from_shape((tokens.len(), self.hidden), x).expect("whole rows"))
            })
            .collect();
        let mut sum = Array2::<f32>::zeros((self.experts, self.hidden));
        blocks.iter().for_each(|block| sum += block);
        Ok(sum.into_raw_vec_and_offset().0)
    }
}

/// Derivative of a token's squared error (half of it) by all logits: `pulls` is that by the chosen gates. Gates are scores
/// over the mass of those that they are divided by: all experts, the living or the chosen.
fn slopes(scores: &[f32], chosen: &[usize], pulls: &[f64], router: &Router<'_>) -> Vec<f32> {
    let rule = router.rule;
    let divides = |expert: usize| match (rule.norm_topk, rule.scoring, router.alive) {
        (true, ..) => chosen.contains(&expert),
        (false, Scoring::Softmax, Alive::Removed(living)) => living[expert],
        (false, Scoring::Softmax, _) => true,
        (false, Scoring::Sigmoid, _) => false,
    };
    let divided: Vec<bool> = (0..scores.len()).map(divides).collect();
    let own_mass = |own: &bool, score: &f32| if *own { f64::from(*score) } else { 0.0 };
    let mass: f64 = match rule.scoring {
        Scoring::Sigmoid if !rule.norm_topk => 1.0,
        _ => divided
            .iter()
            .zip(scores)
            .map(|(own, score)| own_mass(own, score))
            .sum(),
    };
    let scale = f64::from(rule.scale) / mass.max(f64::from(f32::MIN_POSITIVE));
    // Σ pull · gate, what all that share the mass give way by.
    let pulled: f64 = (chosen.iter().zip(pulls))
        .map(|(&expert, pull)| pull * f64::from(scores[expert]) * scale)
        .sum();
    let mut slopes = vec![0.0; scores.len()];
    for (expert, (slope, &score)) in slopes.iter_mut().zip(scores).enumerate() {
        let pull = (chosen.iter().position(|&c| c == expert)).map_or(0.0, |at| pulls[at] * scale);
        let shared = if divided[expert] { pulled / mass } else { 0.0 };
        let by_score = pull - shared;
        let score = f64::from(score);
        #[expect(clippy::cast_possible_truncation, reason = "a slope of an f32 logit")]
        let own = (by_score
            * match rule.scoring {
                // Scores were divided by the mass of all already: what shares no mass moves with none of it.
                Scoring::Softmax => score,
                Scoring::Sigmoid => score * (1.0 - score),
            }) as f32;
        *slope = own;
    }
    slopes
}

/// Adam (Kingma and Ba, 2015), each row at a rate of its own size, rates falling to zero.
struct Descent {
    rows: Vec<f32>,
    first: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
    /// Of each row.
    rates: Vec<f32>,
    hidden: usize,
}

impl Descent {
    fn new(rows: &[f32], hidden: usize, rate: f32) -> Self {
        let of = |row: &[f32]| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_precision_loss,
                reason = "a size of f32"
            )]
            let size = (dot(row, row) / row.len() as f64).sqrt() as f32;
            size * rate
        };
        Self {
            rates: rows.chunks_exact(hidden).map(of).collect(),
            mean: vec![0.0; rows.len()],
            square: vec![0.0; rows.len()],
            first: rows.to_vec(),
            rows: rows.to_vec(),
            hidden,
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "few steps")]
    fn step(&mut self, step: usize, gradient: &[f32]) {
        const MEAN: f32 = 0.9;
        const SQUARE: f32 = 0.99;
        let left = 1.0 - (step - 1) as f32 / STEPS as f32;
        let step = i32::try_from(step).expect("few steps");
        let (mean_of, square_of) = (1.0 - MEAN.powi(step), 1.0 - SQUARE.powi(step));
        for (at, &slope) in gradient.iter().enumerate() {
            self.mean[at] = MEAN * self.mean[at] + (1.0 - MEAN) * slope;
            self.square[at] = SQUARE * self.square[at] + (1.0 - SQUARE) * slope * slope;
            let size = (self.square[at] / square_of).sqrt();
            let rate = self.rates[at / self.hidden] * left;
            if size > 0.0 {
                self.rows[at] -= rate * self.mean[at] / mean_of / size;
            }
            self.rows[at] += PULL * left * (self.first[at] - self.rows[at]);
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
