//! Disks and images by the names their users give them: opened for reading, from wherever they lie.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[cfg(feature = "net")]
use super::services::Services;
use crate::config::{Cloud, Location};
use crate::error::Result;
use crate::host::mounts::{self, Use};
use crate::image::{self, Format, Gate, Image, Info};
use crate::io::file::Identity;
use crate::io::{DiskFile, ReadAt};
use crate::monitor::Monitor;
#[cfg(feature = "net")]
use crate::store::{ObjectDisk, ObjectStore};
#[cfg(feature = "net")]
use crate::unit::MIB;

/// Bytes of an object kept in memory while it is read.
#[cfg(feature = "net")]
pub const OBJECT_CACHE: u64 = 64 * MIB;

/// What opening needs beside the name.
pub struct Opener {
    cloud: Cloud,
    stop: Arc<AtomicBool>,
    monitor: Arc<dyn Monitor>,
}

/// A disk, a file or an object, opened.
pub struct Opened {
    /// Its bytes as they lie there.
    pub file: Arc<dyn ReadAt>,
    origin: Origin,
}

enum Origin {
    File(Arc<DiskFile>),
    #[cfg(feature = "net")]
    Object {
        store: Arc<dyn ObjectStore>,
        key: String,
        identity: Identity,
    },
}

impl Opener {
    /// An opener that finds objects in `cloud`; a wait for the store ends when `stop` is set.
    pub fn new(cloud: &Cloud, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Self {
        Opener { cloud: cloud.clone(), stop: stop.clone(), monitor: monitor.clone() }
    }

    /// Opens what is at `location`.
    pub fn open(&self, location: &Location) -> Result<Opened> {
        match location {
            Location::File(path) => {
                let file = Arc::new(DiskFile::open(path)?);
                Ok(Opened { file: file.clone(), origin: Origin::File(file) })
            }
            #[cfg(feature = "net")]
            Location::Object(url) => {
                let store = Services::new(&self.cloud)?.store(&url.bucket, &self.stop, &self.monitor)?;
                let object = ObjectDisk::open(store.clone(), &url.key, OBJECT_CACHE)?;
                let identity = identity(&*store, &url.key, object.info());
                Ok(Opened {
                    file: Arc::new(object),
                    origin: Origin::Object { store, key: url.key.clone(), identity },
                })
            }
            #[cfg(not(feature = "net"))]
            Location::Object(url) => {
                let _ = (&self.cloud, &self.stop, &self.monitor);
                Err(crate::error::Error::new(
                    crate::error::Kind::Usage,
                    "usage.no-net",
                    format!("{url} cannot be opened"),
                )
                .because("this haul was built without the network"))
            }
        }
    }

    /// Opens the image at `location`.
    pub fn image(&self, location: &Location, format: Option<Format>, gate: &Gate) -> Result<Image> {
        self.open(location)?.image(format, gate)
    }
}

impl Opened {
    /// What tells this state of it from another: asked for anew each time.
    pub fn identity(&self) -> Result<Identity> {
        match &self.origin {
            Origin::File(file) => file.identity(),
            #[cfg(feature = "net")]
            Origin::Object { store, key, identity: known } => {
                Ok(store.head(key)?.map_or_else(|| known.clone(), |info| identity(&**store, key, &info)))
            }
        }
    }

    /// Its path, if it is a file or a device.
    pub fn path(&self) -> Option<&Path> {
        match &self.origin {
            Origin::File(file) => Some(file.path()),
            #[cfg(feature = "net")]
            Origin::Object { .. } => None,
        }
    }

    /// Who on this machine may write to it.
    pub fn uses(&self) -> Result<Vec<Use>> {
        self.path().map_or_else(|| Ok(Vec::new()), mounts::in_use)
    }

    /// The format to take it for when its user named none: a device is raw, since a disk's content must not decide
    /// how the disk is read; everything else is probed.
    fn format(&self, named: Option<Format>) -> Option<Format> {
        let device = match &self.origin {
            Origin::File(file) => file.is_device(),
            #[cfg(feature = "net")]
            Origin::Object { .. } => false,
        };
        named.or(device.then_some(Format::Raw))
    }

    /// The image in it.
    pub fn image(&self, format: Option<Format>, gate: &Gate) -> Result<Image> {
        image::open_on(self.file.clone(), self.format(format), gate)
    }

    /// What the image in it is, even if it is one that [`Opened::image`] refuses.
    pub fn inspect(&self, format: Option<Format>) -> Result<Info> {
        image::inspect(&*self.file, self.format(format))
    }
}

/// An object has no inode and no time of change that can be trusted: its entity tag changes with its content.
#[cfg(feature = "net")]
fn identity(store: &dyn ObjectStore, key: &str, info: &crate::store::ObjectInfo) -> Identity {
    Identity {
        path: format!("{} {}", store.name(key), info.etag),
        size: info.size,
        node: (0, 0),
        modified: 0,
    }
}
