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

/// The profile that `--profile` names, else this machine's; `None` when nothing was named and there is none.
///
/// # Errors
/// [`Fault::Usage`]: a profile that is named and missing or damaged, or of another machine without `--force`.
pub fn find(cx: &Context) -> Result<Option<Predictor>, Fault> {
    let request = Request {
        flag: cx.profile.clone(),
        recipe: None,
        force: cx.force,
    };
    match profile::find(&request, &Identity::here(BTreeMap::new())) {
        Ok(found) => Ok(Some(Predictor {
            model: found.model(),
            warnings: found
                .flags
                .iter()
                .map(|flag| format!("{}: {flag:?}", found.folder.display()))
                .collect(),
            folder: found.folder,
        })),
        Err(cotk_latency::Error::NoProfile { .. }) if cx.profile.is_none() => Ok(None),
        Err(error) => {
            let help = match &error {
                cotk_latency::Error::OtherMachine { .. } => "measure this machine with `cotk profile`, or add --force",
                _ => "measure this machine with `cotk profile`, or leave --profile out",
            };
            Err(Fault::usage(error.to_string(), help))
        }
    }
}
