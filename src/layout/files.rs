//! The files of a file system, found by number and read without mounting it.

use crate::error::Result;

/// Which file: its inode number, and the tree it is in where a file system has several (btrfs: the subvolume).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// The subvolume; 0 where there is but one tree.
    pub tree: u64,
    /// The inode number.
    pub number: u64,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A device, socket or pipe.
    Other,
}

/// What an inode says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// What it is.
    pub kind: FileKind,
    /// Length in bytes.
    pub size: u64,
}

/// Reads the files of one file system. Every number and length on the disk is hostile until it was checked: what makes no
/// sense is an error of [`crate::error::Kind::Image`], reads and memory are bounded.
pub trait Files {
    /// The root folder.
    fn root(&self) -> FileId;

    /// What `file` is.
    fn info(&self, file: FileId) -> Result<FileInfo>;

    /// The file called `name` in `folder`; `.` and `..` are never asked for.
    fn lookup(&self, folder: FileId, name: &[u8]) -> Result<Option<FileId>>;

    /// The names in `folder` but `.` and `..`, `most` of them at most, in the order in which they lie.
    fn names(&self, folder: FileId, most: usize) -> Result<Vec<Vec<u8>>>;

    /// Where `link` leads, at most 4096 bytes.
    fn target(&self, link: FileId) -> Result<Vec<u8>>;

    /// Fills `buf` with the bytes of `file` from `offset` on, holes as zeroes; returns how many, fewer than asked for only
    /// at the end of the file.
    fn read(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<usize>;

    /// Why what is read may be older than what was committed: a journal or log that is not replayed.
    fn stale(&self) -> Option<&'static str>;
}
