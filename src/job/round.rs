//! Rounds on a finished copy: brought up to date with its source, fixed where it lies, put back to what it was.
//!
//! A round is appended to a qcow2 image and counts from one switch on: the header of a file, the completion of an upload.
//! Before it begins, the manifest and the front of the image as it was go into the job's folder; once it counts they
//! become `D.haul-undo`, by which [`undo`] takes the round back.
//!
//! An object that is raw or a fixed VHD is joined anew from parts: what was touched is sent, the rest is copied inside
//! the store. The switch is the completion of the upload, and what it replaced is gone.

#[cfg(feature = "net")]
mod object;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::copy::{Base, Copied, Copy, Settings, Target};
use super::fix;
use super::open::{Opened, Opener};
#[cfg(feature = "net")]
use super::services::Services;
use super::source::{self, Source};
use super::work::WorkFolder;
use crate::config::{Cloud, Location};
use crate::error::{Error, Kind, Result};
use crate::guest;
use crate::image::qcow2::round::{FRONT, live_bytes};
use crate::image::{self, Compress, Format, Gate, Subformat, vhd};
use crate::io::atomic::{self, with_suffix};
use crate::io::{OutFile, Patched, ReadAt, Window, WriteAt, read_vec};
use crate::manifest::{Hex, Manifest, verify};
use crate::monitor::{Level, Monitor};
#[cfg(feature = "net")]
use crate::sink::object::RoundBase;
#[cfg(feature = "net")]
use crate::sink::touched::touched;
use crate::source::OnReadError;
#[cfg(feature = "net")]
use crate::store::ObjectStore;
use crate::unit::{Extent, ExtentMap, MIB, to_usize};

/// Less dead data than this is not worth a new copy, in bytes.
const DEAD_ALLOWED: u64 = 64 * MIB;

/// A finished copy to work on.
pub struct Finished {
    /// Where it lies.
    pub copy: Location,
    /// Where objects are.
    pub cloud: Cloud,
    /// Go on with a round that was stopped.
    pub resume: bool,
    /// Worker threads.
    pub threads: usize,
}

/// What a round did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The copy.
    pub copy: Location,
    /// Bytes of its disk that the round set, in whole chunks.
    pub changed: u64,
    /// Length of the image in bytes, afterwards.
    pub image_bytes: u64,
    /// Root over the source's chunks.
    pub source_root: Hex,
    /// Root over the copy's chunks.
    pub image_root: Hex,
    /// The fix-ups made, as a diff.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fixes: Option<String>,
    /// What a fresh look at the fixed copy found.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub proofs: Vec<String>,
}

/// A copy opened for a round.
struct Open<'a> {
    job: &'a Finished,
    beside: PathBuf,
    work: WorkFolder,
    /// Whether a round that was stopped is taken up.
    resume: bool,
    manifest: Manifest,
    opened: Opened,
    /// The image as it was when the round began.
    image: Arc<dyn ReadAt>,
    stop: &'a Arc<AtomicBool>,
    monitor: &'a Arc<dyn Monitor>,
    #[cfg(feature = "net")]
    object: Option<(Arc<dyn ObjectStore>, String, RoundBase)>,
}

/// The path beside which manifest, journal and undo record of `copy` lie.
pub fn beside(copy: &Location) -> PathBuf {
    copy.path().map_or_else(|| copy.file_name().into(), Path::to_owned)
}

fn undo_folder(beside: &Path) -> PathBuf {
    with_suffix(beside, ".haul-undo")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| io_failed(path, error))
}

fn io_failed(path: &Path, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "round.folder", format!("cannot use {}", path.display()))
        .fact("path", path.display())
        .caused_by(error)
}

impl<'a> Open<'a> {
    fn new(job: &'a Finished, stop: &'a Arc<AtomicBool>, monitor: &'a Arc<dyn Monitor>) -> Result<Self> {
        let beside = beside(&job.copy);
        let resume = job.resume && with_suffix(&beside, ".haul-journal").exists();
        if !resume {
            settle(job, &beside, stop, monitor)?;
        }
        let work = WorkFolder::beside(&beside, resume)?;
        let opened = Opener::new(&job.cloud, stop, monitor).open(&job.copy)?;
        let kept = work.path().join("base");
        let path = with_suffix(&beside, ".manifest");
        #[cfg(feature = "net")]
        let object = match &job.copy {
            Location::Object(url) => {
                let store = Services::new(&job.cloud)?.store(&url.bucket, stop, monitor)?;
                let info = object::stat(&store, &url.key)?;
                Some((store, url.key.clone(), info))
            }
            _ => None,
        };
        if !kept.join("front").exists() {
            let manifest = Manifest::open(&path)?;
            check(&manifest, &job.copy, opened.file.size())?;
            fs::create_dir_all(&kept).map_err(|error| io_failed(&kept, error))?;
            let bytes = read(&path)?;
            atomic::write(&kept.join("manifest"), &bytes)?;
            #[cfg(feature = "net")]
            if let Some((_, _, info)) = &object {
                object::check(&manifest, &job.copy, info)?;
                atomic::write(&kept.join("etag"), info.etag.as_bytes())?;
            }
            let front = read_vec(&*opened.file, 0, FRONT_BYTES.min(to_usize(opened.file.size())))?;
            // Last: with it, all of it is there.
            atomic::write(&kept.join("front"), &front)?;
        }
        let manifest = Manifest::open(&kept.join("manifest"))?;
        let front = fs::read(kept.join("front")).map_err(|error| io_failed(&kept, error))?;
        let before = Extent::new(0, manifest.head.image_bytes);
        let window = Window::new(opened.file.clone(), before, opened.file.name());
        let image: Arc<dyn ReadAt> = Arc::new(Patched::new(window, front));
        #[cfg(feature = "net")]
        let object = object.map(|(store, key, info)| {
            // The object may be the round's already.
            let etag = fs::read_to_string(kept.join("etag")).unwrap_or_else(|_| info.etag.clone());
            let stored = info.crc64.filter(|_| info.etag == etag);
            let base = RoundBase {
                size: manifest.head.image_bytes,
                crc64: manifest.head.crc64.or(stored),
                etag,
                front: None,
                in_place: is_in_place(&manifest),
            };
            (store, key, base)
        });
        Ok(Open {
            job,
            beside,
            work,
            resume,
            manifest,
            opened,
            image,
            stop,
            monitor,
            #[cfg(feature = "net")]
            object,
        })
    }

    /// How the round is made, which for fix-ups is in another way than for an update.
    fn settings(&self, all_blocks: bool, fixes: bool) -> Result<Settings> {
        let format: Format = self.manifest.head.format.parse()?;
        let in_place = !fixes && matches!(self.job.copy, Location::Object(_));
        let (subformat, compress) = match format {
            Format::Qcow2 => match self.manifest.head.compression.as_deref() {
                Some("none") => (None, Compress::None),
                _ => (None, image::qcow2::round::compression(&*self.image)?),
            },
            Format::Raw if in_place => (None, Compress::None),
            Format::Vhd if in_place && vhd::inspect(&*self.image)?.subformat == vhd::Subformat::Fixed => {
                (Some(Subformat::Fixed), Compress::None)
            }
            _ => return Err(self.refused(format, fixes)),
        };
        Ok(Settings { format, subformat, compress, all_blocks, on_read_error: OnReadError::Fail })
    }

    fn refused(&self, format: Format, fixes: bool) -> Error {
        let copy = &self.job.copy;
        let error = Error::new(Kind::Usage, "round.format", format!("no round can be made on {copy}"));
        match fixes {
            true => error
                .because(format!("it is a {format} image, and fix-ups are appended to qcow2 images only"))
                .remedy("make the copy again with `haul convert --fix`, or keep it as qcow2"),
            false => error
                .because(format!("it is a {format} image in {}", if copy.path().is_some() { "a file" } else { "an object" }))
                .remedy(
                    "make the copy again as a whole with --force, or keep it as qcow2; an object may be raw or fixed vhd, too",
                ),
        }
    }

    /// What the round sets when `changed` is what differs: of an image that is not appended to, whole granules.
    fn set(&self, mut changed: ExtentMap, format: Format) -> ExtentMap {
        if format == Format::Qcow2 {
            return changed;
        }
        let mut disk = self.image.size();
        if format == Format::Vhd {
            disk = disk.saturating_sub(vhd::footer::FOOTER_LEN as u64);
            // The footer follows in the same part: what was kept before it could be too short for one of its own.
            changed.insert(Extent::new(disk.saturating_sub(1), disk));
        }
        #[cfg(feature = "net")]
        return touched(&changed, disk, self.manifest.geometry().batch());
        #[cfg(not(feature = "net"))]
        return changed;
    }

    fn target(&self) -> Target {
        #[cfg(feature = "net")]
        if let Some((store, key, _)) = &self.object {
            let folder = self.work.path().to_owned();
            return Target::Object { store: store.clone(), key: key.clone(), folder };
        }
        Target::File { part: self.beside.clone(), name: self.beside.clone() }
    }

    /// Appends what `source` has in `changed`.
    fn append(&self, source: &Source, settings: Settings, changed: ExtentMap, fixes: bool) -> Result<Copied> {
        let copy = Copy {
            source,
            settings,
            target: self.target(),
            journal: with_suffix(&self.beside, ".haul-journal"),
            manifest: with_suffix(&self.beside, ".manifest"),
            threads: self.job.threads,
            base: Some(Base {
                manifest: Manifest::open(&self.work.path().join("base/manifest"))?,
                image: self.image.clone(),
                #[cfg(feature = "net")]
                object: self.object.as_ref().map(|(_, _, base)| base.clone()),
                changed,
                fixes,
            }),
        };
        let base = self.work.path().join("base");
        let copied = match copy.run(self.resume, self.stop, self.monitor) {
            Ok(copied) => copied,
            Err(error) => {
                match error.kind() {
                    Kind::Interrupted | Kind::Network | Kind::Credentials => self.work.keep(),
                    // It may have failed after its switch. Where that cannot be told now, the next run finds out.
                    _ => match settle(self.job, &self.beside, self.stop, self.monitor) {
                        Ok(()) => copy.clear(),
                        Err(_) => self.work.keep(),
                    },
                }
                return Err(error);
            }
        };
        copy.clear();
        settled(&base, &self.beside, &self.manifest)?;
        Ok(copied)
    }

    fn report(&self, manifest: &Manifest, changed: u64) -> Report {
        let head = &manifest.head;
        Report {
            copy: self.job.copy.clone(),
            changed,
            image_bytes: head.image_bytes,
            source_root: head.source_root,
            image_root: head.image_root,
            fixes: None,
            proofs: Vec::new(),
        }
    }
}

/// Whether a round on this copy takes the place of what was there.
fn is_in_place(before: &Manifest) -> bool {
    before.head.format != Format::Qcow2.to_string()
}

/// Takes note that the round on the copy in `before` counts: where it was appended it can be taken back.
fn settled(base: &Path, beside: &Path, before: &Manifest) -> Result<()> {
    if is_in_place(before) {
        forget(beside);
        return Ok(());
    }
    keep_for_undo(base, beside)
}

/// Keeps what a copy was before its last round, and the digest of the manifest it has since.
fn keep_for_undo(base: &Path, beside: &Path) -> Result<()> {
    let undo = undo_folder(beside);
    let _ = fs::remove_dir_all(&undo);
    atomic::write(&base.join("after"), &manifest_digest(beside)?)?;
    fs::rename(base, &undo).map_err(|error| io_failed(&undo, error))
}

fn manifest_digest(beside: &Path) -> Result<Vec<u8>> {
    let bytes = read(&with_suffix(beside, ".manifest"))?;
    Ok(blake3::hash(&bytes).as_bytes().to_vec())
}

/// Forgets the last round of a copy that was made anew.
pub fn forget(beside: &Path) {
    let _ = fs::remove_dir_all(undo_folder(beside));
}

/// Ends a round that was stopped and is not resumed: it counts if its switch was made, and is dropped if not. The
/// manifest may be ahead of the switch, never behind.
fn settle(job: &Finished, beside: &Path, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<()> {
    let base = WorkFolder::path_beside(beside).join("base");
    let Ok(front) = fs::read(base.join("front")) else { return Ok(()) };
    let manifest = Manifest::open(&base.join("manifest"))?;
    let before = manifest.head.image_bytes;
    let counts = match &job.copy {
        #[cfg(feature = "net")]
        Location::Object(url) => {
            let store = Services::new(&job.cloud)?.store(&url.bucket, stop, monitor)?;
            object::counts(&store, &url.key, job, beside, &manifest)?
        }
        _ => {
            let image = Opener::new(&job.cloud, stop, monitor).open(&job.copy)?.file;
            if image.size() < before {
                return check(&manifest, &job.copy, image.size());
            }
            read_vec(&*image, 0, front.len())? != front
        }
    };
    if counts {
        settled(&base, beside, &manifest)?;
    } else {
        if let Location::File(path) = &job.copy {
            OutFile::reopen(path)?.set_len(before)?;
        }
        put_back_manifest(&base, beside)?;
    }
    let _ = fs::remove_file(with_suffix(beside, ".haul-journal"));
    Ok(())
}

/// Makes the manifest kept in `base` the copy's again.
fn put_back_manifest(base: &Path, beside: &Path) -> Result<()> {
    let kept = fs::read(base.join("manifest")).map_err(|error| io_failed(base, error))?;
    atomic::write(&with_suffix(beside, ".manifest"), &kept)
}

/// Bytes of the image's front that a round replaces.
const FRONT_BYTES: usize = crate::unit::to_usize(FRONT);

/// Refuses a copy that is not the one its manifest describes.
fn check(manifest: &Manifest, copy: &Location, size: u64) -> Result<()> {
    if manifest.head.image_bytes == size {
        return Ok(());
    }
    Err(other(copy, &format!("it has {size} bytes, the manifest says {}", manifest.head.image_bytes)))
}

fn other(copy: &Location, why: &str) -> Error {
    Error::new(Kind::Mismatch, "round.other", format!("{copy} is not the copy its manifest describes"))
        .because(why)
        .remedy(
            "run `haul undo` if one was stopped; else put this copy's manifest beside it, or make it again",
        )
}

/// What an update came to.
pub enum Updated {
    /// A round was appended, or nothing had changed.
    Round(Report),
    /// So much of the image is dead that a whole copy is due; nothing was done.
    Dead {
        /// Bytes that nothing of the disk is in.
        bytes: u64,
        /// How the copy was made.
        settings: Settings,
    },
}

/// Brings a finished copy up to date with `opened`, its source: chunks whose digest is no longer that of the manifest
/// are copied again.
pub fn update(
    job: &Finished,
    opened: Opened,
    options: &source::Options<'_>,
    stop: &Arc<AtomicBool>,
    monitor: &Arc<dyn Monitor>,
) -> Result<Updated> {
    let open = Open::new(job, stop, monitor)?;
    let settings = open.settings(options.all_blocks, false)?;
    if !open.manifest.head.amended.is_empty() {
        return Err(Error::new(Kind::Usage, "round.fixed", format!("{} was fixed", job.copy))
            .because("its fix-ups would be mixed with what changed on the source")
            .remedy(
                "take them back with `haul undo` if `haul fix` made them, update, and fix it again; else make the \
                 copy again as a whole",
            ));
    }
    let source = Source::open(opened, options, &**monitor)?;
    if source.size() != open.manifest.head.size {
        return Err(Error::new(Kind::Source, "round.size", format!("{} has another size", source.name()))
            .because(format!("it has {} bytes, the copy {}", source.size(), open.manifest.head.size))
            .remedy("make the copy again as a whole"));
    }
    monitor.begin("compare", Some(source.size()));
    let advance = |done| monitor.advance(done);
    let changed =
        verify::verify(&open.manifest, &source.view(), job.threads.max(1), stop, &advance)?.differing;
    if changed.is_empty() && !open.work.path().join("overlay").exists() && !open.resume {
        return Ok(Updated::Round(open.report(&open.manifest, 0)));
    }
    if settings.format == Format::Qcow2 && !open.resume {
        let dead = open.image.size().saturating_sub(live_bytes(&*open.image)?);
        if dead > DEAD_ALLOWED && dead * 4 > open.image.size() {
            return Ok(Updated::Dead { bytes: dead, settings });
        }
    }
    let bytes = changed.bytes();
    let set = open.set(changed, settings.format);
    let copied = open.append(&source.restricted(&set), settings, set, false)?;
    Ok(Updated::Round(open.report(&copied.manifest, bytes)))
}

/// Fixes a finished copy so that it boots on virtio hardware.
pub fn fix(
    job: &Finished,
    options: &guest::Options,
    stop: &Arc<AtomicBool>,
    monitor: &Arc<dyn Monitor>,
) -> Result<Report> {
    let open = Open::new(job, stop, monitor)?;
    let settings = open.settings(true, true)?;
    let size = open.manifest.head.size;
    let disk = image::open_on(open.image.clone(), Some(Format::Qcow2), &Gate::closed())?.disk;
    // The image's disk ends at a sector's border, the source perhaps before.
    let disk: Arc<dyn ReadAt> = Arc::new(Window::new(disk, Extent::new(0, size), open.opened.file.name()));
    let plan = fix::plan(&guest::inspect(disk.clone())?, options, &**monitor)?;
    if plan.is_empty() {
        monitor.note(Level::Info, "nothing needs to be changed");
        return Ok(open.report(&open.manifest, 0));
    }
    let (overlay, proofs) = fix::overlay(disk, &plan, options.executor(), open.work.path(), &**monitor)?;
    let chunk = open.manifest.head.chunk;
    let whole = |run: Extent| run.widened(chunk).intersect(Extent::new(0, size));
    let changed: ExtentMap = overlay.dirty().iter().map(whole).collect();
    let bytes = changed.bytes();
    let opened = Opener::new(&job.cloud, stop, monitor).open(&job.copy)?;
    let source = Source::of_copy(opened, overlay, changed.clone())?;
    let copied = open.append(&source, settings, changed, true)?;
    Ok(Report {
        fixes: Some(plan.to_string()),
        proofs: proofs.into_iter().map(|proof| proof.claim).collect(),
        ..open.report(&copied.manifest, bytes)
    })
}

/// Takes back the last round of a finished copy: image and manifest are what they were before it.
pub fn undo(job: &Finished, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<Report> {
    let beside = beside(&job.copy);
    settle(job, &beside, stop, monitor)?;
    if let Ok(manifest) = Manifest::open(&with_suffix(&beside, ".manifest"))
        && is_in_place(&manifest)
    {
        let format = &manifest.head.format;
        return Err(Error::new(Kind::Usage, "round.format", format!("no round of {} can be taken back", job.copy))
            .because(format!("it is a {format} image: what a round replaced in it is gone"))
            .remedy(
                "update it from the source, or take an older version of the object if its bucket keeps them; rounds \
                 of a qcow2 copy can be taken back",
            ));
    }
    let folder = undo_folder(&beside);
    let nothing = |error: std::io::Error| {
        Error::new(Kind::Usage, "undo.nothing", format!("there is no round of {} to take back", job.copy))
            .remedy(
                "only the last round of a copy can be taken back, once, with the folder .haul-undo beside it",
            )
            .caused_by(error)
    };
    let front = fs::read(folder.join("front")).map_err(nothing)?;
    let before = Manifest::open(&folder.join("manifest"))?;
    let bytes = before.head.image_bytes;
    let kept = fs::read(folder.join("manifest")).map_err(nothing)?;
    let now = manifest_digest(&beside)?;
    // That of before the round is there when an undo was stopped.
    if now != fs::read(folder.join("after")).map_err(nothing)? && now != *blake3::hash(&kept).as_bytes() {
        return Err(Error::new(Kind::Mismatch, "undo.other", format!("{} was made anew since", job.copy))
            .because("its manifest is not that of the round")
            .remedy("nothing is to be taken back; the folder .haul-undo beside it can be removed"));
    }
    // First, as no round is appended to a copy that is longer than its manifest says.
    put_back_manifest(&folder, &beside)?;
    match &job.copy {
        Location::File(path) => {
            let file = OutFile::reopen(path)?;
            if file.len()? < bytes {
                check(&before, &job.copy, file.len()?)?;
            }
            file.write_at(&front, 0)?;
            file.sync()?;
            file.set_len(bytes)?;
            file.sync()?;
        }
        #[cfg(feature = "net")]
        Location::Object(url) => {
            let store = Services::new(&job.cloud)?.store(&url.bucket, stop, monitor)?;
            object::undo(store, &url.key, &beside, &before, front, monitor)?;
        }
        _ => Opener::new(&job.cloud, stop, monitor).open(&job.copy).map(drop)?,
    }
    fs::remove_dir_all(&folder).map_err(|error| io_failed(&folder, error))?;
    let head = &before.head;
    Ok(Report {
        copy: job.copy.clone(),
        changed: 0,
        image_bytes: head.image_bytes,
        source_root: head.source_root,
        image_root: head.image_root,
        fixes: None,
        proofs: Vec::new(),
    })
}
