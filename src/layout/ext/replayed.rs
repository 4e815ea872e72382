//! A file system as it will be after its journal's replay, seen without writing to it.

use super::groups::{Fs, Overlay};
use super::superblock::{LEN, OFFSET, feature};
use super::{Step, Superblock, journal, require};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, lay_over};
use crate::layout::Stop;
use crate::layout::field::{crc32c_raw, le32};
use crate::unit::{Extent, ExtentMap, to_usize};

/// The disk of a file system, read as if its journal had been replayed.
pub struct Replayed<D> {
    fs: Fs<D>,
    overlay: Overlay,
    /// That of afterwards, which asks for no replay.
    superblock: Vec<u8>,
}

impl<D: ReadAt> Replayed<D> {
    /// The ext file system that begins at byte 0 of `disk`; `None` when it has no journal to be replayed. An error
    /// ([`Kind::Image`]) where this code, the kernel and e2fsck might see it differently.
    pub fn open(disk: D) -> Result<Option<Self>> {
        let name = disk.name();
        Self::after_replay(disk).map_err(|stop| match stop {
            Stop::Failed(error) => error,
            Stop::Whole(why) => {
                Error::new(Kind::Image, "ext.journal", format!("cannot replay the journal of {name}"))
                    .because(why)
            }
        })
    }

    fn after_replay(disk: D) -> Step<Option<Self>> {
        let mut head = vec![0; OFFSET + LEN];
        disk.read_at(&mut head, 0)?;
        let sb = Superblock::parse(&head).ok_or_else(|| "it has no superblock".to_owned())?;
        if !sb.incompat(feature::RECOVER) {
            return Ok(None);
        }
        sb.check(disk.size())?;
        let fs = Fs { disk, sb };
        let all: ExtentMap = [Extent::new(0, fs.sb.blocks)].into_iter().collect();
        let overlay = journal::replay(&fs, &all, journal::MAX_LOGGED)?.overlay;
        let own = fs.sb.own_block();
        let block = fs.read(Some(&overlay), own, 1)?;
        let at = OFFSET - to_usize(own * fs.sb.block_size);
        let mut superblock = block[at..at + LEN].to_vec();
        let after = Superblock::in_block(&block, fs.sb.block_size);
        require(after.is_some_and(|after| after.shape() == fs.sb.shape()), || {
            "the journal changes the file system's shape".into()
        })?;
        let incompat = le32(&superblock, 0x60) & !feature::RECOVER;
        superblock[0x60..0x64].copy_from_slice(&incompat.to_le_bytes());
        if fs.sb.ro_compat(feature::METADATA_CSUM) {
            let sum = crc32c_raw(!0, &superblock[..LEN - 4]);
            superblock[LEN - 4..].copy_from_slice(&sum.to_le_bytes());
        }
        Ok(Some(Replayed { fs, overlay, superblock }))
    }
}

impl<D: ReadAt> ReadAt for Replayed<D> {
    fn size(&self) -> u64 {
        self.fs.disk.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.fs.disk.read_at(buf, offset)?;
        let size = self.fs.sb.block_size;
        let blocks = offset / size..(offset + buf.len() as u64).div_ceil(size);
        let mut copy = vec![0; to_usize(size)];
        for (block, logged) in self.overlay.range(blocks) {
            self.fs.copy(*logged, &mut copy)?;
            lay_over(buf, offset, &copy, block * size);
        }
        lay_over(buf, offset, &self.superblock, OFFSET as u64);
        Ok(())
    }

    fn name(&self) -> String {
        self.fs.disk.name()
    }
}
