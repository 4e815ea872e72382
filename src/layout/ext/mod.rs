//! ext2, ext3 and ext4: which blocks are in use, by the block bitmaps before and after the journal's replay (the
//! format is described in Linux's Documentation/filesystems/ext4).

mod groups;
mod journal;
mod map;
mod superblock;

use uuid::Uuid;

use crate::error::{Error, Retry};

pub(super) use map::ExtMap;
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

/// Why a file system's map cannot be used.
#[derive(Debug)]
pub(super) enum Stop {
    /// It is copied whole, for this reason.
    Whole(String),
    /// The disk failed in a way that may pass: the caller must know, or two runs would disagree.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        match error.retry() {
            Retry::Yes => Stop::Failed(error),
            Retry::No => Stop::Whole(format!("{}: {}", error.what(), error.why())),
        }
    }
}

impl From<String> for Stop {
    fn from(reason: String) -> Self {
        Stop::Whole(reason)
    }
}

type Step<T> = std::result::Result<T, Stop>;

/// Stops unless `holds`, for the reason `why`.
fn require(holds: bool, why: impl FnOnce() -> String) -> Step<()> {
    if holds { Ok(()) } else { Err(Stop::Whole(why())) }
}
