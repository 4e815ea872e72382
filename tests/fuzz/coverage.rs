//! Which edges of the program an input took, where it was built to count them (scripts/fuzz.sh does so).

use std::sync::atomic::{AtomicUsize, Ordering};

/// Where LLVM's counters begin, and one past their end; both 0 where there are none.
static COUNTERS: (AtomicUsize, AtomicUsize) = (AtomicUsize::new(0), AtomicUsize::new(0));

/// Called before `main` by a program built with `-sanitizer-coverage-inline-8bit-counters`: a counter for each edge.
/// One binary has one run of them.
// SAFETY: the name is the one LLVM's SanitizerCoverage calls, with these arguments.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, end: *mut u8) {
    COUNTERS.0.store(start.expose_provenance(), Ordering::Relaxed);
    COUNTERS.1.store(end.expose_provenance(), Ordering::Relaxed);
}

/// Edges seen, and about how often.
pub struct Coverage {
    /// For each counter, a bit for each of eight magnitudes seen.
    seen: Vec<u8>,
}

fn counters() -> &'static mut [u8] {
    let (start, end) = (COUNTERS.0.load(Ordering::Relaxed), COUNTERS.1.load(Ordering::Relaxed));
    if start == 0 {
        return &mut [];
    }
    // SAFETY: LLVM keeps the counters there, in static memory of this length; they are bytes, changed by any thread
    // without order, of which any value will do. Only this module makes a reference, one at a time.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(start), end - start) }
}

impl Coverage {
    /// Nothing seen.
    pub fn new() -> Self {
        Coverage { seen: vec![0; counters().len()] }
    }

    /// Counts from nothing.
    pub fn begin(&self) {
        counters().fill(0);
    }

    /// Adds what was counted; whether any of it is new.
    pub fn take(&mut self) -> bool {
        let mut new = false;
        for (seen, counter) in self.seen.chunks_mut(64).zip(counters().chunks(64)) {
            if counter.iter().fold(0, |any, count| any | count) == 0 {
                continue;
            }
            for (seen, count) in seen.iter_mut().zip(counter) {
                let magnitude = match count {
                    0 => 0,
                    1 => 1,
                    2 => 2,
                    3 => 4,
                    4..=7 => 8,
                    8..=15 => 16,
                    16..=31 => 32,
                    32..=127 => 64,
                    128.. => 128,
                };
                new |= magnitude & !*seen != 0;
                *seen |= magnitude;
            }
        }
        new
    }

    /// Edges seen so far.
    pub fn edges(&self) -> usize {
        self.seen.iter().filter(|seen| **seen != 0).count()
    }
}
