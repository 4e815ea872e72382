//! The raw writer: the disk itself as a stream, with holes where it holds zeroes.

use crate::error::{Error, Kind, Result};
use crate::io::batch::{Cell, Encoder, HashedBatch, Pack, PackedBatch, Piece};
use crate::io::is_zero;
use crate::unit::{Extent, to_usize};

/// The unit in which zeroes become holes: a file system block.
const BLOCK: usize = 4096;

/// Lays out a raw image: every byte at its own offset.
pub struct Writer {
    size: u64,
    position: u64,
}

impl Writer {
    /// A writer for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Writer { size, position: 0 }
    }

    fn skip_to(&mut self, offset: u64, pieces: &mut Vec<Piece>) {
        if offset > self.position {
            pieces.push(Piece::Zeros(offset - self.position));
            self.position = offset;
        }
    }
}

impl Encoder for Writer {
    fn front_len(&self) -> u64 {
        0
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for cell in cells {
            self.skip_to(extent.start + u64::from(cell.start), &mut pieces);
            let start = cell.start as usize;
            pieces.push(Piece::Data(start..start + cell.stored as usize));
            self.position += u64::from(cell.stored);
        }
        self.skip_to(extent.end, &mut pieces);
        Ok(pieces)
    }

    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)> {
        let mut pieces = Vec::new();
        self.skip_to(self.size, &mut pieces);
        Ok((pieces, Vec::new()))
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        Ok(Box::new(RawPacker))
    }

    fn cells_matter(&self) -> bool {
        false
    }
}

/// Finds the runs of a batch that are not zero.
struct RawPacker;

impl Pack for RawPacker {
    fn pack(&mut self, batch: HashedBatch) -> Result<PackedBatch> {
        let too_long = |_| Error::new(Kind::Internal, "raw.batch", "a batch is longer than 4 GiB");
        let len = to_usize(batch.extent().len());
        let mut cells: Vec<Cell> = Vec::new();
        for (i, block) in batch.bytes()[..len].chunks(BLOCK).enumerate().filter(|(_, block)| !is_zero(block))
        {
            let start = u32::try_from(i * BLOCK).map_err(too_long)?;
            let stored = u32::try_from(block.len()).map_err(too_long)?;
            match cells.last_mut() {
                Some(last) if last.start + last.stored == start => last.stored += stored,
                _ => cells.push(Cell { start, stored, compressed: false }),
            }
        }
        Ok(batch.packed(cells))
    }
}
