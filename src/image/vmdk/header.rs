//! The header of a sparse extent: its bytes and back, pure. Field names and offsets are those of "Virtual Disk Format
//! 5.0", section "Hosted Sparse Extents"; all numbers are little endian, offsets and lengths are in sectors.

use super::SECTOR;
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, read_array};
use crate::unit::{Extent, MIB};

/// The first four bytes of a sparse extent of hosted products, and of a stream.
pub const MAGIC: [u8; 4] = *b"KDMV";
/// The first four bytes of a sparse extent of ESX 3 and 4, which haul does not read.
pub(super) const COWD: [u8; 4] = *b"COWD";
/// Bytes of a header: one sector.
pub const HEADER_LEN: usize = 512;
/// `gdOffset` of a stream: the footer has the true one.
pub const GD_AT_END: u64 = u64::MAX;
/// Entries of a grain table, which the specification fixes.
pub const TABLE_ENTRIES: u64 = 512;
/// Sectors of a grain table.
pub(super) const TABLE_SECTORS: u64 = TABLE_ENTRIES * 4 / SECTOR;
/// The most grain tables haul reads or writes: a grain directory of 8 MiB, which maps 64 TiB in grains of 64 KiB.
pub const MAX_TABLES: u64 = 2 * MIB;
/// The largest grain haul reads, in sectors: 2 MiB.
const MAX_GRAIN: u64 = 2 * MIB / SECTOR;
/// The largest embedded descriptor haul reads, in sectors: 1 MiB.
pub(super) const MAX_DESCRIPTOR: u64 = MIB / SECTOR;
/// The bytes that show whether a transfer in text mode changed line ends (`singleEndLineChar` and the three after it).
const LINE_ENDS: [u8; 4] = *b"\n \r\n";
/// `compressAlgorithm` of zlib streams (RFC 1950).
const DEFLATE: u16 = 1;

/// Bits of `flags`.
pub mod flag {
    /// The line end bytes are valid.
    pub const LINE_ENDS: u32 = 1 << 0;
    /// There is a redundant grain directory with tables of its own.
    pub const REDUNDANT: u32 = 1 << 1;
    /// A grain table entry of 1 is a grain of zeroes.
    pub const ZEROED_GRAINS: u32 = 1 << 2;
    /// Grains are compressed.
    pub const COMPRESSED: u32 = 1 << 16;
    /// Grains and tables have markers before them.
    pub const MARKERS: u32 = 1 << 17;
    /// Every bit the specification has.
    pub const KNOWN: u32 = LINE_ENDS | REDUNDANT | ZEROED_GRAINS | COMPRESSED | MARKERS;
}

/// Types of markers, which precede the parts of a stream that are no grain.
pub mod kind {
    /// A grain table.
    pub const TABLE: u32 = 1;
    /// The grain directory.
    pub const DIRECTORY: u32 = 2;
    /// The footer.
    pub const FOOTER: u32 = 3;
}

/// The marker before `sectors` of a stream's part of type `kind`.
pub(super) fn marker(sectors: u64, kind: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..8].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..16].copy_from_slice(&kind.to_le_bytes());
    bytes
}

/// The header of a sparse extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 1; 2 with zeroed grains; 3 for streams.
    pub version: u32,
    /// Bits of [`flag`].
    pub flags: u32,
    /// Length of the extent's part of the disk, in sectors.
    pub capacity: u64,
    /// Sectors of a grain: a power of two, 1 to 4096.
    pub grain: u64,
    /// Where the embedded descriptor is, in sectors; 0 for none.
    pub descriptor_offset: u64,
    /// Sectors of the embedded descriptor.
    pub descriptor_size: u64,
    /// Where the redundant grain directory is, in sectors; 0 for none.
    pub redundant_offset: u64,
    /// Where the grain directory is, in sectors, or [`GD_AT_END`].
    pub directory_offset: u64,
    /// Sectors before the first grain.
    pub overhead: u64,
    /// Whether the file was not closed cleanly.
    pub unclean: bool,
}

/// An error about one field: what it is called, where it is in the file, and what is wrong with it.
pub(super) fn bad_field(image: &str, field: &str, offset: u64, why: impl Into<String>) -> Error {
    let what = format!("{image}: VMDK field `{field}` at offset {offset} is malformed");
    Error::new(Kind::Image, "vmdk.field", what)
        .because(why)
        .fact("image", image)
        .fact("field", field)
        .fact("offset", offset)
}

/// So many sectors in bytes; the largest number there is when that is more.
pub(super) const fn bytes(sectors: u64) -> u64 {
    sectors.saturating_mul(SECTOR)
}

fn u16_at(bytes: &[u8; HEADER_LEN], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Header {
    /// Whether grains are zlib streams behind markers.
    pub fn compressed(&self) -> bool {
        self.flags & flag::COMPRESSED != 0
    }

    /// Whether a grain table entry of 1 is a grain of zeroes.
    pub fn zeroed_grains(&self) -> bool {
        self.flags & flag::ZEROED_GRAINS != 0
    }

    /// Entries of the grain directory.
    pub fn tables(&self) -> u64 {
        self.capacity.div_ceil(TABLE_ENTRIES * self.grain)
    }

    /// Where the embedded descriptor is in the file, in bytes; empty when there is none.
    pub fn descriptor(&self) -> Extent {
        match self.descriptor_offset {
            0 => Extent::new(0, 0),
            offset => Extent::at(bytes(offset), bytes(self.descriptor_size)),
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(4, &self.version.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &self.grain.to_le_bytes());
        put(28, &self.descriptor_offset.to_le_bytes());
        put(36, &self.descriptor_size.to_le_bytes());
        put(44, &512u32.to_le_bytes());
        put(48, &self.redundant_offset.to_le_bytes());
        put(56, &self.directory_offset.to_le_bytes());
        put(64, &self.overhead.to_le_bytes());
        put(72, &[u8::from(self.unclean)]);
        put(73, &LINE_ENDS);
        put(77, &if self.compressed() { DEFLATE } else { 0 }.to_le_bytes());
        bytes
    }

    /// Reads the header at `at` of `file`, in bytes.
    pub fn read(file: &(impl ReadAt + ?Sized), at: u64) -> Result<Self> {
        let name = file.name();
        if at.saturating_add(SECTOR) > file.size() {
            let why = format!("the file ends at {}, before the header does", file.size());
            return Err(bad_field(&name, "magicNumber", at, why));
        }
        Header::decode(&name, &read_array(file, at)?, at)
    }

    /// Reads a header from the sector at `at` of the image called `image`. Every field is checked as far as the
    /// header alone allows; what depends on the file's length is not.
    pub fn decode(image: &str, sector: &[u8; HEADER_LEN], at: u64) -> Result<Self> {
        if sector.starts_with(&COWD) {
            let what = format!("{image}: this VMDK extent cannot be read");
            return Err(Error::new(Kind::Image, "vmdk.cowd", what)
                .because("it is a sparse extent of ESX (COWD, type VMFSSPARSE)")
                .remedy("clone the disk on its host, for example with `vmkfstools -i`, and copy the clone")
                .fact("image", image)
                .fact("offset", at));
        }
        let header = Header {
            version: u32_at(sector, 4),
            flags: u32_at(sector, 8),
            capacity: u64_at(sector, 12),
            grain: u64_at(sector, 20),
            descriptor_offset: u64_at(sector, 28),
            descriptor_size: u64_at(sector, 36),
            redundant_offset: u64_at(sector, 48),
            directory_offset: u64_at(sector, 56),
            overhead: u64_at(sector, 64),
            unclean: sector[72] != 0,
        };
        match header.fault(sector) {
            Some((field, offset, why)) => Err(bad_field(image, field, at + offset, why)),
            None => Ok(header),
        }
    }

    /// The first field that cannot be right: its name, its offset in the header, and why.
    fn fault(&self, sector: &[u8; HEADER_LEN]) -> Option<(&'static str, u64, String)> {
        let fault = |field, offset, why: String| Some((field, offset, why));
        if !sector.starts_with(&MAGIC) {
            return fault("magicNumber", 0, "this is no header of a sparse extent".into());
        }
        if !(1..=3).contains(&self.version) {
            return fault("version", 4, format!("it is {}; versions 1 to 3 exist", self.version));
        }
        if self.flags & !flag::KNOWN != 0 {
            return fault(
                "flags",
                8,
                format!("{:#x} has bits that are not in the specification", self.flags),
            );
        }
        if self.compressed() != (self.flags & flag::MARKERS != 0) {
            return fault("flags", 8, "compressed grains and markers only exist together".into());
        }
        if self.flags & flag::LINE_ENDS != 0 && sector[73..77] != LINE_ENDS {
            let why = "the file was changed by a transfer in text mode".into();
            return fault("singleEndLineChar", 73, why);
        }
        let algorithm = u16_at(sector, 77);
        if algorithm != if self.compressed() { DEFLATE } else { 0 } {
            return fault(
                "compressAlgorithm",
                77,
                format!("{algorithm} contradicts flags {:#x}", self.flags),
            );
        }
        if !self.grain.is_power_of_two() || self.grain > MAX_GRAIN {
            let why = format!("{} sectors are no power of two from 1 to {MAX_GRAIN}", self.grain);
            return fault("grainSize", 20, why);
        }
        let entries = u32_at(sector, 44);
        if u64::from(entries) != TABLE_ENTRIES {
            return fault("numGTEsPerGT", 44, format!("it is {entries}; {TABLE_ENTRIES} is the only size"));
        }
        if self.tables() > MAX_TABLES {
            let why = format!("{} sectors need more than {MAX_TABLES} grain tables", self.capacity);
            return fault("capacity", 12, why);
        }
        if self.descriptor_offset != 0 && !(1..=MAX_DESCRIPTOR).contains(&self.descriptor_size) {
            let why = format!("{} sectors; 1 to {MAX_DESCRIPTOR} are possible", self.descriptor_size);
            return fault("descriptorSize", 36, why);
        }
        if self.directory_offset == 0 {
            return fault("gdOffset", 56, "it is 0, which is the header".into());
        }
        if self.directory_offset == GD_AT_END && !self.compressed() {
            return fault("gdOffset", 56, "only a stream has its directory at its end".into());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Header {
        Header {
            version: 3,
            flags: flag::LINE_ENDS | flag::COMPRESSED | flag::MARKERS,
            capacity: 2048,
            grain: 128,
            descriptor_offset: 1,
            descriptor_size: 20,
            redundant_offset: 0,
            directory_offset: GD_AT_END,
            overhead: 128,
            unclean: false,
        }
    }

    #[test]
    fn a_header_survives_its_bytes() {
        let plain = Header { version: 1, flags: 3, directory_offset: 26, redundant_offset: 21, ..stream() };
        for header in [stream(), plain] {
            assert_eq!(Header::decode("x", &header.encode(), 0).unwrap(), header);
        }
    }

    #[test]
    fn every_bad_field_is_named_with_its_offset() {
        // Field, offset of what is overwritten, the bytes, and where the footer's error points then.
        let cases: [(&str, u64, &[u8]); 19] = [
            ("magicNumber", 0, b"KDMW"),
            ("version", 4, &[0]),
            ("version", 4, &[4]),
            ("flags", 8, &[9]),
            ("flags", 11, &[0x80]),
            ("flags", 10, &[1]),
            ("flags", 10, &[2]),
            ("capacity", 19, &[1]),
            ("grainSize", 20, &[0]),
            ("grainSize", 20, &[96]),
            ("grainSize", 20, &[0, 0x20]),
            ("descriptorSize", 36, &[0]),
            ("descriptorSize", 36, &[1, 8]),
            ("numGTEsPerGT", 44, &[1, 2]),
            ("gdOffset", 56, &[0; 8]),
            ("singleEndLineChar", 73, b"\r"),
            ("singleEndLineChar", 73, b"\n \n\n"),
            ("compressAlgorithm", 77, &[0]),
            ("compressAlgorithm", 77, &[2]),
        ];
        for (field, at, overwrite) in cases {
            for base in [0, 7 * 512] {
                let mut sector = stream().encode();
                let at = usize::try_from(at).unwrap();
                sector[at..at + overwrite.len()].copy_from_slice(overwrite);
                let error = Header::decode("x", &sector, base).unwrap_err();
                assert_eq!((error.kind(), error.id()), (Kind::Image, "vmdk.field"));
                let place = match field {
                    "flags" => 8,
                    "capacity" => 12,
                    _ => at as u64,
                } + base;
                let what = format!("x: VMDK field `{field}` at offset {place} is malformed");
                assert_eq!(error.what(), what, "{error:?}");
            }
        }
    }
}
