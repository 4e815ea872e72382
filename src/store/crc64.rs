//! CRC-64/XZ (ECMA-182, reflected), the checksum COS keeps of every part and object.

use crc_fast::CrcAlgorithm::Crc64Xz;

use super::Part;

/// The CRC-64/XZ of `bytes`.
pub fn of(bytes: &[u8]) -> u64 {
    crc_fast::checksum(Crc64Xz, bytes)
}

/// A CRC-64/XZ over bytes that come in pieces.
pub struct Hasher(crc_fast::Digest);

impl Hasher {
    /// The checksum of nothing yet.
    pub fn new() -> Self {
        Hasher(crc_fast::Digest::new(Crc64Xz))
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all bytes added.
    pub fn finish(&self) -> u64 {
        self.0.finalize()
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self::new()
    }
}

/// The checksum of two byte strings joined, from theirs and the length of the second.
pub fn combine(first: u64, second: u64, second_len: u64) -> u64 {
    match second_len {
        0 => first,
        len => crc_fast::checksum_combine(Crc64Xz, first, second, len),
    }
}

/// The checksum of parts joined in the order given, when every one is known.
pub fn of_parts(parts: &[Part]) -> Option<u64> {
    parts.iter().try_fold(of(b""), |crc, part| Some(combine(crc, part.crc64?, part.size)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_published_vectors_hold() {
        for (text, crc) in [
            ("123456789", 11_051_210_869_376_104_954),
            ("[Object Content]", 16_749_565_679_157_681_890),
            ("[Object Part]", 4_510_578_591_875_220_731),
        ] {
            assert_eq!(of(text.as_bytes()), crc, "{text}");
        }
    }

    proptest! {
        #[test]
        fn parts_combine_to_the_whole(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8)) {
            let listed: Vec<Part> = parts.iter().zip(1..).map(|(bytes, number)| Part {
                number, size: bytes.len() as u64, etag: String::new(), crc64: Some(of(bytes)),
            }).collect();
            let whole = parts.concat();
            prop_assert_eq!(of_parts(&listed), Some(of(&whole)));
            let mut hasher = Hasher::new();
            parts.iter().for_each(|bytes| hasher.update(bytes));
            prop_assert_eq!(hasher.finish(), of(&whole));
        }
    }
}
