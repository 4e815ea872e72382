//! Partitions for a boot loader: added to the copy's table, formatted, and filled with what the firmware reads itself.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha1::{Digest as _, Sha1};
use uuid::Uuid;

use super::disk::{BIOS_BOOT, ESP, MBR_ESP};
use super::fat;
use crate::error::{Error, Kind, Result};
use crate::host::export::Disk;
use crate::io::{ReadAt, read_array};
use crate::layout::{self, NewPartition, PartitionType, Table, TableKind};
use crate::unit::Extent;

/// Bytes of the first sector that are a boot loader's.
const CODE: usize = 440;
/// Where GRUB's boot.img keeps the sector that it loads (grub-core/boot/i386/pc/boot.S, `kernel_sector`).
const KERNEL_SECTOR: usize = 0x5c;
/// Where it keeps the drive to load from (`boot_drive`): 0xff is the one that it was started from.
const BOOT_DRIVE: usize = 0x64;
/// A jump that is taken unless the BIOS says a hard disk (`boot_drive_check`): two instructions of nothing in its place, as
/// grub-install has it.
const DRIVE_CHECK: usize = 0x66;
/// Where the first sector of core.img keeps the sector it goes on at (grub-core/boot/i386/pc/diskboot.S, `blocklist_default_start`).
const NEXT_SECTOR: usize = 0x1f4;
/// Bytes of a sector, as a BIOS counts.
const SECTOR: u64 = 512;

/// What a partition is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// UEFI looks for a boot loader there.
    EfiSystem,
    /// GRUB's core, where a disk with a GPT boots by BIOS.
    BiosBoot,
}

impl Purpose {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Purpose::EfiSystem => "EFI system partition",
            Purpose::BiosBoot => "BIOS boot partition",
        }
    }

    /// How a table of this kind says it; an MBR knows no BIOS boot partition.
    fn kind(self, table: TableKind) -> Option<PartitionType> {
        let guid = |text: &str| Uuid::parse_str(text).ok().map(PartitionType::Gpt);
        match (self, table) {
            (Purpose::EfiSystem, TableKind::Mbr) => Some(PartitionType::Mbr(MBR_ESP)),
            (Purpose::EfiSystem, TableKind::Gpt) => guid(ESP),
            (Purpose::BiosBoot, TableKind::Gpt) => guid(BIOS_BOOT),
            (Purpose::BiosBoot, TableKind::Mbr) => None,
        }
    }

    /// Whether `table` has a partition for it at `extent`.
    pub fn is_at(self, table: &Table, extent: Extent) -> bool {
        let kind = self.kind(table.kind);
        table.partitions.iter().any(|part| part.extent == extent && Some(part.kind) == kind)
    }
}

/// Adds the partition at `extent` to the table of `disk`, and makes a file system in it where it needs one; returns what
/// was done. The same copy becomes the same wherever that is.
pub fn add(disk: &Arc<dyn Disk>, extent: Extent, purpose: Purpose) -> Result<String> {
    let failed = |why: &str| {
        Error::new(Kind::Image, "guest.partition", format!("cannot add the {}", purpose.name())).because(why)
    };
    let table = layout::read_table(disk)?.ok_or_else(|| failed("the disk has no partition table"))?;
    let kind = purpose.kind(table.kind).ok_or_else(|| failed("the disk has an MBR"))?;
    let mut seed = [0; 20];
    seed.copy_from_slice(&Sha1::digest(format!("{} {}", table.id, purpose.name())));
    let guid = uuid::Builder::from_sha1_bytes(*seed.first_chunk().unwrap_or(&[0; 16])).into_uuid();
    let number = layout::add_partition(disk, disk, &NewPartition { extent, kind, guid })?;
    if purpose == Purpose::EfiSystem {
        let serial = u32::from_le_bytes([seed[16], seed[17], seed[18], seed[19]]);
        fat::make(disk, extent, serial)?;
    }
    Ok(format!("added partition {number}, the {}", purpose.name()))
}

/// Puts `core` (GRUB's core.img) into the partition at `extent`, and `boot` (its boot.img), which loads it, into the first
/// sector, beside the table.
pub fn write_boot_sector(disk: &dyn Disk, extent: Extent, boot: &[u8], core: &[u8]) -> Result<()> {
    let failed = |why: String| {
        Error::new(Kind::Image, "guest.boot-sector", "cannot write the boot sector of the copy")
            .because(why)
            .remedy("make a larger gap between the disk's partitions, or leave --firmware out")
    };
    let mut core = core.to_vec();
    let (Some(boot), true) = (boot.get(..CODE), core.len() >= 512) else {
        return Err(failed("what the guest's GRUB made is too short".into()));
    };
    if core.len() as u64 > extent.len() {
        return Err(failed(format!("GRUB has {} bytes, the partition {}", core.len(), extent.len())));
    }
    let sector = extent.start / SECTOR;
    core[NEXT_SECTOR..NEXT_SECTOR + 8].copy_from_slice(&(sector + 1).to_le_bytes());
    let mut first = read_array::<512>(disk, 0)?;
    first[..CODE].copy_from_slice(boot);
    first[KERNEL_SECTOR..KERNEL_SECTOR + 8].copy_from_slice(&sector.to_le_bytes());
    first[BOOT_DRIVE] = 0xff;
    first[DRIVE_CHECK..DRIVE_CHECK + 2].fill(0x90);
    disk.write_at(&core, extent.start)?;
    disk.write_at(&first, 0)
}

/// Whether the first sector of `disk` loads what begins at `start`.
pub fn is_loaded(disk: &dyn ReadAt, start: u64) -> Result<bool> {
    let first = read_array::<512>(disk, 0)?;
    Ok(first[KERNEL_SECTOR..KERNEL_SECTOR + 8] == (start / SECTOR).to_le_bytes())
}
