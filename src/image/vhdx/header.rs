//! The header section: file type identifier, the two headers, the two region tables. Field names and offsets are
//! those of [MS-VHDX] 2.2; numbers are little-endian.

use super::{Guid, bad_field, checksum, field, guid, guid_text, u16_at, u32_at, u64_at};
use crate::error::{Error, Result};
use crate::io::{ReadAt, read_array, read_vec};
use crate::unit::{Extent, KIB, MIB, to_usize};

/// The first eight bytes of every file.
pub const SIGNATURE: [u8; 8] = *b"vhdxfile";
/// Where the two headers are, in bytes.
pub const HEADERS: [u64; 2] = [64 * KIB, 128 * KIB];
/// Bytes of a header.
pub const HEADER_LEN: usize = 4096;
/// Where the two region tables are, in bytes.
pub const REGION_TABLES: [u64; 2] = [192 * KIB, 256 * KIB];
/// Bytes of a region table.
pub const REGION_TABLE_LEN: u64 = 64 * KIB;
/// The most entries of a region table.
const MAX_REGIONS: u32 = 2047;
/// The region of the block allocation table.
pub const BAT: Guid = guid(0x2dc27766_f623_4200_9d64_115e9bfd4a08);
/// The region of the metadata.
pub const METADATA: Guid = guid(0x8b7ca206_4790_4b9a_b8fe_575f050f886e);

/// The header that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The program that made the image, from the file type identifier; control characters are escaped.
    pub creator: String,
    /// Grows with each header written.
    pub sequence: u64,
    /// Which entries of the log count; `None` when the log is empty.
    pub log_guid: Option<Guid>,
    /// Where the log is in the file.
    pub log: Extent,
}

/// The creator of the image on `file`, as its file type identifier names it.
fn creator(file: &dyn ReadAt, name: &str) -> Result<String> {
    const LEN: u64 = 520;
    if file.size() < LEN {
        let why = format!("the file ends after {} of its {LEN} bytes", file.size());
        return Err(bad_field(name, "file type identifier", 0, why));
    }
    let bytes: [u8; 520] = read_array(file, 0)?;
    if !bytes.starts_with(&SIGNATURE) {
        return Err(bad_field(name, "signature", 0, "it is not \"vhdxfile\": the file is no VHDX image"));
    }
    let units = bytes[8..].as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit));
    let text: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    Ok(String::from_utf16_lossy(&text).escape_debug().to_string())
}

impl Header {
    /// Reads the header that counts: the valid one with the higher sequence number. One of the two may be damaged,
    /// as it is when a program was killed while it wrote one.
    /// The file type identifier is read too.
    pub fn read(file: &dyn ReadAt, name: &str) -> Result<Self> {
        let creator = creator(file, name)?;
        let [first, second] = HEADERS.map(|at| read_header(file, name, at));
        let (at, bytes) = match (first?, second?) {
            (Ok(first), Ok(second)) => match u64_at(&first, 8).cmp(&u64_at(&second, 8)) {
                std::cmp::Ordering::Greater => (HEADERS[0], first),
                std::cmp::Ordering::Less => (HEADERS[1], second),
                std::cmp::Ordering::Equal if first == second => (HEADERS[0], first),
                std::cmp::Ordering::Equal => {
                    let why = "both headers have it, and they differ";
                    return Err(bad_field(name, "sequence_number", HEADERS[1] + 8, why));
                }
            },
            (Ok(bytes), Err(_)) => (HEADERS[0], bytes),
            (Err(_), Ok(bytes)) => (HEADERS[1], bytes),
            (Err(first), Err(second)) => return Err(first.fact("second_header", second.why())),
        };
        let bad = |field: &str, offset: u64, why: String| Err(bad_field(name, field, at + offset, why));
        let (log_version, version) = (u16_at(&bytes, 64), u16_at(&bytes, 66));
        if version != 1 {
            return bad("version", 66, format!("it is {version}; version 1 exists"));
        }
        let log_guid = Some(field(&bytes, 48)).filter(|guid| *guid != [0; 16]);
        if log_guid.is_some() && log_version != 0 {
            return bad("log_version", 64, format!("it is {log_version}, and the log must be replayed"));
        }
        let log = Extent::at(u64_at(&bytes, 72), u32_at(&bytes, 68).into());
        if !log.len().is_multiple_of(MIB) {
            return bad("log_length", 68, format!("it is {}, no whole number of MiB", log.len()));
        }
        if log.start < MIB || !log.start.is_multiple_of(MIB) || log.end > file.size() {
            let why = format!("no log of {} bytes can be at {} of this file", log.len(), log.start);
            return bad("log_offset", 72, why);
        }
        Ok(Header { creator, sequence: u64_at(&bytes, 8), log_guid, log })
    }
}

type Damaged<T> = std::result::Result<T, Error>;

/// The header at `at`, or what is wrong with it.
fn read_header(file: &dyn ReadAt, name: &str, at: u64) -> Result<Damaged<[u8; HEADER_LEN]>> {
    if file.size() < at + HEADER_LEN as u64 {
        let why = format!("the file ends at {}", file.size());
        return Ok(Err(bad_field(name, "header", at, why)));
    }
    let bytes: [u8; HEADER_LEN] = read_array(file, at)?;
    Ok(checked(name, "header", at, &bytes, b"head").map(|()| bytes))
}

/// Checks signature and checksum of the structure `bytes`, which is at `at`.
fn checked(name: &str, what: &str, at: u64, bytes: &[u8], signature: &[u8; 4]) -> Damaged<()> {
    if !bytes.starts_with(signature) {
        let why = format!("it is not \"{}\": no {what} is here", String::from_utf8_lossy(signature));
        return Err(bad_field(name, "signature", at, why));
    }
    let (stored, sum) = (u32_at(bytes, 4), checksum(bytes));
    if stored != sum {
        let why = format!("it is {stored:#010x}, and the {what}'s CRC-32C is {sum:#010x}");
        return Err(bad_field(name, "checksum", at + 4, why));
    }
    Ok(())
}

/// Where the two regions every file has are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    /// The block allocation table.
    pub bat: Extent,
    /// The metadata.
    pub metadata: Extent,
    /// All of them, those haul does not know included, and the log: no block of the disk lies there.
    pub taken: Vec<Extent>,
}

impl Regions {
    /// Reads the regions of `file`, whose log was replayed and is at `log`; one damaged table is tolerated, two that
    /// differ are not.
    pub fn read(file: &dyn ReadAt, name: &str, log: Extent) -> Result<Self> {
        let [first, second] = REGION_TABLES.map(|at| read_table(file, name, at));
        match (first?, second?) {
            (Ok(first), Ok(second)) if first != second => {
                let why = "it differs from the first region table, and both are intact";
                Err(bad_field(name, "region table", REGION_TABLES[1], why))
            }
            (Ok(table), _) => Regions::decode(name, REGION_TABLES[0], &table, log, file.size()),
            (_, Ok(table)) => Regions::decode(name, REGION_TABLES[1], &table, log, file.size()),
            (Err(first), Err(second)) => Err(first.fact("second_table", second.why())),
        }
    }

    /// Reads the valid region table `table`, which is at `at` of a file of `file_size` bytes.
    fn decode(name: &str, at: u64, table: &[u8], log: Extent, file_size: u64) -> Result<Self> {
        let bad = |field: &str, offset: u64, why: String| Err(bad_field(name, field, at + offset, why));
        let count = u32_at(table, 8);
        if count > MAX_REGIONS {
            return bad("entry_count", 8, format!("it is {count}; {MAX_REGIONS} are allowed"));
        }
        let mut regions = [(BAT, None), (METADATA, None)];
        let mut taken = vec![log];
        for offset in (0..u64::from(count)).map(|i| 16 + i * 32) {
            let entry: [u8; 32] = field(table, to_usize(offset));
            let (id, required) = (field(&entry, 0), u32_at(&entry, 28) & 1 != 0);
            let region = Extent::at(u64_at(&entry, 16), u32_at(&entry, 24).into());
            if region.start < MIB || !region.start.is_multiple_of(MIB) || region.end > file_size {
                let why =
                    format!("no region of {} bytes can be at {} of this file", region.len(), region.start);
                return bad("file_offset", offset + 16, why);
            }
            if region.is_empty() || !region.len().is_multiple_of(MIB) {
                return bad("length", offset + 24, format!("it is {}, no whole number of MiB", region.len()));
            }
            if let Some(other) = taken.iter().find(|taken| !taken.intersect(region).is_empty()) {
                let why = format!("the region {region:?} overlaps the log or another region at {other:?}");
                return bad("file_offset", offset + 16, why);
            }
            taken.push(region);
            match regions.iter_mut().find(|(known, _)| *known == id) {
                Some((_, Some(_))) => {
                    return bad("guid", offset, format!("a second region {}", guid_text(&id)));
                }
                Some((_, place)) => *place = Some(region),
                None if required => {
                    let why =
                        format!("the region {} is unknown, and required to read the disk", guid_text(&id));
                    return bad("guid", offset, why);
                }
                None => {}
            }
        }
        match regions {
            [(_, Some(bat)), (_, Some(metadata))] => Ok(Regions { bat, metadata, taken }),
            _ => bad("entry_count", 8, "the block allocation table or the metadata region is missing".into()),
        }
    }
}

/// The region table at `at`, or what is wrong with it.
fn read_table(file: &dyn ReadAt, name: &str, at: u64) -> Result<Damaged<Vec<u8>>> {
    if file.size() < at + REGION_TABLE_LEN {
        let why = format!("the file ends at {}", file.size());
        return Ok(Err(bad_field(name, "region table", at, why)));
    }
    let bytes = read_vec(file, at, to_usize(REGION_TABLE_LEN))?;
    Ok(checked(name, "region table", at, &bytes, b"regi").map(|()| bytes))
}
