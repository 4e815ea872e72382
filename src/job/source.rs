//! A job's source: opened, found not to be in use, and mapped.

use std::sync::Arc;

use super::open::Opened;
use crate::error::{Error, Kind, Result};
use crate::image::{Format, Gate, Image, Info};
use crate::io::ReadAt;
use crate::io::file::Identity;
use crate::layout::{self, Usage};
use crate::monitor::{Level, Monitor};
use crate::source::{Amended, BlockSource, OnReadError, UsedView};
use crate::unit::extents::Intersection;
use crate::unit::{Extent, ExtentMap, Extents};

/// A source opened, with the bytes of it that count, and what fix-ups change.
pub struct Source {
    opened: Opened,
    identity: Identity,
    image: Image,
    used: Arc<dyn Extents>,
    volumes: Vec<String>,
    in_use: bool,
    amended: Option<(Arc<dyn ReadAt>, ExtentMap)>,
}

/// How to open a source.
pub struct Options<'a> {
    /// Its format; probed when not given, but never for a block device.
    pub format: Option<Format>,
    /// Files an image may refer to.
    pub gate: &'a Gate,
    /// Copy blocks that no file system uses, too.
    pub all_blocks: bool,
    /// Copy a disk that is in use: the copy may be torn, and the manifest says so.
    pub inconsistent: bool,
}

impl Source {
    /// Finds out what is used of the disk or image in `opened`.
    pub fn open(opened: Opened, options: &Options<'_>, monitor: &dyn Monitor) -> Result<Self> {
        let name = opened.file.name();
        let uses = opened.uses()?;
        if let (Some(first), false) = (uses.first(), options.inconsistent) {
            return Err(Error::new(Kind::Source, "source.in-use", format!("{name} is in use"))
                .because(first.to_string())
                .remedy(
                    "unmount it or mount it read-only; --inconsistent copies it as it stands, possibly torn",
                ));
        }
        for used in &uses {
            monitor.note(Level::Warning, &format!("{name} is copied while in use: {used}"));
        }
        let identity = opened.identity()?;
        let image = opened.image(options.format, options.gate)?;
        let disk = image.disk.clone();
        let (used, volumes): (Arc<dyn Extents>, _) = if options.all_blocks {
            (Arc::new(Extent::new(0, disk.size())), vec!["every block was asked for".to_owned()])
        } else {
            let used = layout::used_map(disk)?;
            let volumes = used.volumes().iter().map(describe).collect();
            (Arc::new(used), volumes)
        };
        Ok(Source { opened, identity, image, used, volumes, in_use: !uses.is_empty(), amended: None })
    }

    /// The same source, with `disk` to be copied in its place where `extents` say it differs.
    #[must_use]
    pub fn amend(mut self, disk: Arc<dyn ReadAt>, extents: ExtentMap) -> Self {
        self.amended = Some((disk, extents));
        self
    }

    /// The same source, of which only what lies in `extents` is copied.
    #[must_use]
    pub fn restricted(mut self, extents: &ExtentMap) -> Self {
        self.used = Arc::new(Intersection(self.used, extents.clone()));
        self
    }

    /// A finished copy that `opened` holds as its own source: `disk`, of which `extents` are copied.
    pub fn of_copy(opened: Opened, disk: Arc<dyn ReadAt>, extents: ExtentMap) -> Result<Self> {
        let info = Info::raw(&disk);
        Ok(Source {
            identity: opened.identity()?,
            opened,
            image: Image { disk, format: Format::Raw, info },
            used: Arc::new(extents),
            volumes: Vec::new(),
            in_use: false,
            amended: None,
        })
    }

    /// The disk as a copy holds it: what is not in use reads as zeroes.
    pub fn view(&self) -> UsedView {
        UsedView::new(self.image.disk.clone(), self.used.clone())
    }

    /// What to call it.
    pub fn name(&self) -> String {
        self.opened.file.name()
    }

    /// The virtual disk.
    pub fn disk(&self) -> &Arc<dyn ReadAt> {
        &self.image.disk
    }

    /// Length of the virtual disk in bytes.
    pub fn size(&self) -> u64 {
        self.image.disk.size()
    }

    /// The bytes in use.
    pub fn used(&self) -> &Arc<dyn Extents> {
        &self.used
    }

    /// What the disk consists of, a line each.
    pub fn volumes(&self) -> &[String] {
        &self.volumes
    }

    /// Whether it was in use when it was opened.
    pub fn in_use(&self) -> bool {
        self.in_use
    }

    /// What tells this state of the source from another.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Where the copy will differ from the source.
    pub fn amended(&self) -> &ExtentMap {
        const NOWHERE: &ExtentMap = &ExtentMap::new();
        self.amended.as_ref().map_or(NOWHERE, |(_, extents)| extents)
    }

    /// An image of it is at most so many bytes long: the disk, and a hundredth for tables.
    pub fn bound(&self) -> u64 {
        self.size() + self.size() / 100 + (1 << 20)
    }

    /// The source as the pipeline reads it.
    pub fn blocks(&self, on_read_error: OnReadError) -> BlockSource {
        let blocks = BlockSource::new(self.image.disk.clone(), self.used.clone(), on_read_error);
        match &self.amended {
            Some((disk, extents)) => blocks.amended(Amended { disk: disk.clone(), extents: extents.clone() }),
            None => blocks,
        }
    }

    /// Fails when the source is not what it was when it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        if self.in_use || self.opened.identity()? == self.identity {
            return Ok(());
        }
        Err(Error::new(
            Kind::Source,
            "source.changed",
            format!("{} changed while it was copied", self.name()),
        )
        .because("its size, time of change or entity tag is not what it was at the start")
        .remedy("stop whatever writes to it, then run the command again"))
    }
}

fn describe(volume: &layout::Volume) -> String {
    let place = match (&volume.logical, volume.partition) {
        (Some(name), _) => name.clone(),
        (None, Some(number)) => format!("partition {number}"),
        (None, None) => "disk".to_owned(),
    };
    let usage = match &volume.usage {
        Usage::Mapped { used_bytes } => format!("{used_bytes} bytes used"),
        Usage::Whole { reason } => format!("copied whole: {reason}"),
    };
    format!("{place} {:?}: {}, {usage}", volume.extent, volume.content.name())
}
