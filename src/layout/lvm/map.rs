//! The used map of a physical volume: free extents are unused, extents of a mapped logical volume as the file system
//! in it says, everything else is used.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::volume::Stripes;
use super::{Found, Group};
use crate::error::Result;
use crate::layout::used::{VolumeMap, next_used};
use crate::unit::Extent;

/// Most areas of a mapped logical volume: each may make its file system's map be asked anew.
const MAX_AREAS: usize = 4096;

/// A logical volume with the map of the file system in it.
pub(in crate::layout) struct MappedVolume {
    /// Its name with its group's.
    name: String,
    /// Its length in bytes.
    size: u64,
    map: Box<dyn VolumeMap>,
}

impl MappedVolume {
    /// The volume `found`, which its file system's `map` speaks of; an error says why it is copied whole.
    pub fn new(found: &Found, map: Box<dyn VolumeMap>) -> std::result::Result<Self, String> {
        match &found.volume {
            Ok(volume) if volume.areas() <= MAX_AREAS => {
                Ok(MappedVolume { name: found.full_name(), size: found.size, map })
            }
            Ok(volume) => Err(format!("it is in {} pieces", volume.areas())),
            Err(why) => Err(why.clone()),
        }
    }

    /// Bytes in use by the file system's summary.
    pub fn used_bytes(&self) -> u64 {
        self.size - self.unused_bytes()
    }

    fn unused_bytes(&self) -> u64 {
        self.map.len().saturating_sub(self.map.used_bytes()).min(self.size)
    }
}

/// The used map of one physical volume. Offsets are relative to it.
pub(in crate::layout) struct PvMap {
    /// Where its extents end.
    len: u64,
    used_bytes: u64,
    /// What is not simply used: in order, without overlaps.
    pieces: Vec<Piece>,
    /// The mapped volumes that begin here.
    volumes: Vec<Arc<MappedVolume>>,
}

/// Bytes of a physical volume that may be unused.
struct Piece {
    extent: Extent,
    /// The logical volume whose bytes these are; none when they are free.
    share: Option<Share>,
}

/// An area of a logical volume's segment.
struct Share {
    volume: Arc<MappedVolume>,
    /// The segment's place in the volume.
    segment: Extent,
    stripes: Stripes,
    /// The area's turn.
    index: u64,
}

impl PvMap {
    /// The map of physical volume `pv` of `group`, whose volumes are `mapped` by index, or not at all.
    pub fn new(group: &Group, pv: usize, mapped: &BTreeMap<usize, Arc<MappedVolume>>) -> Self {
        let vg = &group.vg;
        let extents = vg.pvs.get(pv).map_or(Extent::new(0, 0), |pv| vg.extents_of(pv));
        let place = |start: u64, end: u64| {
            Extent::new(extents.start + start * vg.extent_size, extents.start + end * vg.extent_size)
        };
        let mut map =
            PvMap { len: extents.end, used_bytes: extents.end, pieces: Vec::new(), volumes: Vec::new() };
        let mut free = 0;
        for area in vg.allocated.iter().filter(|area| area.pv == pv) {
            map.add(Piece { extent: place(free, area.start), share: None });
            free = area.start + area.count;
        }
        map.add(Piece { extent: Extent::new(place(free, free).start, extents.end), share: None });
        map.used_bytes -= map.pieces.iter().map(|piece| piece.extent.len()).sum::<u64>();
        for (lv, volume) in mapped.iter().filter_map(|(i, volume)| Some((vg.lvs.get(*i)?, volume))) {
            let mut here = 0;
            for segment in &lv.segments {
                for (index, area) in (0..).zip(&segment.areas).filter(|(_, area)| area.pv == pv) {
                    let extent = place(area.start, area.start + area.count);
                    let whole = Extent::at(segment.start * vg.extent_size, segment.count * vg.extent_size);
                    let stripes = segment.stripes(vg.extent_size);
                    here += extent.len();
                    let share = Share { volume: Arc::clone(volume), segment: whole, stripes, index };
                    map.add(Piece { extent, share: Some(share) });
                }
            }
            let unused =
                u128::from(volume.unused_bytes()) * u128::from(here) / u128::from(volume.size.max(1));
            map.used_bytes -= u64::try_from(unused).unwrap_or(0).min(here);
            let first = lv.segments.first().and_then(|segment| segment.areas.first());
            if first.is_some_and(|first| first.pv == pv) {
                map.volumes.push(Arc::clone(volume));
            }
        }
        map.pieces.sort_by_key(|piece| piece.extent);
        map
    }

    fn add(&mut self, piece: Piece) {
        if !piece.extent.is_empty() {
            self.pieces.push(piece);
        }
    }
}

impl VolumeMap for PvMap {
    fn len(&self) -> u64 {
        self.len
    }

    fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    fn next_used(&self, from: u64) -> Result<Option<Extent>> {
        let mut from = from;
        let next = self.pieces.partition_point(|piece| piece.extent.end <= from);
        for piece in self.pieces.iter().skip(next) {
            if from < piece.extent.start {
                return Ok(Some(Extent::new(from, piece.extent.start)));
            }
            if let Some(share) = &piece.share
                && let Some(run) = share.next_used(from - piece.extent.start)?
            {
                return Ok(Some(run.shifted(piece.extent.start)));
            }
            from = piece.extent.end;
        }
        Ok(Some(Extent::new(from, self.len)).filter(|run| !run.is_empty()))
    }

    fn findings(&self) -> Vec<String> {
        let of = |volume: &Arc<MappedVolume>| {
            let findings = volume.map.findings().into_iter();
            findings.map(|what| format!("{}: {what}", volume.name)).collect::<Vec<_>>()
        };
        self.volumes.iter().flat_map(of).collect()
    }
}

impl Share {
    /// The first used run at or after `from`. Both are relative to the area.
    fn next_used(&self, from: u64) -> Result<Option<Extent>> {
        let Share { volume, segment, stripes, index } = self;
        let mut at = segment.start + stripes.offset(*index, from);
        while at < segment.end {
            let Some(run) = next_used(&*volume.map, at, volume.size)? else { break };
            // Bytes that follow one another in the volume do so in each area, whatever comes between.
            let below = |end: u64| stripes.below(*index, end.min(segment.end) - segment.start);
            if run.start >= segment.end {
                break;
            }
            let here = Extent::new(below(run.start).max(from), below(run.end));
            if !here.is_empty() {
                return Ok(Some(here));
            }
            at = segment.start + stripes.offset(*index, here.end);
        }
        Ok(None)
    }
}
