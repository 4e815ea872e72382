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
pub mod round;
pub mod source;
pub mod state;
#[cfg(feature = "net")]
pub mod upload;
mod work;
