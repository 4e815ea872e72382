//! The embedded cloud: simulators that judge clients as the real services do, on loopback only.

pub mod s3;
