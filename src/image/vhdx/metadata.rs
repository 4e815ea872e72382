//! The metadata region: a table of items, and the items that say what the disk is like. Field names are those of
//! [MS-VHDX] 2.6; numbers are little-endian.

use super::{Guid, bad_field, field, guid, guid_text, u16_at, u32_at};
use crate::error::Result;
use crate::io::{ReadAt, read_array, read_vec};
use crate::unit::{Extent, KIB, MIB, TIB, to_usize};

/// Bytes of the metadata table, which the items follow.
pub const TABLE_LEN: u64 = 64 * KIB;
/// The most entries of the table.
const MAX_ITEMS: u16 = 2047;
/// The largest disk, in bytes.
pub const MAX_SIZE: u64 = 64 * TIB;

/// The known items: what they are called, their ids, and their lengths in bytes.
const KNOWN: [(&str, Guid, usize); 6] = [
    ("file parameters", guid(0xcaa16737_fa36_4d43_b3b6_33f0aa44e76b), 8),
    ("virtual disk size", guid(0x2fa54224_cd1b_4876_b211_5dbed83bf4b8), 8),
    ("logical sector size", guid(0x8141bf1d_a96f_4709_ba47_f233a8faab5f), 4),
    ("physical sector size", guid(0xcda348c7_445d_4471_9cc9_e9885251c556), 4),
    ("virtual disk id", guid(0xbeca12ab_b2e6_4523_93ef_c309e000c746), 16),
    // Its length varies; only whether it is there counts.
    ("parent locator", guid(0xa8d35f2d_b30b_454d_abf7_d3d84834ab0c), 0),
];

/// What the disk is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of the disk in a block: a power of two from 1 to 256 MiB.
    pub block_size: u64,
    /// Whether all blocks stay allocated: a fixed disk.
    pub fixed: bool,
    /// Whether blocks that are absent are those of another disk.
    pub has_parent: bool,
    /// Length of the disk in bytes, at most [`MAX_SIZE`].
    pub size: u64,
    /// Bytes of a sector as the disk counts them: 512 or 4096.
    pub logical_sector: u32,
    /// Bytes of a sector as the disk writes them: 512 or 4096.
    pub physical_sector: u32,
    /// The disk's identifier.
    pub disk_id: Guid,
}

impl Metadata {
    /// Reads the metadata in `region` of `file`, whose log was replayed.
    pub fn read(file: &dyn ReadAt, name: &str, region: Extent) -> Result<Self> {
        // A region is 1 MiB at least and inside the file, as the region table was checked to say.
        let table = read_vec(file, region.start, to_usize(TABLE_LEN))?;
        let bad =
            |field: &str, offset: u64, why: String| Err(bad_field(name, field, region.start + offset, why));
        if !table.starts_with(b"metadata") {
            return bad("signature", 0, "it is not \"metadata\": no metadata table is here".into());
        }
        let count = u16_at(&table, 10);
        if count > MAX_ITEMS {
            return bad("entry_count", 10, format!("it is {count}; {MAX_ITEMS} are allowed"));
        }
        let mut items: [Option<Extent>; KNOWN.len()] = [None; KNOWN.len()];
        for at in (0..u64::from(count)).map(|i| 32 + i * 32) {
            let entry: [u8; 32] = field(&table, to_usize(at));
            let id: Guid = field(&entry, 0);
            let (offset, length, flags) = (u32_at(&entry, 16), u32_at(&entry, 20), u32_at(&entry, 24));
            let (user, required) = (flags & 1 != 0, flags & 4 != 0);
            let found = KNOWN.iter().zip(&mut items).find(|((_, known, _), _)| *known == id && !user);
            let Some((&(what, _, expected), place)) = found else {
                if required {
                    let why =
                        format!("the item {} is unknown, and required to read the disk", guid_text(&id));
                    return bad("item_id", at, why);
                }
                continue;
            };
            let item = Extent::at(u64::from(offset), u64::from(length));
            if item.start < TABLE_LEN || item.end > region.len() {
                let why = format!("{length} bytes at {offset} of the region are no place for the {what}");
                return bad("offset", at + 16, why);
            }
            if expected > 0 && to_usize(item.len()) != expected {
                return bad("length", at + 20, format!("it is {length}; the {what} takes {expected} bytes"));
            }
            if place.replace(item.shifted(region.start)).is_some() {
                return bad("item_id", at, format!("a second {what}"));
            }
        }
        let [parameters, size, logical, physical, id, parent] = items;
        let missing = |i: usize| {
            let (what, ..) = KNOWN[i];
            bad_field(name, what, region.start, "the metadata table has no such item")
        };
        let parameters = parameters.ok_or_else(|| missing(0))?;
        let size_at = size.ok_or_else(|| missing(1))?.start;
        let logical_at = logical.ok_or_else(|| missing(2))?.start;
        let physical_at = physical.ok_or_else(|| missing(3))?.start;
        let id_at = id.ok_or_else(|| missing(4))?.start;
        let flags = u32::from_le_bytes(read_array(file, parameters.start + 4)?);
        let metadata = Metadata {
            block_size: u32::from_le_bytes(read_array(file, parameters.start)?).into(),
            fixed: flags & 1 != 0,
            has_parent: flags & 2 != 0 || parent.is_some(),
            size: u64::from_le_bytes(read_array(file, size_at)?),
            logical_sector: u32::from_le_bytes(read_array(file, logical_at)?),
            physical_sector: u32::from_le_bytes(read_array(file, physical_at)?),
            disk_id: read_array(file, id_at)?,
        };
        let bad = |field: &str, at: u64, why: String| Err(bad_field(name, field, at, why));
        let block = metadata.block_size;
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            let why = format!("it is {block}; powers of two from 1 to 256 MiB are possible");
            return bad("block_size", parameters.start, why);
        }
        for (field, at, bytes) in [
            ("logical_sector_size", logical_at, metadata.logical_sector),
            ("physical_sector_size", physical_at, metadata.physical_sector),
        ] {
            if bytes != 512 && bytes != 4096 {
                return bad(field, at, format!("it is {bytes}; 512 and 4096 are possible"));
            }
        }
        if metadata.size > MAX_SIZE || !metadata.size.is_multiple_of(metadata.logical_sector.into()) {
            let why = format!("{} bytes are more than 64 TiB, or no whole number of sectors", metadata.size);
            return bad("virtual_disk_size", size_at, why);
        }
        Ok(metadata)
    }

    /// Payload entries of the block allocation table between two entries of sector bitmaps ("Chunk ratio").
    pub fn chunk_ratio(&self) -> u64 {
        (u64::from(self.logical_sector) << 23) / self.block_size
    }

    /// The number of blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block_size)
    }

    /// Which entry of the block allocation table block `index` has.
    pub fn entry_of(&self, index: u64) -> u64 {
        index + index / self.chunk_ratio()
    }

    /// The first block whose entry is `entry` or a later one.
    pub fn block_from(&self, entry: u64) -> u64 {
        entry - entry / (self.chunk_ratio() + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_and_entries_are_each_others(index in 0u64..64 << 20, bits in 20u32..29, large in any::<bool>()) {
            let metadata = Metadata {
                block_size: 1 << bits,
                fixed: false,
                has_parent: false,
                size: MAX_SIZE,
                logical_sector: if large { 4096 } else { 512 },
                physical_sector: 4096,
                disk_id: [0; 16],
            };
            let entry = metadata.entry_of(index);
            prop_assert_eq!(metadata.block_from(entry), index);
            // Between two blocks' entries there is at most one, of a sector bitmap, which belongs to no block.
            let next = metadata.entry_of(index + 1);
            let bitmap = (index + 1).is_multiple_of(metadata.chunk_ratio());
            prop_assert_eq!(next - entry, if bitmap { 2 } else { 1 });
            prop_assert_eq!(metadata.block_from(entry + 1), index + 1);
        }
    }
}
