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

use crate::decision::{Decision, Healed, Threshold};
use crate::layout::{self, Layout, Shape};
use crate::low_rank::LowRank;
use crate::record::Kind;
use crate::{ContainerError, Result};

/// What stands under `format`.
pub const FORMAT: &str = "cotk-container";
/// What stands under `version`; others are refused by name.
pub const VERSION: u64 = 1;
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
    /// Nobody is absent: whoever was dropped is routed to as before and answers with a constant.
    Novice,
}

/// One MoE layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    pub layer: LayerId,
    /// What every kept down projection was multiplied by before it was coded, so that the layer's output keeps its size.
    pub gain: f32,
    /// Steps of healing that were tried on the layer as a whole, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub healed: Vec<Healed>,
    /// Where routing modes switch; each mode at most once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub thresholds: Vec<Threshold>,
    /// All experts of the source model, in its numbering.
    pub experts: Vec<Expert>,
}

impl Layer {
    /// How many experts are kept with weights.
    pub fn kept(&self) -> usize {
        let kept = self.experts.iter().filter(|e| matches!(e.state, State::Kept(_)));
        kept.count()
    }

    /// How many experts can be routed to: those with weights, and constants.
    pub fn routable(&self) -> usize {
        self.experts.iter().filter(|e| e.state.is_routable()).count()
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
    /// Why, further: what was measured of it and of what it could have been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Box<Decision>>,
}

/// The statistics that decided about an expert.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Why {
    /// Calibration tokens that the source model's router sent here.
    pub tokens: u64,
    /// Their share of the layer's selections, 0..1.
    pub share: f64,
    /// Their summed gates, as a share of the layer's.
    pub gate_share: f64,
}

/// What stands in an expert's place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its weights.
    Kept(Box<Record>),
    /// A vector that it answers with (a novice): routing is as if it were kept.
    Constant(Box<ConstantRecord>),
    /// Nothing; what that means to routing is [`Manifest::dropped`].
    Dropped,
}

impl State {
    /// Whether routing may choose it.
    pub fn is_routable(&self) -> bool {
        match self {
            Self::Kept(_) | Self::Constant(_) => true,
            Self::Dropped => false,
        }
    }

    /// Where its record lies; `None`: it has none.
    pub(crate) fn place(&self) -> Option<Placed<'_>> {
        match self {
            Self::Kept(record) => Some(Placed {
                kind: Kind::Coded,
                offset: record.offset,
                bytes: record.bytes,
                header: record.header,
                sections: &record.sections,
            }),
            Self::Constant(record) => Some(Placed {
                kind: Kind::Constant,
                offset: record.offset,
                bytes: record.bytes,
                header: record.header,
                sections: std::slice::from_ref(&record.section),
            }),
            Self::Dropped => None,
        }
    }

    /// Bytes of its record, 0 without one.
    pub fn bytes(&self) -> u64 {
        self.place().map_or(0, |placed| placed.bytes)
    }
}

/// A record of either kind in `experts.bin`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed<'a> {
    pub(crate) kind: Kind,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) header: Checksum,
    pub(crate) sections: &'a [Section],
}

/// The record of an expert that answers with a constant: one section of `hidden` f16, little endian.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConstantRecord {
    /// From the start of `experts.bin`.
    pub offset: u64,
    /// Header and section.
    pub bytes: u64,
    /// The header's own checksum.
    pub header: Checksum,
    pub section: Section,
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
        Layout::of([&self.gate, &self.up, &self.down].map(Matrix::shape))
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
    /// Factors beside the codes, or in their place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<LowRank>,
}

impl Matrix {
    /// Codes alone.
    pub fn new(format: MatrixFormat, zero_points: Vec<f32>) -> Self {
        Self {
            format,
            zero_points,
            rank: None,
        }
    }

    /// Width between its factors; 0 without any.
    pub fn rank(&self) -> usize {
        self.rank.map_or(0, |factors| factors.rank())
    }

    /// Bytes of codes, scales, zero points and factors.
    pub fn bytes(&self) -> u64 {
        let codes = match self.shape().has_codes() {
            true => self.format.total_bytes() + 4 * self.zero_points.len(),
            false => 0,
        };
        codes as u64 + self.rank.map_or(0, |factors| factors.bytes())
    }

    pub(crate) fn shape(&self) -> Shape {
        Shape {
            format: self.format,
            rank: self.rank,
        }
    }

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

    /// Bytes of all records, constants too.
    pub fn record_bytes(&self) -> u64 {
        let experts = self.layers.iter().flat_map(|layer| &layer.experts);
        experts.map(|expert| expert.state.bytes()).sum()
    }

    /// Every record of weights in file order.
    pub fn records(&self) -> impl Iterator<Item = (LayerId, ExpertId, &Record)> {
        self.layers.iter().flat_map(|layer| {
            layer.experts.iter().filter_map(|expert| match &expert.state {
                State::Kept(record) => Some((layer.layer, expert.expert, record.as_ref())),
                State::Constant(_) | State::Dropped => None,
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
            if matrix.rank.is_some() {
                return wrong(format!("dense.{name}.rank"), "factors".into(), "codes alone".into());
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
            for (index, threshold) in layer.thresholds.iter().enumerate() {
                let Threshold {
                    mode, low_bit_fraction, ..
                } = threshold;
                let is_new = layer.thresholds[..index].iter().all(|other| other.mode != *mode);
                let is_name =
                    (1..=64).contains(&mode.len()) && mode.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
                if !(is_new && is_name && (0.0..=1.0).contains(low_bit_fraction)) {
                    let expected = "each mode once, with a share of 0 to 1".to_owned();
                    return wrong(
                        format!("{}: thresholds", layer.layer),
                        format!("{threshold:?}"),
                        expected,
                    );
                }
            }
            for (index, expert) in layer.experts.iter().enumerate() {
                let at = format!("{}, {}", layer.layer, expert.expert);
                if expert.expert.index() != index {
                    return wrong(at, expert.expert.to_string(), format!("expert {index}"));
                }
                let checked = match &expert.state {
                    State::Kept(record) => self.check_record(record, end),
                    State::Constant(record) => self.check_constant(record, end),
                    State::Dropped if self.dropped == DroppedMeaning::Novice => {
                        return wrong(at, "dropped".into(), "a constant: `dropped` is novice".into());
                    }
                    State::Dropped => Ok(end),
                };
                end = checked.map_err(|(key, found, expected)| ContainerError::Value {
                    file: file.to_owned(),
                    key: format!("{at}: {key}"),
                    found,
                    expected,
                })?;
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
        for (name, matrix) in parts {
            if let Some(factors) = &matrix.rank {
                factors
                    .check(matrix.format)
                    .map_err(|(found, expected)| (format!("{name}.rank"), found, expected))?;
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

    /// As [`check_record`](Self::check_record).
    fn check_constant(&self, record: &ConstantRecord, previous_end: u64) -> Result<u64, (String, String, String)> {
        let (from, length) = layout::constant_section(self.hidden);
        let bytes = from + length;
        let offset = layout::align_record(previous_end, bytes);
        for (key, found, expected) in [
            ("offset", record.offset, offset),
            ("bytes", record.bytes, bytes),
            ("section.offset", record.section.offset, from),
            ("section.bytes", record.section.bytes, length),
        ] {
            if found != expected {
                return Err((key.to_owned(), found.to_string(), expected.to_string()));
            }
        }
        Ok(offset + bytes)
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
