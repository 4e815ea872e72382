//! btrfs on a single device: which blocks are in use, by its extent tree and, after a crash, its log trees; and its files
//! (the format is described in the btrfs documentation, "On-disk format"; names are the ones used there).

mod alias;
mod chunk;
mod files;
mod log;
mod map;
mod open;
mod superblock;
mod tree;

use uuid::Uuid;

use super::{Step, require};

pub use alias::BtrfsAlias;
pub use files::BtrfsFiles;
pub(super) use map::BtrfsMap;
pub(super) use superblock::Superblock;

/// A btrfs file system, by the superblock of one of its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BtrfsInfo {
    /// Label; empty when it has none.
    pub label: String,
    /// UUID, as users know it.
    pub uuid: Uuid,
    /// Sector size in bytes, the unit of allocation: 4096 to 65536 in a sound file system.
    pub sector_size: u32,
    /// Size of a tree block in bytes.
    pub node_size: u32,
    /// Length of all its devices together, in bytes.
    pub bytes: u64,
    /// Number of devices.
    pub devices: u64,
}
