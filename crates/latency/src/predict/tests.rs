//! Laws of predictions: table rows win, fits say where they end, unknown kinds are refused.

use proptest::prelude::*;

use super::*;
use crate::fit::team::Team;
use crate::fit::{Sample, fit};
use crate::graph::Numerics;
use crate::work::{Context, ConvKey, ExpertKey, Heat, Term};

fn conv(cin: u32, cout: u32, height: u32, threads: u32) -> Key {
    Key::Conv(ConvKey {
        batch: 1,
        cin,
        cout,
        kernel: 3,
        stride: 1,
        groups: 1,
        height,
        width: height,
        numerics: Numerics::Int8,
        threads,
        context: Context::Chain,
    })
}

fn model() -> Model {
    let mut keys: Vec<Key> = Vec::new();
    for c in [8, 16, 32, 64] {
        for h in [4, 8, 16] {
            keys.push(conv(c, c, h, 1));
            keys.push(conv(c, 2 * c, h, 1));
        }
    }
    for bytes in [1u64 << 26, 1 << 28] {
        keys.push(Key::Read(ReadKey {
            tier: Tier::Memory,
            bytes,
            threads: 1,
        }));
    }
    for (hidden, inner) in [(256, 128), (512, 256), (1024, 512)] {
        let heat = Heat::Cold;
        keys.push(Key::Expert(ExpertKey {
            hidden,
            inner,
            bits: 4,
            planes: 2,
            group: 32,
            rank: 0,
            experts: 1,
            tokens: 1,
            threads: 1,
            heat,
        }));
    }
    let us = |key: &Key| -> f64 {
        let cost = |t: Term| if t == Term::Call { 2.0 } else { 0.1 };
        key.features(Block(16)).terms().iter().map(|(t, n)| cost(*t) * n).sum()
    };
    let samples: Vec<Sample> = keys
        .iter()
        .map(|&key| Sample {
            key,
            us: us(&key),
            relative_spread: 0.02,
        })
        .collect();
    let fits = fit(&samples, Block(16), 0.02);
    let rows = samples.iter().map(|s| (s.key, s.us, s.relative_spread));
    Model::new("test", Block(16), rows, fits, 0.02, vec![Flag::Quick])
}

#[test]
fn an_exact_row_wins_and_keeps_its_sum() {
    let mut model = model();
    let key = conv(16, 16, 8, 1);
    model.table.insert(key, (123.0, 0.05));
    let p = model.predict(&Work::Operator(key)).unwrap();
    assert_eq!((p.origin, p.flags.as_slice()), (Origin::Table, &[Flag::Quick][..]));
    assert!((p.ms - 0.123).abs() < 1e-12 && (p.terms.sum_ms() - p.ms).abs() < 1e-9);
    assert!(p.lo_ms < p.ms && p.ms < p.hi_ms && (p.hi_ms / p.ms).ln() > 0.05);
}

#[test]
fn beyond_what_was_measured_is_said_and_wider() {
    let model = model();
    let inside = model.predict(&Work::Operator(conv(24, 24, 8, 1))).unwrap();
    let outside = model.predict(&Work::Operator(conv(256, 256, 32, 1))).unwrap();
    assert!(!inside.flags.iter().any(|f| matches!(f, Flag::Extrapolated { .. })));
    assert!(
        outside
            .flags
            .iter()
            .any(|f| matches!(f, Flag::Extrapolated { path } if path == "conv.int8/t1"))
    );
    assert!((outside.hi_ms / outside.ms).ln() > (inside.hi_ms / inside.ms).ln() + 0.5);
}

#[test]
fn other_threads_stand_in_and_an_unknown_kind_is_refused() {
    let model = model();
    let two = model.predict(&Work::Operator(conv(16, 16, 8, 2))).unwrap();
    assert!(
        two.flags
            .iter()
            .any(|f| matches!(f, Flag::OtherThreads { measured: 1, .. }))
    );
    let float = Key::Conv(ConvKey {
        numerics: Numerics::F32,
        ..match conv(16, 16, 8, 1) {
            Key::Conv(c) => c,
            _ => unreachable!(),
        }
    });
    let text = model.predict(&Work::Operator(float)).unwrap_err().to_string();
    assert!(
        text.contains("conv.blocked/t1") && text.contains("conv 3x3/1 16→16"),
        "{text}"
    );
}

/// Law: a number of threads between or beyond the measured ones takes the time of the nearest, wide and flagged: never none.
#[test]
fn a_number_of_threads_that_was_not_measured_takes_the_nearests_time() {
    let mut model = model();
    let one = model.fits.values().find(|fit| fit.path.family == Family::ConvInt8);
    let mut two = one.expect("convolutions were fitted").clone();
    two.path.threads = 2;
    two.team = Some(Team {
        call_us: 1.5,
        share: 0.55,
        late_us: 3.0,
    });
    model.fits.insert(two.path, two);
    let predict = |threads| model.predict(&Work::Operator(conv(20, 24, 8, threads))).unwrap();
    let two = predict(2);
    assert!(two.ms > 0.0 && (two.terms.sum_ms() - two.ms).abs() < 1e-9);
    for threads in [3, 4, 64] {
        let other = predict(threads);
        assert!(
            (other.ms / two.ms - 1.0).abs() < 1e-9,
            "{threads}: {} and {}",
            other.ms,
            two.ms
        );
        assert!((other.hi_ms / other.ms).ln() >= 1.0, "{threads}");
        let is_said = |flag: &Flag| matches!(flag, Flag::OtherThreads { measured: 2, .. });
        assert!(other.flags.iter().any(is_said), "{:?}", other.flags);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Law: a fitted prediction never falls when a size grows.
    #[test]
    fn fitted_predictions_are_monotone(cin in 1u32..50, cout in 4u32..50, h in 1u32..40, by in 1u32..9) {
        // Within one kernel's channels.
        let (cin, cout, more) = (4 * cin, 4 * cout, 4 * by);
        let mut model = model();
        model.table.clear();
        model.smoother.clear();
        let ms = |key| model.predict(&Work::Operator(key)).unwrap().ms;
        let base = ms(conv(cin, cout, h, 1));
        for larger in [conv(cin + more, cout, h, 1), conv(cin, cout + more, h, 1), conv(cin, cout, h + by, 1)] {
            prop_assert!(ms(larger) >= base - 1e-12);
        }
    }
}
