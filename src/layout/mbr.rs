//! The master boot record and its chain of logical partitions (the layout is described in the UEFI
//! specification 2.10, section 5.2, and, for extended partitions, by common practice).

use super::field::le32;
use super::{Partition, PartitionType, Step, Table, TableKind, require};
use crate::error::Result;
use crate::io::{ReadAt, WriteAt, read_array};
use crate::unit::{Extent, to_usize};

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

impl Entry {
    /// Whether it lists a partition.
    fn is_filled(&self) -> bool {
        self.kind != 0 && self.sectors != 0
    }
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

/// Stops when a file system's boot sector lists partitions as well: which of the two is in use cannot be told. Programs
/// that make a file system on a whole disk may put an entry there that begins with the boot sector itself, which is none.
pub(super) fn require_no_partitions(sector: &[u8; 512]) -> Step<()> {
    let is_partition = |entry: &Entry| entry.is_filled() && entry.start != 0;
    require(!entries(sector).is_some_and(|entries| entries.iter().any(is_partition)), || {
        "its boot sector is also a table of partitions".into()
    })
}

/// Reads the table whose first sector is `sector`; `None` when it is not a table or has no partition.
pub(super) fn read(disk: &dyn ReadAt, sector: &[u8; 512], sector_size: u32) -> Result<Option<Table>> {
    let Some(primary) = entries(sector) else { return Ok(None) };
    // A file system's boot sector carries the same signature; its code rarely looks like four entries.
    if !primary.iter().any(Entry::is_filled) || super::content::has_boot_sector(sector) {
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
    for (number, entry) in (1..).zip(primary).filter(|(_, entry)| entry.is_filled()) {
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

/// The first of the four entries that is empty, from 1.
pub(super) fn free_entry(table: &Table) -> Option<u32> {
    (1..=4).find(|number| table.partitions.iter().all(|part| part.number != *number))
}

/// Puts a partition into a free entry of `table`; its number, or `None` when there is none, or its numbers are too large.
pub(super) fn add(
    disk: &dyn ReadAt,
    out: &dyn WriteAt,
    table: &Table,
    extent: Extent,
    kind: u8,
) -> Result<Option<u32>> {
    let unit = u64::from(table.sector_size);
    let (Ok(start), Ok(sectors)) = (u32::try_from(extent.start / unit), u32::try_from(extent.len() / unit))
    else {
        return Ok(None);
    };
    let Some(number) = free_entry(table) else { return Ok(None) };
    let mut sector = read_array::<512>(disk, 0)?;
    let entry = &mut sector[430 + 16 * to_usize(number.into())..][..16];
    // Cylinders, heads and sectors that say "look at the sector numbers".
    entry[..8].copy_from_slice(&[0, 0xfe, 0xff, 0xff, kind, 0xfe, 0xff, 0xff]);
    entry[8..12].copy_from_slice(&start.to_le_bytes());
    entry[12..].copy_from_slice(&sectors.to_le_bytes());
    out.write_at(&sector, 0)?;
    Ok(Some(number))
}

fn partition(number: u32, extent: Extent, entry: &Entry) -> Partition {
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
        if logical.is_filled() {
            let start = at + u64::from(logical.start);
            let extent = table.place(number, start, logical.sectors.into(), disk.size());
            if logical.start == 0 || start + u64::from(logical.sectors) > end {
                let what = format!("logical partition {number} leaves the extended partition");
                table.find(Some(number), what);
            }
            table.partitions.push(partition(number, extent, &logical));
            number += 1;
        }
        if !link.is_filled() {
            return Ok(());
        }
        at = first + u64::from(link.start);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::io::WriteAt;
    use crate::io::fake::MemoryDisk;
    use crate::layout::{PartitionType, Table, TableKind, read_table};
    use crate::unit::Extent;

    const SECTORS: u32 = 100_000;

    fn put(disk: &MemoryDisk, sector: u32, entries: &[(u8, u32, u32)]) {
        let mut bytes = [0; 512];
        for (i, (kind, start, sectors)) in entries.iter().enumerate() {
            let entry = &mut bytes[446 + 16 * i..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..].copy_from_slice(&sectors.to_le_bytes());
        }
        bytes[510..].copy_from_slice(&[0x55, 0xaa]);
        disk.write_at(&bytes, u64::from(sector) * 512).unwrap();
    }

    /// A disk with a primary partition and an extended one that holds logical ones of these lengths.
    fn disk(primary: u32, logical: &[u32]) -> (MemoryDisk, Vec<(u32, Extent)>) {
        let disk = MemoryDisk::sparse(u64::from(SECTORS) * 512);
        let extended = 1 + primary;
        let inside: u32 = logical.iter().map(|sectors| sectors + 1).sum();
        put(&disk, 0, &[(0x83, 1, primary), (0x0f, extended, inside)]);
        let extent = |start: u32, len: u32| Extent::at(u64::from(start) * 512, u64::from(len) * 512);
        let mut made = vec![(1, extent(1, primary)), (2, extent(extended, inside))];
        let mut at = extended;
        for (i, sectors) in (0..).zip(logical) {
            let next = at + 1 + sectors;
            let last = i as usize + 1 == logical.len();
            let link = if last { (0, 0, 0) } else { (0x05, next - extended, 1) };
            put(&disk, at, &[(0x83, 1, *sectors), link]);
            made.push((5 + i, extent(at + 1, *sectors)));
            at = next;
        }
        (disk, made)
    }

    fn extents(table: &Table) -> Vec<(u32, Extent)> {
        table.partitions.iter().map(|part| (part.number, part.extent)).collect()
    }

    proptest! {
        #[test]
        fn chains_read_back(primary in 1..5000_u32, logical in prop::collection::vec(1..2000_u32, 1..40)) {
            let (disk, made) = disk(primary, &logical);
            let table = read_table(&disk).unwrap().unwrap();
            prop_assert_eq!((table.kind, &table.findings), (TableKind::Mbr, &vec![]));
            prop_assert_eq!(extents(&table), made);
            prop_assert_eq!(table.partitions[1].kind, PartitionType::Mbr(0x0f));
        }

        #[test]
        fn lies_are_found_and_partitions_stay_on_the_disk(
            entries in prop::collection::vec((any::<u8>(), any::<u32>(), any::<u32>()), 4),
            chain in prop::collection::vec((0..64_u32, any::<u8>(), 0..64_u32, 0..64_u32), 0..8),
        ) {
            let disk = MemoryDisk::sparse(u64::from(SECTORS) * 512);
            for (sector, kind, start, sectors) in chain {
                put(&disk, sector, &[(kind, start, sectors), (5, sectors, 1)]);
            }
            put(&disk, 0, &entries);
            if let Ok(Some(table)) = read_table(&disk) {
                for part in &table.partitions {
                    prop_assert!(part.extent.end <= u64::from(SECTORS) * 512);
                }
                let sound = table.partitions.iter().filter(|part| {
                    !part.kind.is_extended() && table.doubt(part.number).is_none()
                });
                let mut sound: Vec<Extent> = sound.map(|part| part.extent).collect();
                sound.sort_unstable();
                prop_assert!(sound.windows(2).all(|pair| pair[0].end <= pair[1].start), "{:?}", table);
            }
        }
    }

    #[test]
    fn a_circular_chain_ends_with_a_finding() {
        let (disk, _) = disk(10, &[10, 10, 10]);
        put(&disk, 11 + 11, &[(0x83, 1, 10), (0x05, 11, 1)]);
        let table = read_table(&disk).unwrap().unwrap();
        assert_eq!(table.partitions.len(), 4);
        assert!(table.findings[0].what.contains("circle"), "{:?}", table.findings);
    }

    #[test]
    fn a_boot_sector_is_not_a_table() {
        let disk = MemoryDisk::sparse(1 << 20);
        put(&disk, 0, &[]);
        assert_eq!(read_table(&disk).unwrap(), None);
        put(&disk, 0, &[(7, 0x2072_6573, 0x6f6c_6c65)]);
        disk.write_at(b"\xeb\x52\x90NTFS    ", 0).unwrap();
        assert_eq!(read_table(&disk).unwrap(), None);
    }
}
