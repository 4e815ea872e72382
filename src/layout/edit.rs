//! Adds a partition to a table that is there: for a boot loader, in a gap between what the table has.

use uuid::Uuid;

use super::{PartitionType, Table, TableKind, gpt, mbr};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, WriteAt};
use crate::unit::Extent;

/// What new partitions begin at a multiple of, in bytes.
const ALIGN: u64 = 4096;
/// Bytes at the start of a disk with an MBR that stay a BIOS boot loader's: GRUB's needs a fourth of it.
const LOADER: u64 = 256 << 10;
/// Bytes at both ends of a disk with a GPT that are the table's: headers, and 16 KiB of entries.
const GPT_ENDS: u64 = 24 << 10;

/// A partition to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPartition {
    /// Where, in bytes: whole sectors.
    pub extent: Extent,
    /// What for, as its table says it.
    pub kind: PartitionType,
    /// Its own GUID, in a GPT.
    pub guid: Uuid,
}

/// The best gap of the disk for a partition of at least `least` bytes and at most `most`: the first that has room for all of
/// it, else the largest one. Why there is none, otherwise.
pub fn room(table: &Table, disk_size: u64, least: u64, most: u64) -> std::result::Result<Extent, String> {
    if let Some(finding) = table.findings.first() {
        return Err(format!("its partition table is in doubt: {}", finding.what));
    }
    let usable = match table.kind {
        TableKind::Mbr if mbr::free_entry(table).is_none() => {
            return Err("all four entries of its partition table are taken".into());
        }
        // Sector numbers have 32 bits.
        TableKind::Mbr => Extent::new(LOADER, disk_size.min(u64::from(u32::MAX) * 512)),
        TableKind::Gpt => Extent::new(GPT_ENDS, disk_size.saturating_sub(GPT_ENDS)),
    };
    let mut gaps = Vec::new();
    let mut at = usable.start;
    let mut order: Vec<Extent> = table.partitions.iter().map(|part| part.extent).collect();
    order.sort_unstable();
    for part in order.into_iter().chain([Extent::new(usable.end, usable.end)]) {
        let (start, end) = (at.next_multiple_of(ALIGN), part.start.min(usable.end) / ALIGN * ALIGN);
        if start < end && end - start >= least {
            gaps.push(Extent::at(start, (end - start).min(most)));
        }
        at = at.max(part.end);
    }
    // The first of the largest.
    let largest = gaps.iter().map(|gap| gap.len()).max();
    let best = gaps.into_iter().find(|gap| Some(gap.len()) == largest);
    best.ok_or_else(|| format!("no gap between its partitions has {} KiB", least >> 10))
}

/// Adds `new` to the table of `disk`, all copies of it, by `out`, which writes the same disk; returns its number. The table
/// must be free of findings.
pub fn add_partition(disk: &dyn ReadAt, out: &dyn WriteAt, new: &NewPartition) -> Result<u32> {
    let failed = |why: &str| {
        Error::new(Kind::Image, "table.add", format!("{}: cannot add a partition", disk.name()))
            .because(why)
            .fact("disk", disk.name())
    };
    let table = super::read_table(disk)?.ok_or_else(|| failed("there is no partition table"))?;
    if let Some(finding) = table.findings.first() {
        return Err(failed(&finding.what));
    }
    if table.partitions.iter().any(|part| !part.extent.intersect(new.extent).is_empty()) {
        return Err(failed("another partition is there"));
    }
    let number = match (table.kind, new.kind) {
        (TableKind::Mbr, PartitionType::Mbr(kind)) => mbr::add(disk, out, &table, new.extent, kind),
        (TableKind::Gpt, PartitionType::Gpt(kind)) => gpt::add(disk, out, new, kind),
        _ => return Err(failed("it is meant for another kind of table")),
    }?;
    number.ok_or_else(|| failed("it has no entry left, or no room for it there"))
}
