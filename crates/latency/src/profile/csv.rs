//! `timings.csv` and `heldout.csv`: one typed row, one parser, one writer. Fields hold no commas and no quotes. The last
//! column is a checksum of the line before it, so that an edited line is refused by its number.

use std::collections::HashMap;
use std::path::Path as FilePath;

use cotk_run::files;

use super::{FileMark, HeldOut, LIMIT_BYTES, Row, Taken};
use crate::graph::Numerics;
use crate::work::{
    AttentionKey, Context, ConvKey, DenseKey, EdgeKey, EdgeKind, ElementwiseKey, ElementwiseKind, ExpertKey, GlueKey,
    Heat, Key, LinearKey, LowRankKey, PlaneKey, PoolKey, PoolKind, ReadKey, Tier, heat_name, numerics_name, pool_name,
    tier_name,
};
use crate::{Error, Result};

/// Columns of a key, in the order of the file; those that an operator does not have stay empty. Of a linear layer `cin` and
/// `cout` are inputs and outputs.
const KEY: [&str; 31] = [
    "operator",
    "batch",
    "cin",
    "cout",
    "kernel",
    "stride",
    "groups",
    "height",
    "width",
    "numerics",
    "context",
    "kind",
    "rank_in",
    "rank_out",
    "hidden",
    "inner",
    "bits",
    "planes",
    "group",
    "rank",
    "experts",
    "top_k",
    "heads",
    "kv_heads",
    "head_dim",
    "value_dim",
    "values",
    "keys",
    "sequences",
    "tokens",
    "heat",
];
/// Where attention's values are: rows of their own, or the beginning of their keys.
const VALUES: [(&str, bool); 2] = [("own", false), ("keys", true)];
const KEY_TAIL: [&str; 3] = ["tier", "bytes", "threads"];
const ROW: [&str; 10] = [
    "sessions",
    "count",
    "median_us",
    "q10_us",
    "mad_us",
    "dropped",
    "quiet",
    "steal_pct",
    "lost_pct",
    "switches",
];
const HELDOUT: [&str; 6] = ["predicted_us", "lo_us", "hi_us", "measured_us", "repeat_us", "coeffs"];
/// No time of ours comes near this: eleven days.
const MOST_US: f64 = 1e12;

pub(super) fn write_rows(rows: &[Row]) -> String {
    let values = |r: &Row| {
        vec![
            r.sessions.to_string(),
            r.count.to_string(),
            number(r.median_us),
            number(r.q10_us),
            number(r.mad_us),
            optional(r.taken.dropped),
            optional(r.taken.is_quiet),
            optional(r.taken.steal_pct),
            optional(r.taken.lost_pct),
            optional(r.taken.switches),
        ]
    };
    write(&ROW, rows.iter().map(|r| (r.key, values(r))))
}

pub(super) fn write_heldout(rows: &[HeldOut]) -> String {
    let values = |h: &HeldOut| {
        let times = [h.predicted_us, h.lo_us, h.hi_us, h.measured_us].map(number);
        let rest = [optional(h.repeat_us), optional(h.coeffs.map(|c| format!("{c:016x}")))];
        times.into_iter().chain(rest).collect()
    };
    write(&HELDOUT, rows.iter().map(|h| (h.key, values(h))))
}

/// An empty cell for what was not recorded.
fn optional<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(String::new, |v| v.to_string())
}

/// Shortest text that reads back to the same number.
fn number(value: f64) -> String {
    value.to_string()
}

fn write(extra: &[&str], rows: impl Iterator<Item = (Key, Vec<String>)>) -> String {
    let names: Vec<&str> = KEY.iter().chain(&KEY_TAIL).chain(extra).copied().collect();
    let mut text = names.join(",") + ",sum\n";
    for (key, values) in rows {
        let cells = cells(&key);
        let line: Vec<String> = KEY
            .iter()
            .chain(&KEY_TAIL)
            .map(|name| {
                cells
                    .iter()
                    .find(|c| c.0 == *name)
                    .map(|c| c.1.clone())
                    .unwrap_or_default()
            })
            .chain(values)
            .collect();
        let line = line.join(",");
        text += &format!("{line},{}\n", sum(&line));
    }
    text
}

fn sum(line: &str) -> String {
    format!("{:08x}", files::checksum(line.as_bytes()) >> 32)
}

fn cells(key: &Key) -> Vec<(&'static str, String)> {
    let mut cells = vec![("operator", key.operator().to_owned())];
    let mut push = |name, value: String| cells.push((name, value));
    match *key {
        Key::Session { threads } => push("threads", threads.to_string()),
        Key::Conv(c) => cells_of_conv(&c)
            .into_iter()
            .for_each(|(name, value)| push(name, value)),
        Key::Linear(l) => {
            let numbers = [
                ("batch", l.batch),
                ("cin", l.inputs),
                ("cout", l.outputs),
                ("threads", l.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
            push("numerics", numerics_name(l.numerics).into());
        }
        Key::Add(p) | Key::GlobalAvgPool(p) | Key::Entry(p) => {
            let numbers = [
                ("batch", p.batch),
                ("cin", p.channels),
                ("height", p.height),
                ("width", p.width),
                ("threads", p.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
            push("numerics", numerics_name(p.numerics).into());
        }
        Key::Edge(e) => {
            let numbers = [
                ("batch", e.batch),
                ("cin", e.channels),
                ("height", e.height),
                ("width", e.width),
                ("threads", e.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
            push("kind", e.kind.name().into());
        }
        Key::Pool(p) => {
            let numbers = [
                ("batch", p.batch),
                ("cin", p.channels),
                ("kernel", p.kernel),
                ("stride", p.stride),
                ("height", p.height),
                ("width", p.width),
                ("threads", p.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
            push("numerics", numerics_name(p.numerics).into());
            push("kind", pool_name(p.kind).into());
        }
        Key::Elementwise(e) => {
            let numbers = [
                ("batch", e.batch),
                ("cin", e.channels),
                ("height", e.height),
                ("width", e.width),
                ("threads", e.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
            push("numerics", numerics_name(e.numerics).into());
            push("kind", e.kind.name().into());
        }
        Key::LowRank(l) => {
            let inner = cells_of_conv(&l.conv);
            inner.into_iter().for_each(|(name, value)| push(name, value));
            push("rank_in", l.rank_in.to_string());
            push("rank_out", l.rank_out.to_string());
        }
        Key::Expert(e) => {
            let numbers = [
                ("hidden", e.hidden),
                ("inner", e.inner),
                ("bits", e.bits),
                ("planes", e.planes),
                ("group", e.group),
                ("rank", e.rank),
                ("experts", e.experts),
                ("tokens", e.tokens),
                ("threads", e.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
            push("heat", heat_name(e.heat).into());
        }
        Key::Dense(d) => {
            let numbers = [
                ("cin", d.inputs),
                ("cout", d.outputs),
                ("bits", d.bits),
                ("group", d.group),
                ("tokens", d.tokens),
                ("threads", d.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
            push("heat", heat_name(d.heat).into());
        }
        Key::Attention(a) => {
            let numbers = [
                ("heads", a.heads),
                ("kv_heads", a.kv_heads),
                ("head_dim", a.head_dim),
                ("value_dim", a.value_dim),
                ("bits", a.kv_bits),
                ("keys", a.keys),
                ("tokens", a.tokens),
                ("sequences", a.sequences),
                ("threads", a.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
            push("values", VALUES[usize::from(a.values_in_keys)].0.into());
            push("heat", heat_name(a.heat).into());
        }
        Key::Glue(g) => {
            let numbers = [
                ("hidden", g.hidden),
                ("experts", g.experts),
                ("top_k", g.top_k),
                ("inner", g.inner),
                ("tokens", g.tokens),
                ("threads", g.threads),
            ];
            numbers
                .into_iter()
                .for_each(|(name, value)| push(name, value.to_string()));
        }
        Key::Read(r) => {
            push("tier", tier_name(r.tier).into());
            push("bytes", r.bytes.to_string());
            push("threads", r.threads.to_string());
        }
    }
    cells
}

fn cells_of_conv(c: &ConvKey) -> Vec<(&'static str, String)> {
    let context = match c.context {
        Context::Alone => "alone",
        Context::Chain => "chain",
    };
    let numbers = [
        ("batch", c.batch),
        ("cin", c.cin),
        ("cout", c.cout),
        ("kernel", c.kernel),
        ("stride", c.stride),
        ("groups", c.groups),
        ("height", c.height),
        ("width", c.width),
        ("threads", c.threads),
    ];
    let mut cells: Vec<_> = numbers
        .into_iter()
        .map(|(name, value)| (name, value.to_string()))
        .collect();
    cells.push(("numerics", numerics_name(c.numerics).into()));
    cells.push(("context", context.into()));
    cells
}

pub(super) fn rows(file: &FilePath, mark: &FileMark) -> Result<Vec<Row>> {
    read(file, &ROW, mark, |line| {
        Ok(Row {
            key: line.key()?,
            sessions: line.number("sessions")?,
            count: line.number("count")?,
            median_us: line.time("median_us")?,
            q10_us: line.time("q10_us")?,
            mad_us: line.time("mad_us")?,
            taken: Taken {
                dropped: line.recorded("dropped", "a whole number", |_| true)?,
                is_quiet: line.recorded("quiet", "true or false", |_| true)?,
                steal_pct: line.recorded("steal_pct", "0 to 100", is_share)?,
                lost_pct: line.recorded("lost_pct", "0 to 100", is_share)?,
                switches: line.recorded("switches", "a whole number", |_| true)?,
            },
        })
    })
}

pub(super) fn heldout(file: &FilePath, mark: &FileMark) -> Result<Vec<HeldOut>> {
    read(file, &HELDOUT, mark, |line| {
        Ok(HeldOut {
            key: line.key()?,
            predicted_us: line.time("predicted_us")?,
            lo_us: line.time("lo_us")?,
            hi_us: line.time("hi_us")?,
            measured_us: line.time("measured_us")?,
            repeat_us: line.recorded("repeat_us", "a time of 0 or more", |us| (0.0..=MOST_US).contains(us))?,
            coeffs: line.checksum("coeffs")?,
        })
    })
}

fn is_share(pct: &f64) -> bool {
    (0.0..=100.0).contains(pct)
}

fn read<T>(file: &FilePath, extra: &[&str], mark: &FileMark, parse: impl Fn(&Line<'_>) -> Result<T>) -> Result<Vec<T>> {
    let text = files::read_text(file, LIMIT_BYTES)?;
    let fail = |line: u64, what: &str, found: String, expected: String| Error::Line {
        file: file.to_owned(),
        line,
        what: what.to_owned(),
        found,
        expected,
    };
    let names: Vec<&str> = KEY
        .iter()
        .chain(&KEY_TAIL)
        .chain(extra)
        .copied()
        .chain(["sum"])
        .collect();
    let mut out = Vec::new();
    let mut seen: HashMap<Key, u64> = HashMap::new();
    let mut lines = 0;
    for (line, number) in text.lines().zip(1u64..) {
        lines = number;
        if number == 1 {
            if line != names.join(",") {
                return Err(fail(1, "columns", line.chars().take(300).collect(), names.join(",")));
            }
            continue;
        }
        let (body, found) = line.rsplit_once(',').unwrap_or((line, ""));
        if found != sum(body) {
            return Err(fail(
                number,
                "checksum of the line",
                format!("`{found}`"),
                format!("`{}`", sum(body)),
            ));
        }
        let cells: Vec<&str> = body.split(',').collect();
        if cells.len() + 1 != names.len() {
            return Err(fail(
                number,
                "cells",
                (cells.len() + 1).to_string(),
                names.len().to_string(),
            ));
        }
        let line = Line {
            file,
            number,
            cells: names.iter().copied().zip(cells).collect(),
        };
        if let Some(first) = seen.insert(line.key()?, number) {
            return Err(fail(
                number,
                "key",
                format!("that of line {first}"),
                "each key once".into(),
            ));
        }
        out.push(parse(&line)?);
    }
    if lines == 0 {
        return Err(fail(1, "columns", "nothing".into(), names.join(",")));
    }
    if mark.rows != lines || !text.ends_with('\n') {
        return Err(fail(
            lines,
            "end of the file",
            format!("after {lines} lines"),
            format!("after {}", mark.rows),
        ));
    }
    Ok(out)
}

struct Line<'a> {
    file: &'a FilePath,
    number: u64,
    cells: HashMap<&'a str, &'a str>,
}

impl Line<'_> {
    fn fail(&self, what: &str, expected: &str) -> Error {
        let found = self.cells.get(what).copied().unwrap_or_default();
        Error::Line {
            file: self.file.to_owned(),
            line: self.number,
            what: format!("`{what}`"),
            found: format!("`{}`", found.chars().take(80).collect::<String>()),
            expected: expected.to_owned(),
        }
    }

    fn number<T: std::str::FromStr + PartialOrd + Default>(&self, name: &str) -> Result<T> {
        let value: Option<T> = self.cells.get(name).and_then(|cell| cell.parse().ok());
        value
            .filter(|v| *v > T::default())
            .ok_or_else(|| self.fail(name, "a whole number above 0"))
    }

    /// A whole number that may be 0.
    fn count(&self, name: &str) -> Result<u32> {
        let value = self.cells.get(name).and_then(|cell| cell.parse().ok());
        value.ok_or_else(|| self.fail(name, "a whole number"))
    }

    fn heat(&self) -> Result<Heat> {
        self.one_of("heat", &[Heat::Hot, Heat::Cold].map(|h| (heat_name(h), h)))
    }

    fn time(&self, name: &str) -> Result<f64> {
        let value: Option<f64> = self.cells.get(name).and_then(|cell| cell.parse().ok());
        value
            .filter(|v| (0.0..=MOST_US).contains(v))
            .ok_or_else(|| self.fail(name, "a time of 0 or more"))
    }

    /// A cell that is empty where nothing was recorded.
    fn recorded<T: std::str::FromStr>(&self, name: &str, expected: &str, is: impl Fn(&T) -> bool) -> Result<Option<T>> {
        match self.cells.get(name).copied().unwrap_or_default() {
            "" => Ok(None),
            cell => match cell.parse().ok().filter(is) {
                Some(value) => Ok(Some(value)),
                None => Err(self.fail(name, &format!("{expected}, or nothing"))),
            },
        }
    }

    /// Sixteen hexadecimal digits, or nothing.
    fn checksum(&self, name: &str) -> Result<Option<u64>> {
        match self.cells.get(name).copied().unwrap_or_default() {
            "" => Ok(None),
            cell if cell.len() == 16 => match u64::from_str_radix(cell, 16) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(self.fail(name, "16 hexadecimal digits, or nothing")),
            },
            _ => Err(self.fail(name, "16 hexadecimal digits, or nothing")),
        }
    }

    fn one_of<T: Copy>(&self, name: &str, known: &[(&str, T)]) -> Result<T> {
        let cell = self.cells.get(name).copied().unwrap_or_default();
        let expected = || known.iter().map(|k| k.0).collect::<Vec<_>>().join(", ");
        known
            .iter()
            .find(|k| k.0 == cell)
            .map(|k| k.1)
            .ok_or_else(|| self.fail(name, &expected()))
    }

    fn numerics(&self) -> Result<Numerics> {
        self.one_of(
            "numerics",
            &[Numerics::F32, Numerics::Int8].map(|n| (numerics_name(n), n)),
        )
    }

    fn conv(&self) -> Result<ConvKey> {
        Ok(ConvKey {
            batch: self.number("batch")?,
            cin: self.number("cin")?,
            cout: self.number("cout")?,
            kernel: self.number("kernel")?,
            stride: self.number("stride")?,
            groups: self.number("groups")?,
            height: self.number("height")?,
            width: self.number("width")?,
            numerics: self.numerics()?,
            threads: self.number("threads")?,
            context: self.one_of("context", &[("alone", Context::Alone), ("chain", Context::Chain)])?,
        })
    }

    fn key(&self) -> Result<Key> {
        type Make = fn(PlaneKey) -> Key;
        let threads = self.number("threads")?;
        let plane = |make: Make| {
            Ok(make(PlaneKey {
                batch: self.number("batch")?,
                channels: self.number("cin")?,
                height: self.number("height")?,
                width: self.number("width")?,
                numerics: self.numerics()?,
                threads,
            }))
        };
        match self.cells.get("operator").copied().unwrap_or_default() {
            "session" => Ok(Key::Session { threads }),
            "conv" => Ok(Key::Conv(self.conv()?)),
            "low_rank" => Ok(Key::LowRank(LowRankKey {
                conv: self.conv()?,
                rank_in: self.number("rank_in")?,
                rank_out: self.number("rank_out")?,
            })),
            "edge" => Ok(Key::Edge(EdgeKey {
                kind: self.one_of("kind", &EdgeKind::ALL.map(|k| (k.name(), k)))?,
                batch: self.number("batch")?,
                channels: self.number("cin")?,
                height: self.number("height")?,
                width: self.number("width")?,
                threads,
            })),
            "pool" => Ok(Key::Pool(PoolKey {
                kind: self.one_of("kind", &[PoolKind::Max, PoolKind::Mean].map(|k| (pool_name(k), k)))?,
                batch: self.number("batch")?,
                channels: self.number("cin")?,
                kernel: self.number("kernel")?,
                stride: self.number("stride")?,
                height: self.number("height")?,
                width: self.number("width")?,
                numerics: self.numerics()?,
                threads,
            })),
            "elementwise" => Ok(Key::Elementwise(ElementwiseKey {
                kind: self.one_of("kind", &ElementwiseKind::ALL.map(|k| (k.name(), k)))?,
                batch: self.number("batch")?,
                channels: self.number("cin")?,
                height: self.number("height")?,
                width: self.number("width")?,
                numerics: self.numerics()?,
                threads,
            })),
            "linear" => Ok(Key::Linear(LinearKey {
                batch: self.number("batch")?,
                inputs: self.number("cin")?,
                outputs: self.number("cout")?,
                numerics: self.numerics()?,
                threads,
            })),
            "add" => plane(Key::Add),
            "global_avg_pool" => plane(Key::GlobalAvgPool),
            "entry" => plane(Key::Entry),
            "expert" => Ok(Key::Expert(ExpertKey {
                hidden: self.number("hidden")?,
                inner: self.number("inner")?,
                bits: self.number("bits")?,
                planes: self.number("planes")?,
                group: self.number("group")?,
                rank: self.count("rank")?,
                experts: self.number("experts")?,
                tokens: self.number("tokens")?,
                threads,
                heat: self.heat()?,
            })),
            "dense" => Ok(Key::Dense(DenseKey {
                inputs: self.number("cin")?,
                outputs: self.number("cout")?,
                bits: self.number("bits")?,
                group: self.count("group")?,
                tokens: self.number("tokens")?,
                threads,
                heat: self.heat()?,
            })),
            "attention" => Ok(Key::Attention(AttentionKey {
                heads: self.number("heads")?,
                kv_heads: self.number("kv_heads")?,
                head_dim: self.number("head_dim")?,
                value_dim: self.number("value_dim")?,
                values_in_keys: self.one_of("values", &VALUES)?,
                kv_bits: self.number("bits")?,
                keys: self.number("keys")?,
                tokens: self.number("tokens")?,
                sequences: self.number("sequences")?,
                threads,
                heat: self.heat()?,
            })),
            "glue" => Ok(Key::Glue(GlueKey {
                hidden: self.number("hidden")?,
                experts: self.number("experts")?,
                top_k: self.number("top_k")?,
                inner: self.count("inner")?,
                tokens: self.number("tokens")?,
                threads,
            })),
            "read" => Ok(Key::Read(ReadKey {
                tier: self.one_of("tier", &Tier::ALL.map(|t| (tier_name(t), t)))?,
                bytes: self.number("bytes")?,
                threads,
            })),
            _ => Err(self.fail(
                "operator",
                "session, conv, linear, add, global_avg_pool, entry, expert, dense, attention, glue or read",
            )),
        }
    }
}
