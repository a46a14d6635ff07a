//! The arithmetic of a MoE layer over coded experts: tokens grouped by expert, each group run once, slots summed in
//! order. Law: a token's result depends neither on its neighbours in the batch nor on the thread count.

use std::cell::RefCell;

use cotk_container::view::{ExpertView, MatrixView};
use cotk_container::{ContainerError, QuantError};
use cotk_kernels::KernelError;
use cotk_kernels::cpu::activations::Activations;
use cotk_kernels::cpu::dispatch::Isa;
use cotk_kernels::cpu::expert::{self, Expert, ExpertScratch};
use cotk_kernels::cpu::experts::{self, ExpertsScratch, Slots};
use cotk_kernels::cpu::gemm::Threads;
use cotk_kernels::cpu::rows::{self, RowKind, Rows};
use cotk_kernels::cpu::weights::Matrix;
use cotk_model::moe::{ExpertUse, MoeRecord, Precision, Routed, RuntimeError};
use cotk_run::units::{ExpertId, LayerId};

use crate::policy::{Choice, Place, RoutingMode, Width};
use crate::store::ExpertStore;

/// Tokens of one pass: bounds what stands between experts and their sum, and is enough for every expert to see many.
const BLOCK_TOKENS: usize = 512;

/// The kernels that this process runs on.
#[derive(Debug, Clone, Copy)]
pub struct Cpu(Isa);

impl Cpu {
    /// The best path of this CPU, or the one that `COTK_ISA` names.
    ///
    /// # Errors
    /// A path that does not exist, or that this CPU lacks.
    pub fn selected() -> Result<Self, KernelError> {
        Isa::selected().map(Self)
    }
}

/// What runs, and how its width is decided.
pub struct Mix<'a> {
    pub store: &'a dyn ExpertStore,
    pub mode: &'a dyn RoutingMode,
    /// What the cache holds of an expert's stored bits.
    pub held_bits: &'a (dyn Fn(Place, u32) -> u32 + Sync),
    pub cpu: Cpu,
    pub layer: LayerId,
    pub hidden_size: usize,
}

/// What a thread keeps between calls.
#[derive(Default)]
struct MixScratch {
    /// Expert and bits of each pair.
    asked: Vec<(ExpertId, u32)>,
    /// Pairs that run, by expert.
    order: Vec<usize>,
    /// Pairs whose expert answers with a constant, ascending.
    constants: Vec<usize>,
    /// How each pair was read.
    read: Vec<(u8, Precision)>,
    /// Empty between calls: its memory is what is kept.
    groups: Vec<(Expert<'static>, &'static [usize])>,
}

thread_local! {
    static MIX: RefCell<MixScratch> = RefCell::default();
}

/// An empty list of another type in the memory of this one: the standard library collects in place where sizes are equal.
fn emptied<A, B>(mut list: Vec<A>) -> Vec<B> {
    list.clear();
    list.into_iter().map(|_| unreachable!("it is empty")).collect()
}

impl Mix<'_> {
    /// `out[t] = Σ gate · expert(hidden[t])` over the routed experts, in slot order, then over constants; both
    /// `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`RuntimeError::Expert`] with the container's reason.
    pub fn forward(&self, hidden: &[f32], routed: &Routed, out: &mut [f32]) -> Result<MoeRecord, RuntimeError> {
        let mut record = MoeRecord::default();
        self.forward_into(hidden, routed, out, &mut record)?;
        Ok(record)
    }

    /// [`forward`](Self::forward) into a record that is kept: nothing is allocated once a thread has mixed as many tokens.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_into(
        &self,
        hidden: &[f32],
        routed: &Routed,
        out: &mut [f32],
        record: &mut MoeRecord,
    ) -> Result<(), RuntimeError> {
        let width = self.hidden_size;
        let slots = routed.slots;
        record.slots = slots;
        record.uses.clear();
        out.fill(0.0);
        if slots > 0 {
            // Taken, not borrowed: whoever runs inside has its own.
            let mut scratch = MIX.take();
            for (block, out) in out.chunks_mut(BLOCK_TOKENS * width).enumerate() {
                let first = block * BLOCK_TOKENS;
                let hidden = &hidden[first * width..][..out.len()];
                self.block(hidden, routed, first, out, &mut record.uses, &mut scratch)?;
            }
            MIX.set(scratch);
        }
        Ok(())
    }

    /// One block of tokens, the first of which is `first` in `routed`.
    fn block(
        &self,
        hidden: &[f32],
        routed: &Routed,
        first: usize,
        out: &mut [f32],
        uses: &mut Vec<ExpertUse>,
        scratch: &mut MixScratch,
    ) -> Result<(), RuntimeError> {
        let (width, slots) = (self.hidden_size, routed.slots);
        let pairs = first * slots..(first + hidden.len() / width) * slots;
        let (experts, gates) = (&routed.experts[pairs.clone()], &routed.gates[pairs]);
        let MixScratch {
            asked,
            order,
            constants,
            read,
            groups: kept,
        } = scratch;

        // (expert, bits asked) of each pair; equal ones share a job.
        asked.clear();
        constants.clear();
        for (pair, (&expert, &gate)) in experts.iter().zip(gates).enumerate() {
            let place = Place {
                layer: self.layer,
                expert,
            };
            let stored = self.store.stored_bits(self.layer, expert).unwrap_or(0);
            if stored == 0 {
                constants.push(pair);
            }
            let token_gates = &gates[pair / slots * slots..][..slots];
            let decided = self.mode.width(&Choice {
                place,
                slot: pair % slots,
                gate,
                gate_sum: token_gates.iter().sum(),
                held_bits: (self.held_bits)(place, stored),
            });
            let bits = match decided {
                Width::Full => stored,
                Width::AtMost(bits) => bits.min(stored),
                Width::Skip => 0,
            };
            asked.push((expert, bits));
        }
        order.clear();
        order.extend((0..asked.len()).filter(|&pair| asked[pair].1 > 0));
        // Pairs of a group stay in token order. (A stable sort may allocate.)
        order.sort_unstable_by_key(|&pair| (asked[pair], pair));

        read.clear();
        read.resize(asked.len(), (0, Precision::Skipped));
        let mut groups = emptied(std::mem::take(kept));
        for group in order.chunk_by(|&a, &b| asked[a] == asked[b]) {
            let (id, bits) = asked[group[0]];
            let fail = |source| RuntimeError::Expert {
                layer: self.layer,
                expert: id,
                source,
            };
            let view = self
                .store
                .expert(self.layer, id, bits)
                .map_err(|e: ContainerError| fail(e.into()))?
                .ok_or_else(|| fail("was dropped, but routing chose it".into()))?;
            let kernel = kernel_of(&view).map_err(|e| fail(e.into()))?;
            for &pair in group {
                read[pair] = width_of(&view);
            }
            groups.push((kernel, group));
        }
        run_groups(self.cpu, &groups, hidden, slots, gates, out);
        *kept = emptied(groups);
        // Behind the experts that run, in slot order: the same whatever else stands in the batch.
        for &pair in &*constants {
            let expert = experts[pair];
            let fail = |source| RuntimeError::Expert {
                layer: self.layer,
                expert,
                source,
            };
            let constant = (self.store.constant(self.layer, expert))
                .map_err(|e: ContainerError| fail(e.into()))?
                .ok_or_else(|| fail("was dropped, but routing chose it".into()))?;
            let rows = Rows::new(RowKind::F16, constant, width);
            let out = &mut out[pair / slots * width..][..width];
            rows::mix(self.cpu.0, rows, &gates[pair..=pair], &[1.0], out);
            read[pair] = (0, Precision::Constant);
        }
        let read = experts.iter().zip(gates).zip(&*read);
        uses.extend(read.map(|((&expert, &gate), &(bits, precision))| ExpertUse {
            expert,
            gate,
            bits,
            precision,
        }));
        Ok(())
    }
}

/// `out[t] += Σ gate · expert(hidden[t])`: each group is an expert and its pairs, a pair `t · slots + slot` of token `t` with
/// the gate `gates[pair]`. `hidden` and `out` are `[tokens, width]`. What a layer's routed experts cost is the time of this.
pub fn run_groups(
    cpu: Cpu,
    groups: &[(Expert<'_>, &[usize])],
    hidden: &[f32],
    slots: usize,
    gates: &[f32],
    out: &mut [f32],
) {
    thread_local! {
        static SCRATCH: RefCell<ExpertsScratch> = RefCell::default();
    }
    // Taken, not borrowed: whoever runs inside has its own.
    let mut scratch = SCRATCH.take();
    experts::forward(
        cpu.0,
        groups,
        hidden,
        Slots { slots, gates },
        out,
        &mut scratch,
        Threads::Pool,
    );
    SCRATCH.set(scratch);
}

/// Widest of the three matrices; full if each is read as stored.
fn width_of(view: &ExpertView<'_>) -> (u8, Precision) {
    let parts = [view.gate, view.up, view.down];
    let bits = parts.iter().map(MatrixView::bits).max().unwrap_or(0);
    let is_full = parts.iter().all(MatrixView::is_full);
    let precision = if is_full { Precision::Full } else { Precision::Prefix };
    (u8::try_from(bits).expect("at most 8"), precision)
}

/// A container's expert as the kernels take it.
fn kernel_of<'a>(view: &ExpertView<'a>) -> Result<Expert<'a>, QuantError> {
    let matrix = |view: &MatrixView<'a>| match *view {
        MatrixView::Codes(codes) => Ok(codes.into()),
        MatrixView::Corrected { codes, left, right } => Matrix::corrected(codes, left, right),
        MatrixView::Product { left, right } => Matrix::product(left, right),
    };
    Expert::try_new(matrix(&view.gate)?, matrix(&view.up)?, matrix(&view.down)?)
}

/// One expert for rows `[rows, hidden]`, alone and without a gate: `[rows, hidden]`.
///
/// # Panics
/// Matrices that do not fit each other: those of one record always do.
pub fn run_expert(cpu: Cpu, view: &ExpertView<'_>, rows: &[f32]) -> Vec<f32> {
    let kernel = kernel_of(view).expect("matrices of one expert");
    let acts = Activations::of(cpu.0, rows, kernel.hidden());
    let mut out = vec![0.0; rows.len()];
    expert::forward(
        cpu.0,
        &kernel,
        &acts,
        &mut out,
        &mut ExpertScratch::default(),
        Threads::One,
    );
    out
}
