//! A block of rows while it is solved: rounding with feedback, scales refitted, codes changed one by one.
//!
//! Rows do not see each other: a block has the same bits whatever runs beside it. Laws: under the Hessian no row is
//! left worse than rounding to nearest on its own scales; a refit and a descent never raise a row's loss.

use cotk_linalg::cholesky;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};

use super::factor::Factor;
use super::grid::{Grid, inverse};
use crate::layout::MatrixFormat;
use crate::scales::Scales;

/// Columns whose feedback reaches the rest at once, in one matrix product (Frantar et al., 2023).
const BLOCK_COLS: usize = 128;
/// Added to the diagonal of the scales' normal equations, as a share of its mean: a group whose levels are all 0 has 0
/// there.
const SCALE_RIDGE: f64 = 1e-9;

/// Weights of a few rows, and what they are solved with.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) format: &'a MatrixFormat,
    pub(super) factor: &'a Factor,
    /// `[rows, cols]`
    pub(super) weights: &'a [f32],
}

/// Codes of a few rows at one width, under full scales.
#[derive(Clone)]
pub(super) struct State {
    /// `[rows, cols]`, at the width in hand.
    pub(super) codes: Vec<u8>,
    /// Scales of the full code `[rows, groups]`, as the format holds them.
    pub(super) held: Scales,
    /// The same as numbers.
    pub(super) scales: Vec<f32>,
    /// Tr(E·H·Eᵀ) of each row.
    pub(super) losses: Vec<f64>,
}

/// The codes of a narrower width that bind a wider one: its children are `code << shift` and what follows.
#[derive(Clone, Copy)]
pub(super) struct Parents<'a> {
    pub(super) codes: &'a [u8],
    pub(super) shift: u32,
}

impl Parents<'_> {
    #[inline(always)]
    fn range(parents: Option<Self>, at: usize, top: f32) -> (f32, f32) {
        match parents {
            Some(p) => {
                let low = f32::from(p.codes[at] << p.shift);
                #[expect(clippy::cast_precision_loss, reason = "below 256")]
                let children = ((1u32 << p.shift) - 1) as f32;
                (low, low + children)
            }
            None => (0.0, top),
        }
    }
}

/// Errors `[rows, cols]` and errors times Hessian.
struct Errors {
    e: Array2<f64>,
    eh: Array2<f64>,
}

impl Rows<'_> {
    fn rows(&self) -> usize {
        self.weights.len() / self.format.cols()
    }

    /// Codes of `grid` under `scales`: rounding with feedback or, row by row, rounding to nearest where that is better;
    /// then `rounds` of refitted scales (`is_free`: only where no narrower width shares them) and descent over codes.
    pub(super) fn solve(
        &self,
        grid: &Grid,
        held: Scales,
        parents: Option<Parents<'_>>,
        rounds: usize,
        refit: bool,
    ) -> State {
        let cols = self.format.cols();
        let scales = held.values(self.format);
        let nearest = self.nearest(grid, &scales, parents);
        let nearest_losses = self.errors(grid, &scales, &nearest).losses();
        let mut codes = self.feedback(grid, &scales, parents);
        let mut errors = self.errors(grid, &scales, &codes);
        let mut losses = errors.losses();
        let mut replaced = false;
        for (row, (loss, nearest_loss)) in losses.iter_mut().zip(nearest_losses).enumerate() {
            if nearest_loss < *loss {
                *loss = nearest_loss;
                codes[row * cols..][..cols].copy_from_slice(&nearest[row * cols..][..cols]);
                replaced = true;
            }
        }
        if replaced {
            errors = self.errors(grid, &scales, &codes);
        }
        let mut state = State {
            codes,
            held,
            scales,
            losses,
        };
        for _ in 0..rounds {
            if refit && self.refit(grid, &mut state, &errors) {
                errors = self.errors(grid, &state.scales, &state.codes);
                state.losses = errors.losses();
            }
            self.descend(grid, &mut state, &mut errors, parents);
        }
        if rounds > 0 {
            state.losses = self.errors(grid, &state.scales, &state.codes).losses();
        }
        state
    }

    /// Steps of one width by group, then row: what one column needs lies together.
    fn steps(&self, grid: &Grid, scales: &[f32]) -> Vec<f32> {
        let (rows, groups) = (self.rows(), self.format.groups());
        let mut steps = vec![0.0; rows * groups];
        for (i, scale) in scales.iter().enumerate() {
            steps[i % groups * rows + i / groups] = scale * grid.cell;
        }
        steps
    }

    fn nearest(&self, grid: &Grid, scales: &[f32], parents: Option<Parents<'_>>) -> Vec<u8> {
        let (cols, groups) = (self.format.cols(), self.format.groups());
        let code = |(at, &w): (usize, &f32)| {
            let scale = scales[at / cols * groups + at % cols / self.format.group()];
            let (low, high) = Parents::range(parents, at, grid.top);
            to_code(grid.nearest(w, inverse(scale * grid.cell), low, high))
        };
        self.weights.iter().enumerate().map(code).collect()
    }

    /// GPTQ (Frantar et al., 2023), columns in the factor's order: what rounding one column loses is taken from those
    /// to come.
    fn feedback(&self, grid: &Grid, scales: &[f32], parents: Option<Parents<'_>>) -> Vec<u8> {
        let (rows, cols) = (self.rows(), self.format.cols());
        let (order, upper) = (&self.factor.order, &self.factor.upper);
        let steps = self.steps(grid, scales);
        let inverses: Vec<f32> = steps.iter().map(|&s| inverse(s)).collect();
        let mut codes = vec![0u8; rows * cols];
        // [position, row]: rows side by side.
        let mut rest = vec![0.0f32; rows * cols];
        for (lane, &col) in rest.chunks_exact_mut(rows).zip(order) {
            for (r, w) in lane.iter_mut().enumerate() {
                *w = self.weights[r * cols + col];
            }
        }
        let mut lost = vec![0.0f32; rows * BLOCK_COLS];
        for from in (0..cols).step_by(BLOCK_COLS) {
            let to = (from + BLOCK_COLS).min(cols);
            for p in from..to {
                let col = order[p];
                let (done, later) = rest[from * rows..to * rows].split_at_mut((p + 1 - from) * rows);
                let now = &done[(p - from) * rows..];
                let lost = &mut lost[(p - from) * rows..][..rows];
                let group = col / self.format.group() * rows;
                let per_pivot = 1.0 / upper[[p, p]];
                for r in 0..rows {
                    let at = r * cols + col;
                    let (low, high) = Parents::range(parents, at, grid.top);
                    let code = grid.nearest(now[r], inverses[group + r], low, high);
                    lost[r] = (now[r] - steps[group + r] * (code - grid.zero_point)) * per_pivot;
                    codes[at] = to_code(code);
                }
                for (lane, q) in later.chunks_exact_mut(rows).zip(p + 1..) {
                    let factor = upper[[p, q]];
                    lane.iter_mut().zip(&*lost).for_each(|(w, l)| *w -= factor * l);
                }
            }
            if to < cols {
                let block = upper.view().split_at(Axis(0), from).1.split_at(Axis(0), to - from).0;
                let block = block.split_at(Axis(1), to).1;
                let lost = ArrayView2::from_shape((to - from, rows), &lost[..(to - from) * rows]);
                let later = ArrayViewMut2::from_shape((cols - to, rows), &mut rest[to * rows..]);
                general_mat_mul(
                    -1.0,
                    &block.t(),
                    &lost.expect("as many as were written"),
                    1.0,
                    &mut later.expect("what is left"),
                );
            }
        }
        codes
    }

    fn errors(&self, grid: &Grid, scales: &[f32], codes: &[u8]) -> Errors {
        let (rows, cols, groups) = (self.rows(), self.format.cols(), self.format.groups());
        let zero = f64::from(grid.zero_point);
        let e = Array2::from_shape_fn((rows, cols), |(r, c)| {
            let step = f64::from(scales[r * groups + c / self.format.group()]) * f64::from(grid.cell);
            f64::from(self.weights[r * cols + c]) - step * (f64::from(codes[r * cols + c]) - zero)
        });
        let eh = e.dot(&self.factor.hessian);
        Errors { e, eh }
    }

    /// Least squares over all scales of a row under the full Hessian, then settled on what the format holds; a row
    /// keeps its old ones where that is no better. True where a row changed.
    fn refit(&self, grid: &Grid, state: &mut State, errors: &Errors) -> bool {
        let (rows, cols, groups, group) = (
            self.rows(),
            self.format.cols(),
            self.format.groups(),
            self.format.group(),
        );
        // Derivatives of a row's weights by its scales: column c by the scale of its group.
        let levels = Array2::from_shape_fn((rows, cols), |(r, c)| {
            f64::from(grid.cell) * (f64::from(state.codes[r * cols + c]) - f64::from(grid.zero_point))
        });
        let group_of = |g: usize| g * group..((g + 1) * group).min(cols);
        let mut normal = vec![0.0f64; rows * groups * groups];
        for g in 0..groups {
            let range = group_of(g);
            let part = |array: ArrayView2<'_, f64>, axis| {
                array
                    .split_at(axis, range.start)
                    .1
                    .split_at(axis, range.len())
                    .0
                    .to_owned()
            };
            let product = part(levels.view(), Axis(1)).dot(&part(self.factor.hessian.view(), Axis(0)));
            for r in 0..rows {
                for other in 0..groups {
                    let dot = group_of(other).map(|c| product[[r, c]] * levels[[r, c]]).sum();
                    normal[(r * groups + g) * groups + other] = dot;
                }
            }
        }
        let mut changed = false;
        for r in 0..rows {
            let a = |i: usize, j: usize| normal[(r * groups + i) * groups + j];
            let b: Vec<f64> = (0..groups)
                .map(|g| group_of(g).map(|c| levels[[r, c]] * errors.eh[[r, c]]).sum())
                .collect();
            #[expect(clippy::cast_precision_loss, reason = "a count of groups")]
            let ridge = SCALE_RIDGE * (0..groups).map(|i| a(i, i)).sum::<f64>() / groups as f64;
            let matrix = Array2::from_shape_fn((groups, groups), |(i, j)| a(i, j) + if i == j { ridge } else { 0.0 });
            let Ok(lower) = cholesky(matrix.view()) else { continue };
            let old = &state.scales[r * groups..][..groups];
            let wanted: Vec<f64> = solve_lower(&lower, &b)
                .iter()
                .zip(old)
                .map(|(x, s)| x + f64::from(*s))
                .collect();
            let mut held = Scales::empty(self.format.scales());
            if !held.push_row(&wanted) {
                continue;
            }
            held.descend_row(old, &normal[r * groups * groups..][..groups * groups], &b);
            let new = held.values(self.format);
            let by: Vec<f64> = new
                .iter()
                .zip(old)
                .map(|(n, s)| f64::from(*n) - f64::from(*s))
                .collect();
            let gain: f64 = (0..groups)
                .map(|i| by[i] * (2.0 * b[i] - (0..groups).map(|j| a(i, j) * by[j]).sum::<f64>()))
                .sum();
            if gain > 0.0 {
                state.scales[r * groups..][..groups].copy_from_slice(&new);
                state.held.set_row(self.format, r, &held, 0);
                changed = true;
            }
        }
        changed
    }

    /// One pass over the columns of each row: each code moves to the best that its neighbours leave it.
    fn descend(&self, grid: &Grid, state: &mut State, errors: &mut Errors, parents: Option<Parents<'_>>) {
        let (cols, groups) = (self.format.cols(), self.format.groups());
        let hessian = &self.factor.hessian;
        for (r, (mut e, mut eh)) in errors.e.rows_mut().into_iter().zip(errors.eh.rows_mut()).enumerate() {
            for &col in &self.factor.order {
                let (at, pull) = (r * cols + col, hessian[[col, col]]);
                let step = state.scales[r * groups + col / self.format.group()] * grid.cell;
                if pull <= 0.0 || step == 0.0 {
                    continue;
                }
                let old = f32::from(state.codes[at]);
                let (low, high) = Parents::range(parents, at, grid.top);
                let level = f64::from(step) * (f64::from(old) - f64::from(grid.zero_point));
                #[expect(clippy::cast_possible_truncation, reason = "a weight")]
                let wanted = (level + eh[col] / pull) as f32;
                let new = grid.nearest(wanted, inverse(step), low, high);
                let by = f64::from(step) * f64::from(new - old);
                if by != 0.0 && by * (by * pull - 2.0 * eh[col]) < 0.0 {
                    state.codes[at] = to_code(new);
                    e[col] -= by;
                    eh.iter_mut().zip(hessian.row(col)).for_each(|(x, h)| *x -= by * h);
                }
            }
        }
    }

    /// Sums over rows for one width of finished full codes: with errors E at the code's own zero point and steps D,
    /// `E·H·E`, `E·H·D` and `D·H·D`: a zero point that is higher by z gives `EHE + 2z·EHD + z²·DHD`.
    pub(super) fn moments(&self, grid: &Grid, scales: &[f32], full_codes: &[u8], shifted: bool) -> [f64; 3] {
        let groups = self.format.groups();
        let codes: Vec<u8> = full_codes.iter().map(|c| c >> grid.cut).collect();
        let errors = self.errors(grid, scales, &codes);
        let dot = |a: &Array2<f64>, b: &Array2<f64>| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let first = dot(&errors.e, &errors.eh);
        if !shifted {
            return [first, 0.0, 0.0];
        }
        let steps = Array2::from_shape_fn((self.rows(), self.format.cols()), |(r, c)| {
            f64::from(scales[r * groups + c / self.format.group()]) * f64::from(grid.cell)
        });
        let steps_h = steps.dot(&self.factor.hessian);
        [first, dot(&errors.e, &steps_h), dot(&steps, &steps_h)]
    }
}

impl Errors {
    fn losses(&self) -> Vec<f64> {
        let row = |(e, eh): (ndarray::ArrayView1<'_, f64>, ndarray::ArrayView1<'_, f64>)| {
            e.iter().zip(eh).map(|(x, y)| x * y).sum()
        };
        self.e.rows().into_iter().zip(self.eh.rows()).map(row).collect()
    }
}

/// x of `L·Lᵀ·x = b`.
fn solve_lower(lower: &Array2<f64>, b: &[f64]) -> Vec<f64> {
    let size = b.len();
    let mut x = b.to_vec();
    for i in 0..size {
        let sum: f64 = (0..i).map(|j| lower[[i, j]] * x[j]).sum();
        x[i] = (x[i] - sum) / lower[[i, i]];
    }
    for i in (0..size).rev() {
        let sum: f64 = (i + 1..size).map(|j| lower[[j, i]] * x[j]).sum();
        x[i] = (x[i] - sum) / lower[[i, i]];
    }
    x
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an integer in 0..=255"
)]
fn to_code(code: f32) -> u8 {
    code as u8
}
