//! What a prediction itself costs: a table hit, a fitted operator, an expected latency over 20 layers with its gradients.

use std::hint::black_box;

use anyhow::{Context, Result};
use cotk_latency::expect::Expectation;
use cotk_latency::graph::Graph;
use cotk_latency::predict::{CostModel, Model, Origin};
use cotk_latency::probe::Prepared;
use cotk_latency::probe::rounds::{Pace, time};
use cotk_latency::work::{Key, Work};
use cotk_onnx::zoo::random_networks;
use cotk_run::seeds::Seeds;
use serde::Serialize;

use crate::Args;
use crate::bars::Bar;
use crate::output::{round, write};
use crate::profile::{Frozen, Judged};

/// Choices of a layer: kernel, width in, width out, weight bits, activation bits, rank (reference 5).
const AXES: [usize; 6] = [3, 4, 4, 3, 2, 5];
const LAYERS: usize = 20;

#[derive(Serialize)]
struct Figures {
    profile: Judged,
    cost: Vec<Cost>,
}

#[derive(Serialize)]
struct Cost {
    what: String,
    us: f64,
    spread_us: f64,
    us_at_most: f64,
}

/// Something to time, `calls` of it in a call.
struct Repeated<F: FnMut()>(F);

impl<F: FnMut()> Prepared for Repeated<F> {
    fn run(&mut self, _piece: usize) -> cotk_latency::Result<()> {
        (self.0)();
        Ok(())
    }
}

/// All of it.
pub(crate) fn run(args: &Args) -> Result<Vec<Bar>> {
    let frozen = Frozen::load(args.profile.clone())?;
    let block = frozen.here.block();
    let origin = |model: &Model, key: &Key| model.predict(&Work::Operator(*key)).map(|p| p.origin).ok();
    let graphs: Vec<Graph> = random_networks(60, &[], &mut Seeds::new(7).stream("costs"))
        .into_iter()
        .map(|n| n.1)
        .collect();
    let mut fitted: Vec<Key> = graphs
        .iter()
        .flat_map(|g| cotk_latency::walk::operators(g, 1, block))
        .collect();
    fitted.retain(|key| origin(&frozen.model, key) == Some(Origin::Fit));
    let hits: Vec<Key> = frozen.found.profile.rows.iter().map(|row| row.key).collect();
    let (hit, fit) = (all_of(&frozen.model, &hits), all_of(&frozen.model, &fitted));
    let (expectation, probabilities) = expectation(&frozen.model, &fitted)?;
    let whole = Repeated(move || {
        black_box(expectation.value_and_gradient(black_box(&probabilities)).ok());
    });
    let graph = graphs
        .into_iter()
        .max_by_key(|g| g.nodes().len())
        .context("sixty networks")?;
    let nodes = graph.nodes().len();
    let model = frozen.model.clone();
    let network = Repeated(move || {
        let work = Work::Graph {
            graph: &graph,
            threads: 1,
        };
        black_box(model.predict(&work).ok());
    });
    let pace = Pace {
        rounds: if args.small { 10 } else { 60 },
        ..Pace::CAREFUL
    };
    let prepared: Vec<Box<dyn Prepared>> = vec![Box::new(hit), Box::new(fit), Box::new(whole), Box::new(network)];
    let timed = time(prepared, &pace, &mut Seeds::new(7).stream("order"))?;
    #[expect(clippy::cast_precision_loss, reason = "counts of keys")]
    let (per_hit, per_fit) = (hits.len() as f64, fitted.len() as f64);
    let cost = [
        (format!("table hit, mean of {} keys", hits.len()), per_hit, 1.0),
        (format!("fitted operator, mean of {} keys", fitted.len()), per_fit, 20.0),
        (
            format!(
                "expectation over {LAYERS} layers of {} entries, with gradients",
                AXES.iter().product::<usize>()
            ),
            1.0,
            1000.0,
        ),
        (format!("a network of {nodes} nodes"), 1.0, 1000.0),
    ];
    let cost: Vec<Cost> = cost
        .into_iter()
        .zip(&timed)
        .map(|((what, per, us_at_most), t)| Cost {
            what,
            us: round(t.median_us / per),
            spread_us: round(t.mad_us / per),
            us_at_most,
        })
        .collect();
    cost.iter().for_each(|c| {
        println!(
            "  {:70} {:8.3} µs ± {:.3} (at most {})",
            c.what, c.us, c.spread_us, c.us_at_most
        )
    });
    let figures = Figures {
        profile: frozen.judged(),
        cost,
    };
    write(args, "latency-costs", "What a prediction costs", &figures)?;
    let bar = |c: &Cost| Bar::at_most(format!("cost: {}", c.what), c.us, "us", c.us_at_most);
    Ok(figures.cost.iter().map(bar).collect())
}

/// Predicts every key once.
fn all_of(model: &Model, keys: &[Key]) -> Repeated<impl FnMut() + use<>> {
    let (model, keys) = (model.clone(), keys.to_vec());
    Repeated(move || {
        for key in &keys {
            black_box(model.predict(&Work::Operator(black_box(*key))).ok());
        }
    })
}

/// A chain of layers whose widths are shared with their neighbours, every entry a prediction.
fn expectation(model: &Model, keys: &[Key]) -> Result<(Expectation, Vec<Vec<f64>>)> {
    // Per layer: kernel, width out, weight bits, activation bits, rank; the first width in is variable 0.
    let of_layer = [AXES[0], AXES[2], AXES[3], AXES[4], AXES[5]];
    let sizes: Vec<usize> = std::iter::once(AXES[1])
        .chain((0..LAYERS).flat_map(|_| of_layer))
        .collect();
    let mut expectation = Expectation::new(sizes.clone(), 0.01);
    for layer in 0..LAYERS {
        let base = 1 + of_layer.len() * layer;
        let width_in = if layer == 0 { 0 } else { base - of_layer.len() + 1 };
        let mut entry = 7 * layer;
        let variables = [base, width_in, base + 1, base + 2, base + 3, base + 4];
        expectation.add::<cotk_latency::Error>(&format!("layer {layer}"), &variables, |_| {
            entry += 1;
            Ok(model.predict(&Work::Operator(keys[entry % keys.len()]))?.ms)
        })?;
    }
    #[expect(clippy::cast_precision_loss, reason = "a handful of choices")]
    let probabilities = sizes.iter().map(|&n| vec![1.0 / n as f64; n]).collect();
    Ok((expectation, probabilities))
}
