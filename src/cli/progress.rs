//! Progress for people (a bar on a terminal, a line now and then elsewhere) and programs (an event a second).

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::output::{print, printable};
use crate::monitor::{Counter, Level, Monitor};
use crate::unit::bytes::human;

/// Between two events for a program.
const EVENT_EVERY: Duration = Duration::from_secs(1);
/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

enum Form {
    Silent,
    Bar(ProgressBar),
    Lines,
    Events,
}

/// The monitor behind every long command.
pub struct Progress {
    form: Form,
    warned: Arc<AtomicBool>,
    state: Mutex<State>,
}

struct State {
    phase: &'static str,
    total: Option<u64>,
    done: u64,
    counters: BTreeMap<Counter, u64>,
    started: Instant,
    told: Instant,
}

impl Progress {
    /// A monitor that sets `warned` at the first warning.
    pub fn new(json: bool, quiet: bool, warned: Arc<AtomicBool>) -> Self {
        let form = match (json, quiet, std::io::stderr().is_terminal()) {
            (true, ..) => Form::Events,
            (_, true, _) => Form::Silent,
            (.., true) => Form::Bar(bar()),
            _ => Form::Lines,
        };
        let now = Instant::now();
        let state =
            State { phase: "", total: None, done: 0, counters: BTreeMap::new(), started: now, told: now };
        Progress { form, warned, state: Mutex::new(state) }
    }

    /// The bytes counted so far.
    pub fn get(&self, counter: Counter) -> u64 {
        self.state().counters.get(&counter).copied().unwrap_or(0)
    }

    /// Time since the monitor was made.
    pub fn elapsed(&self) -> Duration {
        self.state().started.elapsed()
    }

    /// Takes the bar off the terminal, before a result is printed.
    pub fn finish(&self) {
        if let Form::Bar(bar) = &self.form {
            bar.finish_and_clear();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, state: &mut State) {
        let done = state.done;
        match &self.form {
            Form::Silent => {}
            Form::Bar(bar) => bar.set_position(done),
            Form::Lines if state.told.elapsed() >= LINE_EVERY => {
                state.told = Instant::now();
                let of = state.total.map(|total| format!(" of {}", human(total))).unwrap_or_default();
                let _ = writeln!(std::io::stderr(), "{}: {}{of}", state.phase, human(done));
            }
            Form::Events if state.told.elapsed() >= EVENT_EVERY => {
                state.told = Instant::now();
                let counters: serde_json::Map<_, _> =
                    state.counters.iter().map(|(c, n)| (c.name().to_owned(), json!(n))).collect();
                print(
                    &json!({
                        "event": "progress", "phase": state.phase, "done": done, "total": state.total,
                        "counters": counters,
                    })
                    .to_string(),
                );
            }
            Form::Lines | Form::Events => {}
        }
    }
}

fn bar() -> ProgressBar {
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8))
}

/// How far a phase is, or, where its length is not known, how long it has taken.
fn style(known: bool) -> ProgressStyle {
    let template = if known {
        "{prefix:8} {bar:28} {percent:>3}% {bytes:>10} of {total_bytes:10} {bytes_per_sec:>12} {eta:>4}"
    } else {
        "{prefix:8} {elapsed}"
    };
    ProgressStyle::with_template(template)
        .map_or_else(|_| ProgressStyle::default_bar(), |style| style.progress_chars("=> "))
}

impl Monitor for Progress {
    fn begin(&self, phase: &'static str, total: Option<u64>) {
        let mut state = self.state();
        (state.phase, state.total, state.done) = (phase, total, 0);
        match &self.form {
            Form::Bar(bar) => {
                bar.set_style(style(total.is_some()));
                match total {
                    Some(_) => bar.disable_steady_tick(),
                    None => bar.enable_steady_tick(EVENT_EVERY),
                }
                bar.set_prefix(phase);
                bar.set_length(total.unwrap_or(0));
                bar.reset();
            }
            Form::Events => print(&json!({"event": "phase", "phase": phase, "total": total}).to_string()),
            Form::Lines | Form::Silent => {}
        }
    }

    fn count(&self, counter: Counter, bytes: u64) {
        *self.state().counters.entry(counter).or_default() += bytes;
    }

    fn advance(&self, done: u64) {
        let mut state = self.state();
        state.done = state.done.max(done);
        self.tell(&mut state);
    }

    fn note(&self, level: Level, text: &str) {
        if level == Level::Warning {
            self.warned.store(true, Ordering::Relaxed);
        }
        let text = &printable(text);
        let word = if level == Level::Warning { "warning" } else { "note" };
        match &self.form {
            Form::Events => print(&json!({"event": "note", "level": word, "text": text}).to_string()),
            Form::Bar(bar) => bar.println(format!("haul: {word}: {text}")),
            Form::Silent if level == Level::Info => {}
            Form::Lines | Form::Silent => {
                let _ = writeln!(std::io::stderr(), "haul: {word}: {text}");
            }
        }
    }
}
