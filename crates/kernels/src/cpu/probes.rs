//! Experts for `cotk profile`: registered with `cotk-latency`, which alone has the clock.
//!
//! Widths come from the codes that the dispatch table's paths must all run, so that a new code is measured without being
//! listed again. Cold keys rotate over more memory than the caches hold; hot ones run the same expert.

use std::ops::Range;
use std::sync::Arc;

use cotk_latency::probe::{Prepared, Probe, refused};
use cotk_latency::work::{ExpertKey, Heat, Key};
use cotk_quant::QuantError;
use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::{CodedMatrix, CodedView};
use cotk_quant::encode::assemble;
use cotk_quant::layout::{MAX_PLANES, MatrixFormat, Placement};
use cotk_run::seeds::Stream;
use half::f16;
use rand::RngExt;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::activations::Activations;
use super::dispatch::Isa;
use super::expert::{Expert, ExpertScratch, forward};
use super::gemm::Threads;

/// Most bytes that a cold key builds.
const MOST_BYTES: usize = 256 << 20;
/// Least: beyond most last-level caches even where their size is not known.
const LEAST_BYTES: usize = 64 << 20;

/// Whole experts (gate, up, SwiGLU, down) on one path.
#[derive(Debug, Clone)]
pub struct ExpertProbe {
    isa: Isa,
    threads: Vec<u32>,
    shapes: Vec<(u32, u32)>,
    cache_bytes: u64,
}

impl ExpertProbe {
    /// `shapes` are `(hidden, inner)`, most wanted first; `cache_bytes` the largest cache, 0 if not known.
    pub fn new(isa: Isa, threads: Vec<u32>, shapes: Vec<(u32, u32)>, cache_bytes: u64) -> Self {
        Self {
            isa,
            threads,
            shapes,
            cache_bytes,
        }
    }
}

/// Every prefix of every code once, by what it costs: `(bits, planes)`, nested ones first.
fn widths() -> Vec<(Code, Bits, u32)> {
    let mut found: Vec<(Code, Bits, u32)> = Vec::new();
    for code in Code::ALL.into_iter().rev() {
        for (index, bits) in code.prefixes().iter().enumerate() {
            let planes = u32::try_from(index + 1).expect("a few planes");
            if !found.iter().any(|(_, b, p)| (*b, *p) == (*bits, planes)) {
                found.push((code, *bits, planes));
            }
        }
    }
    found
}

impl Probe for ExpertProbe {
    fn name(&self) -> &str {
        "experts"
    }

    fn candidates(&self, count: usize, rng: &mut Stream) -> Vec<Key> {
        let mut keys = Vec::new();
        for &(hidden, inner) in &self.shapes {
            for heat in [Heat::Cold, Heat::Hot] {
                for (_, bits, planes) in widths() {
                    for &threads in &self.threads {
                        keys.push(ExpertKey {
                            hidden,
                            inner,
                            bits: bits.get(),
                            planes,
                            group: 32,
                            tokens: 1,
                            threads,
                            heat,
                        });
                    }
                }
            }
        }
        // Beyond the seeds: any size and a few tokens, log-uniform, on the same widths.
        let seeds = keys.len();
        while seeds > 0 && keys.len() < count {
            let mut key = keys[rng.random_range(0..seeds)];
            let mut log_uniform = |low: f32, high: f32| -> u32 {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "inside low..high"
                )]
                let value = (low * rng.random_range(0.0..(high / low).ln()).exp()) as u32;
                value
            };
            (key.hidden, key.inner) = (log_uniform(4.0, 65.0) * 32, log_uniform(2.0, 45.0) * 32);
            key.tokens = log_uniform(1.0, 9.0);
            keys.push(key);
        }
        keys.truncate(count);
        keys.into_iter().map(Key::Expert).collect()
    }

    fn measures(&self, key: &Key) -> bool {
        matches!(key, Key::Expert(key) if widths().iter().any(|(_, b, p)| (b.get(), *p) == (key.bits, key.planes)))
    }

    fn prepare(&self, key: &Key, session: u32) -> cotk_latency::Result<Box<dyn Prepared>> {
        let Key::Expert(expert) = key else {
            return Err(refused(self.name(), key, "not an expert"));
        };
        let ready = self
            .build(expert, session)
            .map_err(|detail| refused(self.name(), key, &detail))?;
        Ok(Box::new(ready))
    }
}

impl ExpertProbe {
    fn build(&self, key: &ExpertKey, session: u32) -> Result<Ready, String> {
        let (code, bits, _) = widths()
            .into_iter()
            .find(|(_, b, p)| (b.get(), *p) == (key.bits, key.planes))
            .ok_or("no code has this prefix")?;
        let (hidden, inner) = (key.hidden as usize, key.inner as usize);
        let matrix = |rows: usize, cols: usize, seed: u32| -> Result<CodedMatrix, String> {
            let format = MatrixFormat::try_new(rows, cols, code, key.group as usize).map_err(|e| e.to_string())?;
            if format.total_bytes() > MOST_BYTES {
                return Err(format!("{} bytes, at most {MOST_BYTES}", format.total_bytes()));
            }
            // What the codes are does not change the time; they differ so that nothing is shared.
            let mut state = seed.wrapping_mul(2_654_435_761) | 1;
            let codes: Vec<u8> = (0..rows * cols)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8 >> (8 - code.full().get())
                })
                .collect();
            let scales = vec![f16::from_f32(0.01); rows * format.groups()];
            let zero_points = code.prefixes().iter().map(|b| code.default_zero_point(*b)).collect();
            assemble(format, &codes, &scales, zero_points).map_err(|e| e.to_string())
        };
        let one = [
            matrix(inner, hidden, session)?,
            matrix(inner, hidden, session + 1)?,
            matrix(hidden, inner, session + 2)?,
        ];
        let record = Record::new(&one, bits).map_err(|e| e.to_string())?;
        let bytes = record.bytes.len() - ALIGN;
        let copies = match key.heat {
            Heat::Hot => 1,
            Heat::Cold => {
                let far = usize::try_from(self.cache_bytes.saturating_mul(4)).unwrap_or(MOST_BYTES);
                far.clamp(LEAST_BYTES, MOST_BYTES).div_ceil(bytes).max(2)
            }
        };
        let tokens = key.tokens.max(1) as usize;
        #[expect(clippy::cast_precision_loss, reason = "any values do")]
        let x: Vec<f32> = (0..tokens * hidden).map(|i| (i as f32).sin()).collect();
        let pool = match key.threads.max(1) {
            1 => None,
            threads => {
                let pool = ThreadPoolBuilder::new().num_threads(threads as usize).build();
                Some(Arc::new(pool.map_err(|e| e.to_string())?))
            }
        };
        Ok(Ready {
            isa: self.isa,
            bits,
            records: (0..copies).map(|_| record.again()).collect(),
            next: 0,
            acts: Activations::of(self.isa, &x, hidden),
            out: vec![0.0; tokens * hidden],
            scratch: ExpertScratch::new(tokens, inner),
            pool,
        })
    }
}

struct Ready {
    isa: Isa,
    bits: Bits,
    records: Vec<Record>,
    next: usize,
    acts: Activations,
    out: Vec<f32>,
    scratch: ExpertScratch,
    pool: Option<Arc<ThreadPool>>,
}

impl Prepared for Ready {
    fn run(&mut self, _piece: usize) -> cotk_latency::Result<()> {
        let expert = self.records[self.next].expert(self.bits);
        self.next = (self.next + 1) % self.records.len();
        let (isa, acts, out, scratch) = (self.isa, &self.acts, &mut self.out, &mut self.scratch);
        match &self.pool {
            None => forward(isa, &expert, acts, out, scratch, Threads::One),
            Some(pool) => pool.install(|| forward(isa, &expert, acts, out, scratch, Threads::Pool)),
        }
        std::hint::black_box(&self.out);
        Ok(())
    }
}

/// Where planes begin: as in a record, no line of 64 bytes straddles two of the cache.
const ALIGN: usize = 64;

/// The planes of one expert as a record holds them: gate and up tile by tile in turn, then down.
struct Record {
    bytes: Vec<u8>,
    /// Of the bytes that the prefix reads, plane by plane: `[pair, down]`, from the first aligned byte.
    ranges: Vec<[Range<usize>; 2]>,
    formats: [MatrixFormat; 3],
    zero_points: [Vec<f32>; 3],
}

impl Record {
    fn new(matrices: &[CodedMatrix; 3], bits: Bits) -> Result<Self, QuantError> {
        let [gate, up, down] = matrices;
        let pair = CodedMatrix::interleave(gate, up)?;
        let planes = gate.format.code().prefix_index(bits)? + 1;
        let (mut packed, mut ranges) = (Vec::new(), Vec::new());
        let mut put = |plane: &[u8]| {
            let from = packed.len();
            packed.extend_from_slice(plane);
            packed.resize(packed.len().next_multiple_of(ALIGN), 0);
            from..from + plane.len()
        };
        for (pair, down) in pair.iter().zip(&down.planes).take(planes) {
            ranges.push([put(pair), put(down)]);
        }
        let mut record = Self {
            bytes: Vec::new(),
            ranges,
            formats: [gate.format, up.format, down.format],
            zero_points: [
                gate.zero_points.clone(),
                up.zero_points.clone(),
                down.zero_points.clone(),
            ],
        };
        record.bytes = aligned(&packed);
        Ok(record)
    }

    /// The same bytes in memory of their own.
    fn again(&self) -> Self {
        let start = self.bytes.as_ptr().align_offset(ALIGN);
        Self {
            bytes: aligned(&self.bytes[start..start + self.bytes.len() - ALIGN]),
            ranges: self.ranges.clone(),
            formats: self.formats,
            zero_points: self.zero_points.clone(),
        }
    }

    fn expert(&self, bits: Bits) -> Expert<'_> {
        let bytes = &self.bytes[self.bytes.as_ptr().align_offset(ALIGN)..];
        let matrix = |i: usize, side: usize, placement: Placement| {
            let mut planes: [&[u8]; MAX_PLANES] = [&[]; MAX_PLANES];
            for (plane, ranges) in planes.iter_mut().zip(&self.ranges) {
                *plane = &bytes[ranges[side].clone()];
            }
            let view = CodedView::try_new(
                self.formats[i],
                &planes[..self.ranges.len()],
                &self.zero_points[i],
                placement,
            );
            view.and_then(|v| v.prefix(bits)).expect("laid out by `new`")
        };
        let (gate, up) = (matrix(0, 0, Placement::PairFirst), matrix(1, 0, Placement::PairSecond));
        Expert::try_new(gate, up, matrix(2, 1, Placement::Alone)).expect("built with shapes that fit")
    }
}

/// `content` from the first byte at a multiple of [`ALIGN`], in a buffer that is [`ALIGN`] bytes longer.
fn aligned(content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; content.len() + ALIGN];
    let start = bytes.as_ptr().align_offset(ALIGN);
    bytes[start..start + content.len()].copy_from_slice(content);
    bytes
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;

    use super::*;

    #[test]
    fn every_prefix_of_every_code_is_a_candidate_that_runs() {
        let threads = vec![1, 2];
        let probe = ExpertProbe::new(Isa::selected().unwrap(), threads, vec![(64, 40)], 1);
        let keys = probe.candidates(60, &mut Seeds::new(1).stream("probe"));
        assert_eq!(keys.len(), 60);
        for code in Code::ALL {
            for (planes, bits) in (1..).zip(code.prefixes()) {
                let measured = |k: &Key| matches!(k, Key::Expert(e) if (e.bits, e.planes) == (bits.get(), planes));
                assert!(keys.iter().any(measured), "{code} at {bits}");
            }
        }
        for key in keys
            .iter()
            .filter(|k| matches!(k, Key::Expert(e) if e.heat == Heat::Hot))
        {
            assert!(probe.measures(key));
            let mut ready = probe.prepare(key, 0).unwrap();
            ready.run(0).unwrap();
        }
        assert!(probe.prepare(&Key::Session { threads: 1 }, 0).is_err());
    }
}
