//! The files of a FAT12, FAT16 or FAT32, found by the places of their directory entries and read without mounting it.
//! Names are compared without regard to case; a short name is shown as Windows NT and Linux do.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::table::{Kind as FatKind, Table};
use super::{Bpb, entries, root};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, read_array};
use crate::layout::field::{bytes, le16, le32};
use crate::layout::{FileId, FileInfo, FileKind, Files, Step, Stop};
use crate::unit::{Extent, to_usize};

/// Largest folder, in bytes: 65,536 entries.
const MAX_FOLDER: u64 = 2 << 20;
/// The root folder, which has no entry; no entry lies at byte 0.
const ROOT: u64 = 0;
/// Pieces of 13 characters a long name has at most.
const MAX_PIECES: usize = 20;

const DELETED: u8 = 0xe5;
/// Stands for the byte 0xe5 at the start of a name.
const NOT_DELETED: u8 = 0x05;
/// Attributes, as in `root`.
const LABEL: u8 = 0x08;
const FOLDER: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;
/// Of the number of a long name's piece: that it is the name's last, which comes first.
const LAST_PIECE: u8 = 0x40;
/// Which parts of a short name are shown in lower case (Windows NT).
const LOWER_BASE: u8 = 0x08;
const LOWER_EXTENSION: u8 = 0x10;

/// A file system whose files are read.
struct FatFiles {
    table: Table<Arc<dyn ReadAt>>,
    bpb: Bpb,
    /// What was read last: a path goes through the same folders, a file is read a piece at a time.
    last_folder: RefCell<Option<(u64, Rc<Vec<Entry>>)>>,
    last_runs: RefCell<Option<(u64, Rc<Vec<Extent>>)>>,
}

/// A name in a folder.
struct Entry {
    name: Vec<u8>,
    /// The name of eight and three characters, where the name is a longer one.
    short: Option<Vec<u8>>,
    /// Where its directory entry lies, in bytes.
    place: u64,
}

/// The files of the FAT file system on `disk`, which begins with it.
///
/// Fails with [`Kind::Image`] when its boot sector is damaged, and as the disk fails.
pub fn fat_files(disk: Arc<dyn ReadAt>) -> Result<Box<dyn Files>> {
    Ok(Box::new(open(disk)?))
}

/// The byte of `disk`, which begins with a FAT file system, where the content of its folder `folder` begins, and the
/// number by which others name that folder's first cluster: 0 for the root. Fails as [`fat_files`] and reading do.
pub fn fat_folder(disk: Arc<dyn ReadAt>, folder: FileId) -> Result<(u64, u32)> {
    let files = open(disk)?;
    let extents = files.folder_extents(folder.number)?;
    let start = extents.first().map_or(0, |extent| extent.start);
    let cluster = if folder.number == ROOT { 0 } else { files.entry(folder.number)?.1 };
    // Of 28 bits.
    Ok((start, u32::try_from(cluster).unwrap_or(0)))
}

fn open(disk: Arc<dyn ReadAt>) -> Result<FatFiles> {
    let name = disk.name();
    let open = || -> Step<FatFiles> {
        let head = read_array::<512>(&disk, 0)?;
        let bpb = Bpb::parse(&head).ok_or_else(|| "its boot sector is gone".to_owned())?;
        bpb.check_layout(disk.size())?;
        let table = root::table(disk, &bpb);
        Ok(FatFiles { table, bpb, last_folder: RefCell::default(), last_runs: RefCell::default() })
    };
    match open() {
        Ok(files) => Ok(files),
        Err(Stop::Failed(error)) => Err(error),
        Err(Stop::Whole(why)) => {
            let what = format!("{name}: cannot read the files of its FAT file system");
            Err(Error::new(Kind::Image, "fat.unreadable", what).because(why))
        }
    }
}

impl FatFiles {
    /// An error in the file or folder whose entry lies at `place`.
    fn wrong(&self, place: u64, why: impl Into<String>) -> Error {
        let name = self.table.disk.name();
        Error::new(Kind::Image, "fat.damaged", format!("{name}: cannot read a file of its FAT file system"))
            .because(why)
            .fact("entry", place)
    }

    fn checked<T>(&self, place: u64, step: Step<T>) -> Result<T> {
        step.map_err(|stop| match stop {
            Stop::Failed(error) => error,
            Stop::Whole(why) => self.wrong(place, why),
        })
    }

    /// What the entry at `place` says: attributes, first cluster, and length in bytes.
    fn entry(&self, place: u64) -> Result<(u8, u64, u64)> {
        let raw = read_array::<32>(&self.table.disk, place)?;
        let [attributes] = bytes(&raw, 11);
        Ok((attributes, root::first_cluster(self.table.kind, &raw), le32(&raw, 28).into()))
    }

    /// Where the content of `folder` lies, in bytes.
    fn folder_extents(&self, folder: u64) -> Result<Vec<Extent>> {
        let first = match folder {
            ROOT if self.table.kind != FatKind::Fat32 => {
                return Ok(vec![Extent::at(self.bpb.tables_end(), self.bpb.root_len())]);
            }
            ROOT => self.bpb.root_cluster(),
            place => match self.entry(place)? {
                (attributes, first, _) if attributes & FOLDER != 0 => first,
                _ => return Err(self.wrong(place, "it is no folder")),
            },
        };
        let heap = &self.table.heap;
        let (runs, whole) =
            self.checked(folder, self.table.chain(first, MAX_FOLDER.div_ceil(heap.cluster)))?;
        if !whole {
            return Err(self.wrong(folder, "a folder is longer than 2 MiB"));
        }
        Ok(runs.iter().map(|run| heap.bytes(*run)).collect())
    }

    fn folder(&self, folder: u64) -> Result<Rc<Vec<Entry>>> {
        if let Some((known, entries)) = &*self.last_folder.borrow()
            && *known == folder
        {
            return Ok(Rc::clone(entries));
        }
        let extents = self.folder_extents(folder)?;
        let mut content = Vec::new();
        for extent in &extents {
            content.extend(crate::io::read_vec(&self.table.disk, extent.start, to_usize(extent.len()))?);
        }
        let mut places = extents.iter().flat_map(|extent| (extent.start..extent.end).step_by(32));
        let entries = Rc::new(named(&content, &mut places));
        *self.last_folder.borrow_mut() = Some((folder, Rc::clone(&entries)));
        Ok(entries)
    }

    /// The clusters of a file of `size` bytes.
    fn runs(&self, place: u64, first: u64, size: u64) -> Result<Rc<Vec<Extent>>> {
        if let Some((known, runs)) = &*self.last_runs.borrow()
            && *known == place
        {
            return Ok(Rc::clone(runs));
        }
        let clusters = size.div_ceil(self.table.heap.cluster);
        if clusters > self.table.heap.count {
            return Err(self.wrong(place, format!("a file of {size} bytes is longer than its file system")));
        }
        let (runs, _) = self.checked(place, self.table.chain(first, clusters))?;
        if runs.iter().map(Extent::len).sum::<u64>() < clusters {
            return Err(self.wrong(place, "its clusters end before it does"));
        }
        let runs = Rc::new(runs);
        *self.last_runs.borrow_mut() = Some((place, Rc::clone(&runs)));
        Ok(runs)
    }
}

impl Files for FatFiles {
    fn root(&self) -> FileId {
        FileId { tree: 0, number: ROOT }
    }

    fn info(&self, file: FileId) -> Result<FileInfo> {
        if file.number == ROOT {
            return Ok(FileInfo { kind: FileKind::Folder, size: 0 });
        }
        let (attributes, _, size) = self.entry(file.number)?;
        Ok(match attributes & FOLDER {
            0 => FileInfo { kind: FileKind::Regular, size },
            _ => FileInfo { kind: FileKind::Folder, size: 0 },
        })
    }

    fn lookup(&self, folder: FileId, name: &[u8]) -> Result<Option<FileId>> {
        let same = |other: &[u8]| match (std::str::from_utf8(name), std::str::from_utf8(other)) {
            (Ok(name), Ok(other)) => name.chars().map(upper).eq(other.chars().map(upper)),
            _ => name == other,
        };
        let entries = self.folder(folder.number)?;
        let found =
            entries.iter().find(|entry| same(&entry.name) || entry.short.as_deref().is_some_and(same));
        Ok(found.map(|entry| FileId { tree: 0, number: entry.place }))
    }

    fn names(&self, folder: FileId, most: usize) -> Result<Vec<Vec<u8>>> {
        Ok(self.folder(folder.number)?.iter().take(most).map(|entry| entry.name.clone()).collect())
    }

    fn target(&self, link: FileId) -> Result<Vec<u8>> {
        Err(self.wrong(link.number, "FAT has no links"))
    }

    fn read(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let (attributes, first, size) = self.entry(file.number)?;
        if file.number == ROOT || attributes & FOLDER != 0 {
            return Err(self.wrong(file.number, "it is no file"));
        }
        let left = to_usize(size.saturating_sub(offset)).min(buf.len());
        if left == 0 {
            return Ok(0);
        }
        let runs = self.runs(file.number, first, size)?;
        let wanted = Extent::at(offset, left as u64);
        let mut rest = buf.get_mut(..left).unwrap_or_default();
        let mut start = 0;
        for run in runs.iter() {
            let place = self.table.heap.bytes(*run);
            let part = Extent::at(start, place.len()).intersect(wanted);
            start += place.len();
            if !part.is_empty() {
                let (piece, later) = rest.split_at_mut(to_usize(part.len()));
                self.table.disk.read_at(piece, place.start + place.len() - (start - part.start))?;
                rest = later;
            }
        }
        Ok(left)
    }

    fn stale(&self) -> Option<&'static str> {
        None
    }
}

/// As names are compared: what has no single upper-case form is itself.
fn upper(c: char) -> char {
    let mut upper = c.to_uppercase();
    match (upper.next(), upper.next()) {
        (Some(one), None) => one,
        _ => c,
    }
}

/// The names in a folder's `content`, whose entries lie at `places`.
fn named(content: &[u8], places: &mut dyn Iterator<Item = u64>) -> Vec<Entry> {
    let mut found = Vec::new();
    let mut long = LongName::default();
    for (entry, place) in entries(content).zip(places) {
        let ([first], [attributes]) = (bytes(entry, 0), bytes(entry, 11));
        if first == DELETED {
            long = LongName::default();
        } else if attributes & LONG_NAME == LONG_NAME {
            long.add(entry);
        } else if attributes & LABEL == 0 {
            let short = short_name(entry);
            if !matches!(&*short, b"." | b".." | b"") && !short.contains(&b'/') {
                let (name, short) = match std::mem::take(&mut long).name(entry) {
                    Some(name) => (name, Some(short)),
                    None => (short, None),
                };
                found.push(Entry { name, short, place });
            }
            long = LongName::default();
        } else {
            long = LongName::default();
        }
    }
    found
}

/// `NAME    EXT` as `name.ext`, in the case it asks for.
fn short_name(entry: &[u8; 32]) -> Vec<u8> {
    let ([first], [case]) = (bytes(entry, 0), bytes(entry, 12));
    let part = |raw: &[u8], lower: bool| {
        let raw = raw.trim_ascii_end();
        if lower { raw.to_ascii_lowercase() } else { raw.to_vec() }
    };
    let mut base = bytes::<8>(entry, 0);
    if first == NOT_DELETED {
        base[0] = DELETED;
    }
    let mut name = part(&base, case & LOWER_BASE != 0);
    let extension = part(&bytes::<3>(entry, 8), case & LOWER_EXTENSION != 0);
    if !extension.is_empty() {
        name.push(b'.');
        name.extend(extension);
    }
    name
}

/// A long name in the making: its pieces come before the entry they belong to, the last one first.
#[derive(Default)]
struct LongName {
    /// UTF-16, the last piece first.
    pieces: Vec<[u16; 13]>,
    /// The number of the piece that must come next.
    next: u8,
    /// What the short name must add up to.
    sum: u8,
}

impl LongName {
    fn add(&mut self, entry: &[u8; 32]) {
        let ([number], [sum]) = (bytes(entry, 0), bytes(entry, 13));
        let place = number & !LAST_PIECE;
        let goes_on = place == self.next && sum == self.sum && number & LAST_PIECE == 0;
        let begins = number & LAST_PIECE != 0 && (1..=MAX_PIECES).contains(&usize::from(place));
        if begins {
            self.pieces.clear();
            self.sum = sum;
        } else if !goes_on || place == 0 {
            *self = LongName::default();
            return;
        }
        let places = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
        self.pieces.push(places.map(|at| le16(entry, at)));
        self.next = place - 1;
    }

    /// The name, if it is whole and belongs to `entry`.
    fn name(self, entry: &[u8; 32]) -> Option<Vec<u8>> {
        let sum =
            bytes::<11>(entry, 0).iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        if self.pieces.is_empty() || self.next != 0 || sum != self.sum {
            return None;
        }
        let units = self.pieces.iter().rev().flatten().copied().take_while(|unit| *unit != 0);
        let name: String =
            char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
        // No file of a folder is called so.
        (!name.is_empty() && !name.contains('/')).then(|| name.into_bytes())
    }
}
