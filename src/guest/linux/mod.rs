//! What a Linux guest needs: one file per group of fixes.

pub mod agents;
pub mod at_start;
pub mod boot;
pub mod builder;
pub mod cloud_init;
pub mod efi;
pub mod firmware;
pub mod fstab;
pub mod ifcfg;
pub mod ifupdown;
pub mod ini;
pub mod initramfs;
pub mod lvm;
pub mod network;
pub mod os_conf;
pub mod packages;
pub mod probe;

use super::inspect::Guest;
use super::plan::{Draft, Options, Severity};
use super::tree::Tree;
use crate::error::Result;

/// Whether systemd is installed.
fn has_systemd(tree: &Tree) -> Result<bool> {
    Ok(tree.exists("/usr/lib/systemd/systemd")? || tree.exists("/lib/systemd/systemd")?)
}

/// Adds every fix `guest` needs to `draft`, in the order in which they are carried out.
pub fn fixes(guest: &Guest, options: &Options, draft: &mut Draft<'_>) -> Result<()> {
    // First: what it brings along may be configured.
    packages::fix(guest, options, draft)?;
    fstab::fix(guest, draft)?;
    lvm::fix(draft)?;
    arrays(guest, draft);
    boot::fix(guest, options, draft)?;
    efi::fix(guest, draft)?;
    firmware::fix(guest, options, draft)?;
    network::fix(guest, options, draft)?;
    cloud_init::fix(guest, options, draft)?;
    agents::fix(draft)?;
    // Last: it takes in what the fixes above changed.
    initramfs::fix(guest, options.no_guest_programs, draft)
}

/// Tells of mirrors of which this disk has but one member.
fn arrays(guest: &Guest, draft: &mut Draft<'_>) {
    for fs in &guest.filesystems {
        let (Some(array), Some(point)) = (&fs.array, &fs.point) else { continue };
        if array.members > 1 {
            let device = array.devices.last().map_or("the array", String::as_str);
            draft.find(
                "array.degraded",
                Severity::Info,
                &format!("{point} is on a mirror of {} disks: in the cloud it has this one", array.members),
                &format!("afterwards: mdadm --grow {device} --raid-devices=1 --force"),
            );
        }
    }
}
