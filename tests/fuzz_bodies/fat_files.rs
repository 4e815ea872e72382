//! Bytes as a FAT file system whose files are read.

use std::sync::Arc;

use haul::layout::fat_files;

use super::watched::{Watched, refused};
use super::xfs_files::walk;
use super::{Outcome, input};

/// Longest file system, in bytes.
const LONGEST: u64 = 1 << 30;

/// Takes `bytes` as a FAT: its files are read within bounds, or it cannot be opened.
pub fn fuzz_fat_files(bytes: &[u8]) -> Outcome {
    let disk = Watched::within(input::disk(bytes, LONGEST), 400_000, 2 << 30);
    match fat_files(Arc::new(disk)) {
        Ok(files) => walk(&*files, "fuzz"),
        Err(error) => refused(&error),
    }
}
