//! Text to ids and back, by the `tokenizers` crate. Law: the pieces of a [`StreamDecoder`] joined are the text of all
//! ids at once, and no piece ends inside a character.

use std::path::{Path, PathBuf};

use cotk_run::files;

/// Largest `tokenizer.json` that is read: ten times the largest known.
const LIMIT_BYTES: u64 = 256 << 20;

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(transparent)]
    File(#[from] cotk_run::Error),
    #[error("{}: {detail}", file.display())]
    Parse { file: PathBuf, detail: String },
    /// The tokenizer can give ids that the embedding does not have.
    #[error("{}: ids up to {found}, expected below {vocab}: `vocab_size` of the config", file.display())]
    Vocab { file: PathBuf, found: u32, vocab: usize },
    #[error("{}: cannot encode: {detail}", file.display())]
    Encode { file: PathBuf, detail: String },
}

/// The tokenizer of one model.
pub struct Tokenizer {
    file: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `folder`, for a model with `vocab` ids.
    ///
    /// # Errors
    /// A missing or broken file; ids that the model does not have.
    pub fn load(folder: &Path, vocab: usize) -> Result<Self, TokenizerError> {
        let file = folder.join("tokenizer.json");
        let bytes = files::read(&file, LIMIT_BYTES)?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| TokenizerError::Parse {
            file: file.clone(),
            detail: e.to_string(),
        })?;
        let found = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if found as usize >= vocab {
            return Err(TokenizerError::Vocab { file, found, vocab });
        }
        Ok(Self { file, inner })
    }

    /// Ids of a text; markers such as `<|endoftext|>` in it are one token each. Begins with a BOS only where the
    /// tokenizer itself adds one.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_as(text, true)
    }

    /// The same without any token that the text does not spell: for parts of a prompt, and for rendered chats.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_as(text, false)
    }

    fn encode_as(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        encoding
            .map(|e| e.get_ids().to_vec())
            .map_err(|e| TokenizerError::Encode {
                file: self.file.clone(),
                detail: e.to_string(),
            })
    }

    /// Text of ids without special tokens; bytes that are no UTF-8 become U+FFFD. Ids without a token give nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).unwrap_or_default()
    }

    /// The id of a token spelled exactly so.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// How a token is spelled in the vocabulary.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones too.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// A decoder for ids that come one by one.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder {
            tokenizer: self,
            ids: Vec::new(),
            said: 0,
        }
    }
}

/// Turns ids into text piece by piece.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Ids since the last piece but one: decoders join neighbours, so the last piece is decoded again with the next.
    ids: Vec<u32>,
    /// How many of `ids` belong to the last piece.
    said: usize,
}

impl StreamDecoder<'_> {
    /// Takes one id; gives the text that is now certain, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.ids.push(id);
        let (piece, is_whole) = self.pending();
        if piece.is_empty() || !is_whole {
            return None;
        }
        self.ids.drain(..self.said);
        self.said = self.ids.len();
        Some(piece)
    }

    /// What was held back, a cut character as U+FFFD.
    pub fn finish(self) -> Option<String> {
        let (piece, _) = self.pending();
        (!piece.is_empty()).then_some(piece)
    }

    /// New text, and whether it ends with a whole character.
    fn pending(&self) -> (String, bool) {
        let before = self.tokenizer.decode(&self.ids[..self.said]);
        let all = self.tokenizer.decode(&self.ids);
        let piece = all.get(before.len()..).unwrap_or_default();
        (piece.to_owned(), !piece.ends_with('\u{fffd}'))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Byte-level: ids 0 to 255 are the bytes (in the order of the GPT-2 table), 256 is `<|endoftext|>`.
    pub(crate) fn byte_level() -> String {
        let mut table: Vec<(u8, char)> = Vec::new();
        let mut extra = 0u32;
        for byte in 0..=255u8 {
            let is_printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let shown = if is_printable {
                char::from(byte)
            } else {
                extra += 1;
                char::from_u32(255 + extra).unwrap()
            };
            table.push((byte, shown));
        }
        let vocab: serde_json::Map<String, serde_json::Value> = table
            .iter()
            .map(|(byte, shown)| (shown.to_string(), (*byte).into()))
            .collect();
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [{"id": 256, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
                              "rstrip": false, "normalized": false, "special": true}],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                      "vocab": vocab, "merges": []},
        })
        .to_string()
    }

    fn load(vocab: usize) -> Result<Tokenizer, TokenizerError> {
        let dir = tempfile::tempdir().unwrap();
        files::write_atomic(dir.path().join("tokenizer.json"), byte_level().as_bytes()).unwrap();
        Tokenizer::load(dir.path(), vocab)
    }

    #[test]
    fn markers_in_the_text_are_one_token() {
        let tokenizer = load(257).unwrap();
        assert_eq!(tokenizer.encode("a<|endoftext|>").unwrap(), [97, 256]);
        assert_eq!(tokenizer.decode(&[97, 256, 98]), "ab");
    }

    #[test]
    fn ids_beyond_the_embedding_are_refused() {
        let error = load(256).err().unwrap().to_string();
        assert!(error.contains("ids up to 256, expected below 256"), "{error}");
    }

    proptest! {
        /// Law: pieces joined are the whole text, whatever bytes come; none ends inside a character.
        #[test]
        fn pieces_joined_are_the_whole_text(text in "\\PC{0,12}", noise in proptest::collection::vec(0u32..257, 0..6)) {
            let tokenizer = load(257).unwrap();
            for ids in [tokenizer.encode(&text).unwrap(), [tokenizer.encode(&text).unwrap(), noise.clone()].concat()] {
                let mut stream = tokenizer.stream();
                let mut joined = String::new();
                for &id in &ids {
                    if let Some(piece) = stream.push(id) {
                        prop_assert!(!piece.ends_with(char::REPLACEMENT_CHARACTER), "cut");
                        joined.push_str(&piece);
                    }
                }
                joined.push_str(&stream.finish().unwrap_or_default());
                prop_assert_eq!(joined, tokenizer.decode(&ids));
            }
        }
    }
}
