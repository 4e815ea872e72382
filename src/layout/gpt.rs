//! The GUID partition table (UEFI specification 2.10, section 5.3).

use uuid::Uuid;

use super::field::{bytes, has, le32, le64};
use super::mbr::{self, PROTECTIVE};
use super::{NewPartition, Partition, PartitionType, Table, TableKind};
use crate::error::{Error, Kind, Result, Retry};
use crate::io::{ReadAt, WriteAt, is_zero, read_vec};
use crate::unit::{Extent, to_usize};

const SIGNATURE: &[u8] = b"EFI PART";
/// Largest entry array read, in bytes; the usual one has 16 KiB.
const MAX_ARRAY: u64 = 256 << 10;

/// An intact header and its entries.
struct Copy {
    sector_size: u64,
    /// The other copy's sector.
    alternate: u64,
    usable: Extent,
    disk_guid: Uuid,
    array: Vec<u8>,
    entry_size: usize,
}

/// Reads the table of a disk whose first sector is `sector`; `None` when neither copy nor a protective MBR is
/// there.
pub(super) fn read(disk: &dyn ReadAt, sector: &[u8; 512]) -> Result<Option<Table>> {
    let entries = mbr::entries(sector);
    let protected = entries.is_some_and(|all| all.iter().any(|entry| entry.kind == PROTECTIVE));
    let mut damage = None;
    for unit in [512, 4096] {
        match read_copy(disk, unit, 1) {
            Ok(Some(copy)) => {
                let mut table = partitions(disk, &copy);
                if !protected {
                    table.find(None, "there is no protective MBR before the GPT");
                }
                if entries
                    .is_some_and(|all| all.iter().any(|entry| entry.kind != 0 && entry.kind != PROTECTIVE))
                {
                    table.find(None, "a hybrid MBR lists partitions beside the GPT: the GPT is used");
                }
                check_backup(disk, &copy, &mut table)?;
                return Ok(Some(table));
            }
            Ok(None) => {}
            Err(error) if error.retry() == Retry::Yes => return Err(error),
            Err(error) => damage = Some(error),
        }
    }
    // Without a sign of the primary a backup at the end may be left over from an earlier use of the disk.
    if damage.is_none() && !protected {
        return Ok(None);
    }
    for unit in [512, 4096] {
        if let Ok(Some(copy)) = read_copy(disk, unit, (disk.size() / unit).saturating_sub(1)) {
            let mut table = partitions(disk, &copy);
            let why = damage.map_or("its signature is gone".into(), |error| error.why());
            table.find(None, format!("the primary GPT is damaged ({why}): the backup is used"));
            return Ok(Some(table));
        }
    }
    let error =
        Error::new(Kind::Image, "gpt.damaged", format!("{}: cannot read the partition table", disk.name()))
            .because("neither the primary GPT nor its backup at the end of the disk is intact")
            .remedy("mend it with sgdisk or gdisk; without it the disk can only be copied whole")
            .fact("disk", disk.name());
    Err(match damage {
        Some(damage) => error.caused_by(damage),
        None => error,
    })
}

fn check_backup(disk: &dyn ReadAt, primary: &Copy, table: &mut Table) -> Result<()> {
    let last = (disk.size() / primary.sector_size).saturating_sub(1);
    if primary.alternate != last {
        let what = format!("the backup GPT is at sector {}, the disk ends at {last}", primary.alternate);
        table.find(None, what);
    }
    match read_copy(disk, primary.sector_size, primary.alternate) {
        Ok(Some(backup)) if backup.array == primary.array => {}
        Ok(Some(_)) => table.find(None, "the backup GPT lists other partitions: the primary is used"),
        Ok(None) => table.find(None, "the backup GPT is missing"),
        Err(error) if error.retry() == Retry::Yes => return Err(error),
        Err(error) => table.find(None, format!("the backup GPT is damaged ({})", error.why())),
    }
    Ok(())
}

/// Reads and checks the copy whose header is at sector `at`: `None` when its signature is not there.
fn read_copy(disk: &dyn ReadAt, unit: u64, at: u64) -> Result<Option<Copy>> {
    let Some(offset) = at.checked_mul(unit).filter(|offset| offset.saturating_add(unit) <= disk.size())
    else {
        return Ok(None);
    };
    let mut header = read_vec(disk, offset, to_usize(unit))?;
    if !has(&header, 0, SIGNATURE) {
        return Ok(None);
    }
    let lies = |field: &str, value: u64| {
        Error::new(
            Kind::Image,
            "gpt.field",
            format!("{}: the GPT header at {offset} is damaged", disk.name()),
        )
        .because(format!("its {field} is {value}"))
        .fact("offset", offset)
    };
    let header_size = le32(&header, 12);
    if u64::from(header_size) > unit || header_size < 92 {
        return Err(lies("header size", header_size.into()));
    }
    let crc = le32(&header, 16);
    header[16..20].fill(0);
    if crc32fast::hash(&header[..to_usize(header_size.into())]) != crc {
        return Err(lies("checksum does not match: it", crc.into()));
    }
    if le64(&header, 24) != at {
        return Err(lies("own sector", le64(&header, 24)));
    }
    let (count, entry_size) = (u64::from(le32(&header, 80)), u64::from(le32(&header, 84)));
    if !(128..=4096).contains(&entry_size) || !entry_size.is_power_of_two() {
        return Err(lies("entry size", entry_size));
    }
    if count * entry_size > MAX_ARRAY {
        return Err(lies("number of entries", count));
    }
    let array_sector = le64(&header, 72);
    let Some(array_at) = array_sector.checked_mul(unit) else {
        return Err(lies("entry array's sector", array_sector));
    };
    if array_at.saturating_add(count * entry_size) > disk.size() {
        return Err(lies("entry array's sector", array_sector));
    }
    let array = read_vec(disk, array_at, to_usize(count * entry_size))?;
    if crc32fast::hash(&array) != le32(&header, 88) {
        return Err(lies("entry array's checksum does not match: it", le32(&header, 88).into()));
    }
    let after_last = le64(&header, 48).saturating_add(1);
    Ok(Some(Copy {
        sector_size: unit,
        alternate: le64(&header, 32),
        usable: Extent::new(le64(&header, 40).saturating_mul(unit), after_last.saturating_mul(unit)),
        disk_guid: Uuid::from_bytes_le(bytes(&header, 56)),
        array,
        entry_size: to_usize(entry_size),
    }))
}

/// Puts a partition into a free entry of both copies, which are intact and alike; its number, or `None` when there is none,
/// or the table itself is where it should go.
pub(super) fn add(
    disk: &dyn ReadAt,
    out: &dyn WriteAt,
    new: &NewPartition,
    kind: Uuid,
) -> Result<Option<u32>> {
    let mut primary = None;
    for unit in [512, 4096] {
        primary = primary.or(read_copy(disk, unit, 1)?);
    }
    let Some(copy) = primary else { return Ok(None) };
    let (unit, size) = (copy.sector_size, copy.entry_size);
    let free = (0..).zip(copy.array.chunks_exact(size)).find(|(_, entry)| is_zero(&entry[..16]));
    let Some((slot, _)) = free else { return Ok(None) };
    let mut array = copy.array;
    let entry = &mut array[to_usize(slot) * size..][..size];
    entry.fill(0);
    entry[..16].copy_from_slice(&kind.to_bytes_le());
    entry[16..32].copy_from_slice(&new.guid.to_bytes_le());
    entry[32..40].copy_from_slice(&(new.extent.start / unit).to_le_bytes());
    entry[40..48].copy_from_slice(&(new.extent.end / unit - 1).to_le_bytes());
    for at in [1, copy.alternate] {
        let mut header = read_vec(disk, at * unit, to_usize(unit))?;
        let place = le64(&header, 72).saturating_mul(unit);
        let own = Extent::at(place, array.len() as u64);
        if !own.intersect(new.extent).is_empty() || new.extent.start < 2 * unit {
            return Ok(None);
        }
        // Tools leave more room before the first partition than the table needs, and call it unusable.
        let first = le64(&header, 40).min(new.extent.start / unit);
        let last = le64(&header, 48).max(new.extent.end / unit - 1);
        header[40..48].copy_from_slice(&first.to_le_bytes());
        header[48..56].copy_from_slice(&last.to_le_bytes());
        header[88..92].copy_from_slice(&crc32fast::hash(&array).to_le_bytes());
        header[16..20].fill(0);
        let crc = crc32fast::hash(&header[..to_usize(le32(&header, 12).into())]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        out.write_at(&array, place)?;
        out.write_at(&header, at * unit)?;
    }
    Ok(u32::try_from(slot + 1).ok())
}

fn partitions(disk: &dyn ReadAt, copy: &Copy) -> Table {
    let mut table = Table {
        kind: TableKind::Gpt,
        sector_size: if copy.sector_size == 4096 { 4096 } else { 512 },
        id: copy.disk_guid.to_string(),
        partitions: Vec::new(),
        findings: Vec::new(),
    };
    for (number, entry) in (1..).zip(copy.array.chunks_exact(copy.entry_size)) {
        if is_zero(&entry[..16]) {
            continue;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let extent = match last.checked_sub(first) {
            Some(more) => table.place(number, first, more.saturating_add(1), disk.size()),
            None => {
                let what = format!("partition {number} ends at sector {last}, before its start at {first}");
                table.find(Some(number), what);
                Extent::new(0, 0)
            }
        };
        if !extent.is_empty() && !copy.usable.contains(extent) {
            table.find(Some(number), format!("partition {number} leaves the usable part of the disk"));
        }
        let name: Vec<u16> = entry[56..128]
            .chunks_exact(2)
            .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
            .take_while(|unit| *unit != 0)
            .collect();
        table.partitions.push(Partition {
            number,
            extent,
            kind: PartitionType::Gpt(Uuid::from_bytes_le(bytes(entry, 0))),
            name: (!name.is_empty()).then(|| String::from_utf16_lossy(&name)),
            bootable: le64(entry, 48) & 4 != 0,
            guid: Some(Uuid::from_bytes_le(bytes(entry, 16))),
        });
    }
    table.find_overlaps();
    table
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::io::fake::MemoryDisk;
    use crate::io::{WriteAt, read_array};
    use crate::layout::read_table;

    /// A table as the specification says, made here so that reader and writer are not one piece of code.
    fn make(unit: u64, sectors: u64, entry_size: usize, parts: &[(u64, u64, String)]) -> MemoryDisk {
        let disk = MemoryDisk::sparse(unit * sectors);
        let mut protective = [0; 512];
        protective[450] = PROTECTIVE;
        protective[454] = 1;
        protective[458..462].fill(0xff);
        protective[510..].copy_from_slice(&[0x55, 0xaa]);
        disk.write_at(&protective, 0).unwrap();
        let mut array = vec![0; 128 * entry_size];
        for (entry, (first, last, name)) in array.chunks_mut(entry_size).zip(parts) {
            entry[..16].copy_from_slice(&[7; 16]);
            entry[16..32].copy_from_slice(&[9; 16]);
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
            for (place, unit) in entry[56..128].chunks_mut(2).zip(name.encode_utf16()) {
                place.copy_from_slice(&unit.to_le_bytes());
            }
        }
        let array_sectors = (array.len() as u64).div_ceil(unit);
        let last = sectors - 1;
        for (own, other, at) in [(1, last, 2), (last, 1, last - array_sectors)] {
            let mut header = vec![0; 92];
            header[..8].copy_from_slice(SIGNATURE);
            header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
            for (place, value) in [
                (24, own),
                (32, other),
                (40, 2 + array_sectors),
                (48, last - array_sectors - 1),
                (72, at),
                (80, 128 | (entry_size as u64) << 32),
            ] {
                header[place..place + 8].copy_from_slice(&value.to_le_bytes());
            }
            header[88..92].copy_from_slice(&crc32fast::hash(&array).to_le_bytes());
            let crc = crc32fast::hash(&header);
            header[16..20].copy_from_slice(&crc.to_le_bytes());
            disk.write_at(&header, own * unit).unwrap();
            disk.write_at(&array, at * unit).unwrap();
        }
        disk
    }

    fn tables() -> impl Strategy<Value = (u64, usize, Vec<(u64, u64, String)>)> {
        let parts = prop::collection::vec((1..50_u64, 0..20_u64, "[a-zä-ü ]{0,36}"), 0..20);
        (prop::sample::select(vec![512_u64, 4096]), prop::sample::select(vec![128, 256, 512]), parts)
            .prop_map(|(unit, entry_size, parts)| {
                let mut at = 200;
                let place = |(len, gap, name): (u64, u64, String)| {
                    let first = at + gap;
                    at = first + len;
                    (first, at - 1, name)
                };
                (unit, entry_size, parts.into_iter().map(place).collect())
            })
    }

    proptest! {
        #[test]
        fn tables_read_back_from_either_copy((unit, entry_size, parts) in tables(), hurt in 0..92_u64, bit in 0..8) {
            let disk = make(unit, 5000, entry_size, &parts);
            let table = read_table(&disk).unwrap().unwrap();
            prop_assert_eq!(&table.findings, &vec![]);
            prop_assert_eq!(u64::from(table.sector_size), unit);
            let read: Vec<_> = table.partitions.iter()
                .map(|p| (p.extent.start / unit, p.extent.end / unit - 1, p.name.clone().unwrap_or_default()))
                .collect();
            prop_assert_eq!(read, parts);

            let byte = read_array::<1>(&disk, unit + hurt).unwrap()[0] ^ (1_u8 << bit);
            disk.write_at(&[byte], unit + hurt).unwrap();
            let backup = read_table(&disk).unwrap().unwrap();
            prop_assert_eq!(&backup.partitions, &table.partitions);
            prop_assert!(backup.findings[0].what.contains("backup is used"), "{:?}", backup.findings);
        }

        #[test]
        fn damage_is_an_error_or_a_finding_but_never_a_panic(
            (unit, entry_size, parts) in tables(),
            damage in prop::collection::vec((0..5000_u64 * 512, any::<u8>()), 1..40),
            near in prop::collection::vec((0..92_u64, any::<bool>(), any::<u8>()), 0..4),
        ) {
            let disk = make(unit, 5000, entry_size, &parts);
            for (at, byte) in damage {
                disk.write_at(&[byte], at).unwrap();
            }
            for (at, first, byte) in near {
                disk.write_at(&[byte], at + unit * if first { 1 } else { 4999 }).unwrap();
            }
            if let Err(error) = read_table(&disk) {
                prop_assert_eq!(error.kind(), Kind::Image);
            }
        }
    }

    #[test]
    fn overlapping_and_boundless_partitions_are_found() {
        let part = |first, last| (first, last, String::new());
        let disk = make(512, 5000, 128, &[part(200, 300), part(300, 400), part(500, 90_000), part(600, 550)]);
        let table = read_table(&disk).unwrap().unwrap();
        assert!((1..=4).all(|number| table.doubt(number).is_some()), "{:?}", table.findings);
        assert_eq!(table.partitions[2].extent.end, 5000 * 512);
        assert!(table.partitions[3].extent.is_empty());
    }
}
