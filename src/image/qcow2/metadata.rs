//! What an image says about itself before any of its tables is read: header, extensions, names, snapshots.

use super::header::{Compression, Extensions, HEADER_LEN, Header, bad_field, feature};
use crate::error::Result;
use crate::io::{ReadAt, read_array, read_vec};
use crate::unit::{MIB, to_usize};

/// The largest snapshot table haul reads, in bytes; 65,536 snapshots of 256 bytes.
const MAX_SNAPSHOT_TABLE: u64 = 16 * MIB;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Snapshot {
    /// Its id, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub taken: u32,
}

/// The facts of a qcow2 image for `haul inspect`. Control characters in names are escaped.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Info {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// How compressed clusters are compressed, if there are any.
    pub compression: Compression,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// The backing file's name, if the image has one.
    pub backing_file: Option<String>,
    /// The backing file's format, if the image names it.
    pub backing_format: Option<String>,
    /// The external data file's name, if the image has one.
    pub data_file: Option<String>,
    /// Whether L2 entries map subclusters.
    pub extended_l2: bool,
    /// Whether refcounts are updated lazily.
    pub lazy_refcounts: bool,
    /// Whether the image was not closed cleanly: its refcounts may be stale, its data is not.
    pub dirty: bool,
    /// Whether the image is marked as damaged.
    pub corrupt: bool,
    /// The encryption method, if it is encrypted.
    pub encryption: Option<String>,
    /// Incompatible features haul does not know, by the image's own names or by bit.
    pub unknown_features: Vec<String>,
    /// Internal snapshots, which a copy of the active disk leaves behind.
    pub snapshots: Vec<Snapshot>,
}

/// Everything but the tables.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// The header.
    pub header: Header,
    /// The header extensions.
    pub extensions: Extensions,
    /// The backing file's name, as the image has it.
    pub backing_file: Option<String>,
    /// Internal snapshots.
    pub snapshots: Vec<Snapshot>,
}

impl Metadata {
    /// Reads and checks the metadata of the image on `file`.
    pub fn read(file: &(impl ReadAt + ?Sized)) -> Result<Self> {
        let name = file.name();
        let size = file.size();
        let start = read_vec(file, 0, to_usize(size.min(HEADER_LEN as u64)))?;
        let header = Header::decode(&name, &start)?;
        // Extensions end where the backing file's name begins, or with the first cluster (spec, "Header
        // extensions"); the name lies inside that cluster (checked with the header).
        let area_end = header.backing_name.map_or(header.geometry().cluster_size(), |(offset, _)| offset);
        let area_start = u64::from(header.header_length);
        let area =
            read_vec(file, area_start.min(size), to_usize(area_end.min(size).saturating_sub(area_start)))?;
        let extensions = Extensions::decode(&name, &area, area_start)?;
        let backing_file = match header.backing_name {
            Some((offset, len)) if offset + u64::from(len) <= size => {
                Some(read_vec(file, offset, to_usize(len.into()))?)
            }
            Some(_) => {
                return Err(bad_field(
                    &name,
                    "backing_file_offset",
                    8,
                    "the name lies beyond the end of the file",
                ));
            }
            None => None,
        };
        let backing_file = backing_file.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let snapshots = snapshots(file, &name, &header)?;
        Ok(Metadata { header, extensions, backing_file, snapshots })
    }

    /// The name of the external data file, if the image called `image` keeps its clusters in one.
    pub(in crate::image) fn data_file(&self, image: &str) -> Result<Option<&str>> {
        if self.header.incompatible & feature::DATA_FILE == 0 {
            return Ok(None);
        }
        let why = "incompatible feature bit 2 asks for a data file, and no header extension names one";
        let missing = || bad_field(image, "external data file name", 72, why);
        self.extensions.data_file.as_deref().ok_or_else(missing).map(Some)
    }

    /// The facts.
    pub fn info(&self) -> Info {
        let header = &self.header;
        let has = |bit: u64| header.incompatible & bit != 0;
        let shown = |name: &Option<String>| name.as_deref().map(printable);
        let unknown = (0..64).filter(|bit| has(1 << bit) && feature::KNOWN & 1 << bit == 0);
        let unknown = unknown.map(|bit| match self.extensions.feature_name(0, bit) {
            Some(name) => name.to_owned(),
            None => format!("bit {bit}"),
        });
        Info {
            version: header.version,
            cluster_size: header.geometry().cluster_size(),
            compression: header.compression,
            refcount_bits: 1 << header.refcount_order,
            backing_file: shown(&self.backing_file),
            backing_format: shown(&self.extensions.backing_format),
            data_file: shown(&self.extensions.data_file),
            extended_l2: has(feature::EXTENDED_L2),
            lazy_refcounts: header.compatible & feature::LAZY_REFCOUNTS != 0,
            dirty: has(feature::DIRTY),
            corrupt: has(feature::CORRUPT),
            encryption: header.encryption(),
            unknown_features: unknown.collect(),
            snapshots: self.snapshots.clone(),
        }
    }
}

/// A name from an image as it may be shown: control characters could drive a terminal.
fn printable(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// The snapshot table (spec, "Snapshots").
fn snapshots(file: &(impl ReadAt + ?Sized), name: &str, header: &Header) -> Result<Vec<Snapshot>> {
    const FIXED: u64 = 40;
    let start = header.snapshots_offset;
    let end = file.size().min(start.saturating_add(MAX_SNAPSHOT_TABLE));
    let mut found = Vec::new();
    let mut at = start;
    for i in 0..header.snapshots {
        let bad = || {
            let why =
                format!("snapshot {i} of {} leaves the file, or the table exceeds 16 MiB", header.snapshots);
            bad_field(name, "snapshot table entry", at, why)
        };
        if at.saturating_add(FIXED) > end {
            return Err(bad());
        }
        let fixed: [u8; 40] = read_array(file, at)?;
        let u32_at = |i: usize| u32::from_be_bytes([fixed[i], fixed[i + 1], fixed[i + 2], fixed[i + 3]]);
        let id_len = usize::from(u16::from_be_bytes([fixed[12], fixed[13]]));
        let name_len = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
        let text_at = at + FIXED + u64::from(u32_at(36));
        let next = text_at + (id_len + name_len) as u64;
        if next > end {
            return Err(bad());
        }
        let text = read_vec(file, text_at, id_len + name_len)?;
        let shown = |bytes: &[u8]| printable(&String::from_utf8_lossy(bytes));
        found.push(Snapshot { id: shown(&text[..id_len]), name: shown(&text[id_len..]), taken: u32_at(16) });
        at = next.next_multiple_of(8);
    }
    Ok(found)
}
