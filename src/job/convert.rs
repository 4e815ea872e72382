//! One disk or image into an image: a file or an object.
//!
//! Beside a destination file `D` live `D.haul-part`, the image so far, and `D.haul-journal`; both go when the job ends.
//! Beside an object's name, in the current folder, lie its journal and what of it must wait. What a stream needs
//! meanwhile lies where streams are unpacked.

use std::fmt;
use std::fs;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::copy::{Copy, Settings, Target};
use super::fix;
use super::open::{Opened, Opener, scratch};
use super::round;
#[cfg(feature = "net")]
use super::services::Services;
use super::source::{self, Source};
use super::work::WorkFolder;
use crate::config::{Cloud, Location};
use crate::error::{Error, Kind, Result};
use crate::guest;
use crate::image::{Format, Gate};
use crate::io::atomic::{folder_of, with_suffix};
use crate::layout;
use crate::manifest::Hex;
use crate::monitor::{Level, Monitor};
use crate::unit::bytes::human;
use crate::unit::{Extent, MIB};

/// What to convert, and how.
pub struct Convert {
    /// A disk or an image.
    pub source: Location,
    /// The image to make.
    pub destination: Location,
    /// Where objects are.
    pub cloud: Cloud,
    /// The source's format; probed when not given, but never for a block device.
    pub source_format: Option<Format>,
    /// The member of an archive that holds the image; needed only where more than one may.
    pub member: Option<String>,
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
    /// Where to write the manifest, if not beside the destination; a stream has one only if it is named.
    pub manifest: Option<PathBuf>,
    /// Worker threads.
    pub threads: usize,
}

/// What a conversion did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The image made.
    pub destination: Location,
    /// Its manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<PathBuf>,
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
pub fn convert(job: &Convert, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<Report> {
    let beside = job.beside();
    let target = target(job, stop, monitor)?;
    let mut source = open(job, stop, monitor)?;
    note_moved_end(job, &source, &**monitor);
    let mut fixes = None;
    // What waits or is fixed lies beside the destination, and goes with this value.
    let work = WorkFolder::beside(&beside, job.resume)?;
    if let Some(options) = &job.fix {
        let guest = guest::inspect(source.disk().clone())?;
        let plan = fix::plan(&guest, options, &**monitor)?;
        let (fixed, done) = fix::fix(source, plan, options.executor(), work.path(), &**monitor)?;
        source = fixed;
        fixes = Some(done.plan.to_string());
    }
    let copy = Copy {
        source: &source,
        settings: job.settings,
        target,
        journal: with_suffix(&beside, ".haul-journal"),
        manifest: job.manifest.clone().unwrap_or_else(|| with_suffix(&beside, ".manifest")),
        threads: job.threads,
        base: None,
    };
    let streamed = matches!(copy.target, Target::Pipe(_));
    let copied = match copy.run(job.resume, stop, monitor) {
        Ok(copied) => copied,
        Err(error) => {
            let passing = matches!(error.kind(), Kind::Network | Kind::Credentials) && job.is_remote();
            match error.kind() {
                Kind::Interrupted => work.keep(),
                _ if passing => work.keep(),
                _ => copy.discard(),
            }
            return Err(error);
        }
    };
    copy.clear();
    round::forget(&beside);
    let mut manifest = Some(copy.manifest);
    if streamed && job.manifest.is_none() {
        manifest.take().map(fs::remove_file);
    }
    let head = copied.manifest.head;
    Ok(Report {
        destination: job.destination.clone(),
        manifest,
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

fn open(job: &Convert, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<Source> {
    let options = source::Options {
        format: job.source_format,
        gate: &job.gate,
        all_blocks: job.settings.all_blocks,
        inconsistent: job.inconsistent,
    };
    Source::open(job.open_source(stop, monitor)?, &options, &**monitor)
}

/// Says so where rounding the disk up leaves its backup GPT before the last sector.
fn note_moved_end(job: &Convert, source: &Source, monitor: &dyn Monitor) {
    let added = source.size().next_multiple_of(MIB) - source.size();
    let is_gpt = || {
        let table = layout::read_table(&**source.disk()).ok().flatten();
        table.is_some_and(|table| table.kind == layout::TableKind::Gpt)
    };
    if job.settings.format == Format::Vhd && added > 0 && is_gpt() {
        let text = format!(
            "the copy is {added} bytes longer than the source, since clouds want whole MiB of a VHD: its backup GPT is \
             before the last sector, until `sgdisk -e` in the guest moves it"
        );
        monitor.note(Level::Info, &text);
    }
}

impl Convert {
    /// The path beside which manifest, journal and overlay lie: the destination, or for an object its name in the
    /// current folder.
    fn beside(&self) -> PathBuf {
        match &self.destination {
            Location::Stdout | Location::Null => scratch().join(format!("haul-{}", std::process::id())),
            other => round::beside(other),
        }
    }

    /// Opens the source, out of what it is wrapped in.
    pub fn open_source(&self, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<Opened> {
        let opener = Opener::new(&self.cloud, stop, monitor).member(self.member.as_deref());
        // Where there is room for the image, there is more likely room for the file it is made from.
        let opener = match self.destination.path() {
            Some(path) => opener.scratch(folder_of(path)),
            None => opener,
        };
        opener.unwrapped(&self.source, self.source_format)
    }

    fn refuse(&self, why: &str, remedy: &str) -> Error {
        Error::new(Kind::Usage, "convert.destination", format!("cannot write {}", self.destination))
            .because(why)
            .remedy(remedy)
    }

    fn is_remote(&self) -> bool {
        matches!(self.destination, Location::Object(_))
    }

    fn is_resumed(&self) -> bool {
        self.resume && with_suffix(&self.beside(), ".haul-journal").exists()
    }
}

/// The target, which must be new or allowed to be replaced.
fn target(job: &Convert, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<Target> {
    if job.resume && matches!(job.destination, Location::Stdout | Location::Null) {
        return Err(job.refuse("a stream cannot be resumed", "leave --resume out"));
    }
    match &job.destination {
        Location::Null => Ok(Target::Pipe(None)),
        Location::Stdout => {
            let stdout = std::io::stdout();
            if stdout.is_terminal() {
                return Err(job.refuse("it is a terminal", "send the image into a file or another program"));
            }
            let out = stdout.as_fd().try_clone_to_owned();
            let out = out.map_err(|error| job.refuse(&error.to_string(), "name a file"))?;
            Ok(Target::Pipe(Some(out.into())))
        }
        Location::Nbd(_) => Err(job.refuse("NBD exports are only read", "name a file or an object")),
        Location::File(path) => {
            check_file(job, path)?;
            Ok(Target::File { part: with_suffix(path, ".haul-part"), name: path.clone() })
        }
        #[cfg(feature = "net")]
        Location::Object(url) => {
            let store = Services::new(&job.cloud)?.store(&url.bucket, stop, monitor)?;
            if job.source == job.destination {
                return Err(
                    job.refuse("it is the source", "name another object: the source is never written")
                );
            }
            if !job.force && !job.is_resumed() && store.head(&url.key)?.is_some() {
                return Err(job.refuse("it exists", "name another object, or replace it with --force"));
            }
            Ok(Target::Object { store, key: url.key.clone(), folder: WorkFolder::path_beside(&job.beside()) })
        }
        #[cfg(not(feature = "net"))]
        Location::Object(_) => {
            let _ = (stop, monitor);
            Err(job.refuse("this haul was built without the network", "name a file"))
        }
    }
}

fn check_file(job: &Convert, path: &Path) -> Result<()> {
    let Ok(existing) = fs::metadata(path) else { return Ok(()) };
    if !existing.is_file() {
        return Err(job.refuse("it is not a regular file", "name an image file"));
    }
    let source = job.source.path().and_then(|source| fs::canonicalize(source).ok());
    if source.is_some() && fs::canonicalize(path).ok() == source {
        return Err(job.refuse("it is the source", "name another file: the source is never written"));
    }
    // A run that was killed between the name and the end of its journal has only the journal to remove.
    if !job.force && !job.is_resumed() {
        return Err(job.refuse("it exists", "name another file, or replace it with --force"));
    }
    Ok(())
}

/// What a conversion would do.
#[derive(Debug, Serialize)]
pub struct Plan {
    source: Location,
    destination: Location,
    size: u64,
    used_bytes: u64,
    volumes: Vec<String>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "would copy {} to {}", self.source, self.destination)?;
        writeln!(f, "{} of {} are in use", human(self.used_bytes), human(self.size))?;
        self.volumes.iter().try_for_each(|volume| writeln!(f, "  {volume}"))
    }
}

/// Finds out what [`convert`] would do; writes nothing.
pub fn dry_run(job: &Convert, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<Plan> {
    target(job, stop, monitor)?;
    let source = open(job, stop, monitor)?;
    Ok(Plan {
        source: job.source.clone(),
        destination: job.destination.clone(),
        size: source.size(),
        used_bytes: layout::count_used(source.used(), Extent::new(0, source.size()))?,
        volumes: source.volumes().to_vec(),
    })
}
