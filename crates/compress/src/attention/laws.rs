//! Laws of narrower attention: the algebra on small layers, against brute force; a whole model on disk.

use cotk_run::seeds::Seeds;
use ndarray::Array2;
use rand::RngExt;

use super::factor::{Decomposed, Moments, Shape, part, put, widths};

const OUTPUTS: usize = 10;
const INPUTS: usize = 7;

struct Case {
    shape: Shape,
    /// `[groups · dim, INPUTS]`
    values: Array2<f64>,
    /// `[OUTPUTS, heads · dim]`
    outputs: Array2<f64>,
    /// Mixed inputs of every head, `[tokens, INPUTS]` each: attention mixes inputs as it mixes what is made of them.
    mixed: Vec<Array2<f64>>,
}

impl Case {
    fn new(seed: u64, shape: Shape, tokens: usize) -> Self {
        let mut stream = Seeds::new(seed).stream("attention");
        let mut draw =
            |rows: usize, cols: usize| Array2::from_shape_fn((rows, cols), |_| stream.random::<f64>() * 2.0 - 1.0);
        // Inputs of very different sizes, or all ranks would be alike.
        let sizes = Array2::from_shape_fn((1, INPUTS), |(_, at)| 1.5f64.powi(-(at as i32)));
        Self {
            shape,
            values: draw(shape.groups * shape.dim, INPUTS),
            outputs: draw(OUTPUTS, shape.heads * shape.dim),
            mixed: (0..shape.heads).map(|_| draw(tokens, INPUTS) * &sizes).collect(),
        }
    }

    /// Values `[groups · width, INPUTS]` mixed, `[tokens, heads · width]`.
    fn mix(&self, values: &Array2<f64>) -> Array2<f64> {
        let width = values.nrows() / self.shape.groups;
        let mut rows = Array2::zeros((self.mixed[0].nrows(), self.shape.heads * width));
        for (head, mixed) in self.mixed.iter().enumerate() {
            let group = head / (self.shape.heads / self.shape.groups);
            let own = mixed.dot(&part(values.view(), group * width..(group + 1) * width, 0..INPUTS).t());
            put(
                &mut rows,
                0..mixed.nrows(),
                head * width..(head + 1) * width,
                own.view(),
            );
        }
        rows
    }

    fn moments(&self) -> Moments {
        let mut moments = Moments::new(self.shape);
        moments.add(&self.mix(&self.values).mapv(|x| x as f32));
        moments
    }

    /// The values of a narrower pair.
    fn narrow(&self, turns: &[Array2<f64>]) -> Array2<f64> {
        let (dim, rank) = (self.shape.dim, turns[0].nrows());
        let mut narrow = Array2::zeros((self.shape.groups * rank, INPUTS));
        for (group, turn) in turns.iter().enumerate() {
            let own = turn.dot(&part(self.values.view(), group * dim..(group + 1) * dim, 0..INPUTS));
            put(&mut narrow, group * rank..(group + 1) * rank, 0..INPUTS, own.view());
        }
        narrow
    }

    fn square(&self, values: &Array2<f64>, outputs: &Array2<f64>) -> f64 {
        let truth = self.mix(&self.values).dot(&self.outputs.t());
        let said = self.mix(values).dot(&outputs.t());
        (&truth - &said).iter().map(|x| x * x).sum()
    }

    fn size(&self) -> f64 {
        let truth = self.mix(&self.values).dot(&self.outputs.t());
        truth.iter().map(|x| x * x).sum()
    }
}

const SHAPES: [Shape; 3] = [
    Shape {
        heads: 3,
        groups: 3,
        dim: 5,
    },
    Shape {
        heads: 4,
        groups: 2,
        dim: 4,
    },
    Shape {
        heads: 2,
        groups: 1,
        dim: 6,
    },
];

/// Law: at full rank the narrower pair says what both projections said; each rank's own product is what brute force over
/// the dense product makes of it.
#[test]
fn at_full_rank_nothing_changes() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let case = Case::new(seed as u64, shape, 60);
        let moments = case.moments();
        let factors = Decomposed::new(case.outputs.view(), &moments)
            .unwrap()
            .factors(shape.dim);
        let error = case.square(&case.narrow(&factors.turns), &factors.outputs);
        assert!(error < 1e-12 * case.size(), "{shape:?}: {error}");
        let product = factors.product(shape);
        let off = (&product - &case.outputs)
            .iter()
            .fold(0.0f64, |most, x| most.max(x.abs()));
        assert!(off < 1e-6, "{off}");
    }
}

/// Law: with one head, what a rank loses is the sum of the gains that it leaves out, and no other pair of that rank loses
/// less: neither the truncation of the factors one by one nor random ones, refitted or not.
#[test]
fn what_is_truncated_costs_what_its_singular_values_say() {
    let shape = Shape {
        heads: 1,
        groups: 1,
        dim: 6,
    };
    let case = Case::new(7, shape, 80);
    let moments = case.moments();
    let found = Decomposed::new(case.outputs.view(), &moments).unwrap();
    let gains = found.gains();
    assert!(gains.windows(2).all(|pair| pair[0] >= pair[1]));
    for rank in 1..shape.dim {
        let factors = found.factors(rank);
        let error = case.square(&case.narrow(&factors.turns), &factors.outputs);
        let expected: f64 = gains[rank..].iter().sum();
        assert!((error - expected).abs() < 1e-2 * expected, "{rank}: {error} {expected}");
        let mut stream = Seeds::new(rank as u64).stream("others");
        for _ in 0..20 {
            let turn = Array2::from_shape_fn((rank, shape.dim), |_| stream.random::<f64>() - 0.5);
            let other = super::factor::Factors {
                outputs: Array2::zeros((OUTPUTS, rank)),
                turns: vec![turn],
            };
            let other = other.refit(case.outputs.view(), &moments, 1e-9).unwrap().unwrap();
            assert!(case.square(&case.narrow(&other.turns), &other.outputs) > error * (1.0 - 1e-6));
        }
    }
}

/// Law: the refit of all heads together loses less on what it was fitted to, by what brute force measures; it is kept only
/// if the held-out half gains.
#[test]
fn outputs_are_refitted_together() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let case = Case::new(10 + seed as u64, shape, 60);
        let moments = case.moments();
        let factors = Decomposed::new(case.outputs.view(), &moments).unwrap().factors(2);
        let before = case.square(&case.narrow(&factors.turns), &factors.outputs) / case.size();
        let (better, [said_before, said_after]) = factors.refitted(case.outputs.view(), &moments, &moments).unwrap();
        let better = better.expect("what judges is what was fitted");
        let after = case.square(&case.narrow(&better.turns), &better.outputs) / case.size();
        assert!(after < before, "{after} {before}");
        assert!((said_before - before).abs() < 1e-4 * before, "{said_before} {before}");
        assert!((said_after - after).abs() < 1e-4 * before, "{said_after} {after}");
        // Judged by tokens on which the truncation is already exact, no refit is kept.
        let mut exact = Moments::new(shape);
        exact.add(&Array2::zeros((1, shape.heads * shape.dim)));
        assert!(
            factors
                .refitted(case.outputs.view(), &moments, &exact)
                .unwrap()
                .0
                .is_none()
        );
    }
}

/// Law: at least the share that was asked for goes, the least gain first, one multiple stays, and no swap of two steps
/// would lose less.
#[test]
fn the_ranks_that_earn_least_go() {
    let gains = vec![
        vec![9.0, 5.0, 4.0, 1.0, 0.5, 0.1, 0.0, 0.0],
        vec![90.0, 50.0, 40.0, 30.0, 20.0, 15.0, 12.0, 11.0],
        vec![3.0, 3.0, 3.0, 3.0, 3.0, 3.0],
    ];
    let weights = [10, 10, 10];
    assert_eq!(widths(&gains, &weights, 1, 0.0), [8, 8, 6]);
    assert_eq!(widths(&gains, &weights, 1, 0.25), [3, 8, 5]);
    assert_eq!(widths(&gains, &weights, 4, 0.25), [4, 8, 4]);
    for ratio in [0.1, 0.3, 0.5, 0.7, 0.99] {
        let found = widths(&gains, &weights, 2, ratio);
        assert!(found.iter().all(|width| *width >= 2));
        let left: usize = found.iter().sum();
        assert!(
            left as f64 <= 22.0 * (1.0 - ratio) + 1.0 || left == 6,
            "{ratio}: {found:?}"
        );
    }
}

mod whole {
    //! On the committed tiny checkpoint.

    use std::path::{Path, PathBuf};

    use cotk_container::manifest::DENSE;
    use cotk_run::cancel::Cancel;
    use cotk_run::facts::FactList;
    use cotk_run::progress::Silent;

    use crate::Result;
    use crate::pipeline::{Request, Surroundings, compress};
    use crate::recipe::Recipe;
    use crate::report::Report;

    fn tiny(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../data/tiny-qwen2moe")
            .join(name)
    }

    fn made(out: &Path, sets: &[&str]) -> Result<Report> {
        let small = ["compress.calibration_tokens=3000"];
        let sets: Vec<String> = small.iter().chain(sets).map(|s| (*s).to_owned()).collect();
        let request = Request {
            model: tiny(""),
            out: out.to_owned(),
            recipe_name: "moe-int4".to_owned(),
            recipe: Recipe::load("moe-int4", &sets, None, None)?,
            calibration: tiny("train.txt"),
            eval_text: None,
        };
        compress(
            &request,
            &Surroundings {
                progress: &Silent,
                cancel: &Cancel::new(),
                facts: &FactList::default(),
                cost: None,
                threads: 2,
            },
        )
    }

    /// Law: what was to go is gone from the file, the container opens as what it is, and more ranks are worth more.
    #[test]
    fn a_container_holds_narrower_values() {
        let folder = tempfile::tempdir().unwrap();
        let out = |name: &str| folder.path().join(name);
        let whole = made(&out("whole"), &[]).unwrap();
        assert!(whole.attention.is_none());
        let size = |name: &str| fs_err::metadata(out(name).join(DENSE)).unwrap().len();
        let mut last = 0.0;
        for (name, ratio, coded) in [("a", "0.25", false), ("b", "0.75", false), ("c", "0.25", true)] {
            let ratio = format!("compress.attention.ratio={ratio}");
            let mut sets = vec![&*ratio, "compress.attention.multiple=2"];
            if coded {
                sets.push("compress.dense_bits=8");
            }
            let report = made(&out(name), &sets).unwrap();
            let found = report.attention.clone().unwrap();
            assert!(found.bytes_after < found.bytes_before);
            assert!(report.markdown().contains("rotary positions"));
            let opened = cotk_runtime::open::open(&out(name)).unwrap();
            let widths = opened
                .files
                .spec
                .layers
                .iter()
                .map(|layer| opened.files.spec.value_dim(layer));
            assert!(widths.eq(found.layers.iter().map(|layer| layer.width)));
            if !coded {
                // The header's length follows from the names and shapes: a few bytes.
                let gone = size("whole") - size(name);
                assert!(gone.abs_diff(found.bytes_before - found.bytes_after) <= 128, "{gone}");
                assert!(report.kl_nats > last, "{} {last}", report.kl_nats);
                last = report.kl_nats;
            }
        }
        assert!(whole.kl_nats < last);
    }

    /// Law: nothing to take away changes nothing.
    #[test]
    fn a_ratio_of_zero_is_the_source() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, same) = (folder.path().join("whole"), folder.path().join("same"));
        made(&whole, &[]).unwrap();
        let report = made(&same, &["compress.attention.ratio=0"]).unwrap();
        assert!(
            report
                .attention
                .unwrap()
                .layers
                .iter()
                .all(|layer| layer.whole.is_some())
        );
        for name in [DENSE, "experts.bin"] {
            assert_eq!(
                fs_err::read(whole.join(name)).unwrap(),
                fs_err::read(same.join(name)).unwrap(),
                "{name}"
            );
        }
        let refused = made(&folder.path().join("x"), &["compress.attention.ratio=1"]);
        assert!(refused.is_err());
    }
}
