//! Chunks: where on the device the addresses of the file system lie.

use super::superblock::Superblock;
use super::tree::{Key, kind};
use super::{Step, require};
use crate::layout::field::{bytes, le16, le64};
use crate::unit::{Extent, to_usize};

/// Most sectors of a chunk: their bits take 512 KiB. Linux makes none above 10 GiB.
const MAX_SECTORS: u64 = 1 << 22;
/// The object all chunks belong to.
const FIRST_CHUNK_TREE: u64 = 256;
/// The unit in which a chunk is spread over devices.
const STRIPE: u64 = 64 << 10;
/// Bytes of a chunk item before its stripes, and of each stripe.
const HEADER: usize = 48;
const STRIPE_ITEM: usize = 32;

/// What a chunk is for, and how often it is there.
pub(super) mod group {
    pub const DATA: u64 = 0x1;
    pub const SYSTEM: u64 = 0x2;
    pub const METADATA: u64 = 0x4;
    pub const DUP: u64 = 0x20;
}

/// A run of addresses, and where it lies on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Its addresses.
    pub logical: Extent,
    /// What it is for: the bits of [`group`].
    pub kind: u64,
    /// The first byte of each copy on the device; the second counts only when it is kept twice.
    places: [u64; 2],
}

impl Chunk {
    /// Reads the item of the chunk at address `start`, of a file system on the device of `sb` only.
    pub fn parse(sb: &Superblock, key: Key, item: &[u8]) -> Step<Chunk> {
        let start = key.offset;
        let lies = |holds: bool, field: &str, value: u64| {
            require(holds, || format!("chunk {start}'s {field} is {value:#x}"))
        };
        lies(key.id == FIRST_CHUNK_TREE && key.kind == kind::CHUNK, "object", key.id)?;
        let kind = le64(item, 24);
        let content = kind & !group::DUP;
        let known = [group::DATA, group::METADATA, group::SYSTEM, group::DATA | group::METADATA];
        lies(known.contains(&content), "type", kind)?;
        let copies = if kind & group::DUP != 0 { 2 } else { 1 };
        lies(le16(item, 44) == copies, "number of stripes", le16(item, 44).into())?;
        let len = HEADER + usize::from(copies) * STRIPE_ITEM;
        lies(item.len() == len, "item's length", item.len() as u64)?;
        let length = le64(item, 0);
        let whole = |value: u64| value.is_multiple_of(sb.sector_size);
        lies(whole(start) && start.checked_add(length).is_some(), "address", start)?;
        let sound = length > 0 && whole(length) && length / sb.sector_size <= MAX_SECTORS;
        lies(sound, "length", length)?;
        lies(le64(item, 16) == STRIPE, "stripe length", le64(item, 16))?;
        let device = sb.device();
        let mut places = [0; 2];
        for (i, place) in places.iter_mut().enumerate().take(copies.into()) {
            let at = HEADER + i * STRIPE_ITEM;
            let own =
                le64(item, at) == le64(&device, 0) && bytes::<16>(item, at + 16) == bytes::<16>(&device, 66);
            require(own, || format!("chunk {start} lies on another device"))?;
            *place = le64(item, at + 8);
            let inside = place.checked_add(length).is_some_and(|end| end <= sb.device_size);
            lies(whole(*place) && inside, "place", *place)?;
        }
        Ok(Chunk { logical: Extent::at(start, length), kind, places })
    }

    /// Where its copies lie on the device.
    pub fn copies(&self) -> impl Iterator<Item = Extent> + '_ {
        let count = if self.kind & group::DUP != 0 { 2 } else { 1 };
        self.places.iter().take(count).map(|place| Extent::at(*place, self.logical.len()))
    }
}

/// Chunks in the order of their addresses, without overlaps.
#[derive(Default)]
pub(super) struct Chunks(Vec<Chunk>);

impl Chunks {
    /// Reads the array of system chunks in the superblock.
    pub fn of_system(sb: &Superblock) -> Step<Chunks> {
        let mut chunks = Chunks::default();
        let mut rest = sb.system_chunks();
        while !rest.is_empty() {
            let len = HEADER + usize::from(le16(rest, Key::LEN + 44)) * STRIPE_ITEM;
            let item = rest.get(Key::LEN..Key::LEN + len);
            let item = item.ok_or_else(|| "the superblock's system chunks are cut off".to_owned())?;
            chunks.push(Chunk::parse(sb, Key::read(rest, 0), item)?)?;
            rest = rest.get(Key::LEN + len..).unwrap_or_default();
        }
        Ok(chunks)
    }

    /// Adds a chunk behind the others.
    pub fn push(&mut self, chunk: Chunk) -> Step<()> {
        let behind = self.0.last().is_none_or(|last| last.logical.end <= chunk.logical.start);
        require(behind, || format!("chunk {} overlaps another", chunk.logical.start))?;
        self.0.push(chunk);
        Ok(())
    }

    /// The chunks, in order.
    pub fn list(&self) -> &[Chunk] {
        &self.0
    }

    /// The chunk that holds all of `run`.
    pub fn holding(&self, run: Extent) -> Option<&Chunk> {
        let next = self.0.partition_point(|chunk| chunk.logical.end <= run.start);
        self.0.get(next).filter(|chunk| chunk.logical.contains(run))
    }

    /// Every copy of every chunk in the order of the device, with the number of its chunk.
    pub fn stripes(&self) -> Step<Vec<(Extent, u32)>> {
        let numbered = self.0.iter().zip(0..);
        let mut stripes: Vec<(Extent, u32)> =
            numbered.flat_map(|(chunk, number)| chunk.copies().map(move |copy| (copy, number))).collect();
        stripes.sort_unstable();
        let overlap = stripes.windows(2).find(|pair| matches!(pair, [a, b] if b.0.start < a.0.end));
        let number = |pair: &[(Extent, u32)]| pair.first().map_or(0, |stripe| to_usize(stripe.1.into()));
        match overlap.and_then(|pair| self.0.get(number(pair))) {
            Some(chunk) => {
                Err(format!("chunk {} overlaps another on the device", chunk.logical.start).into())
            }
            None => Ok(stripes),
        }
    }
}
