//! An allocator that counts what a thread holds while it is watched.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What a watched thread allocated and has not given back, and the most that was.
#[derive(Clone, Copy)]
struct Held {
    now: usize,
    peak: usize,
}

thread_local! {
    static HELD: Cell<Option<Held>> = const { Cell::new(None) };
}

/// The system's allocator, counting.
struct Counting;

fn count(taken: usize, given: usize) {
    // A thread that ends has no cell any more.
    let _ = HELD.try_with(|held| {
        if let Some(Held { now, peak }) = held.get() {
            let now = (now + taken).saturating_sub(given);
            held.set(Some(Held { now, peak: peak.max(now) }));
        }
    });
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may be there at once.
        count(size, 0);
        count(0, layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.realloc(start, layout, size) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `work` returns, and the most bytes it held at once of those it allocated on this thread.
pub fn watched<T>(work: impl FnOnce() -> T) -> (T, usize) {
    HELD.set(Some(Held { now: 0, peak: 0 }));
    let done = work();
    let held = HELD.replace(None);
    (done, held.map_or(0, |held| held.peak))
}
