//! The used blocks of one btrfs file system, read lazily: a chunk at a time.

use super::chunk::{Chunk, group};
use super::tree::{Fs, Key, Pointer, kind, owner};
use super::{Step, log, require};
use crate::error::Result;
use crate::io::ReadAt;
use crate::layout::Stop;
use crate::layout::batch::{Batch, Batches, Doubts};
use crate::layout::field::le64;
use crate::layout::used::VolumeMap;
use crate::unit::{Extent, ExtentMap, Extents, to_usize};

/// Bytes from the start of the device that are never given out: boot loaders live there.
const BOOT: Extent = Extent::new(0, 1 << 20);
/// What an extent item says it is: data, or a tree block.
const DATA: u64 = 0x1;
const TREE_BLOCK: u64 = 0x2;

/// Which bytes of a btrfs file system are in use, lazily: what the extent tree lists, in every copy, what the log trees
/// take and refer to, the superblocks, and the first MiB.
pub(in crate::layout) struct BtrfsMap<D> {
    fs: Fs<D>,
    extents: Pointer,
    /// The tree of the block group items, the extent tree on most file systems.
    groups: Pointer,
    /// Copies of chunks in the order of the device, with the number of their chunk.
    stripes: Vec<(Extent, u32)>,
    logged: ExtentMap,
    reserved: ExtentMap,
    used_bytes: u64,
    batches: Batches,
    doubts: Doubts,
}

impl<D: ReadAt> BtrfsMap<D> {
    /// Opens the file system on `disk`, which is its only device; at most `max_chunks` chunks.
    pub fn open(disk: D, max_chunks: u64) -> std::result::Result<Self, Stop> {
        let fs = Fs::open(disk, max_chunks)?;
        let extents = fs.root_of(owner::EXTENT)?;
        let groups = if fs.sb.has_group_tree() { fs.root_of(owner::BLOCK_GROUP)? } else { extents };
        let mut map = BtrfsMap {
            stripes: fs.chunks.stripes()?,
            logged: log::logged(&fs)?,
            reserved: fs.sb.places().chain([BOOT]).collect(),
            used_bytes: fs.sb.used,
            fs,
            extents,
            groups,
            batches: Batches::default(),
            doubts: Doubts::default(),
        };
        for root in [map.fs.sb.root(), map.fs.sb.chunk_root(), extents, groups] {
            map.require_listed(root.address)?;
        }
        map.used_bytes += map.reserved.bytes() + map.logged.bytes();
        for chunk in map.fs.chunks.list().iter().filter(|chunk| chunk.kind & group::DUP != 0) {
            map.used_bytes = map.used_bytes.saturating_add(map.used_in_group(chunk)?);
        }
        map.used_bytes = map.used_bytes.min(map.fs.sb.device_size);
        Ok(map)
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.fs.chunks.list().len() as u64
    }

    /// Stops unless the extent tree lists the tree block at `address`.
    fn require_listed(&self, address: u64) -> Step<()> {
        let mut listed = false;
        let range = Key { id: address, kind: kind::EXTENT, offset: 0 }..Key::all(address, kind::METADATA).end;
        self.fs.items(self.extents, range, &mut |_, _| {
            listed = true;
            Ok(())
        })?;
        require(listed, || format!("tree block {address} is not in the extent tree"))
    }

    /// The used bytes of a chunk's block group, by its item.
    fn used_in_group(&self, chunk: &Chunk) -> Step<u64> {
        let (start, len) = (chunk.logical.start, chunk.logical.len());
        let mut used = None;
        self.fs.items(self.groups, Key::all(start, kind::BLOCK_GROUP), &mut |key, item| {
            let sound = key.offset == len && item.len() == 24 && le64(item, 16) == chunk.kind;
            require(sound, || format!("block group {start} contradicts its chunk"))?;
            used = Some(le64(item, 0));
            Ok(())
        })?;
        used.ok_or_else(|| format!("chunk {start} has no block group").into())
    }

    /// Gives `visit` every run that the extent tree lists in a chunk, in order.
    fn listed(&self, chunk: &Chunk, visit: &mut dyn FnMut(Extent)) -> Step<()> {
        let range = Key::first_of(chunk.logical.start)..Key::first_of(chunk.logical.end);
        let (mut end, mut total) = (chunk.logical.start, 0);
        self.fs.items(self.extents, range, &mut |key, item| {
            let wrong = |what: &str| format!("the extent tree's item at {} {what}", key.id);
            let node = self.fs.sb.node_size;
            let (len, is_data) = match key.kind {
                kind::METADATA => (node, false),
                kind::EXTENT => (key.offset, le64(item, 16) & DATA != 0),
                kind::OWNER_REF
                | kind::TREE_BLOCK_REF
                | kind::EXTENT_DATA_REF
                | kind::SHARED_BLOCK_REF
                | kind::SHARED_DATA_REF
                | kind::BLOCK_GROUP => return Ok(()),
                other => return Err(wrong(&format!("is of kind {other}")).into()),
            };
            let form = le64(item, 16) & (DATA | TREE_BLOCK);
            require(item.len() >= 24 && form == if is_data { DATA } else { TREE_BLOCK }, || {
                wrong("is neither of data nor of a tree block")
            })?;
            let fits = if is_data { group::DATA } else { group::METADATA | group::SYSTEM };
            require(chunk.kind & fits != 0 && (is_data || len == node), || wrong("is not for its chunk"))?;
            let run = Extent::at(key.id, len);
            let whole = [run.start, run.end].iter().all(|at| at.is_multiple_of(self.fs.sb.sector_size));
            let sound = whole && !run.is_empty() && end <= run.start && chunk.logical.contains(run);
            require(sound, || wrong(&format!("takes {run:?}")))?;
            end = run.end;
            total += run.len();
            visit(run);
            Ok(())
        })?;
        let used = self.used_in_group(chunk)?;
        require(used == total, || format!("the extent tree lists {total} bytes, the block group {used}"))
    }

    /// Which sectors of chunk `number` are used, counted from its start.
    fn load(&self, number: u32) -> Result<Batch> {
        let size = self.fs.sb.sector_size;
        let Some(chunk) = self.fs.chunks.list().get(to_usize(number.into())) else {
            return Ok(Batch::new(Extent::new(0, 0), true));
        };
        let sectors = Extent::new(0, chunk.logical.len() / size);
        let mut batch = Batch::new(sectors, false);
        let mut set = |run: Extent| {
            let first = (run.start - chunk.logical.start) / size;
            batch.set(Extent::new(first, (run.end - chunk.logical.start).div_ceil(size)), true);
        };
        match self.listed(chunk, &mut set) {
            Ok(()) => {
                self.logged.within(chunk.logical).for_each(set);
                Ok(batch)
            }
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::Whole(why)) => {
                self.doubts.add(chunk.logical.start, why);
                Ok(Batch::new(sectors, true))
            }
        }
    }

    /// The first run of used bytes at or after `from` in any copy of a chunk.
    fn next_in_chunks(&self, from: u64) -> Result<Option<Extent>> {
        let size = self.fs.sb.sector_size;
        let next = self.stripes.partition_point(|(copy, _)| copy.end <= from);
        for (copy, number) in self.stripes.iter().skip(next) {
            let batch = self.batches.get((*number).into(), || self.load(*number))?;
            let at = from.saturating_sub(copy.start) / size;
            if let Some(run) = batch.next_run(at) {
                let run = Extent::new(run.start * size, run.end * size).shifted(copy.start);
                return Ok(Some(Extent::new(run.start.max(from), run.end)));
            }
        }
        Ok(None)
    }
}

impl<D: ReadAt> VolumeMap for BtrfsMap<D> {
    fn len(&self) -> u64 {
        self.fs.sb.device_size
    }

    fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    fn next_used(&self, from: u64) -> Result<Option<Extent>> {
        let reserved = self.reserved.next_extent(from)?;
        Ok(match (reserved, self.next_in_chunks(from)?) {
            (Some(reserved), Some(run)) if reserved.start <= run.start => Some(reserved),
            (reserved, run) => run.or(reserved),
        })
    }

    fn findings(&self) -> Vec<String> {
        self.doubts.findings("chunk")
    }
}
