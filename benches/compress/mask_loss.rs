//! What the exact loss of one mask costs on one thread, at shapes of released models.

use std::time::Instant;

use anyhow::Result;
use cotk_compress::prune::gram::{Gram, Semantics, Tokens};
use cotk_compress::prune::mask::Mask;
use cotk_model::moe::RoutingRule;
use cotk_run::seeds::Seeds;
use rand::RngExt;
use serde::Serialize;

use crate::Args;
use crate::output;

#[derive(Serialize)]
struct Row {
    experts: usize,
    top_k: usize,
    dropped: usize,
    is_normalised: bool,
    semantics: &'static str,
    #[serde(serialize_with = "output::rounded")]
    ms: f64,
    #[serde(serialize_with = "output::rounded")]
    ms_slowest: f64,
    /// At 60 experts and 2,048 tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    bar_at_most: Option<f64>,
}

#[derive(Serialize)]
struct Figures {
    tokens: usize,
    masks: usize,
    row: Vec<Row>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (tokens, masks) = if args.small { (128, 8) } else { (2048, 40) };
    let mut rows = Vec::new();
    for (experts, top_k, dropped) in [(60, 4, 15), (60, 4, 30), (64, 8, 32), (128, 8, 64)] {
        for is_normalised in [false, true] {
            let gram = drawn(experts, top_k, is_normalised, tokens);
            for semantics in [Semantics::Masked, Semantics::Removed, Semantics::Novice] {
                let mut took: Vec<f64> = (0..masks)
                    .map(|seed| {
                        let mask = mask(experts, dropped, seed);
                        let clock = Instant::now();
                        std::hint::black_box(gram.loss(&mask, semantics));
                        clock.elapsed().as_secs_f64() * 1e3
                    })
                    .collect();
                took.sort_by(f64::total_cmp);
                rows.push(Row {
                    experts,
                    top_k,
                    dropped,
                    is_normalised,
                    semantics: semantics.name(),
                    ms: took[took.len() / 2],
                    ms_slowest: took[took.len() - 1],
                    bar_at_most: (experts == 60).then_some(1.0),
                });
            }
        }
    }
    let figures = Figures {
        tokens,
        masks,
        row: rows,
    };
    output::write(
        args,
        "mask-loss",
        "the exact loss of one random mask on one thread, median of masks",
        &figures,
    )
}

fn mask(experts: usize, dropped: usize, seed: usize) -> Mask {
    let mut stream = Seeds::new(seed as u64).stream("mask");
    let mut mask = Mask::none(experts);
    while mask.count() < dropped {
        mask.drop(stream.random_range(0..experts));
    }
    mask
}

/// Drawn outputs of a narrow layer: the loss of a mask sees inner products alone, whatever the width was.
fn drawn(experts: usize, top_k: usize, norm_topk: bool, tokens: usize) -> Gram {
    const HIDDEN: usize = 16;
    let mut stream = Seeds::new(0).stream("gram");
    let mut scores: Vec<f32> = (0..tokens * experts)
        .map(|_| stream.random_range(0.0f32..1.0).powi(6) + 1e-4)
        .collect();
    for row in scores.chunks_exact_mut(experts) {
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|score| *score /= sum);
    }
    let sample = Tokens {
        rule: RoutingRule {
            norm_topk,
            ..RoutingRule::softmax(experts, top_k)
        },
        bias: &[],
        scores: &scores,
        weights: &vec![1.0; tokens],
    };
    let gram = Gram::build(&sample, &vec![0.0; experts * HIDDEN], HIDDEN, |from, to| {
        let mut rows = || {
            (0..(to - from) * HIDDEN)
                .map(|_| stream.random_range(-1.0f32..1.0))
                .collect()
        };
        Ok::<Vec<Vec<f32>>, std::convert::Infallible>((0..experts).map(|_| rows()).collect())
    });
    match gram {
        Ok(gram) => gram,
        Err(never) => match never {},
    }
}
