//! The image formats by their names, and the encoder that lays out an image in one.

use std::fmt;
use std::str::FromStr;

use super::{qcow2, raw, vhd, vmdk};
use crate::error::{Error, Kind, Result};
use crate::io::batch::Encoder;

/// An image format haul reads. All but VHDX are written, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The virtual disk's bytes as they are.
    Raw,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
    /// Microsoft's VHD, which QEMU calls `vpc`.
    Vhd,
    /// Microsoft's VHDX.
    Vhdx,
    /// VMware's VMDK.
    Vmdk,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vhd => "vhd",
            Format::Vhdx => "vhdx",
            Format::Vmdk => "vmdk",
        })
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            "vhd" | "vpc" => Ok(Format::Vhd),
            "vhdx" => Ok(Format::Vhdx),
            "vmdk" => Ok(Format::Vmdk),
            _ => Err(Error::new(Kind::Usage, "image.format", format!("unknown image format {text:?}"))
                .remedy("use raw, qcow2, vhd, vhdx or vmdk")),
        }
    }
}

/// How a format that has several ways lays out the disk; the names are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Subformat {
    /// VHD: the disk as it is, then a footer.
    Fixed,
    /// VHD: blocks of 2 MiB, those with data only.
    Dynamic,
    /// VMDK: grains of 64 KiB, those with data only.
    MonolithicSparse,
    /// VMDK: such grains, compressed, for transport: what an OVA holds.
    StreamOptimized,
}

impl fmt::Display for Subformat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Subformat::Fixed => "fixed",
            Subformat::Dynamic => "dynamic",
            Subformat::MonolithicSparse => "monolithicSparse",
            Subformat::StreamOptimized => "streamOptimized",
        })
    }
}

impl FromStr for Subformat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all =
            [Subformat::Fixed, Subformat::Dynamic, Subformat::MonolithicSparse, Subformat::StreamOptimized];
        all.into_iter().find(|known| known.to_string() == text).ok_or_else(|| {
            Error::new(Kind::Usage, "image.subformat", format!("unknown subformat {text:?}"))
                .remedy("use fixed or dynamic (vhd), monolithicSparse or streamOptimized (vmdk)")
        })
    }
}

/// How a written qcow2 image compresses its data.
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

/// The encoder of an image of a disk of `size` bytes, in a file called `name`, which a VMDK says of itself. Fails with
/// [`Kind::Usage`] where there is no such image.
pub fn encoder(
    format: Format,
    subformat: Option<Subformat>,
    compress: Compress,
    size: u64,
    name: &str,
) -> Result<Box<dyn Encoder>> {
    if compress != Compress::None && format != Format::Qcow2 {
        return Err(Error::new(
            Kind::Usage,
            "image.compress",
            format!("a {format} image cannot be compressed so"),
        )
        .because("only qcow2 has a choice; a streamOptimized vmdk is compressed always")
        .remedy("leave --compress out, or write a qcow2 image with -O qcow2"));
    }
    Ok(match (format, subformat) {
        (Format::Raw, None) => Box::new(raw::writer::Writer::new(size)),
        (Format::Qcow2, None) => Box::new(qcow2::writer::Writer::new(size, compress)?),
        (Format::Vhd, None | Some(Subformat::Dynamic)) => Box::new(vhd::writer::Dynamic::new(size)?),
        (Format::Vhd, Some(Subformat::Fixed)) => Box::new(vhd::writer::Fixed::new(size)?),
        (Format::Vmdk, None | Some(Subformat::MonolithicSparse)) => {
            Box::new(vmdk::writer::Sparse::new(size, name)?)
        }
        (Format::Vmdk, Some(Subformat::StreamOptimized)) => {
            Box::new(vmdk::writer::StreamOptimized::new(size, name)?)
        }
        (Format::Vhdx, _) => {
            return Err(Error::new(Kind::Usage, "image.read-only", "a vhdx image cannot be written")
                .because("haul only reads this format")
                .remedy("write raw, qcow2, vhd or vmdk"));
        }
        (_, Some(subformat)) => {
            return Err(Error::new(
                Kind::Usage,
                "image.subformat",
                format!("a {format} image cannot be {subformat}"),
            )
            .remedy("vhd has fixed and dynamic, vmdk has monolithicSparse and streamOptimized"));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back_and_no_other() {
        for format in [Format::Raw, Format::Qcow2, Format::Vhd, Format::Vhdx, Format::Vmdk] {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
            for subformat in ["fixed", "dynamic", "monolithicSparse", "streamOptimized"] {
                let subformat: Subformat = subformat.parse().unwrap();
                let made = encoder(format, Some(subformat), Compress::None, 1 << 20, "x").is_ok();
                let vhd = matches!(subformat, Subformat::Fixed | Subformat::Dynamic);
                assert_eq!(made, format == if vhd { Format::Vhd } else { Format::Vmdk });
            }
            let plain = encoder(format, None, Compress::None, 1 << 20, "x").is_ok();
            assert_eq!(plain, format != Format::Vhdx);
            let zstd = encoder(format, None, Compress::Zstd, 1 << 20, "x").is_ok();
            assert_eq!(zstd, format == Format::Qcow2);
        }
        assert_eq!("vpc".parse::<Format>().unwrap(), Format::Vhd);
        assert_eq!("Fixed".parse::<Subformat>().unwrap_err().kind(), Kind::Usage);
        assert_eq!("vdi".parse::<Format>().unwrap_err().kind(), Kind::Usage);
    }
}
