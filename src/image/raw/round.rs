//! A later round of an image whose bytes have their places, raw or fixed VHD: what is not touched is kept.

use crate::error::{Error, Kind, Result};
use crate::io::batch::{Cell, Encoder, Pack, Piece};
use crate::unit::{Extent, ExtentMap};

/// Lays out an image as its encoder does, and has [`Piece::Kept`] in place of what lies outside the touched bytes.
pub struct Round {
    encoder: Box<dyn Encoder>,
    touched: ExtentMap,
    length: u64,
}

impl Round {
    /// A round on an image of `length` bytes, of which `touched`, in whole batches but for the disk's end, is laid out by
    /// `encoder`.
    pub fn new(encoder: Box<dyn Encoder>, touched: ExtentMap, length: u64) -> Self {
        Round { encoder, touched, length }
    }

    /// The pieces laid out from `at` on, with those of zeroes kept where nothing is touched.
    fn keep(&self, mut at: u64, pieces: Vec<Piece>) -> Result<Vec<Piece>> {
        let mut kept = Vec::new();
        for piece in pieces {
            let len = match &piece {
                Piece::Meta(bytes) => bytes.len() as u64,
                Piece::Data(range) => range.len() as u64,
                Piece::Zeros(count) | Piece::Kept(count) => *count,
            };
            let extent = Extent::at(at, len);
            at = extent.end;
            match piece {
                Piece::Zeros(_) => self.split(extent, &mut kept),
                Piece::Data(_) if !self.touched.covers(extent) => {
                    return Err(Error::new(
                        Kind::Internal,
                        "raw.round",
                        format!("data came for {extent:?}, which is not touched"),
                    ));
                }
                other => kept.push(other),
            }
        }
        Ok(kept)
    }

    fn split(&self, zeroes: Extent, pieces: &mut Vec<Piece>) {
        let mut at = zeroes.start;
        for run in self.touched.within(zeroes) {
            if run.start > at {
                pieces.push(Piece::Kept(run.start - at));
            }
            pieces.push(Piece::Zeros(run.len()));
            at = run.end;
        }
        if zeroes.end > at {
            pieces.push(Piece::Kept(zeroes.end - at));
        }
    }
}

impl Encoder for Round {
    fn front_len(&self) -> u64 {
        self.encoder.front_len()
    }

    fn position(&self) -> u64 {
        self.encoder.position()
    }

    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>> {
        let at = self.encoder.position();
        let pieces = self.encoder.put(extent, cells)?;
        self.keep(at, pieces)
    }

    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)> {
        let at = self.encoder.position();
        let (pieces, front) = self.encoder.finish()?;
        if self.encoder.position() != self.length {
            return Err(Error::new(Kind::Internal, "raw.round", "the image would get another length")
                .because(format!(
                    "it has {} bytes, and would have {}",
                    self.length,
                    self.encoder.position()
                )));
        }
        Ok((self.keep(at, pieces)?, front))
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        self.encoder.packer()
    }

    fn cells_matter(&self) -> bool {
        self.encoder.cells_matter()
    }
}

#[cfg(test)]
mod tests {
    use super::super::writer::Writer;
    use super::*;
    use crate::unit::MIB;

    #[test]
    fn what_is_not_touched_is_kept_and_the_rest_is_what_the_encoder_lays_out() {
        let touched: ExtentMap = [Extent::at(0, 4 * MIB), Extent::at(8 * MIB, 4 * MIB)].into_iter().collect();
        let mut round = Round::new(Box::new(Writer::new(15 * MIB)), touched.clone(), 15 * MIB);
        let cell = Cell { start: 4096, stored: 512, compressed: false };
        let batch = |n: u64| Extent::at(n * 2 * MIB, 2 * MIB);
        let half = usize::try_from(4096 + 512).unwrap();
        assert_eq!(
            round.put(batch(0), std::slice::from_ref(&cell)).unwrap(),
            [Piece::Zeros(4096), Piece::Data(4096..half), Piece::Zeros(2 * MIB - 4608)]
        );
        assert_eq!(
            round.put(batch(5), std::slice::from_ref(&cell)).unwrap(),
            [
                Piece::Zeros(2 * MIB),
                Piece::Kept(4 * MIB),
                Piece::Zeros(2 * MIB + 4096),
                Piece::Data(4096..half),
                Piece::Zeros(2 * MIB - 4608)
            ]
        );
        assert_eq!(round.finish().unwrap(), (vec![Piece::Kept(3 * MIB)], vec![]));
        let mut round = Round::new(Box::new(Writer::new(15 * MIB)), touched, 15 * MIB);
        assert_eq!(round.put(batch(2), &[cell]).unwrap_err().kind(), Kind::Internal);
        let mut other = Round::new(Box::new(Writer::new(15 * MIB)), ExtentMap::new(), 16 * MIB);
        assert_eq!(other.finish().unwrap_err().kind(), Kind::Internal);
    }
}
