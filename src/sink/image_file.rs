//! A local image file, written front to back in aligned blocks under a temporary name, synced beside the copy.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::JoinHandle;

use bytes::Bytes;

use super::writers::{Waiter, Writers};
use super::{Destination, Sealed};
use crate::error::{Error, Kind, Result};
use crate::io::buffer::ALIGN;
use crate::io::{OutFile, Pool, PoolBuf, ReadAt, WriteAt, atomic};
use crate::manifest::journal::{Journal, Record};
use crate::unit::{Extent, KIB, MIB, to_usize};

/// Bytes gathered before they are written.
const BLOCK: usize = 1 << 20;
/// Blocks there are: one being filled, and as many as are being written or wait for it.
const BLOCKS: usize = 5;
/// Bytes that are written from where they are, not gathered.
const LARGE: usize = BLOCK / 4;
/// A sync begins after so many bytes: what a killed job writes again at most, twice over.
const SYNC_EVERY: u64 = 64 * MIB;
/// Zeroes from this length on become a hole.
const HOLE: u64 = 64 * KIB;

/// The image file being written.
pub struct ImageFile {
    file: Arc<OutFile>,
    writers: Writers,
    blocks: Arc<Pool>,
    /// The bytes from `written` on, up to `filled`; `written` is a multiple of [`ALIGN`].
    block: PoolBuf,
    filled: usize,
    /// Up to here the bytes are with the writers.
    written: u64,
    sync_due: u64,
    journal: Arc<Journal>,
    syncer: Option<Syncer>,
    name: PathBuf,
}

impl ImageFile {
    /// Goes on writing `file` at `position`: the front's length for a new image, the last safe border for a resumed
    /// one, whose bytes before `position` are read back as far as the block reaches. It will be called `name`.
    pub fn at(file: OutFile, name: &Path, position: u64, journal: Arc<Journal>) -> Result<Self> {
        let blocks = Pool::new(BLOCKS, BLOCK);
        let mut block = next_block(&blocks)?;
        let written = position / ALIGN as u64 * ALIGN as u64;
        let filled = to_usize(position - written);
        if filled > 0 {
            crate::io::DiskFile::open(file.path())?.read_at(&mut block[..filled], written)?;
        }
        let file = Arc::new(file);
        let writers = Writers::start(file.clone(), written)?;
        let syncer = Some(Syncer::start(file.clone(), writers.waiter(), journal.clone())?);
        Ok(ImageFile {
            file,
            writers,
            blocks,
            block,
            filled,
            written,
            sync_due: written + SYNC_EVERY,
            journal,
            syncer,
            name: name.to_owned(),
        })
    }

    fn position(&self) -> u64 {
        self.written + self.filled as u64
    }

    /// Has the block written as far as it is filled, padded to [`ALIGN`], and behind it `more`; a page that is not whole
    /// stays in the next block, and is written again if that is longer.
    fn flush(&mut self, more: Bytes) -> Result<()> {
        let (filled, len) = (self.filled, more.len());
        let mut pieces = Vec::with_capacity(2);
        if filled > 0 {
            let padded = filled.next_multiple_of(ALIGN);
            self.block[filled..padded].fill(0);
            let mut next = next_block(&self.blocks)?;
            let whole = filled / ALIGN * ALIGN;
            next[..filled - whole].copy_from_slice(&self.block[whole..filled]);
            let block = std::mem::replace(&mut self.block, next);
            pieces.push(Bytes::from_owner(block).slice(..padded));
            self.filled = filled - whole;
        }
        if !more.is_empty() {
            pieces.push(more);
        }
        if !pieces.is_empty() {
            self.writers.write(self.written, pieces)?;
        }
        self.written += (filled - self.filled + len) as u64;
        Ok(())
    }

    fn stop_syncer(&mut self) -> Result<()> {
        self.syncer.take().map_or(Ok(()), Syncer::stop)
    }
}

fn next_block(blocks: &Arc<Pool>) -> Result<PoolBuf> {
    blocks.take().ok_or_else(|| Error::new(Kind::Internal, "image.block", "no block to write in"))
}

impl Destination for ImageFile {
    fn append(&mut self, mut bytes: Bytes) -> Result<()> {
        let is_aligned = (bytes.as_ptr() as usize | self.filled).is_multiple_of(ALIGN);
        if is_aligned && bytes.len() >= LARGE {
            let whole = bytes.split_to(bytes.len() / ALIGN * ALIGN);
            self.flush(whole)?;
        }
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(BLOCK - self.filled));
            self.block[self.filled..self.filled + part.len()].copy_from_slice(&part);
            self.filled += part.len();
            if self.filled == BLOCK {
                self.flush(Bytes::new())?;
            }
        }
        Ok(())
    }

    fn zeros(&mut self, count: u64) -> Result<()> {
        if count < HOLE {
            return self.append(Bytes::from_static(&[0; to_usize(HOLE)][..to_usize(count)]));
        }
        let position = self.position() + count;
        self.flush(Bytes::new())?;
        let end = self.written + (self.filled as u64).next_multiple_of(ALIGN as u64);
        self.written = position / ALIGN as u64 * ALIGN as u64;
        self.filled = to_usize(position - self.written);
        self.block[..self.filled].fill(0);
        self.writers.leave_out(Extent::new(end, self.written));
        Ok(())
    }

    fn batch_border(&mut self) -> Result<()> {
        if self.written >= self.sync_due
            && let Some(syncer) = &self.syncer
            && syncer.begin(self.written)?
        {
            self.sync_due = self.written + SYNC_EVERY;
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        self.stop_syncer()?;
        self.flush(Bytes::new())?;
        self.writers.settle()?;
        self.file.sync()?;
        self.journal.append(&Record::Synced { position: self.position() })?;
        self.journal.sync()
    }

    fn finish(mut self: Box<Self>, front: Vec<u8>) -> Result<Sealed> {
        self.stop_syncer()?;
        self.flush(Bytes::new())?;
        self.writers.settle()?;
        let length = self.position();
        self.file.set_len(length)?;
        // Everything the front points to is safe before the front is.
        self.file.sync()?;
        if self.file.path() == self.name {
            return Ok(switch(self.file, front, length));
        }
        if !front.is_empty() {
            self.file.write_at(&front, 0)?;
            self.file.sync()?;
        }
        Ok(sealed(self.file.path(), &self.name, length))
    }
}

/// An image to whose file, under its name already, a round was appended: with its new front it is the new one.
pub fn switch(file: Arc<OutFile>, front: Vec<u8>, length: u64) -> Sealed {
    Sealed::new(length, None, move || {
        file.write_at(&front, 0)?;
        file.sync().map(|()| None)
    })
}

/// The complete image file `part` of `length` bytes, which will be called `name`.
pub fn sealed(part: &Path, name: &Path, length: u64) -> Sealed {
    let (part, name) = (part.to_owned(), name.to_owned());
    Sealed::new(length, None, move || match atomic::rename(&part, &name) {
        // A run before this one may have renamed it and not lived to say so.
        Err(_) if !part.exists() && name.metadata().is_ok_and(|meta| meta.len() == length) => Ok(None),
        done => done.map(|()| None),
    })
}

/// Syncs the file beside the copy, so that the copy never waits for the disk's cache.
struct Syncer {
    positions: Option<SyncSender<u64>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Syncer {
    fn start(file: Arc<OutFile>, writes: Waiter, journal: Arc<Journal>) -> Result<Self> {
        let (positions, wanted) = mpsc::sync_channel::<u64>(1);
        let run = move || {
            for position in wanted {
                if !writes.wait(position) {
                    // Whoever writes next, or ends the image, says why.
                    return Ok(());
                }
                file.sync_data()?;
                journal.append(&Record::Synced { position })?;
                journal.sync()?;
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("sync".into()).spawn(run).map_err(|error| {
            Error::new(Kind::Internal, "thread.start", "cannot start a thread").caused_by(error)
        })?;
        Ok(Syncer { positions: Some(positions), thread: Some(thread) })
    }

    /// Asks for a sync of everything below `position`; false while an earlier one is still waiting.
    fn begin(&self, position: u64) -> Result<bool> {
        match self.positions.as_ref().map(|positions| positions.try_send(position)) {
            Some(Ok(())) => Ok(true),
            // Gone means failed: the error is reported when the syncer is stopped.
            Some(Err(TrySendError::Full(_) | TrySendError::Disconnected(_))) | None => Ok(false),
        }
    }

    /// Waits for the syncs under way.
    fn stop(mut self) -> Result<()> {
        self.close()
    }

    fn close(&mut self) -> Result<()> {
        self.positions = None;
        self.thread.take().map_or(Ok(()), |thread| {
            thread.join().unwrap_or_else(|_| {
                Err(Error::new(Kind::Internal, "sync.thread", "the sync thread panicked"))
            })
        })
    }
}

impl Drop for Syncer {
    /// A run that failed leaves no thread behind that would write to the journal of the next one.
    fn drop(&mut self) {
        let _ = self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;
    use crate::io::AlignedBuf;
    use crate::unit::extents::collect;

    const FRONT: u64 = 17 * ALIGN as u64;

    /// What is done with an image being written.
    #[derive(Clone, Debug)]
    enum Step {
        /// Bytes that begin so far behind a page border.
        Append(usize, usize),
        Zeros(u64),
        /// The job is stopped here and taken up again.
        Resume,
    }

    fn step() -> impl Strategy<Value = Step> {
        let near = |n: u64| (n - 5000..n + 5000).boxed();
        let length = prop_oneof![1..9000_u64, near(LARGE as u64), near(BLOCK as u64), Just(2 * MIB)];
        prop_oneof![
            6 => (prop_oneof![Just(0), Just(0), 1..5000_usize], length.clone())
                .prop_map(|(skew, len)| Step::Append(skew, to_usize(len))),
            3 => prop_oneof![length, near(HOLE), Just(90 * MIB)].prop_map(Step::Zeros),
            1 => Just(Step::Resume),
        ]
    }

    fn journal(dir: &Path) -> Arc<Journal> {
        Arc::new(Journal::create(&dir.join("journal"), b"{}").unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn the_file_holds_what_was_appended_and_holes_take_no_room(steps in prop::collection::vec(step(), 1..24)) {
            let dir = tempfile::tempdir().unwrap();
            let (part, name) = (dir.path().join("part"), dir.path().join("image"));
            let file = OutFile::create(&part).unwrap();
            let mut image = ImageFile::at(file, &name, FRONT, journal(dir.path())).unwrap();
            // The runs of bytes that are not zero, and what they are.
            let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
            let mut at = FRONT;
            for (i, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Append(skew, len) => {
                        let mut buf = AlignedBuf::new(skew + len);
                        let value = u8::try_from(i).unwrap() + 1;
                        buf[skew..].fill(value);
                        let bytes = Bytes::from_owner(PoolBuf::from(buf)).slice(skew..);
                        image.append(bytes).unwrap();
                        runs.push((at, vec![value; len]));
                        at += len as u64;
                    }
                    Step::Zeros(count) => {
                        image.zeros(count).unwrap();
                        at += count;
                    }
                    Step::Resume => {
                        image.settle().unwrap();
                        drop(image);
                        let file = OutFile::reopen(&part).unwrap();
                        file.set_len(at).unwrap();
                        image = ImageFile::at(file, &name, at, journal(dir.path())).unwrap();
                    }
                }
                image.batch_border().unwrap();
            }
            let front = vec![0xf0; to_usize(FRONT)];
            let sealed = Box::new(image).finish(front.clone()).unwrap();
            prop_assert_eq!(sealed.bytes, at);
            sealed.publish().unwrap();

            let disk = crate::io::DiskFile::open(&name).unwrap();
            prop_assert_eq!(disk.size(), at);
            runs.insert(0, (0, front));
            let mut end = 0;
            for (start, bytes) in &runs {
                let between = collect(&crate::io::DataOf(&disk), Extent::new(end, *start)).unwrap();
                for run in between.iter() {
                    let zeroes = crate::io::read_vec(&disk, run.start, to_usize(run.len())).unwrap();
                    prop_assert!(crate::io::is_zero(&zeroes), "{:?}", run);
                }
                end = start + bytes.len() as u64;
                prop_assert!(crate::io::read_vec(&disk, *start, bytes.len()).unwrap() == *bytes, "at {}", start);
            }
            // Room ahead of the end, and room for what became a hole, was given back.
            let data = runs.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
            let most = data + runs.len() as u64 * 2 * HOLE + MIB;
            let taken = std::fs::metadata(&name).unwrap().blocks() * 512;
            prop_assert!(taken <= most, "{} bytes taken for {}", taken, data);
        }
    }

    #[test]
    fn a_write_that_fails_is_told_once_and_nothing_waits_for_it() {
        let file = OutFile::reopen(Path::new("/dev/full")).unwrap();
        let mut writers = Writers::start(Arc::new(file), 0).unwrap();
        let run = || vec![Bytes::from_static(&[1; 512])];
        writers.write(0, run()).unwrap();
        let waiter = writers.waiter();
        assert!(!waiter.wait(1));
        let error = writers.write(512, run()).unwrap_err();
        assert_eq!((error.kind(), error.id()), (Kind::Destination, "io.write"));
        assert!(error.to_string().contains("/dev/full"), "{error}");
        assert!(writers.settle().unwrap_err().what().contains("earlier"), "not twice");
    }
}
