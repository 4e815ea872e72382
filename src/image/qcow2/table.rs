//! L1 and L2 table entries: their bits and back, pure. Sections "Cluster mapping" and "Extended L2 Entries" of
//! QEMU's docs/interop/qcow2.txt.

use crate::unit::Extent;

/// Bit 63 of an L1 or L2 entry: the refcount of what it points to is exactly one.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a plain L2 entry (version 3, not extended): the cluster reads as zeroes.
pub const ZERO: u64 = 1;
/// Bits 9 to 55 of an L1 or plain L2 entry: an offset in the file.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Unit of the length of a compressed cluster, in bytes.
pub const SECTOR: u64 = 512;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u64 = 32;

/// The shape of an image's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Whether L2 entries are 128 bits wide and map subclusters.
    pub extended: bool,
}

impl Geometry {
    /// Bytes of a cluster, and of an L2 table.
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// 64-bit words of an L2 entry.
    pub const fn entry_words(self) -> u64 {
        if self.extended { 2 } else { 1 }
    }

    /// Entries in an L2 table.
    pub const fn l2_entries(self) -> u64 {
        self.cluster_size() / (8 * self.entry_words())
    }

    /// Bytes of the virtual disk that one L2 table maps.
    pub const fn l2_span(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries a virtual disk of `size` bytes needs.
    pub const fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    /// The smallest unit an entry maps on its own, in bytes: a cluster or a subcluster.
    pub const fn unit(self) -> u64 {
        if self.extended { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    /// The bit of a compressed L2 entry at which its length begins.
    const fn length_shift(self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// The L2 entry of the `len` (> 0) compressed bytes at `offset`; the caller keeps `len` below a cluster.
    pub const fn compressed_entry(self, offset: u64, len: u64) -> u64 {
        let more_sectors = (offset + len - 1) / SECTOR - offset / SECTOR;
        COMPRESSED | more_sectors << self.length_shift() | offset
    }

    /// Where the bytes of a compressed entry are: from its first byte to the end of its last sector.
    const fn compressed_bytes(self, entry: u64) -> Extent {
        let shift = self.length_shift();
        let offset = entry & ((1 << shift) - 1);
        let more_sectors = (entry & (COMPRESSED - 1)) >> shift;
        Extent::new(offset, (offset / SECTOR + more_sectors + 1) * SECTOR)
    }
}

/// The L1 entry of the L2 table at `offset`, used once.
pub const fn l1_entry(offset: u64) -> u64 {
    COPIED | offset
}

/// The L2 entry of the plain cluster at `offset`, used once.
pub const fn plain_entry(offset: u64) -> u64 {
    COPIED | offset
}

/// Where the bytes of a cluster or subcluster come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The backing file, or zeroes without one.
    Unallocated,
    /// Zeroes.
    Zero,
    /// The (sub)cluster at this offset of the file.
    Plain(u64),
    /// Compressed bytes: a whole cluster unpacks from the start of this range.
    Compressed(Extent),
}

/// How to read the entries of one image.
#[derive(Clone, Copy, Debug)]
pub struct Entries {
    /// The tables' shape.
    pub geometry: Geometry,
    /// Version 2 has no zero bit.
    pub version: u32,
    /// Plain clusters are in an external data file, where offset 0 is a place like any other.
    pub external: bool,
}

impl Entries {
    /// What subcluster `sub` (0 without extended L2) of the entry `word`, `bitmap` maps to; `Err` says what is
    /// wrong with the entry. Reserved bits are ignored, as QEMU ignores them.
    pub fn decode(self, word: u64, bitmap: u64, sub: u64) -> Result<Mapping, &'static str> {
        if word & COMPRESSED != 0 {
            if self.external {
                return Err("a compressed cluster in an image with an external data file");
            }
            return Ok(Mapping::Compressed(self.geometry.compressed_bytes(word)));
        }
        let offset = word & OFFSET_MASK;
        let allocated = offset != 0 || (self.external && word & COPIED != 0);
        if !self.geometry.extended && word & ZERO != 0 {
            return if self.version < 3 { Err("a zero bit in a version 2 image") } else { Ok(Mapping::Zero) };
        }
        if allocated && !offset.is_multiple_of(self.geometry.cluster_size()) {
            return Err("its offset is no cluster boundary");
        }
        if !self.geometry.extended {
            return Ok(if allocated { Mapping::Plain(offset) } else { Mapping::Unallocated });
        }
        let (holds, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        if holds & zero != 0 {
            return Err("a subcluster is both allocated and zero");
        }
        if !allocated && holds != 0 {
            return Err("a subcluster is allocated in a cluster that is not");
        }
        Ok(match () {
            () if zero >> sub & 1 != 0 => Mapping::Zero,
            () if holds >> sub & 1 != 0 => Mapping::Plain(offset + sub * self.geometry.unit()),
            () => Mapping::Unallocated,
        })
    }
}

/// The largest number of compressed bytes worth storing for a cluster: QEMU stores it plain from here on.
pub const fn compressed_limit(geometry: Geometry) -> u64 {
    geometry.cluster_size() - SECTOR
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_compressed_entry_covers_its_bytes_and_less_than_a_sector_more(
            cluster_bits in 9u32..=21, offset in 512u64..1 << 48, len in 1u64..2 << 20,
        ) {
            let geometry = Geometry { cluster_bits, extended: false };
            let len = len.min(geometry.cluster_size());
            let entries = Entries { geometry, version: 3, external: false };
            let entry = geometry.compressed_entry(offset, len);
            let Ok(Mapping::Compressed(bytes)) = entries.decode(entry, 0, 0) else {
                return Err(TestCaseError::fail("not compressed"));
            };
            prop_assert_eq!(bytes.start, offset);
            prop_assert!(bytes.end >= offset + len && bytes.end < offset + len + SECTOR);
        }

        #[test]
        fn a_plain_entry_gives_its_offset_back(cluster_bits in 9u32..=21, cluster in 1u64..1 << 34) {
            let geometry = Geometry { cluster_bits, extended: false };
            let offset = cluster << cluster_bits;
            let entries = Entries { geometry, version: 2, external: false };
            prop_assert_eq!(entries.decode(plain_entry(offset), 0, 0), Ok(Mapping::Plain(offset)));
            prop_assert_eq!(l1_entry(offset) & OFFSET_MASK, offset);
        }

        #[test]
        fn any_words_are_a_mapping_or_an_error(
            word in any::<u64>(), bitmap in any::<u64>(), sub in 0u64..32, cluster_bits in 14u32..=21,
            extended in any::<bool>(), version in 2u32..=3, external in any::<bool>(),
        ) {
            let geometry = Geometry { cluster_bits, extended };
            match (Entries { geometry, version, external }).decode(word, bitmap, sub) {
                Ok(Mapping::Plain(offset)) => prop_assert!(offset.is_multiple_of(geometry.unit())),
                Ok(Mapping::Compressed(bytes)) => {
                    prop_assert!(bytes.len() <= 2 * geometry.cluster_size());
                }
                _ => {}
            }
        }
    }

    #[test]
    fn subclusters_are_told_apart() {
        let geometry = Geometry { cluster_bits: 16, extended: true };
        let entries = Entries { geometry, version: 3, external: false };
        let word = plain_entry(5 << 16);
        let bitmap = 0b001 | 0b010 << 32;
        assert_eq!(entries.decode(word, bitmap, 0), Ok(Mapping::Plain(5 << 16)));
        assert_eq!(entries.decode(word, bitmap, 1), Ok(Mapping::Zero));
        assert_eq!(entries.decode(word, bitmap, 2), Ok(Mapping::Unallocated));
        assert_eq!(entries.decode(word, 1 << 31, 31), Ok(Mapping::Plain((5 << 16) + 31 * 2048)));
        assert!(entries.decode(word, 1 | 1 << 32, 0).is_err());
        assert!(entries.decode(0, 1, 0).is_err());
    }
}
