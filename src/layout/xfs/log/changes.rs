//! What the committed transactions of a log change: chunks of buffers, and inodes, each as the last transaction has it
//! ("XFS Filesystem Structure", "Buffer Log Item", "Inode Log Item"; `xfs_log_format.h` of Linux).

use std::collections::{BTreeMap, BTreeSet};

use super::transactions::Item;
use super::{BB, Step, holds, strange};
use crate::layout::field::{bytes, le16, le32, le64};
use crate::unit::{Extent, to_usize};

/// The kinds of items that change a buffer, and an inode.
pub(super) const BUFFER: u16 = 0x123c;
pub(super) const INODE: u16 = 0x123b;
/// Intents to change what files consist of, and what says that they were carried out.
const INTENTS: [u16; 3] = [0x1244, 0x1246, 0x1248];
const DONE: [u16; 3] = [0x1245, 0x1247, 0x1249];
/// Flags of a buffer's item: it is one of inodes, of which only links between them are taken; it is no longer one, and
/// nothing logged before counts; it is one of quotas.
const OF_INODES: u16 = 0x1;
const CANCEL: u16 = 0x2;
const OF_QUOTAS: u16 = 0x4 | 0x8 | 0x10;
/// Bytes of a buffer for which a bit stands, and where the bits are in the item.
const CHUNK: usize = 128;
const MAP: usize = 20;
/// Most basic blocks of a buffer.
pub(in crate::layout::xfs) const MAX_BUFFER: u64 = 128;
/// Bytes of an inode's item, on 64-bit systems.
const INODE_ITEM: usize = 56;
/// The fields of an inode that follow its core: its data, and its extended attributes.
const DATA_FORK: u32 = 0x2 | 0x4 | TREE;
const ATTR_FORK: u32 = 0x40 | 0x80 | 0x100;
/// What a chunk takes in memory.
const KEPT: usize = size_of::<(u64, u64, [u8; CHUNK])>();
/// Its data is the root of a tree.
pub(in crate::layout::xfs) const TREE: u32 = 0x8;
/// Extents of a file got another owner: not known here.
const OWNER: u32 = 0x200 | 0x400;
/// Most bytes kept: a log that changes more is not replayed.
const MAX_BYTES: usize = 48 << 20;

/// What a log changes.
#[derive(Default)]
pub(in crate::layout::xfs) struct Changes {
    /// By the first basic block.
    pub buffers: BTreeMap<u64, Buffer>,
    /// By the place in bytes.
    pub inodes: BTreeMap<u64, Inode>,
    /// The basic blocks of buffers that are changed otherwise, and their number.
    pub others: BTreeSet<(u64, u64)>,
    /// Intents to change what files consist of that were not carried out.
    pub intents: BTreeSet<u64>,
    /// Where the transaction began that was committed last.
    lsn: u64,
    bytes: usize,
}

/// Chunks of 128 bytes of a buffer.
pub(in crate::layout::xfs) struct Buffer {
    /// Its length in basic blocks.
    pub len: u64,
    /// By their number.
    pub chunks: BTreeMap<u64, (u64, [u8; CHUNK])>,
}

/// An inode, each part as it was logged last.
pub(in crate::layout::xfs) struct Inode {
    /// In the byte order of the system that logged it.
    pub core: Logged,
    /// What the item's flags call it.
    pub data: Option<(u32, Logged)>,
}

/// A part of an inode.
pub(in crate::layout::xfs) struct Logged {
    /// Where the transaction began.
    pub lsn: u64,
    pub bytes: Vec<u8>,
}

impl Buffer {
    fn bytes(&self) -> usize {
        self.chunks.len() * KEPT
    }
}

impl Inode {
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.core.bytes.len() + self.data.as_ref().map_or(0, |(_, data)| data.bytes.len())
    }
}

impl Changes {
    /// Takes in what a transaction changes that began at `lsn`.
    pub(super) fn commit(&mut self, lsn: u64, items: &[Item]) -> Step<()> {
        // Kernels before 5.14 may log the beginnings of two in another order than their ends.
        holds(self.lsn <= lsn, "its transactions are not in order")?;
        self.lsn = lsn;
        let is_cancel = |item: &&Item| item.kind == BUFFER && le16(&item.format, 4) & CANCEL != 0;
        for item in items.iter().filter(|item| !is_cancel(item)) {
            match item.kind {
                BUFFER => self.buffer(lsn, item)?,
                INODE => self.inode(lsn, item)?,
                kind if INTENTS.contains(&kind) => drop(self.intents.insert(le64(&item.format, 8))),
                kind if DONE.contains(&kind) => drop(self.intents.remove(&le64(&item.format, 8))),
                _ => {}
            }
        }
        // As the kernel has it: last.
        for item in items.iter().filter(is_cancel) {
            let (block, len) = place(item)?;
            self.bytes -= self.buffers.remove(&block).as_ref().map_or(0, Buffer::bytes);
            self.others.remove(&(block, len));
            let inodes = self.inodes.range(block * BB..(block + len) * BB);
            for at in inodes.map(|(at, _)| *at).collect::<Vec<_>>() {
                self.bytes -= self.inodes.remove(&at).as_ref().map_or(0, Inode::bytes);
            }
        }
        let others = self.others.len() * size_of::<(u64, u64)>();
        holds(self.bytes + others <= MAX_BYTES, "it changes too much")
    }

    fn buffer(&mut self, lsn: u64, item: &Item) -> Step<()> {
        let (block, len) = place(item)?;
        if le16(&item.format, 4) & (OF_INODES | OF_QUOTAS) != 0 {
            self.others.insert((block, len));
            return Ok(());
        }
        let buffer = self.buffers.entry(block).or_insert_with(|| Buffer { len, chunks: BTreeMap::new() });
        holds(buffer.len == len, "a buffer changes its length")?;
        let words = item.format.get(MAP..).unwrap_or_default().chunks_exact(4);
        let words: Vec<u32> =
            words.take(to_usize(le32(&item.format, 16).into())).map(|word| le32(word, 0)).collect();
        let is_set = |bit: u64| words.get(to_usize(bit / 32)).is_some_and(|word| word >> (bit % 32) & 1 != 0);
        let end = len * BB / CHUNK as u64;
        let mut bit = 0;
        for region in &item.regions {
            bit = (bit..end).find(|bit| is_set(*bit)).unwrap_or(end);
            for chunk in region.chunks(CHUNK) {
                let Ok(bytes) = <[u8; CHUNK]>::try_from(chunk) else {
                    return Err(strange("a region is no number of chunks"));
                };
                holds(bit < end && is_set(bit), "a region is not where its item says")?;
                if buffer.chunks.insert(bit, (lsn, bytes)).is_none() {
                    self.bytes += KEPT;
                }
                bit += 1;
            }
        }
        let last = words.len() as u64 * 32;
        holds(!(bit..last).any(is_set), "a region of a buffer is missing")
    }

    fn inode(&mut self, lsn: u64, item: &Item) -> Step<()> {
        let format = &item.format;
        let (fields, block) = (le32(format, 4), le64(format, 40));
        let (len, offset) = (u64::from(le32(format, 48)), u64::from(le32(format, 52)));
        let sound = format.len() == INODE_ITEM
            && (1..=MAX_BUFFER).contains(&len)
            && offset < len * BB
            && fields & OWNER == 0
            && block < u64::MAX / BB - MAX_BUFFER;
        holds(sound, "an inode's item is not known")?;
        let forks = [fields & DATA_FORK, fields & ATTR_FORK].into_iter().filter(|fork| *fork != 0).count();
        let [core, forked @ ..] = &item.regions[..] else {
            return Err(strange("an inode's item has no inode"));
        };
        holds(forked.len() == forks, "an inode's item has other parts than it says")?;
        let logged = |bytes: &Vec<u8>| Logged { lsn, bytes: bytes.clone() };
        let data = (fields & DATA_FORK != 0).then(|| forked.first()).flatten();
        let data = data.map(|bytes| (fields & DATA_FORK, logged(bytes)));
        let before = self.inodes.remove(&(block * BB + offset));
        self.bytes -= before.as_ref().map_or(0, Inode::bytes);
        let data = data.or_else(|| before?.data);
        let inode = Inode { core: logged(core), data };
        self.bytes += inode.bytes();
        self.inodes.insert(block * BB + offset, inode);
        self.others.insert((block, len));
        Ok(())
    }

    /// The bytes of the disk that it changes, all of each buffer.
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        let buffers = self.buffers.iter().map(|(block, buffer)| (*block, buffer.len));
        let all = buffers.chain(self.others.iter().copied());
        all.map(|(block, len)| Extent::at(block * BB, len * BB))
    }
}

/// The basic blocks of a buffer's item: the first, and how many.
fn place(item: &Item) -> Step<(u64, u64)> {
    let len = u64::from(le16(&item.format, 6));
    let block = u64::from_le_bytes(bytes(&item.format, 8));
    let sound =
        item.format.len() >= MAP && (1..=MAX_BUFFER).contains(&len) && block < u64::MAX / BB - MAX_BUFFER;
    if sound { Ok((block, len)) } else { Err(strange("a buffer's item is not known")) }
}
