//! The dynamic disk header: its bytes and back, pure. Field names and offsets are those of the specification's
//! section "Dynamic Disk Header Format"; numbers are big-endian.

use super::footer::field;
use super::{SECTOR, bad_field, checksum};
use crate::error::Result;

/// Bytes of the header.
pub const HEADER_LEN: usize = 1024;
/// The first eight bytes of every header.
pub const COOKIE: [u8; 8] = *b"cxsparse";
/// An entry of the block allocation table that names no block.
pub const ABSENT: u32 = u32::MAX;
/// The longest table, in entries of 4 bytes: the largest disk, 2040 GiB, in blocks of 512 KiB, the smallest that
/// programs are known to make.
pub const MAX_ENTRIES: u32 = 4 << 20;
/// Where the checksum is.
const CHECKSUM: usize = 36;

/// What a dynamic disk's header says of its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where the block allocation table is, in bytes of the file.
    pub table_offset: u64,
    /// Entries of the table.
    pub max_entries: u32,
    /// Bytes of the disk in a block: a power of two from 512 up.
    pub block_size: u32,
}

impl Header {
    /// The header's bytes, checksum included.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &COOKIE);
        // Data offset: unused.
        put(8, &u64::MAX.to_be_bytes());
        put(16, &self.table_offset.to_be_bytes());
        put(24, &0x0001_0000u32.to_be_bytes());
        put(28, &self.max_entries.to_be_bytes());
        put(32, &self.block_size.to_be_bytes());
        let sum = checksum(&bytes, CHECKSUM);
        bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Reads the header `bytes`, which are at offset `at` of the image called `image`.
    pub fn decode(image: &str, at: u64, bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        let bad = |field: &str, offset: u64, why: String| {
            Err(bad_field(image, field, at.saturating_add(offset), why))
        };
        if !bytes.starts_with(&COOKIE) {
            return bad("cookie", 0, "it is not \"cxsparse\": no dynamic disk header is here".into());
        }
        let (stored, sum) = (u32::from_be_bytes(field(bytes, CHECKSUM)), checksum(bytes, CHECKSUM));
        if stored != sum {
            return bad(
                "checksum",
                36,
                format!("it is {stored:#010x}, and the header sums up to {sum:#010x}"),
            );
        }
        let version = u32::from_be_bytes(field(bytes, 24));
        if version >> 16 != 1 {
            return bad("header_version", 24, format!("it is {version:#010x}; version 1 exists"));
        }
        let header = Header {
            table_offset: u64::from_be_bytes(field(bytes, 16)),
            max_entries: u32::from_be_bytes(field(bytes, 28)),
            block_size: u32::from_be_bytes(field(bytes, 32)),
        };
        if !header.block_size.is_power_of_two() || u64::from(header.block_size) < SECTOR {
            let why = format!("it is {}; powers of two from 512 up are possible", header.block_size);
            return bad("block_size", 32, why);
        }
        Ok(header)
    }

    /// Bytes of the sector bitmap in front of each block: a bit for each sector, in whole sectors.
    pub fn bitmap_len(&self) -> u64 {
        (u64::from(self.block_size) / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;

    proptest! {
        #[test]
        fn a_header_survives_its_bytes(table_offset in any::<u64>(), max_entries in any::<u32>(), bits in 9u32..32) {
            let header = Header { table_offset, max_entries, block_size: 1 << bits };
            prop_assert_eq!(Header::decode("x", 0, &header.encode()).unwrap(), header);
        }

        #[test]
        fn any_bytes_are_a_header_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), HEADER_LEN), sum in any::<bool>()) {
            bytes[..8].copy_from_slice(&COOKIE);
            bytes[24..28].copy_from_slice(&[0, 1, 0, 0]);
            let mut bytes: [u8; HEADER_LEN] = bytes.try_into().unwrap();
            if sum {
                let sum = checksum(&bytes, CHECKSUM);
                bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
            }
            let _ = Header::decode("x", 512, &bytes);
        }
    }

    #[test]
    fn each_bad_field_is_named_with_its_offset() {
        type Damage = fn(&mut [u8; HEADER_LEN]);
        let cases: [(Damage, bool, &str, u64); 5] = [
            (|b| b[0] = b'X', false, "cookie", 0),
            (|b| b[39] ^= 1, false, "checksum", 36),
            (|b| b[25] = 0, true, "header_version", 24),
            (|b| b[35] = 1, true, "block_size", 32),
            (|b| b[32..36].copy_from_slice(&256u32.to_be_bytes()), true, "block_size", 32),
        ];
        for (damage, sum, field, offset) in cases {
            let mut bytes = Header { table_offset: 1536, max_entries: 4, block_size: 2 << 20 }.encode();
            damage(&mut bytes);
            if sum {
                let sum = checksum(&bytes, CHECKSUM);
                bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
            }
            let error = Header::decode("a.vhd", 512, &bytes).unwrap_err();
            let facts: Vec<_> = error.facts().iter().map(|(name, value)| (*name, value.as_str())).collect();
            let at = (512 + offset).to_string();
            assert_eq!(facts, [("image", "a.vhd"), ("field", field), ("offset", &at)], "{error:?}");
            assert_eq!(error.kind(), Kind::Image);
        }
    }
}
