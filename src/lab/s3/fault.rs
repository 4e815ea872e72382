//! Faults to order: which requests they strike, and what happens to those.

use serde::{Deserialize, Serialize};

/// A fault that strikes some requests of one operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The S3 operation, such as `UploadPart`; `*` is any.
    pub on: String,
    /// Requests to let pass first.
    #[serde(default)]
    pub skip: u32,
    /// Requests to strike after those.
    #[serde(default = "one")]
    pub times: u32,
    /// What happens.
    pub then: Effect,
}

fn one() -> u32 {
    1
}

/// What a fault does to a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Effect {
    /// Refused with this status and error code; nothing is done.
    Refuse {
        /// HTTP status.
        status: u16,
        /// S3 error code.
        code: String,
    },
    /// The connection is cut after so many bytes of the request's body; nothing is done.
    CutRequest {
        /// Bytes of the body read first.
        after: u64,
    },
    /// Done, and the answer cut after so many bytes of its body.
    CutAnswer {
        /// Bytes of the body sent first.
        after: u64,
    },
    /// Done, and the connection closed without an answer.
    LoseAnswer,
    /// Done, and acknowledged with the checksum of other bytes.
    WrongChecksum,
    /// Done after a pause.
    Delay {
        /// The pause, in milliseconds.
        millis: u64,
    },
    /// Status 200 and blanks at once, then the answer, or an error instead of doing anything: COS's slow Complete.
    Trickle {
        /// How many blanks.
        blanks: u32,
        /// Milliseconds between them.
        every_millis: u64,
        /// The error code to end in.
        error: Option<String>,
    },
}

impl Fault {
    /// `then`, once, to the next request of operation `on`.
    pub fn once(on: &str, then: Effect) -> Self {
        Fault { on: on.to_owned(), skip: 0, times: 1, then }
    }
}

/// The faults still to come.
#[derive(Default)]
pub struct Faults(Vec<Fault>);

impl Faults {
    pub fn add(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// What strikes this request, by the first fault that fits.
    pub fn strike(&mut self, operation: &str) -> Option<Effect> {
        for fault in self.0.iter_mut().filter(|fault| fault.on == operation || fault.on == "*") {
            if fault.skip > 0 {
                fault.skip -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                return Some(fault.then.clone());
            }
        }
        None
    }
}
