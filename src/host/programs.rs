//! The table of external programs: where each is found, what it is for, which package has it.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::host::child;

/// Where programs are looked for, in order. Never `PATH`: haul runs as root.
const FOLDERS: &[&str] = &["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// How long a program may take to say its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// An external program.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name, looked for in the system's program folders.
    pub name: &'static str,
    /// Absolute paths tried after those folders.
    pub elsewhere: &'static [&'static str],
    /// The argument that makes it print its version and exit.
    pub version: &'static str,
    /// What haul uses it for, to follow "needed to".
    pub purpose: &'static str,
    /// The package that has it on Debian and Ubuntu.
    pub debian: &'static str,
    /// The package that has it on RHEL and its kin.
    pub rhel: &'static str,
}

/// What RHEL and its kin call the QEMU for the machine it runs on.
const QEMU_KVM: &[&str] = &["/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm"];

/// The virtual machine of the boot test.
pub const QEMU: Program = Program {
    name: "qemu-system-x86_64",
    elsewhere: if cfg!(target_arch = "x86_64") { QEMU_KVM } else { &[] },
    version: "--version",
    purpose: "boot an image",
    debian: "qemu-system-x86",
    rhel: "qemu-kvm",
};

/// The same for ARM's 64-bit machines.
pub const QEMU_AARCH64: Program = Program {
    name: "qemu-system-aarch64",
    elsewhere: if cfg!(target_arch = "aarch64") { QEMU_KVM } else { &[] },
    debian: "qemu-system-arm",
    rhel: "qemu-system-aarch64-core",
    ..QEMU
};

/// Where programs are on this host. Each is looked for once; [`Programs::replace`] puts another in its place.
#[derive(Default)]
pub struct Programs {
    found: Mutex<BTreeMap<&'static str, PathBuf>>,
}

impl Programs {
    /// Uses `path` for `program`: the user's choice, or a fake in a test.
    #[must_use]
    pub fn replace(self, program: &Program, path: impl Into<PathBuf>) -> Self {
        self.lock().insert(program.name, path.into());
        self
    }

    /// The absolute path of `program`. Fails with [`Kind::Privilege`] and names the packages when it is missing.
    pub fn find(&self, program: &Program) -> Result<PathBuf> {
        let mut found = self.lock();
        if let Some(path) = found.get(program.name) {
            return Ok(path.clone());
        }
        let in_folders = FOLDERS.iter().map(|folder| Path::new(folder).join(program.name));
        let path = in_folders
            .chain(program.elsewhere.iter().map(PathBuf::from))
            .find(|path| is_executable(path))
            .ok_or_else(|| missing(program))?;
        found.insert(program.name, path.clone());
        Ok(path)
    }

    /// A command for `program` with no input and no environment but `PATH` and `LC_ALL`, so that neither the
    /// user's settings nor a secret reach it.
    pub fn command(&self, program: &Program) -> Result<Command> {
        let mut command = Command::new(self.find(program)?);
        command.env_clear().env("PATH", FOLDERS.join(":")).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        Ok(command)
    }

    /// The first line of what `program` says of its version.
    pub fn version(&self, program: &Program) -> Result<String> {
        let mut command = self.command(program)?;
        command.arg(program.version);
        let output = child::run(&mut command, VERSION_TIMEOUT)?.success()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(200).collect())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, PathBuf>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The id of the error that a program is not installed.
pub const MISSING: &str = "program.missing";

fn missing(program: &Program) -> Error {
    Error::new(Kind::Privilege, MISSING, format!("{} is not installed", program.name))
        .because(format!("it is needed to {}", program.purpose))
        .remedy(format!(
            "install it: apt-get install {} (Debian, Ubuntu) or dnf install {} (RHEL)",
            program.debian, program.rhel
        ))
        .fact("program", program.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHELL: Program = Program {
        name: "sh",
        elsewhere: &[],
        version: "-c exit",
        purpose: "test",
        debian: "dash",
        rhel: "bash",
    };
    const ABSENT: Program = Program { name: "no-such-program", ..SHELL };

    #[test]
    fn a_program_is_found_by_its_absolute_path() {
        let path = Programs::default().find(&SHELL).unwrap();
        assert!(path.is_absolute() && path.ends_with("sh"));
    }

    #[test]
    fn a_missing_program_names_its_packages_and_purpose() {
        let error = Programs::default().find(&ABSENT).unwrap_err();
        assert_eq!((error.kind(), error.id()), (Kind::Privilege, MISSING));
        assert!(error.what_to_do().contains("apt-get install dash"), "{}", error.what_to_do());
        assert!(error.why().contains("needed to test"));
    }

    #[test]
    fn a_fake_takes_the_programs_place() {
        let programs = Programs::default().replace(&ABSENT, "/bin/echo");
        let mut command = programs.command(&ABSENT).unwrap();
        command.arg("fake");
        let output = child::run(&mut command, VERSION_TIMEOUT).unwrap().success().unwrap();
        assert_eq!(output.stdout, b"fake\n");
        assert_eq!(programs.version(&ABSENT).unwrap(), "-c exit");
    }

    #[test]
    fn a_command_inherits_no_environment() {
        let programs = Programs::default().replace(&ABSENT, "/usr/bin/env");
        let output = child::run(&mut programs.command(&ABSENT).unwrap(), VERSION_TIMEOUT).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let names: Vec<&str> = text.lines().filter_map(|line| line.split('=').next()).collect();
        assert_eq!(names, ["LC_ALL", "PATH"]);
    }
}
