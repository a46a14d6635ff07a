//! The one place where a command gets its hardware model from: `--profile`, `--force`, else this machine's profile.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cotk_latency::identity::Identity;
use cotk_latency::predict::Model;
use cotk_latency::profile::{self, Request};

use crate::context::Context;
use crate::fault::Fault;

/// A profile that predicts, and what to say about it.
pub struct Predictor {
    pub model: Model,
    pub folder: PathBuf,
    /// One line each: noisy, of another machine, a reference.
    pub warnings: Vec<String>,
}

/// The profile that `--profile`, the recipe or `$COTK_PROFILE` names, else this machine's; `None` when nothing was named
/// and there is none.
///
/// # Errors
/// [`Fault::Latency`]: a profile that is named and missing or damaged, or of another machine without `--force`.
pub fn find(cx: &Context, recipe: Option<&str>) -> Result<Option<Predictor>, Fault> {
    let request = Request {
        flag: cx.profile.clone(),
        recipe: recipe.map(str::to_owned),
        force: cx.force,
    };
    match profile::find(&request, &Identity::here(BTreeMap::new())) {
        Ok(found) => {
            let model = found.model();
            let warning = |flag| format!("predicted from {}: {flag}", found.folder.display());
            Ok(Some(Predictor {
                warnings: model.flags().iter().map(warning).collect(),
                model,
                folder: found.folder,
            }))
        }
        Err(cotk_latency::Error::NoProfile { .. }) if !request.is_named() => Ok(None),
        Err(error) => Err(error.into()),
    }
}
