//! Which blocks hold a file's data: a list of extents in its inode, or the leaves of a B+tree with such lists
//! ("Data Extents").

use std::rc::Rc;

use super::inode::{Format, Inode};
use super::{Own, XfsFiles};
use crate::error::Result;
use crate::io::read_vec;
use crate::layout::field::{be16, be64, has};
use crate::unit::{Extent, to_usize};

/// Most levels of a tree: 2^48 extents in the smallest blocks need no more.
const MAX_LEVELS: u16 = 12;
/// Bytes of an extent's record, and of a key or a pointer.
const RECORD: usize = 16;
const WORD: usize = 8;
/// Bytes before the records of a block without and with checksums.
const HEADER: usize = 24;
const HEADER_5: usize = 72;
const OWN: Own = Own { sum: 64, address: 24, uuid: 40, owner: 56 };

/// A part of a file that lies in neighbouring blocks, or in none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Its length in blocks, at least 1.
    pub count: u64,
    /// Its first block in the file system; `None` when it reads as zeroes.
    pub place: Option<u64>,
}

/// An extent, in blocks of the file.
struct Record {
    blocks: Extent,
    /// Where it begins in the file system; `None` as long as it was not written.
    place: Option<u64>,
}

/// The extents of a part of a file.
pub(super) struct Leaf {
    inode: u64,
    /// The blocks of the file that these extents are all of.
    covers: Extent,
    records: Vec<Record>,
}

impl XfsFiles {
    /// The run of `inode`'s data that begins with its block `block`.
    pub(super) fn run_at(&self, inode: &Inode, block: u64) -> Result<Run> {
        let leaf = self.leaf_at(inode, block)?;
        let next = leaf.records.partition_point(|record| record.blocks.end <= block);
        let (end, place) = match leaf.records.get(next) {
            Some(Record { blocks, place }) if blocks.start <= block => {
                (blocks.end, place.map(|place| place + (block - blocks.start)))
            }
            Some(Record { blocks, .. }) => (blocks.start, None),
            None => (leaf.covers.end, None),
        };
        self.require(inode.number, block < end, "it goes on beyond the longest file")?;
        Ok(Run { count: end - block, place })
    }

    fn leaf_at(&self, inode: &Inode, block: u64) -> Result<Rc<Leaf>> {
        let asked = Extent::at(block, 1);
        if let Some(leaf) = self.last_leaf.borrow().as_ref()
            && leaf.inode == inode.number
            && leaf.covers.contains(asked)
        {
            return Ok(Rc::clone(leaf));
        }
        let all = Extent::new(0, u64::MAX);
        let leaf = match inode.format {
            Format::Extents(count) => {
                let list = inode.fork.get(..to_usize(count) * RECORD).unwrap_or_default();
                self.leaf(inode, all, list)?
            }
            Format::Tree => self.descend(inode, block)?,
            Format::Local | Format::None => Leaf { inode: inode.number, covers: all, records: Vec::new() },
        };
        let leaf = Rc::new(leaf);
        *self.last_leaf.borrow_mut() = Some(Rc::clone(&leaf));
        Ok(leaf)
    }

    /// Reads the records of `list`, which must be in order and inside `covers`.
    fn leaf(&self, inode: &Inode, covers: Extent, list: &[u8]) -> Result<Leaf> {
        let mut records = Vec::with_capacity(list.len() / RECORD);
        let mut end = covers.start;
        for raw in list.chunks_exact(RECORD) {
            // A flag for what was not written, 54 bits of the place in the file, 52 of the address, 21 of the length.
            let (high, low) = (be64(raw, 0), be64(raw, 8));
            let (start, count) = (high << 1 >> 10, low & 0x1f_ffff);
            let blocks = Extent::at(start, count);
            let sound = count > 0 && start >= end && blocks.end <= covers.end;
            self.require(inode.number, sound, "its extents are out of order")?;
            end = blocks.end;
            let place = self.place((high & 0x1ff) << 43 | low >> 21, count);
            self.require(inode.number, place.is_some(), "an extent lies outside the file system")?;
            records.push(Record { blocks, place: place.filter(|_| high >> 63 == 0) });
        }
        Ok(Leaf { inode: inode.number, covers, records })
    }

    /// Walks down `inode`'s tree to the leaf in whose range `block` is. Every block begins with its key, so that none can
    /// stand for two ranges.
    fn descend(&self, inode: &Inode, block: u64) -> Result<Leaf> {
        let require = |holds, what: &str| self.require(inode.number, holds, what);
        let (mut level, root) = (be16(&inode.fork, 0), inode.fork.get(4..).unwrap_or_default());
        require((1..=MAX_LEVELS).contains(&level), "its tree of extents has an impossible number of levels")?;
        let mut covers = Extent::new(0, u64::MAX);
        let mut child = self.child(inode, root, be16(&inode.fork, 2), block, &mut covers)?;
        while let Some(address) = child {
            level -= 1;
            let raw = self.tree_block(inode, address)?;
            require(be16(&raw, 4) == level, "a block of its tree of extents is of another level")?;
            let entries = raw.get(self.tree_header()..).unwrap_or_default();
            let first = be64(entries, 0);
            let key = if level == 0 { first << 1 >> 10 } else { first };
            require(key == covers.start, "a block of its tree of extents does not begin with its key")?;
            let count = be16(&raw, 6);
            if level == 0 {
                let list = entries.get(..usize::from(count) * RECORD).filter(|list| !list.is_empty());
                let list = list
                    .ok_or_else(|| self.wrong(inode.number, "a leaf of its extents is empty or too long"))?;
                return self.leaf(inode, covers, list);
            }
            child = self.child(inode, entries, count, block, &mut covers)?;
        }
        Ok(Leaf { inode: inode.number, covers, records: Vec::new() })
    }

    /// Of `count` keys and the pointers behind the room for most keys in `node`, the pointer to the child in whose
    /// range `block` is; `covers` becomes that range. `None` when it lies before the first key.
    fn child(
        &self,
        inode: &Inode,
        node: &[u8],
        count: u16,
        block: u64,
        covers: &mut Extent,
    ) -> Result<Option<u64>> {
        let most = node.len() / (2 * WORD);
        let sound = (1..=most).contains(&usize::from(count));
        self.require(inode.number, sound, "a node of its extents is empty or too long")?;
        let key = |i: usize| be64(node, i * WORD);
        let count = usize::from(count);
        let next = (0..count).find(|i| key(*i) > block).unwrap_or(count);
        if next < count {
            covers.end = covers.end.min(key(next));
        }
        let Some(own) = next.checked_sub(1) else { return Ok(None) };
        covers.start = key(own);
        Ok(Some(be64(node, (most + own) * WORD)))
    }

    fn tree_header(&self) -> usize {
        if self.sb.checksums() { HEADER_5 } else { HEADER }
    }

    fn tree_block(&self, inode: &Inode, address: u64) -> Result<Vec<u8>> {
        let place = self.place(address, 1);
        let place = place.ok_or_else(|| self.wrong(inode.number, "its tree of extents leads outside"))?;
        let at = place * self.sb.block_size;
        let raw = read_vec(&self.disk, at, to_usize(self.sb.block_size))?;
        let magic = if self.sb.checksums() { b"BMA3" } else { b"BMAP" };
        self.require(
            inode.number,
            has(&raw, 0, magic),
            "a block of its tree of extents has no magic number",
        )?;
        if self.sb.checksums() {
            self.check_own(inode.number, &raw, at, OWN)?;
        }
        Ok(raw)
    }
}
