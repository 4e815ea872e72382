//! An image straight into an object store: a multipart upload whose first part, which holds the front, goes last.
//!
//! Parts are cut at batch borders, so that a resumed upload goes on at the end of the last part acknowledged
//! without a gap. The data of the first part waits in memory, and in a file for a resumed run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::{Destination, Sealed};
use crate::error::{Error, Kind, Result};
use crate::io::atomic;
use crate::manifest::journal::{Journal, PartRecord, Record};
use crate::manifest::survey::Survey;
use crate::monitor::{Counter, Monitor};
use crate::store::part::{MAX_PART, part_target};
use crate::store::{Body, CopySource, ObjectStore, Part, Upload, crc64};
use crate::unit::{Extent, MIB, fault, to_usize};

/// Bytes of the first part, the front included: small, because it is sent again at each change of the image.
const FIRST_PART: u64 = 16 * MIB;
/// Parts larger than this wait on disk, not in memory.
const IN_MEMORY: u64 = 64 * MIB;
/// The shortest run worth a part of its own when it is copied inside the store: stores refuse shorter parts.
const MIN_COPY: u64 = 8 * MIB;
/// The longest part copied inside the store: far below the 5 GiB that stores allow, so that one try is short.
const MAX_COPY: u64 = 1024 * MIB;
/// Zeroes from this length on may be cut: a hole of a raw image, never the padding of a table.
const LONG_ZEROES: u64 = MIB;

/// What an upload needs besides the bytes.
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
}

/// The object being written.
pub struct ObjectImage {
    context: Context,
    upload: Upload,
    target: u64,
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
}

/// The checksum of `range` of an object, by reading it.
fn crc_of(store: &dyn ObjectStore, key: &str, etag: &str, range: Extent) -> Result<u64> {
    let mut hasher = crc64::Hasher::new();
    let mut at = range.start;
    while at < range.end {
        let bytes = store.get(key, Extent::new(at, (at + 8 * MIB).min(range.end)), Some(etag))?;
        hasher.update(&bytes);
        at += bytes.len() as u64;
    }
    Ok(hasher.finish())
}

impl ObjectImage {
    /// Begins the object, with `front` bytes left out at its start.
    pub fn begin(context: Context, front: u64) -> Result<Self> {
        let upload = context.store.begin(&context.key)?;
        context.journal.append(&Record::Upload { id: upload.id.clone() })?;
        context.journal.sync()?;
        Self::at(context, upload, front, front, BTreeMap::new())
    }

    /// Begins a round on the object of the same key as it is in `base`: its bytes are copied inside the store, but for
    /// the first part, which is sent again last, with the new front. `front` bytes at its start are left out.
    pub fn begin_round(context: Context, base: &RoundBase, front: u64) -> Result<Self> {
        let Context { store, key, journal, .. } = &context;
        let upload = store.begin(key)?;
        journal.append(&Record::Upload { id: upload.id.clone() })?;
        journal.sync()?;
        // What would be too short for a part of its own goes with the first.
        let first_end = if base.size < FIRST_PART + MIN_COPY { base.size } else { FIRST_PART };
        let first = store.get(key, Extent::new(0, first_end), Some(&base.etag))?;
        let held = first[to_usize(front)..].to_vec();
        atomic::write(&first_path(&context.folder), &held)?;
        let crc64 = crc64::of(&held);
        let record = PartRecord { number: 1, start: front, end: first_end, etag: String::new(), crc64 };
        journal.append(&Record::Part(record.clone()))?;
        let mut done = BTreeMap::from([(1, record)]);
        // The checksum of what is copied follows from that of the whole; it is put down with the last of its parts,
        // and 0 with the others, which joins to the same.
        let rest = base.size - first_end;
        let copied_crc = match base.crc64 {
            Some(whole) => {
                let mut counted = first.to_vec();
                if let Some(front) = &base.front {
                    counted[..front.len()].copy_from_slice(front);
                }
                whole ^ crc64::combine(crc64::of(&counted), 0, rest)
            }
            None => crc_of(&**store, key, &base.etag, Extent::new(first_end, base.size))?,
        };
        let count = rest.div_ceil(MAX_COPY);
        for (number, i) in (2..).zip(0..count) {
            let range = Extent::new(first_end + rest * i / count, first_end + rest * (i + 1) / count);
            let part = store.copy_part(
                &upload,
                number,
                &CopySource { key: key.as_str(), etag: &base.etag, range },
            )?;
            let crc64 = if i + 1 == count { copied_crc } else { 0 };
            let record = PartRecord { number, start: range.start, end: range.end, etag: part.etag, crc64 };
            journal.append(&Record::Part(record.clone()))?;
            done.insert(number, record);
            fault::point("round");
        }
        journal.sync()?;
        let mut object = Self::at(context, upload, 0, base.size, done)?;
        object.first = Some(held);
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
            survey.parts.first().is_some_and(|part| part.number == 1 && part.crc64 == crc64::of(&held))
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
        let target = part_target(context.bound.max(front));
        let uploader = Some(Uploader::start(&context, &upload, if target > FIRST_PART { 2 } else { 4 })?);
        let number = done.last_key_value().map_or(1, |(number, _)| number + 1);
        let part = Filling::at(position);
        Ok(ObjectImage { context, upload, target, part, skip: 0, number, first: None, done, uploader })
    }

    /// The bytes at which the part being filled is whole.
    fn full(&self) -> u64 {
        if self.number == 1 { FIRST_PART.saturating_sub(self.part.start) } else { self.target }
    }

    fn cut(&mut self) -> Result<()> {
        let next = self.part.start + self.part.len;
        let part = std::mem::replace(&mut self.part, Filling::at(next));
        let number = self.number;
        self.number += 1;
        if number == 1 {
            self.hold_first(part)
        } else {
            let record = PartRecord { number, start: part.start, end: next, etag: String::new(), crc64: 0 };
            self.send(record, part.into_body())
        }
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
            crc64: crc64::of(&bytes),
        };
        self.context.journal.append(&Record::Part(record))?;
        self.first = Some(bytes);
        Ok(())
    }

    fn send(&mut self, record: PartRecord, body: Body) -> Result<()> {
        let Some(parts) = self.uploader.as_ref().and_then(|uploader| uploader.parts.as_ref()) else {
            return Ok(());
        };
        let sent = parts.send((record, body)).is_ok();
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
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
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
            let n = count.min(LONG_ZEROES);
            self.append(&ZEROES[..to_usize(n)])?;
            count -= n;
            if long && self.part.len >= self.full() {
                self.cut()?;
            }
        }
        Ok(())
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
        let record =
            PartRecord { number: 1, start: 0, end: len, etag: part.etag, crc64: part.crc64.unwrap_or(0) };
        self.context.journal.append(&Record::Front(record.clone()))?;
        Ok(sealed(self.context.store, self.upload, &record, self.done.values()))
    }
}

/// The complete upload of the part `front` and the `others`, of which one numbered 1 does not count.
pub fn sealed<'a>(
    store: Arc<dyn ObjectStore>,
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
            crc64: Some(record.crc64),
        })
        .collect();
    let bytes = parts.iter().map(|part| part.size).sum();
    let crc = crc64::of_parts(&parts);
    let publish = move || match store.complete(&upload, &parts) {
        Ok(_) => Ok(()),
        // A run before this one may have completed it and not lived to say so.
        Err(error) if error.id() == "store.no-upload" => match store.head(&upload.key)? {
            Some(object) if object.size == bytes && (object.crc64.is_none() || object.crc64 == crc) => Ok(()),
            _ => Err(error),
        },
        Err(error) => Err(error),
    };
    Sealed::new(bytes, crc, publish)
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

/// A few threads that send parts side by side.
struct Uploader {
    parts: Option<SyncSender<(PartRecord, Body)>>,
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
                let context = Context {
                    store: context.store.clone(),
                    key: context.key.clone(),
                    bound: context.bound,
                    journal: context.journal.clone(),
                    folder: context.folder.clone(),
                    monitor: context.monitor.clone(),
                };
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
    wanted: &Mutex<Receiver<(PartRecord, Body)>>,
    acknowledged: &Sender<Result<PartRecord>>,
) {
    loop {
        let next = wanted.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((mut record, body)) = next else { return };
        let result = send_part(context, upload, record.number, body).and_then(|part| {
            record.etag = part.etag;
            record.crc64 = part.crc64.unwrap_or(0);
            fault::point("upload");
            context.journal.append(&Record::Part(record.clone()))?;
            context.journal.sync()?;
            fault::point("upload");
            Ok(record)
        });
        let failed = result.is_err();
        if acknowledged.send(result).is_err() || failed {
            return;
        }
    }
}
