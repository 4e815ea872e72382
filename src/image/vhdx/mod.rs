//! VHDX, read only, as Microsoft's [MS-VHDX] defines it. Fixed and dynamic disks, an unfinished log included.

pub mod header;
pub mod log;
pub mod metadata;
mod reader;

pub use super::vhd::Subformat;
pub use reader::{Info, Reader, inspect, probe};

use crate::error::{Error, Kind};

/// An error about one field: what it is called, where it is in the file, and what is wrong with it.
fn bad_field(image: &str, field: &str, offset: u64, why: impl Into<String>) -> Error {
    Error::new(
        Kind::Image,
        "vhdx.field",
        format!("{image}: VHDX field `{field}` at offset {offset} is malformed"),
    )
    .because(why)
    .fact("image", image)
    .fact("field", field)
    .fact("offset", offset)
}

/// A GUID as the file has it: its first three groups little-endian.
pub type Guid = [u8; 16];

/// The GUID whose canonical text is the number `n` in hexadecimal.
const fn guid(n: u128) -> Guid {
    let [a, b, c, d, e, f, g, h, rest @ ..] = n.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// The canonical text of a GUID.
fn guid_text(guid: &Guid) -> String {
    uuid::Uuid::from_bytes_le(*guid).to_string()
}

/// The `N` bytes of `bytes` at `at`; zeroes where there are none, which no caller asks for.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

/// The CRC-32C of a structure, its own checksum of 4 bytes at offset 4 taken as zero.
fn checksum(bytes: &[u8]) -> u32 {
    let (head, rest) = bytes.split_at(bytes.len().min(4));
    let crc = crc32c::crc32c_append(crc32c::crc32c(head), &[0; 4]);
    crc32c::crc32c_append(crc, rest.get(4..).unwrap_or(&[]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_written_as_the_file_has_them() {
        let bat = guid(0x2dc27766_f623_4200_9d64_115e9bfd4a08);
        assert_eq!(bat[..6], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6]);
        assert_eq!(guid_text(&bat), "2dc27766-f623-4200-9d64-115e9bfd4a08");
    }
}
