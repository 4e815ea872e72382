//! The clock that requests are signed and waits are measured with, as a parameter.

use std::time::{Duration, Instant, SystemTime};

use crate::error::Result;

/// Time as the cloud clients see it.
pub trait Clock: Send + Sync {
    /// Seconds since 1970-01-01 UTC.
    fn unix(&self) -> i64;

    /// A reading that never goes back, whatever happens to the wall clock: limits on waiting use it.
    fn elapsed(&self) -> Duration;

    /// Pauses the calling thread. An error (a stop was asked for) ends whatever was waiting.
    fn sleep(&self, pause: Duration) -> Result<()>;
}

/// The machine's own clock.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// The clock; its [`Clock::elapsed`] begins at zero.
    pub fn new() -> Self {
        SystemClock { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        SystemClock::new()
    }
}

impl Clock for SystemClock {
    fn unix(&self) -> i64 {
        match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            // A clock before 1970 is one the server will refuse, which is what explains it to the user.
            Err(_) => 0,
        }
    }

    fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self, pause: Duration) -> Result<()> {
        std::thread::sleep(pause);
        Ok(())
    }
}
