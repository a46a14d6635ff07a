//! How keys and kernel paths are written, for people and in files. Law: a path reads back from its name.

use std::fmt;

use super::{Context, EdgeKind, ElementwiseKind, Family, Form, Heat, Key, Path, PoolKind, Tier};
use crate::graph::Numerics;

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Session { threads } => write!(f, "session, {threads} threads"),
            Self::Conv(c) => {
                write!(
                    f,
                    "conv {0}x{0}/{1} {2}→{3} at {4}x{5}",
                    c.kernel, c.stride, c.cin, c.cout, c.height, c.width
                )?;
                if c.groups > 1 {
                    write!(f, " groups {}", c.groups)?;
                }
                write!(
                    f,
                    " {}, batch {}, {} threads",
                    numerics_name(c.numerics),
                    c.batch,
                    c.threads
                )?;
                if c.context == Context::Alone {
                    write!(f, ", alone")
                } else {
                    Ok(())
                }
            }
            Self::Linear(l) => write!(
                f,
                "linear {}→{} {}, batch {}, {} threads",
                l.inputs,
                l.outputs,
                numerics_name(l.numerics),
                l.batch,
                l.threads
            ),
            Self::Add(p) | Self::GlobalAvgPool(p) | Self::Entry(p) => write!(
                f,
                "{} {} at {}x{} {}, batch {}, {} threads",
                self.operator(),
                p.channels,
                p.height,
                p.width,
                numerics_name(p.numerics),
                p.batch,
                p.threads
            ),
            Self::Edge(e) => write!(
                f,
                "{} {} at {}x{}, batch {}, {} threads",
                e.kind.name(),
                e.channels,
                e.height,
                e.width,
                e.batch,
                e.threads
            ),
            Self::Pool(p) => write!(
                f,
                "{} pool {1}x{1}/{2} {3} at {4}x{5} {6}, batch {7}, {8} threads",
                pool_name(p.kind),
                p.kernel,
                p.stride,
                p.channels,
                p.height,
                p.width,
                numerics_name(p.numerics),
                p.batch,
                p.threads
            ),
            Self::Elementwise(e) => write!(
                f,
                "{} {} at {}x{} {}, batch {}, {} threads",
                e.kind.name(),
                e.channels,
                e.height,
                e.width,
                numerics_name(e.numerics),
                e.batch,
                e.threads
            ),
            Self::LowRank(l) => write!(f, "{} as rank {} and {}", Self::Conv(l.conv), l.rank_in, l.rank_out),
            Self::Expert(e) => write!(
                f,
                "{} experts {}x{}{} {} bits in {} planes, group {}, {} tokens, {} threads, {}",
                e.experts,
                e.hidden,
                e.inner,
                if e.rank > 0 {
                    format!(" rank {}", e.rank)
                } else {
                    String::new()
                },
                e.bits,
                e.planes,
                e.group,
                e.tokens,
                e.threads,
                heat_name(e.heat)
            ),
            Self::Dense(d) => write!(
                f,
                "dense {}→{} {}, {} tokens, {} threads, {}",
                d.inputs,
                d.outputs,
                match d.form() {
                    Form::Codes => format!("{} bits in groups of {}", d.bits, d.group),
                    form => form_name(form).to_owned(),
                },
                d.tokens,
                d.threads,
                heat_name(d.heat)
            ),
            Self::Attention(a) => write!(
                f,
                "attention {}/{} heads of {}, {} keys of {} bits, {} tokens, {} sequences, {} threads, {}",
                a.heads,
                a.kv_heads,
                if a.values_in_keys {
                    format!("{}, latent", a.head_dim)
                } else {
                    a.head_dim.to_string()
                },
                a.keys,
                a.kv_bits,
                a.tokens,
                a.sequences,
                a.threads,
                heat_name(a.heat)
            ),
            Self::Glue(g) => write!(
                f,
                "rest of a layer of width {}, {} of {} experts, MLP of {}, {} tokens, {} threads",
                g.hidden, g.top_k, g.experts, g.inner, g.tokens, g.threads
            ),
            Self::Read(r) => write!(
                f,
                "read {} bytes from {}, {} at once",
                r.bytes,
                tier_name(r.tier),
                r.threads
            ),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.family {
            Family::Session => write!(f, "session")?,
            Family::ConvAlone(n) => write!(f, "conv.alone.{}", numerics_name(n))?,
            Family::ConvBlocked => write!(f, "conv.blocked")?,
            Family::ConvFromNchw => write!(f, "conv.from_nchw")?,
            Family::ConvPatches => write!(f, "conv.patches")?,
            Family::DepthwiseBlocked => write!(f, "depthwise.blocked")?,
            Family::DepthwisePlain => write!(f, "depthwise.plain")?,
            Family::ConvGrouped => write!(f, "conv.grouped")?,
            Family::ConvPointwise => write!(f, "conv.pointwise")?,
            Family::ConvPatchesPointwise => write!(f, "conv.patches_pointwise")?,
            Family::ConvInt8 => write!(f, "conv.int8")?,
            Family::ConvInt8Pointwise => write!(f, "conv.int8_pointwise")?,
            Family::ConvInt8Patches => write!(f, "conv.int8_patches")?,
            Family::ConvInt8PatchesPointwise => write!(f, "conv.int8_patches_pointwise")?,
            Family::DepthwiseInt8Plain => write!(f, "depthwise.int8_plain")?,
            Family::DepthwiseInt8 => write!(f, "depthwise.int8")?,
            Family::Linear(n) => write!(f, "linear.{}", numerics_name(n))?,
            Family::Add(n) => write!(f, "add.{}", numerics_name(n))?,
            Family::PoolPlain => write!(f, "pool.plain")?,
            Family::Pool(n) => write!(f, "pool.{}", numerics_name(n))?,
            Family::Entry(n) => write!(f, "entry.{}", numerics_name(n))?,
            Family::Edge(kind) => write!(f, "edge.{}", kind.name())?,
            Family::Window(kind, n) => write!(f, "pool_{}.{}", pool_name(kind), numerics_name(n))?,
            Family::Elementwise(kind, n) => write!(f, "{}.{}", kind.name(), numerics_name(n))?,
            Family::LowRank(n) => write!(f, "low_rank.{}", numerics_name(n))?,
            Family::Expert { codes, heat } => {
                let weights = if codes { "codes" } else { "floats" };
                write!(f, "expert.{weights}.{}", heat_name(heat))?;
            }
            Family::Dense { form, many, heat } => {
                let shape = if many { "gemm" } else { "gemv" };
                write!(f, "dense.{}.{shape}.{}", form_name(form), heat_name(heat))?;
            }
            Family::Attention { kv_bits, heat } => {
                let cache = match kv_bits {
                    32.. => "f32",
                    16..32 => "f16",
                    _ => "int8",
                };
                write!(f, "attention.{cache}.{}", heat_name(heat))?;
            }
            Family::Glue => write!(f, "glue")?,
            Family::Read(tier) => write!(f, "read.{}", tier_name(tier))?,
        }
        write!(f, "/t{}", self.threads)
    }
}

impl std::str::FromStr for Path {
    type Err = String;

    /// The inverse of `Display`.
    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || format!("`{text}` is no kernel path");
        let (_, threads) = text.rsplit_once("/t").ok_or_else(fail)?;
        let threads = threads.parse().map_err(|_| fail())?;
        let simple = [
            Family::Session,
            Family::ConvBlocked,
            Family::ConvFromNchw,
            Family::ConvPatches,
            Family::DepthwiseBlocked,
            Family::DepthwisePlain,
            Family::ConvGrouped,
            Family::PoolPlain,
            Family::ConvPointwise,
            Family::ConvPatchesPointwise,
            Family::ConvInt8,
            Family::ConvInt8Pointwise,
            Family::ConvInt8Patches,
            Family::ConvInt8PatchesPointwise,
            Family::DepthwiseInt8Plain,
            Family::DepthwiseInt8,
            Family::Glue,
        ];
        let by_numerics = [Numerics::F32, Numerics::Int8].into_iter().flat_map(|n| {
            [
                Family::ConvAlone(n),
                Family::Linear(n),
                Family::Add(n),
                Family::Pool(n),
                Family::Entry(n),
                Family::Window(PoolKind::Max, n),
                Family::Window(PoolKind::Mean, n),
                Family::LowRank(n),
            ]
            .into_iter()
            .chain(ElementwiseKind::ALL.map(|kind| Family::Elementwise(kind, n)))
        });
        let edges = EdgeKind::ALL.map(Family::Edge);
        let by_tier = Tier::ALL.map(Family::Read);
        let by_heat = [Heat::Hot, Heat::Cold].into_iter().flat_map(|heat| {
            [
                Family::Expert { codes: true, heat },
                Family::Expert { codes: false, heat },
                Family::Attention { kv_bits: 32, heat },
                Family::Attention { kv_bits: 16, heat },
                Family::Attention { kv_bits: 8, heat },
            ]
        });
        let dense = [Heat::Hot, Heat::Cold].into_iter().flat_map(|heat| {
            [Form::F32, Form::Half, Form::Codes]
                .into_iter()
                .flat_map(move |form| [true, false].map(|many| Family::Dense { form, many, heat }))
        });
        let cnn = simple.into_iter().chain(by_numerics).chain(edges);
        let known = cnn.chain(by_heat).chain(dense).chain(by_tier);
        if let Some(path) = known
            .map(|family| Self { family, threads })
            .find(|path| path.to_string() == text)
        {
            return Ok(path);
        }
        Err(fail())
    }
}

pub(crate) fn numerics_name(numerics: Numerics) -> &'static str {
    match numerics {
        Numerics::F32 => "f32",
        Numerics::Int8 => "int8",
    }
}

pub(crate) fn pool_name(kind: PoolKind) -> &'static str {
    match kind {
        PoolKind::Max => "max",
        PoolKind::Mean => "mean",
    }
}

pub(crate) fn form_name(form: Form) -> &'static str {
    match form {
        Form::F32 => "f32",
        Form::Half => "half",
        Form::Codes => "codes",
    }
}

pub(crate) fn heat_name(heat: Heat) -> &'static str {
    match heat {
        Heat::Hot => "hot",
        Heat::Cold => "cold",
    }
}

pub(crate) fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::L2 => "l2",
        Tier::L3 => "l3",
        Tier::Memory => "memory",
        Tier::Disk => "disk",
        Tier::DiskBuffered => "disk_buffered",
        Tier::WorkingSet => "working_set",
        Tier::DiskAgain => "disk_again",
        Tier::HostToDevicePinned => "host_to_device_pinned",
        Tier::HostToDevice => "host_to_device",
        Tier::DeviceToHostPinned => "device_to_host_pinned",
        Tier::DeviceToHost => "device_to_host",
        Tier::DeviceMemory => "device_memory",
    }
}
