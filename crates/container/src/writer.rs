//! Writes a container layer by layer into a folder under construction; after each layer what stands is durable, and a
//! writer that died goes on from the layers that its owner remembers. Law: interrupted anywhere and resumed, the same
//! bytes. Not here: what to keep and at which width (`cotk-compress`), renaming the folder into place.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use cotk_quant::QuantError;
use cotk_quant::coded::CodedMatrix;
use cotk_quant::layout::{MatrixFormat, Placement, interleave_pair};
use cotk_run::files::{self, Op, fault_point};
use cotk_run::units::{ExpertId, LayerId};
use half::f16;

use crate::decision::{Decision, Healed, Threshold};
use crate::layout::{self, Holds, Layout, Part, Shape};
use crate::low_rank::{Factors, Role};
use crate::manifest::{
    Checksum, ConstantRecord, DroppedMeaning, EXPERTS, Expert, FORMAT, FileEntry, Layer, MANIFEST, Manifest, Matrix,
    Origin, Placed, Prefix, Record, Section, SourceModel, State, VERSION, Why,
};
use crate::record::{HEADER_BYTES, Header, Kind};
use crate::view::{ExpertView, MatrixView};
use crate::{ContainerError, Result};

/// An expert on its way into a record.
#[derive(Debug, Clone)]
pub struct CodedExpert {
    /// `[inner, hidden]`.
    pub gate: CodedMatrix,
    /// `[inner, hidden]`.
    pub up: CodedMatrix,
    /// `[hidden, inner]`.
    pub down: CodedMatrix,
    /// Of gate, up and down: factors beside the codes or, a product, in their place. The matrix itself then has a format,
    /// the zero points of its code and no planes.
    pub factors: [Option<Factors>; 3],
    /// What each prefix loses, narrowest first.
    pub prefixes: Vec<Prefix>,
}

impl CodedExpert {
    /// Codes alone, their prefixes not measured yet.
    pub fn new(gate: CodedMatrix, up: CodedMatrix, down: CodedMatrix) -> Self {
        Self {
            gate,
            up,
            down,
            factors: [const { None }; 3],
            prefixes: Vec::new(),
        }
    }

    /// Gate, up and down.
    pub fn formats(&self) -> [MatrixFormat; 3] {
        [self.gate.format, self.up.format, self.down.format]
    }

    /// As [`Container::expert`](crate::reader::Container::expert) would give it.
    pub fn view(&self, bits: u32) -> ExpertView<'_> {
        let [gate, up, down] = self.matrices().map(|(matrix, factors)| {
            let codes = || {
                let width = layout::prefix_at(&matrix.format, bits);
                matrix
                    .prefix(width)
                    .expect("one of its own prefixes, all planes are there")
            };
            match factors.as_ref().map(|factors| (factors.role, factors.prefixes())) {
                None => MatrixView::Codes(codes()),
                Some((Role::Correction, [left, right])) => MatrixView::Corrected {
                    codes: codes(),
                    left,
                    right,
                },
                Some((Role::Product, [left, right])) => MatrixView::Product { left, right },
            }
        });
        ExpertView { gate, up, down }
    }

    /// Bytes of its record, header included, before it is aligned.
    pub fn record_bytes(&self) -> u64 {
        Layout::of(self.shapes()).bytes
    }

    fn matrices(&self) -> [(&CodedMatrix, &Option<Factors>); 3] {
        let [gate, up, down] = &self.factors;
        [(&self.gate, gate), (&self.up, up), (&self.down, down)]
    }

    fn shapes(&self) -> [Shape; 3] {
        self.matrices().map(|(matrix, factors)| Shape {
            format: matrix.format,
            rank: factors.as_ref().map(Factors::low_rank),
        })
    }
}

/// What an expert answers with in the place of its weights: f16.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Constant {
    /// Little endian.
    bytes: Vec<u8>,
}

impl Constant {
    /// Rounds `values` `[hidden]`.
    ///
    /// # Errors
    /// [`QuantError::NotFinite`]: a value that is NaN, infinite or beyond f16.
    pub fn new(values: &[f32]) -> Result<Self, QuantError> {
        let halves = values.iter().map(|&value| f16::from_f32(value));
        if let Some(col) = halves.clone().position(|half| !half.is_finite()) {
            return Err(QuantError::NotFinite {
                row: 0,
                col,
                value: values[col],
            });
        }
        Ok(Self {
            bytes: halves.flat_map(f16::to_le_bytes).collect(),
        })
    }

    /// As [`Container::constant`](crate::reader::Container::constant) would give it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What was kept of the values, `[hidden]`.
    pub fn values(&self) -> Vec<f32> {
        constant_values(&self.bytes)
    }
}

/// The values of a constant's bytes.
pub fn constant_values(bytes: &[u8]) -> Vec<f32> {
    let halves = bytes.chunks_exact(size_of::<f16>());
    halves
        .map(|half| f16::from_le_bytes([half[0], half[1]]).to_f32())
        .collect()
}

/// What stands in an expert's place.
#[derive(Debug, Clone)]
pub enum NewState {
    Kept(Box<CodedExpert>),
    Constant(Constant),
    Dropped,
}

impl From<CodedExpert> for NewState {
    fn from(coded: CodedExpert) -> Self {
        Self::Kept(Box::new(coded))
    }
}

impl From<Option<CodedExpert>> for NewState {
    /// `None`: dropped.
    fn from(coded: Option<CodedExpert>) -> Self {
        coded.map_or(Self::Dropped, Self::from)
    }
}

/// What becomes of one expert of a layer.
#[derive(Debug, Clone)]
pub struct NewExpert {
    pub why: Why,
    pub decision: Option<Box<Decision>>,
    pub state: NewState,
}

impl NewExpert {
    /// Without more to say about it than its use.
    pub fn new(why: Why, state: impl Into<NewState>) -> Self {
        Self {
            why,
            decision: None,
            state: state.into(),
        }
    }

    /// The same with what decided.
    #[must_use]
    pub fn decided(mut self, decision: Decision) -> Self {
        self.decision = Some(Box::new(decision));
        self
    }
}

/// What becomes of a layer.
#[derive(Debug, Clone)]
pub struct NewLayer {
    pub layer: LayerId,
    /// Already in the experts.
    pub gain: f32,
    pub healed: Vec<Healed>,
    pub thresholds: Vec<Threshold>,
    /// In their original order.
    pub experts: Vec<NewExpert>,
}

/// What the manifest says besides layers and files.
#[derive(Debug, Clone)]
pub struct Head {
    pub source: SourceModel,
    pub config: serde_json::Value,
    pub recipe: Origin,
    pub little_bits: Option<u32>,
    pub dropped: DroppedMeaning,
    pub hidden: usize,
    /// Coded matrices of the dense part.
    pub dense: BTreeMap<String, Matrix>,
}

/// A container under construction.
#[derive(Debug)]
pub struct ContainerWriter {
    folder: PathBuf,
    path: PathBuf,
    file: std::fs::File,
    end: u64,
    layers: Vec<Layer>,
}

impl ContainerWriter {
    /// Goes on in `folder` after the `layers` that [`append_layer`](Self::append_layer) returned before; none to
    /// begin. What stands behind them in `experts.bin` is cut off.
    ///
    /// # Errors
    /// [`ContainerError::Length`] or [`ContainerError::Section`] when the remembered layers are not there whole.
    pub fn resume(folder: &Path, layers: Vec<Layer>) -> Result<Self> {
        let path = folder.join(EXPERTS);
        let fail = |action| cotk_run::Error::io(action, &path);
        fault_point(Op::Open).map_err(fail("open"))?;
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(fail("open"))?;
        let last = layers.iter().rev().find_map(|layer| {
            let mut experts = layer.experts.iter().rev();
            experts.find_map(|expert| Some((layer.layer, expert.expert, expert.state.place()?)))
        });
        let end = last.map_or(0, |(_, _, record)| record.offset + record.bytes);
        let found = file.metadata().map_err(fail("read"))?.len();
        if found < end {
            return Err(ContainerError::Length {
                file: path,
                found,
                expected: end,
            });
        }
        if let Some((layer, expert, record)) = last {
            check_written(&mut file, &path, layer, expert, &record)?;
        }
        file.set_len(end).map_err(fail("truncate"))?;
        file.seek(SeekFrom::Start(end)).map_err(fail("seek in"))?;
        Ok(Self {
            folder: folder.to_owned(),
            path,
            file,
            end,
            layers,
        })
    }

    /// Layers that are durable.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Appends the records of one layer, experts in their original order, and syncs them; `gain` is already in them. The
    /// returned entry is what its owner remembers for [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`ContainerError::Unwritable`] for matrices that do not fit each other; the file system's.
    pub fn append_layer(&mut self, layer: LayerId, gain: f32, experts: Vec<NewExpert>) -> Result<Layer> {
        self.append(NewLayer {
            layer,
            gain,
            healed: Vec::new(),
            thresholds: Vec::new(),
            experts,
        })
    }

    /// [`append_layer`](Self::append_layer) with more to say.
    ///
    /// # Errors
    /// As [`append_layer`](Self::append_layer).
    pub fn append(&mut self, new: NewLayer) -> Result<Layer> {
        let mut entry = Layer {
            layer: new.layer,
            gain: new.gain,
            healed: new.healed,
            thresholds: new.thresholds,
            experts: Vec::with_capacity(new.experts.len()),
        };
        for (expert, new) in (0..).map(ExpertId).zip(new.experts) {
            let state = match &new.state {
                NewState::Dropped => State::Dropped,
                NewState::Kept(coded) => {
                    let (bytes, record) = encode_record(entry.layer, expert, coded, self.end)?;
                    self.append_record(record.offset, &bytes)?;
                    State::Kept(Box::new(record))
                }
                NewState::Constant(constant) => {
                    let (bytes, record) = encode_constant(entry.layer, expert, constant, self.end);
                    self.append_record(record.offset, &bytes)?;
                    State::Constant(Box::new(record))
                }
            };
            entry.experts.push(Expert {
                expert,
                state,
                why: new.why,
                decision: new.decision,
            });
        }
        fault_point(Op::Sync)
            .and_then(|()| self.file.sync_data())
            .map_err(cotk_run::Error::io("sync", &self.path))?;
        self.layers.push(entry.clone());
        Ok(entry)
    }

    /// Writes the manifest over the layers and `extra` files (names in the folder, all there and final).
    ///
    /// # Errors
    /// The file system's; [`ContainerError::Value`] when what was written would not be read back.
    pub fn finish(self, head: Head, extra: &[&str]) -> Result<Manifest> {
        drop(self.file);
        let mut entries = BTreeMap::new();
        for name in extra.iter().copied().chain([EXPERTS]) {
            let path = self.folder.join(name);
            let bytes = files::open(&path)?
                .metadata()
                .map_err(cotk_run::Error::io("read", &path))?
                .len();
            let xxh3 = Checksum(files::checksum_file(&path)?);
            entries.insert(name.to_owned(), FileEntry { bytes, xxh3 });
        }
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            source: head.source,
            config: head.config,
            recipe: head.recipe,
            little_bits: head.little_bits,
            dropped: head.dropped,
            hidden: head.hidden,
            dense: head.dense,
            layers: self.layers,
            files: entries,
            checksum: Checksum(0),
        };
        let path = self.folder.join(MANIFEST);
        let bytes = manifest.to_bytes();
        let manifest = Manifest::parse(&bytes, &path)?;
        files::write_atomic(&path, &bytes)?;
        Ok(manifest)
    }

    fn append_record(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let padding = vec![0u8; usize::try_from(offset - self.end).expect("less than a page")];
        fault_point(Op::Write)
            .and_then(|()| self.file.write_all(&padding))
            .and_then(|()| self.file.write_all(bytes))
            .map_err(cotk_run::Error::io("write", &self.path))?;
        self.end = offset + bytes.len() as u64;
        Ok(())
    }
}

/// Header and section of a constant that follows a record ending at `previous_end`, and what the manifest says. A vector of
/// another length than the model's is refused with the manifest.
fn encode_constant(
    layer: LayerId,
    expert: ExpertId,
    constant: &Constant,
    previous_end: u64,
) -> (Vec<u8>, ConstantRecord) {
    let section = Section {
        offset: HEADER_BYTES as u64,
        bytes: constant.bytes.len() as u64,
        xxh3: Checksum(files::checksum(&constant.bytes)),
    };
    let bytes = section.offset + section.bytes;
    let header = Header {
        kind: Kind::Constant,
        layer,
        expert,
        bytes,
        sections: vec![section],
    }
    .encode();
    let record = ConstantRecord {
        offset: layout::align_record(previous_end, bytes),
        bytes,
        header: Header::own_checksum(&header),
        section,
    };
    ([&header[..], &constant.bytes].concat(), record)
}

/// Header and sections of one expert that follows a record ending at `previous_end`, and what the manifest says.
fn encode_record(
    layer: LayerId,
    expert: ExpertId,
    coded: &CodedExpert,
    previous_end: u64,
) -> Result<(Vec<u8>, Record)> {
    let unwritable = |what: &str, found: String, expected: String| ContainerError::Unwritable {
        layer,
        expert,
        what: what.to_owned(),
        found,
        expected,
    };
    let (gate, up, down) = (&coded.gate, &coded.up, &coded.down);
    let shape = |m: &CodedMatrix| (m.format.rows(), m.format.cols());
    let (inner, hidden) = shape(gate);
    for (what, matrix, expected) in [("up", up, (inner, hidden)), ("down", down, (hidden, inner))] {
        if shape(matrix) != expected {
            let found = format!("{:?}", shape(matrix));
            return Err(unwritable(what, found, format!("{expected:?}")));
        }
    }
    for ((what, matrix), factors) in [("gate", gate), ("up", up), ("down", down)]
        .into_iter()
        .zip(&coded.factors)
    {
        let Some(factors) = factors else { continue };
        let rank = factors.low_rank();
        rank.check(matrix.format)
            .map_err(|(found, expected)| unwritable(&format!("rank of {what}"), found, expected))?;
        for factor in [&factors.left, &factors.right] {
            let code = factor.format.code();
            let expected = [code.default_zero_point(code.full())];
            if factor.zero_points != expected {
                let found = format!("zero points {:?}", factor.zero_points);
                return Err(unwritable(&format!("rank of {what}"), found, format!("{expected:?}")));
            }
        }
    }
    let expected = layout::prefixes(coded.formats());
    let found: Vec<u32> = coded.prefixes.iter().map(|p| p.bits).collect();
    if found != expected {
        return Err(unwritable("prefixes", format!("{found:?}"), format!("{expected:?}")));
    }
    let layout = Layout::of(coded.shapes());
    let mut bytes = vec![0u8; usize::try_from(layout.bytes).expect("a record fits memory")];
    for (plane, section) in layout.sections.iter().enumerate() {
        for piece in section.pieces.iter().filter(|p| p.placement != Placement::PairSecond) {
            let (own, factors) = match piece.part {
                Part::Gate => (gate, &coded.factors[0]),
                Part::Up => (up, &coded.factors[1]),
                Part::Down => (down, &coded.factors[2]),
            };
            let plane_of = |matrix: &CodedMatrix, plane: usize| {
                let found = matrix.planes.get(plane).cloned();
                let (found, expected) = (found, format!("{} planes", matrix.format.code().planes()));
                found.ok_or_else(|| unwritable("planes", matrix.planes.len().to_string(), expected))
            };
            let codes = match (piece.holds, piece.placement) {
                (Holds::Left, _) => plane_of(&factors.as_ref().expect("laid out").left, 0)?,
                (Holds::Right, _) => plane_of(&factors.as_ref().expect("laid out").right, 0)?,
                (Holds::Codes, Placement::Alone) => plane_of(own, plane)?,
                (Holds::Codes, _) => {
                    interleave_pair(&gate.format, plane, &plane_of(gate, plane)?, &plane_of(up, plane)?)
                        .map_err(|e| unwritable("planes", e.to_string(), "planes of the format's length".into()))?
                }
            };
            if codes.len() as u64 != piece.bytes {
                let expected = format!("{} bytes", piece.bytes);
                return Err(unwritable("plane", format!("{} bytes", codes.len()), expected));
            }
            let at = usize::try_from(piece.offset).expect("inside the record");
            bytes[at..at + codes.len()].copy_from_slice(&codes);
        }
    }
    let sections: Vec<Section> = layout
        .sections
        .iter()
        .map(|s| {
            let at = usize::try_from(s.offset).expect("inside the record");
            Section {
                offset: s.offset,
                bytes: s.bytes,
                xxh3: Checksum(files::checksum(
                    &bytes[at..][..usize::try_from(s.bytes).expect("inside")],
                )),
            }
        })
        .collect();
    let header = Header {
        kind: Kind::Coded,
        layer,
        expert,
        bytes: layout.bytes,
        sections: sections.clone(),
    }
    .encode();
    bytes[..header.len()].copy_from_slice(&header);
    let matrix = |m: &CodedMatrix, factors: &Option<Factors>| Matrix {
        rank: factors.as_ref().map(Factors::low_rank),
        ..Matrix::new(m.format, m.zero_points.clone())
    };
    let record = Record {
        offset: layout::align_record(previous_end, layout.bytes),
        bytes: layout.bytes,
        header: Header::own_checksum(&header),
        sections,
        gate: matrix(gate, &coded.factors[0]),
        up: matrix(up, &coded.factors[1]),
        down: matrix(down, &coded.factors[2]),
        prefixes: coded.prefixes.clone(),
    };
    Ok((bytes, record))
}

/// Reads the last remembered record back: a resumed file that lost bytes is refused, not continued.
fn check_written(
    file: &mut std::fs::File,
    path: &Path,
    layer: LayerId,
    expert: ExpertId,
    record: &Placed<'_>,
) -> Result<()> {
    use std::io::Read;
    for (index, section) in record.sections.iter().enumerate() {
        let fail = |source| cotk_run::Error::io("read", path)(source);
        fault_point(Op::Read).map_err(fail)?;
        file.seek(SeekFrom::Start(record.offset + section.offset))
            .map_err(fail)?;
        let mut bytes = Vec::new();
        file.take(section.bytes).read_to_end(&mut bytes).map_err(fail)?;
        let found = files::checksum(&bytes);
        if found != section.xxh3.0 {
            return Err(ContainerError::Section {
                file: path.to_owned(),
                layer,
                expert,
                section: index,
                found,
                expected: section.xxh3.0,
            });
        }
    }
    Ok(())
}
