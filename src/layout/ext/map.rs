//! The used blocks of one ext file system, read lazily: a batch of groups' bitmaps at a time.

use std::collections::BTreeMap;

use super::groups::{Fs, Group, Metadata, Overlay};
use super::superblock::feature;
use super::{Superblock, journal};
use crate::error::{Result, Retry};
use crate::io::{ReadAt, read_vec};
use crate::layout::batch::{Batch, Batches, Doubts};
use crate::layout::used::VolumeMap;
use crate::layout::{Step, Stop, require};
use crate::unit::{Extent, to_usize};

/// Bytes of bitmaps in a batch, about.
const BATCH: u64 = 128 << 10;

/// Which bytes of an ext file system are in use, lazily.
pub(in crate::layout) struct ExtMap<D> {
    fs: Fs<D>,
    /// Groups as their descriptors are on the disk.
    on_disk: Vec<Group>,
    /// Groups whose descriptors the journal changes, as they are after its replay.
    replayed: BTreeMap<usize, Group>,
    meta: Metadata,
    overlay: Overlay,
    dirty: bool,
    batch_groups: u64,
    batches: Batches,
    doubts: Doubts,
}

impl<D: ReadAt> ExtMap<D> {
    /// Opens the file system on `disk`, which begins with it; at most `max_groups` block groups.
    pub fn open(disk: D, max_groups: u64) -> std::result::Result<Self, Stop> {
        let head = read_vec(&disk, 0, to_usize(disk.size().min(4096)))?;
        let sb = Superblock::parse(&head).ok_or_else(|| "its superblock is gone".to_owned())?;
        sb.check(disk.size())?;
        require(sb.groups() <= max_groups, || format!("it has {} block groups", sb.groups()))?;
        let fs = Fs { disk, sb };
        let (on_disk, meta) = fs.groups()?;
        let mut map = ExtMap {
            batch_groups: (BATCH * 8 / fs.sb.group_blocks).clamp(8, 64).next_multiple_of(8),
            fs,
            on_disk,
            replayed: BTreeMap::new(),
            meta,
            overlay: Overlay::new(),
            dirty: false,
            batches: Batches::default(),
            doubts: Doubts::default(),
        };
        if map.fs.sb.compat(feature::HAS_JOURNAL) {
            map.replay()?;
        }
        Ok(map)
    }

    /// Takes the journal into account.
    fn replay(&mut self) -> Step<()> {
        let fs = &self.fs;
        let replay = journal::replay(fs, &fs.matters(&self.meta), usize::MAX)?;
        self.dirty = replay.dirty;
        self.overlay = replay.overlay;
        let own = fs.sb.own_block();
        if self.overlay.contains_key(&own) {
            let block = fs.read(Some(&self.overlay), own, 1)?;
            let after = Superblock::in_block(&block, fs.sb.block_size);
            let after = after.ok_or_else(|| "the journal overwrites the superblock".to_owned())?;
            after.check(fs.disk.size())?;
            require(after.shape() == fs.sb.shape(), || "the journal changes the file system's shape".into())?;
        }
        self.replayed = fs.replayed_groups(&self.overlay, &self.on_disk, &self.meta)?;
        Ok(())
    }

    /// Number of block groups.
    pub fn groups(&self) -> u64 {
        self.on_disk.len() as u64
    }

    /// Group `i` after the replay.
    fn group(&self, i: usize) -> Group {
        self.replayed.get(&i).copied().unwrap_or(self.on_disk[i])
    }

    fn load(&self, number: u64) -> Result<Batch> {
        let first = number * self.batch_groups;
        let numbers = to_usize(first)..to_usize(self.groups().min(first + self.batch_groups));
        let group_bytes = to_usize(self.fs.sb.group_blocks / 8);
        let mut bits = vec![0; to_usize(self.batch_groups) * group_bytes];
        let after = self.bitmaps(Some(&self.overlay), numbers.clone().map(|i| (i, self.group(i))))?;
        // A journal not yet replayed leaves two truths. Blocks used in either are used.
        let stale = numbers.clone().filter(|i| self.dirty && self.differs(*i));
        let before = self.bitmaps(None, stale.map(|i| (i, self.on_disk[i])))?;
        for (i, bits) in numbers.clone().zip(bits.chunks_exact_mut(group_bytes)) {
            self.used_in_group(i, after.get(&i), bits);
            if let Some(Some(stale)) = before.get(&i) {
                bits.iter_mut().zip(stale).for_each(|(bit, stale)| *bit |= stale);
            }
        }
        let (words, _) = bits.as_chunks::<8>();
        let end = self.fs.group_extent(numbers.end as u64 - 1).end;
        let words = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        Ok(Batch::of_words(Extent::new(self.fs.group_extent(first).start, end), words))
    }

    /// Whether the replay changes the group's descriptor or bitmap.
    fn differs(&self, i: usize) -> bool {
        self.replayed.contains_key(&i) || self.overlay.contains_key(&self.on_disk[i].bitmap)
    }

    /// Reads the bitmaps of `groups` that were ever written, neighbouring ones together; `None` for a bitmap
    /// that cannot be read, ever.
    fn bitmaps(
        &self,
        overlay: Option<&Overlay>,
        groups: impl Iterator<Item = (usize, Group)>,
    ) -> Result<BTreeMap<usize, Option<Vec<u8>>>> {
        let mut found = BTreeMap::new();
        let mut runs: Vec<(u64, Vec<usize>)> = Vec::new();
        for (i, group) in groups.filter(|(_, group)| !group.uninit) {
            match runs.last_mut() {
                Some((first, members)) if *first + members.len() as u64 == group.bitmap => members.push(i),
                _ => runs.push((group.bitmap, vec![i])),
            }
        }
        let size = to_usize(self.fs.sb.block_size);
        for (first, members) in runs {
            if let Ok(bytes) = self.fs.read(overlay, first, members.len() as u64) {
                found.extend(
                    members.into_iter().zip(bytes.chunks_exact(size).map(|bits| Some(bits.to_vec()))),
                );
                continue;
            }
            for (block, i) in (first..).zip(members) {
                match self.fs.read(overlay, block, 1) {
                    Ok(bytes) => found.insert(i, Some(bytes)),
                    Err(error) if error.retry() == Retry::Yes => return Err(error),
                    Err(_) => found.insert(i, None),
                };
            }
        }
        Ok(found)
    }

    /// Sets the bits of the used blocks of group `i`, by its bitmap or, when it was never written, by where the
    /// metadata lies. A group that contradicts itself is used from end to end.
    fn used_in_group(&self, i: usize, bitmap: Option<&Option<Vec<u8>>>, bits: &mut [u8]) {
        let group = self.group(i);
        let extent = self.fs.group_extent(i as u64);
        let bytes = bits.len();
        let mut sound = true;
        match bitmap {
            Some(Some(bitmap)) => {
                bits.copy_from_slice(&bitmap[..bytes]);
                sound = self.fs.bitmap_matches(&group, bits)
                    && self.own_metadata(extent).all(|block| is_set(bits, block - extent.start));
            }
            Some(None) => sound = false,
            None => {
                for place in self.own_metadata(extent).map(|block| block - extent.start) {
                    bits[to_usize(place / 8)] |= 1 << (place % 8);
                }
            }
        }
        if !sound || free_in(bits, extent.len()) != u64::from(group.free) {
            bits.fill(0xff);
            self.doubts.add(i as u64, "its bitmap contradicts its descriptor".into());
        }
    }

    /// Every block of metadata, of whichever group, in `extent`.
    fn own_metadata(&self, extent: Extent) -> impl Iterator<Item = u64> + '_ {
        self.meta.all.within(extent).flat_map(|run| run.start..run.end)
    }
}

fn is_set(bits: &[u8], place: u64) -> bool {
    bits[to_usize(place / 8)] & 1 << (place % 8) != 0
}

/// How many of the first `len` bits are clear.
fn free_in(bits: &[u8], len: u64) -> u64 {
    let whole = to_usize(len / 8);
    let used: u64 = bits[..whole].iter().map(|byte| u64::from(byte.count_ones())).sum();
    let rest = (whole as u64 * 8..len).filter(|place| is_set(bits, *place)).count() as u64;
    len - used - rest
}

impl<D: ReadAt> VolumeMap for ExtMap<D> {
    fn used_bytes(&self) -> u64 {
        let sb = &self.fs.sb;
        let counts = (0..self.on_disk.len()).map(|i| u64::from(self.group(i).free));
        sb.blocks.saturating_sub(counts.sum()) * sb.block_size
    }

    fn len(&self) -> u64 {
        self.fs.sb.blocks * self.fs.sb.block_size
    }

    fn next_used(&self, from: u64) -> Result<Option<Extent>> {
        let sb = &self.fs.sb;
        let size = sb.block_size;
        // The boot block before a file system of 1 KiB blocks is in no bitmap.
        let mut block = from / size;
        if block < sb.first_block {
            return Ok(Some(Extent::new(from, sb.first_block * size)));
        }
        while block < sb.blocks {
            let number = (block - sb.first_block) / (sb.group_blocks * self.batch_groups);
            let batch = self.batches.get(number, || self.load(number))?;
            if let Some(run) = batch.next_run(block) {
                return Ok(Some(Extent::new(from.max(run.start * size), run.end * size)));
            }
            block = batch.end();
        }
        Ok(None)
    }

    fn findings(&self) -> Vec<String> {
        self.doubts.findings("block group")
    }
}
