//! A fixed number of equal buffers, lent out and given back: what bounds the bytes in flight.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::AlignedBuf;

/// Buffers of one length. The one given back last goes out first: it is still in the processor's cache, and those never
/// needed are never made.
pub struct Pool {
    length: usize,
    /// `None` once no buffer goes out any more.
    state: Mutex<Option<State>>,
    given_back: Condvar,
}

struct State {
    free: Vec<AlignedBuf>,
    /// Buffers that may still be made.
    unmade: usize,
}

impl Pool {
    /// A pool of so many buffers of `length` bytes each.
    pub fn new(buffers: usize, length: usize) -> Arc<Self> {
        let state = State { free: Vec::new(), unmade: buffers };
        Arc::new(Pool { length, state: Mutex::new(Some(state)), given_back: Condvar::new() })
    }

    /// Waits for a buffer; `None` after [`Pool::close`]. What is in it is what was left there.
    pub fn take(self: &Arc<Self>) -> Option<PoolBuf> {
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let state = guard.as_mut()?;
            let memory = match state.free.pop() {
                None if state.unmade > 0 => {
                    state.unmade -= 1;
                    Some(AlignedBuf::new(self.length))
                }
                free => free,
            };
            if let Some(memory) = memory {
                return Some(PoolBuf { memory, home: Some(Arc::clone(self)) });
            }
            guard = self.given_back.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give_back(&self, memory: AlignedBuf) {
        if let Some(state) = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            state.free.push(memory);
            self.given_back.notify_one();
        }
    }

    /// Wakes and refuses whoever waits for a buffer, or will.
    pub fn close(&self) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.given_back.notify_all();
    }
}

/// A buffer that goes back to its pool, if it has one, when it is dropped.
pub struct PoolBuf {
    memory: AlignedBuf,
    home: Option<Arc<Pool>>,
}

impl PoolBuf {
    /// Exchanges the memory for another: that goes to the pool in its place.
    pub fn swap(&mut self, memory: &mut AlignedBuf) {
        std::mem::swap(&mut self.memory, memory);
    }
}

impl From<AlignedBuf> for PoolBuf {
    fn from(memory: AlignedBuf) -> Self {
        PoolBuf { memory, home: None }
    }
}

impl Deref for PoolBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for PoolBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

impl AsRef<[u8]> for PoolBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for PoolBuf {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.give_back(std::mem::replace(&mut self.memory, AlignedBuf::new(0)));
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_shared_buffer_comes_back_with_its_last_view() {
        let pool = Pool::new(1, 4096);
        let mut buf = pool.take().unwrap();
        buf.fill(7);
        let whole = Bytes::from_owner(buf);
        let part = whole.slice(100..200);
        drop(whole);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.take().unwrap());
            assert_eq!(part, [7; 100][..]);
            drop(part);
            assert_eq!(waiting.join().unwrap().len(), 4096);
        });
    }

    #[test]
    fn a_closed_pool_lends_nothing() {
        let pool = Pool::new(1, 4096);
        let buf = pool.take().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.take().is_none());
            pool.close();
            assert!(waiting.join().unwrap());
        });
        drop(buf);
        assert!(pool.take().is_none());
    }
}
