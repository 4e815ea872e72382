//! The embedded cloud on loopback: simulators that judge clients as the real services do.

pub mod cvm;
pub mod s3;
