//! A file system as it will be after its log's replay, seen without writing to it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::log::{self, BB, Buffer, Inode, MAX_BUFFER, TREE};
use super::{Step, Superblock, checksum, intact, require};
use crate::error::Result;
use crate::io::{ReadAt, lay_over, read_vec};
use crate::layout::field::{be16, be64, bytes, has, le64};
use crate::unit::{Extent, ExtentMap, to_usize};

/// Most bytes of buffers kept: a log that changes more is not replayed.
const MAX_BYTES: u64 = 48 << 20;

/// The disk of a file system, read as if its log had been replayed.
pub(super) struct Replayed<D> {
    disk: D,
    /// Buffers, and then inodes in them, as they will be, by their places in bytes.
    buffers: BTreeMap<u64, Vec<u8>>,
    inodes: BTreeMap<u64, Vec<u8>>,
    /// The bytes of all buffers that the replay reads or writes.
    touched: ExtentMap,
    /// Whether the next mount does more to files than this shows.
    unfinished: bool,
}

impl<D: ReadAt> Replayed<D> {
    /// The file system `sb` that begins at byte 0 of `disk`, and its superblock afterwards. Stops where this code and the kernel
    /// might see it differently.
    pub fn open(disk: D, sb: &Superblock) -> Step<(Self, Superblock)> {
        let changes = log::changes(&disk, sb)?;
        let size = sb.blocks * sb.block_size;
        let others = !changes.inodes.is_empty() || !changes.others.is_empty();
        let only_counters = !others && changes.buffers.keys().all(|block| *block == 0);
        require(sb.checksums() || only_counters, || {
            "its log must be replayed first, and it has no checksums".into()
        })?;
        let mut replayed = Replayed {
            touched: changes.extents().collect(),
            unfinished: !changes.intents.is_empty(),
            buffers: BTreeMap::new(),
            inodes: BTreeMap::new(),
            disk,
        };
        let inside = |extent: Extent| extent.end <= size;
        let sound = replayed.touched.iter().all(inside);
        require(sound, || "its log changes what lies outside".into())?;
        let (mut end, mut kept) = (0, 0);
        for (block, buffer) in &changes.buffers {
            let at = block * BB;
            require(end <= at, || "its log changes a block as parts of two".into())?;
            end = at + buffer.len * BB;
            kept += buffer.len * BB;
            require(kept <= MAX_BYTES, || "its log changes too much".into())?;
            let mut bytes = read_vec(&replayed.disk, at, to_usize(buffer.len * BB))?;
            if change(&mut bytes, buffer, sb)? {
                replayed.buffers.insert(at, bytes);
            }
        }
        for (at, inode) in &changes.inodes {
            let len = u64::from(be16(sb.raw(), 104));
            require(inside(Extent::at(*at, len)), || "its log changes what lies outside".into())?;
            kept += len;
            require(kept <= MAX_BYTES, || "its log changes too much".into())?;
            let mut bytes = read_vec(&replayed, *at, to_usize(len))?;
            if change_inode(&mut bytes, inode)? {
                replayed.inodes.insert(*at, bytes);
            }
        }
        let head = read_vec(&replayed, 0, sb.raw().len())?;
        let after = Superblock::parse(&head).filter(|after| after.has_layout_of(sb));
        let after = after.ok_or_else(|| "its log changes the file system's shape".to_owned())?;
        Ok((replayed, after))
    }

    /// Keeps nothing of what is changed but what tells of free space, for as long as a map lives.
    pub fn for_free_space(mut self) -> Self {
        self.inodes.clear();
        self.buffers.retain(|_, bytes| has(bytes, 0, b"XAGF") || has(bytes, 0, b"AB3B"));
        self
    }

    /// Whether a replay changes nothing.
    pub fn is_clean(&self) -> bool {
        self.touched.is_empty()
    }

    /// Whether the next mount goes on with something that changes what files consist of.
    pub fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// The bytes of all buffers that a replay reads or writes.
    pub fn touched(&self) -> &ExtentMap {
        &self.touched
    }
}

/// Where a structure of version 5 says when it was written last, which file system it is of, and its checksum.
struct Own {
    lsn: usize,
    uuid: usize,
    sum: usize,
}

/// The structures that are logged, by their magic numbers and where they have them (`xfs_format.h`, `xfs_da_format.h`).
static KINDS: [(usize, &[&[u8]], Own); 9] = [
    (0, &[b"XFSB"], Own { lsn: 240, uuid: 32, sum: 224 }),
    (0, &[b"XAGF"], Own { lsn: 208, uuid: 64, sum: 216 }),
    (0, &[b"XAGI"], Own { lsn: 320, uuid: 296, sum: 312 }),
    (0, &[b"XAFL"], Own { lsn: 24, uuid: 8, sum: 32 }),
    (0, &[b"AB3B", b"AB3C", b"IAB3", b"FIB3", b"RMB3", b"R3FC"], Own { lsn: 24, uuid: 32, sum: 52 }),
    (0, &[b"BMA3"], Own { lsn: 32, uuid: 40, sum: 64 }),
    (0, &[b"XDB3", b"XDD3", b"XDF3"], Own { lsn: 16, uuid: 24, sum: 4 }),
    (0, &[b"XSLM", b"XARM"], Own { lsn: 48, uuid: 16, sum: 12 }),
    (8, &[b"\x3d\xf1", b"\x3d\xff", b"\x3e\xbe", b"\x3b\xee"], Own { lsn: 24, uuid: 32, sum: 12 }),
];

fn own(structure: &[u8]) -> Option<&'static Own> {
    let is = |at: usize, magics: &[&[u8]]| magics.iter().any(|magic| has(structure, at, magic));
    KINDS.iter().find(|(at, magics, _)| is(*at, magics)).map(|(.., own)| own)
}

/// When `structure` was written last, by what it says at `at`; what was never logged says that all bits are set.
fn written(structure: &[u8], at: usize) -> u64 {
    match be64(structure, at) {
        u64::MAX => 0,
        lsn => lsn,
    }
}

/// Puts the checksum of `structure` at `at`.
fn seal(structure: &mut [u8], at: usize) {
    let sum = checksum(structure, at);
    if let Some(place) = structure.get_mut(at..at + 4) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
}

/// Changes `bytes`, a buffer as it is on the disk, unless it was written later than it was logged (`xfs_buf_item_recover.c`);
/// whether anything was changed. A replay takes a block whose checksum does not match as it is, cut off while it was written or
/// damaged, and gives it one that does: here it is a doubt.
fn change(bytes: &mut [u8], buffer: &Buffer, sb: &Superblock) -> Step<bool> {
    let uuid = if has(bytes, 0, b"XFSB") { sb.user_uuid() } else { sb.uuid };
    let known = own(bytes).filter(|own| sb.checksums() && self::bytes::<16>(bytes, own.uuid) == uuid);
    let sound = known.is_none_or(|own| intact(bytes, own.sum));
    require(sound, || "its log changes a block whose checksum does not match".into())?;
    let written = known.map_or(0, |own| written(bytes, own.lsn));
    let mut changed = false;
    for (number, (lsn, chunk)) in &buffer.chunks {
        let at = to_usize(*number) * chunk.len();
        if let Some(place) = bytes.get_mut(at..at + chunk.len()).filter(|_| *lsn > written) {
            place.copy_from_slice(chunk);
            changed = true;
        }
    }
    if let Some(own) = own(bytes).filter(|_| changed && sb.checksums()) {
        seal(bytes, own.sum);
    }
    Ok(changed)
}

/// Where an inode says when it was written last, and its checksum.
const INODE_LSN: usize = 112;
const INODE_SUM: usize = 100;
/// Length of its core, and what of it is left alone: the link to the next inode without a name, and the checksum.
const CORE: usize = 176;
const ALONE: Range<usize> = 96..104;
/// Where its core says where the attributes begin, in units of eight bytes behind the core.
const ATTRIBUTES: usize = 82;
/// The numbers in the core, each by its place and length, without times, which nobody reads here, and the one at 24.
const NUMBERS: [(usize, usize); 20] = [
    (0, 2),
    (2, 2),
    (8, 4),
    (12, 4),
    (16, 4),
    (20, 2),
    (22, 2),
    (56, 8),
    (64, 8),
    (72, 4),
    (76, 4),
    (80, 2),
    (88, 2),
    (90, 2),
    (92, 4),
    (104, 8),
    (112, 8),
    (120, 8),
    (128, 4),
    (152, 8),
];
/// The flag that the one at 24 counts the extents, with 64 bits.
const NREXT64: u64 = 0x10;
/// Bytes of a tree's block before its keys.
const TREE_HEADER: usize = 72;

/// Changes `bytes`, an inode as it is on the disk, unless it was written later than it was logged
/// (`xfs_inode_item_recover.c`); whether anything was changed.
fn change_inode(bytes: &mut [u8], inode: &Inode) -> Step<bool> {
    let core = &inode.core.bytes;
    let sound = core.len() >= CORE && bytes.len() > CORE && has(core, 0, b"NI");
    require(sound, || "its log has an inode that is not known".into())?;
    if has(bytes, 0, b"IN") {
        let sound = intact(bytes, INODE_SUM);
        require(sound, || "its log changes an inode whose checksum does not match".into())?;
    } else {
        // It was made as one of many, which are logged by their number alone.
        bytes.fill(0);
    }
    let written = written(bytes, INODE_LSN);
    let mut changed = false;
    if inode.core.lsn >= written {
        let mut core = core.clone();
        let wide = if le64(&core, 120) & NREXT64 != 0 { 8 } else { 0 };
        for (at, len) in NUMBERS.into_iter().chain([(24, wide)]) {
            core[at..at + len].reverse();
        }
        for part in [0..ALONE.start, ALONE.end..CORE] {
            bytes[part.clone()].copy_from_slice(&core[part]);
        }
        changed = true;
    }
    if let Some((kind, data)) = inode.data.as_ref().filter(|(_, data)| data.lsn >= written) {
        let end = match usize::from(bytes[ATTRIBUTES]) * 8 {
            0 => bytes.len(),
            attributes => CORE + attributes,
        };
        let fork = bytes.get_mut(CORE..end);
        put_fork(
            fork.ok_or_else(|| "its log has an inode whose parts do not fit".to_owned())?,
            *kind,
            &data.bytes,
        )?;
        changed = true;
    }
    if changed {
        seal(bytes, INODE_SUM);
    }
    Ok(changed)
}

/// Puts the logged data of an inode into its fork; the root of a tree is logged as a block of it.
fn put_fork(fork: &mut [u8], kind: u32, logged: &[u8]) -> Step<()> {
    if kind != TREE {
        // It is logged in whole words.
        let len = logged.len().min(fork.len());
        fork[..len].copy_from_slice(&logged[..len]);
        return Ok(());
    }
    let count = usize::from(be16(logged, 6));
    let (from, to) = (logged.len().saturating_sub(TREE_HEADER) / 16, fork.len().saturating_sub(4) / 16);
    require(count > 0 && count <= from.min(to), || "its log has a root that does not fit".into())?;
    fork[..4].copy_from_slice(&logged[4..8]);
    // Keys, then pointers, each behind the room for all of the ones before.
    for (from, to) in [(TREE_HEADER, 4), (TREE_HEADER + from * 8, 4 + to * 8)] {
        fork[to..to + count * 8].copy_from_slice(&logged[from..from + count * 8]);
    }
    Ok(())
}

impl<D: ReadAt> ReadAt for Replayed<D> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read_at(buf, offset)?;
        let near = offset.saturating_sub(MAX_BUFFER * BB)..offset + buf.len() as u64;
        for (at, bytes) in self.buffers.range(near.clone()).chain(self.inodes.range(near)) {
            lay_over(buf, offset, bytes, *at);
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.disk.name()
    }
}
