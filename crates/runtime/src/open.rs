//! Opens whatever can be run: a Hugging Face folder (experts in f32) or a container (experts as coded).

use std::path::Path;
use std::sync::Arc;

use cotk_container::manifest::{DENSE, MANIFEST};
use cotk_container::reader::{Container, is_container};
use cotk_model::checkpoint::coded::CodedSource;
use cotk_model::checkpoint::safetensors::Safetensors;
use cotk_model::folder::ModelFolder;
use cotk_model::layers::cache::KvKind;
use cotk_model::model::Model;
use cotk_model::moe::MoeRuntime;
use cotk_model::reference::PlainMoe;

use crate::Result;
use crate::mix::Cpu;
use crate::resident::Resident;

/// A folder's files, nothing loaded yet.
pub struct Folder {
    pub files: ModelFolder,
    /// `None`: a Hugging Face folder.
    pub container: Option<Arc<Container>>,
}

/// A model ready to run.
pub struct Opened {
    pub files: ModelFolder,
    pub model: Model,
    /// `None`: a Hugging Face folder.
    pub container: Option<Arc<Container>>,
}

impl Opened {
    /// The same with caches of another kind.
    #[must_use]
    pub fn with_kv(mut self, kind: KvKind) -> Self {
        self.model = self.model.with_kv(kind);
        self
    }
}

/// Opens the files of a model folder or container.
///
/// # Errors
/// What is missing, damaged or unknown, by file.
pub fn open_folder(path: &Path) -> Result<Folder> {
    if !is_container(path) {
        return Ok(Folder {
            files: ModelFolder::open(path)?,
            container: None,
        });
    }
    let container = Arc::new(Container::open(path)?);
    let stored = Arc::new(Safetensors::open_file(&path.join(DENSE))?);
    let source = Arc::new(CodedSource::new(stored, container.manifest().dense.clone())?);
    let config = container.manifest().config.to_string();
    Ok(Folder {
        files: ModelFolder::with_source(path, &path.join(MANIFEST), config, source)?,
        container: Some(container),
    })
}

/// Opens and loads.
///
/// # Errors
/// As [`open_folder`]; tensors that are missing or ill-shaped; records that do not fit the config.
pub fn open(path: &Path) -> Result<Opened> {
    // A path of `COTK_ISA` that this CPU lacks is refused for checkpoints, too.
    Cpu::selected()?;
    let Folder { files, container } = open_folder(path)?;
    let runtime: Arc<dyn MoeRuntime> = match &container {
        Some(container) => Arc::new(Resident::new(container.clone(), &files.spec)?),
        None => Arc::new(PlainMoe::load(&files.spec, files.source.as_ref())?),
    };
    let model = Model::load(files.spec.clone(), files.source.as_ref(), runtime)?;
    Ok(Opened {
        files,
        model,
        container,
    })
}
