//! A local image file, written front to back in aligned blocks under a temporary name, synced beside the copy.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::JoinHandle;

use super::{Destination, Sealed};
use crate::error::{Error, Kind, Result};
use crate::io::buffer::ALIGN;
use crate::io::{AlignedBuf, OutFile, ReadAt, WriteAt, atomic};
use crate::manifest::journal::{Journal, Record};
use crate::unit::{KIB, MIB, to_usize};

/// Bytes gathered before they are written.
const BLOCK: usize = 1 << 20;
/// A sync begins after so many bytes: what a killed job writes again at most, twice over.
const SYNC_EVERY: u64 = 64 * MIB;
/// Zeroes from this length on become a hole.
const HOLE: u64 = 64 * KIB;

/// The image file being written.
pub struct ImageFile {
    file: Arc<OutFile>,
    /// The bytes from `written` on, up to `filled`; `written` is a multiple of [`ALIGN`].
    block: AlignedBuf,
    filled: usize,
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
        let mut block = AlignedBuf::new(BLOCK);
        let written = position / ALIGN as u64 * ALIGN as u64;
        let filled = to_usize(position - written);
        if filled > 0 {
            crate::io::DiskFile::open(file.path())?.read_at(&mut block[..filled], written)?;
        }
        let file = Arc::new(file);
        let syncer = Some(Syncer::start(file.clone(), journal.clone())?);
        Ok(ImageFile {
            file,
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

    /// Writes the block as far as it is filled, padded to [`ALIGN`]; whole pages leave the block.
    fn flush(&mut self) -> Result<()> {
        let padded = self.filled.next_multiple_of(ALIGN);
        self.block[self.filled..padded].fill(0);
        if padded > 0 {
            self.file.write_at(&self.block[..padded], self.written)?;
        }
        let whole = self.filled / ALIGN * ALIGN;
        self.block.copy_within(whole..self.filled, 0);
        self.written += whole as u64;
        self.filled -= whole;
        Ok(())
    }

    fn stop_syncer(&mut self) -> Result<()> {
        self.syncer.take().map_or(Ok(()), Syncer::stop)
    }
}

impl Destination for ImageFile {
    fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        if self.filled == 0 && (bytes.as_ptr() as usize).is_multiple_of(ALIGN) {
            let (whole, rest) = bytes.split_at(bytes.len() / ALIGN * ALIGN);
            if !whole.is_empty() {
                self.file.write_at(whole, self.written)?;
                self.written += whole.len() as u64;
            }
            bytes = rest;
        }
        while !bytes.is_empty() {
            let n = bytes.len().min(BLOCK - self.filled);
            self.block[self.filled..self.filled + n].copy_from_slice(&bytes[..n]);
            self.filled += n;
            bytes = &bytes[n..];
            if self.filled == BLOCK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn zeros(&mut self, count: u64) -> Result<()> {
        if count < HOLE {
            return self.append(&[0; to_usize(HOLE)][..to_usize(count)]);
        }
        let position = self.position() + count;
        self.flush()?;
        self.written = position / ALIGN as u64 * ALIGN as u64;
        self.filled = to_usize(position - self.written);
        self.block[..self.filled].fill(0);
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
        self.flush()?;
        self.file.sync()?;
        self.journal.append(&Record::Synced { position: self.position() })?;
        self.journal.sync()
    }

    fn finish(mut self: Box<Self>, front: Vec<u8>) -> Result<Sealed> {
        self.stop_syncer()?;
        self.flush()?;
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
    fn start(file: Arc<OutFile>, journal: Arc<Journal>) -> Result<Self> {
        let (positions, wanted) = mpsc::sync_channel::<u64>(1);
        let run = move || {
            for position in wanted {
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
