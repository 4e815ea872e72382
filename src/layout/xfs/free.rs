//! The free space of an allocation group: the records of its by-block B+tree ("AG Free Space Management").

use super::replayed::Replayed;
use super::{Step, Superblock, intact, require};
use crate::io::{ReadAt, read_vec};
use crate::layout::Stop;
use crate::layout::field::{be16, be32, be64, bytes, has};
use crate::unit::{Extent, to_usize};

/// Most levels a free-space B+tree may have.
const MAX_LEVELS: u32 = 9;
/// A pointer to no block.
const NULL: u32 = !0;
/// Bytes in a record or key, and in a pointer.
const RECORD: u64 = 8;
const POINTER: u64 = 4;

/// A file system that passed [`Superblock::check`], and the disk it is on.
pub(super) struct Fs<D> {
    pub disk: D,
    pub sb: Superblock,
}

/// The header of an allocation group, as far as its free space needs it; blocks count from the group's start.
pub(super) struct Agf {
    number: u64,
    /// Length in blocks.
    length: u64,
    /// Root of the tree by block, and its number of levels.
    root: u64,
    levels: u32,
    /// Free blocks that the tree lists, and the length of its longest run.
    free: u64,
    longest: u64,
    /// What is in use for certain: the group's headers, the roots of its free-space trees, and the log.
    reserved: [Extent; 4],
}

impl<D: ReadAt> Fs<Replayed<D>> {
    /// Blocks in use, by the superblock's count, which is exact after a clean unmount; a log that is to be replayed does not
    /// have it, so that then the groups' headers are counted.
    pub fn used_blocks(&self) -> Step<u64> {
        if self.disk.is_clean() {
            return Ok(self.sb.blocks - self.sb.free_blocks);
        }
        let mut used = self.sb.blocks;
        for group in 0..self.sb.ag_count {
            used -= match self.agf(group) {
                Ok(agf) => agf.free,
                // All of it is used then.
                Err(Stop::Whole(_)) => 0,
                Err(failed) => return Err(failed),
            };
        }
        Ok(used)
    }
}

impl<D: ReadAt> Fs<D> {
    /// Reads and checks the header of group `number`.
    pub fn agf(&self, number: u64) -> Step<Agf> {
        let sb = &self.sb;
        let group = sb.ag(number);
        let at = group.start * sb.block_size + sb.sector_size;
        let raw = read_vec(&self.disk, at, to_usize(sb.sector_size))?;
        let field = |at| u64::from(be32(&raw, at));
        let wrong = |what: &str| format!("its header {what}");
        require(has(&raw, 0, b"XAGF") && field(4) == 1, || wrong("has no magic number, or not version 1"))?;
        if sb.checksums() {
            require(intact(&raw, 216), || wrong("has a checksum that does not match"))?;
            require(bytes::<16>(&raw, 64) == sb.uuid, || wrong("belongs to another file system"))?;
        }
        require(field(8) == number && field(12) == group.len(), || wrong("belongs to another group"))?;
        let log = sb.log.intersect(group);
        let log = if log.is_empty() { Extent::new(0, 0) } else { log };
        let agf = Agf {
            number,
            length: group.len(),
            root: field(16),
            levels: be32(&raw, 28),
            free: field(52),
            longest: field(56),
            reserved: [
                Extent::new(0, sb.header_blocks()),
                Extent::at(field(16), 1),
                Extent::at(field(20), 1),
                Extent::at(log.start.saturating_sub(group.start), log.len()),
            ],
        };
        require((1..=MAX_LEVELS).contains(&agf.levels), || wrong(&format!("has {} levels", agf.levels)))?;
        require(agf.longest <= agf.free && agf.free <= agf.length, || {
            wrong(&format!("counts {} free blocks", agf.free))
        })?;
        Ok(agf)
    }

    /// Gives `visit` every free run of the group, in order, and checks the whole tree on the way.
    pub fn all_free(&self, agf: &Agf, visit: impl FnMut(Extent)) -> Step<()> {
        let mut walk = Walk::new(self, agf, Extent::new(0, agf.length), visit);
        walk.node(agf.root, agf.levels - 1, None)?;
        require(walk.free == agf.free && walk.longest == agf.longest, || {
            format!("its tree lists {} free blocks, its header {}", walk.free, agf.free)
        })?;
        require(walk.levels.iter().flatten().all(|(_, right)| *right == NULL), || {
            "a level of its tree does not end".into()
        })
    }

    /// Gives `visit` the free runs that share a block with `within`, in order, of a group whose whole tree was
    /// checked before.
    pub fn free_within(&self, agf: &Agf, within: Extent, visit: impl FnMut(Extent)) -> Step<()> {
        Walk::new(self, agf, within, visit).node(agf.root, agf.levels - 1, None)
    }

    /// Reads a block of the tree and checks that it is one.
    fn tree_block(&self, agf: &Agf, block: u64) -> Step<Vec<u8>> {
        let sb = &self.sb;
        let wrong = |what: &str| format!("block {block} of its tree {what}");
        let inside = Extent::new(sb.header_blocks(), agf.length);
        require(inside.contains(Extent::at(block, 1)), || wrong("lies outside the group"))?;
        let address = (sb.ag(agf.number).start + block) * sb.block_size;
        let raw = read_vec(&self.disk, address, to_usize(sb.block_size))?;
        let magic = if sb.checksums() { b"AB3B" } else { b"ABTB" };
        require(has(&raw, 0, magic), || wrong("has no magic number"))?;
        if sb.checksums() {
            require(intact(&raw, 52), || wrong("has a checksum that does not match"))?;
            let own = be64(&raw, 16) == address / 512
                && bytes::<16>(&raw, 32) == sb.uuid
                && u64::from(be32(&raw, 48)) == agf.number;
            require(own, || wrong("belongs elsewhere"))?;
        }
        Ok(raw)
    }
}

/// A walk through the tree, from left to right.
struct Walk<'a, D, F> {
    fs: &'a Fs<D>,
    agf: &'a Agf,
    within: Extent,
    visit: F,
    /// Whether every block is visited, so that siblings can be checked.
    whole: bool,
    /// The last block visited in each level, and its right sibling.
    levels: [Option<(u32, u32)>; MAX_LEVELS as usize],
    nodes: u64,
    /// Where the last run ended.
    end: u64,
    free: u64,
    longest: u64,
}

impl<'a, D: ReadAt, F: FnMut(Extent)> Walk<'a, D, F> {
    fn new(fs: &'a Fs<D>, agf: &'a Agf, within: Extent, visit: F) -> Self {
        let whole = within == Extent::new(0, agf.length);
        let levels = [None; MAX_LEVELS as usize];
        Walk { fs, agf, within, visit, whole, levels, nodes: 0, end: 0, free: 0, longest: 0 }
    }

    /// Visits the tree's block `block`, in the level `level` above the leaves, whose first record or key begins
    /// with `key`.
    fn node(&mut self, block: u64, level: u32, key: Option<u32>) -> Step<()> {
        let wrong = |what: &str| format!("block {block} of its tree {what}");
        let sb = &self.fs.sb;
        self.nodes += 1;
        require(self.nodes <= self.agf.length, || wrong("is one too many"))?;
        let raw = self.fs.tree_block(self.agf, block)?;
        require(u32::from(be16(&raw, 4)) == level, || wrong(&format!("is not of level {level}")))?;
        self.check_siblings(&raw, block, level)?;

        let header = if sb.checksums() { 56 } else { 16 };
        let entry = if level == 0 { RECORD } else { RECORD + POINTER };
        let most = (sb.block_size - header) / entry;
        let count = u64::from(be16(&raw, 6));
        // Only the root of an allocation group without free space is empty.
        let least = u64::from(level > 0 || key.is_some());
        require((least..=most).contains(&count), || wrong(&format!("has {count} entries")))?;
        let place = |i: u64| to_usize(header + i * RECORD);
        let starts = |i: u64| be32(&raw, place(i));
        require(key.is_none_or(|key| key == starts(0)), || wrong("does not begin with its key"))?;
        for i in 0..count {
            if level == 0 {
                self.record(Extent::at(starts(i).into(), be32(&raw, place(i) + 4).into()))?;
                continue;
            }
            require(i == 0 || starts(i - 1) < starts(i), || wrong("has keys out of order"))?;
            // What a child lists begins at its key, and ends before the next child's.
            let ends = if i + 1 < count { starts(i + 1).into() } else { self.agf.length };
            let child = Extent::new(starts(i).into(), ends);
            if self.whole || !child.intersect(self.within).is_empty() {
                let pointer = to_usize(header + most * RECORD + i * POINTER);
                self.node(be32(&raw, pointer).into(), level - 1, Some(starts(i)))?;
            }
        }
        Ok(())
    }

    fn check_siblings(&mut self, raw: &[u8], block: u64, level: u32) -> Step<()> {
        let Some(last) = self.levels.get_mut(to_usize(level.into())).filter(|_| self.whole) else {
            return Ok(());
        };
        let (left, right) = (be32(raw, 8), be32(raw, 12));
        let joined = match *last {
            None => left == NULL,
            Some((number, next)) => left == number && u64::from(next) == block,
        };
        let number = u32::try_from(block).unwrap_or(NULL);
        *last = Some((number, right));
        require(joined, || format!("block {block} of its tree is not its neighbours' sibling"))
    }

    fn record(&mut self, run: Extent) -> Step<()> {
        let sound = !run.is_empty()
            && self.end <= run.start
            && run.end <= self.agf.length
            && self.agf.reserved.iter().all(|reserved| reserved.intersect(run).is_empty());
        require(sound, || format!("its tree lists {run:?}, which is out of order or cannot be free"))?;
        self.end = run.end;
        self.free += run.len();
        self.longest = self.longest.max(run.len());
        (self.visit)(run);
        Ok(())
    }
}
