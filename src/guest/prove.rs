//! Looks at a finished copy as if for the first time, and says whether it will boot on virtio.

use std::io::Read;
use std::sync::Arc;

use serde::Serialize;

use super::disk::BootMode;
use super::fat::MAX_FILE;
use super::hook;
use super::initramfs;
use super::inspect::{Guest, inspect};
use super::linux::efi::removable_loader;
use super::linux::fstab::{self, Home, Names};
use super::loader;
use super::package::{Installer, Package};
use super::partition;
use super::plan::{Fix, Plan};
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;
use crate::unit::Extent;

/// One claim about the copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// What is claimed.
    pub claim: String,
    /// Whether it holds.
    pub holds: bool,
}

/// Proves the copy on `disk` after `plan` was applied: reads everything anew, without mounting anything.
pub fn prove(plan: &Plan, disk: Arc<dyn ReadAt>) -> Result<Vec<Proof>> {
    let guest = inspect(Arc::clone(&disk))?;
    let mut proofs = Vec::new();
    planned_texts(plan, &guest, &mut proofs)?;
    boot_sector(plan, &disk, &mut proofs)?;
    kernels(&guest, &mut proofs);
    firmware(&guest, &mut proofs)?;
    loader(&guest, &mut proofs)?;
    mounts(plan, &guest, &mut proofs)?;
    Ok(proofs)
}

fn claim(proofs: &mut Vec<Proof>, holds: bool, claim: String) {
    proofs.push(Proof { claim, holds });
}

fn planned_texts(plan: &Plan, guest: &Guest, proofs: &mut Vec<Proof>) -> Result<()> {
    for (i, fix) in plan.fixes.iter().enumerate() {
        let (path, text) = match fix {
            Fix::Edit { path, new, .. } => (path, Some(new)),
            Fix::Create { path, text, .. } => (path, Some(text)),
            Fix::Remove { path, .. } => (path, None),
            Fix::Copy { from, path, .. } => {
                let copy = content(guest, path)?;
                let same = copy.is_some() && copy == content(guest, from)?;
                claim(proofs, same, format!("{path} is a copy of {from}"));
                continue;
            }
            Fix::Append { image, .. } => {
                let loads = match guest.tree.open(image)? {
                    Some(stream) => hook::is_in(&initramfs::read(stream, image)?),
                    None => false,
                };
                claim(proofs, loads, format!("{image} loads the drivers added to it"));
                continue;
            }
            Fix::Install { packages, installer: Installer::Dpkg, .. } => {
                for package in packages {
                    let package = Package::named(package)?;
                    let text = format!("{} {} is installed", package.name, package.version);
                    claim(proofs, package.is_installed(&guest.tree)?, text);
                }
                continue;
            }
            Fix::Partition { start, end, purpose, .. } => {
                let extent = Extent::new(*start, *end);
                let there = guest.parts.as_ref().is_some_and(|parts| purpose.is_at(&parts.table, extent));
                claim(proofs, there, format!("the disk has an {} at {start}", purpose.name()));
                continue;
            }
            Fix::Grub { core, .. } => {
                claim(proofs, guest.tree.exists(core)?, format!("{core} is there"));
                continue;
            }
            Fix::BootSector { .. } => continue,
            // What rpm has installed is known to itself alone.
            Fix::Install { .. } | Fix::Initramfs { .. } => continue,
        };
        let touched_later = plan.fixes[i + 1..].iter().any(|later| later.path() == path);
        if !touched_later {
            claim(proofs, guest.tree.text(path)?.as_ref() == text, format!("{path} is as planned"));
        }
    }
    Ok(())
}

/// By BIOS: the first sector loads what was put where it looks.
fn boot_sector(plan: &Plan, disk: &dyn ReadAt, proofs: &mut Vec<Proof>) -> Result<()> {
    for fix in &plan.fixes {
        if let Fix::BootSector { core, start, .. } = fix {
            let loads = partition::is_loaded(disk, *start)?;
            claim(proofs, loads, format!("the first sector loads {core} from {start}"));
        }
    }
    Ok(())
}

/// The content of the boot loader at `path`; `None` when there is none.
fn content(guest: &Guest, path: &str) -> Result<Option<Vec<u8>>> {
    let Some(stream) = guest.tree.open(path)? else { return Ok(None) };
    let mut bytes = Vec::new();
    stream.take(MAX_FILE).read_to_end(&mut bytes).map_err(|error| {
        Error::new(Kind::Image, "guest.read", format!("cannot read the guest's {path}")).caused_by(error)
    })?;
    Ok(Some(bytes))
}

/// By UEFI: firmware that knows no boot entries finds a loader.
fn firmware(guest: &Guest, proofs: &mut Vec<Proof>) -> Result<()> {
    if guest.boot == BootMode::Uefi
        && let Some(loader) = removable_loader(guest)
    {
        claim(proofs, guest.tree.exists(&loader)?, format!("firmware without boot entries finds {loader}"));
    }
    Ok(())
}

fn kernels(guest: &Guest, proofs: &mut Vec<Proof>) {
    for kernel in &guest.kernels {
        let lacking = kernel.lacking();
        let text = match lacking.is_empty() {
            true => format!("kernel {} has virtio before it looks for its root", kernel.version),
            false => {
                format!("kernel {} has {} before it looks for its root", kernel.version, lacking.join(", "))
            }
        };
        claim(proofs, lacking.is_empty(), text);
    }
    claim(
        proofs,
        guest.kernels.iter().any(|kernel| kernel.in_menu),
        "the menu boots a kernel that is there".into(),
    );
}

fn loader(guest: &Guest, proofs: &mut Vec<Proof>) -> Result<()> {
    let names = Names::lasting(&guest.filesystems, &[]);
    let entries = guest.menus.iter().flat_map(|menu| menu.entries.iter().map(move |entry| (menu, entry)));
    for (menu, entry) in entries.filter(|(_, entry)| entry.kernel.contains("vmlinu")) {
        for file in std::iter::once(&entry.kernel).chain(&entry.initrds) {
            let there = loader::file(&guest.tree, menu, file)?.is_some();
            claim(proofs, there, format!("{file}, which the menu names, exists"));
        }
        for argument in &entry.arguments {
            let Some(spec) = argument.strip_prefix("root=") else { continue };
            let found = names.find(spec).is_some() || spec.starts_with("/dev/mapper/");
            claim(proofs, found, format!("{argument} of the menu names a file system on this disk"));
        }
    }
    proofs.dedup();
    Ok(())
}

fn mounts(plan: &Plan, guest: &Guest, proofs: &mut Vec<Proof>) -> Result<()> {
    let names = Names::lasting(&guest.filesystems, &plan.data_disks);
    for entry in fstab::parse(&guest.tree.text("/etc/fstab")?.unwrap_or_default()) {
        let optional = entry.options.split(',').any(|option| matches!(option, "nofail" | "noauto"));
        if Names::is_device(&entry.spec) && !optional && !entry.spec.starts_with("/dev/mapper/") {
            let (holds, which) = match names.home(&entry.spec) {
                Home::Here => (true, "this disk"),
                Home::DataDisk => (true, "a data disk"),
                Home::Elsewhere => (false, "this disk"),
                // Then it cannot be proven, either way.
                Home::Unknown => continue,
            };
            claim(proofs, holds, format!("{}, mounted at {}, is on {which}", entry.spec, entry.point));
        }
    }
    Ok(())
}
