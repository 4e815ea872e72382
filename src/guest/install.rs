//! Installs packages in the guest's tree: their files come in open from outside of it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::package::{Installer, unreadable};
use super::plan::Fix;
use super::steps::{TOOL_TIME, guest_program, step_error};
use crate::error::{Error, Kind, Result};
use crate::host::child;

/// Asked before a service is started (invoke-rc.d(8)): its answer 101 is no.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// The packages of a plan, open.
pub struct Given(Vec<(PathBuf, File)>);

impl Given {
    /// Opens the packages of `fixes` where `place` says they are, while paths lead to them.
    pub fn open(fixes: &[Fix], place: impl Fn(&Path) -> PathBuf) -> Result<Self> {
        let mut open = Vec::new();
        for fix in fixes {
            let Fix::Install { packages, .. } = fix else { continue };
            for path in packages {
                let file = File::open(place(path)).map_err(|error| unreadable(path).caused_by(error))?;
                open.push((path.clone(), file));
            }
        }
        Ok(Given(open))
    }
}

/// Installs `packages`, which are among `given`; returns what it did. What a failure leaves in the tree is thrown away with
/// the overlay.
pub fn install(installer: Installer, packages: &[PathBuf], given: &Given) -> Result<String> {
    let folder = format!("/var/tmp/haul-packages-{}", std::process::id());
    fs::create_dir(&folder).map_err(|error| step_error("make", &folder, error))?;
    let mut command = guest_program(installer.programs(), installer.name())?;
    command.args(installer.arguments());
    for (path, file) in given.0.iter().filter(|(path, _)| packages.contains(path)) {
        let inside = format!("{folder}/{}", path.file_name().unwrap_or_default().display());
        copy(file, path, &inside)?;
        command.arg(inside);
    }
    let forbids = installer == Installer::Dpkg && !Path::new(POLICY).exists();
    if forbids {
        forbid_services()?;
    }
    // systemctl(1) is not to look for a systemd that runs.
    command.env("DEBIAN_FRONTEND", "noninteractive").env("SYSTEMD_OFFLINE", "1");
    child::run(&mut command, TOOL_TIME).and_then(child::Finished::success).map_err(|error| {
        Error::new(Kind::Image, "guest.package", "cannot install the packages in the guest")
            .because(format!("{}: {}", error.what(), error.why()))
            .remedy(
                "give the packages they depend on, too: as `apt-get --download-only install` or `dnf download --resolve` fetch \
                 them on a machine of the same system",
            )
    })?;
    fs::remove_dir_all(&folder).map_err(|error| step_error("remove", &folder, error))?;
    if forbids {
        fs::remove_file(POLICY).map_err(|error| step_error("remove", POLICY, error))?;
    }
    let names: Vec<String> =
        packages.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect();
    Ok(format!("installed {}", names.join(" ")))
}

fn copy(mut from: &File, path: &Path, inside: &str) -> Result<()> {
    let mut to = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(inside)
        .map_err(|error| step_error("make", inside, error))?;
    std::io::copy(&mut from, &mut to).map(drop).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => step_error("write", inside, error),
        _ => unreadable(path).caused_by(error),
    })
}

/// Has no service started: it would run beside the server's own.
fn forbid_services() -> Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o755)
        .open(POLICY)
        .and_then(|mut file| file.write_all(b"#!/bin/sh\nexit 101\n"))
        .map_err(|error| step_error("make", POLICY, error))
}
