//! A trial boot with a look inside: the guest's disk with a script of ours on top, which is thrown away afterwards.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::guest::linux::probe;
use crate::guest::{self, Executor, Plan, Setup};
use crate::image::overlay::Overlay;
use crate::io::ReadAt;
use crate::monitor::{Monitor, Tally};

pub use crate::guest::linux::probe::{Inside, MARKER};

/// `disk`, whose guest says how it came up, after it has run `script`. What is on top of it has no name any more when this
/// returns: it goes with the last use of it, however that ends. Needs root, FUSE and loop devices.
pub fn probed(disk: Arc<dyn ReadAt>, script: Option<&str>, monitor: &dyn Monitor) -> Result<Arc<dyn ReadAt>> {
    let plan = probe::plan(&guest::inspect(Arc::clone(&disk))?, script)?;
    monitor.begin("look inside", None);
    let folder = std::env::temp_dir().join(format!("haul-boot-{}", std::process::id()));
    make(&folder)?;
    let overlay = on_top(disk, &plan, &folder);
    // What cannot be removed lies in a folder for such things.
    let _ = fs::remove_dir_all(&folder);
    overlay
}

fn on_top(disk: Arc<dyn ReadAt>, plan: &Plan, folder: &Path) -> Result<Arc<dyn ReadAt>> {
    let overlay = Arc::new(Overlay::create(disk, &folder.join("overlay"))?);
    let mounts = folder.join("fix");
    make(&mounts)?;
    // Its steps are of no interest.
    let setup = Setup { executor: Executor::Host, ..Setup::new(mounts) };
    guest::apply(plan, &overlay, &setup, &Tally::default())?;
    Ok(overlay)
}

fn make(folder: &Path) -> Result<()> {
    fs::DirBuilder::new().mode(0o700).create(folder).map_err(|error| {
        Error::new(Kind::Destination, "boot.folder", format!("cannot make {}", folder.display()))
            .remedy("remove it, where an earlier haul was killed and left it")
            .caused_by(error)
    })
}
