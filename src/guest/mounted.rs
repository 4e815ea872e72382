//! Mounts the file systems of a copy, has the steps of a plan carried out in them, and unmounts everything.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use super::install::Given;
use super::plan::{Fix, Plan, PlannedMount};
use super::say::Say;
use super::steps;
use crate::error::Result;
use crate::host::labels;
use crate::host::loopdev::LoopDevice;
use crate::host::namespace::{self, Limits};
use crate::unit::{Extent, GIB};

/// How long all of a plan may take.
const TIME: Duration = Duration::from_secs(30 * 60);
/// What the guest's programs may use.
const LIMITS: Limits = Limits { memory: 2 * GIB, processes: 512, time: TIME };

/// Carries out `plan` on `disk`, whose file systems are mounted at the folder `root`; false when a step failed, which was said.
/// This process has mounts of its own, and one thread.
pub fn carry_out(disk: &File, plan: &Plan, root: &Path, packages: &Given) -> Result<bool> {
    // One device for each file system, however often it is mounted: two of one btrfs would be taken for two of its disks.
    let mut devices: BTreeMap<u64, LoopDevice> = BTreeMap::new();
    let mounts = || plan.mounts.iter().filter(|mount| !mount.is_fat());
    for mount in mounts() {
        let device = match devices.entry(mount.start) {
            Entry::Occupied(device) => device.into_mut(),
            Entry::Vacant(room) => {
                room.insert(LoopDevice::attach(disk, Extent::new(mount.start, mount.end), false)?)
            }
        };
        namespace::mount_beneath(device.path(), &mount.kind, root, &mount.point, &mount_options(mount))?;
    }
    let fixes = &plan.fixes;
    let done = namespace::confined(root, LIMITS, || in_the_box(fixes, packages))?;
    for fix in fixes.iter().filter(|fix| done && matches!(fix, Fix::Create { .. })) {
        // The box may not.
        labels::adopt(root, fix.path())?;
    }
    for mount in mounts().rev() {
        namespace::unmount(&root.join(mount.point.trim_start_matches('/')))?;
    }
    drop(devices);
    Ok(done)
}

/// What the kernel is told beside the guest's own options: XFS refuses a second file system of one UUID, and the host may
/// have the very original mounted.
fn mount_options(mount: &PlannedMount) -> String {
    match mount.kind.as_str() {
        "xfs" => "nouuid".to_owned(),
        _ => mount.options.clone(),
    }
}

/// The steps, in the guest's tree.
fn in_the_box(fixes: &[Fix], packages: &Given) -> bool {
    for fix in fixes {
        match steps::step(fix, packages) {
            Ok(done) => {
                if let Some(text) = done.warning {
                    Say::Warning { text }.send();
                }
                Say::Step { text: done.text }.send();
            }
            Err(error) => {
                Say::failed(&error).send();
                return false;
            }
        }
    }
    true
}
