//! The machine haul runs on: its programs and child processes, mounts, loop devices, FUSE, namespaces.

pub mod child;
pub mod loopdev;
pub mod mounts;
pub mod programs;
