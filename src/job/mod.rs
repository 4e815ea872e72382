//! Whole jobs: each composes source, pipeline, sink and what comes after, and survives being killed at any point.

pub mod convert;
pub mod copy;
pub mod fix;
#[cfg(feature = "net")]
pub mod migrate;
pub mod open;
#[cfg(feature = "net")]
pub mod report;
#[cfg(feature = "net")]
pub mod services;
pub mod probe;
pub mod round;
pub mod source;
pub mod state;
#[cfg(feature = "net")]
pub mod upload;
mod work;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};

/// Waits, unless the job is stopped meanwhile.
fn wait(pause: Duration, stop: &AtomicBool) -> Result<()> {
    let end = Instant::now() + pause;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Interrupted, "interrupted", "a wait was stopped"));
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
    Ok(())
}
