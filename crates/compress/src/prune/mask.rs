//! Which experts of a layer stay: one bit each, so that a search can remember every mask it has seen.

use cotk_run::units::ExpertId;
use serde::{Deserialize, Serialize};

/// Experts that are dropped, in original numbering; the others stay.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "Listed", try_from = "Listed")]
pub struct Mask {
    experts: usize,
    /// Bit `e % 64` of word `e / 64` is set: expert `e` is dropped.
    words: Vec<u64>,
}

impl Mask {
    /// Everybody stays.
    pub fn none(experts: usize) -> Self {
        Self {
            experts,
            words: vec![0; experts.div_ceil(64)],
        }
    }

    /// These go.
    pub fn of(experts: usize, dropped: impl IntoIterator<Item = usize>) -> Self {
        let mut mask = Self::none(experts);
        dropped.into_iter().for_each(|expert| mask.drop(expert));
        mask
    }

    /// Experts of the layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Whether this expert goes.
    pub fn is_dropped(&self, expert: usize) -> bool {
        self.words[expert / 64] >> (expert % 64) & 1 == 1
    }

    /// This expert goes.
    pub fn drop(&mut self, expert: usize) {
        assert!(expert < self.experts, "expert {expert} of {}", self.experts);
        self.words[expert / 64] |= 1 << (expert % 64);
    }

    /// This expert stays.
    pub fn keep(&mut self, expert: usize) {
        self.words[expert / 64] &= !(1 << (expert % 64));
    }

    /// How many go.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Those that go, ascending.
    pub fn dropped(&self) -> Vec<usize> {
        (0..self.experts).filter(|&expert| self.is_dropped(expert)).collect()
    }

    /// Those that stay, ascending.
    pub fn kept(&self) -> Vec<usize> {
        (0..self.experts).filter(|&expert| !self.is_dropped(expert)).collect()
    }

    /// One flag per expert: `true` = stays.
    pub fn living(&self) -> Vec<bool> {
        (0..self.experts).map(|expert| !self.is_dropped(expert)).collect()
    }

    /// With one expert dropped and another kept instead.
    #[must_use]
    pub fn swapped(&self, dropped: usize, kept: usize) -> Self {
        let mut mask = self.clone();
        mask.keep(dropped);
        mask.drop(kept);
        mask
    }
}

/// As it stands in journals and tables: numbers, not words of bits.
#[derive(Serialize, Deserialize)]
struct Listed {
    experts: usize,
    dropped: Vec<ExpertId>,
}

impl From<Mask> for Listed {
    fn from(mask: Mask) -> Self {
        let id = |expert| ExpertId(u32::try_from(expert).expect("expert counts fit 32 bits"));
        Self {
            experts: mask.experts,
            dropped: mask.dropped().into_iter().map(id).collect(),
        }
    }
}

impl TryFrom<Listed> for Mask {
    type Error = String;

    fn try_from(listed: Listed) -> Result<Self, String> {
        const MOST: usize = 1 << 16;
        if listed.experts > MOST {
            return Err(format!("{} experts: expected at most {MOST}", listed.experts));
        }
        match listed.dropped.iter().find(|expert| expert.index() >= listed.experts) {
            Some(wrong) => Err(format!("{wrong} is dropped of {} experts", listed.experts)),
            None => Ok(Self::of(
                listed.experts,
                listed.dropped.iter().map(|expert| expert.index()),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_its_list_of_dropped_experts() {
        let mut mask = Mask::of(130, [3, 64, 129]);
        assert_eq!((mask.count(), mask.dropped()), (3, vec![3, 64, 129]));
        assert_eq!(mask.kept().len() + mask.count(), 130);
        mask = mask.swapped(64, 63);
        assert_eq!(mask.dropped(), [3, 63, 129]);
        assert!(!mask.living()[63] && mask.living()[64]);
        let text = serde_json::to_string(&mask).unwrap();
        assert_eq!(serde_json::from_str::<Mask>(&text).unwrap(), mask);
        assert!(serde_json::from_str::<Mask>(r#"{"experts":2,"dropped":[2]}"#).is_err());
        assert!(serde_json::from_str::<Mask>(r#"{"experts":99999999,"dropped":[]}"#).is_err());
    }
}
