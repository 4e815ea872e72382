//! Whole jobs: each composes source, pipeline, sink and what comes after, and survives being killed at any point.

pub mod convert;
pub mod copy;
pub mod source;
