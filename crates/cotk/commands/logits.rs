//! `cotk logits`: raw logits of token ids, for tests and other tools.

use std::path::PathBuf;

use cotk_model::ModelError;
use cotk_model::model::{Logits, Model, Sequence};
use cotk_model::tokenizer::Tokenizer;
use cotk_run::files;
use cotk_runtime::in_memory::Routing;
use cotk_runtime::open::open;
use cotk_runtime::synthetic::{self, Experts};
use serde_json::json;

use super::ModeArg;
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::table::Table;

/// Print the logits of every position for given token ids
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk logits ../shared/models/ref-qwen2moe --tokens 1,2,3 --json\n  cotk logits out --tokens 1,2,3 --out logits.npy"
)]
pub struct Args {
    /// Hugging Face folder, or output of `cotk compress`
    #[arg(required_unless_present = "synthetic")]
    pub model: Option<PathBuf>,
    /// Random weights of a real model's shape, as `cotk export --synthetic` writes them, routed as their router says
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    pub synthetic: Option<String>,
    /// Width of the synthetic model's experts: 2, 3, 4 or 8 (default: 8)
    #[arg(long, value_name = "N", requires = "synthetic")]
    pub bits: Option<u32>,
    /// Another depth of the synthetic model
    #[arg(long, value_name = "N", requires = "synthetic")]
    pub layers: Option<usize>,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', required = true, value_name = "IDS")]
    pub tokens: Vec<u32>,
    /// Write a NumPy file (f32, [tokens, vocabulary]) instead of printing
    #[arg(long, value_name = "F.npy")]
    pub out: Option<PathBuf>,
    /// Which width of the experts is used
    #[arg(long, value_enum, default_value_t = ModeArg::Exact)]
    pub mode: ModeArg,
}

/// # Errors
/// What the model refuses; ids outside the vocabulary; more tokens than the context.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let (model, tokenizer) = match (&args.synthetic, &args.model) {
        (Some(name), _) => (synthetic(name, args, cx)?, None),
        (None, Some(path)) => {
            let opened = open(path)?;
            (opened.model, Some(opened.files.tokenizer))
        }
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let mut cache = model.new_cache();
    let mut sequences = [Sequence {
        tokens: &args.tokens,
        cache: &mut cache,
    }];
    let logits = model.forward(&mut sequences, args.mode.into(), Logits::All)?.logits;
    let shape = [args.tokens.len(), model.spec().vocab];
    if let Some(out) = &args.out {
        files::write_atomic(out, &npy(&logits, shape))?;
        let text = format!("{}: f32 [{}, {}]\n", out.display(), shape[0], shape[1]);
        return Ok(Outcome::new(json!({ "shape": shape, "out": out }), text));
    }
    let text = table(&args.tokens, &logits, shape[1], tokenizer.as_ref());
    if let Some(index) = logits.iter().position(|l| !l.is_finite()) {
        return Err(Fault::from(ModelError::Setting {
            what: "a logit",
            found: format!("{} at index {index}", logits[index]),
            expected: "a finite number".to_owned(),
        }));
    }
    Ok(Outcome::new(json!({ "shape": shape, "logits": logits }), text))
}

fn synthetic(name: &str, args: &Args, cx: &Context) -> Result<Model, Fault> {
    if args.layers == Some(0) {
        return Err(Fault::usage(
            "--layers 0: expected 1 or more",
            "leave it out for all layers",
        ));
    }
    let spec = synthetic::spec(name, args.layers)?;
    let experts = Experts::plain(args.bits.unwrap_or(8));
    let made = synthetic::routed_model(&spec, experts, cx.seed.unwrap_or(0), Routing::Router)?;
    Ok(made.model)
}

/// NumPy's format, version 1.0: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.
fn npy(values: &[f32], [rows, columns]: [usize; 2]) -> Vec<u8> {
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    // Magic, version and length are 10 bytes; data begin at a multiple of 64.
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.push_str(&" ".repeat(padded - header.len() - 1));
    header.push('\n');
    let length = u16::try_from(header.len()).expect("two numbers fit a short header");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

/// The three most likely next tokens at each position.
fn table(tokens: &[u32], logits: &[f32], vocab: usize, tokenizer: Option<&Tokenizer>) -> String {
    let spell = |id: u32| tokenizer.and_then(|t| t.token_of(id)).unwrap_or_default();
    let mut table = Table::new(&["position", "token", "next, and its logit", "second", "third"]);
    for ((position, &token), row) in tokens.iter().enumerate().zip(logits.chunks_exact(vocab)) {
        let mut order: Vec<u32> = (0..).take(vocab).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
        let best = order
            .iter()
            .take(3)
            .map(|&id| format!("{} `{}` {:.3}", id, spell(id), row[id as usize]));
        table.row(
            [position.to_string(), format!("{token} `{}`", spell(token))]
                .into_iter()
                .chain(best),
        );
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numpy_file_begins_as_numpy_says() {
        let bytes = npy(&[1.0, 2.0], [1, 2]);
        assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
        assert_eq!((bytes.len() - 8) % 64, 0);
        assert_eq!(bytes[bytes.len() - 4..], 2.0f32.to_le_bytes());
    }
}
