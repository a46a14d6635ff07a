//! Zero-shot tasks from JSON lines: a text and endings to choose from, a word to say, two sentences of which one is
//! good. Which format a file has, its first item says. Knows no model and no tokenizer: who scores them is
//! `cotk_model::tasks`. Law: an item that cannot be scored is refused with file, line and key.

use std::path::{Path, PathBuf};

use cotk_run::files;
use cotk_run::recipe::nearest_of;
use serde_json::{Map, Value};

use crate::{DataError, Result};

/// No task file comes near this.
const LIMIT_BYTES: u64 = 1 << 30;
/// More endings than any benchmark has.
const ENDINGS_LIMIT: usize = 64;
/// Longest value that an error shows, in characters.
const SHOWN: usize = 60;

/// What an item asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Which ending follows the context? `context`, `endings`, `label` (as HellaSwag).
    Choice,
    /// Which words follow the context? `context`, `target` (as LAMBADA).
    Cloze,
    /// Which of two sentences is good? `good`, `bad` (as BLiMP).
    Pair,
}

impl Format {
    /// In tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Choice => "choice",
            Self::Cloze => "cloze",
            Self::Pair => "pair",
        }
    }

    /// The keys that an item must have.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Choice => &["context", "endings", "label"],
            Self::Cloze => &["context", "target"],
            Self::Pair => &["good", "bad"],
        }
    }
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// In its file, from 1.
    pub line: usize,
    /// Empty for a pair.
    pub context: String,
    /// A choice has two or more, a cloze one, a pair the good sentence and the bad one. None is empty.
    pub endings: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
    /// Where the item belongs: its `domain` and `kind`, where it has them.
    pub parts: Vec<(&'static str, String)>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The file's name without `.jsonl`.
    pub name: String,
    pub file: PathBuf,
    pub format: Format,
    /// At least one.
    pub items: Vec<Item>,
}

impl Task {
    /// What guessing reaches: one over the number of endings, on average; 0 where a word must be said.
    #[expect(clippy::cast_precision_loss, reason = "counts are small")]
    pub fn chance(&self) -> f64 {
        match self.format {
            Format::Cloze => 0.0,
            Format::Choice | Format::Pair => {
                let sum: f64 = self.items.iter().map(|item| 1.0 / item.endings.len() as f64).sum();
                sum / self.items.len() as f64
            }
        }
    }
}

/// The files that a path means: itself, or every `*.jsonl` of a folder, by name.
///
/// # Errors
/// A folder that cannot be read or holds no task.
pub fn files_at(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let io = cotk_run::Error::io("read", path);
    let mut found = Vec::new();
    match fs_err::read_dir(path) {
        Err(error) => return Err(io(error).into()),
        Ok(entries) => {
            for entry in entries {
                let file = entry.map_err(cotk_run::Error::io("read", path))?.path();
                if file.extension().is_some_and(|e| e == "jsonl") && file.is_file() {
                    found.push(file);
                }
            }
        }
    }
    if found.is_empty() {
        return Err(DataError::Missing {
            what: "task files (*.jsonl)".into(),
            looked: vec![path.to_owned()],
            help: "name a folder that holds task files, or the files themselves".into(),
        });
    }
    found.sort();
    Ok(found)
}

/// Reads one task.
///
/// # Errors
/// [`DataError::Run`]; [`DataError::Line`] for a line that is no JSON object; [`DataError::Item`] for a key that is
/// missing or holds what cannot be scored; [`DataError::Empty`] without items.
pub fn read(path: impl AsRef<Path>) -> Result<Task> {
    let path = path.as_ref();
    parse(path, &files::read_text(path, LIMIT_BYTES)?)
}

fn parse(path: &Path, text: &str) -> Result<Task> {
    let mut format = None;
    let mut items = Vec::new();
    for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        let broken = |detail: String| DataError::Line {
            file: path.to_owned(),
            line,
            detail,
        };
        let value: Value = serde_json::from_str(text).map_err(|e| broken(e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(broken(format!("is {}, expected a JSON object", shown(&value))));
        };
        let object = Object { path, line, map };
        let format = match format {
            Some(format) => format,
            None => *format.insert(object.format()?),
        };
        items.push(object.item(format)?);
    }
    let name = path
        .file_stem()
        .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    match format {
        Some(format) => Ok(Task {
            name,
            file: path.to_owned(),
            format,
            items,
        }),
        None => Err(DataError::Empty { file: path.to_owned() }),
    }
}

/// One line.
struct Object<'a> {
    path: &'a Path,
    line: usize,
    map: Map<String, Value>,
}

impl Object<'_> {
    fn wrong(&self, key: &str, found: impl ToString, expected: impl ToString) -> DataError {
        DataError::Item {
            file: self.path.to_owned(),
            line: self.line,
            key: key.to_owned(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// The format of which a key is there that no other has.
    fn format(&self) -> Result<Format> {
        let has = |key: &str| self.map.contains_key(key);
        if has("endings") {
            Ok(Format::Choice)
        } else if has("target") {
            Ok(Format::Cloze)
        } else if has("good") || has("bad") {
            Ok(Format::Pair)
        } else {
            let keys: Vec<&str> = self.map.keys().map(String::as_str).collect();
            Err(self.wrong(
                "endings",
                format!("only {}", keys.join(", ")),
                "`context`, `endings` and `label`, or `context` and `target`, or `good` and `bad`",
            ))
        }
    }

    fn item(&self, format: Format) -> Result<Item> {
        if let Some(key) = format.keys().iter().find(|key| !self.map.contains_key(**key)) {
            let nearest = nearest_of(key, self.map.keys().map(String::as_str));
            let found = nearest.map_or("nothing".to_owned(), |near| format!("`{near}`"));
            return Err(self.wrong(key, found, format!("a key of every {} item", format.name())));
        }
        let (context, endings, answer) = match format {
            Format::Choice => {
                let endings = self.endings()?;
                (self.text("context")?, endings.clone(), self.label(endings.len())?)
            }
            Format::Cloze => (self.text("context")?, vec![self.words("target")?], 0),
            Format::Pair => (String::new(), vec![self.words("good")?, self.words("bad")?], 0),
        };
        for (at, ending) in endings.iter().enumerate() {
            if endings[..at].contains(ending) {
                let key = if format == Format::Pair { "bad" } else { "endings" };
                return Err(self.wrong(key, "the same text twice", "endings that differ"));
            }
        }
        let mut parts = Vec::new();
        for key in ["domain", "kind"] {
            if let Some(Value::String(part)) = self.map.get(key) {
                parts.push((key, part.clone()));
            }
        }
        Ok(Item {
            line: self.line,
            context,
            endings,
            answer,
            parts,
        })
    }

    fn text(&self, key: &str) -> Result<String> {
        let value = &self.map[key];
        value
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| self.wrong(key, shown(value), "a string"))
    }

    /// A text that is not empty.
    fn words(&self, key: &str) -> Result<String> {
        let text = self.text(key)?;
        if text.is_empty() {
            return Err(self.wrong(key, "an empty string", "at least one character"));
        }
        Ok(text)
    }

    fn endings(&self) -> Result<Vec<String>> {
        let value = &self.map["endings"];
        let expected = format!("2 to {ENDINGS_LIMIT} strings, none empty");
        let Some(list) = value.as_array() else {
            return Err(self.wrong("endings", shown(value), expected));
        };
        if !(2..=ENDINGS_LIMIT).contains(&list.len()) {
            return Err(self.wrong("endings", format!("{} of them", list.len()), expected));
        }
        list.iter()
            .map(|ending| match ending.as_str() {
                Some(text) if !text.is_empty() => Ok(text.to_owned()),
                _ => Err(self.wrong("endings", shown(ending), &expected)),
            })
            .collect()
    }

    fn label(&self, endings: usize) -> Result<usize> {
        let value = &self.map["label"];
        value
            .as_u64()
            .and_then(|label| usize::try_from(label).ok())
            .filter(|&label| label < endings)
            .ok_or_else(|| {
                self.wrong(
                    "label",
                    shown(value),
                    format!("a whole number from 0 to {}", endings - 1),
                )
            })
    }
}

/// A value in an error: short.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= SHOWN {
        return text;
    }
    text.chars().take(SHOWN - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Task> {
        parse(Path::new("dir/some-task.jsonl"), text)
    }

    #[test]
    fn the_first_item_says_the_format() {
        let choice =
            of("\n{\"context\": \"a\", \"endings\": [\"b\", \"c\", \"d\"], \"label\": 2, \"domain\": \"x\"}\n")
                .unwrap();
        assert_eq!((choice.name.as_str(), choice.format), ("some-task", Format::Choice));
        assert_eq!((choice.items[0].line, choice.items[0].answer), (2, 2));
        assert_eq!(choice.items[0].parts, [("domain", "x".to_owned())]);
        assert!((choice.chance() - 1.0 / 3.0).abs() < 1e-12);
        let cloze = of("{\"context\": \"\", \"target\": \" x\"}").unwrap();
        assert_eq!((cloze.format, cloze.chance()), (Format::Cloze, 0.0));
        let pair = of("{\"good\": \"g\", \"bad\": \"b\", \"kind\": \"k\"}").unwrap();
        assert_eq!((pair.format, pair.chance()), (Format::Pair, 0.5));
        assert_eq!(pair.items[0].endings, ["g", "b"]);
    }

    #[test]
    fn what_cannot_be_scored_is_named_with_line_and_key() {
        let good = "{\"context\": \"a\", \"endings\": [\"b\", \"c\"], \"label\": 0}\n";
        let bad = [
            ("{\"context\": ", "line 2: EOF"),
            ("[1]", "line 2: is [1], expected a JSON object"),
            (
                "{\"context\": \"a\", \"ending\": [\"b\", \"c\"], \"label\": 0}",
                "line 2: `endings`: found `ending`",
            ),
            (
                "{\"context\": \"a\", \"endings\": [], \"label\": 0}",
                "line 2: `endings`: found 0 of them, expected 2 to 64",
            ),
            (
                "{\"context\": \"a\", \"endings\": [\"b\", \"\"], \"label\": 0}",
                "line 2: `endings`: found \"\"",
            ),
            (
                "{\"context\": \"a\", \"endings\": [\"b\", \"b\"], \"label\": 0}",
                "the same text twice",
            ),
            (
                "{\"context\": \"a\", \"endings\": \"b\", \"label\": 0}",
                "`endings`: found \"b\"",
            ),
            (
                "{\"context\": 7, \"endings\": [\"b\", \"c\"], \"label\": 0}",
                "`context`: found 7, expected a string",
            ),
            (
                "{\"context\": \"a\", \"endings\": [\"b\", \"c\"], \"label\": 2}",
                "`label`: found 2, expected a whole number from 0 to 1",
            ),
            (
                "{\"context\": \"a\", \"endings\": [\"b\", \"c\"], \"label\": -1}",
                "`label`: found -1",
            ),
            (
                "{\"good\": \"g\", \"bad\": \"b\"}",
                "line 2: `context`: found nothing, expected a key of every choice item",
            ),
        ];
        for (line, says) in bad {
            let error = of(&format!("{good}{line}\n")).unwrap_err().to_string();
            assert!(
                error.contains(says) && error.contains("some-task.jsonl"),
                "{line}: {error}"
            );
        }
        for (line, says) in [
            (
                "{\"context\": \"a\", \"text\": 1}",
                "`endings`: found only context, text",
            ),
            (
                "{\"context\": \"a\", \"target\": \"\"}",
                "`target`: found an empty string",
            ),
            ("{\"good\": \"g\", \"bad\": \"g\"}", "`bad`: found the same text twice"),
        ] {
            let error = of(line).unwrap_err().to_string();
            assert!(error.contains(says), "{line}: {error}");
        }
        assert!(matches!(of("\n \n"), Err(DataError::Empty { .. })));
    }

    #[test]
    fn a_folder_means_its_task_files_by_name() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(files_at(dir.path()), Err(DataError::Missing { .. })));
        for name in ["b.jsonl", "a.jsonl", "README.md"] {
            files::write_atomic(dir.path().join(name), b"x").unwrap();
        }
        let names = files_at(dir.path()).unwrap();
        assert_eq!(names, [dir.path().join("a.jsonl"), dir.path().join("b.jsonl")]);
    }
}
