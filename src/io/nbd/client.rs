//! An export as a disk: up to four connections, opened as readers need them and anew when they are lost.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Uri;
use super::connection::Connection;
use super::fault::Fault;
use super::link::Link;
use super::reply::Stretch;
use crate::error::{self, Error, Kind};
use crate::io::{ReadAt, check_range};
use crate::unit::{Extent, KIB};

/// Most connections to one export: as many as QEMU's and libnbd's copying programs use.
const CONNECTIONS: usize = 4;
/// Most bytes of one question about allocation: what the protocol's 32 bits hold, in whole blocks of any server.
const QUESTION: u64 = (1 << 32) - 64 * KIB;
/// How many answers about allocation are remembered: the copy's readers are not all at the same place.
const REMEMBERED: usize = 4;
/// Most questions about allocation in one call, and the bytes then said to be data: a server that tells of a few
/// zeroes at a time, or an export without end, keeps nobody for ever.
const QUESTIONS: usize = 64;
const UNASKED: u64 = 64 * KIB;
/// Longest wait for one more connection where there are others.
const ONE_MORE: Duration = Duration::from_secs(10);
/// The pause before the third try; it doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Waits before another try; told why the last one failed. An error ends the read: the job was stopped.
pub type Pause = Arc<dyn Fn(&Error, Duration) -> error::Result<()> + Send + Sync>;

/// How patient to be with a server.
#[derive(Clone)]
pub struct Options {
    /// For connecting and negotiating. A server that logs in elsewhere (VDDK to a vCenter) does so meanwhile.
    pub connect: Duration,
    /// For the requests of one call and their replies, of at most 8 MiB. nbdkit's `retry` filter alone takes 62 s
    /// until it gives up.
    pub reply: Duration,
    /// For how long a read is tried again after its first failure. One more try is made at once in any case.
    pub outage: Duration,
    /// How to wait between two tries.
    pub pause: Pause,
}

impl Default for Options {
    /// An outage may last three minutes, as with an object store.
    fn default() -> Self {
        Options {
            connect: Duration::from_secs(60),
            reply: Duration::from_secs(120),
            outage: Duration::from_secs(180),
            pause: Arc::new(|_, pause| {
                std::thread::sleep(pause);
                Ok(())
            }),
        }
    }
}

/// An export of an NBD server, read-only. Its size is the one at the first connection.
pub struct Client {
    uri: Uri,
    options: Options,
    size: u64,
    /// Most connections at a time.
    most: usize,
    pool: Mutex<Pool>,
    /// A connection was opened, or could not be.
    opened: Condvar,
    known: Mutex<VecDeque<Arc<Stretch>>>,
}

struct Pool {
    /// A connection has as many users as there are others who hold it.
    live: Vec<Arc<Connection>>,
    /// Whether a thread is opening one more; one does at a time.
    opening: bool,
    /// Most there may be: less than `most` when the server refused one more.
    limit: usize,
    /// How often opening one failed, and why last.
    failures: u64,
    failure: Option<Fault>,
}

impl Client {
    /// Connects to an export. Errors are of [`Kind::Network`], or of [`Kind::Source`] when it cannot be read whole.
    pub fn connect(uri: &Uri) -> error::Result<Self> {
        Self::connect_with(uri, Options::default())
    }

    /// The same with a patience of its own.
    pub fn connect_with(uri: &Uri, options: Options) -> error::Result<Self> {
        let connection = open(uri, &options, options.connect).map_err(|fault| fault.error(uri, None))?;
        let most = if connection.export().multi_conn { CONNECTIONS } else { 1 };
        let size = connection.export().size;
        let live = vec![Arc::new(connection)];
        let pool = Pool { live, opening: false, limit: most, failures: 0, failure: None };
        Ok(Client {
            uri: uri.clone(),
            options,
            size,
            most,
            pool: Mutex::new(pool),
            opened: Condvar::new(),
            known: Mutex::default(),
        })
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that nobody uses, one more if there may be, or the one with the fewest users.
    fn connection(&self) -> Result<Arc<Connection>, Fault> {
        let mut pool = self.pool();
        loop {
            pool.live.retain(|connection| !connection.is_broken());
            let enough = pool.opening || pool.live.len() >= pool.limit;
            match pool.live.iter().min_by_key(|connection| Arc::strong_count(connection)) {
                Some(freest) if enough || Arc::strong_count(freest) == 1 => return Ok(freest.clone()),
                None if pool.opening => {
                    let before = pool.failures;
                    pool = self.opened.wait(pool).unwrap_or_else(PoisonError::into_inner);
                    // Each waiting thread trying in its turn would make an outage last that many times longer.
                    match &pool.failure {
                        Some(fault) if pool.failures != before => return Err(fault.shared()),
                        _ => continue,
                    }
                }
                None => pool.limit = self.most,
                Some(_) => {}
            }
            pool.opening = true;
            let time =
                if pool.live.is_empty() { self.options.connect } else { ONE_MORE.min(self.options.connect) };
            drop(pool);
            let opened = self.open(time);
            pool = self.pool();
            pool.opening = false;
            self.opened.notify_all();
            match opened {
                Ok(connection) => {
                    let connection = Arc::new(connection);
                    pool.live.push(connection.clone());
                    return Ok(connection);
                }
                // A server may serve fewer clients than it said: those there are must do.
                Err(fault) if fault.is_passing() && !pool.live.is_empty() => pool.limit = pool.live.len(),
                Err(fault) => {
                    pool.failures += 1;
                    pool.failure = Some(fault.shared());
                    return Err(fault);
                }
            }
        }
    }

    /// Opens one more connection to the same export.
    fn open(&self, time: Duration) -> Result<Connection, Fault> {
        let connection = open(&self.uri, &self.options, time)?;
        let size = connection.export().size;
        if size != self.size {
            return Err(Fault::Unusable(
                Error::new(Kind::Source, "nbd.changed", format!("{} changed while it was read", self.uri))
                    .because(format!("it had {} bytes and has {size} after a new connection", self.size))
                    .remedy("serve it from a snapshot, and begin again")
                    .fact("export", &self.uri),
            ));
        }
        Ok(connection)
    }

    /// Does `work` on a connection, and again where another try may do better. `offset` is the place in an error.
    fn with<T>(
        &self,
        offset: u64,
        mut work: impl FnMut(&Connection) -> Result<T, Fault>,
    ) -> error::Result<T> {
        let mut began = None;
        let (mut waited, mut pause) = (Duration::ZERO, Duration::ZERO);
        loop {
            let fault = match self.connection().and_then(|connection| work(&connection)) {
                Ok(done) => return Ok(done),
                Err(fault) => fault,
            };
            let passing = fault.is_passing();
            if matches!(fault, Fault::Broken(_)) {
                // What broke this connection has probably broken those that nobody uses.
                self.pool().live.retain(|connection| Arc::strong_count(connection) > 1);
            }
            let error = fault.error(&self.uri, Some(offset));
            waited += pause;
            let outage = waited.max(began.get_or_insert_with(Instant::now).elapsed());
            if !passing || (outage > self.options.outage && !pause.is_zero()) {
                return Err(error);
            }
            (self.options.pause)(&error, pause)?;
            pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        }
    }

    /// What is known of the place `from`, which is inside the export.
    fn stretch(&self, from: u64) -> error::Result<Arc<Stretch>> {
        let place = Extent::at(from, 1);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.iter().find(|known| known.covered.contains(place)) {
            return Ok(found.clone());
        }
        let stretch = self.with(from, |connection| {
            let block = connection.export().block.minimum;
            let asked = Extent::at(from / block * block, QUESTION).intersect(Extent::new(0, self.size));
            match connection.status(asked) {
                Ok(stretch) if stretch.covered.contains(place) => Ok(stretch),
                // Whatever a server cannot say is read.
                Ok(_) | Err(Fault::Refused { .. }) => Ok(Stretch::unknown(asked)),
                Err(fault) => Err(fault),
            }
        })?;
        let stretch = Arc::new(stretch);
        known.push_front(stretch.clone());
        known.truncate(REMEMBERED);
        Ok(stretch)
    }
}

impl ReadAt for Client {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> error::Result<()> {
        check_range(self, buf.len(), offset)?;
        let mut done = 0;
        while done < buf.len() {
            let (rest, from) = (&mut buf[done..], offset + done as u64);
            done += self.with(from, |connection| connection.read(rest, from))?;
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> error::Result<Option<Extent>> {
        let mut from = from;
        for _ in 0..QUESTIONS {
            if from >= self.size {
                return Ok(None);
            }
            let stretch = self.stretch(from)?;
            let next = stretch.data.partition_point(|run| run.end <= from);
            if let Some(run) = stretch.data.get(next) {
                return Ok(Some(Extent::new(run.start.max(from), run.end)));
            }
            from = stretch.covered.end;
        }
        let next = Extent::at(from, UNASKED).intersect(Extent::new(0, self.size));
        Ok((!next.is_empty()).then_some(next))
    }

    fn name(&self) -> String {
        self.uri.to_string()
    }
}

fn open(uri: &Uri, options: &Options, time: Duration) -> Result<Connection, Fault> {
    let link = Link::connect(&uri.address, time).map_err(Fault::Unreachable)?;
    Connection::open(link, uri, options.reply)
}
