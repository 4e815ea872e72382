//! XFS: which blocks are in use, by the free-space B+trees of its allocation groups, and its files (the format is
//! described in "XFS Filesystem Structure"; names are the ones used there).

mod files;
mod free;
mod log;
mod map;
mod replayed;
mod superblock;

use uuid::Uuid;

use super::field::le32;
use super::{Step, require};

pub use files::xfs_files;
pub(super) use map::XfsMap;
pub(super) use superblock::Superblock;

/// An XFS file system, by its superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XfsInfo {
    /// Format version: 4, or 5, which has checksums.
    pub version: u8,
    /// Label; empty when it has none.
    pub label: String,
    /// UUID.
    pub uuid: Uuid,
    /// Block size in bytes: 512 to 65536 in a sound file system.
    pub block_size: u32,
    /// Length in blocks.
    pub blocks: u64,
    /// Number of allocation groups.
    pub ag_count: u32,
}

/// Whether the checksum at `at` matches.
fn intact(structure: &[u8], at: usize) -> bool {
    checksum(structure, at) == le32(structure, at)
}

/// The checksum of the whole structure, with itself at `at` taken as zero: CRC-32C, and the only field of XFS in
/// little-endian order.
fn checksum(structure: &[u8], at: usize) -> u32 {
    let (before, rest) = structure.split_at(at.min(structure.len()));
    let after = rest.get(4..).unwrap_or_default();
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after)
}
