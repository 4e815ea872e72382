//! Where two disks differ.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::io::ReadAt;
use crate::unit::extents::{Intersection, Union};
use crate::unit::{Extent, ExtentMap, Extents, MIB, to_usize};

/// The unit in which differences are reported, in bytes.
pub const SECTOR: u64 = 512;
/// Bytes compared at a time by one thread.
const CHUNK: u64 = MIB;

/// How to compare.
pub struct Options<'a> {
    /// The bytes that count; all of them if absent.
    pub mask: Option<&'a dyn Extents>,
    /// The most differing extents to list, at least 1.
    pub limit: usize,
    /// Threads that read and compare, at least 1.
    pub threads: usize,
    /// Told, from any thread, how many more bytes of the disks were compared or skipped.
    pub advance: &'a (dyn Fn(u64) + Sync),
}

impl Default for Options<'_> {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        Options { mask: None, limit: 1000, threads, advance: &|_| {} }
    }
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// The extents that differ, in order: whole sectors, cut off at the longer disk's end.
    pub differing: Vec<Extent>,
    /// Whether the list was cut off at the limit.
    pub more: bool,
    /// Sizes of the two disks in bytes.
    pub sizes: (u64, u64),
}

impl Comparison {
    /// Whether the disks read the same. A longer disk whose tail is all zeroes does, as in `qemu-img compare`.
    pub fn same(&self) -> bool {
        self.differing.is_empty()
    }
}

/// A disk that reads as zeroes beyond its end.
struct Endless<'a>(&'a dyn ReadAt);

impl Endless<'_> {
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let inside = to_usize(self.0.size().saturating_sub(at).min(buf.len() as u64));
        let (inside, beyond) = buf.split_at_mut(inside);
        beyond.fill(0);
        if inside.is_empty() { Ok(()) } else { self.0.read_at(inside, at) }
    }
}

impl Extents for Endless<'_> {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        self.0.next_data(from)
    }
}

/// The pieces still to be compared, handed out in order.
struct Work<'a> {
    set: Box<dyn Extents + 'a>,
    at: u64,
    size: u64,
}

impl Work<'_> {
    /// The next piece, and how far the comparison moves with it.
    fn next(&mut self) -> Result<Option<(Extent, u64)>> {
        let found = if self.at < self.size { self.set.next_extent(self.at)? } else { None };
        let found = found.map(|run| run.intersect(Extent::new(0, self.size))).filter(|run| !run.is_empty());
        let Some(run) = found else { return Ok(None) };
        let piece = Extent::new(run.start, run.end.min((run.start / CHUNK + 1) * CHUNK));
        let moved = piece.end - self.at;
        self.at = piece.end;
        Ok(Some((piece, moved)))
    }
}

/// Compares the disks `a` and `b`, skipping what neither has data in.
pub fn compare(a: &dyn ReadAt, b: &dyn ReadAt, options: &Options) -> Result<Comparison> {
    let size = a.size().max(b.size());
    let both = Union(Endless(a), Endless(b));
    let set: Box<dyn Extents> = match options.mask {
        Some(mask) => Box::new(Intersection(both, mask)),
        None => Box::new(both),
    };
    let work = Mutex::new(Work { set, at: 0, size });
    let differing = Mutex::new(ExtentMap::new());
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let stop = AtomicBool::new(false);

    let compare_pieces = || -> Result<()> {
        let (mut left, mut right) = (vec![0; to_usize(CHUNK)], vec![0; to_usize(CHUNK)]);
        while !stop.load(Ordering::Relaxed) {
            let Some((piece, moved)) = lock(&work).next()? else { break };
            let len = to_usize(piece.len());
            let (left, right) = (&mut left[..len], &mut right[..len]);
            Endless(a).read(left, piece.start)?;
            Endless(b).read(right, piece.start)?;
            if left != right {
                let mut found = lock(&differing);
                differing_sectors(left, right, piece.start).for_each(|sector| found.insert(sector));
                // Pieces are handed out in order, so all before the last run found are, or will be, looked at.
                if found.len() > options.limit {
                    stop.store(true, Ordering::Relaxed);
                }
            }
            (options.advance)(moved);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..options.threads.max(1) {
            scope.spawn(|| {
                if let Err(error) = compare_pieces() {
                    stop.store(true, Ordering::Relaxed);
                    lock(&failed).get_or_insert(error);
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let found = differing.into_inner().unwrap_or_else(PoisonError::into_inner);
    let more = found.len() > options.limit;
    if !more {
        (options.advance)(size - lock(&work).at.min(size));
    }
    Ok(Comparison {
        differing: found.iter().take(options.limit).collect(),
        more,
        sizes: (a.size(), b.size()),
    })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sectors of the disk in which `left` and `right`, both at offset `at`, differ.
fn differing_sectors<'a>(left: &'a [u8], right: &'a [u8], at: u64) -> impl Iterator<Item = Extent> + 'a {
    // The first sector may be cut by the mask: the rest stay on sector boundaries of the disk.
    let head = to_usize(at.next_multiple_of(SECTOR) - at).min(left.len());
    let rest = (head..left.len()).step_by(to_usize(SECTOR)).map(|start| (start, start + to_usize(SECTOR)));
    let pieces = std::iter::once((0, head)).chain(rest);
    pieces.filter_map(move |(start, end)| {
        let end = end.min(left.len());
        let differs = left[start..end] != right[start..end];
        differs.then(|| Extent::new(at + start as u64, at + end as u64))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use proptest::prelude::*;

    use super::*;
    use crate::io::WriteAt;
    use crate::io::fake::{FaultyDisk, MemoryDisk};

    const SIZE: u64 = 5 * MIB + 512;

    fn options<'a>(mask: Option<&'a dyn Extents>, limit: usize) -> Options<'a> {
        Options { mask, limit, threads: 3, ..Options::default() }
    }

    proptest! {
        #[test]
        fn exactly_the_changed_sectors_are_found(
            changes in prop::collection::btree_set(0..SIZE / SECTOR, 0..40),
            masked in prop::collection::vec((0..SIZE, 1..MIB), 0..4),
            limit in 1usize..60,
        ) {
            let (a, b) = (MemoryDisk::sparse(SIZE), MemoryDisk::sparse(SIZE));
            let mask: ExtentMap = masked.iter().map(|(at, len)| Extent::new(*at, (at + len).min(SIZE))).collect();
            let mut expected = ExtentMap::new();
            for sector in &changes {
                // One byte of the sector, the last, on either disk.
                let at = sector * SECTOR + 511;
                (if sector % 2 == 0 { &a } else { &b }).write_at(&[7], at).unwrap();
                let whole = Extent::at(sector * SECTOR, SECTOR);
                if masked.is_empty() {
                    expected.insert(whole);
                } else if mask.run_at(at).is_some() {
                    mask.within(whole).filter(|part| part.contains(Extent::at(at, 1))).for_each(|part| expected.insert(part));
                }
            }
            let mask = (!masked.is_empty()).then_some(&mask as &dyn Extents);
            let found = compare(&a, &b, &options(mask, limit)).unwrap();
            let expected: Vec<Extent> = expected.iter().collect();
            prop_assert_eq!(found.more, expected.len() > limit);
            prop_assert_eq!(found.differing, expected[..limit.min(expected.len())].to_vec());
        }
    }

    #[test]
    fn a_longer_disk_is_the_same_if_its_tail_is_zero() {
        let (short, long) = (MemoryDisk::sparse(MIB), MemoryDisk::sparse(3 * MIB));
        long.write_at(&[0; 4096], 2 * MIB).unwrap();
        assert!(compare(&short, &long, &options(None, 9)).unwrap().same());
        long.write_at(&[1], 3 * MIB - 1).unwrap();
        let found = compare(&short, &long, &options(None, 9)).unwrap();
        assert_eq!(found.differing, [Extent::new(3 * MIB - 512, 3 * MIB)]);
        assert_eq!(compare(&long, &short, &options(None, 9)).unwrap().differing, found.differing);
    }

    #[test]
    fn what_neither_disk_has_data_in_is_not_read_but_counted() {
        let advanced = AtomicU64::new(0);
        let advance = |bytes| {
            advanced.fetch_add(bytes, Ordering::Relaxed);
        };
        let size = 1 << 44;
        let (a, b) = (MemoryDisk::sparse(size), MemoryDisk::sparse(size));
        b.write_at(&[0; 512], 1 << 43).unwrap();
        let a = FaultyDisk::new(a, Vec::new());
        assert!(compare(&a, &b, &Options { advance: &advance, ..Options::default() }).unwrap().same());
        assert_eq!((a.bytes_read(), advanced.into_inner()), (4096, size));
    }

    #[test]
    fn an_unreadable_sector_is_an_error_and_not_a_difference() {
        let (a, b) = (MemoryDisk::sparse(MIB), MemoryDisk::sparse(MIB));
        b.write_at(&[1], 0).unwrap();
        let a = FaultyDisk::new(a, vec![Extent::at(512, 1)]);
        assert_eq!(compare(&a, &b, &Options::default()).unwrap_err().id(), "io.read");
    }
}
