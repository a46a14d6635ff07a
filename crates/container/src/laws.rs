//! Laws of whole containers: round trip, same bytes after an interruption, and a list of attacks. Every damage is an
//! error that names the file, none is a panic.

use std::os::unix::fs::FileExt;
use std::path::Path;

use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::CodedMatrix;
use cotk_quant::decode::decode;
use cotk_quant::encode::encode;
use cotk_quant::layout::MatrixFormat;
use cotk_run::seeds::Seeds;
use cotk_run::units::{ExpertId, LayerId};
use tempfile::TempDir;

use crate::ContainerError;
use crate::dense::{DenseTensor, PLANES, code_matrix, write_dense};
use crate::manifest::{
    Checksum, DENSE, DroppedMeaning, EXPERTS, Layer, MANIFEST, Manifest, Matrix, Origin, Prefix, SourceModel, Why, seal,
};
use crate::reader::Container;
use crate::writer::{CodedExpert, ContainerWriter, Head, NewExpert};

const HIDDEN: usize = 8;

fn matrix(rows: usize, cols: usize, code: Code, purpose: &str) -> CodedMatrix {
    use rand::Rng;
    let mut stream = Seeds::new(7).stream(purpose);
    let weights: Vec<f32> = (0..rows * cols)
        .map(|_| (stream.next_u32() >> 8) as f32 / 8e6 - 1.0)
        .collect();
    encode(&weights, MatrixFormat::try_new(rows, cols, code, 32).unwrap()).unwrap()
}

fn expert(name: &str, inner: usize, gate: Code, up: Code, down: Code) -> NewExpert {
    let coded = CodedExpert {
        gate: matrix(inner, HIDDEN, gate, &format!("{name} gate")),
        up: matrix(inner, HIDDEN, up, &format!("{name} up")),
        down: matrix(HIDDEN, inner, down, &format!("{name} down")),
        prefixes: vec![],
    };
    let formats = [coded.gate.format, coded.up.format, coded.down.format];
    let prefixes = crate::layout::prefixes(formats)
        .into_iter()
        .map(|bits| Prefix {
            bits,
            delta: Some(0.25),
            rho: None,
            tokens: 3,
        })
        .collect();
    NewExpert {
        why: why(),
        kept: Some(CodedExpert { prefixes, ..coded }),
    }
}

fn why() -> Why {
    Why {
        tokens: 12,
        share: 0.1,
        gate_share: 0.3,
    }
}

fn dropped() -> NewExpert {
    NewExpert { why: why(), kept: None }
}

fn layers() -> Vec<(LayerId, Vec<NewExpert>)> {
    let (nested, four) = (Code::Nested224, Code::Plain(Bits::B4));
    vec![
        (
            LayerId(0),
            vec![
                expert("a", 8, nested, nested, nested),
                dropped(),
                expert("b", 17, nested, nested, nested),
            ],
        ),
        (
            LayerId(2),
            vec![expert("c", 8, nested, four, Code::Nested44), dropped(), dropped()],
        ),
    ]
}

fn head() -> Head {
    Head {
        source: SourceModel {
            hash: Checksum(1),
            bytes: 2,
            expert_bytes: 1,
            expert_weights: 9,
        },
        config: serde_json::json!({"model_type": "tiny"}),
        recipe: Origin {
            hash: Checksum(3),
            seed: 4,
            calibration: Checksum(5),
            calibration_tokens: 6,
        },
        little_bits: Some(4),
        dropped: DroppedMeaning::Masked,
        hidden: HIDDEN,
        dense: [("proj".to_owned(), dense_matrix().0)].into(),
    }
}

/// A coded matrix of the dense part, and its plane.
fn dense_matrix() -> (Matrix, Vec<u8>) {
    let weights: Vec<f32> = (0..20 * 70).map(|i| (i as f32 * 0.3).sin()).collect();
    code_matrix(&weights, 20, 70, 8).unwrap()
}

fn write_all(folder: &Path) -> Manifest {
    finish(folder, ContainerWriter::resume(folder, vec![]).unwrap(), layers())
}

fn finish(folder: &Path, mut writer: ContainerWriter, rest: Vec<(LayerId, Vec<NewExpert>)>) -> Manifest {
    for (layer, experts) in rest {
        writer.append_layer(layer, 1.0, experts).unwrap();
    }
    let tensor = DenseTensor {
        name: "norm".to_owned(),
        dtype: "F32",
        shape: vec![2],
        bytes: 8,
    };
    let plane = dense_matrix().1;
    let planes = DenseTensor {
        name: format!("proj{PLANES}"),
        dtype: "U8",
        shape: vec![plane.len()],
        bytes: plane.len() as u64,
    };
    let data = |t: &DenseTensor| Ok::<_, ContainerError>(if t.dtype == "U8" { plane.clone() } else { vec![1; 8] });
    write_dense(&folder.join(DENSE), &[tensor, planes], data).unwrap();
    writer.finish(head(), &[DENSE]).unwrap()
}

fn tiny() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_all(folder.path());
    folder
}

fn bytes_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    [MANIFEST, DENSE, EXPERTS]
        .map(|name| (name.to_owned(), fs_err::read(folder.join(name)).unwrap()))
        .to_vec()
}

/// Opens and uses everything: what an attack must not survive, and never panics.
fn use_all(folder: &Path) -> Result<(), ContainerError> {
    let container = Container::open(folder)?;
    for layer in [0, 1, 2].map(LayerId) {
        for expert in [0, 1, 2, 3].map(ExpertId) {
            for bits in [2, 4, 8] {
                container.expert(layer, expert, bits)?;
            }
        }
    }
    // As `cotk-model` uses them.
    let path = folder.join(DENSE);
    let file = fs_err::read(&path).unwrap();
    for (name, matrix) in &container.manifest().dense {
        let wrong = |found: String| ContainerError::Value {
            file: path.clone(),
            key: name.clone(),
            found,
            expected: "the planes that the manifest describes".to_owned(),
        };
        let read = safetensors::SafeTensors::deserialize(&file).map_err(|e| wrong(e.to_string()))?;
        let planes = read
            .tensor(&format!("{name}{PLANES}"))
            .map_err(|e| wrong(e.to_string()))?;
        matrix.plain(planes.data()).map_err(|e| wrong(e.to_string()))?;
    }
    container.verify()
}

#[test]
fn every_prefix_reads_back_what_was_coded() {
    let folder = tiny();
    let container = Container::open(folder.path()).unwrap();
    for (layer, experts) in layers() {
        for (id, new) in (0..).map(ExpertId).zip(experts) {
            for bits in [2, 4, 8] {
                let view = container.expert(layer, id, bits).unwrap();
                let Some(coded) = &new.kept else {
                    assert!(view.is_none());
                    continue;
                };
                let view = view.unwrap();
                for (read, written) in [(view.gate, &coded.gate), (view.up, &coded.up), (view.down, &coded.down)] {
                    let width = crate::layout::prefix_at(&written.format, bits);
                    assert_eq!(read.bits(), width);
                    assert_eq!(decode(&read), decode(&written.prefix(width).unwrap()));
                }
            }
        }
    }
    container.verify().unwrap();
    assert_eq!(container.manifest().layers[0].kept(), 2);
    assert!(container.expert(LayerId(1), ExpertId(0), 8).unwrap().is_none());
}

#[test]
fn a_manifest_written_again_is_the_same_file() {
    let folder = tiny();
    let path = folder.path().join(MANIFEST);
    let bytes = fs_err::read(&path).unwrap();
    assert_eq!(Manifest::parse(&bytes, &path).unwrap().to_bytes(), bytes);
}

#[test]
fn interrupted_anywhere_and_resumed_the_bytes_are_the_same() {
    let whole = tiny();
    let expected = bytes_of(whole.path());
    for done in 0..=layers().len() {
        for torn in [0, 1, 100, 5000] {
            let folder = tempfile::tempdir().unwrap();
            let mut writer = ContainerWriter::resume(folder.path(), vec![]).unwrap();
            let mut rest = layers();
            let remembered: Vec<Layer> = rest
                .drain(..done)
                .map(|(layer, experts)| writer.append_layer(layer, 1.0, experts).unwrap())
                .collect();
            drop(writer);
            // A layer that was begun and not finished.
            let path = folder.path().join(EXPERTS);
            let mut bytes = fs_err::read(&path).unwrap();
            bytes.resize(bytes.len() + torn, 0xaa);
            fs_err::write(&path, bytes).unwrap();
            finish(
                folder.path(),
                ContainerWriter::resume(folder.path(), remembered).unwrap(),
                rest,
            );
            assert_eq!(bytes_of(folder.path()), expected, "{done} layers, {torn} bytes");
        }
    }
}

#[test]
fn a_partial_file_that_lost_bytes_is_not_continued() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ContainerWriter::resume(folder.path(), vec![]).unwrap();
    let (layer, experts) = layers().swap_remove(0);
    let entry = writer.append_layer(layer, 1.0, experts).unwrap();
    drop(writer);
    let path = folder.path().join(EXPERTS);
    let bytes = fs_err::read(&path).unwrap();
    fs_err::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let resumed = ContainerWriter::resume(folder.path(), vec![entry.clone()]);
    assert!(matches!(resumed, Err(ContainerError::Length { .. })));
    let mut damaged = bytes;
    *damaged.last_mut().unwrap() ^= 1;
    fs_err::write(&path, &damaged).unwrap();
    let resumed = ContainerWriter::resume(folder.path(), vec![entry]);
    assert!(matches!(resumed, Err(ContainerError::Section { .. })));
}

#[test]
fn a_file_cut_at_any_length_is_refused() {
    let folder = tiny();
    for (name, bytes) in bytes_of(folder.path()) {
        let path = folder.path().join(&name);
        // From the end, in place: rewriting a file whole costs a flush each time.
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        for length in (0..bytes.len()).rev() {
            file.set_len(length as u64).unwrap();
            let error = use_all(folder.path()).expect_err("cut");
            assert!(error.to_string().contains(&name), "{name} at {length}: {error}");
        }
        fs_err::remove_file(&path).unwrap();
        let error = use_all(folder.path()).expect_err("gone");
        assert!(error.to_string().contains(&name), "{error}");
        fs_err::write(&path, &bytes).unwrap();
    }
    use_all(folder.path()).unwrap();
}

#[test]
fn any_changed_byte_is_refused() {
    let folder = tiny();
    for (name, bytes) in bytes_of(folder.path()) {
        let path = folder.path().join(&name);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        for at in 0..bytes.len() {
            file.write_all_at(&[bytes[at] ^ 1 << (at % 8)], at as u64).unwrap();
            let error = use_all(folder.path()).expect_err("changed");
            assert!(error.to_string().contains(&name), "{name} at {at}: {error}");
            file.write_all_at(&bytes[at..=at], at as u64).unwrap();
        }
    }
    use_all(folder.path()).unwrap();
}

#[test]
fn a_damaged_section_names_layer_expert_and_section_each_time() {
    let folder = tiny();
    let path = folder.path().join(EXPERTS);
    let mut bytes = fs_err::read(&path).unwrap();
    let manifest = Container::open(folder.path()).unwrap().manifest().clone();
    let (_, _, record) = manifest.records().nth(1).unwrap();
    let at = usize::try_from(record.offset + record.sections[2].offset).unwrap();
    bytes[at] ^= 0x10;
    fs_err::write(&path, &bytes).unwrap();
    let container = Container::open(folder.path()).unwrap();
    // Narrower prefixes do not need the damaged section.
    assert!(container.expert(LayerId(0), ExpertId(2), 4).unwrap().is_some());
    for _ in 0..2 {
        let error = container.expert(LayerId(0), ExpertId(2), 8).expect_err("damaged");
        assert!(matches!(
            error,
            ContainerError::Section {
                layer: LayerId(0),
                expert: ExpertId(2),
                section: 2,
                ..
            }
        ));
    }
}

/// Number tokens of a JSON text, outside strings: (from, to).
fn numbers(text: &str) -> Vec<(usize, usize)> {
    let (mut found, mut in_string, mut from) = (Vec::new(), false, None);
    for (at, byte) in text.bytes().enumerate() {
        let is_number = !in_string
            && (byte.is_ascii_digit() || b"+-.eE".contains(&byte))
            && (from.is_some() || byte.is_ascii_digit() || byte == b'-');
        match (is_number, from) {
            (true, None) => from = Some(at),
            (false, Some(start)) => {
                found.push((start, at));
                from = None;
            }
            _ => {}
        }
        in_string ^= byte == b'"';
    }
    found
}

/// Keys whose value is a report, not a claim about bytes.
const REPORTED: [&str; 12] = [
    "seed",
    "gain",
    "tokens",
    "share",
    "gate_share",
    "delta",
    "rho",
    "calibration_tokens",
    "expert_bytes",
    "expert_weights",
    "zero_points",
    "bytes",
];

#[test]
fn a_sealed_manifest_with_numbers_that_lie_is_refused() {
    let folder = tiny();
    let path = folder.path().join(MANIFEST);
    let text = fs_err::read_to_string(&path).unwrap();
    let mut refused = 0;
    for (from, to) in numbers(&text) {
        for lie in [
            "0",
            "1",
            "-1",
            "4294967295",
            "18446744073709551615",
            "16777217",
            "1e308",
            "0.5",
        ] {
            if &text[from..to] == lie {
                continue;
            }
            let mut damaged = format!("{}{lie}{}", &text[..from], &text[to..]).into_bytes();
            seal(&mut damaged);
            fs_err::write(&path, &damaged).unwrap();
            let line = text[..from].rsplit('\n').next().unwrap();
            match use_all(folder.path()) {
                Err(_) => refused += 1,
                Ok(()) => assert!(
                    line.trim().is_empty() || REPORTED.iter().any(|key| line.contains(&format!("\"{key}\""))),
                    "{line}{lie} was believed"
                ),
            }
        }
    }
    assert!(refused > 500, "{refused}");
}

#[test]
fn other_versions_and_formats_are_refused_by_name() {
    let folder = tiny();
    let path = folder.path().join(MANIFEST);
    let text = fs_err::read_to_string(&path).unwrap();
    for (from, to, expected) in [
        ("\"version\": 0", "\"version\": 1", "format version is 1, expected 0"),
        ("cotk-container", "gguf", "format is `gguf`, expected `cotk-container`"),
    ] {
        let mut other = text.replacen(from, to, 1).into_bytes();
        seal(&mut other);
        fs_err::write(&path, &other).unwrap();
        let error = Container::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    let folder = tiny();
    let path = folder.path().join(MANIFEST);
    let text = fs_err::read_to_string(&path).unwrap();
    for name in ["../dense.safetensors", "/etc/passwd", "a/b", "..", ""] {
        let extra = format!("\"{name}\": {{\"bytes\": 0, \"xxh3\": \"2d06800538d394c2\"}},\n    \"{DENSE}\"");
        let mut damaged = text.replacen(&format!("\"{DENSE}\""), &extra, 1).into_bytes();
        seal(&mut damaged);
        let error = Manifest::parse(&damaged, &path).unwrap_err();
        assert!(
            matches!(&error, ContainerError::Value { key, .. } if key == "files"),
            "{name}: {error}"
        );
    }
}

#[test]
fn matrices_that_do_not_fit_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ContainerWriter::resume(folder.path(), vec![]).unwrap();
    let code = Code::Nested224;
    let mut wrong = expert("a", 24, code, code, code);
    wrong.kept.as_mut().unwrap().down = matrix(HIDDEN, 25, code, "other");
    assert!(matches!(
        writer.append_layer(LayerId(0), 1.0, vec![wrong]),
        Err(ContainerError::Unwritable { .. })
    ));
}

#[test]
fn a_coded_dense_matrix_reads_back_and_other_entries_are_refused() {
    let folder = tiny();
    let container = Container::open(folder.path()).unwrap();
    let (matrix, plane) = dense_matrix();
    assert_eq!(container.manifest().dense["proj"], matrix);
    let file = fs_err::read(folder.path().join(DENSE)).unwrap();
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    let stored = read.tensor("proj.planes").unwrap();
    assert_eq!(stored.data(), plane);
    let decoded = decode(&matrix.plain(stored.data()).unwrap());
    let largest = decoded
        .iter()
        .enumerate()
        .map(|(i, w)| (w - (i as f32 * 0.3).sin()).abs());
    assert!(largest.fold(0.0, f32::max) < 0.005);
    assert!(matrix.plain(&plane[1..]).is_err());

    let text = String::from_utf8(fs_err::read(folder.path().join(MANIFEST)).unwrap()).unwrap();
    let at = text.find("\"dense\": {").unwrap();
    for (from, to) in [
        ("\"plain8\"", "\"nested2+2+4\""),
        ("\"group\": 32", "\"group\": 48"),
        ("\"rows\": 20", "\"rows\": 0"),
        ("128.0", "128.0, 1.0"),
        ("\"rows\"", "\"raws\""),
    ] {
        let dense = text[at..].replacen(from, to, 1);
        let mut broken = format!("{}{dense}", &text[..at]).into_bytes();
        assert_ne!(broken, text.as_bytes(), "{from}");
        seal(&mut broken);
        assert!(Manifest::parse(&broken, folder.path()).is_err(), "{to}");
    }
}
