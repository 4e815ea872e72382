//! The digests of a copy after a round: those of the manifest before, with those of the round in their place where it
//! changed something.

use std::iter::Peekable;

use super::journal::BatchRecord;
use super::{Chunks, Manifest, Sealer};
use crate::error::Result;
use crate::io::batch::Geometry;
use crate::unit::{Digest, Extent, ExtentMap, to_usize};

/// A manifest being brought up to date, batch by batch in the order of the disk.
pub struct Round<'a> {
    geometry: Geometry,
    /// The chunks of the copy before the round.
    image: Peekable<Chunks>,
    /// The chunks of the source in batches that were amended before.
    source: Peekable<Chunks>,
    amended: ExtentMap,
    changed: &'a ExtentMap,
    fixes: bool,
    /// Everything before this offset is sealed.
    cursor: u64,
}

impl<'a> Round<'a> {
    /// A round that set `changed` of the copy in `before`, in whole chunks; with `fixes` its source did not change.
    pub fn of(before: &Manifest, changed: &'a ExtentMap, fixes: bool) -> Result<Self> {
        let amended = before.head.amended.iter().map(|(start, end)| Extent::new(*start, *end));
        Ok(Round {
            geometry: before.geometry(),
            image: before.chunks()?.peekable(),
            source: before.source_chunks()?.peekable(),
            amended: amended.collect(),
            changed,
            fixes,
            cursor: 0,
        })
    }

    /// Takes in a batch of the round, in the order of the disk; what lies before it is sealed as it was.
    pub fn put(&mut self, batch: &BatchRecord, sealer: &mut Sealer) -> Result<()> {
        self.pass(batch.start, sealer)?;
        self.seal(Extent::new(batch.start, batch.end), &batch.digests, sealer)
    }

    /// Seals what follows the last batch.
    pub fn finish(mut self, sealer: &mut Sealer) -> Result<()> {
        self.pass(self.geometry.size, sealer)
    }

    /// Seals the batches up to `end` for which the round brought no data.
    fn pass(&mut self, end: u64, sealer: &mut Sealer) -> Result<()> {
        while let Some(start) = self.next_listed(end)? {
            self.seal(self.geometry.batch_at(start), &[], sealer)?;
        }
        Ok(())
    }

    /// The next place before `end` that the manifest lists.
    fn next_listed(&mut self, end: u64) -> Result<Option<u64>> {
        let mut first = None;
        for chunks in [&mut self.image, &mut self.source] {
            match chunks.peek() {
                Some(Ok((index, _))) => {
                    let start = self.geometry.chunk_at(*index).start;
                    first = Some(first.map_or(start, |first: u64| first.min(start)));
                }
                Some(Err(_)) => return chunks.next().transpose().map(|_| None),
                None => {}
            }
        }
        Ok(first.filter(|start| *start < end))
    }

    /// Seals one batch: `new` has the round's digests of all its chunks, or is empty when they are zeroes.
    fn seal(&mut self, extent: Extent, new: &[Option<Digest>], sealer: &mut Sealer) -> Result<()> {
        let chunk = self.geometry.chunk;
        let count = to_usize(extent.len().div_ceil(chunk));
        let old = take(&mut self.image, &self.geometry, extent, count)?;
        let old_source = take(&mut self.source, &self.geometry, extent, count)?;
        let was_amended = self.amended.within(extent).next().is_some();
        let mut digests = old.clone();
        for (i, digest) in digests.iter_mut().enumerate() {
            if self.changed.covers(self.geometry.chunk_at(extent.start / chunk + i as u64)) {
                *digest = new.get(i).copied().flatten();
            }
        }
        let before = match () {
            () if was_amended => Some(old_source),
            () if self.fixes && digests != old => Some(old),
            () => None,
        };
        self.cursor = extent.end;
        let record =
            BatchRecord { start: extent.start, end: extent.end, digests, before, ..BatchRecord::default() };
        sealer.add(&record)
    }
}

/// The digests that `chunks` lists for the `count` chunks of the batch `extent`.
fn take(
    chunks: &mut Peekable<Chunks>,
    geometry: &Geometry,
    extent: Extent,
    count: usize,
) -> Result<Vec<Option<Digest>>> {
    let first = extent.start / geometry.chunk;
    let mut digests = vec![None; count];
    while let Some(entry) = chunks.next_if(|entry| match entry {
        Ok((index, _)) => *index < first + count as u64,
        Err(_) => true,
    }) {
        let (index, digest) = entry?;
        if let Some(slot) = index.checked_sub(first).and_then(|i| digests.get_mut(to_usize(i))) {
            *slot = Some(digest);
        }
    }
    Ok(digests)
}
