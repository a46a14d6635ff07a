//! `cotk profile`: measures this machine and writes its profile. Here: which probes, how much of each, and the table; the
//! measuring is `cotk_latency::probe::measure`'s, the operators are their crates' own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use cotk_kernels::cuda::links::LinkProbe;
use cotk_latency::graph::Numerics;
use cotk_latency::identity::Identity;
use cotk_latency::probe::disk::DiskProbe;
use cotk_latency::probe::gather::{Settings, Threaded};
use cotk_latency::probe::measure::{Plan, Wanted, With, measure};
use cotk_latency::probe::memory::MemoryProbe;
use cotk_latency::probe::order::FIRST_NETWORKS;
use cotk_latency::probe::{Listed, NetworkProbe, Prepared, Probe, median, refused};
use cotk_latency::profile::{self, MOST_LOST_PCT, Profile, Purpose, Row, Verdict};
use cotk_latency::walk::{operators, walk};
use cotk_latency::work::{
    Block, Context as Place, ConvKey, DenseKey, EdgeKey, ElementwiseKey, Family, Heat, Key, PlaneKey, PoolKey, Term,
    Tier,
};
use cotk_onnx::foreign;
use cotk_onnx::probe::OnnxProbe;
use cotk_onnx::zoo::{OnnxNetworks, random_networks};
use cotk_run::recipe::{Source, parse};
use cotk_run::seeds::Stream;
use cotk_run::units::significant;
use cotk_runtime::mix::Cpu;
use cotk_runtime::probes::EngineProbe;
use cotk_search::SearchError;
use cotk_search::recipe::Recipe;
use cotk_search::space::Space;
use serde_json::json;

use crate::commands::profile_transfer;
use crate::commands::profile_worker::{Processes, worker};
use crate::commands::search::RECIPES;
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::sibling;
use crate::table::Table;

/// Measure this machine: CNN operators in ONNX Runtime, experts in our kernels, memory and disk
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk profile --quick\n  cotk profile --for recipes/quickstart.toml\n  cotk profile --for resnet50.onnx --quick --out profiles/resnet50\n  cotk profile --seconds 1200\n  cotk profile --from profiles/other --samples 10 --threads 2\n\nInterrupted at any moment, the same command goes on where it was."
)]
pub struct Args {
    /// Only what the recipe's networks need, three sessions each: a minute
    #[arg(long)]
    pub quick: bool,
    /// How long it may take; what there is no time for is left out, and counted (default: 570, with --quick 56)
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(2..=86_400))]
    pub seconds: Option<u32>,
    /// Folder to write (default: ./profiles/MACHINE in a checkout of cotk, else the user's data folder)
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Recipe of a search, or ONNX file of any origin, whose operators are measured
    #[arg(long = "for", value_name = "RECIPE|ONNX", default_value = "quickstart")]
    pub recipe: String,
    /// Mark it as a reference: usable anywhere, to compare predictions between commits
    #[arg(long)]
    pub reference: bool,
    /// Carry another machine's profile (or another number of threads) over to this one by a few whole networks: seconds
    #[arg(long, value_name = "PROFILE", conflicts_with_all = ["quick", "recipe", "seconds"])]
    pub from: Option<PathBuf>,
    /// Networks that --from measures here
    #[arg(long, value_name = "N", requires = "from", default_value = "10", value_parser = samples)]
    pub samples: usize,
    /// One process of a measurement: `cotk profile` starts them itself
    #[arg(long, hide = true)]
    pub worker: bool,
}

/// 3 to 200: fewer say nothing of a machine, more are a profile of their own.
fn samples(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|n| (3..=200).contains(n));
    count.ok_or_else(|| "expected a number from 3 to 200".to_owned())
}

/// Measures, writes, reports.
///
/// # Errors
/// A recipe that does not parse, a folder that cannot be written, an operator that cannot run; interrupted.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    if args.worker {
        return worker(cx);
    }
    if cx.profile.is_some() {
        return Err(Fault::usage(
            "--profile names a profile to read, and this command writes one",
            "use --out DIR",
        ));
    }
    if let Some(from) = &args.from {
        return profile_transfer::run(args, cx, from);
    }
    let mut warnings = Vec::new();
    let block = Identity::here(BTreeMap::default()).block();
    let is_file = args.recipe.ends_with(".onnx");
    let keys = if is_file {
        file_keys(&args.recipe, block)?
    } else {
        recipe_keys(&args.recipe, block)?
    };
    // Without ONNX Runtime the rest is measured all the same.
    let version = match cotk_onnx::runtime::version() {
        Ok(version) => Some(version),
        Err(error) => {
            warnings.push(format!(
                "CNN operators are not measured: {error}; help: `cargo xtask setup`"
            ));
            None
        }
    };
    let runtimes: BTreeMap<String, String> = version.iter().map(|v| ("onnxruntime".to_owned(), v.clone())).collect();
    let mut identity = Identity::here(runtimes);
    let links = links();
    identity.gpu = links.as_ref().ok().map(|probe| probe.device().to_owned());
    let folder = args.out.clone().unwrap_or_else(|| profile::home(&identity));
    let threads = u32::try_from(cx.threads).unwrap_or(1);
    let mut wanted = Vec::new();
    if version.is_some() {
        wanted.push(cnn(keys, threads, identity.block(), args.quick, is_file)?);
    }
    wanted.push(engine(threads, identity.cache_bytes, args.quick)?);
    let mut memory = MemoryProbe::new(one_and(threads), identity.cache_bytes);
    if !args.quick {
        memory = memory.sweep();
    }
    wanted.push(Wanted {
        probe: Box::new(memory),
        table: usize::MAX,
        heldout: 0,
        live: live("memory"),
        adapt: false,
    });
    let parent = folder
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .map_or_else(|| ".".into(), PathBuf::from);
    cotk_run::files::create_folder(&parent)?;
    wanted.push(disk(&parent, args.quick)?);
    wanted.push(Wanted {
        probe: match links {
            Ok(probe) => Box::new(probe),
            Err(why) => Box::new(NoGpu(why)),
        },
        table: usize::MAX,
        heldout: 0,
        live: live("gpu"),
        adapt: false,
    });
    let mut settings = if args.quick { Settings::QUICK } else { Settings::FULL };
    if let Some(seconds) = args.seconds {
        settings.budget = Some(Duration::from_secs(seconds.into()));
    }

    let commit = sibling::commit();
    let plan = Plan {
        settings,
        seeds: cx.seeds(0),
        quick: args.quick,
        purpose: if args.reference {
            Purpose::Reference
        } else {
            Purpose::Machine
        },
        identity,
        cotk_version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: (!commit.is_empty()).then(|| commit.to_owned()),
        networks: networks(cx, threads, version.is_some(), args.quick),
        canaries: canaries(version.is_some()),
    };
    let with = With {
        runner: &Processes {
            threads,
            block: plan.identity.block(),
            cache_bytes: plan.identity.cache_bytes,
        },
        networks: version.is_some().then_some(&OnnxNetworks as &dyn NetworkProbe),
    };
    let measured = measure(wanted, &plan, with, &folder, &cx.cancel, &cx.ui).map_err(latency)?;
    let profile = measured.profile;
    let conditions = &profile.head.conditions;
    if let Some(count) = conditions.no_time_for.filter(|count| *count > 0) {
        warnings.push(format!("{count} keys were left out: there was no time for them"));
    }
    for gap in profile.lacks() {
        warnings.push(format!(
            "this profile lacks {gap}: measure again with more time (--seconds)"
        ));
    }
    if conditions.pinned == Some(false) {
        warnings
            .push("this system does not let threads stay on their core: times may hold moves between cores".to_owned());
    }
    let lost_pct = profile.lost_with_several_threads_pct();
    if let Some(pct) = lost_pct.filter(|pct| *pct > MOST_LOST_PCT) {
        warnings.push(format!(
            "with several threads {} % of the time went to others (at most {MOST_LOST_PCT}): those times are not good",
            significant(pct, 2)
        ));
    }
    if measured.resumed > 0 {
        warnings.push(format!("went on: {} timings were taken before", measured.resumed));
    }
    let noise = &profile.head.noise;
    if noise.verdict == Verdict::Noisy {
        warnings.push(format!(
            "too noisy to be called good: repeats differ by {} % (at most 5), {} % of the time was stolen (at most 3)",
            significant(noise.floor_pct, 2),
            significant(noise.steal_pct, 2)
        ));
    }
    if profile
        .rows
        .iter()
        .any(|r| matches!(r.key, Key::Read(read) if read.tier == Tier::DiskBuffered))
    {
        warnings.push("this file system refuses direct reads: disk times went through the page cache".to_owned());
    }
    let summary = profile.heldout_summary();
    let result = json!({
        "device": profile.head.identity.id(),
        "path": folder,
        "quick": args.quick,
        "good": noise.verdict != Verdict::Noisy,
        "verdict": noise.verdict,
        "noise_floor_pct": noise.floor_pct,
        "timings": profile.rows.len(),
        "heldout": summary,
        "networks": profile.networks.len(),
        "left_out": conditions.no_time_for,
        "unmeasurable": profile.head.left_out.len(),
        "undisturbed_pct": conditions.undisturbed_pct,
        "disturbed_factor": conditions.disturbed_factor,
        "lost_with_several_threads_pct": lost_pct,
        "seconds": profile.head.provenance.seconds,
    });
    let mut text = table(&profile);
    text.push_str(&format!(
        "\n{} timings and {} networks in {} s, noise floor {} % ({:?}), written to {}\n",
        profile.rows.len(),
        profile.networks.len(),
        significant(profile.head.provenance.seconds, 3),
        significant(noise.floor_pct, 2),
        noise.verdict,
        folder.display()
    ));
    text.push_str(&format!(
        "times are those of undisturbed cores: {} % of the slices were; as the machine was, things took {} times as long\n",
        significant(conditions.undisturbed_pct.unwrap_or_default(), 2),
        significant(conditions.disturbed_factor.unwrap_or(1.0), 3),
    ));
    for (name, fact) in &conditions.facts {
        text.push_str(&format!("{name}: {fact}\n"));
    }
    text.push_str(&unmeasurable(&profile));
    for calibration in &profile.calibrations {
        text.push_str(&format!(
            "{} networks with {} threads, each left out of its fit: mean error {} %\n",
            calibration.networks,
            calibration.threads,
            significant(calibration.network_mape_pct, 3)
        ));
    }
    if let Some(s) = summary {
        text.push_str(&format!(
            "held-out shapes: {}, mean error {} % (repeats: {} %), {} % of them within 15 %, {} % inside their intervals\n",
            s.count,
            significant(s.mape_pct, 3),
            s.repeat_pct.map_or_else(|| "?".to_owned(), |pct| significant(pct, 2)),
            significant(s.within_15_pct, 3),
            significant(s.covered_pct, 3)
        ));
    }
    Ok(Outcome::new(result, text).warn(warnings))
}

/// What cannot be told from noise, counted by path; by name it stands in profile.toml.
fn unmeasurable(profile: &Profile) -> String {
    let left_out = &profile.head.left_out;
    if left_out.is_empty() {
        return String::new();
    }
    let mut paths: BTreeMap<&str, usize> = BTreeMap::new();
    for lost in left_out {
        *paths.entry(&lost.path).or_default() += 1;
    }
    let mut paths: Vec<(&str, usize)> = paths.into_iter().collect();
    paths.sort_by_key(|(path, count)| (std::cmp::Reverse(*count), *path));
    let heldout = left_out.iter().filter(|lost| lost.is_heldout).count();
    let mut text = format!(
        "not measurable here: {} operators, lost in the noise of their neighbours: in no table, judged by\n\
         nothing, named in profile.toml ({heldout} of them of the held-out list):",
        left_out.len(),
    );
    let mut column = usize::MAX;
    for (path, count) in paths {
        let word = format!(" {path} {count},");
        // Tables fit 100 columns.
        if column.saturating_add(word.len()) > 100 {
            text.push_str("\n ");
            column = 1;
        }
        column += word.len();
        text.push_str(&word);
    }
    text.pop();
    text.push('\n');
    text
}

fn latency(error: cotk_latency::Error) -> Fault {
    SearchError::Latency(error).into()
}

/// Keys of a probe that are prepared at once.
pub(crate) fn live(probe: &str) -> usize {
    match probe {
        "onnx" => 12,
        "memory" | "disk" | "gpu" => 1,
        _ => 3,
    }
}

/// Whole calls between a few µs and a millisecond, and two that read memory.
fn canaries(has_runtime: bool) -> Vec<Key> {
    let mut keys = Vec::new();
    if has_runtime {
        for (channels, side, kernel, numerics) in [
            (8, 8, 3, Numerics::F32),
            (16, 16, 3, Numerics::F32),
            (32, 32, 1, Numerics::F32),
            (64, 16, 3, Numerics::F32),
            (64, 32, 3, Numerics::F32),
            (16, 16, 3, Numerics::Int8),
            (48, 32, 3, Numerics::Int8),
        ] {
            keys.push(Key::Conv(ConvKey {
                batch: 1,
                cin: channels,
                cout: channels,
                kernel,
                stride: 1,
                groups: 1,
                height: side,
                width: side,
                numerics,
                threads: 1,
                context: Place::Alone,
            }));
        }
    }
    for (inputs, outputs) in [(512, 2048), (2048, 2048)] {
        keys.push(Key::Dense(DenseKey {
            inputs,
            outputs,
            bits: 32,
            group: 0,
            tokens: 1,
            threads: 1,
            heat: Heat::Cold,
        }));
    }
    keys
}

/// Whole networks beside the table: what sums of operators are corrected by. Mostly with one thread.
fn networks(cx: &Context, threads: u32, has_runtime: bool, quick: bool) -> Vec<Threaded> {
    let count = match (has_runtime, quick) {
        (false, _) => 0,
        (true, true) => FIRST_NETWORKS,
        (true, false) => 400,
    };
    let drawn = random_networks(count, &[], &mut cx.seeds(0).stream("networks of a profile"));
    let pair = |(at, (_, graph)): (usize, (_, _))| Threaded {
        graph,
        // A third with all threads; four kinds in turn, so that each kind has some.
        threads: if at % 3 == 2 { threads } else { 1 },
    };
    drawn.into_iter().enumerate().map(pair).collect()
}

/// 1 and N.
pub(crate) fn one_and(threads: u32) -> Vec<u32> {
    if threads > 1 { vec![1, threads] } else { vec![1] }
}

/// Every operator that a network of the recipe's space can need, for every data set: shapes differ by image.
fn recipe_keys(name: &str, block: Block) -> Result<Vec<Key>, Fault> {
    let recipe: Recipe = parse(&Source::find(name, RECIPES)?, &[])?;
    let mut names = vec![recipe.data.name];
    for other in [cotk_data::task::Name::Glyphs, cotk_data::task::Name::Cifar10] {
        if !names.contains(&other) {
            names.push(other);
        }
    }
    let mut keys: Vec<Key> = Vec::new();
    for name in names {
        let space = Space::new(&recipe.space, name.shape(), name.classes().len())?;
        for graph in space.cover()? {
            for key in operators(&graph, cotk_search::cost::THREADS, block) {
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
        }
    }
    Ok(keys)
}

/// Every operator that an ONNX file runs at batch 1.
fn file_keys(file: &str, block: Block) -> Result<Vec<Key>, Fault> {
    let network = foreign::from_file(file.as_ref(), &foreign::Options::of_batch(1)).map_err(SearchError::Onnx)?;
    let mut keys: Vec<Key> = Vec::new();
    for key in walk(&network.to_walk(), 1, block).keys() {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    Ok(keys)
}

/// The recipe's or the file's operators at one thread; in a full profile also with N threads, a batch, alone, and draws around them.
fn cnn(keys: Vec<Key>, threads: u32, block: Block, quick: bool, is_file: bool) -> Result<Wanted, Fault> {
    let mut seeds = keys;
    if !quick {
        let base = seeds.clone();
        for &count in one_and(threads).iter().skip(1) {
            seeds.extend(base.iter().map(|k| with(*k, count, 1)));
        }
        // A file's images may be large: what it runs at another batch is drawn, not measured whole.
        let base = if is_file { Vec::new() } else { base };
        seeds.extend(base.iter().map(|k| with(*k, 1, 8)));
        let alone = base.iter().filter_map(|k| match *k {
            Key::Conv(c) => Some(Key::Conv(ConvKey {
                context: Place::Alone,
                ..c
            })),
            _ => None,
        });
        seeds.extend(alone);
    }
    let probe = OnnxProbe::new(seeds, block).map_err(|e| Fault::from(SearchError::Onnx(e)))?;
    let probe = probe.with_threads(if quick { vec![1] } else { one_and(threads) });
    let seeds = probe.seeds();
    Ok(Wanted {
        probe: Box::new(probe),
        table: seeds + if quick { 30 } else { 350 },
        heldout: if quick { 16 } else { 80 },
        live: live("onnx"),
        adapt: true,
    })
}

/// The same operator for another number of threads and another batch.
fn with(key: Key, threads: u32, batch: u32) -> Key {
    let plane = |p: PlaneKey| PlaneKey {
        threads,
        batch: p.batch * batch,
        ..p
    };
    match key {
        Key::Session { .. } => Key::Session { threads },
        Key::Conv(c) => Key::Conv(ConvKey {
            threads,
            batch: c.batch * batch,
            ..c
        }),
        Key::Linear(mut l) => {
            (l.threads, l.batch) = (threads, l.batch * batch);
            Key::Linear(l)
        }
        Key::Add(p) => Key::Add(plane(p)),
        Key::GlobalAvgPool(p) => Key::GlobalAvgPool(plane(p)),
        Key::Entry(p) => Key::Entry(plane(p)),
        Key::Edge(e) => Key::Edge(EdgeKey {
            threads,
            batch: e.batch * batch,
            ..e
        }),
        Key::Pool(p) => Key::Pool(PoolKey {
            threads,
            batch: p.batch * batch,
            ..p
        }),
        Key::Elementwise(e) => Key::Elementwise(ElementwiseKey {
            threads,
            batch: e.batch * batch,
            ..e
        }),
        Key::LowRank(mut l) => {
            (l.conv.threads, l.conv.batch) = (threads, l.conv.batch * batch);
            Key::LowRank(l)
        }
        Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_) | Key::Read(_) => key,
    }
}

/// What our engine runs: every width of experts, dense matrices, attention; in a full profile also draws of any size, from
/// cache and of several tokens.
fn engine(threads: u32, cache_bytes: u64, quick: bool) -> Result<Wanted, Fault> {
    let cpu = Cpu::selected().map_err(|e| Fault::usage(e.to_string(), "leave COTK_ISA out"))?;
    let probe = EngineProbe::new(cpu, one_and(threads), cache_bytes).map_err(latency)?;
    if quick {
        let seeds = probe.quick_seeds();
        let table = seeds.len();
        return Ok(Wanted {
            probe: Box::new(Listed::new(Box::new(probe), seeds, |_| true)),
            table,
            heldout: 0,
            live: live("engine"),
            adapt: false,
        });
    }
    let seeds = probe.seeds().len();
    Ok(Wanted {
        probe: Box::new(probe),
        table: seeds + 200,
        heldout: 60,
        live: live("engine"),
        adapt: true,
    })
}

/// The first GPU's links, or why there are none.
pub(crate) fn links() -> Result<LinkProbe, String> {
    LinkProbe::find()
}

/// Stands where a GPU would: measures nothing and says why.
struct NoGpu(String);

impl Probe for NoGpu {
    fn name(&self) -> &str {
        "gpu"
    }

    fn candidates(&self, _count: usize, _rng: &mut Stream) -> Vec<Key> {
        Vec::new()
    }

    fn measures(&self, _key: &Key) -> bool {
        false
    }

    fn facts(&self) -> Vec<(String, String)> {
        vec![("gpu".to_owned(), format!("none: {}", self.0))]
    }

    fn prepare(&self, key: &Key, _session: u32) -> cotk_latency::Result<Box<dyn Prepared>> {
        Err(refused("gpu", key, &self.0))
    }
}

fn disk(folder: &std::path::Path, quick: bool) -> Result<Wanted, Fault> {
    let (bytes, sizes, depths) = if quick {
        (192 << 20, vec![64 << 10, 1 << 20, 4 << 20], vec![1])
    } else {
        (
            1 << 30,
            vec![64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20],
            vec![1, 2, 4, 8],
        )
    };
    // A third of what is free is enough taken from others.
    let free = cotk_run::files::free_bytes(folder)?;
    let bytes = bytes.min(free / 3);
    let probe = DiskProbe::new(folder, bytes, sizes, depths).map_err(latency)?;
    Ok(Wanted {
        probe: Box::new(probe),
        table: usize::MAX,
        heldout: 0,
        live: live("disk"),
        adapt: false,
    })
}

/// Paths with their errors, then what memory, disk and a GPU's links give: µs before the first byte, and speed.
fn table(profile: &Profile) -> String {
    let mut table = Table::new(&["kernel path", "keys", "repeat %", "error %", "90 % within %"]);
    let block = profile.head.identity.block();
    for fit in profile.fits.iter().filter(|f| !f.path.to_string().starts_with("read.")) {
        // How far the sessions of a key are apart: no fit can be nearer.
        let repeats: Vec<f64> = { profile.rows.iter() }
            .filter(|row| row.key.path(block) == fit.path)
            .map(Row::relative_spread)
            .collect();
        // What only whole networks have is judged with them.
        if !repeats.is_empty() {
            table.row([
                fit.path.to_string(),
                repeats.len().to_string(),
                significant(100.0 * median(&repeats), 2),
                significant(fit.cv_mape_pct, 3),
                significant(100.0 * fit.spread_ln.exp_m1(), 3),
            ]);
        }
    }
    let model = profile.model(&[]);
    let mut speed = Table::new(&["read", "threads", "µs", "GB/s"]);
    for tier in Tier::ALL.into_iter().filter(|tier| *tier != Tier::WorkingSet) {
        let counts = profile.rows.iter().filter_map(|r| match r.key {
            Key::Read(read) if read.tier == tier => Some(read.threads),
            _ => None,
        });
        for count in counts.collect::<std::collections::BTreeSet<u32>>() {
            let Ok(bytes_per_s) = model.bytes_per_s(tier, count) else {
                continue;
            };
            let first = profile
                .fits
                .iter()
                .find(|f| f.path.family == Family::Read(tier) && f.path.threads == count);
            let first = first.and_then(|f| f.coefficients.iter().find(|c| c.term == Term::Call));
            speed.row([
                tier.name().replace('_', " "),
                count.to_string(),
                first.map_or_else(String::new, |c| significant(c.us_per_unit, 3)),
                significant(bytes_per_s / 1e9, 3),
            ]);
        }
    }
    let levels = &profile.head.conditions.levels;
    if !levels.is_empty() {
        let mut found = Table::new(&["working set up to", "threads", "GB/s"]);
        for level in levels {
            found.row([
                level
                    .bytes
                    .map_or_else(|| "any size".to_owned(), |bytes| format!("{} KiB", bytes >> 10)),
                level.threads.to_string(),
                significant(level.gb_per_s, 3),
            ]);
        }
        let told: Vec<String> = { profile.head.conditions.caches.iter() }
            .map(|(name, bytes)| format!("{name} {} KiB", bytes >> 10))
            .collect();
        return format!(
            "{}\n{}\n{}the system tells: {}\n",
            table.render(),
            speed.render(),
            found.render(),
            told.join(", ")
        );
    }
    format!("{}\n{}", table.render(), speed.render())
}
