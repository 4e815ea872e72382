//! VHD, fixed and dynamic, as Microsoft's "Virtual Hard Disk Image Format Specification" 1.0 defines it.

pub mod footer;
pub mod header;
mod metadata;
mod reader;
pub mod writer;

pub use metadata::{Info, Subformat, inspect, probe};
pub use reader::Reader;

use crate::error::{Error, Kind};
use crate::unit::GIB;

/// Bytes of a sector, the unit in which the block allocation table counts.
pub const SECTOR: u64 = 512;
/// The largest dynamic disk, in bytes: sector numbers have 32 bits, and the format sets the bound a little below.
pub const MAX_SIZE: u64 = 2040 * GIB;

/// An error about one field: what it is called, where it is in the file, and what is wrong with it.
fn bad_field(image: &str, field: &str, offset: u64, why: impl Into<String>) -> Error {
    Error::new(
        Kind::Image,
        "vhd.field",
        format!("{image}: VHD field `{field}` at offset {offset} is malformed"),
    )
    .because(why)
    .fact("image", image)
    .fact("field", field)
    .fact("offset", offset)
}

/// The checksum of a footer or header: the ones' complement of the sum of its bytes, those of the checksum itself,
/// at `at`, taken as zero ("Hard Disk Footer Format", field Checksum).
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().fold(0, |sum: u32, byte| sum.wrapping_add((*byte).into()));
    let (before, rest) = bytes.split_at(at);
    !sum(before).wrapping_add(sum(&rest[4..]))
}
