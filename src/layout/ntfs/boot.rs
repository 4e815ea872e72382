//! The boot sector: its fields, and whether they are ones this code can be sure about.

use super::{Step, require};
use crate::layout::field::{bytes, has, le16, le32, le64};
use crate::layout::mbr::require_no_partitions;
use crate::unit::to_usize;

/// Bytes read of the volume's start.
pub(super) const LEN: u64 = 512;
/// Sizes a sector may have, and the largest cluster, in bytes.
const SECTORS: std::ops::RangeInclusive<u64> = 512..=4096;
const MAX_CLUSTER: u64 = 2 << 20;
/// Sizes of a record of the MFT, in bytes.
const RECORDS: std::ops::RangeInclusive<u64> = 512..=4096;

/// A boot sector's fields as far as the used map needs them.
#[derive(Clone, Debug)]
pub(super) struct BootSector {
    raw: [u8; 512],
    /// Bytes in a sector.
    sector_size: u64,
    /// Length in sectors, without the backup boot sector behind the last.
    sectors: u64,
    /// Bytes in a cluster; 0 when the field makes no sense.
    pub cluster_size: u64,
    /// Length in whole clusters.
    pub clusters: u64,
    /// First clusters of the MFT and of its mirror.
    pub mft: u64,
    pub mirror: u64,
    /// Bytes in a record of the MFT; 0 when the field makes no sense.
    pub record_size: u64,
    /// Serial number.
    pub serial: u64,
}

impl BootSector {
    /// Reads the boot sector at the start of a volume; `None` when it is none of NTFS.
    pub fn parse(head: &[u8]) -> Option<BootSector> {
        let raw: [u8; 512] = *head.first_chunk()?;
        if !has(&raw, 3, b"NTFS    ") {
            return None;
        }
        let sector_size = u64::from(le16(&raw, 11));
        let sectors = le64(&raw, 40);
        let [per_cluster] = bytes::<1>(&raw, 13);
        // More than 128 sectors are written as a negative exponent.
        let per_cluster = match per_cluster {
            0xf4.. => 1 << (256 - u64::from(per_cluster)),
            0..=0x80 => u64::from(per_cluster),
            _ => 0,
        };
        let cluster_size = sector_size * per_cluster;
        let [per_record] = bytes::<1>(&raw, 64);
        // A record may be shorter than a cluster; then its size is written in the same way.
        let record_size = match per_record {
            0xe1.. => 1 << (256 - u64::from(per_record)),
            0..=0x7f => u64::from(per_record) * cluster_size,
            _ => 0,
        };
        Some(BootSector {
            sector_size,
            sectors,
            cluster_size,
            clusters: sectors.checked_div(per_cluster).unwrap_or(0),
            mft: le64(&raw, 48),
            mirror: le64(&raw, 56),
            record_size,
            serial: le64(&raw, 72),
            raw,
        })
    }

    /// Checks that nothing in it is beyond what this code knows for sure, on a volume of `size` bytes.
    pub fn check(&self, size: u64) -> Step<()> {
        let lies = |holds: bool, field: &str, value: u64| {
            require(holds, || format!("the boot sector's {field} is {value}"))
        };
        require(has(&self.raw, 510, b"\x55\xaa"), || "the boot sector has no signature".into())?;
        require_no_partitions(&self.raw)?;
        // What only FAT has there: reserved sectors, number of FATs, root entries, lengths.
        let fat = self.raw.get(14..21).into_iter().chain(self.raw.get(22..24)).flatten();
        let none = fat.copied().all(|byte| byte == 0) && le32(&self.raw, 32) == 0;
        require(none, || "the boot sector has fields of FAT".into())?;
        lies(
            SECTORS.contains(&self.sector_size) && self.sector_size.is_power_of_two(),
            "sector size",
            self.sector_size,
        )?;
        let sound = (self.sector_size..=MAX_CLUSTER).contains(&self.cluster_size);
        lies(sound && self.cluster_size.is_power_of_two(), "cluster size", self.cluster_size)?;
        lies(
            RECORDS.contains(&self.record_size) && self.record_size.is_power_of_two(),
            "record size",
            self.record_size,
        )?;
        lies(
            self.sectors <= size / self.sector_size && self.clusters > 0,
            "number of sectors",
            self.sectors,
        )?;
        lies(self.mft < self.clusters, "first cluster of the MFT", self.mft)?;
        lies(self.mirror < self.clusters, "first cluster of the MFT's mirror", self.mirror)
    }

    /// Bytes in a record of the MFT.
    pub fn record_len(&self) -> usize {
        to_usize(self.record_size)
    }
}
