//! A file that counts what is asked of it, and what any bytes must satisfy as an image, whatever its format.

use std::sync::atomic::{AtomicU64, Ordering};

use haul::error::{Error, Kind, Result};
use haul::io::fake::MemoryDisk;
use haul::io::{ReadAt, is_zero};
use haul::unit::Extent;

use super::{Outcome, input, signature};

/// Bytes of the virtual disk that are read of each image.
const READ: u64 = 1 << 20;
/// Answers of `next_data` that are looked at.
const ANSWERS: u64 = 2000;

/// A file called `fuzz` that counts what is asked of it, and panics when its bytes make haul ask without end.
pub struct Watched {
    file: MemoryDisk,
    calls: AtomicU64,
    bytes: AtomicU64,
    most_calls: u64,
    most_bytes: u64,
}

impl Watched {
    /// The file of an image.
    pub fn new(bytes: &[u8]) -> Self {
        Watched::within(input::disk(bytes, u64::MAX), 200_000, 256 << 20)
    }

    /// `file`, of which so many reads, and so many bytes, are asked at most.
    pub fn within(file: MemoryDisk, most_calls: u64, most_bytes: u64) -> Self {
        Watched { file, calls: AtomicU64::new(0), bytes: AtomicU64::new(0), most_calls, most_bytes }
    }

    fn step(&self, bytes: u64) {
        let calls = self.calls.fetch_add(1, Ordering::Relaxed);
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        assert!(calls < self.most_calls && bytes < self.most_bytes, "{calls} reads of {bytes} bytes");
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

/// An error must blame the image and, unless it refuses what the image is rather than a place in it, say where.
pub fn judge(error: &Error) {
    assert_eq!(error.kind(), Kind::Image, "{error:?}");
    assert!(error.what().contains("fuzz"), "the image is not named: {error:?}");
    let place = matches!(error.id(), "io.beyond-end" | "vhdx.log") || error.id().ends_with(".field");
    assert!(!place || error.facts().iter().any(|(name, _)| *name == "offset"), "no offset: {error:?}");
}

/// What came of an image that could not be opened.
pub fn refused(error: &Error) -> Outcome {
    judge(error);
    Outcome::Refused(signature(error))
}

/// What comes of reading `disk`.
pub fn read_of(disk: &dyn ReadAt) -> Outcome {
    match read(disk) {
        Ok(()) => Outcome::Fine(String::new()),
        Err(error) => {
            judge(&error);
            Outcome::Broken(signature(&error))
        }
    }
}

/// Reads some of `disk`, holding what it calls data against what it reads.
pub fn read(disk: &dyn ReadAt) -> Result<()> {
    let size = disk.size();
    let mut buf = vec![0; 100_000];
    let mut again = [0; 700];
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
            let n = usize::try_from((data.end - at).min(buf.len() as u64).min(left)).unwrap();
            disk.read_at(&mut buf[..n], at)?;
            // A part of it reads the same by itself.
            let (from, len) = (n / 3, again.len().min(n - n / 3));
            disk.read_at(&mut again[..len], at + from as u64)?;
            assert!(again[..len] == buf[from..from + len], "{at} and {from} read differently");
            at += n as u64;
            left -= n as u64;
        }
        at = data.end;
        if left == 0 {
            break;
        }
    }
    let tail = usize::try_from((size - at.min(size)).min(512)).unwrap();
    disk.read_at(&mut buf[..tail], size - tail as u64)?;
    assert!(disk.read_at(&mut [0], size).is_err(), "it can be read beyond its end");
    Ok(())
}
