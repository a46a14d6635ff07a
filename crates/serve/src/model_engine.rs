//! The real [`Engine`]: a [`Model`] with its tokenizer. Adds nothing to them but the bytes of single tokens.

use std::collections::HashMap;

use cotk_model::model::{KvCache, Model};
use cotk_model::moe::Mode;
use cotk_model::tokenizer::{StreamDecoder, Tokenizer};
use cotk_runtime::open::Opened;

use crate::engine::{Batch, Engine, EngineError, Facts, SpecialTokens, TextStream};
use crate::model_batch::ModelBatch;

/// A model, its tokenizer, and what clients call it.
pub struct ModelEngine {
    model: Model,
    tokenizer: Tokenizer,
    facts: Facts,
    /// Present when the vocabulary spells bytes as characters.
    byte_of: Option<HashMap<char, u8>>,
}

impl ModelEngine {
    /// From what `cotk_runtime` opened; clients call it by the name of its folder.
    pub fn from_opened(opened: Opened, device: &str) -> Self {
        let files = opened.files;
        let path = files.path.canonicalize().unwrap_or(files.path);
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let id = name.unwrap_or_else(|| "model".to_owned());
        Self::new(id, device.to_owned(), opened.model, files.tokenizer, files.eos)
    }

    /// The same with what a profile says of one token's time in each mode, in ms.
    #[must_use]
    pub fn with_predictions(mut self, predicted_decode_ms: Vec<(Mode, f64)>) -> Self {
        self.facts.predicted_decode_ms = predicted_decode_ms;
        self
    }

    /// `id` is what requests call the model, `end_tokens` end a reply.
    pub fn new(id: String, device: String, model: Model, tokenizer: Tokenizer, end_tokens: Vec<u32>) -> Self {
        let spec = model.spec();
        let facts = Facts {
            id,
            device,
            family: spec.family.to_owned(),
            context: spec.context,
            vocab: spec.vocab,
            end_tokens,
            modes: model.runtime().modes().to_vec(),
            kv_bytes_per_token: KvCache::bytes_for(spec, model.kv(), 1),
            predicted_decode_ms: Vec::new(),
        };
        let byte_of = spells_bytes(&tokenizer).then(byte_alphabet);
        Self {
            model,
            tokenizer,
            facts,
            byte_of,
        }
    }
}

impl Engine for ModelEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, EngineError> {
        let tokens = match special {
            SpecialTokens::Add => self.tokenizer.encode(text),
            SpecialTokens::InText => self.tokenizer.encode_bare(text),
        };
        tokens.map_err(|error| EngineError(error.to_string()))
    }

    fn token_bytes(&self, token: u32) -> Vec<u8> {
        let Some(spelling) = self.tokenizer.token_of(token) else {
            return Vec::new();
        };
        token_bytes(&spelling, self.byte_of.as_ref())
    }

    fn text_stream(&self) -> Box<dyn TextStream + '_> {
        Box::new(Decoding {
            tokenizer: &self.tokenizer,
            decoder: self.tokenizer.stream(),
        })
    }

    fn batch(&self) -> Box<dyn Batch + '_> {
        Box::new(ModelBatch::new(&self.model))
    }
}

struct Decoding<'e> {
    tokenizer: &'e Tokenizer,
    decoder: StreamDecoder<'e>,
}

impl TextStream for Decoding<'_> {
    fn push(&mut self, token: u32) -> Result<String, EngineError> {
        Ok(self.decoder.push(token).unwrap_or_default())
    }

    fn finish(&mut self) -> String {
        let decoder = std::mem::replace(&mut self.decoder, self.tokenizer.stream());
        decoder.finish().unwrap_or_default()
    }
}

/// Whether a blank is spelled `Ġ`: the mark of byte-level vocabularies.
fn spells_bytes(tokenizer: &Tokenizer) -> bool {
    let tokens = tokenizer.encode_bare(" a").unwrap_or_default();
    let spelling = tokens.first().and_then(|&token| tokenizer.token_of(token));
    spelling.is_some_and(|spelling| spelling.starts_with('Ġ'))
}

/// The characters that byte-level BPE (Radford et al., 2019) writes for the 256 bytes: printable ones stand for
/// themselves, the others follow from U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    let shown = |byte: u8| {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or_default()
        }
    };
    (0..=u8::MAX).map(shown).zip(0..=u8::MAX).collect()
}

/// The bytes that a vocabulary entry stands for: byte-level, `<0xE2>`, or text with `▁` for a blank.
fn token_bytes(spelling: &str, byte_of: Option<&HashMap<char, u8>>) -> Vec<u8> {
    if let Some(byte_of) = byte_of {
        let bytes: Option<Vec<u8>> = spelling.chars().map(|shown| byte_of.get(&shown).copied()).collect();
        // Added tokens are spelled as they are, which may use characters beyond the alphabet.
        return bytes.unwrap_or_else(|| spelling.as_bytes().to_vec());
    }
    let hexadecimal = spelling.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    if let Some(byte) = hexadecimal.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        return vec![byte];
    }
    spelling.replace('▁', " ").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vocabulary_entries_stand_for_bytes() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet.len(), 256);
        assert_eq!(token_bytes("Ġthe", Some(&alphabet)), b" the");
        assert_eq!(token_bytes("Ã©", Some(&alphabet)), "é".as_bytes());
        assert_eq!(token_bytes("Ċ", Some(&alphabet)), b"\n");
        assert_eq!(token_bytes("<|endoftext|>", Some(&alphabet)), b"<|endoftext|>");
        assert_eq!(token_bytes("<0xE2>", None), [0xe2]);
        assert_eq!(token_bytes("▁the", None), b" the");
    }
}
