//! Disks and images by the names their users give them: opened for reading, from wherever they lie and out of
//! whatever they are wrapped in.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[cfg(feature = "net")]
use super::services::Services;
use super::wait;
use crate::config::{Cloud, Location};
use crate::error::{Error, Kind, Result};
use crate::host::mounts::{self, Use};
use crate::image::{self, Format, Gate, Image, Info, archive};
use crate::io::file::Identity;
use crate::io::{DiskFile, ReadAt, nbd};
use crate::monitor::{Level, Monitor};
#[cfg(feature = "net")]
use crate::store::{ObjectDisk, ObjectStore};
use crate::unit::TIB;
#[cfg(feature = "net")]
use crate::unit::{KIB, MIB};

/// Bytes of an object kept in memory while it is read.
#[cfg(feature = "net")]
pub const OBJECT_CACHE: u64 = 64 * MIB;
/// The largest file that a compressed stream may become.
const UNPACKED: u64 = 64 * TIB;

/// What opening needs beside the name.
pub struct Opener {
    cloud: Cloud,
    stop: Arc<AtomicBool>,
    monitor: Arc<dyn Monitor>,
    member: Option<String>,
    scratch: PathBuf,
    #[cfg(feature = "net")]
    object_block: u64,
}

/// A disk, a file or an object, opened.
pub struct Opened {
    /// The file, as it lies there or was taken out of an archive.
    pub file: Arc<dyn ReadAt>,
    origin: Origin,
    /// Whether it was taken out of something.
    unwrapped: bool,
}

enum Origin {
    File(Arc<DiskFile>),
    /// An export cannot be told from another state of it: only its size is known.
    Nbd(Arc<nbd::Client>),
    #[cfg(feature = "net")]
    Object {
        store: Arc<dyn ObjectStore>,
        key: String,
        identity: Identity,
    },
}

/// The folder for what is large and temporary: not /tmp, which lies in memory on many a server.
pub fn scratch() -> PathBuf {
    std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into()).into()
}

impl Opener {
    /// An opener that finds objects in `cloud`; a wait for the store ends when `stop` is set.
    pub fn new(cloud: &Cloud, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Self {
        Opener {
            cloud: cloud.clone(),
            stop: stop.clone(),
            monitor: monitor.clone(),
            member: None,
            scratch: scratch(),
            #[cfg(feature = "net")]
            object_block: MIB,
        }
    }

    /// The same, for reads that are few and far between: an object is fetched in pieces of 64 KiB.
    #[must_use]
    pub fn scattered(self) -> Self {
        Opener {
            #[cfg(feature = "net")]
            object_block: 64 * KIB,
            ..self
        }
    }

    /// The same, which takes `member` out of an archive.
    #[must_use]
    pub fn member(mut self, member: Option<&str>) -> Self {
        self.member = member.map(str::to_owned);
        self
    }

    /// The same, which unpacks streams in `folder`, into files without a name; else in `$TMPDIR`, or `/var/tmp`.
    #[must_use]
    pub fn scratch(mut self, folder: &Path) -> Self {
        folder.clone_into(&mut self.scratch);
        self
    }

    /// Opens what is at `location`, as it lies there.
    pub fn open(&self, location: &Location) -> Result<Opened> {
        match location {
            Location::File(path) => {
                let file = Arc::new(DiskFile::open(path)?);
                Ok(Opened { file: file.clone(), origin: Origin::File(file), unwrapped: false })
            }
            Location::Nbd(uri) => {
                let client = Arc::new(nbd::Client::connect_with(uri, self.patience())?);
                Ok(Opened { file: client.clone(), origin: Origin::Nbd(client), unwrapped: false })
            }
            Location::Stdout | Location::Null => {
                Err(Error::new(Kind::Usage, "usage.source", format!("{location} cannot be read"))
                    .because("a source is read at any offset")
                    .remedy("name a disk, a file, an object or an NBD export; a file of that name is ./-"))
            }
            #[cfg(feature = "net")]
            Location::Object(url) => {
                let store = Services::new(&self.cloud)?.store(&url.bucket, &self.stop, &self.monitor)?;
                let object = ObjectDisk::in_blocks(store.clone(), &url.key, OBJECT_CACHE, self.object_block)?;
                let identity = identity(&*store, &url.key, object.info());
                Ok(Opened {
                    file: Arc::new(object),
                    origin: Origin::Object { store, key: url.key.clone(), identity },
                    unwrapped: false,
                })
            }
            #[cfg(not(feature = "net"))]
            Location::Object(url) => {
                let _ = (&self.cloud, &self.stop, &self.monitor);
                Err(Error::new(Kind::Usage, "usage.no-net", format!("{url} cannot be opened"))
                    .because("this haul was built without the network"))
            }
        }
    }

    /// How an NBD server is waited for: a wait ends when the job is stopped, and is told of.
    fn patience(&self) -> nbd::Options {
        let (stop, monitor) = (self.stop.clone(), self.monitor.clone());
        let pause = move |error: &Error, pause: Duration| {
            if !pause.is_zero() {
                monitor.note(Level::Info, &format!("{error}; again in {:.1} s", pause.as_secs_f64()));
            }
            wait(pause, &stop)
        };
        nbd::Options { pause: Arc::new(pause), ..nbd::Options::default() }
    }

    /// Opens what is at `location` and takes it out of the archives and compressed streams it is in. What is or is
    /// said to be raw is not looked into.
    pub fn unwrapped(&self, location: &Location, format: Option<Format>) -> Result<Opened> {
        let mut opened = self.open(location)?;
        if opened.format(format) == Some(Format::Raw) && self.member.is_none() {
            return Ok(opened);
        }
        let options = archive::Options {
            member: self.member.as_deref(),
            scratch: &self.scratch,
            limit: UNPACKED,
            progress: &|progress| {
                if self.stop.load(Ordering::Relaxed) {
                    return Err(Error::new(Kind::Interrupted, "interrupted", "unpacking was stopped"));
                }
                if progress.unpacked <= archive::READ {
                    self.monitor.begin("unpack", Some(progress.of));
                }
                self.monitor.advance(progress.read);
                Ok(())
            },
        };
        let inner = archive::open(opened.file, &options)?;
        for layer in &inner.layers {
            self.monitor.note(Level::Info, &format!("{location}: {layer}"));
        }
        opened.unwrapped = !inner.layers.is_empty();
        opened.file = inner.disk;
        Ok(opened)
    }

    /// Opens the image at `location`.
    pub fn image(&self, location: &Location, format: Option<Format>, gate: &Gate) -> Result<Image> {
        self.unwrapped(location, format)?.image(format, gate)
    }
}

impl Opened {
    /// What tells this state of it from another: asked for anew each time.
    pub fn identity(&self) -> Result<Identity> {
        match &self.origin {
            Origin::File(file) => file.identity(),
            Origin::Nbd(client) => {
                Ok(Identity { path: client.name(), size: client.size(), ..Identity::default() })
            }
            #[cfg(feature = "net")]
            Origin::Object { store, key, identity: known } => {
                Ok(store.head(key)?.map_or_else(|| known.clone(), |info| identity(&**store, key, &info)))
            }
        }
    }

    /// Whether it was taken out of an archive or stream.
    pub fn is_unwrapped(&self) -> bool {
        self.unwrapped
    }

    /// Its path, if it is a file or a device.
    pub fn path(&self) -> Option<&Path> {
        match &self.origin {
            Origin::File(file) => Some(file.path()),
            _ => None,
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
            _ => false,
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
