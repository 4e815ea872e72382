//! What the machine haul runs on offers: mounts, loop devices, FUSE, namespaces.

pub mod loopdev;
pub mod mounts;
