//! The seal of a TOML file: comment lines at its end with a checksum of every line before them. Whoever reads it says which
//! line was edited, and where it was cut. To every other reader it is the same TOML.

use std::path::Path as FilePath;

use cotk_run::files;

use crate::{Error, Result};

/// Checksums on a line of the seal.
const A_LINE: usize = 16;
const BEGIN: &str = "# checksum of each line above:";
const END: &str = "# end";

/// Sixteen bits: that a file has changed its own checksum tells, this only finds the line.
fn sum(number: usize, line: &str) -> String {
    format!("{:04x}", files::checksum(format!("{number} {line}").as_bytes()) >> 48)
}

/// `text` with its seal.
pub(super) fn seal(text: &str) -> String {
    let sums: Vec<String> = (1..)
        .zip(text.lines())
        .map(|(number, line)| sum(number, line))
        .collect();
    let mut sealed = text.to_owned();
    if !sealed.is_empty() && !sealed.ends_with('\n') {
        sealed.push('\n');
    }
    sealed += &format!("{BEGIN}\n");
    for line in sums.chunks(A_LINE) {
        sealed += &format!("# {}\n", line.join(" "));
    }
    sealed += &format!("{END}\n");
    sealed
}

/// The text of a sealed file, and the first line that is not what was written, if any.
///
/// # Errors
/// [`Error::Line`] for a file whose seal is cut, damaged or missing: with the line where it ends.
pub(super) fn unseal<'a>(file: &FilePath, sealed: &'a str) -> Result<(&'a str, Option<u64>)> {
    let lines = sealed.lines().count() as u64;
    let cut = |found: String| Error::Line {
        file: file.to_owned(),
        line: lines.max(1),
        what: "end of the file".to_owned(),
        found,
        expected: format!("checksums of all lines, then `{END}`"),
    };
    let whole = sealed
        .strip_suffix(&format!("\n{END}\n"))
        .ok_or_else(|| cut(format!("it is cut after {lines} lines")))?;
    let (text, tail) = whole
        .rsplit_once(&format!("{BEGIN}\n"))
        .filter(|(text, _)| text.is_empty() || text.ends_with('\n'))
        .or_else(|| whole.strip_suffix(BEGIN).map(|text| (text, "")))
        .ok_or_else(|| cut("no checksums of its lines".to_owned()))?;
    let mut sums = Vec::new();
    for line in tail.lines() {
        let line = line
            .strip_prefix("# ")
            .ok_or_else(|| cut(format!("`{}`", line.chars().take(40).collect::<String>())))?;
        sums.extend(line.split(' '));
    }
    let mut expected = sums.iter();
    for (number, line) in (1..).zip(text.lines()) {
        if expected.next().is_none_or(|expected| **expected != sum(number, line)) {
            return Ok((text, Some(number as u64)));
        }
    }
    // Lines that were deleted at the end.
    let is_short = expected.next().is_some();
    Ok((text, is_short.then(|| text.lines().count() as u64 + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a = 1\nb = 2\n\n[c]\nd = \"x\"\n";

    fn found(sealed: &str) -> Result<(String, Option<u64>)> {
        unseal(FilePath::new("f.toml"), sealed).map(|(text, line)| (text.to_owned(), line))
    }

    #[test]
    fn what_is_sealed_comes_back_and_is_the_same_toml() {
        let long: String = (0..100).map(|i| format!("k{i} = {i}\n")).collect();
        for text in ["", TEXT, &long] {
            let sealed = seal(text);
            assert_eq!(found(&sealed).unwrap(), (text.to_owned(), None));
            let (a, b): (toml::Table, toml::Table) = (toml::from_str(text).unwrap(), toml::from_str(&sealed).unwrap());
            assert_eq!(a, b);
        }
    }

    /// Law: whatever happens to a line, the first line that differs is named.
    #[test]
    fn edited_lines_are_found_by_their_number() {
        let sealed = seal(TEXT);
        let line = |changed: String| found(&changed).unwrap().1;
        assert_eq!(line(sealed.replacen("b = 2", "b = 3", 1)), Some(2));
        assert_eq!(line(sealed.replacen("b = 2\n", "", 1)), Some(2));
        assert_eq!(line(sealed.replacen("b = 2\n", "e = 0\nb = 2\n", 1)), Some(2));
        assert_eq!(line(sealed.replacen("d = \"x\"\n", "", 1)), Some(5));
        assert_eq!(line(sealed.replacen("d = \"x\"\n", "d = \"x\"\ne = 0\n", 1)), Some(6));
        assert_eq!(line(sealed.replacen("a = 1\nb = 2", "b = 2\na = 1", 1)), Some(1));
    }

    #[test]
    fn a_cut_file_is_refused_at_every_length() {
        let sealed = seal(TEXT);
        for end in 0..sealed.len() {
            let error = found(&sealed[..end]).unwrap_err().to_string();
            assert!(
                error.contains("f.toml:") && error.contains("end of the file"),
                "{error}"
            );
        }
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let sealed = seal(TEXT);
        for at in 0..sealed.len() {
            let mut bytes = sealed.clone().into_bytes();
            bytes[at] ^= 1;
            let Ok(changed) = String::from_utf8(bytes) else {
                continue;
            };
            let whole = found(&changed);
            assert!(
                !matches!(&whole, Ok((text, None)) if text == TEXT)
                    && whole.is_err() | whole.is_ok_and(|w| w.1.is_some()),
                "byte {at}"
            );
        }
    }
}
