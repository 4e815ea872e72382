//! What any bytes must satisfy as an image, whatever its format.

use std::sync::atomic::{AtomicU64, Ordering};

use haul::error::{Error, Kind, Result};
use haul::io::fake::MemoryDisk;
use haul::io::{ReadAt, is_zero};
use haul::unit::Extent;

/// Bytes of the virtual disk that are read of each image.
const READ: u64 = 4 << 20;
/// Answers of `next_data` that are looked at.
const ANSWERS: u64 = 2000;

/// A file that counts what is asked of it, and panics when an image makes haul ask without end.
pub struct Watched {
    file: MemoryDisk,
    calls: AtomicU64,
    bytes: AtomicU64,
}

impl Watched {
    pub fn new(bytes: &[u8]) -> Self {
        let file = MemoryDisk::sparse(bytes.len() as u64);
        for (i, page) in bytes.chunks(4096).enumerate().filter(|(_, page)| !is_zero(page)) {
            haul::io::WriteAt::write_at(&file, page, i as u64 * 4096).unwrap();
        }
        Watched { file, calls: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    fn step(&self, bytes: u64) {
        let calls = self.calls.fetch_add(1, Ordering::Relaxed);
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        assert!(calls < 200_000, "{calls} reads for {READ} bytes and {ANSWERS} answers");
        assert!(bytes < 256 << 20, "{bytes} bytes read for {READ} bytes and {ANSWERS} answers");
    }
}

impl ReadAt for Watched {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.step(buf.len() as u64);
        self.file.read_at(buf, offset)
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        self.step(0);
        self.file.next_data(from)
    }

    fn name(&self) -> String {
        "fuzz".into()
    }
}

/// An error must blame the image and say where.
pub fn judge(error: &Error) {
    assert_eq!(error.kind(), Kind::Image, "{error:?}");
    assert!(error.what().contains("fuzz"), "the image is not named: {error:?}");
    let refusal = error.id().ends_with(".differencing");
    assert!(refusal || error.facts().iter().any(|(name, _)| *name == "offset"), "no offset: {error:?}");
}

/// Reads some of `disk`, holding what it calls data against what it reads.
pub fn read(disk: &dyn ReadAt) -> Result<()> {
    let size = disk.size();
    let mut buf = vec![0; 100_000];
    let (mut at, mut left) = (0, READ);
    for _ in 0..ANSWERS {
        let Some(data) = disk.next_data(at)? else {
            at = size;
            break;
        };
        assert!(at <= data.start && data.start < data.end && data.end <= size, "{at}: {data:?} of {size}");
        // What is skipped reads as zeroes, at its ends at least.
        for skipped in [at, data.start.saturating_sub(512).max(at)] {
            let part = &mut buf[..usize::try_from((data.start - skipped).min(512)).unwrap()];
            disk.read_at(part, skipped)?;
            assert!(is_zero(part), "{skipped} was skipped and holds data");
        }
        at = data.start;
        while at < data.end && left > 0 {
            let n = (data.end - at).min(buf.len() as u64).min(left);
            disk.read_at(&mut buf[..usize::try_from(n).unwrap()], at)?;
            at += n;
            left -= n;
        }
        at = data.end;
        if left == 0 {
            break;
        }
    }
    let tail = usize::try_from((size - at.min(size)).min(512)).unwrap();
    disk.read_at(&mut buf[..tail], size - tail as u64)?;
    assert!(disk.read_at(&mut [0], size).is_err());
    Ok(())
}
