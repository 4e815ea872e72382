//! A sparse extent: the part of a disk that one file with grain tables holds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::SECTOR;
use super::header::{GD_AT_END, Header, TABLE_ENTRIES, TABLE_SECTORS, bad_field, bytes, kind, marker};
use super::unpack::{Packed, Unpacker};
use crate::error::{Error, Result};
use crate::image::cache::Cache;
use crate::io::{ReadAt, check_range, read_array, read_vec};
use crate::unit::{Extent, MIB, to_usize};

/// Bytes of grain tables kept in memory: at grains of 64 KiB they map 128 GiB of the disk.
const TABLE_CACHE: usize = 8 << 20;
/// Bytes of unpacked grains kept in memory, for reads of less than a grain.
const GRAIN_CACHE: usize = 8 << 20;
/// Tables side by side in the file that are read at once.
const TABLES_AT_ONCE: usize = 32;
/// Bytes of a grain table.
const TABLE_BYTES: u64 = TABLE_SECTORS * SECTOR;
/// The most compressed bytes read at once for grains that follow, in bytes.
const READ_AHEAD: u64 = MIB;
/// The longest run of data reported at once, in bytes: it bounds what one question about data looks at.
const LONGEST_RUN: u64 = 16 * MIB;

/// What the extents of a disk share: caches, by extent and number, and the decompressors of threads.
pub(super) struct Shared {
    tables: Cache<[u32]>,
    grains: Cache<[u8]>,
    unpackers: Mutex<Vec<Unpacker>>,
}

impl Shared {
    pub(super) fn new() -> Self {
        Shared {
            tables: Cache::new(TABLE_CACHE),
            grains: Cache::new(GRAIN_CACHE),
            unpackers: Mutex::default(),
        }
    }

    fn unpackers(&self) -> MutexGuard<'_, Vec<Unpacker>> {
        self.unpackers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One sparse extent, read from any thread. Holds the grain directory, at most 8 MiB.
pub(super) struct SparseExtent {
    file: Arc<dyn ReadAt>,
    name: String,
    header: Header,
    /// Bytes of the disk in it.
    size: u64,
    /// Bytes of a grain.
    grain: u64,
    /// Where tables are, in sectors, 0 for none.
    directory: Vec<u32>,
    /// Header, descriptor and grain directory.
    reserved: [Extent; 3],
    owner: u64,
    shared: Arc<Shared>,
}

/// Where a run of the extent's bytes comes from.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Hole,
    /// As they are, from this byte of the file on.
    Plain(u64),
    /// A packed grain, whose marker is at this byte of the file.
    Packed(u64),
}

struct Run {
    place: Place,
    len: u64,
}

impl SparseExtent {
    /// The extent on `file`, whose `header` was read, as number `owner` of a disk that takes `sectors` of it. Reads and
    /// checks the grain directory.
    pub(super) fn new(
        file: Arc<dyn ReadAt>,
        header: Header,
        sectors: u64,
        owner: u64,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        let name = file.name();
        // Some products round the capacity up to whole grains (VirtualBox does); the descriptor has the disk's length.
        if sectors > header.capacity || header.capacity - sectors >= header.grain {
            let why = format!("{} contradicts the descriptor, which says {sectors} sectors", header.capacity);
            return Err(bad_field(&name, "capacity", 12, why));
        }
        let (offset, at) = match header.directory_offset {
            GD_AT_END => {
                let (footer, at) = footer(&file, &header)?;
                (footer.directory_offset, at)
            }
            offset => (offset, 0),
        };
        let place = Extent::at(bytes(offset), header.tables() * 4);
        let reserved = [Extent::new(0, SECTOR), header.descriptor(), place];
        let bad = |why: String| Err(bad_field(&name, "gdOffset", at + 56, why));
        if place.end > file.size() {
            return bad(format!(
                "the grain directory at {place:?} ends beyond the end of the file at {}",
                file.size()
            ));
        }
        if reserved[..2].iter().any(|other| !other.intersect(place).is_empty()) {
            return bad(format!("the grain directory at {place:?} overlaps the header or the descriptor"));
        }
        let entries = read_vec(&file, place.start, to_usize(place.len()))?;
        let directory = little_endian(&entries);
        check_directory(&name, &directory, &reserved, file.size())?;
        let (size, grain) = (bytes(sectors), bytes(header.grain));
        Ok(SparseExtent { file, name, header, size, grain, directory, reserved, owner, shared })
    }

    /// The key of table or grain `n` in a cache.
    fn key(&self, n: u64) -> u64 {
        self.owner << 32 | n
    }

    /// The grain table `group`; `None` if it maps nothing. Reads those after it too where they are side by side.
    fn table(&self, group: usize) -> Result<Option<Arc<[u32]>>> {
        let sector = self.directory[group];
        if sector == 0 {
            return Ok(None);
        }
        if let Some(table) = self.shared.tables.get(self.key(group as u64)) {
            return Ok(Some(table));
        }
        let place = Extent::at(bytes(sector.into()), TABLE_BYTES);
        // A table in a hole of a sparse file maps nothing: terabytes of such tables cost no reading.
        if self.file.next_data(place.start)?.is_none_or(|data| data.start >= place.end) {
            return Ok(None);
        }
        let side_by_side =
            |(i, other): &(u64, &u32)| u64::from(**other) == u64::from(sector) + i * TABLE_SECTORS;
        let after = (0..).zip(&self.directory[group..]).take(TABLES_AT_ONCE);
        let count = after.take_while(side_by_side).count() as u64;
        let read = read_vec(&self.file, place.start, to_usize(count * TABLE_BYTES))?;
        let mut first = None;
        for (i, table) in (group as u64..).zip(read.chunks_exact(to_usize(TABLE_BYTES))) {
            let table: Arc<[u32]> = little_endian(table).into();
            self.shared.tables.put(self.key(i), Arc::clone(&table), to_usize(TABLE_BYTES));
            first.get_or_insert(table);
        }
        Ok(first)
    }

    /// Where the grain `nth` is, of which the disk wants bytes up to `end`, by its entry in `table`.
    fn place(&self, table: &[u32], nth: u64, end: u64) -> Result<Place> {
        let index = to_usize(nth % TABLE_ENTRIES);
        let entry = table[index];
        if entry == 0 || (entry == 1 && self.header.zeroed_grains()) {
            return Ok(Place::Hole);
        }
        let start = bytes(entry.into());
        let least = if self.header.compressed() { SECTOR } else { end - nth * self.grain };
        let grain = Extent::at(start, least);
        if grain.end > self.file.size() {
            let why =
                format!("the grain at {grain:?} ends beyond the end of the file at {}", self.file.size());
            return Err(self.bad_entry(nth, why));
        }
        if self.reserved.iter().any(|other| !other.intersect(grain).is_empty()) {
            let why = format!("the grain at {grain:?} overlaps header, descriptor or grain directory");
            return Err(self.bad_entry(nth, why));
        }
        Ok(if self.header.compressed() { Place::Packed(start) } else { Place::Plain(start) })
    }

    fn bad_entry(&self, nth: u64, why: impl Into<String>) -> Error {
        let table = self.directory[to_usize(nth / TABLE_ENTRIES)];
        let offset = bytes(table.into()) + nth % TABLE_ENTRIES * 4;
        bad_field(&self.name, "grain table entry", offset, why)
    }

    /// The run at `at`, not beyond `limit` (at < limit <= size).
    fn run_at(&self, at: u64, limit: u64) -> Result<Run> {
        let span = self.grain * TABLE_ENTRIES;
        let group = at / span;
        let Some(table) = self.table(to_usize(group))? else {
            let after = &self.directory[to_usize(group) + 1..to_usize((limit - 1) / span) + 1];
            let none = after.iter().take_while(|sector| **sector == 0).count();
            let end = ((group + 1 + none as u64) * span).min(limit);
            return Ok(Run { place: Place::Hole, len: end - at });
        };
        let limit = limit.min((group + 1) * span);
        let mut first = None;
        let mut end = at;
        while end < limit {
            let nth = end / self.grain;
            let grain_end = ((nth + 1) * self.grain).min(limit);
            let place = match self.place(&table, nth, grain_end)? {
                Place::Plain(start) => Place::Plain(start + end % self.grain),
                other => other,
            };
            match (first, place) {
                (None, Place::Packed(_)) => return Ok(Run { place, len: grain_end - at }),
                (None, _) => first = Some(place),
                (Some(Place::Hole), Place::Hole) => {}
                (Some(Place::Plain(start)), Place::Plain(next)) if next == start + (end - at) => {}
                _ => break,
            }
            end = grain_end;
        }
        Ok(Run { place: first.unwrap_or(Place::Hole), len: end - at })
    }

    /// Reads the part at `at` of the grain packed at `packed`; `remaining` bytes are still wanted from there.
    fn read_packed(
        &self,
        unpacker: &mut Unpacker,
        buf: &mut [u8],
        at: u64,
        packed: u64,
        remaining: u64,
    ) -> Result<()> {
        let nth = at / self.grain;
        // What the disk has of the grain; the rest of the last one may be left out, and means nothing.
        let needed = to_usize(self.grain.min(self.size - nth * self.grain));
        let packed = Packed { owner: self.owner, at: packed, lba: nth * self.header.grain };
        let mut unpack = |grain: &mut [u8]| match unpacker.unpack(
            &*self.file,
            &packed,
            remaining.min(READ_AHEAD),
            grain,
        )? {
            Ok(len) if len >= needed => Ok(()),
            Ok(len) => {
                Err(self.bad_grain(nth, packed.at, format!("it unpacks to {len} bytes instead of {needed}")))
            }
            Err(why) => Err(self.bad_grain(nth, packed.at, why)),
        };
        if buf.len() as u64 == self.grain {
            return unpack(buf);
        }
        let key = self.key(nth);
        let grain = match self.shared.grains.get(key) {
            Some(grain) => grain,
            None => {
                let mut grain = vec![0; to_usize(self.grain)];
                unpack(&mut grain)?;
                let grain: Arc<[u8]> = grain.into();
                self.shared.grains.put(key, Arc::clone(&grain), grain.len());
                grain
            }
        };
        let from = to_usize(at % self.grain);
        buf.copy_from_slice(&grain[from..from + buf.len()]);
        Ok(())
    }

    fn bad_grain(&self, nth: u64, at: u64, why: String) -> Error {
        bad_field(&self.name, "grain", at, why).fact("sector", nth * self.header.grain)
    }
}

fn little_endian(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect()
}

/// The footer of a stream, and where it is: the header again, with the true `gdOffset`, between its marker and the
/// end-of-stream marker, which are the last three sectors.
fn footer(file: &dyn ReadAt, header: &Header) -> Result<(Header, u64)> {
    let name = file.name();
    let Some(start) = file.size().checked_sub(3 * SECTOR) else {
        return Err(bad_field(&name, "footer marker", 0, "the file is too short for a footer"));
    };
    if read_array::<16>(file, start)?[8..] != marker(1, kind::FOOTER)[8..16] {
        let why = "there is no footer: the stream was cut off";
        return Err(bad_field(&name, "footer marker", start, why));
    }
    let (at, end) = (start + SECTOR, start + 2 * SECTOR);
    let footer = Header::read(file, at)?;
    if footer.directory_offset == GD_AT_END {
        return Err(bad_field(&name, "gdOffset", at + 56, "the footer does not say where the directory is"));
    }
    for (field, offset, same) in [
        ("flags", 8, footer.flags == header.flags),
        ("capacity", 12, footer.capacity == header.capacity),
        ("grainSize", 20, footer.grain == header.grain),
    ] {
        if !same {
            return Err(bad_field(&name, field, at + offset, "footer and header differ"));
        }
    }
    if read_array(file, end)? != [0; 16] {
        return Err(bad_field(&name, "end-of-stream marker", end, "it is not there: the stream was cut off"));
    }
    Ok((footer, at))
}

/// Every grain table must be whole in the file, apart from what is `reserved` (the directory last) and from every
/// other one: so the tables of an extent are no larger than its file, and looking through them ends.
fn check_directory(name: &str, directory: &[u32], reserved: &[Extent; 3], file_size: u64) -> Result<()> {
    let start = reserved[2].start;
    let bad =
        |i: usize, why: String| Err(bad_field(name, "grain directory entry", start + i as u64 * 4, why));
    for (i, sector) in directory.iter().enumerate().filter(|(_, sector)| **sector != 0) {
        let table = Extent::at(bytes((*sector).into()), TABLE_BYTES);
        if table.end > file_size {
            return bad(i, format!("the table at {table:?} ends beyond the end of the file at {file_size}"));
        }
        if reserved.iter().any(|other| !other.intersect(table).is_empty()) {
            return bad(i, format!("the table at {table:?} overlaps header, descriptor or grain directory"));
        }
    }
    let mut sorted: Vec<u32> = directory.iter().copied().filter(|sector| *sector != 0).collect();
    sorted.sort_unstable();
    let clash = sorted.windows(2).find(|pair| u64::from(pair[1] - pair[0]) < TABLE_SECTORS);
    match clash.and_then(|pair| directory.iter().rposition(|sector| *sector == pair[1])) {
        Some(i) => bad(i, format!("the table at {} overlaps another one", bytes(directory[i].into()))),
        None => Ok(()),
    }
}

impl ReadAt for SparseExtent {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let end = offset + buf.len() as u64;
        let mut unpacker = None;
        let mut rest = buf;
        let mut at = offset;
        while at < end {
            let run = self.run_at(at, end)?;
            let (part, after) = rest.split_at_mut(to_usize(run.len));
            match run.place {
                Place::Hole => part.fill(0),
                Place::Plain(start) => self.file.read_at(part, start)?,
                Place::Packed(packed) => {
                    let unpacker = unpacker.get_or_insert_with(|| {
                        let kept = self.shared.unpackers().pop();
                        kept.unwrap_or_else(Unpacker::new)
                    });
                    self.read_packed(unpacker, part, at, packed, end - at)?;
                }
            }
            at += run.len;
            rest = after;
        }
        self.shared.unpackers().extend(unpacker);
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        let mut found: Option<Extent> = None;
        let mut at = from;
        while at < self.size {
            let run = self.run_at(at, self.size)?;
            match (&mut found, run.place) {
                (Some(_), Place::Hole) => break,
                (None, Place::Hole) => {}
                (Some(found), _) => found.end += run.len,
                (None, _) => found = Some(Extent::at(at, run.len)),
            }
            at += run.len;
            if found.is_some_and(|found| found.len() >= LONGEST_RUN) {
                break;
            }
        }
        Ok(found)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
