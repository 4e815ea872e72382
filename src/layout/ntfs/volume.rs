//! The volume: records of its MFT, the content of its files, and what its file `$Volume` says.

use super::boot::BootSector;
use super::record::{Attribute, Record, Stream, kind, named};
use super::{Step, require};
use crate::io::{ReadAt, read_vec};
use crate::layout::field::{bytes, le16};
use crate::unit::{Extent, to_usize};

/// Records of the MFT that its mirror holds as well.
const MIRRORED: u64 = 4;

/// Numbers of the records of the files that every volume has.
pub(super) mod file {
    pub const MFT: u64 = 0;
    pub const LOG: u64 = 2;
    pub const VOLUME: u64 = 3;
    pub const ROOT: u64 = 5;
    pub const BITMAP: u64 = 6;
}

/// Flags of a volume that say nothing of its bitmap: it was mounted by Windows NT 4, its change journal is being deleted,
/// and one that Windows sets since version 7, of unknown meaning.
const HARMLESS: u16 = 0x8 | 0x10 | 0x80;
const DIRTY: u16 = 0x1;

/// A volume whose boot sector passed [`BootSector::check`], and the disk it is on.
pub(super) struct Volume<D> {
    disk: D,
    pub boot: BootSector,
    /// The MFT as far as its first record lists it.
    pub mft: Stream,
}

impl<D: ReadAt> Volume<D> {
    /// Opens the volume with this boot sector.
    pub fn open(disk: D, boot: BootSector) -> Step<Self> {
        boot.check(disk.size())?;
        let at = boot.mft * boot.cluster_size;
        let record = Record::parse(read_vec(&disk, at, boot.record_len())?, file::MFT)?;
        let none = Stream { runs: Vec::new(), clusters: 0, size: 0, initialised: 0 };
        let mut volume = Volume { disk, boot, mft: none };
        volume.mft = volume.partial(&record, kind::DATA, "").map_err(|stop| named(stop, "$MFT"))?;
        let first = volume.mft.runs.first().map(|run| run.clusters.start);
        require(first == Some(volume.boot.mft), || {
            "the boot sector and the MFT place the MFT differently".into()
        })?;
        Ok(volume)
    }

    /// Clusters of the volume.
    pub fn clusters(&self) -> Extent {
        Extent::new(0, self.boot.clusters)
    }

    /// Record `number` of the MFT.
    pub fn record(&self, number: u64) -> Step<Record> {
        let size = self.boot.record_size;
        let raw = self.read(&self.mft, number.saturating_mul(size), size);
        Record::parse(raw.map_err(|stop| named(stop, &format!("record {number} of the MFT")))?, number)
    }

    /// Reads `len` bytes at `offset` of a file, all of which were written; the caller has bounded `len`.
    pub fn read(&self, stream: &Stream, offset: u64, len: u64) -> Step<Vec<u8>> {
        let size = self.boot.cluster_size;
        let known = stream.initialised.min(stream.listed() * size);
        require(offset.checked_add(len).is_some_and(|end| end <= known), || {
            format!("is not known up to byte {}", offset.saturating_add(len))
        })?;
        let asked = Extent::at(offset, len);
        let mut content = vec![0; to_usize(len)];
        let first = stream.runs.partition_point(|run| (run.vcn + run.clusters.len()) * size <= offset);
        for run in stream.runs.iter().skip(first) {
            let own = Extent::at(run.vcn * size, run.clusters.len() * size);
            let part = own.intersect(asked);
            let place = to_usize(part.start - asked.start.min(part.start));
            let Some(target) = content.get_mut(place..place + to_usize(part.len())) else { break };
            if target.is_empty() {
                break;
            }
            self.disk.read_at(target, run.clusters.start * size + (part.start - own.start))?;
        }
        Ok(content)
    }

    /// Where an attribute's content lies; all of it must be listed in its file's first record.
    pub fn stream(&self, record: &Record, kind: u32, name: &str) -> Step<Stream> {
        let stream = self.partial(record, kind, name)?;
        stream.require_complete()?;
        Ok(stream)
    }

    /// Where an attribute's content, or at least its start, lies.
    pub fn partial(&self, record: &Record, kind: u32, name: &str) -> Step<Stream> {
        self.place(&wanted(record, kind, name)?)
    }

    /// Where the content of `attribute` lies.
    pub fn place(&self, attribute: &Attribute<'_>) -> Step<Stream> {
        attribute.stream(self.boot.cluster_size, self.boot.clusters)
    }

    /// The label; empty when there is none.
    pub fn label(&self) -> Step<String> {
        let record = self.record(file::VOLUME)?;
        let name = record.attribute(kind::VOLUME_NAME, "")?.and_then(|name| name.value());
        let (chars, _) = name.unwrap_or_default().as_chunks::<2>();
        let chars: Vec<u16> = chars.iter().map(|char| u16::from_le_bytes(*char)).collect();
        Ok(String::from_utf16_lossy(&chars))
    }

    /// The clusters of the MFT's mirror; stops unless it holds the same as the MFT.
    pub fn mirror(&self) -> Step<Extent> {
        let (size, len) = (self.boot.cluster_size, self.boot.record_size * MIRRORED);
        let place = Extent::at(self.boot.mirror, len.div_ceil(size));
        require(self.clusters().contains(place), || "the MFT's mirror lies beyond the end".into())?;
        let mirror = read_vec(&self.disk, place.start * size, to_usize(len))?;
        for (number, raw) in (0..).zip(mirror.chunks_exact(self.boot.record_len())) {
            let copy =
                Record::parse(raw.to_vec(), number).map_err(|stop| named(stop, "in the MFT's mirror,"))?;
            let same = copy.content() == self.record(number)?.content();
            require(same, || format!("record {number} of the MFT differs from its mirror"))?;
        }
        Ok(place)
    }

    /// Stops unless `$Volume` says that the file system is of a known version and was left in order.
    pub fn check_state(&self) -> Step<()> {
        let record = self.record(file::VOLUME)?;
        let attribute = record.attribute(kind::VOLUME_INFORMATION, "")?;
        let value = attribute.and_then(|attribute| attribute.value()).filter(|value| value.len() >= 12);
        let value = value.ok_or_else(|| "$Volume does not tell the volume's version".to_owned())?;
        let [major, minor] = bytes(value, 8);
        let known = matches!((major, minor), (1, 2) | (3, 0 | 1));
        require(known, || format!("version {major}.{minor} is not known"))?;
        let flags = le16(value, 10);
        require(flags & DIRTY == 0, || "it is marked as dirty".into())?;
        require(flags & !HARMLESS == 0, || format!("it has the volume flags {flags:#06x}"))
    }
}

/// An attribute that must be in this record.
pub(super) fn wanted<'r>(record: &'r Record, kind: u32, name: &str) -> Step<Attribute<'r>> {
    record.attribute(kind, name)?.ok_or_else(|| {
        let spread = if record.is_spread() { " in its first record" } else { "" };
        format!("has no attribute {kind:#x}{spread}").into()
    })
}
