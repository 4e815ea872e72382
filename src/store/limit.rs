//! Holds what is sent to a rate. The limit travels with the body, so that a repeated part counts again.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::{Body, CopySource, ObjectInfo, ObjectStore, Part, Upload};
use crate::error::Result;
use crate::unit::rate::{Rate, TokenBucket};
use crate::unit::{Extent, Secret};

/// Most bytes handed to a connection at once: one TLS record.
const PIECE: u64 = 16 << 10;

/// What a request and its answer cost beside the body: the head, the signature, the TLS handshake's share.
const REQUEST_COST: u64 = 2 << 10;

/// What one piece costs beside its bytes: the TLS record around it.
const PIECE_COST: u64 = 32;

/// A rate shared by every transfer of a job, which may change while they run.
pub struct Limiter {
    bucket: Mutex<Option<TokenBucket>>,
    clock: Box<dyn Fn() -> Duration + Send + Sync>,
}

impl Limiter {
    /// A limiter at `rate` (`None`: no limit), by a monotonic clock.
    pub fn new(rate: Option<Rate>, clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        let now = clock();
        let bucket = rate.map(|rate| TokenBucket::new(rate, now));
        Limiter { bucket: Mutex::new(bucket), clock: Box::new(clock) }
    }

    /// A limiter at `rate` by the system's monotonic clock.
    pub fn at(rate: Option<Rate>) -> Self {
        let start = std::time::Instant::now();
        Limiter::new(rate, move || start.elapsed())
    }

    /// Changes the rate from now on.
    pub fn set_rate(&self, rate: Option<Rate>) {
        let mut bucket = self.bucket();
        match (bucket.as_mut(), rate) {
            (Some(bucket), Some(rate)) => bucket.set_rate(rate),
            (_, rate) => *bucket = rate.map(|rate| TokenBucket::new(rate, (self.clock)())),
        }
    }

    /// How long to wait before a request may begin.
    pub fn begin(&self) -> Duration {
        self.take(REQUEST_COST)
    }

    /// How many of the `left` bytes of a body to send next, and how long to wait before.
    pub fn next(&self, left: u64) -> (u64, Duration) {
        let most = self.bucket().as_ref().map_or(64 * PIECE, |bucket| (bucket.burst() / 4).clamp(1, PIECE));
        let bytes = left.min(most);
        // At low rates a piece is small, and so is its share of a TLS record sent for several.
        (bytes, self.take(bytes + PIECE_COST.min(bytes / 64)))
    }

    fn take(&self, bytes: u64) -> Duration {
        let now = (self.clock)();
        self.bucket().as_mut().map_or(Duration::ZERO, |bucket| bucket.take(bytes, now))
    }

    fn bucket(&self) -> std::sync::MutexGuard<'_, Option<TokenBucket>> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A store whose uploads, every try of them, keep to a rate. Downloads are not held back.
pub struct Limit {
    inner: Arc<dyn ObjectStore>,
    limiter: Arc<Limiter>,
}

impl Limit {
    /// `inner` behind `limiter`.
    pub fn new(inner: Arc<dyn ObjectStore>, limiter: Arc<Limiter>) -> Self {
        Limit { inner, limiter }
    }
}

impl ObjectStore for Limit {
    fn name(&self, key: &str) -> String {
        self.inner.name(key)
    }

    fn head(&self, key: &str) -> Result<Option<ObjectInfo>> {
        self.inner.head(key)
    }

    fn get(&self, key: &str, range: Extent, if_match: Option<&str>) -> Result<Bytes> {
        self.inner.get(key, range, if_match)
    }

    fn put(&self, key: &str, body: Body) -> Result<ObjectInfo> {
        self.inner.put(key, body.limited(self.limiter.clone()))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key)
    }

    fn begin(&self, key: &str) -> Result<Upload> {
        self.inner.begin(key)
    }

    fn put_part(&self, upload: &Upload, number: u32, body: Body) -> Result<Part> {
        self.inner.put_part(upload, number, body.limited(self.limiter.clone()))
    }

    fn copy_part(&self, upload: &Upload, number: u32, source: &CopySource<'_>) -> Result<Part> {
        self.inner.copy_part(upload, number, source)
    }

    fn list_parts(&self, upload: &Upload) -> Result<Vec<Part>> {
        self.inner.list_parts(upload)
    }

    fn complete(&self, upload: &Upload, parts: &[Part]) -> Result<ObjectInfo> {
        self.inner.complete(upload, parts)
    }

    fn abort(&self, upload: &Upload) -> Result<()> {
        self.inner.abort(upload)
    }

    fn uploads(&self, prefix: &str) -> Result<Vec<Upload>> {
        self.inner.uploads(prefix)
    }

    fn presign_get(&self, key: &str, valid: Duration) -> Result<Secret<String>> {
        self.inner.presign_get(key, valid)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// Plays `streams` senders of `len` bytes each against a clock that only the waits move; returns (time, bytes
    /// on the wire) of every piece.
    fn play(limiter: &Limiter, clock: &AtomicU64, streams: usize, len: u64) -> Vec<(u64, u64)> {
        // Each sender: when it may act next, the piece it then sends, bytes left.
        let mut senders: Vec<(u64, u64, u64)> =
            (0..streams).map(|_| (clock.load(Ordering::SeqCst), 0, len)).collect();
        let mut sent = Vec::new();
        while let Some(i) = (0..senders.len()).min_by_key(|i| senders[*i].0) {
            let (at, piece, left) = senders[i];
            clock.fetch_max(at, Ordering::SeqCst);
            if piece > 0 {
                sent.push((at, piece));
            }
            if left == 0 {
                senders.swap_remove(i);
                continue;
            }
            let (bytes, wait) = limiter.next(left);
            senders[i] = (at + u64::try_from(wait.as_nanos()).unwrap(), bytes, left - bytes);
        }
        sent
    }

    fn limiter(rate: u64) -> (Limiter, Arc<AtomicU64>) {
        let clock = Arc::new(AtomicU64::new(0));
        let reading = clock.clone();
        let now = move || Duration::from_nanos(reading.load(Ordering::SeqCst));
        (Limiter::new(Rate::per_second(rate), now), clock)
    }

    fn fullest_second(sent: &[(u64, u64)]) -> u64 {
        let window = |start: u64| {
            sent.iter()
                .filter(|(at, _)| (start..start + 1_000_000_000).contains(at))
                .map(|(_, n)| n)
                .sum::<u64>()
        };
        sent.iter().map(|(at, _)| window(*at)).max().unwrap_or(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn no_second_of_any_transfer_passes_105_percent(rate in 20_000u64..2_000_000, streams in 1usize..6) {
            let (limiter, clock) = limiter(rate);
            let sent = play(&limiter, &clock, streams, rate * 2 / streams as u64);
            let most = fullest_second(&sent);
            prop_assert!(most <= rate + rate / 20, "{most} bytes in a second at {rate}");
            let took = sent.last().unwrap().0;
            prop_assert!(took < 2_300_000_000, "too slow: {took} ns for two seconds' worth");
        }
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let (limiter, clock) = limiter(1_000_000);
        play(&limiter, &clock, 4, 500_000);
        let changed = clock.load(Ordering::SeqCst);
        limiter.set_rate(Rate::per_second(100_000));
        let sent = play(&limiter, &clock, 4, 50_000);
        assert!(fullest_second(&sent) <= 105_000);
        assert!(sent.last().unwrap().0 - changed > 1_500_000_000);
        limiter.set_rate(None);
        assert_eq!(limiter.next(1 << 30), (1 << 20, Duration::ZERO));
    }
}
