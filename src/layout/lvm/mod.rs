//! LVM2: the physical volumes of a disk put together to the logical volumes on it. Linear and striped ones are read;
//! every other kind is known by name only.

mod assembly;
mod group;
mod label;
mod map;
mod text;
mod volume;

use std::sync::Arc;

use super::{Content, Partition, Stop, identify, mirrors, read_table};
use crate::error::{Result, Retry};
use crate::io::{ReadAt, Window};
use crate::unit::Extent;
use group::VolumeGroup;
use volume::Run;

pub(super) use assembly::{Member, assemble};
pub(super) use map::{MappedVolume, PvMap};
pub use volume::LogicalVolume;

/// A physical volume of LVM2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PvInfo {
    /// UUID as LVM prints it; none when its label is damaged.
    pub uuid: Option<String>,
    /// The name of its volume group, if its own metadata tells.
    pub group: Option<String>,
}

/// A volume group as far as it is on a disk.
pub(super) struct Group {
    vg: VolumeGroup,
    /// Where each of its physical volumes is: the member's index and extent; none when it is not on the disk.
    places: Vec<Option<(usize, Extent)>>,
}

/// A logical volume for users, found on a disk.
pub struct Found {
    /// The name of its volume group.
    pub group: String,
    /// Its name in the group.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its bytes, or why they cannot be read.
    pub volume: std::result::Result<Arc<LogicalVolume>, String>,
    /// Its index in the group.
    pub(super) index: usize,
}

impl Found {
    /// Its name with its group's: `group/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }
}

/// Recognises a physical volume by `head`, the first 2 KiB or more of `volume`. Fails only in ways that may pass.
pub(super) fn identify_pv(volume: &dyn ReadAt, head: &[u8]) -> Result<Option<PvInfo>> {
    let Some(header) = label::parse(head) else { return Ok(None) };
    let mut info = PvInfo { uuid: None, group: None };
    let Ok(header) = header else { return Ok(Some(info)) };
    for area in header.metadata.iter().take(2) {
        match label::read_area(volume, *area) {
            Ok(Some(text)) => info.group = group::name_of(&text).map(str::to_owned),
            Ok(None) | Err(Stop::Whole(_)) => {}
            Err(Stop::Failed(error)) => return Err(error),
        }
    }
    info.uuid = Some(header.uuid);
    Ok(Some(info))
}

/// The logical volumes for users on a disk, on its halves of mirrors too, group by group. Those whose group cannot be trusted are not listed. Fails
/// as the disk fails, and with `Kind::Image` when its partition table is damaged.
pub fn logical_volumes(disk: &Arc<dyn ReadAt>) -> Result<Vec<Found>> {
    let volumes: Vec<Member> = match read_table(disk)? {
        None => vec![Member { extent: Extent::new(0, disk.size()), doubt: None }],
        Some(table) => {
            let mirrors = mirrors(disk, &table)?;
            let parts = table.partitions.iter().filter(|part| !part.kind.is_extended());
            let doubt = |part: &Partition| table.doubt(part.number).map(str::to_owned);
            let extent = |part: &Partition| {
                let mirror = mirrors.iter().find(|(number, _)| *number == part.number);
                mirror.map_or(part.extent, |(_, mirror)| mirror.data)
            };
            parts.map(|part| Member { extent: extent(part), doubt: doubt(part) }).collect()
        }
    };
    let mut members = Vec::new();
    for volume in volumes {
        match identify(&Window::new(disk, volume.extent, disk.name())) {
            Ok(Content::Lvm(_)) => members.push(volume),
            Err(error) if error.retry() == Retry::Yes => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
    let assembly = assemble(disk, &members)?;
    Ok(assembly.groups.iter().flat_map(|group| group.volumes(disk)).collect())
}

impl Group {
    /// The logical volumes for users, in the order of the metadata.
    pub fn volumes(&self, disk: &Arc<dyn ReadAt>) -> Vec<Found> {
        let visible = self.vg.lvs.iter().enumerate().filter(|(_, lv)| lv.visible);
        let found = visible.map(|(index, lv)| Found {
            group: self.vg.name.clone(),
            name: lv.name.clone(),
            size: lv.extents * self.vg.extent_size,
            volume: self.open(disk, lv).map(Arc::new),
            index,
        });
        found.collect()
    }

    /// The members that are its physical volumes, and their indices in the group.
    pub fn members(&self) -> impl Iterator<Item = (usize, usize)> {
        let members = self.places.iter().enumerate();
        members.filter_map(|(pv, place)| place.map(|(member, _)| (member, pv)))
    }

    fn open(
        &self,
        disk: &Arc<dyn ReadAt>,
        lv: &group::LogicalVolume,
    ) -> std::result::Result<LogicalVolume, String> {
        if let Some(doubt) = &lv.doubt {
            return Err(doubt.clone());
        }
        let size = self.vg.extent_size;
        let mut runs = Vec::new();
        for segment in &lv.segments {
            let mut areas = Vec::new();
            for area in &segment.areas {
                let (Some(pv), Some(Some((_, place)))) = (self.vg.pvs.get(area.pv), self.places.get(area.pv))
                else {
                    return Err("a part of it is not on this disk".into());
                };
                areas.push(place.start + pv.start + area.start * size);
            }
            let extent = Extent::at(segment.start * size, segment.count * size);
            runs.push(Run { extent, stripes: segment.stripes(size), areas });
        }
        Ok(LogicalVolume::new(
            Arc::clone(disk),
            format!("{}/{} on {}", self.vg.name, lv.name, disk.name()),
            runs,
        ))
    }
}
