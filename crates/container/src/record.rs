//! The 256-byte header before each expert's sections. Law: what was encoded decodes to itself; any changed byte of the
//! header is refused by its own checksum.
//!
//! Bytes, little endian: magic 8 · layer 4 · expert 4 · kind 4 · section count 4 · record bytes 8 · four times
//! (offset 8, length 8, xxh3-64 8) · zeros up to 248 · xxh3-64 of the 248 bytes before.

use cotk_run::files;
use cotk_run::units::{ExpertId, LayerId};

use crate::manifest::{Checksum, Section};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 256;
/// Sections that fit a header.
pub const SECTIONS_LIMIT: usize = 4;
const MAGIC: [u8; 8] = *b"cotkexp1";
/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Three matrices, in codes and factors.
    Coded,
    /// A vector that the expert answers with.
    Constant,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Coded, Self::Constant];

    fn number(self) -> u32 {
        match self {
            Self::Coded => 0,
            Self::Constant => 1,
        }
    }
}

const SECTIONS_AT: usize = 32;
const OWN_AT: usize = HEADER_BYTES - 8;

/// A decoded header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub layer: LayerId,
    pub expert: ExpertId,
    /// Header and sections.
    pub bytes: u64,
    /// At most [`SECTIONS_LIMIT`].
    pub sections: Vec<Section>,
}

/// Which part of a header is wrong: (what, found, expected).
pub(crate) type HeaderFault = (&'static str, String, String);

impl Header {
    /// The header's bytes.
    ///
    /// # Panics
    /// With more than [`SECTIONS_LIMIT`] sections.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        assert!(self.sections.len() <= SECTIONS_LIMIT, "no code has more planes");
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.layer.0.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.expert.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.kind.number().to_le_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "at most four")]
        bytes[20..24].copy_from_slice(&(self.sections.len() as u32).to_le_bytes());
        bytes[24..32].copy_from_slice(&self.bytes.to_le_bytes());
        for (section, into) in self.sections.iter().zip(bytes[SECTIONS_AT..].chunks_exact_mut(24)) {
            into[..8].copy_from_slice(&section.offset.to_le_bytes());
            into[8..16].copy_from_slice(&section.bytes.to_le_bytes());
            into[16..].copy_from_slice(&section.xxh3.0.to_le_bytes());
        }
        let own = files::checksum(&bytes[..OWN_AT]);
        bytes[OWN_AT..].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    /// Own checksum of encoded bytes.
    pub fn own_checksum(bytes: &[u8; HEADER_BYTES]) -> Checksum {
        Checksum(u64_at(bytes, OWN_AT))
    }

    /// The inverse of [`encode`](Self::encode).
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderFault> {
        if bytes[..8] != MAGIC {
            let text = |b: &[u8]| b.escape_ascii().to_string();
            return Err(("magic", text(&bytes[..8]), text(&MAGIC)));
        }
        let (own, computed) = (u64_at(bytes, OWN_AT), files::checksum(&bytes[..OWN_AT]));
        if own != computed {
            return Err(("checksum", format!("{computed:016x}"), format!("{own:016x}")));
        }
        let number = u32_at(bytes, 16);
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.number() == number) else {
            return Err(("kind", number.to_string(), "0 or 1".to_owned()));
        };
        let count = u32_at(bytes, 20) as usize;
        if count > SECTIONS_LIMIT {
            return Err(("section count", count.to_string(), format!("at most {SECTIONS_LIMIT}")));
        }
        let sections = (0..count)
            .map(|i| SECTIONS_AT + 24 * i)
            .map(|at| Section {
                offset: u64_at(bytes, at),
                bytes: u64_at(bytes, at + 8),
                xxh3: Checksum(u64_at(bytes, at + 16)),
            })
            .collect();
        Ok(Self {
            kind,
            layer: LayerId(u32_at(bytes, 8)),
            expert: ExpertId(u32_at(bytes, 12)),
            bytes: u64_at(bytes, 24),
            sections,
        })
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn header() -> impl Strategy<Value = Header> {
        let section = any::<(u64, u64, u64)>().prop_map(|(offset, bytes, hash)| Section {
            offset,
            bytes,
            xxh3: Checksum(hash),
        });
        let kind = proptest::sample::select(Kind::ALL.to_vec());
        let head = (any::<(u32, u32, u64)>(), kind);
        (head, vec(section, 0..=SECTIONS_LIMIT)).prop_map(|(((layer, expert, bytes), kind), sections)| Header {
            kind,
            layer: LayerId(layer),
            expert: ExpertId(expert),
            bytes,
            sections,
        })
    }

    proptest! {
        #[test]
        fn a_header_decodes_to_itself(header in header()) {
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn any_changed_byte_of_a_header_is_refused(header in header(), at in 0..HEADER_BYTES, flip in 1u8..) {
            let mut bytes = header.encode();
            bytes[at] ^= flip;
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }
}
