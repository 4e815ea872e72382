//! The label, the physical volume header and the metadata areas (pvck(8), `--dump headers`, names the fields).

use crate::io::{ReadAt, read_array, read_vec};
use crate::layout::field::{bytes, has, le32, le64};
use crate::layout::{Step, require};
use crate::unit::{Extent, to_usize};

/// The label lies in one of the first sectors of its volume.
const LABEL_SECTORS: usize = 4;
const SECTOR: usize = 512;
/// Bytes at the start of a physical volume that may hold its label, and are read for it.
pub(super) const LABEL_SPACE: u64 = 2048;
/// What LVM's checksums begin with.
const CRC_SEED: u32 = 0xf597_a6cf;
/// Length of a metadata area's header in bytes; its texts go round in the rest.
const AREA_HEADER: u64 = 512;
/// Longest metadata text read, in bytes: some 4,000 logical volumes.
pub(super) const MAX_TEXT: u64 = 2 << 20;
/// The flag of a metadata area that is not kept up to date (`pvchange --metadataignore`).
const IGNORED: u32 = 1;

/// What a physical volume says of itself.
#[derive(Debug)]
pub(super) struct Header {
    /// Its UUID as LVM prints it.
    pub uuid: String,
    /// Its length in bytes.
    pub size: u64,
    /// Where its physical extents begin, in bytes.
    pub data: u64,
    /// Its metadata areas.
    pub metadata: Vec<Extent>,
    /// Its boot loader areas.
    pub boot: Vec<Extent>,
}

/// Reads the header of a volume that begins with `head`, its first 2 KiB or more; `None` when it has no label. An
/// error says why the header cannot be trusted.
pub(super) fn parse(head: &[u8]) -> Option<Result<Header, String>> {
    let is_label = |sector: &usize| {
        has(head, sector * SECTOR, b"LABELONE") && has(head, sector * SECTOR + 24, b"LVM2 001")
    };
    let mut labels = (0..LABEL_SECTORS).filter(is_label);
    let sector = labels.next()?;
    Some(match labels.next() {
        Some(_) => Err("it has more than one LVM label".into()),
        None => header(head, sector),
    })
}

fn header(head: &[u8], number: usize) -> Result<Header, String> {
    let sector: [u8; SECTOR] = bytes(head, number * SECTOR);
    check(crc(&sector[20..]) == le32(&sector, 16), || "its LVM label's checksum does not match".into())?;
    let own = le64(&sector, 8);
    check(own == number as u64, || format!("its LVM label is in sector {number}, but says {own}"))?;
    let at = to_usize(le32(&sector, 20).into());
    let header = sector.get(at..).filter(|_| at >= 32).unwrap_or_default();
    let uuid = header.get(..32).and_then(uuid).ok_or("its LVM header's UUID is none")?;
    let mut lists = Lists { header, at: 40 };
    let data = lists.next("data")?;
    let metadata = lists.next("metadata")?;
    let [data] = data[..] else { return Err(format!("it has {} data areas", data.len())) };
    // Physical volumes made before 2012 have zeroes here.
    let version = le32(header, lists.at);
    lists.at += 8;
    let boot = match version {
        0 => Vec::new(),
        1 | 2 => lists.next("boot loader")?,
        _ => return Err(format!("its LVM header extension's version {version} is not known")),
    };
    Ok(Header { uuid, size: le64(header, 32), data: data.start, metadata, boot })
}

/// The lists of areas in a header, one after the other.
struct Lists<'a> {
    header: &'a [u8],
    at: usize,
}

impl Lists<'_> {
    fn next(&mut self, name: &str) -> Result<Vec<Extent>, String> {
        let mut list = Vec::new();
        loop {
            check(self.at + 16 <= self.header.len(), || format!("its list of {name} areas has no end"))?;
            let (offset, size) = (le64(self.header, self.at), le64(self.header, self.at + 8));
            self.at += 16;
            if offset == 0 {
                return Ok(list);
            }
            list.push(Extent::at(offset, size));
        }
    }
}

/// The 32 characters of a UUID in LVM's groups.
fn uuid(raw: &[u8]) -> Option<String> {
    let text = str::from_utf8(raw).ok()?;
    let ends = [6, 10, 14, 18, 22, 26, 32];
    let groups = ends.iter().scan(0, |start, end| text.get(std::mem::replace(start, *end)..*end));
    let groups: Vec<&str> = groups.collect();
    raw.iter().all(u8::is_ascii_alphanumeric).then(|| groups.join("-"))
}

/// The committed text of the metadata area `area`; `None` when it has none, or is not kept up to date.
pub(super) fn read_area(volume: &dyn ReadAt, area: Extent) -> Step<Option<String>> {
    let place = format!("the metadata area at {}", area.start);
    require(area.end <= volume.size() && area.len() > AREA_HEADER, || format!("{place} leaves its volume"))?;
    let header = read_array::<{ to_usize(AREA_HEADER) }>(volume, area.start)?;
    let lies = |holds: bool, what: &str| require(holds, || format!("{what} of {place} does not fit"));
    lies(crc(&header[4..]) == le32(&header, 0), "the checksum")?;
    lies(has(&header, 4, b" LVM2 x[5A%r0N*>"), "the magic number")?;
    lies(le32(&header, 20) == 1, "the version")?;
    lies(le64(&header, 24) == area.start, "the start")?;
    lies(le64(&header, 32) == area.len(), "the size")?;
    // The first slot is the committed text, the second one is filled while a change is under way.
    let slot = |i: usize| {
        let at = 40 + i * 24;
        (le64(&header, at), le64(&header, at + 8), le32(&header, at + 16), le32(&header, at + 20))
    };
    require(slot(1).0 == 0, || format!("a change of the text in {place} was not finished"))?;
    let (offset, size, checksum, flags) = slot(0);
    lies(flags & !IGNORED == 0, "a flag")?;
    if offset == 0 || flags & IGNORED != 0 {
        return Ok(None);
    }
    lies((AREA_HEADER..area.len()).contains(&offset), "the text's offset")?;
    lies(size <= area.len() - AREA_HEADER, "the text's length")?;
    require(size <= MAX_TEXT, || format!("the text in {place} has {size} bytes"))?;
    let first = size.min(area.len() - offset);
    let mut text = read_vec(volume, area.start + offset, to_usize(first))?;
    text.extend(read_vec(volume, area.start + AREA_HEADER, to_usize(size - first))?);
    lies(crc(&text) == checksum, "the text's checksum")?;
    match String::from_utf8(text) {
        Ok(text) => Ok(Some(text)),
        Err(_) => Err(format!("the text in {place} is not UTF-8").into()),
    }
}

fn check(holds: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

/// LVM's checksum: a CRC-32 that starts with its own value and is not inverted.
fn crc(bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new_with_initial(!CRC_SEED);
    crc.update(bytes);
    !crc.finalize()
}
