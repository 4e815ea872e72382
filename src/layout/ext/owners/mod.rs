//! Whose the blocks of an ext file system are: which of its structures, or which file, by what the inodes say. Best
//! effort, for a reader who wants to know where two disks differ; nothing is decided by it.

mod inode;
mod names;
mod tables;

use std::collections::BTreeMap;

use super::groups::{Fs, Overlay};
use super::superblock::feature;
use super::{Step, Superblock, journal, require};
use crate::io::{ReadAt, read_vec};
use crate::layout::Stop;
use crate::layout::owners::{Owner, Part, escaped};
use crate::unit::{Extent, ExtentMap, to_usize};
use inode::Maps;
use names::Finder;
use tables::Tables;

/// Most block groups: 64 TiB at the usual 128 MiB each, 16 bytes of memory each.
const MAX_GROUPS: u64 = 1 << 19;
/// Most owners told, and most pieces of what was asked about.
const MAX_OWNERS: usize = 4096;
const MAX_PIECES: usize = 16_384;
/// Most directories whose inodes are remembered, 4 bytes each.
const MAX_DIRECTORIES: usize = 1 << 22;
/// Most bytes of all paths together.
const MAX_PATHS: usize = 8 << 20;
/// Most notes.
const MAX_NOTES: usize = 8;

/// Whose the bytes are.
#[derive(Default)]
pub(in crate::layout) struct Owners {
    /// Each owner once.
    pub owners: Vec<Owner>,
    /// What was asked about, in bytes of the volume, and its owner's index.
    pub pieces: Vec<(Extent, usize)>,
    /// What could not be found out, and why.
    pub notes: Vec<String>,
}

/// What could not be found out: the first few reasons.
#[derive(Default)]
pub(super) struct Notes(Vec<String>);

impl Notes {
    pub fn add(&mut self, note: String) {
        if self.0.len() < MAX_NOTES && !self.0.contains(&note) {
            self.0.push(note);
        }
    }
}

/// What is still asked about, in blocks, and what was found.
struct Claims {
    left: ExtentMap,
    owners: Vec<Owner>,
    /// The owners that are inodes: number and part, then the index of the owner.
    inodes: BTreeMap<(u32, Part), usize>,
    /// The link count of each inode that owns something.
    links: BTreeMap<u32, u64>,
    /// Free blocks, if there are.
    free: Option<usize>,
    pieces: Vec<(Extent, usize)>,
}

impl Claims {
    fn wants(&self, blocks: Extent) -> bool {
        self.left.within(blocks).next().is_some()
    }

    fn is_full(&self) -> bool {
        self.owners.len() >= MAX_OWNERS || self.pieces.len() >= MAX_PIECES
    }

    /// Gives the blocks asked about among `blocks` to owner `index`.
    fn give(&mut self, blocks: Extent, index: usize) {
        let room = MAX_PIECES.saturating_sub(self.pieces.len());
        let parts: Vec<Extent> = self.left.within(blocks).take(room).collect();
        for part in parts {
            self.left.remove(part);
            self.pieces.push((part, index));
        }
    }

    fn metadata(&mut self, blocks: Extent, name: impl FnOnce() -> String) {
        if self.wants(blocks) && !self.is_full() {
            let owner = Owner::Metadata(name());
            let known = self.owners.iter().rposition(|known| *known == owner);
            let index = known.unwrap_or_else(|| {
                self.owners.push(owner);
                self.owners.len() - 1
            });
            self.give(blocks, index);
        }
    }

    fn free(&mut self, blocks: Extent) {
        if self.wants(blocks) && !self.is_full() {
            let index = *self.free.get_or_insert_with(|| {
                self.owners.push(Owner::Free);
                self.owners.len() - 1
            });
            self.give(blocks, index);
        }
    }

    fn inode(&mut self, blocks: Extent, number: u32, inode: inode::Inode<'_>, part: Part) {
        if !self.wants(blocks) || self.is_full() {
            return;
        }
        let owners = &mut self.owners;
        let index = *self.inodes.entry((number, part)).or_insert_with(|| {
            owners.push(Owner::Inode { number, kind: inode.kind(), part, path: None, more: 0 });
            owners.len() - 1
        });
        let names = match inode.kind() {
            // Its other links are its own entry and those of the directories in it.
            "directory" => 1,
            inode::EA_VALUE => 0,
            _ => u64::from(inode.links()),
        };
        self.links.insert(number, names);
        self.give(blocks, index);
    }
}

/// Says whose the bytes in `wanted` are, which are those of the ext file system at the start of `disk`. Memory stays
/// below 64 MiB, whatever the file system says; what is too much is left out, with a note.
pub(in crate::layout) fn owners<D: ReadAt>(disk: D, wanted: &ExtentMap) -> Step<Owners> {
    let head = read_vec(&disk, 0, to_usize(disk.size().min(4096)))?;
    let sb = Superblock::parse(&head).ok_or_else(|| "its superblock is gone".to_owned())?;
    sb.check_shape(disk.size())?;
    require(sb.groups() <= MAX_GROUPS, || format!("it has {} block groups", sb.groups()))?;
    let size = sb.block_size;
    let left =
        wanted.iter().map(|run| run.widened(size)).map(|run| Extent::new(run.start / size, run.end / size));
    let mut claims = Claims {
        left: left.collect(),
        owners: Vec::new(),
        inodes: BTreeMap::new(),
        links: BTreeMap::new(),
        free: None,
        pieces: Vec::new(),
    };
    let mut notes = Notes::default();
    let fs = Fs { disk, sb };
    let overlay = replay(&fs, &mut notes)?;
    let tables = claim_metadata(&fs, &overlay, &mut claims, &mut notes)?;
    let directories = claim_inodes(&fs, &overlay, &tables, &mut claims, &mut notes)?;
    if claims.is_full() {
        notes.add("the rest of what differs is not looked up: there is too much of it".into());
    }
    name(&fs, &overlay, &tables, directories, &mut claims, &mut notes)?;

    let rest: Vec<Extent> = claims.left.iter().take(MAX_PIECES).collect();
    if !rest.is_empty() {
        let index = claims.owners.len();
        claims.owners.push(Owner::Unknown);
        claims.pieces.extend(rest.into_iter().map(|run| (run, index)));
    }
    let in_bytes = |run: Extent| Extent::new(run.start * size, run.end.saturating_mul(size));
    let pieces = claims.pieces.into_iter().map(|(run, index)| (in_bytes(run), index)).collect();
    Ok(Owners { owners: claims.owners, pieces, notes: notes.0 })
}

/// The blocks of which the journal has newer copies.
fn replay<D: ReadAt>(fs: &Fs<D>, notes: &mut Notes) -> Step<Overlay> {
    if !fs.sb.compat(feature::HAS_JOURNAL) || !fs.sb.incompat(feature::RECOVER) || fs.sb.journal_inode == 0 {
        return Ok(Overlay::new());
    }
    let all: ExtentMap = [Extent::new(0, fs.sb.blocks)].into_iter().collect();
    match journal::replay(fs, &all, journal::MAX_LOGGED) {
        Ok(replay) => Ok(replay.overlay),
        Err(Stop::Whole(why)) => {
            notes.add(format!("names are as before the journal's replay: {why}"));
            Ok(Overlay::new())
        }
        Err(failed) => Err(failed),
    }
}

/// Claims what belongs to the file system itself and what is free, and returns where the inodes are.
fn claim_metadata<D: ReadAt>(
    fs: &Fs<D>,
    overlay: &Overlay,
    claims: &mut Claims,
    notes: &mut Notes,
) -> Step<Tables> {
    let sb = &fs.sb;
    claims.metadata(Extent::new(0, sb.first_block), || "boot block".into());
    claims.metadata(Extent::new(sb.blocks, u64::MAX), || "space behind the file system".into());
    if let Some(block) = sb.mmp_block() {
        claims.metadata(Extent::at(block, 1), || "multiple mount protection".into());
    }
    let mut tables = Tables::new(sb.group_inodes);
    fs.each_descriptor(Some(overlay), |number, raw| {
        claim_fixed(fs, number, claims);
        match fs.parse(number, raw) {
            Ok((_, [bitmap, inode_bitmap, table])) => {
                claims.metadata(bitmap, || format!("block bitmap of group {number}"));
                claims.metadata(inode_bitmap, || format!("inode bitmap of group {number}"));
                claims.metadata(table, || format!("inode table of group {number}"));
                tables.push(fs, raw, table);
            }
            Err(Stop::Whole(why)) => {
                notes.add(why);
                tables.push_unknown();
            }
            Err(failed) => return Err(failed),
        }
        Ok(())
    })?;
    // Free blocks come after all metadata, which may lie in any group.
    fs.each_descriptor(Some(overlay), |number, raw| {
        let extent = fs.group_extent(number);
        let Ok((group, _)) = fs.parse(number, raw) else { return Ok(()) };
        if !claims.wants(extent) || claims.is_full() {
            return Ok(());
        }
        if group.uninit {
            claims.free(extent);
            return Ok(());
        }
        match fs.read(Some(overlay), group.bitmap, 1).map_err(Stop::from) {
            Ok(bits) => claim_free(claims, extent, &bits),
            Err(Stop::Whole(why)) => notes.add(format!("block bitmap of group {number}: {why}")),
            Err(failed) => return Err(failed),
        }
        Ok(())
    })?;
    Ok(tables)
}

/// Claims the superblock and descriptors at the start of a group.
fn claim_fixed<D: ReadAt>(fs: &Fs<D>, group: u64, claims: &mut Claims) {
    let fixed = fs.fixed(group);
    if !claims.wants(fixed) {
        return;
    }
    let backup = u64::from(fs.sb.has_backup(group));
    let descriptors = match fs.in_meta_group(group / fs.per_block()) {
        true => fixed.len() - backup.min(fixed.len()),
        false if fs.sb.incompat(feature::META_BG) => fs.sb.first_meta_bg,
        false => fs.descriptor_blocks(),
    };
    let superblock = Extent::at(fixed.start, backup);
    let descriptors = Extent::at(superblock.end, descriptors).intersect(fixed);
    claims.metadata(superblock, || match group {
        0 => "superblock".into(),
        group => format!("backup superblock of group {group}"),
    });
    claims.metadata(descriptors, || match group {
        0 => "group descriptors".into(),
        group => format!("group descriptors in group {group}"),
    });
    claims.metadata(Extent::new(descriptors.end, fixed.end), || {
        format!("reserved group descriptors in group {group}")
    });
}

/// Claims the blocks of a group whose bits are clear.
fn claim_free(claims: &mut Claims, extent: Extent, bits: &[u8]) {
    let is_free = |block: u64| {
        let place = block - extent.start;
        bits.get(to_usize(place / 8)).is_some_and(|byte| byte & 1 << (place % 8) == 0)
    };
    let wanted: Vec<Extent> = claims.left.within(extent).collect();
    for run in wanted {
        let mut at = run.start;
        while at < run.end && !claims.is_full() {
            let end = (at..run.end).find(|block| is_free(*block) != is_free(at)).unwrap_or(run.end);
            if is_free(at) {
                claims.free(Extent::new(at, end));
            }
            at = end;
        }
    }
}

/// Claims what belongs to inodes, and returns the numbers of all directories.
fn claim_inodes<D: ReadAt>(
    fs: &Fs<D>,
    overlay: &Overlay,
    tables: &Tables,
    claims: &mut Claims,
    notes: &mut Notes,
) -> Step<Vec<u32>> {
    let mut directories = Vec::new();
    if claims.left.is_empty() {
        return Ok(directories);
    }
    let mut maps = Maps::new(fs, overlay);
    let (mut damaged, mut too_many) = (0_u64, false);
    tables.scan(fs, overlay, notes, &mut |number, inode| {
        if inode.is_directory() {
            too_many |= directories.len() == MAX_DIRECTORIES;
            if !too_many {
                directories.push(number);
            }
        }
        if claims.left.is_empty() || claims.is_full() {
            return Ok(true);
        }
        maps.damaged = false;
        maps.walk(inode, &mut |run, part| {
            match fs.sb.special_inode(number) {
                Some(name) => claims.metadata(run, || name.into()),
                None => claims.inode(run, number, inode, part),
            }
            Ok(!claims.left.is_empty() && !claims.is_full())
        })?;
        damaged += u64::from(maps.damaged);
        Ok(true)
    })?;
    if maps.exhausted() {
        notes.add("its block maps are too large to be read to the end: owners may be missing".into());
    }
    if damaged > 0 {
        notes.add(format!("{damaged} inodes have damaged block maps"));
    }
    if too_many {
        notes.add("it has too many directories: names may be missing".into());
    }
    Ok(directories)
}

/// Finds the names of the inodes that own something.
fn name<D: ReadAt>(
    fs: &Fs<D>,
    overlay: &Overlay,
    tables: &Tables,
    directories: Vec<u32>,
    claims: &mut Claims,
    notes: &mut Notes,
) -> Step<()> {
    if claims.links.is_empty() {
        return Ok(());
    }
    let mut finder = Finder::search(fs, overlay, tables, &claims.links, directories, notes)?;
    let mut room = MAX_PATHS;
    for owner in &mut claims.owners {
        let Owner::Inode { number, path, more, .. } = owner else { continue };
        if let Some((found, others)) = finder.path(*number)? {
            let found = escaped(&found);
            let Some(rest) = room.checked_sub(found.len()) else {
                notes.add("paths are too long to be told all".into());
                break;
            };
            room = rest;
            *path = Some(found);
            *more = others;
        }
    }
    Ok(())
}
