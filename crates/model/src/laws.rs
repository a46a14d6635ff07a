//! The laws of every [`MoeRuntime`], one suite as a value: each implementation runs [`check`] in its tests, with a
//! plain reference of the same weights. Inputs are drawn from one seed; all broken laws are said at once.

use cotk_run::seeds::Seeds;
use cotk_run::units::LayerId;
use rand::{Rng, RngExt};

use crate::moe::{Mode, MoeRecord, MoeRuntime, Precision, RouterScores, RoutingRule, RuntimeError};

/// What is held to the laws, and against what.
pub struct Subject<'a> {
    pub runtime: &'a dyn MoeRuntime,
    /// The truth for [`Mode::Exact`]: same layers, same weights (decoded ones for a quantized subject), same choice
    /// of experts.
    pub reference: &'a dyn MoeRuntime,
    /// Largest relative error of exact mode: ‖out − reference‖ / ‖reference‖ over a batch.
    pub exact_error: f32,
    /// Largest relative difference between a batch and its tokens one by one; 0 demands equal bits.
    pub split_error: f32,
    pub seed: u64,
}

/// A law: its name, and a check that says what it found.
pub struct Law {
    /// The law in words, as a test name.
    pub name: &'static str,
    check: fn(&Subject<'_>) -> Result<(), String>,
}

/// Every law.
pub const LAWS: [Law; 9] = [
    Law {
        name: "exact_equals_the_reference",
        check: exact_equals_the_reference,
    },
    Law {
        name: "same_input_gives_the_same_bits_whatever_the_thread_count",
        check: same_bits_whatever_the_thread_count,
    },
    Law {
        name: "a_batch_equals_its_tokens_one_by_one",
        check: a_batch_equals_its_tokens,
    },
    Law {
        name: "the_record_tells_what_routing_chose",
        check: the_record_tells_what_routing_chose,
    },
    Law {
        name: "gates_scale_the_output",
        check: gates_scale_the_output,
    },
    Law {
        name: "little_is_another_computation",
        check: little_is_another_computation,
    },
    Law {
        name: "no_tokens_no_output",
        check: no_tokens_no_output,
    },
    Law {
        name: "what_cannot_be_served_is_refused",
        check: what_cannot_be_served_is_refused,
    },
    Law {
        name: "a_crowd_at_one_expert_changes_nothing",
        check: a_crowd_at_one_expert_changes_nothing,
    },
];

/// Runs every law.
///
/// # Errors
/// The names of all broken laws, each with what was found.
pub fn check(subject: &Subject<'_>) -> Result<(), String> {
    let broken: Vec<String> = LAWS
        .iter()
        .filter_map(|law| (law.check)(subject).err().map(|found| format!("{}: {found}", law.name)))
        .collect();
    if broken.is_empty() {
        Ok(())
    } else {
        Err(broken.join("\n"))
    }
}

/// Hidden states `[tokens, hidden]` and scores `[tokens, experts]`.
struct Input {
    hidden: Vec<f32>,
    scores: Vec<f32>,
}

fn draw(subject: &Subject<'_>, purpose: &str, tokens: usize) -> Input {
    let shape = subject.runtime.shape();
    let mut stream = Seeds::new(subject.seed).stream(purpose);
    let hidden = (0..tokens * shape.hidden).map(|_| normal(&mut stream)).collect();
    let logits: Vec<f32> = (0..tokens * shape.rule.experts)
        .map(|_| 2.0 * normal(&mut stream))
        .collect();
    let mut scores = Vec::with_capacity(logits.len());
    for row in logits.chunks(shape.rule.experts) {
        let sum: f32 = row.iter().map(|l| l.exp()).sum();
        scores.extend(row.iter().map(|l| l.exp() / sum));
    }
    Input { hidden, scores }
}

/// Twelve uniforms: normal enough, and the same on every platform.
fn normal(stream: &mut impl Rng) -> f32 {
    (0..12).map(|_| stream.random::<f32>()).sum::<f32>() - 6.0
}

fn run(
    runtime: &dyn MoeRuntime,
    layer: LayerId,
    input: &Input,
    mode: Mode,
) -> Result<(Vec<f32>, MoeRecord), RuntimeError> {
    // What stood in `out` must not matter: NaN would show.
    let mut out = vec![f32::NAN; input.hidden.len()];
    let router = RouterScores::new(&input.scores, &runtime.shape().rule)?;
    let record = runtime.forward(layer, &input.hidden, router, mode, &mut out)?;
    Ok((out, record))
}

fn run_ok(
    runtime: &dyn MoeRuntime,
    layer: LayerId,
    input: &Input,
    mode: Mode,
) -> Result<(Vec<f32>, MoeRecord), String> {
    run(runtime, layer, input, mode).map_err(|e| format!("{layer}, {mode}: {e}"))
}

/// ‖a − b‖ / ‖b‖ in f64.
fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let size: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    if difference == 0.0 {
        0.0
    } else {
        (difference / size).sqrt()
    }
}

fn within(what: &str, found: f64, limit: f32) -> Result<(), String> {
    // NaN must fail: hence not `found > limit`.
    if found <= f64::from(limit) {
        Ok(())
    } else {
        Err(format!(
            "{what}: relative error {found:.3e}, expected at most {limit:.3e}"
        ))
    }
}

fn exact_equals_the_reference(s: &Subject<'_>) -> Result<(), String> {
    if s.runtime.shape() != s.reference.shape() {
        return Err(format!(
            "shape {:?}, expected {:?}",
            s.runtime.shape(),
            s.reference.shape()
        ));
    }
    for &layer in &s.runtime.shape().layers {
        for tokens in [1, 2, 33] {
            let input = draw(s, "equals", tokens);
            let (out, _) = run_ok(s.runtime, layer, &input, Mode::Exact)?;
            let (truth, _) = run_ok(s.reference, layer, &input, Mode::Exact)?;
            within(
                &format!("{layer}, {tokens} tokens"),
                relative_error(&out, &truth),
                s.exact_error,
            )?;
        }
    }
    Ok(())
}

fn same_bits_whatever_the_thread_count(s: &Subject<'_>) -> Result<(), String> {
    let layer = s.runtime.shape().layers[0];
    for &mode in s.runtime.modes() {
        for tokens in [1, 70] {
            let input = draw(s, "threads", tokens);
            let mut outs = Vec::new();
            for threads in [1, 3, 3] {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .map_err(|e| e.to_string())?;
                outs.push(pool.install(|| run_ok(s.runtime, layer, &input, mode))?);
            }
            for other in &outs[1..] {
                if bits(&other.0) != bits(&outs[0].0) || other.1 != outs[0].1 {
                    return Err(format!("{layer}, {mode}, {tokens} tokens: another result"));
                }
            }
        }
    }
    Ok(())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn a_batch_equals_its_tokens(s: &Subject<'_>) -> Result<(), String> {
    let shape = s.runtime.shape();
    let (width, experts) = (shape.hidden, shape.rule.experts);
    for &layer in &shape.layers {
        for &mode in s.runtime.modes() {
            let input = draw(s, "split", 9);
            let (whole, record) = run_ok(s.runtime, layer, &input, mode)?;
            let (mut parts, mut uses) = (Vec::new(), Vec::new());
            for token in 0..9 {
                let one = Input {
                    hidden: input.hidden[token * width..][..width].to_vec(),
                    scores: input.scores[token * experts..][..experts].to_vec(),
                };
                let (out, record) = run_ok(s.runtime, layer, &one, mode)?;
                parts.extend(out);
                uses.extend(record.uses);
            }
            within(
                &format!("{layer}, {mode}"),
                relative_error(&parts, &whole),
                s.split_error,
            )?;
            if s.split_error == 0.0 && bits(&parts) != bits(&whole) {
                return Err(format!("{layer}, {mode}: other bits"));
            }
            if uses != record.uses {
                return Err(format!("{layer}, {mode}: other experts alone than in a batch"));
            }
        }
    }
    Ok(())
}

fn the_record_tells_what_routing_chose(s: &Subject<'_>) -> Result<(), String> {
    for &layer in &s.runtime.shape().layers {
        let input = draw(s, "record", 17);
        let (_, truth) = run_ok(s.reference, layer, &input, Mode::Exact)?;
        for &mode in s.runtime.modes() {
            let (_, record) = run_ok(s.runtime, layer, &input, mode)?;
            if record.slots != truth.slots || record.uses.len() != truth.uses.len() {
                return Err(format!(
                    "{layer}, {mode}: {} uses in {} slots, expected {} in {}",
                    record.uses.len(),
                    record.slots,
                    truth.uses.len(),
                    truth.slots
                ));
            }
            for (found, expected) in record.uses.iter().zip(&truth.uses) {
                if found.expert != expected.expert || (found.gate - expected.gate).abs() > 1e-6 {
                    return Err(format!("{layer}, {mode}: {found:?}, expected {expected:?}"));
                }
                let has_bits = match found.precision {
                    Precision::Full | Precision::Prefix => found.bits > 0,
                    Precision::Constant | Precision::Skipped => found.bits == 0,
                };
                if !has_bits {
                    return Err(format!("{layer}, {mode}: {found:?} contradicts itself"));
                }
            }
        }
    }
    Ok(())
}

/// Scores of half the size give half the output, or the same where gates are normalised by their sum.
fn gates_scale_the_output(s: &Subject<'_>) -> Result<(), String> {
    let RoutingRule { norm_topk, .. } = s.runtime.shape().rule;
    let layer = s.runtime.shape().layers[0];
    let input = draw(s, "gates", 5);
    // A power of two: the arithmetic itself stays exact. `removed` divides by the living mass and cannot be told
    // apart from a normalised rule here, so both answers are right; nothing else is.
    let halved = Input {
        hidden: input.hidden.clone(),
        scores: input.scores.iter().map(|g| g * 0.5).collect(),
    };
    let (whole, _) = run_ok(s.runtime, layer, &input, Mode::Exact)?;
    let (half, _) = run_ok(s.runtime, layer, &halved, Mode::Exact)?;
    let doubled: Vec<f32> = half.iter().map(|h| h * 2.0).collect();
    let (scaled, same) = (relative_error(&doubled, &whole), relative_error(&half, &whole));
    if norm_topk {
        within("normalised gates", same, 1e-5)
    } else {
        within("gates", scaled.min(same), 1e-5)
    }
}

fn little_is_another_computation(s: &Subject<'_>) -> Result<(), String> {
    let modes = s.runtime.modes();
    if modes.first() != Some(&Mode::Exact) {
        return Err(format!("modes {modes:?}, expected `exact` first"));
    }
    for &layer in &s.runtime.shape().layers {
        let input = draw(s, "little", 8);
        let (exact, record) = run_ok(s.runtime, layer, &input, Mode::Exact)?;
        if record.skipped_mass() != 0.0 || record.uses.iter().any(|u| u.precision == Precision::Prefix) {
            return Err(format!("{layer}: exact mode ran below full width"));
        }
        if modes.contains(&Mode::Little) {
            let (little, record) = run_ok(s.runtime, layer, &input, Mode::Little)?;
            if (record.low_bit_fraction() - 1.0).abs() > 1e-9 {
                return Err(format!(
                    "{layer}: low bit fraction {}, expected 1",
                    record.low_bit_fraction()
                ));
            }
            let difference = relative_error(&little, &exact);
            if !(difference > 0.0 && difference < 1.0) {
                return Err(format!(
                    "{layer}: relative difference {difference:.3e} to exact, expected between 0 and 1"
                ));
            }
        }
    }
    Ok(())
}

fn no_tokens_no_output(s: &Subject<'_>) -> Result<(), String> {
    let empty = Input {
        hidden: Vec::new(),
        scores: Vec::new(),
    };
    let (out, record) = run_ok(s.runtime, s.runtime.shape().layers[0], &empty, Mode::Exact)?;
    if out.is_empty() && record.uses.is_empty() {
        Ok(())
    } else {
        Err(format!("{} values, {} uses", out.len(), record.uses.len()))
    }
}

fn what_cannot_be_served_is_refused(s: &Subject<'_>) -> Result<(), String> {
    let shape = s.runtime.shape();
    let layer = shape.layers[0];
    let good = draw(s, "refused", 3);
    let short = Input {
        hidden: good.hidden[1..].to_vec(),
        scores: good.scores.clone(),
    };
    if run(s.runtime, layer, &short, Mode::Exact).is_ok() {
        return Err("hidden states of a wrong length were taken".to_owned());
    }
    if run(s.runtime, LayerId(u32::MAX), &good, Mode::Exact).is_ok() {
        return Err("a layer without experts was served".to_owned());
    }
    for mode in [Mode::Exact, Mode::Little] {
        if run(s.runtime, layer, &good, mode).is_ok() != s.runtime.modes().contains(&mode) {
            return Err(format!(
                "mode {mode} is served but not offered, or offered but not served"
            ));
        }
    }
    Ok(())
}

/// All tokens at the same experts, and experts without any token: no bound of a buffer, no empty batch shows.
fn a_crowd_at_one_expert_changes_nothing(s: &Subject<'_>) -> Result<(), String> {
    let shape = s.runtime.shape();
    let layer = shape.layers[shape.layers.len() - 1];
    let mut input = draw(s, "crowd", 40);
    let one: Vec<f32> = input.scores[..shape.rule.experts].to_vec();
    for row in input.scores.chunks_mut(shape.rule.experts) {
        row.copy_from_slice(&one);
    }
    let (out, _) = run_ok(s.runtime, layer, &input, Mode::Exact)?;
    let (truth, _) = run_ok(s.reference, layer, &input, Mode::Exact)?;
    within("crowd", relative_error(&out, &truth), s.exact_error)
}
