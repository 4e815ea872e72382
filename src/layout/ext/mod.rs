//! ext2, ext3 and ext4: which blocks are in use, by the block bitmaps before and after the journal's replay (the
//! format is described in Linux's Documentation/filesystems/ext4), and whose they are.

mod groups;
mod journal;
mod map;
mod owners;
mod replayed;
mod superblock;

use uuid::Uuid;

use super::{Step, require};

pub(super) use map::ExtMap;
pub(super) use owners::owners;
pub use replayed::Replayed;
pub(super) use superblock::Superblock;

/// An ext file system, by its superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtInfo {
    /// `ext2`, `ext3` or `ext4`, by the features it uses.
    pub version: &'static str,
    /// Label; empty when it has none.
    pub label: String,
    /// UUID.
    pub uuid: Uuid,
    /// Block size in bytes: 1024 to 65536.
    pub block_size: u32,
    /// Length in blocks.
    pub blocks: u64,
    /// Whether its journal must be replayed before it is consistent.
    pub needs_recovery: bool,
    /// The compatible, incompatible and read-only compatible feature words.
    pub features: [u32; 3],
}
