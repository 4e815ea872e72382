//! jbd2: finds, without writing, which blocks a replay of the journal would put where. Only blocks the used map
//! needs are remembered, and only as places in the journal (Documentation/filesystems/ext4/journal.rst).

use std::collections::{BTreeMap, BTreeSet};

use crc_fast::{CrcAlgorithm, Digest};

use super::groups::{Fs, Logged, Overlay};
use super::superblock::feature::METADATA_CSUM;
use super::{Step, require};
use crate::io::ReadAt;
use crate::layout::field::{be16, be32, bytes, crc32c_raw, le16, le32};
use crate::unit::{Extent, ExtentMap, to_usize};

/// First four bytes of every block of the journal's own.
pub(super) const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
const REVOKE: u32 = 5;

const COMPAT_CHECKSUM: u32 = 0x1;
const BIT64: u32 = 0x2;
const ASYNC_COMMIT: u32 = 0x4;
const CSUM_V2: u32 = 0x8;
const CSUM_V3: u32 = 0x10;
const FAST_COMMIT: u32 = 0x20;
/// revoke, 64bit, async_commit, csum_v2, csum_v3, fast_commit.
const KNOWN: u32 = 0x1 | BIT64 | ASYNC_COMMIT | CSUM_V2 | CSUM_V3 | FAST_COMMIT;

const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;

/// Most extents and most blocks of pointers a journal's inode may have.
const MAX_RUNS: usize = 65_536;
const MAX_NODES: u32 = 16_384;

/// Most newer copies of blocks in all: more than a journal of 1 GiB in blocks of 4 KiB holds.
pub(super) const MAX_LOGGED: usize = 1 << 18;

/// A run of the journal file: its first block in the file, and where it lies.
type Run = (u64, Extent);

/// What a replay would do to the blocks asked about.
pub(super) struct Replay {
    /// Newer copies, by the block they replace.
    pub overlay: Overlay,
    /// Whether there is anything to replay.
    pub dirty: bool,
}

/// Reads the journal: which of the blocks in `wanted` it would replace, at most `most` of them (about 200 bytes of
/// memory each). Stops at everything that this code, the kernel and e2fsck might see differently.
pub(super) fn replay<D: ReadAt>(fs: &Fs<D>, wanted: &ExtentMap, most: usize) -> Step<Replay> {
    let runs = map_inode(fs)?;
    let Some(journal) = Journal::open(fs, runs)? else {
        return Ok(Replay { overlay: Overlay::new(), dirty: false });
    };
    Ok(Replay { overlay: Log::new(&journal, wanted, most).read()?, dirty: true })
}

/// A journal with something in it.
struct Journal<'a, D> {
    fs: &'a Fs<D>,
    runs: Vec<Run>,
    /// The log takes the file's blocks from `first` up to `end`.
    first: u64,
    end: u64,
    start: u64,
    sequence: u32,
    compat: u32,
    incompat: u32,
    seed: u32,
}

impl<'a, D: ReadAt> Journal<'a, D> {
    /// Reads the journal's superblock; `None` when the log is empty.
    fn open(fs: &'a Fs<D>, runs: Vec<Run>) -> Step<Option<Self>> {
        let length = runs.last().map_or(0, |(at, run)| at + run.len());
        let mut journal = Journal {
            fs,
            runs,
            first: 0,
            end: length,
            start: 0,
            sequence: 0,
            compat: 0,
            incompat: 0,
            seed: 0,
        };
        require(length > 0, || "the journal is empty".into())?;
        let block = journal.read(0)?;
        let raw = &block[..1024];
        let kind = be32(raw, 4);
        let lies = |holds: bool, field: &str, value: u64| {
            require(holds, || format!("the journal's {field} is {value}"))
        };
        lies(be32(raw, 0) == MAGIC, "magic number", be32(raw, 0).into())?;
        lies(kind == SUPERBLOCK_V1 || kind == SUPERBLOCK_V2, "superblock type", kind.into())?;
        let block_size = u64::from(be32(raw, 0xc));
        lies(block_size == fs.sb.block_size, "block size", block_size)?;
        let end = u64::from(be32(raw, 0x10));
        lies(end <= length, "length in blocks", end)?;
        let (first, start) = (u64::from(be32(raw, 0x14)), u64::from(be32(raw, 0x1c)));
        lies((1..end).contains(&first), "first block", first)?;
        if kind == SUPERBLOCK_V2 {
            journal.compat = be32(raw, 0x24);
            journal.incompat = be32(raw, 0x28);
            lies(journal.compat & !COMPAT_CHECKSUM == 0, "compatible features", journal.compat.into())?;
            lies(journal.incompat & !KNOWN == 0, "incompatible features", journal.incompat.into())?;
            lies(be32(raw, 0x2c) == 0, "read-only compatible features", be32(raw, 0x2c).into())?;
            journal.seed = crc32c_raw(!0, &bytes::<16>(raw, 0x30));
        }
        let sums = [journal.has(CSUM_V2), journal.has(CSUM_V3), journal.compat & COMPAT_CHECKSUM != 0];
        lies(sums.iter().filter(|sum| **sum).count() <= 1, "checksum features", journal.incompat.into())?;
        if journal.has(CSUM_V2 | CSUM_V3) {
            let [kind] = bytes::<1>(raw, 0x50);
            lies(kind == 4, "checksum type", kind.into())?;
            let sum = crc32c_raw(crc32c_raw(crc32c_raw(!0, &raw[..0xfc]), &[0; 4]), &raw[0x100..]);
            require(sum == be32(raw, 0xfc), || "the journal superblock's checksum does not match".into())?;
        }
        lies(be32(raw, 0x20) == 0, "recorded error", be32(raw, 0x20).into())?;
        if start == 0 && !(journal.has(FAST_COMMIT) && fs.sb.info().needs_recovery) {
            return Ok(None);
        }
        require(!journal.has(FAST_COMMIT), || "the journal may hold fast commits".into())?;
        require(!journal.has(ASYNC_COMMIT) || sums.contains(&true), || {
            "the journal commits asynchronously without checksums".into()
        })?;
        lies((first..end).contains(&start), "start of the log", start)?;
        Ok(Some(Journal { first, end, start, sequence: be32(raw, 0x18), ..journal }))
    }

    fn has(&self, feature: u32) -> bool {
        self.incompat & feature != 0
    }

    /// The block of the file system that is block `at` of the journal.
    fn place(&self, at: u64) -> Step<u64> {
        let i = self.runs.partition_point(|(first, _)| *first <= at);
        let found = i.checked_sub(1).and_then(|i| self.runs.get(i));
        let block = found.map(|(first, run)| run.start + (at - first)).filter(|_| at < self.end);
        block.ok_or_else(|| format!("the journal has no block {at}").into())
    }

    fn read(&self, at: u64) -> Step<Vec<u8>> {
        Ok(self.fs.read(None, self.place(at)?, 1)?)
    }

    /// The block of the log after `at`.
    fn next(&self, at: u64) -> u64 {
        if at + 1 >= self.end { self.first } else { at + 1 }
    }

    /// Bytes of one tag without its UUID.
    fn tag_size(&self) -> usize {
        match (self.has(CSUM_V3), self.has(BIT64), self.has(CSUM_V2)) {
            (true, ..) => 16,
            (_, true, false) => 12,
            (_, true, true) => 14,
            (_, false, false) => 8,
            (_, false, true) => 10,
        }
    }

    /// Bytes at the end of a descriptor or revocation block that hold its checksum.
    fn tail_size(&self) -> usize {
        if self.has(CSUM_V2 | CSUM_V3) { 4 } else { 0 }
    }

    /// The checksum of `block` with the four bytes at `field` taken as zero.
    fn block_checksum(&self, block: &[u8], field: usize) -> u32 {
        let before = crc32c_raw(crc32c_raw(self.seed, &block[..field]), &[0; 4]);
        crc32c_raw(before, &block[field + 4..])
    }

    fn check_tail(&self, block: &[u8], at: u64) -> Step<()> {
        let field = block.len() - 4;
        let good = self.tail_size() == 0 || self.block_checksum(block, field) == be32(block, field);
        require(good, || format!("the checksum of journal block {at} does not match"))
    }
}

/// A block's newest copy so far.
struct Copy {
    /// Its block in the journal.
    at: u64,
    escaped: bool,
    sequence: u32,
    checksum: u32,
}

/// The walk over the log, one transaction after the other.
struct Log<'a, D> {
    journal: &'a Journal<'a, D>,
    wanted: &'a ExtentMap,
    /// Most copies, and most revocations, to remember.
    most: usize,
    /// What committed transactions wrote, and the last transaction that revoked a block.
    copies: BTreeMap<u64, Copy>,
    revoked: BTreeMap<u64, u32>,
    /// Blocks of the log walked so far.
    steps: u64,
}

impl<'a, D: ReadAt> Log<'a, D> {
    fn new(journal: &'a Journal<'a, D>, wanted: &'a ExtentMap, most: usize) -> Self {
        Log { journal, wanted, most, copies: BTreeMap::new(), revoked: BTreeMap::new(), steps: 0 }
    }

    fn wants(&self, block: u64) -> bool {
        self.wanted.run_at(block).is_some()
    }

    fn bounded(&self, remembered: usize) -> Step<()> {
        // The same block may be counted twice: in the transaction read now and before.
        require(remembered / 2 <= self.most, || "the journal holds too much".into())
    }

    fn step(&mut self, at: u64) -> Step<u64> {
        self.steps += 1;
        require(self.steps <= self.journal.end - self.journal.first, || {
            "the journal's log runs over itself".into()
        })?;
        Ok(self.journal.next(at))
    }

    /// Walks every committed transaction and returns what they leave.
    fn read(mut self) -> Step<Overlay> {
        let journal = self.journal;
        let (mut at, mut sequence) = (journal.start, journal.sequence);
        let mut pending: BTreeMap<u64, Copy> = BTreeMap::new();
        let mut pending_revoked = BTreeSet::new();
        let mut sum = Digest::new(CrcAlgorithm::Crc32Mpeg2);
        loop {
            let block = journal.read(at)?;
            if be32(&block, 0) != MAGIC || be32(&block, 8) != sequence {
                break;
            }
            match be32(&block, 4) {
                DESCRIPTOR => {
                    journal.check_tail(&block, at)?;
                    sum.update(&block);
                    at = self.step(at)?;
                    at = self.read_tags(&block, at, sequence, &mut pending, &mut sum)?;
                    self.bounded(pending.len() + self.copies.len())?;
                }
                REVOKE => {
                    journal.check_tail(&block, at)?;
                    self.read_revocations(&block, at, &mut pending_revoked)?;
                    self.bounded(pending_revoked.len() + self.revoked.len())?;
                    at = self.step(at)?;
                }
                COMMIT => {
                    self.check_commit(&block, at, &sum)?;
                    sum.reset();
                    self.copies.append(&mut pending);
                    let revoked = std::mem::take(&mut pending_revoked);
                    self.revoked.extend(revoked.into_iter().map(|block| (block, sequence)));
                    at = self.step(at)?;
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
        }
        self.finish()
    }

    /// Reads a descriptor's tags, whose data starts at journal block `at`; returns the block after them.
    fn read_tags(
        &mut self,
        descriptor: &[u8],
        mut at: u64,
        sequence: u32,
        pending: &mut BTreeMap<u64, Copy>,
        sum: &mut Digest,
    ) -> Step<u64> {
        let journal = self.journal;
        let tags = &descriptor[12..descriptor.len() - journal.tail_size()];
        let size = journal.tag_size();
        let mut offset = 0;
        while offset + size <= tags.len() {
            let tag = &tags[offset..offset + size];
            let v3 = journal.has(CSUM_V3);
            let flags = if v3 { be32(tag, 4) } else { be16(tag, 6).into() };
            let checksum = if v3 { be32(tag, 12) } else { be16(tag, 4).into() };
            let high = if journal.has(BIT64) { be32(tag, 8) } else { 0 };
            let block = u64::from(high) << 32 | u64::from(be32(tag, 0));
            require(block < journal.fs.sb.blocks, || {
                format!("the journal names block {block}, beyond the end of the file system")
            })?;
            if self.wants(block) {
                let escaped = flags & TAG_ESCAPED != 0;
                pending.insert(block, Copy { at, escaped, sequence, checksum });
            }
            if journal.compat & COMPAT_CHECKSUM != 0 {
                sum.update(&journal.read(at)?);
            }
            at = self.step(at)?;
            if flags & TAG_LAST != 0 {
                break;
            }
            offset += size + if flags & TAG_SAME_UUID != 0 { 0 } else { 16 };
        }
        Ok(at)
    }

    fn read_revocations(&self, block: &[u8], at: u64, revoked: &mut BTreeSet<u64>) -> Step<()> {
        let end = to_usize(be32(block, 12).into());
        let fits = (16..=block.len() - self.journal.tail_size()).contains(&end);
        require(fits, || format!("the revocation block at {at} of the journal claims {end} bytes"))?;
        let wide = self.journal.has(BIT64);
        revoked.extend(
            block[16..end]
                .chunks_exact(if wide { 8 } else { 4 })
                .map(|record| match wide {
                    true => u64::from_be_bytes(bytes(record, 0)),
                    false => be32(record, 0).into(),
                })
                .filter(|block| self.wants(*block)),
        );
        Ok(())
    }

    /// Checks a commit block, and with the first kind of checksum its whole transaction. A torn one means that
    /// kernels may disagree about where the log ends.
    fn check_commit(&self, block: &[u8], at: u64, sum: &Digest) -> Step<()> {
        let good = if self.journal.has(CSUM_V2 | CSUM_V3) {
            self.journal.block_checksum(block, 0x10) == be32(block, 0x10)
        } else if self.journal.compat & COMPAT_CHECKSUM != 0 {
            let found = be32(block, 0x10);
            let [kind, size] = bytes::<2>(block, 0xc);
            (kind, size, found) == (0, 0, 0) || (kind, size, u64::from(found)) == (1, 4, sum.finalize())
        } else {
            true
        };
        require(good, || format!("the checksum of the commit at journal block {at} does not match"))
    }

    /// Drops what a later transaction revoked, and checks the blocks that stay.
    fn finish(self) -> Step<Overlay> {
        let mut overlay = Overlay::new();
        for (block, copy) in &self.copies {
            let revoked = self.revoked.get(block).is_some_and(|by| {
                // Sequence numbers wrap: the revocation counts when it is not older.
                by.wrapping_sub(copy.sequence) < 1 << 31
            });
            if revoked {
                continue;
            }
            self.check_data(*block, copy)?;
            let place = self.journal.place(copy.at)?;
            overlay.insert(*block, Logged { block: place, escaped: copy.escaped });
        }
        Ok(overlay)
    }

    fn check_data(&self, block: u64, copy: &Copy) -> Step<()> {
        if !self.journal.has(CSUM_V2 | CSUM_V3) {
            return Ok(());
        }
        let seed = crc32c_raw(self.journal.seed, &copy.sequence.to_be_bytes());
        let sum = crc32c_raw(seed, &self.journal.read(copy.at)?);
        let good =
            if self.journal.has(CSUM_V3) { sum == copy.checksum } else { sum & 0xffff == copy.checksum };
        require(good, || format!("the checksum of the journal's copy of block {block} does not match"))
    }
}

/// The blocks of the journal's inode, in order and without gaps.
fn map_inode<D: ReadAt>(fs: &Fs<D>) -> Step<Vec<Run>> {
    let sb = &fs.sb;
    let number = u64::from(sb.journal_inode) - 1;
    let (group, index) = (number / sb.group_inodes, number % sb.group_inodes);
    require(group < sb.groups(), || format!("the journal's inode {} does not exist", number + 1))?;
    let table = fs.block_number(&fs.descriptor(group)?, 0x8, 0x28);
    let at = index * sb.inode_size;
    let block = fs.read(None, table + at / sb.block_size, 1)?;
    let inode = &block[to_usize(at % sb.block_size)..];
    let inode = &inode[..to_usize(sb.inode_size)];

    let seed = crc32c_raw(sb.seed, &sb.journal_inode.to_le_bytes());
    let seed = crc32c_raw(seed, &inode[0x64..0x68]);
    require(!sb.ro_compat(METADATA_CSUM) || inode_checksum_matches(seed, inode), || {
        "the checksum of the journal's inode does not match".into()
    })?;
    let size = u64::from(le32(inode, 0x6c)) << 32 | u64::from(le32(inode, 0x4));
    require(le16(inode, 0) & 0xf000 == 0x8000 && le16(inode, 0x1a) > 0, || {
        "the journal's inode is not a file".into()
    })?;
    let blocks = size / sb.block_size;
    require(blocks > 0 && blocks <= sb.blocks && blocks < 1 << 32, || {
        format!("the journal's size is {size} bytes")
    })?;
    let mut mapper = Mapper { fs, seed, blocks, runs: Vec::new(), next: 0, nodes: 0 };
    let root = &inode[0x28..0x64];
    if le32(inode, 0x20) & 0x8_0000 != 0 {
        mapper.extents(root, None)?;
    } else {
        for (i, pointer) in root.chunks_exact(4).enumerate() {
            mapper.pointers(le32(pointer, 0).into(), i.saturating_sub(11))?;
        }
    }
    require(mapper.next == blocks, || format!("the journal has {} of its {blocks} blocks", mapper.next))?;
    Ok(mapper.runs)
}

/// Whether an inode's checksum, whose halves lie in its two parts, is right.
fn inode_checksum_matches(seed: u32, inode: &[u8]) -> bool {
    let mut zeroed = inode.to_vec();
    zeroed[0x7c..0x7e].fill(0);
    let mut stored = u32::from(le16(inode, 0x7c));
    let mut mask = 0xffff;
    // The upper half is there when the inode's extra part reaches it.
    if inode.len() > 128 && le16(inode, 0x80) >= 4 {
        zeroed[0x82..0x84].fill(0);
        stored |= u32::from(le16(inode, 0x82)) << 16;
        mask = !0;
    }
    crc32c_raw(seed, &zeroed) & mask == stored
}

struct Mapper<'a, D> {
    fs: &'a Fs<D>,
    /// Start value of the checksums of the inode's extent blocks.
    seed: u32,
    /// Blocks the file has.
    blocks: u64,
    runs: Vec<Run>,
    /// The next block of the file.
    next: u64,
    nodes: u32,
}

impl<D: ReadAt> Mapper<'_, D> {
    fn node(&mut self, block: u64) -> Step<Vec<u8>> {
        self.nodes += 1;
        require(self.nodes <= MAX_NODES, || "the journal is too fragmented".into())?;
        self.bounded(block, 1)?;
        Ok(self.fs.read(None, block, 1)?)
    }

    fn bounded(&self, block: u64, count: u64) -> Step<()> {
        let sb = &self.fs.sb;
        require(block > sb.first_block && block.saturating_add(count) <= sb.blocks, || {
            format!("the journal claims block {block}, outside the file system")
        })
    }

    /// Adds `count` blocks at `block` as the file's next ones; those beyond its end are left out.
    fn add(&mut self, block: u64, count: u64) -> Step<()> {
        let count = count.min(self.blocks - self.next);
        if count == 0 {
            return Ok(());
        }
        self.bounded(block, count)?;
        match self.runs.last_mut() {
            Some((_, run)) if run.end == block => run.end += count,
            _ => self.runs.push((self.next, Extent::at(block, count))),
        }
        self.next += count;
        require(self.runs.len() <= MAX_RUNS, || "the journal is too fragmented".into())
    }

    /// Adds what an extent tree node maps; `depth` is what its parent says, unknown for the root.
    fn extents(&mut self, node: &[u8], depth: Option<u16>) -> Step<()> {
        let (magic, entries, own_depth) = (le16(node, 0), le16(node, 2), le16(node, 6));
        let fits = usize::from(entries) <= (node.len() - 12) / 12;
        let sound = magic == 0xf30a && fits && own_depth <= 5 && depth.is_none_or(|depth| depth == own_depth);
        require(sound, || "the journal's extent tree is damaged".into())?;
        for entry in node[12..].chunks_exact(12).take(entries.into()) {
            require(u64::from(le32(entry, 0)) == self.next, || "the journal has a hole".into())?;
            if own_depth == 0 {
                let (len, high) = (le16(entry, 4), le16(entry, 6));
                require((1..=32768).contains(&len), || "the journal has unwritten blocks".into())?;
                self.add(u64::from(high) << 32 | u64::from(le32(entry, 8)), len.into())?;
            } else {
                let child = u64::from(le16(entry, 8)) << 32 | u64::from(le32(entry, 4));
                let child = self.node(child)?;
                // The tail follows the most entries the block has room for.
                let tail = (12 + 12 * usize::from(le16(&child, 4))).min(child.len() - 4);
                let sum = crc32c_raw(self.seed, &child[..tail]);
                require(!self.fs.sb.ro_compat(METADATA_CSUM) || sum == le32(&child, tail), || {
                    "the checksum of the journal's extent tree does not match".into()
                })?;
                self.extents(&child, Some(own_depth - 1))?;
            }
        }
        Ok(())
    }

    /// Adds what a pointer of an old-style block map leads to through `levels` blocks of pointers.
    fn pointers(&mut self, pointer: u64, levels: usize) -> Step<()> {
        if self.next == self.blocks {
            return Ok(());
        }
        require(pointer != 0, || "the journal has a hole".into())?;
        if levels == 0 {
            return self.add(pointer, 1);
        }
        let node = self.node(pointer)?;
        for pointer in node.chunks_exact(4) {
            self.pointers(le32(pointer, 0).into(), levels - 1)?;
        }
        Ok(())
    }
}
