//! Weights to codes, round to nearest: the scale of each group, the code of each weight, the zero point of each prefix.
//!
//! Rules: 8 bits (plain and nested) as Q8_0, plain 4 bits as Q4_0, plain 2 and 3 bits by a search over the scale, 1 bit
//! by sign. Two-level scales are the nearest to those, codes the nearest to them.
//! A solver that chooses codes itself (GPTQ) hands them to [`assemble`]. Law: the mean error of every prefix is 0,
//! weighted by its step.

use half::f16;

use crate::QuantError;
use crate::code::{Bits, Code};
use crate::coded::CodedMatrix;
use crate::layout::{BLOCK_ROWS, MatrixFormat, STEP, SUPER_GROUPS, ScaleForm, TILE_STEPS};
use crate::scales::Scales;

/// Steps of the scale search at 2 and 3 bits, each with both signs.
const SEARCH_STEPS: u16 = 29;
/// First factor of the search on `extreme / −2^(b−1)`, and the distance between factors: 0.5 … 1.2.
const SEARCH: (f32, f32) = (0.5, 0.025);

/// Codes `weights` `[rows, cols]` (row major) to nearest, with fitted zero points for the prefixes of nested codes.
///
/// # Errors
/// As [`codes_and_scales`].
pub fn encode(weights: &[f32], format: MatrixFormat) -> Result<CodedMatrix, QuantError> {
    let (codes, scales) = round(weights, &format)?;
    let zero_points = fit_zero_points(weights, &codes, &scales.values(&format), &format);
    assemble_scaled(format, &codes, &scales, zero_points)
}

/// What [`encode`] lays out: unsigned codes `[rows, cols]` of full width and f16 scales `[rows, groups]`.
///
/// # Errors
/// A length that is not the format's; a weight that is NaN or infinite, or so large that its scale leaves f16, by row
/// and column; a format whose scales are two-level.
pub fn codes_and_scales(weights: &[f32], format: &MatrixFormat) -> Result<(Vec<u8>, Vec<f16>), QuantError> {
    match round(weights, format)? {
        (codes, Scales::F16(scales)) => Ok((codes, scales)),
        (_, Scales::TwoLevel { fine, .. }) => Err(QuantError::Length {
            what: "two-level scales",
            found: fine.len(),
            expected: 0,
        }),
    }
}

/// Codes and scales of any form.
fn round(weights: &[f32], format: &MatrixFormat) -> Result<(Vec<u8>, Scales), QuantError> {
    check(weights, format)?;
    let mut codes = vec![0u8; weights.len()];
    let mut scales = Scales::empty(format.scales());
    let (cols, group) = (format.cols(), format.group());
    let mut wanted = Vec::with_capacity(format.groups());
    for (row, (w_row, c_row)) in weights.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)).enumerate() {
        wanted.clear();
        for (w, c) in w_row.chunks(group).zip(c_row.chunks_mut(group)) {
            wanted.push(encode_group(w, c, format.code()).to_f64());
        }
        if !scales.push_row(&wanted) {
            let at = wanted.iter().position(|s| !s.is_finite()).unwrap_or(0) * group;
            return Err(overflow(&w_row[at..(at + group).min(cols)], row, at));
        }
    }
    if format.scales() == ScaleForm::TwoLevel {
        // What was settled on is not what the codes were made with.
        let full = format.code().full();
        #[expect(clippy::cast_precision_loss, reason = "at most 255")]
        let (top, zero) = (
            ((1u32 << full.get()) - 1) as f32,
            format.code().default_zero_point(full),
        );
        let values = scales.values(format);
        for (at, (c, w)) in codes.iter_mut().zip(weights).enumerate() {
            let scale = values[at / cols * format.groups() + at % cols / group];
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..=top")]
            let code = (w * inverse(scale) + zero).round().clamp(0.0, top) as u8;
            *c = code;
        }
    }
    Ok((codes, scales))
}

/// [`assemble_scaled`] with f16 scales `[rows, groups]`.
///
/// # Errors
/// As [`assemble_scaled`].
pub fn assemble(
    format: MatrixFormat,
    codes: &[u8],
    scales: &[f16],
    zero_points: Vec<f32>,
) -> Result<CodedMatrix, QuantError> {
    assemble_scaled(format, codes, &Scales::F16(scales.to_vec()), zero_points)
}

/// Lays codes `[rows, cols]` of full width and scales out in planes; columns past the end of a row and rows past the end
/// of a block get codes 0 and scales 0. `zero_points` has one for each prefix.
///
/// # Errors
/// A length or a form of scales that is not the format's.
pub fn assemble_scaled(
    format: MatrixFormat,
    codes: &[u8],
    scales: &Scales,
    zero_points: Vec<f32>,
) -> Result<CodedMatrix, QuantError> {
    for (what, found, expected) in [
        ("codes", codes.len(), format.rows() * format.cols()),
        ("zero points", zero_points.len(), format.code().planes()),
    ] {
        if found != expected {
            return Err(QuantError::Length { what, found, expected });
        }
    }
    scales.check(&format)?;
    let mut planes: Vec<Vec<u8>> = (0..format.code().planes())
        .map(|p| pack_plane(&format, p, codes))
        .collect();
    let plane = &mut planes[0];
    for row in 0..format.rows() {
        for group in 0..format.groups() {
            match scales {
                Scales::F16(scales) => {
                    let at = format.locate_scale(row, group);
                    plane[at..at + 2].copy_from_slice(&scales[row * format.groups() + group].to_le_bytes());
                }
                Scales::TwoLevel { coarse, fine } => {
                    let at = format.locate_two_level(row, group);
                    let coarse = coarse[row * format.scale_blocks() + group / SUPER_GROUPS];
                    plane[at.coarse..at.coarse + 2].copy_from_slice(&coarse.to_le_bytes());
                    let six = (fine[row * format.groups() + group] + 32).cast_unsigned();
                    plane[at.low.0] |= (six & 15) << at.low.1;
                    plane[at.high.0] |= (six >> 4 & 3) << at.high.1;
                }
            }
        }
    }
    Ok(CodedMatrix {
        format,
        planes,
        zero_points,
    })
}

/// The fields of one plane in the order of the layout; scales stay 0.
fn pack_plane(format: &MatrixFormat, plane: usize, codes: &[u8]) -> Vec<u8> {
    let cols = format.cols();
    let mut bytes = vec![0u8; format.plane_bytes(plane)];
    for block in 0..format.row_blocks() {
        for tile in 0..format.tiles() {
            let mut at = format.tile(plane, block, tile).offset;
            for step in 0..format.tile_steps(tile) {
                let first_col = (tile * TILE_STEPS + step) * STEP;
                for field in format.code().plane_fields(plane) {
                    let line_cols = STEP / field.bits as usize;
                    for byte in 0..64 * field.bits as usize {
                        let (line, row, depth) = (byte / 64, block * BLOCK_ROWS + byte % 64 / 4, byte % 4);
                        if row >= format.rows() {
                            continue;
                        }
                        let mut packed = 0u32;
                        for i in 0..8 / field.bits {
                            let col = first_col + line * line_cols + 4 * i as usize + depth;
                            if col < cols {
                                let value = u32::from(codes[row * cols + col]) >> field.shift;
                                packed |= (value & ((1 << field.bits) - 1)) << (field.bits * i);
                            }
                        }
                        #[expect(clippy::cast_possible_truncation, reason = "8 / bits fields of `bits` bits")]
                        let packed = packed as u8;
                        bytes[at + byte] = packed;
                    }
                    at += 64 * field.bits as usize;
                }
            }
        }
    }
    bytes
}

pub(crate) fn check(weights: &[f32], format: &MatrixFormat) -> Result<(), QuantError> {
    let expected = format.rows() * format.cols();
    if weights.len() != expected {
        return Err(QuantError::Length {
            what: "weights",
            found: weights.len(),
            expected,
        });
    }
    match weights.iter().position(|w| !w.is_finite()) {
        Some(i) => Err(QuantError::NotFinite {
            row: i / format.cols(),
            col: i % format.cols(),
            value: weights[i],
        }),
        None => Ok(()),
    }
}

pub(crate) fn overflow(group: &[f32], row: usize, first_col: usize) -> QuantError {
    let (at, extreme) = extreme(group);
    QuantError::ScaleOverflow {
        row,
        col: first_col + at,
        absmax: extreme.abs(),
        // Of the finest grid: the caller learns the order of magnitude.
        limit: 127.0 * f16::MAX.to_f32(),
    }
}

/// Index and value of the first weight of largest magnitude.
fn extreme(group: &[f32]) -> (usize, f32) {
    group.iter().enumerate().fold(
        (0, 0.0f32),
        |best, (i, &w)| if w.abs() > best.1.abs() { (i, w) } else { best },
    )
}

/// Fills `codes` (of full width) and returns the scale; infinite when f16 cannot hold it.
fn encode_group(group: &[f32], codes: &mut [u8], code: Code) -> f16 {
    match code {
        Code::Plain(Bits::B8) | Code::Nested224 | Code::Nested44 => encode_q8(group, codes),
        Code::Plain(Bits::B4) => encode_q4(group, codes),
        Code::Plain(Bits::B1) => encode_signs(group, codes),
        Code::Plain(bits @ (Bits::B2 | Bits::B3)) => encode_searched(group, codes, bits),
    }
}

/// Q8_0 as ggml's reference has it: scale absmax / 127, halves away from zero, codes made with the unrounded scale.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "-127..=127 moved by 128"
)]
fn encode_q8(group: &[f32], codes: &mut [u8]) -> f16 {
    let scale = extreme(group).1.abs() / 127.0;
    let inverse = inverse(scale);
    for (c, w) in codes.iter_mut().zip(group) {
        *c = ((w * inverse).round() + 128.0) as u8;
    }
    f16::from_f32(scale)
}

/// Q4_0 as ggml's reference has it: the extreme weight becomes −8, codes made with the unrounded scale.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "0.5..=16.5, then cut"
)]
fn encode_q4(group: &[f32], codes: &mut [u8]) -> f16 {
    let scale = extreme(group).1 / -8.0;
    let inverse = inverse(scale);
    for (c, w) in codes.iter_mut().zip(group) {
        *c = ((w * inverse + 8.5) as u8).min(15);
    }
    f16::from_f32(scale)
}

/// Signs: the level of least squared error is the mean magnitude, half a scale from zero.
fn encode_signs(group: &[f32], codes: &mut [u8]) -> f16 {
    for (c, w) in codes.iter_mut().zip(group) {
        *c = u8::from(*w >= 0.0);
    }
    #[expect(clippy::cast_precision_loss, reason = "a mean")]
    let mean = group.iter().map(|w| f64::from(w.abs())).sum::<f64>() / group.len() as f64;
    f16::from_f64(2.0 * mean)
}

/// 1 / scale, and 0 where that is not a number to multiply with (weights below 1e-36: they become 0).
fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The f16 scale (either sign) of least squared error among [`SEARCH_STEPS`] × 2, refitted once to its own codes.
fn encode_searched(group: &[f32], codes: &mut [u8], bits: Bits) -> f16 {
    let half = f32::from(1u8 << (bits.get() - 1));
    let widest = extreme(group).1 / -half;
    let mut best = (f32::INFINITY, f16::ZERO);
    let consider = |scale: f32, best: &mut (f32, f16)| {
        let scale = f16::from_f32(scale);
        let error = if scale.is_finite() {
            squared_error(group, scale.to_f32(), half)
        } else {
            f32::INFINITY
        };
        if error < best.0 {
            *best = (error, scale);
        }
    };
    for i in 0..SEARCH_STEPS {
        let scale = widest * (SEARCH.0 + SEARCH.1 * f32::from(i));
        consider(scale, &mut best);
        consider(-scale, &mut best);
    }
    if best.0 == f32::INFINITY {
        return f16::INFINITY;
    }
    let (mut wq, mut qq) = (0.0f32, 0.0f32);
    for w in group {
        let q = nearest(*w, best.1.to_f32(), half);
        wq += w * q;
        qq += q * q;
    }
    if qq > 0.0 {
        consider(wq / qq, &mut best);
    }
    for (c, w) in codes.iter_mut().zip(group) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..2^bits")]
        let code = (nearest(*w, best.1.to_f32(), half) + half) as u8;
        *c = code;
    }
    best.1
}

/// The signed code in `-half..half` nearest to `w / scale`.
fn nearest(w: f32, scale: f32, half: f32) -> f32 {
    (w * inverse(scale)).round().clamp(-half, half - 1.0)
}

fn squared_error(group: &[f32], scale: f32, half: f32) -> f32 {
    group
        .iter()
        .map(|&w| {
            let e = w - scale * nearest(w, scale, half);
            e * e
        })
        .sum()
}

/// Least squares over the matrix: with `c = scale · cell`, the z that minimises `Σ (w − c·(u − z))²`, which makes
/// `Σ c·error` 0. Full widths keep the code of zero.
fn fit_zero_points(weights: &[f32], codes: &[u8], scales: &[f32], format: &MatrixFormat) -> Vec<f32> {
    let code = format.code();
    let full = code.full().get();
    let fit = |bits: &Bits| {
        let cut = full - bits.get();
        if cut == 0 {
            return code.default_zero_point(*bits);
        }
        let cell = f64::from(1u32 << cut);
        let (mut above, mut below) = (0.0f64, 0.0f64);
        for row in 0..format.rows() {
            for group in 0..format.groups() {
                let c = f64::from(scales[row * format.groups() + group]) * cell;
                let from = row * format.cols() + group * format.group();
                let to = from + format.group().min(format.cols() - group * format.group());
                for (w, u) in weights[from..to].iter().zip(&codes[from..to]) {
                    above += c * (c * f64::from(u >> cut) - f64::from(*w));
                    below += c * c;
                }
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "a zero point is an f32")]
        let z = (above / below) as f32;
        if z.is_finite() {
            z
        } else {
            code.default_zero_point(*bits)
        }
    };
    code.prefixes().iter().map(fit).collect()
}
