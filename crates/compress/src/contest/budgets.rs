//! `cotk compress --compare … --budgets …`: every entrant at every budget, each built by the same pass from the same
//! calibration tokens and offers, and judged as the finished container that `cotk run` would serve. Laws: a row differs
//! from another by its allocation, rounding and healing alone; every budget is the same for all; a stopped contest goes
//! on to the same table.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cotk_container::manifest::Manifest;
use cotk_model::model::Model;
use cotk_model::moe::MoeRuntime;
use cotk_quant::code::{Bits, Code};
use cotk_quant::layout::ScaleForm;
use cotk_run::files;
use cotk_run::units::significant;
use cotk_runtime::open::{open, open_folder};
use cotk_runtime::resident::Resident;
use cotk_runtime::throughput::{self, Subject, Work};
use serde::{Deserialize, Serialize};

use super::entrant::{Effort, Entrant, Method};
use super::judge::{Bench, Judges, TextFigure, WindowScore, perplexity, uncompressed};
use super::plot;
use super::table::{BudgetLine, Contested, Counts, Ranking, Skipped, lines, ranking};
use crate::baselines::PUBLISHED_GROUP;
use crate::choice::{Fate, Form, Kind, LayerFates, LayerOffers, Limits};
use crate::finish::bits_per_expert_weight;
use crate::heal::HealOptions;
use crate::joint::code::How;
use crate::joint::points::Tried;
use crate::joint::recipe::{Joint, Rounding};
use crate::partial::{Begun, Entry, Identity, Partial, partial_path};
use crate::pipeline::{Job, Request, Surroundings};
use crate::states::Stream;
use crate::{CompressError, Result};

/// What a nominal form may take above its budget, in bits per weight, for ragged last groups: rows of 96 weights end
/// within a group of eight scales of 16. The same for every entrant.
pub const ALLOWANCE_BITS: f64 = 0.03;
/// Uniform codes so far below the largest that fits are not tried: a bit fewer costs far more than coarser scales.
const NEAR_BITS: f64 = 0.3;
/// Scales of uniform codes; those of f16 first.
const UNIFORM: [(usize, ScaleForm); 6] = [
    (32, ScaleForm::F16),
    (64, ScaleForm::F16),
    (128, ScaleForm::F16),
    (16, ScaleForm::TwoLevel),
    (32, ScaleForm::TwoLevel),
    (64, ScaleForm::TwoLevel),
];
/// Of the text that a single compression would judge itself by: here it judges nothing.
const OWN_QUALITY_TOKENS: usize = 64;
/// Samples of the speed of decoding.
const DECODE_REPEATS: usize = 5;

/// Who competes for which budgets, on which texts.
#[derive(Debug, Clone)]
pub struct Contest {
    /// Its recipe says how offers are made and how the joint allocation is; its `eval_text` is not read.
    pub request: Request,
    pub entrants: Vec<Entrant>,
    /// Bits per weight of all experts of the source, scales included; each entrant at each.
    pub budgets: Vec<f64>,
    /// Further ones, for the plot: each method's own row alone, with one seed.
    pub plot_budgets: Vec<f64>,
    /// Make up the figure that decides; shown one by one too.
    pub texts: Vec<PathBuf>,
    /// Shown beside it.
    pub second_texts: Vec<PathBuf>,
    /// Of each text, at most, in windows spread over it.
    pub text_tokens: usize,
    /// Tokens of one sequence that each container decodes for its speed; absent: not measured.
    pub decode_tokens: Option<usize>,
}

/// The whole table, and what it stands on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Standings {
    pub calibration_tokens: usize,
    /// Targets that decide.
    pub targets: usize,
    pub windows: usize,
    /// What intervals draw.
    pub documents: usize,
    pub perplexity_before: f64,
    pub bytes_before: u64,
    pub expert_bytes_before: u64,
    pub expert_weights: u64,
    /// Uncompressed, per text.
    pub texts_before: Vec<TextFigure>,
    /// Above each budget, in bits per weight.
    pub allowance_bits: f64,
    pub lines: Vec<BudgetLine>,
    pub skipped: Vec<Skipped>,
    /// Of expected losses and KL.
    pub ranking: Option<Ranking>,
    /// Joint allocations that were measured end to end on held-out calibration text; of each budget the best was built.
    pub tried: Vec<Tried>,
    /// What all rows share: measuring the offers.
    pub offers_seconds: f64,
    pub offers_peak_rss_bytes: u64,
    /// Of this process.
    pub seconds: f64,
    pub peak_rss_bytes: u64,
    pub warnings: Vec<String>,
}

/// Compares; the table also lies in OUT as `comparison.json`, KL against bytes as `pareto.svg`.
///
/// # Errors
/// As [`crate::pipeline::compress`]; no entrant meets any budget; what stays unfinished in `OUT.partial/` is gone on with
/// by the same request.
pub fn contest(contest: &Contest, with: &Surroundings<'_>) -> Result<Standings> {
    let clock = Instant::now();
    crate::attention::refuse_beside_comparison(&contest.request.recipe)?;
    let request = Request {
        eval_text: contest.texts.first().cloned(),
        ..contest.request.clone()
    };
    let mut job = Job::open(&request, with)?;
    job.texts.quality.truncate(OWN_QUALITY_TOKENS + 1);
    let bench = contest.bench();
    let judges = job.judges(&bench)?;
    let identity = job.identity_with(&contest.identity()?)?;
    let mut partial = match Partial::begin(&request.out, &identity)? {
        Begun::Stood(standings) => return Ok(*standings),
        Begun::Working(partial) => *partial,
        Begun::Finished(_) | Begun::Compared(_) => return Err(CompressError::OutputExists { folder: request.out }),
    };
    let streams = job.streams(&partial);
    job.recover(&mut partial, &streams)?;
    forget_peak();
    let offers_clock = Instant::now();
    let offers = job.offers(
        &mut partial,
        &streams,
        job.joint(),
        &contest.always(job.source.files.spec.hidden, job.source.files.spec.moe_intermediate),
    )?;
    let offers_seconds = offers_clock.elapsed().as_secs_f64();
    let offers_peak_rss_bytes = files::peak_rss_bytes();
    let mut arena = Arena {
        job: &job,
        contest,
        judges: &judges,
        identity: &identity,
        offers: &offers,
        teacher: job.teacher(&partial, &judges)?,
        skipped: Vec::new(),
    };
    let done = arena.all(&mut partial)?;
    let skipped = arena.skipped;
    let before = uncompressed(done.first().map_or(&[], |row| &row.scores));
    let deciding = judges.deciding();
    let lines = lines(&contest.entrants, &contest.all_budgets(), &done, &judges);
    let documents: BTreeSet<usize> = judges.documents[..deciding].iter().copied().collect();
    let peaks = done
        .iter()
        .map(|row| row.peak_rss_bytes)
        .chain([files::peak_rss_bytes()]);
    let standings = Standings {
        calibration_tokens: job.texts.calibration_tokens(),
        targets: before.iter().take(deciding).map(|s| s.targets).sum(),
        windows: deciding,
        documents: documents.len(),
        perplexity_before: perplexity(&before[..deciding.min(before.len())]),
        bytes_before: job.source.origin.bytes,
        expert_bytes_before: job.source.origin.expert_bytes,
        expert_weights: job.source.origin.expert_weights,
        texts_before: judges.by_text(&before),
        allowance_bits: ALLOWANCE_BITS,
        ranking: ranking(&lines),
        tried: partial.tried(),
        lines,
        skipped,
        offers_seconds,
        offers_peak_rss_bytes,
        seconds: clock.elapsed().as_secs_f64(),
        peak_rss_bytes: peaks.max().unwrap_or(0).max(offers_peak_rss_bytes),
        warnings: job.texts.warnings.clone(),
    };
    let json = serde_json::to_vec_pretty(&standings).expect("numbers and strings have a JSON form");
    files::write_atomic(partial.out().join("comparison.json"), &json)?;
    let file = partial.out().join("pareto.svg");
    let svg = plot::pareto(&standings.lines).map_err(|detail| CompressError::Plot {
        file: file.clone(),
        detail,
    })?;
    files::write_atomic(file, svg.as_bytes())?;
    partial.finished(Entry::Stood(Box::new(standings.clone())))?;
    partial.publish(&request.out)?;
    Ok(standings)
}

impl Contest {
    fn all_budgets(&self) -> Vec<f64> {
        self.budgets.iter().chain(&self.plot_budgets).copied().collect()
    }

    fn bench(&self) -> Bench<'_> {
        Bench {
            texts: &self.texts,
            second_texts: &self.second_texts,
            text_tokens: self.text_tokens,
            calibration: &self.request.calibration,
        }
    }

    /// Forms that some entrant may give to every expert: wanted wherever they lie, however poor they are for most.
    fn always(&self, hidden: usize, inner: usize) -> Vec<Form> {
        let mut forms = BTreeSet::new();
        for entrant in &self.entrants {
            let scalings: &[(usize, ScaleForm)] = match (entrant.method, &entrant.scaling) {
                (Method::Joint, _) => &[],
                (Method::Mc | Method::Mop, _) => {
                    let plain = |bits| Form::plain(Code::Plain(bits), PUBLISHED_GROUP);
                    forms.extend(Bits::ALL.map(plain));
                    &[]
                }
                (_, Some(scaling)) => &[(scaling.group, scaling.scales)],
                (Method::Rtn, None) => &UNIFORM[..3],
                (Method::GptqUniform, None) => &UNIFORM,
            };
            let all = scalings.iter().flat_map(|&(group, scales)| {
                Bits::ALL.map(|bits| Form {
                    code: Code::Plain(bits),
                    group,
                    scales,
                })
            });
            let all: Vec<(f64, Form)> = all
                .filter_map(|form| Some((bits_of(form, hidden, inner)?, form)))
                .collect();
            for budget in self.all_budgets() {
                let fitting = all.iter().filter(|(bits, _)| *bits <= budget + ALLOWANCE_BITS);
                let most = fitting.clone().map(|(bits, _)| *bits).fold(0.0, f64::max);
                forms.extend(
                    fitting
                        .filter(|(bits, _)| *bits > most - NEAR_BITS)
                        .map(|(_, form)| *form),
                );
            }
        }
        forms.into_iter().collect()
    }

    /// What makes two contests the same.
    fn identity(&self) -> Result<Vec<u8>> {
        let wanted = (&self.entrants, &self.budgets, &self.plot_budgets, self.decode_tokens);
        let mut bytes = serde_json::to_vec(&wanted).expect("numbers and names");
        bytes.extend(self.bench().identity()?);
        Ok(bytes)
    }
}

/// What every row needs.
struct Arena<'a> {
    job: &'a Job<'a>,
    contest: &'a Contest,
    judges: &'a Judges,
    identity: &'a Identity,
    offers: &'a [LayerOffers],
    /// The judging windows behind the uncompressed model's last layer.
    teacher: Stream,
    skipped: Vec<Skipped>,
}

impl Arena<'_> {
    /// Every entrant at every budget; what the journal has is not done again.
    fn all(&mut self, partial: &mut Partial) -> Result<Vec<Contested>> {
        let mut done = partial.contested();
        let mut wanted = Vec::new();
        for &budget in &self.contest.budgets {
            for entrant in &self.contest.entrants {
                wanted.extend((0..entrant.seeds()).map(|seed| (budget, *entrant, seed)));
            }
        }
        // What bars ask for comes first: a contest that is stopped has said the most.
        wanted.sort_by_key(|(_, entrant, _)| entrant.rank());
        for &budget in &self.contest.plot_budgets {
            let own = self.contest.entrants.iter().filter(|entrant| entrant.is_plotted());
            wanted.extend(own.map(|entrant| (budget, *entrant, 0)));
        }
        let clock = Instant::now();
        let (mut built, mut hopeless, mut refused) = (0u32, BTreeSet::new(), None);
        for (at, (budget, entrant, seed)) in wanted.iter().enumerate() {
            let is_this = |row: &Contested| (row.budget_bits, row.entrant, row.seed) == (*budget, *entrant, *seed);
            if done.iter().any(is_this) || hopeless.contains(&(budget.to_bits(), entrant.name())) {
                continue;
            }
            let left = match built {
                0 => String::new(),
                _ => {
                    let rest = u32::try_from(wanted.len() - at).unwrap_or(u32::MAX);
                    format!(", about {} left", minutes(clock.elapsed() / built * rest))
                }
            };
            self.job.with.progress.note(&format!(
                "{} at {budget} bits: {} of {}{left}",
                entrant.name(),
                at + 1,
                wanted.len()
            ));
            match self.row(partial, *budget, entrant, *seed) {
                Ok(row) => {
                    partial.finished(Entry::Contested(Box::new(row.clone())))?;
                    done.push(row);
                    built += 1;
                }
                // Nothing of this entrant's fits: said, not fatal to the others.
                Err(error @ CompressError::Budget { .. }) => {
                    hopeless.insert((budget.to_bits(), entrant.name()));
                    self.skipped.push(Skipped {
                        budget_bits: *budget,
                        name: entrant.name(),
                        why: error.to_string(),
                    });
                    refused = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        match refused {
            Some(error) if done.is_empty() => Err(error),
            _ => Ok(done),
        }
    }

    /// Chooses, builds, judges; the container is gone afterwards.
    fn row(&self, partial: &mut Partial, budget: f64, entrant: &Entrant, seed: u64) -> Result<Contested> {
        forget_peak();
        let clock = Instant::now();
        let name = format!("{}-{budget}-{seed}", entrant.name().replace(':', "-"));
        let out = partial_path(&self.job.request.out).join("rows").join(name);
        let identity = Identity {
            recipe: self.identity.recipe,
            inputs: self.identity.inputs,
        };
        files::create_folder(out.parent().unwrap_or(&out))?;
        let Begun::Working(mut row) = Partial::begin(&out, &identity)? else {
            return Err(CompressError::OutputExists { folder: out });
        };
        let streams = self.job.streams(&row);
        self.job.recover(&mut row, &streams)?;
        let limits = Limits {
            record_bytes: Some(record_bytes(budget, self.job.source.origin.expert_weights)),
            ms: None,
        };
        let seed = self.job.request.recipe.seed + seed;
        let chosen = match entrant.chooser() {
            Some(chooser) => chooser.choose(self.offers, &limits, seed),
            None => self.job.joint_fates(partial, self.offers, self.job.joint(), &limits),
        };
        let (fates, expected_loss) = match chosen {
            Ok(chosen) => chosen,
            Err(error) => {
                drop(row);
                remove(&partial_path(&out))?;
                return Err(error);
            }
        };
        self.job.build_fates(&mut row, &streams, &fates, &self.how(entrant))?;
        let manifest = self.job.finish_container(&row)?;
        let (seconds, peak_rss_bytes) = (clock.elapsed().as_secs_f64(), files::peak_rss_bytes());
        let scores = self.judge(&row.out())?;
        let decode_tokens_per_s = match self.contest.decode_tokens {
            None => None,
            Some(tokens) => Some(self.decode_speed(&row.out(), tokens)?),
        };
        let found = Contested {
            entrant: *entrant,
            budget_bits: budget,
            seed: seed - self.job.request.recipe.seed,
            counts: counts(&fates, &row),
            expected_loss,
            bits_per_expert_weight: bits_per_expert_weight(&manifest),
            expert_bytes: manifest.files[cotk_container::manifest::EXPERTS].bytes,
            bytes: all_bytes(&manifest),
            decode_tokens_per_s,
            seconds,
            peak_rss_bytes,
            scores,
        };
        drop(row);
        remove(&partial_path(&out))?;
        Ok(found)
    }

    fn how(&self, entrant: &Entrant) -> How {
        let own = How {
            rounding: Rounding::Gptq,
            ..How::of(self.job.joint())
        };
        let how = match entrant.effort {
            Effort::Nearest => How::nearest(),
            Effort::Refit => own,
            Effort::Plain => How {
                scale_factors: vec![1.0],
                refit_rounds: 0,
                tries_starts: false,
                ..own
            },
        };
        How {
            heal: entrant.is_healed.then(HealOptions::default),
            ..how
        }
    }

    fn judge(&self, container: &Path) -> Result<Vec<WindowScore>> {
        let opened = open(container)?;
        self.job
            .score_model(&self.judges.slices(), &self.teacher, &opened.model)
    }

    /// One sequence, all threads, while nothing else of this process runs.
    fn decode_speed(&self, container: &Path, tokens: usize) -> Result<f64> {
        let folder = open_folder(container)?;
        let stored = folder.container.clone().expect("a container was written");
        let held: Arc<dyn MoeRuntime> = Arc::new(Resident::new(stored, &folder.files.spec)?);
        let model = Model::load(folder.files.spec.clone(), folder.files.source.as_ref(), held)?;
        let subject = Subject {
            model: &model,
            expert_bytes: &|_, _| 0,
            dense_bytes: 0,
        };
        let settings = throughput::Settings {
            work: vec![Work::Decode {
                batch: 1,
                steps: tokens.min(model.spec().context),
            }],
            threads: vec![self.job.with.threads],
            repeats: DECODE_REPEATS,
            keep_disturbed: false,
            seed: 0,
        };
        let report = throughput::measure(&subject, &settings, self.job.with.progress, self.job.with.cancel)?;
        Ok(report.rows[0].tokens_per_s)
    }
}

impl Job<'_> {
    /// The recipe's section.
    pub(crate) fn joint(&self) -> &Joint {
        let joint = self.request.recipe.compress.joint.as_ref();
        joint.expect("the command gives a contest its section")
    }

    /// The judging windows through the uncompressed model.
    fn teacher(&self, partial: &Partial, judges: &Judges) -> Result<Stream> {
        let windows = judges.slices();
        let lengths = windows.iter().map(|w| w.len()).collect();
        let stream = Stream::new(
            &partial.states(),
            "judge-teacher",
            self.source.files.spec.hidden,
            lengths,
        );
        self.embed(&stream, &windows)?;
        self.with
            .progress
            .begin("judging the source", self.layers() as u64, "layers");
        for index in 0..self.layers() {
            let (layer, experts) = self.load_whole(index)?;
            self.step_under(&layer, experts.as_ref(), None, index, &stream, &stream)?;
            stream.forget(index);
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        Ok(stream)
    }
}

/// Codes and scales of an expert in this form, per weight.
#[expect(clippy::cast_precision_loss, reason = "sizes of matrices are far below 2^52")]
fn bits_of(form: Form, hidden: usize, inner: usize) -> Option<f64> {
    let bytes = |kind: Kind| {
        let (rows, cols) = kind.shape(hidden, inner);
        form.format(rows, cols).ok().map(|format| format.total_bytes())
    };
    let all = Kind::ALL.into_iter().map(bytes).sum::<Option<usize>>()?;
    Some(8.0 * all as f64 / (3 * hidden * inner) as f64)
}

/// Bytes of codes and scales that a budget of bits per weight leaves.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts of weights are far below 2^52"
)]
fn record_bytes(bits: f64, weights: u64) -> u64 {
    ((bits + ALLOWANCE_BITS) / 8.0 * weights as f64).floor() as u64
}

fn all_bytes(manifest: &Manifest) -> u64 {
    manifest.files.values().map(|file| file.bytes).sum::<u64>() + manifest.to_bytes().len() as u64
}

fn counts(fates: &[LayerFates], row: &Partial) -> Counts {
    let mut counts = Counts::default();
    for fate in fates.iter().flat_map(|layer| &layer.experts) {
        counts.experts += 1;
        match fate {
            Fate::Dropped => counts.experts_dropped += 1,
            Fate::Constant => counts.experts_constant += 1,
            Fate::Coded { matrices, channels } => {
                counts.experts_shrunk += usize::from(channels.is_some());
                for matrix in matrices {
                    *counts.matrices.entry(matrix.form.to_string()).or_default() += 1;
                    counts.matrices_corrected += usize::from(matrix.rank > 0);
                }
            }
        }
    }
    let hessians = row.built().into_iter().filter_map(|built| built.moe.as_ref());
    let hessians = hessians.flat_map(|moe| &moe.hessians);
    counts.hessians_shrunk = hessians.filter(|note| note.is_shrunk()).count();
    counts
}

fn remove(folder: &Path) -> Result<()> {
    std::fs::remove_dir_all(folder).map_err(cotk_run::Error::io("remove", folder))?;
    Ok(())
}

/// So that each row has its own peak; where the kernel does not let go of it, rows show that of all so far.
#[expect(clippy::disallowed_methods, reason = "a switch of the kernel, not a file")]
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn minutes(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 90.0 => format!("{} s", significant(seconds, 2)),
        seconds => format!("{} min", significant(seconds / 60.0, 2)),
    }
}
