//! The GUID partition table (UEFI specification 2.10, section 5.3).

use uuid::Uuid;

use super::field::{bytes, has, le32, le64};
use super::mbr::{self, PROTECTIVE};
use super::{Partition, PartitionType, Table, TableKind};
use crate::error::{Error, Kind, Result, Retry};
use crate::io::{ReadAt, is_zero, read_vec};
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
