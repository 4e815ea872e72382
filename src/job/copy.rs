//! The copy every job shares: source to image, journalled, resumable at any byte, sealed before it has a name.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::source::Source;
use crate::error::{Error, Kind, Result};
use crate::image::{self, Compress, Format, Subformat, qcow2, raw};
use crate::io::batch::{Encoder, Geometry};
use crate::io::file::Identity;
use crate::io::{OutFile, ReadAt};
use crate::manifest::journal::{Journal, Record};
use crate::manifest::survey::Survey;
use crate::manifest::{Head, Manifest, Sealer, merge};
use crate::monitor::Monitor;
use crate::pipeline;
use crate::sink::image_file::{self, ImageFile};
#[cfg(feature = "net")]
use crate::sink::object::{self, ObjectImage, RoundBase};
use crate::sink::pipe::Pipe;
use crate::sink::{Destination, ImageSink, Sealed, Sink};
use crate::source::OnReadError;
#[cfg(feature = "net")]
use crate::store::{ObjectStore, Upload};
use crate::unit::{Extent, ExtentMap, fault};

/// How to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Format of the image.
    pub format: Format,
    /// How that format lays out the disk, where it has several ways.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subformat: Option<Subformat>,
    /// Compression of the image.
    pub compress: Compress,
    /// Copy blocks that no file system uses, too.
    pub all_blocks: bool,
    /// What to do about unreadable sectors.
    pub on_read_error: OnReadError,
}

/// Where the image goes.
pub enum Target {
    /// A file, written as `part` and then called `name`.
    File {
        /// Its name while it is incomplete.
        part: PathBuf,
        /// Its name.
        name: PathBuf,
    },
    /// An object.
    #[cfg(feature = "net")]
    Object {
        /// The bucket.
        store: Arc<dyn ObjectStore>,
        /// The object's key.
        key: String,
        /// A folder of the job's own, for what must wait.
        folder: PathBuf,
    },
    /// A stream: standard output, or nowhere.
    Pipe(Option<File>),
}

impl Target {
    /// The last part of the image's name.
    fn file_name(&self) -> String {
        let name = match self {
            Target::File { name, .. } => name.as_path(),
            #[cfg(feature = "net")]
            Target::Object { key, .. } => Path::new(key),
            Target::Pipe(_) => Path::new("disk.vmdk"),
        };
        name.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// A copy to be made.
pub struct Copy<'a> {
    /// The source, opened.
    pub source: &'a Source,
    /// How.
    pub settings: Settings,
    /// Where to.
    pub target: Target,
    /// The journal's path.
    pub journal: PathBuf,
    /// The manifest's path.
    pub manifest: PathBuf,
    /// Worker threads.
    pub threads: usize,
    /// The finished copy that this one brings up to date.
    pub base: Option<Base>,
}

/// A finished copy, as a round finds it.
pub struct Base {
    /// Its manifest.
    pub manifest: Manifest,
    /// The image as it is, whatever is appended to its file meanwhile.
    pub image: Arc<dyn ReadAt>,
    /// The object it is, if it is one.
    #[cfg(feature = "net")]
    pub object: Option<RoundBase>,
    /// What the round sets, in whole chunks; where the image is not appended to, in whole granules.
    pub changed: ExtentMap,
    /// Whether it is the copy alone that changes: its source stays what the manifest says.
    pub fixes: bool,
}

/// The part of a copy that a resumed run must share with the run it continues; kept in the journal.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Parameters {
    source: Identity,
    settings: Settings,
    size: u64,
    amended: Vec<(u64, u64)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<String>,
}

/// A copy that exists under its name.
pub struct Copied {
    /// Its manifest.
    pub manifest: Manifest,
    /// Where in the disk this run took up an earlier one; 0 for a run from the start.
    pub resumed_from: u64,
    /// Extents that could not be read and are zero in the copy.
    pub unreadable: Vec<(u64, u64)>,
}

enum Stand {
    /// Data is missing from this offset of the disk on.
    Copying(Box<dyn Sink>, u64),
    /// Only the manifest or the name is missing.
    Complete(Sealed),
}

impl Copy<'_> {
    /// Makes the copy, taking up an earlier run where its journal proves it safe if `resume` says so.
    pub fn run(&self, resume: bool, stop: &AtomicBool, monitor: &Arc<dyn Monitor>) -> Result<Copied> {
        let stand =
            if resume && self.journal.exists() { self.resume(monitor)? } else { self.start(monitor)? };
        let blocks = self.source.blocks(self.settings.on_read_error);
        let (sealed, resumed_from) = match stand {
            Stand::Complete(sealed) => (sealed, self.source.size()),
            Stand::Copying(mut sink, from) => {
                monitor.begin("copy", Some(self.source.size()));
                let options = pipeline::Options { threads: self.threads, from, stop };
                pipeline::run(&blocks, &mut *sink, &options, &**monitor)?;
                (sink.finish()?, from)
            }
        };
        fault::point("complete");
        if self.base.as_ref().is_none_or(|base| !base.fixes) {
            self.source.check_unchanged()?;
        }
        let unreadable: Vec<_> = blocks.unreadable().iter().map(|run| (run.start, run.end)).collect();
        let (bytes, known) = (sealed.bytes, sealed.crc64);
        let mut manifest = self.seal(bytes, known, unreadable.clone())?;
        fault::point("complete");
        let kept = sealed.publish()?;
        fault::point("complete");
        // The checksum of an object with parts copied inside the store is the store's word. It tells this object from
        // another one that takes its place later; the copy is complete without it.
        if let (None, Some(_)) = (known, kept) {
            manifest = self.seal(bytes, kept, unreadable.clone()).unwrap_or(manifest);
        }
        Ok(Copied { manifest, resumed_from, unreadable })
    }

    fn parameters(&self) -> Parameters {
        Parameters {
            source: match &self.base {
                // It is the copy itself, which grows.
                Some(base) if base.fixes => Identity::default(),
                _ => self.source.identity().clone(),
            },
            base: self.base.as_ref().map(Base::identity),
            settings: self.settings,
            size: self.source.size(),
            amended: self.source.amended().iter().map(|run| (run.start, run.end)).collect(),
        }
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        let whole = |copy: &Self| {
            let Settings { format, subformat, compress, .. } = copy.settings;
            image::encoder(format, subformat, compress, copy.source.size(), &copy.target.file_name())
        };
        if let Some(base) = &self.base {
            let (image, changed) = (base.image.clone(), base.changed.clone());
            if self.settings.format == Format::Qcow2 {
                return Ok(Box::new(qcow2::round::Round::new(image, self.settings.compress, changed)?));
            }
            // A file is written from where the encoder begins, which here is its first byte.
            if matches!(self.target, Target::File { .. }) {
                return Err(Error::new(Kind::Internal, "round.file", "no round in place is made on a file"));
            }
            return Ok(Box::new(raw::round::Round::new(whole(self)?, changed, image.size())));
        }
        whole(self)
    }

    /// Begins a new image and its journal.
    fn start(&self, monitor: &Arc<dyn Monitor>) -> Result<Stand> {
        let encoder = self.encoder()?;
        let json = serde_json::to_vec(&self.parameters()).map_err(|error| {
            Error::new(Kind::Internal, "journal.encode", "cannot encode the job's parameters")
                .caused_by(error)
        })?;
        let destination: (Box<dyn Destination>, _) = match &self.target {
            Target::File { part, name } => {
                let file = match &self.base {
                    Some(_) => OutFile::reopen(part)?,
                    None => OutFile::create(part)?,
                };
                let position = encoder.position();
                file.set_len(if self.base.is_some() { position } else { 0 })?;
                let journal = Arc::new(Journal::create(&self.journal, &json)?);
                (Box::new(ImageFile::at(file, name, position, journal.clone())?), journal)
            }
            #[cfg(feature = "net")]
            Target::Object { store, key, folder } => {
                let journal = Arc::new(Journal::create(&self.journal, &json)?);
                let context = self.context((store, key, folder), &journal, monitor);
                let object = match context.base {
                    Some(_) => ObjectImage::begin_round(context, encoder.front_len())?,
                    None => ObjectImage::begin(context, encoder.front_len())?,
                };
                (Box::new(object), journal)
            }
            Target::Pipe(out) => {
                let journal = Arc::new(Journal::create(&self.journal, &json)?);
                let out = out.as_ref().map(File::try_clone).transpose().map_err(|error| {
                    Error::new(Kind::Internal, "pipe.clone", "cannot use standard output").caused_by(error)
                })?;
                (Box::new(Pipe::new(out, encoder.front_len(), journal.clone())?), journal)
            }
        };
        #[cfg(not(feature = "net"))]
        let _ = monitor;
        Ok(Stand::Copying(Box::new(ImageSink::new(encoder, destination.0, destination.1)), 0))
    }

    /// Takes up an image where its journal proves it safe: the encoder lays the proven batches out again, without
    /// their bytes.
    fn resume(&self, monitor: &Arc<dyn Monitor>) -> Result<Stand> {
        let survey = Survey::of(&self.journal)?;
        let recorded: Option<Parameters> = serde_json::from_slice(&survey.job).ok();
        if recorded.as_ref() != Some(&self.parameters()) {
            return Err(Error::new(
                Kind::Source,
                "resume.changed",
                format!("the copy of {} cannot be resumed", self.source.name()),
            )
            .because("the source or the options are not those of the run that was stopped")
            .remedy("run the command again without --resume"));
        }
        if let Some((bytes, _)) = survey.sealed {
            return Ok(Stand::Complete(self.sealed(&survey, bytes)?));
        }
        let mut encoder = self.encoder()?;
        let (survey, safe) = match &self.target {
            Target::File { part, .. } => {
                let safe = OutFile::reopen(part)?.len()?.min(survey.synced);
                (survey, safe)
            }
            #[cfg(feature = "net")]
            Target::Object { store, key, folder } => {
                ObjectImage::safe(&**store, key, folder, encoder.front_len(), survey)?
            }
            Target::Pipe(_) => return Err(not_resumed()),
        };
        if safe == 0 || (self.base.is_some() && safe < encoder.position()) {
            self.abort_uploads();
            return self.start(monitor);
        }
        let mut from = 0;
        survey.batches(&self.journal, |batch| {
            if batch.position <= safe {
                encoder.put(Extent::new(batch.start, batch.end), &batch.cells)?;
                from = batch.end;
            }
            Ok(())
        })?;
        let position = encoder.position();
        let journal = Arc::new(Journal::reopen(&self.journal, survey.valid)?);
        let destination: Box<dyn Destination> = match &self.target {
            Target::File { part, name } => {
                journal.append(&Record::Resumed { from, position })?;
                let file = OutFile::reopen(part)?;
                // What was written beyond goes: a hole skipped from here on must read as zeroes.
                file.set_len(position)?;
                Box::new(ImageFile::at(file, name, position, journal.clone())?)
            }
            #[cfg(feature = "net")]
            Target::Object { store, key, folder } => {
                journal.append(&Record::Resumed { from, position: safe })?;
                let context = self.context((store, key, folder), &journal, monitor);
                Box::new(ObjectImage::resume(context, &survey, position, safe)?)
            }
            Target::Pipe(_) => return Err(not_resumed()),
        };
        journal.sync()?;
        Ok(Stand::Copying(Box::new(ImageSink::new(encoder, destination, journal)), from))
    }

    #[cfg(feature = "net")]
    fn context(
        &self,
        (store, key, folder): (&Arc<dyn ObjectStore>, &str, &Path),
        journal: &Arc<Journal>,
        monitor: &Arc<dyn Monitor>,
    ) -> object::Context {
        object::Context {
            store: store.clone(),
            key: key.to_owned(),
            bound: self.source.bound(),
            journal: journal.clone(),
            folder: folder.to_owned(),
            monitor: monitor.clone(),
            base: self.base_object().cloned(),
        }
    }

    #[cfg(feature = "net")]
    fn base_object(&self) -> Option<&RoundBase> {
        self.base.as_ref().and_then(|base| base.object.as_ref())
    }

    fn sealed(&self, survey: &Survey, bytes: u64) -> Result<Sealed> {
        #[cfg(not(feature = "net"))]
        let _ = survey;
        match &self.target {
            Target::File { part, .. } if self.base.is_some() => {
                let mut encoder = self.encoder()?;
                survey.batches(&self.journal, |batch| {
                    encoder.put(Extent::new(batch.start, batch.end), &batch.cells).map(drop)
                })?;
                let (_, front) = encoder.finish()?;
                Ok(image_file::switch(Arc::new(OutFile::reopen(part)?), front, bytes))
            }
            Target::File { part, name } => Ok(image_file::sealed(part, name, bytes)),
            #[cfg(feature = "net")]
            Target::Object { store, key, .. } => {
                let (Some(front), Some(id)) = (&survey.front, &survey.upload) else {
                    return Err(Error::new(
                        Kind::Image,
                        "journal.order",
                        "the journal lacks the upload it completes",
                    )
                    .remedy("run the command again without --resume"));
                };
                let upload = Upload { key: key.clone(), id: id.clone() };
                Ok(object::sealed(store.clone(), self.base_object(), upload, front, survey.parts.iter()))
            }
            Target::Pipe(_) => Err(not_resumed()),
        }
    }

    fn seal(&self, bytes: u64, crc64: Option<u64>, unreadable: Vec<(u64, u64)>) -> Result<Manifest> {
        let survey = Survey::of(&self.journal)?;
        let mut sealer = Sealer::begin(&self.manifest, Geometry::of(self.source.size()))?;
        if let Some(base) = &self.base {
            let mut round = merge::Round::of(&base.manifest, &base.changed, base.fixes)?;
            survey.batches(&self.journal, |batch| round.put(&batch, &mut sealer))?;
            round.finish(&mut sealer)?;
        } else {
            survey.batches(&self.journal, |batch| sealer.add(&batch))?;
        }
        if let Some(base) = self.base.as_ref().filter(|base| base.fixes) {
            let old = &base.manifest.head;
            let mut amended: ExtentMap =
                old.amended.iter().map(|(start, end)| Extent::new(*start, *end)).collect();
            base.changed.iter().for_each(|run| amended.insert(run));
            let head = Head { image_bytes: bytes, crc64, ..old.clone() };
            return sealer.seal(head, &amended);
        }
        let head = Head {
            source: self.source.name(),
            inconsistent: self.source.in_use(),
            format: self.settings.format.to_string(),
            compression: Some(self.settings.compress.to_string()),
            image_bytes: bytes,
            crc64,
            unreadable,
            volumes: self.source.volumes().to_vec(),
            ..Head::default()
        };
        sealer.seal(head, self.source.amended())
    }

    /// Drops every unfinished upload of the object, also one whose id was lost with an answer. What cannot be
    /// dropped now, `haul jobs clean` finds later.
    fn abort_uploads(&self) {
        #[cfg(feature = "net")]
        if let Target::Object { store, key, .. } = &self.target {
            let unfinished = store.uploads(key).unwrap_or_default();
            for upload in unfinished.iter().filter(|upload| upload.key == *key) {
                let _ = store.abort(upload);
            }
        }
    }

    /// Removes what an unfinished copy left; nothing else refers to it.
    pub fn discard(&self) {
        // In a round that is the finished copy itself.
        if let (Target::File { part, .. }, None) = (&self.target, &self.base) {
            remove(part);
        }
        self.clear();
    }

    /// Removes what only a resumed run would need, once the copy has its name.
    pub fn clear(&self) {
        self.abort_uploads();
        #[cfg(feature = "net")]
        if let Target::Object { folder, .. } = &self.target {
            remove(&folder.join("first-part"));
        }
        remove(&self.journal);
    }
}

impl Base {
    /// What tells this round from another.
    fn identity(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for run in self.changed.iter() {
            hasher.update(&run.start.to_le_bytes()).update(&run.end.to_le_bytes());
        }
        let head = &self.manifest.head;
        format!("{} {} {}", head.image_root.0, head.image_bytes, hasher.finalize().to_hex())
    }
}

/// Removes a file that may be gone already.
fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

fn not_resumed() -> Error {
    Error::new(Kind::Usage, "resume.pipe", "a stream cannot be resumed")
        .remedy("run the command again without --resume")
}
