//! The index of a folder with many blocks: hashes of its names in order, in the leaves of a B+tree ("Leaf Directories",
//! "Node Directories").

use super::folder::INDEX;
use super::inode::Inode;
use super::{Own, XfsFiles};
use crate::error::Result;
use crate::layout::field::{be16, be32};

/// Most levels of nodes above the leaves.
const MAX_LEVELS: u16 = 5;
/// Most leaves and entries looked at because their hash is that of the name.
const MAX_LEAVES: usize = 1024;
const MAX_SAME: usize = 1 << 14;
/// Bytes before the entries without and with checksums, and bytes of an entry.
const HEADER: usize = 16;
const HEADER_5: usize = 64;
const ENTRY: usize = 8;
const OWN: Own = Own { sum: 12, address: 16, uuid: 32, owner: 48 };
/// Magic numbers of a node, of the only leaf, and of one of many, without and with checksums.
const NODE: [u16; 2] = [0xfebe, 0x3ebe];
const LEAVES: [[u16; 2]; 2] = [[0xd2f1, 0xd2ff], [0x3df1, 0x3dff]];

/// A block of the index.
struct IndexBlock {
    /// Levels above the leaves.
    level: u16,
    /// The block that follows in the same level, in blocks of the folder; 0 for none.
    next: u64,
    /// Hashes, and what they stand for: a block of the index, or eight bytes of the folder's data.
    entries: Vec<(u32, u32)>,
}

impl XfsFiles {
    /// The inode number of the entry `name` of the folder `inode`, by its index.
    pub(super) fn find_by_index(&self, inode: &Inode, name: &[u8]) -> Result<Option<u64>> {
        let hash = hash(name);
        let mut at = INDEX / self.sb.block_size;
        let mut block = self.index_block(inode, at)?;
        self.require(inode.number, block.level <= MAX_LEVELS, "its index has too many levels")?;
        while block.level > 0 {
            // A node has the last hash of each child.
            let child = block.entries.partition_point(|(last, _)| *last < hash);
            let Some((_, child)) = block.entries.get(child) else { return Ok(None) };
            at = u64::from(*child);
            let level = block.level - 1;
            block = self.index_block(inode, at)?;
            self.require(inode.number, block.level == level, "a block of its index is of another level")?;
        }
        let (mut same, mut last) = (0, None);
        for _ in 0..MAX_LEAVES {
            let first = block.entries.partition_point(|(other, _)| *other < hash);
            for (other, place) in block.entries.get(first..).unwrap_or_default() {
                if *other != hash {
                    return Ok(None);
                }
                same += 1;
                self.require(inode.number, same <= MAX_SAME, "too many names in it have the same hash")?;
                // An entry that is no more stands for the folder's header.
                let found = match *place {
                    0 => None,
                    place => self.entry_named(inode, u64::from(place) * 8, name, &mut last)?,
                };
                if found.is_some() {
                    return Ok(found);
                }
            }
            if block.next == 0 {
                return Ok(None);
            }
            block = self.index_block(inode, block.next)?;
            self.require(inode.number, block.level == 0, "a block of its index is of another level")?;
        }
        Err(self.wrong(inode.number, "too many names in it have the same hash"))
    }

    /// Reads and checks the block of the index that begins with the folder's block `first`.
    fn index_block(&self, inode: &Inode, first: u64) -> Result<IndexBlock> {
        let inside = (INDEX..2 * INDEX).contains(&(first * self.sb.block_size));
        self.require(inode.number, inside, "its index leads outside")?;
        let (raw, at) = self.folder_block(inode, first)?;
        let version = usize::from(self.sb.checksums());
        let magic = be16(&raw, 8);
        let is_node = NODE.get(version) == Some(&magic);
        let is_leaf = LEAVES.get(version).is_some_and(|leaves| leaves.contains(&magic));
        self.require(inode.number, is_node || is_leaf, "a block of its index has no magic number")?;
        if self.sb.checksums() {
            self.check_own(inode.number, &raw, at, OWN)?;
        }
        let (header, counts) = if self.sb.checksums() { (HEADER_5, 56) } else { (HEADER, 12) };
        let level = if is_node { be16(&raw, counts + 2) } else { 0 };
        self.require(inode.number, is_node == (level > 0), "a node of its index has no level")?;
        let count = usize::from(be16(&raw, counts));
        let entries = raw.get(header..).and_then(|rest| rest.get(..count * ENTRY));
        let entries = entries.ok_or_else(|| self.wrong(inode.number, "a block of its index is too long"))?;
        let entries = entries.chunks_exact(ENTRY).map(|entry| (be32(entry, 0), be32(entry, 4))).collect();
        Ok(IndexBlock { level, next: be32(&raw, 0).into(), entries })
    }
}

/// The hash of a name ("Directory Hash"): its bytes seven bits apart, folded into 32.
fn hash(name: &[u8]) -> u32 {
    name.iter().fold(0, |hash: u32, byte| hash.rotate_left(7) ^ u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_hashed_as_xfs_db_hashes_them() {
        // xfs_db -c 'hash NAME'
        for (name, expected) in
            [(".", 0x2e), ("..", 0x172e), ("passwd", 0x1e7c_f862), ("a-longer-name.conf", 0x4469_2565)]
        {
            assert_eq!(hash(name.as_bytes()), expected, "{name}");
        }
    }
}
