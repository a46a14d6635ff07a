//! CIFAR-10 in its official binary form: `data_batch_1..5.bin`, `test_batch.bin`, plain or `.xz`. A record is one label
//! byte and 3 x 32 x 32 pixel bytes, plane by plane. Krizhevsky, "Learning Multiple Layers of Features from Tiny
//! Images", technical report, University of Toronto, 2009. Law: a file of another length or with another label is
//! refused, never read in part.

use std::io::Read;
use std::path::{Path, PathBuf};

use cotk_run::files;

use crate::images::{ImageShape, Images};
use crate::locate::locate;
use crate::{DataError, Result};

/// Shape of every image.
pub const SHAPE: ImageShape = ImageShape {
    channels: 3,
    height: 32,
    width: 32,
};

/// Class names in label order.
pub const CLASSES: [&str; 10] = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
];

/// Records in each official file.
const RECORDS: usize = 10_000;
const RECORD_BYTES: usize = 1 + 3 * 32 * 32;

/// Needs 33 MiB for the official archives (dictionary 32 MiB).
const XZ_MEMORY_BYTES: u64 = 256 << 20;

const HELP: &str = "put the official binary files (data_batch_1.bin … test_batch.bin, or each as .xz) into \
                    data/cifar10, or set COTK_DATA to the folder that holds cifar10/";

/// The folder given, or the first `cifar10` where data is looked for.
///
/// # Errors
/// [`DataError::Missing`] with the places that were looked at.
pub fn folder(named: Option<&Path>) -> Result<PathBuf> {
    match named {
        Some(folder) if folder.is_dir() => Ok(folder.to_owned()),
        Some(folder) => Err(DataError::Missing {
            what: "CIFAR-10".into(),
            looked: vec![folder.to_owned()],
            help: HELP.into(),
        }),
        None => locate("cifar10", HELP),
    }
}

/// The 50,000 training images, in file order.
///
/// # Errors
/// [`DataError`] naming the file.
pub fn train(folder: &Path) -> Result<Images> {
    let paths: Vec<PathBuf> = (1..=5)
        .map(|i| find(folder, &format!("data_batch_{i}.bin")))
        .collect::<Result<_>>()?;
    // Decompression is 1.5 s of CPU a file: one thread each.
    let parts = std::thread::scope(|scope| {
        let readers: Vec<_> = paths
            .iter()
            .map(|path| scope.spawn(|| read_file(path, RECORDS)))
            .collect();
        readers
            .into_iter()
            .map(|reader| reader.join().expect("a reader returns its errors"))
            .collect::<Result<Vec<_>>>()
    })?;
    let (pixels, labels): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    Ok(Images::new(SHAPE, pixels.concat(), labels.concat()))
}

/// The 10,000 test images.
///
/// # Errors
/// [`DataError`] naming the file.
pub fn test(folder: &Path) -> Result<Images> {
    let (pixels, labels) = read_file(&find(folder, "test_batch.bin")?, RECORDS)?;
    Ok(Images::new(SHAPE, pixels, labels))
}

/// `name` or `name.xz`, the plain file first.
fn find(folder: &Path, name: &str) -> Result<PathBuf> {
    let looked = vec![folder.join(name), folder.join(format!("{name}.xz"))];
    match looked.iter().find(|path| path.exists()) {
        Some(path) => Ok(path.clone()),
        None => Err(DataError::Missing {
            what: format!("CIFAR-10 file {name}"),
            looked,
            help: HELP.into(),
        }),
    }
}

/// Pixels and labels of one file of exactly `records` records.
fn read_file(path: &Path, records: usize) -> Result<(Vec<u8>, Vec<u8>)> {
    let expected = (records * RECORD_BYTES) as u64;
    let bytes = if path.extension().is_some_and(|e| e == "xz") {
        unpack(path, expected)?
    } else {
        let found = files::open(path)?.metadata().map_or(0, |m| m.len());
        if found != expected {
            return Err(size(path, found, false, records));
        }
        files::read(path, expected)?
    };
    if bytes.len() as u64 != expected {
        return Err(size(path, bytes.len() as u64, bytes.len() as u64 > expected, records));
    }
    let mut pixels = Vec::with_capacity(records * SHAPE.len());
    let mut labels = Vec::with_capacity(records);
    for (record, bytes) in bytes.chunks_exact(RECORD_BYTES).enumerate() {
        if usize::from(bytes[0]) >= CLASSES.len() {
            return Err(DataError::Label {
                file: path.to_owned(),
                record,
                found: bytes[0],
                classes: CLASSES.len(),
            });
        }
        labels.push(bytes[0]);
        pixels.extend_from_slice(&bytes[1..]);
    }
    Ok((pixels, labels))
}

fn size(path: &Path, found: u64, at_least: bool, records: usize) -> DataError {
    DataError::Size {
        file: path.to_owned(),
        found,
        at_least,
        expected: (records * RECORD_BYTES) as u64,
        records: records as u64,
        record_bytes: RECORD_BYTES as u64,
    }
}

/// At most one byte more than `expected`: a longer file is seen without being unpacked whole.
fn unpack(path: &Path, expected: u64) -> Result<Vec<u8>> {
    let xz = |detail: String| DataError::Xz {
        file: path.to_owned(),
        detail,
    };
    let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_BYTES, 0).map_err(|e| xz(e.to_string()))?;
    let reader = liblzma::read::XzDecoder::new_stream(files::open(path)?, stream);
    let mut bytes = Vec::new();
    reader
        .take(expected + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| xz(e.to_string()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn records(count: usize) -> Vec<u8> {
        (0..count)
            .flat_map(|i| {
                let mut record = vec![(i % 10) as u8];
                record.extend((0..SHAPE.len()).map(|p| (p * 7 + i) as u8));
                record
            })
            .collect()
    }

    fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        files::write_atomic(&path, bytes).unwrap();
        path
    }

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut writer = liblzma::write::XzEncoder::new(Vec::new(), 1);
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn packed_and_plain_files_read_alike() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = records(3);
        let plain = read_file(&write(dir.path(), "a.bin", &bytes), 3).unwrap();
        assert_eq!(plain.1, [0, 1, 2]);
        assert_eq!(plain.0[..3], bytes[1..4]);
        assert_eq!(
            read_file(&write(dir.path(), "a.bin.xz", &packed(&bytes)), 3).unwrap(),
            plain
        );
    }

    #[test]
    fn another_length_is_refused_at_every_cut_class() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = records(3);
        for cut in [0, 1, RECORD_BYTES, 2 * RECORD_BYTES, bytes.len() - 1] {
            for (name, content) in [
                ("cut.bin", bytes[..cut].to_vec()),
                ("cut.bin.xz", packed(&bytes[..cut])),
            ] {
                let error = read_file(&write(dir.path(), name, &content), 3).unwrap_err();
                assert!(
                    matches!(&error, DataError::Size { found, expected: 9219, .. } if *found == cut as u64),
                    "{error}"
                );
            }
        }
        let long = write(dir.path(), "long.bin.xz", &packed(&records(5)));
        assert!(
            read_file(&long, 3)
                .unwrap_err()
                .to_string()
                .contains("9220 bytes or more")
        );
    }

    #[test]
    fn a_label_that_no_class_has_is_named_with_its_record() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = records(3);
        bytes[2 * RECORD_BYTES] = 10;
        let error = read_file(&write(dir.path(), "label.bin", &bytes), 3)
            .unwrap_err()
            .to_string();
        assert!(error.contains("record 2 has label 10, expected 0 to 9"), "{error}");
    }

    #[test]
    fn a_damaged_archive_is_an_error_at_every_truncation_and_changed_byte() {
        let dir = tempfile::tempdir().unwrap();
        let archive = packed(&records(2));
        for step in 0..40 {
            let at = archive.len() * step / 40;
            let mut changed = archive.clone();
            changed[at] ^= 0x55;
            assert!(
                read_file(&write(dir.path(), "c.bin.xz", &changed), 2).is_err(),
                "byte {at} changed"
            );
            assert!(
                read_file(&write(dir.path(), "t.bin.xz", &archive[..at]), 2).is_err(),
                "cut at {at}"
            );
        }
    }

    #[test]
    fn a_missing_file_names_both_forms() {
        let dir = tempfile::tempdir().unwrap();
        let error = train(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("data_batch_1.bin,") && error.contains("data_batch_1.bin.xz"),
            "{error}"
        );
    }
}
