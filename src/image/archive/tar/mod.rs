//! Tar archives: which members there are and where their data lies, without reading the data.
//!
//! POSIX ustar and pax, GNU tar, and their sparse files. Own code, not a library's, because a member is read in place,
//! sparse ones too, and because no name or table of a hostile archive may be longer than a bound.

mod header;
mod pax;
mod sparse;

use std::sync::Arc;

use self::header::{Header, SIZE, Sparse as SparsePiece, text};
use super::damaged;
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, Window, is_zero, read_array, read_vec};
use crate::unit::{Extent, to_usize};

pub(super) use self::header::{BLOCK, begins};

/// Most files that are listed, and most headers of any kind: an archive of disk images has a handful.
const MAX_MEMBERS: usize = 4096;
const MAX_HEADERS: usize = 65_536;
/// The longest name in bytes.
const MAX_NAME: usize = 1024;
/// The longest list of pax records in bytes: a sparse map of version 0 is one record.
const MAX_RECORDS: u64 = 4 << 20;

/// A file in the archive.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Its name; what is not UTF-8 in it is replaced.
    pub name: String,
    /// Its length in bytes, holes counted.
    pub size: u64,
    /// Where its header is.
    at: u64,
    /// Where its data is stored: all of it, or the runs of a sparse file one after the other.
    data: Extent,
    /// Where the map of a sparse file is.
    sparse: Option<Map>,
}

/// Where the map of a sparse file is, by the format that has it there.
#[derive(Clone, Debug)]
enum Map {
    /// Old GNU: in the header at this offset and the blocks after it.
    Header(u64),
    /// pax, versions 0.0 and 0.1: in these records.
    Records(Extent),
    /// pax, version 1.0: before the data.
    Data,
}

/// What was read ahead of a header for the file it begins.
#[derive(Default)]
struct Ahead {
    name: Option<Vec<u8>>,
    records: Option<(Extent, pax::Known)>,
}

/// The files in the archive `disk`, in its order.
pub(super) fn members(disk: &dyn ReadAt) -> Result<Vec<Member>> {
    let mut walk = Walk { disk, name: disk.name(), at: 0 };
    let mut members = Vec::new();
    let mut ahead = Ahead::default();
    for _ in 0..MAX_HEADERS {
        match walk.next(&mut ahead)? {
            Step::Member(member) => members.push(member),
            Step::Other => {}
            Step::End if ahead.name.is_none() && ahead.records.is_none() => return Ok(members),
            Step::End => return Err(walk.bad(walk.at, "the archive ends where a file was announced")),
        }
        if members.len() > MAX_MEMBERS {
            break;
        }
    }
    Err(walk.bad(walk.at, format!("more than {MAX_MEMBERS} files or {MAX_HEADERS} headers")))
}

enum Step {
    Member(Member),
    Other,
    End,
}

struct Walk<'a> {
    disk: &'a dyn ReadAt,
    name: String,
    at: u64,
}

impl Walk<'_> {
    fn bad(&self, at: u64, what: impl std::fmt::Display) -> Error {
        damaged("archive.tar", &self.name, at, what)
    }

    fn cut_off(&self, what: impl std::fmt::Display) -> Error {
        damaged(
            "archive.truncated",
            &self.name,
            self.disk.size(),
            format!("the archive is cut off in {what}"),
        )
        .remedy("fetch the file again; if `tar --list` finds all in it, add an end: truncate --size=+1024")
    }

    /// The block at the present place, which is left behind.
    fn block(&mut self, what: &str) -> Result<header::Block> {
        if self.disk.size() - self.at < BLOCK {
            return Err(self.cut_off(what));
        }
        let block = read_array(self.disk, self.at)?;
        self.at += BLOCK;
        Ok(block)
    }

    /// `len` bytes of data at the present place, which are left behind with what fills their last block.
    fn data(&mut self, len: u64, what: &dyn std::fmt::Display) -> Result<Extent> {
        let data = Extent::at(self.at, len);
        if len > self.disk.size() - self.at {
            return Err(self.cut_off(what));
        }
        let end = data.end.checked_next_multiple_of(BLOCK).unwrap_or(data.end);
        self.at = end.min(self.disk.size());
        Ok(data)
    }

    fn next(&mut self, ahead: &mut Ahead) -> Result<Step> {
        let at = self.at;
        let block = self.block("a header, before its end mark")?;
        if is_zero(&block) {
            self.end()?;
            return Ok(Step::End);
        }
        let header =
            Header::new(&block).ok_or_else(|| self.bad(at, "no tar header (its checksum is wrong)"))?;
        if !header.has_magic() {
            return Err(self.bad(at, "no tar header (it has no magic number)"));
        }
        let size = header.size().ok_or_else(|| self.bad(at + SIZE, "a size that is no number"))?;
        match header.kind() {
            b'L' => {
                let name = self.bytes(at, size, MAX_NAME as u64 + 1, "a long name")?;
                ahead.name = Some(text(&name).to_vec());
                Ok(Step::Other)
            }
            b'x' => {
                let data = Extent::at(self.at, size);
                let bytes = self.bytes(at, size, MAX_RECORDS, "pax records")?;
                let known = pax::read(&bytes).map_err(|why| self.bad(at, why))?;
                ahead.records = Some((data, known));
                Ok(Step::Other)
            }
            b'g' => {
                let bytes = self.bytes(at, size, MAX_RECORDS, "pax records")?;
                match pax::read(&bytes).map_err(|why| self.bad(at, why))? {
                    known if known == pax::Known::default() => Ok(Step::Other),
                    _ => Err(self.bad(at, "pax records that name or measure every file at once")),
                }
            }
            // A long link name, a volume's label, a folder's list of names.
            b'K' | b'V' | b'D' => {
                self.data(size, &"an entry")?;
                if header.kind() != b'K' {
                    *ahead = Ahead::default();
                }
                Ok(Step::Other)
            }
            // Links, devices, folders, pipes: programs disagree on whether data follows one that has a size.
            kind @ b'1'..=b'6' => {
                let size = ahead.records.take().and_then(|(_, known)| known.size).unwrap_or(size);
                *ahead = Ahead::default();
                if size != 0 {
                    return Err(self.bad(at, format!("an entry of type {:?} with data", char::from(kind))));
                }
                Ok(Step::Other)
            }
            0 | b'0' | b'7' | b'S' => self.member(at, &header, size, std::mem::take(ahead)),
            kind => Err(self
                .bad(at, format!("an entry of the unknown type {:?}", char::from(kind)))
                .remedy("unpack the archive with tar, and give haul the image")),
        }
    }

    /// The data of a header that says something of the next one.
    fn bytes(&mut self, at: u64, len: u64, most: u64, what: &str) -> Result<Vec<u8>> {
        if len > most {
            return Err(self.bad(at + SIZE, format!("{what} of {len} bytes, more than {most},")));
        }
        let data = self.data(len, &what)?;
        read_vec(self.disk, data.start, to_usize(len))
    }

    fn member(&mut self, at: u64, header: &Header<'_>, size: u64, ahead: Ahead) -> Result<Step> {
        let (records, known) = ahead.records.unzip();
        let known = known.unwrap_or_default();
        let stored = known.size.unwrap_or(size);
        let (size, sparse) = match (header.kind(), known.sparse) {
            (b'S', pax::Sparse::No) => {
                self.skip_extensions(at, header)?;
                let size =
                    header.real_size().ok_or_else(|| self.bad(at + 483, "a size that is no number"))?;
                (size, Some(Map::Header(at)))
            }
            (b'S', _) => return Err(self.bad(at, "a file that is sparse in two ways")),
            (_, pax::Sparse::No) => (stored, None),
            (_, pax::Sparse::Records(size)) => (size, records.map(Map::Records)),
            (_, pax::Sparse::Data(size)) => (size, Some(Map::Data)),
        };
        let name = known.name.or(ahead.name).unwrap_or_else(|| header.name());
        if name.len() > MAX_NAME || name.is_empty() {
            return Err(self.bad(at, format!("a name of {} bytes, not 1 to {MAX_NAME},", name.len())));
        }
        let name = String::from_utf8_lossy(&name).into_owned();
        let data = self.data(stored, &format!("the member {name:?}"))?;
        Ok(Step::Member(Member { name, size, at, data, sparse }))
    }

    /// Leaves the extension blocks of an old GNU sparse header behind.
    fn skip_extensions(&mut self, at: u64, header: &Header<'_>) -> Result<()> {
        let mut extended = header.sparse().extended;
        for _ in 0..sparse::MAX_RUNS {
            if !extended {
                return Ok(());
            }
            extended = SparsePiece::extension(&self.block("a sparse map")?).extended;
        }
        Err(self.bad(at, "a sparse map that is too long"))
    }

    /// What is behind the first zero block: another one and nothing but zeroes, to fill the last record of a tape.
    fn end(&mut self) -> Result<()> {
        let mut bytes = vec![0; 1 << 16];
        while self.at < self.disk.size() {
            let Some(data) = self.disk.next_data(self.at)? else { break };
            let len = to_usize(data.len().min(bytes.len() as u64));
            let piece = &mut bytes[..len];
            self.disk.read_at(piece, data.start)?;
            if let Some(i) = piece.iter().position(|byte| *byte != 0) {
                let at = data.start + i as u64;
                return Err(damaged(
                    "archive.trailing",
                    &self.name,
                    at,
                    "there is something behind the archive's end",
                )
                .because("a second archive in it may hold another disk")
                .remedy("if the rest does not belong to it, cut it off a copy"));
            }
            self.at = data.start + len as u64;
        }
        Ok(())
    }
}

impl Member {
    /// Where its header is: no other member has the same.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The member of the archive `disk` as a file of its own, read in place.
    pub(super) fn open(&self, disk: &Arc<dyn ReadAt>) -> Result<Arc<dyn ReadAt>> {
        let archive = disk.name();
        let name = format!("{archive}:{}", self.name.escape_debug());
        let bad = |why: String| {
            Error::new(Kind::Image, "archive.sparse", format!("cannot read {name}"))
                .because(format!("the map of a sparse file at offset {}: {why}", self.at))
                .fact("image", &archive)
                .fact("offset", self.at)
        };
        let (data, runs) = match &self.sparse {
            None => return Ok(Arc::new(Window::new(disk.clone(), self.data, name))),
            Some(Map::Header(at)) => (self.data, sparse::from_header(disk, *at)?),
            Some(Map::Records(records)) => {
                let bytes = read_vec(disk, records.start, to_usize(records.len()))?;
                (self.data, pax::runs(&bytes))
            }
            Some(Map::Data) => sparse::from_data(disk, self.data)?,
        };
        let runs = runs.map_err(bad)?;
        Ok(Arc::new(sparse::SparseFile::new(disk.clone(), data, runs, self.size, &name).map_err(bad)?))
    }
}
