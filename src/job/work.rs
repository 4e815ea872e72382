//! The folder of a job without a job's folder: beside its destination, gone when the job is.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::io::atomic::with_suffix;

/// The folder `D.haul-work` of what waits or is fixed for a destination `D`; removed when dropped, unless kept for a
/// resumed run.
pub struct WorkFolder {
    path: PathBuf,
    kept: Cell<bool>,
}

impl WorkFolder {
    /// Where the folder of `destination` is.
    pub fn path_beside(destination: &Path) -> PathBuf {
        with_suffix(destination, ".haul-work")
    }

    /// Makes the folder of `destination`; what an earlier run left in it counts only for a resumed one.
    pub fn beside(destination: &Path, resume: bool) -> Result<Self> {
        let path = Self::path_beside(destination);
        if !resume {
            let _ = fs::remove_dir_all(&path);
        }
        match fs::create_dir(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::new(
                    Kind::Destination,
                    "convert.folder",
                    format!("cannot make {}", path.display()),
                )
                .caused_by(error));
            }
            _ => {}
        }
        Ok(WorkFolder { path, kept: Cell::new(false) })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps it for a resumed run.
    pub fn keep(&self) {
        self.kept.set(true);
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        if !self.kept.get() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
