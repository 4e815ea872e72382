//! One disk or image into an image file: read what is used, write it under a temporary name, seal, rename.
//!
//! Beside the destination `D` live `D.haul-part`, the image so far, and `D.haul-journal`; both go when the job ends.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::host::mounts;
use crate::image::{self, Compress, Format, Gate, Image};
use crate::io::atomic::{self, with_suffix};
use crate::io::batch::{Encoder, Geometry};
use crate::io::file::Identity;
use crate::io::{DiskFile, OutFile};
use crate::layout::{self, Usage};
use crate::manifest::journal::{Journal, Record};
use crate::manifest::survey::Survey;
use crate::manifest::{Head, Hex, Manifest, Sealer};
use crate::monitor::{Level, Monitor};
use crate::pipeline;
use crate::sink::image_file::ImageFile;
use crate::sink::{ImageSink, Sealed, Sink};
use crate::source::{BlockSource, OnReadError};
use crate::unit::bytes::human;
use crate::unit::{Extent, ExtentMap, Extents};

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
    /// The destination's format.
    pub format: Format,
    /// Compression of the destination.
    pub compress: Compress,
    /// Copy blocks that no file system uses, too.
    pub all_blocks: bool,
    /// Copy a disk that is in use: the copy may be torn, and the manifest says so.
    pub inconsistent: bool,
    /// Replace an existing destination.
    pub force: bool,
    /// Go on with an earlier run that was stopped.
    pub resume: bool,
    /// What to do about unreadable sectors.
    pub on_read_error: OnReadError,
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
    /// Extents of the source that could not be read and are zero in the copy.
    pub unreadable: Vec<(u64, u64)>,
    /// Whether the source was in use while it was copied.
    pub inconsistent: bool,
}

/// The part of a job that a resumed run must share with the run it continues; kept in the journal.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Parameters {
    source: Identity,
    format: Format,
    compress: Compress,
    all_blocks: bool,
    on_read_error: OnReadError,
    size: u64,
}

/// The files of a job beside its destination.
struct Files {
    part: PathBuf,
    journal: PathBuf,
    manifest: PathBuf,
}

impl Files {
    fn of(destination: &Path) -> Self {
        Files {
            part: with_suffix(destination, ".haul-part"),
            journal: with_suffix(destination, ".haul-journal"),
            manifest: with_suffix(destination, ".manifest"),
        }
    }

    /// Removes what an unfinished job left. Nothing else refers to it.
    fn remove_unfinished(&self) {
        for path in [&self.part, &self.journal] {
            let _ = fs::remove_file(path);
        }
    }
}

/// A source opened, with the bytes of it that count.
pub struct Source {
    file: DiskFile,
    identity: Identity,
    image: Image,
    used: Arc<dyn Extents>,
    volumes: Vec<String>,
    in_use: bool,
}

impl Source {
    /// Opens the source of `job` and finds out what is used of it.
    pub fn open(job: &Convert, monitor: &dyn Monitor) -> Result<Self> {
        let uses = mounts::in_use(&job.source)?;
        if let (Some(first), false) = (uses.first(), job.inconsistent) {
            return Err(Error::new(
                Kind::Source,
                "source.in-use",
                format!("{} is in use", job.source.display()),
            )
            .because(first.to_string())
            .remedy(
                "unmount it or mount it read-only; --inconsistent copies it as it stands, possibly torn",
            ));
        }
        for used in &uses {
            monitor.note(Level::Warning, &format!("{} is copied while in use: {used}", job.source.display()));
        }
        let file = DiskFile::open(&job.source)?;
        let identity = file.identity()?;
        let image = image::open(&job.source, job.source_format, &job.gate)?;
        let disk = image.disk.clone();
        let (used, volumes): (Arc<dyn Extents>, _) = if job.all_blocks {
            (Arc::new(Extent::new(0, disk.size())), vec!["every block was asked for".to_owned()])
        } else {
            let used = layout::used_map(disk)?;
            let volumes = used.volumes().iter().map(describe).collect();
            (Arc::new(used), volumes)
        };
        Ok(Source { file, identity, image, used, volumes, in_use: !uses.is_empty() })
    }

    /// Length of the virtual disk in bytes.
    pub fn size(&self) -> u64 {
        self.image.disk.size()
    }

    fn check_unchanged(&self) -> Result<()> {
        if self.in_use || self.file.identity()? == self.identity {
            return Ok(());
        }
        Err(Error::new(
            Kind::Source,
            "source.changed",
            format!("{} changed while it was copied", self.identity.path),
        )
        .because("its size or time of change is not what it was at the start")
        .remedy("stop whatever writes to it, then run the command again"))
    }
}

fn describe(volume: &layout::Volume) -> String {
    let place = volume.partition.map_or_else(|| "disk".to_owned(), |number| format!("partition {number}"));
    let usage = match &volume.usage {
        Usage::Mapped { used_bytes } => format!("{used_bytes} bytes used"),
        Usage::Whole { reason } => format!("copied whole: {reason}"),
    };
    format!("{place} {:?}: {}, {usage}", volume.extent, volume.content.name())
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
    let source = Source::open(job, monitor)?;
    Ok(Plan {
        source: job.source.clone(),
        destination: job.destination.clone(),
        size: source.size(),
        used_bytes: layout::count_used(&source.used, Extent::new(0, source.size()))?,
        volumes: source.volumes,
    })
}

/// Converts a disk or image as `job` says. On an error nothing is left but, after a pause, what `--resume` needs.
pub fn convert(job: &Convert, stop: &AtomicBool, monitor: &dyn Monitor) -> Result<Report> {
    let files = Files::of(&job.destination);
    check_destination(job)?;
    let source = Source::open(job, monitor)?;
    let result = copy(job, &source, &files, stop, monitor);
    if let Err(error) = &result
        && error.kind() != Kind::Interrupted
    {
        files.remove_unfinished();
    }
    result
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
    let same = fs::canonicalize(&job.destination).ok() == fs::canonicalize(&job.source).ok();
    if same {
        return Err(refuse("it is the source", "name another file: the source is never written"));
    }
    if !job.force {
        return Err(refuse("it exists", "name another file, or replace it with --force"));
    }
    Ok(())
}

fn encoder(job: &Convert, size: u64) -> Result<Box<dyn Encoder>> {
    Ok(match job.format {
        Format::Raw => Box::new(image::raw::writer::Writer::new(size)),
        Format::Qcow2 => Box::new(image::qcow2::writer::Writer::new(size, job.compress)?),
    })
}

fn copy(
    job: &Convert,
    source: &Source,
    files: &Files,
    stop: &AtomicBool,
    monitor: &dyn Monitor,
) -> Result<Report> {
    let parameters = Parameters {
        source: source.identity.clone(),
        format: job.format,
        compress: job.compress,
        all_blocks: job.all_blocks,
        on_read_error: job.on_read_error,
        size: source.size(),
    };
    let (mut sink, from) = if job.resume && files.journal.exists() {
        resume(job, &parameters, files)?
    } else {
        start(job, &parameters, files)?
    };
    monitor.begin("copy", Some(source.size()));
    let blocks = BlockSource::new(source.image.disk.clone(), source.used.clone(), job.on_read_error);
    let options = pipeline::Options { threads: job.threads, from, stop };
    pipeline::run(&blocks, &mut *sink, &options, monitor)?;
    let sealed = sink.finish()?;
    source.check_unchanged()?;
    let manifest = seal(job, source, &sealed, files)?;
    atomic::rename(&files.part, &job.destination)?;
    files.remove_unfinished();
    Ok(Report {
        destination: job.destination.clone(),
        manifest: files.manifest.clone(),
        size: manifest.head.size,
        image_bytes: sealed.bytes,
        bytes: manifest.head.bytes,
        source_root: manifest.head.source_root,
        image_root: manifest.head.image_root,
        unreadable: blocks.unreadable().iter().map(|run| (run.start, run.end)).collect(),
        inconsistent: source.in_use,
    })
}

/// Begins a new image and its journal.
fn start(job: &Convert, parameters: &Parameters, files: &Files) -> Result<(Box<dyn Sink>, u64)> {
    let encoder = encoder(job, parameters.size)?;
    let json = serde_json::to_vec(parameters).map_err(|error| {
        Error::new(Kind::Internal, "journal.encode", "cannot encode the job's parameters").caused_by(error)
    })?;
    let file = OutFile::create(&files.part)?;
    let journal = Arc::new(Journal::create(&files.journal, &json)?);
    let destination = ImageFile::at(file, encoder.front_len(), journal.clone())?;
    Ok((Box::new(ImageSink::new(encoder, Box::new(destination), journal)), 0))
}

/// Takes up an image where its journal proves it safe: the encoder lays the proven batches out again, without bytes.
fn resume(job: &Convert, parameters: &Parameters, files: &Files) -> Result<(Box<dyn Sink>, u64)> {
    let survey = Survey::of(&files.journal)?;
    let recorded: Option<Parameters> = serde_json::from_slice(&survey.job).ok();
    if recorded.as_ref() != Some(parameters) {
        return Err(Error::new(
            Kind::Source,
            "resume.changed",
            format!("{} cannot be resumed", job.destination.display()),
        )
        .because("the source or the options are not those of the run that was stopped")
        .remedy("run the command again without --resume"));
    }
    let mut encoder = encoder(job, parameters.size)?;
    let mut from = 0;
    survey.batches(&files.journal, |batch| {
        if batch.position <= survey.synced {
            encoder.put(Extent::new(batch.start, batch.end), &batch.cells)?;
            from = batch.end;
        }
        Ok(())
    })?;
    let journal = Arc::new(Journal::reopen(&files.journal, survey.valid)?);
    journal.append(&Record::Resumed { from, position: encoder.position() })?;
    journal.sync()?;
    let destination = ImageFile::at(OutFile::reopen(&files.part)?, encoder.position(), journal.clone())?;
    Ok((Box::new(ImageSink::new(encoder, Box::new(destination), journal)), from))
}

fn seal(job: &Convert, source: &Source, sealed: &Sealed, files: &Files) -> Result<Manifest> {
    let survey = Survey::of(&files.journal)?;
    let mut sealer = Sealer::begin(&files.manifest, Geometry::of(source.size()))?;
    survey.batches(&files.journal, |batch| sealer.add(&batch))?;
    let head = Head {
        source: job.source.display().to_string(),
        inconsistent: source.in_use,
        format: job.format.to_string(),
        image_bytes: sealed.bytes,
        volumes: source.volumes.clone(),
        ..Head::default()
    };
    sealer.seal(head, &ExtentMap::new())
}
