//! Hidden states of one stream on disk, swept batch by batch: memory holds a batch, never the stream. Law: what a layer
//! makes of a window depends on that window alone, so that batches may be cut anywhere between windows.

use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use cotk_container::manifest::Checksum;
use cotk_model::layers::Layer;
use cotk_model::layers::attention::Span;
use cotk_model::layers::cache::{KvKind, LayerCache};
use cotk_model::layers::rope::Rope;
use cotk_model::spec::ModelSpec;
use cotk_run::Error;
use cotk_run::cancel::Cancel;
use cotk_run::files::{self, Op, fault_point};

use crate::Result;

/// Tokens of one batch at least, where windows are short: experts want company.
const BATCH_TOKENS: usize = 4096;

/// One stream: its windows, and where its states before each layer lie.
#[derive(Debug)]
pub struct Stream {
    folder: PathBuf,
    name: String,
    hidden: usize,
    /// Tokens of each window.
    windows: Vec<usize>,
}

impl Stream {
    /// Nothing on disk yet.
    pub fn new(folder: &Path, name: &str, hidden: usize, windows: Vec<usize>) -> Self {
        Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            hidden,
            windows,
        }
    }

    /// The states that enter layer `layer`; raw f32, `[tokens, hidden]`.
    pub fn path(&self, layer: usize) -> PathBuf {
        self.folder.join(format!("{}-{layer}.f32", self.name))
    }

    /// Tokens of each window.
    pub fn windows(&self) -> &[usize] {
        &self.windows
    }

    /// Tokens of all windows.
    pub fn tokens(&self) -> usize {
        self.windows.iter().sum()
    }

    /// Bytes of the states before one layer.
    pub fn bytes(&self) -> u64 {
        (self.tokens() * self.hidden) as u64 * 4
    }

    /// Checksum of the states that enter a layer, as they lie.
    ///
    /// # Errors
    /// The file system's.
    pub fn checksum(&self, layer: usize) -> Result<Checksum> {
        Ok(Checksum(files::checksum_file(&self.path(layer))?))
    }

    /// Forgets the states that entered a layer.
    pub fn forget(&self, layer: usize) {
        // Space alone is lost if this fails; the folder goes at the end.
        let _ = std::fs::remove_file(self.path(layer));
    }

    /// Writes the states that enter layer 0: `embed` turns the tokens of a batch into rows.
    ///
    /// # Errors
    /// The file system's, and those of `embed`.
    pub fn begin(&self, tokens: &[&[u32]], mut embed: impl FnMut(&[u32]) -> Result<Vec<f32>>) -> Result<()> {
        let mut writer = Writer::create(self.path(0))?;
        for window in tokens {
            writer.write(&embed(window)?)?;
        }
        writer.finish()
    }

    /// Hands out the states that enter `layer`, batch by batch: rows `[tokens, hidden]` and the length of each window.
    ///
    /// # Errors
    /// Those of `see`; the file system's; [`Error::Cancelled`].
    pub fn read(
        &self,
        layer: usize,
        cancel: &Cancel,
        mut see: impl FnMut(Vec<f32>, &[usize]) -> Result<()>,
    ) -> Result<()> {
        let path = self.path(layer);
        let mut file = BufReader::with_capacity(1 << 20, files::open(&path)?);
        let mut bytes = Vec::new();
        for batch in self.batches() {
            cancel.check()?;
            bytes.resize(batch.iter().sum::<usize>() * self.hidden * 4, 0);
            fault_point(Op::Read)
                .and_then(|()| file.read_exact(&mut bytes))
                .map_err(Error::io("read", &path))?;
            let rows = bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect();
            see(rows, batch)?;
        }
        Ok(())
    }

    /// Turns the states that enter `layer` into those that enter the next.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn step(
        &self,
        layer: usize,
        cancel: &Cancel,
        apply: impl FnMut(&mut Vec<f32>, &[usize]) -> Result<()>,
    ) -> Result<()> {
        self.step_to(self, layer, cancel, apply)
    }

    /// The same, as states of another stream of the same windows: it goes its own way from there.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn step_to(
        &self,
        to: &Self,
        layer: usize,
        cancel: &Cancel,
        mut apply: impl FnMut(&mut Vec<f32>, &[usize]) -> Result<()>,
    ) -> Result<()> {
        let mut writer = Writer::create(to.path(layer + 1))?;
        self.read(layer, cancel, |mut rows, windows| {
            apply(&mut rows, windows)?;
            writer.write(&rows)
        })?;
        writer.finish()
    }

    /// The states that enter a layer, handed out row by row: for streams that are read side by side.
    ///
    /// # Errors
    /// The file system's.
    pub fn rows(&self, layer: usize) -> Result<Rows> {
        let path = self.path(layer);
        Ok(Rows {
            file: BufReader::with_capacity(1 << 20, files::open(&path)?),
            path,
            hidden: self.hidden,
        })
    }

    fn batches(&self) -> impl Iterator<Item = &[usize]> {
        let mut rest = self.windows.as_slice();
        std::iter::from_fn(move || {
            let mut tokens = 0;
            let count = rest
                .iter()
                .take_while(|&&window| {
                    let is_first = tokens == 0;
                    tokens += window;
                    is_first || tokens <= BATCH_TOKENS
                })
                .count();
            let (batch, after) = rest.split_at(count);
            rest = after;
            (count > 0).then_some(batch)
        })
    }
}

/// States of one stream, in order.
#[derive(Debug)]
pub struct Rows {
    file: BufReader<std::fs::File>,
    path: PathBuf,
    hidden: usize,
}

impl Rows {
    /// The next `tokens` rows, `[tokens, hidden]`.
    ///
    /// # Errors
    /// The file system's; fewer rows than that.
    pub fn next(&mut self, tokens: usize) -> Result<Vec<f32>> {
        let mut bytes = vec![0; tokens * self.hidden * 4];
        fault_point(Op::Read)
            .and_then(|()| self.file.read_exact(&mut bytes))
            .map_err(Error::io("read", &self.path))?;
        Ok(bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect())
    }
}

/// The first half of a layer for whole windows: `hidden += attention(norm(hidden))`, positions from 0 in each.
pub fn attend(spec: &ModelSpec, rope: &Rope, layer: &Layer, hidden: &mut [f32], windows: &[usize]) {
    let tokens: usize = windows.iter().sum();
    debug_assert_eq!(hidden.len(), tokens * spec.hidden, "a row a token");
    let mut caches: Vec<LayerCache> = windows.iter().map(|_| layer.cache(KvKind::default())).collect();
    let mut spans: Vec<Span<'_>> = windows
        .iter()
        .zip(&mut caches)
        .map(|(&tokens, cache)| Span { tokens, cache })
        .collect();
    layer.attend(rope, hidden, &mut spans);
}

/// Not synced: a resumed run checks the checksum, and begins anew where the machine itself went down.
struct Writer {
    path: PathBuf,
    file: BufWriter<std::fs::File>,
}

impl Writer {
    fn create(path: PathBuf) -> Result<Self> {
        let file = fault_point(Op::Open)
            .and_then(|()| {
                std::fs::OpenOptions::new()
                    .create(true)
                    .write(true)
                    .truncate(true)
                    .open(&path)
            })
            .map_err(Error::io("create", &path))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            path,
        })
    }

    fn write(&mut self, rows: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(fault_point(Op::Write)
            .and_then(|()| self.file.write_all(&bytes))
            .map_err(Error::io("write", &self.path))?)
    }

    fn finish(mut self) -> Result<()> {
        Ok(self.file.flush().map_err(Error::io("write", &self.path))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_every_window_once_in_order() {
        for windows in [vec![], vec![9000], vec![1000; 9], vec![4000, 100, 5000, 1, 1]] {
            let stream = Stream::new(Path::new("/nowhere"), "x", 4, windows.clone());
            let batches: Vec<&[usize]> = stream.batches().collect();
            assert_eq!(batches.concat(), windows);
            assert!(
                batches
                    .iter()
                    .all(|b| b.len() == 1 || b.iter().sum::<usize>() <= BATCH_TOKENS)
            );
        }
    }

    #[test]
    fn a_step_reads_what_the_last_one_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let stream = Stream::new(folder.path(), "x", 2, vec![2, 1]);
        let embed = |tokens: &[u32]| Ok(tokens.iter().flat_map(|&t| [t as f32, 0.5]).collect());
        stream.begin(&[&[1, 2], &[3]], embed).unwrap();
        let cancel = Cancel::new();
        let double = |rows: &mut Vec<f32>, _: &[usize]| {
            rows.iter_mut().for_each(|x| *x *= 2.0);
            Ok(())
        };
        stream.step(0, &cancel, double).unwrap();
        let mut seen = Vec::new();
        stream
            .read(1, &cancel, |rows, windows| {
                seen.push((rows, windows.to_vec()));
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, [(vec![2.0, 1.0, 4.0, 1.0, 6.0, 1.0], vec![2, 1])]);
        cancel.cancel();
        assert!(stream.step(1, &cancel, double).is_err());
    }
}
