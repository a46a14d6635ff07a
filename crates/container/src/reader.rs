//! Opens a container: maps `experts.bin`, holds every file to the manifest. Law: a damaged byte gives an error that
//! names it, before it is used, never a panic; what is handed out was checked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use cotk_quant::coded::{CodedView, Prefix};
use cotk_run::files;
use cotk_run::units::{ExpertId, LayerId};
use memmap2::Mmap;

use crate::finite::{bad_half, bad_scale};
use crate::layout::{Holds, Layout, Part, prefix_at};
use crate::low_rank;
use crate::manifest::{EXPERTS, Layer, MANIFEST, MANIFEST_LIMIT_BYTES, Manifest, Placed, Record, State};
use crate::record::{HEADER_BYTES, Header, SECTIONS_LIMIT};
use crate::view::{ExpertView, MatrixView};
use crate::{ContainerError, Result};

/// An open container. Cheap to share: all methods take `&self`.
#[derive(Debug)]
pub struct Container {
    folder: PathBuf,
    manifest: Manifest,
    experts: Mmap,
    /// In file order.
    slots: Vec<Slot>,
    /// (layer, expert) → index into `slots`.
    index: HashMap<(LayerId, ExpertId), usize>,
}

/// Where one record lies, and which of its sections were found whole.
#[derive(Debug)]
struct Slot {
    layer: LayerId,
    expert: ExpertId,
    /// `None`: a constant, one section and nothing to look for in it.
    layout: Option<Layout>,
    /// Positions of the record in the manifest's lists.
    at: (usize, usize),
    /// Bit i: section i was checked.
    checked: AtomicU8,
    /// Bit i: all scales of [`Part`] i are numbers, those of its factors too.
    finite: AtomicU8,
}

/// Whether a folder claims to be a container.
pub fn is_container(folder: &Path) -> bool {
    folder.join(MANIFEST).is_file()
}

impl Container {
    /// Opens a container: manifest, sizes of all files, checksums of all but `experts.bin`, all record headers.
    /// Sections are checked before their first use.
    ///
    /// # Errors
    /// Whatever is missing, damaged or contradicts the manifest.
    pub fn open(folder: &Path) -> Result<Self> {
        let manifest_path = folder.join(MANIFEST);
        let manifest = Manifest::parse(&files::read(&manifest_path, MANIFEST_LIMIT_BYTES)?, &manifest_path)?;
        for (name, entry) in &manifest.files {
            let path = folder.join(name);
            let found = files::open(&path)?
                .metadata()
                .map_err(cotk_run::Error::io("read", &path))?
                .len();
            if found != entry.bytes {
                return Err(ContainerError::Length {
                    file: path,
                    found,
                    expected: entry.bytes,
                });
            }
            if name != EXPERTS {
                check_file(&path, entry.xxh3.0)?;
            }
        }
        let experts = map(&folder.join(EXPERTS), manifest.files[EXPERTS].bytes)?;
        let mut slots = Vec::new();
        let mut index = HashMap::new();
        for (l, layer) in manifest.layers.iter().enumerate() {
            for (e, expert) in layer.experts.iter().enumerate() {
                let layout = match &expert.state {
                    State::Kept(record) => Some(record.layout()),
                    State::Constant(_) => None,
                    State::Dropped => continue,
                };
                index.insert((layer.layer, expert.expert), slots.len());
                slots.push(Slot {
                    layer: layer.layer,
                    expert: expert.expert,
                    layout,
                    at: (l, e),
                    checked: AtomicU8::new(0),
                    finite: AtomicU8::new(0),
                });
            }
        }
        let container = Self {
            folder: folder.to_owned(),
            manifest,
            experts,
            slots,
            index,
        };
        for slot in &container.slots {
            container.check_header(slot)?;
        }
        Ok(container)
    }

    /// What it holds and why.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// One layer's entry; `None` for a dense layer or one that does not exist.
    pub fn layer(&self, layer: LayerId) -> Option<&Layer> {
        self.manifest.layers.iter().find(|l| l.layer == layer)
    }

    /// An expert's widest width; `None`: dropped, a constant, or no such expert.
    pub fn stored_bits(&self, layer: LayerId, expert: ExpertId) -> Option<u32> {
        let slot = &self.slots[*self.index.get(&(layer, expert))?];
        let (record, _) = self.weights(slot)?;
        record.prefixes.last().map(|prefix| prefix.bits)
    }

    /// One expert, each matrix at its widest prefix of at most `bits` (its narrowest if none is). `None`: dropped, a
    /// constant, or no such expert.
    ///
    /// # Errors
    /// [`ContainerError::Section`] when a section that this width needs is damaged, [`ContainerError::Scale`] when it was
    /// written with a scale that is no number; again at every call.
    pub fn expert(&self, layer: LayerId, expert: ExpertId, bits: u32) -> Result<Option<ExpertView<'_>>> {
        let Some(slot) = self.index.get(&(layer, expert)).map(|&i| &self.slots[i]) else {
            return Ok(None);
        };
        let Some((record, layout)) = self.weights(slot) else {
            return Ok(None);
        };
        let [gate, up, down] = [Part::Gate, Part::Up, Part::Down].map(|part| {
            let matrix = part.of(record);
            let width = prefix_at(&matrix.format, bits);
            let planes = matrix.format.code().prefixes().iter().position(|&b| b == width);
            let count = planes.expect("chosen from this code's prefixes") + 1;
            self.matrix(slot, (record, layout), part, count)
        });
        Ok(Some(ExpertView {
            gate: gate?,
            up: up?,
            down: down?,
        }))
    }

    /// What an expert answers with whatever it is asked: `hidden` f16, little endian. `None`: it is no constant.
    ///
    /// # Errors
    /// [`ContainerError::Section`] when it is damaged, [`ContainerError::Scale`] when it holds what is no number; again at
    /// every call.
    pub fn constant(&self, layer: LayerId, expert: ExpertId) -> Result<Option<&[u8]>> {
        let Some(slot) = self.index.get(&(layer, expert)).map(|&i| &self.slots[i]) else {
            return Ok(None);
        };
        if slot.layout.is_some() {
            return Ok(None);
        }
        self.check_section(slot, 0)?;
        let record = self.placed(slot);
        let section = record.sections[0];
        let bytes = self.bytes(record.offset + section.offset, section.bytes);
        match bad_half(bytes) {
            None => Ok(Some(bytes)),
            Some((row, found)) => Err(self.not_a_number(slot, "constant", row, found)),
        }
    }

    /// Checks every byte of the container. Reads all of it.
    ///
    /// # Errors
    /// The first damage.
    pub fn verify(&self) -> Result<()> {
        for slot in &self.slots {
            for section in 0..self.placed(slot).sections.len() {
                self.check_section(slot, section)?;
            }
            // And the scales.
            self.expert(slot.layer, slot.expert, 1)?;
            self.constant(slot.layer, slot.expert)?;
        }
        // The padding between records, too.
        check_file(&self.folder.join(EXPERTS), self.manifest.files[EXPERTS].xxh3.0)
    }

    /// The first `count` planes of one matrix and its factors, their sections checked.
    fn matrix(
        &self,
        slot: &Slot,
        (record, layout): (&Record, &Layout),
        part: Part,
        count: usize,
    ) -> Result<MatrixView<'_>> {
        let matrix = part.of(record);
        let lies = |section: usize, holds: Holds| {
            let pieces = &layout.sections[section].pieces;
            let piece = pieces.iter().find(|p| (p.part, p.holds) == (part, holds));
            let piece = piece.expect("the gate counted planes and factors");
            (self.bytes(record.offset + piece.offset, piece.bytes), piece.placement)
        };
        // Factors, and at least one plane of a matrix without them.
        self.check_section(slot, 0)?;
        let factors = matrix.rank.map(|rank| {
            let factor = |holds, format| low_rank::factor(format, lies(0, holds).0);
            (factor(Holds::Left, rank.left), factor(Holds::Right, rank.right))
        });
        if let (Some((left, right)), false) = (factors, matrix.shape().has_codes()) {
            self.check_scales(slot, part, [Some(&left), Some(&right), None])?;
            return Ok(MatrixView::Product { left, right });
        }
        let codes = {
            let mut planes: [&[u8]; SECTIONS_LIMIT] = [&[]; SECTIONS_LIMIT];
            let mut placement = Default::default();
            for (plane, into) in planes.iter_mut().enumerate().take(count) {
                self.check_section(slot, plane)?;
                (*into, placement) = lies(plane, Holds::Codes);
            }
            let width = matrix.format.code().prefixes()[count - 1];
            let view = CodedView::try_new(matrix.format, &planes[..count], &matrix.zero_points, placement)
                .expect("lengths and zero points passed the manifest's gate");
            view.prefix(width).expect("its planes were just given")
        };
        let (left, right) = factors.as_ref().map(|(left, right)| (left, right)).unzip();
        self.check_scales(slot, part, [left, right, Some(&codes)])?;
        Ok(match factors {
            None => MatrixView::Codes(codes),
            Some((left, right)) => MatrixView::Corrected { codes, left, right },
        })
    }

    fn state(&self, slot: &Slot) -> &State {
        &self.manifest.layers[slot.at.0].experts[slot.at.1].state
    }

    fn placed(&self, slot: &Slot) -> Placed<'_> {
        self.state(slot).place().expect("only experts with records have slots")
    }

    /// `None`: a constant.
    fn weights<'a>(&'a self, slot: &'a Slot) -> Option<(&'a Record, &'a Layout)> {
        match (self.state(slot), &slot.layout) {
            (State::Kept(record), Some(layout)) => Some((record, layout)),
            _ => None,
        }
    }

    /// Inside the map: the gate placed every record, `open` compared the lengths.
    fn bytes(&self, offset: u64, bytes: u64) -> &[u8] {
        let at = usize::try_from(offset).expect("inside the map");
        &self.experts[at..at + usize::try_from(bytes).expect("inside the map")]
    }

    fn check_header(&self, slot: &Slot) -> Result<()> {
        let record = self.placed(slot);
        let fail = |what, found, expected| ContainerError::Header {
            file: self.folder.join(EXPERTS),
            layer: slot.layer,
            expert: slot.expert,
            what,
            found,
            expected,
        };
        let bytes: &[u8; HEADER_BYTES] = self
            .bytes(record.offset, HEADER_BYTES as u64)
            .try_into()
            .expect("that many bytes");
        let header = Header::decode(bytes).map_err(|(what, found, expected)| fail(what, found, expected))?;
        let expected = Header {
            kind: record.kind,
            layer: slot.layer,
            expert: slot.expert,
            bytes: record.bytes,
            sections: record.sections.to_vec(),
        };
        if header != expected {
            return Err(fail("content", format!("{header:?}"), format!("{expected:?}")));
        }
        let found = Header::own_checksum(bytes);
        if found != record.header {
            let text = |c: crate::manifest::Checksum| format!("{:016x}", c.0);
            return Err(fail("checksum", text(found), text(record.header)));
        }
        Ok(())
    }

    /// Holds all scales of one matrix to be numbers, once: right after its bytes were held to their checksum.
    fn check_scales(&self, slot: &Slot, part: Part, of: [Option<&Prefix<'_>>; 3]) -> Result<()> {
        let bit = 1u8 << part as u8;
        // Scales lie in the lowest planes, so all widths have the same. Two threads may both check.
        if slot.finite.load(Ordering::Acquire) & bit != 0 {
            return Ok(());
        }
        let names = ["left factor", "right factor", "matrix"];
        for (name, codes) in names.into_iter().zip(of) {
            if let Some(bad) = codes.and_then(bad_scale) {
                let part = match part {
                    Part::Gate => "gate",
                    Part::Up => "up",
                    Part::Down => "down",
                };
                let what = format!("{part} {name}");
                return Err(self.not_a_number(slot, &what, bad.row, bad.found));
            }
        }
        slot.finite.fetch_or(bit, Ordering::Release);
        Ok(())
    }

    fn not_a_number(&self, slot: &Slot, what: &str, row: usize, found: f32) -> ContainerError {
        ContainerError::Scale {
            file: self.folder.join(EXPERTS),
            layer: slot.layer,
            expert: slot.expert,
            what: what.to_owned(),
            row,
            found,
        }
    }

    fn check_section(&self, slot: &Slot, section: usize) -> Result<()> {
        let bit = 1u8 << section;
        // Two threads may both check: the answer is the same.
        if slot.checked.load(Ordering::Acquire) & bit != 0 {
            return Ok(());
        }
        let record = self.placed(slot);
        let entry = record.sections[section];
        let found = files::checksum(self.bytes(record.offset + entry.offset, entry.bytes));
        if found != entry.xxh3.0 {
            return Err(ContainerError::Section {
                file: self.folder.join(EXPERTS),
                layer: slot.layer,
                expert: slot.expert,
                section,
                found,
                expected: entry.xxh3.0,
            });
        }
        slot.checked.fetch_or(bit, Ordering::Release);
        Ok(())
    }
}

fn check_file(path: &Path, expected: u64) -> Result<()> {
    let found = files::checksum_file(path)?;
    if found == expected {
        return Ok(());
    }
    Err(ContainerError::Checksum {
        file: path.to_owned(),
        found,
        expected,
    })
}

fn map(path: &Path, expected: u64) -> Result<Mmap> {
    let file = files::open(path)?;
    // SAFETY: the map is read-only and nobody of ours writes to a finished container (writers rename whole folders into
    // place). A stranger who truncates the file under us costs a SIGBUS, as with every mapped checkpoint.
    let map = unsafe { Mmap::map(&file) }.map_err(cotk_run::Error::io("map", path))?;
    if map.len() as u64 != expected {
        return Err(ContainerError::Length {
            file: path.to_owned(),
            found: map.len() as u64,
            expected,
        });
    }
    Ok(map)
}
