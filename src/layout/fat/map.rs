//! The used clusters of a volume, read lazily: a batch at a time.

use super::Step;
use crate::error::Result;
use crate::io::{ReadAt, read_vec};
use crate::layout::Stop;
use crate::layout::batch::{Batch, Batches, Doubts};
use crate::layout::used::VolumeMap;
use crate::unit::{Extent, to_usize};

/// Clusters in a batch, at most: a multiple of 64. Their entries take 1 MiB of a table.
const BATCH: u64 = 1 << 18;

/// Where the clusters of a volume lie. They count from 0 here, and from 2 in tables and directories.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heap {
    /// Where the first begins, in bytes.
    pub start: u64,
    /// Bytes in a cluster.
    pub cluster: u64,
    /// How many there are.
    pub count: u64,
}

impl Heap {
    /// Where a run of clusters lies, in bytes.
    pub fn bytes(&self, run: Extent) -> Extent {
        Extent::new(self.start + run.start * self.cluster, self.start + run.end * self.cluster)
    }

    /// Reads runs of clusters one after the other, at most `most` bytes.
    pub fn read(&self, disk: &dyn ReadAt, runs: &[Extent], most: u64) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for run in runs {
            let place = self.bytes(*run);
            let len = place.len().min(most - all.len() as u64);
            all.extend(read_vec(disk, place.start, to_usize(len))?);
        }
        Ok(all)
    }
}

/// What tells which clusters are in use.
pub(super) trait Allocation: Send + Sync {
    /// A bit for each of `clusters`, of which the first is a multiple of 64: set when it is used, the first in the
    /// lowest bit of the first word, and clear beyond the last.
    fn used(&self, clusters: Extent) -> Step<Vec<u64>>;
}

/// Which bytes of a volume are in use, lazily: all before its clusters, and those clusters that `A` tells.
pub(super) struct ClusterMap<A> {
    heap: Heap,
    allocation: A,
    /// Clusters in use.
    used: u64,
    batches: Batches,
    doubts: Doubts,
}

impl<A: Allocation> ClusterMap<A> {
    /// Of whose clusters `used` are in use.
    pub fn new(heap: Heap, allocation: A, used: u64) -> Self {
        ClusterMap { heap, allocation, used, batches: Batches::default(), doubts: Doubts::default() }
    }

    /// Reads all of what tells which clusters are in use once, to count them; it stops where that contradicts itself.
    pub fn open(heap: Heap, allocation: A) -> Step<Self> {
        let mut map = ClusterMap::new(heap, allocation, 0);
        for number in 0..heap.count.div_ceil(BATCH) {
            let words = map.allocation.used(map.extent(number))?;
            map.used += words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        Ok(map)
    }

    /// The clusters of batch `number`.
    fn extent(&self, number: u64) -> Extent {
        Extent::at(number * BATCH, BATCH).intersect(Extent::new(0, self.heap.count))
    }

    fn load(&self, number: u64) -> Result<Batch> {
        let extent = self.extent(number);
        match self.allocation.used(extent) {
            Ok(words) => Ok(Batch::of_words(extent, words)),
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::Whole(why)) => {
                self.doubts.add(number, why);
                Ok(Batch::new(extent, true))
            }
        }
    }

    /// Stops unless every cluster of `runs` is in use, which may be in any order; `whose` says what they belong to.
    pub fn require_used(&self, runs: &mut [Extent], whose: &str) -> Step<()> {
        // In order, no batch is read twice.
        runs.sort_unstable();
        for run in runs {
            let mut at = run.start;
            while at < run.end {
                let number = at / BATCH;
                let known = at < self.heap.count;
                let batch = if known { Some(self.batches.get(number, || self.load(number))?) } else { None };
                let used = batch.and_then(|batch| batch.next_run(at)).filter(|used| used.start == at);
                let stuck = || format!("cluster {} of {whose} is not in use", at + 2);
                at = used.ok_or_else(stuck)?.end;
            }
        }
        Ok(())
    }
}

impl<A: Allocation> VolumeMap for ClusterMap<A> {
    fn len(&self) -> u64 {
        self.heap.bytes(Extent::new(0, self.heap.count)).end
    }

    fn used_bytes(&self) -> u64 {
        self.heap.start + self.used * self.heap.cluster
    }

    fn next_used(&self, from: u64) -> Result<Option<Extent>> {
        let Some(place) = from.checked_sub(self.heap.start) else {
            return Ok(Some(Extent::new(from, self.heap.start)));
        };
        let mut cluster = place / self.heap.cluster;
        while cluster < self.heap.count {
            let number = cluster / BATCH;
            let batch = self.batches.get(number, || self.load(number))?;
            if let Some(run) = batch.next_run(cluster) {
                let run = self.heap.bytes(run);
                return Ok(Some(Extent::new(from.max(run.start), run.end)));
            }
            cluster = batch.end();
        }
        Ok(None)
    }

    fn findings(&self) -> Vec<String> {
        self.doubts.findings("batch of clusters")
    }
}
