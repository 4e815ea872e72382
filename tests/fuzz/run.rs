//! Gives a parser one changed input after another, and keeps those that lead to something new.

use std::any::Any;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, mpsc};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::allocations;
use super::bodies::input::View;
use super::bodies::{Body, Outcome};
use super::bounds::processor_time;
use super::coverage::Coverage;
use super::images::Random;
use super::mutate;

/// Nanoseconds of the processor that any one input may take.
const LONGEST: u64 = 2_000_000_000;
/// An input that is not done after this time never will be.
const HANG: Duration = Duration::from_secs(120);
/// Inputs kept for what they led to where no edges are counted.
const MOST_OUTCOMES: usize = 3000;

/// When to stop.
pub enum Until {
    Executions(u64),
    /// So much of the processors' time: whatever else the machine does, as much was tried.
    Worked(Duration),
}

/// The processors' time that this process, and those it waited for, have taken.
pub fn worked() -> Duration {
    let of = |who| {
        let usage = getrusage(who).unwrap();
        let time = usage.user_time() + usage.system_time();
        Duration::from_micros(time.num_microseconds().try_into().unwrap())
    };
    of(UsageWho::RUSAGE_SELF) + of(UsageWho::RUSAGE_CHILDREN)
}

/// What a run found.
#[derive(Default)]
pub struct Report {
    pub executions: u64,
    pub seconds: f64,
    pub opened: u64,
    pub outcomes: BTreeSet<Outcome>,
    /// Edges of the program taken; 0 where they are not counted.
    pub edges: usize,
    /// What no input may do, and the first input that did, by where it panicked.
    pub findings: BTreeMap<String, Vec<u8>>,
}

/// The folder of a parser's seeds.
pub fn corpus_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name)
}

/// The seeds in a folder with their names; none if it is not there. Those called `….zst` are unpacked.
pub fn seeds(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let bytes = fs::read(path).unwrap();
        match name.strip_suffix(".zst") {
            Some(name) => (name.to_owned(), unpack(&bytes)),
            None => (name, bytes),
        }
    };
    paths.iter().map(read).collect()
}

fn unpack(bytes: &[u8]) -> Vec<u8> {
    let size = zstd_safe::get_frame_content_size(bytes).unwrap().expect("a seed's length is in its frame");
    let mut seed = vec![0; usize::try_from(size).unwrap()];
    let len = zstd_safe::decompress(&mut seed[..], bytes).unwrap();
    assert_eq!(len, seed.len());
    seed
}

thread_local! {
    /// Whether a panic of this thread is a finding.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}
/// Where the last panic was, and its words.
static PANIC: Mutex<Option<String>> = Mutex::new(None);
/// Panics of other threads: those of a server are as bad.
static ELSEWHERE: AtomicU64 = AtomicU64::new(0);

/// Makes panics of watched threads known to the run instead of the terminal.
fn hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !WATCHED.get() {
                ELSEWHERE.fetch_add(1, Ordering::Relaxed);
                return before(info);
            }
            let place = info.location().map(|at| format!("{}:{}", at.file(), at.line()));
            let words: &dyn Any = info.payload();
            let words = words.downcast_ref::<String>().map(String::as_str);
            let words = words.or(info.payload().downcast_ref::<&str>().copied()).unwrap_or_default();
            *PANIC.lock().unwrap() = Some(format!("{} {words}", place.unwrap_or_default()));
        }));
    });
}

/// Gives `body` one input. An error says what it did that none may do.
pub fn execute(body: &Body, input: &[u8], coverage: &Coverage) -> Result<Outcome, String> {
    hook();
    let elsewhere = ELSEWHERE.load(Ordering::Relaxed);
    let start = Instant::now();
    WATCHED.set(true);
    coverage.begin();
    let done = catch_unwind(AssertUnwindSafe(|| allocations::watched(|| (body.run)(input))));
    WATCHED.set(false);
    let took = start.elapsed();
    let (outcome, held) = match done {
        Ok(done) => done,
        Err(_) => return Err(PANIC.lock().unwrap().take().unwrap_or_default()),
    };
    if ELSEWHERE.load(Ordering::Relaxed) != elsewhere {
        return Err("a panic of another thread".into());
    }
    let held = held.saturating_sub(3 * input.len());
    if held > body.held {
        return Err(format!("held {held} bytes"));
    }
    // Slow may be the machine: what counts is the processor's time, on a second try.
    if u128::from(LONGEST) < took.as_nanos() {
        let start = processor_time();
        let _ = catch_unwind(|| (body.run)(input));
        let took = processor_time() - start;
        if took > LONGEST {
            return Err(format!("took {took} ns of the processor"));
        }
    }
    Ok(outcome)
}

/// The current input in a file, for a run that dies of it, and a thread that ends a run that hangs.
struct Watchdog {
    file: File,
    executions: Arc<AtomicU64>,
    _stop: mpsc::Sender<()>,
}

impl Watchdog {
    fn new(path: PathBuf) -> Self {
        let file = File::create(&path).unwrap();
        let executions = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = mpsc::channel::<()>();
        let count = Arc::clone(&executions);
        std::thread::spawn(move || {
            let mut before = u64::MAX;
            while stopped.recv_timeout(HANG) == Err(mpsc::RecvTimeoutError::Timeout) {
                let now = count.load(Ordering::Relaxed);
                if now == before {
                    eprintln!("the input in {} hangs", path.display());
                    std::process::abort();
                }
                before = now;
            }
        });
        Watchdog { file, executions, _stop: stop }
    }

    /// `input` is next. The file is its length, as eight bytes, and it.
    fn next(&self, input: &[u8]) {
        self.executions.fetch_add(1, Ordering::Relaxed);
        let bytes = [&(input.len() as u64).to_le_bytes(), input].concat();
        self.file.write_all_at(&bytes, 0).unwrap();
    }
}

/// Fuzzes `body` from its corpus on. With `keep`, inputs that lead to something new are kept in that folder, and taken
/// up by the next run.
pub fn run(body: &Body, seed: u64, until: &Until, keep: Option<&Path>) -> Report {
    let start = worked();
    let mut random = Random(seed);
    let mut coverage = Coverage::new();
    let mut report = Report::default();
    let grown = keep.map(|keep| keep.join("corpus").join(body.name));
    let watchdog = keep.map(|keep| {
        fs::create_dir_all(grown.as_ref().unwrap()).unwrap();
        Watchdog::new(keep.join(format!("{}.current", body.name)))
    });
    let mut try_one = |input: &[u8], report: &mut Report| {
        if let Some(watchdog) = &watchdog {
            watchdog.next(input);
        }
        report.executions += 1;
        match execute(body, input, &coverage) {
            Ok(outcome) => {
                let new_edges = coverage.take();
                report.opened += u64::from(outcome.opened());
                let new_outcome = report.outcomes.len() < MOST_OUTCOMES && report.outcomes.insert(outcome);
                new_edges || new_outcome
            }
            Err(what) => {
                let place = what.split(' ').next().unwrap_or_default().to_owned();
                if report.findings.keys().all(|known| !known.starts_with(&place)) {
                    report.findings.insert(what, input.to_vec());
                }
                false
            }
        }
    };

    let mut corpus: Vec<Vec<u8>> =
        seeds(&corpus_dir(body.name)).into_iter().map(|(_, bytes)| bytes).collect();
    for input in &corpus {
        try_one(input, &mut report);
    }
    if let Some(grown) = &grown {
        let mut inputs = seeds(grown);
        inputs.sort_by_key(|(_, input)| input.len());
        for (name, input) in inputs {
            if try_one(&input, &mut report) {
                corpus.push(input);
            } else {
                fs::remove_file(grown.join(name)).unwrap();
            }
        }
    }
    loop {
        let is_done = match until {
            Until::Executions(most) => report.executions >= *most,
            Until::Worked(longest) => worked() - start >= *longest,
        };
        if is_done {
            break;
        }
        let mut input = mutate::next(&corpus, &mut random);
        // Damage that a checksum reveals is seen at once: most is looked at with its sum right.
        if random.below(4) > 0 {
            (body.seal)(&mut View::new(&mut input));
        }
        if try_one(&input, &mut report) {
            if let Some(grown) = &grown {
                fs::write(grown.join(name_of(&input)), &input).unwrap();
            }
            corpus.push(input);
        }
    }
    report.edges = coverage.edges();
    report.seconds = (worked() - start).as_secs_f64();
    report
}

/// A name for an input: the beginning of its digest.
pub fn name_of(input: &[u8]) -> String {
    blake3::hash(input).to_hex()[..16].to_owned()
}
