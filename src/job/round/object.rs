//! What rounds on an object need besides: whether it is still the one that its manifest describes, whether a stopped
//! round has become it, and how it is put back.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::{Finished, manifest_digest, other, read};
use crate::config::Location;
use crate::error::{Error, Kind, Result};
use crate::io::atomic::with_suffix;
use crate::job::work::WorkFolder;
use crate::manifest::Manifest;
use crate::manifest::journal::Journal;
use crate::manifest::survey::Survey;
use crate::monitor::Monitor;
use crate::sink::Destination;
use crate::sink::object::{Context, ObjectImage, RoundBase};
use crate::store::{ObjectDisk, ObjectInfo, ObjectStore, Upload};

/// The same for an object, by its checksum, too, where both know it: a raw disk may have been replaced by another.
pub fn check(manifest: &Manifest, copy: &Location, info: &ObjectInfo) -> Result<()> {
    super::check(manifest, copy, info.size)?;
    match (manifest.head.crc64, info.crc64) {
        (Some(said), Some(found)) if said != found => {
            Err(other(copy, &format!("its CRC-64 is {found}, the manifest says {said}")))
        }
        _ => Ok(()),
    }
}

/// Whether the object is what a stopped round made of the one in `before`: its entity tag is another, the round's upload
/// is gone, and the round's manifest, which was written first, describes it.
pub fn counts(
    store: &Arc<dyn ObjectStore>,
    key: &str,
    job: &Finished,
    beside: &Path,
    before: &Manifest,
) -> Result<bool> {
    let base = WorkFolder::path_beside(beside).join("base");
    let info = stat(store, key)?;
    let Ok(tag) = fs::read_to_string(base.join("etag")) else {
        // A version of haul began it that kept no tag, and knew no rounds but those that make an image longer.
        return Ok(info.size > before.head.image_bytes);
    };
    let journal = with_suffix(beside, ".haul-journal");
    let upload = Survey::of(&journal).ok().and_then(|survey| survey.upload);
    let upload = upload.map(|id| Upload { key: key.to_owned(), id });
    if info.etag == tag {
        // What was sent for it is billed until it is dropped.
        if let Some(upload) = upload {
            store.abort(&upload)?;
        }
        return Ok(false);
    }
    let there = match upload.map(|upload| store.list_parts(&upload)) {
        None => false,
        Some(Ok(_)) => true,
        Some(Err(error)) if error.id() == "store.no-upload" => false,
        Some(Err(error)) => return Err(error),
    };
    let path = with_suffix(beside, ".manifest");
    let now = Manifest::open(&path)?;
    let same = manifest_digest(beside)? == *blake3::hash(&read(&base.join("manifest"))?).as_bytes();
    if there || same {
        return Err(other(
            &job.copy,
            "its entity tag is not the one it had, and the round did not come to its end",
        ));
    }
    check(&now, &job.copy, &info).map(|()| true)
}

/// What the store says of an object that must be there.
pub fn stat(store: &Arc<dyn ObjectStore>, key: &str) -> Result<ObjectInfo> {
    ObjectDisk::open(store.clone(), key, 0).map(|object| object.info().clone())
}

/// Makes the object from its own first bytes, with the front it had.
pub fn undo(
    store: Arc<dyn ObjectStore>,
    key: &str,
    beside: &Path,
    before: &Manifest,
    front: Vec<u8>,
    monitor: &Arc<dyn Monitor>,
) -> Result<()> {
    let work = WorkFolder::beside(beside, false)?;
    let info = store.head(key)?.filter(|info| info.size >= before.head.image_bytes);
    let Some(info) = info else {
        return Err(Error::new(Kind::Mismatch, "undo.other", "the object is another one"));
    };
    let journal = Arc::new(Journal::create(&work.path().join("journal"), b"undo")?);
    let base = RoundBase {
        size: before.head.image_bytes,
        etag: info.etag,
        crc64: before.head.crc64,
        front: Some(front.clone()),
        in_place: false,
    };
    let context = Context {
        store,
        key: key.to_owned(),
        bound: before.head.image_bytes,
        journal,
        folder: work.path().to_owned(),
        monitor: monitor.clone(),
        base: Some(base),
    };
    let object = ObjectImage::begin_round(context, front.len() as u64)?;
    Box::new(object).finish(front)?.publish().map(drop)
}
