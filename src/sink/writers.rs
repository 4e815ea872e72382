//! Writes runs of a file side by side, so that the disk has the next one while it takes the last.

use std::collections::BTreeSet;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;

use crate::error::{Error, Kind, Result};
use crate::io::OutFile;
use crate::unit::{Extent, MIB};

/// Writes at a time. More do not make a disk faster that two do not.
const WRITERS: usize = 2;
/// Room reserved at a time, ahead of what is written: that is, what a killed job leaves behind of room it has no use for.
const RESERVE: u64 = 64 * MIB;

/// The writes of a file that is written front to back.
pub struct Writers {
    runs: Option<SyncSender<Run>>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Up to where the file has room.
    reserved: u64,
}

struct Run {
    offset: u64,
    pieces: Vec<Bytes>,
}

struct Shared {
    file: Arc<OutFile>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Where the runs begin that are not on the file yet.
    under_way: BTreeSet<u64>,
    /// Why a write failed, until it was told.
    error: Option<Error>,
    failed: bool,
}

impl Writers {
    /// Writers of `file`, whose bytes beyond `position` come in order.
    pub fn start(file: Arc<OutFile>, position: u64) -> Result<Self> {
        // A run that waits for its turn holds a buffer of those the copy reads into: no more wait than write.
        let (runs, taken) = mpsc::sync_channel(WRITERS);
        let taken = Arc::new(Mutex::new(taken));
        let shared = Arc::new(Shared { file, state: Mutex::default(), changed: Condvar::new() });
        let thread = |_| {
            let (shared, taken) = (Arc::clone(&shared), Arc::clone(&taken));
            std::thread::Builder::new().name("write".into()).spawn(move || shared.work(&taken)).map_err(
                |error| Error::new(Kind::Internal, "thread.start", "cannot start a thread").caused_by(error),
            )
        };
        let threads = (0..WRITERS).map(thread).collect::<Result<_>>()?;
        Ok(Writers { runs: Some(runs), shared, threads, reserved: position })
    }

    /// Has `pieces` written one behind the other at `offset`, at or beyond the end of the run before. It may fail with
    /// the error of an earlier run.
    pub fn write(&mut self, offset: u64, pieces: Vec<Bytes>) -> Result<()> {
        let end = offset + pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
        if end > self.reserved {
            let room = Extent::new(self.reserved.max(offset), end + RESERVE);
            self.shared.file.reserve(room);
            self.reserved = room.end;
        }
        self.shared.begin(offset)?;
        if let Some(runs) = &self.runs {
            let _ = runs.send(Run { offset, pieces });
        }
        Ok(())
    }

    /// Leaves out `hole`, which begins at the end of the run before.
    pub fn leave_out(&mut self, hole: Extent) {
        let reserved = hole.intersect(Extent::new(0, self.reserved));
        if !reserved.is_empty() {
            self.shared.file.punch(reserved);
        }
        self.reserved = self.reserved.max(hole.end);
    }

    /// Returns once every run is on the file, or with the error of one that is not.
    pub fn settle(&self) -> Result<()> {
        self.waiter().wait(u64::MAX).then_some(()).ok_or_else(|| self.shared.why())
    }

    /// Who waits for runs to be on the file.
    pub fn waiter(&self) -> Waiter {
        Waiter(Arc::clone(&self.shared))
    }
}

impl Drop for Writers {
    /// No thread is left that would write to the file of the next run.
    fn drop(&mut self) {
        self.runs = None;
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Waits for runs to be on the file.
pub struct Waiter(Arc<Shared>);

impl Waiter {
    /// Waits until every run that begins below `position` is on the file; false if one has failed.
    pub fn wait(&self, position: u64) -> bool {
        let mut state = self.0.lock();
        while !state.failed && state.under_way.first().is_some_and(|offset| *offset < position) {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.failed
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, offset: u64) -> Result<()> {
        let mut state = self.lock();
        if state.failed {
            drop(state);
            return Err(self.why());
        }
        state.under_way.insert(offset);
        Ok(())
    }

    /// Why a write failed.
    fn why(&self) -> Error {
        self.lock().error.take().unwrap_or_else(|| {
            Error::new(
                Kind::Destination,
                "io.write",
                format!("an earlier write to {} failed", self.file.path().display()),
            )
        })
    }

    fn work(&self, runs: &Mutex<Receiver<Run>>) {
        loop {
            let run = runs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Run { offset, pieces }) = run else { return };
            // After an error nothing more is written, and whoever waits for a buffer gets those that wait here.
            let written = if self.lock().failed { Ok(()) } else { self.file.write_pieces(&pieces, offset) };
            drop(pieces);
            let mut state = self.lock();
            state.under_way.remove(&offset);
            if let Err(error) = written {
                state.failed = true;
                state.error = Some(error);
            }
            drop(state);
            self.changed.notify_all();
        }
    }
}
