//! Bytes as a qcow2 image.

use std::sync::Arc;

use haul::error::Result;
use haul::image::qcow2::round::{self, Round};
use haul::image::{self, Format, Gate};
use haul::io::batch::{Encoder, Geometry, Piece, RawBatch};
use haul::io::fake::MemoryDisk;
use haul::io::{AlignedBuf, ReadAt, read_vec};
use haul::unit::{Extent, ExtentMap};

use super::Outcome;
use super::watched::{Watched, judge, read_of, refused};

/// Longest disk, and image, that a round is appended to, in bytes.
const LONGEST: u64 = 16 << 20;
/// Bytes of a cluster of the images that haul writes.
const CLUSTER: u64 = 64 << 10;

/// Takes `bytes` as a qcow2 image: it is opened and read within bounds, or fails with an error.
pub fn fuzz_qcow2(bytes: &[u8]) -> Outcome {
    let file = Arc::new(Watched::new(bytes));
    let _ = image::probe(&*file).inspect_err(judge);
    let info = image::inspect(&*file, Some(Format::Qcow2)).inspect_err(judge);
    match image::open_on(file, Some(Format::Qcow2), &Gate::closed()) {
        Ok(image) => {
            assert_eq!(image.disk.size(), info.unwrap().virtual_size);
            read_of(&*image.disk)
        }
        Err(error) => refused(&error),
    }
}

/// Takes `bytes` as a finished image that a round is appended to: it is refused, or holds what the round set, and
/// what it held before.
pub fn fuzz_round(bytes: &[u8]) -> Outcome {
    let base = Arc::new(Watched::new(bytes));
    let _ = round::live_bytes(&*base).inspect_err(judge);
    let compress = match round::compression(&*base) {
        Ok(compress) => compress,
        Err(error) => return refused(&error),
    };
    let before = match image::open_on(Arc::clone(&base) as _, Some(Format::Qcow2), &Gate::closed()) {
        Ok(image) => image.disk,
        Err(error) => return refused(&error),
    };
    let size = before.size();
    if size > LONGEST || base.size() > LONGEST {
        return Outcome::Broken("too long".into());
    }
    let runs =
        [Extent::at(0, CLUSTER), Extent::at(5 * CLUSTER, 2 * CLUSTER), Extent::at(40 * CLUSTER, CLUSTER)];
    let changed: ExtentMap = runs.into_iter().map(|run| run.intersect(Extent::new(0, size))).collect();
    let after =
        match append(&base, Round::new(Arc::clone(&base) as _, compress, changed.clone()), &changed, size) {
            Ok(image) => image,
            Err(error) => {
                judge(&error);
                return Outcome::Broken(super::signature(&error));
            }
        };
    let after = image::open_on(Arc::new(MemoryDisk::holding(&after)), Some(Format::Qcow2), &Gate::closed());
    let after = after.expect("what a round was appended to can be opened").disk;
    let mut same = true;
    for start in (0..size).step_by(usize::try_from(CLUSTER).unwrap()) {
        let cluster = Extent::new(start, (start + CLUSTER).min(size));
        let len = usize::try_from(cluster.len()).unwrap();
        if changed.covers(cluster) {
            assert!(
                read_vec(&after, start, len).unwrap().iter().all(|byte| *byte == 0x5a),
                "{cluster:?} was set"
            );
        } else if let Ok(bytes) = read_vec(&before, start, len) {
            assert!(bytes == read_vec(&after, start, len).unwrap(), "{cluster:?} was not set");
        } else {
            same = false;
        }
    }
    if same { Outcome::Fine(format!("{compress}")) } else { Outcome::Broken(format!("{compress}")) }
}

/// The image in `base` with `round` appended, which sets `changed` to a byte of its own, and its new front.
fn append(base: &Watched, round: Result<Round>, changed: &ExtentMap, size: u64) -> Result<Vec<u8>> {
    let mut round = round?;
    let mut image = read_vec(base, 0, usize::try_from(base.size()).unwrap())?;
    image.resize(usize::try_from(round.position()).unwrap(), 0);
    let mut place = |pieces: Vec<Piece>, data: &[u8]| {
        for piece in pieces {
            match piece {
                Piece::Meta(bytes) => image.extend(bytes),
                Piece::Data(range) => image.extend(&data[range]),
                Piece::Zeros(count) => image.resize(image.len() + usize::try_from(count).unwrap(), 0),
                Piece::Kept(_) => panic!("nothing is kept in an image that is appended to"),
            }
        }
    };
    let geometry = Geometry::of(size);
    let mut packer = round.packer()?;
    let mut start = 0;
    while start < size {
        let extent = geometry.batch_at(start);
        let mut buf = AlignedBuf::new(usize::try_from(geometry.batch()).unwrap());
        for run in changed.within(extent) {
            let place = |at: u64| usize::try_from(at - extent.start).unwrap();
            buf[place(run.start)..place(run.end)].fill(0x5a);
        }
        let batch = packer.pack(RawBatch::new(extent, buf).hash(&geometry))?;
        if !batch.cells.is_empty() {
            place(round.put(extent, &batch.cells)?, &batch.buf);
        }
        start = extent.end;
    }
    let (pieces, front) = round.finish()?;
    place(pieces, &[]);
    image[..front.len()].copy_from_slice(&front);
    Ok(image)
}
