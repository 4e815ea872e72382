//! Random access to bytes: the ports [`ReadAt`] and [`WriteAt`], files and devices behind them, and fakes.

pub mod atomic;
pub mod batch;
pub mod buffer;
pub mod fake;
pub mod file;
pub mod nbd;
pub mod pool;
mod residency;

use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::unit::{Extent, Extents, to_usize};

pub use buffer::AlignedBuf;
pub use file::{DiskFile, OutFile};
pub use pool::{Pool, PoolBuf};

/// A disk, an image's virtual disk, or a part of one, read at any offset from any thread.
pub trait ReadAt: Send + Sync {
    /// Length in bytes; it does not change.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`. Fails when any byte lies beyond [`ReadAt::size`] or cannot be read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// The next run at or after `from` that may hold non-zero bytes; everything between is known to read as
    /// zeroes without being read. The same contract as [`Extents::next_extent`].
    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        Extent::new(0, self.size()).next_extent(from)
    }

    /// What to call it in a message: a path, a URL, or a part of one.
    fn name(&self) -> String;
}

/// Bytes written at any offset.
pub trait WriteAt: Send + Sync {
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()>;

    /// Returns once everything written before is on stable storage.
    fn sync(&self) -> Result<()>;
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
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

impl<T: WriteAt + ?Sized> WriteAt for Arc<T> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        (**self).write_at(bytes, offset)
    }

    fn sync(&self) -> Result<()> {
        (**self).sync()
    }
}

/// Where a disk may hold data, as a lazy set.
pub struct DataOf<T>(pub T);

impl<T: ReadAt> Extents for DataOf<T> {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        self.0.next_data(from)
    }
}

/// A part of a disk as a disk of its own: a partition, a logical volume's segment.
pub struct Window<T> {
    base: T,
    extent: Extent,
    name: String,
}

impl<T: ReadAt> Window<T> {
    /// The part `extent` of `base`, called `name` in messages; cut off at the end of `base`.
    pub fn new(base: T, extent: Extent, name: impl Into<String>) -> Self {
        let extent = extent.intersect(Extent::new(0, base.size()));
        Window { base, extent, name: name.into() }
    }
}

impl<T: ReadAt> ReadAt for Window<T> {
    fn size(&self) -> u64 {
        self.extent.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        self.base.read_at(buf, self.extent.start + offset)
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        if from >= self.size() {
            return Ok(None);
        }
        let Some(run) = self.base.next_data(self.extent.start + from)? else { return Ok(None) };
        let run = run.intersect(self.extent);
        Ok((!run.is_empty()).then(|| Extent::new(run.start - self.extent.start, run.end - self.extent.start)))
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

/// A disk whose first bytes are others.
pub struct Patched<T> {
    base: T,
    front: Vec<u8>,
}

impl<T: ReadAt> Patched<T> {
    /// `base`, which begins with `front` instead of its own bytes.
    pub fn new(base: T, front: Vec<u8>) -> Self {
        Patched { base, front }
    }
}

impl<T: ReadAt> ReadAt for Patched<T> {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.base.read_at(buf, offset)?;
        let front = self.front.get(crate::unit::to_usize(offset)..).unwrap_or_default();
        let n = front.len().min(buf.len());
        buf[..n].copy_from_slice(&front[..n]);
        Ok(())
    }

    fn name(&self) -> String {
        self.base.name()
    }
}

/// Refuses a read that leaves the disk; every implementation of [`ReadAt::read_at`] starts with it.
pub fn check_range(disk: &(impl ReadAt + ?Sized), len: usize, offset: u64) -> Result<()> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= disk.size() => Ok(()),
        _ => Err(Error::new(
            Kind::Image,
            "io.beyond-end",
            format!("{}: {len} bytes at {offset} lie beyond its end at {}", disk.name(), disk.size()),
        )
        .because("the image or disk is shorter than its own metadata says")
        .fact("disk", disk.name())
        .fact("offset", offset)),
    }
}

/// Reads `N` bytes at `offset`.
pub fn read_array<const N: usize>(disk: &(impl ReadAt + ?Sized), offset: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    disk.read_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Reads `len` bytes at `offset`; the caller has bounded `len`.
pub fn read_vec(disk: &(impl ReadAt + ?Sized), offset: u64, len: usize) -> Result<Vec<u8>> {
    check_range(disk, len, offset)?;
    let mut bytes = vec![0; len];
    disk.read_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Lays over `buf`, which was read at `offset`, what of `bytes`, which belong at `at`, it has room for.
pub fn lay_over(buf: &mut [u8], offset: u64, bytes: &[u8], at: u64) {
    let part = Extent::at(offset, buf.len() as u64).intersect(Extent::at(at, bytes.len() as u64));
    if !part.is_empty() {
        let of = |start: u64| to_usize(part.start - start)..to_usize(part.end - start);
        buf[of(offset)].copy_from_slice(&bytes[of(at)]);
    }
}

/// Whether every byte is zero; 64 bytes at a time, so that a processor can do it in wide registers.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::fake::MemoryDisk;
    use super::*;

    #[test]
    fn a_window_is_a_disk_of_its_own() {
        let disk = MemoryDisk::sparse(1 << 20);
        disk.write_at(b"haul", 4096).unwrap();
        let window = Window::new(&disk, Extent::at(4096, 8192), "part");
        assert_eq!(window.size(), 8192);
        assert_eq!(&read_array::<4>(&window, 0).unwrap(), b"haul");
        assert_eq!(window.next_data(0).unwrap(), Some(Extent::new(0, 4096)));
        assert_eq!(window.next_data(4096).unwrap(), None);
        assert!(read_array::<4>(&window, 8190).unwrap_err().what().contains("part"));
    }

    #[test]
    fn zero_means_every_byte() {
        for len in [0, 1, 63, 64, 65, 4096] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for i in [0, len / 2, len.saturating_sub(1)] {
                if let Some(byte) = bytes.get_mut(i) {
                    *byte = 1;
                    assert!(!is_zero(&bytes), "byte {i} of {len}");
                    bytes[i] = 0;
                }
            }
        }
    }
}
