//! Folders ("Directories"): the short form in the inode, one block, and many blocks with an index beside them.

use super::inode::{Format, Inode};
use super::{Own, XfsFiles};
use crate::error::Result;
use crate::layout::field::{be16, be32, be64, bytes, has};
use crate::unit::to_usize;

/// Where in a folder's data its index begins, in bytes.
pub(super) const INDEX: u64 = 32 << 30;
/// Most bytes of a folder that are read for its names, and most blocks and holes that are passed.
const MAX_LISTED: u64 = 256 << 20;
const MAX_STEPS: u64 = 1 << 17;
/// Bytes before the entries of a block without and with checksums.
const HEADER: usize = 16;
const HEADER_5: usize = 64;
const OWN: Own = Own { sum: 4, address: 8, uuid: 24, owner: 40 };
/// Magic numbers of a folder's only block, and of one of many, without and with checksums.
const ONLY: [&[u8]; 2] = [b"XD2B", b"XDB3"];
const ONE_OF_MANY: [&[u8]; 2] = [b"XD2D", b"XDD3"];
/// What marks free room between entries.
const FREE: u16 = 0xffff;

/// Told of an entry, its inode number and name; says whether to go on.
pub(super) type Each<'e> = dyn FnMut(u64, &[u8]) -> bool + 'e;

/// A block of entries.
pub(super) struct Block {
    /// Its first block in the folder.
    first: u64,
    bytes: Vec<u8>,
    /// Where its entries end.
    end: usize,
    /// Whether it is the folder's only one.
    only: bool,
}

impl XfsFiles {
    /// Bytes in a block of a folder.
    pub(super) fn folder_block_size(&self) -> u64 {
        self.folder_blocks * self.sb.block_size
    }

    /// Tells `each` the entries of the folder `inode`, `.` and `..` left out.
    pub(super) fn entries(&self, inode: &Inode, each: &mut Each<'_>) -> Result<()> {
        if inode.format == Format::Local {
            return self.short_entries(inode, each);
        }
        let end = INDEX / self.sb.block_size;
        let (mut at, mut left) = (0, MAX_LISTED);
        for _ in 0..MAX_STEPS {
            if at >= end {
                return Ok(());
            }
            let run = self.run_at(inode, at)?;
            if run.place.is_none() && at > 0 {
                at = at.saturating_add(run.count).min(end).next_multiple_of(self.folder_blocks);
                continue;
            }
            let block = self.entry_block(inode, at)?;
            if !self.block_entries(inode, &block, each)? || block.only {
                return Ok(());
            }
            at += self.folder_blocks;
            match left.checked_sub(self.folder_block_size()) {
                Some(less) => left = less,
                None => break,
            }
        }
        Err(self.wrong(inode.number, "it is a folder of more blocks than are looked through"))
    }

    /// The inode number of the entry `name` of the folder `inode`.
    pub(super) fn find(&self, inode: &Inode, name: &[u8]) -> Result<Option<u64>> {
        let mut found = None;
        let mut each = |number: u64, other: &[u8]| {
            if other == name {
                found = Some(number);
            }
            found.is_none()
        };
        if inode.format == Format::Local {
            self.short_entries(inode, &mut each)?;
            return Ok(found);
        }
        let first = self.entry_block(inode, 0)?;
        if !first.only {
            return self.find_by_index(inode, name);
        }
        self.block_entries(inode, &first, &mut each)?;
        Ok(found)
    }

    /// The entries kept in the inode: a count of them, whether inode numbers take eight bytes, and the parent.
    fn short_entries(&self, inode: &Inode, each: &mut Each<'_>) -> Result<()> {
        let cut_off = || self.wrong(inode.number, "its entries do not fit");
        let data = inode.fork.get(..to_usize(inode.size)).unwrap_or_default();
        let [count, long] = bytes::<2>(data, 0);
        let number_len = if long == 0 { 4 } else { 8 };
        let mut rest = data.get(2 + number_len..).ok_or_else(cut_off)?;
        for _ in 0..count {
            let name_len = rest.first().copied().map_or(0, usize::from);
            let len = 3 + name_len + self.kind_len + number_len;
            let (entry, next) = rest.split_at_checked(len).ok_or_else(cut_off)?;
            let name = entry.get(3..3 + name_len).unwrap_or_default();
            let at = len - number_len;
            let number = if long == 0 { be32(entry, at).into() } else { be64(entry, at) };
            self.check_name(inode, name)?;
            if !each(number, name) {
                return Ok(());
            }
            rest = next;
        }
        Ok(())
    }

    /// Reads the block of a folder that begins with its block `first`, and where it is in bytes.
    pub(super) fn folder_block(&self, inode: &Inode, first: u64) -> Result<(Vec<u8>, u64)> {
        let block_size = self.sb.block_size;
        let mut bytes = vec![0; to_usize(self.folder_block_size())];
        let mut address = None;
        let mut done = 0;
        while done < self.folder_blocks {
            let run = self.run_at(inode, first + done)?;
            let place = run.place.ok_or_else(|| self.wrong(inode.number, "a block of it is nowhere"))?;
            let count = run.count.min(self.folder_blocks - done);
            let piece = bytes.get_mut(to_usize(done * block_size)..to_usize((done + count) * block_size));
            self.disk.read_at(piece.unwrap_or_default(), place * block_size)?;
            address.get_or_insert(place * block_size);
            done += count;
        }
        Ok((bytes, address.unwrap_or(0)))
    }

    /// Reads and checks the block of entries that begins with the folder's block `first`.
    pub(super) fn entry_block(&self, inode: &Inode, first: u64) -> Result<Block> {
        let (bytes, at) = self.folder_block(inode, first)?;
        let version = usize::from(self.sb.checksums());
        let is = |magic: [&[u8]; 2]| magic.get(version).is_some_and(|magic| has(&bytes, 0, magic));
        let only = first == 0 && is(ONLY);
        self.require(inode.number, only || is(ONE_OF_MANY), "a block of it has no magic number")?;
        if self.sb.checksums() {
            self.check_own(inode.number, &bytes, at, OWN)?;
        }
        let mut end = bytes.len();
        if only {
            // Its index is at its end: eight bytes for each of so many, then how many they are.
            let index = u64::from(be32(&bytes, end - 8)) * 8 + 8;
            let fits = index <= (end - HEADER_5) as u64;
            self.require(inode.number, fits, "its index does not fit")?;
            end -= to_usize(index);
        }
        Ok(Block { first, bytes, end, only })
    }

    /// Tells `each` the entries of a block, `.` and `..` left out; whether to go on.
    fn block_entries(&self, inode: &Inode, block: &Block, each: &mut Each<'_>) -> Result<bool> {
        let mut at = if self.sb.checksums() { HEADER_5 } else { HEADER };
        while at < block.end {
            if be16(&block.bytes, at) == FREE {
                let len = usize::from(be16(&block.bytes, at + 2));
                let sound = len >= 8 && len.is_multiple_of(8) && len <= block.end - at;
                self.require(inode.number, sound, "free room in it has an impossible length")?;
                at += len;
                continue;
            }
            let (number, name, len) = self.entry(inode, block, at)?;
            if name != b"." && name != b".." {
                self.check_name(inode, name)?;
                if !each(number, name) {
                    return Ok(false);
                }
            }
            at += len;
        }
        Ok(true)
    }

    /// The entry `at` a place in a block: inode number, name and length.
    fn entry<'b>(&self, inode: &Inode, block: &'b Block, at: usize) -> Result<(u64, &'b [u8], usize)> {
        let entries = block.bytes.get(..block.end).unwrap_or_default();
        let [name_len] = bytes::<1>(entries, at + 8);
        let name_len = usize::from(name_len);
        // Behind the name: what kind of file it is, where it is known, and the entry's own place in two bytes.
        let len = (9 + name_len + self.kind_len + 2).next_multiple_of(8);
        let name = entries.get(at + 9..at + 9 + name_len).filter(|_| name_len > 0);
        let own = at + len <= block.end && usize::from(be16(entries, at + len - 2)) == at;
        match name.filter(|_| own) {
            Some(name) => Ok((be64(entries, at), name, len)),
            None => Err(self.wrong(inode.number, "an entry of it makes no sense")),
        }
    }

    /// The inode number of the entry `offset` bytes into the folder's data, when its name is `name`. `block` is the
    /// block read last.
    pub(super) fn entry_named(
        &self,
        inode: &Inode,
        offset: u64,
        name: &[u8],
        block: &mut Option<Block>,
    ) -> Result<Option<u64>> {
        let size = self.folder_block_size();
        let first = offset / size * self.folder_blocks;
        if block.as_ref().is_none_or(|block| block.first != first) {
            *block = Some(self.entry_block(inode, first)?);
        }
        let Some(block) = block else { return Ok(None) };
        let (number, other, _) = self.entry(inode, block, to_usize(offset % size))?;
        Ok((other == name).then_some(number))
    }

    fn check_name(&self, inode: &Inode, name: &[u8]) -> Result<()> {
        let sound = !name.is_empty() && !name.contains(&b'/') && !name.contains(&0);
        self.require(inode.number, sound, "a name in it is none")
    }
}
