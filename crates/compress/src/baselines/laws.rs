//! Laws of the baselines, on offers that are drawn.

use cotk_quant::code::{Bits, Code};
use cotk_quant::layout::{ScaleForm, WHOLE_ROW};
use cotk_run::seeds::Seeds;
use cotk_run::units::{ExpertId, LayerId};
use rand::RngExt;

use super::mc::assign;
use super::*;
use crate::choice::{Chooser, Limits, MatrixChoice, Offer};
use crate::layer::{ExpertUsage, Usage};

const HIDDEN: usize = 256;
const INNER: usize = 96;
const EXPERTS: u32 = 8;
const LAYERS: u32 = 3;

/// Every form that some baseline wants; errors fall fourfold a bit, less for finer scales, times what is drawn.
pub(crate) fn drawn(seed: u64) -> Vec<LayerOffers> {
    let mut stream = Seeds::new(seed).stream("offers");
    let groups = [(16, ScaleForm::TwoLevel), (32, ScaleForm::TwoLevel)]
        .into_iter()
        .chain([32, 64, 128, WHOLE_ROW].map(|group| (group, ScaleForm::F16)));
    let forms: Vec<Form> = groups
        .flat_map(|(group, scales)| {
            Bits::ALL.map(|bits| Form {
                code: Code::Plain(bits),
                group,
                scales,
            })
        })
        .collect();
    (0..LAYERS)
        .map(|layer| {
            let mut offers = Vec::new();
            let mut experts = Vec::new();
            for expert in (0..EXPERTS).map(ExpertId) {
                let tokens = stream.random_range(1..1000u64);
                let gate = tokens as f64 * stream.random_range(0.1..0.5);
                experts.push(ExpertUsage {
                    tokens,
                    gate,
                    gate_squares: gate * gate / tokens as f64,
                });
                for kind in Kind::ALL {
                    let scale = stream.random_range(0.5..2.0) * gate;
                    for &form in &forms {
                        let (rows, cols) = kind.shape(HIDDEN, INNER);
                        let bits = f64::from(form.code.full().get());
                        offers.push(Offer {
                            expert,
                            kind,
                            choice: MatrixChoice { form, rank: 0 },
                            error: scale * 0.25f64.powf(bits) * (1.0 + form.group.min(cols) as f64 / 256.0),
                            bytes: form.format(rows, cols).unwrap().total_bytes() as u64,
                            ms: 0.0,
                        });
                    }
                }
            }
            LayerOffers {
                layer: LayerId(layer),
                usage: Usage {
                    tokens: experts.iter().map(|e: &ExpertUsage| e.tokens).sum(),
                    experts,
                    state_square: 1.0,
                },
                offers,
                variants: Vec::new(),
                sensitivity: [1.0, 2.0, 0.5],
            }
        })
        .collect()
}

/// A budget in bits per weight, scales included.
fn limits(bits: f64) -> Limits {
    let weights = 3 * HIDDEN * INNER * EXPERTS as usize * LAYERS as usize;
    Limits {
        record_bytes: Some((bits / 8.0 * weights as f64) as u64),
        ms: None,
    }
}

fn form(fate: &Fate) -> Form {
    match fate {
        Fate::Coded { matrices, .. } => matrices[0].form,
        other => panic!("{other:?}"),
    }
}

fn taken(layers: &[LayerOffers], fates: &[LayerFates]) -> (u64, f64) {
    let offered = Offered::all(layers);
    let wholes: Vec<Whole> = offered
        .iter()
        .zip(fates)
        .flat_map(|(offered, fates)| {
            assert_eq!(offered.layer.layer, fates.layer);
            let of = |(at, fate)| offered.whole(ExpertId(at), form(fate)).unwrap();
            (0..).zip(&fates.experts).map(of).collect::<Vec<_>>()
        })
        .collect();
    (bytes(&wholes), loss(&wholes))
}

fn choosers() -> Vec<Box<dyn Chooser>> {
    vec![
        Box::new(Uniform::strongest("gptq uniform")),
        Box::new(Uniform::finest("rtn")),
        Box::new(Mc::PUBLISHED),
        Box::new(MixtureOfPrecisions::default()),
    ]
}

#[test]
fn budgets_are_met_nearly_used_up_and_losses_are_those_of_the_fates() {
    for seed in 0..3 {
        let offers = drawn(seed);
        for chooser in choosers() {
            for bits in [1.5, 2.25, 2.5, 3.5, 4.5, 8.5] {
                let limits = limits(bits);
                let (fates, expected) = chooser.choose(&offers, &limits, seed).unwrap();
                let (bytes, loss) = taken(&offers, &fates);
                let limit = limits.record_bytes.unwrap();
                assert!(bytes <= limit, "{} at {bits}: {bytes} of {limit}", chooser.name());
                // A step of the coarsest allocation: half a bit of 8-bit codes, three quarters below.
                let is_used = bytes as f64 > 0.72 * limit as f64 || bits > 8.0;
                assert!(is_used, "{} at {bits}: {bytes} of {limit}", chooser.name());
                assert!((loss - expected).abs() <= 1e-9 * loss, "{}", chooser.name());
            }
        }
    }
}

#[test]
fn a_budget_that_nothing_meets_names_the_least() {
    let offers = drawn(0);
    for chooser in choosers() {
        let small = Limits {
            record_bytes: Some(1000),
            ms: None,
        };
        match chooser.choose(&offers, &small, 0) {
            Err(CompressError::Budget { budget: 1000, least }) => {
                let enough = Limits {
                    record_bytes: Some(least),
                    ms: None,
                };
                assert!(chooser.choose(&offers, &enough, 0).is_ok(), "{}", chooser.name());
            }
            other => panic!("{}: {other:?}", chooser.name()),
        }
    }
}

#[test]
fn uniform_takes_the_form_that_loses_least_of_those_that_fit() {
    let offers = drawn(1);
    let (fates, _) = Uniform::strongest("u").choose(&offers, &limits(4.53), 0).unwrap();
    // 4 bits, 6-bit scales for 16 and an f16 for 128 of them, whole bytes where a row ends after 96: 4.528 bits, and the
    // finest.
    let finest = Form {
        code: Code::Plain(Bits::B4),
        group: 16,
        scales: ScaleForm::TwoLevel,
    };
    assert!(fates.iter().flat_map(|l| &l.experts).all(|fate| form(fate) == finest));
    let of = |bits| form(&Uniform::finest("r").choose(&offers, &limits(bits), 0).unwrap().0[0].experts[0]);
    assert_eq!(of(4.5), Form::plain(Code::Plain(Bits::B4), 32));
    assert_eq!(of(2.4), Form::plain(Code::Plain(Bits::B2), 64));
    let named = Uniform::of("x", 128, ScaleForm::F16);
    assert_eq!(
        form(&named.choose(&offers, &limits(4.5), 0).unwrap().0[0].experts[0]),
        Form::plain(Code::Plain(Bits::B4), 128)
    );
}

#[test]
fn mc_finds_the_optimum_of_its_program() {
    let mut stream = Seeds::new(5).stream("costs");
    for widths in [[1, 2, 3], [2, 3, 4], [3, 4, 8]] {
        for bits in 5 * widths[0]..=5 * widths[2] {
            let costs: Vec<Vec<f64>> = (0..5)
                .map(|_| {
                    let scale: f64 = stream.random_range(0.0..1.0);
                    widths.iter().map(|&w| scale * 0.3f64.powi(w as i32)).collect()
                })
                .collect();
            let value = |picked: &[usize]| -> f64 { picked.iter().zip(&costs).map(|(&w, c)| c[w]).sum() };
            let sum = |picked: &[usize]| -> usize { picked.iter().map(|&w| widths[w]).sum() };
            let mut brute = [f64::INFINITY; 2];
            for code in 0..3usize.pow(5) {
                let picked: Vec<usize> = (0..5).map(|e| code / 3usize.pow(e) % 3).collect();
                if sum(&picked) <= bits {
                    let is_strict = picked.contains(&2) && picked.contains(&1);
                    brute[1] = brute[1].min(value(&picked));
                    if is_strict {
                        brute[0] = brute[0].min(value(&picked));
                    }
                }
            }
            let wanted = if brute[0].is_finite() { brute[0] } else { brute[1] };
            let picked = assign(&costs, &widths, bits, 1);
            assert!(sum(&picked) <= bits && (value(&picked) - wanted).abs() < 1e-12);
        }
    }
}

#[test]
fn mc_gives_bits_to_experts_that_are_chosen_and_weigh() {
    let mut offers = drawn(2);
    for layer in &mut offers {
        layer.usage.experts[3].tokens = 100_000;
        layer.usage.experts[3].gate = 90_000.0;
        layer.usage.experts[5].tokens = 0;
        layer.usage.experts[5].gate = 0.0;
    }
    let (fates, _) = Mc::PUBLISHED.choose(&offers, &limits(2.5), 0).unwrap();
    for layer in &fates {
        let bits = |expert: usize| form(&layer.experts[expert]).code.full().get();
        assert_eq!((bits(3), bits(5)), (3, 1));
        assert!(layer.experts.iter().all(|fate| form(fate).group == 128));
    }
}

#[test]
fn a_mixture_of_precisions_is_drawn_by_its_seed() {
    let offers = drawn(3);
    let mix = |seed| {
        MixtureOfPrecisions::default()
            .choose(&offers, &limits(3.5), seed)
            .unwrap()
            .0
    };
    assert_eq!(mix(0), mix(0));
    assert_ne!(mix(0), mix(1));
    let wide = |seed| {
        let all = mix(seed);
        let experts: Vec<u32> = all
            .iter()
            .flat_map(|l| l.experts.iter().map(|fate| form(fate).code.full().get()))
            .collect();
        assert!(experts.iter().all(|bits| [2, 4].contains(bits)));
        experts.iter().filter(|&&bits| bits == 4).count()
    };
    assert_eq!(wide(0), wide(1));
}
