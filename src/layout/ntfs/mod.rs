//! NTFS: which clusters are in use, by its file `$Bitmap` (the format is described by libfsntfs's "New Technologies File
//! System (NTFS)" and by Linux's `fs/ntfs3/ntfs.h`; names are the ones used there).

mod boot;
mod hibernation;
mod log;
mod map;
mod record;
mod runs;
mod volume;

use super::{Step, Stop, require};
use crate::error::Result;
use crate::io::ReadAt;
use boot::BootSector;
use volume::Volume;

pub(super) use map::NtfsMap;

/// An NTFS file system, by its boot sector and its file `$Volume`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NtfsInfo {
    /// Label; empty when it has none, or none that can be read.
    pub label: String,
    /// Serial number.
    pub serial: u64,
    /// Cluster size in bytes: 512 to 2097152 in a sound file system.
    pub cluster_size: u64,
    /// Length in clusters.
    pub clusters: u64,
}

impl NtfsInfo {
    /// The serial number as util-linux shows it, and as `UUID=` in an fstab has it.
    pub fn uuid(&self) -> String {
        format!("{:016X}", self.serial)
    }
}

/// Recognises a file system on `volume`, of which `head` is the start. Fails only as reading fails.
pub(super) fn identify(volume: &dyn ReadAt, head: &[u8]) -> Result<Option<NtfsInfo>> {
    let Some(boot) = BootSector::parse(head) else { return Ok(None) };
    let mut info = NtfsInfo {
        label: String::new(),
        serial: boot.serial,
        cluster_size: boot.cluster_size,
        clusters: boot.clusters,
    };
    match Volume::open(volume, boot).and_then(|volume| volume.label()) {
        Ok(label) => info.label = label,
        Err(Stop::Failed(error)) => return Err(error),
        Err(Stop::Whole(_)) => {}
    }
    Ok(Some(info))
}
