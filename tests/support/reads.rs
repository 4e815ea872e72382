//! A disk held against the bytes it must read as.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::Path;
use std::sync::Arc;

use haul::image::compare;
use haul::io::{DataOf, DiskFile, ReadAt, Window, is_zero};
use haul::unit::extents::collect;
use haul::unit::{Extent, ExtentMap};

use super::images::{Random, arg, output, run};

/// The image file at `path`.
pub fn file(path: &Path) -> Arc<dyn ReadAt> {
    Arc::new(DiskFile::open(path).unwrap())
}

/// The disk reads as `expected`: in one sweep of pieces of several sizes, at random places from several threads at
/// once, and with nothing but zeroes outside what it calls data. Returns what it calls data.
pub fn assert_reads(disk: &dyn ReadAt, expected: &[u8]) -> ExtentMap {
    let size = expected.len() as u64;
    assert_eq!(disk.size(), size);
    let read = |at: u64, len: usize| {
        let mut buf = vec![0xa5; len];
        disk.read_at(&mut buf, at).unwrap_or_else(|e| panic!("{len} bytes at {at}: {e:?}"));
        let from = usize::try_from(at).unwrap();
        assert!(buf == expected[from..from + len], "{len} bytes at {at} differ");
    };
    for step in [65_536, (3 << 20) + 12_345] {
        (0..expected.len()).step_by(step).for_each(|at| read(at as u64, step.min(expected.len() - at)));
    }
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let mut random = Random(thread);
            scope.spawn(move || {
                for _ in 0..if size == 0 { 0 } else { 150 } {
                    let at = random.below(size);
                    let longest = [700, 70_000, 700_000][usize::try_from(random.below(3)).unwrap()];
                    let len = random.below(longest);
                    read(at, usize::try_from(len.min(size - at)).unwrap());
                }
            });
        }
    });
    assert!(disk.read_at(&mut [0], size).is_err());

    let data = collect(&DataOf(disk), Extent::new(0, u64::MAX)).unwrap();
    let mut last = 0;
    for run in data.iter().chain([Extent::new(size, size)]) {
        assert!(run.end <= size);
        let hole = &expected[usize::try_from(last).unwrap()..usize::try_from(run.start).unwrap()];
        assert!(is_zero(hole), "{last}..{} holds data and is not reported", run.start);
        last = run.end;
    }
    // A question from inside a run gives the rest of it.
    for run in data.iter().take(20) {
        let middle = run.start + run.len() / 2;
        assert_eq!(disk.next_data(middle).unwrap().unwrap().start, middle);
    }
    data
}

/// `bytes` with zeroes after them up to `size`.
pub fn padded(bytes: &[u8], size: u64) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(usize::try_from(size).unwrap(), 0);
    padded
}

/// The disk of the image at `path`, of the format QEMU calls `format`, as QEMU reads it: a raw file, if QEMU can.
pub fn as_qemu_reads(path: &Path, format: &str) -> Option<DiskFile> {
    let raw = path.with_extension("qemu.raw");
    let done = output("qemu-img", &["convert", "-f", format, "-O", "raw", arg(path), arg(&raw)]);
    done.status.success().then(|| DiskFile::open(&raw).unwrap())
}

/// Where two disks differ as far as both go.
pub fn differing(a: &dyn ReadAt, b: &dyn ReadAt) -> Vec<Extent> {
    let both = Extent::new(0, a.size().min(b.size()));
    compare(&Window::new(a, both, "a"), &Window::new(b, both, "b"), &Default::default()).unwrap().differing
}

/// An image served as a file by libvhdi, in a folder of its own; gone when dropped.
pub struct VhdiMount(Option<tempfile::TempDir>);

impl VhdiMount {
    pub fn new(image: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        run("vhdimount", &[arg(image), arg(dir.path())]);
        VhdiMount(Some(dir))
    }

    /// The disk in it.
    pub fn disk(&self) -> DiskFile {
        DiskFile::open(&self.0.as_ref().unwrap().path().join("vhdi1")).unwrap()
    }
}

impl Drop for VhdiMount {
    fn drop(&mut self) {
        let Some(dir) = self.0.take() else { return };
        // Lazily: a process another test just starts may hold a file open between fork and exec.
        let gone = output("umount", &["-l", arg(dir.path())]).status.success();
        if !gone {
            let kept = dir.keep();
            assert!(std::thread::panicking(), "cannot unmount {}", kept.display());
        }
    }
}
