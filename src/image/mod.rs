//! Disk images, and the copy-on-write overlay over any of them.

pub mod overlay;
