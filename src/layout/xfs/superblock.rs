//! The superblock: its fields, and whether they are ones this code can be sure about.

use uuid::Uuid;

use super::{Step, XfsInfo, intact, require};
use crate::layout::field::{be16, be32, be64, bytes, has, text};
use crate::unit::{Extent, to_usize};

/// Largest sector a superblock may take, in bytes.
pub(super) const MAX_SECTOR: u64 = 32 << 10;
/// Largest allocation group and largest log, in bytes.
const MAX_AG: u64 = 1 << 40;
const MAX_LOG: u64 = 1 << 31;
/// Where the version word is, the counters begin, the words of features, and the checksum.
const VERSION: usize = 100;
const ICOUNT: usize = 128;
const FEATURES: usize = 200;
const CRC: usize = 224;

/// Feature bits ("XFS Filesystem Structure", "Superblocks"; the newer ones by Linux's `xfs_format.h`).
mod feature {
    /// In the version word: an abandoned feature that no kernel mounts.
    pub const SHARED: u16 = 0x200;
    /// In the version word: there are extended attributes, and quotas.
    pub const ATTRIBUTES: u16 = 0x10;
    pub const QUOTAS: u16 = 0x40;
    /// Version 4's second word: lazy_sb_count, attr2, projid32, crc, ftype.
    pub const KNOWN_2: u32 = 0x2 | 0x8 | 0x80 | 0x100 | 0x200;
    /// finobt, rmapbt, reflink, inobt_cnt.
    pub const KNOWN_RO: u32 = 0x1 | 0x2 | 0x4 | 0x8;
    pub const META_UUID: u32 = 0x4;
    pub const NEEDS_REPAIR: u32 = 0x10;
    /// ftype, sparse inodes, meta_uuid, bigtime, nrext64, exchange_range, parent.
    pub const KNOWN_INCOMPAT: u32 = 0x1 | 0x2 | META_UUID | 0x8 | 0x20 | 0x40 | 0x80;
    /// log incompatible: extended attributes logged as intents.
    pub const KNOWN_LOG: u32 = 0x1;
}
use feature as f;

/// A superblock's fields as far as the used map needs them.
#[derive(Clone, Debug)]
pub(in crate::layout) struct Superblock {
    raw: Vec<u8>,
    /// Format version.
    pub version: u8,
    /// Bytes in a block.
    pub block_size: u64,
    /// Bytes in a sector, the unit of the headers.
    pub sector_size: u64,
    /// Length in blocks.
    pub blocks: u64,
    /// Blocks in an allocation group.
    pub ag_blocks: u64,
    /// Number of allocation groups.
    pub ag_count: u64,
    /// Free blocks, by a count that is exact after a clean unmount.
    pub free_blocks: u64,
    /// The internal log, in blocks.
    pub log: Extent,
    /// The UUID in metadata and in the log.
    pub uuid: [u8; 16],
}

impl Superblock {
    /// Reads the superblock at the start of a volume, of which `head` holds 32 KiB or all; `None` when it is none.
    pub fn parse(head: &[u8]) -> Option<Superblock> {
        if !has(head, 0, b"XFSB") {
            return None;
        }
        let sector_size = u64::from(be16(head, 102));
        let raw = head.get(..to_usize(sector_size.clamp(512, MAX_SECTOR)))?.to_vec();
        let version = bytes::<1>(&raw, 101)[0] & 0xf;
        let uuid_at = if version == 5 && be32(&raw, 216) & f::META_UUID != 0 { 248 } else { 32 };
        let ag_blocks = u64::from(be32(&raw, 84));
        let [ag_log] = bytes::<1>(&raw, 124);
        // An address in the file system has the allocation group above, the block in it below.
        let address = be64(&raw, 48);
        let ag = address.checked_shr(ag_log.into()).unwrap_or(0);
        let in_ag = address - ag.checked_shl(ag_log.into()).unwrap_or(0).min(address);
        let log_start = ag.saturating_mul(ag_blocks).saturating_add(in_ag);
        Some(Superblock {
            version,
            block_size: be32(&raw, 4).into(),
            sector_size,
            blocks: be64(&raw, 8),
            ag_blocks,
            ag_count: be32(&raw, 88).into(),
            free_blocks: be64(&raw, 144),
            log: Extent::at(log_start, be32(&raw, 96).into()),
            uuid: bytes(&raw, uuid_at),
            raw,
        })
    }

    /// What to tell a reader.
    pub fn info(&self) -> XfsInfo {
        XfsInfo {
            version: self.version,
            label: text(&bytes::<12>(&self.raw, 108)),
            uuid: Uuid::from_bytes(bytes(&self.raw, 32)),
            block_size: be32(&self.raw, 4),
            blocks: self.blocks,
            ag_count: be32(&self.raw, 88),
        }
    }

    /// Its sector.
    pub(super) fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Whether it says the same of how the file system is laid out as `other`: all but counters, times, checksum, and that
    /// there are attributes or quotas, which a system says once it has the first.
    pub(super) fn has_layout_of(&self, other: &Superblock) -> bool {
        let word = |sb: &Superblock| be16(&sb.raw, VERSION) | f::ATTRIBUTES | f::QUOTAS;
        let same = [0..VERSION, VERSION + 2..ICOUNT, FEATURES..CRC, 248..264].into_iter().all(|range| {
            let part = self.raw.get(range.clone());
            part.is_some() && part == other.raw.get(range)
        });
        same && word(self) == word(other)
    }

    /// Whether metadata carries checksums, its own address and the file system's UUID.
    pub(super) fn checksums(&self) -> bool {
        self.version == 5
    }

    /// Bytes from the start of an allocation group that its headers take.
    pub(super) fn header_blocks(&self) -> u64 {
        (4 * self.sector_size).div_ceil(self.block_size)
    }

    /// The blocks of allocation group `ag`; the last may be short.
    pub(super) fn ag(&self, ag: u64) -> Extent {
        let start = ag * self.ag_blocks;
        Extent::new(start, self.blocks.min(start + self.ag_blocks))
    }

    /// The UUID a reader knows, which the log carries as well.
    pub(super) fn user_uuid(&self) -> [u8; 16] {
        bytes(&self.raw, 32)
    }

    /// Checks that nothing in it is beyond what this code knows for sure, on a volume of `size` bytes.
    pub(super) fn check(&self, size: u64) -> Step<()> {
        self.check_readable(size)?;
        if self.checksums() {
            unknown("read-only compatible", be32(&self.raw, 212) & !f::KNOWN_RO)?;
            unknown("compatible", be32(&self.raw, 208))?;
            unknown("log incompatible", be32(&self.raw, 220) & !f::KNOWN_LOG)?;
        }
        require(be64(&self.raw, 16) == 0 && be64(&self.raw, 24) == 0, || "it has a realtime device".into())?;
        require(!self.has_external_log(), || "its log is on another device".into())?;
        lies(self.free_blocks <= self.blocks, "free block count", self.free_blocks)?;
        self.check_log()
    }

    /// Checks that nothing in it keeps its files from being read, on a volume of `size` bytes: a kernel that does not
    /// know the other features still mounts it read-only.
    pub(super) fn check_readable(&self, size: u64) -> Step<()> {
        require(matches!(self.version, 4 | 5), || format!("version {} is not known", self.version))?;
        self.check_sizes()?;
        if self.checksums() {
            require(intact(&self.raw, CRC), || "the superblock's checksum does not match".into())?;
        }
        self.check_features()?;
        let [in_progress] = bytes::<1>(&self.raw, 126);
        require(in_progress == 0, || "its making or copying was never finished".into())?;
        self.check_geometry(size)
    }

    /// Whether the log is on a device of its own.
    pub(super) fn has_external_log(&self) -> bool {
        be64(&self.raw, 48) == 0
    }

    fn check_features(&self) -> Step<()> {
        require(be16(&self.raw, 100) & f::SHARED == 0, || "it has the feature shared".into())?;
        if !self.checksums() {
            // A second copy of the word lies where some old kernels put it, and counts as well.
            return unknown("version 4", (be32(&self.raw, 200) | be32(&self.raw, 204)) & !f::KNOWN_2);
        }
        let incompat = be32(&self.raw, 216);
        require(incompat & f::NEEDS_REPAIR == 0, || "it is marked as needing repair".into())?;
        unknown("incompatible", incompat & !f::KNOWN_INCOMPAT)
    }

    /// A size in bytes at `at` and its exponent at `log_at`, which must agree.
    fn check_size(&self, field: &str, size: u64, log_at: usize, most: u64) -> Step<()> {
        let [log] = bytes::<1>(&self.raw, log_at);
        require((512..=most).contains(&size) && 1_u64.checked_shl(log.into()) == Some(size), || {
            format!("the superblock's {field} size is {size} and its exponent {log}")
        })
    }

    fn check_sizes(&self) -> Step<()> {
        self.check_size("block", self.block_size, 120, 65_536)?;
        self.check_size("sector", self.sector_size, 121, MAX_SECTOR.min(self.block_size))
    }

    fn check_geometry(&self, size: u64) -> Step<()> {
        lies(self.blocks <= size / self.block_size, "block count", self.blocks)?;
        lies(
            (64..=MAX_AG / self.block_size).contains(&self.ag_blocks),
            "allocation group size",
            self.ag_blocks,
        )?;
        let [ag_log] = bytes::<1>(&self.raw, 124);
        lies(
            u64::from(ag_log) == u64::from((self.ag_blocks - 1).ilog2() + 1),
            "allocation group size exponent",
            ag_log.into(),
        )?;
        lies(
            self.ag_count == self.blocks.div_ceil(self.ag_blocks) && self.ag_count > 0,
            "allocation group count",
            self.ag_count,
        )?;
        lies(self.ag(self.ag_count - 1).len() >= 64, "block count", self.blocks)
    }

    /// Checks that the log lies where one can.
    pub(super) fn check_log(&self) -> Step<()> {
        let own = self.ag(self.log.start / self.ag_blocks);
        let room = Extent::new(own.start + self.header_blocks(), own.end);
        lies(
            self.log.start < self.blocks
                && room.contains(self.log)
                && !self.log.is_empty()
                && self.log.len() <= MAX_LOG / self.block_size,
            "log's place",
            self.log.start,
        )
    }
}

fn unknown(word: &str, bits: u32) -> Step<()> {
    require(bits == 0, || format!("{word} features {bits:#x} are not known"))
}

fn lies(holds: bool, field: &str, value: u64) -> Step<()> {
    require(holds, || format!("the superblock's {field} is {value}"))
}
