//! Whose bytes of a disk are: for ext2, ext3 and ext4, in partitions, logical volumes or alone, the files they belong
//! to. For a reader; nothing is decided by it.

use std::fmt;
use std::fmt::Write;
use std::sync::Arc;

use super::lvm::LogicalVolume;
use super::{Content, Stop, ext, logical_volumes, used_map};
use crate::error::Result;
use crate::io::{ReadAt, Window};
use crate::unit::{Extent, ExtentMap};

/// Most extents that are looked up.
const MAX_EXTENTS: usize = 1000;
/// Most pieces of a logical volume that are looked up: its stripes may be smaller than the extents asked about.
const MAX_PIECES: usize = 1 << 14;

/// What an inode uses a block for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Its content.
    Content,
    /// Its extent tree or indirect blocks.
    Map,
    /// Its extended attributes; other inodes may share the block.
    Attributes,
}

/// Whose a block is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The file system's own: the name of the structure, such as `inode table of group 3` or `journal`.
    Metadata(String),
    /// A file's, directory's or symbolic link's.
    Inode {
        /// Its inode number.
        number: u32,
        /// `file`, `directory`, `symbolic link`, or what else stat(1) calls it.
        kind: &'static str,
        /// What the inode uses the block for.
        part: Part,
        /// A path from the root of its file system, escaped as by [`escaped`]; none when no name was found.
        path: Option<String>,
        /// How many other names were found: hard links. There may be more of them.
        more: u64,
    },
    /// No one's: the block bitmap calls it free.
    Free,
    /// Used by the block bitmap, but of no inode that was found.
    Unknown,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Metadata(name) => f.write_str(name),
            Owner::Free => f.write_str("free blocks"),
            Owner::Unknown => f.write_str("blocks in use, but of no file that was found"),
            Owner::Inode { number, kind, part, path, more } => {
                match path {
                    Some(path) => f.write_str(path)?,
                    None => write!(f, "inode {number} (no name was found)")?,
                }
                match (*kind, part) {
                    ("file", Part::Content) => {}
                    (kind, Part::Content) => write!(f, " ({kind})")?,
                    (_, Part::Map) => f.write_str(" (its block map)")?,
                    (_, Part::Attributes) => f.write_str(" (its extended attributes)")?,
                }
                match more {
                    0 => Ok(()),
                    more => write!(f, " and {more} more name{}", if *more == 1 { "" } else { "s" }),
                }
            }
        }
    }
}

/// What was asked about in one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeOwners {
    /// The number of its partition; none for a disk without partitions, a logical volume, and what lies in none.
    pub partition: Option<u32>,
    /// The name of a logical volume, as `group/volume`.
    pub logical: Option<String>,
    /// What the volume holds, such as `ext4`; none for what lies outside of all partitions.
    pub content: Option<String>,
    /// Each owner once, and which of the bytes asked about are its own, in bytes of the disk.
    pub owners: Vec<(Owner, Vec<Extent>)>,
    /// What was asked about when no owners can be told at all, in bytes of the disk.
    pub unnamed: Vec<Extent>,
    /// Why owners or names are missing.
    pub notes: Vec<String>,
}

/// Where the bytes of a volume are.
enum Place<'a> {
    /// From here on.
    At(u64),
    Logical(&'a LogicalVolume),
}

impl Place<'_> {
    /// A run of the volume in bytes of the disk; at most [`MAX_PIECES`] pieces.
    fn on_disk(&self, run: Extent, to: &mut ExtentMap) {
        let volume = match self {
            Place::At(start) => return to.insert(run.shifted(*start)),
            Place::Logical(volume) => volume,
        };
        let mut at = run.start;
        for _ in 0..MAX_PIECES {
            let Some(place) = volume.place(at).filter(|_| at < run.end) else { break };
            let len = place.len().min(run.end - at);
            to.insert(Extent::at(place.start, len));
            at += len;
        }
    }
}

/// Says whose the bytes in `extents` of a disk are; of more than 1,000 extents, the first 1,000. What no owner can be
/// told for is told too, with the reason. Fails only in ways that may pass.
pub fn owners(disk: &Arc<dyn ReadAt>, extents: &[Extent]) -> Result<Vec<VolumeOwners>> {
    let mut asked: ExtentMap = extents.iter().take(MAX_EXTENTS).copied().collect();
    // The maps themselves are not kept: they take memory.
    let volumes = used_map(Arc::clone(disk))?.volumes().to_vec();
    let mut found = Vec::new();
    if volumes.iter().any(|volume| volume.logical.is_some()) {
        let logical = logical_volumes(disk)?;
        for volume in volumes.iter().filter(|volume| volume.logical.is_some()) {
            let opened = logical.iter().find(|found| Some(found.full_name()) == volume.logical);
            let Some(Ok(opened)) = opened.map(|found| &found.volume) else { continue };
            let mut inside = ExtentMap::new();
            for run in asked.iter() {
                inside.extend(opened.offsets_of(run, MAX_PIECES.saturating_sub(inside.len())));
            }
            if inside.is_empty() {
                continue;
            }
            let place = Place::Logical(opened);
            let window = Window::new(Arc::<LogicalVolume>::clone(opened), volume.extent, opened.name());
            let told = in_volume(None, volume.logical.clone(), &volume.content, &window, &inside, &place)?;
            for run in told.owners.iter().flat_map(|(_, runs)| runs).chain(&told.unnamed) {
                asked.remove(*run);
            }
            found.push(told);
        }
    }
    for volume in volumes.iter().filter(|volume| volume.logical.is_none()) {
        let start = volume.extent.start;
        let inside: ExtentMap =
            asked.within(volume.extent).map(|run| Extent::new(run.start - start, run.end - start)).collect();
        if inside.is_empty() {
            continue;
        }
        asked.remove(volume.extent);
        let window = Window::new(Arc::clone(disk), volume.extent, disk.name());
        let place = Place::At(start);
        found.push(in_volume(volume.partition, None, &volume.content, &window, &inside, &place)?);
    }
    found.sort_by_key(|told| (told.partition.is_none(), told.partition));
    if !asked.is_empty() {
        found.push(VolumeOwners {
            partition: None,
            logical: None,
            content: None,
            owners: Vec::new(),
            unnamed: asked.iter().collect(),
            notes: Vec::new(),
        });
    }
    Ok(found)
}

/// Whose the bytes in `inside` of one volume are.
fn in_volume(
    partition: Option<u32>,
    logical: Option<String>,
    content: &Content,
    volume: &dyn ReadAt,
    inside: &ExtentMap,
    place: &Place<'_>,
) -> Result<VolumeOwners> {
    let mut told = VolumeOwners {
        partition,
        logical,
        content: Some(content.name().to_owned()),
        owners: Vec::new(),
        unnamed: Vec::new(),
        notes: Vec::new(),
    };
    let found = match content {
        Content::Ext(_) => ext::owners(volume, inside),
        _ => Err("only the files of ext2, ext3 and ext4 are named".to_owned().into()),
    };
    match found {
        Ok(found) => {
            let mut extents = vec![ExtentMap::new(); found.owners.len()];
            for (piece, owner) in found.pieces {
                let Some(extents) = extents.get_mut(owner) else { continue };
                inside.within(piece).for_each(|run| place.on_disk(run, extents));
            }
            let extents = extents.iter().map(|extents| extents.iter().collect());
            told.owners = found.owners.into_iter().zip(extents).collect();
            told.notes = found.notes;
        }
        Err(Stop::Whole(why)) => {
            let mut extents = ExtentMap::new();
            inside.iter().for_each(|run| place.on_disk(run, &mut extents));
            told.unnamed = extents.iter().collect();
            told.notes.push(why);
        }
        Err(Stop::Failed(error)) => return Err(error),
    }
    Ok(told)
}

/// A path for a reader: text as it is, but everything else (control characters, bytes that are no UTF-8, the
/// backslash) escaped as in Rust, such as `\n`, `\u{202e}` or `\xff`.
pub(super) fn escaped(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\'' | '"' => text.push(c),
                c => text.extend(c.escape_debug()),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_printed_without_harm() {
        for (name, text) in [
            (&b"/etc/hosts"[..], "/etc/hosts"),
            ("/主页/été".as_bytes(), "/主页/été"),
            (b"/it's \"so\"", "/it's \"so\""),
            (b"/a\nb\x1b[31m", "/a\\nb\\u{1b}[31m"),
            (b"/back\\slash", "/back\\\\slash"),
            ("/\u{202e}txt.exe".as_bytes(), "/\\u{202e}txt.exe"),
            (b"/\xff\xe4\xb8", "/\\xff\\xe4\\xb8"),
        ] {
            assert_eq!(escaped(name), text);
        }
    }
}
