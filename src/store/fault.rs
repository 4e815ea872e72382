//! A store that fails on purpose, by a seed: requests that never arrive, and answers that never come back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::{Body, CopySource, ObjectInfo, ObjectStore, Part, Upload};
use crate::error::{Error, Kind, Result};
use crate::unit::{Extent, Secret};

/// `inner`, with a share of requests failing; the same seed and calls fail in the same places.
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    random: Mutex<u64>,
    per_mille: u32,
    failed: AtomicU64,
}

impl Faulty {
    /// Of 1,000 requests about `per_mille` fail, half of them after they were carried out.
    pub fn new(inner: Arc<dyn ObjectStore>, seed: u64, per_mille: u32) -> Self {
        Faulty { inner, random: Mutex::new(seed), per_mille, failed: AtomicU64::new(0) }
    }

    /// The requests that failed so far.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// The next number of the splitmix64 sequence.
    fn draw(&self) -> u64 {
        let mut state = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn around<T>(&self, key: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let draw = self.draw();
        if draw % 1000 >= u64::from(self.per_mille) {
            return call();
        }
        self.failed.fetch_add(1, Ordering::Relaxed);
        let (id, why) = match draw >> 32 & 1 {
            0 => ("fault.request", "the request was lost"),
            _ => {
                call()?;
                ("fault.answer", "the answer was lost")
            }
        };
        Err(Error::new(Kind::Network, id, format!("no answer about {}", self.name(key)))
            .because(why)
            .retryable())
    }
}

impl ObjectStore for Faulty {
    fn name(&self, key: &str) -> String {
        self.inner.name(key)
    }

    fn head(&self, key: &str) -> Result<Option<ObjectInfo>> {
        self.around(key, || self.inner.head(key))
    }

    fn get(&self, key: &str, range: Extent, if_match: Option<&str>) -> Result<Bytes> {
        self.around(key, || self.inner.get(key, range, if_match))
    }

    fn put(&self, key: &str, body: Body) -> Result<ObjectInfo> {
        self.around(key, || self.inner.put(key, body))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.around(key, || self.inner.delete(key))
    }

    fn begin(&self, key: &str) -> Result<Upload> {
        self.around(key, || self.inner.begin(key))
    }

    fn put_part(&self, upload: &Upload, number: u32, body: Body) -> Result<Part> {
        self.around(&upload.key, || self.inner.put_part(upload, number, body))
    }

    fn copy_part(&self, upload: &Upload, number: u32, source: &CopySource<'_>) -> Result<Part> {
        self.around(&upload.key, || self.inner.copy_part(upload, number, source))
    }

    fn list_parts(&self, upload: &Upload) -> Result<Vec<Part>> {
        self.around(&upload.key, || self.inner.list_parts(upload))
    }

    fn complete(&self, upload: &Upload, parts: &[Part]) -> Result<ObjectInfo> {
        self.around(&upload.key, || self.inner.complete(upload, parts))
    }

    fn abort(&self, upload: &Upload) -> Result<()> {
        self.around(&upload.key, || self.inner.abort(upload))
    }

    fn uploads(&self, prefix: &str) -> Result<Vec<Upload>> {
        self.around(prefix, || self.inner.uploads(prefix))
    }

    fn presign_get(&self, key: &str, valid: Duration) -> Result<Secret<String>> {
        self.inner.presign_get(key, valid)
    }
}
