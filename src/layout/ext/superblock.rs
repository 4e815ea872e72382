//! The superblock: its fields, and whether they are ones this code can be sure about.

use uuid::Uuid;

use super::{ExtInfo, Step, require};
use crate::layout::field::{bytes, crc32c_raw, has, le16, le32, le64, text};

/// Where the superblock lies in its file system, in bytes.
pub(super) const OFFSET: usize = 1024;
/// Its length in bytes.
pub(super) const LEN: usize = 1024;

/// Feature bits (Documentation/filesystems/ext4/super.rst).
pub(super) mod feature {
    pub const HAS_JOURNAL: u32 = 0x4;
    pub const SPARSE_SUPER2: u32 = 0x200;
    pub const ORPHAN_FILE: u32 = 0x1000;
    /// dir_prealloc, imagic, has_journal, ext_attr, resize_inode, dir_index, sparse_super2, fast_commit,
    /// stable_inodes, orphan_file.
    pub const KNOWN_COMPAT: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x200 | 0x400 | 0x800 | 0x1000;

    pub const RECOVER: u32 = 0x4;
    pub const JOURNAL_DEV: u32 = 0x8;
    pub const META_BG: u32 = 0x10;
    pub const BIT64: u32 = 0x80;
    pub const MMP: u32 = 0x100;
    pub const FLEX_BG: u32 = 0x200;
    pub const CSUM_SEED: u32 = 0x2000;
    /// filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, inline_data,
    /// encrypt, casefold.
    pub const KNOWN_INCOMPAT: u32 =
        0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000;
    /// filetype, recover, meta_bg: what ext3 may have.
    pub const EXT3_INCOMPAT: u32 = 0x2 | 0x4 | 0x10;

    pub const SPARSE_SUPER: u32 = 0x1;
    pub const GDT_CSUM: u32 = 0x10;
    pub const QUOTA: u32 = 0x100;
    pub const BIGALLOC: u32 = 0x200;
    pub const METADATA_CSUM: u32 = 0x400;
    /// sparse_super, large_file, btree_dir, huge_file, gdt_csum, dir_nlink, extra_isize, quota, metadata_csum,
    /// project, verity, orphan_present.
    pub const KNOWN_RO: u32 =
        0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x400 | 0x2000 | 0x8000 | 0x10000;
    /// sparse_super, large_file, btree_dir: what ext3 may have.
    pub const EXT3_RO: u32 = 0x1 | 0x2 | 0x4;
}
use feature as f;

/// A superblock's fields as far as the used map needs them.
#[derive(Clone, Debug)]
pub(in crate::layout) struct Superblock {
    raw: Vec<u8>,
    /// Length in blocks.
    pub blocks: u64,
    /// Bytes in a block.
    pub block_size: u64,
    /// The first block a bitmap describes: 1 when blocks have 1 KiB, else 0.
    pub first_block: u64,
    /// Blocks in a group.
    pub group_blocks: u64,
    /// Inodes in a group.
    pub group_inodes: u64,
    /// Bytes in an inode.
    pub inode_size: u64,
    /// Bytes in a group descriptor.
    pub descriptor_size: u64,
    /// Blocks kept free behind the group descriptors.
    pub reserved_gdt: u64,
    /// The first descriptor block placed by meta_bg.
    pub first_meta_bg: u64,
    /// The two groups with a backup superblock under sparse_super2.
    pub backups: [u64; 2],
    /// Inode of the journal, 0 for none.
    pub journal_inode: u32,
    /// Start value of every metadata_csum checksum.
    pub seed: u32,
    /// UUID.
    pub uuid: [u8; 16],
    compat: u32,
    incompat: u32,
    ro_compat: u32,
}

impl Superblock {
    /// Reads the superblock from the first 2 KiB of a volume; `None` when it does not look like one.
    pub fn parse(head: &[u8]) -> Option<Superblock> {
        Self::from_raw(head.get(OFFSET..OFFSET + LEN)?)
    }

    /// The superblock in the block that holds it, of a file system whose blocks have `block_size` bytes.
    pub(super) fn in_block(block: &[u8], block_size: u64) -> Option<Superblock> {
        let at = if block_size == 1024 { 0 } else { OFFSET };
        Self::from_raw(block.get(at..at + LEN)?)
    }

    fn from_raw(raw: &[u8]) -> Option<Superblock> {
        let log_block_size = le32(raw, 0x18);
        let revision = le32(raw, 0x4c);
        let plausible = has(raw, 0x38, &[0x53, 0xef])
            && log_block_size <= 6
            && revision <= 1
            && le32(raw, 0x4) > 0
            && le32(raw, 0x20) > 0
            && le32(raw, 0x28) > 0;
        if !plausible {
            return None;
        }
        // The original revision has none of the fields from 0x54 on.
        let dynamic = |at| if revision == 0 { 0 } else { le32(raw, at) };
        let [compat, incompat, ro_compat] = [dynamic(0x5c), dynamic(0x60), dynamic(0x64)];
        let big = incompat & f::BIT64 != 0;
        let uuid = bytes(raw, 0x68);
        let high = |at| if big { u64::from(le32(raw, at)) << 32 } else { 0 };
        Some(Superblock {
            blocks: u64::from(le32(raw, 0x4)) | high(0x150),
            block_size: 1024 << log_block_size,
            first_block: le32(raw, 0x14).into(),
            group_blocks: le32(raw, 0x20).into(),
            group_inodes: le32(raw, 0x28).into(),
            inode_size: if revision == 0 { 128 } else { le16(raw, 0x58).into() },
            descriptor_size: if big { le16(raw, 0xfe).into() } else { 32 },
            reserved_gdt: if revision == 0 { 0 } else { le16(raw, 0xce).into() },
            first_meta_bg: dynamic(0x104).into(),
            backups: [dynamic(0x24c).into(), dynamic(0x250).into()],
            journal_inode: dynamic(0xe0),
            seed: if incompat & f::CSUM_SEED != 0 { le32(raw, 0x270) } else { crc32c_raw(!0, &uuid) },
            uuid,
            compat,
            incompat,
            ro_compat,
            raw: raw.to_vec(),
        })
    }

    /// What to tell a reader.
    pub fn info(&self) -> ExtInfo {
        let ext4 = self.incompat & !f::EXT3_INCOMPAT != 0 || self.ro_compat & !f::EXT3_RO != 0;
        ExtInfo {
            version: match (ext4, self.compat(f::HAS_JOURNAL)) {
                _ if self.incompat(f::JOURNAL_DEV) => "ext journal device",
                (true, _) => "ext4",
                (false, true) => "ext3",
                (false, false) => "ext2",
            },
            label: text(&bytes::<16>(&self.raw, 0x78)),
            uuid: Uuid::from_bytes(self.uuid),
            block_size: 1024 << le32(&self.raw, 0x18),
            blocks: self.blocks,
            needs_recovery: self.incompat(f::RECOVER),
            features: [self.compat, self.incompat, self.ro_compat],
        }
    }

    pub(super) fn compat(&self, bit: u32) -> bool {
        self.compat & bit != 0
    }

    pub(super) fn incompat(&self, bit: u32) -> bool {
        self.incompat & bit != 0
    }

    pub(super) fn ro_compat(&self, bit: u32) -> bool {
        self.ro_compat & bit != 0
    }

    /// Whether group descriptors carry checksums and their flags mean something.
    pub(super) fn has_group_checksums(&self) -> bool {
        self.ro_compat(f::METADATA_CSUM | f::GDT_CSUM)
    }

    /// Number of block groups.
    pub(super) fn groups(&self) -> u64 {
        (self.blocks - self.first_block).div_ceil(self.group_blocks)
    }

    /// Blocks in one group's inode table.
    pub(super) fn inode_table_blocks(&self) -> u64 {
        (self.group_inodes * self.inode_size).div_ceil(self.block_size)
    }

    /// The block with the superblock itself.
    pub(super) fn own_block(&self) -> u64 {
        OFFSET as u64 / self.block_size
    }

    /// Checks that nothing in it is beyond what this code knows for sure, on a volume of `size` bytes.
    pub(super) fn check(&self, size: u64) -> Step<()> {
        self.check_shape(size)?;
        let state = le16(&self.raw, 0x3a);
        require(state & 2 == 0, || "it is marked as having errors".into())?;
        require(self.compat(f::HAS_JOURNAL) || state & 1 != 0, || {
            "it was not unmounted cleanly and has no journal".into()
        })?;
        require(!self.incompat(f::RECOVER) || self.compat(f::HAS_JOURNAL), || {
            "it needs recovery but has no journal".into()
        })?;
        require(!self.compat(f::HAS_JOURNAL) || self.journal_inode != 0, || {
            "its journal is on another device".into()
        })
    }

    /// The part of [`Superblock::check`] that says whether its structures can be read at all, whatever state they
    /// are in.
    pub(super) fn check_shape(&self, size: u64) -> Step<()> {
        let unknown =
            |word: &str, bits: u32| require(bits == 0, || format!("{word} features {bits:#x} are not known"));
        require(!self.ro_compat(f::BIGALLOC), || "it allocates in clusters (bigalloc)".into())?;
        unknown("incompatible", self.incompat & !f::KNOWN_INCOMPAT)?;
        unknown("read-only compatible", self.ro_compat & !f::KNOWN_RO)?;
        unknown("compatible", self.compat & !f::KNOWN_COMPAT)?;
        if self.ro_compat(f::METADATA_CSUM) {
            let [kind] = bytes::<1>(&self.raw, 0x175);
            require(kind == 1, || format!("its checksum type {kind} is not known"))?;
            let sum = crc32c_raw(!0, &self.raw[..0x3fc]);
            require(sum == le32(&self.raw, 0x3fc), || "the superblock's checksum does not match".into())?;
        }
        self.check_geometry(size)
    }

    fn check_geometry(&self, size: u64) -> Step<()> {
        let lies = |holds: bool, field: &str, value: u64| {
            require(holds, || format!("the superblock's {field} is {value}"))
        };
        let bits = 8 * self.block_size;
        lies(
            le32(&self.raw, 0x1c) == le32(&self.raw, 0x18),
            "cluster size exponent",
            le32(&self.raw, 0x1c).into(),
        )?;
        lies(self.first_block == u64::from(self.block_size == 1024), "first data block", self.first_block)?;
        lies(
            (256..=bits).contains(&self.group_blocks) && self.group_blocks.is_multiple_of(8),
            "blocks per group",
            self.group_blocks,
        )?;
        lies(
            u64::from(le32(&self.raw, 0x24)) == self.group_blocks,
            "clusters per group",
            le32(&self.raw, 0x24).into(),
        )?;
        lies((1..=bits).contains(&self.group_inodes), "inodes per group", self.group_inodes)?;
        lies(
            (128..=self.block_size).contains(&self.inode_size) && self.inode_size.is_power_of_two(),
            "inode size",
            self.inode_size,
        )?;
        let smallest = if self.incompat(f::BIT64) { 64 } else { 32 };
        lies(
            (smallest..=1024).contains(&self.descriptor_size) && self.descriptor_size.is_power_of_two(),
            "group descriptor size",
            self.descriptor_size,
        )?;
        lies(
            self.reserved_gdt <= self.block_size / 4,
            "number of reserved descriptor blocks",
            self.reserved_gdt,
        )?;
        lies(
            self.blocks > self.first_block && self.blocks <= size / self.block_size,
            "block count",
            self.blocks,
        )?;
        let inodes = u64::from(le32(&self.raw, 0));
        lies(self.groups().checked_mul(self.group_inodes) == Some(inodes), "inode count", inodes)
    }

    /// What the inode `number` is for, when it is one of the file system's own.
    pub(super) fn special_inode(&self, number: u32) -> Option<&'static str> {
        let is = |named: u32| named != 0 && named == number;
        Some(match number {
            1 => "bad blocks",
            7 => "resize inode",
            _ if self.compat(f::HAS_JOURNAL) && is(self.journal_inode) => "journal",
            _ if self.ro_compat(f::QUOTA) && is(le32(&self.raw, 0x240)) => "user quota",
            _ if self.ro_compat(f::QUOTA) && is(le32(&self.raw, 0x244)) => "group quota",
            _ if self.ro_compat(f::QUOTA) && is(le32(&self.raw, 0x26c)) => "project quota",
            _ if self.compat(f::ORPHAN_FILE) && is(le32(&self.raw, 0x280)) => "orphan file",
            _ => return None,
        })
    }

    /// The block of multiple mount protection.
    pub(super) fn mmp_block(&self) -> Option<u64> {
        self.incompat(f::MMP).then(|| le64(&self.raw, 0x168))
    }

    /// Everything that decides where metadata lies and how it is checked: two superblocks of one file system
    /// that differ in it are not the same file system any more.
    pub(super) fn shape(&self) -> impl PartialEq + use<> {
        let layout = [
            self.blocks,
            self.block_size,
            self.group_blocks,
            self.group_inodes,
            self.inode_size,
            self.descriptor_size,
            self.reserved_gdt,
            self.first_meta_bg,
            self.backups[0],
            self.backups[1],
        ];
        let features = [
            self.compat & (f::SPARSE_SUPER2 | f::HAS_JOURNAL),
            self.incompat & (f::META_BG | f::BIT64 | f::FLEX_BG | f::CSUM_SEED),
            self.ro_compat & (f::SPARSE_SUPER | f::GDT_CSUM | f::METADATA_CSUM),
            self.seed,
            self.journal_inode,
        ];
        (layout, features, self.uuid)
    }

    /// Whether `group` holds a copy of the superblock.
    pub(super) fn has_backup(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat(f::SPARSE_SUPER2) {
            return self.backups.contains(&group);
        }
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        group == 1 || !self.ro_compat(f::SPARSE_SUPER) || [3, 5, 7].into_iter().any(power_of)
    }
}
