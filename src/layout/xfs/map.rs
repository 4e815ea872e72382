//! The used blocks of one XFS file system, read lazily: a part of an allocation group at a time.

use std::sync::atomic::{AtomicBool, Ordering};

use super::free::Fs;
use super::replayed::Replayed;
use super::superblock::MAX_SECTOR;
use super::{Step, Superblock, require};
use crate::error::Result;
use crate::io::{ReadAt, read_vec};
use crate::layout::Stop;
use crate::layout::batch::{Batch, Batches, Doubts};
use crate::layout::used::VolumeMap;
use crate::unit::{Extent, to_usize};

/// Blocks in a batch, at most: their bits take 512 KiB.
const BATCH: u64 = 1 << 22;

/// Which bytes of an XFS file system are in use, lazily: all but what the free-space B+trees list after its log's replay. The
/// blocks that an allocation group keeps for these trees themselves (its AGFL) are in none of them, and so are used.
pub(in crate::layout) struct XfsMap<D> {
    fs: Fs<Replayed<D>>,
    /// Bytes in use.
    used: u64,
    /// Groups whose whole tree was found sound.
    sound: Vec<AtomicBool>,
    batches: Batches,
    doubts: Doubts,
}

impl<D: ReadAt> XfsMap<D> {
    /// Opens the file system on `disk`, which begins with it; at most `max_groups` allocation groups.
    pub fn open(disk: D, max_groups: u64) -> std::result::Result<Self, Stop> {
        let head = read_vec(&disk, 0, to_usize(disk.size().min(MAX_SECTOR)))?;
        let sb = Superblock::parse(&head).ok_or_else(|| "its superblock is gone".to_owned())?;
        sb.check(disk.size())?;
        require(sb.ag_count <= max_groups, || format!("it has {} allocation groups", sb.ag_count))?;
        let (disk, sb) = Replayed::open(disk, &sb)?;
        let fs = Fs { disk: disk.for_free_space(), sb };
        Ok(XfsMap {
            sound: (0..fs.sb.ag_count).map(|_| AtomicBool::new(false)).collect(),
            used: fs.used_blocks()? * fs.sb.block_size,
            fs,
            batches: Batches::default(),
            doubts: Doubts::default(),
        })
    }

    /// Number of allocation groups.
    pub fn groups(&self) -> u64 {
        self.fs.sb.ag_count
    }

    /// Batches of a group.
    fn per_group(&self) -> u64 {
        self.fs.sb.ag_blocks.div_ceil(BATCH)
    }

    /// The number of the batch with `block`.
    fn batch_of(&self, block: u64) -> u64 {
        let (group, place) = (block / self.fs.sb.ag_blocks, block % self.fs.sb.ag_blocks);
        group * self.per_group() + place / BATCH
    }

    fn load(&self, number: u64) -> Result<Batch> {
        let group = number / self.per_group();
        let extent = self.fs.sb.ag(group);
        let first = number % self.per_group() * BATCH;
        let within = Extent::at(first, BATCH).intersect(Extent::new(0, extent.len()));
        let mut batch = Batch::new(within.shifted(extent.start), true);
        match self.free(group, within, |run| batch.set(run.shifted(extent.start), false)) {
            Ok(()) => {
                // What a replay changes is there for it, whatever becomes of it.
                let size = self.fs.sb.block_size;
                let own = Extent::new(within.start + extent.start, within.end + extent.start);
                for run in self.fs.disk.touched().within(Extent::new(own.start * size, own.end * size)) {
                    batch.set(Extent::new(run.start / size, run.end.div_ceil(size)), true);
                }
                Ok(batch)
            }
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::Whole(why)) => {
                self.doubts.add(group, why);
                Ok(Batch::new(within.shifted(extent.start), true))
            }
        }
    }

    /// Gives `visit` at least the free runs of group `group` inside `within`; the first time only after its whole
    /// tree was found sound.
    fn free(&self, group: u64, within: Extent, visit: impl FnMut(Extent)) -> Step<()> {
        let agf = self.fs.agf(group)?;
        let sound = self.sound.get(to_usize(group));
        if sound.is_some_and(|sound| sound.load(Ordering::Relaxed)) {
            return self.fs.free_within(&agf, within, visit);
        }
        self.fs.all_free(&agf, visit)?;
        sound.into_iter().for_each(|sound| sound.store(true, Ordering::Relaxed));
        Ok(())
    }
}

impl<D: ReadAt> VolumeMap for XfsMap<D> {
    fn len(&self) -> u64 {
        self.fs.sb.blocks * self.fs.sb.block_size
    }

    fn used_bytes(&self) -> u64 {
        self.used
    }

    fn next_used(&self, from: u64) -> Result<Option<Extent>> {
        let size = self.fs.sb.block_size;
        let mut block = from / size;
        while block < self.fs.sb.blocks {
            let number = self.batch_of(block);
            let batch = self.batches.get(number, || self.load(number))?;
            if let Some(run) = batch.next_run(block) {
                return Ok(Some(Extent::new(from.max(run.start * size), run.end * size)));
            }
            block = batch.end();
        }
        Ok(None)
    }

    fn findings(&self) -> Vec<String> {
        self.doubts.findings("allocation group")
    }
}
