//! Tries again what failed in passing: exponential backoff with jitter, bounded, told to the monitor.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{Body, CopySource, ObjectInfo, ObjectStore, Part, Upload};
use crate::error::{Result, Retry as Again};
use crate::monitor::{Level, Monitor};
use crate::unit::{Extent, Secret};

/// How often and how patiently to try.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Tries in all; at least one is made.
    pub attempts: u32,
    /// Longest pause after the first failure; it doubles with each one.
    pub first: Duration,
    /// Longest pause of all.
    pub longest: Duration,
}

impl Default for Policy {
    /// Ten tries over about three minutes: longer than a store's brief outage, shorter than a window's patience.
    fn default() -> Self {
        Policy { attempts: 10, first: Duration::from_millis(500), longest: Duration::from_secs(60) }
    }
}

type Pause = Box<dyn Fn(Duration) -> Result<()> + Send + Sync>;

/// A store that tries again where [`crate::error::Error::retry`] says it can help.
pub struct Retry {
    inner: Arc<dyn ObjectStore>,
    policy: Policy,
    monitor: Arc<dyn Monitor>,
    pause: Pause,
    random: RandomState,
}

impl Retry {
    /// `inner`, tried again after `pause`, which may end the wait with an error (the job was stopped).
    pub fn new(
        inner: Arc<dyn ObjectStore>,
        policy: Policy,
        monitor: Arc<dyn Monitor>,
        pause: impl Fn(Duration) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Retry { inner, policy, monitor, pause: Box::new(pause), random: RandomState::new() }
    }

    /// Between half and all of the pause that is due after `failures` failures.
    fn delay(&self, failures: u32) -> Duration {
        let due = self.policy.first.saturating_mul(1 << (failures - 1).min(20)).min(self.policy.longest);
        let mut hasher = self.random.build_hasher();
        hasher.write_u128(std::time::Instant::now().elapsed().as_nanos());
        hasher.write_u32(failures);
        due / 2 + due.mul_f64((hasher.finish() % 1024) as f64 / 2048.0)
    }

    fn run<T>(&self, call: impl Fn() -> Result<T>) -> Result<T> {
        let mut failures = 0;
        loop {
            let error = match call() {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            failures += 1;
            if error.retry() == Again::No {
                return Err(error);
            }
            if failures >= self.policy.attempts {
                return Err(error.fact("attempts", failures));
            }
            let delay = self.delay(failures);
            let text = format!(
                "{}: {}; trying again in {:.1} s ({failures} of {})",
                error.what(),
                error.why(),
                delay.as_secs_f64(),
                self.policy.attempts
            );
            self.monitor.note(Level::Info, &text);
            (self.pause)(delay)?;
        }
    }
}

impl ObjectStore for Retry {
    fn name(&self, key: &str) -> String {
        self.inner.name(key)
    }

    fn head(&self, key: &str) -> Result<Option<ObjectInfo>> {
        self.run(|| self.inner.head(key))
    }

    fn get(&self, key: &str, range: Extent, if_match: Option<&str>) -> Result<Bytes> {
        self.run(|| self.inner.get(key, range, if_match))
    }

    fn put(&self, key: &str, body: Body) -> Result<ObjectInfo> {
        self.run(|| self.inner.put(key, body.clone()))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.run(|| self.inner.delete(key))
    }

    fn begin(&self, key: &str) -> Result<Upload> {
        self.run(|| self.inner.begin(key))
    }

    fn put_part(&self, upload: &Upload, number: u32, body: Body) -> Result<Part> {
        self.run(|| self.inner.put_part(upload, number, body.clone()))
    }

    fn copy_part(&self, upload: &Upload, number: u32, source: &CopySource<'_>) -> Result<Part> {
        self.run(|| self.inner.copy_part(upload, number, source))
    }

    fn list_parts(&self, upload: &Upload) -> Result<Vec<Part>> {
        self.run(|| self.inner.list_parts(upload))
    }

    fn complete(&self, upload: &Upload, parts: &[Part]) -> Result<ObjectInfo> {
        self.run(|| self.inner.complete(upload, parts))
    }

    fn abort(&self, upload: &Upload) -> Result<()> {
        self.run(|| self.inner.abort(upload))
    }

    fn uploads(&self, prefix: &str) -> Result<Vec<Upload>> {
        self.run(|| self.inner.uploads(prefix))
    }

    fn presign_get(&self, key: &str, valid: Duration) -> Result<Secret<String>> {
        self.inner.presign_get(key, valid)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::error::{Error, Kind};
    use crate::monitor::Tally;
    use crate::store::fault::Faulty;
    use crate::store::memory::Memory;

    fn flaky(per_mille: u32, attempts: u32) -> (Retry, Arc<Tally>, Arc<Mutex<Vec<Duration>>>) {
        let tally = Arc::new(Tally::default());
        let waits = Arc::new(Mutex::new(Vec::new()));
        let seen = waits.clone();
        let store = Arc::new(Faulty::new(Arc::new(Memory::new("b")), 7, per_mille));
        let policy = Policy { attempts, ..Policy::default() };
        let pause = move |wait| {
            seen.lock().unwrap().push(wait);
            Ok(())
        };
        (Retry::new(store, policy, tally.clone(), pause), tally, waits)
    }

    #[test]
    fn passing_faults_are_outlived_and_told() {
        let (store, tally, waits) = flaky(400, 40);
        for n in 0..20 {
            store.put(&format!("k{n}"), vec![n; 10].into()).unwrap();
        }
        for n in 0..20 {
            assert_eq!(store.get(&format!("k{n}"), Extent::new(0, 10), None).unwrap(), vec![n; 10]);
        }
        assert_eq!(tally.notes().len(), waits.lock().unwrap().len());
        assert!(tally.notes().len() > 5);
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_then_the_error_stands() {
        let (store, _, waits) = flaky(1000, 12);
        let error = store.head("k").unwrap_err();
        assert_eq!(error.facts().last().unwrap(), &("attempts", "12".to_owned()));
        let waits = waits.lock().unwrap();
        assert_eq!(waits.len(), 11);
        for (wait, n) in waits.iter().zip(0u32..) {
            let due = Duration::from_millis(500 << n).min(Duration::from_secs(60));
            assert!((due / 2..=due).contains(wait), "pause {n} is {wait:?}");
        }
    }

    #[test]
    fn a_lasting_error_is_not_tried_again_and_a_stopped_job_does_not_wait() {
        let (store, _, waits) = flaky(0, 5);
        store.get("none", Extent::new(0, 1), None).unwrap_err();
        assert!(waits.lock().unwrap().is_empty());

        let stop = |_| Err(Error::new(Kind::Interrupted, "job.paused", "paused"));
        let inner = Arc::new(Faulty::new(Arc::new(Memory::new("b")), 7, 1000));
        let store = Retry::new(inner, Policy::default(), Arc::new(Tally::default()), stop);
        assert_eq!(store.head("k").unwrap_err().kind(), Kind::Interrupted);
    }
}
