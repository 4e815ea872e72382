//! Fault points for kill tests: places at which a test may have this process killed. Compiled to nothing without the
//! feature `fault-points`, which no shipped binary has.

/// A place at which `HAUL_FAULT=<phase>:<n>` kills this process, when it passes the n-th place of that phase, as
/// SIGKILL does: nothing after it happens.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub fn point(_phase: &'static str) {}

/// A place at which `HAUL_FAULT=<phase>:<n>` kills this process, when it passes the n-th place of that phase, as
/// SIGKILL does: nothing after it happens.
#[cfg(feature = "fault-points")]
pub fn point(phase: &'static str) {
    if reached(phase) {
        die();
    }
}

/// Counts a place, and says whether the process is to die here: for a caller that has something to finish first.
#[cfg(feature = "fault-points")]
pub fn reached(phase: &'static str) -> bool {
    use std::collections::BTreeMap;
    use std::sync::{LazyLock, Mutex, PoisonError};

    static WANTED: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let text = std::env::var("HAUL_FAULT").ok()?;
        let (phase, n) = text.split_once(':')?;
        Some((phase.to_owned(), n.parse().ok()?))
    });
    static PASSED: Mutex<BTreeMap<&str, u64>> = Mutex::new(BTreeMap::new());

    let Some((wanted, n)) = &*WANTED else { return false };
    let mut passed = PASSED.lock().unwrap_or_else(PoisonError::into_inner);
    let count = passed.entry(phase).or_default();
    *count += 1;
    wanted == phase && count == n
}

/// What a SIGKILL from outside does.
#[cfg(feature = "fault-points")]
pub fn die() {
    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
}
