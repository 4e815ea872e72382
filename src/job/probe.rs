//! A trial boot with a look inside: the guest's disk with a script of ours on top, which is thrown away afterwards.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::guest::linux::probe;
use crate::guest::{self, Setup};
use crate::image::overlay::Overlay;
use crate::io::ReadAt;
use crate::monitor::{Monitor, Tally};

pub use crate::guest::linux::probe::{Inside, MARKER};

/// The disk to boot; what is on top of it goes when this is dropped.
pub struct Probed {
    /// The disk as the guest is to see it.
    pub disk: Arc<dyn ReadAt>,
    folder: PathBuf,
}

impl Probed {
    /// `disk`, whose guest says how it came up, after it has run `script`. Needs root, FUSE and loop devices.
    pub fn new(disk: Arc<dyn ReadAt>, script: Option<&str>, monitor: &dyn Monitor) -> Result<Self> {
        let plan = probe::plan(&guest::inspect(Arc::clone(&disk))?, script)?;
        let folder = std::env::temp_dir().join(format!("haul-boot-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&folder).map_err(|error| {
            Error::new(Kind::Destination, "boot.folder", format!("cannot make {}", folder.display()))
                .caused_by(error)
        })?;
        let mut probed = Probed { disk: Arc::clone(&disk), folder };
        let overlay = Arc::new(Overlay::create(disk, &probed.folder.join("overlay"))?);
        let mounts = probed.folder.join("fix");
        fs::create_dir(&mounts).map_err(|error| {
            Error::new(Kind::Destination, "boot.folder", format!("cannot make {}", mounts.display()))
                .caused_by(error)
        })?;
        monitor.begin("look inside", None);
        // Its steps are of no interest.
        guest::apply(&plan, &overlay, &Setup::new(mounts), &Tally::default())?;
        probed.disk = overlay;
        Ok(probed)
    }
}

impl Drop for Probed {
    fn drop(&mut self) {
        // What cannot be removed lies in a folder for such things.
        let _ = fs::remove_dir_all(&self.folder);
    }
}
