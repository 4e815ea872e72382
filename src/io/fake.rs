//! Disks for tests: in memory and sparse, with bad ranges, and with a count of what was read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{ReadAt, WriteAt, check_range};
use crate::error::{Error, Kind, Result};
use crate::unit::{Extent, to_usize};

const PAGE: u64 = 4096;
/// One page of the disk in memory.
type Page = [u8; to_usize(PAGE)];

/// A sparse disk in memory: pages never written read as zeroes and are not reported as data.
pub struct MemoryDisk {
    size: u64,
    pages: Mutex<BTreeMap<u64, Box<Page>>>,
}

impl MemoryDisk {
    /// A disk of `size` bytes, all holes.
    pub fn sparse(size: u64) -> Self {
        MemoryDisk { size, pages: Mutex::default() }
    }

    /// A disk that holds `bytes`.
    pub fn holding(bytes: &[u8]) -> Self {
        let disk = MemoryDisk::sparse(bytes.len() as u64);
        disk.put(bytes, 0);
        disk
    }

    fn pages(&self) -> MutexGuard<'_, BTreeMap<u64, Box<Page>>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, bytes: &[u8], offset: u64) {
        let mut pages = self.pages();
        for (page, at, range) in pieces(bytes.len(), offset) {
            let target = pages.entry(page).or_insert_with(|| Box::new([0; to_usize(PAGE)]));
            target[at..at + range.len()].copy_from_slice(&bytes[range]);
        }
    }
}

/// Cuts `len` bytes at `offset` at page borders: page number, place in the page, range of the bytes.
fn pieces(len: usize, offset: u64) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let in_page = to_usize(at % PAGE);
        let n = (to_usize(PAGE) - in_page).min(len - done);
        done += n;
        Some((at / PAGE, in_page, done - n..done))
    })
}

impl ReadAt for MemoryDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let pages = self.pages();
        for (page, at, range) in pieces(buf.len(), offset) {
            match pages.get(&page) {
                Some(page) => buf[range.clone()].copy_from_slice(&page[at..at + range.len()]),
                None => buf[range].fill(0),
            }
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        let pages = self.pages();
        let found = pages.range(from / PAGE..).next().map(|(page, _)| page * PAGE);
        let run = found.map(|start| Extent::new(start.max(from), (start + PAGE).min(self.size)));
        // The last page goes on beyond a disk of no whole pages.
        Ok(run.filter(|run| !run.is_empty()))
    }

    fn name(&self) -> String {
        "memory disk".into()
    }
}

impl WriteAt for MemoryDisk {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        check_range(self, bytes.len(), offset)?;
        self.put(bytes, offset);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        (**self).read_at(buf, offset)
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        (**self).next_data(from)
    }

    fn name(&self) -> String {
        (**self).name()
    }
}

/// A disk with unreadable sectors, counting the bytes read from it.
pub struct FaultyDisk<T> {
    base: T,
    bad: Vec<Extent>,
    read: AtomicU64,
}

impl<T: ReadAt> FaultyDisk<T> {
    /// `base`, of which every read that touches one of `bad` fails with EIO.
    pub fn new(base: T, bad: Vec<Extent>) -> Self {
        FaultyDisk { base, bad, read: AtomicU64::new(0) }
    }

    /// Bytes read so far, failed reads left out.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

impl<T: ReadAt> ReadAt for FaultyDisk<T> {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let asked = Extent::at(offset, buf.len() as u64);
        if self.bad.iter().any(|bad| !bad.intersect(asked).is_empty()) {
            return Err(Error::new(
                Kind::Source,
                "io.read",
                format!("cannot read {} at {offset}", self.name()),
            )
            .fact("offset", offset)
            .caused_by(std::io::Error::from_raw_os_error(libc::EIO)));
        }
        self.base.read_at(buf, offset)?;
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        self.base.next_data(from)
    }

    fn name(&self) -> String {
        self.base.name()
    }
}
