//! Packages that the user gives, installed before anything else is changed.

use crate::error::Result;
use crate::guest::inspect::{Guest, selinux};
use crate::guest::package::{Installer, Package};
use crate::guest::plan::{Draft, Fix, Options, Severity};

/// Makes a system under SELinux label all its files when it next starts (selinux(8)).
const RELABEL: &str = "/.autorelabel";

/// The packages of `options` that the guest does not have.
pub fn missing(guest: &Guest, options: &Options) -> Result<Vec<Package>> {
    let mut packages = Vec::new();
    for file in &options.packages {
        let package = Package::named(file)?;
        if !packages.contains(&package) && !package.is_installed(&guest.tree)? {
            packages.push(package);
        }
    }
    Ok(packages)
}

/// Installs them, by each program in one go: one may need the other.
pub fn fix(guest: &Guest, options: &Options, draft: &mut Draft<'_>) -> Result<()> {
    let packages = missing(guest, options)?;
    for installer in [Installer::Dpkg, Installer::Rpm] {
        let its: Vec<&Package> = packages.iter().filter(|package| package.installer == installer).collect();
        if its.is_empty() {
            continue;
        }
        let mut is_there = false;
        for program in installer.programs() {
            is_there |= guest.tree.exists(program)?;
        }
        if !is_there {
            draft.find(
                "packages.no-tool",
                Severity::Fatal,
                &format!("the guest has no {}, which installs {}", installer.name(), its[0].file.display()),
                "give packages of the guest's own distribution",
            );
            continue;
        }
        let packages = its.iter().map(|package| package.file.clone()).collect();
        draft.push(Fix::Install { packages, installer, reason: "given by --package".into() });
    }
    // What is installed while SELinux is not running has no label.
    let labels = matches!(selinux(&guest.tree)?.as_deref(), Some("enforcing" | "permissive"));
    if labels && !packages.is_empty() {
        draft.write(
            RELABEL,
            "",
            0o644,
            "SELinux labels what is installed at the first start, which takes minutes",
        )?;
    }
    Ok(())
}
