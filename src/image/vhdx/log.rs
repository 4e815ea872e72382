//! The log: changes to the file's tables that were recorded, and not all made, when the image was last written. They
//! are made here in memory, over the file. Field names are those of [MS-VHDX] 2.3; numbers are little-endian.

use std::collections::BTreeMap;

use super::header::Header;
use super::{Guid, bad_field, checksum, field, u32_at, u64_at};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, check_range, lay_over, read_vec};
use crate::unit::{Extent, ExtentMap, Extents, MIB, to_usize};

/// Bytes of a sector of the log, and of what a descriptor changes.
const SECTOR: usize = 4096;
/// Bytes of an entry's header.
const ENTRY_HEADER: usize = 64;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 32;
/// The longest log that is replayed: it is held in memory. Programs make logs of 1 MiB.
const MAX_LOG: u64 = 16 * MIB;
/// The most stretches of the file that a log may make zeroes.
const MAX_ZEROED: usize = 4096;

/// The file as it is when its log is replayed. Nothing is written.
pub struct Replayed<F> {
    file: F,
    size: u64,
    /// Sectors the log holds, by their offset in the file.
    sectors: BTreeMap<u64, Box<[u8; SECTOR]>>,
    /// What the log makes zeroes of, unless it is among the sectors.
    zeroed: ExtentMap,
}

/// A valid entry of the log.
struct Entry {
    sequence: u64,
    /// The sector of the log at which the oldest entry that still counted began.
    tail: usize,
    /// Length in sectors.
    len: usize,
    /// How long the file was at least when the entry was written, in bytes.
    flushed_size: u64,
    /// How long the file is to be at least, in bytes.
    last_size: u64,
    descriptors: usize,
}

/// The log in memory, in sectors; it goes on at its start where it ends.
struct Log(Vec<[u8; SECTOR]>);

/// Makes the changes of the log that `header` names. The header must have a log GUID.
pub fn replay<F: ReadAt>(file: F, name: &str, header: &Header, guid: &Guid) -> Result<Replayed<F>> {
    let refuse = |why: String| {
        Error::new(
            Kind::Image,
            "vhdx.log",
            format!("{name}: this VHDX image has a log that must be replayed"),
        )
        .because(why)
        .remedy(
            "let the program that wrote the image open and close it, or `qemu-img check -r all` a copy of it",
        )
        .fact("image", name)
        .fact("offset", header.log.start)
    };
    if header.log.len() > MAX_LOG {
        return Err(refuse(format!("the log is {} bytes long, and 16 MiB are read", header.log.len())));
    }
    let bytes = read_vec(&file, header.log.start, to_usize(header.log.len()))?;
    let log = Log(bytes.as_chunks::<SECTOR>().0.to_vec());
    drop(bytes);
    let entries: Vec<Option<Entry>> = (0..log.0.len()).map(|at| log.entry(at, guid)).collect();
    let sequence = active_sequence(&entries);
    let Some(last) = sequence.last().and_then(|at| entries.get(*at)?.as_ref()) else {
        return Err(refuse("no valid sequence of entries is in it: the image is damaged".into()));
    };
    if file.size() < last.flushed_size {
        let why = format!("the file ends at {}, and was {} bytes long", file.size(), last.flushed_size);
        return Err(bad_field(name, "flushed_file_offset", header.log.start, why));
    }
    let size = file.size().max(last.last_size);
    let mut replayed = Replayed { file, size, sectors: BTreeMap::new(), zeroed: ExtentMap::new() };
    for at in sequence.iter().skip_while(|at| **at != last.tail) {
        if let Some(entry) = entries.get(*at).and_then(Option::as_ref) {
            replayed.apply(&log, *at, entry).map_err(&refuse)?;
        }
    }
    Ok(replayed)
}

impl Log {
    /// The sector `at`, counted on beyond the log's end.
    fn sector(&self, at: usize) -> &[u8; SECTOR] {
        &self.0[at % self.0.len()]
    }

    /// Descriptor `i` of the entry at sector `at`: descriptors follow the entry's header, sector after sector.
    fn descriptor(&self, at: usize, i: usize) -> [u8; DESCRIPTOR] {
        let place = ENTRY_HEADER + i * DESCRIPTOR;
        field(self.sector(at + place / SECTOR), place % SECTOR)
    }

    /// The entry at sector `at`, if one that counts is there. Its structure is checked before its checksum is
    /// computed: no sector begins an entry and is inside another one, so that looking at all of them ends soon.
    fn entry(&self, at: usize, guid: &Guid) -> Option<Entry> {
        let first = self.sector(at);
        let len = u32_at(first, 8) as usize;
        let tail = u32_at(first, 12) as usize;
        let sequence = u64_at(first, 16);
        let descriptors = u32_at(first, 24) as usize;
        let whole = |n: usize| n.is_multiple_of(SECTOR) && n / SECTOR <= self.0.len();
        let valid = first.starts_with(b"loge")
            && field::<16>(first, 32) == *guid
            && sequence > 0
            && len > 0
            && whole(len)
            && whole(tail)
            && tail / SECTOR < self.0.len();
        let len = len / SECTOR;
        let heads = (ENTRY_HEADER + descriptors * DESCRIPTOR).div_ceil(SECTOR);
        if !valid || heads > len {
            return None;
        }
        let mut data = heads;
        for i in 0..descriptors {
            let descriptor = self.descriptor(at, i);
            let change = Change::of(&descriptor)?;
            if u64_at(&descriptor, 24) != sequence {
                return None;
            }
            if let Change::Data { .. } = change {
                let sector = self.sector(at + data);
                let halves = u64::from(u32_at(sector, 4)) << 32 | u64::from(u32_at(sector, SECTOR - 4));
                if data >= len || !sector.starts_with(b"data") || halves != sequence {
                    return None;
                }
                data += 1;
            }
        }
        if data != len {
            return None;
        }
        let rest = (at + 1..at + len).map(|at| self.sector(at));
        let sum = rest.fold(checksum(first), |sum, sector| crc32c::crc32c_append(sum, sector));
        (sum == u32_at(first, 4)).then(|| Entry {
            sequence,
            tail: tail / SECTOR,
            len,
            flushed_size: u64_at(first, 48),
            last_size: u64_at(first, 56),
            descriptors,
        })
    }
}

/// What a descriptor changes.
enum Change {
    /// The sector at this offset of the file: its first 8 and last 4 bytes are in the descriptor.
    Data { offset: u64, first: [u8; 8], last: [u8; 4] },
    /// These bytes of the file become zeroes.
    Zeroes(Extent),
}

impl Change {
    /// The change of `descriptor`, unless it is none.
    fn of(descriptor: &[u8; DESCRIPTOR]) -> Option<Change> {
        let offset = u64_at(descriptor, 16);
        let whole = |n: u64| n.is_multiple_of(SECTOR as u64) && n <= i64::MAX.unsigned_abs();
        if descriptor.starts_with(b"desc") && whole(offset) {
            return Some(Change::Data { offset, first: field(descriptor, 8), last: field(descriptor, 4) });
        }
        let length = u64_at(descriptor, 8);
        let zeroes = descriptor.starts_with(b"zero") && whole(offset) && whole(length);
        zeroes.then(|| Change::Zeroes(Extent::at(offset, length)))
    }
}

/// The sectors at which the entries of the active sequence begin, oldest first ([MS-VHDX] 2.3.2 and 2.3.3): of all
/// runs of entries that follow each other in place and number, and whose last one's tail is among them, the one that
/// ends with the highest number. Empty if there is none.
fn active_sequence(entries: &[Option<Entry>]) -> Vec<usize> {
    let count = entries.len();
    let entry = |at: usize| entries.get(at).and_then(Option::as_ref);
    let mut best: (u64, Vec<usize>) = (0, Vec::new());
    let mut tail = 0;
    while tail < count {
        let mut run = Vec::new();
        let (mut head, mut sectors, mut last) = (tail, 0, None);
        while let Some(next) = entry(head % count) {
            sectors += next.len;
            if sectors > count
                || last.is_some_and(|last: &Entry| last.sequence.checked_add(1) != Some(next.sequence))
            {
                break;
            }
            run.push(head % count);
            head += next.len;
            last = Some(next);
        }
        match last {
            Some(last) if run.contains(&last.tail) => {
                if last.sequence > best.0 {
                    best = (last.sequence, run);
                }
                tail = head;
            }
            _ => tail += 1,
        }
    }
    best.1
}

impl<F> Replayed<F> {
    /// Makes the changes of `entry`, which is at sector `at` of the log; `Err` says why they are too many.
    fn apply(&mut self, log: &Log, at: usize, entry: &Entry) -> std::result::Result<(), String> {
        let mut data = at + (ENTRY_HEADER + entry.descriptors * DESCRIPTOR).div_ceil(SECTOR);
        for i in 0..entry.descriptors {
            match Change::of(&log.descriptor(at, i)) {
                Some(Change::Data { offset, first, last }) => {
                    let mut sector = Box::new(*log.sector(data));
                    sector[..8].copy_from_slice(&first);
                    sector[SECTOR - 4..].copy_from_slice(&last);
                    self.sectors.insert(offset, sector);
                    self.size = self.size.max(offset + SECTOR as u64);
                    data += 1;
                }
                Some(Change::Zeroes(extent)) => {
                    let gone: Vec<u64> =
                        self.sectors.range(extent.start..extent.end).map(|(at, _)| *at).collect();
                    gone.iter().for_each(|at| drop(self.sectors.remove(at)));
                    self.zeroed.insert(extent);
                    // Each insertion moves those after it.
                    if self.zeroed.len() > MAX_ZEROED {
                        return Err(format!("it makes zeroes of more than {MAX_ZEROED} places of the file"));
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Lays what the log changed in `changed` over `buf`, which was read from `offset`.
    fn lay_over(&self, buf: &mut [u8], offset: u64) {
        let asked = Extent::at(offset, buf.len() as u64);
        for part in self.zeroed.within(asked) {
            buf[to_usize(part.start - offset)..to_usize(part.end - offset)].fill(0);
        }
        let first = asked.start / SECTOR as u64 * SECTOR as u64;
        for (at, sector) in self.sectors.range(first..asked.end) {
            lay_over(buf, offset, &sector[..], *at);
        }
    }
}

impl<F: ReadAt> ReadAt for Replayed<F> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        // The log may have made the file longer.
        let inside = to_usize(self.file.size().saturating_sub(offset).min(buf.len() as u64));
        let (there, beyond) = buf.split_at_mut(inside);
        if !there.is_empty() {
            self.file.read_at(there, offset)?;
        }
        beyond.fill(0);
        self.lay_over(buf, offset);
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        let below = if from < self.file.size() { self.file.next_data(from)? } else { None };
        let sector = |at: u64| Extent::at(at, SECTOR as u64).next_extent(from);
        let first = from / SECTOR as u64 * SECTOR as u64;
        let above = self.sectors.range(first..).next().map_or(Ok(None), |(at, _)| sector(*at))?;
        Ok(match (below, above) {
            (Some(below), Some(above)) if above.start < below.start => Some(above),
            (below, above) => below.or(above),
        })
    }

    fn name(&self) -> String {
        self.file.name()
    }
}
