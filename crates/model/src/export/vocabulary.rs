//! `tokenizer.json` as the keys of a GGUF file: tokens, their types, merges or scores, and the name by which llama.cpp
//! knows how a text is cut before merging. A cut that it has no name for is refused: a wrong name splits differently
//! without an error.

use std::collections::HashMap;
use std::path::Path;

use cotk_container::gguf::Value;
use cotk_run::files;
use serde::Deserialize;
use serde_json::Value as Json;

use super::ExportError;
use crate::folder::ModelFolder;
use crate::tokenizer::TokenizerError;

const LIMIT_BYTES: u64 = 256 << 20;

/// llama.cpp's types of tokens.
mod token_type {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const UNUSED: i32 = 5;
    pub(super) const BYTE: i32 = 6;
}

/// The parts of `tokenizer.json` that matter here.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Json>,
    pre_tokenizer: Option<Json>,
    model: Bpe,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    special: bool,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Json,
    #[serde(default)]
    merges: Vec<Json>,
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// How texts are cut and merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Bytes as letters, cut by the expression of this name.
    ByteLevel(&'static str),
    /// SentencePiece's: spaces as ▁, unknown letters as bytes.
    SentencePiece,
}

/// Keys of the tokenizer, and of the chat template where there is one.
pub(super) fn metadata(model: &ModelFolder) -> Result<Vec<(String, Value)>, ExportError> {
    let path = model.path.join("tokenizer.json");
    let bytes = files::read(&path, LIMIT_BYTES)?;
    let file: File = serde_json::from_slice(&bytes).map_err(|e| parse_error(&path, e.to_string()))?;
    let kind = kind_of(&file)?;
    let vocab = vocab_of(&path, &file)?;
    let merges = merges_of(&path, &file)?;

    let rows = model.spec.vocab;
    let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![token_type::UNUSED; rows];
    for (token, &id) in &vocab {
        tokens[id as usize].clone_from(token);
        types[id as usize] = if is_byte(token) && kind == Kind::SentencePiece {
            token_type::BYTE
        } else if Some(token) == file.model.unk_token.as_ref() {
            token_type::UNKNOWN
        } else {
            token_type::NORMAL
        };
    }
    for added in &file.added_tokens {
        let id = added.id as usize;
        tokens[id].clone_from(&added.content);
        if types[id] != token_type::UNKNOWN {
            types[id] = if added.special {
                token_type::CONTROL
            } else {
                token_type::USER_DEFINED
            };
        }
    }

    let mut keys: Vec<(&str, Value)> = Vec::new();
    match kind {
        Kind::ByteLevel(pre) => {
            keys.push(("model", "gpt2".into()));
            keys.push(("pre", pre.into()));
            let merges = merges.iter().map(|[a, b]| format!("{a} {b}")).collect();
            keys.push(("merges", Value::Texts(merges)));
        }
        Kind::SentencePiece => {
            keys.push(("model", "llama".into()));
            keys.push(("pre", "default".into()));
            keys.push(("scores", Value::F32s(scores(&tokens, &merges))));
            keys.push(("add_space_prefix", Value::Bool(true)));
        }
    }
    keys.push(("tokens", Value::Texts(tokens)));
    keys.push(("token_type", Value::I32s(types)));
    keys.extend(special(model)?);
    let mut keys: Vec<(String, Value)> = keys
        .into_iter()
        .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
        .collect();
    if let Some(template) = &model.chat_template {
        keys.push(("tokenizer.chat_template".to_owned(), template.as_str().into()));
    }
    Ok(keys)
}

/// Ids of BOS, end, padding and unknown, and whether a BOS is added.
fn special(model: &ModelFolder) -> Result<Vec<(&'static str, Value)>, ExportError> {
    let id_of = |name: &str| model.tokenizer.id_of(model.special_tokens.get(name)?);
    let encode = |bare: bool| {
        let ids = if bare {
            model.tokenizer.encode_bare("a")
        } else {
            model.tokenizer.encode("a")
        };
        ids.map_err(crate::ModelError::from)
    };
    let (with, without) = (encode(false)?, encode(true)?);
    let front = with.len().saturating_sub(without.len());
    if front > 1 || with[front..] != without[..] {
        return Err(refused(
            "what the tokenizer adds to a text",
            format!("{with:?} for {without:?}"),
            "nothing, or one token before it",
        ));
    }
    let bos = if front == 1 {
        Some(with[0])
    } else {
        id_of("bos_token").or(model.spec.bos)
    };
    let mut keys = Vec::new();
    for (key, id) in [
        ("bos_token_id", bos),
        ("eos_token_id", id_of("eos_token").or(model.eos.first().copied())),
        ("padding_token_id", id_of("pad_token")),
        ("unknown_token_id", id_of("unk_token")),
    ] {
        keys.extend(id.map(|id| (key, Value::U32(id))));
    }
    keys.push(("add_bos_token", Value::Bool(front == 1)));
    keys.push(("add_eos_token", Value::Bool(false)));
    Ok(keys)
}

fn parse_error(path: &Path, detail: String) -> ExportError {
    let file = path.to_owned();
    ExportError::Model(TokenizerError::Parse { file, detail }.into())
}

fn refused(what: &str, found: String, expected: &str) -> ExportError {
    ExportError::Refused {
        format: "llama.cpp",
        what: what.to_owned(),
        found,
        expected: expected.to_owned(),
        others: 0,
        help: "export with --hf, or serve it with `cotk serve`".to_owned(),
    }
}

/// Qwen2's, and the two with groups of up to three digits that share its other parts.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek-V3's three cuts.
const DEEPSEEK_V3: [&str; 3] = [
    r##"\p{N}{1,3}"##,
    r##"[一-龥぀-ゟ゠-ヿ]+"##,
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// DeepSeek-V2's, before digits one by one. (llama.cpp cuts them in runs: the same where no merge joins digits.)
const DEEPSEEK_LLM: [&str; 5] = [
    r##"[\r\n]"##,
    r##"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"##,
    r##"\s?[!-/:-~！-／：-～‘-‟　-。]+"##,
    r##"\s+$"##,
    r##"[一-龥ࠀ-一가-퟿]+"##,
];

/// An expression as it is written: line ends, which some files hold as such, by their escapes.
fn spelled(pattern: &str) -> String {
    pattern.replace('\r', r"\r").replace('\n', r"\n")
}

/// Whether some merge joins two runs of digits.
fn joins_digits(file: &File) -> bool {
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    file.model.merges.iter().any(|merge| match merge {
        Json::String(pair) => pair.split_once(' ').is_some_and(|(a, b)| is_digits(a) && is_digits(b)),
        Json::Array(pair) => pair.iter().all(|part| part.as_str().is_some_and(is_digits)),
        _ => false,
    })
}

fn kind_of(file: &File) -> Result<Kind, ExportError> {
    if file.model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
        let found = file.model.kind.clone().unwrap_or_default();
        return Err(refused("the tokenizer's model", found, "BPE"));
    }
    if file.model.byte_fallback {
        return sentence_piece(file);
    }
    // NFC: llama.cpp does not normalise; texts are nearly always composed already.
    let normalizer = file.normalizer.as_ref().map(|n| n["type"].as_str().unwrap_or_default());
    if !matches!(normalizer, None | Some("NFC")) {
        return Err(refused(
            "the tokenizer's normalizer",
            shown(file.normalizer.as_ref()),
            "none or NFC",
        ));
    }
    let steps = steps(file.pre_tokenizer.as_ref());
    let is = |step: &Json, kind: &str| step["type"] == kind;
    let bytes = |step: &Json, with_regex: bool| {
        is(step, "ByteLevel")
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == with_regex
    };
    let split = |step: &Json, pattern: &str| {
        is(step, "Split")
            && step["pattern"]["Regex"].as_str().map(spelled).as_deref() == Some(pattern)
            && step["behavior"] == "Isolated"
            && step["invert"] != true
    };
    let digits = |step: &Json| is(step, "Digits") && step["individual_digits"] == true;
    let pre = match steps.as_slice() {
        [last] if bytes(last, true) => Some("gpt-2"),
        [first, last] if digits(first) && bytes(last, true) => Some("smollm"),
        [first, last] if split(first, QWEN2) && bytes(last, false) => Some("qwen2"),
        [numbers, cjk, rest, last]
            if split(numbers, DEEPSEEK_V3[0])
                && split(cjk, DEEPSEEK_V3[1])
                && split(rest, DEEPSEEK_V3[2])
                && bytes(last, false) =>
        {
            Some("deepseek-v3")
        }
        [lines, letters, marks, end, cjk, numbers, last]
            if split(lines, DEEPSEEK_LLM[0])
                && split(letters, DEEPSEEK_LLM[1])
                && split(marks, DEEPSEEK_LLM[2])
                && split(end, DEEPSEEK_LLM[3])
                && split(cjk, DEEPSEEK_LLM[4])
                && digits(numbers)
                && bytes(last, false)
                && !joins_digits(file) =>
        {
            Some("deepseek-llm")
        }
        [first, last] if split(first, LLAMA3) && bytes(last, false) && file.model.ignore_merges => Some("llama-bpe"),
        _ => None,
    };
    match pre {
        Some("llama-bpe") => Ok(Kind::ByteLevel("llama-bpe")),
        Some(pre) if !file.model.ignore_merges => Ok(Kind::ByteLevel(pre)),
        _ => Err(refused(
            "how the tokenizer cuts a text before merging",
            shown(file.pre_tokenizer.as_ref()),
            "one that llama.cpp has a name for: gpt-2, smollm, qwen2, llama-bpe, deepseek-v3 or deepseek-llm",
        )),
    }
}

/// Old files prepend and replace in the normalizer, newer ones in a Metaspace.
fn sentence_piece(file: &File) -> Result<Kind, ExportError> {
    let normal = steps(file.normalizer.as_ref());
    let is_old = match normal.as_slice() {
        [first, second] => {
            first["type"] == "Prepend"
                && first["prepend"] == "▁"
                && second["type"] == "Replace"
                && second["pattern"]["String"] == " "
                && second["content"] == "▁"
        }
        _ => false,
    };
    let cut = file.pre_tokenizer.as_ref();
    let is_new = cut.is_some_and(|cut| {
        let is_always = cut["prepend_scheme"].as_str().unwrap_or("always") != "never";
        cut["type"] == "Metaspace" && cut["replacement"] == "▁" && is_always && cut["split"] == false
    });
    if (is_old && cut.is_none()) || (normal.is_empty() && is_new) {
        return Ok(Kind::SentencePiece);
    }
    let found = format!("{}, {}", shown(file.normalizer.as_ref()), shown(cut));
    let expected = "SentencePiece's: ▁ before the text and for each space";
    Err(refused("how the tokenizer treats spaces", found, expected))
}

/// A sequence's parts, or the one part.
fn steps(part: Option<&Json>) -> Vec<&Json> {
    let Some(part) = part else {
        return Vec::new();
    };
    for key in ["pretokenizers", "normalizers"] {
        if let Some(list) = part[key].as_array() {
            return list.iter().collect();
        }
    }
    vec![part]
}

fn shown(part: Option<&Json>) -> String {
    let text = part.map_or_else(|| "none".to_owned(), Json::to_string);
    if text.chars().count() <= 120 {
        return text;
    }
    text.chars().take(119).chain(['…']).collect()
}

fn vocab_of(path: &Path, file: &File) -> Result<HashMap<String, u32>, ExportError> {
    // Ids are below the config's vocabulary: whoever opened the folder has checked the tokenizer's largest.
    serde_json::from_value(file.model.vocab.clone()).map_err(|e| parse_error(path, format!("model.vocab: {e}")))
}

/// "a b", or ["a", "b"] in newer files.
fn merges_of(path: &Path, file: &File) -> Result<Vec<[String; 2]>, ExportError> {
    let pair = |merge: &Json| match merge {
        Json::String(text) => text.split_once(' ').map(|(a, b)| [a.to_owned(), b.to_owned()]),
        Json::Array(pair) => match pair.as_slice() {
            [Json::String(a), Json::String(b)] => Some([a.clone(), b.clone()]),
            _ => None,
        },
        _ => None,
    };
    let merges = file.model.merges.iter().enumerate();
    merges
        .map(|(rank, merge)| {
            pair(merge)
                .ok_or_else(|| parse_error(path, format!("model.merges[{rank}] is {merge}, expected two tokens")))
        })
        .collect()
}

fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// SentencePiece merges the pair whose whole has the highest score, BPE the pair of lowest rank: the score of a token
/// is minus the lowest rank that makes it.
fn scores(tokens: &[String], merges: &[[String; 2]]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, [a, b]) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    #[expect(clippy::cast_precision_loss, reason = "ranks are below 2^24")]
    let score = |token: &String| ranks.get(token).map_or(0.0, |&rank| -(rank as f32));
    tokens.iter().map(score).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(normalizer: Json, pre_tokenizer: Json, model: Json) -> File {
        let whole =
            json!({ "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model });
        serde_json::from_value(whole).unwrap()
    }

    fn bytes(use_regex: bool) -> Json {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
    }

    #[test]
    fn a_cut_is_named_or_refused() {
        let bpe = || json!({"type": "BPE", "vocab": {}, "merges": []});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let sequence = |parts: Json| json!({"type": "Sequence", "pretokenizers": parts});
        let digits = json!({"type": "Digits", "individual_digits": true});
        for (cut, name) in [
            (bytes(true), Some("gpt-2")),
            (sequence(json!([digits, bytes(true)])), Some("smollm")),
            (sequence(json!([split(QWEN2), bytes(false)])), Some("qwen2")),
            (
                sequence(json!([
                    split(DEEPSEEK_V3[0]),
                    split(DEEPSEEK_V3[1]),
                    split(&DEEPSEEK_V3[2].replace(r"\r", "\r").replace(r"\n", "\n")),
                    bytes(false)
                ])),
                Some("deepseek-v3"),
            ),
            (
                sequence(json!([
                    split("[\r\n]"),
                    split(DEEPSEEK_LLM[1]),
                    split(DEEPSEEK_LLM[2]),
                    split(DEEPSEEK_LLM[3]),
                    split(DEEPSEEK_LLM[4]),
                    digits,
                    bytes(false)
                ])),
                Some("deepseek-llm"),
            ),
            (sequence(json!([split(DEEPSEEK_V3[0]), bytes(false)])), None),
            (sequence(json!([split(r"\p{N}"), bytes(false)])), None),
            (sequence(json!([split(QWEN2), bytes(true)])), None),
            (
                json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}),
                None,
            ),
            (json!({"type": "Whitespace"}), None),
            (Json::Null, None),
        ] {
            let found = kind_of(&file(Json::Null, cut.clone(), bpe())).ok();
            assert_eq!(found, name.map(Kind::ByteLevel), "{cut}");
        }
        assert!(kind_of(&file(json!({"type": "Lowercase"}), bytes(true), bpe())).is_err());
        assert!(kind_of(&file(json!({"type": "NFC"}), bytes(true), bpe())).is_ok());
        assert!(kind_of(&file(Json::Null, bytes(true), json!({"type": "Unigram"}))).is_err());
    }

    #[test]
    fn sentence_piece_is_known_in_both_forms() {
        let model = || json!({"type": "BPE", "byte_fallback": true, "vocab": {}, "merges": []});
        let old = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        let new = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        assert_eq!(
            kind_of(&file(old.clone(), Json::Null, model())).unwrap(),
            Kind::SentencePiece
        );
        assert_eq!(kind_of(&file(Json::Null, new, model())).unwrap(), Kind::SentencePiece);
        assert!(kind_of(&file(old, bytes(true), model())).is_err());
        assert!(is_byte("<0x0A>") && !is_byte("<0xA>") && !is_byte("0x0A"));
    }

    #[test]
    fn scores_order_merges_as_ranks_do() {
        let pair = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        let tokens = ["a", "ab", "abc", "bc"].map(str::to_owned);
        let found = scores(
            &tokens,
            &[pair("b", "c"), pair("a", "b"), pair("ab", "c"), pair("a", "bc")],
        );
        assert_eq!(found, [0.0, -1.0, -2.0, 0.0]);
    }
}
