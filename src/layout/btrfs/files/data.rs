//! Data on the disk: read a piece at a time, checked against its checksums, unpacked, and kept for the next read.

use std::collections::VecDeque;
use std::sync::Arc;

use super::extent::Stored;
use super::unpack::{Packing, unpack};
use super::{BtrfsFiles, Step, require};
use crate::error::Retry;
use crate::io::read_vec;
use crate::layout::Stop;
use crate::layout::btrfs::chunk::group;
use crate::layout::btrfs::tree::{Key, kind};
use crate::unit::{Extent, to_usize};

/// Bytes of an extent that is not compressed that are read at once.
const STEP: u64 = 64 << 10;
/// Pieces kept: 512 KiB at most.
const KEPT: usize = 4;
/// The object of all checksums.
const SUMS: u64 = 10_u64.wrapping_neg();

/// Bytes of an extent, unpacked: all of it if it is compressed.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Piece {
    place: Extent,
    packing: Option<Packing>,
    len: u64,
    has_sums: bool,
}

/// The pieces last read.
#[derive(Default)]
pub(super) struct Pieces(VecDeque<(Piece, Arc<Vec<u8>>)>);

impl BtrfsFiles {
    /// Fills `part` with the bytes of `stored` from `from` on, counted from the first one that is meant.
    pub(super) fn stored(&self, stored: Stored, has_sums: bool, from: u64, part: &mut [u8]) -> Step<()> {
        let (mut at, mut rest) = (stored.from + from, part);
        while !rest.is_empty() {
            let start = if stored.packing.is_some() { 0 } else { at / STEP * STEP };
            let place = match stored.packing {
                Some(_) => stored.place,
                None => Extent::at(stored.place.start.saturating_add(start), STEP).intersect(stored.place),
            };
            let len = if stored.packing.is_some() { stored.len } else { place.len() };
            let piece = self.piece(Piece { place, packing: stored.packing, len, has_sums })?;
            let bytes = piece.get(to_usize(at - start)..).unwrap_or_default();
            require(!bytes.is_empty(), || format!("its data at {place:?} ends too early"))?;
            let n = bytes.len().min(rest.len());
            let (part, behind) = rest.split_at_mut(n);
            part.copy_from_slice(&bytes[..n]);
            at += n as u64;
            rest = behind;
        }
        Ok(())
    }

    fn piece(&self, piece: Piece) -> Step<Arc<Vec<u8>>> {
        let mut kept = self.pieces.borrow_mut();
        if let Some(number) = kept.0.iter().position(|(kept, _)| *kept == piece)
            && let Some(found) = kept.0.remove(number)
        {
            let bytes = Arc::clone(&found.1);
            kept.0.push_front(found);
            return Ok(bytes);
        }
        let stored = self.data(piece.place, piece.has_sums)?;
        let bytes = match piece.packing {
            None => stored,
            Some(packing) => unpack(packing, &stored, to_usize(piece.len), to_usize(self.fs.sb.sector_size))?,
        };
        let bytes = Arc::new(bytes);
        kept.0.truncate(KEPT - 1);
        kept.0.push_front((piece, Arc::clone(&bytes)));
        Ok(bytes)
    }

    /// Reads data, of at most 128 KiB: the first of its copies that has the right checksums.
    fn data(&self, run: Extent, has_sums: bool) -> Step<Vec<u8>> {
        let chunk = self.fs.chunks.holding(run).filter(|chunk| chunk.kind & group::DATA != 0);
        let chunk = chunk.ok_or_else(|| format!("its data at {run:?} lies outside all chunks for data"))?;
        let sums = if has_sums { self.sums_of(run)? } else { Vec::new() };
        let mut why = String::new();
        for copy in chunk.copies() {
            match read_vec(&self.fs.disk, copy.start + (run.start - chunk.logical.start), to_usize(run.len()))
            {
                Ok(data) => match self.first_wrong(&data, &sums) {
                    None => return Ok(data),
                    Some(at) => why = format!("its data at {} has another checksum", run.start + at),
                },
                Err(error) if error.retry() == Retry::Yes => return Err(Stop::Failed(error)),
                Err(error) => why = format!("its data at {run:?} cannot be read: {}", error.why()),
            }
        }
        Err(Stop::Whole(why))
    }

    /// Where the first sector of `data` begins whose checksum is another than in `sums`.
    fn first_wrong(&self, data: &[u8], sums: &[Vec<u8>]) -> Option<u64> {
        let sectors = data.chunks(to_usize(self.fs.sb.sector_size));
        let mut sectors = sectors.zip(sums).zip(0..);
        let wrong = sectors.find(|((data, sum), _)| !sum.is_empty() && !self.fs.sb.is_sum_of(sum, data));
        wrong.map(|(_, number): (_, u64)| number * self.fs.sb.sector_size)
    }

    /// The checksum of each sector of `run`; an empty one where there is none.
    fn sums_of(&self, run: Extent) -> Step<Vec<Vec<u8>>> {
        let (sector, len) = (self.fs.sb.sector_size, self.fs.sb.sum_len());
        let mut sums = Vec::new();
        let mut at = run.start;
        while at < run.end {
            let key = Key { id: SUMS, kind: kind::SUMS, offset: at };
            let leaf = self.fs.leaf(self.sums, key)?;
            let known = leaf
                .floor(key)
                .0
                .and_then(|(key, item)| item.get(to_usize((at - key.offset) / sector) * len..));
            let sum = known.and_then(|sums| sums.get(..len)).unwrap_or_default();
            sums.push(sum.to_vec());
            at += sector;
        }
        Ok(sums)
    }
}
