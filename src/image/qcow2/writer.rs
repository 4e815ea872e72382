//! The forward qcow2 writer: clusters and tables leave in one stream, the front (header, refcount table, L1) last.
//!
//! ```text
//! front: header | refcount table | L1        known size, written last
//! then:  data of 512 MiB of the disk | its L2 table | data … | refcount block for each 2 GiB of file | …
//! ```
//! An L2 table follows its window and is left out when the window is empty; a refcount block follows once the
//! stream has passed the clusters it counts. Memory: one L2 table, the open refcount blocks, the front.
//! The format is QEMU's docs/interop/qcow2.rst, version 3, 64 KiB clusters, 16-bit refcounts.

use std::collections::BTreeMap;

use super::codec::{Codec, Deflate, Zstd};
use super::header::{Compression, Header};
use super::table::{Geometry, compressed_limit, l1_entry, plain_entry};
use crate::error::{Error, Kind, Result};
use crate::image::Compress;
use crate::io::batch::{Cell, Encoder, HashedBatch, Pack, PackedBatch, Piece};
use crate::io::{AlignedBuf, is_zero};
use crate::unit::{Extent, to_usize};

pub(super) const GEOMETRY: Geometry = Geometry { cluster_bits: 16, extended: false };
/// Bytes of a cluster.
pub const CLUSTER: u64 = GEOMETRY.cluster_size();
const CLUSTER_BYTES: usize = to_usize(CLUSTER);
/// Entries of an L2 table: 512 MiB of the disk.
pub(super) const L2_ENTRIES: u64 = GEOMETRY.l2_entries();
/// Entries of a refcount block: 2 GiB of the file.
pub(super) const REFCOUNTS: u64 = CLUSTER / 2;
/// A compressed cluster is stored only when it saves at least a sector, as QEMU does.
const WORTH_STORING: usize = to_usize(compressed_limit(GEOMETRY));

/// The largest virtual disk written, in bytes: an L1 table of 32 MiB, the most QEMU opens.
pub const MAX_SIZE: u64 = (super::header::MAX_L1_BYTES / 8) * GEOMETRY.l2_span();

/// Lays out a qcow2 image of a disk whose data comes in order.
pub struct Writer {
    size: u64,
    compress: Compress,
    position: u64,
    l1: Vec<u64>,
    /// Index of the 512 MiB window whose L2 table is open, and that table.
    window: u64,
    l2: Vec<u64>,
    reftable: Vec<u64>,
    reftable_clusters: u64,
    /// Refcount blocks not yet laid out, by index.
    open_blocks: BTreeMap<u64, Vec<u16>>,
}

impl Writer {
    /// A writer for a virtual disk of `size` bytes, rounded up to whole 512-byte sectors.
    pub fn new(size: u64, compress: Compress) -> Result<Self> {
        if size > MAX_SIZE {
            return Err(Error::new(Kind::Usage, "qcow2.too-large", format!("a disk of {size} bytes"))
                .because(format!("a qcow2 image with 64 KiB clusters holds at most {MAX_SIZE} bytes")));
        }
        let size = size.next_multiple_of(512);
        let windows = size.div_ceil(L2_ENTRIES * CLUSTER);
        let l1_clusters = (windows * 8).div_ceil(CLUSTER);
        // No more host clusters than: every data cluster, one alignment for each batch that mixes compressed and
        // plain clusters (a batch has 32 clusters or more), an L2 table and its alignment for each window.
        let data = size.div_ceil(CLUSTER);
        let bound = 16 + l1_clusters + data + data.div_ceil(32) + 2 * windows;
        let blocks = bound.div_ceil(REFCOUNTS - 1) + 1;
        let reftable_clusters = (blocks * 8).div_ceil(CLUSTER);
        let mut writer = Writer {
            size,
            compress,
            position: (1 + reftable_clusters + l1_clusters) * CLUSTER,
            l1: vec![0; to_usize(windows)],
            window: 0,
            l2: Vec::new(),
            reftable: Vec::new(),
            reftable_clusters,
            open_blocks: BTreeMap::new(),
        };
        writer.count(Extent::new(0, writer.position));
        Ok(writer)
    }

    /// A packer of clusters compressed so.
    pub(super) fn packer_of(compress: Compress) -> Result<Box<dyn Pack>> {
        Ok(match compress {
            Compress::None => Box::new(PlainPacker),
            Compress::Zlib => Box::new(CompressingPacker::new(Deflate::new())),
            Compress::Zstd => Box::new(CompressingPacker::new(Zstd::new()?)),
        })
    }

    /// Adds one reference to each cluster that `extent` of the file touches.
    fn count(&mut self, extent: Extent) {
        for cluster in extent.start / CLUSTER..extent.end.div_ceil(CLUSTER) {
            let block =
                self.open_blocks.entry(cluster / REFCOUNTS).or_insert_with(|| vec![0; to_usize(REFCOUNTS)]);
            let count = &mut block[to_usize(cluster % REFCOUNTS)];
            *count = count.saturating_add(1);
        }
    }

    /// Moves on to a cluster border.
    fn align(&mut self, pieces: &mut Vec<Piece>) {
        let aligned = self.position.next_multiple_of(CLUSTER);
        if aligned > self.position {
            pieces.push(Piece::Zeros(aligned - self.position));
            self.position = aligned;
        }
    }

    /// Lays out one whole cluster of table bytes and returns where.
    fn table(&mut self, bytes: Vec<u8>, pieces: &mut Vec<Piece>) -> u64 {
        self.align(pieces);
        let at = self.position;
        pieces.push(Piece::Meta(bytes));
        self.position += CLUSTER;
        self.count(Extent::at(at, CLUSTER));
        at
    }

    /// Lays out the open window's L2 table, unless nothing is in it.
    fn close_window(&mut self, pieces: &mut Vec<Piece>) {
        if self.l2.is_empty() {
            return;
        }
        let table = big_endian(&self.l2);
        self.l2.clear();
        let at = self.table(table, pieces);
        self.l1[to_usize(self.window)] = l1_entry(at);
    }

    fn map(&mut self, cluster: u64, entry: u64) {
        if self.l2.is_empty() {
            self.l2.resize(to_usize(L2_ENTRIES), 0);
        }
        self.l2[to_usize(cluster % L2_ENTRIES)] = entry;
    }

    /// Lays out each refcount block whose clusters are all behind the stream.
    fn close_blocks(&mut self, pieces: &mut Vec<Piece>) {
        while let Some((&index, _)) = self.open_blocks.first_key_value()
            && (index + 1) * REFCOUNTS * CLUSTER <= self.position / CLUSTER * CLUSTER
        {
            self.close_block(index, pieces);
        }
    }

    fn close_block(&mut self, index: u64, pieces: &mut Vec<Piece>) {
        let block = self.open_blocks.remove(&index).unwrap_or_default();
        let at = self.table(block_bytes(&block), pieces);
        self.record_block(index, at);
    }

    fn record_block(&mut self, index: u64, at: u64) {
        let slot = to_usize(index);
        if self.reftable.len() <= slot {
            self.reftable.resize(slot + 1, 0);
        }
        self.reftable[slot] = at;
    }

    /// Lays out the blocks still open, which count themselves too.
    fn close_all_blocks(&mut self, pieces: &mut Vec<Piece>) {
        self.align(pieces);
        loop {
            let end = self.position / CLUSTER + self.open_blocks.len() as u64;
            let last = (end - 1) / REFCOUNTS;
            if self.open_blocks.last_key_value().is_some_and(|(&index, _)| index >= last) {
                break;
            }
            self.open_blocks.insert(last, vec![0; to_usize(REFCOUNTS)]);
        }
        for place in 0..self.open_blocks.len() as u64 {
            self.count(Extent::at(self.position + place * CLUSTER, CLUSTER));
        }
        for (index, block) in std::mem::take(&mut self.open_blocks) {
            self.record_block(index, self.position);
            pieces.push(Piece::Meta(block_bytes(&block)));
            self.position += CLUSTER;
        }
    }

    fn front(&self) -> Vec<u8> {
        let compression = if self.compress == Compress::Zstd { Compression::Zstd } else { Compression::Zlib };
        let header = Header {
            refcount_table_offset: CLUSTER,
            refcount_table_clusters: u32::try_from(self.reftable_clusters).unwrap_or(u32::MAX),
            l1_offset: (1 + self.reftable_clusters) * CLUSTER,
            ..Header::new(self.size, GEOMETRY.cluster_bits, compression)
        };
        let mut front = header.encode().to_vec();
        front.resize(to_usize(header.refcount_table_offset), 0);
        front.extend(big_endian(&self.reftable));
        front.resize(to_usize(header.l1_offset), 0);
        front.extend(big_endian(&self.l1));
        front.resize(to_usize(self.front_len()), 0);
        front
    }
}

pub(super) fn block_bytes(counts: &[u16]) -> Vec<u8> {
    counts.iter().flat_map(|count| count.to_be_bytes()).collect()
}

pub(super) fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

impl Encoder for Writer {
    fn front_len(&self) -> u64 {
        let l1_clusters = (self.l1.len() as u64 * 8).div_ceil(CLUSTER);
        (1 + self.reftable_clusters + l1_clusters) * CLUSTER
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        if cells.is_empty() {
            return Ok(pieces);
        }
        let mut at = 0;
        for wanted in [false, true] {
            for cell in cells.iter().filter(|cell| cell.compressed == wanted) {
                let cluster = (extent.start + u64::from(cell.start)) / CLUSTER;
                if cluster / L2_ENTRIES != self.window {
                    self.close_window(&mut pieces);
                    self.window = cluster / L2_ENTRIES;
                }
                let stored = cell.stored as usize;
                if !cell.compressed {
                    self.align(&mut pieces);
                }
                let host = Extent::at(self.position, u64::from(cell.stored));
                let entry = if cell.compressed {
                    GEOMETRY.compressed_entry(host.start, host.len())
                } else {
                    plain_entry(host.start)
                };
                self.map(cluster, entry);
                self.count(host);
                self.position = host.end;
                let range = match self.compress {
                    Compress::None => cell.start as usize..cell.start as usize + stored,
                    _ => at..at + stored,
                };
                at += stored;
                match pieces.last_mut() {
                    Some(Piece::Data(last)) if last.end == range.start => last.end = range.end,
                    _ => pieces.push(Piece::Data(range)),
                }
            }
        }
        self.close_blocks(&mut pieces);
        Ok(pieces)
    }

    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)> {
        let mut pieces = Vec::new();
        self.close_window(&mut pieces);
        self.close_all_blocks(&mut pieces);
        Ok((pieces, self.front()))
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        Writer::packer_of(self.compress)
    }

    fn cells_matter(&self) -> bool {
        true
    }
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The clusters of a batch that are not all zero: place in the batch and bytes, zeroes to the cluster's end included.
fn clusters(batch: &HashedBatch) -> impl Iterator<Item = (usize, &[u8])> {
    let len = to_usize(batch.extent().len()).next_multiple_of(CLUSTER_BYTES).min(batch.bytes().len());
    batch.bytes()[..len]
        .chunks(CLUSTER_BYTES)
        .enumerate()
        .map(|(i, bytes)| (i * CLUSTER_BYTES, bytes))
        .filter(|(_, bytes)| !is_zero(bytes))
}

/// Stores clusters as they are, straight from the buffer they were read into.
struct PlainPacker;

impl Pack for PlainPacker {
    fn pack(&mut self, batch: HashedBatch) -> Result<PackedBatch> {
        let cells = clusters(&batch)
            .map(|(start, bytes)| Cell {
                start: to_u32(start),
                stored: to_u32(bytes.len()),
                compressed: false,
            })
            .collect();
        Ok(batch.packed(cells))
    }
}

/// Compresses each cluster by itself. Clusters that do not shrink come first in the packed buffer, as they are.
struct CompressingPacker<C> {
    codec: C,
    /// Compressed clusters of the batch at hand, end to end.
    compressed: Vec<u8>,
    packed: AlignedBuf,
}

impl<C: Codec> CompressingPacker<C> {
    fn new(codec: C) -> Self {
        CompressingPacker { codec, compressed: Vec::new(), packed: AlignedBuf::new(0) }
    }
}

impl<C: Codec> Pack for CompressingPacker<C> {
    fn pack(&mut self, batch: HashedBatch) -> Result<PackedBatch> {
        let capacity = batch.bytes().len();
        if self.packed.len() != capacity {
            self.packed = AlignedBuf::new(capacity);
        }
        self.compressed.clear();
        self.compressed.resize(capacity + CLUSTER_BYTES, 0);
        let mut cells = Vec::with_capacity(capacity / CLUSTER_BYTES);
        let (mut plain, mut compressed) = (0, 0);
        for (start, bytes) in clusters(&batch) {
            let room = &mut self.compressed[compressed..compressed + WORTH_STORING];
            let stored = match self.codec.compress(bytes, room)? {
                Some(n) => {
                    compressed += n;
                    n
                }
                None => {
                    self.packed[plain..plain + bytes.len()].copy_from_slice(bytes);
                    plain += bytes.len();
                    bytes.len()
                }
            };
            cells.push(Cell {
                start: to_u32(start),
                stored: to_u32(stored),
                compressed: stored < CLUSTER_BYTES,
            });
        }
        self.packed[plain..plain + compressed].copy_from_slice(&self.compressed[..compressed]);
        Ok(batch.repacked(cells, &mut self.packed))
    }
}
