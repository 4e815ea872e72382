//! What is on a disk: partition tables, what each partition holds, and which bytes are in use. Pure over
//! [`ReadAt`]; everything doubtful counts as used.

mod batch;
mod btrfs;
mod content;
mod edit;
mod ext;
mod fat;
mod field;
mod files;
mod gpt;
mod lvm;
mod mbr;
mod md;
mod owners;
mod ntfs;
mod swap;
mod used;
mod xfs;

use uuid::Uuid;

use crate::error::{Error, Result, Retry};
use crate::io::{ReadAt, Window};
use crate::unit::Extent;

pub use btrfs::{BtrfsAlias, BtrfsFiles, BtrfsInfo};
pub use content::{Content, identify};
pub use edit::{NewPartition, add_partition, room};
pub use ext::{ExtInfo, Replayed};
pub use fat::{ExfatInfo, FatInfo, fat_files, fat_folder};
pub use files::{FileId, FileInfo, FileKind, Files};
pub use lvm::{Found, LogicalVolume, PvInfo, logical_volumes};
pub use md::{Mirror, mirrors};
pub use ntfs::NtfsInfo;
pub use owners::{Owner, Part, VolumeOwners, owners};
pub use swap::SwapInfo;
pub use used::{Usage, UsedMap, Volume, count_used, used_map};
pub use xfs::{XfsInfo, xfs_files};

/// Why a file system's map cannot be used.
#[derive(Debug)]
enum Stop {
    /// It is copied whole, for this reason.
    Whole(String),
    /// The disk failed in a way that may pass: the caller must know, or two runs would disagree.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        match error.retry() {
            Retry::Yes => Stop::Failed(error),
            Retry::No => Stop::Whole(format!("{}: {}", error.what(), error.why())),
        }
    }
}

impl From<String> for Stop {
    fn from(reason: String) -> Self {
        Stop::Whole(reason)
    }
}

type Step<T> = std::result::Result<T, Stop>;

/// Stops unless `holds`, for the reason `why`.
fn require(holds: bool, why: impl FnOnce() -> String) -> Step<()> {
    if holds { Ok(()) } else { Err(Stop::Whole(why())) }
}

/// The kind of a partition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// The PC's master boot record, with its chain of logical partitions.
    Mbr,
    /// The GUID partition table of the UEFI specification.
    Gpt,
}

/// What the table says a partition is for; its content may be something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionType {
    /// The type byte of an MBR entry.
    Mbr(u8),
    /// The type GUID of a GPT entry.
    Gpt(Uuid),
}

impl PartitionType {
    /// Whether this is an extended partition: a container of logical ones, with no content of its own.
    pub const fn is_extended(self) -> bool {
        matches!(self, PartitionType::Mbr(0x05 | 0x0f | 0x85))
    }
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number as Linux counts: the slot from 1; logical partitions from 5.
    pub number: u32,
    /// Where it lies on the disk, in bytes; cut off at the disk's end (then a finding says so).
    pub extent: Extent,
    /// What the table says it is for.
    pub kind: PartitionType,
    /// Its GPT name.
    pub name: Option<String>,
    /// The MBR's active flag, or the GPT's legacy BIOS bootable attribute.
    pub bootable: bool,
    /// Its own GUID (GPT only).
    pub guid: Option<Uuid>,
}

/// Something about a table that is not as it should be. The copy is made all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The partition it makes doubtful, which is then copied whole; none when it is about the table.
    pub partition: Option<u32>,
    /// What is wrong.
    pub what: String,
}

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Which kind.
    pub kind: TableKind,
    /// The unit its block addresses count in: 512 or 4096 bytes.
    pub sector_size: u32,
    /// The disk's identifier: the MBR signature as eight hexadecimal digits, or the disk's GUID.
    pub id: String,
    /// The partitions in the order of their numbers, extended ones included.
    pub partitions: Vec<Partition>,
    /// What is wrong with it.
    pub findings: Vec<Finding>,
}

impl Table {
    /// Why the content of partition `number` cannot be trusted, if it cannot.
    pub fn doubt(&self, number: u32) -> Option<&str> {
        self.findings.iter().find(|finding| finding.partition == Some(number)).map(|finding| &*finding.what)
    }

    fn find(&mut self, partition: Option<u32>, what: impl Into<String>) {
        self.findings.push(Finding { partition, what: what.into() });
    }

    /// Adds a finding for every partition that shares bytes with another, extended ones left out.
    fn find_overlaps(&mut self) {
        let mut order: Vec<(Extent, u32)> = self
            .partitions
            .iter()
            .filter(|part| !part.kind.is_extended())
            .map(|part| (part.extent, part.number))
            .collect();
        order.sort_unstable();
        let mut widest: Option<(Extent, u32)> = None;
        for (extent, number) in order {
            if let Some((other, first)) = widest
                && !other.intersect(extent).is_empty()
            {
                self.find(Some(number), format!("partition {number} overlaps partition {first}"));
                self.find(Some(first), format!("partition {first} overlaps partition {number}"));
            }
            if widest.is_none_or(|(other, _)| other.end < extent.end) {
                widest = Some((extent, number));
            }
        }
    }

    /// The extent of `sectors` sectors at `start`, cut off at the end of the disk, with a finding when it was.
    fn place(&mut self, number: u32, start: u64, sectors: u64, disk_size: u64) -> Extent {
        let unit = u64::from(self.sector_size);
        let asked = Extent::at(start.saturating_mul(unit), sectors.saturating_mul(unit));
        if asked.end > disk_size {
            let what = format!(
                "partition {number} ends at byte {}, beyond the end of the disk at {disk_size}",
                asked.end
            );
            self.find(Some(number), what);
        }
        Extent::new(asked.start.min(disk_size), asked.end.min(disk_size))
    }
}

/// Reads the partition table of a whole disk; `None` when there is none. A GPT is preferred over the protective
/// or hybrid MBR before it, its backup is used when the primary is damaged.
///
/// Fails with `Kind::Image` when there is a table but no intact copy of it, and as the disk fails.
pub fn read_table(disk: &dyn ReadAt) -> Result<Option<Table>> {
    if disk.size() < 1024 {
        return Ok(None);
    }
    let sector = crate::io::read_array::<512>(disk, 0)?;
    if let Some(table) = gpt::read(disk, &sector)? {
        return Ok(Some(table));
    }
    let Some(mut table) = mbr::read(disk, &sector, 512)? else { return Ok(None) };
    // An MBR does not say how large a sector is. If its entries make sense in sectors of 4096 bytes as well,
    // the partitions' contents decide; if they cannot, nothing of them is trusted.
    if let Some(mut large) = mbr::read(disk, &sector, 4096)?
        && large.findings.is_empty()
        && recognised(disk, &large)?
    {
        if !recognised(disk, &table)? {
            return Ok(Some(large));
        }
        for part in &mut large.partitions {
            table.find(Some(part.number), "the sector size may be 512 or 4096 bytes: contents fit both");
        }
    }
    Ok(Some(table))
}

/// Whether any partition holds something known.
fn recognised(disk: &dyn ReadAt, table: &Table) -> Result<bool> {
    for part in table.partitions.iter().filter(|part| !part.kind.is_extended()) {
        let content = identify(&Window::new(disk, part.extent, "partition"))?;
        if !matches!(content, Content::Empty | Content::Unknown) {
            return Ok(true);
        }
    }
    Ok(false)
}
