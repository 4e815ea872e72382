//! Raw: the disk itself, nothing around it.

pub mod round;
pub mod writer;
