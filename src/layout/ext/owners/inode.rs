//! Inodes and the blocks that are theirs: extent trees, indirect blocks, attribute blocks, and what is kept in the
//! inode itself (Documentation/filesystems/ext4: inodes.rst, ifork.rst, attributes.rst).

use super::{Fs, Overlay, Part, Step, Stop};
use crate::io::ReadAt;
use crate::layout::field::{bytes, has, le16, le32};
use crate::unit::Extent;

/// Most blocks of pointers and extents that are read for all inodes of a file system together: 4 GiB at 4 KiB each.
const MAX_NODES: u64 = 1 << 20;
/// Deepest extent tree, as in the kernel.
const MAX_DEPTH: u16 = 5;

/// What an inode is called that holds the value of an attribute too long for its file's inode.
pub(super) const EA_VALUE: &str = "extended attribute value";

const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_EA_INODE: u32 = 0x20_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;

/// An inode as it is in its table.
#[derive(Clone, Copy)]
pub(super) struct Inode<'a>(pub &'a [u8]);

impl<'a> Inode<'a> {
    fn mode(self) -> u16 {
        le16(self.0, 0) & 0xf000
    }

    /// How many names it has; 0 when it is not in use.
    pub fn links(self) -> u16 {
        le16(self.0, 0x1a)
    }

    pub fn is_directory(self) -> bool {
        self.mode() == 0x4000
    }

    /// What it is, in the words of stat(1).
    pub fn kind(self) -> &'static str {
        match self.mode() {
            0x8000 if self.has_flag(FLAG_EA_INODE) => EA_VALUE,
            0x8000 => "file",
            0x4000 => "directory",
            0xa000 => "symbolic link",
            _ => "special file",
        }
    }

    fn has_flag(self, flag: u32) -> bool {
        le32(self.0, 0x20) & flag != 0
    }

    /// Where its extended attributes are, if they have a block.
    fn attributes(self) -> u64 {
        u64::from(le16(self.0, 0x76)) << 32 | u64::from(le32(self.0, 0x68))
    }

    /// The root of its block map, or a little content in its place.
    fn root(self) -> &'a [u8] {
        self.0.get(0x28..0x64).unwrap_or_default()
    }

    fn has_map(self) -> bool {
        let size = le32(self.0, 0x4);
        match self.mode() {
            _ if self.has_flag(FLAG_INLINE_DATA) => false,
            0x8000 | 0x4000 => true,
            // The target of a short link takes the map's place.
            0xa000 => !(1..60).contains(&size),
            _ => false,
        }
    }

    /// The two pieces of content kept in the inode itself, if it has such.
    pub fn inline_data(self) -> Option<(&'a [u8], &'a [u8])> {
        self.has_flag(FLAG_INLINE_DATA).then(|| (self.root(), self.inline_rest().unwrap_or_default()))
    }

    /// The value of the attribute `system.data` behind the inode's fields.
    fn inline_rest(self) -> Option<&'a [u8]> {
        let body = self.0.get(128 + usize::from(le16(self.0, 0x80))..)?;
        if !has(body, 0, &0xea02_0000_u32.to_le_bytes()) {
            return None;
        }
        let entries = body.get(4..)?;
        let mut at = 0;
        while at + 16 <= entries.len() && le32(entries, at) != 0 {
            let [len, index] = bytes::<2>(entries, at);
            let (value, size) = (usize::from(le16(entries, at + 2)), le32(entries, at + 8));
            if index == 7 && has(entries, at + 16, b"data") && len == 4 && le32(entries, at + 4) == 0 {
                return entries.get(value..)?.get(..usize::try_from(size).ok()?);
            }
            at += 16 + usize::from(len).next_multiple_of(4);
        }
        None
    }
}

/// Told of a run of blocks and what it is for; says whether to go on.
pub(super) type Each<'e> = dyn FnMut(Extent, Part) -> Step<bool> + 'e;

/// Reads block maps, within one budget for the whole file system.
pub(super) struct Maps<'a, D> {
    fs: &'a Fs<D>,
    overlay: &'a Overlay,
    /// How many more blocks of maps may be read.
    left: u64,
    /// Whether a map is not what it should be; the rest of it is told all the same.
    pub damaged: bool,
}

impl<'a, D: ReadAt> Maps<'a, D> {
    pub fn new(fs: &'a Fs<D>, overlay: &'a Overlay) -> Self {
        Maps { fs, overlay, left: MAX_NODES.min(fs.sb.blocks), damaged: false }
    }

    /// Whether there was more to read than any file system needs.
    pub fn exhausted(&self) -> bool {
        self.left == 0
    }

    /// Tells `each` every run of blocks that is `inode`'s, until it has enough.
    pub fn walk(&mut self, inode: Inode<'_>, each: &mut Each<'_>) -> Step<()> {
        let attributes = inode.attributes();
        if attributes != 0 && self.inside(attributes) && !each(Extent::at(attributes, 1), Part::Attributes)? {
            return Ok(());
        }
        if !inode.has_map() {
            return Ok(());
        }
        if inode.has_flag(FLAG_EXTENTS) {
            self.extents(inode.root(), None, each)?;
            return Ok(());
        }
        let (direct, indirect) = inode.root().split_at_checked(48).unwrap_or_default();
        if !self.run_of_pointers(direct, each)? {
            return Ok(());
        }
        for (levels, pointer) in (1..).zip(indirect.chunks_exact(4)) {
            if !self.pointers(le32(pointer, 0).into(), levels, each)? {
                break;
            }
        }
        Ok(())
    }

    fn inside(&mut self, block: u64) -> bool {
        let inside = block > self.fs.sb.first_block && block < self.fs.sb.blocks;
        self.damaged |= !inside;
        inside
    }

    /// A block of the map, after `each` was told of it; `None` when it was enough, or there is no such block.
    fn node(&mut self, block: u64, each: &mut Each<'_>) -> Step<Option<Vec<u8>>> {
        if self.left == 0 || !each(Extent::at(block, 1), Part::Map)? {
            return Ok(None);
        }
        self.left -= 1;
        match self.fs.read(Some(self.overlay), block, 1).map_err(Into::into) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Stop::Failed(error)) => Err(Stop::Failed(error)),
            Err(Stop::Whole(_)) => {
                self.damaged = true;
                Ok(Some(Vec::new()))
            }
        }
    }

    /// What an extent tree node maps; `depth` is what its parent says, unknown for the root. Recurs at most
    /// [`MAX_DEPTH`] times.
    fn extents(&mut self, node: &[u8], depth: Option<u16>, each: &mut Each<'_>) -> Step<bool> {
        let (entries, own_depth) = (le16(node, 2), le16(node, 6));
        let sound = le16(node, 0) == 0xf30a
            && usize::from(entries) <= node.len().saturating_sub(12) / 12
            && own_depth <= MAX_DEPTH
            && depth.is_none_or(|depth| depth == own_depth);
        if !sound {
            self.damaged = true;
            return Ok(true);
        }
        for entry in node.chunks_exact(12).skip(1).take(entries.into()) {
            let go_on = if own_depth == 0 {
                let block = u64::from(le16(entry, 6)) << 32 | u64::from(le32(entry, 8));
                // Longer ones are allocated but not yet written: they belong to the file too.
                let len = le16(entry, 4);
                let len = u64::from(if len > 32768 { len - 32768 } else { len });
                let inside = len > 0 && self.inside(block) && self.inside(block + len - 1);
                !inside || each(Extent::at(block, len), Part::Content)?
            } else {
                let child = u64::from(le16(entry, 8)) << 32 | u64::from(le32(entry, 4));
                if !self.inside(child) {
                    continue;
                }
                match self.node(child, each)? {
                    Some(node) => self.extents(&node, Some(own_depth - 1), each)?,
                    None => false,
                }
            };
            if !go_on {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What a pointer of an old-style block map leads to through `levels` blocks of pointers, 1 to 3.
    fn pointers(&mut self, pointer: u64, levels: u32, each: &mut Each<'_>) -> Step<bool> {
        if pointer == 0 || !self.inside(pointer) {
            return Ok(true);
        }
        let Some(node) = self.node(pointer, each)? else { return Ok(false) };
        if levels == 1 {
            return self.run_of_pointers(&node, each);
        }
        for pointer in node.chunks_exact(4) {
            if !self.pointers(le32(pointer, 0).into(), levels - 1, each)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The blocks that `pointers` name, neighbours together.
    fn run_of_pointers(&mut self, pointers: &[u8], each: &mut Each<'_>) -> Step<bool> {
        let mut run = Extent::at(0, 0);
        for pointer in pointers.chunks_exact(4) {
            let block = u64::from(le32(pointer, 0));
            if block == 0 || !self.inside(block) {
                continue;
            }
            if block == run.end {
                run.end += 1;
                continue;
            }
            if !run.is_empty() && !each(run, Part::Content)? {
                return Ok(false);
            }
            run = Extent::at(block, 1);
        }
        Ok(run.is_empty() || each(run, Part::Content)?)
    }
}
