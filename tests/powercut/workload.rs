//! What the guest does to its files, by seed and number: the host knows from them what must be on the disk.

use std::collections::BTreeMap;

/// Files there are at most.
pub const SLOTS: u64 = 40;
/// Folders they are in.
pub const FOLDERS: u64 = 4;

/// Numbers from a seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    /// `len` bytes that no file system can compress.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// One step of the workload. When it is reported, file and folder were made safe by fsync.
#[derive(Clone, Debug)]
pub enum Op {
    /// The file is cut to nothing and written again.
    Write(u64, Vec<u8>),
    /// A new file takes the old one's name.
    Replace(u64, Vec<u8>),
    /// Bytes are added at the end.
    Append(u64, Vec<u8>),
    /// Bytes are written over others, perhaps beyond the end.
    Patch(u64, usize, Vec<u8>),
    /// The file gets this length.
    Resize(u64, usize),
    /// The file goes.
    Delete(u64),
    /// The first file takes the second one's name.
    Rename(u64, u64),
}

impl Op {
    /// Whether it touches a file.
    pub fn changes(&self, slot: u64) -> bool {
        match self {
            Op::Write(changed, _)
            | Op::Replace(changed, _)
            | Op::Append(changed, _)
            | Op::Patch(changed, ..)
            | Op::Resize(changed, _)
            | Op::Delete(changed) => *changed == slot,
            Op::Rename(from, to) => [*from, *to].contains(&slot),
        }
    }
}

/// The step `n`, from 1, of the workload `seed`.
pub fn op(seed: u64, n: u64) -> Op {
    let mut random = Random(seed ^ n.wrapping_mul(0xd134_2543_de82_ef95));
    let slot = random.next() % SLOTS;
    // Small enough to be kept beside the inode, of a few blocks, of many.
    let longest = [3000, 40_000, 250_000][random.below(3)];
    let kind = random.below(12);
    let at = random.below(longest);
    let len = 1 + random.below(longest);
    match kind {
        0..=2 => Op::Write(slot, random.bytes(len)),
        3..=4 => Op::Replace(slot, random.bytes(len)),
        5..=6 => Op::Append(slot, random.bytes(len / 3 + 1)),
        7..=8 => Op::Patch(slot, at, random.bytes(len / 3 + 1)),
        9 => Op::Resize(slot, len),
        10 => Op::Delete(slot),
        _ => Op::Rename(slot, (slot + 1 + random.next() % (SLOTS - 1)) % SLOTS),
    }
}

/// The folder of a file.
pub fn folder(slot: u64) -> String {
    format!("d{}", slot % FOLDERS)
}

/// The file's path from the file system's root.
pub fn path(slot: u64) -> String {
    format!("{}/f{slot}", folder(slot))
}

/// The files and what is in them.
pub type Files = BTreeMap<u64, Vec<u8>>;

/// What `op` makes of `files`.
pub fn apply(files: &mut Files, op: Op) {
    match op {
        Op::Write(slot, bytes) | Op::Replace(slot, bytes) => {
            files.insert(slot, bytes);
        }
        Op::Append(slot, bytes) => files.entry(slot).or_default().extend(bytes),
        Op::Patch(slot, at, bytes) => {
            let file = files.entry(slot).or_default();
            let end = at + bytes.len();
            file.resize(file.len().max(end), 0);
            file[at..end].copy_from_slice(&bytes);
        }
        Op::Resize(slot, len) => files.entry(slot).or_default().resize(len, 0),
        Op::Delete(slot) => {
            files.remove(&slot);
        }
        Op::Rename(from, to) => {
            if let Some(bytes) = files.remove(&from) {
                files.insert(to, bytes);
            }
        }
    }
}

/// The files after the first `steps` steps.
pub fn files_after(seed: u64, steps: u64) -> Files {
    let mut files = Files::new();
    (1..=steps).for_each(|n| apply(&mut files, op(seed, n)));
    files
}

/// The files that are not as they must be when `op` was under way and what was there before it was safe.
pub fn lost(before: &Files, op: &Op, found: &Files) -> Vec<u64> {
    let mut after = before.clone();
    apply(&mut after, op.clone());
    (0..SLOTS).filter(|slot| !is_sound(*slot, before, op, &after, found)).collect()
}

/// Whether a file is as it was before `op`, or as far as `op` leaves it so.
fn is_sound(slot: u64, before: &Files, op: &Op, after: &Files, found: &Files) -> bool {
    let is = |slot: u64, files: &Files| found.get(&slot) == files.get(&slot);
    if is(slot, before) || !op.changes(slot) {
        return is(slot, before);
    }
    let [old, new] = [before, found].map(|files| files.get(&slot).map_or(&[][..], Vec::as_slice));
    match op {
        Op::Write(..) => true,
        Op::Replace(..) | Op::Delete(_) => is(slot, after),
        Op::Append(..) => new.starts_with(old),
        Op::Patch(_, at, bytes) => {
            let others = |i: &usize| !(*at..at + bytes.len()).contains(i);
            (0..old.len()).filter(others).all(|i| new.get(i) == old.get(i))
        }
        Op::Resize(_, len) => new.starts_with(&old[..old.len().min(*len)]),
        // It may be gone from its old name once it is there under the new one.
        Op::Rename(_, to) => is(slot, after) && is(*to, after),
    }
}
