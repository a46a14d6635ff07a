//! Which profile is used, whose machine it must be of, and where a new one is written. Law: what was asked for and is not
//! there, or is another machine's, is an error that says so.

use std::path::{Path as FilePath, PathBuf};

use cotk_run::files;

use super::{Profile, Purpose};
use crate::identity::Identity;
use crate::predict::{Flag, Model};
use crate::{Error, Result};

/// Which profile to use: the first that is named wins.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// `--profile`.
    pub flag: Option<PathBuf>,
    /// The recipe's `[latency] profile`; `"auto"` goes on.
    pub recipe: Option<String>,
    /// `--force`: another machine's profile may be used.
    pub force: bool,
}

impl Request {
    /// Whether somebody asked for a certain profile: finding none is then an error of theirs.
    pub fn is_named(&self) -> bool {
        self.flag.is_some()
            || self.recipe.as_deref().is_some_and(|name| name != "auto")
            || std::env::var_os("COTK_PROFILE").is_some_and(|name| !name.is_empty())
    }
}

/// A profile with where it was found and what to say about it.
#[derive(Debug, Clone)]
pub struct Found {
    pub profile: Profile,
    pub folder: PathBuf,
    /// `OtherMachine` when forced.
    pub flags: Vec<Flag>,
}

impl Found {
    /// The profile as something that predicts.
    pub fn model(&self) -> Model {
        self.profile.model(&self.flags)
    }
}

/// Finds, loads and checks the profile for this machine: `--profile`, the recipe, `$COTK_PROFILE`, `./profiles/<id>`,
/// `$XDG_DATA_HOME/cotk/profiles/<id>`.
///
/// # Errors
/// [`Error::NoProfile`] with every place looked at; [`Error::OtherMachine`] with every difference; as [`Profile::load`].
pub fn find(request: &Request, here: &Identity) -> Result<Found> {
    let recipe = request
        .recipe
        .as_deref()
        .filter(|name| *name != "auto")
        .map(PathBuf::from);
    let variable = std::env::var_os("COTK_PROFILE")
        .filter(|v| !v.is_empty())
        .map(PathBuf::from);
    let (folder, looked_at) = match request.flag.clone().or(recipe).or(variable) {
        Some(named) => (Some(named), Vec::new()),
        None => {
            let mut places = vec![PathBuf::from("profiles").join(here.id())];
            places.extend(files::data_folder().map(|d| d.join("profiles").join(here.id())));
            (places.iter().find(|p| p.join("profile.toml").exists()).cloned(), places)
        }
    };
    let folder = folder.ok_or(Error::NoProfile { looked_at })?;
    if !folder.join("profile.toml").exists() {
        return Err(Error::NoProfile {
            looked_at: vec![folder],
        });
    }
    let profile = Profile::load(&folder)?;
    let differences = profile.head.identity.differences(here);
    let mut flags = Vec::new();
    if profile.head.purpose == Purpose::Machine && !differences.is_empty() {
        if !request.force {
            return Err(Error::OtherMachine { folder, differences });
        }
        flags.push(Flag::OtherMachine);
    }
    Ok(Found { profile, folder, flags })
}

/// Where `cotk profile` writes: `./profiles/<id>` inside a checkout of cotk, else the user's data folder.
pub fn home(here: &Identity) -> PathBuf {
    let checkout = FilePath::new("crates/cotk").is_dir() && FilePath::new("profiles").is_dir();
    match files::data_folder().filter(|_| !checkout) {
        Some(data) => data.join("profiles").join(here.id()),
        None => PathBuf::from("profiles").join(here.id()),
    }
}
