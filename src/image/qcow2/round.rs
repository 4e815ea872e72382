//! A later round of a finished qcow2 image: what changed is appended, and one new header makes it count.
//!
//! ```text
//! the image so far | changed clusters, their L2 tables | refcount blocks | refcount table | L1     then: header sector
//! ```
//! Nothing of the image so far is written over but its first sectors, so until the header is replaced the image is the old
//! one, and with the old header it is the old one again. What is no longer referred to gets a refcount of 0: QEMU finds
//! no leak in the result.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::header::{Compression, HEADER_LEN, Header, bad_field, feature};
use super::metadata::Metadata;
use super::table::{Entries, Geometry, Mapping, OFFSET_MASK, l1_entry, plain_entry};
use super::writer::{CLUSTER, GEOMETRY, L2_ENTRIES, REFCOUNTS, Writer, big_endian, block_bytes};
use crate::error::{Error, Kind, Result};
use crate::image::Compress;
use crate::io::batch::{Cell, Encoder, Pack, Piece};
use crate::io::{ReadAt, read_vec};
use crate::unit::{Extent, ExtentMap, to_usize};

/// Bytes at the start of the image that a round replaces: the header lies in the first 512 of them.
pub const FRONT: u64 = 4096;
/// The largest refcount table QEMU opens, in bytes (8 MiB: QCOW_MAX_REFTABLE_SIZE).
const MAX_REFTABLE: u64 = 8 << 20;

/// Lays out one round after the end of an image.
pub struct Round {
    base: Arc<dyn ReadAt>,
    header: Header,
    compress: Compress,
    /// What the round sets, in whole clusters of the disk; where no data comes for it, it becomes zeroes.
    changed: ExtentMap,
    /// Changes below this offset of the disk are laid out.
    done: u64,
    position: u64,
    l1: Vec<u64>,
    /// The L2 table being changed, and which.
    window: Option<(usize, Vec<u64>)>,
    reftable: Vec<u64>,
    /// The refcount blocks that this round changes.
    blocks: BTreeMap<usize, Vec<u16>>,
}

impl Round {
    /// A round on the image in `base` that sets `changed` of its disk, in whole clusters of 64 KiB but for the disk's end.
    ///
    /// Fails with [`Kind::Image`] when the image is not of the shape that haul writes.
    pub fn new(base: Arc<dyn ReadAt>, compress: Compress, changed: ExtentMap) -> Result<Self> {
        let name = base.name();
        let header = shape(&*base, compress)?;
        let entries = |at: u64, count: u64, field: &'static str, place: u64| -> Result<Vec<u64>> {
            let table = Extent::at(at, count * 8);
            if table.end > base.size() {
                return Err(bad_field(&name, field, place, "the table lies beyond the end of the file"));
            }
            let bytes = read_vec(&*base, table.start, to_usize(table.len()))?;
            Ok(bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
        };
        let l1 = entries(header.l1_offset, GEOMETRY.l1_entries(header.virtual_size), "l1_table_offset", 40)?;
        let reftable_bytes = u64::from(header.refcount_table_clusters) * CLUSTER;
        if reftable_bytes > MAX_REFTABLE {
            return Err(bad_field(&name, "refcount_table_clusters", 56, "the table is longer than 8 MiB"));
        }
        let reftable =
            entries(header.refcount_table_offset, reftable_bytes / 8, "refcount_table_offset", 48)?;
        let position = base.size().next_multiple_of(CLUSTER);
        Ok(Round {
            base,
            header,
            compress,
            changed,
            done: 0,
            position,
            l1,
            window: None,
            reftable,
            blocks: BTreeMap::new(),
        })
    }

    fn bad(&self, what: &str, offset: u64, why: impl Into<String>) -> Error {
        bad_field(&self.base.name(), what, offset, why)
    }

    /// Reads one cluster of the image so far, in which `offset` was found by the name of `what`.
    fn cluster(&self, offset: u64, what: &str) -> Result<Vec<u8>> {
        if !offset.is_multiple_of(CLUSTER) || offset + CLUSTER > self.base.size() {
            return Err(self.bad(what, offset, "it is no cluster of the file"));
        }
        read_vec(&*self.base, offset, to_usize(CLUSTER))
    }

    /// Makes the refcount block with this index one that the round changes.
    fn touch(&mut self, index: usize) -> Result<()> {
        if self.blocks.contains_key(&index) {
            return Ok(());
        }
        let block = match self.reftable.get(index).map_or(0, |entry| entry & OFFSET_MASK) {
            0 => vec![0; to_usize(REFCOUNTS)],
            offset => {
                let bytes = self.cluster(offset, "refcount table entry")?;
                bytes.as_chunks::<2>().0.iter().map(|count| u16::from_be_bytes(*count)).collect()
            }
        };
        self.blocks.insert(index, block);
        Ok(())
    }

    /// Adds or takes away one reference to each cluster that `extent` of the file touches.
    fn count(&mut self, extent: Extent, more: bool) -> Result<()> {
        for cluster in extent.start / CLUSTER..extent.end.div_ceil(CLUSTER) {
            let index = to_usize(cluster / REFCOUNTS);
            self.touch(index)?;
            let block = self.blocks.get_mut(&index);
            let count = block.and_then(|block| block.get_mut(to_usize(cluster % REFCOUNTS)));
            let counted = count.and_then(|count| {
                *count = if more { count.checked_add(1)? } else { count.checked_sub(1)? };
                Some(())
            });
            if counted.is_none() {
                let why = if more { "it is referred to too often" } else { "nothing refers to it" };
                return Err(self.bad("refcount of the cluster", cluster * CLUSTER, why));
            }
        }
        Ok(())
    }

    /// Opens the L2 table of `cluster` of the disk; the one open before is laid out.
    fn open_window(&mut self, cluster: u64, pieces: &mut Vec<Piece>) -> Result<()> {
        let index = to_usize(cluster / L2_ENTRIES);
        if self.window.as_ref().is_some_and(|(open, _)| *open == index) {
            return Ok(());
        }
        self.close_window(pieces)?;
        let table = match self.l1.get(index).map(|entry| entry & OFFSET_MASK) {
            None => return Err(self.bad("L1 table", self.header.l1_offset, "it is too short for the disk")),
            Some(0) => vec![0; to_usize(L2_ENTRIES)],
            Some(offset) => {
                let bytes = self.cluster(offset, "L1 entry")?;
                bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect()
            }
        };
        self.window = Some((index, table));
        Ok(())
    }

    fn close_window(&mut self, pieces: &mut Vec<Piece>) -> Result<()> {
        let Some((index, table)) = self.window.take() else { return Ok(()) };
        let old = self.l1[index] & OFFSET_MASK;
        if old != 0 {
            self.count(Extent::at(old, CLUSTER), false)?;
        }
        self.l1[index] = match table.iter().all(|entry| *entry == 0) {
            true => 0,
            false => l1_entry(self.table(big_endian(&table), pieces)?),
        };
        Ok(())
    }

    /// Lays out one whole cluster of table bytes and returns where.
    fn table(&mut self, bytes: Vec<u8>, pieces: &mut Vec<Piece>) -> Result<u64> {
        self.align(pieces);
        let at = self.position;
        pieces.push(Piece::Meta(bytes));
        self.position += CLUSTER;
        self.count(Extent::at(at, CLUSTER), true)?;
        Ok(at)
    }

    fn align(&mut self, pieces: &mut Vec<Piece>) {
        let aligned = self.position.next_multiple_of(CLUSTER);
        if aligned > self.position {
            pieces.push(Piece::Zeros(aligned - self.position));
            self.position = aligned;
        }
    }

    /// Gives `cluster` of the disk the L2 entry `entry`, and lets go of what it had.
    fn map(&mut self, cluster: u64, entry: u64, pieces: &mut Vec<Piece>) -> Result<()> {
        self.open_window(cluster, pieces)?;
        let Some((index, table)) = &mut self.window else { return Ok(()) };
        let slot = to_usize(cluster % L2_ENTRIES);
        let old = std::mem::replace(&mut table[slot], entry);
        let entries = Entries { geometry: GEOMETRY, version: 3, external: false };
        let at = (self.l1[*index] & OFFSET_MASK) + slot as u64 * 8;
        match entries.decode(old, 0, 0).map_err(|why| self.bad("L2 entry", at, why))? {
            Mapping::Plain(offset) => self.count(Extent::at(offset, CLUSTER), false),
            Mapping::Compressed(bytes) => self.count(bytes, false),
            Mapping::Zero | Mapping::Unallocated => Ok(()),
        }
    }

    /// Makes what changed in `within`, and has no data among `cells` (of a batch at `within`'s start), read as zeroes.
    fn unmap(&mut self, within: Extent, cells: &[Cell], pieces: &mut Vec<Piece>) -> Result<()> {
        let given: BTreeSet<u64> =
            cells.iter().map(|cell| (within.start + u64::from(cell.start)) / CLUSTER).collect();
        let runs: Vec<Extent> = self.changed.within(within).collect();
        for run in runs {
            for cluster in (run.start / CLUSTER..run.end.div_ceil(CLUSTER)).filter(|c| !given.contains(c)) {
                // A window that maps nothing and a cluster that is not mapped cost no table.
                let empty = self.l1.get(to_usize(cluster / L2_ENTRIES)).is_some_and(|entry| *entry == 0);
                let open = self.window.as_ref().is_some_and(|(open, _)| *open as u64 == cluster / L2_ENTRIES);
                if open || !empty {
                    self.map(cluster, 0, pieces)?;
                }
            }
        }
        Ok(())
    }

    /// Lays out refcount blocks, refcount table and L1 behind everything else; they count themselves.
    fn close_tables(&mut self, pieces: &mut Vec<Piece>) -> Result<()> {
        self.align(pieces);
        let clusters = |bytes: u64| bytes.div_ceil(CLUSTER).max(1);
        let l1_clusters = clusters(self.l1.len() as u64 * 8);
        let old_tables = [
            Extent::at(self.header.l1_offset, clusters(u64::from(self.header.l1_entries) * 8) * CLUSTER),
            Extent::at(
                self.header.refcount_table_offset,
                u64::from(self.header.refcount_table_clusters) * CLUSTER,
            ),
        ];
        for old in old_tables {
            self.count(old, false)?;
        }
        // Each block that is rewritten leaves its old place and takes a new one, both of which some block counts.
        let mut released = BTreeSet::new();
        let (mut total, mut table_clusters);
        loop {
            let before = self.blocks.len();
            let rewritten: Vec<usize> = self.blocks.keys().copied().collect();
            for index in rewritten {
                let old = self.reftable.get(index).map_or(0, |entry| entry & OFFSET_MASK);
                if old != 0 && released.insert(index) {
                    self.count(Extent::at(old, CLUSTER), false)?;
                }
            }
            let last = self.blocks.last_key_value().map_or(0, |(index, _)| *index as u64);
            table_clusters = clusters((last + 1).max(self.reftable.len() as u64) * 8);
            total = self.blocks.len() as u64 + table_clusters + l1_clusters;
            let end = self.position / CLUSTER + total;
            for index in self.position / CLUSTER / REFCOUNTS..=(end - 1) / REFCOUNTS {
                self.touch(to_usize(index))?;
            }
            if self.blocks.len() == before {
                break;
            }
        }
        if table_clusters * CLUSTER > MAX_REFTABLE {
            return Err(self.bad("refcount table", 48, "it would be longer than 8 MiB"));
        }
        self.count(Extent::at(self.position, total * CLUSTER), true)?;
        self.reftable.resize(to_usize(table_clusters * CLUSTER / 8), 0);
        for (index, block) in std::mem::take(&mut self.blocks) {
            self.reftable[index] = self.position;
            pieces.push(Piece::Meta(block_bytes(&block)));
            self.position += CLUSTER;
        }
        self.header.refcount_table_offset = self.position;
        self.header.refcount_table_clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
        pieces.push(Piece::Meta(big_endian(&self.reftable)));
        self.position += table_clusters * CLUSTER;
        self.header.l1_offset = self.position;
        let mut l1 = big_endian(&self.l1);
        l1.resize(to_usize(l1_clusters * CLUSTER), 0);
        pieces.push(Piece::Meta(l1));
        self.position += l1_clusters * CLUSTER;
        Ok(())
    }
}

/// The header of an image to which haul can append: one of the shape it writes itself.
fn shape(base: &dyn ReadAt, compress: Compress) -> Result<Header> {
    let metadata = Metadata::read(base)?;
    let header = metadata.header;
    let zstd = header.compression == Compression::Zstd;
    let why = match () {
        () if header.version != 3 || header.header_length as usize > HEADER_LEN => {
            "its header is not one that haul writes"
        }
        () if header.geometry() != GEOMETRY => "its clusters are not of 64 KiB",
        () if header.refcount_order != 4 => "its refcounts are not of 16 bits",
        () if header.incompatible & !feature::COMPRESSION != 0 || header.compatible != 0 => {
            "it has features that haul does not write"
        }
        () if header.backing_name.is_some() || header.snapshots != 0 || header.crypt_method != 0 => {
            "it has a backing file, snapshots or encryption"
        }
        () if compress == Compress::Zstd && !zstd || compress == Compress::Zlib && zstd => {
            "it is compressed in another way"
        }
        () => return Ok(header),
    };
    Err(Error::new(Kind::Image, "qcow2.round", format!("nothing can be appended to {}", base.name()))
        .because(why)
        .remedy("make the copy again as a whole")
        .fact("image", base.name()))
}

/// How the image in `base` compresses what is appended to it.
pub fn compression(base: &dyn ReadAt) -> Result<Compress> {
    let header = shape(base, Compress::None)?;
    Ok(if header.compression == Compression::Zstd { Compress::Zstd } else { Compress::Zlib })
}

/// Bytes of the image in `base` that hold data of its disk; the rest is tables, and what earlier rounds replaced.
pub fn live_bytes(base: &dyn ReadAt) -> Result<u64> {
    let metadata = Metadata::read(base)?;
    let header = &metadata.header;
    let geometry: Geometry = header.geometry();
    let entries = Entries { geometry, version: header.version, external: false };
    let l1 = read_vec(base, header.l1_offset, to_usize(geometry.l1_entries(header.virtual_size) * 8))?;
    let mut live = 0;
    for entry in l1.as_chunks::<8>().0 {
        let offset = u64::from_be_bytes(*entry) & OFFSET_MASK;
        if offset == 0 {
            continue;
        }
        let table = read_vec(base, offset, to_usize(geometry.cluster_size()))?;
        for entry in table.as_chunks::<8>().0 {
            live += match entries.decode(u64::from_be_bytes(*entry), 0, 0) {
                Ok(Mapping::Plain(_)) => geometry.cluster_size(),
                Ok(Mapping::Compressed(bytes)) => bytes.len(),
                _ => 0,
            };
        }
    }
    Ok(live)
}

impl Encoder for Round {
    fn front_len(&self) -> u64 {
        FRONT
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        self.unmap(Extent::new(self.done, extent.start.max(self.done)), &[], &mut pieces)?;
        self.unmap(extent, cells, &mut pieces)?;
        let mut at = 0;
        for wanted in [false, true] {
            for cell in cells.iter().filter(|cell| cell.compressed == wanted) {
                let cluster = (extent.start + u64::from(cell.start)) / CLUSTER;
                self.open_window(cluster, &mut pieces)?;
                if !cell.compressed {
                    self.align(&mut pieces);
                }
                let host = Extent::at(self.position, u64::from(cell.stored));
                self.count(host, true)?;
                self.position = host.end;
                let stored = cell.stored as usize;
                let start = if self.compress == Compress::None { cell.start as usize } else { at };
                at += stored;
                match pieces.last_mut() {
                    Some(Piece::Data(last)) if last.end == start => last.end = start + stored,
                    _ => pieces.push(Piece::Data(start..start + stored)),
                }
                let entry = match cell.compressed {
                    true => GEOMETRY.compressed_entry(host.start, host.len()),
                    false => plain_entry(host.start),
                };
                self.map(cluster, entry, &mut pieces)?;
            }
        }
        self.done = extent.end;
        Ok(pieces)
    }

    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)> {
        let mut pieces = Vec::new();
        self.unmap(Extent::new(self.done, u64::MAX), &[], &mut pieces)?;
        self.close_window(&mut pieces)?;
        self.close_tables(&mut pieces)?;
        let mut front = read_vec(&*self.base, 0, to_usize(FRONT))?;
        let length = (self.header.header_length as usize).min(HEADER_LEN);
        front[..length].copy_from_slice(&self.header.encode()[..length]);
        Ok((pieces, front))
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        Writer::packer_of(self.compress)
    }

    fn cells_matter(&self) -> bool {
        true
    }
}
