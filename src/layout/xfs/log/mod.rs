//! The log: what a mount would change by it ("XFS Filesystem Structure", "Journaling Log"). Nothing when the record before its
//! head says that the file system was unmounted. A log that merely looks strange is not replayed at all.

mod changes;
mod transactions;

use super::{Step, Superblock, require};
use crate::io::{ReadAt, read_vec};
use crate::layout::Stop;
use crate::layout::field::{be32, be64, bytes, le32};
use crate::unit::to_usize;
use transactions::Transactions;

pub(super) use changes::{Buffer, Changes, Inode, MAX_BUFFER, TREE};

/// A basic block, the log's unit, in bytes.
pub(super) const BB: u64 = 512;
/// First word of a record's header. In every other basic block it is the cycle, the number of the log's round.
const MAGIC: u32 = 0xfeed_babe;
/// What a mounted system may have under way at once: 8 buffers of 256 KiB. Only that near to the head can old and
/// new basic blocks be mixed.
const IN_FLIGHT: u64 = 4096;
/// Bytes of a record whose cycle words one basic block of header holds.
const PER_HEADER: u64 = 32 << 10;
/// Largest record, in basic blocks: its data, and with its header, which may take one for each 32 KiB.
const MAX_RECORD: u64 = 512;
const MAX_WITH_HEADER: u64 = MAX_RECORD + MAX_RECORD * BB / PER_HEADER;
/// The header's length on 64-bit and on 32-bit systems; it decides the checksum.
const HEADER_LENGTHS: [usize; 2] = [328, 324];
/// Length of each further basic block of header, without its padding.
const FURTHER_LENGTH: usize = 260;
/// Where the header's checksum lies.
const CRC: usize = 32;
/// Where the first words of basic blocks are kept in the header, and in each further basic block of it; how many of them.
const CYCLE_DATA: usize = 44;
const FURTHER_DATA: usize = 4;
const WORDS: usize = 64;
/// The format of operations logged by a little-endian system.
const LITTLE_ENDIAN: u32 = 1;
/// The client that logs the unmount, and the flag that says so.
const CLIENT_LOG: u8 = 0xaa;
const UNMOUNT: u8 = 0x20;

/// What a replay of the log of the file system on `disk` changes. Stops where that is not certain.
pub(super) fn changes<D: ReadAt>(disk: &D, sb: &Superblock) -> Step<Changes> {
    let log = Log {
        disk,
        start: sb.log.start * sb.block_size,
        blocks: sb.log.len() * sb.block_size / BB,
        uuid: sb.user_uuid(),
    };
    let head = log.head()?;
    let last = log.last_record(head)?;
    if last.says_unmounted() {
        // mkfs.xfs and xfs_repair write no checksum.
        require(last.sum == 0 || last.intact, || "its last record's checksum does not match".into())?;
        return Ok(Changes::default());
    }
    log.changes(head, last.tail)
}

struct Log<'a, D> {
    disk: &'a D,
    /// Where it lies, in bytes.
    start: u64,
    /// Its length in basic blocks.
    blocks: u64,
    uuid: [u8; 16],
}

/// The cycle of the basic block that `bytes` begin with.
fn cycle(bytes: &[u8]) -> u32 {
    match be32(bytes, 0) {
        MAGIC => be32(bytes, 4),
        cycle => cycle,
    }
}

fn strange(what: &str) -> Stop {
    Stop::Whole(format!("its log must be replayed first, or is damaged: {what}"))
}

/// The place of the log's head, and the cycles before and after it.
#[derive(Clone, Copy)]
struct Head {
    /// The first basic block not yet written in the newest cycle; the log's length when all are.
    at: u64,
    before: u32,
    after: u32,
}

impl<D: ReadAt> Log<'_, D> {
    /// Reads `count` basic blocks from `first`, going on at the log's start when its end is reached.
    fn read(&self, first: u64, count: u64) -> Step<Vec<u8>> {
        let first = first % self.blocks;
        let count = count.min(self.blocks);
        let to_end = count.min(self.blocks - first);
        let mut bytes = read_vec(self.disk, self.start + first * BB, to_usize(to_end * BB))?;
        if to_end < count {
            bytes.extend(read_vec(self.disk, self.start, to_usize((count - to_end) * BB))?);
        }
        Ok(bytes)
    }

    fn cycle_at(&self, block: u64) -> Step<u32> {
        Ok(cycle(&self.read(block, 1)?))
    }

    /// Finds the head: from the start up to it every basic block has the newest cycle, from it to the end the one
    /// before.
    fn head(&self) -> Step<Head> {
        let (before, last) = (self.cycle_at(0)?, self.cycle_at(self.blocks - 1)?);
        require(before != 0, || "its log holds nothing".into())?;
        let mut head = Head { at: self.blocks, before, after: before };
        if before != last {
            let (mut newest, mut at) = (0, self.blocks - 1);
            while at - newest > 1 {
                let middle = newest + (at - newest) / 2;
                *(if self.cycle_at(middle)? == before { &mut newest } else { &mut at }) = middle;
            }
            head = Head { at, before, after: last };
        }
        if head.at < self.blocks && head.before.wrapping_sub(head.after) != 1 {
            return Err(strange("its cycles are no neighbours"));
        }
        self.check_around(head)?;
        Ok(head)
    }

    /// Checks every cycle that writes under way could have left behind or ahead of the head.
    fn check_around(&self, head: Head) -> Step<()> {
        let behind = IN_FLIGHT.min(self.blocks);
        let mut at = head.at + self.blocks - behind;
        let mut left = behind + IN_FLIGHT.min(self.blocks - behind);
        while left > 0 {
            let count = left.min(MAX_RECORD);
            for (block, place) in self.read(at, count)?.chunks_exact(to_usize(BB)).zip(at..) {
                let cycle = cycle(block);
                // xfs_admin and xfs_repair leave some of a new log as never written, which is older than any cycle.
                let sound = if place % self.blocks < head.at {
                    cycle == head.before
                } else {
                    cycle == head.after || cycle == 0
                };
                if !sound {
                    return Err(strange("cycles are mixed near its head"));
                }
            }
            at += count;
            left -= count;
        }
        Ok(())
    }

    /// The record that ends at the head.
    fn last_record(&self, head: Head) -> Step<Record> {
        let most = MAX_WITH_HEADER.min(self.blocks);
        let first = head.at + self.blocks - most;
        let bytes = self.read(first, most)?;
        let blocks = bytes.chunks_exact(to_usize(BB));
        let Some(at) = blocks.clone().rposition(|block| be32(block, 0) == MAGIC) else {
            return Err(strange("no record ends at its head"));
        };
        let (record, rest) = self
            .record(bytes.get(at * to_usize(BB)..).unwrap_or_default(), (first + at as u64) % self.blocks)?;
        holds(rest.is_empty(), "its last record is not complete")?;
        Ok(record)
    }

    /// Reads the record that `bytes` begin with, at basic block `at`, and returns what follows it.
    fn record<'b>(&self, bytes: &'b [u8], at: u64) -> Step<(Record, &'b [u8])> {
        let version = be32(bytes, 8);
        let len = u64::from(be32(bytes, 12));
        let (header, blocks) = lengths(bytes);
        let own = u64::from(cycle(bytes)) << 32 | at;
        holds(be32(bytes, 0) == MAGIC && matches!(version, 1 | 2), "a record's version is not known")?;
        holds(be64(bytes, 16) == own, "a record belongs elsewhere")?;
        holds(self::bytes::<16>(bytes, 304) == self.uuid, "a record belongs to another file system")?;
        let split = |bytes: &'b [u8], len: u64| bytes.split_at_checked(to_usize(len));
        let whole = split(bytes, (header + blocks) * BB);
        let (record, rest) = whole.ok_or_else(|| strange("a record is not complete"))?;
        let data = record.get(to_usize(header * BB)..).unwrap_or_default();
        let sum = le32(record, CRC);
        let summed = data.get(..to_usize(len)).unwrap_or_default();
        let intact = HEADER_LENGTHS.iter().any(|header| checksum(record, *header, summed) == sum);
        let mut data = data.to_vec();
        // The first word of each basic block gave way to the cycle, and is in the header.
        for (i, block) in data.chunks_exact_mut(to_usize(BB)).enumerate() {
            let (header, word) = (i / WORDS, i % WORDS * 4);
            let kept = if header == 0 { CYCLE_DATA } else { header * to_usize(BB) + FURTHER_DATA };
            if let Some(first) = block.first_chunk_mut::<4>() {
                *first = self::bytes(record, kept + word);
            }
        }
        data.truncate(to_usize(len));
        let record = Record {
            lsn: own,
            data,
            tail: be64(record, 24),
            operations: be32(record, 40),
            format: be32(record, 300),
            sum,
            intact,
        };
        Ok((record, rest))
    }

    /// What the records change from `tail` on, as the last one tells it, to the head.
    fn changes(&self, head: Head, tail: u64) -> Step<Changes> {
        let (tail_cycle, tail) = (tail >> 32, tail & u64::from(u32::MAX));
        let mut left = if tail < head.at && tail_cycle == u64::from(head.before) {
            head.at - tail
        } else if (head.at..self.blocks).contains(&tail) && tail_cycle == u64::from(head.after) {
            self.blocks - tail + head.at
        } else {
            return Err(strange("its tail is nowhere"));
        };
        let mut transactions = Transactions::default();
        let mut at = tail;
        while left > 0 {
            let header = self.read(at, 1)?;
            let (headers, blocks) = lengths(&header);
            holds(headers + blocks <= MAX_WITH_HEADER.min(left), "a record is too long")?;
            let bytes = self.read(at, headers + blocks)?;
            let (record, _) = self.record(&bytes, at % self.blocks)?;
            holds(record.sum != 0 && record.intact, "a record's checksum does not match")?;
            holds(record.format == LITTLE_ENDIAN, "it was written by a big-endian system")?;
            transactions.read(&record.data, record.operations, record.lsn)?;
            at += headers + blocks;
            left -= headers + blocks;
        }
        Ok(transactions.changes())
    }
}

/// A record of the log.
struct Record {
    /// Where it is: the cycle above, the basic block below.
    lsn: u64,
    /// What follows its header, with the first words of basic blocks put back.
    data: Vec<u8>,
    /// Where a replay begins when this record is the last.
    tail: u64,
    operations: u32,
    format: u32,
    sum: u32,
    intact: bool,
}

impl Record {
    fn says_unmounted(&self) -> bool {
        let [client, flags] = bytes::<2>(&self.data, 8);
        self.operations == 1 && client == CLIENT_LOG && flags & UNMOUNT != 0
    }
}

/// How many basic blocks the header of a record takes, of which `bytes` begin with the first, and how many its data.
fn lengths(bytes: &[u8]) -> (u64, u64) {
    let (version, len, size) = (be32(bytes, 8), u64::from(be32(bytes, 12)), u64::from(be32(bytes, 320)));
    let header = if version & 2 == 0 { 1 } else { size.div_ceil(PER_HEADER).max(1) };
    (header, len.div_ceil(BB))
}

fn holds(holds: bool, what: &str) -> Step<()> {
    if holds { Ok(()) } else { Err(strange(what)) }
}

/// The checksum of a record: the header without padding and with the checksum taken as zero, the further basic
/// blocks of the header without theirs, then the data.
fn checksum(record: &[u8], header: usize, data: &[u8]) -> u32 {
    let part = |range: std::ops::Range<usize>| record.get(range).unwrap_or_default();
    let mut sum = crc32c::crc32c(part(0..CRC));
    sum = crc32c::crc32c_append(crc32c::crc32c_append(sum, &[0; 4]), part(CRC + 4..header));
    if be32(record, 8) & 2 != 0 {
        for i in 1..(data.len() as u64).div_ceil(PER_HEADER) {
            let at = to_usize(i * BB);
            sum = crc32c::crc32c_append(sum, part(at..at + FURTHER_LENGTH));
        }
    }
    crc32c::crc32c_append(sum, data)
}
