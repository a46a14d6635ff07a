//! Recipes: TOML in, one typed value out. Each crate owns the type of its section; the recipe's own type (with
//! `#[serde(deny_unknown_fields)]` on every table) is its caller's. Law: what is not known is refused with the nearest
//! known key; what was resolved can be written down and read again to the same hash.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files;
use crate::{Error, Result};

const LIMIT_BYTES: u64 = 1 << 20;

/// A recipe's text and where it came from.
#[derive(Debug, Clone)]
pub struct Source {
    /// Path, or the bare name of an embedded recipe.
    pub name: String,
    pub text: String,
}

impl Source {
    /// A file, or the bare name of one of `embedded` (`(name, text)`).
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::NoRecipe`] when there is neither.
    pub fn find(name: &str, embedded: &[(&str, &str)]) -> Result<Self> {
        if Path::new(name).exists() {
            return Ok(Self {
                name: name.to_owned(),
                text: files::read_text(name, LIMIT_BYTES)?,
            });
        }
        match embedded.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Ok(Self {
                name: name.to_owned(),
                text: (*text).to_owned(),
            }),
            None => Err(Error::NoRecipe {
                name: name.to_owned(),
                known: embedded.iter().map(|(n, _)| (*n).to_owned()).collect(),
            }),
        }
    }

    /// File name without folder and extension: the first part of a run's name.
    pub fn stem(&self) -> String {
        Path::new(&self.name)
            .file_stem()
            .map_or_else(|| "recipe".to_owned(), |s| s.to_string_lossy().into_owned())
    }
}

/// Parses a recipe after the `--set key.path=value` overrides.
///
/// # Errors
/// [`Error::Recipe`] with line, column, caret, the key and the nearest known one; [`Error::Set`].
pub fn parse<T: DeserializeOwned>(source: &Source, sets: &[String]) -> Result<T> {
    if sets.is_empty() {
        return toml::from_str(&source.text).map_err(|e| fault(source, &e));
    }
    let mut table: toml::Table = toml::from_str(&source.text).map_err(|e| fault(source, &e))?;
    for set in sets {
        apply(&mut table, set)?;
    }
    // Through text again, so that an unknown key is shown in its line.
    let text = toml::to_string(&table).map_err(|e| Error::Set {
        argument: sets.join(" "),
        detail: e.to_string(),
    })?;
    let with_sets = Source {
        name: format!("{} with --set {}", source.name, sets.join(" --set ")),
        text,
    };
    toml::from_str(&with_sets.text).map_err(|e| fault(&with_sets, &e))
}

/// The resolved recipe as text: what the run folder stores.
///
/// # Errors
/// [`Error::Set`] for a value that TOML cannot hold.
pub fn resolved<T: Serialize>(recipe: &T) -> Result<String> {
    toml::to_string(recipe).map_err(|e| Error::Set {
        argument: "recipe".into(),
        detail: e.to_string(),
    })
}

/// Hash of a resolved recipe: same decisions, same hash, whatever the file looked like.
///
/// # Errors
/// As [`resolved`].
pub fn hash<T: Serialize>(recipe: &T) -> Result<u64> {
    Ok(files::checksum(resolved(recipe)?.as_bytes()))
}

fn apply(table: &mut toml::Table, set: &str) -> Result<()> {
    let fail = |detail: &str| Error::Set {
        argument: set.to_owned(),
        detail: detail.to_owned(),
    };
    let (path, value) = set.split_once('=').ok_or_else(|| fail("expected key.path=value"))?;
    // A bare word is a string: `--set data.name=glyphs` needs no quotes.
    let value = toml::from_str::<toml::Table>(&format!("value = {value}"))
        .ok()
        .and_then(|mut t| t.remove("value"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut keys: Vec<&str> = path.split('.').map(str::trim).collect();
    let last = keys
        .pop()
        .filter(|k| !k.is_empty())
        .ok_or_else(|| fail("the key is empty"))?;
    let mut here = table;
    for key in keys {
        let entry = here
            .entry(key)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        here = entry
            .as_table_mut()
            .ok_or_else(|| fail(&format!("`{key}` is a value, not a section")))?;
    }
    here.insert(last.to_owned(), value);
    Ok(())
}

fn fault(source: &Source, error: &toml::de::Error) -> Error {
    let message = error.message();
    let mut quoted = message.split('`').skip(1).step_by(2);
    let (mut key, mut nearest) = (None, None);
    if message.starts_with("unknown field") || message.starts_with("unknown variant") {
        if let Some(found) = quoted.next() {
            nearest = nearest_of(found, quoted);
            key = Some(found.to_owned());
        }
    } else if message.starts_with("missing field") {
        key = quoted.next().map(str::to_owned);
    }
    Error::Recipe {
        file: source.name.clone(),
        key,
        nearest,
        detail: error.to_string().trim_end().to_owned(),
    }
}

/// The known word with the least edit distance, if any is near at all (half of the word may differ).
pub fn nearest_of<'a>(found: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    known
        .map(|word| (edit_distance(found, word), word))
        .min()
        .filter(|(distance, word)| *distance <= word.len().max(found.len()).div_ceil(2))
        .map(|(_, word)| word.to_owned())
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Recipe {
        seed: u64,
        train: Train,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Train {
        epochs: u32,
        #[serde(default)]
        name: String,
    }

    fn source(text: &str) -> Source {
        Source {
            name: "r.toml".into(),
            text: text.into(),
        }
    }

    #[test]
    fn an_unknown_key_is_refused_with_line_and_nearest_key() {
        let error = parse::<Recipe>(&source("seed = 1\n[train]\nepoch = 3\n"), &[]).unwrap_err();
        let Error::Recipe {
            key, nearest, detail, ..
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!((key.as_deref(), nearest.as_deref()), (Some("epoch"), Some("epochs")));
        assert!(detail.contains("line 3, column 1"), "{detail}");
    }

    #[test]
    fn set_overrides_and_bare_words_are_strings() {
        let recipe: Recipe = parse(
            &source("seed = 1\n[train]\nepochs = 3\n"),
            &["train.epochs=5".into(), "train.name=ab".into()],
        )
        .unwrap();
        assert_eq!(
            recipe,
            Recipe {
                seed: 1,
                train: Train {
                    epochs: 5,
                    name: "ab".into()
                }
            }
        );
        for bad in ["train.epochs", "=3", "seed.x=3"] {
            assert!(
                matches!(
                    parse::<Recipe>(&source("seed = 1\n[train]\nepochs = 3\n"), &[bad.into()]),
                    Err(Error::Set { .. })
                ),
                "{bad}"
            );
        }
    }

    #[test]
    fn what_is_resolved_reads_back_to_the_same_hash() {
        let recipe = Recipe {
            seed: 4,
            train: Train {
                epochs: 2,
                name: "a \"b\"".into(),
            },
        };
        let again: Recipe = parse(&source(&resolved(&recipe).unwrap()), &[]).unwrap();
        assert_eq!(hash(&again).unwrap(), hash(&recipe).unwrap());
    }

    #[test]
    fn nearest_key_needs_some_likeness() {
        assert_eq!(
            nearest_of("taget_ms", ["target_ms", "profile"].into_iter()).as_deref(),
            Some("target_ms")
        );
        assert_eq!(nearest_of("zzzz", ["target_ms", "profile"].into_iter()), None);
    }
}
