//! What the tests of used maps share: maps of image files, the copies they lead to, and damaged disks.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use haul::error::Result;
use haul::io::fake::FaultyDisk;
use haul::io::{DiskFile, ReadAt, is_zero};
use haul::layout::{self, Usage, UsedMap};
use haul::unit::{Extent, ExtentMap, MIB, extents};

use crate::support::{Random, empty_image, run, text};

/// The used map of an image file.
pub fn open(image: &Path) -> UsedMap {
    layout::used_map(Arc::new(DiskFile::open(image).unwrap())).unwrap()
}

/// What is used of the first `size` bytes.
pub fn used(map: &UsedMap, size: u64) -> ExtentMap {
    extents::collect(map, Extent::new(0, size)).unwrap()
}

/// What is in `size` bytes but not in `set`.
pub fn rest(set: &ExtentMap, size: u64) -> ExtentMap {
    let mut rest: ExtentMap = [Extent::new(0, size)].into_iter().collect();
    set.iter().for_each(|run| rest.remove(run));
    rest
}

/// Why the image, a single volume, is copied whole; fails the test when it is not.
pub fn whole_because(name: &str, image: &Path) -> String {
    let map = open(image);
    let Usage::Whole { reason } = &map.volumes()[0].usage else { panic!("{name} is mapped") };
    let size = fs::metadata(image).unwrap().len();
    assert_eq!(layout::count_used(&map, Extent::new(0, size)).unwrap(), size, "{name}");
    assert_eq!(map.used_bytes(), size, "{name}");
    reason.clone()
}

/// The copy haul would make: used bytes, the rest zero.
pub fn masked_copy(image: &Path, copy: &Path) {
    let disk = DiskFile::open(image).unwrap();
    empty_image(copy, disk.size());
    let out = File::options().write(true).open(copy).unwrap();
    for run in used(&open(image), disk.size()).iter() {
        let mut at = run.start;
        while at < run.end {
            let mut bytes = vec![0; (run.end - at).min(MIB) as usize];
            disk.read_at(&mut bytes, at).unwrap();
            if !is_zero(&bytes) {
                out.write_all_at(&bytes, at).unwrap();
            }
            at += bytes.len() as u64;
        }
    }
}

/// Every name below `dir` with its mode, owner and length, and the SHA-256 of every file.
pub fn tree(dir: &Path) -> String {
    let list =
        "find . -printf '%p %M %U %s %l\\n' | sort; find . -type f -print0 | sort -z | xargs -0 -r sha256sum";
    run("sh", &["-c", &format!("cd {} && {{ {list}; }}", text(dir))])
}

/// A disk in memory of which some bytes were changed.
pub struct Damaged {
    pub disk: Arc<Vec<u8>>,
    pub changes: BTreeMap<u64, u8>,
}

impl ReadAt for Damaged {
    fn size(&self) -> u64 {
        self.disk.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        haul::io::check_range(self, buf.len(), offset)?;
        let at = offset as usize;
        buf.copy_from_slice(&self.disk[at..at + buf.len()]);
        for (place, byte) in self.changes.range(offset..offset + buf.len() as u64) {
            buf[(place - offset) as usize] = *byte;
        }
        Ok(())
    }

    fn name(&self) -> String {
        "damaged disk".into()
    }
}

/// What a damaged disk may not do: panic, report a fault of haul's own, read without end, or, when its metadata
/// carries checksums, lose a used byte. Damage of `disk` by `random` in the KiBs listed. Returns whether the map
/// saw it.
pub fn survives_damage(
    disk: &Arc<Vec<u8>>,
    places: &[usize],
    used_before: Option<&ExtentMap>,
    random: &mut Random,
) -> bool {
    let mut changes = BTreeMap::new();
    for _ in 0..1 + random.below(6) {
        let at = places[random.below(places.len() as u64) as usize] + random.below(1024) as usize;
        let byte = match random.below(3) {
            0 => 0xff,
            1 => disk[at] ^ (1 << random.below(8)),
            _ => random.next() as u8,
        };
        changes.insert(at as u64, byte);
    }
    survives(Damaged { disk: Arc::clone(disk), changes }, used_before).1
}

/// The same of a disk that is damaged already. Returns what is used, and whether the map saw the damage.
pub fn survives(damaged: Damaged, used_before: Option<&ExtentMap>) -> (ExtentMap, bool) {
    let disk = Arc::clone(&damaged.disk);
    let size = disk.len() as u64;
    let damaged = Arc::new(FaultyDisk::new(damaged, Vec::new()));
    let map = match layout::used_map(Arc::clone(&damaged) as Arc<dyn ReadAt>) {
        Ok(map) => map,
        Err(error) => panic!("{error}: {}", error.why()),
    };
    let used = extents::collect(&map, Extent::new(0, size)).unwrap();
    let read = damaged.bytes_read();
    assert!(read < 4 * size + 64 * MIB, "{read} bytes read");
    for run in used_before.into_iter().flat_map(ExtentMap::iter) {
        assert!(used.covers(run), "used bytes in {run:?} are lost: {:?}", damaged_bytes(&*damaged, &disk));
    }
    let whole = map.volumes().iter().any(|volume| matches!(volume.usage, Usage::Whole { .. }));
    (used, whole || !map.findings().is_empty())
}

/// Where and how a damaged disk differs.
fn damaged_bytes(damaged: &dyn ReadAt, disk: &[u8]) -> Vec<(usize, u8, u8)> {
    let mut bytes = vec![0; disk.len()];
    damaged.read_at(&mut bytes, 0).unwrap();
    let both = disk.iter().zip(&bytes).enumerate();
    both.filter(|(_, (old, new))| old != new).map(|(at, (old, new))| (at, *old, *new)).collect()
}

/// The 1 KiB pieces of a disk that are not zero: where damage can matter.
pub fn written(disk: &[u8]) -> Vec<usize> {
    (0..disk.len() / 1024)
        .map(|i| i * 1024)
        .filter(|at| disk[*at..at + 1024].iter().any(|b| *b != 0))
        .collect()
}
