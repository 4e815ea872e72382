//! A store in memory with the rules of a real one: part sizes, part order, entity tags, what is left unfinished.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::{
    Body, CopySource, ObjectInfo, ObjectStore, Part, Upload, check_key, check_object, check_parts, crc64,
    errors, is_proven,
};
use crate::error::{Error, Kind, Result};
use crate::unit::{Extent, MIB, Secret, to_usize};

/// Smallest part but the last, in bytes, as COS has it.
const MIN_PART: u64 = MIB;

/// A bucket in memory.
pub struct Memory {
    bucket: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, (ObjectInfo, Bytes)>,
    uploads: BTreeMap<String, Pending>,
    begun: u64,
    received: u64,
    read: u64,
}

struct Pending {
    key: String,
    parts: BTreeMap<u32, (Part, Bytes)>,
}

impl Memory {
    /// An empty bucket.
    pub fn new(bucket: &str) -> Self {
        Memory { bucket: bucket.to_owned(), state: Mutex::default() }
    }

    /// Bytes of bodies received so far, repeated ones again.
    pub fn received(&self) -> u64 {
        self.state().received
    }

    /// Bytes of objects handed out so far.
    pub fn read(&self) -> u64 {
        self.state().read
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn no_upload(&self, upload: &Upload) -> Error {
        errors::no_upload(&self.name(&upload.key), &upload.id)
    }

    fn add_part(&self, upload: &Upload, number: u32, bytes: Bytes) -> Result<Part> {
        let part =
            Part { number, size: bytes.len() as u64, etag: tag(&bytes), crc64: Some(crc64::of(&bytes)) };
        let mut state = self.state();
        let pending = state.uploads.get_mut(&upload.id).ok_or_else(|| self.no_upload(upload))?;
        pending.parts.insert(number, (part.clone(), bytes));
        Ok(part)
    }

    fn refused(&self, key: &str, why: String) -> Error {
        Error::new(
            Kind::Network,
            "store.refused",
            format!("the store refused a request about {}", self.name(key)),
        )
        .because(why)
    }
}

fn tag(bytes: &[u8]) -> String {
    format!("\"{}\"", &crate::unit::Digest::of(bytes).to_string()[..32])
}

impl ObjectStore for Memory {
    fn name(&self, key: &str) -> String {
        format!("memory://{}/{key}", self.bucket)
    }

    fn head(&self, key: &str) -> Result<Option<ObjectInfo>> {
        Ok(self.state().objects.get(key).map(|(info, _)| info.clone()))
    }

    fn get(&self, key: &str, range: Extent, if_match: Option<&str>) -> Result<Bytes> {
        let mut state = self.state();
        let (info, bytes) = state.objects.get(key).ok_or_else(|| errors::no_object(&self.name(key)))?;
        if if_match.is_some_and(|tag| tag != info.etag) {
            return Err(errors::changed(&self.name(key)));
        }
        if range.end > info.size {
            return Err(errors::short(&self.name(key), range, info.size));
        }
        let bytes = bytes.slice(to_usize(range.start)..to_usize(range.end));
        state.read += range.len();
        Ok(bytes)
    }

    fn put(&self, key: &str, body: Body) -> Result<ObjectInfo> {
        check_key(key)?;
        let bytes = body.bytes()?;
        let info = ObjectInfo { size: body.len(), etag: tag(&bytes), crc64: Some(crc64::of(&bytes)) };
        let mut state = self.state();
        state.received += body.len();
        state.objects.insert(key.to_owned(), (info.clone(), bytes));
        Ok(info)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.state().objects.remove(key);
        Ok(())
    }

    fn begin(&self, key: &str) -> Result<Upload> {
        check_key(key)?;
        let mut state = self.state();
        state.begun += 1;
        let id = format!("upload-{}", state.begun);
        state.uploads.insert(id.clone(), Pending { key: key.to_owned(), parts: BTreeMap::new() });
        Ok(Upload { key: key.to_owned(), id })
    }

    fn put_part(&self, upload: &Upload, number: u32, body: Body) -> Result<Part> {
        self.state().received += body.len();
        self.add_part(upload, number, body.bytes()?)
    }

    fn copy_part(&self, upload: &Upload, number: u32, source: &CopySource<'_>) -> Result<Part> {
        let bytes = self.get(source.key, source.range, Some(source.etag))?;
        self.state().read -= source.range.len();
        Ok(Part { crc64: None, ..self.add_part(upload, number, bytes)? })
    }

    fn list_parts(&self, upload: &Upload) -> Result<Vec<Part>> {
        let state = self.state();
        let pending = state.uploads.get(&upload.id).ok_or_else(|| self.no_upload(upload))?;
        Ok(pending.parts.values().map(|(part, _)| Part { crc64: None, ..part.clone() }).collect())
    }

    fn complete(&self, upload: &Upload, parts: &[Part]) -> Result<ObjectInfo> {
        let name = self.name(&upload.key);
        check_parts(&name, parts)?;
        let mut state = self.state();
        let Some(pending) = state.uploads.get(&upload.id) else {
            // Completed before, its answer lost?
            let info = state.objects.get(&upload.key).map(|(info, _)| info.clone());
            let info = info.filter(|info| is_proven(&name, parts, info));
            return info.ok_or_else(|| self.no_upload(upload));
        };
        let mut whole = BytesMut::new();
        for part in parts {
            let found = pending.parts.get(&part.number).filter(|(found, _)| found.etag == part.etag);
            let (_, bytes) =
                found.ok_or_else(|| self.refused(&upload.key, format!("InvalidPart {}", part.number)))?;
            if part.number as usize != parts.len() && part.size < MIN_PART {
                return Err(self.refused(&upload.key, format!("EntityTooSmall: part {}", part.number)));
            }
            whole.extend_from_slice(bytes);
        }
        let whole = whole.freeze();
        let etag = format!("{}-{}\"", tag(&whole).trim_end_matches('"'), parts.len());
        let info = ObjectInfo { size: whole.len() as u64, etag, crc64: Some(crc64::of(&whole)) };
        check_object(&name, parts, &info)?;
        state.uploads.remove(&upload.id);
        state.objects.insert(upload.key.clone(), (info.clone(), whole));
        Ok(info)
    }

    fn abort(&self, upload: &Upload) -> Result<()> {
        self.state().uploads.remove(&upload.id);
        Ok(())
    }

    fn uploads(&self, prefix: &str) -> Result<Vec<Upload>> {
        let state = self.state();
        let matching = state.uploads.iter().filter(|(_, pending)| pending.key.starts_with(prefix));
        Ok(matching.map(|(id, pending)| Upload { key: pending.key.clone(), id: id.clone() }).collect())
    }

    fn presign_get(&self, key: &str, valid: Duration) -> Result<Secret<String>> {
        Ok(Secret::new(format!("{}?valid={}", self.name(key), valid.as_secs())))
    }
}
