//! The machine haul runs on: its programs and child processes, mounts, loop devices, FUSE, namespaces.

pub mod child;
pub mod disks;
pub mod export;
pub mod first;
pub mod labels;
pub mod loopdev;
pub mod mounts;
pub mod namespace;
pub mod programs;
pub mod writers;
