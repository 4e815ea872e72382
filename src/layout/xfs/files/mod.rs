//! The files of an XFS file system, found by their inode numbers and read without mounting it ("XFS Filesystem
//! Structure", "Dynamically Allocated Structures"; what is newer by Linux's `xfs_format.h` and `xfs_da_format.h`).

mod extents;
mod folder;
mod index;
mod inode;
mod link;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::replayed::Replayed;
use super::superblock::MAX_SECTOR;
use super::{Superblock, intact};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, read_vec};
use crate::layout::field::{be16, be32, be64, bytes};
use crate::layout::{FileId, FileInfo, FileKind, Files, Step, Stop};
use crate::unit::{Extent, to_usize};
use extents::Leaf;
use inode::Inode;

/// Smallest and largest inode, in bytes; with checksums it is at least 512.
const INODE: std::ops::RangeInclusive<u64> = 256..=2048;
/// Largest block of a folder, in bytes.
const MAX_FOLDER_BLOCK: u64 = 64 << 10;

/// Feature bits of the version word: folders as they are since 2000, names that ignore case.
const DIRV2: u16 = 0x2000;
const BORG: u16 = 0x4000;
/// Folders' entries tell what a file is: in version 4's second word, and in version 5's incompatible features.
const FTYPE_V4: u32 = 0x200;
const FTYPE: u32 = 0x1;

/// A file system whose files are read. Blocks count from its start, also where the disk has a group and a block in it.
struct XfsFiles {
    disk: Arc<dyn ReadAt>,
    sb: Superblock,
    root: u64,
    /// Bytes in an inode.
    inode_size: u64,
    /// How many bits of an inode's number are its place in a block, and of a block's address its place in the group.
    inode_bits: u32,
    group_bits: u32,
    /// Blocks in a block of a folder.
    folder_blocks: u64,
    /// Bytes by which an entry of a folder tells what a file is: 1 or 0.
    kind_len: usize,
    stale: Option<&'static str>,
    /// What was read last: a file is read a piece at a time.
    last_inode: RefCell<Option<Rc<Inode>>>,
    last_leaf: RefCell<Option<Rc<Leaf>>>,
}

/// The files of the XFS file system on `disk`, which begins with it.
///
/// Fails with [`Kind::Image`] when its superblock is damaged or tells of something that keeps its files from being read,
/// and as the disk fails.
pub fn xfs_files(disk: Arc<dyn ReadAt>) -> Result<Box<dyn Files>> {
    match XfsFiles::open(Arc::clone(&disk)) {
        Ok(files) => Ok(Box::new(files)),
        Err(Stop::Failed(error)) => Err(error),
        Err(Stop::Whole(why)) => {
            let what = format!("{}: cannot read the files of its XFS file system", disk.name());
            Err(Error::new(Kind::Image, "xfs.unreadable", what).because(why))
        }
    }
}

impl XfsFiles {
    fn open(disk: Arc<dyn ReadAt>) -> Step<Self> {
        let head = read_vec(&disk, 0, to_usize(disk.size().min(MAX_SECTOR)))?;
        let sb = Superblock::parse(&head).ok_or_else(|| "it has no superblock".to_owned())?;
        sb.check_readable(disk.size())?;
        let raw = sb.raw();
        let byte = |at| u32::from(bytes::<1>(raw, at)[0]);

        let features = be16(raw, 100);
        super::require(features & DIRV2 != 0, || "its folders have a form that is not known".into())?;
        super::require(features & BORG == 0, || "its names ignore case".into())?;
        let inode_size = u64::from(be16(raw, 104));
        let least = if sb.checksums() { 512 } else { *INODE.start() };
        let sound = (least..=*INODE.end().min(&sb.block_size)).contains(&inode_size)
            && inode_size.is_power_of_two()
            && byte(123) == (sb.block_size / inode_size).ilog2();
        super::require(sound, || format!("the superblock's inode size is {inode_size}"))?;
        let folder_blocks = 1_u64.checked_shl(byte(192)).unwrap_or(0);
        let fits = (1..=MAX_FOLDER_BLOCK / sb.block_size).contains(&folder_blocks);
        super::require(fits, || format!("the superblock's folder blocks are {folder_blocks} blocks long"))?;
        let has_kinds =
            if sb.checksums() { be32(raw, 216) & FTYPE != 0 } else { be32(raw, 200) & FTYPE_V4 != 0 };

        let mut stale = None;
        let mut seen = Arc::clone(&disk);
        if sb.has_external_log() {
            stale = Some("its log is on another device, and was not replayed");
        } else {
            match sb.check_log().and_then(|()| Replayed::open(Arc::clone(&disk), &sb)) {
                Ok((replayed, _)) => {
                    if replayed.is_unfinished() {
                        stale = Some("its log has changes that the next mount finishes");
                    }
                    seen = Arc::new(replayed);
                }
                Err(Stop::Whole(_)) => stale = Some("its log was not replayed"),
                Err(failed) => return Err(failed),
            }
        }
        let files = XfsFiles {
            root: be64(raw, 56),
            inode_size,
            inode_bits: byte(123),
            group_bits: byte(124),
            folder_blocks,
            kind_len: usize::from(has_kinds),
            stale,
            last_inode: RefCell::default(),
            last_leaf: RefCell::default(),
            disk: seen,
            sb,
        };
        files.inode(files.root)?;
        Ok(files)
    }

    /// Where the run of `count` blocks at the address `address` begins, its group above, its block in it below; `None`
    /// when there is no such run.
    fn place(&self, address: u64, count: u64) -> Option<u64> {
        let group = address.checked_shr(self.group_bits).filter(|group| *group < self.sb.ag_count)?;
        let block = address - (group << self.group_bits);
        let extent = self.sb.ag(group);
        let run = Extent::at(extent.start + block, count);
        (block >= self.sb.header_blocks() && extent.contains(run)).then_some(run.start)
    }

    /// Fails for the reason `what` of the inode numbered `inode` unless `holds`.
    fn require(&self, inode: u64, holds: bool, what: &str) -> Result<()> {
        if holds { Ok(()) } else { Err(self.wrong(inode, what)) }
    }

    fn wrong(&self, inode: u64, what: &str) -> Error {
        let name = self.disk.name();
        Error::new(Kind::Image, "xfs.damaged", format!("{name}: cannot read a file of its XFS file system"))
            .because(format!("inode {inode}: {what}"))
            .fact("inode", inode)
    }

    /// Checks what a block with checksums says of itself: its sum, the disk address `at` in bytes, the file system, and
    /// the inode it belongs to.
    fn check_own(&self, inode: u64, block: &[u8], at: u64, fields: Own) -> Result<()> {
        self.require(inode, intact(block, fields.sum), "the checksum of one of its blocks does not match")?;
        let own = be64(block, fields.address) == at / 512
            && bytes::<16>(block, fields.uuid) == self.sb.uuid
            && be64(block, fields.owner) == inode;
        self.require(inode, own, "one of its blocks belongs elsewhere")
    }

    /// Fills `buf` with the bytes of `inode` from `offset` on; what lies in no block reads as zeroes.
    fn read_data(&self, inode: &Inode, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        let block_size = self.sb.block_size;
        while !buf.is_empty() {
            let run = self.run_at(inode, offset / block_size)?;
            let within = offset % block_size;
            let left = run.count.saturating_mul(block_size) - within;
            let n = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
            let (piece, rest) = buf.split_at_mut(n);
            match run.place {
                Some(place) => self.disk.read_at(piece, place * block_size + within)?,
                None => piece.fill(0),
            }
            offset += n as u64;
            buf = rest;
        }
        Ok(())
    }
}

/// Where a block with checksums keeps what it says of itself.
#[derive(Clone, Copy)]
struct Own {
    sum: usize,
    address: usize,
    uuid: usize,
    owner: usize,
}

impl Files for XfsFiles {
    fn root(&self) -> FileId {
        FileId { tree: 0, number: self.root }
    }

    fn info(&self, file: FileId) -> Result<FileInfo> {
        let inode = self.inode(file.number)?;
        Ok(FileInfo { kind: inode.kind, size: inode.size })
    }

    fn lookup(&self, folder: FileId, name: &[u8]) -> Result<Option<FileId>> {
        let inode = self.inode_of(folder.number, FileKind::Folder)?;
        let found = self.find(&inode, name)?;
        Ok(found.map(|number| FileId { tree: 0, number }))
    }

    fn names(&self, folder: FileId, most: usize) -> Result<Vec<Vec<u8>>> {
        let inode = self.inode_of(folder.number, FileKind::Folder)?;
        let mut names = Vec::new();
        if most > 0 {
            self.entries(&inode, &mut |_, name| {
                names.push(name.to_vec());
                names.len() < most
            })?;
        }
        Ok(names)
    }

    fn target(&self, link: FileId) -> Result<Vec<u8>> {
        self.link_target(&*self.inode_of(link.number, FileKind::Link)?)
    }

    fn read(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let inode = self.inode_of(file.number, FileKind::Regular)?;
        if inode.realtime {
            let name = self.disk.name();
            return Err(Error::new(Kind::Image, "xfs.realtime", format!("{name}: cannot read a file"))
                .because("its data is on a realtime device")
                .fact("inode", file.number));
        }
        let left = inode.size.saturating_sub(offset);
        let n = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
        self.read_data(&inode, offset, buf.get_mut(..n).unwrap_or_default())?;
        Ok(n)
    }

    fn stale(&self) -> Option<&'static str> {
        self.stale
    }
}
