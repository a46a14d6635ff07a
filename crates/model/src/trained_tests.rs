//! Trained checkpoints: the committed tiny one, and `ref-qwen2moe` where it is present, against the figures that
//! PyTorch found (their READMEs).

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cotk_run::cancel::Cancel;
use cotk_run::files;
use cotk_run::progress::Silent;
use cotk_run::seeds::Seeds;

use crate::ModelError;
use crate::eval::{EvalOptions, Evaluation, evaluate};
use crate::folder::ModelFolder;
use crate::generate::{Finish, Generated, Request, generate};
use crate::model::Model;
use crate::moe::Mode;
use crate::reference::PlainMoe;
use crate::sampling::{Sampler, Sampling};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn load(path: &Path) -> (ModelFolder, Model) {
    let folder = ModelFolder::open(path).unwrap();
    let runtime = Arc::new(PlainMoe::load(&folder.spec, folder.source.as_ref()).unwrap());
    let model = Model::load(folder.spec.clone(), folder.source.as_ref(), runtime).unwrap();
    (folder, model)
}

fn tiny() -> (ModelFolder, Model) {
    load(&repository().join("data/tiny-qwen2moe"))
}

fn heldout(folder: &ModelFolder) -> Vec<u32> {
    let text = files::read_text(repository().join("data/tiny-qwen2moe/heldout.txt"), 1 << 20).unwrap();
    folder.tokenizer.encode(&text).unwrap()
}

fn score(model: &Model, tokens: &[u32], options: &EvalOptions, reference: Option<&Model>) -> Evaluation {
    evaluate(model, tokens, options, reference, &Silent, &Cancel::new()).unwrap()
}

fn windows_of(window: usize) -> EvalOptions {
    EvalOptions {
        window: Some(window),
        stride: Some(window),
        bos: Some(0),
        ..EvalOptions::default()
    }
}

#[test]
fn the_tiny_checkpoint_scores_its_heldout_text_as_pytorch_does() {
    let (folder, model) = tiny();
    let found = score(&model, &heldout(&folder), &windows_of(256), None);
    assert_eq!(found.tokens, 10_703);
    assert!((found.perplexity / 2.3637 - 1.0).abs() < 1e-3, "{}", found.perplexity);
    let [lo, hi] = found.perplexity_ci95;
    assert!(
        lo < found.perplexity && found.perplexity < hi && hi / lo < 1.3,
        "{lo} {hi}"
    );
}

#[test]
fn more_context_never_scores_much_worse() {
    let (folder, model) = tiny();
    let tokens = &heldout(&folder)[..4000];
    let at = |window, stride| {
        let options = EvalOptions {
            window: Some(window),
            stride: Some(stride),
            ..EvalOptions::default()
        };
        score(&model, tokens, &options, None).nll_nats
    };
    assert!(at(256, 128) < at(256, 256));
    assert!(at(256, 256) < at(32, 32));
    let by_default = score(&model, tokens, &EvalOptions::default(), None);
    assert_eq!(
        (by_default.window, by_default.stride, by_default.tokens),
        (256, 128, 3999)
    );
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let (folder, model) = tiny();
    let tokens = &heldout(&folder)[..1000];
    let found = score(&model, tokens, &EvalOptions::default(), Some(&model))
        .reference
        .unwrap();
    assert!(found.kl_nats < 1e-9 && found.top1_agreement == 1.0, "{found:?}");
}

/// The 512-window column of `ref-qwen2moe`'s README, loss to four digits. Needs `../shared`; the tiny checkpoint's
/// figure above is the same code.
#[test]
fn the_reference_checkpoint_scores_math_as_its_readme_says() {
    let shared = repository().join("../shared/models");
    if !shared.join("ref-qwen2moe/model.safetensors").exists() {
        return;
    }
    let (folder, model) = load(&shared.join("ref-qwen2moe"));
    let text = files::read_text(shared.join("text/test-math.txt"), 1 << 20).unwrap();
    let tokens = folder.tokenizer.encode(&text).unwrap();
    let found = score(&model, &tokens, &windows_of(512), None);
    assert_eq!(found.tokens, 32_758);
    assert!((found.nll_nats - 1.8812).abs() < 2e-4, "{}", found.nll_nats);
    assert!((found.perplexity / 6.56 - 1.0).abs() < 1e-3, "{}", found.perplexity);
    assert!((found.top1_accuracy - 0.573).abs() < 1e-3);
}

fn run(
    folder: &ModelFolder,
    model: &Model,
    prompt: &str,
    sampling: Sampling,
    seed: u64,
) -> Result<Generated, ModelError> {
    let prompt = folder.tokenizer.encode(prompt).unwrap();
    let request = Request {
        prompt: &prompt,
        max_tokens: 60,
        stop: &folder.eos,
        mode: Mode::Exact,
    };
    let mut sampler = Sampler::new(sampling, Seeds::new(seed).stream("sampling"));
    generate(model, &request, &mut sampler, &Cancel::new(), |_| {
        ControlFlow::Continue(())
    })
}

#[test]
fn the_tiny_checkpoint_has_learnt_its_text() {
    let (folder, model) = tiny();
    let found = run(
        &folder,
        &model,
        "Some animals:\n- cat\n- dog\n- fox\nThere are",
        Sampling::GREEDY,
        1,
    )
    .unwrap();
    assert_eq!(folder.tokenizer.decode(&found.tokens), " 3 animals.\n");
    assert_eq!(found.finish, Finish::Stop);
}

#[test]
fn sampled_text_follows_the_seed() {
    let (folder, model) = tiny();
    let warm = Sampling::new(1.0, 1.0).unwrap();
    let text = |sampling, seed| run(&folder, &model, "One day", sampling, seed).unwrap().tokens;
    assert_eq!(text(warm, 1), text(warm, 1));
    assert_ne!(text(warm, 1), text(warm, 2));
    assert_eq!(text(Sampling::GREEDY, 1), text(Sampling::GREEDY, 2));
}

#[test]
fn prompts_that_cannot_be_run_are_refused() {
    let (folder, model) = tiny();
    let empty = run(&folder, &model, "", Sampling::GREEDY, 1).unwrap_err();
    assert!(matches!(empty, ModelError::EmptyPrompt));
    let long = run(&folder, &model, &"cat ".repeat(400), Sampling::GREEDY, 1)
        .unwrap_err()
        .to_string();
    assert!(
        long.contains("expected at most 255") && long.contains("context is 256"),
        "{long}"
    );
}

#[test]
fn generation_ends_where_the_context_does() {
    let (folder, model) = tiny();
    let prompt = vec![5; 250];
    let request = Request {
        prompt: &prompt,
        max_tokens: 100,
        stop: &[],
        mode: Mode::Exact,
    };
    let mut sampler = Sampler::new(Sampling::GREEDY, Seeds::new(1).stream("sampling"));
    let found = generate(&model, &request, &mut sampler, &Cancel::new(), |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((found.tokens.len(), found.finish), (6, Finish::Length));
    assert_eq!(folder.eos, [0]);
}

#[test]
fn a_cancelled_run_stops() {
    let (folder, model) = tiny();
    let cancel = Cancel::new();
    cancel.cancel();
    let tokens = heldout(&folder);
    let stopped = evaluate(&model, &tokens, &EvalOptions::default(), None, &Silent, &cancel);
    assert!(matches!(stopped, Err(ModelError::Run(cotk_run::Error::Cancelled))));
}

#[test]
fn windows_that_do_not_fit_are_refused() {
    let (folder, model) = tiny();
    let tokens = &heldout(&folder)[..50];
    for (window, stride, limit) in [
        (Some(257), None, None),
        (Some(0), None, None),
        (Some(8), Some(9), None),
        (None, Some(0), None),
        (None, None, Some(1)),
    ] {
        let options = EvalOptions {
            window,
            stride,
            max_tokens: limit,
            ..EvalOptions::default()
        };
        let refused = evaluate(&model, tokens, &options, None, &Silent, &Cancel::new());
        assert!(matches!(refused, Err(ModelError::Setting { .. })), "{options:?}");
    }
}

#[test]
fn the_inventory_lists_what_the_checkpoint_holds() {
    let (folder, _) = tiny();
    crate::inventory::check(&folder.spec, folder.source.as_ref(), true).unwrap();
    let expected = crate::inventory::tensors(&folder.spec);
    assert_eq!(expected.len(), folder.source.names().len());
    let params = crate::inventory::dense_params(&folder.spec) + 24 * crate::inventory::expert_params(&folder.spec);
    assert_eq!(params, 275_200);
}
