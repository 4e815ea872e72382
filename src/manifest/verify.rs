//! Proves a copy against its manifest: every listed chunk has its digest, everything else reads as zeroes.

use std::iter::Peekable;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Chunks, Manifest};
use crate::error::{Error, Kind, Result};
use crate::io::batch::Geometry;
use crate::io::{AlignedBuf, ReadAt, is_zero, read_vec};
use crate::unit::{Digest, Extent, ExtentMap, MIB, to_usize};

/// What [`verify`] found.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Chunks whose bytes are not what the manifest says.
    pub differing: ExtentMap,
    /// Bytes of the copy read and compared.
    pub compared: u64,
}

/// Whole chunks to look at, at most a batch, with the digests they should have.
pub(super) struct Task {
    pub extent: Extent,
    pub digests: Vec<(u64, Digest)>,
}

/// Hands out batches in order, leaping over what neither the manifest lists nor the copy holds.
struct Tasks<'a> {
    chunks: Peekable<Chunks>,
    copy: &'a dyn ReadAt,
    geometry: Geometry,
    cursor: u64,
}

impl Tasks<'_> {
    fn next(&mut self) -> Result<Option<Task>> {
        let listed = match self.chunks.peek() {
            Some(Ok((index, _))) => Some(self.geometry.chunk_at(*index).start),
            Some(Err(_)) => return self.chunks.next().transpose().map(|_| None),
            None => None,
        };
        let held = self.copy.next_data(self.cursor)?.map(|run| run.start);
        // What a format added to the disk's end is no batch's, nor is what a forged manifest lists there.
        let next = listed.into_iter().chain(held).min().filter(|start| *start < self.geometry.size);
        let Some(start) = next else { return Ok(None) };
        let extent = self.geometry.batch_at(start);
        let mut digests = Vec::new();
        while let Some(entry) = self
            .chunks
            .next_if(|entry| !matches!(entry, Ok((index, _)) if index * self.geometry.chunk >= extent.end))
        {
            digests.push(entry?);
        }
        self.cursor = extent.end;
        Ok(Some(Task { extent, digests }))
    }
}

/// Reads `copy` with `threads` threads and compares it with `manifest`; `advance` is told, from any thread, how far
/// it has come.
pub fn verify(
    manifest: &Manifest,
    copy: &dyn ReadAt,
    threads: usize,
    stop: &AtomicBool,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<Verdict> {
    let geometry = manifest.geometry();
    check_size(manifest, copy)?;
    let tasks = Mutex::new(Tasks { chunks: manifest.chunks()?.peekable(), copy, geometry, cursor: 0 });
    let mut verdict = read(&geometry, copy, &|| lock(&tasks).next(), threads, stop, advance)?;
    let added = Extent::new(geometry.size, copy.size());
    if !is_zero(&read_vec(copy, added.start, to_usize(added.len()))?) {
        verdict.differing.insert(added);
    }
    Ok(verdict)
}

/// Refuses a copy that cannot be the manifest's because of its size.
pub(super) fn check_size(manifest: &Manifest, copy: &dyn ReadAt) -> Result<()> {
    let size = manifest.head.size;
    // Formats round the size up, to whole sectors or MiB; what is added must be zeroes.
    let fits = size..=size.next_multiple_of(MIB).max(MIB);
    if !fits.contains(&copy.size()) {
        return Err(Error::new(Kind::Mismatch, "verify.size", format!("{} has the wrong size", copy.name()))
            .because(format!("it is {} bytes long, the manifest says {size}", copy.size())));
    }
    Ok(())
}

/// Reads what `next` hands out, until it hands out nothing, and compares it.
pub(super) fn read(
    geometry: &Geometry,
    copy: &dyn ReadAt,
    next: &(dyn Fn() -> Result<Option<Task>> + Sync),
    threads: usize,
    stop: &AtomicBool,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<Verdict> {
    let verdict = Mutex::new(Verdict::default());
    let work = || -> Result<()> {
        let mut buf = AlignedBuf::new(to_usize(geometry.batch()));
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, "interrupted", "verification was stopped"));
            }
            let Some(task) = next()? else { return Ok(()) };
            let readable = task.extent.intersect(Extent::new(0, copy.size()));
            let bytes = &mut buf[..to_usize(task.extent.len())];
            let (head, tail) = bytes.split_at_mut(to_usize(readable.len()));
            copy.read_at(head, readable.start)?;
            tail.fill(0);
            let differing = differing(&task, bytes, geometry);
            advance(task.extent.end);
            let mut verdict = lock(&verdict);
            verdict.compared += task.extent.len();
            verdict.differing.extend(differing);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| {
                Err(Error::new(Kind::Internal, "verify.thread", "a verification thread panicked"))
            })
        })
    })?;
    advance(geometry.size);
    Ok(verdict.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn differing(task: &Task, bytes: &[u8], geometry: &Geometry) -> Vec<Extent> {
    let first = task.extent.start / geometry.chunk;
    let mut digests = task.digests.iter().peekable();
    (first..)
        .zip(bytes.chunks(to_usize(geometry.chunk)))
        .filter(|(index, chunk)| match digests.next_if(|(listed, _)| listed == index) {
            Some((_, digest)) => Digest::of(chunk) != *digest,
            None => !is_zero(chunk),
        })
        .map(|(index, _)| geometry.chunk_at(index))
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::Sealer;
    use super::super::journal::BatchRecord;
    use super::*;
    use crate::io::WriteAt;
    use crate::io::fake::MemoryDisk;

    /// A copy that knows no holes, as an object does.
    struct Solid(MemoryDisk);

    impl ReadAt for Solid {
        fn size(&self) -> u64 {
            self.0.size()
        }

        fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            self.0.read_at(buf, offset)
        }

        fn name(&self) -> String {
            self.0.name()
        }
    }

    #[test]
    fn a_copy_rounded_up_is_verified_to_its_end_and_must_be_zero_there() {
        let size = 3 * MIB + 512;
        let folder = tempfile::tempdir().unwrap();
        let mut sealer = Sealer::begin(&folder.path().join("manifest"), Geometry::of(size)).unwrap();
        let digests = vec![Some(Digest::of(&[7; 65_536]))];
        sealer.add(&BatchRecord { start: 0, end: 2 * MIB, digests, ..BatchRecord::default() }).unwrap();
        let manifest = sealer.seal(super::super::Head::default(), &ExtentMap::new()).unwrap();
        let disk = MemoryDisk::sparse(4 * MIB);
        disk.write_at(&[7; 65_536], 0).unwrap();
        let copy = Solid(disk);
        let verified = || verify(&manifest, &copy, 2, &AtomicBool::new(false), &|_| {}).unwrap();
        assert_eq!((verified().differing.is_empty(), verified().compared), (true, size));
        copy.0.write_at(&[1], size).unwrap();
        assert_eq!(verified().differing.iter().collect::<Vec<_>>(), [Extent::new(size, 4 * MIB)]);
    }
}
