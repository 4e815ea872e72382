//! The files of a btrfs, found by name and read without mounting it, through all its subvolumes.

mod data;
mod extent;
mod item;
mod lzo;
mod subvolume;
mod unpack;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use super::tree::{Fs, Key, Pointer, kind, owner};
use super::{Step, require};
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;
use crate::layout::{FileId, FileInfo, FileKind, Files, Stop};
use crate::unit::to_usize;
use data::Pieces;
use extent::{Content, FileExtent};
use item::{Entry, Inode, Location};
use subvolume::Subvolume;

/// Most chunks: 10 MiB of them. They are usually of 1 GiB.
const MAX_CHUNKS: u64 = 1 << 18;
/// Longest target of a link, in bytes, as in Linux.
const MAX_TARGET: u64 = 4096;
/// Largest file, in bytes, as in Linux.
const MAX_SIZE: u64 = i64::MAX.unsigned_abs();

/// Reads the files of a btrfs on a single device: inline, plain, compressed (zlib, LZO, zstd) and preallocated extents,
/// holes, links, subvolumes and snapshots. Each tree block's checksum, address, owner, level and generation is checked,
/// and the checksum of each sector of data that has one.
///
/// Log trees are not replayed ([`Files::stale`]). Extended attributes, ownership and times are not read.
pub struct BtrfsFiles {
    fs: Fs<Arc<dyn ReadAt>>,
    root: FileId,
    /// The tree of the data's checksums.
    sums: Pointer,
    subvolumes: RefCell<HashMap<u64, Option<Subvolume>>>,
    pieces: RefCell<Pieces>,
}

impl BtrfsFiles {
    /// Opens the file system on `disk`, all of whose subvolumes are below [`Files::root`], the top-level one (5).
    ///
    /// Fails with `Kind::Image` when it has more than one device, a profile other than single and DUP, checksums other
    /// than CRC-32C and SHA-256, or features that are not known, when it is damaged, and as the disk fails.
    pub fn open(disk: Arc<dyn ReadAt>) -> Result<BtrfsFiles> {
        let name = disk.name();
        Self::opened(disk).map_err(|stop| refused(&name, "cannot read the files of its btrfs", stop))
    }

    fn opened(disk: Arc<dyn ReadAt>) -> Step<BtrfsFiles> {
        let fs = Fs::open(disk, MAX_CHUNKS)?;
        let mut files = BtrfsFiles {
            root: FileId { tree: owner::TOP, number: 0 },
            sums: fs.root_of(owner::CHECKSUM)?,
            fs,
            subvolumes: RefCell::default(),
            pieces: RefCell::default(),
        };
        let top = files.folder_of(owner::TOP)?;
        files.root = top.ok_or_else(|| "its top-level subvolume is gone".to_owned())?;
        Ok(files)
    }

    /// The result of a step that was about `file`.
    fn about<T>(&self, file: FileId, step: Step<T>) -> Result<T> {
        step.map_err(|stop| {
            let what = format!("cannot read inode {} of subvolume {}", file.number, file.tree);
            refused(&self.fs.disk.name(), &what, stop)
        })
    }

    fn inode(&self, file: FileId) -> Step<Inode> {
        let key = Key { id: file.number, kind: kind::INODE, offset: 0 };
        let leaf = self.fs.leaf(self.tree(file.tree)?, key)?;
        let (_, item) = leaf.floor(key).0.ok_or_else(|| "it is not there".to_owned())?;
        Inode::parse(item)
    }

    fn info_of(&self, file: FileId) -> Step<FileInfo> {
        if subvolume::is_stub(file) {
            return Ok(FileInfo { kind: FileKind::Folder, size: 0 });
        }
        let inode = self.inode(file)?;
        Ok(FileInfo { kind: inode.kind, size: inode.size })
    }

    fn find(&self, folder: FileId, name: &[u8]) -> Step<Option<FileId>> {
        if subvolume::is_stub(folder) {
            return Ok(None);
        }
        let key = Key { id: folder.number, kind: kind::NAME, offset: item::hash(name) };
        let leaf = self.fs.leaf(self.tree(folder.tree)?, key)?;
        let Some((_, item)) = leaf.floor(key).0.filter(|(found, _)| *found == key) else { return Ok(None) };
        // Names of the same hash are in one item.
        match Entry::named(item, name)? {
            None => Ok(None),
            Some(Location::Inode(number)) => Ok(Some(FileId { tree: folder.tree, number })),
            Some(Location::Subvolume(id)) => self.entered(folder, name, id).map(Some),
        }
    }

    fn names_in(&self, folder: FileId, most: usize) -> Step<Vec<Vec<u8>>> {
        let mut names = Vec::new();
        if subvolume::is_stub(folder) {
            return Ok(names);
        }
        let tree = self.tree(folder.tree)?;
        let mut range = Key::all(folder.number, kind::NAME_BY_INDEX);
        while range.start < range.end && names.len() < most {
            let leaf = self.fs.leaf(tree, range.start)?;
            for (_, item) in leaf.items(range.clone()).take(most - names.len()) {
                names.push(Entry::only(item)?.to_vec());
            }
            range.start = leaf.end();
        }
        Ok(names)
    }

    fn target_of(&self, link: FileId) -> Step<Vec<u8>> {
        let inode = self.inode(link)?;
        require(inode.kind == FileKind::Link, || "it is no symbolic link".into())?;
        require(inode.size <= MAX_TARGET, || format!("it is a link of {} bytes", inode.size))?;
        let mut target = vec![0; to_usize(inode.size)];
        self.fill(link, inode, 0, &mut target)?;
        Ok(target)
    }

    fn read_from(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Step<usize> {
        let inode = self.inode(file)?;
        require(inode.kind == FileKind::Regular, || "it is no regular file".into())?;
        let len = to_usize(inode.size.saturating_sub(offset).min(buf.len() as u64));
        let Some(buf) = buf.get_mut(..len) else { return Ok(0) };
        self.fill(file, inode, offset, buf)?;
        Ok(len)
    }

    /// Fills `buf` with the bytes of `file` at `offset`, all of which are inside it.
    fn fill(&self, file: FileId, inode: Inode, offset: u64, buf: &mut [u8]) -> Step<()> {
        let tree = self.tree(file.tree)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let key = Key { id: file.number, kind: kind::EXTENT_DATA, offset: at };
            let leaf = self.fs.leaf(tree, key)?;
            let (found, next) = leaf.floor(key);
            let extent = found.map(|(key, item)| FileExtent::parse(&self.fs.sb, key.offset, item));
            let extent = extent.transpose()?.filter(|extent| extent.run.end > at);
            // The next extent begins behind `at`, so there is always a part to be filled.
            let end = extent.as_ref().map_or(next, |extent| extent.run.end.min(next));
            let (part, behind) = rest.split_at_mut(to_usize((end - at).min(rest.len() as u64)));
            match extent {
                None => part.fill(0),
                Some(extent) => self.copy(&extent, inode.has_sums, at - extent.run.start, part)?,
            }
            at += part.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    /// Fills `part` with the bytes at `from` of an extent, all of which are inside it.
    fn copy(&self, extent: &FileExtent<'_>, has_sums: bool, from: u64, part: &mut [u8]) -> Step<()> {
        match extent.content {
            Content::Zeroes => part.fill(0),
            Content::Inline(bytes) => {
                let bytes = bytes.get(to_usize(from)..).unwrap_or_default();
                let n = bytes.len().min(part.len());
                let (data, zeroes) = part.split_at_mut(n);
                data.copy_from_slice(&bytes[..n]);
                zeroes.fill(0);
            }
            Content::InlinePacked(packing, bytes) => {
                let sector = to_usize(self.fs.sb.sector_size);
                let unpacked = unpack::unpack(packing, bytes, to_usize(extent.run.len()), sector)?;
                let from = to_usize(from);
                part.copy_from_slice(unpacked.get(from..from + part.len()).unwrap_or_default());
            }
            Content::Disk(stored) => self.stored(stored, has_sums, from, part)?,
        }
        Ok(())
    }
}

impl Files for BtrfsFiles {
    fn root(&self) -> FileId {
        self.root
    }

    fn info(&self, file: FileId) -> Result<FileInfo> {
        self.about(file, self.info_of(file))
    }

    fn lookup(&self, folder: FileId, name: &[u8]) -> Result<Option<FileId>> {
        self.about(folder, self.find(folder, name))
    }

    fn names(&self, folder: FileId, most: usize) -> Result<Vec<Vec<u8>>> {
        self.about(folder, self.names_in(folder, most))
    }

    fn target(&self, link: FileId) -> Result<Vec<u8>> {
        self.about(link, self.target_of(link))
    }

    fn read(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.about(file, self.read_from(file, offset, buf))
    }

    fn stale(&self) -> Option<&'static str> {
        self.fs.sb.log_root().map(
            |_| "its log tree is not replayed: files written by fsync since the last commit are as before",
        )
    }
}

fn refused(disk: &str, what: &str, stop: Stop) -> Error {
    match stop {
        Stop::Failed(error) => error,
        Stop::Whole(why) => Error::new(Kind::Image, "btrfs.files", format!("{disk}: {what}"))
            .because(why)
            .fact("disk", disk.to_owned()),
    }
}
