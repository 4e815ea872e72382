//! How large the parts of a multipart upload are.

use crate::unit::{GIB, MIB};

/// Most parts an upload may have (S3, COS).
pub const MAX_PARTS: usize = 10_000;

/// Smallest part besides the last that every S3 store takes (AWS: 5 MiB; COS: 1 MiB).
pub const MIN_PART: u64 = 5 * MIB;

/// Largest part a store takes (S3, COS: 5 GiB).
pub const MAX_PART: u64 = 5 * GIB;

/// The size in bytes at which a writer should close a part, for an object of at most `bound` bytes.
///
/// A writer cuts at the first border of its own at or after the target, so parts differ in size. The target is
/// the least whole MiB that makes at most 9,000 parts, never under 16 MiB: a tenth of the part numbers is left
/// for parts cut early.
pub fn part_target(bound: u64) -> u64 {
    bound.div_ceil(9_000).next_multiple_of(MIB).clamp(16 * MIB, MAX_PART)
}

/// How long in bytes a part copied inside the store may be, for an object of `size` bytes: 1 GiB, so that one try is
/// short, and more where that would make over 2,000 parts.
pub fn copy_target(size: u64) -> u64 {
    size.div_ceil(2_000).clamp(GIB, MAX_PART)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::TIB;

    #[test]
    fn small_objects_have_16_mib_parts_and_large_ones_at_most_9000() {
        assert_eq!(part_target(0), 16 * MIB);
        assert_eq!(part_target(140 * GIB), 16 * MIB);
        assert_eq!(part_target(2 * TIB), 234 * MIB);
        for bound in [1, 141 * GIB, 2 * TIB, 16 * TIB, 43 * TIB] {
            let target = part_target(bound);
            assert!(target.is_multiple_of(MIB) && bound.div_ceil(target) <= 9_000, "{bound}");
        }
        assert_eq!(part_target(u64::MAX / 2), MAX_PART);
        for (size, most) in [(0, GIB), (2 * TIB, GIB + 48 * MIB), (48 * TIB, MAX_PART)] {
            assert!((GIB..=most).contains(&copy_target(size)), "{size}");
            assert!(size.div_ceil(copy_target(size)) < MAX_PARTS as u64, "{size}");
        }
    }
}
