//! A file system shown under another UUID: a kernel takes one file system of each, and a server's copy has the server's.

use uuid::Uuid;

use super::superblock::{FSID, INCOMPAT, LEN, METADATA_FSID, PLACES, Superblock, feature};
use crate::layout::field::bytes;
use crate::unit::to_usize;

/// Another UUID for a file system. Only its superblocks tell: tree blocks and devices keep the first one, which the
/// superblock shown names as theirs (the feature METADATA_UUID, Linux 5.0; what `btrfstune -m` makes).
#[derive(Clone, Debug)]
pub struct BtrfsAlias {
    first: [u8; 16],
    alias: [u8; 16],
    /// The field of the feature, and whether it is in force.
    metadata: [u8; 16],
    in_force: bool,
}

impl BtrfsAlias {
    /// Length of a superblock in bytes.
    pub const LEN: usize = to_usize(LEN);
    /// Where the superblock and its mirrors are, in bytes from the start of the file system.
    pub const PLACES: [u64; 3] = PLACES;

    /// `alias` for the file system of this superblock; `None` if it is none, or damaged.
    pub fn new(superblock: &[u8], alias: Uuid) -> Option<Self> {
        intact(superblock)?;
        Some(BtrfsAlias {
            first: bytes(superblock, FSID),
            alias: alias.into_bytes(),
            metadata: bytes(superblock, METADATA_FSID),
            in_force: incompat(superblock) & feature::METADATA_UUID != 0,
        })
    }

    /// The UUID that it has.
    pub fn uuid(&self) -> Uuid {
        Uuid::from_bytes(self.first)
    }

    /// Makes of a superblock of the file system the one that is shown; leaves other bytes alone.
    pub fn show(&self, block: &mut [u8]) {
        if intact(block).is_none() || bytes(block, FSID) != self.first {
            return;
        }
        put(block, FSID, &self.alias);
        if !self.in_force {
            put(block, METADATA_FSID, &self.first);
            put(block, INCOMPAT, &(incompat(block) | feature::METADATA_UUID).to_le_bytes());
        }
        seal(block);
    }

    /// Makes of a superblock as it is shown the one that the file system has; leaves other bytes alone.
    pub fn keep(&self, block: &mut [u8]) {
        if intact(block).is_none() || bytes(block, FSID) != self.alias {
            return;
        }
        put(block, FSID, &self.first);
        if !self.in_force {
            put(block, METADATA_FSID, &self.metadata);
            put(block, INCOMPAT, &(incompat(block) & !feature::METADATA_UUID).to_le_bytes());
        }
        seal(block);
    }
}

fn intact(block: &[u8]) -> Option<Superblock> {
    Superblock::of(block).filter(|superblock| block.len() == BtrfsAlias::LEN && superblock.intact(block))
}

fn incompat(block: &[u8]) -> u64 {
    u64::from_le_bytes(bytes(block, INCOMPAT))
}

fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = block.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Writes the checksum of what follows it.
fn seal(block: &mut [u8]) {
    let sum = Superblock::of(block).and_then(|superblock| superblock.sum_of(block));
    put(block, 0, &sum.unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A superblock with checksums of this kind.
    fn superblock(kind: u16) -> Vec<u8> {
        let mut block: Vec<u8> = (0..BtrfsAlias::LEN).map(|i| u8::try_from(i % 251).unwrap()).collect();
        put(&mut block, 64, b"_BHRfS_M");
        put(&mut block, 196, &kind.to_le_bytes());
        put(&mut block, INCOMPAT, &0x361_u64.to_le_bytes());
        put(&mut block, 0, &[0; 32]);
        seal(&mut block);
        block
    }

    #[test]
    fn what_is_shown_has_another_uuid_and_is_kept_as_it_was() {
        for kind in [0, 2] {
            let block = superblock(kind);
            let alias = BtrfsAlias::new(&block, Uuid::from_bytes([7; 16])).unwrap();
            let mut shown = block.clone();
            alias.show(&mut shown);
            assert!(intact(&shown).is_some());
            assert_eq!(bytes::<16>(&shown, FSID), [7; 16]);
            assert_eq!(bytes::<16>(&shown, METADATA_FSID), bytes::<16>(&block, FSID));
            assert_eq!(incompat(&shown), 0x761);
            // The kernel writes it with another generation.
            put(&mut shown, 72, &99_u64.to_le_bytes());
            seal(&mut shown);
            alias.keep(&mut shown);
            assert!(intact(&shown).is_some());
            put(&mut shown, 72, &block[72..80]);
            seal(&mut shown);
            assert_eq!(shown, block);
        }
    }

    #[test]
    fn a_file_system_that_has_the_feature_keeps_it() {
        let mut block = superblock(0);
        put(&mut block, INCOMPAT, &0x761_u64.to_le_bytes());
        seal(&mut block);
        let alias = BtrfsAlias::new(&block, Uuid::from_bytes([7; 16])).unwrap();
        let mut shown = block.clone();
        alias.show(&mut shown);
        assert_eq!(bytes::<16>(&shown, METADATA_FSID), bytes::<16>(&block, METADATA_FSID));
        alias.keep(&mut shown);
        assert_eq!(shown, block);
    }

    #[test]
    fn other_bytes_and_damaged_superblocks_are_left_alone() {
        let block = superblock(0);
        let alias = BtrfsAlias::new(&block, Uuid::from_bytes([7; 16])).unwrap();
        let mut damaged = block.clone();
        damaged[2000] ^= 1;
        assert!(BtrfsAlias::new(&damaged, alias.uuid()).is_none());
        for other in [vec![0; BtrfsAlias::LEN], damaged, block[..100].to_vec()] {
            let mut changed = other.clone();
            alias.show(&mut changed);
            alias.keep(&mut changed);
            assert_eq!(changed, other);
        }
    }
}
