//! An image file into an object: parts side by side; what an interrupted upload left in the store is not sent again.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use md5::{Digest as _, Md5};
use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::io::{DiskFile, ReadAt, read_vec};
use crate::monitor::{Counter, Monitor};
use crate::store::part::part_target;
use crate::store::{Body, ObjectStore, Part, Upload};
use crate::unit::{Extent, MIB, to_usize};

/// Parts sent side by side.
const THREADS: usize = 4;

/// An object uploaded.
#[derive(Debug, Serialize)]
pub struct Uploaded {
    /// The object.
    pub object: String,
    /// Length in bytes.
    pub size: u64,
    /// CRC-64/XZ of the object, from stores that keep one.
    pub crc64: Option<u64>,
    /// Bytes that an earlier run had sent.
    pub already_there: u64,
}

/// Uploads the file at `path` as `key`. With `resume` the latest unfinished upload of that key is taken up: parts whose
/// size and MD5 tag are those of the file stay.
pub fn upload(
    path: &Path,
    store: &Arc<dyn ObjectStore>,
    key: &str,
    resume: bool,
    stop: &AtomicBool,
    monitor: &dyn Monitor,
) -> Result<Uploaded> {
    let disk = DiskFile::open(path)?;
    let (size, before) = (disk.size(), disk.identity()?);
    monitor.begin("upload", Some(size));
    if size == 0 {
        let object = store.put(key, Vec::new().into())?;
        return Ok(Uploaded { object: store.name(key), size, crc64: object.crc64, already_there: 0 });
    }
    let earlier =
        if resume { store.uploads(key)?.into_iter().rfind(|upload| upload.key == key) } else { None };
    let there = earlier.as_ref().map_or(Ok(Vec::new()), |upload| store.list_parts(upload))?;
    let upload = earlier.map_or_else(|| store.begin(key), Ok)?;
    let work = Work {
        file: Arc::new(File::open(path).map_err(|error| {
            Error::new(Kind::Source, "io.open", format!("cannot open {}", path.display())).caused_by(error)
        })?),
        disk,
        store: store.clone(),
        upload,
        there,
        target: part_target(size),
        next: AtomicU32::new(1),
    };
    let sent = send_all(&work, stop, monitor).and_then(|parts| {
        if work.disk.identity()? != before {
            return Err(Error::new(
                Kind::Source,
                "source.changed",
                format!("{} changed while it was sent", path.display()),
            )
            .remedy("run the command again when nothing writes to it"));
        }
        Ok((
            store.complete(&work.upload, &parts.iter().map(|(part, _)| part.clone()).collect::<Vec<_>>())?,
            parts,
        ))
    });
    match sent {
        Ok((object, parts)) => Ok(Uploaded {
            object: store.name(key),
            size: object.size,
            crc64: object.crc64,
            already_there: parts.iter().filter(|(_, kept)| *kept).map(|(part, _)| part.size).sum(),
        }),
        Err(error) => {
            if !matches!(error.kind(), Kind::Interrupted | Kind::Network | Kind::Credentials) {
                // Nobody will take it up: parts are billed until they are dropped.
                let _ = store.abort(&work.upload);
            }
            Err(error)
        }
    }
}

struct Work {
    file: Arc<File>,
    disk: DiskFile,
    store: Arc<dyn ObjectStore>,
    upload: Upload,
    there: Vec<Part>,
    target: u64,
    next: AtomicU32,
}

/// Sends every part; each comes back with whether the store had it already.
fn send_all(work: &Work, stop: &AtomicBool, monitor: &dyn Monitor) -> Result<Vec<(Part, bool)>> {
    let failed = AtomicBool::new(false);
    let one_thread = || -> Result<Vec<(Part, bool)>> {
        let mut parts = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, "interrupted", "the upload was stopped"));
            }
            let number = work.next.fetch_add(1, Ordering::Relaxed);
            let start = u64::from(number - 1) * work.target;
            let range = Extent::at(start, work.target).intersect(Extent::new(0, work.disk.size()));
            if range.is_empty() {
                break;
            }
            match send(work, number, range, monitor) {
                Ok(part) => parts.push(part),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(parts)
    };
    let mut all = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(one_thread)).collect();
        threads.into_iter().try_fold(Vec::new(), |mut all, thread| {
            all.extend(thread.join().unwrap_or_else(|_| {
                Err(Error::new(Kind::Internal, "upload.thread", "an upload thread panicked"))
            })?);
            Ok::<_, Error>(all)
        })
    })?;
    all.sort_by_key(|(part, _)| part.number);
    Ok(all)
}

fn send(work: &Work, number: u32, range: Extent, monitor: &dyn Monitor) -> Result<(Part, bool)> {
    let body = Body::file(work.file.clone(), range);
    if let Some(there) = work.there.iter().find(|part| part.number == number && part.size == range.len())
        && there.etag.trim_matches('"').eq_ignore_ascii_case(&md5(&work.disk, range)?)
    {
        let part = Part { crc64: Some(body.crc64()?), ..there.clone() };
        monitor.advance(range.end);
        return Ok((part, true));
    }
    let part = work.store.put_part(&work.upload, number, body)?;
    monitor.count(Counter::Written, range.len());
    monitor.advance(range.end);
    Ok((part, false))
}

fn md5(disk: &DiskFile, range: Extent) -> Result<String> {
    let mut hasher = Md5::new();
    let mut at = range.start;
    while at < range.end {
        let piece = Extent::at(at, MIB).intersect(range);
        hasher.update(read_vec(disk, piece.start, to_usize(piece.len()))?);
        at = piece.end;
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
