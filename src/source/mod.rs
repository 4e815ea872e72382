//! A disk as it is copied: the bytes in use, with everything else zero, and what fix-ups changed laid over it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::io::batch::{Geometry, HashedBatch, RawBatch};
use crate::io::buffer::ALIGN;
use crate::io::{DataOf, PoolBuf, ReadAt, check_range};
use crate::monitor::{Counter, Level, Monitor};
use crate::unit::extents::{Intersection, Union, collect};
use crate::unit::{Extent, ExtentMap, Extents, KIB, fault, to_usize};

/// What to do about sectors that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReadError {
    /// Stop, and name the first one.
    #[default]
    Fail,
    /// Copy zeroes instead, and report each extent.
    Zero,
}

/// Gaps up to this length between used runs are read through: one request instead of two.
const READ_THROUGH: u64 = 64 * KIB;

/// A disk to be copied.
pub struct BlockSource {
    disk: Arc<dyn ReadAt>,
    used: Arc<dyn Extents>,
    amended: Option<Amended>,
    on_error: OnReadError,
    unreadable: Mutex<ExtentMap>,
}

/// What fix-ups changed: the disk as it shall become, and where it differs.
pub struct Amended {
    /// The disk seen through its overlay.
    pub disk: Arc<dyn ReadAt>,
    /// Where the overlay was written.
    pub extents: ExtentMap,
}

/// A disk of which only the bytes in use show; the others read as zeroes.
pub struct UsedView {
    disk: Arc<dyn ReadAt>,
    used: Arc<dyn Extents>,
}

impl UsedView {
    /// `disk`, of which only the bytes in `used` show.
    pub fn new(disk: Arc<dyn ReadAt>, used: Arc<dyn Extents>) -> Self {
        UsedView { disk, used }
    }
}

impl ReadAt for UsedView {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let asked = Extent::at(offset, buf.len() as u64);
        buf.fill(0);
        for run in collect(&Intersection(&self.used, DataOf(&self.disk)), asked)?.iter() {
            self.disk.read_at(&mut buf[range_in(asked, run)], run.start)?;
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        Intersection(&self.used, DataOf(&self.disk)).next_extent(from)
    }

    fn name(&self) -> String {
        self.disk.name()
    }
}

impl BlockSource {
    /// `disk`, of which only the bytes in `used` count.
    pub fn new(disk: Arc<dyn ReadAt>, used: Arc<dyn Extents>, on_error: OnReadError) -> Self {
        BlockSource { disk, used, amended: None, on_error, unreadable: Mutex::default() }
    }

    /// The same disk with fix-ups laid over it.
    #[must_use]
    pub fn amended(mut self, amended: Amended) -> Self {
        self.amended = Some(amended);
        self
    }

    /// How the disk is cut.
    pub fn geometry(&self) -> Geometry {
        Geometry::of(self.disk.size())
    }

    /// What to call it.
    pub fn name(&self) -> String {
        self.disk.name()
    }

    /// The next run of bytes at or after `from` that must be looked at.
    pub fn next(&self, from: u64) -> Result<Option<Extent>> {
        let wanted = Intersection(&self.used, DataOf(&self.disk));
        let end = Extent::new(0, self.disk.size());
        let next = match &self.amended {
            None => wanted.next_extent(from)?,
            Some(amended) => Union(wanted, &amended.extents).next_extent(from)?,
        };
        Ok(next.map(|run| run.intersect(end)).filter(|run| !run.is_empty()))
    }

    /// Reads the batch at `extent` into `buf` and digests it.
    pub fn read(&self, extent: Extent, mut buf: PoolBuf, monitor: &dyn Monitor) -> Result<HashedBatch> {
        let geometry = self.geometry();
        let read = self.read_used(extent, &mut buf, monitor)?;
        fault::point("read");
        monitor.count(Counter::Read, read);
        monitor.count(Counter::Skipped, extent.len() - read);
        let batch = RawBatch::new(extent, buf);
        match &self.amended {
            Some(amended) if amended.extents.within(extent).next().is_some() => {
                batch.hash_amended(&geometry, |extent, bytes| {
                    amended.extents.within(extent).try_for_each(|run| {
                        amended.disk.read_at(&mut bytes[range_in(extent, run)], run.start)
                    })
                })
            }
            _ => Ok(batch.hash(&geometry)),
        }
    }

    /// Fills `buf` with the used bytes of `extent` and zeroes; returns the bytes asked of the disk.
    fn read_used(&self, extent: Extent, buf: &mut [u8], monitor: &dyn Monitor) -> Result<u64> {
        let wanted = Intersection(&self.used, DataOf(&self.disk));
        let wanted = collect(&wanted, extent)?;
        let mut total = 0;
        let mut zeroed = 0;
        let mut runs = wanted.iter().peekable();
        while let Some(first) = runs.next() {
            let mut span = first;
            let mut last = first;
            let mut gaps = Vec::new();
            while let Some(next) = runs.next_if(|next| next.start - last.end <= READ_THROUGH) {
                gaps.push(Extent::new(last.end, next.start));
                span.end = next.end;
                last = next;
            }
            // Whole pages: what O_DIRECT wants, and what the page cache reads anyway.
            let widened = span.widened(ALIGN as u64).intersect(extent);
            let range = range_in(extent, widened);
            buf[zeroed..range.start].fill(0);
            zeroed = range.end;
            self.read_span(widened, &mut buf[range], monitor)?;
            total += widened.len();
            gaps.push(Extent::new(widened.start, span.start));
            gaps.push(Extent::new(span.end, widened.end));
            gaps.into_iter().for_each(|gap| buf[range_in(extent, gap)].fill(0));
        }
        buf[zeroed..].fill(0);
        Ok(total)
    }

    /// Reads `extent`; where that fails, ever smaller pieces of it, down to a page.
    fn read_span(&self, extent: Extent, buf: &mut [u8], monitor: &dyn Monitor) -> Result<()> {
        let Err(error) = self.disk.read_at(buf, extent.start) else { return Ok(()) };
        if error.id() != "io.read" {
            return Err(error);
        }
        let piece = match extent.len() {
            n if n > 64 * KIB => 64 * KIB,
            n if n > ALIGN as u64 => ALIGN as u64,
            _ => return self.give_up(extent, buf, error, monitor),
        };
        let mut from = extent.start;
        while from < extent.end {
            let part = Extent::at(from, piece).intersect(extent);
            self.read_span(part, &mut buf[range_in(extent, part)], monitor)?;
            from = part.end;
        }
        Ok(())
    }

    fn give_up(&self, extent: Extent, buf: &mut [u8], error: Error, monitor: &dyn Monitor) -> Result<()> {
        if self.on_error == OnReadError::Fail {
            return Err(error.with_kind(Kind::Source).remedy(
                "replace the disk, or copy zeroes in place of unreadable sectors with --on-read-error zero",
            ));
        }
        buf.fill(0);
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).insert(extent);
        let text =
            format!("{}: bytes {extent:?} cannot be read; the copy holds zeroes there", self.disk.name());
        monitor.note(Level::Warning, &text);
        Ok(())
    }

    /// What could not be read and is zero in the copy.
    pub fn unreadable(&self) -> ExtentMap {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// `part` of `extent` as a range of the buffer that holds `extent`.
fn range_in(extent: Extent, part: Extent) -> std::ops::Range<usize> {
    to_usize(part.start - extent.start)..to_usize(part.end - extent.start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::io::AlignedBuf;
    use crate::io::WriteAt;
    use crate::io::fake::{FaultyDisk, MemoryDisk};
    use crate::monitor::Tally;

    const SIZE: u64 = 5 << 20;

    fn batch_of(source: &BlockSource, at: u64) -> HashedBatch {
        let extent = source.geometry().batch_at(at);
        source.read(extent, AlignedBuf::new(2 << 20).into(), &Tally::default()).unwrap()
    }

    proptest! {
        #[test]
        fn a_batch_holds_the_used_bytes_and_zeroes(
            runs in prop::collection::vec((0..SIZE, 1u64..300_000), 0..20),
            stale in any::<bool>(),
        ) {
            let disk = MemoryDisk::sparse(SIZE);
            disk.write_at(&vec![7; to_usize(SIZE)], 0).unwrap();
            let used: ExtentMap =
                runs.iter().map(|(at, len)| Extent::at(*at, *len).intersect(Extent::new(0, SIZE))).collect();
            let source = BlockSource::new(Arc::new(disk), Arc::new(used.clone()), OnReadError::Fail);
            for at in [0, 2 << 20, 4 << 20] {
                let extent = source.geometry().batch_at(at);
                let mut buf = AlignedBuf::new(2 << 20);
                if stale { buf.fill(9) }
                let batch = source.read(extent, buf.into(), &Tally::default()).unwrap();
                let mut expected = vec![0; 2 << 20];
                used.within(extent).for_each(|run| expected[range_in(extent, run)].fill(7));
                prop_assert!(batch.bytes() == expected);
            }
        }
    }

    #[test]
    fn one_bad_sector_costs_one_page_and_is_reported() {
        let disk = MemoryDisk::sparse(SIZE);
        disk.write_at(&vec![7; to_usize(SIZE)], 0).unwrap();
        let bad = Extent::at(1 << 20, 512);
        let whole = Arc::new(Extent::new(0, SIZE));
        let faulty = Arc::new(FaultyDisk::new(disk, vec![bad]));
        let source = BlockSource::new(faulty.clone(), whole.clone(), OnReadError::Zero);
        let batch = batch_of(&source, 0);
        let page = Extent::at(1 << 20, 4096);
        assert_eq!(source.unreadable().iter().collect::<Vec<_>>(), [page]);
        assert!(batch.bytes()[range_in(Extent::new(0, SIZE), page)].iter().all(|byte| *byte == 0));
        assert_eq!(batch.bytes().iter().filter(|byte| **byte == 0).count(), 4096);

        let source = BlockSource::new(faulty, whole, OnReadError::Fail);
        let read =
            source.read(source.geometry().batch_at(0), AlignedBuf::new(2 << 20).into(), &Tally::default());
        let error = read.err().unwrap();
        assert_eq!((error.kind(), error.facts()[0].1.as_str()), (Kind::Source, "1048576"));
    }

    #[test]
    fn an_amended_batch_carries_both_digests() {
        let disk = Arc::new(MemoryDisk::sparse(SIZE));
        disk.write_at(&[1; 4096], 0).unwrap();
        let fixed = Arc::new(MemoryDisk::sparse(SIZE));
        fixed.write_at(&[2; 4096], 65_536).unwrap();
        let used = Arc::new(Extent::new(0, SIZE));
        let extents = [Extent::at(65_536, 4096)].into_iter().collect();
        let source =
            BlockSource::new(disk, used, OnReadError::Fail).amended(Amended { disk: fixed, extents });
        let batch = batch_of(&source, 0).packed(Vec::new());
        let before = batch.before.unwrap();
        assert_eq!(batch.digests[0], before[0]);
        assert!(batch.digests[1].is_some() && before[1].is_none());
        assert_eq!(batch.buf[65_536], 2);
    }
}
