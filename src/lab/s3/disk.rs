//! Where the lab keeps buckets: a folder each, with data files and the records that name them.
//!
//! An object is a record listing data files, so that joining parts copies nothing: data first, then the record,
//! and what no record names is removed at the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use md5::{Digest as _, Md5};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::io::atomic;
use crate::store::crc64;
use crate::unit::Digest;

const FILE_NAME: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// Bytes stored, not yet under a name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Data {
    file: String,
    pub size: u64,
    /// MD5, hexadecimal.
    pub md5: String,
    pub crc64: u64,
}

/// An object.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Object {
    pub key: String,
    pub size: u64,
    /// Without quotes.
    pub etag: String,
    pub crc64: u64,
    /// Unix seconds.
    pub modified: i64,
    /// Whether anyone may read it.
    pub public: bool,
    pieces: Vec<Data>,
}

/// An upload not completed yet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pending {
    pub key: String,
    pub public: bool,
    pub begun: i64,
    #[serde(skip)]
    pub parts: BTreeMap<u32, Data>,
}

#[derive(Default)]
pub struct Bucket {
    pub public: bool,
    pub objects: BTreeMap<String, Arc<Object>>,
    pub uploads: BTreeMap<String, Pending>,
}

#[derive(Serialize, Deserialize)]
struct BucketRecord {
    public: bool,
}

/// All buckets, in a folder.
pub struct Disk {
    root: PathBuf,
    buckets: Mutex<BTreeMap<String, Bucket>>,
}

/// A data file being written; dropped unfinished, it is gone.
pub struct Writer {
    folder: PathBuf,
    name: String,
    file: File,
    md5: Md5,
    crc64: crc64::Hasher,
    size: u64,
    finished: bool,
}

fn failed(path: &Path, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "lab.disk", format!("the lab cannot use {}", path.display()))
        .caused_by(error)
}

/// Unix seconds now.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(0)
}

fn file_name(key: &str) -> String {
    let plain = utf8_percent_encode(key, FILE_NAME).to_string();
    if plain.len() <= 200 { format!("{plain}.json") } else { format!("{}.json", Digest::of(key.as_bytes())) }
}

fn save(path: &Path, record: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(record).map_err(|error| {
        Error::new(Kind::Internal, "lab.record", "cannot write a record").caused_by(error)
    })?;
    atomic::write(path, &text)
}

fn load<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(|error| failed(path, error))?;
    serde_json::from_slice(&text).map_err(|error| failed(path, error.into()))
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).map_err(|error| failed(folder, error))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| failed(folder, error))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| !name.ends_with(".tmp"));
    Ok(names)
}

impl Writer {
    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.md5.update(bytes);
        self.crc64.update(bytes);
        self.size += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    pub fn finish(mut self) -> Data {
        self.finished = true;
        let md5 = self.md5.finalize_reset().iter().map(|byte| format!("{byte:02x}")).collect();
        Data { file: self.name.clone(), size: self.size, md5, crc64: self.crc64.finish() }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_file(self.folder.join(&self.name));
        }
    }
}

impl Object {
    fn new(key: &str, public: bool, etag: String, pieces: Vec<Data>) -> Self {
        let size = pieces.iter().map(|piece| piece.size).sum();
        let crc64 = pieces.iter().fold(crc64::of(b""), |crc, p| crc64::combine(crc, p.crc64, p.size));
        Object { key: key.to_owned(), size, etag, crc64, modified: now(), public, pieces }
    }
}

impl Disk {
    /// Opens a folder of buckets, made if missing, and removes what an earlier run left without a name.
    pub fn open(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).map_err(|error| failed(root, error))?;
        let mut buckets = BTreeMap::new();
        for name in names(root)? {
            let folder = root.join(&name);
            if folder.join("bucket.json").exists() {
                buckets.insert(name, load_bucket(&folder)?);
            }
        }
        Ok(Disk { root: root.to_owned(), buckets: Mutex::new(buckets) })
    }

    pub fn buckets(&self) -> MutexGuard<'_, BTreeMap<String, Bucket>> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, bucket: &str) -> PathBuf {
        self.root.join(bucket)
    }

    /// Makes a bucket; `false` when it is there already.
    pub fn create_bucket(&self, bucket: &str, public: bool) -> Result<bool> {
        let mut buckets = self.buckets();
        if buckets.contains_key(bucket) {
            return Ok(false);
        }
        let folder = self.folder(bucket);
        for part in ["objects", "uploads", "data"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(|error| failed(&path, error))?;
        }
        save(&folder.join("bucket.json"), &BucketRecord { public })?;
        buckets.insert(bucket.to_owned(), Bucket { public, ..Bucket::default() });
        Ok(true)
    }

    /// A new data file in a bucket that exists.
    pub fn writer(&self, bucket: &str) -> Result<Writer> {
        let folder = self.folder(bucket).join("data");
        let name = uuid::Uuid::new_v4().simple().to_string();
        let path = folder.join(&name);
        let file = File::create_new(&path).map_err(|error| failed(&path, error))?;
        Ok(Writer {
            folder,
            name,
            file,
            md5: Md5::new(),
            crc64: crc64::Hasher::new(),
            size: 0,
            finished: false,
        })
    }

    /// Removes data that gets no name.
    pub fn discard(&self, bucket: &str, data: &Data) {
        self.remove_data(bucket, [data]);
    }

    fn remove_data<'a>(&self, bucket: &str, data: impl IntoIterator<Item = &'a Data>) {
        let folder = self.folder(bucket).join("data");
        for data in data {
            // What cannot be removed now goes at the next start.
            let _ = fs::remove_file(folder.join(&data.file));
        }
    }

    fn install(&self, bucket: &str, state: &mut Bucket, object: Object) -> Result<Arc<Object>> {
        save(&self.folder(bucket).join("objects").join(file_name(&object.key)), &object)?;
        let object = Arc::new(object);
        if let Some(old) = state.objects.insert(object.key.clone(), object.clone()) {
            self.remove_data(bucket, &old.pieces);
        }
        Ok(object)
    }

    /// Gives data the name `key`. `None` when the bucket is gone.
    pub fn put(&self, bucket: &str, key: &str, public: bool, data: Data) -> Result<Option<Arc<Object>>> {
        let mut buckets = self.buckets();
        let Some(state) = buckets.get_mut(bucket) else { return Ok(None) };
        let object = Object::new(key, public, data.md5.clone(), vec![data]);
        self.install(bucket, state, object).map(Some)
    }

    /// Lets anyone read an object, or only its owner. `false` when there is none.
    pub fn set_public(&self, bucket: &str, key: &str, public: bool) -> Result<bool> {
        let mut buckets = self.buckets();
        let Some(object) = buckets.get_mut(bucket).and_then(|state| state.objects.get_mut(key)) else {
            return Ok(false);
        };
        let changed = Object { public, ..(**object).clone() };
        save(&self.folder(bucket).join("objects").join(file_name(key)), &changed)?;
        *object = Arc::new(changed);
        Ok(true)
    }

    /// Removes an object, if it is there.
    pub fn delete(&self, bucket: &str, key: &str) -> Result<()> {
        let mut buckets = self.buckets();
        let removed = buckets.get_mut(bucket).and_then(|state| state.objects.remove(key));
        if let Some(object) = removed {
            let path = self.folder(bucket).join("objects").join(file_name(key));
            fs::remove_file(&path).map_err(|error| failed(&path, error))?;
            self.remove_data(bucket, &object.pieces);
        }
        Ok(())
    }

    /// Begins an upload; `None` when there is no such bucket.
    pub fn begin(&self, bucket: &str, key: &str, public: bool) -> Result<Option<String>> {
        let mut buckets = self.buckets();
        let Some(state) = buckets.get_mut(bucket) else { return Ok(None) };
        let id = uuid::Uuid::new_v4().simple().to_string();
        let folder = self.folder(bucket).join("uploads").join(&id);
        fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
        let pending = Pending { key: key.to_owned(), public, begun: now(), parts: BTreeMap::new() };
        save(&folder.join("upload.json"), &pending)?;
        state.uploads.insert(id.clone(), pending);
        Ok(Some(id))
    }

    /// Makes data part `number` of an upload; `false` when the upload is gone.
    pub fn add_part(&self, bucket: &str, id: &str, number: u32, data: Data) -> Result<bool> {
        let mut buckets = self.buckets();
        let pending = buckets.get_mut(bucket).and_then(|state| state.uploads.get_mut(id));
        let Some(pending) = pending else {
            self.remove_data(bucket, [&data]);
            return Ok(false);
        };
        save(&self.folder(bucket).join("uploads").join(id).join(format!("{number}.json")), &data)?;
        if let Some(old) = pending.parts.insert(number, data) {
            self.remove_data(bucket, [&old]);
        }
        Ok(true)
    }

    /// Joins parts, which the caller has checked, into the object: one rename decides. `None` when it is gone.
    pub fn complete(&self, bucket: &str, id: &str, numbers: &[u32]) -> Result<Option<Arc<Object>>> {
        let mut buckets = self.buckets();
        let Some(state) = buckets.get_mut(bucket) else { return Ok(None) };
        let Some(mut pending) = state.uploads.remove(id) else { return Ok(None) };
        let pieces: Vec<Data> = numbers.iter().filter_map(|number| pending.parts.remove(number)).collect();
        let mut md5 = Md5::new();
        for piece in &pieces {
            let digest = (0..piece.md5.len()).step_by(2).filter_map(|i| piece.md5.get(i..i + 2));
            let digest: Vec<u8> = digest.filter_map(|pair| u8::from_str_radix(pair, 16).ok()).collect();
            md5.update(digest);
        }
        let digest: String = md5.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let object = Object::new(&pending.key, pending.public, format!("{digest}-{}", pieces.len()), pieces);
        let object = self.install(bucket, state, object)?;
        self.remove_upload(bucket, id, &pending)?;
        Ok(Some(object))
    }

    /// Drops an upload; `false` when there is none.
    pub fn abort(&self, bucket: &str, id: &str) -> Result<bool> {
        let mut buckets = self.buckets();
        let pending = buckets.get_mut(bucket).and_then(|state| state.uploads.remove(id));
        match pending {
            Some(pending) => self.remove_upload(bucket, id, &pending).map(|()| true),
            None => Ok(false),
        }
    }

    fn remove_upload(&self, bucket: &str, id: &str, pending: &Pending) -> Result<()> {
        let folder = self.folder(bucket).join("uploads").join(id);
        fs::remove_dir_all(&folder).map_err(|error| failed(&folder, error))?;
        self.remove_data(bucket, pending.parts.values());
        Ok(())
    }

    /// Where the bytes `start..end` of an object lie: file, offset in it, length, in order.
    pub fn pieces(&self, bucket: &str, object: &Object, start: u64, end: u64) -> Vec<(PathBuf, u64, u64)> {
        let folder = self.folder(bucket).join("data");
        let mut found = Vec::new();
        let mut at = 0;
        for piece in &object.pieces {
            let (from, to) = (start.max(at), end.min(at + piece.size));
            if from < to {
                found.push((folder.join(&piece.file), from - at, to - from));
            }
            at += piece.size;
        }
        found
    }
}

fn load_bucket(folder: &Path) -> Result<Bucket> {
    let record: BucketRecord = load(&folder.join("bucket.json"))?;
    let mut bucket = Bucket { public: record.public, ..Bucket::default() };
    let mut named = BTreeSet::new();
    for name in names(&folder.join("objects"))? {
        let object: Object = load(&folder.join("objects").join(name))?;
        named.extend(object.pieces.iter().map(|piece| piece.file.clone()));
        bucket.objects.insert(object.key.clone(), Arc::new(object));
    }
    for id in names(&folder.join("uploads"))? {
        let upload = folder.join("uploads").join(&id);
        let parts = || -> Result<Pending> {
            let mut pending: Pending = load(&upload.join("upload.json"))?;
            for name in names(&upload)? {
                if let Some(number) = name.strip_suffix(".json").and_then(|n| n.parse().ok()) {
                    pending.parts.insert(number, load(&upload.join(name))?);
                }
            }
            Ok(pending)
        };
        match parts() {
            // Its parts are an object's by now, or the upload was never told to anyone: it ended in between.
            Ok(pending) if !pending.parts.values().any(|data| named.contains(&data.file)) => {
                bucket.uploads.insert(id, pending);
            }
            _ => fs::remove_dir_all(&upload).map_err(|error| failed(&upload, error))?,
        }
    }
    let parts = bucket.uploads.values().flat_map(|pending| pending.parts.values());
    named.extend(parts.map(|data| data.file.clone()));
    for name in names(&folder.join("data"))? {
        if !named.contains(&name) {
            let path = folder.join("data").join(name);
            fs::remove_file(&path).map_err(|error| failed(&path, error))?;
        }
    }
    Ok(bucket)
}
