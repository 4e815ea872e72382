//! Path names of inodes: directories are read in the order that finds them soonest, each link of a path is one that
//! an entry of its directory proves.

use std::collections::{BTreeMap, BTreeSet};

use super::inode::{Inode, Maps};
use super::tables::Tables;
use super::{Fs, Notes, Overlay, Part, Step, Stop};
use crate::io::ReadAt;
use crate::layout::field::{le16, le32};
use crate::unit::Extent;

/// The root directory's inode.
pub(super) const ROOT: u32 = 2;
/// Most blocks of directories that are read: 16 GiB at 4 KiB each.
const MAX_BLOCKS: u64 = 1 << 22;
/// Blocks of a directory read at a time.
const READ: u64 = 16;
/// Longest path in bytes, and most names in it.
const MAX_PATH: usize = 4096;
const MAX_LEVELS: usize = 1024;
/// Most directories whose own names are looked up, and remembered in up to 300 bytes each.
const MAX_PARENTS: usize = 1 << 15;

/// The names of one inode.
#[derive(Default)]
pub(super) struct Names {
    /// The directory with its first name, and that.
    first: Option<(u32, Vec<u8>)>,
    /// How many names were found.
    pub found: u64,
    /// How many there should be.
    expected: u64,
}

/// Told of a directory's entry, its inode and name; says whether to go on.
type Each<'e> = dyn FnMut(u32, &[u8]) -> bool + 'e;

/// Finds names.
pub(super) struct Finder<'a, D> {
    fs: &'a Fs<D>,
    overlay: &'a Overlay,
    tables: &'a Tables,
    maps: Maps<'a, D>,
    /// How many more blocks may be read.
    left: u64,
    names: BTreeMap<u32, Names>,
    /// The names of directories, and the directories they are in, as far as they were asked for.
    parents: BTreeMap<u32, Option<(u32, Vec<u8>)>>,
}

impl<'a, D: ReadAt> Finder<'a, D> {
    /// Looks for names of the inodes in `wanted`, given with their link counts, in `directories`.
    pub fn search(
        fs: &'a Fs<D>,
        overlay: &'a Overlay,
        tables: &'a Tables,
        wanted: &BTreeMap<u32, u64>,
        mut directories: Vec<u32>,
        notes: &mut Notes,
    ) -> Step<Self> {
        let left = MAX_BLOCKS.min(fs.sb.blocks);
        let maps = Maps::new(fs, overlay);
        let expect = |links: u64| Names { expected: links, ..Names::default() };
        let names = wanted.iter().map(|(inode, links)| (*inode, expect(*links))).collect();
        let mut finder = Finder { fs, overlay, tables, maps, left, names, parents: BTreeMap::new() };
        // A file's inode is made in the group of its directory's, where there is room.
        let groups: BTreeSet<u64> = wanted.keys().map(|inode| tables.group_of(*inode)).collect();
        directories
            .sort_unstable_by_key(|directory| (!groups.contains(&tables.group_of(*directory)), *directory));
        let mut missing = finder.names.values().filter(|names| names.expected > 0).count();
        for directory in directories {
            if missing == 0 {
                break;
            }
            let mut names = std::mem::take(&mut finder.names);
            let read = finder.entries(directory, &mut |inode, name| {
                let Some(found) = names.get_mut(&inode).filter(|_| name != b"." && name != b"..") else {
                    return true;
                };
                found.found += 1;
                found.first.get_or_insert_with(|| (directory, name.to_vec()));
                missing -= usize::from(found.found == found.expected);
                missing > 0
            });
            finder.names = names;
            match read {
                Err(Stop::Whole(why)) => notes.add(format!("directory inode {directory}: {why}")),
                read => read?,
            }
            if finder.left == 0 || finder.maps.exhausted() {
                notes.add("its directories are too large to be read to the end: names may be missing".into());
                break;
            }
        }
        finder.left = MAX_BLOCKS.min(fs.sb.blocks);
        Ok(finder)
    }

    /// A path of an inode that was asked for, as bytes, and how many names it has beside that one.
    pub fn path(&mut self, inode: u32) -> Step<Option<(Vec<u8>, u64)>> {
        if inode == ROOT {
            return Ok(Some((b"/".to_vec(), 0)));
        }
        let Some(names) = self.names.get(&inode) else { return Ok(None) };
        let more = names.found.saturating_sub(1);
        let Some((mut directory, name)) = names.first.clone() else { return Ok(None) };
        let mut len = name.len() + 1;
        let mut path = vec![name];
        while directory != ROOT {
            let Some((parent, name)) = self.parent(directory)? else { return Ok(None) };
            len += name.len() + 1;
            if len > MAX_PATH || path.len() > MAX_LEVELS {
                return Ok(None);
            }
            path.push(name);
            directory = parent;
        }
        let parts = path.iter().rev().flat_map(|name| [&b"/"[..], name]);
        Ok(Some((parts.flatten().copied().collect(), more)))
    }

    /// The directory that `directory` is in, and its name there.
    fn parent(&mut self, directory: u32) -> Step<Option<(u32, Vec<u8>)>> {
        if let Some(known) = self.parents.get(&directory) {
            return Ok(known.clone());
        }
        if self.parents.len() >= MAX_PARENTS {
            return Ok(None);
        }
        let found = match self.look_up(directory) {
            Err(Stop::Whole(_)) => None,
            found => found?,
        };
        self.parents.insert(directory, found.clone());
        Ok(found)
    }

    fn look_up(&mut self, directory: u32) -> Step<Option<(u32, Vec<u8>)>> {
        let mut parent = 0;
        self.entries(directory, &mut |inode, name| {
            if name == b".." {
                parent = inode;
            }
            parent == 0
        })?;
        let mut own = None;
        if parent != 0 && parent != directory {
            self.entries(parent, &mut |inode, name| {
                if inode == directory && name != b"." && name != b".." {
                    own = Some((parent, name.to_vec()));
                }
                own.is_none()
            })?;
        }
        Ok(own)
    }

    /// Tells `each` the entries of a directory, hashed or not: the blocks of an index look like free entries.
    fn entries(&mut self, directory: u32, each: &mut Each<'_>) -> Step<()> {
        let raw = self.tables.read(self.fs, self.overlay, directory)?;
        let inode = Inode(&raw);
        if !inode.is_directory() {
            return Ok(());
        }
        if let Some((root, rest)) = inode.inline_data() {
            let (parent, entries) = root.split_at_checked(4).unwrap_or_default();
            let _ = each(le32(parent, 0), b"..") && entries_of(entries, each) && entries_of(rest, each);
            return Ok(());
        }
        let (fs, overlay, left) = (self.fs, self.overlay, &mut self.left);
        self.maps.walk(inode, &mut |run, part| {
            let mut rest = if part == Part::Content { run } else { Extent::at(0, 0) };
            while !rest.is_empty() {
                let count = rest.len().min(READ).min(*left);
                if count == 0 {
                    return Ok(false);
                }
                *left -= count;
                let bytes = fs.read(Some(overlay), rest.start, count)?;
                rest.start += count;
                let mut blocks = bytes.chunks_exact(crate::unit::to_usize(fs.sb.block_size));
                if !blocks.all(|block| entries_of(block, each)) {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }
}

/// The entries in one block of a directory (directory.rst).
fn entries_of(block: &[u8], each: &mut Each<'_>) -> bool {
    let mut at = 0;
    while at + 8 <= block.len() {
        let len = match le16(block, at + 4) {
            0 | 0xffff if block.len() == 65_536 => 65_536,
            len => usize::from(len),
        };
        let name_len = block.get(at + 6).copied().map_or(0, usize::from);
        if len < 8 || !len.is_multiple_of(4) || 8 + name_len > len {
            break;
        }
        let inode = le32(block, at);
        let Some(name) = block.get(at + 8..at + 8 + name_len) else { break };
        if inode != 0 && !name.is_empty() && !each(inode, name) {
            return false;
        }
        at += len;
    }
    true
}
