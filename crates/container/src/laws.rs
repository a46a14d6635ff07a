//! Laws of whole containers: round trip, same bytes after an interruption, and a list of attacks. Every damage is an
//! error that names the file, none is a panic.

use std::os::unix::fs::FileExt;
use std::path::Path;

use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::CodedMatrix;
use cotk_quant::decode::decode;
use cotk_quant::encode::encode;
use cotk_quant::layout::{MatrixFormat, WHOLE_ROW};
use cotk_run::seeds::Seeds;
use cotk_run::units::{ExpertId, LayerId};
use tempfile::TempDir;

use crate::ContainerError;
use crate::decision::{Alternative, Channels, Decision, HealStep, Healed, MatrixDecision, Threshold};
use crate::dense::{DenseTensor, PLANES, code_matrix, write_dense};
use crate::layout::Part;
use crate::low_rank::{Factors, Role};
use crate::manifest::{
    Checksum, DENSE, DroppedMeaning, EXPERTS, Layer, MANIFEST, Manifest, Matrix, Origin, Prefix, SourceModel, Why, seal,
};
use crate::reader::Container;
use crate::writer::{CodedExpert, Constant, ContainerWriter, Head, NewExpert, NewLayer, NewState, constant_values};

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
    NewExpert::new(
        why(),
        measured(CodedExpert::new(
            matrix(inner, HIDDEN, gate, &format!("{name} gate")),
            matrix(inner, HIDDEN, up, &format!("{name} up")),
            matrix(HIDDEN, inner, down, &format!("{name} down")),
        )),
    )
}

fn measured(coded: CodedExpert) -> CodedExpert {
    let prefix = |bits| Prefix {
        bits,
        delta: Some(0.25),
        rho: None,
        tokens: 3,
    };
    let prefixes = crate::layout::prefixes(coded.formats()).into_iter().map(prefix);
    CodedExpert {
        prefixes: prefixes.collect(),
        ..coded
    }
}

fn factors(role: Role, rows: usize, cols: usize) -> Factors {
    let draw = |count: usize, step: f32| -> Vec<f32> { (0..count).map(|i| (i as f32 * step).sin()).collect() };
    Factors::encode(role, &draw(rows * 5, 0.7), &draw(5 * cols, 0.3), (rows, 5, cols)).unwrap()
}

/// Gate with a correction, up as a product, down as codes.
fn low_rank(name: &str, inner: usize) -> NewExpert {
    let eight = Code::Plain(Bits::B8);
    let mut coded = CodedExpert::new(
        matrix(inner, HIDDEN, Code::Nested44, &format!("{name} gate")),
        matrix(inner, HIDDEN, eight, &format!("{name} up")),
        matrix(HIDDEN, inner, Code::Nested44, &format!("{name} down")),
    );
    coded.up.planes.clear();
    coded.factors = [
        Some(factors(Role::Correction, inner, HIDDEN)),
        Some(factors(Role::Product, inner, HIDDEN)),
        None,
    ];
    NewExpert::new(why(), measured(coded))
}

fn constant() -> NewExpert {
    let values: Vec<f32> = (0..HIDDEN).map(|i| i as f32 / 3.0 - 1.0).collect();
    NewExpert::new(why(), NewState::Constant(Constant::new(&values).unwrap()))
}

/// With everything that a decision can say.
fn decision() -> Decision {
    let format = MatrixFormat::try_new(17, HIDDEN, Code::Plain(Bits::B2), WHOLE_ROW).unwrap();
    let other = Alternative {
        format,
        rank: 16,
        bytes: 77,
        error: 0.5,
    };
    let healed = Healed {
        step: HealStep::Ridge,
        before: 0.25,
        after: 0.125,
        kept: true,
    };
    let matrix = MatrixDecision {
        error: 0.25,
        sensitivity: Some(1.5),
        lambda: Some(0.75),
        narrower: Some(other),
        wider: None,
    };
    Decision {
        chosen_by: Some("joint".to_owned()),
        starved: Some(60),
        dropped_alone: Some(0.5),
        matrices: Some([matrix; 3]),
        channels: Some(Channels {
            of: 24,
            error: Some(0.125),
        }),
        scale: Some(1.25),
        healed: vec![healed],
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
    NewExpert::new(why(), NewState::Dropped)
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
            vec![
                expert("c", 8, nested, four, Code::Nested44).decided(decision()),
                constant(),
                low_rank("d", 9),
            ],
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

fn append(writer: &mut ContainerWriter, layer: LayerId, experts: Vec<NewExpert>) -> Layer {
    let threshold = Threshold {
        mode: "big-little".to_owned(),
        value: 0.5,
        low_bit_fraction: 0.25,
    };
    let new = NewLayer {
        layer,
        gain: 1.0,
        healed: decision().healed,
        thresholds: vec![threshold],
        experts,
    };
    writer.append(new).unwrap()
}

fn finish(folder: &Path, mut writer: ContainerWriter, rest: Vec<(LayerId, Vec<NewExpert>)>) -> Manifest {
    for (layer, experts) in rest {
        append(&mut writer, layer, experts);
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
            container.constant(layer, expert)?;
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
                let NewState::Kept(coded) = &new.state else {
                    assert!(view.is_none());
                    continue;
                };
                let (read, written) = (view.unwrap(), coded.view(bits));
                for (part, format) in [Part::Gate, Part::Up, Part::Down].into_iter().zip(coded.formats()) {
                    assert_eq!(read.part(part).bits(), crate::layout::prefix_at(&format, bits).get());
                    assert_eq!(read.part(part).rank(), written.part(part).rank());
                    assert_eq!(read.weights(part), written.weights(part));
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
                .map(|(layer, experts)| append(&mut writer, layer, experts))
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
    let entry = append(&mut writer, layer, experts);
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

/// Law: whole bytes with a scale that is no number are refused before they are used, by expert, matrix and row; experts beside
/// them are not.
#[test]
fn a_scale_that_is_no_number_is_named_each_time() {
    let nested = Code::Nested224;
    type Spoil = fn(&mut CodedExpert) -> &mut Vec<u8>;
    let cases: [(&str, Spoil); 3] = [
        ("up matrix has a scale of NaN in row 5", |coded| &mut coded.up.planes[0]),
        ("gate right factor has a scale of NaN in row 5", |coded| {
            &mut coded.factors[0].as_mut().unwrap().right.planes[0]
        }),
        ("up left factor has a scale of NaN in row 5", |coded| {
            &mut coded.factors[1].as_mut().unwrap().left.planes[0]
        }),
    ];
    for (at, (message, spoil)) in cases.into_iter().enumerate() {
        let mut experts = vec![
            expert("a", 8, nested, nested, nested),
            if at == 0 {
                expert("b", 17, nested, nested, nested)
            } else {
                low_rank("d", 9)
            },
        ];
        let NewState::Kept(coded) = &mut experts[1].state else {
            unreachable!("made with weights");
        };
        // Codes of one step, then 16 scales.
        let plane = spoil(coded);
        let first_scale = plane.len().min(if at == 0 { 64 * 2 } else { 64 * 8 });
        plane[first_scale + 2 * 5..][..2].copy_from_slice(&0x7e00u16.to_le_bytes());
        let folder = tempfile::tempdir().unwrap();
        finish(
            folder.path(),
            ContainerWriter::resume(folder.path(), vec![]).unwrap(),
            vec![(LayerId(3), experts)],
        );
        let container = Container::open(folder.path()).unwrap();
        assert!(container.expert(LayerId(3), ExpertId(0), 8).unwrap().is_some());
        for bits in [2, 8, 8] {
            let error = container
                .expert(LayerId(3), ExpertId(1), bits)
                .expect_err("no number")
                .to_string();
            assert!(
                error.contains(message) && error.contains("layer 3, expert 1"),
                "{error}"
            );
        }
        assert!(matches!(container.verify(), Err(ContainerError::Scale { .. })));
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
const REPORTED: [&str; 16] = [
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
    "before",
    "after",
    "value",
    "low_bit_fraction",
];

#[test]
fn a_sealed_manifest_with_numbers_that_lie_is_refused() {
    let folder = tiny();
    let path = folder.path().join(MANIFEST);
    let text = fs_err::read_to_string(&path).unwrap();
    // A decision only tells.
    let told = text.find("\"decision\": {").unwrap();
    let told = told..told + text[told..].find("]\n          }").unwrap();
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
                    line.trim().is_empty()
                        || told.contains(&from)
                        || REPORTED.iter().any(|key| line.contains(&format!("\"{key}\""))),
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
        ("\"version\": 1", "\"version\": 0", "format version is 0, expected 1"),
        ("\"version\": 1", "\"version\": 2", "format version is 2, expected 1"),
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
    kept(&mut wrong).down = matrix(HIDDEN, 25, code, "other");
    let mut factor = low_rank("b", 9);
    kept(&mut factor).factors[0] = Some(factors(Role::Correction, 10, HIDDEN));
    let mut bare = low_rank("c", 9);
    kept(&mut bare).factors[1] = None;
    let mut moved = low_rank("d", 9);
    let right = &mut kept(&mut moved).factors[0].as_mut().unwrap().right;
    right.zero_points[0] += 1.0;
    for wrong in [wrong, factor, bare, moved] {
        assert!(matches!(
            writer.append_layer(LayerId(0), 1.0, vec![wrong]),
            Err(ContainerError::Unwritable { .. })
        ));
    }
}

fn kept(new: &mut NewExpert) -> &mut CodedExpert {
    match &mut new.state {
        NewState::Kept(coded) => coded,
        _ => panic!("kept"),
    }
}

#[test]
fn factors_add_their_product_at_every_prefix() {
    let folder = tiny();
    let container = Container::open(folder.path()).unwrap();
    let dense = |factors: &Factors| {
        let [left, right] = [&factors.left, &factors.right].map(|f| decode(&f.prefix(Bits::B8).unwrap()));
        let rank = factors.low_rank().rank();
        assert_eq!(rank, 16, "5 is filled up");
        move |row: usize, col: usize| -> f32 { (0..rank).map(|r| left[row * rank + r] * right[r * HIDDEN + col]).sum() }
    };
    let mut written = low_rank("d", 9);
    let coded = kept(&mut written);
    let (correction, product) = (coded.factors[0].as_ref().unwrap(), coded.factors[1].as_ref().unwrap());
    let (correction, product) = (dense(correction), dense(product));
    for bits in [4, 8] {
        let view = container.expert(LayerId(2), ExpertId(2), bits).unwrap().unwrap();
        let codes = decode(&coded.gate.prefix(Bits::try_from(bits).unwrap()).unwrap());
        let (gate, up) = (view.weights(Part::Gate), view.weights(Part::Up));
        for row in 0..9 {
            for col in 0..HIDDEN {
                let at = row * HIDDEN + col;
                assert!((gate[at] - codes[at] - correction(row, col)).abs() < 1e-5);
                assert!((up[at] - product(row, col)).abs() < 1e-5);
            }
        }
    }
    assert_eq!(
        container.manifest().layers[1].experts[2].state.bytes(),
        coded.record_bytes()
    );
}

#[test]
fn a_constant_reads_back_and_is_routable() {
    let folder = tiny();
    let container = Container::open(folder.path()).unwrap();
    let layer = &container.manifest().layers[1];
    assert_eq!((layer.kept(), layer.routable()), (2, 3));
    let read = container.constant(LayerId(2), ExpertId(1)).unwrap().unwrap();
    let NewState::Constant(written) = constant().state else {
        panic!("a constant")
    };
    assert_eq!(read, written.bytes());
    assert!((constant_values(read)[5] - 2.0 / 3.0).abs() < 1e-3);
    for (layer, expert) in [(0, 0), (0, 1), (1, 1), (2, 0)] {
        assert!(container.constant(LayerId(layer), ExpertId(expert)).unwrap().is_none());
    }
    for value in [f32::NAN, f32::INFINITY, 1e6] {
        assert!(Constant::new(&[0.0, value]).is_err());
    }
}

#[test]
fn where_dropped_means_novice_every_expert_answers() {
    let head = || Head {
        dropped: DroppedMeaning::Novice,
        ..head()
    };
    let written = |experts: Vec<NewExpert>| {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ContainerWriter::resume(folder.path(), vec![]).unwrap();
        writer.append_layer(LayerId(0), 1.0, experts).unwrap();
        write_dense(&folder.path().join(DENSE), &[], |_| Ok::<_, ContainerError>(vec![])).unwrap();
        writer.finish(head(), &[DENSE])
    };
    let code = Code::Nested224;
    assert!(written(vec![expert("a", 8, code, code, code), constant()]).is_ok());
    assert!(written(vec![expert("a", 8, code, code, code), dropped()]).is_err());
    let short = NewState::Constant(Constant::new(&[1.0; HIDDEN - 1]).unwrap());
    assert!(written(vec![expert("a", 8, code, code, code), NewExpert::new(why(), short)]).is_err());
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
