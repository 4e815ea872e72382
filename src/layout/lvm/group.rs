//! A volume group by its metadata text: only what can be understood for sure, and whether it fits together.

use std::collections::{BTreeMap, BTreeSet};

use super::text::{Section, Value, is_name};
use super::volume::Stripes;
use crate::unit::Extent;

/// Bytes in a sector: what sizes in a text are counted in.
const SECTOR: u64 = 512;
/// Most stripes of a segment, as in LVM.
const MAX_STRIPES: usize = 128;
/// Lengths in bytes stay below it, so that sums of a few do not overflow.
const MAX_BYTES: u64 = 1 << 60;

/// A volume group.
#[derive(Debug, PartialEq)]
pub(super) struct VolumeGroup {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub id: String,
    /// Which generation of the metadata this is.
    pub seqno: u64,
    /// Bytes in an extent.
    pub extent_size: u64,
    /// Its physical volumes.
    pub pvs: Vec<PhysicalVolume>,
    /// Its logical volumes, hidden ones included, in the order of the text.
    pub lvs: Vec<LogicalVolume>,
    /// The physical extents that belong to a logical volume: by physical volume and place, without overlaps.
    pub allocated: Vec<Area>,
}

/// A physical volume, here or on another disk.
#[derive(Debug, PartialEq)]
pub(super) struct PhysicalVolume {
    /// Its UUID.
    pub id: String,
    /// Where its first extent begins, in bytes.
    pub start: u64,
    /// Number of its extents.
    pub extents: u64,
}

/// A logical volume.
#[derive(Debug, PartialEq)]
pub(super) struct LogicalVolume {
    /// Its name in the group.
    pub name: String,
    /// Whether it is there for users, and not a part of another one.
    pub visible: bool,
    /// Its length in extents.
    pub extents: u64,
    /// Its segments from the first extent to the last; none when there is a doubt.
    pub segments: Vec<Segment>,
    /// Why its bytes are not simply those of its segments.
    pub doubt: Option<String>,
}

/// A run of a logical volume's extents, spread over one or more areas of the same length.
#[derive(Debug, PartialEq)]
pub(super) struct Segment {
    /// Its first extent in the logical volume.
    pub start: u64,
    /// Its length in extents of the logical volume.
    pub count: u64,
    /// How many bytes go to one area before the next one's turn; 0 when there is one area only.
    pub stripe_size: u64,
    /// Its areas in their turn.
    pub areas: Vec<Area>,
}

/// Extents of a physical volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Area {
    /// Index of the physical volume in its group.
    pub pv: usize,
    /// The first extent.
    pub start: u64,
    /// Number of extents.
    pub count: u64,
}

/// The names a text uses.
#[derive(Default)]
struct Names<'a> {
    /// Physical volumes and their indices.
    pvs: BTreeMap<&'a str, usize>,
    /// What segments that are not striped name: the parts of a volume, or what it is a snapshot of.
    parts: BTreeSet<&'a str>,
    /// What striped segments lie on that is no physical volume.
    bases: BTreeSet<&'a str>,
}

type Parsed<T> = Result<T, String>;

fn check(holds: bool, why: impl FnOnce() -> String) -> Parsed<()> {
    if holds { Ok(()) } else { Err(why()) }
}

/// The name of the group whose metadata `text` seems to be.
pub(super) fn name_of(text: &str) -> Option<&str> {
    let end = text.bytes().position(|byte| !is_name(byte))?;
    text.get(..end).filter(|name| is_valid_name(name))
}

impl Segment {
    /// How its bytes go round its areas, in a group whose extents have `extent_size` bytes.
    pub fn stripes(&self, extent_size: u64) -> Stripes {
        match &self.areas[..] {
            [only] => Stripes { count: 1, size: only.count * extent_size },
            areas => Stripes { count: areas.len() as u64, size: self.stripe_size },
        }
    }
}

impl VolumeGroup {
    /// Where the extents of one of its physical volumes are in it, in bytes.
    pub fn extents_of(&self, pv: &PhysicalVolume) -> Extent {
        Extent::at(pv.start, pv.extents * self.extent_size)
    }

    /// The number of parts that take memory.
    pub fn parts(&self) -> usize {
        self.pvs.len() + self.lvs.len() + self.allocated.len()
    }

    /// Reads a metadata text. An error says why the group cannot be trusted.
    pub fn parse(text: &str) -> Parsed<VolumeGroup> {
        let top = Section::parse(text)?;
        check(top.string("contents") == Ok("Text Format Volume Group"), || {
            "its metadata is no group's".into()
        })?;
        check(top.number("version") == Ok(1), || "its metadata text's version is not known".into())?;
        let mut groups = top.sections();
        let (Some((name, body)), None) = (groups.next(), groups.next()) else {
            return Err("its metadata text is not that of one group".into());
        };
        VolumeGroup::read(name, body).map_err(|why| format!("volume group {name}: {why}"))
    }

    fn read(name: &str, body: &Section<'_>) -> Parsed<VolumeGroup> {
        check(is_valid_name(name), || "its name is not valid".into())?;
        check(matches!(body.get("format"), None | Some(Value::Text("lvm2"))), || {
            "its format is not lvm2".into()
        })?;
        check(matches!(body.get("lock_type"), None | Some(Value::Text("none"))), || {
            "it is shared with other machines".into()
        })?;
        only(body, "status", &["RESIZEABLE", "READ", "WRITE"])?;
        only(body, "flags", &["NOAUTOACTIVATE"])?;
        let sectors = body.number("extent_size")?;
        // LVM makes powers of two and multiples of 128 KiB.
        let extent_size = bytes(sectors, SECTOR)
            .filter(|size| *size > 0 && (sectors.is_power_of_two() || sectors.is_multiple_of(256)))
            .ok_or_else(|| format!("its extent_size is {sectors}"))?;
        let mut group = VolumeGroup {
            name: name.to_owned(),
            id: uuid(body)?,
            seqno: body.number("seqno")?,
            extent_size,
            pvs: Vec::new(),
            lvs: Vec::new(),
            allocated: Vec::new(),
        };
        let mut names = Names::default();
        for (kind, section) in body.sections() {
            match kind {
                "physical_volumes" => {
                    for (name, body) in section.sections() {
                        let pv = group.pv(body).map_err(|why| format!("physical volume {name}: {why}"))?;
                        names.pvs.insert(name, group.pvs.len());
                        group.pvs.push(pv);
                    }
                }
                "logical_volumes" | "historical_logical_volumes" => {}
                _ => return Err(format!("its section {kind} is not known")),
            }
        }
        let ids: BTreeSet<_> = group.pvs.iter().map(|pv| &pv.id).collect();
        check(ids.len() == group.pvs.len(), || "two physical volumes have the same UUID".into())?;
        if let Some(Value::Section(lvs)) = body.get("logical_volumes") {
            group.read_lvs(lvs, &mut names)?;
        }
        group.check_overlaps()?;
        Ok(group)
    }

    fn pv(&self, body: &Section<'_>) -> Parsed<PhysicalVolume> {
        only(body, "status", &["ALLOCATABLE"])?;
        only(body, "flags", &[])?;
        let (start, extents) = (body.number("pe_start")?, body.number("pe_count")?);
        let start = bytes(start, SECTOR).ok_or_else(|| format!("its pe_start is {start}"))?;
        check(bytes(extents, self.extent_size).is_some(), || format!("its pe_count is {extents}"))?;
        Ok(PhysicalVolume { id: uuid(body)?, start, extents })
    }

    fn read_lvs<'a>(&mut self, lvs: &Section<'a>, names: &mut Names<'a>) -> Parsed<()> {
        for (name, body) in lvs.sections() {
            check(is_valid_name(name), || format!("logical volume {name:?}: its name is not valid"))?;
            check(!names.pvs.contains_key(name), || {
                format!("a physical and a logical volume are called {name}")
            })?;
            let lv = self.read_lv(name, body, names);
            self.lvs.push(lv.map_err(|why| format!("logical volume {name}: {why}"))?);
        }
        if let Some(part) = names.parts.iter().find(|part| names.pvs.contains_key(*part)) {
            return Err(format!("a volume that is not striped lies on {part} itself"));
        }
        let mut bases = names.bases.clone();
        for lv in &mut self.lvs {
            if bases.remove(&*lv.name) || names.parts.contains(&*lv.name) {
                lv.doubt.get_or_insert_with(|| "another logical volume refers to it".into());
                lv.segments = Vec::new();
            }
        }
        bases
            .first()
            .map_or(Ok(()), |base| Err(format!("a segment lies on {base}, which is not in the group")))
    }

    fn read_lv<'a>(
        &mut self,
        name: &str,
        body: &Section<'a>,
        names: &mut Names<'a>,
    ) -> Parsed<LogicalVolume> {
        let status = body.strings("status")?;
        check(!status.iter().any(|word| ["PVMOVE", "LOCKED"].contains(word)), || "it is being moved".into())?;
        let mut lv = LogicalVolume {
            name: name.to_owned(),
            visible: status.contains(&"VISIBLE"),
            extents: 0,
            segments: Vec::new(),
            doubt: only(body, "status", &["READ", "WRITE", "VISIBLE", "FIXED_MINOR"])
                .and(only(body, "flags", &["ACTIVATION_SKIP", "NOAUTOACTIVATE"]))
                .err(),
        };
        let count = body.number("segment_count")?;
        let segments: BTreeMap<&str, &Section<'a>> = body.sections().collect();
        check(segments.len() as u64 == count, || format!("it has not {count} segments"))?;
        for number in 1..=count {
            let name = format!("segment{number}");
            let segment = segments.get(&*name).ok_or_else(|| format!("it has no {name}"))?;
            let read = self.read_segment(segment, &mut lv, names);
            read.map_err(|why| format!("{name}: {why}"))?;
        }
        check(bytes(lv.extents, self.extent_size).is_some(), || format!("it has {} extents", lv.extents))?;
        if lv.segments.is_empty() {
            lv.doubt.get_or_insert_with(|| "it has no segments".into());
        }
        if lv.doubt.is_some() {
            lv.segments = Vec::new();
        }
        Ok(lv)
    }

    fn read_segment<'a>(
        &mut self,
        body: &Section<'a>,
        lv: &mut LogicalVolume,
        names: &mut Names<'a>,
    ) -> Parsed<()> {
        let (start, count) = (body.number("start_extent")?, body.number("extent_count")?);
        check(start == lv.extents, || format!("its start_extent is {start}, not {}", lv.extents))?;
        check((1..MAX_BYTES).contains(&count), || format!("its extent_count is {count}"))?;
        // Bounded, since each segment takes bytes of the text.
        lv.extents = start.saturating_add(count);
        let kind = body.string("type")?;
        if kind != "striped" {
            let base = kind.split_once('+').map_or(kind, |(base, _)| base);
            check(OPAQUE.contains(&base) || base.starts_with("raid"), || {
                format!("its type {kind} is not known")
            })?;
            lv.doubt.get_or_insert_with(|| format!("it is of type {kind}"));
            // A snapshot is told by a volume of its own, which is no volume for users.
            lv.visible &= kind != "snapshot";
            let values = body.0.iter().filter(|(name, _)| *name != "tags");
            names.parts.extend(values.flat_map(|(_, value)| names_in(value)));
            return Ok(());
        }
        let stripe_count = body.number("stripe_count")?;
        let Some(Value::List(list)) = body.get("stripes") else {
            return Err("its stripes are no list".into());
        };
        let (pairs, rest) = list.as_chunks::<2>();
        let fits = pairs.len() as u64 == stripe_count
            && rest.is_empty()
            && (1..=MAX_STRIPES).contains(&pairs.len())
            && count.is_multiple_of(stripe_count);
        check(fits, || format!("its {count} extents do not fit its {stripe_count} stripes"))?;
        let mut areas = Vec::new();
        for pair in pairs {
            let [Value::Text(name), Value::Number(first)] = pair else {
                return Err("its stripes are no places".into());
            };
            let Some(pv) = names.pvs.get(name) else {
                names.bases.insert(name);
                lv.doubt.get_or_insert_with(|| format!("it is built on {name}"));
                continue;
            };
            let first = u64::try_from(*first).map_err(|_| format!("a stripe begins at extent {first}"))?;
            areas.push(Area { pv: *pv, start: first, count: count / stripe_count });
        }
        self.allocated.extend(&areas);
        let mut stripe_size = 0;
        if stripe_count > 1 {
            let sectors = body.number("stripe_size")?;
            stripe_size = sectors.saturating_mul(SECTOR);
            let area = (count / stripe_count).saturating_mul(self.extent_size);
            if !sectors.is_power_of_two() || !area.is_multiple_of(stripe_size) {
                lv.doubt.get_or_insert_with(|| format!("its stripe_size is {sectors}"));
            }
        }
        if let Some((name, _)) = body.0.iter().find(|(name, _)| !STRIPED.contains(name)) {
            lv.doubt.get_or_insert_with(|| format!("a segment's {name} is not known"));
        }
        lv.segments.push(Segment { start, count, stripe_size, areas });
        Ok(())
    }

    /// Sorts the areas; fails when two share an extent, or one leaves its physical volume.
    fn check_overlaps(&mut self) -> Parsed<()> {
        self.allocated.sort_unstable();
        let end = |area: &Area| area.start.saturating_add(area.count);
        for area in &self.allocated {
            let extents = self.pvs.get(area.pv).map_or(0, |pv| pv.extents);
            check(end(area) <= extents, || format!("a segment ends at extent {} of {extents}", end(area)))?;
        }
        for pair in self.allocated.windows(2) {
            let [first, second] = pair else { continue };
            check(first.pv != second.pv || end(first) <= second.start, || {
                format!("two segments share extent {}", second.start)
            })?;
        }
        Ok(())
    }
}

/// Kinds of segments, other than `raid*`, that lie on logical volumes only, and are not read.
const OPAQUE: [&str; 12] = [
    "mirror",
    "snapshot",
    "thin",
    "thin-pool",
    "cache",
    "cache-pool",
    "writecache",
    "integrity",
    "vdo",
    "vdo-pool",
    "error",
    "zero",
];
/// What a striped segment may say.
const STRIPED: [&str; 7] =
    ["start_extent", "extent_count", "type", "stripe_count", "stripe_size", "stripes", "tags"];

/// Fails when the list `name` of `body` has a word that is not in `known`.
fn only(body: &Section<'_>, name: &str, known: &[&str]) -> Parsed<()> {
    match body.strings(name)?.iter().find(|word| !known.contains(word)) {
        Some(word) => Err(format!("its {name} is {word}")),
        None => Ok(()),
    }
}

/// The UUID of a group or physical volume.
fn uuid(body: &Section<'_>) -> Parsed<String> {
    let id = body.string("id")?;
    check(id.len() == 38, || "its id is no UUID".into())?;
    Ok(id.to_owned())
}

/// `count` units of `unit` bytes, if that many can be.
fn bytes(count: u64, unit: u64) -> Option<u64> {
    count.checked_mul(unit).filter(|bytes| *bytes < MAX_BYTES)
}

/// Every string in a value.
fn names_in<'a>(value: &Value<'a>) -> Vec<&'a str> {
    match value {
        Value::Text(text) => vec![text],
        Value::List(list) => list.iter().flat_map(names_in).collect(),
        Value::Section(section) => section.0.iter().flat_map(|(_, value)| names_in(value)).collect(),
        Value::Number(_) => Vec::new(),
    }
}

/// Whether LVM lets a group or volume have this name.
fn is_valid_name(name: &str) -> bool {
    name.bytes().all(is_name)
        && (1..128).contains(&name.len())
        && !name.starts_with('-')
        && ![".", ".."].contains(&name)
}
