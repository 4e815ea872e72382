//! Disk images: what a file, a device or an object holds as a virtual disk.
//!
//! An image is hostile until told otherwise: what it refers to is opened through a [`Gate`] that denies by default.

pub mod archive;
mod cache;
pub mod compare;
pub mod gate;
pub mod overlay;
pub mod qcow2;
pub mod raw;
mod sparse;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::io::{DiskFile, ReadAt};

pub use compare::{Comparison, compare};
pub use gate::Gate;

/// An image format haul reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The virtual disk's bytes as they are.
    Raw,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(Error::new(Kind::Usage, "image.format", format!("unknown image format {text:?}"))
                .remedy("use raw or qcow2")),
        }
    }
}

/// What an image is, without reading the disk in it: the facts of `haul inspect`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Info {
    /// Its format.
    pub format: Format,
    /// Length of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Length of the file, device or object in bytes.
    pub file_size: u64,
    /// What only a qcow2 image has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qcow2: Option<qcow2::Info>,
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
pub fn probe(disk: &(impl ReadAt + ?Sized)) -> Result<Format> {
    let mut magic = qcow2::header::MAGIC.map(|_| 0);
    if disk.size() < magic.len() as u64 {
        return Ok(Format::Raw);
    }
    disk.read_at(&mut magic, 0)?;
    Ok(if magic == qcow2::header::MAGIC { Format::Qcow2 } else { Format::Raw })
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
    let (virtual_size, qcow2) = match format {
        Format::Raw => (file.size(), None),
        Format::Qcow2 => {
            let metadata = qcow2::Metadata::read(file)?;
            (metadata.header.virtual_size, Some(metadata.info()))
        }
    };
    Ok(Info { format, virtual_size, file_size: file.size(), qcow2 })
}

/// Opens an image and what it refers to. Each file of the gate serves once, so a chain ends.
fn open_chain(file: Arc<dyn ReadAt>, format: Option<Format>, gate: &mut Gate) -> Result<Image> {
    let format = format.map_or_else(|| probe(&file), Ok)?;
    let file_size = file.size();
    if format == Format::Raw {
        let info = Info { format, virtual_size: file_size, file_size, qcow2: None };
        return Ok(Image { disk: file, format, info });
    }
    let name = file.name();
    let metadata = qcow2::Metadata::read(&file)?;
    if let Some(refusal) = metadata.header.refusal(&name, &metadata.extensions) {
        return Err(refusal);
    }
    let info =
        Info { format, virtual_size: metadata.header.virtual_size, file_size, qcow2: Some(metadata.info()) };
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
    let disk = Arc::new(qcow2::Reader::new(file, &metadata, data, backing)?);
    Ok(Image { disk, format, info })
}

/// How a written image compresses its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// Not at all.
    None,
    /// Deflate: every reader understands it.
    Zlib,
    /// Zstandard: faster, but importers and QEMU before 5.1 refuse it.
    Zstd,
}

impl fmt::Display for Compress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Compress::None => "none",
            Compress::Zlib => "zlib",
            Compress::Zstd => "zstd",
        })
    }
}
