//! FAT12, FAT16, FAT32 and exFAT: which clusters are in use, by the file allocation tables or, on exFAT, by the
//! allocation bitmap. The formats are described in Microsoft's "FAT: General Overview of On-Disk Format", version 1.03,
//! and in its "exFAT file system specification", revision 1.00; names are the ones used there.

mod bpb;
mod exfat;
mod files;
mod map;
mod root;
mod table;

use bpb::Bpb;

use super::field::bytes;
use super::{Content, Step, Stop, require};
use crate::error::Result;
use crate::io::ReadAt;

pub use files::{fat_files, fat_folder};

pub(super) use exfat::open as open_exfat;
pub(super) use root::open as open_fat;

/// A FAT file system, by its boot sector and root directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FatInfo {
    /// `fat12`, `fat16` or `fat32`.
    pub version: &'static str,
    /// The label in the root directory; empty when it has none.
    pub label: String,
    /// The serial number as fstab names it, such as `6696-24DF`; none when it has none.
    pub serial: Option<String>,
    /// Cluster size in bytes: a power of two.
    pub cluster_size: u64,
    /// Number of clusters.
    pub clusters: u64,
}

/// An exFAT file system, by its boot sector and root directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExfatInfo {
    /// Label; empty when it has none.
    pub label: String,
    /// The serial number as fstab names it, such as `6F19-665B`; none when it has none.
    pub serial: Option<String>,
    /// Cluster size in bytes: 512 to 33,554,432 in a sound file system.
    pub cluster_size: u64,
    /// Number of clusters.
    pub clusters: u64,
}

/// Recognises either by `head`, the first sector of `volume` or more. Fails only in ways that may pass.
pub(super) fn identify(volume: &dyn ReadAt, head: &[u8]) -> Result<Option<Content>> {
    if let Some(boot) = exfat::Boot::parse(head) {
        let label = or_empty(exfat::label(volume, &boot))?;
        return Ok(Some(Content::Exfat(boot.info(label))));
    }
    let Some(bpb) = Bpb::parse(head) else { return Ok(None) };
    let label = or_empty(root::label(volume, &bpb))?;
    Ok(Some(Content::Fat(bpb.info(label))))
}

/// Whether `sector` is the boot sector of a FAT12, FAT16 or FAT32.
pub(super) fn is_boot_sector(sector: &[u8; 512]) -> bool {
    Bpb::parse(sector).is_some()
}

/// A label, or none where the root directory makes no sense.
fn or_empty(label: Step<String>) -> Result<String> {
    match label {
        Ok(label) => Ok(label),
        Err(Stop::Whole(_)) => Ok(String::new()),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// A serial number as text; zero is none.
fn serial(number: u32) -> Option<String> {
    (number != 0).then(|| format!("{:04X}-{:04X}", number >> 16, number & 0xffff))
}

/// The entries of a directory, up to its end.
fn entries(directory: &[u8]) -> impl Iterator<Item = &[u8; 32]> {
    let (entries, _) = directory.as_chunks::<32>();
    entries.iter().take_while(|entry| bytes::<1>(*entry, 0) != [0])
}
