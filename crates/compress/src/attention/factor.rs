//! The algebra of one layer: second moments of mixed values, singular values per group of heads, narrower factors, and a
//! joint refit of the outputs. Law: with one head a group the loss of a rank is exactly the sum of what its groups leave
//! out; no refit is worse on the tokens that it was fitted to.

use std::ops::Range;

use cotk_linalg::{Whitened, ridge, whiten};
use ndarray::{Array2, ArrayView2, Axis, Slice};

use crate::Result;

/// Of the mean of the second moment's diagonal, added to it.
pub(super) const DAMPING: f64 = 1e-6;
/// Pulls of the refit towards the truncated factors.
const LAMBDAS: [f64; 4] = [0.1, 0.01, 0.001, 0.0001];
/// Widths up to which all heads are refitted together; beyond, the heads that share values: a second moment of more is too
/// large to hold.
const MOST_TOGETHER: usize = 4096;

/// A block of a matrix.
pub(super) fn part(mut matrix: ArrayView2<'_, f64>, rows: Range<usize>, columns: Range<usize>) -> ArrayView2<'_, f64> {
    matrix.slice_axis_inplace(Axis(0), Slice::from(rows));
    matrix.slice_axis_inplace(Axis(1), Slice::from(columns));
    matrix
}

/// Writes a block of a matrix.
pub(super) fn put(matrix: &mut Array2<f64>, rows: Range<usize>, columns: Range<usize>, block: ArrayView2<'_, f64>) {
    let mut to = matrix.view_mut();
    to.slice_axis_inplace(Axis(0), Slice::from(rows));
    to.slice_axis_inplace(Axis(1), Slice::from(columns));
    to.assign(&block);
}

/// Who shares values, and how wide they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) heads: usize,
    /// Heads with values of their own; divides `heads`.
    pub(super) groups: usize,
    /// Width of a value head.
    pub(super) dim: usize,
}

impl Shape {
    fn group(self) -> usize {
        self.heads / self.groups
    }

    /// Columns of the output projection that are refitted together.
    fn blocks(self) -> Vec<Range<usize>> {
        let width = self.heads * self.dim;
        let step = if width <= MOST_TOGETHER {
            width
        } else {
            self.group() * self.dim
        };
        (0..width).step_by(step).map(|from| from..from + step).collect()
    }
}

/// Σ w·m·mᵀ of mixed values, by blocks of heads that are refitted together.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    shape: Shape,
    blocks: Vec<Array2<f64>>,
}

impl Moments {
    pub(super) fn new(shape: Shape) -> Self {
        let blocks = shape.blocks();
        Self {
            shape,
            blocks: blocks.iter().map(|b| Array2::zeros((b.len(), b.len()))).collect(),
        }
    }

    /// Adds rows `[tokens, heads · dim]`, each times the root of its weight.
    pub(super) fn add(&mut self, rows: &Array2<f32>) {
        for (sum, columns) in self.blocks.iter_mut().zip(self.shape.blocks()) {
            let block = rows.slice_axis(Axis(1), Slice::from(columns));
            sum.zip_mut_with(&block.t().dot(&block), |sum, &x| *sum += f64::from(x));
        }
    }

    /// Of one head's values, `[dim, dim]`.
    fn of_head(&self, head: usize) -> ArrayView2<'_, f64> {
        let (dim, from) = (self.shape.dim, head * self.shape.dim);
        let wide = self.blocks[0].nrows();
        let at = from % wide;
        part(self.blocks[from / wide].view(), at..at + dim, at..at + dim)
    }

    /// Of a group's values: what its heads see together, `[dim, dim]`.
    fn of_group(&self, group: usize) -> Array2<f64> {
        let heads = self.shape.group();
        let mut sum = Array2::zeros((self.shape.dim, self.shape.dim));
        (group * heads..(group + 1) * heads).for_each(|head| sum += &self.of_head(head));
        sum
    }

    /// Σ w·‖M·m‖² of `matrix` M `[outputs, heads · dim]`; blocks count as if they were independent.
    pub(super) fn size(&self, matrix: ArrayView2<'_, f64>) -> f64 {
        let blocks = self.blocks.iter().zip(self.shape.blocks());
        let of = |(second, columns): (&Array2<f64>, Range<usize>)| {
            let block = matrix.slice_axis(Axis(1), Slice::from(columns));
            (&block.dot(second) * &block).sum()
        };
        blocks.map(of).sum()
    }
}

/// One layer, decomposed: what each rank of each group gains.
pub(super) struct Decomposed {
    shape: Shape,
    groups: Vec<Whitened>,
}

/// A narrower pair.
#[derive(Debug, Clone)]
pub(super) struct Factors {
    /// In the place of the output projection, `[outputs, heads · rank]`.
    pub(super) outputs: Array2<f64>,
    /// Turns each group's values into narrower ones, `[rank, dim]`.
    pub(super) turns: Vec<Array2<f64>>,
}

impl Decomposed {
    /// Of an output projection `[outputs, heads · dim]`.
    pub(super) fn new(outputs: ArrayView2<'_, f64>, moments: &Moments) -> Result<Self> {
        let shape = moments.shape;
        let of = |group: usize| {
            let second = moments.of_group(group);
            let second = if second.diag().sum() > 0.0 {
                second
            } else {
                Array2::eye(shape.dim)
            };
            Ok(whiten(stacked(outputs, shape, group).view(), second.view(), DAMPING)?)
        };
        let groups = (0..shape.groups).map(of).collect::<Result<_>>()?;
        Ok(Self { shape, groups })
    }

    /// What each rank gains, summed over groups, descending: `[dim]`.
    pub(super) fn gains(&self) -> Vec<f64> {
        let mut gains = vec![0.0; self.shape.dim];
        for group in &self.groups {
            gains.iter_mut().zip(group.gains()).for_each(|(sum, gain)| *sum += gain);
        }
        gains
    }

    /// The best pair of `rank`, outputs not refitted.
    pub(super) fn factors(&self, rank: usize) -> Factors {
        let Shape { heads, groups, .. } = self.shape;
        let per = self.shape.group();
        let rows = self.groups[0].factors(1).0.nrows() / per;
        let mut outputs = Array2::zeros((rows, heads * rank));
        let mut turns = Vec::with_capacity(groups);
        for (group, whitened) in self.groups.iter().enumerate() {
            let (left, right) = whitened.factors(rank);
            for own in 0..per {
                let head = group * per + own;
                let own = part(left.view(), own * rows..(own + 1) * rows, 0..rank);
                put(&mut outputs, 0..rows, head * rank..(head + 1) * rank, own);
            }
            turns.push(right);
        }
        Factors { outputs, turns }
    }
}

/// Output blocks of the heads that share a group's values, below each other: `[heads of the group · outputs, dim]`.
fn stacked(outputs: ArrayView2<'_, f64>, shape: Shape, group: usize) -> Array2<f64> {
    let per = shape.group();
    let columns = |head: usize| part(outputs, 0..outputs.nrows(), head * shape.dim..(head + 1) * shape.dim);
    let blocks: Vec<_> = (group * per..(group + 1) * per).map(columns).collect();
    ndarray::concatenate(Axis(0), &blocks).expect("blocks of one matrix are as wide as each other")
}

impl Factors {
    /// What both together stand for: an output projection of full width, `[outputs, heads · dim]`.
    pub(super) fn product(&self, shape: Shape) -> Array2<f64> {
        let (rows, rank) = (self.outputs.nrows(), self.turns[0].nrows());
        let mut product = Array2::zeros((self.outputs.nrows(), shape.heads * shape.dim));
        for head in 0..shape.heads {
            let own = part(self.outputs.view(), 0..rows, head * rank..(head + 1) * rank);
            let own = own.dot(&self.turns[head / shape.group()]);
            put(
                &mut product,
                0..rows,
                head * shape.dim..(head + 1) * shape.dim,
                own.view(),
            );
        }
        product
    }

    /// Outputs refitted to `truth` on what `fitted` saw, all heads of a block together; returns them only if `held_out`
    /// loses less by them, and the relative losses there, before and after.
    pub(super) fn refitted(
        &self,
        truth: ArrayView2<'_, f64>,
        fitted: &Moments,
        held_out: &Moments,
    ) -> Result<(Option<Self>, [f64; 2])> {
        let shape = fitted.shape;
        let size = held_out.size(truth);
        let loss = |factors: &Self| {
            let loss = held_out.size((&truth - &factors.product(shape)).view());
            if size > 0.0 { loss / size } else { 0.0 }
        };
        let before = loss(self);
        let mut best: Option<(f64, Self)> = None;
        for lambda in LAMBDAS {
            let Some(found) = self.refit(truth, fitted, lambda)? else {
                return Ok((None, [before; 2]));
            };
            let loss = loss(&found);
            if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                best = Some((loss, found));
            }
        }
        match best {
            Some((after, found)) if after < before => Ok((Some(found), [before, after])),
            _ => Ok((None, [before; 2])),
        }
    }

    /// `None` where nothing was seen.
    pub(super) fn refit(&self, truth: ArrayView2<'_, f64>, fitted: &Moments, lambda: f64) -> Result<Option<Self>> {
        let (shape, rank) = (fitted.shape, self.turns[0].nrows());
        let mut outputs = self.outputs.clone();
        for (second, columns) in fitted.blocks.iter().zip(shape.blocks()) {
            let heads = columns.start / shape.dim..columns.end / shape.dim;
            let mut turn = Array2::zeros((heads.len() * rank, columns.len()));
            for (at, head) in heads.clone().enumerate() {
                let columns = at * shape.dim..(at + 1) * shape.dim;
                put(
                    &mut turn,
                    at * rank..(at + 1) * rank,
                    columns,
                    self.turns[head / shape.group()].view(),
                );
            }
            let seen = turn.dot(second);
            let gram = seen.dot(&turn.t());
            if gram.diag().sum() <= 0.0 {
                return Ok(None);
            }
            let cross = truth.slice_axis(Axis(1), Slice::from(columns)).dot(&seen.t());
            let (rows, narrow) = (0..outputs.nrows(), heads.start * rank..heads.end * rank);
            let prior = part(self.outputs.view(), rows.clone(), narrow.clone());
            let found = ridge(gram.view(), cross.view(), prior, lambda)?;
            put(&mut outputs, rows, narrow, found.view());
        }
        Ok(Some(Self {
            outputs,
            turns: self.turns.clone(),
        }))
    }
}

/// Widths of value heads of each layer, so that at least the share `ratio` of their weights is gone: the ranks that gain
/// least per weight go first, `multiple` at a time, and one multiple stays. `gains` of each layer, descending, whose ranks
/// take `weights` each.
#[expect(clippy::cast_precision_loss, reason = "weights of a model are far below 2^53")]
pub(super) fn widths(gains: &[Vec<f64>], weights: &[usize], multiple: usize, ratio: f64) -> Vec<usize> {
    let mut widths: Vec<usize> = gains.iter().map(Vec::len).collect();
    let all: usize = widths.iter().zip(weights).map(|(width, each)| width * each).sum();
    // (gain per weight, layer, width before the step, ranks of the step)
    let mut steps = Vec::new();
    for (layer, gains) in gains.iter().enumerate() {
        let mut width = gains.len();
        while width > multiple {
            let next = (width - 1) / multiple * multiple;
            let gain: f64 = gains[next..width].iter().sum();
            steps.push((
                gain / ((width - next) * weights[layer]) as f64,
                layer,
                width,
                width - next,
            ));
            width = next;
        }
    }
    steps.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).then(b.2.cmp(&a.2)));
    let mut gone = 0;
    for (_, layer, _, ranks) in steps {
        if gone as f64 >= ratio * all as f64 {
            break;
        }
        widths[layer] -= ranks;
        gone += ranks * weights[layer];
    }
    widths
}
