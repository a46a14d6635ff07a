//! `cotk plan MODEL`: what a mixture of experts will take on this machine: a decoding step, a prefill, each layer, what is
//! where under a budget, and the choices beside it. Here: arguments and tables; the step is `cotk_runtime::cost`'s, placing
//! `cotk_runtime::plan`'s, predicting `cotk_latency::moe`'s. No weight is read.

use std::path::Path;

use cotk_latency::moe::{LayerPrediction, MoeStep, StepPrediction};
use cotk_latency::predict::Terms;
use cotk_latency::probe::now::memory_now;
use cotk_model::layers::cache::KvKind;
use cotk_run::units::{Bytes, significant};
use cotk_runtime::cost::{self, Pass};
use cotk_runtime::open::{Folder, open_folder};
use cotk_runtime::plan::{self, Choice, Placement};
use serde_json::{Value, json};

use crate::commands::ModeArg;
use crate::commands::plan::prediction_json;
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::predictor;
use crate::table::Table;

/// Flags of the mixture of experts.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Mixture of experts")]
pub struct Args {
    /// Bits of the experts of a Hugging Face checkpoint, as if compressed to plain codes in groups of 32
    #[arg(long, value_name = "BITS", value_parser = bits)]
    pub bits: Option<u32>,
    /// Tokens of a sequence when the step is taken [default: 512, or the model's context]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,
    /// Tokens of the prompt whose prefill is predicted [default: the context]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: Option<u32>,
    /// Bytes of memory for weights and cache; experts beyond it are on disk [default: all in memory]
    #[arg(long, value_name = "BYTES")]
    pub budget_bytes: Option<u64>,
    /// Which width of a container's experts is used
    #[arg(long, value_enum, default_value = "exact")]
    pub mode: ModeArg,
    /// Measure what memory gives at this minute (a second), and count it in: on a shared host it drifts
    #[arg(long)]
    pub now: bool,
}

fn bits(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(bits @ (2 | 3 | 4 | 8 | 16)) => Ok(bits),
        _ => Err(format!("`{text}`: expected 2, 3, 4, 8 or 16")),
    }
}

/// Bits that are compared for a checkpoint without codes of its own.
const WIDTHS: [u32; 4] = [2, 3, 4, 8];
/// Bits where nobody says any.
const DEFAULT_BITS: u32 = 4;

/// Where shares of experts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shares {
    Calibration,
    Uniform,
}

impl Shares {
    fn name(self) -> &'static str {
        match self {
            Self::Calibration => "calibration",
            Self::Uniform => "uniform",
        }
    }
}

struct Plan {
    decode: StepPrediction,
    /// Absent where the profile holds nothing of many tokens.
    prefill: Option<StepPrediction>,
    prompt: usize,
    context: usize,
    batch: usize,
    placement: Placement,
    choices: Vec<Choice>,
    shares: Shares,
    bits: String,
}

/// Predicts a model folder or container.
///
/// # Errors
/// What the folder's files refuse; no profile, or one without experts; a budget below one step.
pub fn run(model: &Path, args: &Args, batch: u32, cx: &Context) -> Result<Outcome, Fault> {
    let Folder { files, container } = open_folder(model)?;
    let spec = &files.spec;
    if spec.moe_layers().is_empty() {
        return Err(Fault::usage(
            format!("{}: a model without routed experts", model.display()),
            "plan an ONNX file, or a mixture of experts",
        ));
    }
    if let (Some(_), Some(bits)) = (&container, args.bits) {
        return Err(Fault::usage(
            format!("--bits {bits}: the experts of a container have their own"),
            "leave --bits out",
        ));
    }
    let context = args
        .context
        .map_or(cost::POSITIONS.min(spec.context), |tokens| tokens as usize);
    let prompt = args.prompt.map_or(context, |tokens| tokens as usize);
    if let Some(found) = [context, prompt].into_iter().find(|tokens| *tokens > spec.context) {
        return Err(Fault::usage(
            format!("{found} tokens: the model's context is {}", spec.context),
            "give fewer",
        ));
    }
    let predictor = predictor::find(cx, None)?.ok_or_else(|| {
        Fault::usage(
            "no profile of this machine",
            "`cotk profile --quick` measures one in a minute",
        )
    })?;
    let threads = u32::try_from(cx.threads).unwrap_or(1);
    let mut warnings = predictor.warnings.clone();
    let mut machine = predictor.model.clone();
    if args.now {
        let mut order = cx.seeds(0).stream("memory now");
        let mut counts = vec![1];
        // What is little is one thread's work whatever there are.
        counts.extend((threads > 1).then_some(threads));
        for threads in counts {
            match memory_now(&machine, threads, &mut order)? {
                Some(ratio) => machine = machine.with_memory_now(threads, ratio),
                None => warnings.push(format!(
                    "--now: the profile has no pass over memory with {threads} threads"
                )),
            }
        }
    }
    let machine = &machine;
    let batch = batch as usize;
    let mode = args.mode.into();
    let dense = cost::forms_of(spec, files.source.as_ref());
    let held = cost::Held {
        dense: &dense,
        kv: KvKind::default(),
    };
    let step = |pass: Pass, bits: u32| -> MoeStep {
        cost::step(spec, pass, threads, &held, |layer| match &container {
            Some(container) => cost::container_experts(container.manifest(), spec, layer, mode, threads),
            None => cost::uniform_experts(spec, bits, threads),
        })
    };
    let decode = Pass::Decode { context, batch };
    let own_bits = args.bits.unwrap_or(DEFAULT_BITS);
    let held = plan::held_bytes(spec, &held, context, batch);
    let mut placed = step(decode, own_bits);
    let placement = plan::place(&mut placed, held, args.budget_bytes)?;
    let mut prefill = step(Pass::Prefill { tokens: prompt }, own_bits);
    for (layer, placed) in prefill.layers.iter_mut().zip(&placed.layers) {
        for (expert, placed) in layer.experts.iter_mut().zip(&placed.experts) {
            expert.home = placed.home;
        }
    }
    let candidates: Vec<(u32, MoeStep)> = match &container {
        Some(_) => vec![(widest(&placed), step(decode, own_bits))],
        None => WIDTHS.iter().map(|&bits| (bits, step(decode, bits))).collect(),
    };
    let choices = plan::choices(&candidates, held, batch, machine).map_err(Fault::from);
    let choices = choices.unwrap_or_else(|error| {
        warnings.push(format!("no table of choices: {error}"));
        Vec::new()
    });
    let prefill = match machine.step(&prefill) {
        Ok(prefill) => Some(prefill),
        Err(error) => {
            warnings.push(format!("the prefill is not predicted: {error}"));
            None
        }
    };
    let plan = Plan {
        decode: machine.step(&placed)?,
        prefill,
        prompt,
        context,
        batch,
        placement,
        choices,
        shares: if container.is_some() {
            Shares::Calibration
        } else {
            Shares::Uniform
        },
        bits: if container.is_some() {
            format!("{} bits at most", widest(&placed))
        } else {
            format!("{own_bits} bits")
        },
    };
    if plan.shares == Shares::Uniform {
        warnings.push("nothing is known of how often experts are used: each is thought used alike".to_owned());
    }
    if plan.decode.floor.ms > plan.decode.whole.ms {
        warnings.push(format!(
            "predicted below the time of its bytes ({} ms): part of them is thought to come from cache",
            significant(plan.decode.floor.ms, 3)
        ));
    }
    Ok(Outcome::new(plan.json(), plan.text(model)).warn(warnings))
}

/// Most bits of any expert.
fn widest(step: &MoeStep) -> u32 {
    let bits = step.layers.iter().flat_map(|l| &l.experts).map(|e| e.key.bits);
    bits.max().unwrap_or(0)
}

/// What most of a time is spent on.
fn bound_by(terms: &Terms) -> &'static str {
    let all = [
        (terms.launch_ms, "launch"),
        (terms.layout_ms, "layout"),
        (terms.memory_ms, "memory"),
        (terms.compute_ms, "compute"),
        (terms.link_ms, "disk"),
    ];
    all.into_iter()
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or("", |(_, name)| name)
}

/// What stands behind a layer's time.
fn note(layer: &LayerPrediction) -> String {
    let ms = layer.prediction.ms.max(f64::MIN_POSITIVE);
    if layer.touched == 0.0 {
        return "dense".to_owned();
    }
    let mut note = format!(
        "experts {} %, {} touched",
        significant(100.0 * layer.experts_ms / ms, 2),
        significant(layer.touched, 3)
    );
    if layer.missed > 0.0 {
        note.push_str(&format!(", {} from disk", significant(layer.missed, 2)));
    }
    note
}

impl Plan {
    fn tokens_per_s(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a batch")]
        let batch = self.batch as f64;
        batch * 1e3 / self.decode.whole.ms
    }

    fn prefill_tokens_per_s(&self, prefill: &StepPrediction) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "tokens of a prompt")]
        let tokens = self.prompt as f64;
        tokens * 1e3 / prefill.whole.ms
    }

    fn floor_share(&self) -> f64 {
        self.decode.floor.ms / self.decode.whole.ms
    }

    fn json(&self) -> Value {
        let layers = self.decode.layers.iter().enumerate().map(|(index, layer)| {
            json!({
                "layer": index,
                "ms": layer.prediction.ms,
                "bound_by": bound_by(&layer.prediction.terms),
                "note": note(layer),
            })
        });
        let ends = json!({
            "layer": "head",
            "ms": self.decode.ends.ms,
            "bound_by": bound_by(&self.decode.ends.terms),
            "note": "final norm and logits",
        });
        let place = &self.placement;
        json!({
            "prediction": prediction_json(&self.decode.whole, Some(self.tokens_per_s())),
            "context": self.context,
            "batch": self.batch,
            "per_layer": layers.chain([ends]).collect::<Vec<_>>(),
            "floor": {
                "ms": self.decode.floor.ms,
                "share": self.floor_share(),
                "memory_bytes": self.decode.floor.memory_bytes,
                "disk_bytes": self.decode.floor.disk_bytes,
            },
            "touched_experts": self.decode.touched,
            "missed_experts": self.decode.missed,
            "prefill": self.prefill.as_ref().map(|prefill| json!({
                "tokens": self.prompt,
                "prediction": prediction_json(&prefill.whole, Some(self.prefill_tokens_per_s(prefill))),
            })),
            "placement": {
                "budget_bytes": place.budget_bytes,
                "memory_bytes": place.memory_bytes(),
                "dense_bytes": place.dense_bytes,
                "kv_bytes": place.kv_bytes,
                "expert_bytes_in_memory": place.expert_bytes,
                "expert_bytes": place.all_expert_bytes,
                "shares": self.shares.name(),
                "layers": place.layers.iter().map(|l| json!({
                    "layer": l.layer,
                    "in_memory": l.in_memory,
                    "on_disk": l.on_disk,
                })).collect::<Vec<_>>(),
            },
            "pareto": self.choices.iter().map(|choice| json!({
                "bits": choice.bits,
                "budget_bytes": choice.placement.budget_bytes.unwrap_or(choice.placement.memory_bytes()),
                "memory_bytes": choice.placement.memory_bytes(),
                "experts_on_disk": choice.placement.layers.iter().map(|l| l.on_disk).sum::<usize>(),
                "ms": choice.prediction.whole.ms,
                "tokens_per_s": choice.tokens_per_s,
            })).collect::<Vec<_>>(),
        })
    }

    fn text(&self, model: &Path) -> String {
        let whole = &self.decode.whole;
        let ms = |ms: f64| significant(ms, 3);
        let mut facts = Table::new(&["model", &model.display().to_string()]);
        facts
            .row([
                "decoding step".to_owned(),
                format!("{} ms, {} to {}", ms(whole.ms), ms(whole.lo_ms), ms(whole.hi_ms)),
            ])
            .row(["tokens per s".to_owned(), significant(self.tokens_per_s(), 3)])
            .row([
                "of that".to_owned(),
                format!(
                    "memory {} ms, compute {}, launch {}, disk {}",
                    ms(whole.terms.memory_ms),
                    ms(whole.terms.compute_ms),
                    ms(whole.terms.launch_ms),
                    ms(whole.terms.link_ms)
                ),
            ])
            .row([
                "its bytes alone".to_owned(),
                format!(
                    "{} ms, {} % of it",
                    ms(self.decode.floor.ms),
                    significant(100.0 * self.floor_share(), 2)
                ),
            ])
            .row([
                format!("prefill of {} tokens", self.prompt),
                self.prefill.as_ref().map_or("not predicted".to_owned(), |prefill| {
                    format!(
                        "{} ms, {} to {}, {} tokens per s",
                        ms(prefill.whole.ms),
                        ms(prefill.whole.lo_ms),
                        ms(prefill.whole.hi_ms),
                        significant(self.prefill_tokens_per_s(prefill), 3)
                    )
                }),
            ])
            .row([
                "asked of".to_owned(),
                format!(
                    "{}, context {}, batch {}, {:?}",
                    self.bits, self.context, self.batch, whole.origin
                )
                .to_lowercase(),
            ]);
        let mut text = facts.render();
        text.push('\n');
        text.push_str(&self.layers_table());
        text.push('\n');
        let place = &self.placement;
        let on_disk: usize = place.layers.iter().map(|l| l.on_disk).sum();
        let mut where_ = Table::new(&["what", "where", "bytes"]);
        where_
            .row(["dense part", "memory", &Bytes(place.dense_bytes).to_string()])
            .row(["keys and values", "memory", &Bytes(place.kv_bytes).to_string()])
            .row(["experts", "memory", &Bytes(place.expert_bytes).to_string()]);
        if on_disk > 0 {
            let away = Bytes(place.all_expert_bytes - place.expert_bytes).to_string();
            where_.row([format!("{on_disk} experts"), "disk".to_owned(), away]);
        }
        text.push_str(&where_.render());
        if !self.choices.is_empty() {
            text.push_str("\nchoices that no other one beats in bits, bytes and speed\n");
            let mut table = Table::new(&["bits", "memory", "experts on disk", "ms", "tokens per s"]);
            for choice in &self.choices {
                let place = &choice.placement;
                table.row([
                    choice.bits.to_string(),
                    Bytes(place.budget_bytes.unwrap_or(place.memory_bytes())).to_string(),
                    place.layers.iter().map(|l| l.on_disk).sum::<usize>().to_string(),
                    ms(choice.prediction.whole.ms),
                    significant(choice.tokens_per_s, 3),
                ]);
            }
            text.push_str(&table.render());
        }
        text
    }

    /// Neighbours that say the same share a line.
    fn layers_table(&self) -> String {
        let mut table = Table::new(&["layers", "ms each", "bound by", "of which"]);
        let mut rows: Vec<(usize, usize, [String; 3])> = Vec::new();
        for (index, layer) in self.decode.layers.iter().enumerate() {
            let cells = [
                significant(layer.prediction.ms, 3),
                bound_by(&layer.prediction.terms).to_owned(),
                note(layer),
            ];
            match rows.last_mut() {
                Some((_, last, same)) if *same == cells => *last = index,
                _ => rows.push((index, index, cells)),
            }
        }
        for (first, last, [ms, bound, note]) in rows {
            let name = if first == last {
                first.to_string()
            } else {
                format!("{first} to {last}")
            };
            table.row([name, ms, bound, note]);
        }
        let ends = &self.decode.ends;
        table.row([
            "head",
            &significant(ends.ms, 3),
            bound_by(&ends.terms),
            "final norm and logits",
        ]);
        table.render()
    }
}
