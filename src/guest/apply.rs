//! Carries out a plan on an overlay: on the disk itself and in FAT by haul, in other file systems by a kernel, be it this
//! machine's or that of an appliance.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk;
use super::extended::Extended;
use super::fat;
use super::hook;
use super::inspect::inspect;
use super::partition;
use super::plan::{Fix, Plan, changed};
use super::steps;
use super::tree::Node;
use super::{appliance, by_host};
use crate::error::{Error, Kind, Result};
use crate::host::export;
use crate::image::overlay::{Overlay, Sealed};
use crate::io::ReadAt;
use crate::monitor::{Level, Monitor};
use crate::unit::{Extent, fault};

/// What applying needs of its surroundings.
#[derive(Clone, Debug)]
pub struct Setup {
    /// An empty folder of haul's own; mount points lie in it.
    pub folder: PathBuf,
    /// The `haul` program, which starts itself again.
    pub program: PathBuf,
    /// Whose kernel mounts the copy's file systems.
    pub executor: Executor,
}

/// Whose kernel mounts a copy's file systems, and runs the guest's programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executor {
    /// This machine's.
    Host,
    /// The guest's own, in a virtual machine.
    Appliance,
}

impl Executor {
    /// This machine's where it can.
    pub fn fitting() -> Self {
        let can = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
        if can { Executor::Host } else { Executor::Appliance }
    }
}

impl Setup {
    /// `folder`, the running program, and the kernel that fits.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Setup { folder: folder.into(), program: "/proc/self/exe".into(), executor: Executor::fitting() }
    }
}

/// Carries out `plan` on `overlay` and seals it. By this machine's kernel it needs
/// root, FUSE and loop devices; by an appliance QEMU. A plan with nothing to do
/// seals the overlay as it is. Fails without sealing when any step fails.
pub fn apply(plan: &Plan, overlay: &Arc<Overlay>, setup: &Setup, monitor: &dyn Monitor) -> Result<Sealed> {
    if plan.is_empty() || overlay.is_sealed() {
        return overlay.seal();
    }
    monitor.begin("fix", None);
    let shown = Extended::new(Arc::clone(overlay), &(Arc::clone(overlay) as Arc<dyn ReadAt>))?;
    let shown: Arc<dyn export::Disk> = Arc::new(shown);
    let all = || plan.fixes.iter();
    for fix in all() {
        if let Fix::Partition { start, end, purpose, .. } = fix {
            let text = partition::add(&shown, Extent::new(*start, *end), *purpose)?;
            monitor.note(Level::Info, &text);
        }
    }
    let on_disk = |fix: &Fix| matches!(fix, Fix::Partition { .. } | Fix::BootSector { .. });
    let fixes: Vec<Fix> = all().filter(|fix| !on_disk(fix) && plan.fat_of(fix).is_none()).cloned().collect();
    if !fixes.is_empty() {
        let plan = Plan { fixes, mounts: plan.mounts.clone(), ..Plan::default() };
        match setup.executor {
            Executor::Host => by_host::carry_out(&plan, &shown, setup, monitor)?,
            Executor::Appliance => {
                let guest = inspect(Arc::clone(overlay) as Arc<dyn ReadAt>)?;
                appliance::carry_out(&plan, &guest, &shown, setup, monitor)?;
            }
        }
    }
    for fix in all() {
        let text = match (fix, plan.fat_of(fix)) {
            (Fix::BootSector { core, start, end, .. }, _) => {
                let extent = Extent::new(*start, *end);
                let boot = in_tree(overlay, &beside(core, "boot.img"))?;
                partition::write_boot_sector(&*shown, extent, &boot, &in_tree(overlay, core)?)?;
                format!("put {core} where a BIOS looks")
            }
            (Fix::Append { kernel, image, modules, .. }, Some(mount)) => {
                // The modules are in another file system.
                let guest = inspect(Arc::clone(overlay) as Arc<dyn ReadAt>)?;
                let Some(Node::File(len)) = guest.tree.node(image)? else { return Err(changed(image)) };
                let open = |path: &str| guest.tree.open(path);
                let bytes = hook::appendix(kernel, image, len, modules, &open)?;
                fat::append(&shown, mount, image, len, &bytes)?;
                steps::appended(image)
            }
            (Fix::Copy { from, path, .. }, Some(mount)) if !from.starts_with(&mount.point) => {
                fat::put(&shown, mount, path, &in_tree(overlay, from)?)?;
                format!("copied {from} to {path}")
            }
            (_, Some(mount)) => fat::step(&shown, mount, fix)?,
            _ => continue,
        };
        monitor.note(Level::Info, &text);
    }
    fault::point("fix");
    let sealed = overlay.seal();
    fault::point("fix");
    sealed
}

/// `path` in haul's own folder cannot be used.
pub(super) fn folder_error(path: &Path, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "guest.folder", format!("cannot use {}", path.display())).caused_by(error)
}

/// The boot loader's file at `path`, as it is in the copy by now.
fn in_tree(overlay: &Arc<Overlay>, path: &str) -> Result<Vec<u8>> {
    let tree = disk::open(Arc::clone(overlay) as Arc<dyn ReadAt>)?.tree;
    let stream = tree.open(path)?.ok_or_else(|| changed(path))?;
    let mut bytes = Vec::new();
    stream.take(fat::MAX_FILE).read_to_end(&mut bytes).map_err(|error| {
        Error::new(Kind::Image, "guest.read", format!("cannot read the copy's {path}")).caused_by(error)
    })?;
    Ok(bytes)
}

fn beside(path: &str, name: &str) -> String {
    format!("{}/{name}", path.rsplit_once('/').map_or("", |(folder, _)| folder))
}
