//! The used map of a whole disk: everything is in use but what a file system or swap area proves unused.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::btrfs::BtrfsMap;
use super::ext::ExtMap;
use super::lvm::{self, Found, Group, MappedVolume, Member, PvMap};
use super::ntfs::NtfsMap;
use super::xfs::XfsMap;
use super::{Content, Finding, Stop, Table, fat, identify, read_table, swap};
use crate::error::{Kind, Result, Retry};
use crate::io::{ReadAt, Window};
use crate::unit::{Extent, Extents};

/// Most block groups, or what other file systems call them, of all file systems of a disk together: 64 TiB at the
/// usual 128 MiB each. Each takes about 40 bytes in memory.
const MAX_GROUPS: u64 = 1 << 19;
/// Most logical volumes of a disk that are mapped: each may keep a part of its map in memory.
const MAX_LOGICAL: usize = 256;

/// How much of a volume is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Usage {
    /// What its own map calls used: `used_bytes` by its summary, which a scan of the map may correct.
    Mapped {
        /// Bytes in use.
        used_bytes: u64,
    },
    /// All of it.
    Whole {
        /// Why.
        reason: String,
    },
}

/// A partition, a disk without partitions, or a logical volume on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The number of its partition; none for a whole disk and for a logical volume.
    pub partition: Option<u32>,
    /// The name of a logical volume, as `group/volume`; none for a partition or disk.
    pub logical: Option<String>,
    /// Where it lies on the disk, in bytes; for a logical volume, which may be in pieces, from 0 to its length.
    pub extent: Extent,
    /// What it holds.
    pub content: Content,
    /// How much of it is copied.
    pub usage: Usage,
}

/// What a file system says of the volume it lies on; everything doubtful counts as used. Offsets are relative to the
/// volume.
pub(super) trait VolumeMap: Send + Sync {
    /// Bytes from the volume's start that the map speaks of; what lies beyond is used.
    fn len(&self) -> u64;

    /// Bytes in use below [`VolumeMap::len`] by a summary, found without reading the whole map.
    fn used_bytes(&self) -> u64;

    /// The first run of used bytes at or after `from`, which is below [`VolumeMap::len`]; `None` beyond the last.
    fn next_used(&self, from: u64) -> Result<Option<Extent>>;

    /// What was copied whole because it contradicts itself, as far as the map was read.
    fn findings(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The bytes of a disk that are in use, as a lazy set in whole-disk coordinates.
pub struct UsedMap {
    size: u64,
    table: Option<Table>,
    findings: Vec<Finding>,
    volumes: Vec<Volume>,
    /// Volumes that are not copied whole: in order, without overlaps.
    maps: Vec<(Extent, Box<dyn VolumeMap>)>,
}

/// What is left to do, and to spend, while a map is built.
struct Pending {
    /// Block groups of ext file systems.
    groups: u64,
    /// Logical volumes to be mapped.
    logical: usize,
    /// Physical volumes: members with their indices among the volumes.
    members: Vec<(usize, Member)>,
}

/// A volume's map, or why it is copied whole.
type Mapped = std::result::Result<Box<dyn VolumeMap>, String>;

/// Builds the used map of a whole disk. A partition table or file system it cannot be sure about makes its part
/// of the disk used, with the reason in [`UsedMap::volumes`]; it fails only as the disk itself does.
pub fn used_map(disk: Arc<dyn ReadAt>) -> Result<UsedMap> {
    let whole = Extent::new(0, disk.size());
    let mut map = UsedMap {
        size: disk.size(),
        table: None,
        findings: Vec::new(),
        volumes: Vec::new(),
        maps: Vec::new(),
    };
    let mut pending = Pending { groups: MAX_GROUPS, logical: MAX_LOGICAL, members: Vec::new() };
    match read_table(&*disk) {
        Ok(Some(table)) => {
            map.findings.clone_from(&table.findings);
            // A file system made over the whole disk, or left from before it was partitioned: which of the two
            // is in use cannot be told.
            let under = identify(&*disk).ok();
            let under = under.filter(|content| content.is_mapped());
            let under =
                under.map(|content| format!("the disk is partitioned but also starts as {}", content.name()));
            for part in table.partitions.iter().filter(|part| !part.kind.is_extended()) {
                let doubt = table.doubt(part.number).or(under.as_deref());
                map.add(&disk, Some(part.number), part.extent, doubt, &mut pending)?;
            }
            map.table = Some(table);
        }
        Ok(None) => map.add(&disk, None, whole, None, &mut pending)?,
        Err(error) if error.kind() == Kind::Image => {
            let reason = format!("{}: {}", error.what(), error.why());
            map.findings.push(Finding { partition: None, what: reason.clone() });
            let usage = Usage::Whole { reason };
            map.volumes.push(Volume {
                partition: None,
                logical: None,
                extent: whole,
                content: Content::Unknown,
                usage,
            });
        }
        Err(error) => return Err(error),
    }
    map.add_groups(&disk, pending)?;
    map.maps.sort_by_key(|(extent, _)| *extent);
    Ok(map)
}

impl UsedMap {
    /// Adds a volume: mapped if it can be, whole if not.
    fn add(
        &mut self,
        disk: &Arc<dyn ReadAt>,
        partition: Option<u32>,
        extent: Extent,
        doubt: Option<&str>,
        pending: &mut Pending,
    ) -> Result<()> {
        let name = match partition {
            Some(number) => format!("{} partition {number}", disk.name()),
            None => disk.name(),
        };
        let window = Window::new(Arc::clone(disk), extent, name);
        let (content, map) = look(window, doubt, &mut pending.groups)?;
        if matches!(content, Content::Lvm(_)) {
            let member = Member { extent, doubt: doubt.map(str::to_owned) };
            pending.members.push((self.volumes.len(), member));
        }
        let usage = self.keep(extent, map);
        self.volumes.push(Volume { partition, logical: None, extent, content, usage });
        Ok(())
    }

    /// Keeps the map of a volume, if it has one.
    fn keep(&mut self, extent: Extent, map: Mapped) -> Usage {
        match map {
            Ok(map) => {
                let used_bytes = extent.len() - map.len() + map.used_bytes();
                self.maps.push((extent, map));
                Usage::Mapped { used_bytes }
            }
            Err(reason) => Usage::Whole { reason },
        }
    }

    /// Maps the physical volumes, which were added as volumes without a map, and adds the logical ones on them.
    fn add_groups(&mut self, disk: &Arc<dyn ReadAt>, mut pending: Pending) -> Result<()> {
        let (places, members): (Vec<usize>, Vec<Member>) =
            std::mem::take(&mut pending.members).into_iter().unzip();
        let assembly = lvm::assemble(disk, &members)?;
        let mut maps: Vec<(usize, Mapped)> =
            assembly.whole.into_iter().map(|(member, why)| (member, Err(why))).collect();
        for group in &assembly.groups {
            let mapped = self.add_logical(disk, group, &mut pending)?;
            let pvs = group.members();
            maps.extend(pvs.map(|(member, pv)| (member, Ok(Box::new(PvMap::new(group, pv, &mapped)) as _))));
        }
        for (member, map) in maps {
            let (Some(place), Some(member)) = (places.get(member), members.get(member)) else { continue };
            let usage = self.keep(member.extent, map);
            if let Some(volume) = self.volumes.get_mut(*place) {
                volume.usage = usage;
            }
        }
        Ok(())
    }

    /// Adds the logical volumes of a group, and returns those with a map by their index in it.
    fn add_logical(
        &mut self,
        disk: &Arc<dyn ReadAt>,
        group: &Group,
        pending: &mut Pending,
    ) -> Result<BTreeMap<usize, Arc<MappedVolume>>> {
        let mut mapped = BTreeMap::new();
        for found in group.volumes(disk) {
            let (content, map) = look_into(&found, pending)?;
            let map = map.and_then(|map| MappedVolume::new(&found, map));
            let usage = match map {
                Ok(map) => {
                    let used_bytes = map.used_bytes();
                    mapped.insert(found.index, Arc::new(map));
                    Usage::Mapped { used_bytes }
                }
                Err(reason) => Usage::Whole { reason },
            };
            let (logical, extent) = (Some(found.full_name()), Extent::new(0, found.size));
            self.volumes.push(Volume { partition: None, logical, extent, content, usage });
        }
        Ok(mapped)
    }

    /// The disk's partition table, if it has one.
    pub fn table(&self) -> Option<&Table> {
        self.table.as_ref()
    }

    /// The volumes in the order of their partitions' numbers, a disk without partitions being one volume; then the
    /// logical volumes on them.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// What is wrong with the partition table, and the block groups copied whole because they contradict
    /// themselves, as far as the map was read.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = self.findings.clone();
        for (extent, map) in &self.maps {
            let volume = self.own_volumes().find(|volume| volume.extent == *extent);
            let partition = volume.and_then(|volume| volume.partition);
            findings.extend(map.findings().into_iter().map(|what| Finding { partition, what }));
        }
        findings
    }

    /// About how many bytes are in use, by the file systems' own summaries: reads nothing. [`count_used`] reads
    /// the map and is exact.
    pub fn used_bytes(&self) -> u64 {
        let unused = self.own_volumes().map(|volume| match volume.usage {
            Usage::Mapped { used_bytes } => volume.extent.len().saturating_sub(used_bytes),
            Usage::Whole { .. } => 0,
        });
        self.size.saturating_sub(unused.sum())
    }

    /// The volumes that are parts of the disk, and not of other volumes.
    fn own_volumes(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.iter().filter(|volume| volume.logical.is_none())
    }
}

/// Says what a volume holds, and maps it if it can be and there is no doubt.
fn look(volume: Window<Arc<dyn ReadAt>>, doubt: Option<&str>, budget: &mut u64) -> Result<(Content, Mapped)> {
    match identify(&volume) {
        Ok(content) => {
            let map = match doubt {
                Some(doubt) => Err(doubt.to_owned()),
                None => map_of(&content, volume, budget)?,
            };
            Ok((content, map))
        }
        Err(error) if error.retry() == Retry::Yes => Err(error),
        Err(error) => Ok((Content::Unknown, Err(format!("{}: {}", error.what(), error.why())))),
    }
}

/// The same for a logical volume. Such a volume may be a virtual machine's disk: a file system below a partition table
/// is a left-over.
fn look_into(found: &Found, pending: &mut Pending) -> Result<(Content, Mapped)> {
    let volume: Arc<dyn ReadAt> = match &found.volume {
        Ok(volume) => Arc::<lvm::LogicalVolume>::clone(volume),
        Err(why) => return Ok((Content::Unknown, Err(why.clone()))),
    };
    let mut doubt = match read_table(&volume) {
        Ok(None) => None,
        Ok(Some(_)) => Some("it is a disk with partitions of its own".to_owned()),
        Err(error) if error.retry() == Retry::Yes => return Err(error),
        Err(error) => Some(format!("{}: {}", error.what(), error.why())),
    };
    if pending.logical == 0 {
        doubt.get_or_insert_with(|| {
            format!("the disk has more than {MAX_LOGICAL} logical volumes with a map")
        });
    }
    let (whole, name) = (Extent::new(0, found.size), volume.name());
    let (content, map) = look(Window::new(volume, whole, name), doubt.as_deref(), &mut pending.groups)?;
    pending.logical -= usize::from(map.is_ok());
    Ok((content, map))
}

/// The map of a volume, or why it is copied whole.
fn map_of(content: &Content, volume: Window<Arc<dyn ReadAt>>, budget: &mut u64) -> Result<Mapped> {
    let map: std::result::Result<Box<dyn VolumeMap>, Stop> = match content {
        Content::Ext(_) => ExtMap::open(volume, *budget).map(|ext| {
            *budget -= ext.groups();
            Box::new(ext) as _
        }),
        Content::Xfs(_) => XfsMap::open(volume, *budget).map(|xfs| {
            *budget -= xfs.groups();
            Box::new(xfs) as _
        }),
        Content::Btrfs(_) => BtrfsMap::open(volume, *budget).map(|btrfs| {
            *budget -= btrfs.chunks();
            Box::new(btrfs) as _
        }),
        Content::Fat(_) => fat::open_fat(volume).map(|map| Box::new(map) as _),
        Content::Exfat(_) => fat::open_exfat(volume).map(|map| Box::new(map) as _),
        Content::Ntfs(_) => NtfsMap::open(volume).map(|map| Box::new(map) as _),
        Content::Swap(info) => swap::SwapMap::of(info, volume.size()).map(|map| Box::new(map) as _),
        other => Err(format!("no used map is known for it ({})", other.name()).into()),
    };
    match map {
        Ok(map) => Ok(Ok(map)),
        Err(Stop::Whole(reason)) => Ok(Err(reason)),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// The first run of used bytes of a volume of `size` bytes at or after `from`.
pub(super) fn next_used(map: &dyn VolumeMap, from: u64, size: u64) -> Result<Option<Extent>> {
    let known = if from < map.len() { map.next_used(from)? } else { None };
    let beyond = Extent::new(from.max(map.len()), size);
    Ok(known.or(Some(beyond).filter(|run| !run.is_empty())))
}

impl Extents for UsedMap {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        let mut from = from;
        while from < self.size {
            let next = self.maps.partition_point(|(extent, _)| extent.end <= from);
            let Some((extent, map)) = self.maps.get(next) else {
                return Ok(Some(Extent::new(from, self.size)));
            };
            if from < extent.start {
                return Ok(Some(Extent::new(from, extent.start)));
            }
            if let Some(run) = next_used(&**map, from - extent.start, extent.len())? {
                return Ok(Some(run.shifted(extent.start)));
            }
            from = extent.end;
        }
        Ok(None)
    }
}

/// Exactly how many bytes of `within` are in a set, by walking it.
pub fn count_used(set: &dyn Extents, within: Extent) -> Result<u64> {
    let (mut from, mut total) = (within.start, 0);
    while let Some(run) = set.next_extent(from)? {
        let run = run.intersect(within);
        if run.is_empty() {
            break;
        }
        total += run.len();
        from = run.end;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::WriteAt;
    use crate::io::fake::{FaultyDisk, MemoryDisk};
    use crate::unit::extents::collect;

    const SIZE: u64 = 8 << 20;

    fn swap_disk() -> MemoryDisk {
        let disk = MemoryDisk::sparse(SIZE);
        // Version 1, the last page, no bad pages.
        disk.write_at(&[1, 0, 0, 0, 0xff, 3, 0, 0], 1024).unwrap();
        disk.write_at(b"SWAPSPACE2", 4086).unwrap();
        disk
    }

    #[test]
    fn swap_is_its_header_and_what_lies_beyond_it() {
        let map = used_map(Arc::new(swap_disk())).unwrap();
        let used = collect(&map, Extent::new(0, SIZE)).unwrap();
        let expected = [Extent::new(0, 4096), Extent::new(1024 * 4096, SIZE)];
        assert_eq!(used.iter().collect::<Vec<_>>(), expected);
        assert_eq!(map.used_bytes(), used.bytes());
        assert_eq!(map.next_extent(5000).unwrap(), Some(expected[1]));
        assert_eq!(map.next_extent(SIZE).unwrap(), None);
    }

    #[test]
    fn a_swap_area_longer_than_its_partition_is_copied_whole() {
        let disk = swap_disk();
        disk.write_at(&[0xff, 0xff], 1028).unwrap();
        assert_eq!(used_map(Arc::new(disk)).unwrap().used_bytes(), SIZE);
    }

    #[test]
    fn a_volume_that_cannot_be_read_is_copied_whole() {
        // The second half of a damaged disk's identification fails, its partition table does not.
        let disk = FaultyDisk::new(swap_disk(), vec![Extent::new(SIZE - 512, SIZE)]);
        let map = used_map(Arc::new(disk)).unwrap();
        assert_eq!(map.used_bytes(), SIZE);
        let Usage::Whole { reason } = &map.volumes()[0].usage else { panic!("mapped") };
        assert!(reason.contains("cannot read"), "{reason}");
    }
}
