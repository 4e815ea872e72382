//! exFAT: its boot sector, and the allocation bitmap that its root directory lists.

use super::map::{Allocation, ClusterMap, Heap};
use super::table::{Kind, Table};
use super::{ExfatInfo, Step, entries, require, serial};
use crate::io::{ReadAt, is_zero, read_array, read_vec};
use crate::layout::field::{bytes, has, le16, le32, le64};
use crate::layout::mbr::require_no_partitions;
use crate::layout::used::VolumeMap;
use crate::unit::{Extent, to_usize};

/// Largest root directory that is read, in bytes; the specification allows 256 MiB.
const MAX_ROOT: u64 = 16 << 20;
/// How much of it is looked at for a label, in bytes.
const MAX_FOR_LABEL: u64 = 64 << 10;
/// Largest up-case table, in bytes: every UTF-16 code unit.
const MAX_UPCASE: u64 = 128 << 10;
/// Bytes that the allocation bitmap may be longer than it must.
const MAX_SLACK: u64 = 1 << 20;
/// Exponents of a sector's bytes, and the largest of a cluster's.
const SECTOR_SHIFTS: std::ops::RangeInclusive<u8> = 9..=12;
const MAX_CLUSTER_SHIFT: u8 = 25;
/// Sectors of a boot region: the checksum is in the last one. The first table lies behind it and its backup.
const BOOT_SECTORS: u64 = 12;
/// Bytes of the boot sector that change while it is mounted, and are not in the checksum: flags, and percentage used.
const UNSUMMED: [usize; 3] = [106, 107, 112];
/// Volume flags: the second table and bitmap are in use, it was not unmounted, it met errors of the disk.
const SECOND_ACTIVE: u16 = 0x1;
const DIRTY: u16 = 0x2;
const MEDIA_FAILURE: u16 = 0x4;
/// Kinds of directory entries.
const BITMAP: u8 = 0x81;
const UPCASE: u8 = 0x82;
const LABEL: u8 = 0x83;
const STREAM: u8 = 0xc0;
/// The media byte that the table begins with.
const MEDIA: u8 = 0xf8;

/// A boot sector's fields as far as the used map needs them.
#[derive(Clone, Debug)]
pub(super) struct Boot {
    raw: [u8; 512],
    /// Exponents of the bytes in a sector, and of the sectors in a cluster.
    sector_shift: u8,
    cluster_shift: u8,
}

impl Boot {
    /// Reads the boot sector at the start of `head`; `None` when it is none.
    pub fn parse(head: &[u8]) -> Option<Boot> {
        let raw = bytes::<512>(head, 0);
        let [sector_shift, cluster_shift] = bytes(&raw, 108);
        has(&raw, 3, b"EXFAT   ").then_some(Boot { raw, sector_shift, cluster_shift })
    }

    /// What to tell a reader.
    pub fn info(&self, label: String) -> ExfatInfo {
        ExfatInfo {
            label,
            serial: serial(le32(&self.raw, 100)),
            cluster_size: self.shifts().map_or(0, |shift| 1 << shift),
            clusters: self.clusters(),
        }
    }

    /// The exponent of the bytes in a cluster, if it may be one.
    fn shifts(&self) -> Option<u8> {
        let sum = self.sector_shift.checked_add(self.cluster_shift)?;
        Some(sum).filter(|sum| SECTOR_SHIFTS.contains(&self.sector_shift) && *sum <= MAX_CLUSTER_SHIFT)
    }

    fn clusters(&self) -> u64 {
        le32(&self.raw, 92).into()
    }

    /// A field that counts sectors, in bytes; [`Boot::check_layout`] has checked how large they are.
    fn sectors(&self, at: usize) -> u64 {
        u64::from(le32(&self.raw, at)) << self.sector_shift
    }

    fn heap(&self) -> Heap {
        let cluster = 1 << (self.sector_shift + self.cluster_shift);
        Heap { start: self.sectors(88), cluster, count: self.clusters() }
    }

    fn table<D: ReadAt>(&self, disk: D) -> Table<D> {
        Table { disk, kind: Kind::Exfat, heap: self.heap(), starts: vec![self.sectors(80)] }
    }

    /// Checks that the volume of `size` bytes can be laid out as the boot sector says.
    fn check_layout(&self, size: u64) -> Step<()> {
        let lies = |holds: bool, field: &str, value: u64| {
            require(holds, || format!("the boot sector's {field} is {value}"))
        };
        require(has(&self.raw, 510, b"\x55\xaa"), || "the boot sector has no signature".into())?;
        require(is_zero(&bytes::<53>(&self.raw, 11)), || {
            "the boot sector has a BIOS parameter block".into()
        })?;
        require(self.shifts().is_some(), || {
            format!("the boot sector's size exponents are {} and {}", self.sector_shift, self.cluster_shift)
        })?;
        let (length, clusters) = (le64(&self.raw, 72), self.clusters());
        lies(length <= size >> self.sector_shift, "length", length)?;
        let [copies] = bytes::<1>(&self.raw, 110);
        // Two are of TexFAT, of which one is in the making while a transaction lasts.
        lies(copies == 1, "number of tables", copies.into())?;
        lies(le16(&self.raw, 104) >> 8 == 1, "revision", le16(&self.raw, 104).into())?;
        let (table, table_len, heap) = (self.sectors(80), self.sectors(84), self.heap());
        lies(table >= (2 * BOOT_SECTORS) << self.sector_shift, "table's place", table)?;
        lies(table + table_len <= heap.start, "cluster heap's place", heap.start)?;
        lies((1..=Kind::Exfat.most_clusters()).contains(&clusters), "cluster count", clusters)?;
        lies((clusters + 2) * 4 <= table_len, "table length", table_len)?;
        lies(
            heap.bytes(Extent::new(0, clusters)).end <= length << self.sector_shift,
            "cluster count",
            clusters,
        )
    }

    /// Checks that the boot region of `disk` is intact, and that the volume was unmounted.
    fn check_state(&self, disk: &dyn ReadAt) -> Step<()> {
        require_no_partitions(&self.raw)?;
        let flags = le16(&self.raw, 106);
        require(flags & DIRTY == 0, || "it was not unmounted".into())?;
        require(flags & (SECOND_ACTIVE | MEDIA_FAILURE) == 0, || format!("its volume flags are {flags:#x}"))?;
        let region = read_vec(disk, 0, to_usize(BOOT_SECTORS << self.sector_shift))?;
        let (summed, sums) = region.split_at(to_usize((BOOT_SECTORS - 1) << self.sector_shift));
        let sum = checksum(summed).to_le_bytes();
        let (sums, _) = sums.as_chunks::<4>();
        require(sums.iter().all(|other| *other == sum), || "its boot region's checksum does not match".into())
    }
}

/// The checksum of a boot region.
fn checksum(region: &[u8]) -> u32 {
    let summed = region.iter().enumerate().filter(|(at, _)| !UNSUMMED.contains(at));
    summed.fold(0_u32, |sum, (_, byte)| sum.rotate_right(1).wrapping_add(u32::from(*byte)))
}

/// Opens the exFAT file system on `disk`, which begins with it.
pub(in crate::layout) fn open<D: ReadAt>(disk: D) -> Step<impl VolumeMap> {
    let head = read_array::<512>(&disk, 0)?;
    let boot = Boot::parse(&head).ok_or_else(|| "its boot sector is gone".to_owned())?;
    boot.check_layout(disk.size())?;
    boot.check_state(&disk)?;
    let table = boot.table(disk);
    table.check_begin(MEDIA, None)?;
    let heap = table.heap;
    let (mut own, whole) = root(&table, &boot, MAX_ROOT)?;
    require(whole, || "its root directory is too long".into())?;
    let root = Root::read(&heap.read(&table.disk, &own, MAX_ROOT.max(heap.cluster))?)?;
    let needed = heap.count.div_ceil(8);
    let bitmap = root.bitmap.runs(&table, needed..=needed + MAX_SLACK)?;
    own.extend(&bitmap);
    own.extend(root.upcase.runs(&table, 1..=MAX_UPCASE)?);
    let map = ClusterMap::open(heap, Bitmap::new(table.disk, heap, &bitmap))?;
    map.require_used(&mut own, "its own metadata")?;
    let mut streams: Vec<Extent> = Vec::new();
    for first in root.streams {
        let place =
            u64::from(first).checked_sub(2).ok_or_else(|| format!("a file begins at cluster {first}"))?;
        streams.push(Extent::at(place, 1));
    }
    map.require_used(&mut streams, "a file")?;
    Ok(map)
}

/// The label in the root directory of `volume`; empty when there is none.
pub(super) fn label(volume: &dyn ReadAt, boot: &Boot) -> Step<String> {
    boot.check_layout(volume.size())?;
    let table = boot.table(volume);
    let (runs, _) = root(&table, boot, MAX_FOR_LABEL)?;
    let directory = table.heap.read(volume, &runs, MAX_FOR_LABEL)?;
    let entry = entries(&directory).find(|entry| bytes(*entry, 0) == [LABEL]);
    let [len] = entry.map_or([0], |entry| bytes(entry, 1));
    let units = entry.into_iter().flat_map(|entry| (0..11).map(|i| le16(entry, 2 + i * 2))).take(len.into());
    Ok(String::from_utf16_lossy(&units.collect::<Vec<_>>()))
}

/// The clusters of the root directory, and whether they are all there is of it: at most `most` bytes, or one cluster.
fn root<D: ReadAt>(table: &Table<D>, boot: &Boot, most: u64) -> Step<(Vec<Extent>, bool)> {
    table.chain(le32(&boot.raw, 96).into(), most.div_ceil(table.heap.cluster))
}

/// What the root directory lists.
struct Root {
    bitmap: Place,
    upcase: Place,
    /// The first clusters of files and folders.
    streams: Vec<u32>,
}

/// Where a structure's chain begins, and its length in bytes.
struct Place {
    first: u32,
    len: u64,
}

impl Root {
    fn read(directory: &[u8]) -> Step<Root> {
        let (mut bitmaps, mut upcases, mut streams) = (Vec::new(), Vec::new(), Vec::new());
        for entry in entries(directory) {
            let place = Place { first: le32(entry, 20), len: le64(entry, 24) };
            match bytes(entry, 0) {
                [BITMAP] => bitmaps.push((place, bytes(entry, 1))),
                [UPCASE] => upcases.push(place),
                [STREAM] if place.first != 0 => streams.push(place.first),
                _ => {}
            }
        }
        let count = bitmaps.len();
        let (Some((bitmap, [0])), 1) = (bitmaps.pop(), count) else {
            return Err(format!("its root directory lists {count} allocation bitmaps").into());
        };
        let count = upcases.len();
        let (Some(upcase), 1) = (upcases.pop(), count) else {
            return Err(format!("its root directory lists {count} up-case tables").into());
        };
        Ok(Root { bitmap, upcase, streams })
    }
}

impl Place {
    /// The clusters it lies in, if its length is one of `lens` and its chain is as long.
    fn runs<D: ReadAt>(&self, table: &Table<D>, lens: std::ops::RangeInclusive<u64>) -> Step<Vec<Extent>> {
        let (first, len) = (self.first, self.len);
        let wrong = || format!("the chain of cluster {first} is not of {len} bytes");
        require(lens.contains(&len), wrong)?;
        let count = len.div_ceil(table.heap.cluster);
        let (runs, whole) = table.chain(first.into(), count)?;
        let found: u64 = runs.iter().map(Extent::len).sum();
        require(whole && found == count, wrong)?;
        Ok(runs)
    }
}

/// The allocation bitmap: a bit for each cluster.
struct Bitmap<D> {
    disk: D,
    /// Its pieces: which of its bytes they are, and where they begin on the disk.
    pieces: Vec<(Extent, u64)>,
}

impl<D: ReadAt> Bitmap<D> {
    /// The bitmap in the clusters of `runs`.
    fn new(disk: D, heap: Heap, runs: &[Extent]) -> Bitmap<D> {
        let mut at = 0;
        let piece = |run: &Extent| {
            let place = heap.bytes(*run);
            let part = Extent::at(at, place.len());
            at = part.end;
            (part, place.start)
        };
        Bitmap { disk, pieces: runs.iter().map(piece).collect() }
    }
}

impl<D: ReadAt> Allocation for Bitmap<D> {
    fn used(&self, clusters: Extent) -> Step<Vec<u64>> {
        let wanted = Extent::new(clusters.start / 8, clusters.end.div_ceil(8));
        let mut bits = Vec::new();
        let first = self.pieces.partition_point(|(part, _)| part.end <= wanted.start);
        for (part, place) in self.pieces.iter().skip(first).take_while(|(part, _)| part.start < wanted.end) {
            let here = part.intersect(wanted);
            bits.extend(read_vec(&self.disk, place + (here.start - part.start), to_usize(here.len()))?);
        }
        require(bits.len() as u64 == wanted.len(), || "its allocation bitmap is too short".into())?;
        let beyond = wanted.len() * 8 - clusters.len();
        if let Some(last) = bits.last_mut() {
            *last &= 0xff >> beyond;
        }
        bits.resize(bits.len().next_multiple_of(8), 0);
        let (words, _) = bits.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_specifications() {
        // The sum as its text puts it: the lowest bit goes to the top, the rest one down, and the byte is added.
        let region: Vec<u8> = (0..6000_u32).map(|i| (i * 7 + i / 256).to_le_bytes()[0]).collect();
        let mut expected = 0_u32;
        for (i, byte) in region.iter().enumerate() {
            if i == 106 || i == 107 || i == 112 {
                continue;
            }
            let top = if expected & 1 != 0 { 0x8000_0000 } else { 0 };
            expected = (top + (expected >> 1)).wrapping_add(u32::from(*byte));
        }
        assert_eq!(checksum(&region), expected);
    }
}
