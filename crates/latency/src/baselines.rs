//! What others predict by, fitted on the same profile, to be judged on the same list: a plain roofline, FLOPs, the nearest
//! table entry, the sum of operators timed alone. None of them knows kernel paths, padding, layouts or fusion: that is the
//! point. Pure.

use crate::fit::nnls;
use crate::graph::{Graph, Numerics};
use crate::predict::{CostModel, Model};
use crate::profile::Profile;
use crate::walk::operators;
use crate::work::{Block, Context, ConvKey, Key, Work};

/// One way to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rival {
    /// Launch plus the larger of arithmetic and memory: three fitted numbers for each number format.
    Roofline,
    /// Affine in multiply-adds, fitted for what is asked: operators on operators, networks on networks.
    Flops,
    /// The time of the nearest shape in the table.
    Nearest,
    /// Convolutions at what they take as a network of their own; the rest as the model has it.
    Alone,
}

impl Rival {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Roofline, Self::Flops, Self::Nearest, Self::Alone];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Roofline => "plain roofline",
            Self::Flops => "flops, affine",
            Self::Nearest => "nearest table entry",
            Self::Alone => "sum of operators alone",
        }
    }
}

/// Counts that anybody would write down: no padding, no layout.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plain {
    mega_macs: f64,
    kib: f64,
}

/// Launch, µs per million multiply-adds, µs per KiB.
type Roofline = [f64; 3];

/// The rivals, fitted.
#[derive(Debug, Clone)]
pub struct Rivals {
    threads: u32,
    block: Block,
    model: Model,
    /// Rows of the table with this number of threads: plain operators, no edges.
    table: Vec<(Key, f64)>,
    roofline: [Roofline; 2],
    flops_of_operators: [f64; 2],
    flops_of_networks: Option<[f64; 2]>,
    has_alone: bool,
}

impl Rivals {
    /// From a profile's rows and networks with `threads` threads.
    pub fn new(profile: &Profile, threads: u32) -> Self {
        let block = profile.head.identity.block();
        let rows = profile.rows.iter().filter(|row| row.key.path(block).threads == threads);
        let table: Vec<(Key, f64)> = rows
            .filter(|row| plain(&row.key).is_some() && !is_alone(&row.key) && row.median_us > 0.0)
            .map(|row| (row.key, row.median_us))
            .collect();
        let of = |numerics: Numerics| -> Vec<(Plain, f64)> {
            let rows = table.iter().filter(|(key, _)| numerics_of(key) == Some(numerics));
            rows.filter_map(|(key, us)| Some((plain(key)?, *us))).collect()
        };
        let all: Vec<(f64, f64)> = table
            .iter()
            .filter_map(|(key, us)| Some((plain(key)?.mega_macs, *us)))
            .collect();
        let networks: Vec<(f64, f64)> = profile
            .networks
            .iter()
            .filter(|row| row.threads == threads)
            .map(|row| (mega_macs(&row.graph), row.median_us))
            .collect();
        Self {
            threads,
            block,
            model: profile.model(&[]),
            roofline: [roofline(&of(Numerics::F32)), roofline(&of(Numerics::Int8))],
            flops_of_operators: affine(&all),
            flops_of_networks: (networks.len() >= 2).then(|| affine(&networks)),
            has_alone: profile.rows.iter().any(|row| is_alone(&row.key)),
            table,
        }
    }

    /// µs of one operator; `None` where the rival has nothing to go by.
    pub fn operator_us(&self, rival: Rival, key: &Key) -> Option<f64> {
        let counts = plain(key)?;
        match rival {
            Rival::Roofline => {
                let [launch, compute, memory] = self.roofline[numerics_of(key)? as usize];
                Some(launch + (compute * counts.mega_macs).max(memory * counts.kib))
            }
            Rival::Flops => Some(self.flops_of_operators[0] + self.flops_of_operators[1] * counts.mega_macs),
            Rival::Nearest => self.nearest(key),
            Rival::Alone => match *key {
                Key::Conv(conv) if self.has_alone => {
                    let alone = Key::Conv(ConvKey {
                        context: Context::Alone,
                        ..conv
                    });
                    Some(self.model.predict(&Work::Operator(alone)).ok()?.ms * 1e3)
                }
                Key::Conv(_) => None,
                _ => Some(self.model.predict(&Work::Operator(*key)).ok()?.ms * 1e3),
            },
        }
    }

    /// µs of a network: its operators in sum, without edges that nobody else sees; by FLOPs as a whole.
    pub fn network_us(&self, rival: Rival, graph: &Graph) -> Option<f64> {
        if rival == Rival::Flops {
            let [launch, slope] = self.flops_of_networks?;
            return Some(launch + slope * mega_macs(graph));
        }
        let keys = operators(graph, self.threads, self.block);
        keys.iter()
            .filter(|key| plain(key).is_some())
            .map(|key| self.operator_us(rival, key))
            .sum()
    }

    /// Smallest distance in ln of every size, among operators of the same kind; ties go to the earlier row.
    fn nearest(&self, key: &Key) -> Option<f64> {
        let (kind, at) = place(key)?;
        let near = self.table.iter().filter_map(|(other, us)| {
            let (other_kind, there) = place(other)?;
            let distance: f64 = at.iter().zip(&there).map(|(a, b)| (a - b).powi(2)).sum();
            (other_kind == kind).then_some((distance, *us))
        });
        near.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, us)| us)
    }
}

fn is_alone(key: &Key) -> bool {
    matches!(key, Key::Conv(conv) if conv.context == Context::Alone)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn mega_macs(graph: &Graph) -> f64 {
    graph.macs() as f64 / 1e6
}

/// What a table that knows no kernels would file an operator under, and where: ln of each size.
fn place(key: &Key) -> Option<((u8, Numerics), Vec<f64>)> {
    let ln = |sizes: &[u32]| sizes.iter().map(|&s| f64::from(s.max(1)).ln()).collect::<Vec<f64>>();
    Some(match *key {
        Key::Conv(c) => {
            let sizes = ln(&[c.batch, c.cin, c.cout, c.height, c.width, c.groups]);
            // Kernel and stride count double, as their squares do in work.
            let [kernel, stride] = [c.kernel, c.stride].map(|s| 2.0 * f64::from(s).ln());
            ((0, c.numerics), [sizes, vec![kernel, stride]].concat())
        }
        Key::Linear(l) => ((1, l.numerics), ln(&[l.batch, l.inputs, l.outputs])),
        Key::Add(p) => ((2, p.numerics), ln(&[p.batch, p.channels, p.height, p.width])),
        Key::GlobalAvgPool(p) => ((3, p.numerics), ln(&[p.batch, p.channels, p.height, p.width])),
        _ => return None,
    })
}

fn numerics_of(key: &Key) -> Option<Numerics> {
    place(key).map(|(kind, _)| kind.1)
}

/// Multiply-adds and bytes read and written once (reference 2.1); `None` for what is no operator on paper.
fn plain(key: &Key) -> Option<Plain> {
    let bytes = |numerics| match numerics {
        Numerics::F32 => 4.0,
        Numerics::Int8 => 1.0,
    };
    let product = |sizes: &[u32]| sizes.iter().map(|&s| f64::from(s)).product::<f64>();
    let (macs, elements, numerics) = match *key {
        Key::Conv(c) => {
            let (height, width) = (c.height.div_ceil(c.stride.max(1)), c.width.div_ceil(c.stride.max(1)));
            let weights = product(&[c.kernel, c.kernel, c.cin / c.groups.max(1), c.cout]);
            let out = product(&[c.batch, height, width]);
            let moved = product(&[c.batch, c.cin, c.height, c.width]) + out * f64::from(c.cout) + weights;
            (out * weights, moved, c.numerics)
        }
        Key::Linear(l) => {
            let weights = product(&[l.inputs, l.outputs]);
            (
                f64::from(l.batch) * weights,
                weights + f64::from(l.batch) * f64::from(l.inputs + l.outputs),
                l.numerics,
            )
        }
        Key::Add(p) => (
            0.0,
            3.0 * product(&[p.batch, p.channels, p.height, p.width]),
            p.numerics,
        ),
        Key::GlobalAvgPool(p) => (0.0, product(&[p.batch, p.channels, p.height, p.width]), p.numerics),
        _ => return None,
    };
    Some(Plain {
        mega_macs: macs / 1e6,
        kib: bytes(numerics) * elements / 1024.0,
    })
}

/// `argmin_{a, b ≥ 0} Σ ((a + b·x − t) / t)²`.
fn affine(rows: &[(f64, f64)]) -> [f64; 2] {
    let rows: Vec<(Vec<f64>, f64)> = rows.iter().map(|&(x, t)| (vec![1.0, x], t)).collect();
    relative(&rows, 2).try_into().expect("two columns")
}

/// `launch + max(compute, memory)`: each row is fitted on the side that binds it, until none changes sides.
fn roofline(rows: &[(Plain, f64)]) -> Roofline {
    let mut found: Roofline = relative(
        &rows
            .iter()
            .map(|(p, t)| (vec![1.0, p.mega_macs, p.kib], *t))
            .collect::<Vec<_>>(),
        3,
    )
    .try_into()
    .expect("three columns");
    for _ in 0..30 {
        let side = |p: &Plain| {
            if found[1] * p.mega_macs >= found[2] * p.kib {
                vec![1.0, p.mega_macs, 0.0]
            } else {
                vec![1.0, 0.0, p.kib]
            }
        };
        let next: Vec<(Vec<f64>, f64)> = rows.iter().map(|(p, t)| (side(p), *t)).collect();
        let next: Roofline = relative(&next, 3).try_into().expect("three columns");
        // A side that binds nobody would never bind again.
        let kept = [
            next[0],
            if next[1] > 0.0 { next[1] } else { found[1] },
            if next[2] > 0.0 { next[2] } else { found[2] },
        ];
        if kept == found {
            break;
        }
        found = kept;
    }
    found
}

/// Non-negative least squares of relative errors.
fn relative(rows: &[(Vec<f64>, f64)], columns: usize) -> Vec<f64> {
    let mut gram = vec![vec![0.0; columns]; columns];
    let mut right = vec![0.0; columns];
    for (x, t) in rows {
        for i in 0..columns {
            right[i] += x[i] / t;
            for j in 0..columns {
                gram[i][j] += x[i] * x[j] / (t * t);
            }
        }
    }
    for (i, row) in gram.iter_mut().enumerate() {
        row[i] = row[i] * (1.0 + 1e-9) + f64::MIN_POSITIVE;
    }
    nnls(&gram, &right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roofline_machine_is_found() {
        let rows: Vec<(Plain, f64)> = (0..60u32)
            .map(|i| {
                let (mega_macs, kib) = (f64::from(i % 12) + 0.1, 40.0 * f64::from(i / 12) + 1.0);
                (Plain { mega_macs, kib }, 3.0 + (8.0 * mega_macs).max(0.4 * kib))
            })
            .collect();
        let [launch, compute, memory] = roofline(&rows);
        assert!((launch - 3.0).abs() < 0.1 && (compute - 8.0).abs() < 0.1 && (memory - 0.4).abs() < 0.01);
        let [launch, slope] = affine(&[(1.0, 12.0), (2.0, 22.0), (5.0, 52.0)]);
        assert!((launch - 2.0).abs() < 1e-3 && (slope - 10.0).abs() < 1e-3);
    }

    #[test]
    fn the_counts_are_those_on_paper() {
        let conv = Key::Conv(ConvKey {
            batch: 2,
            cin: 6,
            cout: 10,
            kernel: 3,
            stride: 2,
            groups: 1,
            height: 9,
            width: 8,
            numerics: Numerics::F32,
            threads: 1,
            context: Context::Chain,
        });
        let counts = plain(&conv).unwrap();
        assert_eq!(counts.mega_macs, (2 * 5 * 4 * 9 * 6 * 10) as f64 / 1e6);
        assert_eq!(counts.kib, 4.0 * (2 * 6 * 72 + 2 * 20 * 10 + 540) as f64 / 1024.0);
        assert_eq!(plain(&Key::Session { threads: 1 }), None);
    }
}
