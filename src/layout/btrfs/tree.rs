//! Trees: blocks with checksums, of which each pointer says what generation, level and first key its block has.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::chunk::{Chunks, group};
use super::superblock::Superblock;
use super::{Step, require};
use crate::error::Retry;
use crate::io::{ReadAt, read_vec};
use crate::layout::Stop;
use crate::layout::field::{bytes, le32, le64};
use crate::unit::{Extent, to_usize};

/// Highest level of a root.
const MAX_LEVEL: u8 = 7;
/// Bytes of a block's header, of a pointer, and of what a leaf says of each item.
const HEADER: usize = 101;
const POINTER: usize = 33;
const ITEM: usize = 25;
/// Tree blocks kept: a path to a leaf and a few more, 2 MiB at most.
const KEPT: usize = 32;

/// Trees by the number that their blocks carry, which is that of their root item too.
pub(super) mod owner {
    pub const ROOT: u64 = 1;
    pub const EXTENT: u64 = 2;
    pub const CHUNK: u64 = 3;
    pub const BLOCK_GROUP: u64 = 11;
    pub const LOG: u64 = 6_u64.wrapping_neg();
    pub const CHECKSUM: u64 = 7;
    /// The subvolume all others are in.
    pub const TOP: u64 = 5;

    /// Whether tree `id` is a subvolume's: above 2^48 are quota groups, and further up the trees of the system.
    pub const fn is_subvolume(id: u64) -> bool {
        id == TOP || (id >= 256 && id < 1 << 48)
    }

    /// Whether a block of tree `block` may be in tree `tree`: a snapshot shares blocks with what it is of, which may be
    /// gone.
    pub const fn fits(block: u64, tree: u64) -> bool {
        block == tree || (is_subvolume(block) && is_subvolume(tree))
    }
}

/// Kinds of items.
pub(super) mod kind {
    pub const INODE: u8 = 1;
    pub const NAME: u8 = 84;
    pub const NAME_BY_INDEX: u8 = 96;
    pub const EXTENT_DATA: u8 = 108;
    pub const SUMS: u8 = 128;
    pub const ROOT: u8 = 132;
    pub const ROOT_REF: u8 = 156;
    pub const EXTENT: u8 = 168;
    pub const METADATA: u8 = 169;
    pub const OWNER_REF: u8 = 172;
    pub const TREE_BLOCK_REF: u8 = 176;
    pub const EXTENT_DATA_REF: u8 = 178;
    pub const SHARED_BLOCK_REF: u8 = 182;
    pub const SHARED_DATA_REF: u8 = 184;
    pub const BLOCK_GROUP: u8 = 192;
    pub const DEVICE: u8 = 216;
    pub const CHUNK: u8 = 228;
}

/// The key of an item, in the order of the trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// The object; an address in the extent tree.
    pub id: u64,
    /// The kind of item.
    pub kind: u8,
    /// What it means depends on the kind.
    pub offset: u64,
}

impl Key {
    /// Its length on the disk.
    pub const LEN: usize = 17;
    /// Not below any key.
    pub const MAX: Key = Key { id: u64::MAX, kind: u8::MAX, offset: u64::MAX };

    /// The key at `at`.
    pub fn read(structure: &[u8], at: usize) -> Key {
        let [kind] = bytes(structure, at + 8);
        Key { id: le64(structure, at), kind, offset: le64(structure, at + 9) }
    }

    /// The smallest key of object `id`.
    pub const fn first_of(id: u64) -> Key {
        Key { id, kind: 0, offset: 0 }
    }

    /// All keys of `kind` of object `id`.
    pub const fn all(id: u64, kind: u8) -> Range<Key> {
        Key { id, kind, offset: 0 }..Key { id, kind: kind.saturating_add(1), offset: 0 }
    }
}

/// A pointer to a tree block, and what the block must say of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pointer {
    pub address: u64,
    pub generation: u64,
    pub level: u8,
    pub owner: u64,
}

impl Pointer {
    /// The root that a root item names, of a tree whose blocks carry `owner`.
    pub fn of_root_item(item: &[u8], owner: u64) -> Step<Pointer> {
        require(item.len() >= 239, || format!("the root item of tree {owner} is cut off"))?;
        let [level] = bytes(item, 238);
        Ok(Pointer { address: le64(item, 176), generation: le64(item, 160), level, owner })
    }
}

/// A file system whose superblock was checked, the disk it is on, and its chunks.
pub(super) struct Fs<D> {
    pub disk: D,
    pub sb: Superblock,
    pub chunks: Chunks,
    kept: Mutex<VecDeque<(Place, Arc<Block>)>>,
}

/// A tree block, as its parent speaks of it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    at: Pointer,
    /// Its first key; `None` for a root.
    first: Option<Key>,
    /// All its keys are below this one.
    end: Key,
}

impl Place {
    const fn of_root(at: Pointer) -> Self {
        Place { at, first: None, end: Key::MAX }
    }
}

/// A tree block that was checked: its keys are in order, and its items lie in it.
struct Block {
    raw: Vec<u8>,
    /// Number of its entries.
    count: usize,
    place: Place,
}

impl Block {
    fn entry(&self, i: usize) -> usize {
        HEADER + i * if self.place.at.level == 0 { ITEM } else { POINTER }
    }

    fn key(&self, i: usize) -> Key {
        Key::read(&self.raw, self.entry(i))
    }

    /// Number of keys that are not above `key`.
    fn not_above(&self, key: Key) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            if self.key(middle) <= key { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// Where item `i` of a leaf begins behind the header, and its length.
    fn bounds(&self, i: usize) -> (usize, usize) {
        let at = self.entry(i) + Key::LEN;
        (to_usize(le32(&self.raw, at).into()), to_usize(le32(&self.raw, at + 4).into()))
    }

    /// Item `i` of a leaf.
    fn item(&self, i: usize) -> &[u8] {
        let (start, len) = self.bounds(i);
        self.raw.get(HEADER + start..HEADER + start + len).unwrap_or_default()
    }

    /// The block that pointer `i` leads to.
    fn child(&self, i: usize) -> Place {
        let (entry, at) = (self.entry(i) + Key::LEN, self.place.at);
        let (address, generation) = (le64(&self.raw, entry), le64(&self.raw, entry + 8));
        let pointer = Pointer { address, generation, level: at.level.saturating_sub(1), owner: at.owner };
        let end = if i + 1 < self.count { self.key(i + 1) } else { self.place.end };
        Place { at: pointer, first: Some(self.key(i)), end }
    }
}

/// A leaf of a tree.
pub(super) struct Leaf(Arc<Block>);

impl Leaf {
    /// Not above any key of the leaves behind it; [`Key::MAX`] when there is none.
    pub fn end(&self) -> Key {
        self.0.place.end
    }

    /// Its items in `range`, in order.
    pub fn items(&self, range: Range<Key>) -> impl Iterator<Item = (Key, &[u8])> {
        let items = (0..self.0.count).map(|i| (self.0.key(i), self.0.item(i)));
        items.skip_while(move |(key, _)| *key < range.start).take_while(move |(key, _)| *key < range.end)
    }

    /// Its last item whose key is not above `key` and of the same object and kind, and the offset of the next one, here
    /// or in the leaves behind it: `u64::MAX` when there is none.
    pub fn floor(&self, key: Key) -> (Option<(Key, &[u8])>, u64) {
        let own = |other: &Key| (other.id, other.kind) == (key.id, key.kind);
        let next = self.0.not_above(key);
        let found = next.checked_sub(1).map(|i| (self.0.key(i), self.0.item(i)));
        let next = if next < self.0.count { self.0.key(next) } else { self.end() };
        (found.filter(|(found, _)| own(found)), if own(&next) { next.offset } else { u64::MAX })
    }
}

/// What a walk through a tree comes across.
pub(super) enum Seen<'a> {
    /// A tree block, by its address.
    Block(u64),
    /// An item of a leaf.
    Item(Key, &'a [u8]),
}

impl<D: ReadAt> Fs<D> {
    /// A file system with the chunks known so far.
    pub fn new(disk: D, sb: Superblock, chunks: Chunks) -> Self {
        Fs { disk, sb, chunks, kept: Mutex::default() }
    }

    /// The root of tree `id`, by its item in the tree of roots.
    pub fn root_of(&self, id: u64) -> Step<Pointer> {
        let mut found = None;
        self.items(self.sb.root(), Key::all(id, kind::ROOT), &mut |key, item| {
            require(key.offset == 0 && found.is_none(), || format!("tree {id} has more than one root"))?;
            found = Some(Pointer::of_root_item(item, id)?);
            Ok(())
        })?;
        found.ok_or_else(|| format!("tree {id} has no root").into())
    }

    /// Gives `visit` every item in `range`, in order.
    pub fn items(
        &self,
        root: Pointer,
        range: Range<Key>,
        visit: &mut dyn FnMut(Key, &[u8]) -> Step<()>,
    ) -> Step<()> {
        self.walk(root, range, &mut |seen| match seen {
            Seen::Block(_) => Ok(()),
            Seen::Item(key, item) => visit(key, item),
        })
    }

    /// Gives `visit` every block on the way to items in `range`, and these items, in order.
    pub fn walk(
        &self,
        root: Pointer,
        range: Range<Key>,
        visit: &mut dyn FnMut(Seen<'_>) -> Step<()>,
    ) -> Step<()> {
        self.node(Place::of_root(root), &range, visit)
    }

    /// The leaf in which `key` is, if it is in the tree; it has the last key that is not above it.
    pub fn leaf(&self, root: Pointer, key: Key) -> Step<Leaf> {
        let mut place = Place::of_root(root);
        loop {
            let block = self.block(place)?;
            if place.at.level == 0 {
                return Ok(Leaf(block));
            }
            place = block.child(block.not_above(key).saturating_sub(1));
        }
    }

    fn node(
        &self,
        place: Place,
        range: &Range<Key>,
        visit: &mut dyn FnMut(Seen<'_>) -> Step<()>,
    ) -> Step<()> {
        let block = self.block(place)?;
        visit(Seen::Block(place.at.address))?;
        for i in 0..block.count {
            if place.at.level == 0 {
                if range.contains(&block.key(i)) {
                    visit(Seen::Item(block.key(i), block.item(i)))?;
                }
                continue;
            }
            let child = block.child(i);
            if block.key(i) < range.end && range.start < child.end {
                self.node(child, range, visit)?;
            }
        }
        Ok(())
    }

    /// The tree block at `place`, checked.
    fn block(&self, place: Place) -> Step<Arc<Block>> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut blocks = kept();
        if let Some(number) = blocks.iter().position(|(kept, _)| *kept == place)
            && let Some(found) = blocks.remove(number)
        {
            let block = Arc::clone(&found.1);
            blocks.push_front(found);
            return Ok(block);
        }
        drop(blocks);
        let block = Arc::new(self.sound(place)?);
        let mut blocks = kept();
        blocks.truncate(KEPT - 1);
        blocks.push_front((place, Arc::clone(&block)));
        Ok(block)
    }

    /// Reads a tree block and checks that its keys and items are in order.
    fn sound(&self, place: Place) -> Step<Block> {
        let at = place.at;
        let raw = self.read(at)?;
        let wrong = |what: &str| format!("tree block {} {what}", at.address);
        let count = to_usize(le32(&raw, 96).into());
        let most = (raw.len() - HEADER) / if at.level == 0 { ITEM } else { POINTER };
        // Only a tree without items has an empty block: its root.
        let least = usize::from(at.level > 0 || place.first.is_some());
        require((least..=most).contains(&count), || wrong(&format!("has {count} entries")))?;
        let mut data_end = raw.len() - HEADER;
        let block = Block { raw, count, place };
        let begins = place.first.is_none_or(|first| first == block.key(0));
        require(begins, || wrong("does not begin with its key"))?;
        let ordered = (1..count).all(|i| block.key(i - 1) < block.key(i))
            && (count == 0 || block.key(count - 1) < place.end);
        require(ordered, || wrong("has keys out of order"))?;
        for i in (0..count).filter(|_| at.level == 0) {
            let (start, len) = block.bounds(i);
            let sound = start.checked_add(len) == Some(data_end) && start >= count * ITEM;
            require(sound, || wrong("has items out of order"))?;
            data_end = start;
        }
        Ok(block)
    }

    fn read(&self, at: Pointer) -> Step<Vec<u8>> {
        let wrong = |what: &str| format!("tree block {} {what}", at.address);
        require(at.level <= MAX_LEVEL, || wrong(&format!("is of level {}", at.level)))?;
        let run = Extent::at(at.address, self.sb.node_size);
        let chunk =
            self.chunks.holding(run).filter(|chunk| chunk.kind & (group::METADATA | group::SYSTEM) != 0);
        let chunk = chunk.ok_or_else(|| wrong("lies outside all chunks for metadata"))?;
        let mut why = String::new();
        for copy in chunk.copies() {
            let place = copy.start + (at.address - chunk.logical.start);
            match read_vec(&self.disk, place, to_usize(self.sb.node_size)) {
                Ok(raw) => match self.check(&raw, at) {
                    Ok(()) => return Ok(raw),
                    Err(what) => why = wrong(what),
                },
                Err(error) if error.retry() == Retry::Yes => return Err(Stop::Failed(error)),
                Err(error) => why = wrong(&format!("cannot be read: {}", error.why())),
            }
        }
        Err(Stop::Whole(why))
    }

    /// Whether a block is the one that `at` points to; if not, why.
    fn check(&self, raw: &[u8], at: Pointer) -> Result<(), &'static str> {
        let [level] = bytes(raw, 100);
        let checks = [
            (self.sb.intact(raw), "has a checksum that does not match"),
            (bytes::<16>(raw, 32) == self.sb.tree_uuid(), "belongs to another file system"),
            (le64(raw, 48) == at.address, "belongs elsewhere"),
            (le64(raw, 80) == at.generation, "is of another generation than its pointer says"),
            (owner::fits(le64(raw, 88), at.owner), "belongs to another tree"),
            (level == at.level, "is of another level than its pointer says"),
        ];
        checks.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, what)| Err(*what))
    }
}
