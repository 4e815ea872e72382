//! What any bytes must satisfy as a VMDK image: open and read within bounds, or fail with an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use haul::error::{Error, Kind, Result};
use haul::image::vmdk::{self, Metadata, Reader};
use haul::io::fake::MemoryDisk;
use haul::io::{ReadAt, is_zero};
use haul::unit::Extent;

/// Bytes of the virtual disk that are read of each image.
const READ: u64 = 4 << 20;
/// Answers of `next_data` that are looked at.
const ANSWERS: u64 = 2000;
/// Extent files an image gets at most.
const EXTENTS: usize = 8;

/// A file that counts what is asked of it, and panics when an image makes haul ask without end.
struct Watched {
    file: Arc<MemoryDisk>,
    calls: AtomicU64,
    bytes: AtomicU64,
}

impl Watched {
    fn new(file: &Arc<MemoryDisk>) -> Arc<Self> {
        Arc::new(Watched { file: Arc::clone(file), calls: AtomicU64::new(0), bytes: AtomicU64::new(0) })
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

/// Takes `bytes` as a VMDK image whose extent files, if it names any, all hold `extent`. Returns whether it could be
/// opened, and whether all of it that was tried could be read.
pub fn fuzz_vmdk(bytes: &[u8], extent: &[u8]) -> (bool, bool) {
    let file = Watched::new(&Arc::new(MemoryDisk::holding(bytes)));
    let extent = Arc::new(MemoryDisk::holding(extent));
    let _ = vmdk::probe(&*file).map_err(judge);
    let _ = Metadata::read(&*file).map(|metadata| metadata.info()).map_err(judge);
    let mut opened = 0;
    let disk = Reader::open(file, |wanted| {
        assert!(!wanted.contains(['/', '\\']), "{wanted:?} is a path");
        opened += 1;
        if opened > EXTENTS {
            return Err(Error::new(Kind::Image, "image.extent-not-named", "fuzz wants too much"));
        }
        Ok(Watched::new(&extent))
    });
    match disk {
        Ok(disk) => (true, read(&disk).map_err(judge).is_ok()),
        Err(error) => {
            judge(error);
            (false, false)
        }
    }
}

/// An error must blame the image and say where.
fn judge(error: Error) {
    assert_eq!(error.kind(), Kind::Image, "{error:?}");
    assert!(error.what().contains("fuzz"), "the image is not named: {error:?}");
    let refusal = !matches!(error.id(), "vmdk.field" | "io.beyond-end");
    assert!(refusal || error.facts().iter().any(|(name, _)| *name == "offset"), "no offset: {error:?}");
}

fn read(disk: &dyn ReadAt) -> Result<()> {
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
    Ok(())
}
