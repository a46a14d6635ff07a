//! Law: a decoded token allocates nothing, on any number of threads, for one sequence and for several, whatever holds the
//! dense matrices and the cache. A binary of its own: the allocator counts for the whole process.

#![allow(clippy::unwrap_used, reason = "clippy knows test functions, not their helpers")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cotk_container::ContainerError;
use cotk_container::dense::write_dense;
use cotk_container::low_rank::{Factors, Role};
use cotk_container::manifest::{Checksum, DENSE, DroppedMeaning, Origin, Prefix, SourceModel, Why};
use cotk_container::reader::Container;
use cotk_container::writer::{CodedExpert, Constant, ContainerWriter, Head, NewExpert, NewState};
use cotk_kernels::cpu::team::Team;
use cotk_model::checkpoint::TensorSource;
use cotk_model::checkpoint::coded::CodingSource;
use cotk_model::inventory;
use cotk_model::layers::cache::KvKind;
use cotk_model::model::{Logits, Model, Sequence, Workspace};
use cotk_model::moe::Mode;
use cotk_model::spec::ModelSpec;
use cotk_quant::code::Code;
use cotk_quant::coded::CodedMatrix;
use cotk_quant::encode::encode;
use cotk_quant::layout::MatrixFormat;
use cotk_runtime::resident::Resident;
use cotk_runtime::synthetic::{self, Source};

/// Counts what is asked of the system's.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands everything to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn matrix(rows: usize, cols: usize, salt: usize) -> CodedMatrix {
    let weights: Vec<f32> = (0..rows * cols)
        .map(|i| ((i * 7 + salt * 13) as f32 * 0.37).sin() * 0.05)
        .collect();
    let format = MatrixFormat::try_new(rows, cols, Code::Nested224, 32).unwrap();
    encode(&weights, format).unwrap()
}

/// A container with all experts of a model, some as constants or with corrections, and nothing else of it.
fn container(folder: &Path, spec: &ModelSpec) -> Arc<Container> {
    let mut writer = ContainerWriter::resume(folder, Vec::new()).unwrap();
    for layer in spec.moe_layers() {
        let expert = |e: usize| {
            let (hidden, inner) = (spec.hidden, spec.moe_intermediate);
            let prefix = |bits| Prefix {
                bits,
                delta: None,
                rho: None,
                tokens: 0,
            };
            // Constants and corrections among them: neither may allocate.
            if e % 5 == 4 {
                let constant = Constant::new(&vec![0.01; hidden]).unwrap();
                return NewExpert::new(Why::default(), NewState::Constant(constant));
            }
            let mut kept = CodedExpert::new(
                matrix(inner, hidden, e),
                matrix(inner, hidden, e + 100),
                matrix(hidden, inner, e + 200),
            );
            if e % 5 == 3 {
                let (rank, shapes) = (16, [(inner, hidden), (inner, hidden), (hidden, inner)]);
                kept.factors = shapes.map(|(rows, cols)| {
                    let (left, right) = (vec![0.01; rows * rank], vec![0.02; rank * cols]);
                    Some(Factors::encode(Role::Correction, &left, &right, (rows, rank, cols)).unwrap())
                });
            }
            kept.prefixes = [2, 4, 8].map(prefix).to_vec();
            NewExpert::new(Why::default(), kept)
        };
        let experts = (0..spec.routing.experts).map(expert).collect();
        writer.append_layer(layer, 1.0, experts).unwrap();
    }
    write_dense(&folder.join(DENSE), &[], |_| Ok::<_, ContainerError>(Vec::new())).unwrap();
    let head = Head {
        source: SourceModel {
            hash: Checksum(0),
            bytes: 0,
            expert_bytes: 0,
            expert_weights: 0,
        },
        config: serde_json::json!({}),
        recipe: Origin {
            hash: Checksum(0),
            seed: 0,
            calibration: Checksum(0),
            calibration_tokens: 0,
        },
        little_bits: Some(4),
        dropped: DroppedMeaning::Masked,
        hidden: spec.hidden,
        dense: Default::default(),
    };
    writer.finish(head, &[DENSE]).unwrap();
    Arc::new(Container::open(folder).unwrap())
}

/// The fewest allocations of 12 decoded tokens of `N` sequences: of the first such window after a warm-up on one thread; on
/// several, of a few windows, since a helper may meet a part for the first time in any of them.
fn allocations<const N: usize>(model: &Model, threads: usize, mode: Mode) -> u64 {
    Team::new(threads).install(|| {
        let mut caches = [(); N].map(|()| model.new_cache());
        caches.iter_mut().for_each(|cache| cache.reserve(128));
        let mut work = Workspace::default();
        let tokens: Vec<u32> = (1..40).collect();
        let mut step = |from: usize, to: usize| {
            caches.iter_mut().for_each(|cache| cache.truncate(from));
            let mut batch = caches.each_mut().map(|cache| Sequence {
                tokens: &tokens[from..to],
                cache,
            });
            model.step(&mut batch, mode, Logits::Last, &mut work).unwrap();
            assert!(work.logits().iter().all(|l| l.is_finite()));
        };
        step(0, 12);
        (12..24).for_each(|t| step(t, t + 1));
        let windows = if threads == 1 { 1 } else { 40 };
        let mut window = || {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            (24..36).for_each(|t| step(t, t + 1));
            ALLOCATIONS.load(Ordering::Relaxed) - before
        };
        let mut fewest = window();
        for _ in 1..windows {
            if fewest == 0 {
                break;
            }
            fewest = fewest.min(window());
        }
        fewest
    })
}

/// One test: tests of one binary run side by side and would count each other's.
#[test]
fn a_decoded_token_allocates_nothing() {
    let spec = synthetic::spec("ref-qwen2moe", Some(2)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let container = container(folder.path(), &spec);
    let plain: Arc<dyn TensorSource> = Arc::new(Source::new(&spec, 3));
    let coded = CodingSource::new(plain.clone(), &inventory::codable(&spec), 8).unwrap();
    for (name, source) in [("f32", plain.as_ref()), ("8 bit", &coded)] {
        for kind in KvKind::ALL {
            let runtime = Arc::new(Resident::new(container.clone(), &spec).unwrap());
            let model = Model::load(spec.clone(), source, runtime).unwrap().with_kv(kind);
            for threads in [1, 2] {
                for mode in [Mode::Exact, Mode::Little] {
                    let found = [
                        allocations::<1>(&model, threads, mode),
                        allocations::<4>(&model, threads, mode),
                    ];
                    assert_eq!(found, [0, 0], "{name}, {kind}, {threads} threads, {mode}: of 12 steps");
                }
            }
        }
    }
}
