//! An ext2/3/4 file system read from a disk as a [`Volume`]: no mount, no root, its journal honoured.

use std::io::Read;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error, Ext4Read, FileType};

use super::tree::{MAX_NAMES, Node, Volume};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, read_array};
use crate::layout::Replayed;

/// Fewest blocks of a block group: `mke2fs -g` takes no fewer.
const MIN_GROUP: u64 = 256;
/// Most block groups: 16 TiB of the smallest usual ones, of 8 MiB. Each takes 16 bytes in memory.
const MAX_GROUPS: u64 = 1 << 21;
/// Longest folder in bytes: room for [`MAX_NAMES`] of the longest names, twice.
const MAX_FOLDER: u64 = 64 << 20;
/// Longest target of a link in bytes, as in Linux (`PATH_MAX`).
const MAX_TARGET: u64 = 4096;

/// An ext2/3/4 file system.
pub struct ExtVolume {
    fs: Ext4,
    name: String,
}

/// Adapts our port to the crate's.
struct Disk<T>(T);

impl<T: ReadAt> Ext4Read for Disk<T> {
    fn read(
        &mut self,
        start: u64,
        bytes: &mut [u8],
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.read_at(bytes, start)?)
    }
}

impl ExtVolume {
    /// Opens the file system that begins at byte 0 of `disk`. Committed transactions in a journal not yet
    /// replayed are seen as if they were.
    pub fn open(disk: impl ReadAt + 'static) -> Result<Self> {
        let name = disk.name();
        check(&name, &disk)?;
        let disk = Arc::new(disk);
        let fs = match Replayed::open(Arc::clone(&disk)) {
            Ok(Some(after)) => Ext4::load(Box::new(Disk(after))),
            Ok(None) => Ext4::load(Box::new(Disk(disk))),
            // The crate reads some journals, too.
            Err(error) => match Ext4::load(Box::new(Disk(disk))) {
                Err(_) => return Err(bare(&name, "/").caused_by(error)),
                read => read,
            },
        };
        let fs = fs.map_err(|error| failed(&name, "/", error))?;
        let volume = ExtVolume { fs, name };
        volume.node("/")?;
        Ok(volume)
    }
}

/// Refuses a file system whose superblock counts more than there can be: memory is taken for each block group first.
fn check(name: &str, disk: &impl ReadAt) -> Result<()> {
    let superblock = read_array::<1024>(disk, 1024)?;
    let le32 =
        |at: usize| superblock[at..].first_chunk().map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)));
    // The crate takes the upper half as part of the count without the feature 64bit, too.
    let blocks = le32(0x4) | le32(0x150) << 32;
    let block_size = 1024_u64.checked_shl(superblock[0x18].into()).unwrap_or(u64::MAX);
    let whole = blocks.checked_mul(block_size).is_some_and(|bytes| bytes <= disk.size());
    if !whole {
        return Err(refused(
            name,
            "/",
            format!("its superblock counts {blocks} blocks, more than its disk has"),
        ));
    }
    match le32(0x20) {
        group @ 0..MIN_GROUP => Err(refused(name, "/", format!("its block groups have {group} blocks"))),
        group if blocks / group > MAX_GROUPS => {
            Err(refused(name, "/", format!("its superblock counts {} block groups", blocks / group)))
        }
        _ => Ok(()),
    }
}

fn failed(name: &str, path: &str, error: Ext4Error) -> Error {
    bare(name, path).caused_by(error)
}

fn refused(name: &str, path: &str, why: String) -> Error {
    bare(name, path).because(why)
}

fn bare(name: &str, path: &str) -> Error {
    Error::new(Kind::Image, "guest.ext", format!("cannot read {path} in the file system on {name}"))
        .remedy("run e2fsck on the source while it is unmounted, then try again")
        .fact("path", path)
}

/// `None` for what is simply not there.
fn present<T>(name: &str, path: &str, found: std::result::Result<T, Ext4Error>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory | Ext4Error::MalformedPath) => Ok(None),
        Err(error) => Err(failed(name, path, error)),
    }
}

impl Volume for ExtVolume {
    fn node(&self, path: &str) -> Result<Option<Node>> {
        let found = present(&self.name, path, self.fs.symlink_metadata(path))?;
        // A folder is looked through from its start, by every path that leads through it.
        if let Some(meta) = &found
            && meta.is_dir()
            && meta.len() > MAX_FOLDER
        {
            return Err(refused(&self.name, path, format!("it is a folder of {} bytes", meta.len())));
        }
        Ok(found.map(|meta| match meta.file_type() {
            FileType::Regular => Node::File(meta.len()),
            FileType::Directory => Node::Folder,
            FileType::Symlink => Node::Link,
            _ => Node::Other,
        }))
    }

    fn link(&self, path: &str) -> Result<String> {
        let meta = self.fs.symlink_metadata(path).map_err(|error| failed(&self.name, path, error))?;
        // All of it is read at once.
        if meta.len() > MAX_TARGET {
            return Err(refused(&self.name, path, format!("it is a link of {} bytes", meta.len())));
        }
        let target = self.fs.read_link(path).map_err(|error| failed(&self.name, path, error))?;
        // Not UTF-8: a path nothing of ours leads to.
        Ok(target.to_str().unwrap_or("\u{fffd}").to_owned())
    }

    fn names(&self, path: &str) -> Result<Vec<String>> {
        let entries = self.fs.read_dir(path).map_err(|error| failed(&self.name, path, error))?;
        let mut names = Vec::new();
        for entry in entries.take(MAX_NAMES) {
            let entry = entry.map_err(|error| failed(&self.name, path, error))?;
            match entry.file_name().as_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        Ok(names)
    }

    fn open(&self, path: &str) -> Result<Box<dyn Read + '_>> {
        let file = self.fs.open(path).map_err(|error| failed(&self.name, path, error))?;
        Ok(Box::new(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::WriteAt;
    use crate::io::fake::MemoryDisk;

    #[test]
    fn a_superblock_that_counts_too_much_is_refused_before_memory_is_taken() {
        // Blocks of 1 KiB.
        for (blocks, per_group, words) in [
            (u32::MAX, 0, "groups have 0 blocks"),
            (u32::MAX, 255, "groups have 255 blocks"),
            (u32::MAX, 256, "16777215 block groups"),
        ] {
            let disk = MemoryDisk::sparse(4 << 40);
            disk.write_at(&blocks.to_le_bytes(), 1024 + 4).unwrap();
            disk.write_at(&u32::to_le_bytes(per_group), 1024 + 0x20).unwrap();
            disk.write_at(&[0x53, 0xef], 1024 + 0x38).unwrap();
            let error = ExtVolume::open(disk).err().unwrap();
            assert!(error.why().contains(words), "{error:?}");
        }
        // The upper half counts whatever the features are.
        for (at, words) in [(4, "1025 blocks, more than its disk has"), (0x150, "4402341478400 blocks, more")]
        {
            let disk = MemoryDisk::sparse(1 << 20);
            disk.write_at(&1025_u32.to_le_bytes(), 1024 + at).unwrap();
            let error = ExtVolume::open(disk).err().unwrap();
            assert!(error.why().contains(words), "{error:?}");
        }
    }
}
