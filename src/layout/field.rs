//! Fixed-width fields of on-disk structures. A field past the end of its structure reads as zero, so that no
//! parser can panic; every parser checks the structure's length before it trusts a field.

/// The `N` bytes at `at`.
pub(super) fn bytes<const N: usize>(structure: &[u8], at: usize) -> [u8; N] {
    structure.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

/// Little-endian 16 bits at `at`.
pub(super) fn le16(structure: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes(structure, at))
}

/// Little-endian 32 bits at `at`.
pub(super) fn le32(structure: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(structure, at))
}

/// Little-endian 64 bits at `at`.
pub(super) fn le64(structure: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(structure, at))
}

/// Big-endian 16 bits at `at`.
pub(super) fn be16(structure: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes(structure, at))
}

/// Big-endian 32 bits at `at`.
pub(super) fn be32(structure: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes(structure, at))
}

/// Big-endian 64 bits at `at`.
pub(super) fn be64(structure: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes(structure, at))
}

/// Whether the structure has `magic` at `at`.
pub(super) fn has(structure: &[u8], at: usize, magic: &[u8]) -> bool {
    structure.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

/// Text up to the first NUL, spaces at its end left out.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).trim_end().to_owned()
}

/// CRC-32C over `bytes` from the state `seed`, without the usual inversion at either end.
pub(super) fn crc32c_raw(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}
