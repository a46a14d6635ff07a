//! One seed a run, split into named streams. Law: a stream depends on seed and name alone, so that work may move
//! between threads and a resumed run draws what the first would have drawn.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use xxhash_rust::xxh3::xxh3_128;

/// The generator of every stream: a named algorithm, so that a seed means the same in a year.
pub type Stream = ChaCha8Rng;

/// The seed of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seeds(u64);

impl Seeds {
    /// From the recipe's or the command line's `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The number itself, for reports.
    pub fn seed(self) -> u64 {
        self.0
    }

    /// The generator for one purpose: `seeds.stream("calibration")`, `seeds.stream(&format!("epoch {epoch}"))`.
    pub fn stream(self, purpose: &str) -> Stream {
        let mut text = self.0.to_le_bytes().to_vec();
        text.extend_from_slice(purpose.as_bytes());
        let low = xxh3_128(&text).to_le_bytes();
        text.push(0xff); // not valid UTF-8: no purpose can make the same bytes
        let high = xxh3_128(&text).to_le_bytes();
        let mut seed = [0u8; 32];
        seed[..16].copy_from_slice(&low);
        seed[16..].copy_from_slice(&high);
        ChaCha8Rng::from_seed(seed)
    }

    /// A seed for a library that wants a number, drawn from the stream of that purpose.
    pub fn number(self, purpose: &str) -> u64 {
        use rand::Rng;
        self.stream(purpose).next_u64()
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn streams_differ_by_purpose_and_seed_and_repeat() {
        let draw = |seed: u64, purpose: &str| Seeds::new(seed).stream(purpose).next_u64();
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
    }

    #[test]
    fn a_seed_means_the_same_in_a_year() {
        assert_eq!(Seeds::new(7).number("golden"), GOLDEN);
    }

    const GOLDEN: u64 = 5_236_437_104_552_773_816;
}
