//! The embedded cloud on loopback: real signature checks, an importer that judges, instances in QEMU.

pub mod cvm;
