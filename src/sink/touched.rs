//! What a round in place sends again: whole granules around what changed.
//!
//! An object whose bytes have their places, raw or fixed VHD, is joined anew: touched granules are sent, what lies
//! between them is copied inside the store. Both must be parts that a store takes: neither too short nor too many.

use crate::store::part::{MAX_PARTS, MIN_PART, copy_target, part_target};
use crate::unit::{Extent, ExtentMap, MIB};

/// Bytes of the first part at most. It is held in memory and sent last.
pub const FIRST_PART: u64 = 16 * MIB;

/// The smallest granule in bytes: what a store takes as a part, and a whole number of batches.
const GRANULE: u64 = 8 * MIB;
const _: () = assert!(GRANULE >= MIN_PART);

/// The bytes of the object at whose multiples a sent part ends, for one of at most `bound` bytes. A granule has none of
/// them inside but its own multiples, so that no run of granules has a part shorter than one.
pub fn grid(bound: u64) -> u64 {
    part_target(bound).next_multiple_of(FIRST_PART)
}

/// `changed` of an image whose disk takes `size` bytes from its first on, widened to granules: of 8 MiB, and larger where
/// the object would have too many parts. A granule is a whole number of batches, of `batch` bytes each, a power of two.
///
/// The first granule is always in it: the first part of an upload is sent last and cannot be one copied.
pub fn touched(changed: &ExtentMap, size: u64, batch: u64) -> ExtentMap {
    let whole = Extent::new(0, size);
    let mut granule = GRANULE.max(batch);
    loop {
        let first = Extent::new(0, 1);
        let widened = |run: Extent| run.widened(granule).intersect(whole);
        let touched: ExtentMap = std::iter::once(first).chain(changed.iter()).map(widened).collect();
        // A tenth of the numbers is left, as it is for parts that are only sent.
        if touched.covers(whole) || parts(&touched, size) <= MAX_PARTS as u64 * 9 / 10 {
            return touched;
        }
        granule = granule.saturating_mul(2);
    }
}

/// The parts of the object at most.
fn parts(touched: &ExtentMap, size: u64) -> u64 {
    let (sent, copied) = (grid(size), copy_target(size));
    // The first part is shorter than the others, and a footer may have one of its own.
    let mut count = 2;
    let mut end = 0;
    for run in touched.iter() {
        count += (run.start - end).div_ceil(copied) + run.end.div_ceil(sent) - run.start / sent;
        end = run.end;
    }
    count + (size - end).div_ceil(copied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::batch::Geometry;
    use crate::unit::{GIB, TIB};

    fn map(runs: impl IntoIterator<Item = (u64, u64)>) -> ExtentMap {
        runs.into_iter().map(|(start, len)| Extent::at(start, len)).collect()
    }

    #[test]
    fn granules_are_8_mib_and_the_first_is_always_among_them() {
        let size = 100 * MIB + 512;
        let two = 2 * MIB;
        assert_eq!(touched(&map([]), size, two), map([(0, 8 * MIB)]));
        assert_eq!(
            touched(&map([(41 * MIB, 1), (size - 1, 1)]), size, two),
            map([(0, 8 * MIB), (40 * MIB, 8 * MIB), (96 * MIB, 4 * MIB + 512)])
        );
        assert_eq!(touched(&map([(0, 1)]), 700, two), map([(0, 700)]));
        assert_eq!(touched(&map([]), 0, two), map([]));
    }

    #[test]
    fn a_change_in_every_place_of_a_large_disk_makes_no_more_parts_than_a_store_takes() {
        for (size, every) in [(GIB, 16 * MIB), (400 * GIB, 24 * MIB), (2 * TIB, 40 * MIB), (40 * TIB, GIB)] {
            let geometry = Geometry::of(size);
            let changed = map((0..size / every).map(|i| (i * every, 65_536)));
            let touched = touched(&changed, size, geometry.batch());
            assert!(parts(&touched, size) <= 9_002, "{size}: {}", parts(&touched, size));
            assert!(changed.iter().all(|run| touched.covers(run)));
            for run in touched.iter() {
                assert!(run.start.is_multiple_of(8 * MIB) && run.start.is_multiple_of(geometry.batch()));
                assert!(run.end == size || run.end.is_multiple_of(geometry.batch()));
            }
        }
    }
}
