//! Items of inodes and of names in folders.

use super::{MAX_SIZE, Step, owner, require};
use crate::layout::FileKind;
use crate::layout::btrfs::tree::{Key, kind};
use crate::layout::field::{bytes, crc32c_raw, le16, le32, le64};

/// Length of an inode item.
const INODE: usize = 160;
/// The flag of a file whose data has no checksums.
const NO_SUMS: u64 = 0x1;
/// Bytes of an entry before its name.
const ENTRY: usize = 30;
/// Longest name, in bytes.
const MAX_NAME: usize = 255;

/// An inode item.
#[derive(Clone, Copy)]
pub(super) struct Inode {
    pub kind: FileKind,
    /// Length in bytes.
    pub size: u64,
    /// Whether its data has checksums.
    pub has_sums: bool,
}

impl Inode {
    pub fn parse(item: &[u8]) -> Step<Inode> {
        require(item.len() == INODE, || format!("its item has {} bytes", item.len()))?;
        let (size, mode) = (le64(item, 16), le32(item, 52));
        // The kinds of inode(7).
        let kind = match mode & 0o170_000 {
            0o100_000 => FileKind::Regular,
            0o040_000 => FileKind::Folder,
            0o120_000 => FileKind::Link,
            0o010_000 | 0o020_000 | 0o060_000 | 0o140_000 => FileKind::Other,
            _ => return Err(format!("its mode is {mode:o}").into()),
        };
        require(size <= MAX_SIZE, || format!("its size is {size}"))?;
        Ok(Inode { kind, size, has_sums: le64(item, 64) & NO_SUMS == 0 })
    }
}

/// What a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Location {
    /// An inode of the same tree.
    Inode(u64),
    /// The root of another tree.
    Subvolume(u64),
}

/// A name in a folder.
pub(super) struct Entry<'a> {
    key: Key,
    name: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Takes the first entry off `item`.
    fn take(item: &mut &'a [u8]) -> Step<Entry<'a>> {
        let wrong = |what: &str| format!("a name in it {what}");
        let (data, len) = (usize::from(le16(item, 25)), usize::from(le16(item, 27)));
        require(item.len() >= ENTRY, || wrong("is cut off"))?;
        require((1..=MAX_NAME).contains(&len) && data == 0, || wrong(&format!("has {len} bytes")))?;
        let entry = Entry { key: Key::read(item, 0), name: item.get(ENTRY..ENTRY + len).unwrap_or_default() };
        require(!entry.name.is_empty(), || wrong("is cut off"))?;
        *item = item.get(ENTRY + len..).unwrap_or_default();
        Ok(entry)
    }

    /// What `name` leads to, by the item of its hash.
    pub fn named(mut item: &'a [u8], name: &[u8]) -> Step<Option<Location>> {
        while !item.is_empty() {
            let entry = Entry::take(&mut item)?;
            if entry.name == name {
                return entry.location().map(Some);
            }
        }
        Ok(None)
    }

    /// The name of an item that has but one.
    pub fn only(mut item: &'a [u8]) -> Step<&'a [u8]> {
        let entry = Entry::take(&mut item)?;
        require(item.is_empty(), || "an index in it has more than one name".into())?;
        Ok(entry.name)
    }

    fn location(&self) -> Step<Location> {
        match self.key.kind {
            kind::INODE => Ok(Location::Inode(self.key.id)),
            kind::ROOT if owner::is_subvolume(self.key.id) => Ok(Location::Subvolume(self.key.id)),
            other => Err(format!("a name in it leads to {} of kind {other}", self.key.id).into()),
        }
    }
}

/// The hash that the item of a name is found by.
pub(super) fn hash(name: &[u8]) -> u64 {
    crc32c_raw(!1, name).into()
}

/// The name in an item that says where a subvolume is, and the folder.
pub(super) fn reference(item: &[u8]) -> (u64, &[u8]) {
    let [low, high] = bytes(item, 16);
    let len = usize::from(u16::from_le_bytes([low, high]));
    (le64(item, 0), item.get(18..18 + len).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u8, id: u64, name: &[u8]) -> Vec<u8> {
        let len = u16::try_from(name.len()).unwrap().to_le_bytes();
        [&id.to_le_bytes()[..], &[kind], &[0; 16], &[0; 2], &len, &[1], name].concat()
    }

    #[test]
    fn names_of_one_hash_are_told_apart() {
        let item = [entry(1, 300, b"one"), entry(132, 256, b"other")].concat();
        assert_eq!(Entry::named(&item, b"one").unwrap(), Some(Location::Inode(300)));
        assert_eq!(Entry::named(&item, b"other").unwrap(), Some(Location::Subvolume(256)));
        assert_eq!(Entry::named(&item, b"on").unwrap(), None);
        assert!(Entry::only(&item).is_err());
        assert_eq!(Entry::only(&item[..33]).unwrap(), b"one");
    }

    #[test]
    fn broken_entries_are_refused() {
        for len in 1..33 {
            assert!(Entry::only(&entry(1, 300, b"one")[..len]).is_err(), "{len}");
        }
        for (kind, id) in [(0, 300), (84, 300), (132, 2), (132, u64::MAX - 6), (132, 1 << 48)] {
            assert!(Entry::named(&entry(kind, id, b"one"), b"one").is_err(), "{kind} {id}");
        }
        assert!(Entry::only(&entry(1, 300, b"")).is_err());
        assert!(Entry::only(&entry(1, 300, &[b'a'; 256])).is_err());
    }

    /// `default`, as every root tree has it.
    #[test]
    fn the_hash_is_that_of_btrfs() {
        assert_eq!(hash(b"default"), 2_378_154_706);
    }
}
