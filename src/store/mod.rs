//! Object stores behind one port: S3/COS, memory, and wrappers that retry, limit and inject faults.
//!
//! The port is synchronous: its callers are threads of the data path.

mod body;
pub mod crc64;
pub mod fault;
pub mod limit;
pub mod memory;
pub mod object_disk;
pub mod part;
pub mod retry;
pub mod s3;

use std::time::Duration;

use bytes::Bytes;

use crate::error::{Error, Kind, Result};
use crate::unit::{Extent, Secret};

pub use body::Body;
pub use object_disk::ObjectDisk;

/// What a store says about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Length in bytes.
    pub size: u64,
    /// The entity tag as the store gave it, quotes included. Never the digest of a multipart object.
    pub etag: String,
    /// CRC-64/XZ of the whole object, from stores that keep one (COS).
    pub crc64: Option<u64>,
}

/// A multipart upload that was begun and neither completed nor aborted.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Upload {
    /// The object it will become.
    pub key: String,
    /// The store's name for it.
    pub id: String,
}

/// A part that the store acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Part {
    /// 1 to 10,000; parts are joined in this order.
    pub number: u32,
    /// Length in bytes.
    pub size: u64,
    /// The entity tag as the store gave it, quotes included.
    pub etag: String,
    /// CRC-64/XZ of the bytes we sent. `None` in a listing: no store lists it.
    pub crc64: Option<u64>,
}

/// A range of an object to copy inside the store.
#[derive(Clone, Debug)]
pub struct CopySource<'a> {
    /// The object, in the same bucket.
    pub key: &'a str,
    /// The entity tag it must still have.
    pub etag: &'a str,
    /// The bytes to copy; not empty.
    pub range: Extent,
}

/// One bucket of an object store.
///
/// Every error names the object and says by [`Error::retry`] whether another try can help; nothing is retried
/// inside. A method that returns `Ok` has the store's acknowledgement, with its checksum proven where the store
/// gives one.
pub trait ObjectStore: Send + Sync {
    /// What to call an object in a message: `cos://bucket/key`.
    fn name(&self, key: &str) -> String;

    /// Size and tags of an object; `None` when there is none.
    fn head(&self, key: &str) -> Result<Option<ObjectInfo>>;

    /// The bytes of `range`, all of which must exist; with `if_match`, only while the object has that entity tag.
    fn get(&self, key: &str, range: Extent, if_match: Option<&str>) -> Result<Bytes>;

    /// Writes a small object whole, replacing what was there.
    fn put(&self, key: &str, body: Body) -> Result<ObjectInfo>;

    /// Removes an object; it is no error when there is none.
    fn delete(&self, key: &str) -> Result<()>;

    /// Begins a multipart upload. Repeated after a lost answer it leaves an empty one for [`ObjectStore::uploads`].
    fn begin(&self, key: &str) -> Result<Upload>;

    /// Sends part `number`, replacing an earlier part of that number.
    fn put_part(&self, upload: &Upload, number: u32, body: Body) -> Result<Part>;

    /// Makes part `number` from bytes the store already has.
    fn copy_part(&self, upload: &Upload, number: u32, source: &CopySource<'_>) -> Result<Part>;

    /// The parts of an upload that the store has, by number.
    fn list_parts(&self, upload: &Upload) -> Result<Vec<Part>>;

    /// Joins `parts` (ascending, contiguous from 1) into the object. Where the answer is in doubt the object itself
    /// is asked; the size, and the CRC-64 where store and parts have it, are proven before `Ok`. Where a part has none
    /// a doubt stays an error, which the caller, who knows what was there before, may settle.
    fn complete(&self, upload: &Upload, parts: &[Part]) -> Result<ObjectInfo>;

    /// Drops an upload and its parts; it is no error when it is gone.
    fn abort(&self, upload: &Upload) -> Result<()>;

    /// The unfinished uploads of objects whose key begins with `prefix`.
    fn uploads(&self, prefix: &str) -> Result<Vec<Upload>>;

    /// A link that lets its holder GET the object for `valid` (at most seven days), and HEAD nothing.
    fn presign_get(&self, key: &str, valid: Duration) -> Result<Secret<String>>;
}

/// Refuses part lists no store takes: empty, not ascending from 1 without gaps, too many.
fn check_parts(name: &str, parts: &[Part]) -> Result<()> {
    let contiguous = parts.iter().zip(1u32..).all(|(part, number)| part.number == number);
    if parts.is_empty() || !contiguous || parts.len() > part::MAX_PARTS {
        let numbers = (parts.len(), parts.first().map(|p| p.number), parts.last().map(|p| p.number));
        return Err(Error::new(Kind::Internal, "store.parts", format!("cannot complete {name}"))
            .because(format!("its parts are not 1, 2, 3, …: (count, first, last) is {numbers:?}")));
    }
    Ok(())
}

/// Whether an object found after a completion in doubt must be what `parts` make. Parts copied inside the store may have
/// no checksum known here: another object of the same length is then not told from theirs.
fn is_proven(name: &str, parts: &[Part], object: &ObjectInfo) -> bool {
    // Where the store keeps no CRC-64 the tag's part count is all there is to tell an older object by.
    let joined = object.etag.trim_matches('"').ends_with(&format!("-{}", parts.len()));
    crc64::of_parts(parts).is_some()
        && check_object(name, parts, object).is_ok()
        && (object.crc64.is_some() || joined)
}

/// Proves a completed object against the parts it was made of.
fn check_object(name: &str, parts: &[Part], object: &ObjectInfo) -> Result<()> {
    let size: u64 = parts.iter().map(|part| part.size).sum();
    let crc64 = crc64::of_parts(parts);
    let wrong = |what: &str, sent: String, found: String| {
        Err(Error::new(Kind::Mismatch, "store.object", format!("{name} is not what was sent"))
            .because(format!("its {what} is {found}, the parts add up to {sent}"))
            .fact("object", name))
    };
    if object.size != size {
        return wrong("size", size.to_string(), object.size.to_string());
    }
    match (crc64, object.crc64) {
        (Some(sent), Some(found)) if sent != found => wrong("CRC-64", sent.to_string(), found.to_string()),
        _ => Ok(()),
    }
}

/// Refuses keys that no store or not this client can address.
fn check_key(key: &str) -> Result<()> {
    let why = match key {
        "" => "it is empty",
        key if key.len() > 850 => "it is longer than 850 bytes",
        key if key.starts_with('/') => "it begins with a slash",
        key if key.split('/').any(|part| part == "." || part == "..") => "it has `.` or `..` for a segment",
        _ => return Ok(()),
    };
    Err(Error::new(Kind::Usage, "store.key", format!("{key:?} cannot be an object's key")).because(why))
}

/// The errors that every store tells in the same words.
mod errors {
    use crate::error::{Error, Kind};
    use crate::unit::Extent;

    pub fn no_object(name: &str) -> Error {
        Error::new(Kind::Network, "store.no-object", format!("there is no object {name}"))
            .because("the store knows no such key")
            .remedy("check the bucket and the key")
            .fact("object", name)
    }

    pub fn no_upload(name: &str, id: &str) -> Error {
        Error::new(Kind::Network, "store.no-upload", format!("the unfinished upload of {name} is gone"))
            .because("it was completed or aborted, by someone else or by a clean-up rule of the bucket")
            .remedy("start the upload again")
            .fact("object", name)
            .fact("upload", id)
    }

    pub fn changed(name: &str) -> Error {
        Error::new(Kind::Source, "store.changed", format!("{name} changed while it was read"))
            .because("its entity tag is no longer the one it had at first")
            .remedy("keep others from writing the object and run again")
            .fact("object", name)
    }

    pub fn short(name: &str, range: Extent, size: u64) -> Error {
        Error::new(Kind::Network, "store.range", format!("cannot read {range:?} of {name}"))
            .because(format!("the object is {size} bytes long"))
            .fact("object", name)
    }
}
