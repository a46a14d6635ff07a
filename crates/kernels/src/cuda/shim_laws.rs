//! The `.cu` text as C++ on the CPU, against the plain reference: bit for bit, in three orders of threads.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::{CodedMatrix, CodedView};
use cotk_quant::layout::Placement;

use super::q4::{Q4Matrix, SplitActivations, sample_expert};
use crate::cpu::activations::Activations;
use crate::cpu::dispatch::Isa;
use crate::cpu::reference;

/// Compiles shim and text with the system's C++ compiler, contraction off as for the GPU.
fn compile(folder: &Path, text: &str) -> PathBuf {
    for (name, content) in [
        ("expert_q4.cu", text),
        ("shim.h", include_str!("shim.h")),
        ("shim_expert_q4.cpp", include_str!("shim_expert_q4.cpp")),
    ] {
        fs_err::write(folder.join(name), content).unwrap();
    }
    let program = folder.join("shim");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let output = Command::new(compiler)
        .args([
            "-std=c++17",
            "-O1",
            "-ffp-contract=off",
            "-fsanitize=undefined",
            "-fno-sanitize-recover=all",
            "-w",
        ])
        .arg(folder.join("shim_expert_q4.cpp"))
        .arg("-o")
        .arg(&program)
        .output()
        .expect("a C++ compiler is needed to build cotk");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}

/// One case through the shim: middle codes, scales, sums, then y, as words.
fn run(program: &Path, order: u32, head: &[u32], floats: &[f32], buffers: &[Vec<u8>]) -> Result<Vec<u32>, String> {
    let mut input = Vec::new();
    head.iter().for_each(|v| input.extend(v.to_le_bytes()));
    floats.iter().for_each(|v| input.extend(v.to_le_bytes()));
    for buffer in buffers {
        input.extend(u32::try_from(buffer.len()).unwrap().to_le_bytes());
        input.extend(buffer);
    }
    let mut child = Command::new(program)
        .env("COTK_ORDER", order.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&input).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let words = output.stdout.as_chunks::<4>().0.iter();
    Ok(words.map(|w| u32::from_le_bytes(*w)).collect())
}

fn bytes_of(values: impl IntoIterator<Item = [u8; 4]>) -> Vec<u8> {
    values.into_iter().flatten().collect()
}

/// Shim and reference on one shape; `Err` says what differs.
fn check(program: &Path, order: u32, (hidden, inner, tokens): (usize, usize, usize), code: Code) -> Result<(), String> {
    let [gate, up, down] = sample_expert(hidden, inner, code, 7 + hidden as u64).unwrap();
    let x: Vec<f32> = (0..tokens * hidden)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0)
        .collect();
    let acts = Activations::of(Isa::present()[0], &x, hidden);
    let mut expected = vec![0.0; tokens * hidden];
    let (g, u, d) = (
        gate.prefix(Bits::B4).unwrap(),
        up.prefix(Bits::B4).unwrap(),
        down.prefix(Bits::B4).unwrap(),
    );
    reference::expert(&g.into(), &u.into(), &d.into(), &acts, &mut expected);

    // Gate and up take turns, as in a record.
    let pair = CodedMatrix::interleave(&gate, &up).unwrap();
    let view = |m: &CodedMatrix, placement| {
        let view = CodedView::try_new(m.format, &[pair[0].as_slice()], &m.zero_points, placement).unwrap();
        let matrix = Q4Matrix::try_new(&view.prefix(Bits::B4).unwrap()).unwrap();
        (matrix.turns, matrix.second, matrix.zero_point, matrix.cell)
    };
    let (turns, first, gate_zero, cell) = view(&gate, Placement::PairFirst);
    let (_, second, up_zero, _) = view(&up, Placement::PairSecond);
    assert_eq!((turns, first, second), (2, 0, 1));
    let split = SplitActivations::of(&acts);
    let down = Q4Matrix::try_new(&d).unwrap();
    let buffers = [
        pair[0].clone(),
        pair[0].clone(),
        down.plane.to_vec(),
        bytes_of(split.codes.iter().map(|v| v.to_le_bytes())),
        bytes_of(split.scales.iter().map(|v| v.to_le_bytes())),
        bytes_of(split.sums.iter().map(|v| v.to_le_bytes())),
    ];
    let head = [hidden, inner, tokens].map(|v| u32::try_from(v).unwrap());
    let head = [head[0], head[1], head[2], turns, second];
    let out = run(
        program,
        order,
        &head,
        &[gate_zero, up_zero, down.zero_point, cell],
        &buffers,
    )?;
    let y = &out[out.len() - tokens * hidden..];
    let differing = y.iter().zip(&expected).position(|(a, b)| *a != b.to_bits());
    match differing {
        None => Ok(()),
        Some(i) => Err(format!("y[{i}] is {}, expected {}", f32::from_bits(y[i]), expected[i])),
    }
}

#[test]
fn the_cu_text_equals_the_reference_and_notices_a_missing_barrier() {
    let folder = tempfile::tempdir().unwrap();
    let program = compile(folder.path(), super::SOURCE);
    for order in 0..3 {
        for shape in [(64, 32, 1), (96, 40, 2), (33, 17, 3), (160, 96, 1)] {
            for code in [Code::Plain(Bits::B4), Code::Nested44] {
                check(&program, order, shape, code).unwrap_or_else(|e| panic!("order {order}, {shape:?}, {code}: {e}"));
            }
        }
    }
    let broken = super::SOURCE.replace("__syncthreads();", "");
    assert_ne!(broken, super::SOURCE);
    let program = compile(folder.path(), &broken);
    let noticed = (0..3).filter(|order| check(&program, *order, (64, 32, 1), Code::Plain(Bits::B4)).is_err());
    assert!(noticed.count() > 0, "no order of threads shows the missing barrier");
}
