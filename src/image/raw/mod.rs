//! Raw: the disk itself, nothing around it.

pub mod writer;
