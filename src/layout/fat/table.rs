//! A file allocation table: an entry for each cluster, which names the next one of its file, says that it is the last,
//! bad, or, as zero, free.

use super::map::{Allocation, Heap};
use super::{Step, require};
use crate::error::Result;
use crate::io::{ReadAt, read_vec};
use crate::layout::field::{le16, le32};
use crate::unit::{Extent, to_usize};

/// Entries read at once while a chain is followed.
const WINDOW: u64 = 1024;
/// Entries read at once otherwise.
const AT_ONCE: u64 = 1 << 18;
/// Most pieces a chain may be in.
const MAX_RUNS: usize = 1 << 16;

/// Which file system it is, and so how wide an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fat12,
    Fat16,
    Fat32,
    Exfat,
}

impl Kind {
    /// Its name for a reader.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Fat12 => "fat12",
            Kind::Fat16 => "fat16",
            Kind::Fat32 => "fat32",
            Kind::Exfat => "exfat",
        }
    }

    /// Bits an entry takes.
    pub fn bits(self) -> u64 {
        match self {
            Kind::Fat12 => 12,
            Kind::Fat16 => 16,
            Kind::Fat32 | Kind::Exfat => 32,
        }
    }

    /// The bits of an entry that count.
    fn mask(self) -> u32 {
        match self {
            Kind::Fat12 => 0xfff,
            Kind::Fat16 => 0xffff,
            Kind::Fat32 => 0x0fff_ffff,
            Kind::Exfat => !0,
        }
    }

    /// The entry of a bad cluster.
    fn bad(self) -> u32 {
        self.mask() - 8
    }

    /// The least entry that ends a chain.
    fn last(self) -> u32 {
        if self == Kind::Exfat { !0 } else { self.bad() + 1 }
    }

    /// Most clusters there may be, so that every number of one is less than that of a bad one; FAT16 by Microsoft's
    /// specification.
    pub fn most_clusters(self) -> u64 {
        match self {
            Kind::Fat16 => 65_524,
            _ => u64::from(self.bad()) - 2,
        }
    }

    /// The bits of the second entry that are clear when the volume was not unmounted, or met an error of the disk.
    fn state(self) -> u32 {
        match self {
            Kind::Fat16 => 0xc000,
            Kind::Fat32 => 0x0c00_0000,
            Kind::Fat12 | Kind::Exfat => 0,
        }
    }
}

/// The copies of a table.
pub(super) struct Table<D> {
    pub disk: D,
    pub kind: Kind,
    pub heap: Heap,
    /// Where they begin, in bytes: at least one, and each long enough for all clusters. Chains are followed in the
    /// first.
    pub starts: Vec<u64>,
}

impl<D: ReadAt> Table<D> {
    /// Reads `entries` of the copy at `start`.
    fn read(&self, start: u64, entries: Extent) -> Result<Vec<u8>> {
        let bits = self.kind.bits();
        let (from, to) = (entries.start * bits / 8, (entries.end * bits).div_ceil(8));
        read_vec(&self.disk, start + from, to_usize(to - from))
    }

    /// Entry `n` out of bytes that [`Table::read`] read from entry `first` on.
    fn entry(&self, raw: &[u8], first: u64, n: u64) -> u32 {
        let bits = self.kind.bits();
        let at = to_usize(n * bits / 8 - first * bits / 8);
        let entry = match self.kind {
            Kind::Fat12 => u32::from(le16(raw, at)) >> (4 * (n % 2)),
            Kind::Fat16 => le16(raw, at).into(),
            Kind::Fat32 | Kind::Exfat => le32(raw, at),
        };
        entry & self.kind.mask()
    }

    /// Whether a table of volumes with the media byte `media` begins at byte `start`, and its second entry.
    fn begins(&self, start: u64, media: u8) -> Result<Option<u32>> {
        let raw = self.read(start, Extent::new(0, 2))?;
        let first = self.kind.mask() & !0xff | u32::from(media);
        let second = self.entry(&raw, 0, 1);
        let sound = self.entry(&raw, 0, 0) == first && second | self.kind.state() >= self.kind.last();
        Ok(sound.then_some(second))
    }

    /// Checks what the two entries before the first cluster's say, in every copy, and that none follows at `end`.
    pub fn check_begin(&self, media: u8, end: Option<u64>) -> Step<()> {
        for start in &self.starts {
            let Some(second) = self.begins(*start, media)? else {
                return Err(format!("there is no allocation table at byte {start}").into());
            };
            let state = self.kind.state();
            require(second & state == state, || "it was not unmounted, or met errors of the disk".into())?;
        }
        match end {
            Some(end) if self.begins(end, media)?.is_some() => {
                Err("it has a table more than it says".to_owned().into())
            }
            _ => Ok(()),
        }
    }

    /// Follows a chain from cluster `first`, which counts from 2, through at most `most` clusters. Returns them in
    /// runs, which count from 0, and whether the chain ends there.
    pub fn chain(&self, first: u64, most: u64) -> Step<(Vec<Extent>, bool)> {
        let mut runs: Vec<Extent> = Vec::new();
        let (mut window, mut raw) = (Extent::new(0, 0), Vec::new());
        let start = self.starts.first().copied().unwrap_or_default();
        let end = self.heap.count + 2;
        let mut cluster = first;
        for _ in 0..most {
            require((2..end).contains(&cluster), || format!("a chain leads to cluster {cluster}"))?;
            match runs.last_mut() {
                Some(run) if run.end + 2 == cluster => run.end += 1,
                _ => runs.push(Extent::at(cluster - 2, 1)),
            }
            require(runs.len() <= MAX_RUNS, || {
                format!("the chain of cluster {first} is in too many pieces")
            })?;
            if !window.contains(Extent::at(cluster, 1)) {
                window = Extent::at(cluster, WINDOW).intersect(Extent::new(0, end));
                raw = self.read(start, window)?;
            }
            let entry = self.entry(&raw, window.start, cluster);
            if entry >= self.kind.last() {
                return Ok((runs, true));
            }
            cluster = entry.into();
        }
        Ok((runs, false))
    }
}

/// A cluster is used when its entry in any copy is not free.
impl<D: ReadAt> Allocation for Table<D> {
    fn used(&self, clusters: Extent) -> Step<Vec<u64>> {
        let mut words = vec![0_u64; to_usize(clusters.len().div_ceil(64))];
        let end = self.heap.count + 2;
        self.each(clusters, |place, entry| {
            let leads = entry == 0 || (2..end).contains(&entry.into()) || entry >= self.kind.bad();
            require(leads, || strange(place, entry, "is no cluster"))?;
            let bit = place - clusters.start;
            if let Some(word) = words.get_mut(to_usize(bit / 64)) {
                *word |= u64::from(entry != 0) << (bit % 64);
            }
            Ok(())
        })?;
        Ok(words)
    }
}

impl<D: ReadAt> Table<D> {
    /// Stops where a chain leads to a free cluster. Returns how many are used. Takes a bit for each cluster meanwhile: at
    /// most 32 MiB.
    pub fn check_links(&self) -> Step<u64> {
        let clusters = Extent::new(0, self.heap.count);
        let words = self.used(clusters)?;
        self.each(clusters, |place, entry| {
            let next = u64::from(entry).checked_sub(2).filter(|next| *next < clusters.end);
            let free =
                |next: u64| words.get(to_usize(next / 64)).is_none_or(|word| word >> (next % 64) & 1 == 0);
            require(!next.is_some_and(free), || strange(place, entry, "is free"))
        })?;
        Ok(words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Gives `visit` each of `clusters` with its entry, for one copy after the other.
    fn each(&self, clusters: Extent, mut visit: impl FnMut(u64, u32) -> Step<()>) -> Step<()> {
        let entries = clusters.shifted(2);
        for start in &self.starts {
            for first in (entries.start..entries.end).step_by(to_usize(AT_ONCE)) {
                let part = Extent::at(first, AT_ONCE).intersect(entries);
                let raw = self.read(*start, part)?;
                for n in part.start..part.end {
                    visit(n - 2, self.entry(&raw, first, n))?;
                }
            }
        }
        Ok(())
    }
}

/// Why cluster `place` makes its table doubtful.
fn strange(place: u64, entry: u32, why: &str) -> String {
    format!("cluster {}'s entry is {entry:#x}, which {why}", place + 2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::io::WriteAt;
    use crate::io::fake::MemoryDisk;

    const STARTS: [u64; 2] = [512, 65_536];

    /// Both copies of a table with the entries given, bit by bit, from cluster 2 on.
    fn table(kind: Kind, copies: [&[u32]; 2]) -> Table<MemoryDisk> {
        let disk = MemoryDisk::sparse(1 << 20);
        for (start, entries) in STARTS.into_iter().zip(copies) {
            let mut bytes = vec![0_u8; (entries.len() + 2) * 4];
            for (n, entry) in (2..).zip(entries) {
                for bit in (0..kind.bits()).filter(|bit| entry >> bit & 1 != 0) {
                    let place = n * kind.bits() + bit;
                    bytes[to_usize(place / 8)] |= 1 << (place % 8);
                }
            }
            disk.write_at(&bytes, start).unwrap();
        }
        let heap = Heap { start: 1 << 19, cluster: 512, count: copies[0].len() as u64 };
        Table { disk, kind, heap, starts: STARTS.to_vec() }
    }

    proptest! {
        #[test]
        fn a_cluster_is_used_when_any_copy_says_so(
            entries in prop::collection::vec((0..4_u8, 0..4_u8), 64..400),
            kind in prop::sample::select(vec![Kind::Fat12, Kind::Fat16, Kind::Fat32]),
        ) {
            let entry = |kind: Kind, choice: u8| [0, 2, kind.bad(), kind.mask()][usize::from(choice)];
            let first: Vec<u32> = entries.iter().map(|(choice, _)| entry(kind, *choice)).collect();
            let second: Vec<u32> = entries.iter().map(|(_, choice)| entry(kind, *choice)).collect();
            let table = table(kind, [&first, &second]);
            for start in [0, 64] {
                let words = table.used(Extent::new(start, entries.len() as u64)).unwrap();
                let found = entries.iter().skip(to_usize(start)).zip(0..).all(|(choices, bit)| {
                    let used = words[to_usize(bit / 64)] >> (bit % 64) & 1 != 0;
                    used == (*choices != (0, 0))
                });
                prop_assert!(found, "{kind:?} from {start}");
                let set: u32 = words.iter().map(|word| word.count_ones()).sum();
                let skipped = entries.iter().skip(to_usize(start)).filter(|choices| **choices != (0, 0));
                prop_assert_eq!(set as usize, skipped.count());
            }
        }
    }

    #[test]
    fn a_chain_is_followed_to_its_end_or_to_nowhere() {
        for kind in [Kind::Fat12, Kind::Fat16, Kind::Fat32, Kind::Exfat] {
            // Cluster 2 leads to 3, 4, back to 7, and there it ends; 5 leads to itself, 6 to a free one, 8 behind the end.
            let entries = [3, 4, 7, 5, 9, kind.mask(), 10, 0];
            let table = table(kind, [&entries, &entries]);
            let runs = vec![Extent::new(0, 3), Extent::at(5, 1)];
            assert_eq!(table.chain(2, 4).unwrap(), (runs.clone(), true), "{kind:?}");
            assert_eq!(table.chain(2, 3).unwrap(), (runs[..1].to_vec(), false), "{kind:?}");
            assert_eq!(table.chain(5, 100).unwrap().0.len(), 100, "{kind:?}");
            for first in [0, 1, 6, 8, 10] {
                assert!(table.chain(first, 100).is_err(), "{kind:?} from {first}");
            }
        }
    }
}
