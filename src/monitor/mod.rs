//! The progress port: four methods and one enum of counters. Terminal, JSON, metrics and tests implement it.

use std::collections::BTreeMap;
use std::sync::Mutex;

/// What is counted while a job runs; all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counter {
    /// Bytes read from the source.
    Read,
    /// Bytes of the source that were not read because nothing uses them.
    Skipped,
    /// Bytes read that were all zero and so take no room in the copy.
    Zero,
    /// Bytes of the copy written to a file or acknowledged by a store.
    Written,
}

impl Counter {
    /// The name in JSON output.
    pub const fn name(self) -> &'static str {
        match self {
            Counter::Read => "read",
            Counter::Skipped => "skipped",
            Counter::Zero => "zero",
            Counter::Written => "written",
        }
    }
}

/// How much a note matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something worth knowing.
    Info,
    /// A non-fatal error: the job goes on, and ends with exit code 14.
    Warning,
}

/// Where progress goes. Calls come from several threads and must be cheap.
pub trait Monitor: Send + Sync {
    /// A phase such as `copy` begins; `total` is its length in bytes of the source, where known.
    fn begin(&self, phase: &'static str, total: Option<u64>);
    /// `bytes` more were counted.
    fn count(&self, counter: Counter, bytes: u64);
    /// The current phase stands at `done` of the total that [`Monitor::begin`] gave.
    fn advance(&self, done: u64);
    /// A line for the reader.
    fn note(&self, level: Level, text: &str);
}

/// A monitor that remembers totals and notes: for tests, and for reports.
#[derive(Default)]
pub struct Tally {
    state: Mutex<TallyState>,
}

#[derive(Default)]
struct TallyState {
    counters: BTreeMap<Counter, u64>,
    notes: Vec<(Level, String)>,
}

impl Tally {
    /// The bytes counted so far.
    pub fn get(&self, counter: Counter) -> u64 {
        self.lock().counters.get(&counter).copied().unwrap_or(0)
    }

    /// The notes so far, in order.
    pub fn notes(&self) -> Vec<(Level, String)> {
        self.lock().notes.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, TallyState> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Monitor for Tally {
    fn begin(&self, _phase: &'static str, _total: Option<u64>) {}

    fn count(&self, counter: Counter, bytes: u64) {
        *self.lock().counters.entry(counter).or_default() += bytes;
    }

    fn advance(&self, _done: u64) {}

    fn note(&self, level: Level, text: &str) {
        self.lock().notes.push((level, text.to_owned()));
    }
}

/// Two monitors told the same.
pub struct Both<A, B>(pub A, pub B);

impl<A: Monitor, B: Monitor> Monitor for Both<A, B> {
    fn begin(&self, phase: &'static str, total: Option<u64>) {
        self.0.begin(phase, total);
        self.1.begin(phase, total);
    }

    fn count(&self, counter: Counter, bytes: u64) {
        self.0.count(counter, bytes);
        self.1.count(counter, bytes);
    }

    fn advance(&self, done: u64) {
        self.0.advance(done);
        self.1.advance(done);
    }

    fn note(&self, level: Level, text: &str) {
        self.0.note(level, text);
        self.1.note(level, text);
    }
}

impl<T: Monitor + ?Sized> Monitor for std::sync::Arc<T> {
    fn begin(&self, phase: &'static str, total: Option<u64>) {
        (**self).begin(phase, total);
    }

    fn count(&self, counter: Counter, bytes: u64) {
        (**self).count(counter, bytes);
    }

    fn advance(&self, done: u64) {
        (**self).advance(done);
    }

    fn note(&self, level: Level, text: &str) {
        (**self).note(level, text);
    }
}
