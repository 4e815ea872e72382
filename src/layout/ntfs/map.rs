//! The used clusters of one NTFS file system, read lazily: a part of its bitmap at a time.

use std::collections::BTreeSet;

use super::boot::{BootSector, LEN};
use super::record::{Stream, kind, named};
use super::volume::{Volume, file};
use super::{Step, Stop, hibernation, log, require};
use crate::error::Result;
use crate::io::{ReadAt, read_vec};
use crate::layout::batch::{Batch, Batches, Doubts};
use crate::layout::used::VolumeMap;
use crate::unit::{Extent, ExtentMap, to_usize};

/// Clusters in a batch, at most: their bits take 512 KiB.
const BATCH: u64 = 1 << 22;
/// Batches that are counted when a map is opened, about: 1 TiB in clusters of 4 KiB.
const COUNTED: u64 = 64;
/// Bytes from the volume's start that belong to the boot code.
const BOOT: u64 = 8192;

/// Which bytes of an NTFS file system are in use, lazily: the clusters that its bitmap calls used. What lies behind the
/// last whole cluster, the backup boot sector for one, is in no bitmap.
pub(in crate::layout) struct NtfsMap<D> {
    volume: Volume<D>,
    bitmap: Stream,
    /// Clusters of the file system's own files: a bitmap that calls one of them free is wrong.
    own: ExtentMap,
    used: u64,
    batches: Batches,
    doubts: Doubts,
}

impl<D: ReadAt> NtfsMap<D> {
    /// Opens the file system on `disk`, which begins with it.
    pub fn open(disk: D) -> std::result::Result<Self, Stop> {
        let head = read_vec(&disk, 0, to_usize(disk.size().min(LEN)))?;
        let boot = BootSector::parse(&head).ok_or_else(|| "its boot sector is gone".to_owned())?;
        let volume = Volume::open(disk, boot)?;
        let mirror = volume.mirror()?;
        volume.check_state()?;
        let log = system_file(&volume, file::LOG).map_err(|stop| named(stop, "$LogFile"))?;
        log::require_clean(&volume, &log).map_err(|stop| named(stop, "$LogFile"))?;
        hibernation::require_awake(&volume)?;
        let bitmap = system_file(&volume, file::BITMAP).map_err(|stop| named(stop, "$Bitmap"))?;
        let clusters = volume.boot.clusters;
        require(bitmap.initialised == bitmap.size && bitmap.size >= clusters.div_ceil(8), || {
            format!("$Bitmap has {} bytes for {clusters} clusters", bitmap.initialised)
        })?;
        let own = own_clusters(&volume, mirror, [&log, &bitmap])?;
        let mut map =
            NtfsMap { volume, bitmap, own, used: 0, batches: Batches::default(), doubts: Doubts::default() };
        map.used = map.count()?;
        Ok(map)
    }

    /// About how many clusters are used, by all of the bitmap or by parts of it all over; a bitmap that is wrong there is
    /// wrong altogether.
    fn count(&self) -> Step<u64> {
        let clusters = self.volume.boot.clusters;
        let batches = clusters.div_ceil(BATCH);
        let mut numbers: BTreeSet<u64> =
            (0..batches).step_by(to_usize(batches.div_ceil(COUNTED).max(1))).collect();
        numbers.extend([self.volume.boot.mft / BATCH, self.volume.boot.mirror / BATCH]);
        let (mut used, mut seen) = (0_u64, 0);
        for number in numbers {
            let batch = self.read(number)?;
            let mut at = number * BATCH;
            seen += batch.end() - at;
            while at < batch.end()
                && let Some(run) = batch.next_run(at)
            {
                used += run.len();
                at = run.end;
            }
        }
        let scaled = u128::from(used) * u128::from(clusters) / u128::from(seen.max(1));
        Ok(u64::try_from(scaled).unwrap_or(clusters))
    }

    /// Reads a part of the bitmap.
    fn read(&self, number: u64) -> Step<Batch> {
        let extent = Extent::at(number * BATCH, BATCH).intersect(self.volume.clusters());
        let bits = self.volume.read(&self.bitmap, extent.start / 8, extent.len().div_ceil(8));
        let mut bits = bits.map_err(|stop| named(stop, "$Bitmap"))?;
        bits.resize(bits.len().next_multiple_of(8), 0);
        let (words, _) = bits.as_chunks::<8>();
        let words = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let batch = Batch::of_words(extent, words);
        for own in self.own.within(extent) {
            let used = batch.next_run(own.start).is_some_and(|run| run.contains(own));
            require(used, || format!("$Bitmap calls clusters in {own:?} free, which hold metadata"))?;
        }
        Ok(batch)
    }

    fn load(&self, number: u64) -> Result<Batch> {
        match self.read(number) {
            Ok(batch) => Ok(batch),
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::Whole(why)) => {
                self.doubts.add(number, why);
                let extent = Extent::at(number * BATCH, BATCH).intersect(self.volume.clusters());
                Ok(Batch::new(extent, true))
            }
        }
    }
}

/// Where the content of one of the file system's own files lies.
fn system_file<D: ReadAt>(volume: &Volume<D>, number: u64) -> Step<Stream> {
    let record = volume.record(number)?;
    require(!record.is_spread(), || "is spread over several records".into())?;
    volume.stream(&record, kind::DATA, "")
}

/// The clusters of the boot code, the MFT as far as it is known, its mirror and `files`.
fn own_clusters<D: ReadAt>(volume: &Volume<D>, mirror: Extent, files: [&Stream; 2]) -> Step<ExtentMap> {
    let boot = Extent::new(0, BOOT.div_ceil(volume.boot.cluster_size));
    let streams = [&volume.mft].into_iter().chain(files);
    let mut runs: Vec<Extent> = streams.flat_map(|stream| &stream.runs).map(|run| run.clusters).collect();
    runs.extend([boot, mirror]);
    runs.sort_unstable();
    let apart = runs.iter().zip(runs.iter().skip(1)).all(|(one, next)| one.end <= next.start);
    require(apart, || "files of the file system's own share clusters".into())?;
    Ok(runs.into_iter().collect())
}

impl<D: ReadAt> VolumeMap for NtfsMap<D> {
    fn len(&self) -> u64 {
        self.volume.boot.clusters * self.volume.boot.cluster_size
    }

    fn used_bytes(&self) -> u64 {
        self.used * self.volume.boot.cluster_size
    }

    fn next_used(&self, from: u64) -> Result<Option<Extent>> {
        let size = self.volume.boot.cluster_size;
        let mut cluster = from / size;
        while cluster < self.volume.boot.clusters {
            let number = cluster / BATCH;
            let batch = self.batches.get(number, || self.load(number))?;
            if let Some(run) = batch.next_run(cluster) {
                return Ok(Some(Extent::new(from.max(run.start * size), run.end * size)));
            }
            cluster = batch.end();
        }
        Ok(None)
    }

    fn findings(&self) -> Vec<String> {
        self.doubts.findings("bitmap part")
    }
}
