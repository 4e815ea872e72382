//! Members of md arrays (Linux's `include/uapi/linux/raid/md_p.h`): of a mirror each has all the data, in one run.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use super::Table;
use super::field::{bytes, le16, le32, le64, text};
use crate::error::{Result, Retry};
use crate::io::{ReadAt, Window, read_array, read_vec};
use crate::unit::{Extent, to_usize};

pub(super) const MAGIC: u32 = 0xa92b_4efc;
/// The level of a mirror.
const RAID1: u32 = 1;
/// Bytes of a superblock 0.90, and of one of version 1 before the roles of its members.
const OLD_LEN: usize = 4096;
const NEW_LEN: usize = 256;
/// Most members a superblock of version 1 has room for.
const MOST_MEMBERS: u32 = 1920;
/// The features that change nothing about where the data is: a bitmap of what is to be written to the other members.
const BITMAP: u32 = 0x1;
/// States of a member (0.90): active, and in sync.
const ACTIVE_IN_SYNC: u32 = 0x2 | 0x4;

/// An active member of a mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The array.
    pub array: Uuid,
    /// What the array is called: `host:name`, or its number (0.90).
    pub name: String,
    /// How many members the array has.
    pub members: u32,
    /// Where its data lies on the member, in bytes.
    pub data: Extent,
}

/// The mirrors of which a partition of `disk`, by its number, is a member, with the place of their data on the disk. Those with
/// more than one member on it are left out: all of them had to be written alike. Fails only in ways that may pass.
pub fn mirrors(disk: &Arc<dyn ReadAt>, table: &Table) -> Result<Vec<(u32, Mirror)>> {
    let mut found: Vec<(u32, Mirror)> = Vec::new();
    for part in table.partitions.iter().filter(|part| !part.kind.is_extended()) {
        match mirror(&Window::new(disk, part.extent, disk.name())) {
            Ok(Some(mirror)) => {
                let data = mirror.data.shifted(part.extent.start);
                found.push((part.number, Mirror { data, ..mirror }));
            }
            Err(error) if error.retry() == Retry::Yes => return Err(error),
            // What cannot be read is no mirror that can be used.
            Ok(None) | Err(_) => {}
        }
    }
    let mut arrays = BTreeMap::new();
    for (_, mirror) in &found {
        *arrays.entry(mirror.array).or_insert(0) += 1;
    }
    found.retain(|(_, mirror)| arrays.get(&mirror.array) == Some(&1));
    Ok(found)
}

/// The mirror that `volume` is a member of; `None` when it is none, a spare, not in sync, being reshaped, or damaged.
fn mirror(volume: &dyn ReadAt) -> Result<Option<Mirror>> {
    let size = volume.size();
    let at_end = (size / 512).checked_sub(16).map(|sector| (sector & !7) * 512);
    for place in [Some(4096), Some(0), at_end].into_iter().flatten() {
        if place + NEW_LEN as u64 <= size
            && let Some(mirror) = new(volume, place)?
        {
            return Ok(Some(mirror));
        }
    }
    match (size & !0xffff).checked_sub(0x10000) {
        Some(place) => Ok(old(&read_array::<OLD_LEN>(volume, place)?, place)),
        None => Ok(None),
    }
}

/// By a superblock of version 1 at byte `place`.
fn new(volume: &dyn ReadAt, place: u64) -> Result<Option<Mirror>> {
    let head = read_array::<NEW_LEN>(volume, place)?;
    let roles = le32(&head, 220);
    if le32(&head, 0) != MAGIC || le32(&head, 4) != 1 || roles > MOST_MEMBERS {
        return Ok(None);
    }
    let len = NEW_LEN + 2 * to_usize(roles.into());
    if place + len as u64 > volume.size() {
        return Ok(None);
    }
    let sb = read_vec(volume, place, len)?;
    let (number, members) = (le32(&sb, 160), le32(&sb, 92));
    let role = if number < roles { le16(&sb, NEW_LEN + 2 * to_usize(number.into())) } else { u16::MAX };
    let (start, sectors) = (le64(&sb, 128), le64(&sb, 80));
    let data =
        start.checked_add(sectors).and_then(|end| Some((start.checked_mul(512)?, end.checked_mul(512)?)));
    let Some((start, end)) = data.filter(|(_, end)| *end <= volume.size()) else { return Ok(None) };
    let sound = sum(&sb, 216) == le32(&sb, 216)
        && le64(&sb, 144).checked_mul(512) == Some(place)
        && le32(&sb, 72) == RAID1
        && le32(&sb, 8) & !BITMAP == 0
        && u32::from(role) < members
        && start < end;
    Ok(sound.then(|| Mirror {
        array: Uuid::from_bytes(bytes(&sb, 16)),
        name: text(&bytes::<32>(&sb, 32)),
        members,
        data: Extent::new(start, end),
    }))
}

/// By a superblock 0.90 at byte `place`, before which all data lies.
fn old(sb: &[u8; OLD_LEN], place: u64) -> Option<Mirror> {
    let word = |n: usize| le32(sb, n * 4);
    let end = u64::from(word(8)) * 1024;
    let sound = word(0) == MAGIC
        && word(1) == 0
        && sum(sb, 38 * 4) == word(38)
        && word(7) == RAID1
        && word(992 + 3) & ACTIVE_IN_SYNC == ACTIVE_IN_SYNC
        && (1..=place).contains(&end);
    let words = [word(5), word(13), word(14), word(15)];
    let array = Uuid::from_bytes(bytes(&words.map(u32::to_be_bytes).concat(), 0));
    sound.then(|| Mirror { array, name: word(11).to_string(), members: word(10), data: Extent::new(0, end) })
}

/// The sum of a superblock's words, that at byte `own` left out, with what overflows added.
fn sum(sb: &[u8], own: usize) -> u32 {
    let (words, rest) = sb.as_chunks::<4>();
    let mut sum: u64 = words.iter().map(|word| u64::from(u32::from_le_bytes(*word))).sum();
    if let [low, high] = rest {
        sum += u64::from(u16::from_le_bytes([*low, *high]));
    }
    sum -= u64::from(le32(sb, own));
    let halves = (sum & 0xffff_ffff) + (sum >> 32);
    u32::try_from(halves & 0xffff_ffff).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::WriteAt;
    use crate::io::fake::MemoryDisk;

    const SIZE: u64 = 8 << 20;

    /// What `mirror` makes of a member with a sound superblock 1.2, changed by `change`, its sum right.
    fn member(change: impl FnOnce(&mut Vec<u8>)) -> Option<Mirror> {
        let mut sb = vec![0; NEW_LEN + 4];
        let words = [(0, MAGIC), (4, 1), (72, RAID1), (80, 8192), (92, 2), (128, 2048), (144, 8), (220, 2)];
        for (at, word) in words {
            sb[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        sb[16..32].fill(5);
        sb[32..41].copy_from_slice(b"host:root");
        sb[258] = 1;
        change(&mut sb);
        let own = sum(&sb, 216);
        sb[216..220].copy_from_slice(&own.to_le_bytes());
        let disk = MemoryDisk::sparse(SIZE);
        disk.write_at(&sb, 4096).unwrap();
        mirror(&disk).unwrap()
    }

    #[test]
    fn an_active_member_of_a_mirror_tells_where_its_data_lies() {
        let found = member(|_| ()).unwrap();
        assert_eq!((found.name.as_str(), found.members), ("host:root", 2));
        assert_eq!(found.data, Extent::at(1 << 20, 4 << 20));
        assert!(member(|sb| sb[8] = 1).is_some(), "a bitmap changes nothing");
    }

    #[test]
    fn what_is_no_whole_half_of_a_mirror_is_none() {
        let put = |at: usize, value: u8| move |sb: &mut Vec<u8>| sb[at] = value;
        // Another level; a feature that matters; a spare; more data than there is; another place; no data.
        for (at, value) in [(72, 5), (8, 4), (257, 0xff), (85, 1), (144, 16), (81, 0)] {
            assert_eq!(member(put(at, value)), None, "{value} at {at}");
        }
        let disk = MemoryDisk::sparse(SIZE);
        disk.write_at(&MAGIC.to_le_bytes(), 4096).unwrap();
        assert_eq!(mirror(&disk).unwrap(), None);
        for size in [0, 511, 4096, 0x10000, 0x20000] {
            assert_eq!(mirror(&MemoryDisk::sparse(size)).unwrap(), None, "{size}");
        }
    }
}
