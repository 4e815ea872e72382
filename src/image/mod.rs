//! Disk images: what a file, a device or an object holds as a virtual disk.
//!
//! An image is hostile until told otherwise: what it refers to is opened through a [`Gate`] that denies by default.

pub mod archive;
mod cache;
pub mod compare;
mod format;
pub mod gate;
pub mod overlay;
pub mod qcow2;
pub mod raw;
mod sparse;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Kind, Result};
use crate::io::{DiskFile, ReadAt};

pub use compare::{Comparison, compare};
pub use format::{Compress, Format, Subformat, encoder};
pub use gate::Gate;

/// What an image is, without reading the disk in it: the facts of `haul inspect`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Info {
    /// Its format.
    pub format: Format,
    /// Length of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Length of the file, device or object in bytes.
    pub file_size: u64,
    /// What only an image of this format has; a raw image has nothing.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
}

/// What only an image of one format has.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Details {
    /// Of a qcow2 image.
    Qcow2(qcow2::Info),
    /// Of a VHD image.
    Vhd(vhd::Info),
    /// Of a VHDX image.
    Vhdx(vhdx::Info),
    /// Of a VMDK image.
    Vmdk(vmdk::Info),
}

impl Info {
    /// What is known of the raw disk `file`.
    pub fn raw(file: &dyn ReadAt) -> Self {
        Info { format: Format::Raw, virtual_size: file.size(), file_size: file.size(), details: None }
    }

    /// What a qcow2 image has.
    pub fn qcow2(&self) -> Option<&qcow2::Info> {
        match &self.details {
            Some(Details::Qcow2(info)) => Some(info),
            _ => None,
        }
    }
}

/// An open image.
pub struct Image {
    /// The virtual disk. A raw image is its own virtual disk.
    pub disk: Arc<dyn ReadAt>,
    /// The image's format.
    pub format: Format,
    /// What it is.
    pub info: Info,
}

/// The format `disk` seems to have, by its first bytes. A raw disk whose owner writes a header of another format
/// to its start looks like that format: where it matters, the user says which it is.
pub fn probe(disk: &dyn ReadAt) -> Result<Format> {
    let mut magic = qcow2::header::MAGIC.map(|_| 0);
    if disk.size() < magic.len() as u64 {
        return Ok(Format::Raw);
    }
    disk.read_at(&mut magic, 0)?;
    Ok(if magic == qcow2::header::MAGIC {
        Format::Qcow2
    } else if vhdx::probe(disk)? {
        Format::Vhdx
    } else if vmdk::probe(disk)? {
        Format::Vmdk
    } else if vhd::probe(disk)? {
        Format::Vhd
    } else {
        Format::Raw
    })
}

/// Opens the image file or block device `path`; without a `format` a file is probed, and a block device is raw,
/// since a disk's content must not decide how the disk is read.
pub fn open(path: &Path, format: Option<Format>, gate: &Gate) -> Result<Image> {
    let file = DiskFile::open(path)?;
    let format = format.or(file.is_device().then_some(Format::Raw));
    open_on(Arc::new(file), format, gate)
}

/// Opens the image on `file`: a local file, or an object in a store.
pub fn open_on(file: Arc<dyn ReadAt>, format: Option<Format>, gate: &Gate) -> Result<Image> {
    open_chain(file, format, &mut gate.clone())
}

/// What the image on `file` is, even if it is one that [`open_on`] refuses. Nothing it refers to is opened.
pub fn inspect(file: &dyn ReadAt, format: Option<Format>) -> Result<Info> {
    let format = format.map_or_else(|| probe(file), Ok)?;
    let (virtual_size, details) = match format {
        Format::Raw => return Ok(Info::raw(file)),
        Format::Qcow2 => {
            let metadata = qcow2::Metadata::read(file)?;
            (metadata.header.virtual_size, Details::Qcow2(metadata.info()))
        }
        Format::Vhd => {
            let info = vhd::inspect(file)?;
            (info.virtual_size, Details::Vhd(info))
        }
        Format::Vhdx => {
            let info = vhdx::inspect(file)?;
            (info.virtual_size, Details::Vhdx(info))
        }
        Format::Vmdk => {
            let metadata = vmdk::Metadata::read(file)?;
            (metadata.virtual_size(), Details::Vmdk(metadata.info()))
        }
    };
    Ok(Info { format, virtual_size, file_size: file.size(), details: Some(details) })
}

/// Opens an image and what it refers to. Each file of the gate serves once, so a chain ends.
fn open_chain(file: Arc<dyn ReadAt>, format: Option<Format>, gate: &mut Gate) -> Result<Image> {
    let info = inspect(&file, format)?;
    let format = info.format;
    let disk: Arc<dyn ReadAt> = match format {
        Format::Raw => file,
        Format::Qcow2 => Arc::new(open_qcow2(file, gate)?),
        Format::Vhd => Arc::new(vhd::Reader::open(file)?),
        Format::Vhdx => Arc::new(vhdx::Reader::open(file)?),
        Format::Vmdk => Arc::new(vmdk::open(file, gate)?),
    };
    Ok(Image { disk, format, info })
}

fn open_qcow2(file: Arc<dyn ReadAt>, gate: &mut Gate) -> Result<qcow2::Reader> {
    let name = file.name();
    let metadata = qcow2::Metadata::read(&file)?;
    if let Some(refusal) = metadata.header.refusal(&name, &metadata.extensions) {
        return Err(refusal);
    }
    let data = match metadata.data_file(&name)? {
        Some(wanted) => Some(Arc::new(DiskFile::open(&gate.take_data_file(&name, wanted)?)?) as _),
        None => None,
    };
    let backing = match &metadata.backing_file {
        Some(wanted) => {
            let path = gate.take_backing(&name, wanted)?;
            let format = metadata.extensions.backing_format.as_deref().map(Format::from_str).transpose();
            let format = format.map_err(|error| error.with_kind(Kind::Image).fact("image", &name))?;
            Some(open_chain(Arc::new(DiskFile::open(&path)?), format, gate)?.disk)
        }
        None => None,
    };
    qcow2::Reader::new(file, &metadata, data, backing)
}
