//! The master boot record and its chain of logical partitions (the layout is described in the UEFI
//! specification 2.10, section 5.2, and, for extended partitions, by common practice).

use super::field::le32;
use super::{Partition, PartitionType, Table, TableKind};
use crate::error::Result;
use crate::io::{ReadAt, read_array};

/// Most logical partitions followed; Linux itself stops at about a hundred.
const MAX_LOGICAL: u32 = 256;
/// The type byte of the entry that covers a GPT disk.
pub(super) const PROTECTIVE: u8 = 0xee;

/// One of the four entries of a boot record, in sectors.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    status: u8,
    pub(super) kind: u8,
    start: u32,
    sectors: u32,
}

/// The four entries of a boot record; `None` without its signature or when a status byte is impossible.
pub(super) fn entries(sector: &[u8; 512]) -> Option<[Entry; 4]> {
    let entry = |i: usize| {
        let raw = &sector[446 + 16 * i..462 + 16 * i];
        Entry { status: raw[0], kind: raw[4], start: le32(raw, 8), sectors: le32(raw, 12) }
    };
    let all = [entry(0), entry(1), entry(2), entry(3)];
    let plausible = sector[510..] == [0x55, 0xaa] && all.iter().all(|entry| entry.status & 0x7f == 0);
    plausible.then_some(all)
}

/// Reads the table whose first sector is `sector`; `None` when it is not a table or has no partition.
pub(super) fn read(disk: &dyn ReadAt, sector: &[u8; 512], sector_size: u32) -> Result<Option<Table>> {
    let Some(primary) = entries(sector) else { return Ok(None) };
    let filled = |entry: &Entry| entry.kind != 0 && entry.sectors != 0;
    // A file system's boot sector carries the same signature; its code rarely looks like four entries.
    if !primary.iter().any(filled) || super::content::has_boot_sector(sector) {
        return Ok(None);
    }
    let mut table = Table {
        kind: TableKind::Mbr,
        sector_size,
        id: format!("{:08x}", le32(sector, 440)),
        partitions: Vec::new(),
        findings: Vec::new(),
    };
    let mut extended = None;
    for (number, entry) in (1..).zip(primary).filter(|(_, entry)| filled(entry)) {
        let extent = table.place(number, entry.start.into(), entry.sectors.into(), disk.size());
        let kind = PartitionType::Mbr(entry.kind);
        if entry.start == 0 && !kind.is_extended() {
            table.find(Some(number), format!("partition {number} covers the partition table"));
        }
        if kind.is_extended() {
            match extended {
                None => extended = Some((number, entry)),
                Some((first, _)) => {
                    let what = format!("partition {number} is a second extended partition beside {first}");
                    table.find(Some(number), what);
                }
            }
        }
        table.partitions.push(partition(number, extent, &entry));
    }
    if let Some((number, entry)) = extended {
        read_chain(disk, &mut table, number, entry)?;
    }
    table.find_overlaps();
    Ok(Some(table))
}

fn partition(number: u32, extent: crate::unit::Extent, entry: &Entry) -> Partition {
    Partition {
        number,
        extent,
        kind: PartitionType::Mbr(entry.kind),
        name: None,
        bootable: entry.status == 0x80,
        guid: None,
    }
}

/// Follows the chain of boot records inside the extended partition. A broken link ends it with a finding: what
/// lies behind it belongs to no known partition and is copied whole.
fn read_chain(disk: &dyn ReadAt, table: &mut Table, container: u32, outer: Entry) -> Result<()> {
    let unit = u64::from(table.sector_size);
    let (first, end) = (u64::from(outer.start), u64::from(outer.start) + u64::from(outer.sectors));
    let mut at = first;
    let mut number = 5;
    let mut seen = std::collections::BTreeSet::new();
    loop {
        let broken = |why: &str| format!("the chain of logical partitions breaks at sector {at}: {why}");
        if !seen.insert(at) {
            table.find(Some(container), broken("it leads in a circle"));
            return Ok(());
        }
        if number >= 5 + MAX_LOGICAL {
            table.find(Some(container), broken("it is too long"));
            return Ok(());
        }
        if at >= end || (at + 1) * unit > disk.size() {
            table.find(Some(container), broken("it leaves the extended partition or the disk"));
            return Ok(());
        }
        let Some([logical, link, ..]) = entries(&read_array::<512>(disk, at * unit)?) else {
            // A new extended partition may hold no boot record at all.
            if at != first {
                table.find(Some(container), broken("there is no boot record"));
            }
            return Ok(());
        };
        if logical.kind != 0 && logical.sectors != 0 {
            let start = at + u64::from(logical.start);
            let extent = table.place(number, start, logical.sectors.into(), disk.size());
            if logical.start == 0 || start + u64::from(logical.sectors) > end {
                let what = format!("logical partition {number} leaves the extended partition");
                table.find(Some(number), what);
            }
            table.partitions.push(partition(number, extent, &logical));
            number += 1;
        }
        if link.kind == 0 || link.sectors == 0 {
            return Ok(());
        }
        at = first + u64::from(link.start);
    }
}
