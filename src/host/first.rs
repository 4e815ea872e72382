//! What the first process of a machine does: it mounts what the kernel offers, loads modules, and switches the machine off.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::error::{Error, Kind, Result};

fn failed(what: &str, error: impl Into<std::io::Error>) -> Error {
    Error::new(Kind::Internal, "appliance.start", format!("the appliance cannot {what}"))
        .caused_by(error.into())
}

/// Mounts /dev, /proc and /sys, and makes the kernel's console what this process says.
pub fn begin() -> Result<()> {
    for (kind, point) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        // The kernel's own archive may have the folder.
        let _ = fs::create_dir(point);
        mount(Some(kind), point, Some(kind), MsFlags::empty(), None::<&str>)
            .map_err(|error| failed(&format!("mount {point}"), error))?;
    }
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console")
        .map_err(|error| failed("open its console", error))?;
    nix::unistd::dup2_stdin(&console).map_err(|error| failed("use its console", error))?;
    nix::unistd::dup2_stdout(&console).map_err(|error| failed("use its console", error))?;
    nix::unistd::dup2_stderr(&console).map_err(|error| failed("use its console", error))
}

/// Loads the kernel module in the file `path`.
pub fn load(path: &Path) -> Result<()> {
    let what = || format!("load {}", path.display());
    let file = File::open(path).map_err(|error| failed(&what(), error))?;
    match nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty()) {
        // It is there, or its hardware is not: what needs it will say so.
        Ok(()) | Err(nix::errno::Errno::EEXIST | nix::errno::Errno::ENODEV) => Ok(()),
        Err(error) => Err(failed(&what(), error)),
    }
}

/// Goes from the kernel's archive, which no root may be turned away from, to a file system in memory.
pub fn leave_archive() -> Result<()> {
    const NEW: &str = "/root-in-memory";
    fs::create_dir(NEW).map_err(|error| failed("make a folder", error))?;
    mount(Some("haul"), NEW, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
        .map_err(|error| failed("mount a root", error))?;
    for point in ["/dev", "/proc", "/sys"] {
        let inside = format!("{NEW}{point}");
        fs::create_dir(&inside).map_err(|error| failed("make a folder", error))?;
        mount(Some(point), inside.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|error| failed(&format!("move {point}"), error))?;
    }
    nix::unistd::chdir(NEW).map_err(|error| failed("enter its root", error))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|error| failed("move its root", error))?;
    nix::unistd::chroot(".").map_err(|error| failed("enter its root", error))?;
    nix::unistd::chdir("/").map_err(|error| failed("enter its root", error))
}

/// Switches the machine off. It only comes back where that cannot be done.
pub fn power_off() {
    // There is nothing left to tell of it.
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

/// Whether this is the first process of a machine, started by the kernel as `name`.
pub fn is_first(name: &CStr) -> bool {
    let called = std::env::args_os().next();
    nix::unistd::getpid().as_raw() == 1
        && called.is_some_and(|called| called.as_encoded_bytes() == name.to_bytes())
}
