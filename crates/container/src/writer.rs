//! Writes a container layer by layer into a folder under construction; after each layer what stands is durable, and a
//! writer that died goes on from the layers that its owner remembers. Law: interrupted anywhere and resumed, the same
//! bytes. Not here: what to keep and at which width (`cotk-compress`), renaming the folder into place.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use cotk_quant::coded::CodedMatrix;
use cotk_quant::layout::{Placement, interleave_pair};
use cotk_run::files::{self, Op, fault_point};
use cotk_run::units::{ExpertId, LayerId};

use crate::layout::{self, Layout, Part};
use crate::manifest::{
    Checksum, DroppedMeaning, EXPERTS, Expert, FORMAT, FileEntry, Layer, MANIFEST, Manifest, Matrix, Origin, Prefix,
    Record, Section, SourceModel, State, VERSION, Why,
};
use crate::record::Header;
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
    /// What each prefix loses, narrowest first.
    pub prefixes: Vec<Prefix>,
}

/// What becomes of one expert of a layer.
#[derive(Debug, Clone)]
pub struct NewExpert {
    pub why: Why,
    /// `None`: dropped.
    pub kept: Option<CodedExpert>,
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
            layer.experts.iter().rev().find_map(|expert| match &expert.state {
                State::Kept(record) => Some((layer.layer, expert.expert, record.as_ref())),
                State::Dropped => None,
            })
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
            check_written(&mut file, &path, layer, expert, record)?;
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
        let mut entry = Layer {
            layer,
            gain,
            experts: Vec::with_capacity(experts.len()),
        };
        for (id, new) in (0..).map(ExpertId).zip(experts) {
            let state = match &new.kept {
                None => State::Dropped,
                Some(coded) => State::Kept(Box::new(self.append_record(layer, id, coded)?)),
            };
            entry.experts.push(Expert {
                expert: id,
                state,
                why: new.why,
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

    fn append_record(&mut self, layer: LayerId, expert: ExpertId, coded: &CodedExpert) -> Result<Record> {
        let (bytes, record) = encode_record(layer, expert, coded, self.end)?;
        let padding = vec![0u8; usize::try_from(record.offset - self.end).expect("less than a page")];
        fault_point(Op::Write)
            .and_then(|()| self.file.write_all(&padding))
            .and_then(|()| self.file.write_all(&bytes))
            .map_err(cotk_run::Error::io("write", &self.path))?;
        self.end = record.offset + record.bytes;
        Ok(record)
    }
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
    let formats = [gate.format, up.format, down.format];
    let expected = layout::prefixes(formats);
    let found: Vec<u32> = coded.prefixes.iter().map(|p| p.bits).collect();
    if found != expected {
        return Err(unwritable("prefixes", format!("{found:?}"), format!("{expected:?}")));
    }
    let layout = Layout::of(gate.format, up.format, down.format);
    let mut bytes = vec![0u8; usize::try_from(layout.bytes).expect("a record fits memory")];
    for (plane, section) in layout.sections.iter().enumerate() {
        for piece in section.pieces.iter().filter(|p| p.placement != Placement::PairSecond) {
            let own = match piece.part {
                Part::Gate => gate,
                Part::Up => up,
                Part::Down => down,
            };
            let codes = match piece.placement {
                Placement::Alone => own.planes[plane].clone(),
                _ => interleave_pair(&gate.format, plane, &gate.planes[plane], &up.planes[plane])
                    .map_err(|e| unwritable("planes", e.to_string(), "planes of the format's length".into()))?,
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
        layer,
        expert,
        bytes: layout.bytes,
        sections: sections.clone(),
    }
    .encode();
    bytes[..header.len()].copy_from_slice(&header);
    let matrix = |m: &CodedMatrix| Matrix {
        format: m.format,
        zero_points: m.zero_points.clone(),
    };
    let record = Record {
        offset: layout::align_record(previous_end, layout.bytes),
        bytes: layout.bytes,
        header: Header::own_checksum(&header),
        sections,
        gate: matrix(gate),
        up: matrix(up),
        down: matrix(down),
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
    record: &Record,
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
