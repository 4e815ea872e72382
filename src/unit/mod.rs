//! Numbers and names with a meaning: extents, sizes, digests, secrets.

pub mod bytes;
pub mod digest;
pub mod extents;
pub mod fault;
pub mod rate;
pub mod secret;

pub use digest::Digest;
pub use extents::{Extent, ExtentMap, Extents};
pub use secret::Secret;

/// One kibibyte, in bytes.
pub const KIB: u64 = 1 << 10;
/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;
/// One gibibyte, in bytes.
pub const GIB: u64 = 1 << 30;
/// One tebibyte, in bytes.
pub const TIB: u64 = 1 << 40;

const _: () = assert!(usize::BITS == 64, "haul is built for 64-bit machines only");

/// A `u64` as a `usize`: lossless, because haul is built for 64-bit machines only.
#[expect(clippy::cast_possible_truncation, reason = "the assertion above makes it lossless")]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}
