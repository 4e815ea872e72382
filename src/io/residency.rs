//! What of a file the page cache holds, asked without reading any of it.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::raw::c_void;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

use crate::unit::{Extent, to_usize};

/// A file mapped for mincore(2) to look at. Its bytes are never touched, so that neither a file cut short nor a bad
/// sector raises SIGBUS.
pub struct Residency {
    start: NonNull<c_void>,
    len: usize,
    page: usize,
}

// SAFETY: the mapping is an address range that only mincore and munmap are given, from any thread alike.
unsafe impl Send for Residency {}
// SAFETY: as above.
unsafe impl Sync for Residency {}

impl Residency {
    /// How many pages of an extent are looked at.
    const SAMPLES: u64 = 8;

    /// Maps the first `size` bytes of `file`; `None` where its file system cannot, or addresses do not suffice.
    pub fn of(file: &File, size: u64) -> Option<Self> {
        let len = NonZeroUsize::new(usize::try_from(size).ok()?)?;
        let page = usize::try_from(sysconf(SysconfVar::PAGE_SIZE).ok()??).ok()?;
        // SAFETY: the kernel chooses the place, and nobody reads or writes there.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0) }.ok()?;
        Some(Residency { start, len: len.get(), page })
    }

    /// Whether most of `extent`, which lies in the file, is in memory, going by a few of its pages.
    pub fn mostly(&self, extent: Extent) -> bool {
        let step = (extent.len() / Self::SAMPLES).max(self.page as u64);
        let places: Vec<u64> = (extent.start..extent.end).step_by(to_usize(step)).collect();
        places.iter().filter(|at| self.holds(to_usize(**at))).count() * 2 > places.len()
    }

    fn holds(&self, offset: usize) -> bool {
        let at = offset / self.page * self.page;
        let mut state = 0u8;
        // SAFETY: the page lies in the mapping (checked first), and one byte is written for one page.
        offset < self.len
            && unsafe { libc::mincore(self.start.as_ptr().byte_add(at), self.page, &raw mut state) } == 0
            && state & 1 == 1
    }
}

impl Drop for Residency {
    fn drop(&mut self) {
        // SAFETY: mapped in `of` with this very length, and unmapped once. It fails for no mapping that exists.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

    use super::*;

    #[test]
    fn pages_are_held_until_they_are_let_go() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.sync_all().unwrap();
        let residency = Residency::of(&file, 4 << 20).unwrap();
        assert!(residency.mostly(Extent::new(0, 4 << 20)));
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        assert!(!residency.mostly(Extent::new(0, 4 << 20)));
        // Whole pages, which need not be read first.
        file.write_all_at(&vec![8; 1 << 20], 1 << 20).unwrap();
        assert!(residency.mostly(Extent::new(1 << 20, 2 << 20)));
        assert!(!residency.mostly(Extent::new(0, 4 << 20)), "a quarter counts for most");
    }
}
