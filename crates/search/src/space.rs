//! An architecture space as a value: a residual CNN whose convolutions choose a kernel (3 inside 5) and the bits of
//! their weights. Knows no training and no times. Law: every point encodes to a text that decodes to it; every point
//! is a [`Graph`] that can be cut out and run alone.

use cotk_data::images::ImageShape;
use cotk_latency::graph::{
    ActQuant, Activation, Conv, Graph, Linear, Node, Op, RawGraph, Shape, Source, WeightBits, Weights,
};
use cotk_run::seeds::Stream;
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::{Result, SearchError};

/// `[space]`: what may be chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// Channels of the stem (3x3, stride 1).
    #[serde(default = "default_stem")]
    pub stem: u32,
    /// Channels of each stage; a stage begins with a convolution of stride 2.
    #[serde(default = "default_stages")]
    pub stages: Vec<u32>,
    /// Residual blocks of two convolutions behind it.
    #[serde(default = "default_blocks")]
    pub blocks: u32,
    /// Kernels of the searched convolutions, each inside the next.
    #[serde(default = "default_kernels")]
    pub kernels: Vec<u32>,
    /// Bits of their weights, each inside the next. Activations have 8.
    #[serde(default = "default_bits")]
    pub bits: Vec<WeightBits>,
}

impl Default for Section {
    fn default() -> Self {
        Self {
            stem: default_stem(),
            stages: default_stages(),
            blocks: default_blocks(),
            kernels: default_kernels(),
            bits: default_bits(),
        }
    }
}

fn default_stem() -> u32 {
    16
}

fn default_stages() -> Vec<u32> {
    vec![32, 48]
}

fn default_blocks() -> u32 {
    1
}

fn default_kernels() -> Vec<u32> {
    vec![3, 5]
}

fn default_bits() -> Vec<WeightBits> {
    vec![WeightBits::B2, WeightBits::B4, WeightBits::B8]
}

/// One convolution of the backbone, searched or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// As in the graph and in checkpoints.
    pub name: String,
    pub cin: u32,
    pub cout: u32,
    pub stride: u32,
    pub relu: bool,
    /// Index into a point's choices; `None`: 3x3 with 8 bits, always.
    pub choice: Option<usize>,
}

/// What follows what. Indices are into [`Space::slots`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Conv(usize),
    /// `relu(x + second(first(x)))`.
    Block {
        first: usize,
        second: usize,
    },
}

/// A choice for one searched convolution: indices into the space's kernels and bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Choice {
    pub kernel: u8,
    pub bits: u8,
}

/// One network of the space.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Point(pub Vec<Choice>);

/// What a gate switches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateKind {
    /// On: kernel `kernels[rung]` or larger.
    Kernel,
    /// On: bits `bits[rung]` or more.
    Bits,
}

/// One yes-or-no decision. On only inside its parent: the gate of the rung below in the same slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gate {
    /// Index into a point's choices.
    pub choice: usize,
    pub kind: GateKind,
    /// 1 or more: what it switches on is rung `rung`.
    pub rung: usize,
}

/// What a network's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Everything in f32.
    Float,
    /// Weights as chosen, activations 8 bits.
    Int8,
}

/// How activations become bytes: `real = scale * (code - zero_point)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Range {
    pub scale: f32,
    /// 0 behind a ReLU, 128 for signed values.
    pub zero_point: u8,
}

impl From<Range> for ActQuant {
    fn from(range: Range) -> Self {
        Self {
            scale: range.scale,
            zero_point: range.zero_point,
        }
    }
}

/// A [`Form`] with the ranges that it needs.
#[derive(Debug, Clone, PartialEq)]
pub enum Coding {
    Float,
    /// See [`Space::graph`] for the order of `outputs`.
    Int8 {
        input: Range,
        outputs: Vec<Range>,
    },
}

/// A space: fixed backbone, free choices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    input: ImageShape,
    classes: usize,
    kernels: Vec<u32>,
    bits: Vec<u32>,
    slots: Vec<Slot>,
    steps: Vec<Step>,
    gates: Vec<Gate>,
}

impl Space {
    /// The one gate: a section and the data's shape become a space.
    ///
    /// # Errors
    /// [`SearchError::Recipe`] with the key.
    pub fn new(section: &Section, input: ImageShape, classes: usize) -> Result<Self> {
        let refuse = |key, found: String, expected: &str| {
            Err(SearchError::Recipe {
                key,
                found,
                expected: expected.to_owned(),
            })
        };
        if !(1..=1024).contains(&section.stem) {
            return refuse("space.stem", section.stem.to_string(), "1 to 1024 channels");
        }
        if section.stages.is_empty()
            || section.stages.len() > 6
            || section.stages.iter().any(|c| !(1..=4096).contains(c))
        {
            return refuse(
                "space.stages",
                format!("{:?}", section.stages),
                "1 to 6 stages of 1 to 4096 channels",
            );
        }
        if section.blocks > 32 {
            return refuse("space.blocks", section.blocks.to_string(), "at most 32");
        }
        let rising = |list: &[u32]| !list.is_empty() && list.windows(2).all(|w| w[0] < w[1]);
        if !rising(&section.kernels) || section.kernels.iter().any(|k| k % 2 == 0 || *k > 9) {
            return refuse(
                "space.kernels",
                format!("{:?}", section.kernels),
                "odd sizes up to 9, rising",
            );
        }
        let widths: Vec<u32> = section.bits.iter().map(|b| b.get()).collect();
        if !rising(&widths) {
            return refuse("space.bits", format!("{widths:?}"), "some of 2, 4, 8, rising");
        }
        let mut space = Self {
            input,
            classes,
            kernels: section.kernels.clone(),
            bits: widths,
            slots: Vec::new(),
            steps: Vec::new(),
            gates: Vec::new(),
        };
        let channels = u32::try_from(input.channels).expect("1 or 3");
        let stem = space.slot("stem".into(), channels, section.stem, 1, true, false);
        space.steps.push(Step::Conv(stem));
        let mut from = section.stem;
        for (s, &to) in section.stages.iter().enumerate() {
            let down = space.slot(format!("stage{s}.down"), from, to, 2, true, true);
            space.steps.push(Step::Conv(down));
            for b in 0..section.blocks {
                let first = space.slot(format!("stage{s}.block{b}.first"), to, to, 1, true, true);
                let second = space.slot(format!("stage{s}.block{b}.second"), to, to, 1, false, true);
                space.steps.push(Step::Block { first, second });
            }
            from = to;
        }
        let choices = space.choices();
        for choice in 0..choices {
            for rung in 1..space.kernels.len() {
                space.gates.push(Gate {
                    choice,
                    kind: GateKind::Kernel,
                    rung,
                });
            }
            for rung in 1..space.bits.len() {
                space.gates.push(Gate {
                    choice,
                    kind: GateKind::Bits,
                    rung,
                });
            }
        }
        Ok(space)
    }

    fn slot(&mut self, name: String, cin: u32, cout: u32, stride: u32, relu: bool, searched: bool) -> usize {
        let choice = searched.then(|| self.choices());
        self.slots.push(Slot {
            name,
            cin,
            cout,
            stride,
            relu,
            choice,
        });
        self.slots.len() - 1
    }

    /// Shape of the input images.
    pub fn input(&self) -> ImageShape {
        self.input
    }

    /// Outputs of the classifier.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Kernel sizes, rising.
    pub fn kernels(&self) -> &[u32] {
        &self.kernels
    }

    /// Weight bits, rising.
    pub fn bits(&self) -> &[u32] {
        &self.bits
    }

    /// All convolutions, in running order.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// How they are wired; then come global average pool and classifier.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Number of searched convolutions.
    pub fn choices(&self) -> usize {
        self.slots.iter().filter(|s| s.choice.is_some()).count()
    }

    /// The decisions, grouped by choice: kernel rungs, then bit rungs.
    pub fn gates(&self) -> &[Gate] {
        &self.gates
    }

    /// Channels that the classifier sees.
    pub fn features(&self) -> u32 {
        self.slots.last().expect("there is a stem").cout
    }

    /// Number of networks.
    pub fn count(&self) -> f64 {
        let per_choice = (self.kernels.len() * self.bits.len()) as f64;
        per_choice.powi(i32::try_from(self.choices()).expect("few"))
    }

    /// All kernels and bits at their largest.
    pub fn largest(&self) -> Point {
        self.uniform(self.kernels.len() - 1, self.bits.len() - 1)
    }

    /// All kernels and bits at their smallest.
    pub fn smallest(&self) -> Point {
        self.uniform(0, 0)
    }

    /// The same rungs everywhere.
    pub fn uniform(&self, kernel: usize, bits: usize) -> Point {
        let choice = Choice {
            kernel: u8::try_from(kernel).expect("few rungs"),
            bits: u8::try_from(bits).expect("few rungs"),
        };
        Point(vec![choice; self.choices()])
    }

    /// A network at random, all alike likely.
    pub fn sample(&self, stream: &mut Stream) -> Point {
        Point(
            (0..self.choices())
                .map(|_| Choice {
                    kernel: stream.random_range(0..self.kernels.len()) as u8,
                    bits: stream.random_range(0..self.bits.len()) as u8,
                })
                .collect(),
        )
    }

    /// One gene moved by one rung; the same point only if there is nothing to choose.
    #[must_use]
    pub fn mutate(&self, point: &Point, stream: &mut Stream) -> Point {
        let moves = self.moves(point);
        match moves.len() {
            0 => point.clone(),
            n => moves[stream.random_range(0..n)].clone(),
        }
    }

    /// Every network one rung away.
    pub fn moves(&self, point: &Point) -> Vec<Point> {
        let mut moves = Vec::new();
        let mut push = |at: usize, choice: Choice| {
            let mut next = point.clone();
            next.0[at] = choice;
            moves.push(next);
        };
        for (at, &choice) in point.0.iter().enumerate() {
            if choice.kernel > 0 {
                push(
                    at,
                    Choice {
                        kernel: choice.kernel - 1,
                        ..choice
                    },
                );
            }
            if usize::from(choice.kernel) + 1 < self.kernels.len() {
                push(
                    at,
                    Choice {
                        kernel: choice.kernel + 1,
                        ..choice
                    },
                );
            }
            if choice.bits > 0 {
                push(
                    at,
                    Choice {
                        bits: choice.bits - 1,
                        ..choice
                    },
                );
            }
            if usize::from(choice.bits) + 1 < self.bits.len() {
                push(
                    at,
                    Choice {
                        bits: choice.bits + 1,
                        ..choice
                    },
                );
            }
        }
        moves
    }

    /// The point with these gates on. A gate inside a closed one is closed.
    ///
    /// # Panics
    /// When there are not as many as [`Space::gates`].
    pub fn point_of(&self, on: &[bool]) -> Point {
        assert_eq!(on.len(), self.gates.len(), "one value per gate");
        let mut point = self.smallest();
        for (gate, &on) in self.gates.iter().zip(on) {
            let choice = &mut point.0[gate.choice];
            let rung = match gate.kind {
                GateKind::Kernel => &mut choice.kernel,
                GateKind::Bits => &mut choice.bits,
            };
            // Rungs come in rising order: this one opens only on top of the one below.
            if on && usize::from(*rung) + 1 == gate.rung {
                *rung += 1;
            }
        }
        point
    }

    /// The gates of a point: inverse of [`Space::point_of`].
    pub fn gates_of(&self, point: &Point) -> Vec<bool> {
        self.gates
            .iter()
            .map(|gate| {
                let choice = point.0[gate.choice];
                let rung = match gate.kind {
                    GateKind::Kernel => choice.kernel,
                    GateKind::Bits => choice.bits,
                };
                usize::from(rung) >= gate.rung
            })
            .collect()
    }

    /// Kernel size of a slot in a point; the stem has 3.
    pub fn kernel(&self, slot: &Slot, point: &Point) -> u32 {
        slot.choice.map_or(3, |c| self.kernels[usize::from(point.0[c].kernel)])
    }

    /// Weight bits of a slot in a point; the stem has 8.
    pub fn weight_bits(&self, slot: &Slot, point: &Point) -> u32 {
        slot.choice.map_or(8, |c| self.bits[usize::from(point.0[c].bits)])
    }

    /// A point as text: `5w8-3w4-…`, kernel and bits per searched convolution.
    pub fn encode(&self, point: &Point) -> String {
        let parts: Vec<String> = point
            .0
            .iter()
            .map(|c| {
                format!(
                    "{}w{}",
                    self.kernels[usize::from(c.kernel)],
                    self.bits[usize::from(c.bits)]
                )
            })
            .collect();
        parts.join("-")
    }

    /// The point of a text.
    ///
    /// # Errors
    /// [`SearchError::Encoding`] with the part that is wrong.
    pub fn decode(&self, text: &str) -> Result<Point> {
        let refuse = |detail: String| SearchError::Encoding {
            text: text.chars().take(200).collect(),
            detail,
        };
        let parts: Vec<&str> = text.split('-').take(self.choices() + 1).collect();
        if parts.len() != self.choices() {
            return Err(refuse(format!("expected {} parts", self.choices())));
        }
        let rung = |part: &str, text: &str, known: &[u32]| -> Result<u8> {
            known
                .iter()
                .position(|k| k.to_string() == text)
                .and_then(|at| u8::try_from(at).ok())
                .ok_or_else(|| refuse(format!("part `{part}`: `{text}` is none of {known:?}")))
        };
        let choices = parts.into_iter().map(|part| {
            let (k, b) = part
                .split_once('w')
                .ok_or_else(|| refuse(format!("part `{part}`: expected <kernel>w<bits>")))?;
            Ok(Choice {
                kernel: rung(part, k, &self.kernels)?,
                bits: rung(part, b, &self.bits)?,
            })
        });
        Ok(Point(choices.collect::<Result<_>>()?))
    }

    /// The network of a point at batch 1. Node names are the slots' names, `<block>.add`, `pool` and `head`; int8 ranges
    /// are given in node order, but for `head`, whose output stays f32.
    ///
    /// # Errors
    /// [`SearchError::Latency`] when ranges are no numbers.
    ///
    /// # Panics
    /// When there are not as many ranges as [`Space::ranges`].
    pub fn graph(&self, point: &Point, coding: &Coding) -> Result<Graph> {
        let (input_quant, outputs) = match coding {
            Coding::Float => (None, None),
            Coding::Int8 { input, outputs } => {
                assert_eq!(outputs.len(), self.ranges(), "one range per node");
                (Some(ActQuant::from(*input)), Some(outputs))
            }
        };
        let mut nodes: Vec<Node> = Vec::new();
        let mut push = |name: String, op: Op, inputs: Vec<Source>, quantized: bool| {
            let output = outputs.filter(|_| quantized).map(|o| o[nodes.len()].into());
            nodes.push(Node {
                name,
                op,
                inputs,
                output,
            });
            Source::Node(nodes.len() - 1)
        };
        let conv = |slot: &Slot| {
            Op::Conv(Conv {
                cin: slot.cin,
                cout: slot.cout,
                kernel: self.kernel(slot, point),
                stride: slot.stride,
                groups: 1,
                activation: if slot.relu { Activation::Relu } else { Activation::None },
                weights: match coding {
                    Coding::Float => Weights::F32,
                    Coding::Int8 { .. } => Weights::Int(
                        WeightBits::try_from(self.weight_bits(slot, point)).expect("the section has such bits alone"),
                    ),
                },
            })
        };
        let mut x = Source::Input;
        for step in &self.steps {
            x = match *step {
                Step::Conv(at) => push(self.slots[at].name.clone(), conv(&self.slots[at]), vec![x], true),
                Step::Block { first, second } => {
                    let (first, second) = (&self.slots[first], &self.slots[second]);
                    let inner = push(first.name.clone(), conv(first), vec![x], true);
                    let outer = push(second.name.clone(), conv(second), vec![inner], true);
                    let add = second.name.replace("second", "add");
                    push(add, Op::Add(Activation::Relu), vec![outer, x], true)
                }
            };
        }
        let pool = push("pool".into(), Op::GlobalAvgPool, vec![x], true);
        let head = Op::Linear(Linear {
            inputs: self.features(),
            outputs: u32::try_from(self.classes).expect("few classes"),
            activation: Activation::None,
            weights: match coding {
                Coding::Float => Weights::F32,
                Coding::Int8 { .. } => Weights::Int(WeightBits::B8),
            },
        });
        push("head".into(), head, vec![pool], false);
        let dimension = |v: usize| u32::try_from(v).expect("images are small");
        Ok(Graph::new(RawGraph {
            name: "network".into(),
            input: Shape {
                batch: 1,
                channels: dimension(self.input.channels),
                height: dimension(self.input.height),
                width: dimension(self.input.width),
            },
            input_quant,
            nodes,
        })?)
    }

    /// Number of activation ranges of a network: one per node but the classifier.
    pub fn ranges(&self) -> usize {
        let convs = self.slots.len();
        let adds = self.steps.iter().filter(|s| matches!(s, Step::Block { .. })).count();
        convs + adds + 1
    }

    /// The graph of a point for its cost alone: its ranges are made up.
    ///
    /// # Errors
    /// As [`Space::graph`].
    pub fn cost_graph(&self, point: &Point, form: Form) -> Result<Graph> {
        const UNIT: Range = Range {
            scale: 1.0,
            zero_point: 0,
        };
        let coding = match form {
            Form::Float => Coding::Float,
            Form::Int8 => Coding::Int8 {
                input: UNIT,
                outputs: vec![UNIT; self.ranges()],
            },
        };
        self.graph(point, &coding)
    }

    /// Networks whose operators together are all that the space can need: what a profile has to measure.
    ///
    /// # Errors
    /// As [`Space::graph`].
    pub fn cover(&self) -> Result<Vec<Graph>> {
        let mut graphs = Vec::new();
        for kernel in 0..self.kernels.len() {
            graphs.push(self.cost_graph(&self.uniform(kernel, 0), Form::Int8)?);
            graphs.push(self.cost_graph(&self.uniform(kernel, 0), Form::Float)?);
        }
        Ok(graphs)
    }
}

#[cfg(test)]
pub(crate) mod tests;
