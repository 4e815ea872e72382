//! What holds for any damaged input: no panic, no hang, little memory.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::print_stdout, reason = "the figures")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::allocations;

/// Nanoseconds of the processor that any one input may take: what is meant is that none hangs.
const LONGEST: u64 = 2_000_000_000;
/// The most bytes that any one input may make haul hold at once.
pub const MOST_HELD: usize = 256 << 20;

/// Nanoseconds this thread was on a processor.
pub fn processor_time() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// The inputs so far, and what the worst of them took.
#[derive(Default)]
pub struct Bounds {
    count: u64,
    slowest: u64,
    most_held: usize,
}

impl Bounds {
    /// What `work` returns, which is the next input, `name`. `own` are the bytes that it holds of the input itself;
    /// beyond them it may hold `most`, at most [`MOST_HELD`].
    pub fn hold<T>(&mut self, name: &str, own: usize, most: usize, work: impl FnOnce() -> T) -> T {
        let start = processor_time();
        let outcome = catch_unwind(AssertUnwindSafe(|| allocations::watched(work)));
        let took = processor_time() - start;
        let (done, peak) = outcome.unwrap_or_else(|_| panic!("{name} panicked"));
        let held = peak.saturating_sub(own);
        assert!(took < LONGEST, "{name} took {took} ns");
        assert!(held <= most.min(MOST_HELD), "{name} held {held} bytes");
        self.count += 1;
        self.slowest = self.slowest.max(took);
        self.most_held = self.most_held.max(held);
        done
    }

    /// Prints the worst of the inputs, which are `what`.
    pub fn print(&self, what: &str) {
        let Bounds { count, slowest, most_held } = self;
        println!(
            "figure: {count} {what}: none panicked; the slowest took {} ms of the processor, the largest {} KiB",
            slowest / 1_000_000,
            most_held >> 10
        );
    }
}
