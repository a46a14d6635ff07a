//! Single-thread GEMV by code and path as a share of the memory read bandwidth of the same minute, and GEMM in GOPS.
//!
//! `cargo bench -p cotk-kernels --profile dev`; weights rotate over 256 MiB (`COTK_BENCH_MIB`), `COTK_ISA` picks one path, samples are interleaved
//! with the bandwidth probe, figures are medians. `COTK_CODE` picks one code, `COTK_GROUP=16|32|…|row` and
//! `COTK_SCALES=two-level` another form of scales; `COTK_PART=gemv|rows|layers|gemm` one table. Time is the thread's CPU time: another process on the core does not count.
#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use cotk_kernels::cpu::activations::Activations;
use cotk_kernels::cpu::bandwidth::read_once;
use cotk_kernels::cpu::dispatch::Isa;
use cotk_kernels::cpu::expert::Expert;
use cotk_kernels::cpu::experts::{self, ExpertsScratch, Slots};
use cotk_kernels::cpu::gemm::{Threads, gemm};
use cotk_kernels::cpu::pages::Pages;
use cotk_kernels::cpu::peak::integer_ops;
use cotk_kernels::cpu::rows::{self, RowKind, Rows};
use cotk_kernels::cpu::team::Team;
use cotk_quant::code::Code;
use cotk_quant::coded::{CodedMatrix, CodedView};
use cotk_quant::layout::{MatrixFormat, Placement, ScaleForm, WHOLE_ROW};

const ROWS: usize = 1408;
const COLS: usize = 2048;
const SAMPLES: usize = 9;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// CPU time of this thread.
fn now() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = now();
    work();
    now() - start
}

/// The form of scales that the environment asks for.
fn format(rows: usize, cols: usize, code: Code) -> MatrixFormat {
    let group = match std::env::var("COTK_GROUP").as_deref() {
        Err(_) => 32,
        Ok("row") => WHOLE_ROW,
        Ok(group) => group.parse().expect("a group"),
    };
    let scales = match std::env::var("COTK_SCALES").as_deref() {
        Ok("two-level") => ScaleForm::TwoLevel,
        _ => ScaleForm::F16,
    };
    MatrixFormat::try_with_scales(rows, cols, code, group, scales).expect("a form of ours")
}

/// Random codes and small scales; what they are does not change the time.
fn matrix(rows: usize, cols: usize, code: Code) -> CodedMatrix {
    cotk_quant::noise::matrix(format(rows, cols, code), 0.01, 7)
}

/// Whether a table is asked for.
fn is_wanted(part: &str) -> bool {
    std::env::var("COTK_PART").map_or(true, |name| name == part)
}

/// Copies of a matrix's planes, each at a multiple of 64 bytes as in a record.
struct Copies {
    one: CodedMatrix,
    planes: Vec<(Pages, usize)>,
}

impl Copies {
    fn new(one: CodedMatrix, count: usize) -> Self {
        let planes = one.planes.iter().map(|plane| {
            let pitch = plane.len().next_multiple_of(64);
            let mut bytes = Pages::zeroed(pitch * count);
            for i in 0..count {
                bytes[i * pitch..][..plane.len()].copy_from_slice(plane);
            }
            (bytes, pitch)
        });
        let planes = planes.collect();
        Self { one, planes }
    }

    fn view(&self, i: usize) -> CodedView<'_> {
        let planes = self.planes.iter().zip(&self.one.planes);
        let slices: Vec<&[u8]> = planes
            .map(|((bytes, pitch), plane)| &bytes[i * pitch..][..plane.len()])
            .collect();
        CodedView::try_new(self.one.format, &slices, &self.one.zero_points, Placement::Alone)
            .expect("lengths of the format")
    }
}

/// Wall time: several threads work.
fn wall(work: impl FnOnce()) -> f64 {
    let start = std::time::Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// The experts of OLMoE's layers: 8 of many, hidden 2048, inner 1024.
fn layers(stream: &[u8], wanted: &dyn Fn(&Isa) -> bool) {
    const HIDDEN: usize = 2048;
    const INNER: usize = 1024;
    const TOP: usize = 8;
    println!("\nexperts of a layer, {HIDDEN} × {INNER}, 8 a token: GB/s at 1 and 4 tokens, GOPS at 512");
    println!(
        "{:12} {:12} {:>7} {:>8} {:>8} {:>8} {:>10} {:>8} {:>8}",
        "path", "code", "threads", "1 token", "read", "share %", "4 tokens", "prefill", "peak"
    );
    for isa in Isa::present()
        .into_iter()
        .filter(wanted)
        .filter(|isa| isa.name() != "scalar")
    {
        for code in Code::ALL
            .into_iter()
            .filter(|code| std::env::var("COTK_CODE").map_or(true, |name| name == code.name()))
        {
            let make = |rows, cols| matrix(rows, cols, code);
            let (up, down) = (make(INNER, HIDDEN), make(HIDDEN, INNER));
            let bytes = 2 * up.format.total_bytes() + down.format.total_bytes();
            let count = ((stream.len()).div_ceil(bytes) / TOP * TOP).clamp(2 * TOP, 64);
            let pair: Vec<Vec<u8>> = CodedMatrix::interleave(&up, &up).expect("one format");
            let mut pairs = up.clone();
            pairs.planes = pair;
            let (pairs, downs) = (Copies::new(pairs, count), Copies::new(down, count));
            let expert = |i: usize| {
                let side = |placement| {
                    let slices: Vec<&[u8]> = (pairs.planes.iter().zip(&pairs.one.planes))
                        .map(|((bytes, pitch), plane)| &bytes[i * pitch..][..plane.len()])
                        .collect();
                    CodedView::try_new(up.format, &slices, &up.zero_points, placement)
                        .and_then(|v| v.prefix(code.full()))
                        .expect("a view")
                };
                let down = downs.view(i).prefix(code.full()).expect("a prefix");
                Expert::try_new(side(Placement::PairFirst), side(Placement::PairSecond), down).expect("they fit")
            };
            for threads in [1, 2] {
                let team = Team::new(threads);
                let mut scratch = ExpertsScratch::default();
                let mut time = |tokens: usize, distinct: usize, first: usize| {
                    let pairs: Vec<Vec<usize>> = (0..distinct)
                        .map(|e| {
                            (0..tokens * TOP)
                                .filter(|p| (p / TOP * 3 + p % TOP) % distinct == e)
                                .collect()
                        })
                        .collect();
                    let groups: Vec<_> = (pairs.iter().enumerate())
                        .map(|(e, pairs)| (expert((first + e) % count), pairs.as_slice()))
                        .collect();
                    let hidden = vec![0.5; tokens * HIDDEN];
                    let gates = vec![0.1; tokens * TOP];
                    let mut out = vec![0.0; tokens * HIDDEN];
                    let slots = Slots {
                        slots: TOP,
                        gates: &gates,
                    };
                    wall(|| experts::forward(isa, &groups, &hidden, slots, &mut out, &mut scratch, Threads::Pool))
                };
                team.install(|| {
                    let (mut one, mut four, mut many, mut reads, mut peaks) = (vec![], vec![], vec![], vec![], vec![]);
                    for _ in 0..5 {
                        one.push((0..count / TOP).map(|i| time(1, TOP, i * TOP)).sum::<f64>());
                        four.push((0..count / 16).map(|i| time(4, 16.min(count), i * 16)).sum::<f64>());
                        reads.push(wall(|| {
                            std::hint::black_box(read_once(isa, stream, Threads::Pool));
                        }));
                        peaks.push(wall(|| {
                            std::hint::black_box(integer_ops(isa, 200_000));
                        }));
                    }
                    for i in 0..2 {
                        many.push(time(512, 64.min(count), i));
                    }
                    let one = (count / TOP * TOP * bytes) as f64 / median(one) / 1e9;
                    let four = (count / 16 * 16 * bytes) as f64 / median(four) / 1e9;
                    let read = stream.len() as f64 / median(reads) / 1e9;
                    let many = 2.0 * (512 * TOP * 3 * HIDDEN * INNER) as f64 / median(many) / 1e9;
                    let peak = integer_ops(isa, 200_000).0 as f64 / median(peaks) / 1e9 * threads as f64;
                    println!(
                        "{:12} {:12} {threads:>7} {one:>8.1} {read:>8.1} {:>8.0} {four:>10.1} {many:>8.0} {peak:>8.0}",
                        isa.name(),
                        code.name(),
                        100.0 * one / read
                    );
                });
            }
        }
    }
}

/// Rows of 16-bit floats, one token: as checkpoints hold dense matrices.
fn rows_of_floats(stream: &[u8], wanted: &dyn Fn(&Isa) -> bool) {
    println!("\nrows of bf16, 1 thread, one token");
    println!(
        "{:12} {:>10} {:>8} {:>8} {:>8}",
        "path", "row bytes", "GB/s", "read", "share %"
    );
    for isa in Isa::present()
        .into_iter()
        .filter(wanted)
        .filter(|isa| isa.name() != "scalar")
    {
        for cols in [128, 256, 512, 768, 1000, 1024, 1536, 2048, 4096] {
            let x = vec![0.5; cols];
            let count = stream.len() / (2 * cols);
            let rows = Rows::new(RowKind::Bf16, &stream[..2 * cols * count], cols);
            let mut out = vec![0.0; count];
            let (mut rates, mut reads) = (Vec::new(), Vec::new());
            for _ in 0..SAMPLES {
                let time = seconds(|| rows::dot(isa, rows, &x, &mut out, Threads::One));
                rates.push((2 * cols * count) as f64 / time / 1e9);
                let time = seconds(|| {
                    std::hint::black_box(read_once(isa, stream, Threads::One));
                });
                reads.push(stream.len() as f64 / time / 1e9);
            }
            let (rate, read) = (median(rates), median(reads));
            println!(
                "{:12} {:>10} {rate:>8.1} {read:>8.1} {:>8.0}",
                isa.name(),
                2 * cols,
                100.0 * rate / read
            );
        }
    }
}

fn main() {
    let mib: usize = std::env::var("COTK_BENCH_MIB")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(256);
    let mut stream = Pages::zeroed(mib << 20);
    stream.iter_mut().zip(0usize..).for_each(|(b, i)| *b = i as u8);
    let x: Vec<f32> = (0..COLS).map(|i| (i as f32).sin()).collect();
    println!("{ROWS} × {COLS}, 1 thread, {mib} MiB of weights in turn");
    println!(
        "{:12} {:12} {:>5} {:>10} {:>10} {:>8}",
        "path", "code", "bits", "gemv GB/s", "read GB/s", "share %"
    );
    let wanted = |isa: &Isa| std::env::var("COTK_ISA").map_or(true, |name| name == isa.name());
    for isa in Isa::present()
        .into_iter()
        .filter(|isa| wanted(isa) && is_wanted("gemv"))
    {
        let acts = Activations::of(isa, &x, COLS);
        for code in Code::ALL
            .into_iter()
            .filter(|code| std::env::var("COTK_CODE").map_or(true, |name| name == code.name()))
        {
            let one = matrix(ROWS, COLS, code);
            for bits in code.prefixes() {
                let bytes = one.format.prefix_bytes(*bits).expect("a prefix of the code");
                let count = (mib << 20).div_ceil(bytes);
                let copies = Copies::new(one.clone(), count);
                let mut out = vec![0.0; ROWS];
                let (mut rates, mut reads) = (Vec::new(), Vec::new());
                for _ in 0..if isa.name() == "scalar" { 2 } else { SAMPLES } {
                    let time = seconds(|| {
                        for i in 0..count {
                            let prefix = copies.view(i).prefix(*bits).expect("a prefix of the code");
                            gemm(isa, prefix, &acts, &mut out, Threads::One);
                        }
                    });
                    rates.push((bytes * count) as f64 / time / 1e9);
                    let time = seconds(|| {
                        std::hint::black_box(read_once(isa, &stream, Threads::One));
                    });
                    reads.push(stream.len() as f64 / time / 1e9);
                }
                let (rate, read) = (median(rates), median(reads));
                println!(
                    "{:12} {:12} {bits:>5} {rate:>10.1} {read:>10.1} {:>8.0}",
                    isa.name(),
                    code.name(),
                    100.0 * rate / read
                );
            }
        }
    }
    if is_wanted("rows") {
        rows_of_floats(&stream, &wanted);
    }
    if is_wanted("layers") {
        layers(&stream, &wanted);
    }
    println!("\nGEMM, weights in cache (512 × 512), 1 thread, GOPS (2 per weight and token)");
    println!(
        "{:12} {:12} {:>5} {:>8} {:>8} {:>8} {:>8}",
        "path", "code", "bits", "1", "4", "12", "60"
    );
    for isa in Isa::present()
        .into_iter()
        .filter(|isa| wanted(isa) && is_wanted("gemm"))
    {
        for code in Code::ALL
            .into_iter()
            .filter(|code| std::env::var("COTK_CODE").map_or(true, |name| name == code.name()))
        {
            let m = Copies::new(matrix(512, 512, code), 1);
            let prefix = m.view(0).prefix(code.full()).expect("the full width");
            let mut figures = Vec::new();
            for tokens in [1usize, 4, 12, 60] {
                let x: Vec<f32> = (0..512 * tokens).map(|i| (i as f32).sin()).collect();
                let acts = Activations::of(isa, &x, 512);
                let mut out = vec![0.0; 512 * tokens];
                let rounds = if isa.name() == "scalar" {
                    1
                } else {
                    256usize.div_ceil(tokens)
                };
                let times = (0..SAMPLES).map(|_| {
                    seconds(|| {
                        for _ in 0..rounds {
                            gemm(isa, prefix, &acts, &mut out, Threads::One);
                        }
                    })
                });
                let time = median(times.collect());
                figures.push(2.0 * (512 * 512 * tokens * rounds) as f64 / time / 1e9);
            }
            let [one, four, twelve, many] = figures[..] else {
                unreachable!("four batch sizes")
            };
            println!(
                "{:12} {:12} {:>5} {one:>8.0} {four:>8.0} {twelve:>8.0} {many:>8.0}",
                isa.name(),
                code.name(),
                code.full()
            );
        }
    }
}
