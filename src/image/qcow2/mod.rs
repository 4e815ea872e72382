//! qcow2, versions 2 and 3, as QEMU's docs/interop/qcow2.txt defines it.

pub mod header;
pub mod table;
