//! Child processes that never outlive haul: killed with their parent, killed and reaped when dropped.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::error::{Error, Kind, Result};

/// The most of a program's output, and of its messages, that is kept, in bytes; the rest is read and dropped.
pub const MAX_OUTPUT: usize = 16 << 20;

/// How often a child that has closed its output is asked whether it has ended.
const REAP_EVERY: Duration = Duration::from_millis(20);

/// A running child in a process group of its own. Dropping it kills the group and reaps the child.
pub struct Guarded {
    child: Child,
    reaped: bool,
}

impl Guarded {
    /// Starts `command`. The kernel kills the child when the *thread* that called this ends, however it ends
    /// (prctl(2), `PR_SET_PDEATHSIG`): keep the thread for as long as the child is needed.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let parent = nix::unistd::getpid();
        command.process_group(0);
        // SAFETY: between fork and exec only async-signal-safe calls are made (prctl, getppid), nothing allocates:
        // `io::Error::from_raw_os_error` and `Errno` are plain numbers.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have died before the line above: then nobody would ever kill this child.
                if nix::unistd::getppid() != parent {
                    return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
                }
                Ok(())
            });
        }
        match command.spawn() {
            Ok(child) => Ok(Guarded { child, reaped: false }),
            Err(error) => Err(Error::new(
                Kind::Privilege,
                "program.start",
                format!("cannot start {}", command.get_program().display()),
            )
            .caused_by(error)),
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// How the child ended, if it has.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().ok().flatten();
        self.reaped |= status.is_some();
        status
    }

    /// Kills the child and what it started, and waits for its end.
    pub fn kill(&mut self) {
        if self.reaped {
            return;
        }
        // Both fail only when the process is gone already.
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.reaped = true;
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a finished program left.
#[derive(Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its output, the first [`MAX_OUTPUT`] bytes.
    pub stdout: Vec<u8>,
    /// Its messages, the first [`MAX_OUTPUT`] bytes.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Turns a failure into an error with the command line and the end of its messages.
    pub fn success(self) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        let messages = if self.stderr.is_empty() { &self.stdout } else { &self.stderr };
        Err(Error::new(
            Kind::Internal,
            "program.failed",
            format!("`{}` failed ({})", self.command, self.status),
        )
        .because(tail(messages))
        .remedy("run the command by hand to see more")
        .fact("command", &self.command))
    }
}

/// The last lines of `bytes` on one line, without control characters.
pub fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(2048)..]).into_owned();
    let mut lines: Vec<&str> = text.lines().rev().filter(|line| !line.trim().is_empty()).take(5).collect();
    lines.reverse();
    lines.join("; ").chars().filter(|c| !c.is_control()).collect()
}

fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Runs `command` to its end, or kills it and fails when that takes longer than `timeout`.
/// Its input is empty unless the command sets one; its output and messages are captured.
pub fn run(command: &mut Command, timeout: Duration) -> Result<Finished> {
    let deadline = Instant::now() + timeout;
    let shown = shown(command);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Guarded::spawn(command)?;
    let capture = |error: std::io::Error| {
        Error::new(Kind::Internal, "program.capture", format!("cannot read the output of `{shown}`"))
            .caused_by(error)
    };
    let (mut stdout, mut stderr) = (child.child.stdout.take(), child.child.stderr.take());
    for pipe in [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)].into_iter().flatten() {
        nonblocking(pipe).map_err(capture)?;
    }
    let (mut out, mut messages) = (Vec::new(), Vec::new());
    loop {
        // First the end, then the pipes: what is written before the end is in them by then.
        let ended = child.try_wait();
        drain(&mut stdout, &mut out, MAX_OUTPUT).map_err(capture)?;
        drain(&mut stderr, &mut messages, MAX_OUTPUT).map_err(capture)?;
        if let Some(status) = ended {
            return Ok(Finished { command: shown, status, stdout: out, stderr: messages });
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            child.kill();
            return Err(Error::new(
                Kind::Internal,
                "program.timeout",
                format!("`{shown}` did not end within {} s", timeout.as_secs_f64()),
            )
            .because(tail(&messages))
            .fact("command", &shown));
        }
        let pipes: Vec<BorrowedFd<'_>> = [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)]
            .into_iter()
            .flatten()
            .collect();
        // A program may leave a child of its own behind that holds the pipes open: ask for its end now and then.
        let nap = if pipes.is_empty() { REAP_EVERY } else { REAP_EVERY * 5 };
        wait_readable(&pipes, left.min(nap)).map_err(capture)?;
    }
}

/// Makes reads from `fd` return at once.
pub fn nonblocking(fd: BorrowedFd<'_>) -> std::io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Waits until one of `fds` can be read or is closed, at most `timeout`; says of each whether it is.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Duration) -> std::io::Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    match poll(&mut polled, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(polled.iter().map(|fd| fd.any().unwrap_or(false)).collect())
}

/// Reads what the non-blocking `pipe` holds, keeps the first `limit` bytes of all of it in `kept`, and forgets the
/// pipe at its end.
pub fn drain(pipe: &mut Option<impl Read>, kept: &mut Vec<u8>, limit: usize) -> std::io::Result<()> {
    let Some(reader) = pipe else { return Ok(()) };
    let mut buffer = [0; 16384];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => {
                *pipe = None;
                return Ok(());
            }
            Ok(n) => {
                let room = limit.saturating_sub(kept.len());
                kept.extend_from_slice(&buffer[..n.min(room)]);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn output_and_messages_are_captured_apart() {
        let done = run(&mut sh("echo out; echo err >&2"), LONG).unwrap().success().unwrap();
        assert_eq!((done.stdout.as_slice(), done.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    }

    #[test]
    fn output_beyond_the_bound_is_dropped_and_does_not_block_the_program() {
        let done = run(&mut sh("head -c 20000000 /dev/zero; echo end >&2"), LONG).unwrap().success().unwrap();
        assert_eq!((done.stdout.len(), done.stderr.as_slice()), (MAX_OUTPUT, &b"end\n"[..]));
    }

    #[test]
    fn a_failure_names_the_command_and_its_last_words() {
        let error = run(&mut sh("echo nonsense >&2; exit 3"), LONG).unwrap().success().unwrap_err();
        assert_eq!(error.id(), "program.failed");
        assert!(error.what().contains("/bin/sh -c") && error.what().contains('3'), "{error}");
        assert_eq!(error.why(), "nonsense");
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut held =
            std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
        let script = format!("sleep 1000 >{} & echo started; wait", fifo.display());
        let error = run(&mut sh(&script), Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.id(), "program.timeout");
        // The pipe ends with the last process that holds it.
        assert_eq!(wait_readable(&[held.as_fd()], LONG).unwrap(), [true]);
        assert_eq!(held.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_program_that_leaves_a_child_holding_its_output_is_not_waited_for() {
        let done = run(&mut sh("sleep 30 & echo started"), LONG).unwrap();
        assert_eq!(done.stdout, b"started\n");
    }

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| {
            let mut command = sh("sleep 1000");
            Guarded::spawn(&mut command).unwrap()
        })
        .join()
        .unwrap();
        let status = child.child().wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    }
}
