//! What is said of a plan that is carried out elsewhere: in another process, or in another machine.

use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::monitor::{Level, Monitor};

/// Longest line of it, in bytes.
pub const MAX_LINE: u64 = 64 << 10;
/// What each line of it begins with.
pub const BEGIN: &[u8] = br#"{"say":"#;

/// One line of JSON each.
#[derive(Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum Say {
    /// FUSE is mounted: serve it.
    Mounted,
    /// A step is done.
    Step {
        /// What was done.
        text: String,
    },
    /// What the user must know of it.
    Warning {
        /// In words.
        text: String,
    },
    /// Something failed.
    Failed {
        /// That of the error's kind.
        exit_code: u8,
        /// The error's id.
        cause: String,
        /// What failed.
        what: String,
        /// Why.
        why: String,
        /// What to do.
        remedy: String,
    },
    /// Everything is done, written and unmounted.
    Done,
}

impl Say {
    /// What `error` is, in words.
    pub fn failed(error: &Error) -> Self {
        Say::Failed {
            exit_code: error.kind().exit_code(),
            cause: error.id().to_owned(),
            what: error.what().to_owned(),
            why: error.why(),
            remedy: error.what_to_do().to_owned(),
        }
    }

    /// Says it on standard output; false when nobody listens.
    pub fn send(&self) -> bool {
        let Ok(line) = serde_json::to_string(self) else { return false };
        let mut out = std::io::stdout().lock();
        // One write: the lines of two processes must not mix.
        out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).is_ok()
    }

    /// Passes it on to `monitor`; an error where it says that something failed.
    pub fn pass_on(self, monitor: &dyn Monitor) -> Result<()> {
        match self {
            Say::Step { text } => monitor.note(Level::Info, &text),
            Say::Warning { text } => monitor.note(Level::Warning, &text),
            Say::Failed { exit_code, cause, what, why, remedy } => {
                let known = [Kind::Privilege, Kind::Source, Kind::Destination, Kind::Internal];
                let kind =
                    known.into_iter().find(|kind| kind.exit_code() == exit_code).unwrap_or(Kind::Image);
                return Err(Error::new(kind, "guest.apply", what)
                    .because(why)
                    .remedy(remedy)
                    .fact("cause", cause));
            }
            Say::Mounted | Say::Done => {}
        }
        Ok(())
    }
}
