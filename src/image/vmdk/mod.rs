//! VMDK, as VMware's technical note "Virtual Disk Format 5.0" defines it: hosted disks, streams, flat files of VMFS.

pub mod descriptor;
pub mod header;
mod metadata;
mod reader;
mod sparse;
mod unpack;
pub mod writer;

use std::sync::Arc;

use super::Gate;
use crate::error::Result;
use crate::io::{DiskFile, ReadAt, read_vec};
use crate::unit::to_usize;

pub use metadata::{Info, Metadata};
pub use reader::Reader;

/// Bytes of a sector, the unit of every offset and length in the format.
pub const SECTOR: u64 = 512;

/// Whether `file` is a VMDK file: a sparse extent, or a descriptor. A sparse extent of ESX ("COWD") is one too, which
/// [`Reader::open`] refuses by name: taken for a raw disk it would be copied as nonsense.
pub fn probe(file: &dyn ReadAt) -> Result<bool> {
    let longest = descriptor::SIGNATURE.len() as u64;
    let start = read_vec(file, 0, to_usize(longest.min(file.size())))?;
    Ok(start.starts_with(&header::MAGIC) || start.starts_with(&header::COWD) || descriptor::is_one(&start))
}

/// Opens the VMDK disk on `file`; extent files its descriptor names are opened only where `gate` allows them.
pub fn open(file: Arc<dyn ReadAt>, gate: &mut Gate) -> Result<Reader> {
    let image = file.name();
    Reader::open(file, |wanted| Ok(Arc::new(DiskFile::open(&gate.take_extent(&image, wanted)?)?)))
}
