//! One model in ONNX Runtime: run, time, and see what it became. Inputs and outputs are f32. All graph optimizations are on,
//! one inter-op thread, no spinning of idle workers (several sessions live at once while measuring).

use std::path::Path;
use std::time::Duration;

use cotk_latency::probe::Prepared;
use cotk_latency::probe::rounds::{self, Pace};
use cotk_run::seeds::Seeds;
use ort::session::builder::GraphOptimizationLevel;
use ort::value::Tensor;
use prost::Message;

use crate::{Error, Result, runtime};

pub(crate) mod feeds;

/// A model that is ready to run.
#[derive(Debug)]
pub struct Session {
    name: String,
    inner: ort::session::Session,
    input_dims: Vec<i64>,
    input_name: String,
}

/// Quiet moments of a shared core are hardly longer.
const LONGEST_SLICE: Duration = Duration::from_micros(400);

/// What a timing found, per call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// Median over the runs of the mean time of a call, on an undisturbed core.
    pub ms: f64,
    /// Median absolute deviation of those means.
    pub spread_ms: f64,
    /// Tenth percentile: what the machine can do when nothing disturbs it.
    pub q10_ms: f64,
    /// Number of runs, and of calls in each.
    pub runs: usize,
    pub calls: usize,
}

/// One node of the optimized graph, as ONNX Runtime ran it.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeTime {
    /// Operator after fusion: `QLinearConv`, `FusedConv`, `Conv`, `ReorderOutput`, …
    pub op: String,
    pub name: String,
    pub us: f64,
}

impl Session {
    /// A model from its bytes; `name` for messages.
    ///
    /// # Errors
    /// [`Error::NoLibrary`], [`Error::Load`]; [`Error::Runtime`] in ONNX Runtime's own words.
    pub fn from_bytes(name: &str, bytes: &[u8], threads: usize) -> Result<Self> {
        let fail = |e: ort::Error| failed("load", name, &e);
        let inner = builder(threads, name)?.commit_from_memory(bytes).map_err(fail)?;
        Self::wrap(name, inner)
    }

    /// A model from its file.
    ///
    /// # Errors
    /// As [`Session::from_bytes`].
    pub fn from_file(path: &Path, threads: usize) -> Result<Self> {
        let bytes = cotk_run::files::read(path, crate::read::LIMIT_BYTES)?;
        Self::from_bytes(&path.display().to_string(), &bytes, threads)
    }

    fn wrap(name: &str, inner: ort::session::Session) -> Result<Self> {
        let wrong = |detail: &str| Error::Runtime {
            action: "use",
            model: name.to_owned(),
            detail: detail.to_owned(),
        };
        let [input] = inner.inputs() else {
            return Err(wrong(&format!("{} inputs, expected 1", inner.inputs().len())));
        };
        let shape = input
            .dtype()
            .tensor_shape()
            .ok_or_else(|| wrong("its input is not a tensor"))?;
        let input_dims: Vec<i64> = shape.iter().copied().collect();
        if input_dims.iter().any(|&d| d < 1) {
            return Err(wrong(&format!("input shape {input_dims:?}, expected fixed dimensions")));
        }
        let input_name = input.name().to_owned();
        Ok(Self {
            name: name.to_owned(),
            inner,
            input_dims,
            input_name,
        })
    }

    /// Shape of the input, batch first.
    pub fn input_dims(&self) -> &[i64] {
        &self.input_dims
    }

    /// Number of values of one input.
    pub fn input_len(&self) -> usize {
        self.input_dims
            .iter()
            .map(|&d| usize::try_from(d).unwrap_or(0))
            .product()
    }

    /// The first output of one call, row major.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of values; [`Error::Runtime`].
    pub fn run(&mut self, input: &[f32]) -> Result<Vec<f32>> {
        let tensor = self.input(input)?;
        let fail = |e: ort::Error| failed("run", &self.name, &e);
        let outputs = self.inner.run(ort::inputs![&tensor]).map_err(fail)?;
        let (_, values) = outputs[0].try_extract_tensor::<f32>().map_err(fail)?;
        Ok(values.to_vec())
    }

    /// Outputs of any number of samples: `samples` holds whole samples of a model exported at batch 1 or more; a last
    /// batch that is not full is filled up with its own first sample, whose results are dropped.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn run_all(&mut self, samples: &[f32]) -> Result<Vec<f32>> {
        let batch = usize::try_from(self.input_dims[0]).unwrap_or(1).max(1);
        let (len, sample) = (self.input_len(), self.input_len() / batch);
        if sample == 0 || !samples.len().is_multiple_of(sample) {
            return Err(Error::Input {
                model: self.name.clone(),
                found: samples.len(),
                expected: samples.len().next_multiple_of(sample.max(1)),
            });
        }
        let mut out = Vec::new();
        for chunk in samples.chunks(len) {
            let mut full = chunk.to_vec();
            while full.len() < len {
                full.extend_from_slice(&chunk[..sample]);
            }
            let values = self.run(&full)?;
            out.extend_from_slice(&values[..values.len() / batch * (chunk.len() / sample)]);
        }
        Ok(out)
    }

    /// Times calls on one input by the rules of [`cotk_latency::probe::rounds`]: `runs` slices (at least 5) of an undisturbed
    /// core, each as many calls as fill `slice`, at most 0.4 ms of them unless a call is longer.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn time(&mut self, input: &[f32], runs: usize, slice: Duration) -> Result<Timing> {
        let runs = u32::try_from(runs.max(5)).unwrap_or(u32::MAX);
        let pace = Pace {
            rounds: runs,
            slice: slice.min(LONGEST_SLICE),
            patience: slice * 4 * runs,
        };
        let name = self.name.clone();
        let ready = self.ready(input)?;
        let mut order = Seeds::new(0).stream("order of one");
        let timed = rounds::time(vec![Box::new(ready)], &pace, &mut order).map_err(|e| failed("time", &name, &e))?;
        let timed = timed.first().expect("one thing was timed");
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let calls = (pace.slice.as_secs_f64() * 1e6 / timed.median_us.max(1e-3))
            .ceil()
            .clamp(1.0, 1e6) as usize;
        Ok(Timing {
            ms: timed.median_us / 1e3,
            spread_ms: timed.mad_us / 1e3,
            q10_ms: timed.q10_us / 1e3,
            runs: timed.count as usize,
            calls,
        })
    }

    /// The session with one input at hand: what a timing loop calls.
    pub(crate) fn ready(&mut self, input: &[f32]) -> Result<Ready<'_>> {
        let tensor = self.input(input)?;
        Ok(Ready { session: self, tensor })
    }

    pub(crate) fn input(&self, input: &[f32]) -> Result<Tensor<f32>> {
        if input.len() != self.input_len() {
            return Err(Error::Input {
                model: self.name.clone(),
                found: input.len(),
                expected: self.input_len(),
            });
        }
        let fail = |e: ort::Error| failed("take an input for", &self.name, &e);
        Tensor::from_array((self.input_dims.clone(), input.to_vec())).map_err(fail)
    }

    pub(crate) fn call(&mut self, tensor: &Tensor<f32>) -> Result<()> {
        let done = self.inner.run(ort::inputs![tensor]);
        done.map(drop).map_err(|e| failed("run", &self.name, &e))
    }

    /// Name of the model's input.
    pub fn input_name(&self) -> &str {
        &self.input_name
    }
}

/// See [`Session::ready`].
pub(crate) struct Ready<'a> {
    session: &'a mut Session,
    tensor: Tensor<f32>,
}

impl Prepared for Ready<'_> {
    fn run(&mut self, _piece: usize) -> cotk_latency::Result<()> {
        let done = self.session.call(&self.tensor);
        done.map_err(|e| cotk_latency::Error::Probe {
            probe: "onnx".into(),
            key: self.session.name.clone(),
            detail: e.to_string(),
        })
    }
}

fn builder(threads: usize, name: &str) -> Result<ort::session::builder::SessionBuilder> {
    let environment = runtime::environment()?;
    let fail = |e: &dyn std::fmt::Display| Error::Runtime {
        action: "set up",
        model: name.to_owned(),
        detail: e.to_string(),
    };
    let builder = ort::session::Session::builder(environment).map_err(|e| fail(&e))?;
    let builder = builder
        .with_optimization_level(GraphOptimizationLevel::All)
        .map_err(|e| fail(&e))?;
    let builder = builder.with_intra_threads(threads.max(1)).map_err(|e| fail(&e))?;
    let builder = builder.with_inter_threads(1).map_err(|e| fail(&e))?;
    builder.with_intra_op_spinning(false).map_err(|e| fail(&e))
}

fn failed(action: &'static str, model: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Runtime {
        action,
        model: model.to_owned(),
        detail: error.to_string(),
    }
}

/// The operators that ONNX Runtime runs for this model, after all its optimizations: `(domain, operator, node name)`.
///
/// # Errors
/// As [`Session::from_bytes`].
pub fn optimized_operators(name: &str, bytes: &[u8]) -> Result<Vec<(String, String, String)>> {
    let folder = temporary()?;
    let path = folder.path().join("optimized.onnx");
    let fail = |e: &dyn std::fmt::Display| failed("optimize", name, e);
    let mut builder = builder(1, name)?
        .with_optimized_model_path(&path)
        .map_err(|e| fail(&e))?;
    builder.commit_from_memory(bytes).map_err(|e| fail(&e))?;
    let bytes = cotk_run::files::read(&path, crate::read::LIMIT_BYTES)?;
    let model = crate::proto::Model::decode(&bytes[..]).map_err(|e| fail(&e))?;
    let nodes = model.graph.unwrap_or_default().node;
    Ok(nodes.into_iter().map(|n| (n.domain, n.op_type, n.name)).collect())
}

/// Time by node of one call, from ONNX Runtime's own profiler: for shares, not for latency (it costs time itself).
///
/// # Errors
/// As [`Session::run`]; [`Error::Decode`] when the trace cannot be read.
pub fn profile_nodes(name: &str, bytes: &[u8], threads: usize, input: &[f32]) -> Result<Vec<NodeTime>> {
    let folder = temporary()?;
    let fail = |e: &dyn std::fmt::Display| failed("profile", name, e);
    let mut builder = builder(threads, name)?
        .with_profiling(folder.path().join("trace"))
        .map_err(|e| fail(&e))?;
    let mut session = Session::wrap(name, builder.commit_from_memory(bytes).map_err(|e| fail(&e))?)?;
    session.run(input)?;
    // Without this the trace stays empty.
    let trace = session.inner.end_profiling().map_err(|e| fail(&e))?;
    let wrong = |detail: String| Error::Decode {
        file: trace.clone(),
        detail,
    };
    let text = cotk_run::files::read_text(&trace, 1 << 28)?;
    let events: serde_json::Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let events = events.as_array().ok_or_else(|| wrong("not a list of events".into()))?;
    let kernels = events.iter().filter_map(|event| {
        let label = event.get("name")?.as_str()?.strip_suffix("_kernel_time")?;
        Some(NodeTime {
            op: event.get("args")?.get("op_name")?.as_str()?.to_owned(),
            name: label.to_owned(),
            us: event.get("dur")?.as_f64()?,
        })
    });
    Ok(kernels.collect())
}

fn temporary() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|source| {
        Error::Run(cotk_run::Error::Io {
            action: "create a temporary folder in",
            file: std::env::temp_dir(),
            source,
        })
    })
}
