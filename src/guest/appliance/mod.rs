//! Carries out a plan in a virtual machine: for what this machine's kernel cannot or must not mount, and where nobody is root.
//!
//! It boots a kernel of the guest's own, which knows the guest's file systems, with haul as its first process. Its disk is the
//! copy, served by NBD; it has no network. What it does in there is what is done here otherwise, box and all.

mod init;
mod machine;

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::apply::{Setup, folder_error};
use super::inspect::Guest;
use super::plan::Plan;
use super::say::{BEGIN, MAX_LINE, Say};
use crate::boot::{self, Arch, Direct, Expect, Format, Machine};
use crate::error::{Error, Kind, Result};
use crate::host::export::Disk;
use crate::host::programs::{self, Programs};
use crate::io::nbd::Server;
use crate::monitor::{Level, Monitor, Tally};

pub use init::first_process;

/// What it says last.
const END: &str = "haul-appliance-end";
/// How long it may take: without KVM everything takes ten times as long.
const TIME: Duration = Duration::from_secs(2 * 60 * 60);
/// Its memory, in MiB: what the guest's programs may use, the kernel, and haul.
const MEMORY: u32 = 3072;

/// Carries out `plan` on the disk `shown`, by a kernel of `guest`, which is on it.
pub fn carry_out(
    plan: &Plan,
    guest: &Guest,
    shown: &Arc<dyn Disk>,
    setup: &Setup,
    monitor: &dyn Monitor,
) -> Result<()> {
    let (kernel, initramfs) = machine::files(plan, guest, &setup.program)?;
    let file = |name: &str, bytes: &[u8]| {
        let path = setup.folder.join(name);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let written = options.open(&path).and_then(|mut file| file.write_all(bytes));
        written.map(|()| path.clone()).map_err(|error| folder_error(&path, error))
    };
    let direct = Direct {
        kernel: file("kernel", &kernel)?,
        initramfs: file("initramfs", &initramfs)?,
        arguments: machine::arguments(guest.arch),
    };
    // A socket's path has 107 bytes at most, and haul's own folder may lie deep. No other job's machine may find this one's.
    let socket = std::env::temp_dir().join(format!("haul-fix-{}.sock", Uuid::new_v4()));
    let server = Server::writable(Arc::clone(shown) as _, Arc::clone(shown) as _, &socket)?;
    let machine = Machine {
        arch: Arch::of_guest(guest.arch),
        memory_mib: MEMORY,
        // Two have hung early where none runs at a time.
        cpus: 1,
        direct: Some(direct),
        ..Machine::new(&socket, Format::Served)
    };
    let console = setup.folder.join("console.log");
    let expect = Expect::Marker(END.into());
    let outcome = boot::run(&Programs::default(), &machine, expect, TIME, &console, &Tally::default());
    // A disk that could not be read or written is why it failed.
    server.stop()?;
    let verdict = outcome.map_err(without)?.verdict;
    // All is on the disk once it says so, however the machine ends.
    if report(&console, monitor)? {
        return Ok(());
    }
    monitor.note(Level::Info, &format!("the appliance's last words:\n{}", last_lines(&console)));
    Err(Error::new(Kind::Internal, "appliance.ended", "the appliance ended early")
        .because(format!("it {}: {}", verdict.state.what(), verdict.evidence))
        .remedy("look at its last words above; as root, haul can do without it"))
}

/// Why no machine could be started, and what to do where that is for want of QEMU.
fn without(error: Error) -> Error {
    if error.id() != programs::MISSING {
        return error;
    }
    let install = error.what_to_do().to_owned();
    error.remedy(format!("{install}; or run haul as root without --appliance, which does not need it"))
}

/// The end of what is in `console`.
fn last_lines(console: &Path) -> String {
    const LINES: usize = 12;
    // It explains another failure: one here is none.
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Passes on what was said on `console`; whether that is all of it.
fn report(console: &Path, monitor: &dyn Monitor) -> Result<bool> {
    let file = fs::File::open(console).map_err(|error| folder_error(console, error))?;
    let mut lines = BufReader::new(file);
    loop {
        let mut line = Vec::new();
        let read = (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line);
        if read.map_err(|error| folder_error(console, error))? == 0 {
            return Ok(false);
        }
        // The words of firmware and kernel are there, too, and not all of them end their line.
        let said = line.windows(BEGIN.len()).position(|bytes| bytes == BEGIN);
        match said.map(|at| serde_json::from_slice(line[at..].trim_ascii_end())) {
            Some(Ok(Say::Done)) => return Ok(true),
            Some(Ok(said)) => said.pass_on(monitor)?,
            Some(Err(_)) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard_among_the_words_of_firmware_and_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let console = dir.path().join("console.log");
        let heard = |text: &str| {
            fs::write(&console, text).unwrap();
            let monitor = Tally::default();
            let done = report(&console, &monitor)?;
            let notes: Vec<String> = monitor.notes().into_iter().map(|(_, text)| text).collect();
            Ok::<_, Error>((done, notes))
        };
        let step = |text: &str| serde_json::to_string(&Say::Step { text: text.into() }).unwrap();
        // The firmware's last line has no end.
        let text = format!("Booting from ROM...{}\r\n[1.0] oops\n{}\n", step("one"), step("two"));
        assert_eq!(heard(&text).unwrap(), (false, vec!["one".into(), "two".into()]));
        let done = serde_json::to_string(&Say::Done).unwrap();
        assert_eq!(heard(&format!("{}\n[2.0] {done}\n", step("one"))).unwrap(), (true, vec!["one".into()]));
        let error = Error::new(Kind::Image, "some.id", "it failed");
        let failed = serde_json::to_string(&Say::failed(&error)).unwrap();
        assert_eq!(heard(&format!("rom{failed}\n{done}\n")).unwrap_err().what(), "it failed");
    }
}
