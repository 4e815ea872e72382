//! A cache bounded in bytes, shared by threads.

use std::collections::HashMap;
use std::mem::take;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Values by number. Two generations: when the young one has half the limit it becomes the old one, and what was
/// not asked for meanwhile goes. Every step is constant time.
pub(super) struct Cache<V: ?Sized> {
    half: usize,
    state: Mutex<Generations<V>>,
}

struct Generations<V: ?Sized> {
    young: HashMap<u64, (Arc<V>, usize)>,
    young_bytes: usize,
    old: HashMap<u64, (Arc<V>, usize)>,
}

impl<V: ?Sized> Cache<V> {
    /// An empty cache that keeps at most `limit` bytes, or two values if those are larger.
    pub(super) fn new(limit: usize) -> Self {
        let state = Generations { young: HashMap::new(), young_bytes: 0, old: HashMap::new() };
        Cache { half: limit / 2, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, Generations<V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value `key`, if it is still here.
    pub(super) fn get(&self, key: u64) -> Option<Arc<V>> {
        let mut state = self.lock();
        if let Some((value, _)) = state.young.get(&key) {
            return Some(Arc::clone(value));
        }
        let (value, bytes) = state.old.remove(&key)?;
        state.insert(key, Arc::clone(&value), bytes, self.half);
        Some(value)
    }

    /// Keeps `value` of `bytes` bytes as `key`.
    pub(super) fn put(&self, key: u64, value: Arc<V>, bytes: usize) {
        self.lock().insert(key, value, bytes, self.half);
    }
}

impl<V: ?Sized> Generations<V> {
    fn insert(&mut self, key: u64, value: Arc<V>, bytes: usize, half: usize) {
        if self.young_bytes + bytes > half {
            self.old = take(&mut self.young);
            self.young_bytes = 0;
        }
        self.young_bytes += bytes;
        if let Some((_, replaced)) = self.young.insert(key, (value, bytes)) {
            self.young_bytes -= replaced;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_within_its_limit_and_keeps_what_is_asked_for() {
        let cache: Cache<u64> = Cache::new(100);
        for key in 0..1000 {
            cache.put(key, Arc::new(key), 10);
            assert_eq!(cache.get(0).as_deref(), Some(&0), "after {key}");
            let state = cache.lock();
            assert!(state.young.len() + state.old.len() <= 10);
        }
        assert_eq!(cache.get(1).as_deref(), None);
        assert_eq!(cache.get(999).as_deref(), Some(&999));
    }
}
