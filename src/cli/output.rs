//! What a person or a program sees: lines or JSON on standard output, errors and notes on standard error.

use std::cell::Cell;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use serde_json::json;

use super::progress::Progress;
use crate::error::{Error, Kind};
use crate::monitor::Monitor;

/// Where a command's results go.
pub struct Output {
    json: bool,
    quiet: bool,
    /// Whether events were printed: then the result is an event too.
    events: Cell<bool>,
    warned: Arc<AtomicBool>,
    failed: Cell<Option<Kind>>,
}

impl Output {
    /// Output as the global options ask for it.
    pub fn new(json: bool, quiet: bool) -> Self {
        Output { json, quiet, events: Cell::new(false), warned: Arc::default(), failed: Cell::new(None) }
    }

    /// The progress monitor of a long piece of work.
    pub fn progress(&self) -> Progress {
        self.events.set(self.json);
        Progress::new(self.json, self.quiet, self.warned.clone())
    }

    /// A monitor for work too short to show progress of: only its notes are seen.
    pub fn notes(&self) -> Arc<dyn Monitor> {
        Arc::new(Progress::new(false, true, self.warned.clone()))
    }

    /// Whether a warning was noted.
    pub fn warned(&self) -> bool {
        self.warned.load(Ordering::Relaxed)
    }

    /// Makes the process end with the exit code of `kind`, without an error: the result itself says why.
    pub fn fail(&self, kind: Kind) {
        self.failed.set(Some(kind));
    }

    /// What [`Output::fail`] was told.
    pub fn failed(&self) -> Option<Kind> {
        self.failed.get()
    }

    /// Prints the result: `document` as JSON, or the lines of `text`.
    pub fn result(&self, document: &impl Serialize, text: &str) {
        if !self.json {
            return print(text.trim_end());
        }
        let value = serde_json::to_value(document).unwrap_or_default();
        if self.events.get() {
            print(&json!({"event": "result", "result": value}).to_string());
        } else {
            print(&serde_json::to_string_pretty(&value).unwrap_or_default());
        }
    }

    /// Prints an error: three lines, or a JSON event.
    pub fn error(&self, error: &Error) {
        if self.json {
            // A fact may come more than once, such as every extent that differs.
            let facts: Vec<_> =
                error.facts().iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
            return print(
                &json!({
                    "event": "error", "id": error.id(), "exit_code": error.kind().exit_code(),
                    "what": error.what(), "why": error.why(), "do": error.what_to_do(), "facts": facts,
                })
                .to_string(),
            );
        }
        let text = format!("haul: {}\n  why: {}\n  do:  {}", error.what(), error.why(), error.what_to_do());
        // With standard error gone there is no one left to tell.
        let _ = writeln!(std::io::stderr(), "{}", printable(&text));
    }
}

/// Whether standard output is a disk image's.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Leaves standard output to an image: from now on everything else goes to standard error.
pub fn leave_stdout() {
    TAKEN.store(true, Ordering::Relaxed);
}

/// Prints to standard output; a reader that went away is no error.
pub fn print(text: &str) {
    let text = printable(text);
    let _ = match TAKEN.load(Ordering::Relaxed) {
        true => writeln!(std::io::stderr(), "{text}"),
        false => writeln!(std::io::stdout(), "{text}"),
    };
}

/// Names and labels come from disks: control characters in them must not reach a terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}
