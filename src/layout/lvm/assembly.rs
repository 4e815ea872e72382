//! The physical volumes of a disk put together to volume groups: which copy of the metadata holds, and whether the
//! volumes are what it says.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Group;
use super::group::{PhysicalVolume, VolumeGroup};
use super::label::{self, Header};
use crate::error::Result;
use crate::io::{ReadAt, Window, read_vec};
use crate::layout::{Step, Stop, require};
use crate::unit::{Extent, to_usize};

/// Most physical volumes of a disk whose metadata is read: up to 4 MiB each.
const MAX_PVS: usize = 64;
/// Most metadata areas of a physical volume, as in LVM.
const MAX_AREAS: usize = 2;
/// Most parts of all groups of a disk together; each takes up to 200 bytes in memory.
const MAX_PARTS: usize = 1 << 16;

/// A partition or disk that holds a physical volume.
pub(in crate::layout) struct Member {
    /// Where it is on the disk, in bytes.
    pub extent: Extent,
    /// Why its content cannot be trusted.
    pub doubt: Option<String>,
}

/// The physical volumes of a disk, put together.
pub(in crate::layout) struct Assembly {
    /// The groups that can be trusted.
    pub groups: Vec<Group>,
    /// Every member that is in none of them, by its index, and why it is copied whole.
    pub whole: Vec<(usize, String)>,
}

/// The newest metadata of a group.
struct Newest {
    vg: VolumeGroup,
    doubt: Option<String>,
}

/// A physical volume while the groups are put together.
struct Pv {
    header: Option<Header>,
    size: u64,
    /// UUID of the group that its own metadata describes.
    group: Option<String>,
    doubt: Option<String>,
}

/// Where the physical volumes with one UUID are.
#[derive(Default)]
struct Here {
    members: Vec<usize>,
    /// How many groups have it.
    groups: usize,
}

/// Reads the metadata of every member and puts the groups together. Fails only in ways that may pass.
pub(in crate::layout) fn assemble(disk: &Arc<dyn ReadAt>, members: &[Member]) -> Result<Assembly> {
    let mut newest = Vec::new();
    let mut pvs = Vec::new();
    for member in members {
        let volume = Window::new(Arc::clone(disk), member.extent, disk.name());
        let mut pv = Pv { header: None, size: volume.size(), group: None, doubt: member.doubt.clone() };
        let read = match pvs.len() {
            0..MAX_PVS => pv.read(&volume, &mut newest),
            _ => Err(format!("the disk has more than {MAX_PVS} physical volumes").into()),
        };
        match read {
            Ok(()) => {}
            Err(Stop::Whole(why)) => pv.doubt = pv.doubt.or(Some(why)),
            Err(Stop::Failed(error)) => return Err(error),
        }
        pvs.push(pv);
    }
    let mut here: BTreeMap<String, Here> = BTreeMap::new();
    for (i, pv) in pvs.iter().enumerate() {
        if let Some(header) = &pv.header {
            here.entry(header.uuid.clone()).or_default().members.push(i);
        }
    }
    for known in newest.iter().flat_map(|newest| &newest.vg.pvs) {
        if let Some(here) = here.get_mut(&known.id) {
            here.groups += 1;
        }
    }

    // A physical volume that cannot be read may hold newer metadata of any group that does not name it.
    let is_named = |header: &Header| here.get(&header.uuid).is_some_and(|here| here.groups > 0);
    let mut strays = pvs.iter().filter(|pv| !pv.header.as_ref().is_some_and(is_named));
    let stray = strays.find_map(|pv| pv.doubt.as_ref());
    let stray = stray.map(|why| format!("there may be newer metadata of its group: {why}"));

    let mut groups = Vec::new();
    // Why a member is copied whole, unless a group has it.
    let mut reasons: Vec<Option<String>> = Vec::new();
    for pv in &pvs {
        let none = || "it belongs to no volume group on this disk".to_owned();
        reasons.push(Some(pv.doubt.clone().unwrap_or_else(none)));
    }
    for Newest { vg, mut doubt } in newest {
        let found: Vec<Option<&Here>> = vg.pvs.iter().map(|known| here.get(&known.id)).collect();
        let mut own: Vec<usize> = Vec::new();
        for (known, found) in vg.pvs.iter().zip(&found) {
            let Some(found) = found else { continue };
            own.extend(&found.members);
            let misfits =
                found.members.iter().filter_map(|i| pvs.get(*i)).find_map(|pv| pv.misfit(&vg, known));
            let twice = (found.members.len() > 1 || found.groups > 1)
                .then(|| format!("the physical volume {} is there more than once", known.id));
            doubt = doubt.or(twice).or(misfits);
        }
        doubt = doubt.or_else(|| stray.clone());
        for i in &own {
            if let Some(reason) = reasons.get_mut(*i) {
                reason.clone_from(&doubt);
            }
        }
        if doubt.is_none() && !own.is_empty() {
            let place = |found: &Option<&Here>| {
                let i = *found.as_ref()?.members.first()?;
                Some((i, members.get(i)?.extent))
            };
            let places = found.iter().map(place).collect();
            groups.push(Group { vg, places });
        }
    }
    let whole = reasons.into_iter().enumerate().filter_map(|(i, reason)| Some((i, reason?))).collect();
    Ok(Assembly { groups, whole })
}

impl Pv {
    /// Reads the header and every copy of the metadata.
    fn read(&mut self, volume: &dyn ReadAt, newest: &mut Vec<Newest>) -> Step<()> {
        let head = read_vec(volume, 0, to_usize(volume.size().min(4096)))?;
        let header =
            self.header.insert(label::parse(&head).ok_or_else(|| "its LVM label is gone".to_owned())??);
        require(header.size <= self.size, || format!("its LVM header says it has {} bytes", header.size))?;
        require(header.metadata.len() <= MAX_AREAS, || {
            format!("it has {} metadata areas", header.metadata.len())
        })?;
        // A copy that cannot be read may be the newest: the rest is still read, so that its group is known.
        let mut read = Ok(());
        for area in &header.metadata {
            let copy = label::read_area(volume, *area)
                .and_then(|text| Ok(text.as_deref().map(VolumeGroup::parse).transpose()?));
            match copy {
                Ok(None) => {}
                Ok(Some(vg)) => {
                    require(self.group.as_ref().is_none_or(|id| *id == vg.id), || {
                        "its metadata areas describe different groups".into()
                    })?;
                    self.group = Some(vg.id.clone());
                    add(newest, vg)?;
                }
                Err(Stop::Whole(why)) => read = Err(Stop::Whole(why)),
                Err(failed) => return Err(failed),
            }
        }
        read
    }

    /// Why this is not the physical volume that its group knows as `known`.
    fn misfit(&self, vg: &VolumeGroup, known: &PhysicalVolume) -> Option<String> {
        let header = self.header.as_ref()?;
        let extents = vg.extents_of(known);
        let label = Extent::new(0, label::LABEL_SPACE);
        let mut own = header.metadata.iter().chain(&header.boot).chain([&label]);
        let covered = own.any(|area| !area.intersect(extents).is_empty());
        let wrong = match () {
            () if self.doubt.is_some() => return self.doubt.clone(),
            () if self.group.as_ref().is_some_and(|id| *id != vg.id) => "it has another group's metadata",
            () if header.data != extents.start => "its header has them elsewhere",
            () if extents.end > self.size => "they leave it",
            () if covered => "they cover its label or metadata",
            () => return None,
        };
        Some(format!("the extents of physical volume {} are in doubt: {wrong}", known.id))
    }
}

/// Takes a copy of a group's metadata into account.
fn add(newest: &mut Vec<Newest>, vg: VolumeGroup) -> Step<()> {
    let known: usize = newest.iter().map(|known| known.vg.parts()).sum();
    match newest.iter_mut().find(|known| known.vg.id == vg.id) {
        Some(known) if vg.seqno < known.vg.seqno => {}
        Some(known) if vg.seqno == known.vg.seqno => {
            if vg != known.vg {
                let why = || format!("there are two different metadata texts of generation {}", vg.seqno);
                known.doubt.get_or_insert_with(why);
            }
        }
        same => {
            require(known + vg.parts() <= MAX_PARTS, || {
                "the disk's volume groups have too many parts".into()
            })?;
            match same {
                Some(known) => known.vg = vg,
                None => newest.push(Newest { vg, doubt: None }),
            }
        }
    }
    Ok(())
}
