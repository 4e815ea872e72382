//! The root directory of FAT12, FAT16 and FAT32: the volume's label, and whether what it lists is where the tables and
//! the boot sector say.

use super::map::ClusterMap;
use super::table::{Kind, Table};
use super::{Bpb, Step, entries, require};
use crate::io::{ReadAt, read_array, read_vec};
use crate::layout::field::{bytes, has, le16, text};
use crate::layout::used::VolumeMap;
use crate::unit::{Extent, to_usize};

/// Largest directory, in bytes.
const MAX: u64 = 2 << 20;
/// How much of it is looked at for a label, in bytes.
const MAX_FOR_LABEL: u64 = 64 << 10;
/// Folders of the root that are looked at.
const MAX_FOLDERS: usize = 64;
/// A name that begins with this is of a file that was deleted.
const DELETED: u8 = 0xe5;
/// Attributes: a label, a folder, and the four that together make an entry a part of a long name.
const LABEL: u8 = 0x08;
const FOLDER: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;

/// Opens the FAT file system on `disk`, which begins with it.
pub(in crate::layout) fn open<D: ReadAt>(disk: D) -> Step<impl VolumeMap> {
    let head = read_array::<512>(&disk, 0)?;
    let bpb = Bpb::parse(&head).ok_or_else(|| "its boot sector is gone".to_owned())?;
    bpb.check_layout(disk.size())?;
    bpb.check_state(&disk)?;
    let table = table(disk, &bpb);
    table.check_begin(bpb.media(), Some(bpb.tables_end()))?;
    let (directory, whole) = read(&table, &bpb, MAX)?;
    require(whole, || "its root directory is too long".into())?;
    let mut listed = listed(&table, &directory)?;
    let used = table.check_links()?;
    let map = ClusterMap::new(bpb.heap(), table, used);
    map.require_used(&mut listed, "a file")?;
    Ok(map)
}

/// The label in the root directory of `volume`; empty when there is none.
pub(super) fn label(volume: &dyn ReadAt, bpb: &Bpb) -> Step<String> {
    bpb.check_layout(volume.size())?;
    let (directory, _) = read(&table(volume, bpb), bpb, MAX_FOR_LABEL)?;
    let is_label = |entry: &&[u8; 32]| {
        let ([first], [attributes]) = (bytes(*entry, 0), bytes(*entry, 11));
        first != DELETED && attributes & (LABEL | FOLDER) == LABEL && attributes & LONG_NAME != LONG_NAME
    };
    Ok(entries(&directory).find(is_label).map(|entry| text(&bytes::<11>(entry, 0))).unwrap_or_default())
}

pub(super) fn table<D: ReadAt>(disk: D, bpb: &Bpb) -> Table<D> {
    Table { disk, kind: bpb.kind, heap: bpb.heap(), starts: bpb.tables() }
}

/// Reads the root directory, and says whether it was at most `most` bytes.
fn read<D: ReadAt>(table: &Table<D>, bpb: &Bpb, most: u64) -> Step<(Vec<u8>, bool)> {
    if bpb.kind != Kind::Fat32 {
        let len = bpb.root_len();
        return Ok((read_vec(&table.disk, bpb.tables_end(), to_usize(len.min(most)))?, len <= most));
    }
    let (runs, whole) = table.chain(bpb.root_cluster(), most.div_ceil(table.heap.cluster))?;
    Ok((table.heap.read(&table.disk, &runs, most)?, whole))
}

/// The first clusters of all that is listed in the root directory. Stops at a folder that does not begin with itself.
fn listed<D: ReadAt>(table: &Table<D>, directory: &[u8]) -> Step<Vec<Extent>> {
    let mut listed = Vec::new();
    let mut folders = 0;
    for entry in entries(directory) {
        let ([first], [attributes]) = (bytes(entry, 0), bytes(entry, 11));
        if first == DELETED || attributes & LABEL != 0 {
            continue;
        }
        let cluster = first_cluster(table.kind, entry);
        let is_folder = attributes & FOLDER != 0;
        if cluster == 0 && !is_folder {
            continue;
        }
        let Some(place) = cluster.checked_sub(2).filter(|place| *place < table.heap.count) else {
            return Err(format!("its root directory lists something at cluster {cluster}").into());
        };
        if is_folder && folders < MAX_FOLDERS {
            folders += 1;
            let own = read_array::<32>(&table.disk, table.heap.bytes(Extent::at(place, 1)).start)?;
            let sound = has(&own, 0, b".          ") && first_cluster(table.kind, &own) == cluster;
            require(sound, || {
                format!("there is no folder at cluster {cluster}, which the root directory lists")
            })?;
        }
        listed.push(Extent::at(place, 1));
    }
    Ok(listed)
}

pub(super) fn first_cluster(kind: Kind, entry: &[u8; 32]) -> u64 {
    let high = if kind == Kind::Fat32 { le16(entry, 20) } else { 0 };
    u64::from(high) << 16 | u64::from(le16(entry, 26))
}
