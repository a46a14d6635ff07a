//! A machine's measured times on disk: `profile.toml`, `timings.csv`, `coeffs.toml`, `heldout.csv`, `networks.jsonl`. The
//! only room that touches profile files. Law: what is saved loads to the same predictions; a changed or cut file is refused
//! by line.

mod conditions;
mod csv;
mod find;
mod lacks;
mod networks;
mod sealed;

use std::collections::BTreeMap;
use std::fs::TryLockError;
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FilePath, PathBuf};
use std::time::{Duration, Instant};

use cotk_run::files;
use serde::{Deserialize, Serialize};

use crate::correct::Correction;
use crate::fit::joint::{self, Calibration, Measured};
use crate::fit::team::Team;
use crate::fit::{Coefficient, PathFit, Sample};
use crate::identity::Identity;
use crate::predict::{Flag, Model};
use crate::transfer::profile::Transfer;
use crate::work::{Key, Tier};
use crate::{Error, Result};

pub use self::conditions::{Carried, Conditions, LeftOut, Level, throttled};
pub use self::find::{Found, Request, find, home};
pub use self::lacks::MOST_LOST_PCT;
pub use self::networks::NetworkRow;

const LIMIT_BYTES: u64 = 1 << 28;
/// Above this floor a profile is called noisy.
const NOISY: f64 = 0.05;

/// Everything that was measured and fitted on one machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    pub head: Head,
    /// In key order.
    pub rows: Vec<Row>,
    pub fits: Vec<PathFit>,
    /// How sure sums over networks are, by number of threads.
    pub calibrations: Vec<Calibration>,
    pub heldout: Vec<HeldOut>,
    /// What networks from use have taught about sums, by number of threads.
    pub corrections: Vec<Correction>,
    /// Whole networks: those that the fit has seen, and those that use has added.
    pub networks: Vec<NetworkRow>,
}

/// `profile.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    pub format: u32,
    pub purpose: Purpose,
    pub provenance: Provenance,
    pub identity: Identity,
    pub noise: Noise,
    /// Carried over from another profile, not measured operator by operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// The networks that it was carried over by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<Carried>,
    /// What it is good for; filled on save.
    #[serde(default)]
    pub good_for: GoodFor,
    /// What the machine was like meanwhile.
    #[serde(default)]
    pub conditions: Conditions,
    /// What is in no table, and judged by nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// The first line of the file that is not what was written, found on load.
    #[serde(skip)]
    pub edited: Option<u64>,
    /// Lengths and checksums of the other files; filled on save.
    #[serde(default)]
    pub files: BTreeMap<String, FileMark>,
}

/// What the times may be taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Times of this machine: refused on another one unless forced.
    Machine,
    /// Committed, to compare predictions between commits: usable anywhere, and every prediction says so.
    Reference,
}

/// How the profile came to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    pub date: String,
    pub cotk_version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    pub seed: u64,
    pub quick: bool,
    pub seconds: f64,
}

/// How well this machine can be measured at all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Noise {
    /// Median of |ln(a / b)| over repeats of the canaries in different sessions, in percent.
    pub floor_pct: f64,
    /// The same, 90th percentile.
    pub p90_pct: f64,
    /// Share of time that the hypervisor took away while measuring.
    pub steal_pct: f64,
    pub verdict: Verdict,
    /// What was repeated.
    pub canaries: Vec<String>,
}

/// See `Noise`: up to 2 % good, up to 5 % usable, else noisy (reference 4.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Good,
    Usable,
    Noisy,
}

impl Verdict {
    /// From the floor and the stolen share, both in percent.
    pub fn of(floor_pct: f64, steal_pct: f64) -> Self {
        match () {
            () if floor_pct > 100.0 * NOISY || steal_pct > 3.0 || !floor_pct.is_finite() => Self::Noisy,
            () if floor_pct > 2.0 => Self::Usable,
            () => Self::Good,
        }
    }
}

/// Kinds of operator and numbers of threads that were measured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoodFor {
    /// `cnn`, `experts`, `memory`, `disk`.
    pub kinds: Vec<String>,
    pub threads: Vec<u32>,
    pub paths: Vec<String>,
}

/// What a whole file looks like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileMark {
    pub rows: u64,
    pub xxh3: String,
}

/// One measured key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    pub key: Key,
    /// Independent builds of the key.
    pub sessions: u32,
    /// Slices in all sessions.
    pub count: u32,
    /// Median over sessions of the median over slices; of the least disturbed session where that counts
    /// ([`crate::probe::gather::takes_best`]).
    pub median_us: f64,
    /// Tenth percentile of slices, smallest session.
    pub q10_us: f64,
    /// Median absolute deviation of slices, or half the range of the sessions' medians if that is larger; how far the next
    /// session is where the best one counts.
    pub mad_us: f64,
    /// What went on meanwhile.
    pub taken: Taken,
}

/// What the machine did while a key was timed; `None` where that was not recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Taken {
    /// Slices that were dropped, in all sessions: disturbed ones.
    pub dropped: Option<u32>,
    /// Whether the slices that count were undisturbed in every session; else the fastest of all stand in.
    pub is_quiet: Option<bool>,
    /// Share of the time that the hypervisor took from all cores while the key and what lived beside it were timed, in
    /// percent, mean of the sessions.
    pub steal_pct: Option<f64>,
    /// Share of the slices' time that went to others on the same core, in percent, mean of the sessions; and involuntary
    /// switches of the measuring thread in all of them.
    pub lost_pct: Option<f64>,
    pub switches: Option<u32>,
}

impl Row {
    /// Spread over time.
    pub fn relative_spread(&self) -> f64 {
        if self.median_us > 0.0 {
            self.mad_us / self.median_us
        } else {
            1.0
        }
    }

    /// For the fit.
    pub fn sample(&self) -> Sample {
        Sample {
            key: self.key,
            us: self.median_us,
            relative_spread: self.relative_spread(),
        }
    }
}

/// A shape that was kept out of the table, predicted after the fit was frozen, then measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeldOut {
    pub key: Key,
    pub predicted_us: f64,
    pub lo_us: f64,
    pub hi_us: f64,
    pub measured_us: f64,
    /// How far apart repeats of the measurement are.
    pub repeat_us: Option<f64>,
    /// Checksum of the coefficients that predicted it, see [`Profile::coeffs_checksum`].
    pub coeffs: Option<u64>,
}

/// How well held-out shapes were predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeldOutSummary {
    pub count: usize,
    pub mape_pct: f64,
    /// Share of them within 15 %, in percent.
    pub within_15_pct: f64,
    /// Share of them inside their predicted intervals, in percent.
    pub covered_pct: f64,
    /// Median of how far apart repeats of one of them are, in percent: no prediction can be nearer.
    pub repeat_pct: Option<f64>,
    /// Whether they judge the coefficients that the profile has now: since it was measured, networks from use may have
    /// changed them.
    pub is_of_these_coefficients: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CoeffsFile {
    #[serde(default)]
    path: Vec<CoeffsPath>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    networks: Vec<Calibration>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    correction: Vec<Correction>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CoeffsPath {
    name: String,
    rows: usize,
    cv_mape_pct: f64,
    spread_ln: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    team: Option<Team>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    overlap: Option<f64>,
    term: Vec<Coefficient>,
}

impl Profile {
    /// Version of the folder's layout; others are refused by name.
    pub const FORMAT: u32 = 4;

    /// A profile's folder, whoever's machine it is of. While another process exchanges it, one of the two is read.
    ///
    /// # Errors
    /// [`Error::Run`] for a missing file, [`Error::Format`], [`Error::Line`].
    pub fn load(folder: &FilePath) -> Result<Self> {
        for _ in 0..EXCHANGES {
            let before = inode(folder);
            let read = Self::read(folder);
            if read.is_ok() || inode(folder) == before {
                return read;
            }
        }
        Self::read(folder)
    }

    fn read(folder: &FilePath) -> Result<Self> {
        let head = head(&folder.join("profile.toml"))?;
        if let Some(detail) = conditions::complaint(&head) {
            return Err(Error::Format {
                file: folder.join("profile.toml"),
                detail,
            });
        }
        if let Some(detail) = head.transfer.as_ref().and_then(Transfer::complaint) {
            return Err(Error::Format {
                file: folder.join("profile.toml"),
                detail,
            });
        }
        let mark = |name: &str| {
            head.files.get(name).ok_or_else(|| Error::Format {
                file: folder.join("profile.toml"),
                detail: format!("cut short: nothing in it about {name}"),
            })
        };
        let rows = csv::rows(&folder.join("timings.csv"), mark("timings.csv")?)?;
        let heldout = csv::heldout(&folder.join("heldout.csv"), mark("heldout.csv")?)?;
        let coeffs = folder.join("coeffs.toml");
        let parsed: CoeffsFile = coefficients(&coeffs, mark("coeffs.toml")?)?;
        let fit = |path: CoeffsPath| {
            let fail = |detail| Error::Format {
                file: coeffs.clone(),
                detail,
            };
            if let Some(c) = path.term.iter().find(|c| {
                !([c.us_per_unit, c.spread_us.unwrap_or(0.0)]
                    .iter()
                    .all(|us| us.is_finite() && *us >= 0.0))
            }) {
                let detail = format!(
                    "path {}: {}: found {} ± {}, expected 0 or more",
                    path.name,
                    c.term.name(),
                    c.us_per_unit,
                    c.spread_us.unwrap_or(0.0)
                );
                return Err(fail(detail));
            }
            if let Some(detail) = path.team.as_ref().and_then(Team::complaint) {
                return Err(fail(format!("path {}: {detail}", path.name)));
            }
            if let Some(power) = path.overlap.filter(|power| !(*power >= 1.0 && power.is_finite())) {
                return Err(fail(format!(
                    "path {}: overlap: found {power}, expected 1 or more",
                    path.name
                )));
            }
            Ok(PathFit {
                path: path.name.parse().map_err(fail)?,
                coefficients: path.term,
                rows: path.rows,
                cv_mape_pct: path.cv_mape_pct,
                spread_ln: path.spread_ln,
                team: path.team,
                overlap: path.overlap,
            })
        };
        let fits = parsed.path.into_iter().map(fit).collect::<Result<_>>()?;
        if let Some(detail) = parsed.correction.iter().find_map(Correction::complaint) {
            return Err(Error::Format { file: coeffs, detail });
        }
        let wrong = |c: &&Calibration| !(c.network_factor.is_finite() && c.network_factor > 0.0);
        if let Some(c) = parsed.networks.iter().find(wrong) {
            return Err(Error::Format {
                file: coeffs,
                detail: format!("network_factor: found {}, expected a number above 0", c.network_factor),
            });
        }
        Ok(Self {
            rows,
            fits,
            calibrations: parsed.networks,
            corrections: parsed.correction,
            heldout,
            networks: networks::read(&folder.join("networks.jsonl"), head.files.get("networks.jsonl"))?,
            head,
        })
    }

    /// Loads a folder, changes it and saves it, alone: another process that does the same waits.
    ///
    /// # Errors
    /// As [`load`](Self::load) and [`save`](Self::save); what `change` returns: the old profile then stands.
    pub fn update<T, E: From<Error>>(
        folder: &FilePath,
        change: impl FnOnce(&mut Self) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let _held = hold(folder)?;
        let mut profile = Self::load(folder)?;
        let changed = change(&mut profile)?;
        profile.replace(folder)?;
        Ok(changed)
    }

    /// Writes the folder anew: whole beside it, then exchanged.
    ///
    /// # Errors
    /// [`Error::Run`]; the old profile then stands.
    pub fn save(&self, folder: &FilePath) -> Result<()> {
        let _held = folder.join("profile.toml").exists().then(|| hold(folder)).transpose()?;
        self.replace(folder)
    }

    fn replace(&self, folder: &FilePath) -> Result<()> {
        let partial = with_suffix(folder, ".partial-new");
        remove(&partial)?;
        files::create_folder(&partial)?;
        let timings = csv::write_rows(&self.rows);
        let heldout = csv::write_heldout(&self.heldout);
        let networks = networks::write(&self.networks);
        let encode = |e: toml::ser::Error| Error::Format {
            file: folder.to_owned(),
            detail: e.to_string(),
        };
        let coeffs = sealed::seal(&self.coeffs_text().map_err(encode)?);
        let mut head = self.head.clone();
        head.good_for = self.good_for();
        let mark = |text: &str| FileMark {
            rows: text.lines().count() as u64,
            xxh3: format!("{:016x}", files::checksum(text.as_bytes())),
        };
        let all = [
            ("timings.csv", &timings),
            ("coeffs.toml", &coeffs),
            ("heldout.csv", &heldout),
            ("networks.jsonl", &networks),
        ];
        head.files = all
            .iter()
            .map(|(name, text)| ((*name).to_owned(), mark(text)))
            .collect();
        for (name, text) in all {
            files::write_atomic(partial.join(name), text.as_bytes())?;
        }
        let head = sealed::seal(&::toml::to_string(&head).map_err(encode)?);
        files::write_atomic(partial.join("profile.toml"), head.as_bytes())?;
        // From the moment that it has its name, the next writer waits for the end of this one.
        let _held = hold(&partial)?;
        if !folder.exists() {
            return Ok(files::publish_folder(&partial, folder)?);
        }
        if cotk_run::system::exchange_folders(&partial, folder)? {
            return remove(&partial);
        }
        let old = with_suffix(folder, ".partial-old");
        remove(&old)?;
        files::publish_folder(folder, &old)?;
        files::publish_folder(&partial, folder)?;
        remove(&old)
    }

    fn coeffs_text(&self) -> std::result::Result<String, toml::ser::Error> {
        ::toml::to_string(&CoeffsFile {
            path: self
                .fits
                .iter()
                .map(|fit| CoeffsPath {
                    name: fit.path.to_string(),
                    rows: fit.rows,
                    cv_mape_pct: fit.cv_mape_pct,
                    spread_ln: fit.spread_ln,
                    team: fit.team,
                    overlap: fit.overlap,
                    term: fit.coefficients.clone(),
                })
                .collect(),
            networks: self.calibrations.clone(),
            correction: self.corrections.clone(),
        })
    }

    /// Checksum of everything that was fitted: what a held-out row names as its judge.
    pub fn coeffs_checksum(&self) -> u64 {
        files::checksum(self.coeffs_text().unwrap_or_default().as_bytes())
    }

    /// What was measured.
    pub fn good_for(&self) -> GoodFor {
        let mut good = GoodFor::default();
        for fit in &self.fits {
            let kind = crate::predict::kind(fit.path.family).to_owned();
            if !good.kinds.contains(&kind) {
                good.kinds.push(kind);
            }
            good.threads.push(fit.path.threads);
            good.paths.push(fit.path.to_string());
        }
        good.threads.sort_unstable();
        good.threads.dedup();
        good
    }

    /// The profile as something that predicts; `also` joins the profile's own flags.
    pub fn model(&self, also: &[Flag]) -> Model {
        let mut flags = also.to_vec();
        if self.head.noise.verdict == Verdict::Noisy {
            flags.push(Flag::Noisy);
        }
        if self.head.provenance.quick {
            flags.push(Flag::Quick);
        }
        if let Some(line) = self.head.edited {
            flags.push(Flag::Edited { line });
        }
        if self.head.purpose == Purpose::Reference {
            flags.push(Flag::Reference);
        }
        if let Some(transfer) = &self.head.transfer {
            flags.push(Flag::Transferred {
                from: transfer.from.clone(),
                networks: transfer.networks,
            });
        }
        let rows = self.rows.iter().map(|r| (r.key, r.median_us, r.relative_spread()));
        let floor = self.head.noise.floor_pct / 100.0;
        let model = Model::new(
            self.head.identity.id(),
            self.head.identity.block(),
            rows,
            self.fits.iter().cloned(),
            floor,
            flags,
        )
        .with_cache(self.head.identity.cache_bytes)
        .calibrated(self.calibrations.clone())
        .corrected(self.corrections.clone());
        match &self.head.transfer {
            Some(transfer) => model.carried_over(transfer.clone()),
            None => model,
        }
    }

    /// Fits every path and the spread of sums anew, from rows and networks in one system. What was carried over from another
    /// machine keeps its fits.
    pub fn refit(&mut self) {
        if self.head.transfer.is_none() {
            self.refit_operators();
        }
        self.corrections.clear();
        self.corrections = Correction::fit(&self.model(&[]), &self.networks);
    }

    fn refit_operators(&mut self) {
        let block = self.head.identity.block();
        let rows = { self.rows.iter() }
            .filter(|row| is_fitted(&row.key))
            .map(|row| Measured::of_table(&row.sample(), block));
        let networks = self.networks.iter().map(|network| network.measured(block));
        let measured: Vec<Measured> = rows.chain(networks).collect();
        let fitted = joint::fit_all(&measured, block, self.head.noise.floor_pct / 100.0);
        self.fits = fitted.paths;
        self.calibrations = fitted.calibrations;
    }

    /// Error on held-out shapes; `None` where none were measured.
    pub fn heldout_summary(&self) -> Option<HeldOutSummary> {
        let errors: Vec<f64> = self
            .heldout
            .iter()
            .map(|h| (h.predicted_us / h.measured_us - 1.0).abs())
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "counts of shapes")]
        let share = |is: &dyn Fn(&HeldOut) -> bool| {
            100.0 * self.heldout.iter().filter(|h| is(h)).count() as f64 / self.heldout.len() as f64
        };
        let repeats: Vec<f64> = { self.heldout.iter() }
            .filter_map(|h| Some(100.0 * h.repeat_us? / h.measured_us))
            .collect();
        let coeffs = self.coeffs_checksum();
        #[expect(clippy::cast_precision_loss, reason = "counts of shapes")]
        (!errors.is_empty()).then(|| HeldOutSummary {
            count: errors.len(),
            mape_pct: 100.0 * errors.iter().sum::<f64>() / errors.len() as f64,
            within_15_pct: share(&|h| (h.predicted_us / h.measured_us - 1.0).abs() <= 0.15),
            covered_pct: share(&|h| (h.lo_us..=h.hi_us).contains(&h.measured_us)),
            repeat_pct: (!repeats.is_empty()).then(|| crate::probe::median(&repeats)),
            is_of_these_coefficients: self.heldout.iter().all(|h| h.coeffs == Some(coeffs)),
        })
    }
}

pub(crate) fn with_suffix(folder: &FilePath, suffix: &str) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn remove(folder: &FilePath) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::Run(cotk_run::Error::io("remove", folder)(e))),
        _ => Ok(()),
    }
}

/// Whether a line through its path's times says anything: a working set of any size lies in one level or another.
pub(crate) fn is_fitted(key: &Key) -> bool {
    !matches!(key, Key::Read(read) if read.tier == Tier::WorkingSet)
}

/// How often a folder may be exchanged while it is read.
const EXCHANGES: u32 = 8;
/// Longest that a writer waits for another one.
const PATIENCE: Duration = Duration::from_secs(30);

fn inode(folder: &FilePath) -> Option<u64> {
    folder.join("profile.toml").metadata().ok().map(|found| found.ino())
}

/// Holds a folder for writing until dropped. What is locked is the file that every exchange replaces: whoever waited for
/// the old one begins anew with the new one, and nothing is left behind.
fn hold(folder: &FilePath) -> Result<std::fs::File> {
    let path = folder.join("profile.toml");
    let begin = Instant::now();
    loop {
        let file = files::open(&path)?;
        match file.try_lock() {
            Ok(()) => {
                let held = file.metadata().map_err(cotk_run::Error::io("read", &path))?.ino();
                if inode(folder) == Some(held) {
                    return Ok(file);
                }
            }
            Err(TryLockError::WouldBlock) if begin.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Run(cotk_run::Error::Locked {
                    file: folder.to_owned(),
                    holder: "?".to_owned(),
                }));
            }
            Err(TryLockError::Error(error)) => return Err(Error::Run(cotk_run::Error::io("lock", &path)(error))),
        }
    }
}

fn read_toml<T: serde::de::DeserializeOwned>(file: &FilePath, text: &str) -> Result<T> {
    ::toml::from_str(text).map_err(|e| Error::Format {
        file: file.to_owned(),
        detail: e.to_string().trim_end().to_owned(),
    })
}

/// `profile.toml`. It says what is so of the machine: a line edited by hand is named with every prediction, and not refused.
fn head(file: &FilePath) -> Result<Head> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let text = files::read_text(file, LIMIT_BYTES)?;
    if let Ok(Version { format }) = ::toml::from_str::<Version>(&text)
        && format != Profile::FORMAT
    {
        return Err(Error::Format {
            file: file.to_owned(),
            detail: format!(
                "format {format}, expected {}: measure again with `cotk profile`",
                Profile::FORMAT
            ),
        });
    }
    let (body, edited) = match sealed::unseal(file, &text) {
        Ok(found) => found,
        // What does not even parse says so with its own line.
        Err(error) => return Err(read_toml::<Head>(file, &text).err().unwrap_or(error)),
    };
    Ok(Head {
        edited,
        ..read_toml(file, body)?
    })
}

/// `coeffs.toml`, as it was fitted: an edited line is refused by its number.
fn coefficients(file: &FilePath, mark: &FileMark) -> Result<CoeffsFile> {
    let text = files::read_text(file, LIMIT_BYTES)?;
    let (body, edited) = sealed::unseal(file, &text)?;
    if let Some(line) = edited {
        let found = body.lines().nth(usize::try_from(line - 1).unwrap_or(usize::MAX));
        return Err(Error::Line {
            file: file.to_owned(),
            line,
            what: "line".to_owned(),
            found: found.map_or_else(
                || "nothing".to_owned(),
                |l| format!("`{}`", l.chars().take(80).collect::<String>()),
            ),
            expected: "what was fitted (its checksum differs)".to_owned(),
        });
    }
    let found = format!("{:016x}", files::checksum(text.as_bytes()));
    if found != mark.xxh3 {
        return Err(Error::Format {
            file: file.to_owned(),
            detail: format!(
                "changed since it was measured: {} lines with checksum {found}, expected {} with {}",
                text.lines().count(),
                mark.rows,
                mark.xxh3
            ),
        });
    }
    read_toml(file, body)
}

#[cfg(test)]
mod laws;
#[cfg(test)]
pub(crate) mod tests;
