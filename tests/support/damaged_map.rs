//! Disks in memory of which bytes were changed, and what the used map may make of them.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::sync::Arc;

use haul::error::Result;
use haul::io::ReadAt;
use haul::io::fake::FaultyDisk;
use haul::layout::{self, Usage};
use haul::unit::{Extent, ExtentMap, MIB, extents};

use crate::bounds::{Bounds, MOST_HELD};
use crate::support::Random;

/// A disk in memory of which some bytes were changed, or which is shorter than it was.
pub struct Damaged {
    pub disk: Arc<Vec<u8>>,
    pub size: usize,
    pub changes: BTreeMap<u64, u8>,
}

impl Damaged {
    /// Damage of `disk` by `random` in the KiBs listed.
    pub fn new(disk: &Arc<Vec<u8>>, places: &[usize], random: &mut Random) -> Damaged {
        let mut size = disk.len();
        let place = |random: &mut Random| {
            places[random.below(places.len() as u64) as usize] + random.below(1024) as usize
        };
        if random.below(10) == 0 {
            size = if random.below(2) == 0 { place(random) } else { random.below(size as u64) as usize };
        }
        let mut changes = BTreeMap::new();
        for _ in 0..1 + random.below(6) {
            let at = place(random);
            changes.insert(at as u64, changed(disk[at], random));
        }
        Damaged { disk: Arc::clone(disk), size, changes }
    }
}

/// A byte that was `old`.
pub fn changed(old: u8, random: &mut Random) -> u8 {
    match random.below(3) {
        0 => 0xff,
        1 => old ^ (1 << random.below(8)),
        _ => random.next() as u8,
    }
}

impl ReadAt for Damaged {
    fn size(&self) -> u64 {
        self.size as u64
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

/// What a damaged disk may not do: panic, report a fault of haul's own, read without end, break `bounds`, or, when its
/// metadata carries checksums, lose a byte of `used_before`. Returns what is used, and whether the map saw the damage.
pub fn survives(bounds: &mut Bounds, damaged: Damaged, used_before: Option<&ExtentMap>) -> (ExtentMap, bool) {
    let (disk, size) = (Arc::clone(&damaged.disk), damaged.size as u64);
    let name = format!("a disk of {size} bytes with {:?}", damaged.changes);
    let damaged = Arc::new(FaultyDisk::new(damaged, Vec::new()));
    let (used, seen) = bounds.hold(&name, 0, MOST_HELD, || {
        let map = layout::used_map(Arc::clone(&damaged) as Arc<dyn ReadAt>);
        let map = map.unwrap_or_else(|error| panic!("{error}: {}", error.why()));
        let used = extents::collect(&map, Extent::new(0, size)).unwrap();
        let whole = map.volumes().iter().any(|volume| matches!(volume.usage, Usage::Whole { .. }));
        (used, whole || !map.findings().is_empty())
    });
    let read = damaged.bytes_read();
    assert!(read < 4 * size + 64 * MIB, "{name}: {read} bytes read");
    for run in used_before.into_iter().flat_map(|used| used.within(Extent::new(0, size))) {
        assert!(used.covers(run), "used bytes in {run:?} are lost: {:?}", damaged_bytes(&*damaged, &disk));
    }
    (used, seen)
}

/// The same for damage of `disk` by `random` in the KiBs listed.
pub fn survives_damage(
    bounds: &mut Bounds,
    disk: &Arc<Vec<u8>>,
    places: &[usize],
    used_before: Option<&ExtentMap>,
    random: &mut Random,
) -> bool {
    survives(bounds, Damaged::new(disk, places, random), used_before).1
}

/// Where and how a damaged disk differs.
fn damaged_bytes(damaged: &dyn ReadAt, disk: &[u8]) -> Vec<(usize, u8, u8)> {
    let mut bytes = vec![0; damaged.size() as usize];
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
