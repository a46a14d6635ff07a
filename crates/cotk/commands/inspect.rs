//! `cotk inspect`: what a model is, from its headers alone: no weight is read.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cotk_compress::report::ENOUGH_TOKENS;
use cotk_container::decision::MatrixDecision;
use cotk_container::low_rank::Role;
use cotk_container::manifest::{DENSE, EXPERTS, Matrix, State, Why};
use cotk_container::reader::Container;
use cotk_model::checkpoint::TensorSource;
use cotk_model::inventory;
use cotk_model::spec::{LayerKind, ModelSpec};
use cotk_quant::layout::MatrixFormat;
use cotk_run::units::{Bytes, ExpertId, LayerId, significant};
use cotk_runtime::open::{Folder, open_folder};
use serde_json::{Value, json};

use super::inspect_expert::{self, Place};
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::table::Table;

/// Say what a model is: layers, experts, bits, bytes
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk inspect ../shared/models/ref-qwen2moe\n  cotk inspect out --experts --json\n  cotk inspect out --expert 2.17\n\n--expert says why: what was measured of it, and what its neighbouring choices would have cost."
)]
pub struct Args {
    /// Hugging Face folder, or output of `cotk compress`
    pub model: PathBuf,
    /// List every expert
    #[arg(long)]
    pub experts: bool,
    /// Explain every decision about one expert of a container: layer and expert, as 2.17
    #[arg(long, value_name = "LAYER.EXPERT", conflicts_with = "experts")]
    pub expert: Option<Place>,
}

/// One expert as stored.
struct Expert {
    id: ExpertId,
    bytes: u64,
    /// Bits per weight of gate, up and down.
    bits: [u32; 3],
    /// Width between the factors of gate, up and down.
    rank: [usize; 3],
    /// `kept`, `constant` or `dropped`.
    kind: &'static str,
    params: u64,
    /// The use that decided, of a container.
    why: Option<Why>,
}

/// # Errors
/// What the folder's files refuse.
pub fn run(args: &Args, _cx: &Context) -> Result<Outcome, Fault> {
    let Folder { files, container } = open_folder(&args.model)?;
    let spec = &files.spec;
    if let Some(place) = args.expert {
        return inspect_expert::explain(&args.model, container.as_deref(), place);
    }
    inventory::check(spec, files.source.as_ref(), container.is_none()).map_err(cotk_model::ModelError::from)?;

    let mut per_layer = Vec::new();
    for (id, layer) in (0..).map(LayerId).zip(&spec.layers) {
        let experts = match (layer.kind, &container) {
            (LayerKind::Dense { .. }, _) => Vec::new(),
            (LayerKind::Moe { .. }, Some(container)) => coded(container, id),
            (LayerKind::Moe { .. }, None) => (0..u32::try_from(spec.routing.experts).unwrap_or(0))
                .map(ExpertId)
                .map(|expert| {
                    let (bytes, bits) = inventory::expert_storage(spec, files.source.as_ref(), id, expert)?;
                    Ok(Expert {
                        id: expert,
                        bytes,
                        bits,
                        rank: [0; 3],
                        kind: "kept",
                        params: inventory::expert_params(spec),
                        why: None,
                    })
                })
                .collect::<Result<_, cotk_model::checkpoint::CheckpointError>>()
                .map_err(cotk_model::ModelError::from)?,
        };
        per_layer.push((id, layer.kind, experts));
    }

    let all = || per_layer.iter().flat_map(|(_, _, experts)| experts);
    // Whoever answers takes a slot.
    let kept = |experts: &[Expert]| experts.iter().filter(|e| e.kind != "dropped").count();
    let params_total = inventory::dense_params(spec) + all().map(|e| e.params).sum::<u64>();
    let params_active = inventory::dense_params(spec)
        + per_layer
            .iter()
            .map(|(_, _, experts)| active(spec, experts, kept(experts)))
            .sum::<u64>();
    let (bytes, expert_bytes) = match &container {
        None => (files.source.bytes(), all().map(|e| e.bytes).sum()),
        Some(container) => {
            let size = |name: &str| container.manifest().files.get(name).map_or(0, |entry| entry.bytes);
            (size(DENSE) + size(EXPERTS), size(EXPERTS))
        }
    };
    let dense = dense_forms(spec, files.source.as_ref());
    let format = if container.is_some() { "cotk" } else { "hf" };
    let result = json!({
        "format": format,
        "family": spec.family,
        "layers": spec.layers.len(),
        "hidden": spec.hidden,
        "vocab": spec.vocab,
        "context": spec.context,
        "heads": spec.attention.heads,
        "kv_heads": spec.attention.kv_heads,
        "head_dim": spec.attention.head_dim,
        "experts": spec.routing.experts,
        "top_k": spec.routing.top_k,
        "norm_topk_prob": spec.routing.norm_topk,
        "moe_intermediate": spec.moe_intermediate,
        "tied_embeddings": spec.tied_embeddings,
        "params_total": params_total,
        "params_active": params_active,
        "bytes": bytes,
        "expert_bytes": expert_bytes,
        "dense": dense.iter().map(|(bits, (matrices, bytes))| json!({
            "bits": bits, "matrices": matrices, "bytes": bytes,
        })).collect::<Vec<_>>(),
        "little_bits": container.as_ref().and_then(|c| c.manifest().little_bits),
        "per_layer": per_layer.iter().map(|(id, kind, experts)| layer_json(*id, *kind, experts, args.experts))
            .collect::<Vec<_>>(),
    });

    let mut result = result;
    let choices = container.as_deref().map(choices);
    if let (Some(choices), Value::Object(fields)) = (&choices, &mut result) {
        fields.insert("matrices".into(), json!(choices.matrices));
        fields.insert("experts_with_few_tokens".into(), json!(choices.few_tokens));
        fields.insert("experts_with_shrunk_hessians".into(), json!(choices.shrunk));
    }

    let mut text = String::new();
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let millions = |count: u64| format!("{} M", significant(count as f64 / 1e6, 4));
    let mut facts = Table::new(&["model", &args.model.display().to_string()]);
    facts
        .row(["format", format])
        .row(["family", spec.family])
        .row(["layers".to_owned(), spec.layers.len().to_string()])
        .row([
            "hidden, context, vocabulary".to_owned(),
            format!("{}, {}, {}", spec.hidden, spec.context, spec.vocab),
        ])
        .row([
            "heads, key heads, width".to_owned(),
            format!(
                "{}, {}, {}",
                spec.attention.heads, spec.attention.kv_heads, spec.attention.head_dim
            ),
        ])
        .row([
            "experts, chosen, width".to_owned(),
            format!(
                "{}, {}, {}",
                spec.routing.experts, spec.routing.top_k, spec.moe_intermediate
            ),
        ])
        .row(["parameters".to_owned(), millions(params_total)])
        .row(["active per token".to_owned(), millions(params_active)])
        .row(["bytes".to_owned(), Bytes(bytes).to_string()])
        .row(["of experts".to_owned(), Bytes(expert_bytes).to_string()]);
    for (bits, (matrices, bytes)) in &dense {
        facts.row([
            format!("dense matrices at {bits} bit"),
            format!("{matrices}, {}", Bytes(*bytes)),
        ]);
    }
    if let Some(choices) = &choices {
        facts.row([
            format!("experts that fewer than {ENOUGH_TOKENS} tokens chose"),
            choices.few_tokens.to_string(),
        ]);
        facts.row([
            "experts whose Hessian leaned on others'".to_owned(),
            choices.shrunk.to_string(),
        ]);
        for (form, count) in &choices.matrices {
            facts.row([format!("matrices of experts: {form}"), count.to_string()]);
        }
    }
    text.push_str(&facts.render());
    text.push('\n');
    text.push_str(&layers_table(&per_layer, args.experts));
    Ok(Outcome::new(result, text))
}

/// What was chosen for the experts of a container, counted.
struct Choices {
    /// Matrices by form, `plain2 g64`.
    matrices: BTreeMap<String, usize>,
    few_tokens: usize,
    shrunk: usize,
}

fn choices(container: &Container) -> Choices {
    let mut found = Choices {
        matrices: BTreeMap::new(),
        few_tokens: 0,
        shrunk: 0,
    };
    for expert in container.manifest().layers.iter().flat_map(|layer| &layer.experts) {
        found.few_tokens += usize::from(expert.why.tokens < ENOUGH_TOKENS);
        let decided = expert.decision.as_deref().and_then(|decision| decision.matrices);
        let leaned = |matrix: &MatrixDecision| matrix.lambda.is_some_and(|lambda| lambda > 0.0);
        found.shrunk += usize::from(decided.is_some_and(|matrices| matrices.iter().any(leaned)));
        if let State::Kept(record) = &expert.state {
            for matrix in [&record.gate, &record.up, &record.down] {
                *found.matrices.entry(inspect_expert::form(matrix)).or_default() += 1;
            }
        }
    }
    found
}

/// Dense matrices by the bits that they are stored at: how many, and their bytes.
fn dense_forms(spec: &ModelSpec, source: &dyn TensorSource) -> BTreeMap<u32, (usize, u64)> {
    let mut forms: BTreeMap<u32, (usize, u64)> = BTreeMap::new();
    for name in inventory::dense_names(spec, source) {
        let Some(info) = source.info(&name).filter(|info| info.shape.len() == 2) else {
            continue;
        };
        let (bits, bytes) = match source.codes(&name) {
            Some(matrix) => (matrix.format.code().full().get(), matrix.format.total_bytes() as u64),
            None => (8 * u32::try_from(info.dtype.size_bytes()).unwrap_or(0), info.bytes()),
        };
        let entry = forms.entry(bits).or_default();
        *entry = (entry.0 + 1, entry.1 + bytes);
    }
    forms
}

/// Parameters of the experts that one token runs: the largest, where they differ.
fn active(spec: &ModelSpec, experts: &[Expert], kept: usize) -> u64 {
    let largest = experts.iter().map(|e| e.params).max().unwrap_or(0);
    largest * spec.routing.top_k.min(kept) as u64
}

/// Weights that are stored: of a matrix, or of the factors in its place.
fn params(matrix: &Matrix) -> u64 {
    let of = |format: MatrixFormat| (format.rows() * format.cols()) as u64;
    match matrix.rank {
        None => of(matrix.format),
        Some(factors) => {
            let whole = match factors.role {
                Role::Correction => of(matrix.format),
                Role::Product => 0,
            };
            whole + of(factors.left) + of(factors.right)
        }
    }
}

fn coded(container: &Container, layer: LayerId) -> Vec<Expert> {
    let Some(layer) = container.layer(layer) else {
        return Vec::new();
    };
    layer
        .experts
        .iter()
        .map(|expert| match &expert.state {
            State::Constant(record) => Expert {
                id: expert.expert,
                bytes: record.bytes,
                bits: [0; 3],
                rank: [0; 3],
                kind: "constant",
                params: 0,
                why: Some(expert.why),
            },
            State::Dropped => Expert {
                id: expert.expert,
                bytes: 0,
                bits: [0; 3],
                rank: [0; 3],
                kind: "dropped",
                params: 0,
                why: Some(expert.why),
            },
            State::Kept(record) => Expert {
                id: expert.expert,
                bytes: record.bytes,
                bits: record.formats().map(|format| format.code().full().get()),
                rank: [&record.gate, &record.up, &record.down].map(|matrix| matrix.rank()),
                kind: "kept",
                params: [&record.gate, &record.up, &record.down].map(params).iter().sum(),
                why: Some(expert.why),
            },
        })
        .collect()
}

fn layer_json(id: LayerId, kind: LayerKind, experts: &[Expert], is_listed: bool) -> Value {
    let mut layer = json!({
        "layer": id,
        "kind": kind_name(kind),
        "experts_kept": experts.iter().filter(|e| e.kind == "kept").count(),
        "experts_constant": experts.iter().filter(|e| e.kind == "constant").count(),
    });
    if is_listed {
        layer["experts"] = experts
            .iter()
            .map(|e| {
                json!({
                    "id": e.id,
                    "bytes": e.bytes,
                    "bits": { "gate": e.bits[0], "up": e.bits[1], "down": e.bits[2] },
                    "rank": (e.rank != [0; 3]).then(|| json!({
                        "gate": e.rank[0], "up": e.rank[1], "down": e.rank[2],
                    })),
                    "kind": e.kind,
                    "tokens": e.why.map(|why| why.tokens),
                    "share": e.why.map(|why| why.share),
                    "gate_share": e.why.map(|why| why.gate_share),
                    "is_starved": e.why.map(|why| why.tokens < ENOUGH_TOKENS),
                })
            })
            .collect();
    }
    layer
}

fn kind_name(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Dense { .. } => "dense",
        LayerKind::Moe { .. } => "moe",
    }
}

fn layers_table(per_layer: &[(LayerId, LayerKind, Vec<Expert>)], is_listed: bool) -> String {
    if is_listed {
        let mut table = Table::new(&[
            "layer",
            "expert",
            "kind",
            "gate bits",
            "up bits",
            "down bits",
            "ranks",
            "bytes",
            "tokens",
            "share, %",
            "gate share, %",
            "few tokens",
        ]);
        let percent = |share: f64| significant(share * 100.0, 3);
        for (id, _, experts) in per_layer {
            for e in experts {
                let [gate, up, down] = e.bits.map(|bits| bits.to_string());
                table.row([
                    id.0.to_string(),
                    e.id.0.to_string(),
                    e.kind.to_owned(),
                    gate,
                    up,
                    down,
                    match e.rank {
                        [0, 0, 0] => String::new(),
                        [gate, up, down] => format!("{gate} {up} {down}"),
                    },
                    e.bytes.to_string(),
                    e.why.map_or_else(String::new, |why| why.tokens.to_string()),
                    e.why.map_or_else(String::new, |why| percent(why.share)),
                    e.why.map_or_else(String::new, |why| percent(why.gate_share)),
                    match e.why {
                        Some(why) if why.tokens == 0 => "never fires".to_owned(),
                        Some(why) if why.tokens < ENOUGH_TOKENS => format!("lacks {}", ENOUGH_TOKENS - why.tokens),
                        Some(_) | None => String::new(),
                    },
                ]);
            }
        }
        return table.render();
    }
    let mut table = Table::new(&["layer", "kind", "experts kept", "bytes of experts"]);
    for (id, kind, experts) in per_layer {
        let constants = experts.iter().filter(|e| e.kind == "constant").count();
        let bytes: u64 = experts.iter().map(|e| e.bytes).sum();
        table.row([
            id.0.to_string(),
            kind_name(*kind).to_owned(),
            format!(
                "{} of {}{}",
                experts.iter().filter(|e| e.kind == "kept").count(),
                experts.len(),
                match constants {
                    0 => String::new(),
                    count => format!(", {count} constant"),
                }
            ),
            Bytes(bytes).to_string(),
        ]);
    }
    table.render()
}
