//! Rows of a comparison by name: which experts go, how much of each layer, what becomes of those that stay, healed or not.

use serde::{Deserialize, Serialize};

use super::ratios::Spread;
use super::search::Method;
use crate::shrink::plan::Way;

/// Seeds of a method that draws.
const SEEDS: u64 = 3;

/// One way to take a share of the experts' weights away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowWish {
    pub method: Method,
    pub spread: Spread,
    /// Whether reception fields choose among three masks per layer.
    pub has_field: bool,
    /// What becomes of the experts that stay.
    #[serde(default)]
    pub way: Way,
    /// Where they become smaller: whether half of what goes are whole experts, as MoE-I² has it; else none are.
    #[serde(default)]
    pub has_both: bool,
    #[serde(default)]
    pub is_healed: bool,
    /// Whether healing fits routers too.
    #[serde(default)]
    pub has_router: bool,
}

/// Rows that make experts smaller: name, way, whether whole experts go too.
const SHRINKING: [(&str, Way, bool); 5] = [
    ("channels", Way::Channels, false),
    ("rank", Way::Rank, false),
    ("mix", Way::Channels, true),
    ("mix-rank", Way::Rank, true),
    ("paper", Way::PlainRank, true),
];

impl RowWish {
    /// `reap`, `swap:unequal`, `genetic:equal:field`, `channels`, `rank:equal`, `mix`, `paper:healed`.
    ///
    /// # Errors
    /// What is not known, and what is.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let mut wish = Self::named(name).ok_or_else(|| {
            let mut names: Vec<&str> = Method::ALL.iter().map(|method| method.name()).collect();
            names.retain(|name| *name != "paper");
            names.extend(SHRINKING.iter().map(|row| row.0));
            format!("`{name}` is not a method: expected one of {}", names.join(", "))
        })?;
        for part in parts {
            match part {
                "equal" => wish.spread = Spread::Equal,
                "unequal" => wish.spread = Spread::Unequal,
                "paper" => wish.spread = Spread::Paper,
                "field" => wish.has_field = true,
                "layers" => wish.has_field = false,
                "experts" => (wish.way, wish.has_both) = (Way::Whole, false),
                "healed" => wish.is_healed = true,
                "router" => (wish.is_healed, wish.has_router) = (true, true),
                other => {
                    return Err(format!(
                        "`{other}` in `{text}`: expected equal, unequal, paper, field, layers, experts, healed or router"
                    ));
                }
            }
        }
        if wish.way != Way::Whole && !wish.has_both && wish.spread == Spread::Paper {
            return Err(format!(
                "`paper` in `{text}`: MoE-I²'s shares are of experts, none go here"
            ));
        }
        Ok(wish)
    }

    fn named(name: &str) -> Option<Self> {
        let plain = Self {
            method: Method::Swap,
            spread: Spread::Unequal,
            has_field: false,
            way: Way::Whole,
            has_both: false,
            is_healed: false,
            has_router: false,
        };
        if let Some(&(name, way, has_both)) = SHRINKING.iter().find(|row| row.0 == name) {
            let is_paper = name == "paper";
            return Some(Self {
                method: if is_paper { Method::Paper } else { plain.method },
                spread: if is_paper { Spread::Paper } else { plain.spread },
                has_field: is_paper,
                way,
                has_both,
                ..plain
            });
        }
        let method = Method::named(name)?;
        Some(Self {
            method,
            spread: Spread::Equal,
            ..plain
        })
    }

    /// All of one ratio by default.
    pub fn usual() -> Vec<Self> {
        [
            "random",
            "frequency",
            "reap",
            "reap-renormalised",
            "energy",
            "single",
            "greedy",
            "swap",
            "genetic",
            "genetic:equal:field",
            "reap:unequal",
            "energy:unequal",
            "greedy:unequal",
            "swap:unequal",
            "genetic:unequal",
            "paper:experts",
            "paper",
            "rank",
            "mix",
            "channels:equal",
            "channels",
            "reap:healed",
            "swap:unequal:healed",
            "paper:healed",
            "rank:healed",
            "mix:healed",
            "channels:healed",
        ]
        .iter()
        .map(|text| Self::parse(text).expect("these are known"))
        .collect()
    }

    /// In tables: `genetic unequal field`, `channels unequal healed`.
    pub fn name(&self) -> String {
        let what = SHRINKING.iter().find(|row| (row.1, row.2) == (self.way, self.has_both));
        let what = match what {
            Some((name, ..)) => *name,
            None => self.method.name(),
        };
        let mut name = match (self.method, self.spread, self.way) {
            (Method::Paper, Spread::Paper, Way::Whole) => "paper experts".to_owned(),
            (Method::Paper, Spread::Paper, _) => what.to_owned(),
            (_, spread, _) => format!("{what} {}", spread.name()),
        };
        for (is_so, word) in [
            (self.has_field, " field"),
            (self.is_healed, " healed"),
            (self.has_router, " router"),
        ] {
            if is_so {
                name.push_str(word);
            }
        }
        name
    }

    /// Whether anything but masks is asked for.
    pub(crate) fn needs_tokens(&self) -> bool {
        self.way != Way::Whole || self.is_healed
    }

    pub(crate) fn seeds(&self) -> u64 {
        match self.method {
            Method::Random => SEEDS,
            // Drawn too, but its swaps end in the same place; one seed a figure, in the recipe.
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_spelled_as_they_are_named() {
        for (text, name) in [
            ("reap", "reap equal"),
            ("swap:unequal", "swap unequal"),
            ("genetic:equal:field", "genetic equal field"),
            ("paper", "paper field"),
            ("paper:layers", "paper"),
            ("paper:experts", "paper experts field"),
            ("channels", "channels unequal"),
            ("rank:equal:healed", "rank equal healed"),
            ("mix", "mix unequal"),
            ("reap:healed", "reap equal healed"),
            ("reap:router", "reap equal healed router"),
        ] {
            assert_eq!(RowWish::parse(text).unwrap().name(), name);
        }
        for (text, wanted) in [
            ("reep", "expected one of"),
            ("reap:even", "`even`"),
            ("channels:paper", "none go"),
            ("", "not a method"),
        ] {
            assert!(RowWish::parse(text).unwrap_err().contains(wanted), "{text}");
        }
        assert!(RowWish::usual().len() > 10);
    }
}
