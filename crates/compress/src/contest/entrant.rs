//! What competes for a budget of bits: `gptq-uniform`, `joint:healed`, … Law: a row's spelling in tables says which
//! allocation, which rounding and whether it was healed.

use cotk_quant::layout::{ScaleForm, WHOLE_ROW};
use serde::{Deserialize, Serialize};

use crate::baselines::{Mc, MixtureOfPrecisions, Uniform};
use crate::choice::Chooser;

/// Seeds of a method that draws.
const SEEDS: u64 = 3;

/// Who gives experts their bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// One form for all, each weight to its nearest level.
    Rtn,
    /// One form for all, by GPTQ.
    GptqUniform,
    /// MC-MoE's integer program per layer.
    Mc,
    /// Two widths, at random.
    Mop,
    /// The recipe's own allocation.
    Joint,
}

/// How codes are chosen once bits are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    /// To the nearest level.
    Nearest,
    /// GPTQ with the scales that are best for rounding.
    Plain,
    /// GPTQ with the recipe's scale factors and refits.
    Refit,
}

/// Groups and scales that were asked for by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scaling {
    pub group: usize,
    pub scales: ScaleForm,
}

impl Scaling {
    const SPELT: &'static str = "g16-two-level, g32, g32-two-level, g64, g64-two-level, g128, g128-two-level or row";

    fn parse(text: &str) -> Option<Self> {
        let (size, scales) = match text.strip_suffix("-two-level") {
            Some(size) => (size, ScaleForm::TwoLevel),
            None => (text, ScaleForm::F16),
        };
        let group = match size {
            "row" => WHOLE_ROW,
            _ => size.strip_prefix('g')?.parse().ok()?,
        };
        let exists = match scales {
            ScaleForm::F16 => [32, 64, 128, WHOLE_ROW].contains(&group),
            ScaleForm::TwoLevel => [16, 32, 64, 128].contains(&group),
        };
        exists.then_some(Self { group, scales })
    }

    fn spell(self) -> String {
        let group = match self.group {
            WHOLE_ROW => "row".to_owned(),
            group => format!("g{group}"),
        };
        match self.scales {
            ScaleForm::F16 => group,
            ScaleForm::TwoLevel => format!("{group}-two-level"),
        }
    }
}

/// One row of a contest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entrant {
    pub method: Method,
    /// Of `gptq-uniform`, where it was named.
    pub scaling: Option<Scaling>,
    pub effort: Effort,
    pub is_healed: bool,
}

impl Entrant {
    /// `rtn`, `gptq-uniform:g32:plain`, `mc:refit`, `joint:healed`.
    ///
    /// # Errors
    /// What is not known, and what is.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let (method, effort) = match name {
            "rtn" => (Method::Rtn, Effort::Nearest),
            "gptq-uniform" => (Method::GptqUniform, Effort::Refit),
            "mc" => (Method::Mc, Effort::Plain),
            "mop" => (Method::Mop, Effort::Plain),
            "joint" => (Method::Joint, Effort::Refit),
            other => {
                return Err(format!(
                    "`{other}` is not a way to spend bits: expected one of {}",
                    Self::NAMES.join(", ")
                ));
            }
        };
        let mut entrant = Self {
            method,
            scaling: None,
            effort,
            is_healed: false,
        };
        for part in parts {
            match (part, Scaling::parse(part)) {
                ("healed", _) => entrant.is_healed = true,
                ("plain", _) if method != Method::Rtn => entrant.effort = Effort::Plain,
                ("refit", _) if method != Method::Rtn => entrant.effort = Effort::Refit,
                (_, Some(scaling)) if method == Method::GptqUniform => entrant.scaling = Some(scaling),
                _ => {
                    let scalings = match method {
                        Method::GptqUniform => format!(", {}", Scaling::SPELT),
                        _ => String::new(),
                    };
                    let efforts = match method {
                        Method::Rtn => "",
                        _ => ", plain, refit",
                    };
                    return Err(format!("`{part}` in `{text}`: expected healed{efforts}{scalings}"));
                }
            }
        }
        Ok(entrant)
    }

    /// All that [`Entrant::parse`] knows.
    pub const NAMES: [&'static str; 5] = ["rtn", "gptq-uniform", "mc", "mop", "joint"];

    /// Whether the word names an entrant and not a way to choose a mask.
    pub fn is_named(text: &str) -> bool {
        Self::NAMES.contains(&text.split(':').next().unwrap_or_default())
    }

    /// All of one budget by default.
    pub fn usual() -> Vec<Self> {
        [
            "rtn",
            "gptq-uniform:g32:plain",
            "gptq-uniform",
            "gptq-uniform:healed",
            "mc",
            "mc:refit",
            "mop",
            "joint:plain",
            "joint",
            "joint:healed",
        ]
        .iter()
        .map(|text| Self::parse(text).expect("these are known"))
        .collect()
    }

    /// As [`Entrant::parse`] reads it.
    pub fn name(&self) -> String {
        let (method, usual) = match self.method {
            Method::Rtn => ("rtn", Effort::Nearest),
            Method::GptqUniform => ("gptq-uniform", Effort::Refit),
            Method::Mc => ("mc", Effort::Plain),
            Method::Mop => ("mop", Effort::Plain),
            Method::Joint => ("joint", Effort::Refit),
        };
        let mut name = method.to_owned();
        if let Some(scaling) = self.scaling {
            name = format!("{name}:{}", scaling.spell());
        }
        if self.effort != usual {
            name.push_str(match self.effort {
                Effort::Nearest => ":nearest",
                Effort::Plain => ":plain",
                Effort::Refit => ":refit",
            });
        }
        if self.is_healed {
            name.push_str(":healed");
        }
        name
    }

    /// Seeds it is drawn with.
    pub fn seeds(&self) -> u64 {
        match self.method {
            Method::Mop => SEEDS,
            _ => 1,
        }
    }

    /// Whether it is on the plot where no bar is: each method as it is by default, and the joint allocation healed.
    pub fn is_plotted(&self) -> bool {
        ["rtn", "gptq-uniform", "mc", "mop", "joint", "joint:healed"].contains(&self.name().as_str())
    }

    /// When it is built, low first: what bars are asked of, the other methods as published, variants.
    pub fn rank(&self) -> u8 {
        match self.name().as_str() {
            "gptq-uniform" | "mc" | "joint" | "joint:healed" => 0,
            "rtn" | "mop" => 1,
            _ => 2,
        }
    }

    /// Whether it may stand for the best uniform code of its budget.
    pub fn is_uniform(&self) -> bool {
        self.method == Method::GptqUniform && !self.is_healed
    }

    /// The baseline; `None`: the recipe's own allocation.
    pub fn chooser(&self) -> Option<Box<dyn Chooser>> {
        Some(match (self.method, self.scaling) {
            (Method::Rtn, _) => Box::new(Uniform::finest(self.name())),
            (Method::GptqUniform, None) => Box::new(Uniform::strongest(self.name())),
            (Method::GptqUniform, Some(scaling)) => Box::new(Uniform::of(self.name(), scaling.group, scaling.scales)),
            (Method::Mc, _) => Box::new(Mc::PUBLISHED),
            (Method::Mop, _) => Box::new(MixtureOfPrecisions::default()),
            (Method::Joint, _) => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_spelled_as_they_are_named() {
        for text in [
            "rtn",
            "rtn:healed",
            "gptq-uniform",
            "gptq-uniform:g16-two-level",
            "gptq-uniform:row:plain:healed",
            "mc",
            "mc:refit",
            "mop",
            "joint:plain",
            "joint:healed",
        ] {
            let entrant = Entrant::parse(text).unwrap();
            assert_eq!(entrant.name(), text);
            assert!(Entrant::is_named(text) && (entrant.chooser().is_none() == text.starts_with("joint")));
            let json = serde_json::to_string(&entrant).unwrap();
            assert_eq!(serde_json::from_str::<Entrant>(&json).unwrap(), entrant);
        }
        assert!(!Entrant::is_named("reap:equal"));
        assert!(Entrant::usual().iter().any(Entrant::is_uniform));
        for (text, wanted) in [
            ("rtm", "expected one of rtn"),
            ("rtn:plain", "expected healed"),
            ("mc:g32", "expected healed, plain, refit"),
            ("gptq-uniform:g48", "g16-two-level"),
            ("gptq-uniform:g16", "g16-two-level"),
            ("", "not a way"),
        ] {
            assert!(Entrant::parse(text).unwrap_err().contains(wanted), "{text}");
        }
    }
}
