//! The boot sector of FAT12, FAT16 and FAT32: its fields, and whether they are ones this code can be sure about.

use std::ops::RangeInclusive;

use super::map::Heap;
use super::table::Kind;
use super::{FatInfo, Step, require, serial};
use crate::io::{ReadAt, read_array};
use crate::layout::field::{bytes, has, le16, le32};
use crate::layout::mbr::require_no_partitions;

/// Largest cluster, in bytes.
const MAX_CLUSTER: u64 = 64 << 10;
/// The least number of clusters of a FAT16, and numbers so near that drivers do not agree which of the two it is: the
/// specification advises to avoid them.
const LEAST_FAT16: u64 = 4085;
const UNSURE: RangeInclusive<u64> = LEAST_FAT16 - 16..=LEAST_FAT16 + 16;
/// The state kept by Windows and Linux: it was not unmounted, and its surface is to be tested.
const DIRTY: u8 = 0x1 | 0x2;
/// In the flags of a FAT32: only one copy of the table is kept up to date, the one in the lowest bits.
const NOT_MIRRORED: u16 = 0x80;

/// A boot sector's fields as far as the used map needs them.
#[derive(Clone, Debug)]
pub(super) struct Bpb {
    raw: [u8; 512],
    /// Which of the three it is.
    pub kind: Kind,
    /// Bytes in a sector.
    sector: u64,
    /// Sectors in a cluster, before the first table, in a table, in a root directory outside the clusters, and in all.
    per_cluster: u64,
    reserved: u64,
    table_sectors: u64,
    root_sectors: u64,
    total: u64,
    /// Copies of the table.
    copies: u64,
    /// Number of clusters.
    clusters: u64,
}

impl Bpb {
    /// Reads the boot sector at the start of `head`; `None` when it is none.
    pub fn parse(head: &[u8]) -> Option<Bpb> {
        let raw = bytes::<512>(head, 0);
        let [jump] = bytes::<1>(&raw, 0);
        let [per_cluster] = bytes::<1>(&raw, 13);
        let [copies] = bytes::<1>(&raw, 16);
        let [media] = bytes::<1>(&raw, 21);
        let (sector, reserved) = (le16(&raw, 11), le16(&raw, 14));
        let plausible = has(&raw, 510, b"\x55\xaa")
            && (jump == 0xe9 || jump == 0xeb)
            && (512..=4096).contains(&sector)
            && sector.is_power_of_two()
            && per_cluster.is_power_of_two()
            && reserved > 0
            && (1..=2).contains(&copies)
            && (media == 0xf0 || media >= 0xf8);
        if !plausible {
            return None;
        }
        let either = |short: u16, long: u32| u64::from(if short != 0 { u32::from(short) } else { long });
        let short_table = le16(&raw, 22);
        let mut bpb = Bpb {
            kind: Kind::Fat32,
            sector: sector.into(),
            per_cluster: per_cluster.into(),
            reserved: reserved.into(),
            table_sectors: either(short_table, le32(&raw, 36)),
            root_sectors: (u64::from(le16(&raw, 17)) * 32).div_ceil(sector.into()),
            total: either(le16(&raw, 19), le32(&raw, 32)),
            copies: copies.into(),
            clusters: 0,
            raw,
        };
        bpb.clusters = bpb.total.checked_sub(bpb.heap_sector())? / bpb.per_cluster;
        // The specification goes by the number of clusters alone. Drivers tell FAT32 by its long count of sectors, and
        // small ones are made; the table's first entries show which it is.
        if short_table != 0 {
            bpb.kind = if bpb.clusters < LEAST_FAT16 { Kind::Fat12 } else { Kind::Fat16 };
        }
        Some(bpb)
    }

    /// What to tell a reader.
    pub fn info(&self, label: String) -> FatInfo {
        let fat32 = self.kind == Kind::Fat32;
        let [signature] = bytes::<1>(&self.raw, if fat32 { 66 } else { 38 });
        let number = le32(&self.raw, if fat32 { 67 } else { 39 });
        let has_serial = fat32 || matches!(signature, 0x28 | 0x29);
        FatInfo {
            version: self.kind.name(),
            label,
            serial: serial(number).filter(|_| has_serial),
            cluster_size: self.per_cluster * self.sector,
            clusters: self.clusters,
        }
    }

    /// The sector after the last table.
    fn root_sector(&self) -> u64 {
        self.reserved + self.copies * self.table_sectors
    }

    /// The sector of the first cluster.
    fn heap_sector(&self) -> u64 {
        self.root_sector() + self.root_sectors
    }

    /// The media byte, which the tables begin with.
    pub fn media(&self) -> u8 {
        let [media] = bytes(&self.raw, 21);
        media
    }

    /// Where the clusters lie.
    pub fn heap(&self) -> Heap {
        Heap {
            start: self.heap_sector() * self.sector,
            cluster: self.per_cluster * self.sector,
            count: self.clusters,
        }
    }

    /// Where the copies of the table begin, in bytes; the one to be read alone first.
    pub fn tables(&self) -> Vec<u64> {
        let mut starts: Vec<u64> =
            (0..self.copies).map(|i| (self.reserved + i * self.table_sectors) * self.sector).collect();
        let active = usize::from(self.active()).min(starts.len().saturating_sub(1));
        starts.swap(0, active);
        starts
    }

    fn active(&self) -> u16 {
        let flags = le16(&self.raw, 40);
        if self.kind == Kind::Fat32 && flags & NOT_MIRRORED != 0 { flags & 0xf } else { 0 }
    }

    /// Where the last table ends, and the root directory of a FAT12 or FAT16 begins, in bytes.
    pub fn tables_end(&self) -> u64 {
        self.root_sector() * self.sector
    }

    /// Length of the root directory of a FAT12 or FAT16, in bytes: at most 2 MiB.
    pub fn root_len(&self) -> u64 {
        self.root_sectors * self.sector
    }

    /// The first cluster of the root directory of a FAT32.
    pub fn root_cluster(&self) -> u64 {
        u64::from(le32(&self.raw, 44))
    }

    /// Checks that the volume of `size` bytes can be laid out as the boot sector says.
    pub fn check_layout(&self, size: u64) -> Step<()> {
        let lies = |holds: bool, field: &str, value: u64| {
            require(holds, || format!("the boot sector's {field} is {value}"))
        };
        let (short, long) = (u32::from(le16(&self.raw, 19)), le32(&self.raw, 32));
        lies(self.per_cluster * self.sector <= MAX_CLUSTER, "cluster size", self.per_cluster * self.sector)?;
        lies(short == 0 || long == 0 || short == long, "second sector count", long.into())?;
        lies(self.total <= size / self.sector, "sector count", self.total)?;
        lies((1..=self.kind.most_clusters()).contains(&self.clusters), "cluster count", self.clusters)?;
        let needed = ((self.clusters + 2) * self.kind.bits()).div_ceil(8);
        // One that is much too long is of more clusters: their size is not what the boot sector says. Programs that make
        // file systems may fill it up to whole clusters.
        let most = (needed * 3).div_ceil(2 * self.sector) + self.per_cluster;
        let room = needed.div_ceil(self.sector)..=most;
        lies(room.contains(&self.table_sectors), "table size", self.table_sectors)?;
        let root_entries = u64::from(le16(&self.raw, 17));
        let wants_root = self.kind != Kind::Fat32;
        lies(
            (root_entries > 0) == wants_root && root_entries * 32 == self.root_len(),
            "root directory's size",
            root_entries,
        )?;
        if self.kind == Kind::Fat32 {
            lies(u64::from(self.active()) < self.copies, "active table", self.active().into())?;
            return lies(le16(&self.raw, 42) == 0, "version", le16(&self.raw, 42).into());
        }
        lies(!UNSURE.contains(&self.clusters), "cluster count, near a limit,", self.clusters)
    }

    /// Checks that nothing else contradicts the boot sector of `disk`, and that it was unmounted.
    pub fn check_state(&self, disk: &dyn ReadAt) -> Step<()> {
        require_no_partitions(&self.raw)?;
        let [state] = bytes::<1>(&self.raw, if self.kind == Kind::Fat32 { 65 } else { 37 });
        require(state & DIRTY == 0, || "it was not unmounted, or is to be checked".into())?;
        let backup = u64::from(le16(&self.raw, 50));
        if self.kind != Kind::Fat32 || !(1..self.reserved).contains(&backup) {
            return Ok(());
        }
        let copy = read_array::<512>(disk, backup * self.sector)?;
        let differs =
            [11..24, 32..40, 42..48].into_iter().any(|part| copy.get(part.clone()) != self.raw.get(part));
        // Not every program that makes a FAT32 fills the place it names.
        require(!has(&copy, 510, b"\x55\xaa") || !differs, || "its boot sector and the backup differ".into())
    }
}
