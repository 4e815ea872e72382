//! The superblock and its mirrors: their fields, and whether they are ones this code can be sure about.

use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::tree::{Pointer, owner};
use super::{BtrfsInfo, Step, require};
use crate::io::{ReadAt, read_vec};
use crate::layout::field::{bytes, has, le16, le32, le64, text};
use crate::unit::{Extent, to_usize};

/// Where the superblock and its mirrors lie on a device, as far as it reaches, and the length of each.
pub(super) const PLACES: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
pub(super) const LEN: u64 = 4096;
/// Bytes a checksum has room in, at the start of what it is of.
const CHECKSUM: usize = 32;
/// Sizes a sector may have; a tree block may not be larger either.
const MIN_SECTOR: u64 = 4096;
const MAX_SECTOR: u64 = 65_536;
/// Where the UUID lies, the features without which it cannot be read, and the UUID that tree blocks have instead of the
/// first where that feature is in force.
pub(super) const FSID: usize = 32;
pub(super) const INCOMPAT: usize = 188;
pub(super) const METADATA_FSID: usize = 571;
/// Where the item that describes the device lies, and the array of system chunks.
const DEVICE: usize = 201;
const ARRAY: usize = 811;
const MAX_ARRAY: u32 = 2048;

/// Feature bits and flags (Linux's `btrfs.h` and `btrfs_tree.h`).
pub(super) mod feature {
    /// The flag of every superblock that was written.
    pub const WRITTEN: u64 = 0x1;
    pub const ERROR: u64 = 0x4;
    /// free_space_tree and its validity, verity, block_group_tree.
    pub const KNOWN_RO: u64 = 0x1 | 0x2 | 0x4 | BLOCK_GROUP_TREE;
    pub const BLOCK_GROUP_TREE: u64 = 0x8;
    pub const METADATA_UUID: u64 = 0x400;
    /// mixed_backref, default_subvol, mixed_groups, compress_lzo, compress_zstd, big_metadata, extended_iref,
    /// skinny_metadata, no_holes, metadata_uuid, simple_quota.
    pub const KNOWN_INCOMPAT: u64 =
        0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | METADATA_UUID | 0x1_0000;
}
use feature as f;

/// The kind of a file system's checksums.
#[derive(Clone, Copy, Debug)]
enum Checksum {
    Crc32c,
    Sha256,
}

impl Checksum {
    fn of_type(number: u16) -> Option<Checksum> {
        match number {
            0 => Some(Checksum::Crc32c),
            2 => Some(Checksum::Sha256),
            _ => None,
        }
    }

    /// Its length in bytes.
    const fn len(self) -> usize {
        match self {
            Checksum::Crc32c => 4,
            Checksum::Sha256 => 32,
        }
    }

    /// The checksum of `data`.
    fn of(self, data: &[u8]) -> Vec<u8> {
        match self {
            Checksum::Crc32c => crc32c::crc32c(data).to_le_bytes().to_vec(),
            Checksum::Sha256 => Sha256::digest(data).to_vec(),
        }
    }

    /// Whether `sum` is the checksum of `data`.
    fn is_of(self, sum: &[u8], data: &[u8]) -> bool {
        self.of(data) == sum
    }
}

/// A superblock's fields as far as the used map needs them.
#[derive(Clone, Debug)]
pub(in crate::layout) struct Superblock {
    raw: Vec<u8>,
    /// The transaction it was written in.
    pub generation: u64,
    /// Bytes in a sector.
    pub sector_size: u64,
    /// Bytes in a tree block.
    pub node_size: u64,
    /// Bytes that the extent tree lists, each once however many copies there are.
    pub used: u64,
    /// Length of the device in bytes.
    pub device_size: u64,
}

impl Superblock {
    /// Reads the superblock of a volume, of whose start `head` holds at least 68 KiB or all; `None` when it has none.
    pub fn parse(head: &[u8]) -> Option<Superblock> {
        let raw = head.get(to_usize(PLACES[0])..to_usize(PLACES[0] + LEN))?;
        Self::of(raw)
    }

    pub(super) fn of(raw: &[u8]) -> Option<Superblock> {
        has(raw, 64, b"_BHRfS_M").then(|| Superblock {
            generation: le64(raw, 72),
            sector_size: le32(raw, 144).into(),
            node_size: le32(raw, 148).into(),
            used: le64(raw, 120),
            device_size: le64(raw, DEVICE + 8),
            raw: raw.to_vec(),
        })
    }

    /// What to tell a reader.
    pub fn info(&self) -> BtrfsInfo {
        BtrfsInfo {
            label: text(&bytes::<256>(&self.raw, 299)),
            uuid: Uuid::from_bytes(bytes(&self.raw, FSID)),
            sector_size: le32(&self.raw, 144),
            node_size: le32(&self.raw, 148),
            bytes: le64(&self.raw, 112),
            devices: le64(&self.raw, 136),
        }
    }

    fn incompat(&self) -> u64 {
        le64(&self.raw, INCOMPAT)
    }

    fn read_only(&self) -> u64 {
        le64(&self.raw, 180)
    }

    /// Whether block group items have a tree of their own.
    pub(super) fn has_group_tree(&self) -> bool {
        self.read_only() & f::BLOCK_GROUP_TREE != 0
    }

    /// The UUID in tree blocks.
    pub(super) fn tree_uuid(&self) -> [u8; 16] {
        bytes(&self.raw, if self.incompat() & f::METADATA_UUID != 0 { METADATA_FSID } else { FSID })
    }

    /// The item that describes the device: number, length and more, and UUIDs.
    pub(super) fn device(&self) -> [u8; 98] {
        bytes(&self.raw, DEVICE)
    }

    /// The array of keys and items of the chunks that hold the chunk tree.
    pub(super) fn system_chunks(&self) -> &[u8] {
        let len = to_usize(le32(&self.raw, 160).min(MAX_ARRAY).into());
        self.raw.get(ARRAY..ARRAY + len).unwrap_or_default()
    }

    /// The root of the tree of roots.
    pub(super) fn root(&self) -> Pointer {
        let [level] = bytes(&self.raw, 198);
        Pointer { address: le64(&self.raw, 80), generation: self.generation, level, owner: owner::ROOT }
    }

    /// The root of the chunk tree.
    pub(super) fn chunk_root(&self) -> Pointer {
        let [level] = bytes(&self.raw, 199);
        let generation = le64(&self.raw, 164);
        Pointer { address: le64(&self.raw, 88), generation, level, owner: owner::CHUNK }
    }

    /// The root of the tree of log trees, which the transaction after the superblock's writes; `None` when there is
    /// nothing to be replayed.
    pub(super) fn log_root(&self) -> Option<Pointer> {
        let [level] = bytes(&self.raw, 200);
        let address = le64(&self.raw, 96);
        let generation = self.generation.saturating_add(1);
        (address != 0).then_some(Pointer { address, generation, level, owner: owner::LOG })
    }

    /// The folder in the tree of roots that has names for subvolumes.
    pub(super) fn root_folder(&self) -> u64 {
        le64(&self.raw, 128)
    }

    fn checksum(&self) -> Option<Checksum> {
        Checksum::of_type(le16(&self.raw, 196))
    }

    /// Length of a checksum in bytes: 4 to 32.
    pub(super) fn sum_len(&self) -> usize {
        self.checksum().map_or(CHECKSUM, Checksum::len)
    }

    /// Whether `sum`, of [`Superblock::sum_len`] bytes, is the checksum of `data`.
    pub(super) fn is_sum_of(&self, sum: &[u8], data: &[u8]) -> bool {
        self.checksum().is_some_and(|checksum| checksum.is_of(sum, data))
    }

    /// The checksum that a structure begins with if it is intact; `None` if its kind is not known.
    pub(super) fn sum_of(&self, structure: &[u8]) -> Option<Vec<u8>> {
        Some(self.checksum()?.of(structure.get(CHECKSUM..)?))
    }

    /// Whether a structure begins with the checksum of what follows.
    pub(super) fn intact(&self, structure: &[u8]) -> bool {
        let parts = structure.split_at_checked(CHECKSUM);
        parts.is_some_and(|(sum, data)| self.is_sum_of(sum.get(..self.sum_len()).unwrap_or_default(), data))
    }

    /// Checks that nothing in it is beyond what this code knows for sure, on a volume of `size` bytes.
    pub(super) fn check(&self, size: u64) -> Step<()> {
        let kind = le16(&self.raw, 196);
        require(Checksum::of_type(kind).is_some(), || format!("checksums of type {kind} are not known"))?;
        require(self.intact(&self.raw), || "the superblock's checksum does not match".into())?;
        self.check_features()?;
        let lies = |holds: bool, field: &str, value: u64| {
            require(holds, || format!("the superblock's {field} is {value}"))
        };
        let raw = &self.raw;
        lies(le64(raw, 48) == PLACES[0], "own address", le64(raw, 48))?;
        let sizes = MIN_SECTOR..=MAX_SECTOR;
        let (sector, node) = (self.sector_size, self.node_size);
        lies(sizes.contains(&sector) && sector.is_power_of_two(), "sector size", sector)?;
        lies((sector..=MAX_SECTOR).contains(&node) && node.is_power_of_two(), "node size", node)?;
        lies(le32(raw, 160) <= MAX_ARRAY, "size of system chunks", le32(raw, 160).into())?;
        lies(self.device_size <= size, "device size", self.device_size)?;
        lies(self.used <= self.device_size, "count of used bytes", self.used)?;
        let own = bytes::<16>(raw, DEVICE + 82) == self.tree_uuid();
        require(own, || "its device belongs to another file system".into())
    }

    fn check_features(&self) -> Step<()> {
        let unknown =
            |word: &str, bits: u64| require(bits == 0, || format!("{word} features {bits:#x} are not known"));
        unknown("incompatible", self.incompat() & !f::KNOWN_INCOMPAT)?;
        unknown("read-only compatible", self.read_only() & !f::KNOWN_RO)?;
        unknown("compatible", le64(&self.raw, 172))?;
        let flags = le64(&self.raw, 56);
        require(flags & f::ERROR == 0, || "it is marked as having errors".into())?;
        require(flags == f::WRITTEN, || format!("the superblock's flags {flags:#x} are not known"))?;
        let devices = le64(&self.raw, 136);
        require(devices == 1, || format!("it has {devices} devices"))
    }

    /// Stops if a mirror is newer than this superblock: the kernel reads this one, but others the newest.
    pub(super) fn check_mirrors<D: ReadAt>(&self, disk: &D) -> Step<()> {
        for place in self.places().filter(|place| place.start != PLACES[0]) {
            let raw = read_vec(disk, place.start, to_usize(place.len()))?;
            let newer = Self::of(&raw).is_some_and(|mirror| {
                mirror.generation > self.generation && bytes::<16>(&raw, FSID) == bytes::<16>(&self.raw, FSID)
            });
            require(!newer, || format!("its superblock at byte {} is newer than the first", place.start))?;
        }
        Ok(())
    }

    /// Where the superblock and those of its mirrors are that lie on the device.
    pub(super) fn places(&self) -> impl Iterator<Item = Extent> + '_ {
        PLACES.iter().map(|place| Extent::at(*place, LEN)).filter(|place| place.end <= self.device_size)
    }
}
