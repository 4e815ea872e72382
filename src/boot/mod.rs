//! The boot test: an image started in QEMU as a cloud would start it, and judged by its serial console.

pub mod config_drive;
mod console;
mod machine;
mod qmp;
mod vm;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::host::programs::Programs;
use crate::monitor::{Level, Monitor};

pub use console::{Console, Expect, State, Verdict};
pub use machine::{Accelerator, Arch, Direct, Firmware, Format, Hardware, Machine};
pub use vm::Vm;

/// How a boot went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Where it ended, and why.
    pub verdict: Verdict,
    /// How long it took.
    pub elapsed: Duration,
    /// What ran the guest in the end.
    pub accelerator: Accelerator,
    /// The file with the guest's serial console.
    pub console: PathBuf,
    /// The file with a picture of its screen, where one could be taken.
    pub screenshot: Option<PathBuf>,
}

impl Outcome {
    /// Itself when the guest came up; else an error that names the console's file.
    pub fn up(self) -> Result<Self> {
        let state = self.verdict.state;
        if state == State::Up {
            return Ok(self);
        }
        Err(Error::new(
            Kind::Boot,
            "boot.failed",
            format!("the guest {} (after {} s)", state.what(), self.elapsed.as_secs()),
        )
        .because(self.verdict.evidence)
        .remedy(format!("look at its console in {}", self.console.display()))
        .fact("state", state.name())
        .fact("console", self.console.display())
        .fact("accelerator", self.accelerator.name()))
    }

    /// The outcome as it is reported.
    pub fn report(&self) -> serde_json::Value {
        serde_json::json!({
            "state": self.verdict.state.name(),
            "evidence": self.verdict.evidence,
            "seconds": self.elapsed.as_secs_f64(),
            "accelerator": self.accelerator.name(),
            "console": self.console,
            "screenshot": self.screenshot,
        })
    }
}

/// Boots `machine` until `expect` is seen, the boot fails, or `timeout` is over. The serial console goes to
/// `console`, a picture of the screen at the end to the same name ending in `.png`. The image is not written.
///
/// A boot that fails is an [`Outcome`] too ([`Outcome::up`] makes it an error); an error says that there was no boot:
/// QEMU is missing or refuses the image.
pub fn run(
    programs: &Programs,
    machine: &Machine,
    expect: Expect,
    timeout: Duration,
    console: &Path,
    monitor: &dyn Monitor,
) -> Result<Outcome> {
    monitor.begin("boot", None);
    let started = Instant::now();
    let mut vm = Vm::start(programs, machine, expect, console, monitor)?;
    let verdict = vm.watch(started + timeout, monitor)?;
    let elapsed = started.elapsed();
    let verdict = verdict.unwrap_or_else(|| Verdict {
        state: State::Timeout,
        evidence: format!("last seen: {}", vm.last_line()),
    });
    vm.settle();
    let path = console.with_extension("png");
    let screenshot = match vm.screenshot(&path) {
        Ok(()) => Some(path),
        // A guest that is off has no screen.
        Err(error) => {
            monitor.note(Level::Info, &format!("no screenshot: {error}"));
            None
        }
    };
    Ok(Outcome { verdict, elapsed, accelerator: vm.accelerator(), console: console.to_owned(), screenshot })
}
