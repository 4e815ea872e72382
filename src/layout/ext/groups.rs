//! Block groups: where their descriptors and fixed metadata lie, and what the descriptors say.

use std::collections::BTreeMap;

use crc_fast::{CrcAlgorithm, Digest};

use super::superblock::feature as f;
use super::{Step, Superblock, require};
use crate::io::{ReadAt, read_vec};
use crate::layout::field::{crc32c_raw, le16, le32};
use crate::unit::{Extent, ExtentMap, to_usize};

/// Bytes of descriptors read at a time.
const READ: u64 = 1 << 20;

/// Where the journal holds a newer copy of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logged {
    /// The block of the file system that is part of the journal and holds the copy.
    pub block: u64,
    /// Whether the copy's first four bytes stand for the journal's magic number.
    pub escaped: bool,
}

/// Newer copies in the journal, by the block they replace.
pub(super) type Overlay = BTreeMap<u64, Logged>;

/// What a group's descriptor says, as far as the used map needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// The block with its block bitmap.
    pub bitmap: u64,
    /// Checksum of the block bitmap; the upper half is 0 in descriptors of 32 bytes.
    pub checksum: u32,
    /// Number of free blocks.
    pub free: u32,
    /// The bitmap was never written: only fixed metadata is in use.
    pub uninit: bool,
}

/// A file system that passed [`Superblock::check`], and the disk it is on.
pub(super) struct Fs<D> {
    pub disk: D,
    pub sb: Superblock,
}

impl<D: ReadAt> Fs<D> {
    /// The blocks of group `group`; the last group may be short.
    pub fn group_extent(&self, group: u64) -> Extent {
        let start = self.sb.first_block + group * self.sb.group_blocks;
        Extent::new(start, self.sb.blocks.min(start + self.sb.group_blocks))
    }

    /// Reads `count` blocks from `first`, those in `overlay` from the journal.
    pub fn read(&self, overlay: Option<&Overlay>, first: u64, count: u64) -> crate::error::Result<Vec<u8>> {
        let size = self.sb.block_size;
        let mut bytes = read_vec(&self.disk, first * size, to_usize(count * size))?;
        for (block, logged) in overlay.into_iter().flat_map(|overlay| overlay.range(first..first + count)) {
            let at = to_usize((block - first) * size);
            self.copy(*logged, &mut bytes[at..at + to_usize(size)])?;
        }
        Ok(bytes)
    }

    /// Reads the journal's copy of a block.
    pub fn copy(&self, logged: Logged, block: &mut [u8]) -> crate::error::Result<()> {
        self.disk.read_at(block, logged.block * self.sb.block_size)?;
        if logged.escaped {
            block[..4].copy_from_slice(&super::journal::MAGIC.to_be_bytes());
        }
        Ok(())
    }

    pub fn per_block(&self) -> u64 {
        self.sb.block_size / self.sb.descriptor_size
    }

    pub fn descriptor_blocks(&self) -> u64 {
        self.sb.groups().div_ceil(self.per_block())
    }

    /// Whether descriptor block `index` lies in the meta group it describes.
    pub fn in_meta_group(&self, index: u64) -> bool {
        self.sb.incompat(f::META_BG) && index >= self.sb.first_meta_bg
    }

    /// Where descriptor block `index` lies.
    pub fn descriptor_block(&self, index: u64) -> u64 {
        if !self.in_meta_group(index) {
            return self.sb.first_block + 1 + index;
        }
        let group = index * self.per_block();
        self.group_extent(group).start + u64::from(self.sb.has_backup(group))
    }

    /// The superblock's and the descriptors' blocks at the start of a group, reserved ones included.
    pub fn fixed(&self, group: u64) -> Extent {
        let backup = u64::from(self.sb.has_backup(group));
        let index = group / self.per_block();
        let len = if self.in_meta_group(index) {
            let place = group % self.per_block();
            backup + u64::from(place <= 1 || place == self.per_block() - 1)
        } else if backup == 1 {
            let old =
                if self.sb.incompat(f::META_BG) { self.sb.first_meta_bg } else { self.descriptor_blocks() };
            1 + old + self.sb.reserved_gdt
        } else {
            0
        };
        Extent::at(self.group_extent(group).start, len)
    }

    /// The raw descriptor of one group, as it is on the disk.
    pub fn descriptor(&self, group: u64) -> Step<Vec<u8>> {
        let index = group / self.per_block();
        let block = self.read(None, self.descriptor_block(index), 1)?;
        let size = to_usize(self.sb.descriptor_size);
        let at = to_usize(group % self.per_block()) * size;
        Ok(block[at..at + size].to_vec())
    }

    /// A block number whose halves are at `low` and `high`.
    pub fn block_number(&self, descriptor: &[u8], low: usize, high: usize) -> u64 {
        let high = if descriptor.len() >= 64 { le32(descriptor, high) } else { 0 };
        u64::from(high) << 32 | u64::from(le32(descriptor, low))
    }

    /// Reads one descriptor: the group, and the blocks its block bitmap, inode bitmap and inode table take.
    pub fn parse(&self, group: u64, raw: &[u8]) -> Step<(Group, [Extent; 3])> {
        let wide = raw.len() >= 64;
        let wrong = |what: &str| format!("the descriptor of block group {group} {what}");
        if self.sb.has_group_checksums() {
            let sum = self.descriptor_checksum(group, raw);
            require(sum == le16(raw, 0x1e), || wrong("has a checksum that does not match"))?;
        }
        let bitmap = self.block_number(raw, 0x0, 0x20);
        let meta = [
            Extent::at(bitmap, 1),
            Extent::at(self.block_number(raw, 0x4, 0x24), 1),
            Extent::at(self.block_number(raw, 0x8, 0x28), self.sb.inode_table_blocks()),
        ];
        let own = self.group_extent(group);
        let bounds = if self.sb.incompat(f::FLEX_BG) {
            Extent::new(self.sb.first_block + 1, self.sb.blocks)
        } else {
            own
        };
        require(meta.iter().all(|part| bounds.contains(*part)), || {
            wrong("places its metadata outside the file system or group")
        })?;
        let high = |at| if wide { u32::from(le16(raw, at)) << 16 } else { 0 };
        let free = high(0x2c) | u32::from(le16(raw, 0xc));
        require(u64::from(free) <= own.len(), || wrong(&format!("counts {free} free blocks")))?;
        let group = Group {
            bitmap,
            checksum: high(0x38) | u32::from(le16(raw, 0x18)),
            free,
            // Without descriptor checksums the flags mean nothing.
            uninit: self.sb.has_group_checksums() && le16(raw, 0x12) & 2 != 0,
        };
        Ok((group, meta))
    }

    fn descriptor_checksum(&self, group: u64, raw: &[u8]) -> u16 {
        let number = group.to_le_bytes();
        let low16 = |sum: u64| u16::from_le_bytes([sum.to_le_bytes()[0], sum.to_le_bytes()[1]]);
        if self.sb.ro_compat(f::METADATA_CSUM) {
            let sum = crc32c_raw(self.sb.seed, &number[..4]);
            let sum = crc32c_raw(crc32c_raw(sum, &raw[..0x1e]), &[0, 0]);
            return low16(crc32c_raw(sum, &raw[0x20..]).into());
        }
        // The kernel's crc16 starting from !0 is the one known as CRC-16/MODBUS.
        let mut digest = Digest::new(CrcAlgorithm::Crc16Modbus);
        digest.update(&self.sb.uuid);
        digest.update(&number[..4]);
        digest.update(&raw[..0x1e]);
        digest.update(&raw[0x20..]);
        low16(digest.finalize())
    }

    /// Whether `bits`, the block bitmap of `group`, is the one its descriptor means.
    pub fn bitmap_matches(&self, group: &Group, bits: &[u8]) -> bool {
        let sum = crc32c_raw(self.sb.seed, bits);
        let mask = if self.sb.descriptor_size >= 64 { !0 } else { 0xffff };
        !self.sb.ro_compat(f::METADATA_CSUM) || sum & mask == group.checksum
    }

    /// Gives the raw descriptor of every group, the copies in `overlay` before those on the disk, to `each` in order.
    pub fn each_descriptor(
        &self,
        overlay: Option<&Overlay>,
        mut each: impl FnMut(u64, &[u8]) -> Step<()>,
    ) -> Step<()> {
        require(self.sb.first_meta_bg <= self.descriptor_blocks(), || {
            format!("the superblock's first meta group is {}", self.sb.first_meta_bg)
        })?;
        let total = self.sb.groups();
        let mut number = 0;
        let mut index = 0;
        while index < self.descriptor_blocks() {
            let first = self.descriptor_block(index);
            let most = (READ / self.sb.block_size).min(self.descriptor_blocks() - index);
            let run =
                (1..most).take_while(|i| self.descriptor_block(index + i) == first + i).count() as u64 + 1;
            require(first + run <= self.sb.blocks, || {
                "the group descriptors lie beyond the end of the file system".into()
            })?;
            let bytes = self.read(overlay, first, run)?;
            for raw in bytes.chunks_exact(to_usize(self.sb.descriptor_size)) {
                if number == total {
                    break;
                }
                each(number, raw)?;
                number += 1;
            }
            index += run;
        }
        Ok(())
    }

    /// Reads every group, and where all metadata lies, in blocks.
    pub fn groups(&self) -> Step<(Vec<Group>, Metadata)> {
        let total = self.sb.groups();
        let mut groups = Vec::with_capacity(to_usize(total));
        let mut places = Places::default();
        let mut bitmaps = Places::default();
        places.push(Extent::new(self.sb.first_block, self.sb.first_block + 1));
        self.each_descriptor(None, |number, raw| {
            let (group, meta) = self.parse(number, raw)?;
            groups.push(group);
            bitmaps.push(meta[0]);
            meta.into_iter().for_each(|part| places.push(part));
            // The superblock's own block is in already.
            let fixed = self.fixed(number);
            let fixed = if number == 0 { Extent::new(fixed.start + 1, fixed.end) } else { fixed };
            places.push(fixed);
            Ok(())
        })?;
        let wanted = places.total;
        let all = places.into_map();
        require(all.bytes() == wanted, || "two block groups claim the same metadata block".into())?;
        require(all.iter().next_back().is_none_or(|last| last.end <= self.sb.blocks), || {
            "metadata lies beyond the end of the file system".into()
        })?;
        Ok((groups, Metadata { all, bitmaps: bitmaps.into_map() }))
    }

    /// The groups whose descriptors differ after the journal's replay, as they are then.
    pub fn replayed_groups(
        &self,
        overlay: &Overlay,
        before: &[Group],
        meta: &Metadata,
    ) -> Step<BTreeMap<usize, Group>> {
        let mut changed = BTreeMap::new();
        for index in 0..self.descriptor_blocks() {
            let block = self.descriptor_block(index);
            if !overlay.contains_key(&block) {
                continue;
            }
            let bytes = self.read(Some(overlay), block, 1)?;
            let first = to_usize(index * self.per_block());
            for (i, raw) in bytes.chunks_exact(to_usize(self.sb.descriptor_size)).enumerate() {
                let Some(old) = before.get(first + i) else { break };
                let (new, places) = self.parse((first + i) as u64, raw)?;
                require(
                    new.bitmap == old.bitmap && places.iter().all(|part| meta.all.covers(*part)),
                    || format!("the journal moves the metadata of block group {}", first + i),
                )?;
                if new != *old {
                    changed.insert(first + i, new);
                }
            }
        }
        Ok(changed)
    }

    /// The blocks whose newer copies in the journal matter for the used map.
    pub fn matters(&self, meta: &Metadata) -> ExtentMap {
        let mut blocks: Vec<Extent> = (0..self.descriptor_blocks())
            .map(|index| Extent::at(self.descriptor_block(index), 1))
            .chain(meta.bitmaps.iter())
            .chain([Extent::at(self.sb.own_block(), 1)])
            .collect();
        blocks.sort_unstable();
        blocks.into_iter().collect()
    }
}

/// Where metadata lies, in blocks.
pub(super) struct Metadata {
    /// Superblocks, descriptors, bitmaps and inode tables of every group.
    pub all: ExtentMap,
    /// Block bitmaps alone.
    pub bitmaps: ExtentMap,
}

/// Extents in any order, on their way to become a map without quadratic insertion.
#[derive(Default)]
struct Places {
    runs: Vec<Extent>,
    total: u64,
}

impl Places {
    fn push(&mut self, extent: Extent) {
        self.total += extent.len();
        if !extent.is_empty() {
            self.runs.push(extent);
        }
    }

    fn into_map(mut self) -> ExtentMap {
        self.runs.sort_unstable();
        self.runs.into_iter().collect()
    }
}
