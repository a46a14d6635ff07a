//! One expert made smaller, in f32. Law: channels that stay lose least (the fit of what is kept under the routed inputs'
//! Hessian); ranks are below break-even, or the matrix stays whole.

use cotk_linalg::{break_even, keep_columns, removal_order, svd, whiten};
use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::moments::Moments;
use crate::Result;

/// Of the mean of a Hessian's diagonal: what makes it invertible where few tokens came.
pub(crate) const DAMPING: f64 = 1e-3;

/// What becomes of one expert's matrices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slim {
    Whole,
    /// So many inner channels stay, chosen by OBS; 0: the expert answers with nothing.
    Channels(usize),
    /// Ranks of gate, up and down that lose least on the routed inputs; 0: that matrix stays whole.
    Ranks([usize; 3]),
    /// The same by plain truncation, which sees the weights alone (MoE-I²).
    PlainRanks([usize; 3]),
}

impl Slim {
    /// Weights that are left of an expert `[hidden, inner]`.
    pub fn weights(&self, hidden: usize, inner: usize) -> usize {
        match self {
            Self::Whole => 3 * hidden * inner,
            Self::Channels(kept) => 3 * hidden * kept,
            Self::Ranks(ranks) | Self::PlainRanks(ranks) => ranks.iter().map(|&r| rank_weights(r, hidden, inner)).sum(),
        }
    }
}

/// Of one matrix; rank 0: whole.
pub(crate) fn rank_weights(rank: usize, hidden: usize, inner: usize) -> usize {
    match rank {
        0 => hidden * inner,
        rank => rank * (hidden + inner),
    }
}

/// A smaller expert.
#[derive(Debug, Clone)]
pub struct Slimmed {
    /// Gate and up of low rank are multiplied out here, and so is down, where `factors` has its two.
    pub mlp: Mlp,
    /// Right `[rank, inner]` and left `[hidden, rank]` factor of a down projection of low rank: a refit may touch the left
    /// one alone.
    pub factors: Option<(Linear, Linear)>,
    /// Inner channels that stay, ascending; absent: all.
    pub channels: Option<Vec<u32>>,
}

impl Slimmed {
    /// As it was.
    pub fn whole(mlp: Mlp) -> Self {
        Self {
            mlp,
            factors: None,
            channels: None,
        }
    }
}

/// Makes an expert smaller on what its matrices see; `None` where nothing of it stays.
///
/// # Errors
/// Moments or weights that are not finite.
pub fn slim(mlp: &Mlp, how: &Slim, moments: &Moments) -> Result<Option<Slimmed>> {
    match how {
        Slim::Whole => Ok(Some(Slimmed::whole(mlp.clone()))),
        Slim::Channels(kept) => channels(mlp, *kept, moments),
        Slim::Ranks(ranks) => {
            let input = moments.input.as_ref().expect("moments of inputs were asked for");
            let (input, middle) = (seen(input), seen(&moments.middle));
            ranked(mlp, *ranks, |matrix, kind, rank| {
                let second = if kind == 2 { &middle } else { &input };
                Ok(whiten(matrix.view(), second.view(), DAMPING)?.factors(rank))
            })
            .map(Some)
        }
        Slim::PlainRanks(ranks) => ranked(mlp, *ranks, |matrix, _, rank| plain(matrix, rank)).map(Some),
    }
}

/// Columns in the order in which they go, with the loss once each is gone.
///
/// # Errors
/// As [`slim`].
pub(crate) fn order(mlp: &Mlp, moments: &Moments) -> Result<Vec<cotk_linalg::Removal>> {
    let down = matrix(&mlp.down);
    Ok(removal_order(down.view(), seen(&moments.middle).view(), DAMPING, 0)?)
}

/// An expert that no token came to is reduced by its weights alone.
pub(crate) fn seen(moment: &Array2<f64>) -> Array2<f64> {
    if moment.diag().sum() > 0.0 {
        moment.clone()
    } else {
        Array2::eye(moment.nrows())
    }
}

pub(crate) fn matrix(linear: &Linear) -> Array2<f64> {
    let weights = linear.weights();
    let view = ArrayView2::from_shape((linear.outputs(), linear.inputs()), &weights);
    view.expect("a linear knows its shape").mapv(f64::from)
}

#[expect(clippy::cast_possible_truncation, reason = "weights are held in f32")]
pub(crate) fn linear(matrix: &Array2<f64>) -> Linear {
    let weights = matrix.iter().map(|&w| w as f32).collect();
    Linear::new(weights, matrix.nrows(), matrix.ncols())
}

fn channels(mlp: &Mlp, kept: usize, moments: &Moments) -> Result<Option<Slimmed>> {
    let inner = mlp.gate.outputs();
    if kept >= inner {
        return Ok(Some(Slimmed::whole(mlp.clone())));
    }
    if kept == 0 {
        return Ok(None);
    }
    let (down, hessian) = (matrix(&mlp.down), seen(&moments.middle));
    let gone = removal_order(down.view(), hessian.view(), DAMPING, kept)?;
    let mut stays = vec![true; inner];
    gone.iter().for_each(|removal| stays[removal.column] = false);
    let stays: Vec<usize> = (0..inner).filter(|&channel| stays[channel]).collect();
    let (fitted, _) = keep_columns(down.view(), hessian.view(), DAMPING, &stays)?;
    let rows = |from: &Linear| {
        let weights = stays.iter().flat_map(|&row| from.row(row).into_owned()).collect();
        Linear::new(weights, stays.len(), from.inputs())
    };
    Ok(Some(Slimmed {
        mlp: Mlp {
            gate: rows(&mlp.gate),
            up: rows(&mlp.up),
            down: linear(&fitted),
        },
        factors: None,
        channels: Some(
            (stays.iter())
                .map(|&c| u32::try_from(c).expect("inner sizes fit 32 bits"))
                .collect(),
        ),
    }))
}

/// Two factors: left `[rows, rank]`, right `[rank, cols]`.
type Factors = (Array2<f64>, Array2<f64>);

fn plain(matrix: &Array2<f64>, rank: usize) -> Result<Factors> {
    let found = svd(matrix.view())?;
    let first = ndarray::Slice::from(..rank.min(found.s.len()));
    let roots = found.s.slice_axis(ndarray::Axis(0), first).mapv(f64::sqrt);
    let left = &found.u.slice_axis(ndarray::Axis(1), first) * &roots;
    let right = &found.vt.slice_axis(ndarray::Axis(0), first) * &roots.insert_axis(ndarray::Axis(1));
    Ok((left, right))
}

fn ranked(
    mlp: &Mlp,
    ranks: [usize; 3],
    factors: impl Fn(&Array2<f64>, usize, usize) -> Result<Factors>,
) -> Result<Slimmed> {
    let reduced = |from: &Linear, kind: usize| -> Result<Option<Factors>> {
        // At break-even and above two factors are larger than the matrix.
        let rank = ranks[kind];
        let is_less = rank > 0 && rank <= break_even(from.outputs(), from.inputs());
        is_less.then(|| factors(&matrix(from), kind, rank)).transpose()
    };
    let product = |from: &Linear, found: &Option<Factors>| match found {
        Some((left, right)) => linear(&left.dot(right)),
        None => from.clone(),
    };
    let down = reduced(&mlp.down, 2)?;
    Ok(Slimmed {
        mlp: Mlp {
            gate: product(&mlp.gate, &reduced(&mlp.gate, 0)?),
            up: product(&mlp.up, &reduced(&mlp.up, 1)?),
            down: product(&mlp.down, &down),
        },
        factors: down.map(|(left, right)| (linear(&right), linear(&left))),
        channels: None,
    })
}
