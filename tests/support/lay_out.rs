//! Disks laid out as images, as a job and its sink do.

#![allow(dead_code, reason = "each test binary uses its own part")]

use haul::io::batch::{Encoder, Geometry, Piece, RawBatch};
use haul::io::{AlignedBuf, ReadAt};
use haul::unit::{ExtentMap, to_usize};

/// Hands what of `pieces` is not zeroes to `write`, with its offset; the first lies at `position`, which moves on.
pub fn place(pieces: Vec<Piece>, data: &[u8], position: &mut u64, mut write: impl FnMut(&[u8], u64)) {
    for piece in pieces {
        let bytes = match &piece {
            Piece::Meta(bytes) => &bytes[..],
            Piece::Data(range) => &data[range.clone()],
            Piece::Zeros(count) => {
                *position += count;
                continue;
            }
            Piece::Kept(_) => unreachable!("only a round in place keeps anything"),
        };
        write(bytes, *position);
        *position += bytes.len() as u64;
    }
}

/// Puts what `set` names of `disk` through `encoder`, and each piece of the image to `write` with its offset. Returns
/// the front, not yet written, and the image's length.
pub fn lay_out(
    encoder: &mut dyn Encoder,
    disk: &dyn ReadAt,
    set: &ExtentMap,
    mut write: impl FnMut(&[u8], u64),
) -> (Vec<u8>, u64) {
    let geometry = Geometry::of(disk.size());
    let mut packer = encoder.packer().unwrap();
    let mut position = encoder.position();
    let mut start = 0;
    while start < geometry.size {
        let extent = geometry.batch_at(start);
        start = extent.end;
        if set.within(extent).next().is_none() {
            continue;
        }
        let mut buf = AlignedBuf::new(to_usize(geometry.batch()));
        for run in set.within(extent) {
            let part = &mut buf[to_usize(run.start - extent.start)..to_usize(run.end - extent.start)];
            disk.read_at(part, run.start).unwrap();
        }
        let batch = packer.pack(RawBatch::new(extent, buf).hash(&geometry)).unwrap();
        if !batch.cells.is_empty() {
            let pieces = encoder.put(extent, &batch.cells).unwrap();
            place(pieces, &batch.buf, &mut position, &mut write);
            assert_eq!(position, encoder.position());
        }
    }
    let (pieces, front) = encoder.finish().unwrap();
    place(pieces, &[], &mut position, &mut write);
    (front, position)
}
