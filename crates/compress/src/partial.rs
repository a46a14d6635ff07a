//! `OUT.partial/`: an output under construction beside OUT. Holds `begin.json` (of which recipe and inputs), the journal,
//! hidden states, and `out/`, which becomes OUT. Law: killed anywhere, the same command goes on to the same bytes;
//! another recipe or input is refused, both shown; when OUT stands, nothing is left beside it.

use std::path::{Path, PathBuf};

use cotk_container::manifest::{Checksum, Layer};
use cotk_run::Error;
use cotk_run::files;
use cotk_run::folder::FolderLock;
use cotk_run::journal::Journal;
use cotk_run::units::LayerId;
use serde::{Deserialize, Serialize};

use crate::attention::NarrowedAttention;
use crate::contest::budgets::Standings;
use crate::contest::table::Contested;
use crate::decide::Measured;
use crate::joint::code::HessianNote;
use crate::joint::offers::Offered;
use crate::joint::points::Tried;
use crate::joint::sensitivity::KindSensitivity;
use crate::layer::Usage;
use crate::prune::compare::{Comparison, Judged};
use crate::prune::plan::{Pruned, Sensitivity};
use crate::quality::Quality;
use crate::report::Report;
use crate::shrink::judge::ShrinkSensitivity;
use crate::shrink::survey::Shrunk;
use crate::{CompressError, Result};

const BEGIN_LIMIT_BYTES: u64 = 1 << 20;

/// What an unfinished output was begun from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Of the resolved recipe.
    pub recipe: Checksum,
    /// Of model, calibration text and evaluation text.
    pub inputs: Checksum,
}

/// One finished step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Entry {
    Measured(MeasuredLayer),
    Sensitivity(Sensitivity),
    Kinds(KindSensitivity),
    Tried(Tried),
    Attention(Box<NarrowedAttention>),
    Pruned(Box<Pruned>),
    Judged(Box<Judged>),
    Shrunk(Box<Shrunk>),
    ShrinkSensitivity(Box<ShrinkSensitivity>),
    /// A row of a contest.
    Contested(Box<Contested>),
    /// As `Finished`, of a comparison.
    Compared(Box<Comparison>),
    /// As `Finished`, of a contest.
    Stood(Box<Standings>),
    Built(Box<BuiltLayer>),
    Scored(Quality),
    /// Everything stands in `out/`; what is left is to rename it.
    Finished(Box<Report>),
}

impl Entry {
    fn measured(&self) -> Option<&MeasuredLayer> {
        match self {
            Self::Measured(layer) => Some(layer),
            _ => None,
        }
    }

    fn built(&self) -> Option<&BuiltLayer> {
        match self {
            Self::Built(layer) => Some(layer),
            _ => None,
        }
    }

    fn scored(&self) -> Option<&Quality> {
        match self {
            Self::Scored(quality) => Some(quality),
            _ => None,
        }
    }
}

/// A layer of the first pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeasuredLayer {
    /// Counting dense layers.
    pub layer: usize,
    /// `None`: a dense layer.
    pub found: Option<Measured>,
    /// Where `[compress.joint]` chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offered: Option<Box<Offered>>,
    /// Of the states that enter the next layer.
    pub states: Checksum,
}

/// A layer of the second pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BuiltLayer {
    /// Counting dense layers.
    pub layer: usize,
    /// `None`: a dense layer.
    pub moe: Option<BuiltMoe>,
    /// Of the states that enter the next layer: calibration, teacher, student.
    pub states: [Checksum; 3],
}

/// What was written for a MoE layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BuiltMoe {
    pub entry: Layer,
    pub usage: Usage,
    /// ‖student − teacher‖ / ‖teacher‖ of the experts' mixed output, on the student's inputs.
    pub relative_error: f64,
    /// Of the router's rows, where they were fitted anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<Checksum>,
    /// Of kept experts, where codes were chosen under Hessians.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hessians: Vec<HessianNote>,
}

/// The folder, locked, and what is finished in it.
#[derive(Debug)]
pub struct Partial {
    folder: PathBuf,
    journal: Journal<Entry>,
    /// What an earlier process finished.
    pub entries: Vec<Entry>,
    _lock: FolderLock,
}

/// What a command finds when it begins.
#[derive(Debug)]
pub enum Begun {
    /// Work to do, perhaps less than all of it.
    Working(Box<Partial>),
    /// An earlier process had finished all but the last clean-up.
    Finished(Box<Report>),
    /// The same of a comparison.
    Compared(Box<Comparison>),
    /// The same of a contest.
    Stood(Box<Standings>),
}

impl Partial {
    /// Begins OUT, or goes on with it.
    ///
    /// # Errors
    /// [`CompressError::OutputExists`]; [`Error::OtherInput`] with both hashes; [`Error::Locked`].
    pub fn begin(out: &Path, identity: &Identity) -> Result<Begun> {
        let folder = partial_path(out);
        let exists = |folder: &Path| CompressError::OutputExists {
            folder: folder.to_owned(),
        };
        let begin = folder.join("begin.json");
        if !begin.is_file() {
            if out.exists() {
                return Err(exists(out));
            }
            // Without `begin.json` only a folder that never held anything of value may be ours.
            let is_empty = |folder: &Path| {
                let mut names = std::fs::read_dir(folder).map_err(Error::io("list", folder))?;
                let is_scrap = |e: std::io::Result<std::fs::DirEntry>| {
                    e.is_ok_and(|e| e.file_name() == ".lock" || is_temporary(&e.file_name().to_string_lossy()))
                };
                Ok::<bool, Error>(names.all(is_scrap))
            };
            if folder.exists() && !(folder.is_dir() && is_empty(&folder)?) {
                return Err(exists(&folder));
            }
            files::create_folder(&folder)?;
        }
        let lock = FolderLock::take(&folder)?;
        if begin.is_file() {
            refuse_other(&begin, identity)?;
        } else {
            let text = serde_json::to_vec(identity).expect("two strings have a JSON form");
            files::write_atomic(&begin, &text)?;
        }
        let (journal, entries) = Journal::open(folder.join("journal.jsonl"))?;
        let partial = Self {
            folder,
            journal,
            entries,
            _lock: lock,
        };
        if let Some(Entry::Finished(report)) = partial.entries.last() {
            let report = report.clone();
            partial.publish(out)?;
            return Ok(Begun::Finished(report));
        }
        if let Some(Entry::Compared(comparison)) = partial.entries.last() {
            let comparison = comparison.clone();
            partial.publish(out)?;
            return Ok(Begun::Compared(comparison));
        }
        if let Some(Entry::Stood(standings)) = partial.entries.last() {
            let standings = standings.clone();
            partial.publish(out)?;
            return Ok(Begun::Stood(standings));
        }
        if out.exists() {
            return Err(exists(out));
        }
        for folder in [partial.states(), partial.out()] {
            files::create_folder(&folder)?;
        }
        partial.sweep_temporaries()?;
        Ok(Begun::Working(Box::new(partial)))
    }

    /// Hidden states.
    pub fn states(&self) -> PathBuf {
        self.folder.join("states")
    }

    /// What becomes OUT.
    pub fn out(&self) -> PathBuf {
        self.folder.join("out")
    }

    /// Whether anything was finished before.
    pub fn is_resumed(&self) -> bool {
        !self.entries.is_empty()
    }

    /// Forgets all finished steps: for a machine that went down and lost what they wrote.
    ///
    /// # Errors
    /// The file system's.
    pub fn restart(&mut self) -> Result<()> {
        let path = self.folder.join("journal.jsonl");
        files::write_atomic(&path, b"")?;
        (self.journal, self.entries) = Journal::open(&path)?;
        Ok(())
    }

    /// A step is finished and durable.
    ///
    /// # Errors
    /// The file system's.
    pub fn finished(&mut self, entry: Entry) -> Result<()> {
        self.journal.append(&entry)?;
        self.entries.push(entry);
        Ok(())
    }

    /// The first pass as far as it got.
    pub fn measured(&self) -> Vec<&MeasuredLayer> {
        self.entries.iter().filter_map(Entry::measured).collect()
    }

    /// The masks, if they are chosen.
    pub fn pruned(&self) -> Option<&Pruned> {
        self.entries.iter().find_map(|entry| match entry {
            Entry::Pruned(pruned) => Some(&**pruned),
            _ => None,
        })
    }

    /// What became of attention, if it was made narrower.
    pub fn attention(&self) -> Option<&NarrowedAttention> {
        self.entries.iter().find_map(|entry| match entry {
            Entry::Attention(found) => Some(&**found),
            _ => None,
        })
    }

    /// What layers and matrix kinds weigh at the model's end, if it was measured.
    pub fn kind_sensitivity(&self) -> Option<&KindSensitivity> {
        self.entries.iter().find_map(|entry| match entry {
            Entry::Kinds(found) => Some(found),
            _ => None,
        })
    }

    /// Allocations that were measured end to end.
    pub fn tried(&self) -> Vec<Tried> {
        let tried = |entry: &Entry| match entry {
            Entry::Tried(tried) => Some(*tried),
            _ => None,
        };
        self.entries.iter().filter_map(tried).collect()
    }

    /// Rows of a comparison, as far as it got.
    pub fn judged(&self) -> Vec<Judged> {
        let judged = |entry: &Entry| match entry {
            Entry::Judged(judged) => Some((**judged).clone()),
            _ => None,
        };
        self.entries.iter().filter_map(judged).collect()
    }

    /// Rows of a contest, as far as it got.
    pub fn contested(&self) -> Vec<Contested> {
        let contested = |entry: &Entry| match entry {
            Entry::Contested(contested) => Some((**contested).clone()),
            _ => None,
        };
        self.entries.iter().filter_map(contested).collect()
    }

    /// The second pass as far as it got.
    pub fn built(&self) -> Vec<&BuiltLayer> {
        self.entries.iter().filter_map(Entry::built).collect()
    }

    /// The quality measurement, if it was made.
    pub fn scored(&self) -> Option<&Quality> {
        self.entries.iter().find_map(Entry::scored)
    }

    /// Renames `out/` into place and removes the rest. Repeatable.
    ///
    /// # Errors
    /// The file system's.
    pub fn publish(self, out: &Path) -> Result<()> {
        if self.out().exists() {
            if out.exists() {
                return Err(CompressError::OutputExists { folder: out.to_owned() });
            }
            files::publish_folder(&self.out(), out)?;
        }
        // The large part first: killed on the way, the same command finds its journal and ends the clean-up.
        let states = self.states();
        if states.exists() {
            std::fs::remove_dir_all(&states).map_err(Error::io("remove", &states))?;
        }
        std::fs::remove_dir_all(&self.folder).map_err(Error::io("remove", &self.folder))?;
        Ok(())
    }

    /// What a killed process left of files that were never finished.
    fn sweep_temporaries(&self) -> Result<()> {
        for folder in [self.folder.clone(), self.out()] {
            for entry in std::fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
                let entry = entry.map_err(Error::io("list", &folder))?;
                if is_temporary(&entry.file_name().to_string_lossy()) {
                    std::fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
                }
            }
        }
        Ok(())
    }
}

/// `OUT.partial`.
pub fn partial_path(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    // `out/` and `out` are the same folder.
    while name.len() > 1 && name.to_string_lossy().ends_with('/') {
        name = name.to_string_lossy().trim_end_matches('/').into();
    }
    name.push(".partial");
    name.into()
}

/// Names that `files::AtomicFile` gives to files under construction.
fn is_temporary(name: &str) -> bool {
    name.contains(".tmp-")
}

fn refuse_other(begin: &Path, identity: &Identity) -> Result<()> {
    let bytes = files::read(begin, BEGIN_LIMIT_BYTES)?;
    let found: Identity = serde_json::from_slice(&bytes).map_err(|e| Error::Journal {
        file: begin.to_owned(),
        line: e.line(),
        detail: e.to_string(),
    })?;
    for (what, found, expected) in [
        ("recipe", found.recipe, identity.recipe),
        ("model or text", found.inputs, identity.inputs),
    ] {
        if found != expected {
            return Err(Error::OtherInput {
                file: begin.parent().unwrap_or(begin).to_owned(),
                what,
                found: String::from(found),
                expected: String::from(expected),
            }
            .into());
        }
    }
    Ok(())
}

/// Layer numbers as ids.
pub(crate) fn layer_id(layer: usize) -> LayerId {
    LayerId(u32::try_from(layer).expect("layer counts are small"))
}
