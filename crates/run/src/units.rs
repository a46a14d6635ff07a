//! Units and ids as types, where two of them meet in one signature.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A time that can be a target or a prediction: finite and above zero, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Millis(f64);

impl Millis {
    /// The number of milliseconds.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Millis {
    type Error = String;

    fn try_from(ms: f64) -> Result<Self, String> {
        if ms.is_finite() && ms > 0.0 {
            Ok(Self(ms))
        } else {
            Err(format!("{ms} is not a time in ms: expected a number above 0"))
        }
    }
}

impl From<Millis> for f64 {
    fn from(ms: Millis) -> Self {
        ms.0
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", significant(self.0, 3))
    }
}

/// A count of bytes; displays in powers of 1024 (KiB, MiB, GiB).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        let bytes = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..1_048_576 => write!(f, "{} KiB", significant(bytes / 1024.0, 3)),
            1_048_576..1_073_741_824 => write!(f, "{} MiB", significant(bytes / 1_048_576.0, 3)),
            _ => write!(f, "{} GiB", significant(bytes / 1_073_741_824.0, 3)),
        }
    }
}

/// Index of a decoder layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerId(pub u32);

/// Index of a routed expert inside its layer, in the *original* model's numbering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExpertId(pub u32);

impl LayerId {
    /// As an index into per-layer lists.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl ExpertId {
    /// As an index into per-expert lists.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {}", self.0)
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expert {}", self.0)
    }
}

/// `value` with `digits` significant digits, without an exponent between 1e-4 and 1e9: the form of every table.
pub fn significant(value: f64, digits: usize) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if !value.is_finite() {
        return value.to_string();
    }
    let magnitude = value.abs().log10().floor();
    if !(-4.0..9.0).contains(&magnitude) {
        return format!("{value:.*e}", digits.saturating_sub(1));
    }
    #[expect(clippy::cast_possible_truncation, reason = "between -4 and 9")]
    let decimals = digits as i64 - 1 - magnitude as i64;
    format!("{value:.*}", usize::try_from(decimals).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_whatever_the_size() {
        for (value, text) in [
            (0.012_345, "0.0123"),
            (1.234_5, "1.23"),
            (12.345, "12.3"),
            (1234.5, "1234"),
            (0.0, "0"),
            (1e-9, "1.00e-9"),
        ] {
            assert_eq!(significant(value, 3), text);
        }
    }

    #[test]
    fn a_time_is_above_zero() {
        assert!(Millis::try_from(-3.0).unwrap_err().contains("-3 is not a time in ms"));
        assert!(Millis::try_from(f64::NAN).is_err());
        assert_eq!(Millis::try_from(2.5).map(Millis::get), Ok(2.5));
    }

    #[test]
    fn bytes_read_in_powers_of_1024() {
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Bytes(45_605_232).to_string(), "43.5 MiB");
    }
}
