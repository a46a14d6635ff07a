//! The whole way of a search, top to bottom: target, plan, method, repair against measured time, fine-tuning, export,
//! measurement, result. Every step that took time is a line of the journal; a killed run goes on behind the last one.
//! Law: times are inputs: a step count or a measured latency is journaled before anything depends on it, and the
//! prediction before the measurement that judges it.

mod journal;
mod tune;

use std::path::{Path, PathBuf};
use std::time::Instant;

use cotk_data::loader::Source;
use cotk_data::task::{Normalisation, Task};
use cotk_onnx::weights::Network;
use cotk_run::cancel::Cancel;
use cotk_run::facts::Fact;
use cotk_run::folder::RunFolder;
use cotk_run::journal::Journal;
use cotk_run::progress::Progress;
use cotk_run::seeds::Seeds;
use cotk_run::{files, recipe};
use serde::Serialize;

use self::journal::{Entry, Which};
use self::tune::{SETTLE, evaluate, fine_tune};
use crate::cost::{Costs, Quantity, Tables};
use crate::method::gradient::Gradient;
use crate::method::{Drive, Found, Limit, Method};
use crate::plan::{Halves, Plan, time_steps};
use crate::profile::{self, Profiled};
use crate::recipe::{MethodName, Recipe};
use crate::refit::{self, Judged, Refit, refit};
use crate::repair::{reachable, repair};
use crate::result::{Baseline, Exports, Finished, LayerResult, NetworkResult, SearchResult};
use crate::space::{Form, Point, Space};
use crate::trainable::Trainable;
use crate::{Result, SearchError, checkpoint, export, measure, report};

/// Rounds of interleaved timing, each with fresh sessions.
const TIMING_ROUNDS: usize = 7;
/// A measured time this far from its prediction sends the network back to repair, at most so often.
const DISAGREEMENT: f64 = 0.03;
const CORRECTIONS: usize = 3;

/// Makes the shared weights of a space: the program passes the one that trains.
pub type Make<'a> = &'a dyn Fn(&Space, Normalisation, &Recipe, Seeds) -> Box<dyn Trainable>;

/// What is asked, and where.
pub struct Request<'a> {
    /// Its `seed` is the one that is used.
    pub recipe: Recipe,
    /// First part of the run folder's name.
    pub name: String,
    pub runs: PathBuf,
    /// `--resume`.
    pub resume: Option<PathBuf>,
    /// `--restart`.
    pub restart: bool,
    /// `--profile`.
    pub profile: Option<PathBuf>,
    /// That profile may be of another machine.
    pub force: bool,
    /// Threads of training: part of what makes a run repeatable.
    pub threads: usize,
    pub cotk_version: String,
    pub commit: String,
    pub make: Make<'a>,
    pub cancel: &'a Cancel,
    pub progress: &'a dyn Progress,
}

/// What `--dry-run` says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DryRun {
    pub plan: Plan,
    /// Networks in the space.
    pub networks: f64,
    /// Predicted time and bytes of the largest and the smallest network; no times without a profile.
    pub largest_ms: Option<f64>,
    pub smallest_ms: Option<f64>,
    pub largest_bytes: u64,
    pub smallest_bytes: u64,
    pub target_ms: Option<f64>,
    pub target_bytes: Option<f64>,
    /// Which profile, or that one will be measured.
    pub profile: String,
    /// Bytes that the run folder will take, at most.
    pub disk_bytes: u64,
}

/// Says what a run would do: times 20 steps, writes nothing.
///
/// # Errors
/// As [`run`].
pub fn dry_run(request: &Request<'_>) -> Result<DryRun> {
    let recipe = &request.recipe;
    recipe.check()?;
    let task = recipe.data.load()?;
    let space = space_of(recipe)?;
    let seeds = Seeds::new(recipe.seed);
    let mut net = (request.make)(&space, task.normalisation, recipe, seeds);
    let plan = plan(recipe, &task, &space, net.as_mut(), seeds)?;
    let found = profile::find(request.profile.as_deref(), request.force, recipe)?;
    let (largest, smallest) = (space.largest(), space.smallest());
    let bytes = |point: &Point| Ok::<u64, SearchError>(space.cost_graph(point, Form::Int8)?.bytes());
    let (mut times, mut limits) = (None, Vec::new());
    if let Some((_, model)) = &found {
        profile::suffices(&space, model)?;
        let costs = Costs::new(&space, &Tables::new(&space, model)?)?;
        limits = limits_of(recipe, &space, &costs)?;
        reachable(&space, &costs, &limits)?;
        times = Some((costs.at(Quantity::Ms, &largest)?, costs.at(Quantity::Ms, &smallest)?));
    }
    let target = |quantity| limits.iter().find(|l| l.quantity == quantity).map(|l| l.target);
    let state: usize = net.state().values().map(|a| 4 * a.values.len()).sum();
    Ok(DryRun {
        plan,
        networks: space.count(),
        largest_ms: times.map(|t| t.0),
        smallest_ms: times.map(|t| t.1),
        largest_bytes: bytes(&largest)?,
        smallest_bytes: bytes(&smallest)?,
        target_ms: target(Quantity::Ms),
        target_bytes: target(Quantity::Bytes),
        profile: found.map_or_else(
            || "none yet: the operators of the space are measured first (about 15 s)".to_owned(),
            |(profiled, _)| profiled.folder.display().to_string(),
        ),
        // Three checkpoints, one more while it is replaced, exports and plots.
        disk_bytes: 4 * state as u64 + (4 << 20),
    })
}

/// Runs or resumes a search. `record` gets the facts once, before the run counts as finished.
///
/// # Errors
/// [`SearchError`]; [`SearchError::OutOfReach`] when no network of the space meets a target.
pub fn run<E: From<SearchError>>(
    request: &Request<'_>,
    record: impl FnOnce(&Path, &[Fact]) -> Result<(), E>,
) -> Result<Finished, E> {
    let begun = Instant::now();
    let recipe = &request.recipe;
    recipe.check()?;
    let (folder, resumed) = open_run(request)?;
    let (journal, entries) = Journal::open(folder.path().join("journal.jsonl")).map_err(SearchError::from)?;
    let mut run = Run {
        request,
        folder: folder.path().to_owned(),
        journal,
        entries,
        begun,
        warnings: Vec::new(),
    };
    let finished = run.go(resumed)?;
    record(&run.folder, &finished.facts)?;
    let text = serde_json::to_string_pretty(&finished.result).expect("plain data");
    files::write_atomic(run.folder.join("result.json"), text.as_bytes()).map_err(SearchError::from)?;
    Ok(finished)
}

/// The folder to work in, and whether it was begun before.
fn open_run(request: &Request<'_>) -> Result<(RunFolder, bool)> {
    let resolved = recipe::resolved(&request.recipe)?;
    let hash = recipe::hash(&request.recipe)?;
    let found = match &request.resume {
        Some(folder) => Some(folder.clone()),
        None if request.restart => None,
        None => RunFolder::unfinished(&request.runs, &request.name, hash)?
            .into_iter()
            .next(),
    };
    let Some(path) = found else {
        return Ok((RunFolder::create(&request.runs, &request.name, hash, &resolved)?, false));
    };
    let theirs = files::read_text(path.join("recipe.toml"), 1 << 20)?;
    let folder = RunFolder::open(&path)?;
    if theirs != resolved {
        return Err(cotk_run::Error::OtherInput {
            file: path.join("recipe.toml"),
            what: "recipe",
            found: format!("{:016x}", files::checksum(theirs.as_bytes())),
            expected: format!("{hash:016x}"),
        }
        .into());
    }
    request.progress.note(&format!("going on with {}", path.display()));
    Ok((folder, true))
}

fn space_of(recipe: &Recipe) -> Result<Space> {
    Space::new(
        &recipe.space,
        recipe.data.name.shape(),
        recipe.data.name.classes().len(),
    )
}

fn limits_of(recipe: &Recipe, space: &Space, costs: &Costs) -> Result<Vec<Limit>> {
    let largest = space.largest();
    let mut limits = Vec::new();
    let largest_ms = costs.at(Quantity::Ms, &largest)?;
    let named = recipe.latency.target_ms.map(cotk_run::units::Millis::get);
    if let Some(target) = named.or(recipe.latency.target_of_largest.map(|share| share * largest_ms)) {
        limits.push(Limit {
            quantity: Quantity::Ms,
            target,
        });
    }
    let largest_bytes = costs.at(Quantity::Bytes, &largest)?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    let named = recipe.budget.bytes.map(|b| b as f64);
    if let Some(target) = named.or(recipe.budget.bytes_of_largest.map(|share| share * largest_bytes)) {
        limits.push(Limit {
            quantity: Quantity::Bytes,
            target,
        });
    }
    Ok(limits)
}

fn plan(recipe: &Recipe, task: &Task, space: &Space, net: &mut dyn Trainable, seeds: Seeds) -> Result<Plan> {
    let halves = Halves::new(task, recipe, seeds)?;
    let batch = recipe.train.batch;
    let source = Source::shuffled(halves.weights, task.normalisation, None, seeds, "timing", batch);
    Plan::new(recipe, time_steps(net, space, &source, seeds)?)
}

/// One process's work on a run.
struct Run<'a> {
    request: &'a Request<'a>,
    folder: PathBuf,
    journal: Journal<Entry>,
    entries: Vec<Entry>,
    begun: Instant,
    warnings: Vec<String>,
}

impl Run<'_> {
    fn go(&mut self, resumed: bool) -> Result<Finished> {
        let request = self.request;
        let recipe = &request.recipe;
        let seeds = Seeds::new(recipe.seed);
        self.begin(resumed)?;
        files::create_folder(&self.folder.join("checkpoints"))?;

        // Costs first: a target out of reach is told before anything is trained.
        let space = space_of(recipe)?;
        let (tables, profiled, limits) = self.costs(&space)?;
        let costs = Costs::new(&space, &tables)?;
        self.warnings.extend(profiled.warnings.iter().cloned());

        let task = recipe.data.load()?;
        let halves = Halves::new(&task, recipe, seeds)?;
        let mut net = (request.make)(&space, task.normalisation, recipe, seeds);
        let plan = self.plan(&task, &space, seeds)?;

        let mut drive = Drive {
            space: &space,
            costs: &costs,
            limits: &limits,
            plan,
            recipe,
            task: &task,
            halves: &halves,
            net: net.as_mut(),
            seeds,
            checkpoint: self.folder.join("checkpoints/supernet.safetensors"),
            cancel: request.cancel,
            progress: request.progress,
        };
        reachable(&space, &costs, &limits)?;
        let method: &dyn Method = match recipe.search.method {
            MethodName::Gradient => &Gradient,
        };
        let found = method.search(&mut drive)?;
        self.worked()?;
        let point = self.choose(&mut drive, &found)?;

        // Both from the same shared weights, with as many steps.
        let network = self.train(&drive, Which::Network, &point, Form::Int8)?;
        let baseline = self.train(&drive, Which::Baseline, &space.largest(), Form::Float)?;
        let (onnx, weights) = (
            self.folder.join("network.onnx"),
            self.folder.join("network.safetensors"),
        );
        export::write(&network, &space.encode(&point), &onnx, &weights)?;
        let exports = Exports {
            safetensors: weights,
            onnx,
        };

        let predicted = self.predict(&space, &point, &costs, &profiled)?;
        let measured = self.measure(&network, &baseline)?;
        let accuracy_val = measure::accuracy(&network, &halves.val, task.normalisation, 1)?.accuracy();
        let latency_refit = self.learn(&profiled, &network, predicted.0, &measured)?;
        let tested = self.test(&task, &network, &baseline)?;
        self.worked()?;

        let result = self.result(
            &space,
            &point,
            &limits,
            method.name(),
            &network,
            exports,
            predicted,
            measured,
            tested,
        );
        let mut result = result;
        result.accuracy_val = accuracy_val;
        result.baseline.bytes = baseline.graph().bytes();
        result.profile = profiled.folder.display().to_string();
        result.latency_refit = latency_refit;
        self.judge(&result);
        report::write(&self.folder, &result, &found.history, &limits, &space)?;
        let facts = report::facts(&result, recipe, &request.name, &tested_images(&self.entries));
        Ok(Finished {
            result,
            facts,
            warnings: std::mem::take(&mut self.warnings),
            resumed,
        })
    }

    fn append(&mut self, entry: Entry) -> Result<()> {
        self.journal.append(&entry)?;
        self.entries.push(entry);
        Ok(())
    }

    fn find<T>(&self, of: impl Fn(&Entry) -> Option<T>) -> Option<T> {
        self.entries.iter().rev().find_map(of)
    }

    fn begin(&mut self, resumed: bool) -> Result<()> {
        let request = self.request;
        match self.find(|e| match e {
            Entry::Begun {
                threads,
                cotk_version,
                commit,
            } => Some((*threads, cotk_version.clone(), commit.clone())),
            _ => None,
        }) {
            Some((threads, version, commit)) => {
                if threads != request.threads {
                    return Err(cotk_run::Error::OtherInput {
                        file: self.folder.join("journal.jsonl"),
                        what: "number of threads",
                        found: threads.to_string(),
                        expected: request.threads.to_string(),
                    }
                    .into());
                }
                if (version.as_str(), commit.as_str()) != (request.cotk_version.as_str(), request.commit.as_str()) {
                    self.warnings.push(format!(
                        "begun by cotk {version} ({commit}), goes on with {} ({}): bits may differ",
                        request.cotk_version, request.commit
                    ));
                }
                debug_assert!(resumed, "only a resumed run has a journal");
                Ok(())
            }
            None => self.append(Entry::Begun {
                threads: request.threads,
                cotk_version: request.cotk_version.clone(),
                commit: request.commit.clone(),
            }),
        }
    }

    fn costs(&mut self, space: &Space) -> Result<(Tables, Profiled, Vec<Limit>)> {
        if let Some(known) = self.find(|e| match e {
            Entry::Costs {
                tables,
                profile,
                limits,
            } => Some((tables.clone(), profile.clone(), limits.clone())),
            _ => None,
        }) {
            return Ok(known);
        }
        let request = self.request;
        let (profiled, model) = match profile::find(request.profile.as_deref(), request.force, &request.recipe)? {
            Some(found) => found,
            None => profile::measure(space, &self.folder.join("profile"), request)?,
        };
        profile::suffices(space, &model)?;
        let tables = Tables::new(space, &model)?;
        let costs = Costs::new(space, &tables)?;
        let limits = limits_of(&request.recipe, space, &costs)?;
        self.append(Entry::Costs {
            tables: tables.clone(),
            profile: profiled.clone(),
            limits: limits.clone(),
        })?;
        Ok((tables, profiled, limits))
    }

    fn plan(&mut self, task: &Task, space: &Space, seeds: Seeds) -> Result<Plan> {
        if let Some(plan) = self.find(|e| match e {
            Entry::Planned { plan } => Some(*plan),
            _ => None,
        }) {
            return Ok(plan);
        }
        // On weights of its own: timing changes them.
        let mut net = (self.request.make)(space, task.normalisation, &self.request.recipe, seeds);
        let plan = plan(&self.request.recipe, task, space, net.as_mut(), seeds)?;
        self.append(Entry::Planned { plan })?;
        Ok(plan)
    }

    /// Repairs against predicted times; where ONNX Runtime disagrees, against corrected ones.
    fn choose(&mut self, drive: &mut Drive<'_>, found: &Found) -> Result<Point> {
        if let Some(encoding) = self.find(|e| match e {
            Entry::Chosen { encoding } => Some(encoding.clone()),
            _ => None,
        }) {
            return drive.space.decode(&encoding);
        }
        let start = found.points.first().cloned().unwrap_or_else(|| drive.space.smallest());
        drive.progress.begin("repairing", 0, "networks");
        let target_ms = drive
            .limits
            .iter()
            .find(|l| l.quantity == Quantity::Ms)
            .map(|l| l.target);
        let mut limits = drive.limits.to_vec();
        let mut point = start;
        for _ in 0..CORRECTIONS {
            point = match repair(drive, &point, &limits) {
                Ok(repaired) => repaired.point,
                // A corrected target may lie out of reach where the real one does not: keep what there is, measured.
                Err(SearchError::OutOfReach { .. }) if limits != drive.limits => break,
                Err(error) => return Err(error),
            };
            let Some(target_ms) = target_ms else { break };
            let (predicted, measured) = self.try_out(drive, &point)?;
            drive.progress.advance(1);
            let correction = measured / predicted;
            if measured <= target_ms || (correction - 1.0).abs() <= DISAGREEMENT {
                break;
            }
            for limit in limits.iter_mut().filter(|l| l.quantity == Quantity::Ms) {
                limit.target = target_ms / correction;
            }
        }
        drive.progress.end();
        self.append(Entry::Chosen {
            encoding: drive.space.encode(&point),
        })?;
        Ok(point)
    }

    /// Predicted and measured time of a point: its weights do not matter yet.
    fn try_out(&mut self, drive: &Drive<'_>, point: &Point) -> Result<(f64, f64)> {
        let encoding = drive.space.encode(point);
        let predicted = drive.costs.at(Quantity::Ms, point)?;
        let known = self.find(|e| match e {
            Entry::Timed {
                encoding: of,
                measured_ms,
            } if *of == encoding => Some(*measured_ms),
            _ => None,
        });
        if let Some(measured) = known {
            return Ok((predicted, measured));
        }
        self.append(Entry::Tried {
            encoding: encoding.clone(),
            predicted_ms: predicted,
        })?;
        let mut subnet = drive.net.cut_out(point, Form::Int8)?;
        subnet.settle(&drive.calibration(1))?;
        let network = export::network(drive.space, point, subnet.folded()?)?;
        let measured = measure::latencies(&[&network], 5)?[0].ms;
        self.append(Entry::Timed {
            encoding,
            measured_ms: measured,
        })?;
        Ok((predicted, measured))
    }

    /// Fine-tunes one network from the shared weights, or takes the finished one from its checkpoint.
    fn train(&mut self, drive: &Drive<'_>, which: Which, point: &Point, form: Form) -> Result<Network> {
        let path = self.folder.join(format!("checkpoints/{}.safetensors", which.name()));
        let mut subnet = drive.net.cut_out(point, form)?;
        let mut done = 0;
        if path.exists() {
            let (step, state) = checkpoint::load::<u64>(&path)?;
            subnet.load(&state)?;
            done = step;
        } else {
            subnet.settle(&drive.calibration(SETTLE / 2))?;
        }
        let total = drive.plan.fine_tune;
        if done <= total {
            fine_tune(drive, which, subnet.as_mut(), done, &path)?;
        }
        if self
            .find(|e| matches!(e, Entry::Trained { which: of, .. } if *of == which).then_some(()))
            .is_none()
        {
            let score = evaluate(subnet.as_ref(), &drive.halves.val, drive.task)?;
            self.append(Entry::Trained {
                which,
                val_accuracy: score,
            })?;
            self.worked()?;
        }
        export::network(drive.space, point, subnet.folded()?)
    }

    fn predict(&mut self, space: &Space, point: &Point, costs: &Costs, profiled: &Profiled) -> Result<(f64, f64)> {
        if let Some(known) = self.find(|e| match e {
            Entry::Predicted { ms, spread_ms, .. } => Some((*ms, *spread_ms)),
            _ => None,
        }) {
            return Ok(known);
        }
        // The number that the search decided on; spread and origin are the profile's.
        let ms = costs.at(Quantity::Ms, point)?;
        let prediction = profiled.predict(space, point)?;
        let spread_ms = prediction.spread_ms() * ms / prediction.ms;
        self.append(Entry::Predicted {
            ms,
            spread_ms,
            origin: format!("{:?}", prediction.origin).to_lowercase(),
        })?;
        Ok((ms, spread_ms))
    }

    fn measure(&mut self, network: &Network, baseline: &Network) -> Result<[f64; 5]> {
        if let Some(known) = self.find(|e| match e {
            Entry::Measured {
                ms,
                spread_ms,
                baseline_ms,
                baseline_spread_ms,
                q10_ms,
            } => Some([*ms, *spread_ms, *baseline_ms, *baseline_spread_ms, *q10_ms]),
            _ => None,
        }) {
            return Ok(known);
        }
        let timings = measure::latencies(&[network, baseline], TIMING_ROUNDS)?;
        let (ours, theirs) = (timings[0], timings[1]);
        self.append(Entry::Measured {
            ms: ours.ms,
            spread_ms: ours.spread_ms,
            baseline_ms: theirs.ms,
            baseline_spread_ms: theirs.spread_ms,
            q10_ms: ours.q10_ms,
        })?;
        Ok([ours.ms, ours.spread_ms, theirs.ms, theirs.spread_ms, ours.q10_ms])
    }

    /// A prediction that was wrong makes the profile better.
    fn learn(
        &mut self,
        profiled: &Profiled,
        network: &Network,
        predicted_ms: f64,
        &[measured_ms, spread_ms, _, _, q10_ms]: &[f64; 5],
    ) -> Result<Option<Refit>> {
        if let Some(known) = self.find(|e| match e {
            Entry::Refitted { refit } => Some(refit.clone()),
            _ => None,
        }) {
            return Ok(Some(known));
        }
        let judged = Judged {
            predicted_ms,
            measured_ms,
            spread_ms,
            q10_ms,
            sessions: TIMING_ROUNDS as u32,
            count: (TIMING_ROUNDS * measure::SLICES) as u32,
        };
        if !judged.disagrees() {
            return Ok(None);
        }
        let copy = self.folder.join("profile-refitted");
        let refit = refit(&profiled.folder, &copy, &profile::here()?, network.graph(), &judged)?;
        self.append(Entry::Refitted { refit: refit.clone() })?;
        Ok(Some(refit))
    }

    /// Reads the test images, once.
    fn test(&mut self, task: &Task, network: &Network, baseline: &Network) -> Result<[f64; 2]> {
        if let Some(known) = self.find(|e| match e {
            Entry::Tested { accuracy, baseline, .. } => Some([*accuracy, *baseline]),
            _ => None,
        }) {
            return Ok(known);
        }
        let images = task.open_test()?;
        let ours = measure::accuracy(network, &images, task.normalisation, 1)?.accuracy();
        let theirs = measure::accuracy(baseline, &images, task.normalisation, 1)?.accuracy();
        self.append(Entry::Tested {
            accuracy: ours,
            baseline: theirs,
            images: images.len() as u64,
        })?;
        Ok([ours, theirs])
    }

    fn worked(&mut self) -> Result<()> {
        let seconds = self.begun.elapsed().as_secs_f64();
        self.begun = Instant::now();
        self.append(Entry::Worked { seconds })
    }

    fn seconds(&self) -> f64 {
        let before = self.entries.iter().filter_map(|e| match e {
            Entry::Worked { seconds } => Some(*seconds),
            _ => None,
        });
        before.sum::<f64>() + self.begun.elapsed().as_secs_f64()
    }

    #[expect(clippy::too_many_arguments, reason = "one value per line of the result")]
    fn result(
        &self,
        space: &Space,
        point: &Point,
        limits: &[Limit],
        method: &str,
        network: &Network,
        exports: Exports,
        predicted: (f64, f64),
        [measured_ms, measured_spread_ms, baseline_ms, baseline_spread_ms, _]: [f64; 5],
        [accuracy_test, baseline_test]: [f64; 2],
    ) -> SearchResult {
        let target = |quantity| limits.iter().find(|l| l.quantity == quantity).map(|l| l.target);
        let graph = network.graph();
        let target_ms = target(Quantity::Ms);
        SearchResult {
            run: self.folder.clone(),
            method: method.to_owned(),
            seed: self.request.recipe.seed,
            data: self.request.recipe.data.name.as_str().to_owned(),
            network: NetworkResult {
                encoding: space.encode(point),
                params: graph.params(),
                macs: graph.macs(),
                bytes: graph.bytes(),
                layers: space
                    .slots()
                    .iter()
                    .map(|slot| LayerResult {
                        name: slot.name.clone(),
                        kernel: space.kernel(slot, point),
                        weight_bits: space.weight_bits(slot, point),
                        channels_in: slot.cin,
                        channels_out: slot.cout,
                        stride: slot.stride,
                    })
                    .collect(),
            },
            accuracy_val: 0.0,
            accuracy_test,
            target_ms,
            target_bytes: target(Quantity::Bytes),
            predicted_ms: predicted.0,
            predicted_spread_ms: predicted.1,
            measured_ms,
            measured_spread_ms,
            meets_target: target_ms.map(|target| measured_ms <= target),
            baseline: Baseline {
                name: "largest network, f32".to_owned(),
                accuracy_test: baseline_test,
                measured_ms: baseline_ms,
                measured_spread_ms: baseline_spread_ms,
                bytes: 0,
            },
            exports,
            profile: String::new(),
            latency_refit: None,
            seconds: self.seconds(),
        }
    }

    /// What a reader of the result must be told.
    fn judge(&mut self, result: &SearchResult) {
        if let (Some(target), Some(false)) = (result.target_ms, result.meets_target) {
            self.warnings.push(format!(
                "measured {:.4} ms, target {target:.4} ms: missed by {:.1} %",
                result.measured_ms,
                100.0 * (result.measured_ms / target - 1.0)
            ));
        }
        let off = result.measured_ms / result.predicted_ms - 1.0;
        if off.abs() > refit::DISAGREEMENT {
            let learnt = match &result.latency_refit {
                Some(refit) => format!(
                    "; added to {}, which is {:+.0} % off now",
                    refit.profile.display(),
                    refit.after_pct
                ),
                None => "; the measurement itself spreads too far to learn from".to_owned(),
            };
            self.warnings.push(format!(
                "measured {:.4} ms is {:+.0} % off the predicted {:.4} ms{learnt}",
                result.measured_ms,
                100.0 * off,
                result.predicted_ms
            ));
        }
    }
}

fn tested_images(entries: &[Entry]) -> u64 {
    let images = entries.iter().find_map(|e| match e {
        Entry::Tested { images, .. } => Some(*images),
        _ => None,
    });
    images.unwrap_or(0)
}
