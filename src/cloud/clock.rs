//! The clock that requests are signed and waits are measured with, as a parameter.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::error::{Error, Kind, Result};

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
    stop: Arc<AtomicBool>,
}

/// How soon a pause notices that a stop was asked for.
const STOP_CHECK: Duration = Duration::from_millis(100);

impl SystemClock {
    /// The clock; its [`Clock::elapsed`] begins at zero.
    pub fn new() -> Self {
        SystemClock::until(Arc::default())
    }

    /// The clock, whose pauses end with [`Kind::Interrupted`] once `stop` is set.
    pub fn until(stop: Arc<AtomicBool>) -> Self {
        SystemClock { start: Instant::now(), stop }
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
        let end = Instant::now() + pause;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, "interrupted", "a wait for the cloud was stopped"));
            }
            match end.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Ok(()),
                left => std::thread::sleep(left.min(STOP_CHECK)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_ends_a_pause() {
        let clock = SystemClock::until(Arc::new(AtomicBool::new(true)));
        assert_eq!(clock.sleep(Duration::from_secs(3600)).unwrap_err().kind(), Kind::Interrupted);
    }
}
