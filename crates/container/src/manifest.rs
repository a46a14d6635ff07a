//! `manifest.json`: what the container holds, where, and why. The only truth about bits and shapes.
//!
//! One gate ([`Manifest::parse`]) checks everything: behind it nobody checks again. The last key is the checksum of
//! all bytes before it. Law: what was parsed and written again is the same file; any changed byte is refused.

use std::collections::BTreeMap;
use std::path::Path;

use cotk_quant::QuantError;
use cotk_quant::coded::{self, CodedView};
use cotk_quant::layout::{MAX_DIM, MatrixFormat, Placement};
use cotk_run::files;
use cotk_run::units::{ExpertId, LayerId};
use serde::{Deserialize, Serialize};

use crate::layout::{self, Layout};
use crate::{ContainerError, Result};

/// What stands under `format`.
pub const FORMAT: &str = "cotk-container";
/// What stands under `version`; others are refused by name.
pub const VERSION: u64 = 0;
/// File names inside a container.
pub const MANIFEST: &str = "manifest.json";
/// Everything that is not a routed expert.
pub const DENSE: &str = "dense.safetensors";
/// The expert records, order = layer, expert.
pub const EXPERTS: &str = "experts.bin";
/// The only file without a checksum, since it may hold times.
pub const REPORT: &str = "report.md";

/// No manifest of ours comes near this.
pub(crate) const MANIFEST_LIMIT_BYTES: u64 = 1 << 28;
const LAYERS_LIMIT: usize = 1 << 14;
const EXPERTS_LIMIT: usize = 1 << 16;
const FILES_LIMIT: usize = 64;
const DENSE_LIMIT: usize = 1 << 20;

/// An xxh3-64, in JSON 16 hexadecimal digits (a JSON number would lose its low bits elsewhere).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Checksum(pub u64);

impl TryFrom<String> for Checksum {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_hex = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        is_hex
            .then(|| u64::from_str_radix(&text, 16).ok().map(Self))
            .flatten()
            .ok_or_else(|| format!("`{text}` is not a checksum: expected 16 hexadecimal digits"))
    }
}

impl From<Checksum> for String {
    fn from(checksum: Checksum) -> Self {
        format!("{:016x}", checksum.0)
    }
}

/// The whole manifest. Field order is the order in the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: String,
    pub version: u64,
    /// The model that this came from.
    pub source: SourceModel,
    /// The model's own `config.json`.
    pub config: serde_json::Value,
    /// What decided.
    pub recipe: Origin,
    /// The width that `little` reads experts at; absent: this container has no `little`.
    pub little_bits: Option<u32>,
    /// What a dropped expert means to routing.
    pub dropped: DroppedMeaning,
    /// Hidden size: columns of gate and up, rows of down.
    pub hidden: usize,
    /// MoE layers in ascending order; dense layers do not stand here.
    pub layers: Vec<Layer>,
    /// Matrices `X` of the dense part that are coded: plain codes whose bytes are the U8 tensor `X.planes`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dense: BTreeMap<String, Matrix>,
    /// Every other file but `report.md`.
    pub files: BTreeMap<String, FileEntry>,
    /// xxh3-64 of the file's bytes before this value.
    pub checksum: Checksum,
}

/// Where the weights came from, without a path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceModel {
    /// Of config and weight files.
    pub hash: Checksum,
    /// Weight bytes of the source.
    pub bytes: u64,
    /// Bytes of its routed experts.
    pub expert_bytes: u64,
    /// Routed-expert parameters of the source.
    pub expert_weights: u64,
}

/// Recipe and inputs that decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Of the resolved recipe.
    pub hash: Checksum,
    pub seed: u64,
    /// Of the calibration text.
    pub calibration: Checksum,
    pub calibration_tokens: u64,
}

/// Size and checksum of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    pub bytes: u64,
    pub xxh3: Checksum,
}

/// What the absence of an expert means: loss, runtime and exports read the same word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DroppedMeaning {
    /// Its router row is gone: softmax over the kept experts.
    Removed,
    /// Its router row is kept, its selection forbidden: softmax over all, top-k of the kept.
    Masked,
}

/// One MoE layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    pub layer: LayerId,
    /// What every kept down projection was multiplied by before it was coded, so that the layer's output keeps its size.
    pub gain: f32,
    /// All experts of the source model, in its numbering.
    pub experts: Vec<Expert>,
}

impl Layer {
    /// How many experts are kept.
    pub fn kept(&self) -> usize {
        self.experts
            .iter()
            .filter(|e| matches!(e.state, State::Kept(_)))
            .count()
    }
}

/// One expert and the numbers behind its decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expert {
    pub expert: ExpertId,
    pub state: State,
    /// Why: the numbers that decided.
    pub why: Why,
}

/// The statistics that decided about an expert.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Why {
    /// Calibration tokens that the source model's router sent here.
    pub tokens: u64,
    /// Their share of the layer's selections, 0..1.
    pub share: f64,
    /// Their summed gates, as a share of the layer's.
    pub gate_share: f64,
}

/// Kept with a record, or dropped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Kept(Box<Record>),
    Dropped,
}

/// One expert's record in `experts.bin`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// From the start of `experts.bin`.
    pub offset: u64,
    /// Header and sections, without padding behind.
    pub bytes: u64,
    /// The header's own checksum.
    pub header: Checksum,
    pub sections: Vec<Section>,
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
    /// What each usable prefix loses, narrowest first.
    pub prefixes: Vec<Prefix>,
}

impl Record {
    /// Of gate, up and down.
    pub fn formats(&self) -> [MatrixFormat; 3] {
        [self.gate.format, self.up.format, self.down.format]
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout::of(self.gate.format, self.up.format, self.down.format)
    }
}

/// One contiguous piece of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// From the start of the record.
    pub offset: u64,
    pub bytes: u64,
    pub xxh3: Checksum,
}

/// One matrix: shape, code, group, and the zero point of each prefix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    pub format: MatrixFormat,
    /// Narrowest prefix first.
    pub zero_points: Vec<f32>,
}

impl Matrix {
    /// The whole of a plain matrix that lies alone in `plane`.
    ///
    /// # Errors
    /// Bytes of another length, a code of several planes.
    pub fn plain<'a>(&self, plane: &'a [u8]) -> std::result::Result<coded::Prefix<'a>, QuantError> {
        let view = CodedView::try_new(self.format, &[plane], &self.zero_points, Placement::Alone)?;
        view.prefix(self.format.code().full())
    }
}

/// A prefix against the source expert, over the calibration tokens routed to it, weighted by squared gates.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefix {
    pub bits: u32,
    /// δ = ‖ŷ − y‖ / ‖y‖; absent when no token came.
    pub delta: Option<f64>,
    /// ρ = ‖ŷ‖ / ‖y‖; absent when no token came.
    pub rho: Option<f64>,
    /// Tokens behind both.
    pub tokens: u64,
}

impl Manifest {
    /// The gate: bytes in, a manifest that cannot be wrong out (about itself; the files are checked by the reader).
    ///
    /// # Errors
    /// With file, key, found and expected.
    pub fn parse(bytes: &[u8], file: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Probe {
            format: String,
            version: serde_json::Value,
        }
        let unreadable = |e: &dyn std::fmt::Display| ContainerError::Manifest {
            file: file.to_owned(),
            detail: e.to_string(),
        };
        let probe: Probe = serde_json::from_slice(bytes).map_err(|e| unreadable(&e))?;
        let version = |what, found: String, expected: String| {
            Err(ContainerError::Version {
                file: file.to_owned(),
                what,
                found,
                expected,
            })
        };
        if probe.format != FORMAT {
            return version("format", format!("`{}`", probe.format), format!("`{FORMAT}`"));
        }
        if probe.version != VERSION {
            return version("format version", probe.version.to_string(), VERSION.to_string());
        }
        let (found, expected) = seal_of(bytes).ok_or_else(|| unreadable(&"does not end in its checksum"))?;
        if found != expected {
            return Err(ContainerError::Checksum {
                file: file.to_owned(),
                found,
                expected,
            });
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| unreadable(&e))?;
        manifest.check(file)?;
        Ok(manifest)
    }

    /// The file's bytes, sealed.
    pub fn to_bytes(&self) -> Vec<u8> {
        let open = Self {
            checksum: Checksum(0),
            ..self.clone()
        };
        let mut text = serde_json::to_vec_pretty(&open).expect("strings, numbers and lists have a JSON form");
        text.push(b'\n');
        seal(&mut text);
        text
    }

    /// Bytes of all records.
    pub fn record_bytes(&self) -> u64 {
        self.records().map(|(_, _, record)| record.bytes).sum()
    }

    /// Every record in file order.
    pub fn records(&self) -> impl Iterator<Item = (LayerId, ExpertId, &Record)> {
        self.layers.iter().flat_map(|layer| {
            layer.experts.iter().filter_map(|expert| match &expert.state {
                State::Kept(record) => Some((layer.layer, expert.expert, record.as_ref())),
                State::Dropped => None,
            })
        })
    }

    fn check(&self, file: &Path) -> Result<()> {
        let wrong = |key: String, found: String, expected: String| {
            Err(ContainerError::Value {
                file: file.to_owned(),
                key,
                found,
                expected,
            })
        };
        if self.hidden == 0 || self.hidden > MAX_DIM {
            return wrong("hidden".into(), self.hidden.to_string(), format!("1 to {MAX_DIM}"));
        }
        if self.layers.len() > LAYERS_LIMIT {
            return wrong(
                "layers".into(),
                self.layers.len().to_string(),
                format!("at most {LAYERS_LIMIT}"),
            );
        }
        if self.files.len() > FILES_LIMIT {
            return wrong(
                "files".into(),
                self.files.len().to_string(),
                format!("at most {FILES_LIMIT}"),
            );
        }
        for required in [DENSE, EXPERTS] {
            if !self.files.contains_key(required) {
                return wrong("files".into(), format!("no {required}"), required.to_owned());
            }
        }
        if self.dense.len() > DENSE_LIMIT {
            return wrong(
                "dense".into(),
                self.dense.len().to_string(),
                format!("at most {DENSE_LIMIT}"),
            );
        }
        for (name, matrix) in &self.dense {
            let code = matrix.format.code();
            if code.planes() != 1 {
                return wrong(
                    format!("dense.{name}.format.code"),
                    code.to_string(),
                    "a plain code".into(),
                );
            }
            if matrix.zero_points.len() != 1 || !matrix.zero_points[0].is_finite() {
                let found = format!("{:?}", matrix.zero_points);
                return wrong(format!("dense.{name}.zero_points"), found, "1 finite number".into());
            }
        }
        for name in self.files.keys() {
            let is_plain = !name.is_empty()
                && name.len() < 128
                && !name.starts_with('.')
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                && ![MANIFEST, REPORT].contains(&name.as_str());
            if !is_plain {
                return wrong(
                    "files".into(),
                    format!("`{name}`"),
                    "names of files beside the manifest".into(),
                );
            }
        }
        let mut end = 0u64;
        let mut last_layer = None;
        for layer in &self.layers {
            if last_layer >= Some(layer.layer) {
                return wrong(
                    "layers".into(),
                    layer.layer.to_string(),
                    "each layer once, in order".into(),
                );
            }
            last_layer = Some(layer.layer);
            if layer.experts.is_empty() || layer.experts.len() > EXPERTS_LIMIT {
                let key = format!("{}: experts", layer.layer);
                return wrong(key, layer.experts.len().to_string(), format!("1 to {EXPERTS_LIMIT}"));
            }
            for (index, expert) in layer.experts.iter().enumerate() {
                let at = format!("{}, {}", layer.layer, expert.expert);
                if expert.expert.index() != index {
                    return wrong(at, expert.expert.to_string(), format!("expert {index}"));
                }
                if let State::Kept(record) = &expert.state {
                    end = self
                        .check_record(record, end)
                        .map_err(|(key, found, expected)| ContainerError::Value {
                            file: file.to_owned(),
                            key: format!("{at}: {key}"),
                            found,
                            expected,
                        })?;
                }
            }
        }
        let experts_bytes = self.files[EXPERTS].bytes;
        if end != experts_bytes {
            return wrong(
                format!("files.{EXPERTS}.bytes"),
                experts_bytes.to_string(),
                format!("{end}, where the last record ends"),
            );
        }
        if let Some(bits) = self.little_bits {
            let is_narrower = |(_, _, record): (_, _, &Record)| {
                let widths = record.prefixes.iter().map(|p| p.bits);
                widths.clone().any(|b| b == bits) && widths.max() > Some(bits)
            };
            if !self.records().any(is_narrower) {
                return wrong(
                    "little_bits".into(),
                    bits.to_string(),
                    "a width below the full one of at least one expert".into(),
                );
            }
        }
        Ok(())
    }

    /// Returns where this record ends; errors are (key, found, expected).
    fn check_record(&self, record: &Record, previous_end: u64) -> Result<u64, (String, String, String)> {
        let fail = |key: &str, found: String, expected: String| Err((key.to_owned(), found, expected));
        let parts = [("gate", &record.gate), ("up", &record.up), ("down", &record.down)];
        for (name, matrix) in parts {
            let expected = matrix.format.code().planes();
            if matrix.zero_points.len() != expected || matrix.zero_points.iter().any(|z| !z.is_finite()) {
                let found = format!("{:?}", matrix.zero_points);
                return fail(
                    &format!("{name}.zero_points"),
                    found,
                    format!("{expected} finite numbers"),
                );
            }
        }
        let inner = record.gate.format.rows();
        let shapes = [(inner, self.hidden), (inner, self.hidden), (self.hidden, inner)];
        for ((name, matrix), expected) in parts.into_iter().zip(shapes) {
            let found = (matrix.format.rows(), matrix.format.cols());
            if found != expected {
                return fail(name, format!("{found:?}"), format!("{expected:?}"));
            }
        }
        let formats = record.formats();
        let layout = record.layout();
        let offset = layout::align_record(previous_end, layout.bytes);
        if record.offset != offset {
            return fail("offset", record.offset.to_string(), offset.to_string());
        }
        if record.bytes != layout.bytes {
            return fail("bytes", record.bytes.to_string(), layout.bytes.to_string());
        }
        let found: Vec<(u64, u64)> = record.sections.iter().map(|s| (s.offset, s.bytes)).collect();
        let expected: Vec<(u64, u64)> = layout.sections.iter().map(|s| (s.offset, s.bytes)).collect();
        if found != expected {
            return fail("sections", format!("{found:?}"), format!("{expected:?}"));
        }
        let found: Vec<u32> = record.prefixes.iter().map(|p| p.bits).collect();
        let expected = layout::prefixes(formats);
        if found != expected {
            return fail("prefixes", format!("{found:?}"), format!("{expected:?}"));
        }
        Ok(offset + layout.bytes)
    }
}

const SEAL_TAIL: &[u8] = b"\"\n}\n";

/// Replaces the checksum at the end of a manifest's text by that of the bytes before it. For writers and tests.
///
/// # Panics
/// When the text does not end in a checksum.
pub fn seal(text: &mut [u8]) {
    let at = text.len() - SEAL_TAIL.len() - 16;
    assert!(text.ends_with(SEAL_TAIL), "a manifest ends in its checksum");
    let digits = format!("{:016x}", files::checksum(&text[..at]));
    text[at..at + 16].copy_from_slice(digits.as_bytes());
}

/// (found, expected) checksums, if the text ends in one.
fn seal_of(text: &[u8]) -> Option<(u64, u64)> {
    let before = text.strip_suffix(SEAL_TAIL)?;
    let (body, digits) = before.split_at(before.len().checked_sub(16)?);
    let digits = std::str::from_utf8(digits).ok()?.to_owned();
    Some((files::checksum(body), Checksum::try_from(digits).ok()?.0))
}
