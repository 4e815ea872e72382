//! An image straight into an object store: a multipart upload whose first part, which holds the front, goes last.
//!
//! Parts are cut at batch borders, so that a resumed upload goes on at the end of the last part acknowledged
//! without a gap. The data of the first part waits in memory, and in a file for a resumed run.
//!
//! A round makes the object anew out of the one of the same key: what stays is copied inside the store, on condition of
//! its entity tag.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;

use super::touched::{FIRST_PART, grid};
use super::{Destination, Sealed};
use crate::error::{Error, Kind, Result};
use crate::io::atomic;
use crate::manifest::journal::{Journal, PartRecord, Record};
use crate::manifest::survey::Survey;
use crate::monitor::{Counter, Monitor};
use crate::store::part::{MAX_PART, copy_target, part_target};
use crate::store::{Body, CopySource, ObjectInfo, ObjectStore, Part, Upload, crc64};
use crate::unit::{Extent, MIB, fault, to_usize};

/// Parts larger than this wait on disk, not in memory.
const IN_MEMORY: u64 = 64 * MIB;
/// The shortest run worth a part of its own when it is copied inside the store: stores refuse shorter parts.
const MIN_COPY: u64 = 8 * MIB;
/// Zeroes from this length on may be cut: a hole of a raw image, never the padding of a table.
const LONG_ZEROES: u64 = MIB;

/// What an upload needs besides the bytes.
#[derive(Clone)]
pub struct Context {
    /// Where the object goes.
    pub store: Arc<dyn ObjectStore>,
    /// Its key.
    pub key: String,
    /// An image is at most so many bytes long.
    pub bound: u64,
    /// The job's journal.
    pub journal: Arc<Journal>,
    /// A folder for the first part's data and for parts too large for memory.
    pub folder: PathBuf,
    /// Where acknowledged bytes are counted.
    pub monitor: Arc<dyn Monitor>,
    /// The object that a round begins with, if this is one.
    pub base: Option<RoundBase>,
}

/// The object being written.
pub struct ObjectImage {
    context: Context,
    upload: Upload,
    target: u64,
    /// Whether parts end at multiples of the target, wherever they begin: so none is too short where it ends because
    /// what follows is kept.
    in_place: bool,
    /// The part being filled.
    part: Filling,
    /// Bytes to let pass: a resumed encoder repeats zeroes that are already in a part.
    skip: u64,
    number: u32,
    /// The first part's data, once it is whole.
    first: Option<Vec<u8>>,
    done: BTreeMap<u32, PartRecord>,
    uploader: Option<Uploader>,
}

/// A part not cut yet.
struct Filling {
    start: u64,
    len: u64,
    bytes: Vec<u8>,
    spool: Option<File>,
}

impl Filling {
    fn at(start: u64) -> Self {
        Filling { start, len: 0, bytes: Vec::new(), spool: None }
    }

    fn append(&mut self, bytes: &[u8], target: u64, folder: &Path) -> Result<()> {
        self.len += bytes.len() as u64;
        if target <= IN_MEMORY {
            if self.bytes.capacity() == 0 {
                self.bytes.reserve_exact(to_usize(target + 2 * MIB));
            }
            self.bytes.extend_from_slice(bytes);
            return Ok(());
        }
        let spool = match &mut self.spool {
            Some(spool) => spool,
            none => none.insert(unnamed_file(folder)?),
        };
        spool.write_all(bytes).map_err(|error| spool_error(folder, error))
    }

    fn into_body(self) -> Body {
        match self.spool {
            Some(file) => Body::file(Arc::new(file), Extent::new(0, self.len)),
            None => self.bytes.into(),
        }
    }
}

/// A file that is gone with its last descriptor, however the process ends.
fn unnamed_file(folder: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(folder)
        .map_err(|error| spool_error(folder, error))
}

fn spool_error(folder: &Path, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "object.spool", format!("cannot keep a part in {}", folder.display()))
        .remedy("free space there, or name another folder with --state-dir")
        .fact("path", folder.display())
        .caused_by(error)
}

/// The object that a round begins with.
#[derive(Clone, Debug)]
pub struct RoundBase {
    /// Its length in bytes, or less: what follows is left behind.
    pub size: u64,
    /// Its entity tag.
    pub etag: String,
    /// CRC-64/XZ of those bytes, if it is known.
    pub crc64: Option<u64>,
    /// The bytes at its start that the checksum counts in place of the object's own.
    pub front: Option<Vec<u8>>,
    /// Whether what the round sets takes the place of what it was, as in a raw image, instead of following it.
    pub in_place: bool,
}

impl ObjectImage {
    /// Begins the object, with `front` bytes left out at its start.
    pub fn begin(context: Context, front: u64) -> Result<Self> {
        let upload = context.store.begin(&context.key)?;
        context.journal.append(&Record::Upload { id: upload.id.clone() })?;
        context.journal.sync()?;
        Self::at(context, upload, front, front, BTreeMap::new())
    }

    /// Begins a round on the object of the same key as it is in the context's base. In place, its bytes come as
    /// [`Destination::kept`] says. Else they are copied inside the store, but for the first part, which is sent again
    /// last, with the new front: `front` bytes at its start are left out.
    pub fn begin_round(context: Context, front: u64) -> Result<Self> {
        let base = context.base.clone().ok_or_else(no_base)?;
        if base.in_place {
            return Self::begin(context, front);
        }
        let Context { store, key, journal, .. } = &context;
        let upload = store.begin(key)?;
        journal.append(&Record::Upload { id: upload.id.clone() })?;
        journal.sync()?;
        // What would be too short for a part of its own goes with the first.
        let first_end = if base.size < FIRST_PART + MIN_COPY { base.size } else { FIRST_PART };
        let first = store.get(key, Extent::new(0, first_end), Some(&base.etag))?;
        let held = first[to_usize(front)..].to_vec();
        atomic::write(&first_path(&context.folder), &held)?;
        let crc64 = Some(crc64::of(&held));
        let record = PartRecord { number: 1, start: front, end: first_end, etag: String::new(), crc64 };
        journal.append(&Record::Part(record.clone()))?;
        journal.sync()?;
        let rest = Extent::new(first_end, base.size);
        // The checksum of what is copied follows from that of the whole.
        let copied = base.crc64.map(|whole| {
            let mut counted = first.to_vec();
            if let Some(front) = &base.front {
                counted[..front.len()].copy_from_slice(front);
            }
            whole ^ crc64::combine(crc64::of(&counted), 0, rest.len())
        });
        let mut object = Self::at(context, upload, 0, first_end, BTreeMap::from([(1, record)]))?;
        object.first = Some(held);
        object.copy_parts(rest, copied)?;
        Ok(object)
    }

    /// How many bytes of the image are safe in the store, by the journal and by the store itself; 0 when nothing is,
    /// or the upload is gone. The survey comes back without the parts that do not count.
    pub fn safe(
        store: &dyn ObjectStore,
        key: &str,
        folder: &Path,
        front: u64,
        mut survey: Survey,
    ) -> Result<(Survey, u64)> {
        let Some(id) = &survey.upload else { return Ok((survey, 0)) };
        let held = read_first(folder).is_ok_and(|held| {
            survey.parts.first().is_some_and(|part| part.number == 1 && part.crc64 == Some(crc64::of(&held)))
        });
        let listed = match store.list_parts(&Upload { key: key.into(), id: id.clone() }) {
            Ok(listed) if held => listed,
            Ok(_) => return Ok((survey, 0)),
            Err(error) if error.id() == "store.no-upload" => return Ok((survey, 0)),
            Err(error) => return Err(error),
        };
        survey.parts.retain(|part| {
            part.number == 1
                || listed.iter().any(|there| there.number == part.number && there.etag == part.etag)
        });
        let safe = survey.uploaded(front);
        survey.parts.retain(|part| part.end <= safe);
        Ok((survey, safe))
    }

    /// Goes on with the upload in `survey`, of which `safe` bytes are in the store; the encoder stands at
    /// `position`, at or before that.
    pub fn resume(context: Context, survey: &Survey, position: u64, safe: u64) -> Result<Self> {
        let id = survey.upload.clone().unwrap_or_default();
        let upload = Upload { key: context.key.clone(), id };
        let done = survey.parts.iter().map(|part| (part.number, part.clone())).collect();
        let first = read_first(&context.folder)?;
        let mut object = Self::at(context, upload, 0, safe, done)?;
        object.skip = safe - position;
        object.first = Some(first);
        Ok(object)
    }

    fn at(
        context: Context,
        upload: Upload,
        front: u64,
        position: u64,
        done: BTreeMap<u32, PartRecord>,
    ) -> Result<Self> {
        let bound = context.bound.max(front);
        let in_place = context.base.as_ref().is_some_and(|base| base.in_place);
        let target = if in_place { grid(bound) } else { part_target(bound) };
        let uploader = Some(Uploader::start(&context, &upload, if target > FIRST_PART { 2 } else { 4 })?);
        let number = done.last_key_value().map_or(1, |(number, _)| number + 1);
        let part = Filling::at(position);
        Ok(ObjectImage {
            context,
            upload,
            target,
            in_place,
            part,
            skip: 0,
            number,
            first: None,
            done,
            uploader,
        })
    }

    /// The bytes at which the part being filled is whole.
    fn full(&self) -> u64 {
        match () {
            () if self.number == 1 => FIRST_PART.saturating_sub(self.part.start),
            () if self.in_place => self.target - self.part.start % self.target,
            () => self.target,
        }
    }

    fn cut(&mut self) -> Result<()> {
        let next = self.part.start + self.part.len;
        let part = std::mem::replace(&mut self.part, Filling::at(next));
        let number = self.number;
        self.number += 1;
        if number == 1 {
            self.hold_first(part)
        } else {
            let record =
                PartRecord { number, start: part.start, end: next, etag: String::new(), crc64: None };
            self.send(record, Load::Bytes(part.into_body()))
        }
    }

    /// Has `range` of the base, which begins where the image stands, copied inside the store as parts of their own.
    /// `crc64` is that of the range, where it is known.
    fn copy_parts(&mut self, range: Extent, crc64: Option<u64>) -> Result<()> {
        let size = self.context.base.as_ref().ok_or_else(no_base)?.size;
        if range.end > size || self.number == 1 {
            return Err(Error::new(Kind::Internal, "object.kept", format!("{range:?} cannot be kept"))
                .because(format!("the object has {size} bytes; part {} is next", self.number)));
        }
        let count = range.len().div_ceil(copy_target(size));
        let border = |i: u64| range.start + range.len() * i / count;
        for i in 0..count {
            // The checksum is put down with the last of the parts, and 0 with the others, which joins to the same.
            let crc64 = crc64.map(|crc| if i + 1 == count { crc } else { 0 });
            let (start, end) = (border(i), border(i + 1));
            let record = PartRecord { number: self.number, start, end, etag: String::new(), crc64 };
            self.number += 1;
            self.send(record, Load::Kept)?;
        }
        self.part = Filling::at(range.end);
        Ok(())
    }

    /// Keeps the first part's data: it is sent last, in front of it the front.
    fn hold_first(&mut self, part: Filling) -> Result<()> {
        let bytes = part.bytes;
        atomic::write(&first_path(&self.context.folder), &bytes)?;
        let record = PartRecord {
            number: 1,
            start: part.start,
            end: part.start + bytes.len() as u64,
            etag: String::new(),
            crc64: Some(crc64::of(&bytes)),
        };
        self.context.journal.append(&Record::Part(record))?;
        self.first = Some(bytes);
        Ok(())
    }

    fn send(&mut self, record: PartRecord, load: Load) -> Result<()> {
        let Some(parts) = self.uploader.as_ref().and_then(|uploader| uploader.parts.as_ref()) else {
            return Ok(());
        };
        let sent = parts.send((record, load)).is_ok();
        self.collect()?;
        if sent { Ok(()) } else { self.wait() }
    }

    /// Takes in what was acknowledged, and the first error.
    fn collect(&mut self) -> Result<()> {
        let Some(uploader) = &self.uploader else { return Ok(()) };
        for result in uploader.results.try_iter() {
            let record = result?;
            self.done.insert(record.number, record);
        }
        Ok(())
    }

    /// Waits for every part under way.
    fn wait(&mut self) -> Result<()> {
        let Some(mut uploader) = self.uploader.take() else { return Ok(()) };
        uploader.close()?;
        for result in uploader.results.try_iter() {
            let record = result?;
            self.done.insert(record.number, record);
        }
        Ok(())
    }
}

fn no_base() -> Error {
    Error::new(Kind::Internal, "object.base", "a round has no object to begin with")
}

fn first_path(folder: &Path) -> PathBuf {
    folder.join("first-part")
}

fn read_first(folder: &Path) -> Result<Vec<u8>> {
    let path = first_path(folder);
    std::fs::read(&path).map_err(|error| {
        Error::new(Kind::Destination, "object.first", format!("cannot read {}", path.display()))
            .caused_by(error)
    })
}

impl Destination for ObjectImage {
    fn append(&mut self, bytes: Bytes) -> Result<()> {
        let pass = to_usize(self.skip.min(bytes.len() as u64));
        self.skip -= pass as u64;
        let bytes = &bytes[pass..];
        if self.part.len + bytes.len() as u64 > MAX_PART {
            return Err(Error::new(Kind::Internal, "object.part", "a part would be longer than 5 GiB"));
        }
        // The first part is always held in memory.
        let target = if self.number == 1 { FIRST_PART } else { self.target };
        self.part.append(bytes, target, &self.context.folder)
    }

    fn zeros(&mut self, mut count: u64) -> Result<()> {
        const ZEROES: &[u8] = &[0; to_usize(LONG_ZEROES)];
        let long = count >= LONG_ZEROES;
        let pass = self.skip.min(count);
        self.skip -= pass;
        count -= pass;
        while count > 0 {
            let left = self.full().saturating_sub(self.part.len);
            let n = count.min(LONG_ZEROES).min(if left > 0 { left } else { LONG_ZEROES });
            self.append(Bytes::from_static(&ZEROES[..to_usize(n)]))?;
            count -= n;
            if long && self.part.len >= self.full() {
                self.cut()?;
            }
        }
        Ok(())
    }

    fn kept(&mut self, count: u64) -> Result<()> {
        let pass = self.skip.min(count);
        self.skip -= pass;
        if count == pass {
            return Ok(());
        }
        if self.part.len > 0 {
            self.cut()?;
        }
        self.copy_parts(Extent::at(self.part.start, count - pass), None)
    }

    fn batch_border(&mut self) -> Result<()> {
        if self.part.len >= self.full() && self.part.len > 0 {
            self.cut()?;
        }
        self.collect()
    }

    fn settle(&mut self) -> Result<()> {
        self.wait()?;
        self.context.journal.sync()
    }

    fn finish(mut self: Box<Self>, front: Vec<u8>) -> Result<Sealed> {
        if self.number == 1 || self.part.len > 0 {
            self.cut()?;
        }
        self.wait()?;
        let mut first = front;
        first.extend(self.first.take().unwrap_or_default());
        let len = first.len() as u64;
        fault::point("complete");
        let part = send_part(&self.context, &self.upload, 1, first.into())?;
        fault::point("complete");
        let record = PartRecord { number: 1, start: 0, end: len, etag: part.etag, crc64: part.crc64 };
        self.context.journal.append(&Record::Front(record.clone()))?;
        let Context { store, base, .. } = self.context;
        Ok(sealed(store, base.as_ref(), self.upload, &record, self.done.values()))
    }
}

/// The complete upload of the part `front` and the `others`, of which one numbered 1 does not count. It takes the place
/// of `base`, if there is one, and of no other object.
pub fn sealed<'a>(
    store: Arc<dyn ObjectStore>,
    base: Option<&RoundBase>,
    upload: Upload,
    front: &'a PartRecord,
    others: impl Iterator<Item = &'a PartRecord>,
) -> Sealed {
    let parts: Vec<Part> = std::iter::once(front)
        .chain(others.filter(|part| part.number != 1))
        .map(|record| Part {
            number: record.number,
            size: record.end - record.start,
            etag: record.etag.clone(),
            crc64: record.crc64,
        })
        .collect();
    let bytes = parts.iter().map(|part| part.size).sum();
    let crc = crc64::of_parts(&parts);
    let replaced = base.map(|base| base.etag.clone());
    let publish = move || complete(&*store, &upload, &parts, replaced.as_deref()).map(|object| object.crc64);
    Sealed::new(bytes, crc, publish)
}

/// Joins `parts` into the object, which has the entity tag `replaced` until then, if it is there at all.
fn complete(
    store: &dyn ObjectStore,
    upload: &Upload,
    parts: &[Part],
    replaced: Option<&str>,
) -> Result<ObjectInfo> {
    let (bytes, crc) = (parts.iter().map(|part| part.size).sum::<u64>(), crc64::of_parts(parts));
    // Where no checksum tells, the tag does: it changes with the object.
    let joined = |object: &ObjectInfo| {
        object.size == bytes
            && replaced != Some(object.etag.as_str())
            && (object.crc64.is_none() || crc.is_none() || object.crc64 == crc)
    };
    if let Some(tag) = replaced {
        let there = store.head(&upload.key)?;
        if there.as_ref().is_none_or(|object| object.etag != tag) {
            // A run before this one may have completed it and not lived to say so: then the upload is gone.
            return match (store.list_parts(upload), there) {
                (Err(error), Some(object)) if error.id() == "store.no-upload" && joined(&object) => {
                    Ok(object)
                }
                (Err(error), _) if error.id() != "store.no-upload" => Err(error),
                _ => Err(replaced_meanwhile(&store.name(&upload.key))),
            };
        }
    }
    match store.complete(upload, parts) {
        Err(error) if error.id() == "store.no-upload" => match store.head(&upload.key)? {
            Some(object) if joined(&object) => Ok(object),
            _ => Err(error),
        },
        done => done,
    }
}

fn replaced_meanwhile(name: &str) -> Error {
    Error::new(Kind::Mismatch, "round.replaced", format!("{name} is not the object the round began with"))
        .because("its entity tag is another one: something else wrote it")
        .remedy("make the copy again as a whole with --force, under another name if that object is needed")
        .fact("object", name)
}

fn send_part(context: &Context, upload: &Upload, number: u32, body: Body) -> Result<Part> {
    let len = body.len();
    let mut part = context.store.put_part(upload, number, body.clone())?;
    if part.crc64.is_none() {
        part.crc64 = Some(body.crc64()?);
    }
    context.monitor.count(Counter::Written, len);
    Ok(part)
}

/// Copies the part in `record` out of the base.
fn copy_part(context: &Context, upload: &Upload, record: &PartRecord) -> Result<Part> {
    let base = context.base.as_ref().ok_or_else(no_base)?;
    let range = Extent::new(record.start, record.end);
    let source = CopySource { key: &context.key, etag: &base.etag, range };
    context.store.copy_part(upload, record.number, &source)
}

/// Where the bytes of a part come from.
enum Load {
    /// They are sent.
    Bytes(Body),
    /// They are those of the base, at the same place.
    Kept,
}

/// A few threads that send parts side by side.
struct Uploader {
    parts: Option<SyncSender<(PartRecord, Load)>>,
    results: Receiver<Result<PartRecord>>,
    threads: Vec<JoinHandle<()>>,
}

impl Uploader {
    fn start(context: &Context, upload: &Upload, threads: usize) -> Result<Self> {
        // No queue: what waits to be sent is the one part the writer holds.
        let (parts, wanted) = mpsc::sync_channel(0);
        let wanted = Arc::new(Mutex::new(wanted));
        let (acknowledged, results) = mpsc::channel();
        let threads = (0..threads)
            .map(|_| {
                let (wanted, acknowledged, upload) = (wanted.clone(), acknowledged.clone(), upload.clone());
                let context = context.clone();
                std::thread::Builder::new()
                    .name("upload".into())
                    .spawn(move || upload_parts(&context, &upload, &wanted, &acknowledged))
                    .map_err(|error| {
                        Error::new(Kind::Internal, "thread.start", "cannot start a thread").caused_by(error)
                    })
            })
            .collect::<Result<_>>()?;
        Ok(Uploader { parts: Some(parts), results, threads })
    }

    /// Takes no more parts, and returns when those under way have ended.
    fn close(&mut self) -> Result<()> {
        self.parts = None;
        std::mem::take(&mut self.threads).into_iter().try_for_each(|thread| {
            thread
                .join()
                .map_err(|_| Error::new(Kind::Internal, "upload.thread", "an upload thread panicked"))
        })
    }
}

impl Drop for Uploader {
    /// A run that failed leaves no thread behind that would write to the journal of the next one.
    fn drop(&mut self) {
        let _ = self.close();
    }
}

fn upload_parts(
    context: &Context,
    upload: &Upload,
    wanted: &Mutex<Receiver<(PartRecord, Load)>>,
    acknowledged: &Sender<Result<PartRecord>>,
) {
    loop {
        let next = wanted.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((mut record, load)) = next else { return };
        let (done, phase) = match load {
            Load::Bytes(body) => (send_part(context, upload, record.number, body), "upload"),
            Load::Kept => (copy_part(context, upload, &record), "round"),
        };
        let result = done.and_then(|part| {
            record.etag = part.etag;
            record.crc64 = record.crc64.or(part.crc64);
            fault::point(phase);
            context.journal.append(&Record::Part(record.clone()))?;
            context.journal.sync()?;
            fault::point(phase);
            Ok(record)
        });
        let failed = result.is_err();
        if acknowledged.send(result).is_err() || failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::{Compress, Format, Subformat, encoder, raw};
    use crate::io::AlignedBuf;
    use crate::io::batch::{Encoder, Geometry, RawBatch};
    use crate::monitor::Tally;
    use crate::sink::touched::touched;
    use crate::sink::{ImageSink, Sink};
    use crate::store::memory::Memory;
    use crate::store::part::MIN_PART;
    use crate::unit::ExtentMap;

    struct Bench {
        store: Arc<Memory>,
        folder: tempfile::TempDir,
        format: (Format, Option<Subformat>),
        /// What the parts are planned for, in bytes.
        bound: u64,
    }

    impl Bench {
        fn new(fixed: bool, bound: u64) -> Self {
            let format = if fixed { (Format::Vhd, Some(Subformat::Fixed)) } else { (Format::Raw, None) };
            let folder = tempfile::tempdir().unwrap();
            Bench { store: Arc::new(Memory::new("b")), folder, format, bound }
        }

        fn encoder(&self, disk: &[u8]) -> Box<dyn Encoder> {
            encoder(self.format.0, self.format.1, Compress::None, disk.len() as u64, "disk").unwrap()
        }

        fn context(&self, base: Option<RoundBase>) -> Context {
            let journal = Journal::create(&self.folder.path().join("journal"), b"{}").unwrap();
            Context {
                store: self.store.clone(),
                key: "disk".into(),
                bound: self.bound,
                journal: Arc::new(journal),
                folder: self.folder.path().to_owned(),
                monitor: Arc::new(Tally::default()),
                base,
            }
        }

        /// The object laid out whole, or of what is `touched`; it has no name yet.
        fn lay_out(&self, disk: &[u8], touched: Option<&ExtentMap>) -> Result<Sealed> {
            let size = disk.len() as u64;
            let geometry = Geometry::of(size);
            let context = self.context(touched.map(|_| self.base()));
            let journal = context.journal.clone();
            let mut encoder = self.encoder(disk);
            let object = match touched {
                Some(touched) => {
                    encoder = Box::new(raw::round::Round::new(encoder, touched.clone(), self.base().size));
                    ObjectImage::begin_round(context, 0)?
                }
                None => ObjectImage::begin(context, 0)?,
            };
            let mut packer = encoder.packer()?;
            let mut sink = Box::new(ImageSink::new(encoder, Box::new(object), journal));
            let mut at = 0;
            while at < size {
                let extent = geometry.batch_at(at);
                at = extent.end;
                if touched.is_some_and(|touched| !touched.covers(extent)) {
                    continue;
                }
                let bytes = &disk[to_usize(extent.start)..to_usize(extent.end)];
                if bytes.iter().all(|byte| *byte == 0) {
                    continue;
                }
                let mut buf = AlignedBuf::new(to_usize(geometry.batch()));
                buf[..bytes.len()].copy_from_slice(bytes);
                sink.put(packer.pack(RawBatch::new(extent, buf).hash(&geometry))?)?;
            }
            sink.finish()
        }

        fn object(&self) -> Vec<u8> {
            let info = self.store.head("disk").unwrap().unwrap();
            self.store.get("disk", Extent::new(0, info.size), None).unwrap().to_vec()
        }

        fn base(&self) -> RoundBase {
            let info = self.store.head("disk").unwrap().unwrap();
            RoundBase { size: info.size, etag: info.etag, crc64: info.crc64, front: None, in_place: true }
        }

        /// What a round sets of an image, as `job::round` has it.
        fn touched(&self, changed: &ExtentMap, disk: u64) -> ExtentMap {
            let mut changed = changed.clone();
            let mut end = self.base().size;
            if self.format.0 == Format::Vhd {
                end -= 512;
                changed.insert(Extent::new(end - 1, end));
            }
            touched(&changed, end, Geometry::of(disk).batch())
        }

        /// The sizes of the parts sent and copied so far.
        fn parts(&self) -> Vec<u64> {
            let uploads = self.store.uploads("disk").unwrap();
            let parts = self.store.list_parts(uploads.last().unwrap()).unwrap();
            parts.iter().map(|part| part.size).collect()
        }
    }

    /// Some of a disk: noise in runs of whole KiB, zeroes between them.
    fn fill(disk: &mut [u8], runs: &[(usize, usize, u8)]) -> ExtentMap {
        let mut changed = ExtentMap::new();
        let len = disk.len();
        for (at, count, seed) in runs {
            let (start, end) = (at % len, (at % len + count).min(len));
            for (i, byte) in disk[start..end].iter_mut().enumerate() {
                *byte = seed.wrapping_mul(u8::try_from(i % 251).unwrap());
            }
            changed.insert(Extent::new(start as u64, end as u64));
        }
        changed
    }

    fn runs(most: usize, longest: usize) -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
        prop::collection::vec((any::<usize>(), 1..longest, prop::sample::select(vec![0, 1, 7, 91])), 0..most)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_round_in_place_makes_what_a_whole_copy_would_out_of_parts_a_store_takes(
            size in (1usize..120, 0usize..3).prop_map(|(mib, more)| (mib << 20) + more * 512),
            fixed in any::<bool>(),
            large in any::<bool>(),
            before in runs(12, 20 << 20),
            changes in runs(6, 3 << 20),
        ) {
            // The parts of a disk of 400 GiB are of 46 MiB, those of a small one of 16.
            let bench = Bench::new(fixed, if large { 400 << 30 } else { size as u64 });
            let mut disk = vec![0; size];
            fill(&mut disk, &before);
            bench.lay_out(&disk, None).unwrap().publish().unwrap();
            let changed = fill(&mut disk, &changes);
            let touched = bench.touched(&changed, size as u64);
            let received = bench.store.received();
            let sealed = bench.lay_out(&disk, Some(&touched)).unwrap();
            let sent = bench.store.received() - received;
            let parts = bench.parts();
            prop_assert!(parts[..parts.len() - 1].iter().all(|size| *size >= MIN_PART), "{parts:?} of {touched:?}");
            prop_assert!(sent <= touched.bytes() + 512, "{sent} bytes for {touched:?}");
            sealed.publish().unwrap();
            let round = bench.object();
            bench.lay_out(&disk, None).unwrap().publish().unwrap();
            prop_assert!(round == bench.object());
        }
    }

    /// A store's smallest part must hold for what is left of a run when a whole part was cut off it.
    #[test]
    fn a_run_longer_than_a_part_has_no_short_end() {
        // Parts of such an object are of 46 MiB, which is no whole number of granules.
        let bench = Bench::new(false, 400 << 30);
        let mut disk = vec![0; 96 << 20];
        bench.lay_out(&disk, None).unwrap().publish().unwrap();
        let changed = fill(&mut disk, &[(16 << 20, 48 << 20, 7)]);
        let sealed = bench.lay_out(&disk, Some(&bench.touched(&changed, 96 << 20))).unwrap();
        assert_eq!(bench.parts(), [8, 8, 32, 16, 32].map(|mib| mib << 20));
        sealed.publish().unwrap();
        assert!(bench.object() == disk);
    }

    fn object_and_change() -> (Bench, Vec<u8>, ExtentMap) {
        let bench = Bench::new(false, 64 << 20);
        let mut disk = vec![0; 64 << 20];
        fill(&mut disk, &[(0, 64 << 20, 3)]);
        bench.lay_out(&disk, None).unwrap().publish().unwrap();
        let changed = fill(&mut disk, &[(40 << 20, 70_000, 9)]);
        let touched = bench.touched(&changed, 64 << 20);
        (bench, disk, touched)
    }

    #[test]
    fn an_object_replaced_during_a_round_is_left_alone() {
        let (bench, disk, touched) = object_and_change();
        let sealed = bench.lay_out(&disk, Some(&touched)).unwrap();
        bench.store.put("disk", vec![1; 64 << 20].into()).unwrap();
        let error = sealed.publish().unwrap_err();
        assert_eq!((error.kind(), error.id()), (Kind::Mismatch, "round.replaced"));
        assert!(bench.object() == vec![1; 64 << 20]);

        // The store itself refuses to copy out of another object.
        let context = bench.context(Some(RoundBase { etag: "\"old\"".into(), ..bench.base() }));
        let mut object = Box::new(ObjectImage::begin_round(context, 0).unwrap());
        object.append(vec![5; 8 << 20].into()).unwrap();
        object.kept(56 << 20).unwrap();
        assert_eq!(object.finish(Vec::new()).unwrap_err().id(), "store.changed");
    }

    #[test]
    fn a_completion_whose_answer_was_lost_is_told_by_the_entity_tag() {
        let (bench, disk, touched) = object_and_change();
        let before = bench.base();
        let sealed = bench.lay_out(&disk, Some(&touched)).unwrap();
        let upload = bench.store.uploads("disk").unwrap().pop().unwrap();
        let parts = bench.store.list_parts(&upload).unwrap();
        bench.store.complete(&upload, &parts).unwrap();
        sealed.publish().unwrap();
        // The same upload gone, and the object the one it was: it was not completed.
        let error = complete(&*bench.store, &upload, &parts, Some(&bench.base().etag)).unwrap_err();
        assert_eq!(error.id(), "store.no-upload");
        complete(&*bench.store, &upload, &parts, Some(&before.etag)).unwrap();
    }
}
