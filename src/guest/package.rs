//! Packages of the guest's distribution that the user gives: told by their names, installed by the guest's own program.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tree::Tree;
use crate::error::{Error, Kind, Result};

/// A program that installs packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Installer {
    /// dpkg: Debian, Ubuntu.
    Dpkg,
    /// rpm: Red Hat, SUSE and their kin.
    Rpm,
}

/// Where dpkg says what it has installed.
const STATUS: &str = "/var/lib/dpkg/status";
/// The most that is read of it, in bytes: a paragraph has about a KiB.
const MAX_STATUS: u64 = 64 << 20;

impl Installer {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Installer::Dpkg => "dpkg",
            Installer::Rpm => "rpm",
        }
    }

    /// Where the program may be.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            Installer::Dpkg => &["/usr/bin/dpkg"],
            Installer::Rpm => &["/usr/bin/rpm", "/bin/rpm"],
        }
    }

    /// The folder of its records.
    pub fn records(self) -> &'static str {
        match self {
            Installer::Dpkg => "/var/lib/dpkg",
            Installer::Rpm => "/var/lib/rpm",
        }
    }

    /// How it is told to install the packages that follow, without a question; the settings that are there stay. What is
    /// installed is installed again.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Installer::Dpkg => &["--install", "--force-confdef", "--force-confold"],
            Installer::Rpm => &["--upgrade", "--replacepkgs"],
        }
    }
}

/// A package in a file of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// The file.
    pub file: PathBuf,
    /// What the package is called.
    pub name: String,
    /// Its version, with the distribution's revision.
    pub version: String,
    /// The program that installs it.
    pub installer: Installer,
}

impl Package {
    /// The package in `file`, whose name must be as the distribution has it: `NAME_VERSION_ARCHITECTURE.deb` or
    /// `NAME-VERSION-RELEASE.ARCHITECTURE.rpm`. The file is not read.
    pub fn named(file: &Path) -> Result<Self> {
        let called = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let parts = by_dpkg(called)
            .map(|parts| (Installer::Dpkg, parts))
            .or_else(|| by_rpm(called).map(|parts| (Installer::Rpm, parts)));
        let plain = |text: &str| {
            !text.is_empty()
                && text.starts_with(|c: char| c.is_ascii_alphanumeric())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-._~:^".contains(c))
        };
        match parts {
            Some((installer, (name, version))) if plain(&name) && plain(&version) => {
                Ok(Package { file: file.to_owned(), name, version, installer })
            }
            _ => Err(Error::new(
                Kind::Usage,
                "guest.package",
                format!("cannot tell what package {} is", file.display()),
            )
            .because("its name is not that of a distribution's package")
            .remedy(
                "name it as the distribution does: NAME_VERSION_ARCH.deb or NAME-VERSION-RELEASE.ARCH.rpm",
            )),
        }
    }

    /// Whether the guest has it already, in this very version. Of rpm's records this cannot be told.
    pub fn is_installed(&self, tree: &Tree) -> Result<bool> {
        if self.installer == Installer::Rpm {
            return Ok(false);
        }
        let Some(stream) = tree.open(STATUS)? else { return Ok(false) };
        let mut status = Vec::new();
        stream.take(MAX_STATUS).read_to_end(&mut status).map_err(|error| {
            Error::new(Kind::Image, "guest.read", format!("cannot read the guest's {STATUS}"))
                .caused_by(error)
        })?;
        let status = String::from_utf8_lossy(&status);
        let is = |paragraph: &str, key: &str, value: &str| {
            paragraph.lines().any(|line| line.strip_prefix(key).is_some_and(|rest| rest.trim() == value))
        };
        Ok(status.split("\n\n").any(|paragraph| {
            is(paragraph, "Package:", &self.name)
                && is(paragraph, "Version:", &self.version)
                && paragraph
                    .lines()
                    .any(|line| line.starts_with("Status:") && line.ends_with(" ok installed"))
        }))
    }
}

/// Whether one of `files` is the package `name`.
pub fn are_with(files: &[PathBuf], name: &str) -> bool {
    files.iter().any(|file| Package::named(file).is_ok_and(|package| package.name == name))
}

/// The whole path of the package in `file`, which is there and is called as a package is.
pub fn find(file: &Path) -> Result<PathBuf> {
    let failed = |error: std::io::Error| unreadable(file).caused_by(error);
    Package::named(file)?;
    if std::fs::metadata(file).map_err(failed)?.is_file() {
        return std::path::absolute(file).map_err(failed);
    }
    Err(unreadable(file).because("it is not a file"))
}

/// That the package in `file` cannot be read.
pub fn unreadable(file: &Path) -> Error {
    Error::new(Kind::Source, "guest.package", format!("cannot read the package {}", file.display()))
        .remedy("see that it is there and can be read, until the job has ended")
        .fact("package", file.display())
}

/// Name and version in what apt calls a file: a colon is written as `%3a`.
fn by_dpkg(file: &str) -> Option<(String, String)> {
    let mut parts = file.strip_suffix(".deb")?.split('_');
    let (name, version, _) = (parts.next()?, parts.next()?, parts.next()?);
    parts.next().is_none().then(|| (name.to_owned(), version.replace("%3a", ":").replace("%3A", ":")))
}

/// Name and version in what rpm calls a file.
fn by_rpm(file: &str) -> Option<(String, String)> {
    let (rest, _) = file.strip_suffix(".rpm")?.rsplit_once('.')?;
    let (rest, release) = rest.rsplit_once('-')?;
    let (name, version) = rest.rsplit_once('-')?;
    Some((name.to_owned(), format!("{version}-{release}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_told_by_the_names_that_distributions_give_them() {
        for (file, expected) in [
            (
                "/x/cloud-init_22.4.2-1+deb12u3_all.deb",
                Some((Installer::Dpkg, "cloud-init", "22.4.2-1+deb12u3")),
            ),
            ("libc6_2%3a2.36-9_amd64.deb", Some((Installer::Dpkg, "libc6", "2:2.36-9"))),
            (
                "cloud-init-19.4-7.el7.centos.x86_64.rpm",
                Some((Installer::Rpm, "cloud-init", "19.4-7.el7.centos")),
            ),
            (
                "grub2-efi-x64-modules-2.06-70.el9.noarch.rpm",
                Some((Installer::Rpm, "grub2-efi-x64-modules", "2.06-70.el9")),
            ),
            ("cloud-init.deb", None),
            ("a_b_c_d.deb", None),
            ("--root=x_1_all.deb", None),
            ("cloud-init.rpm", None),
            ("cloud-init-19.4.tar.gz", None),
            ("/", None),
        ] {
            let found = Package::named(Path::new(file)).ok();
            let found = found.as_ref().map(|p| (p.installer, p.name.as_str(), p.version.as_str()));
            assert_eq!(found, expected, "{file}");
        }
    }
}
