//! The zero-shot part of `cotk eval`: task files in, accuracies out. How an item is scored is `cotk_model::tasks`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use cotk_data::zeroshot::{self, Task};
use cotk_model::ModelError;
use cotk_model::folder::ModelFolder;
use cotk_model::moe::Mode;
use cotk_model::tasks::{TaskOptions, TaskResult, evaluate};
use cotk_run::units::significant;
use cotk_runtime::open::Opened;
use serde_json::{Value, json};

use crate::context::Context;
use crate::fault::Fault;
use crate::table::Table;

/// One task, and the same under the reference.
pub(super) struct Scored {
    model: TaskResult,
    reference: Option<TaskResult>,
}

/// Every task that the paths mean, each at most `max_items` long.
pub(super) fn read(paths: &[PathBuf], max_items: Option<NonZeroUsize>) -> Result<Vec<Task>, Fault> {
    let mut tasks = Vec::new();
    for path in paths {
        for file in zeroshot::files_at(path).map_err(ModelError::from)? {
            let mut task = zeroshot::read(file).map_err(ModelError::from)?;
            task.items.truncate(max_items.map_or(usize::MAX, NonZeroUsize::get));
            tasks.push(task);
        }
    }
    Ok(tasks)
}

/// What stands before each item: as asked, else the model's BOS, else its end of text.
pub(super) fn bos(files: &ModelFolder, asked: Option<u32>) -> Result<u32, Fault> {
    (asked.or(files.spec.bos).or(files.eos.first().copied())).ok_or_else(|| {
        Fault::usage(
            format!("{}: names neither a BOS nor an end of text", files.path.display()),
            "give the token id that stands before each item: --bos ID",
        )
    })
}

pub(super) fn score(
    tasks: &[Task],
    opened: &Opened,
    reference: Option<&Opened>,
    options: TaskOptions,
    cx: &Context,
) -> Result<Vec<Scored>, Fault> {
    let under = |opened: &Opened, task: &Task, options: &TaskOptions| {
        evaluate(
            &opened.model,
            &opened.files.tokenizer,
            task,
            options,
            &cx.ui,
            &cx.cancel,
        )
    };
    let exact = TaskOptions {
        mode: Mode::Exact,
        ..options
    };
    let scored = tasks.iter().map(|task| {
        Ok(Scored {
            model: under(opened, task, &options)?,
            reference: reference.map(|reference| under(reference, task, &exact)).transpose()?,
        })
    });
    scored.collect()
}

impl Scored {
    /// Share of the items where model and reference choose the same.
    #[expect(clippy::cast_precision_loss, reason = "counts are small")]
    fn agreement(&self) -> Option<f64> {
        let theirs = &self.reference.as_ref()?.choices;
        let same = self.model.choices.iter().zip(theirs).filter(|(a, b)| a == b).count();
        Some(same as f64 / theirs.len() as f64)
    }

    #[expect(clippy::cast_precision_loss, reason = "token counts are small")]
    fn tokens_per_s(&self) -> f64 {
        self.model.tokens as f64 / self.model.seconds.max(1e-9)
    }

    pub(super) fn json(&self) -> Value {
        let found = &self.model;
        let first = &found.measures[0];
        json!({
            "name": found.name,
            "format": found.format.name(),
            "items": found.choices.len(),
            "rule": first.rule.name(),
            "accuracy": first.accuracy,
            "accuracy_ci95": first.accuracy_ci95,
            "chance": found.chance,
            "answer_nll_nats": found.answer_nll_nats,
            "measures": found.measures.iter().map(|m| json!({
                "rule": m.rule.name(),
                "accuracy": m.accuracy,
                "accuracy_ci95": m.accuracy_ci95,
            })).collect::<Vec<_>>(),
            "parts": found.parts.iter().map(|p| json!({
                "key": p.key,
                "value": p.value,
                "items": p.items,
                "accuracy": p.accuracy,
            })).collect::<Vec<_>>(),
            "reference": self.reference.as_ref().map(|r| json!({
                "accuracy": r.measures[0].accuracy,
                "accuracy_ci95": r.measures[0].accuracy_ci95,
                "answer_nll_nats": r.answer_nll_nats,
                "agreement": self.agreement(),
            })),
            "tokens": found.tokens,
            "tokens_per_s": self.tokens_per_s(),
        })
    }
}

/// Accuracies, then what the items of each domain and kind reach.
pub(super) fn tables(scored: &[Scored]) -> String {
    let show = |value: f64| significant(value, 4);
    let mut table = Table::new(&[
        "task",
        "rule",
        "items",
        "accuracy",
        "95 % interval",
        "chance",
        "reference",
        "same choice",
    ]);
    for task in scored {
        for (at, measure) in task.model.measures.iter().enumerate() {
            let [lo, hi] = measure.accuracy_ci95;
            let mut cells = vec![
                task.model.name.clone(),
                measure.rule.name().to_owned(),
                task.model.choices.len().to_string(),
                show(measure.accuracy),
                format!("{} to {}", show(lo), show(hi)),
                show(task.model.chance),
            ];
            if let Some(reference) = &task.reference {
                cells.push(show(reference.measures[at].accuracy));
                cells.extend(task.agreement().filter(|_| at == 0).map(show));
            }
            table.row(cells);
        }
    }
    let mut parts = Table::new(&["task", "part", "items", "accuracy"]);
    for task in scored {
        for part in &task.model.parts {
            let name = format!("{} {}", part.key, part.value);
            parts.row([
                task.model.name.clone(),
                name,
                part.items.to_string(),
                show(part.accuracy),
            ]);
        }
    }
    let mut text = table.render();
    if scored.iter().any(|task| !task.model.parts.is_empty()) {
        text.push('\n');
        text += &parts.render();
    }
    for task in scored {
        text += &format!(
            "\n{}: right answers {} nats each, {} tokens/s",
            task.model.name,
            show(task.model.answer_nll_nats),
            significant(task.tokens_per_s(), 3)
        );
    }
    text.push('\n');
    text
}
