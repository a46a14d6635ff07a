//! What every `cotk compress` of a committed tiny model begins with.

use crate::program::in_repository;

/// A text beside the tiny model.
pub(crate) fn text(name: &str) -> String {
    let path = in_repository("data/tiny-qwen2moe").join(name);
    path.to_str().expect("UTF-8").to_owned()
}

/// `cotk compress --moe MODEL -o out`, few tokens, and what else is wanted.
pub(crate) fn compress_of(model: &str, tokens: usize, more: &[&str]) -> Vec<String> {
    let train = text("train.txt");
    let tokens = format!("compress.calibration_tokens={tokens}");
    let base = [
        "compress",
        "--moe",
        model,
        "-o",
        "out",
        "--calibration",
        &train,
        "--set",
        &tokens,
        "--json",
    ];
    base.iter().chain(more).map(|arg| (*arg).to_owned()).collect()
}
