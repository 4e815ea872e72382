//! What an image says about itself before its block allocation table is read: footer, header, the disk's length.

use std::fmt;

use super::footer::{COOKIE, Chs, DiskType, FOOTER_LEN, Footer};
use super::header::{HEADER_LEN, Header, MAX_ENTRIES};
use super::{MAX_SIZE, bad_field};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, read_array};
use crate::unit::Extent;

/// Bytes of a footer.
const FOOTER: u64 = FOOTER_LEN as u64;
/// Seconds from 1970 to 2000, where the format's time begins.
const EPOCH: u64 = 946_684_800;

/// How a VHD or VHDX image holds its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Subformat {
    /// As it is, with a footer after it.
    Fixed,
    /// In blocks, those of zeroes left out.
    Dynamic,
    /// As blocks that differ from another disk: haul does not read it.
    Differencing,
}

impl fmt::Display for Subformat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Subformat::Fixed => "fixed",
            Subformat::Dynamic => "dynamic",
            Subformat::Differencing => "differencing",
        })
    }
}

/// The facts of a VHD image for `haul inspect`. Control characters in names are escaped.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Info {
    /// How the disk is held.
    pub subformat: Subformat,
    /// Length of the virtual disk in bytes, as haul reads it.
    pub virtual_size: u64,
    /// The footer's field of that name.
    pub current_size: u64,
    /// What the footer's geometry makes, in bytes; some programs take it for the disk's length.
    pub geometry_size: u64,
    /// Bytes of a block, unless the disk is fixed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    /// The program that made the image, such as `win` (Hyper-V), `vpc`, `vbox`, `qem2`.
    pub creator: String,
    /// That program's version.
    pub creator_version: String,
    /// When, in seconds since 1970.
    pub created: u64,
    /// The image's identifier.
    pub uuid: String,
    /// Whether a machine was saved with the disk: what it had in memory is not in the image.
    pub saved_state: bool,
    /// Whether the footer at the end is missing or damaged, and its copy at the start was used.
    pub footer_damaged: bool,
}

/// Everything but the table.
pub(super) struct Metadata {
    /// The footer that counts.
    pub footer: Footer,
    /// Whether it is the copy at the start, because the one at the end is damaged.
    pub copied: bool,
    /// The header, unless the disk is fixed.
    pub header: Option<Header>,
    /// The virtual disk's length in bytes.
    pub size: u64,
}

/// Whether `file` seems to be a VHD image: it begins with a footer's cookie, as dynamic disks do, or it ends with a
/// valid footer, of a fixed disk of just its length or of a dynamic one whose header and table are where the footer
/// says: taken for a raw disk, an image whose first sector is damaged would be copied as if it were one. A raw disk
/// whose owner writes such bytes to it looks like an image: where it matters, the user says which it is.
pub fn probe(file: &dyn ReadAt) -> Result<bool> {
    let size = file.size();
    if size < FOOTER {
        return Ok(false);
    }
    if read_array::<8>(file, 0)? == COOKIE {
        return Ok(true);
    }
    let end = size - FOOTER;
    if Footer::decode("", end, &read_array(file, end)?).is_err() {
        return Ok(false);
    }
    match Metadata::read(file) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == Kind::Image => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the image on `file` is, even if it is one that haul does not read.
pub fn inspect(file: &dyn ReadAt) -> Result<Info> {
    Ok(Metadata::read(file)?.info())
}

/// The length of a fixed disk before whose footer lie `area` bytes: all of them, or nothing is certain. Which field
/// says so is the same, since the file's length shows what was meant.
fn fixed_size(footer: &Footer, area: u64) -> Option<u64> {
    let named = footer.current_size == area || (sized_by_geometry(footer) && footer.geometry.bytes() == area);
    named.then_some(area)
}

/// Whether the program that made the image takes the geometry for the disk's length: Virtual PC, and QEMU unless
/// it was told otherwise. The largest geometry stands for every larger disk, so it is no length.
fn sized_by_geometry(footer: &Footer) -> bool {
    matches!(&footer.creator, b"vpc " | b"qemu") && footer.geometry.bytes() != Chs::MAX.bytes()
}

/// The length of a dynamic disk: `current_size`, which Hyper-V, disk2vhd, XenServer, Azure, VirtualBox and `qem2` mean.
/// Virtual PC and QEMU mean the geometry, which for one size in bytes can be a little more or a little less. QEMU
/// reads their images by it, and so cuts off the end of those that Hyper-V took over or that another program made in
/// their name. The longer of the two is read here: what lies beyond the shorter one may be data, and else is zeroes.
fn dynamic_size(footer: &Footer) -> u64 {
    let geometry = if sized_by_geometry(footer) { footer.geometry.bytes() } else { 0 };
    footer.current_size.max(geometry)
}

impl Metadata {
    /// Reads and checks the metadata of the image on `file`.
    pub(super) fn read(file: &dyn ReadAt) -> Result<Self> {
        let name = file.name();
        let (footer, copied) = find_footer(file, &name)?;
        let footer_at = if copied { 0 } else { file.size() - FOOTER };
        if footer.disk_type == DiskType::Fixed {
            let area = file.size() - FOOTER;
            let size = fixed_size(&footer, area).ok_or_else(|| {
                let why = format!("it is {}, and {area} bytes lie before the footer", footer.current_size);
                bad_field(&name, "current_size", footer_at + 48, why)
            })?;
            return Ok(Metadata { footer, copied, header: None, size });
        }
        let at = footer.data_offset;
        let place = Extent::at(at, HEADER_LEN as u64);
        if at < FOOTER || place.len() < HEADER_LEN as u64 || place.end > file.size() {
            let why = format!("no header can be at {at} of a file of {} bytes", file.size());
            return Err(bad_field(&name, "data_offset", footer_at + 16, why));
        }
        let header = Header::decode(&name, at, &read_array(file, at)?)?;
        let size = dynamic_size(&footer);
        if size > MAX_SIZE {
            let why = format!("{size} bytes are more than the 2040 GiB a dynamic disk can have");
            return Err(bad_field(&name, "current_size", footer_at + 48, why));
        }
        check_table(file, &name, &footer, &header, size)?;
        Ok(Metadata { footer, copied, header: Some(header), size })
    }

    /// The facts.
    pub(super) fn info(&self) -> Info {
        let footer = &self.footer;
        Info {
            subformat: match footer.disk_type {
                DiskType::Fixed => Subformat::Fixed,
                DiskType::Dynamic => Subformat::Dynamic,
                DiskType::Differencing => Subformat::Differencing,
            },
            virtual_size: self.size,
            current_size: footer.current_size,
            geometry_size: footer.geometry.bytes(),
            block_size: self.header.as_ref().map(|header| header.block_size),
            creator: String::from_utf8_lossy(&footer.creator)
                .trim_end_matches([' ', '\0'])
                .escape_debug()
                .to_string(),
            creator_version: format!("{}.{}", footer.creator_version >> 16, footer.creator_version & 0xffff),
            created: EPOCH + u64::from(footer.timestamp),
            uuid: uuid::Uuid::from_bytes(footer.uuid).to_string(),
            saved_state: footer.saved_state,
            footer_damaged: self.copied,
        }
    }
}

/// The footer that counts, and whether it is the copy at the start. The one at the end comes first, since a fixed
/// disk has no other and what looks like a copy may be its data; a copy that contradicts it is refused.
fn find_footer(file: &dyn ReadAt, name: &str) -> Result<(Footer, bool)> {
    let Some(end_at) = file.size().checked_sub(FOOTER) else {
        let why = format!("the file ends after {} of its 512 bytes", file.size());
        return Err(bad_field(name, "footer", 0, why));
    };
    let front_bytes: [u8; FOOTER_LEN] = read_array(file, 0)?;
    let front = Footer::decode(name, 0, &front_bytes);
    match (front, Footer::decode(name, end_at, &read_array(file, end_at)?)) {
        (Ok(front), Ok(end)) if front.disk_type != DiskType::Fixed => match front.first_difference(&end) {
            Some((field, offset)) => {
                let why = format!("it differs from the copy at offset {offset}, and both footers are intact");
                Err(bad_field(name, field, end_at + offset, why))
            }
            None => Ok((end, false)),
        },
        (_, Ok(end)) => Ok((end, false)),
        (Ok(front), Err(_)) if front.disk_type != DiskType::Fixed => Ok((front, true)),
        (Err(front), Err(_)) if front_bytes.starts_with(&COOKIE) => Err(front),
        (_, Err(end)) => Err(end),
    }
}

/// What the table's place and length must satisfy.
fn check_table(file: &dyn ReadAt, name: &str, footer: &Footer, header: &Header, size: u64) -> Result<()> {
    let bad = |field: &str, offset: u64, why: String| {
        Err(bad_field(name, field, footer.data_offset.saturating_add(offset), why))
    };
    let needed = size.div_ceil(header.block_size.into());
    if needed > MAX_ENTRIES.into() {
        let why = format!("blocks of {} bytes make a table of more than 16 MiB", header.block_size);
        return bad("block_size", 32, why);
    }
    if u64::from(header.max_entries) < needed {
        let why = format!("it is {}, and a disk of {size} bytes has {needed} blocks", header.max_entries);
        return bad("max_table_entries", 28, why);
    }
    let table = Extent::at(header.table_offset, needed * 4);
    let taken = [Extent::new(0, FOOTER), Extent::at(footer.data_offset, HEADER_LEN as u64)];
    if table.len() < needed * 4 || table.end > file.size() {
        let why = format!("{needed} entries at {} lie beyond the end of the file", header.table_offset);
        return bad("table_offset", 16, why);
    }
    if taken.iter().any(|taken| !taken.intersect(table).is_empty()) {
        let why = format!("the table at {} overlaps the footer's copy or the header", header.table_offset);
        return bad("table_offset", 16, why);
    }
    Ok(())
}

/// The refusal of an image that needs another one.
pub(super) fn refusal(name: &str) -> Error {
    Error::new(Kind::Image, "vhd.differencing", format!("{name}: this VHD image cannot be read"))
        .because("it is a differencing disk (disk_type 4): it holds only what differs from its parent")
        .remedy("merge it with its parent first, with the program that made it")
        .fact("image", name)
}
