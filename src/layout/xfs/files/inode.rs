//! Inodes ("On-disk Inode"): where they are, what they say, and where the fork with their data is.

use std::rc::Rc;

use super::XfsFiles;
use crate::error::Result;
use crate::io::read_vec;
use crate::layout::FileKind;
use crate::layout::field::{be16, be32, be64, bytes, has};
use crate::layout::xfs::intact;
use crate::unit::to_usize;

/// Bytes before the fork with the data, in inodes of version 1 and 2, and of version 3.
const CORE: usize = 100;
const CORE_3: usize = 176;
/// Where the checksum, the inode's own number and the file system's UUID are in version 3.
const CRC: usize = 100;
const NUMBER: usize = 152;
const UUID: usize = 160;
/// Flags: data on a realtime device; the count of extents has 64 bits.
const REALTIME: u16 = 0x1;
const NREXT64: u64 = 0x10;

/// How a fork keeps its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// In the fork.
    Local,
    /// By a list of this many extents in the fork.
    Extents(u64),
    /// By a B+tree whose root is in the fork.
    Tree,
    /// Not at all: a device's number.
    None,
}

/// An inode in use.
pub(super) struct Inode {
    pub number: u64,
    pub kind: FileKind,
    pub format: Format,
    /// Length of the data in bytes, below 2^63.
    pub size: u64,
    /// Whether its data is on a realtime device.
    pub realtime: bool,
    /// The fork with the data.
    pub fork: Vec<u8>,
}

impl XfsFiles {
    /// Reads and checks the inode numbered `number`.
    pub(super) fn inode(&self, number: u64) -> Result<Rc<Inode>> {
        if let Some(inode) = self.last_inode.borrow().as_ref().filter(|inode| inode.number == number) {
            return Ok(Rc::clone(inode));
        }
        let inode = Rc::new(self.read_inode(number)?);
        *self.last_inode.borrow_mut() = Some(Rc::clone(&inode));
        Ok(inode)
    }

    /// The inode numbered `number`, which must be of a file of the kind `kind`.
    pub(super) fn inode_of(&self, number: u64, kind: FileKind) -> Result<Rc<Inode>> {
        let inode = self.inode(number)?;
        self.require(number, inode.kind == kind, "it is a file of another kind than asked for")?;
        Ok(inode)
    }

    fn read_inode(&self, number: u64) -> Result<Inode> {
        let place = self.place(number >> self.inode_bits, 1);
        let block = place.ok_or_else(|| self.wrong(number, "there is no such inode"))?;
        let within = (number & ((1 << self.inode_bits) - 1)) * self.inode_size;
        let raw = read_vec(&self.disk, block * self.sb.block_size + within, to_usize(self.inode_size))?;

        let require = |holds, what: &str| self.require(number, holds, what);
        require(has(&raw, 0, b"IN"), "it has no magic number")?;
        let [version, format] = bytes::<2>(&raw, 4);
        let checksums = self.sb.checksums();
        require(if checksums { version == 3 } else { matches!(version, 1 | 2) }, "its version is wrong")?;
        if checksums {
            require(intact(&raw, CRC), "its checksum does not match")?;
            let own = be64(&raw, NUMBER) == number && bytes::<16>(&raw, UUID) == self.sb.uuid;
            require(own, "it belongs elsewhere")?;
        }
        let kind = match be16(&raw, 2) & 0xf000 {
            0 => return Err(self.wrong(number, "it is not in use")),
            0x8000 => FileKind::Regular,
            0x4000 => FileKind::Folder,
            0xa000 => FileKind::Link,
            _ => FileKind::Other,
        };
        let core = if checksums { CORE_3 } else { CORE };
        let [attributes] = bytes::<1>(&raw, 82);
        // The attributes' fork begins so many units of eight bytes behind the data's.
        let end = if attributes == 0 { raw.len() } else { core + usize::from(attributes) * 8 };
        let fork = raw.get(core..end).ok_or_else(|| self.wrong(number, "its forks do not fit"))?.to_vec();
        let size = be64(&raw, 56);
        require(i64::try_from(size).is_ok(), "it is longer than any file")?;
        let large = checksums && be64(&raw, 120) & NREXT64 != 0;
        let extents = if large { be64(&raw, 24) } else { be32(&raw, 76).into() };
        let format = match (kind, format) {
            (FileKind::Other, _) => Format::None,
            (FileKind::Folder | FileKind::Link, 1) if size <= fork.len() as u64 => Format::Local,
            (_, 2) if extents <= fork.len() as u64 / 16 => Format::Extents(extents),
            (FileKind::Regular | FileKind::Folder, 3) => Format::Tree,
            _ => return Err(self.wrong(number, "its data has a form that is not known or does not fit")),
        };
        Ok(Inode { number, kind, format, size, realtime: be16(&raw, 90) & REALTIME != 0, fork })
    }
}
