//! One disk or image into an image file.
//!
//! Beside the destination `D` live `D.haul-part`, the image so far, and `D.haul-journal`; both go when the job ends.

use std::cell::Cell;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::copy::{Copy, Settings, Target};
use super::fix;
use super::source::{self, Source};
use crate::error::{Error, Kind, Result};
use crate::guest;
use crate::image::{Format, Gate};
use crate::io::atomic::with_suffix;
use crate::layout;
use crate::manifest::Hex;
use crate::monitor::Monitor;
use crate::unit::Extent;
use crate::unit::bytes::human;

/// What to convert, and how.
pub struct Convert {
    /// A disk or an image file.
    pub source: PathBuf,
    /// The image file to make.
    pub destination: PathBuf,
    /// The source's format; probed when not given, but never for a block device.
    pub source_format: Option<Format>,
    /// Files an image may refer to.
    pub gate: Gate,
    /// How to copy.
    pub settings: Settings,
    /// Copy a disk that is in use: the copy may be torn, and the manifest says so.
    pub inconsistent: bool,
    /// Replace an existing destination.
    pub force: bool,
    /// Go on with an earlier run that was stopped.
    pub resume: bool,
    /// What fix-ups may do to the copy; none leaves it as the source is.
    pub fix: Option<guest::Options>,
    /// Worker threads.
    pub threads: usize,
}

/// What a conversion did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The image made.
    pub destination: PathBuf,
    /// Its manifest.
    pub manifest: PathBuf,
    /// Length of the virtual disk in bytes.
    pub size: u64,
    /// Length of the image in bytes.
    pub image_bytes: u64,
    /// Bytes of the copy in chunks that are not all zero.
    pub bytes: u64,
    /// Root over the source's chunks.
    pub source_root: Hex,
    /// Root over the copy's chunks.
    pub image_root: Hex,
    /// Where in the disk this run took up an earlier one; 0 for a run from the start.
    pub resumed_from: u64,
    /// Extents of the source that could not be read and are zero in the copy.
    pub unreadable: Vec<(u64, u64)>,
    /// Whether the source was in use while it was copied.
    pub inconsistent: bool,
    /// The fix-ups made in the copy, as a diff.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fixes: Option<String>,
}

/// Converts a disk or image as `job` says. On an error nothing is left but, after a pause, what `--resume` needs.
pub fn convert(job: &Convert, stop: &AtomicBool, monitor: &Arc<dyn Monitor>) -> Result<Report> {
    check_destination(job)?;
    let mut source = open(job, &**monitor)?;
    let mut fixes = None;
    // The overlay lives beside the destination, and goes with this value.
    let overlay = Overlay::beside(&job.destination, job.resume);
    if let Some(options) = &job.fix {
        overlay.make()?;
        let guest = guest::inspect(source.disk().clone())?;
        let plan = fix::plan(&guest, options, &**monitor)?;
        let (fixed, done) = fix::fix(source, plan, &overlay.folder, &**monitor)?;
        source = fixed;
        fixes = Some(done.plan.to_string());
    }
    let copy = Copy {
        source: &source,
        settings: job.settings,
        target: Target::File {
            part: with_suffix(&job.destination, ".haul-part"),
            name: job.destination.clone(),
        },
        journal: with_suffix(&job.destination, ".haul-journal"),
        manifest: with_suffix(&job.destination, ".manifest"),
        threads: job.threads,
    };
    let copied = match copy.run(job.resume, stop, monitor) {
        Ok(copied) => copied,
        Err(error) => {
            match error.kind() {
                Kind::Interrupted => overlay.keep(),
                _ => copy.discard(),
            }
            return Err(error);
        }
    };
    copy.clear();
    let head = copied.manifest.head;
    Ok(Report {
        destination: job.destination.clone(),
        manifest: copy.manifest,
        size: head.size,
        image_bytes: head.image_bytes,
        bytes: head.bytes,
        source_root: head.source_root,
        image_root: head.image_root,
        resumed_from: copied.resumed_from,
        unreadable: copied.unreadable,
        inconsistent: head.inconsistent,
        fixes,
    })
}

/// The folder of a conversion's overlay, `D.haul-fix`; removed when dropped, unless kept for a resumed run.
struct Overlay {
    folder: PathBuf,
    kept: Cell<bool>,
}

impl Overlay {
    /// The folder for `destination`; what an earlier run left in it counts only for a resumed one.
    fn beside(destination: &Path, resume: bool) -> Self {
        let overlay = Overlay { folder: with_suffix(destination, ".haul-fix"), kept: Cell::new(false) };
        if !resume {
            let _ = fs::remove_dir_all(&overlay.folder);
        }
        overlay
    }

    fn make(&self) -> Result<()> {
        fs::create_dir_all(&self.folder).map_err(|error| {
            Error::new(Kind::Destination, "fix.folder", format!("cannot make {}", self.folder.display()))
                .caused_by(error)
        })
    }

    fn keep(&self) {
        self.kept.set(true);
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if !self.kept.get() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

fn open(job: &Convert, monitor: &dyn Monitor) -> Result<Source> {
    let options = source::Options {
        format: job.source_format,
        gate: &job.gate,
        all_blocks: job.settings.all_blocks,
        inconsistent: job.inconsistent,
    };
    Source::open(&job.source, &options, monitor)
}

fn check_destination(job: &Convert) -> Result<()> {
    let Ok(existing) = fs::metadata(&job.destination) else { return Ok(()) };
    let refuse = |why: &str, remedy: &str| {
        Error::new(Kind::Usage, "convert.destination", format!("cannot write {}", job.destination.display()))
            .because(why)
            .remedy(remedy)
    };
    if !existing.is_file() {
        return Err(refuse("it is not a regular file", "name an image file"));
    }
    if fs::canonicalize(&job.destination).ok() == fs::canonicalize(&job.source).ok() {
        return Err(refuse("it is the source", "name another file: the source is never written"));
    }
    // A run that was killed between the name and the end of its journal has only the journal to remove.
    let resumed = job.resume && with_suffix(&job.destination, ".haul-journal").exists();
    if !job.force && !resumed {
        return Err(refuse("it exists", "name another file, or replace it with --force"));
    }
    Ok(())
}

/// What a conversion would do.
#[derive(Debug, Serialize)]
pub struct Plan {
    source: PathBuf,
    destination: PathBuf,
    size: u64,
    used_bytes: u64,
    volumes: Vec<String>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "would copy {} to {}", self.source.display(), self.destination.display())?;
        writeln!(f, "{} of {} are in use", human(self.used_bytes), human(self.size))?;
        self.volumes.iter().try_for_each(|volume| writeln!(f, "  {volume}"))
    }
}

/// Finds out what [`convert`] would do; writes nothing.
pub fn dry_run(job: &Convert, monitor: &dyn Monitor) -> Result<Plan> {
    check_destination(job)?;
    let source = open(job, monitor)?;
    Ok(Plan {
        source: job.source.clone(),
        destination: job.destination.clone(),
        size: source.size(),
        used_bytes: layout::count_used(source.used(), Extent::new(0, source.size()))?,
        volumes: source.volumes().to_vec(),
    })
}
