//! A logical volume read like a disk: its segments, and the stripes of each, at their places on the disk.

use std::sync::Arc;

use crate::error::Result;
use crate::io::{ReadAt, check_range};
use crate::unit::{Extent, to_usize};

/// How a segment's bytes go round its areas. Offsets are relative to the segment, or to one of its areas.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stripes {
    /// Number of areas.
    pub count: u64,
    /// Bytes that go to one area before the next one's turn.
    pub size: u64,
}

impl Stripes {
    /// Bytes of area `index` that lie below `offset` of the segment.
    pub fn below(self, index: u64, offset: u64) -> u64 {
        let row = self.count * self.size;
        let in_row = (offset % row).saturating_sub(index * self.size).min(self.size);
        offset / row * self.size + in_row
    }

    /// Where byte `at` of area `index` is in the segment.
    pub fn offset(self, index: u64, at: u64) -> u64 {
        at / self.size * (self.count * self.size) + index * self.size + at % self.size
    }
}

/// A run of a logical volume, with its areas on the disk.
#[derive(Debug)]
pub(super) struct Run {
    /// Its place in the logical volume.
    pub extent: Extent,
    /// How its bytes go round its areas.
    pub stripes: Stripes,
    /// Where its areas begin on the disk.
    pub areas: Vec<u64>,
}

/// A linear or striped logical volume, all on one disk.
pub struct LogicalVolume {
    disk: Arc<dyn ReadAt>,
    name: String,
    /// In order and without gaps.
    runs: Vec<Run>,
}

impl LogicalVolume {
    /// The volume on `disk` made of `runs`, which follow one another from 0 on.
    pub(super) fn new(disk: Arc<dyn ReadAt>, name: String, runs: Vec<Run>) -> Self {
        LogicalVolume { disk, name, runs }
    }

    /// Number of areas of all its segments.
    pub(super) fn areas(&self) -> usize {
        self.runs.iter().map(|run| run.areas.len()).sum()
    }

    /// Where on the disk the bytes from `offset` on lie, as far as they are together; `None` at and beyond its end.
    pub fn place(&self, offset: u64) -> Option<Extent> {
        let run = self.runs.get(self.runs.partition_point(|run| run.extent.end <= offset))?;
        let Stripes { count, size } = run.stripes;
        let at = offset - run.extent.start;
        let area = run.areas.get(to_usize(at / size % count))?;
        let in_area = at / (count * size) * size + at % size;
        Some(Extent::at(area + in_area, size - at % size))
    }

    /// Which bytes of the volume lie in `extent` of the disk: at most `most` pieces, of stripes one each.
    pub(in crate::layout) fn offsets_of(&self, extent: Extent, most: usize) -> Vec<Extent> {
        let mut found = Vec::new();
        for run in &self.runs {
            let area_len = run.extent.len() / run.stripes.count;
            for (index, start) in (0..).zip(&run.areas) {
                let mut rest = Extent::at(*start, area_len).intersect(extent);
                while !rest.is_empty() && found.len() < most {
                    let at = rest.start - start;
                    let len = rest.len().min(run.stripes.size - at % run.stripes.size);
                    found.push(Extent::at(run.extent.start + run.stripes.offset(index, at), len));
                    rest.start += len;
                }
            }
        }
        found
    }

    /// The first run of data of `run` at or after `from`, which is in it.
    fn data_in(&self, run: &Run, from: u64) -> Result<Option<Extent>> {
        let area_len = run.extent.len() / run.stripes.count;
        let mut first: Option<Extent> = None;
        for (index, start) in (0..).zip(&run.areas) {
            let at = run.stripes.below(index, from - run.extent.start);
            let area = Extent::new(start + at, start + area_len);
            let Some(data) = self.disk.next_data(area.start)? else { continue };
            let data = data.intersect(area);
            if data.is_empty() {
                continue;
            }
            let at = data.start - start;
            let together = run.stripes.size - at % run.stripes.size;
            let found =
                Extent::at(run.extent.start + run.stripes.offset(index, at), data.len().min(together));
            first = first.filter(|first| first.start < found.start).or(Some(found));
        }
        Ok(first)
    }
}

impl ReadAt for LogicalVolume {
    fn size(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.extent.end)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let (mut rest, mut offset) = (buf, offset);
        while let (false, Some(place)) = (rest.is_empty(), self.place(offset)) {
            let len = to_usize(place.len().min(rest.len() as u64));
            let (now, later) = rest.split_at_mut(len);
            self.disk.read_at(now, place.start)?;
            offset += len as u64;
            rest = later;
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        let next = self.runs.partition_point(|run| run.extent.end <= from);
        for run in self.runs.iter().skip(next) {
            let found = self.data_in(run, from.max(run.extent.start))?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::io::WriteAt;
    use crate::io::fake::MemoryDisk;
    use crate::io::read_vec;
    use crate::unit::extents::collect;

    const PAGE: u64 = 4096;

    /// Runs of 1 to 4 stripes whose areas lie anywhere on a disk without overlaps.
    fn volumes() -> impl Strategy<Value = (Vec<Run>, u64)> {
        let run = (1..4_u64, 0..3_u32, 1..4_u64);
        (prop::collection::vec(run, 1..5), any::<prop::sample::Index>()).prop_map(|(shapes, turn)| {
            let areas: u64 = shapes.iter().map(|(count, ..)| count).sum();
            let (mut start, mut next) = (0, turn.index(to_usize(areas)) as u64);
            let mut place = || {
                next += 1;
                next % areas * 16 * PAGE
            };
            let mut run = |(count, log, rows): (u64, u32, u64)| {
                let size = if count == 1 { PAGE * rows } else { PAGE << log };
                let len = if count == 1 { size } else { size * count * rows };
                start += len;
                Run {
                    extent: Extent::new(start - len, start),
                    stripes: Stripes { count, size },
                    areas: (0..count).map(|_| place()).collect(),
                }
            };
            let runs = shapes.into_iter().map(&mut run).collect();
            (runs, areas * 16 * PAGE)
        })
    }

    proptest! {
        #[test]
        fn places_and_their_inverse_agree(count in 1..5_u64, log in 0..4_u32, offset in 0..500_u64) {
            let stripes = Stripes { count, size: 1 << log };
            let index = offset / stripes.size % count;
            let at = stripes.below(index, offset);
            prop_assert_eq!(stripes.offset(index, at), offset);
            for index in 0..count {
                let naive = (0..offset).filter(|byte| byte / stripes.size % count == index).count() as u64;
                prop_assert_eq!(stripes.below(index, offset), naive);
            }
        }

        #[test]
        fn data_is_read_and_found_where_it_was_put(
            (runs, size) in volumes(),
            pages in prop::collection::btree_set(0..200_u64, 0..20),
        ) {
            let disk = Arc::new(MemoryDisk::sparse(size));
            let volume = LogicalVolume::new(disk.clone(), "volume".into(), runs);
            let size = volume.size();
            let mut expected = vec![0; to_usize(size)];
            for page in pages.into_iter().filter(|page| page * PAGE < size) {
                let place = volume.place(page * PAGE).unwrap();
                disk.write_at(&[u8::try_from(page).unwrap() | 1; 4096], place.start).unwrap();
                prop_assert_eq!(volume.offsets_of(Extent::at(place.start, 9), 9), [Extent::at(page * PAGE, 9)]);
                expected[to_usize(page * PAGE)..][..4096].fill(u8::try_from(page).unwrap() | 1);
            }
            prop_assert!(read_vec(&volume, 0, to_usize(size)).unwrap() == expected);
            let data = collect(&crate::io::DataOf(&volume), Extent::new(0, size)).unwrap();
            for page in 0..size / PAGE {
                let is_data = data.covers(Extent::at(page * PAGE, PAGE));
                prop_assert_eq!(is_data, expected[to_usize(page * PAGE)] != 0, "page {}", page);
            }
            prop_assert!(volume.read_at(&mut [0; 2], size - 1).is_err());
        }
    }
}
