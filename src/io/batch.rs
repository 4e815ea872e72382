//! The unit of the data path: a window of the disk that is read, hashed, packed and written as one. The types make
//! the order certain: only what was hashed can be packed, only what was packed can be written.

use std::ops::Range;

use super::{AlignedBuf, PoolBuf, is_zero};
use crate::error::Result;
use crate::unit::{Digest, Extent, KIB, MIB, to_usize};

/// How a disk is cut: into batches, which travel, and chunks, which carry a digest each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Length of the disk in bytes.
    pub size: u64,
    /// Bytes of a chunk: a power of two from 64 KiB up, so that no disk has more than 4 Mi chunks.
    pub chunk: u64,
}

impl Geometry {
    /// The geometry of a disk of `size` bytes: 64 KiB chunks up to 256 GiB, larger ones beyond.
    pub fn of(size: u64) -> Self {
        Geometry { size, chunk: size.div_ceil(4 * MIB).next_power_of_two().max(64 * KIB) }
    }

    /// Bytes of a batch: a whole number of chunks.
    pub fn batch(&self) -> u64 {
        self.chunk.max(2 * MIB)
    }

    /// The batch that holds `offset`.
    pub fn batch_at(&self, offset: u64) -> Extent {
        let start = offset / self.batch() * self.batch();
        Extent::new(start, (start + self.batch()).min(self.size))
    }

    /// The chunk with this index.
    pub fn chunk_at(&self, index: u64) -> Extent {
        Extent::new(index * self.chunk, ((index + 1) * self.chunk).min(self.size))
    }
}

/// A batch as read: the bytes of the source, with everything unused zero.
pub struct RawBatch {
    extent: Extent,
    buf: PoolBuf,
}

impl RawBatch {
    /// `buf` holds the bytes of `extent`, and zeroes after them up to its own end.
    pub fn new(extent: Extent, buf: impl Into<PoolBuf>) -> Self {
        let buf = buf.into();
        debug_assert!(extent.len() <= buf.len() as u64);
        RawBatch { extent, buf }
    }

    /// Digests every chunk.
    pub fn hash(self, geometry: &Geometry) -> HashedBatch {
        let digests = self.digests(geometry);
        HashedBatch { extent: self.extent, buf: self.buf, digests, before: None }
    }

    /// Digests every chunk, lets `amend` change the bytes, and digests again: the copy differs from the source
    /// there, and both digests go on record.
    pub fn hash_amended(
        mut self,
        geometry: &Geometry,
        amend: impl FnOnce(Extent, &mut [u8]) -> Result<()>,
    ) -> Result<HashedBatch> {
        let before = self.digests(geometry);
        amend(self.extent, &mut self.buf)?;
        let digests = self.digests(geometry);
        Ok(HashedBatch { extent: self.extent, buf: self.buf, digests, before: Some(before) })
    }

    fn digests(&self, geometry: &Geometry) -> Vec<Option<Digest>> {
        self.buf[..to_usize(self.extent.len())]
            .chunks(to_usize(geometry.chunk))
            .map(|chunk| (!is_zero(chunk)).then(|| Digest::of(chunk)))
            .collect()
    }
}

/// A batch whose every chunk has its digest.
pub struct HashedBatch {
    extent: Extent,
    buf: PoolBuf,
    digests: Vec<Option<Digest>>,
    before: Option<Vec<Option<Digest>>>,
}

impl HashedBatch {
    /// Where in the disk.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The bytes, with zeroes after them up to the buffer's end.
    pub fn bytes(&self) -> &[u8] {
        &self.buf
    }

    /// The same batch as it will be written, its cells in the buffer they were read into.
    pub fn packed(self, cells: Vec<Cell>) -> PackedBatch {
        let HashedBatch { extent, buf, digests, before } = self;
        PackedBatch { extent, digests, before, cells, buf }
    }

    /// The same batch as it will be written, its cells in `packed`, which has the batch's own memory afterwards.
    pub fn repacked(mut self, cells: Vec<Cell>, packed: &mut AlignedBuf) -> PackedBatch {
        self.buf.swap(packed);
        self.packed(cells)
    }
}

/// One unit of an image as it will be stored: a qcow2 cluster, a run of a raw image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Where in the batch's part of the virtual disk, in bytes from the batch's start.
    pub start: u32,
    /// Bytes it takes in the image.
    pub stored: u32,
    /// Whether those are compressed bytes.
    pub compressed: bool,
}

/// A batch as it will be stored.
pub struct PackedBatch {
    /// Where in the disk.
    pub extent: Extent,
    /// The digest of each chunk of the copy, `None` for a chunk of zeroes.
    pub digests: Vec<Option<Digest>>,
    /// The same for the source, where the copy was amended.
    pub before: Option<Vec<Option<Digest>>>,
    /// What is stored, in the order of the disk; places not named read as zeroes.
    pub cells: Vec<Cell>,
    /// The stored bytes, where each cell's position follows from the format.
    pub buf: PoolBuf,
}

/// Turns hashed batches into packed ones for one image format. Each worker thread has its own.
pub trait Pack: Send {
    /// Packs one batch; `spare` is the buffer a packer that needs a second one works in.
    fn pack(&mut self, batch: HashedBatch) -> Result<PackedBatch>;
}

/// What an encoder wants appended to the image, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of the format's own tables.
    Meta(Vec<u8>),
    /// This range of the packed batch's buffer.
    Data(Range<usize>),
    /// So many zero bytes, or a hole.
    Zeros(u64),
    /// So many bytes that stay what they are in the image a round begins with.
    Kept(u64),
}

/// An image format written as one forward stream whose front is known last. Pure: the same batches give the same
/// bytes at the same places, so that a resumed job replays its journal through [`Encoder::put`] and drops the pieces.
pub trait Encoder: Send {
    /// Bytes reserved at the start of the image, written last.
    fn front_len(&self) -> u64;

    /// Bytes of the image laid out so far, the front included.
    fn position(&self) -> u64;

    /// Lays out the next batch; batches come in the order of the disk, empty ones may be left out.
    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>>;

    /// Lays out the end; returns the last pieces and the front.
    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)>;

    /// A packer for one worker thread.
    fn packer(&self) -> Result<Box<dyn Pack>>;

    /// Whether a cell's stored length is needed to lay out the image again (false where it follows from the disk).
    fn cells_matter(&self) -> bool;
}
