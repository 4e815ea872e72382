//! qcow2, versions 2 and 3, as QEMU's docs/interop/qcow2.txt defines it.

mod codec;
pub mod header;
mod metadata;
mod reader;
pub mod round;
pub mod table;
mod unpack;
pub mod writer;

pub use metadata::{Info, Metadata, Snapshot};
pub use reader::Reader;
