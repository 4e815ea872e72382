//! Records of the MFT, and what else is written in 512-byte pieces that an update sequence ties together.

use std::ops::Range;

use super::runs::{Run, decode};
use super::{Step, Stop, require};
use crate::layout::field::{bytes, has, le16, le32, le64};
use crate::unit::to_usize;

/// The pieces an update sequence protects, whatever the sector size.
const STRIDE: usize = 512;
/// Flag of a record: it is in use.
const IN_USE: u16 = 1;
/// What ends the list of attributes.
const END: u32 = 0xffff_ffff;
/// The shortest attribute, and the shortest whose content lies elsewhere.
const RESIDENT: usize = 24;
const NON_RESIDENT: usize = 64;

/// Types of attributes.
pub(super) mod kind {
    pub const ATTRIBUTE_LIST: u32 = 0x20;
    pub const VOLUME_NAME: u32 = 0x60;
    pub const VOLUME_INFORMATION: u32 = 0x70;
    pub const DATA: u32 = 0x80;
    pub const INDEX_ROOT: u32 = 0x90;
    pub const INDEX_ALLOCATION: u32 = 0xa0;
    pub const BITMAP: u32 = 0xb0;
}

/// Undoes what protects a structure against being written in part: each 512 bytes end with the same number, and what
/// was there is in a list.
pub(super) fn fix_up(structure: &mut [u8]) -> Step<()> {
    let torn = || "was written in part".to_owned();
    let (at, count) = (usize::from(le16(structure, 4)), usize::from(le16(structure, 6)));
    let sound = structure.len().is_multiple_of(STRIDE)
        && count == structure.len() / STRIDE + 1
        && at >= 8
        && at.is_multiple_of(2)
        && at + 2 * count <= STRIDE - 2;
    require(sound, torn)?;
    let list = structure.get(at..at + 2 * count).unwrap_or_default().to_vec();
    for (i, piece) in structure.chunks_exact_mut(STRIDE).enumerate() {
        if let Some(last) = piece.last_chunk_mut::<2>() {
            require(*last == bytes::<2>(&list, 0), torn)?;
            *last = bytes(&list, 2 + 2 * i);
        }
    }
    Ok(())
}

/// A record of the MFT, which describes a file.
pub(super) struct Record {
    raw: Vec<u8>,
    attributes: Vec<Range<usize>>,
}

impl Record {
    /// Reads record `number` out of its bytes.
    pub fn parse(mut raw: Vec<u8>, number: u64) -> Step<Record> {
        let named = |stop| named(stop, &format!("record {number} of the MFT"));
        let holds = |holds: bool, what: &str| require(holds, || what.to_owned()).map_err(named);
        holds(has(&raw, 0, b"FILE"), "is not one")?;
        fix_up(&mut raw).map_err(named)?;
        holds(le16(&raw, 22) & IN_USE != 0, "is not in use")?;
        holds(le64(&raw, 32) == 0, "belongs to another")?;
        // Only versions since 3.1 have the number; the update sequence takes its place in older ones.
        let own = le16(&raw, 4) < 48 || u64::from(le32(&raw, 44)) == number & 0xffff_ffff;
        holds(own, "has another number")?;
        let used = to_usize(le32(&raw, 24).into());
        holds(used <= raw.len() && to_usize(le32(&raw, 28).into()) == raw.len(), "has a wrong length")?;
        let attributes = attributes(raw.get(..used).unwrap_or_default()).map_err(named)?;
        Ok(Record { raw, attributes })
    }

    /// How often the record was given to another file.
    pub fn sequence(&self) -> u16 {
        le16(&self.raw, 16)
    }

    /// The part that says something.
    pub fn content(&self) -> &[u8] {
        self.raw.get(..to_usize(le32(&self.raw, 24).into())).unwrap_or_default()
    }

    /// Whether the file has attributes in other records.
    pub fn is_spread(&self) -> bool {
        self.all().any(|attribute| attribute.kind() == kind::ATTRIBUTE_LIST)
    }

    /// The one attribute of that type and name in this record.
    pub fn attribute(&self, kind: u32, name: &str) -> Step<Option<Attribute<'_>>> {
        let mut found = self.all().filter(|attribute| attribute.kind() == kind && attribute.has_name(name));
        let first = found.next();
        require(found.next().is_none(), || format!("has two attributes {kind:#x}"))?;
        Ok(first)
    }

    fn all(&self) -> impl Iterator<Item = Attribute<'_>> {
        self.attributes.iter().map(|range| Attribute(self.raw.get(range.clone()).unwrap_or_default()))
    }
}

/// Where the attributes of a record lie.
fn attributes(record: &[u8]) -> Step<Vec<Range<usize>>> {
    let mut found = Vec::new();
    let mut at = usize::from(le16(record, 20));
    let damaged = || "has damaged attributes".to_owned();
    while at.is_multiple_of(8) && at + 4 <= record.len() {
        if le32(record, at) == END {
            return Ok(found);
        }
        let len = to_usize(le32(record, at + 4).into());
        let attribute = record.get(at..at.saturating_add(len)).unwrap_or_default();
        require(Attribute(attribute).is_sound(), damaged)?;
        found.push(at..at + len);
        at += len;
    }
    Err(damaged().into())
}

/// An attribute of a file: its name, its content, the list of a folder.
#[derive(Clone, Copy)]
pub(super) struct Attribute<'r>(&'r [u8]);

/// Where the content of an attribute lies outside of its record.
#[derive(Debug)]
pub(super) struct Stream {
    /// In the order of the file; all of it unless there are more in other records.
    pub runs: Vec<Run>,
    /// Clusters it takes in all.
    pub clusters: u64,
    /// Length in bytes.
    pub size: u64,
    /// How many of them were ever written.
    pub initialised: u64,
}

impl<'r> Attribute<'r> {
    fn kind(&self) -> u32 {
        le32(self.0, 0)
    }

    fn is_resident(&self) -> bool {
        self.0.get(8) == Some(&0)
    }

    fn name(&self) -> Option<&'r [u8]> {
        let [chars] = bytes::<1>(self.0, 9);
        let at = usize::from(le16(self.0, 10));
        if chars == 0 { Some(&[]) } else { self.0.get(at..at + 2 * usize::from(chars)) }
    }

    fn has_name(&self, name: &str) -> bool {
        self.name().is_some_and(|own| name.encode_utf16().flat_map(u16::to_le_bytes).eq(own.iter().copied()))
    }

    fn is_sound(&self) -> bool {
        let resident = self.is_resident();
        self.0.len() >= if resident { RESIDENT } else { NON_RESIDENT }
            && self.0.len().is_multiple_of(8)
            && self.name().is_some()
            && (!resident || self.value().is_some())
    }

    /// Its content, if that is in the record.
    pub fn value(&self) -> Option<&'r [u8]> {
        let at = usize::from(le16(self.0, 20));
        let len = to_usize(le32(self.0, 16).into());
        self.0.get(at..)?.get(..len).filter(|_| self.is_resident() && at >= RESIDENT)
    }

    /// Where its content lies, or its start if there is more in other records, on a volume of `clusters` clusters of
    /// `cluster_size` bytes.
    pub fn stream(&self, cluster_size: u64, clusters: u64) -> Step<Stream> {
        require(!self.is_resident(), || "is in its record".into())?;
        require(le16(self.0, 12) == 0, || "is compressed, encrypted or sparse".into())?;
        let (first, last) = (le64(self.0, 16), le64(self.0, 24));
        let (allocated, size, initialised) = (le64(self.0, 40), le64(self.0, 48), le64(self.0, 56));
        let pairs = usize::from(le16(self.0, 32));
        let runs = decode(self.0.get(pairs.max(NON_RESIDENT)..).unwrap_or_default(), clusters)?;
        let listed: u64 = runs.iter().map(|run| run.clusters.len()).sum();
        let sound = pairs >= NON_RESIDENT
            && first == 0
            && last.wrapping_add(1) == listed
            && allocated.is_multiple_of(cluster_size)
            && listed <= allocated / cluster_size
            && initialised <= size
            && size <= allocated;
        require(sound, || "has lengths that contradict each other".into())?;
        Ok(Stream { runs, clusters: allocated / cluster_size, size, initialised })
    }
}

impl Stream {
    /// Stops unless all of it is known.
    pub fn require_complete(&self) -> Step<()> {
        require(self.listed() == self.clusters, || "is spread over several records".into())
    }

    /// Clusters of it that are known.
    pub fn listed(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.vcn + run.clusters.len())
    }
}

/// Says of what a reason is.
pub(super) fn named(stop: Stop, what: &str) -> Stop {
    match stop {
        Stop::Whole(why) => format!("{what} {why}").into(),
        failed => failed,
    }
}
