//! A running QEMU: started, watched, photographed, and never outliving the thread that started it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::boot::console::{Console, Expect, State, Verdict};
use crate::boot::machine::{Accelerator, Machine};
use crate::boot::qmp::{Event, Qmp};
use crate::error::{Error, Kind, Result};
use crate::host::child::{Guarded, drain, nonblocking, tail, wait_readable};
use crate::host::programs::Programs;
use crate::monitor::{Level, Monitor};

/// Most of the console that is kept in its file, in bytes: a guest can print for ever.
const MAX_CONSOLE: u64 = 64 << 20;

/// Most of QEMU's own messages that is kept, in bytes.
const MAX_MESSAGES: usize = 16 << 10;

/// A console without output for this long shows a prompt, not half a line.
const PAUSE: Duration = Duration::from_millis(500);

/// Under KVM a guest that for this long neither prints nor reads its disk, before anything is decided, hangs.
const STALL: Duration = Duration::from_secs(10);

/// Resets a guest may ask for on its way up: a relabelling, a firmware's own, one after an update.
const MAX_RESETS: u32 = 3;

/// A running machine. It must stay with the thread that started it, whose end kills it.
pub struct Vm<'a> {
    programs: &'a Programs,
    machine: &'a Machine,
    path: PathBuf,
    accelerator: Accelerator,
    qemu: Qemu,
    log: File,
    logged: u64,
    judge: Console,
    resets: u32,
    progress: Progress,
}

/// The process and its three lines to us.
struct Qemu {
    child: Guarded,
    control: Qmp,
    console: UnixStream,
    stderr: Option<ChildStderr>,
    messages: Vec<u8>,
}

/// When the guest was last seen at work, and what it had read and written on its disk by then.
struct Progress {
    at: Instant,
    asked: Instant,
    transfers: Transfers,
}

impl<'a> Vm<'a> {
    /// Starts `machine`, waiting for `expect`; its serial console is kept in the file `console`.
    pub fn start(
        programs: &'a Programs,
        machine: &'a Machine,
        expect: Expect,
        console: &Path,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let mut accelerator = match machine.accelerator {
            Accelerator::Auto if machine.arch.is_native() && kvm_is_usable() => Accelerator::Kvm,
            Accelerator::Auto => Accelerator::Tcg,
            chosen => chosen,
        };
        let log = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(console);
        let log = log.map_err(|error| log_failed(console, error))?;
        let qemu = match Qemu::launch(programs, machine, accelerator) {
            Err(error) if machine.accelerator == Accelerator::Auto && accelerator == Accelerator::Kvm => {
                note_fall_back(monitor, &format!("QEMU does not start under KVM ({})", error.why()));
                accelerator = Accelerator::Tcg;
                Qemu::launch(programs, machine, accelerator)?
            }
            launched => launched?,
        };
        let now = Instant::now();
        Ok(Vm {
            programs,
            machine,
            path: console.to_owned(),
            accelerator,
            qemu,
            log,
            logged: 0,
            judge: Console::new(expect),
            resets: 0,
            progress: Progress { at: now, asked: now, transfers: Transfers::default() },
        })
    }

    /// What runs the guest now.
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// The last thing the guest said that means something.
    pub fn last_line(&self) -> &str {
        self.judge.last_line()
    }

    /// Watches the guest until its boot is decided; `None` when that takes longer than `until`. May be called again:
    /// the guest runs on, but only while it is watched is its console read.
    /// Under [`Accelerator::Auto`] a guest that hangs in KVM, or whose QEMU ends there, is started again in TCG.
    pub fn watch(&mut self, until: Instant, monitor: &dyn Monitor) -> Result<Option<Verdict>> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let fds = [self.qemu.console.as_fd(), self.qemu.control.stream().as_fd()];
            let ready =
                wait_readable(&fds, left.min(PAUSE)).map_err(|error| broken("waiting for it", error))?;
            let mut verdict = None;
            if ready.iter().all(|ready| !ready) {
                verdict = self.judge.pause();
            }
            let open = self.read_console(&mut verdict)?;
            self.qemu.read_messages();
            if verdict.is_some() {
                return Ok(verdict);
            }
            let may_fall_back = self.may_fall_back();
            let lost = match self.qemu.control.events() {
                Ok(events) => {
                    if let Some(verdict) = self.weigh(&events, monitor) {
                        return Ok(Some(verdict));
                    }
                    None
                }
                Err(error) => Some(error),
            };
            if (!open || lost.is_some()) && may_fall_back {
                let why = self.qemu.ended().why().to_owned();
                self.fall_back(&format!("QEMU ended under KVM ({why})"), monitor)?;
                continue;
            }
            match lost {
                Some(error) if open => return Err(error),
                _ if !open => return Err(self.qemu.ended()),
                _ if may_fall_back => self.fall_back_if_stalled(monitor)?,
                _ => {}
            }
        }
    }

    /// Reads on until the guest pauses, at most two seconds: for what follows a panic's first line.
    pub fn settle(&mut self) {
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            match wait_readable(&[self.qemu.console.as_fd()], PAUSE) {
                Ok(ready) if ready == [true] => {}
                _ => return,
            }
            if !matches!(self.read_console(&mut None), Ok(true)) {
                return;
            }
        }
    }

    /// Writes what the screen shows to `path`, a PNG.
    pub fn screenshot(&mut self, path: &Path) -> Result<()> {
        let absolute = std::path::absolute(path).map_err(|error| log_failed(path, error))?;
        let text = absolute.to_str().ok_or_else(|| {
            Error::new(Kind::Usage, "boot.path", format!("{} is not UTF-8", path.display()))
        })?;
        self.qemu.control.command("screendump", json!({ "filename": text, "format": "png" }))?;
        Ok(())
    }

    /// Reads what the console holds, into the log and the judge; false when QEMU has closed it.
    fn read_console(&mut self, verdict: &mut Option<Verdict>) -> Result<bool> {
        let mut buffer = [0; 16384];
        // At most so often in a row that a guest which never stops printing cannot hold up everything else.
        for _ in 0..64 {
            match self.qemu.console.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => {
                    self.progress.at = Instant::now();
                    let bytes = &buffer[..n];
                    let room = usize::try_from(MAX_CONSOLE - self.logged).unwrap_or(usize::MAX);
                    let kept = &bytes[..n.min(room)];
                    self.log.write_all(kept).map_err(|error| log_failed(&self.path, error))?;
                    self.logged += kept.len() as u64;
                    if let Some(found) = self.judge.feed(bytes) {
                        verdict.get_or_insert(found);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(broken("reading its console", error)),
            }
        }
        Ok(true)
    }

    fn weigh(&mut self, events: &[Event], monitor: &dyn Monitor) -> Option<Verdict> {
        for event in events {
            let (state, evidence) = match event {
                Event::Shutdown => (State::PoweredOff, self.last_line().to_owned()),
                Event::Reset => {
                    self.resets += 1;
                    monitor.note(
                        Level::Info,
                        &format!("the guest restarted ({} of at most {MAX_RESETS})", self.resets),
                    );
                    if self.resets <= MAX_RESETS {
                        continue;
                    }
                    (State::RebootLoop, self.last_line().to_owned())
                }
            };
            return Some(Verdict { state, evidence });
        }
        None
    }

    fn fall_back_if_stalled(&mut self, monitor: &dyn Monitor) -> Result<()> {
        if self.progress.asked.elapsed() >= STALL / 10 {
            self.progress.asked = Instant::now();
            let transfers = Transfers::read(&self.qemu.control.command("query-blockstats", json!({}))?);
            if transfers != self.progress.transfers {
                self.progress.transfers = transfers;
                self.progress.at = Instant::now();
            }
        }
        if self.progress.at.elapsed() < STALL {
            return Ok(());
        }
        self.fall_back(&format!("the guest made no progress for {} s under KVM", STALL.as_secs()), monitor)
    }

    /// Whether KVM was haul's choice. Where writes are kept there is no second start after the first of them; by then it works.
    fn may_fall_back(&self) -> bool {
        let at_work = self.machine.direct.is_some() && self.progress.transfers.writes > 0;
        self.machine.accelerator == Accelerator::Auto && self.accelerator == Accelerator::Kvm && !at_work
    }

    /// Starts the guest again, from its beginning, under TCG.
    fn fall_back(&mut self, why: &str, monitor: &dyn Monitor) -> Result<()> {
        note_fall_back(monitor, why);
        self.qemu.child.kill();
        self.accelerator = Accelerator::Tcg;
        self.qemu = Qemu::launch(self.programs, self.machine, self.accelerator)?;
        self.resets = 0;
        Ok(())
    }
}

impl Qemu {
    /// Starts QEMU and waits until it takes commands.
    fn launch(programs: &Programs, machine: &Machine, accelerator: Accelerator) -> Result<Self> {
        let pair = || UnixStream::pair().map_err(|error| broken("making a socket", error));
        let (control, their_control) = pair()?;
        let (console, their_console) = pair()?;
        console.set_nonblocking(true).map_err(|error| broken("making a socket", error))?;
        let mut command = programs.command(machine.arch.program())?;
        command
            .args(machine.arguments(accelerator)?)
            .stdin(Stdio::from(OwnedFd::from(their_control)))
            .stdout(Stdio::from(OwnedFd::from(their_console)))
            .stderr(Stdio::piped());
        let mut child = Guarded::spawn(&mut command)?;
        // The command holds QEMU's ends of the sockets: as long as it does, QEMU's end is never seen.
        drop(command);
        let stderr = child.child().stderr.take();
        if let Some(stderr) = &stderr {
            nonblocking(stderr.as_fd()).map_err(|error| broken("making a pipe", error))?;
        }
        match Qmp::connect(control) {
            Ok(control) => Ok(Qemu { child, control, console, stderr, messages: Vec::new() }),
            Err(error) => Err(ended(&mut child, stderr, Vec::new()).caused_by(error)),
        }
    }

    /// Keeps QEMU from waiting for someone to read what it has to say.
    fn read_messages(&mut self) {
        // They only ever explain another failure: one here is none.
        let _ = drain(&mut self.stderr, &mut self.messages, MAX_MESSAGES);
    }

    fn ended(&mut self) -> Error {
        ended(&mut self.child, self.stderr.take(), std::mem::take(&mut self.messages))
    }
}

/// The error of a QEMU that is gone or about to go, with its own last words.
fn ended(qemu: &mut Guarded, mut stderr: Option<ChildStderr>, mut messages: Vec<u8>) -> Error {
    // What it said before it was killed is in the pipe still.
    qemu.kill();
    let _ = drain(&mut stderr, &mut messages, MAX_MESSAGES);
    let error = Error::new(Kind::Boot, "boot.qemu", "QEMU ended before the boot was decided")
        .remedy("look at its message; an image must be in the format given");
    if messages.is_empty() { error } else { error.because(tail(&messages)) }
}

fn broken(doing: &str, error: std::io::Error) -> Error {
    Error::new(Kind::Boot, "boot.io", format!("lost touch with QEMU while {doing}")).caused_by(error)
}

fn log_failed(path: &Path, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "boot.log", format!("cannot write {}", path.display()))
        .fact("path", path.display())
        .caused_by(error)
}

fn note_fall_back(monitor: &dyn Monitor, why: &str) {
    monitor.note(Level::Info, &format!("{why}: it is started again under TCG"));
}

fn kvm_is_usable() -> bool {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// How often all disks together were read and written.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Transfers {
    reads: u64,
    writes: u64,
}

impl Transfers {
    /// What the answer to `query-blockstats` says.
    fn read(stats: &Value) -> Self {
        let disks = || stats.as_array().into_iter().flatten();
        let sum =
            |name: &str| disks().filter_map(|disk| disk.pointer(name)?.as_u64()).fold(0, u64::saturating_add);
        Transfers { reads: sum("/stats/rd_operations"), writes: sum("/stats/wr_operations") }
    }
}
