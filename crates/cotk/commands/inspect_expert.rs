//! `cotk inspect OUT --expert L.E`: every number behind one expert of a container, and what its neighbouring choices would
//! have cost. Shows what the manifest tells; computes nothing anew.

use std::path::Path;

use cotk_compress::choice::Form;
use cotk_compress::report::ENOUGH_TOKENS;
use cotk_container::decision::{Alternative, Decision, Healed, MatrixDecision};
use cotk_container::low_rank::Role;
use cotk_container::manifest::{DroppedMeaning, Expert, Layer, Matrix, Record, State};
use cotk_container::reader::Container;
use cotk_quant::layout::MatrixFormat;
use cotk_run::units::{ExpertId, LayerId, significant};
use serde_json::{Value, json};

use crate::context::Outcome;
use crate::fault::Fault;
use crate::table::Table;

const MATRICES: [&str; 3] = ["gate", "up", "down"];

/// One expert of one layer, as typed: `2.17`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    layer: LayerId,
    expert: ExpertId,
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text
            .split_once('.')
            .map(|(layer, expert)| (layer.parse(), expert.parse()));
        match parts {
            Some((Ok(layer), Ok(expert))) => Ok(Self {
                layer: LayerId(layer),
                expert: ExpertId(expert),
            }),
            _ => Err("expected a layer and an expert, as 2.17".to_owned()),
        }
    }
}

/// # Errors
/// A folder that is no container; a layer or an expert that it does not have.
pub(super) fn explain(model: &Path, container: Option<&Container>, place: Place) -> Result<Outcome, Fault> {
    let Some(container) = container else {
        return Err(Fault::usage(
            format!(
                "--expert: {} is a checkpoint, nothing was decided about it",
                model.display()
            ),
            "name the output of `cotk compress`",
        ));
    };
    let manifest = container.manifest();
    let Some(layer) = container.layer(place.layer) else {
        let layers: Vec<String> = manifest.layers.iter().map(|l| l.layer.0.to_string()).collect();
        return Err(Fault::usage(
            format!("--expert: {} has no experts", place.layer),
            format!("layers with experts: {}", layers.join(", ")),
        ));
    };
    let Some(expert) = layer.experts.get(place.expert.index()) else {
        return Err(Fault::usage(
            format!("--expert: {} has no {}", place.layer, place.expert),
            format!("it has experts 0 to {}", layer.experts.len() - 1),
        ));
    };
    let told = Told {
        layer,
        expert,
        decision: expert.decision.as_deref().cloned().unwrap_or_default(),
        meaning: manifest.dropped,
    };
    Ok(Outcome::new(json!({ "expert": told.json() }), told.text()))
}

/// What there is to say.
struct Told<'a> {
    layer: &'a Layer,
    expert: &'a Expert,
    decision: Decision,
    meaning: DroppedMeaning,
}

impl Told<'_> {
    fn kind(&self) -> &'static str {
        match self.expert.state {
            State::Kept(_) => "kept",
            State::Constant(_) => "constant",
            State::Dropped => "dropped",
        }
    }

    fn record(&self) -> Option<&Record> {
        match &self.expert.state {
            State::Kept(record) => Some(record),
            State::Constant(_) | State::Dropped => None,
        }
    }

    /// Name, matrix, and what decided.
    fn matrices(&self) -> Vec<(&'static str, &Matrix, Option<MatrixDecision>)> {
        let Some(record) = self.record() else { return Vec::new() };
        let matrices = [&record.gate, &record.up, &record.down];
        let decided = |i: usize| self.decision.matrices.map(|all| all[i]);
        (0..3).map(|i| (MATRICES[i], matrices[i], decided(i))).collect()
    }

    /// Steps of the layer, then of the expert.
    fn healed(&self) -> impl Iterator<Item = (&'static str, &Healed)> {
        let of = |whose: &'static str| move |step| (whose, step);
        let layer = self.layer.healed.iter().map(of("layer"));
        layer.chain(self.decision.healed.iter().map(of("expert")))
    }

    /// What stands in its place, in words.
    fn place(&self) -> String {
        match (&self.expert.state, self.meaning) {
            (State::Kept(_), _) => "its weights".to_owned(),
            (State::Constant(_), _) => "a constant: routed to as before, it answers with a stored vector".to_owned(),
            (State::Dropped, DroppedMeaning::Removed) => "nothing: its router row is gone".to_owned(),
            (State::Dropped, DroppedMeaning::Masked | DroppedMeaning::Novice) => {
                "nothing: its router row counts, but it is not chosen".to_owned()
            }
        }
    }

    fn json(&self) -> Value {
        let (why, decision) = (&self.expert.why, &self.decision);
        let matrices: serde_json::Map<String, Value> = self
            .matrices()
            .into_iter()
            .map(|(name, matrix, decided)| (name.to_owned(), matrix_json(matrix, decided.as_ref())))
            .collect();
        json!({
            "layer": self.layer.layer,
            "id": self.expert.expert,
            "kind": self.kind(),
            "bytes": self.expert.state.bytes(),
            "tokens": why.tokens,
            "share": why.share,
            "gate_share": why.gate_share,
            "is_starved": why.tokens < ENOUGH_TOKENS,
            "lacks_tokens": self.lacks(),
            "chosen_by": decision.chosen_by,
            "dropped_alone": decision.dropped_alone,
            "inner": self.record().map(|record| record.gate.format.rows()),
            "channels_of": decision.channels.map(|channels| channels.of),
            "channels_error": decision.channels.and_then(|channels| channels.error),
            "scale": decision.scale,
            "gain": self.layer.gain,
            "matrices": matrices,
            "prefixes": self.record().map(|record| &record.prefixes),
            "healed": self.healed().map(|(of, healed)| json!({
                "of": of,
                "step": healed.step,
                "before": healed.before,
                "after": healed.after,
                "kept": healed.kept,
            })).collect::<Vec<_>>(),
            "thresholds": self.layer.thresholds,
        })
    }

    fn lacks(&self) -> Option<u64> {
        let few = ENOUGH_TOKENS
            .checked_sub(self.expert.why.tokens)
            .filter(|&lacks| lacks > 0);
        self.decision.starved.or(few)
    }

    fn text(&self) -> String {
        let (why, decision) = (&self.expert.why, &self.decision);
        let percent = |share: f64| format!("{} %", significant(share * 100.0, 3));
        let title = format!("{}, {}", self.layer.layer, self.expert.expert);
        let mut facts = Table::new(&[&title, self.kind()]);
        facts.row(["in its place".to_owned(), self.place()]);
        if let Some(chooser) = &decision.chosen_by {
            facts.row(["chosen by".to_owned(), chooser.clone()]);
        }
        facts
            .row(["tokens seen".to_owned(), why.tokens.to_string()])
            .row(["share of selections, of gates".to_owned(), {
                format!("{}, {}", percent(why.share), percent(why.gate_share))
            }]);
        if let Some(lacks) = self.lacks() {
            let found = match why.tokens {
                0 => "never fired: its figures rest on its neighbours'".to_owned(),
                _ => format!("lacks {lacks} of them for figures of its own"),
            };
            facts.row(["few tokens".to_owned(), found]);
        }
        if let Some(loss) = decision.dropped_alone {
            facts.row(["loss if it alone were dropped".to_owned(), significant(loss, 3)]);
        }
        if let Some(record) = self.record() {
            let inner = record.gate.format.rows();
            let channels = decision.channels.map_or_else(String::new, |c| format!(" of {}", c.of));
            let error = decision.channels.and_then(|c| c.error);
            let error = error.map_or_else(String::new, |e| format!(", error {}", significant(e, 3)));
            facts.row(["inner channels".to_owned(), format!("{inner}{channels}{error}")]);
        }
        if let Some(scale) = decision.scale {
            facts.row(["scale in its down projection".to_owned(), significant(scale, 4)]);
        }
        facts
            .row(["layer's gain".to_owned(), significant(f64::from(self.layer.gain), 4)])
            .row(["bytes of its record".to_owned(), self.expert.state.bytes().to_string()]);
        let mut text = facts.render();
        let tables = [
            self.forms(),
            self.neighbours(),
            self.prefixes(),
            self.steps(),
            self.thresholds(),
        ];
        for table in tables.into_iter().flatten() {
            text.push('\n');
            text.push_str(&table.render());
        }
        if self.decision.matrices.is_some() {
            text.push_str(
                "\nerror: of the layer's output with this matrix alone changed, held-out, relative and squared\n",
            );
        }
        text
    }

    fn forms(&self) -> Option<Table> {
        let matrices = self.matrices();
        let heads = [
            "matrix",
            "form",
            "rank",
            "bits each",
            "bytes",
            "error",
            "KL an error",
            "shrinkage λ",
        ];
        let mut table = Table::new(&heads);
        for (name, matrix, decided) in &matrices {
            let number = |found: Option<f64>| found.map_or_else(String::new, |x| significant(x, 3));
            table.row([
                (*name).to_owned(),
                form(matrix),
                rank(matrix),
                significant(bits_each(matrix), 3),
                matrix.bytes().to_string(),
                number(decided.map(|d| d.error)),
                number(decided.and_then(|d| d.sensitivity)),
                number(decided.and_then(|d| d.lambda)),
            ]);
        }
        (!matrices.is_empty()).then_some(table)
    }

    /// The choices beside those that were taken.
    fn neighbours(&self) -> Option<Table> {
        let mut table = Table::new(&[
            "matrix",
            "instead",
            "rank",
            "bytes",
            "error",
            "more bytes",
            "times error",
        ]);
        let mut is_empty = true;
        for (name, matrix, decided) in self.matrices() {
            let Some(decided) = decided else { continue };
            for (side, other) in [("narrower", decided.narrower), ("wider", decided.wider)] {
                let Some(other) = other else { continue };
                is_empty = false;
                table.row([
                    name.to_owned(),
                    format!("{side}: {}", format_name(other.format)),
                    other.rank.to_string(),
                    other.bytes.to_string(),
                    significant(other.error, 3),
                    (i128::from(other.bytes) - i128::from(matrix.bytes())).to_string(),
                    significant(other.error / decided.error, 3),
                ]);
            }
        }
        (!is_empty).then_some(table)
    }

    fn prefixes(&self) -> Option<Table> {
        let record = self.record()?;
        let mut table = Table::new(&["prefix, bits", "error δ", "norm ρ", "tokens"]);
        for prefix in &record.prefixes {
            let number = |found: Option<f64>| found.map_or_else(String::new, |x| significant(x, 3));
            table.row([
                prefix.bits.to_string(),
                number(prefix.delta),
                number(prefix.rho),
                prefix.tokens.to_string(),
            ]);
        }
        Some(table)
    }

    fn steps(&self) -> Option<Table> {
        let mut table = Table::new(&["healing", "of the", "loss before", "after", "stands"]);
        let mut is_empty = true;
        for (of, healed) in self.healed() {
            is_empty = false;
            table.row([
                healed.step.name().to_owned(),
                of.to_owned(),
                significant(healed.before, 4),
                significant(healed.after, 4),
                if healed.kept { "yes" } else { "no" }.to_owned(),
            ]);
        }
        (!is_empty).then_some(table)
    }

    fn thresholds(&self) -> Option<Table> {
        let mut table = Table::new(&["mode", "threshold", "below full width"]);
        for threshold in &self.layer.thresholds {
            table.row([
                threshold.mode.clone(),
                significant(threshold.value, 4),
                significant(threshold.low_bit_fraction, 3),
            ]);
        }
        (!self.layer.thresholds.is_empty()).then_some(table)
    }
}

fn format_name(format: MatrixFormat) -> String {
    let form = Form {
        code: format.code(),
        group: format.group(),
        scales: format.scales(),
    };
    form.to_string()
}

/// How a matrix is stored, the rank of a correction apart.
pub(super) fn form(matrix: &Matrix) -> String {
    match matrix.rank.map(|factors| factors.role) {
        Some(Role::Product) => format!("two factors, {}", format_name(matrix.format)),
        Some(Role::Correction) | None => format_name(matrix.format),
    }
}

fn rank(matrix: &Matrix) -> String {
    match matrix.rank() {
        0 => String::new(),
        rank => rank.to_string(),
    }
}

/// Of every weight that it stands for.
#[expect(clippy::cast_precision_loss, reason = "byte counts are far below 2^53")]
fn bits_each(matrix: &Matrix) -> f64 {
    8.0 * matrix.bytes() as f64 / (matrix.format.rows() * matrix.format.cols()) as f64
}

fn matrix_json(matrix: &Matrix, decided: Option<&MatrixDecision>) -> Value {
    let alternative = |other: Option<Alternative>| {
        other.map(|other| {
            json!({
                "form": format_name(other.format),
                "rank": other.rank,
                "bytes": other.bytes,
                "error": other.error,
            })
        })
    };
    json!({
        "form": form(matrix),
        "format": matrix.format,
        "rank": matrix.rank(),
        "role": matrix.rank.map(|factors| factors.role),
        "bits_each": bits_each(matrix),
        "bytes": matrix.bytes(),
        "error": decided.map(|d| d.error),
        "sensitivity": decided.and_then(|d| d.sensitivity),
        "lambda": decided.and_then(|d| d.lambda),
        "narrower": alternative(decided.and_then(|d| d.narrower)),
        "wider": alternative(decided.and_then(|d| d.wider)),
    })
}
