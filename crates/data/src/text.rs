//! Plain text as documents: UTF-8, split on `<|endoftext|>` (the next document starts right after the marker).
//! Knows no tokenizer. Law: joining the documents with the marker gives the file back, but for empty documents.

use std::path::Path;

use cotk_run::files;

use crate::{DataError, Result};

/// What stands between two documents.
pub const MARKER: &str = "<|endoftext|>";

/// No text of ours comes near this.
const LIMIT_BYTES: u64 = 1 << 30;

/// The documents of a text file, in file order; a file without markers is one document. Empty ones are dropped.
///
/// # Errors
/// [`DataError::Run`] when it cannot be read or is not UTF-8; [`DataError::Empty`] when nothing is in it.
pub fn documents(path: impl AsRef<Path>) -> Result<Vec<String>> {
    let path = path.as_ref();
    let documents = split(&files::read_text(path, LIMIT_BYTES)?);
    if documents.is_empty() {
        return Err(DataError::Empty { file: path.to_owned() });
    }
    Ok(documents)
}

/// The same on text in memory.
pub fn split(text: &str) -> Vec<String> {
    text.split(MARKER)
        .filter(|document| !document.trim().is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_the_documents_gives_the_text_back() {
        let text = "a\n<|endoftext|>b <|x|>\n<|endoftext|>c\n<|endoftext|>";
        assert_eq!(split(text), ["a\n", "b <|x|>\n", "c\n"]);
        assert_eq!(split(text).join(MARKER) + MARKER, text);
        assert_eq!(split("no marker"), ["no marker"]);
    }

    #[test]
    fn a_file_without_text_is_an_error_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty.txt");
        files::write_atomic(&path, b"\n<|endoftext|>\n").unwrap();
        assert!(matches!(documents(&path), Err(DataError::Empty { file }) if file == path));
        files::write_atomic(&path, &[b'a', 0xff]).unwrap();
        assert!(documents(&path).unwrap_err().to_string().contains("empty.txt"));
    }
}
