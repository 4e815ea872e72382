//! Disk images: what a file holds as a virtual disk.

pub mod qcow2;
