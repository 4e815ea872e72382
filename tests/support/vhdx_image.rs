//! VHDX images with damage in them, and logs as a killed program leaves them ([MS-VHDX] 2.2 and 2.3).

#![allow(dead_code, reason = "each test binary uses a part")]

use std::ops::Range;

use super::images::{Bench, Random, arg, run};

/// Bytes of a sector of the log.
pub const SECTOR: usize = 4096;
/// Where QEMU puts the log of 1 MiB, the block allocation table and the metadata.
pub const LOG: Range<usize> = 1 << 20..2 << 20;
pub const BAT: usize = 2 << 20;
pub const METADATA: usize = 3 << 20;
/// Where the first block is at the earliest.
pub const DATA: usize = 4 << 20;
/// Where the structures with a checksum are, and their lengths: headers and region tables.
pub const SEALED: [(usize, usize); 4] =
    [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10), (256 << 10, 64 << 10)];
/// The log's GUID in images of [`interrupted`].
const GUID: [u8; 16] = [7; 16];

/// Puts `value` at `at`.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn crc(bytes: &[u8]) -> [u8; 4] {
    let mut bytes = bytes.to_vec();
    bytes[4..8].fill(0);
    crc32c::crc32c(&bytes).to_le_bytes()
}

/// Makes the checksums of `image` right again.
pub fn seal(image: &mut [u8]) {
    for (at, len) in SEALED {
        let Some(structure) = image.get(at..at + len) else { continue };
        let sum = crc(structure);
        put(image, at + 4, &sum);
    }
}

/// The disk of `bench` as an image by QEMU with the options `options`.
pub fn by_qemu(bench: &Bench, options: &str) -> Vec<u8> {
    let path = bench.path("by-qemu.vhdx");
    run("qemu-img", &["convert", "-f", "raw", "-O", "vhdx", "-o", options, arg(&bench.raw), arg(&path)]);
    std::fs::read(path).unwrap()
}

/// The disk of `bench`, whose length is a multiple of 1 MiB, as a fixed image with blocks of 1 MiB, the first of which
/// is at [`DATA`]: QEMU leaves room before them.
pub fn fixed(bench: &Bench) -> Vec<u8> {
    let mut image = by_qemu(bench, "block_size=1M,subformat=fixed,block_state_zero=off");
    let blocks = bench.bytes.chunks(1 << 20);
    let count = blocks.len();
    image.truncate(DATA);
    for (i, block) in blocks.enumerate() {
        let at = image.len() as u64;
        put(&mut image, BAT + i * 8, &(at | 6).to_le_bytes());
        image.extend(block);
    }
    assert_eq!(image.len(), DATA + (count << 20));
    image
}

/// What an entry of a log changes.
#[derive(Clone)]
pub enum Change {
    /// The sector at this offset of the file.
    Data(u64, Vec<u8>),
    /// So many bytes at this offset become zeroes.
    Zeroes(u64, u64),
}

/// An entry of a log.
pub struct Entry {
    pub guid: [u8; 16],
    pub sequence: u64,
    /// The sector of the log at which the oldest entry that counts begins.
    pub tail: usize,
    pub flushed_size: u64,
    pub last_size: u64,
    pub changes: Vec<Change>,
}

impl Entry {
    pub fn encode(&self) -> Vec<u8> {
        let heads = (64 + self.changes.len() * 32).next_multiple_of(SECTOR);
        let mut bytes = vec![0; heads];
        for (i, change) in self.changes.iter().enumerate() {
            let at = 64 + i * 32;
            let offset = match change {
                Change::Data(offset, sector) => {
                    put(&mut bytes, at, b"desc");
                    put(&mut bytes, at + 4, &sector[SECTOR - 4..]);
                    put(&mut bytes, at + 8, &sector[..8]);
                    let sequence = self.sequence.to_le_bytes();
                    let (low, high) = sequence.split_at(4);
                    bytes.extend([b"data", high, &sector[8..SECTOR - 4], low].concat());
                    offset
                }
                Change::Zeroes(offset, len) => {
                    put(&mut bytes, at, b"zero");
                    put(&mut bytes, at + 8, &len.to_le_bytes());
                    offset
                }
            };
            put(&mut bytes, at + 16, &offset.to_le_bytes());
            put(&mut bytes, at + 24, &self.sequence.to_le_bytes());
        }
        let len = u32::try_from(bytes.len()).unwrap();
        let head = [
            b"loge\0\0\0\0",
            &len.to_le_bytes()[..],
            &u32::try_from(self.tail * SECTOR).unwrap().to_le_bytes(),
            &self.sequence.to_le_bytes(),
            &u32::try_from(self.changes.len()).unwrap().to_le_bytes(),
            &[0; 4],
            &self.guid,
            &self.flushed_size.to_le_bytes(),
            &self.last_size.to_le_bytes(),
        ];
        put(&mut bytes, 0, &head.concat());
        let sum = crc(&bytes);
        put(&mut bytes, 4, &sum);
        bytes
    }
}

/// Puts the entry `bytes` at sector `at` of the log of `image`, which goes on at its start where it ends.
pub fn put_entry(image: &mut [u8], at: usize, bytes: &[u8]) {
    let log = &mut image[LOG];
    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
        put(log, (at + i) % (log.len() / SECTOR) * SECTOR, sector);
    }
}

/// Makes both headers name the log's entries with `guid`, and its checksums right.
pub fn name_log(image: &mut [u8], guid: [u8; 16]) {
    for (at, _) in &SEALED[..2] {
        put(image, at + 48, &guid);
    }
    seal(image);
}

fn apply(image: &mut [u8], change: &Change) {
    let place = |at: u64| usize::try_from(at).unwrap();
    match change {
        Change::Data(at, bytes) => put(image, place(*at), bytes),
        Change::Zeroes(at, len) => image[place(*at)..place(at + len)].fill(0),
    }
}

/// The image `whole` as a program leaves it that is killed while it changes the block allocation table and the
/// metadata: both are damaged, and what is right is in the log. The log begins anywhere and may go on at its start;
/// around the entries that count are older ones, others' ones and one cut off.
pub fn interrupted(whole: &[u8], random: &mut Random) -> Vec<u8> {
    let place = |at: usize| at as u64;
    let right = |at: usize| Change::Data(place(at), whole[at..at + SECTOR].to_vec());
    let wrong = |random: &mut Random, at: usize| {
        let mut sector = vec![0; SECTOR];
        random.fill(&mut sector);
        Change::Data(place(at), sector)
    };
    // What the sectors are in the end, in several entries; a change that is not the last of its place is wrong.
    let (table, items) = ([BAT, BAT + SECTOR], [METADATA, METADATA + (64 << 10)]);
    let empty = whole[BAT + SECTOR..BAT + 2 * SECTOR].iter().all(|byte| *byte == 0);
    let last = if empty { Change::Zeroes(place(BAT + SECTOR), place(SECTOR)) } else { right(BAT + SECTOR) };
    let mut entries = vec![
        // So many that their descriptors fill a sector and more.
        (0..120 + random.below(20)).map(|_| wrong(random, table[0])).collect(),
        vec![wrong(random, table[1]), Change::Zeroes(place(items[1]), place(SECTOR))],
        vec![right(items[0]), Change::Zeroes(place(BAT), place(2 * SECTOR)), right(items[1])],
        vec![right(table[0]), last],
    ];
    let before = usize::try_from(random.below(3)).unwrap();
    if random.below(2) == 0 {
        entries.remove(0);
    }

    let mut image = whole.to_vec();
    let sectors = LOG.len() / SECTOR;
    let old = |guid, sequence| Entry {
        guid,
        sequence,
        tail: 0,
        flushed_size: 0,
        last_size: 0,
        changes: vec![wrong(&mut Random(sequence), table[0])],
    };
    // Others' entries, and those of a round long past, everywhere: each of two sectors.
    for at in 0..sectors / 2 {
        let mut entry = if at % 2 == 0 { old([9; 16], 1000 + place(at)) } else { old(GUID, 3 + place(at)) };
        entry.tail = at * 2;
        put_entry(&mut image, at * 2, &entry.encode());
    }
    let first = usize::try_from(random.below(place(sectors))).unwrap();
    let sequence = if random.below(2) == 0 { 1000 } else { u64::from(u32::MAX) - 1 };
    let (mut at, mut starts) = (first, Vec::new());
    let before = before.min(entries.len() - 2);
    for (i, changes) in entries.iter().enumerate() {
        starts.push(at % sectors);
        let entry = Entry {
            guid: GUID,
            sequence: sequence + place(i),
            tail: starts[if i < before { 0 } else { before }],
            flushed_size: place(whole.len()),
            last_size: place(whole.len()),
            changes: changes.clone(),
        };
        let bytes = entry.encode();
        put_entry(&mut image, at, &bytes);
        at += bytes.len() / SECTOR;
    }
    // The next one was not written to its end.
    let next = Entry {
        guid: GUID,
        sequence: sequence + place(entries.len()),
        tail: starts[before],
        flushed_size: 0,
        last_size: 0,
        changes: vec![wrong(random, BAT)],
    };
    let mut bytes = next.encode();
    if let Some(byte) = bytes.get_mut(5000) {
        *byte ^= 1;
    }
    put_entry(&mut image, at, &bytes);

    // The file: older entries were made, of those that count any.
    for places in [table, items] {
        places.into_iter().for_each(|at| apply(&mut image, &wrong(random, at)));
    }
    entries[..before].iter().flatten().for_each(|change| apply(&mut image, change));
    entries[before..]
        .iter()
        .flatten()
        .filter(|_| random.below(2) == 0)
        .for_each(|change| apply(&mut image, change));
    name_log(&mut image, GUID);
    image
}
