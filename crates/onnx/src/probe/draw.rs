//! Draws of keys as use has them: operators of random networks mostly, then shapes spread evenly over all that is sensible,
//! triples, and neighbours of the seeds. 45 % of channels are multiples of four, 40 % of the block, 15 % any.

use cotk_latency::graph::Numerics;
use cotk_latency::walk::operators;
use cotk_latency::work::{
    Block, Context, ConvKey, EdgeKey, EdgeKind, ElementwiseKey, ElementwiseKind, Key, LinearKey, LowRankKey, PoolKey,
    PoolKind,
};
use cotk_run::seeds::Stream;
use rand::RngExt;
use rand::seq::IndexedRandom;

use crate::zoo::{Kind, random_network};

/// Larger ones take too long to be timed often.
const MOST_MACS: u64 = 60_000_000;
/// Square roots of primes: multiples of these spread evenly in as many dimensions.
const STEPS: [f64; 5] = [
    std::f64::consts::SQRT_2,
    1.732_050_807_568_877_2,
    2.236_067_977_499_79,
    2.645_751_311_064_590_6,
    3.316_624_790_355_4,
];

pub(super) struct Draw<'a> {
    convs: Vec<ConvKey>,
    block: Block,
    threads: &'a [u32],
    rng: &'a mut Stream,
    /// Where the even spread begins, and how many it has given.
    offset: [f64; 5],
    given: f64,
    /// Operators of the network at hand, not drawn yet.
    pending: Vec<Key>,
}

impl<'a> Draw<'a> {
    pub(super) fn new(seeds: &[Key], block: Block, threads: &'a [u32], rng: &'a mut Stream) -> Self {
        let convs = seeds.iter().filter_map(|k| match k {
            Key::Conv(c) if c.groups == 1 && c.context == Context::Chain => Some(*c),
            _ => None,
        });
        Self {
            convs: convs.collect(),
            block,
            threads,
            offset: std::array::from_fn(|_| rng.random()),
            rng,
            given: 0.0,
            pending: Vec::new(),
        }
    }

    pub(super) fn key(&mut self) -> Key {
        match self.rng.random_range(0..20) {
            0..10 => self.of_a_network(),
            10..14 => Key::Conv(self.spread()),
            14..16 => self.triple(),
            16 => self.pass(),
            _ if self.convs.is_empty() => self.of_a_network(),
            _ => self.like_a_seed(),
        }
    }

    fn threads(&mut self) -> u32 {
        match self.threads {
            [] => 1,
            [only] => *only,
            [first, more @ ..] if self.rng.random_range(0..3) == 0 => more.choose(self.rng).copied().unwrap_or(*first),
            [first, ..] => *first,
        }
    }

    fn of_a_network(&mut self) -> Key {
        // A few of each: one network is not the whole table.
        if self.pending.is_empty() {
            let kind = *Kind::ALL.choose(self.rng).expect("four kinds");
            let mut graph = random_network(self.rng, kind);
            if self.rng.random_range(0..10) == 0 {
                graph = graph.with_batch(8).unwrap_or(graph);
            }
            let threads = self.threads();
            let keys = operators(&graph, threads, self.block);
            self.pending = keys.sample(self.rng, 4).copied().collect();
        }
        self.pending.pop().expect("a network has operators")
    }

    /// Any convolution, evenly over the logarithms of its sizes.
    fn spread(&mut self) -> ConvKey {
        loop {
            self.given += 1.0;
            let at: [f64; 5] = std::array::from_fn(|i| (self.offset[i] + self.given * STEPS[i]).fract());
            let kind = self.rng.random_range(0..10);
            let most = if kind < 4 { 160.0 } else { 384.0 };
            let (cin, cout) = (self.channels(4.0, most, at[0]), self.channels(4.0, most, at[1]));
            let stride = if at[3] < 0.75 { 1 } else { 2 };
            let side = self.whole(4.0, 33.0, at[2]);
            let mut key = ConvKey {
                batch: if at[4] < 0.1 { 8 } else { 1 },
                cin,
                cout,
                kernel: if self.rng.random::<f64>() < 0.7 { 3 } else { 5 },
                stride,
                groups: 1,
                height: side,
                width: side,
                numerics: if self.rng.random::<f64>() < 0.6 {
                    Numerics::F32
                } else {
                    Numerics::Int8
                },
                threads: self.threads(),
                context: Context::Chain,
            };
            match kind {
                0..4 if stride == 1 && at[4] > 0.5 => key.cout = key.cin,
                0..4 => {}
                4..7 => key.kernel = 1,
                _ => (key.cout, key.groups) = (key.cin, key.cin),
            }
            if macs(&key) < MOST_MACS {
                return key;
            }
        }
    }

    fn triple(&mut self) -> Key {
        loop {
            let mut conv = self.spread();
            if conv.groups > 1 || conv.kernel == 1 || conv.cin < 12 {
                continue;
            }
            conv.batch = 1;
            let mut rank = |channels: u32| {
                let share = self.rng.random();
                self.channels(4.0, f64::from(channels.max(5)), share)
            };
            let (rank_in, rank_out) = (rank(conv.cin), rank(conv.cout));
            return Key::LowRank(LowRankKey {
                conv,
                rank_in,
                rank_out,
            });
        }
    }

    /// Pools, passes and linear layers.
    fn pass(&mut self) -> Key {
        let (share, side) = (self.rng.random(), *[4u32, 8, 16, 32].choose(self.rng).expect("a list"));
        let channels = self.channels(8.0, 256.0, share);
        let threads = self.threads();
        match self.rng.random_range(0..7) {
            0..2 => Key::Pool(PoolKey {
                kind: if share < 0.5 { PoolKind::Max } else { PoolKind::Mean },
                batch: 1,
                channels,
                kernel: *[2, 3, 3].choose(self.rng).expect("a list"),
                stride: 1,
                height: side,
                width: side,
                numerics: Numerics::F32,
                threads,
            }),
            2..5 => Key::Elementwise(ElementwiseKey {
                kind: *[
                    ElementwiseKind::Unary,
                    ElementwiseKind::Transcendental,
                    ElementwiseKind::Binary,
                ]
                .choose(self.rng)
                .expect("a list"),
                batch: 1,
                channels,
                height: side,
                width: side,
                numerics: Numerics::F32,
                threads,
            }),
            5 => Key::Edge(EdgeKey {
                kind: if share < 0.5 {
                    EdgeKind::Dequantize
                } else {
                    EdgeKind::TransposeInt8
                },
                batch: 1,
                channels: channels.max(16).next_multiple_of(4),
                height: side.max(8),
                width: side.max(8),
                threads,
            }),
            _ => Key::Linear(LinearKey {
                batch: 1,
                inputs: 4 * channels,
                outputs: *[10, 100, 256].choose(self.rng).expect("a list"),
                numerics: if share < 0.5 { Numerics::F32 } else { Numerics::Int8 },
                threads,
            }),
        }
    }

    /// A seed with its channels moved by up to half; those of images stay.
    fn like_a_seed(&mut self) -> Key {
        let mut key = *self.convs.choose(self.rng).expect("not empty");
        let same = key.cin == key.cout && key.stride == 1;
        let mut moved = |channels: u32| {
            let share = self.rng.random();
            self.channels(0.6 * f64::from(channels), 1.6 * f64::from(channels), share)
        };
        if key.cin > 4 {
            key.cin = moved(key.cin);
        }
        key.cout = if same { key.cin } else { moved(key.cout) };
        Key::Conv(key)
    }

    fn whole(&self, low: f64, high: f64, at: f64) -> u32 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "inside low..high"
        )]
        let value = (low * (high / low).powf(at)) as u32;
        value
    }

    /// Log-uniform, rounded as channels are.
    fn channels(&mut self, low: f64, high: f64, at: f64) -> u32 {
        let wish = low * (high / low).powf(at);
        let step = match self.rng.random_range(0..20) {
            0..9 => 4,
            9..17 => self.block.0,
            _ => 1,
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "channels are few"
        )]
        let rounded = (wish / f64::from(step)).round().max(1.0) as u32 * step;
        rounded
    }
}

fn macs(c: &ConvKey) -> u64 {
    let points = u64::from(c.batch) * u64::from(c.height.div_ceil(c.stride)) * u64::from(c.width.div_ceil(c.stride));
    points * u64::from(c.cin / c.groups) * u64::from(c.cout) * u64::from(c.kernel).pow(2)
}
