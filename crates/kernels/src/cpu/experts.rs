//! The routed experts of a layer for some tokens: gate, up and SwiGLU of all of them as one list of parts, then down of
//! all of them, where a part owns output rows and adds the experts of a token in the order of its slots.
//!
//! Law: a token's result depends neither on its neighbours nor on the threads; one expert alone is
//! [`super::reference::expert`], bit for bit.

use std::ops::Range;

use cotk_quant::layout::{BLOCK_ROWS, STEP};

use super::activations::Activations;
use super::dispatch::{BlockOut, Isa};
use super::expert::Expert;
use super::gemm::{ALONE_BYTES, Disjoint, Product, Threads, chunk_blocks, in_chunks, products_of};
use super::panels::{PANEL_TOKENS, Panels, PanelsShape, PanelsView, words_of};
use super::team;
use super::weights::{Matrix, Weights};

/// One expert and what it is for: pairs, `token · slots + slot`.
pub type Group<'a> = (Expert<'a>, &'a [usize]);

/// How experts are summed.
#[derive(Debug, Clone, Copy)]
pub struct Slots<'a> {
    /// Slots of a token.
    pub slots: usize,
    /// `[tokens, slots]`.
    pub gates: &'a [f32],
}

/// What [`forward`] and [`super::expert::forward`] need beside their arguments; grows to the largest call, then nothing is
/// allocated any more.
#[derive(Debug, Default)]
pub struct ExpertsScratch {
    acts: Activations,
    plans: Vec<Plan>,
    /// Tokens of the groups that are no other's.
    inputs: Vec<Panels>,
    /// Panels of all groups.
    middle: Vec<u32>,
    /// Between the factors of gate, up and down, of each group.
    between: [Vec<Factor>; 3],
    /// `[seats, pairs, rows of a part]`.
    rows: Vec<f32>,
    /// Of each pair: whether a group has it.
    is_run: Vec<bool>,
    pairs: Vec<usize>,
}

/// What is decided of one group before anything runs.
#[derive(Debug, Clone, Copy)]
struct Plan {
    /// Index of the group whose packed tokens serve this one, too.
    input: usize,
    middle: PanelsShape,
    /// Where its panels begin.
    middle_at: usize,
    first_part: usize,
    /// Inner steps of a part.
    chunk: usize,
}

/// What stands between two factors.
#[derive(Debug, Default)]
struct Factor {
    floats: Vec<f32>,
    acts: Activations,
    panels: Panels,
}

/// `out[t] += Σ gate · expert(hidden[t])` over slots in ascending order; `hidden` and `out` are `[tokens, width]`. A pair
/// that no group has adds nothing.
///
/// # Panics
/// Experts of another width; pairs beyond the gates; a pair in two groups.
pub fn forward(
    isa: Isa,
    groups: &[Group<'_>],
    hidden: &[f32],
    Slots { slots, gates }: Slots<'_>,
    out: &mut [f32],
    scratch: &mut ExpertsScratch,
    threads: Threads,
) {
    let Some(width) = groups.first().map(|(expert, _)| expert.hidden()) else {
        return;
    };
    assert_eq!(hidden.len(), out.len(), "what goes in and what comes out");
    assert_eq!(gates.len() * width, hidden.len() * slots, "gates are [tokens, slots]");
    let is_run = &mut scratch.is_run;
    is_run.clear();
    is_run.resize(gates.len(), false);
    for (expert, pairs) in groups {
        assert_eq!(expert.hidden(), width, "experts of one layer");
        for &pair in *pairs {
            assert!(
                !std::mem::replace(&mut is_run[pair], true),
                "pair {pair} has two experts"
            );
        }
    }
    let threads = who_works(groups, threads);
    let mut acts = std::mem::take(&mut scratch.acts);
    acts.quantize_on(isa, hidden, width, threads);
    middle(isa, groups, &acts, |pair| pair / slots, scratch, threads);
    scratch.acts = acts;
    let is_run = std::mem::take(&mut scratch.is_run);
    let out = Disjoint::new(out);
    down(isa, groups, scratch, gates.len(), threads, |rows, values| {
        for (pair, value) in values.chunks_exact(rows.len()).enumerate() {
            if is_run[pair] {
                let at = pair / slots * width;
                // SAFETY: a row belongs to one part, and a part to one thread.
                let out = unsafe { out.part(at + rows.start..at + rows.end) };
                let gate = gates[pair];
                out.iter_mut().zip(value).for_each(|(out, value)| *out += gate * value);
            }
        }
    });
    scratch.is_run = is_run;
}

/// `out[t] = expert(acts[t])`.
pub(super) fn alone(
    isa: Isa,
    expert: &Expert<'_>,
    acts: &Activations,
    out: &mut [f32],
    scratch: &mut ExpertsScratch,
    threads: Threads,
) {
    let (width, tokens) = (expert.hidden(), acts.tokens());
    assert_eq!(acts.cols(), width, "matrix columns and activations");
    assert_eq!(out.len(), tokens * width, "output of {tokens} tokens");
    let mut pairs = std::mem::take(&mut scratch.pairs);
    pairs.clear();
    pairs.extend(0..tokens);
    let groups = [(*expert, pairs.as_slice())];
    let threads = who_works(&groups, threads);
    middle(isa, &groups, acts, |pair| pair, scratch, threads);
    let out = Disjoint::new(out);
    down(isa, &groups, scratch, tokens, threads, |rows, values| {
        for (token, value) in values.chunks_exact(rows.len()).enumerate() {
            // SAFETY: a row belongs to one part, and a part to one thread.
            unsafe { out.write(token * width + rows.start, value) };
        }
    });
    scratch.pairs = pairs;
}

/// The caller alone where there is little to do.
fn who_works(groups: &[Group<'_>], threads: Threads) -> Threads {
    let bytes = |matrix: &Matrix<'_>| match matrix {
        Matrix::Whole(weights) => weights.bytes(),
        Matrix::Product { left, right } => left.bytes() + right.bytes(),
        Matrix::Corrected { whole, left, right } => whole.bytes() + left.bytes() + right.bytes(),
    };
    let work = |(expert, pairs): &Group<'_>| expert.matrices().map(bytes).iter().sum::<usize>() * pairs.len();
    let is_little = groups.iter().map(work).sum::<usize>() < ALONE_BYTES;
    if is_little { Threads::One } else { threads }
}

/// What is multiplied last: of rows, and so of parts.
fn last<'a>(matrix: &Matrix<'a>) -> Weights<'a> {
    match *matrix {
        Matrix::Whole(weights) | Matrix::Corrected { whole: weights, .. } => weights,
        Matrix::Product { left, .. } => left,
    }
}

/// One matrix of a group, what it is multiplied by, and what is added to it.
#[derive(Clone, Copy)]
struct Side<'a> {
    weights: Weights<'a>,
    acts: PanelsView<'a>,
    correction: Option<(Weights<'a>, PanelsView<'a>)>,
}

impl<'a> Side<'a> {
    /// `between`: of this group, where the matrix has factors.
    fn new(matrix: &Matrix<'a>, input: PanelsView<'a>, between: Option<&'a Factor>) -> Self {
        let between = || between.expect("filled by the right factors").panels.view();
        let (acts, correction) = match *matrix {
            Matrix::Whole(_) => (input, None),
            Matrix::Product { .. } => (between(), None),
            Matrix::Corrected { left, .. } => (input, Some((left, between()))),
        };
        Self {
            weights: last(matrix),
            acts,
            correction,
        }
    }

    /// Adds what the correction gives for one row block.
    #[inline]
    fn correct(&self, isa: Isa, block: usize, panel: usize, out: &mut [BlockOut]) {
        let Some((left, acts)) = &self.correction else { return };
        let mut more = [[0.0; BLOCK_ROWS]; PANEL_TOKENS];
        let more = &mut more[..out.len()];
        left.block(isa, block, &acts.panel(panel), more);
        for (out, more) in out.iter_mut().zip(more) {
            out.iter_mut().zip(more).for_each(|(y, more)| *y += *more);
        }
    }
}

/// Packs each group's tokens, then fills its middle: `silu(gate · x) · (up · x)`.
fn middle(
    isa: Isa,
    groups: &[Group<'_>],
    acts: &Activations,
    token: impl Fn(usize) -> usize + Sync,
    scratch: &mut ExpertsScratch,
    threads: Threads,
) {
    let plans = &mut scratch.plans;
    plans.clear();
    let (mut words, mut parts) = (0, 0);
    for (i, (expert, pairs)) in groups.iter().enumerate() {
        let tokens = pairs.iter().map(|&pair| token(pair));
        // Of one token all experts have the same.
        let input = match plans.last() {
            Some(before) if tokens.eq(groups[before.input].1.iter().map(|&pair| token(pair))) => before.input,
            _ => i,
        };
        let middle = PanelsShape {
            tokens: pairs.len(),
            cols: expert.inner(),
        };
        let [gate, up, _] = expert.matrices().map(last);
        let step_bytes = STEP / BLOCK_ROWS * (gate.block_bytes() + up.block_bytes());
        let chunk = chunk_blocks(step_bytes, pairs.len());
        plans.push(Plan {
            input,
            middle,
            middle_at: words,
            first_part: parts,
            chunk,
        });
        words += middle.words();
        parts += middle.steps().div_ceil(chunk);
    }
    scratch.middle.clear();
    scratch.middle.resize(words, 0);
    let inputs = &mut scratch.inputs;
    if inputs.len() < groups.len() {
        inputs.resize_with(groups.len(), Panels::default);
    }
    let packing = if acts.tokens() < PANEL_TOKENS {
        Threads::One
    } else {
        threads
    };
    let each = Disjoint::new(inputs);
    in_chunks(groups.len(), 1, packing, |range| {
        for i in range.filter(|&i| plans[i].input == i) {
            // SAFETY: a group belongs to one part.
            let input = unsafe { each.element(i) };
            input.gather(acts, groups[i].1.iter().map(|&pair| token(pair)));
        }
    });
    let [between_gate, between_up, _] = &mut scratch.between;
    let inputs = &scratch.inputs;
    for (side, between) in [(0, &mut *between_gate), (1, &mut *between_up)] {
        right_factors(isa, groups, side, between, |i| inputs[plans[i].input].view(), threads);
    }

    let words = Disjoint::new(&mut scratch.middle);
    in_chunks(parts, 1, threads, |range| {
        for part in range {
            let i = plans.partition_point(|plan| plan.first_part <= part) - 1;
            let (plan, (expert, _)) = (&plans[i], &groups[i]);
            let input = inputs[plan.input].view();
            let [gate, up, _] = expert.matrices();
            let sides = [(gate, &*between_gate), (up, &*between_up)]
                .map(|(matrix, between)| Side::new(matrix, input, between.get(i)));
            let from = (part - plan.first_part) * plan.chunk;
            let mut buffers = Buffers::ZERO;
            for step in from..(from + plan.chunk).min(plan.middle.steps()) {
                middle_step(isa, &sides, plan, step, &words, &mut buffers);
            }
        }
    });
}

/// Between products and SwiGLU, for the tokens of one panel.
struct Buffers {
    gate: [[f32; STEP]; PANEL_TOKENS],
    up: [[f32; STEP]; PANEL_TOKENS],
    blocks: [[BlockOut; PANEL_TOKENS]; 2],
}

impl Buffers {
    const ZERO: Self = Self {
        gate: [[0.0; STEP]; PANEL_TOKENS],
        up: [[0.0; STEP]; PANEL_TOKENS],
        blocks: [[[0.0; BLOCK_ROWS]; PANEL_TOKENS]; 2],
    };
}

/// 32 inner channels of one group: one quantized step of each of its tokens.
fn middle_step(
    isa: Isa,
    [gate, up]: &[Side<'_>; 2],
    plan: &Plan,
    step: usize,
    words: &Disjoint<'_, u32>,
    buffers: &mut Buffers,
) {
    let blocks = gate.weights.row_blocks();
    for i in 0..plan.middle.count() {
        let panels = [gate.acts.panel(i), up.acts.panel(i)];
        let (tokens, width) = (panels[0].tokens, panels[0].width);
        for half in 0..STEP / BLOCK_ROWS {
            let (block, at) = (step * STEP / BLOCK_ROWS + half, half * BLOCK_ROWS);
            let [first, second] = &mut buffers.blocks;
            let (first, second) = (&mut first[..width], &mut second[..width]);
            if block >= blocks {
                first.fill([0.0; BLOCK_ROWS]);
                second.fill([0.0; BLOCK_ROWS]);
            } else if std::ptr::eq(gate.acts.words, up.acts.words) {
                let both = [&gate.weights, &up.weights];
                Weights::pair(isa, both, block, &panels[0], [&mut *first, &mut *second]);
                gate.correct(isa, block, i, first);
                up.correct(isa, block, i, second);
            } else {
                gate.weights.block(isa, block, &panels[0], first);
                up.weights.block(isa, block, &panels[1], second);
                gate.correct(isa, block, i, first);
                up.correct(isa, block, i, second);
            }
            for (side, found) in [(&mut buffers.gate, &*first), (&mut buffers.up, &*second)] {
                for (side, values) in side.iter_mut().zip(found).take(tokens) {
                    side[at..at + BLOCK_ROWS].copy_from_slice(values);
                }
            }
        }
        for t in 0..tokens {
            let codes = isa.swiglu(&buffers.gate[t], &buffers.up[t]);
            let (at, distance) = plan.middle.place(i * PANEL_TOKENS + t, step);
            for (n, word) in words_of(&codes).into_iter().enumerate() {
                // SAFETY: a step belongs to one part, and a part to one thread.
                unsafe { words.write(plan.middle_at + at + n * distance, &[word]) };
            }
        }
    }
}

/// Of two factors the right one: what it gives is quantized like any activation.
fn right_factors<'p>(
    isa: Isa,
    groups: &[Group<'_>],
    side: usize,
    between: &mut Vec<Factor>,
    input: impl Fn(usize) -> PanelsView<'p>,
    threads: Threads,
) {
    for (i, (expert, pairs)) in groups.iter().enumerate() {
        let Some((_, right)) = expert.matrices()[side].factors() else {
            continue;
        };
        if between.len() <= i {
            between.resize_with(groups.len(), Factor::default);
        }
        let Factor { floats, acts, panels } = &mut between[i];
        floats.clear();
        floats.resize(pairs.len() * right.rows(), 0.0);
        let product = Product {
            weights: right,
            bias: None,
            out: floats,
        };
        products_of(isa, input(i), &mut [product], threads);
        acts.quantize(isa, floats, right.rows());
        panels.gather(acts, 0..pairs.len());
    }
}

/// Output rows of all groups: `done(rows, values)` gets `[pairs, rows]` of each part, anything where no group has the pair.
fn down(
    isa: Isa,
    groups: &[Group<'_>],
    scratch: &mut ExpertsScratch,
    pairs: usize,
    threads: Threads,
    done: impl Fn(Range<usize>, &[f32]) + Sync,
) {
    let plans = &scratch.plans;
    let middle = |i: usize| {
        let Plan { middle, middle_at, .. } = plans[i];
        PanelsView {
            shape: middle,
            words: &scratch.middle[middle_at..middle_at + middle.words()],
        }
    };
    let between = &mut scratch.between[2];
    right_factors(isa, groups, 2, between, middle, threads);
    let width = groups[0].0.hidden();
    // Of each expert as long a stream as any: the CPU's own prefetching begins anew with each.
    let block_bytes = groups
        .iter()
        .map(|(expert, _)| last(expert.matrices()[2]).block_bytes());
    let block_bytes = block_bytes.max().expect("there is a group");
    // Many tokens: few rows, so that what stands between products and sums stays near.
    let chunk = if pairs > 64 { 1 } else { chunk_blocks(block_bytes, 1) };
    let part_rows = chunk * BLOCK_ROWS;
    let seats = if threads == Threads::One { 1 } else { team::threads() };
    let needed = seats * pairs * part_rows;
    if scratch.rows.len() < needed {
        scratch.rows.resize(needed, 0.0);
    }
    let rows_of = Disjoint::new(&mut scratch.rows);
    let run = |seat: usize, part: usize| {
        let rows = part * part_rows..((part + 1) * part_rows).min(width);
        // SAFETY: parts of one seat never run at the same time.
        let values = unsafe { rows_of.part(seat * pairs * part_rows..(seat + 1) * pairs * part_rows) };
        let values = &mut values[..pairs * rows.len()];
        for (i, (expert, of_group)) in groups.iter().enumerate() {
            let side = Side::new(expert.matrices()[2], middle(i), between.get(i));
            let mut buffer = [[0.0; BLOCK_ROWS]; PANEL_TOKENS];
            for from in rows.clone().step_by(BLOCK_ROWS) {
                let to = (from + BLOCK_ROWS).min(width);
                for (p, of_panel) in of_group.chunks(PANEL_TOKENS).enumerate() {
                    let panel = side.acts.panel(p);
                    let found = &mut buffer[..panel.width];
                    side.weights.block(isa, from / BLOCK_ROWS, &panel, found);
                    side.correct(isa, from / BLOCK_ROWS, p, found);
                    for (&pair, found) in of_panel.iter().zip(&buffer) {
                        let at = pair * rows.len() + from - rows.start;
                        values[at..at + to - from].copy_from_slice(&found[..to - from]);
                    }
                }
            }
        }
        done(rows, values);
    };
    let parts = width.div_ceil(part_rows);
    match threads {
        Threads::One => (0..parts).for_each(|part| run(0, part)),
        Threads::Pool => team::run_seated(parts, run),
    }
}
