//! Whether a hibernated Windows sleeps on the volume: then its memory holds metadata that the volume does not.

use super::record::{Record, fix_up, kind, named};
use super::volume::{Volume, file, wanted};
use super::{Step, require};
use crate::io::{ReadAt, is_zero};
use crate::layout::field::{bytes, has, le16, le32, le64};
use crate::unit::to_usize;

/// The file a system is hibernated to, in the root folder. It starts with zeroes when none sleeps in it, and is short on a
/// volume that belongs to a system sleeping elsewhere.
const NAME: &[u8] = b"hiberfil.sys";
/// Bytes at its start that are looked at; a file that has fewer is short.
const HEAD: u64 = 4096;
/// The name of a folder's index.
const I30: &str = "$I30";
/// Bytes of index blocks that are searched, at most.
const MAX_INDEX: u64 = 16 << 20;
/// Bytes of index blocks read at a time.
const READ: u64 = 1 << 20;
/// Sizes of an index block, in bytes.
const BLOCKS: std::ops::RangeInclusive<u64> = 512..=65_536;
/// Where the header of an index begins in the root's value, and in an index block.
const IN_ROOT: usize = 16;
const IN_BLOCK: usize = 24;
/// Flags of an index: it has blocks; of an entry: it is the last.
const LARGE: u8 = 1;
const LAST: u16 = 2;
/// Where the name begins in an entry, and the shortest entry.
const ENTRY: usize = 16;
const NAME_LENGTH: usize = ENTRY + 64;

/// Stops unless no system sleeps on the volume, for certain.
pub(super) fn require_awake<D: ReadAt>(volume: &Volume<D>) -> Step<()> {
    let root = volume.record(file::ROOT)?;
    let found = search(volume, &root).map_err(|stop| named(stop, "the root folder"))?;
    // A name may be there twice, once as its short form.
    for reference in found {
        let zero = starts_with_zeroes(volume, reference).map_err(|stop| named(stop, "hiberfil.sys"))?;
        require(zero, || "a hibernated system may sleep on it".into())?;
    }
    Ok(())
}

fn starts_with_zeroes<D: ReadAt>(volume: &Volume<D>, reference: u64) -> Step<bool> {
    let record = volume.record(reference & 0xffff_ffff_ffff)?;
    require(u64::from(record.sequence()) == reference >> 48, || "was removed, but is in its folder".into())?;
    let data = wanted(&record, kind::DATA, "")?;
    if data.value().is_some() {
        return Ok(false);
    }
    let stream = volume.place(&data)?;
    // What was never written reads as zeroes.
    Ok(stream.size >= HEAD && is_zero(&volume.read(&stream, 0, HEAD.min(stream.initialised))?))
}

/// The records of all files of that name in a folder: all of its index is gone through, as it lies.
fn search<D: ReadAt>(volume: &Volume<D>, folder: &Record) -> Step<Vec<u64>> {
    let mut found = Vec::new();
    let root = wanted(folder, kind::INDEX_ROOT, I30)?;
    let root = root.value().ok_or_else(|| "has no index".to_owned())?;
    let header = root.get(IN_ROOT..).unwrap_or_default();
    entries(header, &mut found)?;
    if bytes::<1>(header, 12)[0] & LARGE == 0 {
        return Ok(found);
    }
    let size = u64::from(le32(root, 8));
    require(BLOCKS.contains(&size) && size.is_power_of_two(), || {
        format!("has index blocks of {size} bytes")
    })?;
    let blocks = volume.stream(folder, kind::INDEX_ALLOCATION, I30)?;
    require(blocks.size <= MAX_INDEX, || format!("has an index of {} bytes", blocks.size))?;
    let in_use = in_use(volume, folder, blocks.size / size)?;
    // A block's number counts clusters, or pieces of 512 bytes when it is smaller than one.
    let unit = if size < volume.boot.cluster_size { 512 } else { volume.boot.cluster_size };
    let mut at = 0;
    while at < blocks.size / size * size {
        let part = volume.read(&blocks, at, READ.min(blocks.size / size * size - at))?;
        for (block, place) in part.chunks_exact(to_usize(size)).zip((at..).step_by(to_usize(size))) {
            let number = to_usize(place / size);
            if in_use.get(number / 8).is_some_and(|bits| bits & 1 << (number % 8) == 0) {
                continue;
            }
            let mut block = block.to_vec();
            let own = has(&block, 0, b"INDX") && le64(&block, 16) == place / unit;
            require(own, || "has a damaged index block".into())?;
            fix_up(&mut block)?;
            entries(block.get(IN_BLOCK..).unwrap_or_default(), &mut found)?;
        }
        at += READ;
    }
    Ok(found)
}

/// The bitmap of a folder's index blocks, of which there are `blocks`.
fn in_use<D: ReadAt>(volume: &Volume<D>, folder: &Record, blocks: u64) -> Step<Vec<u8>> {
    let bitmap = wanted(folder, kind::BITMAP, I30)?;
    let len = blocks.div_ceil(8);
    let bits = match bitmap.value() {
        Some(value) => value.get(..to_usize(len)).map(<[u8]>::to_vec),
        None => {
            let stream = volume.place(&bitmap)?;
            stream.require_complete()?;
            Some(volume.read(&stream, 0, len)?)
        }
    };
    bits.ok_or_else(|| "has a bitmap that is too short".to_owned().into())
}

/// Goes through the entries of an index, or of a block of it, which begin behind `header`.
fn entries(header: &[u8], found: &mut Vec<u64>) -> Step<()> {
    let damaged = || "has damaged index entries".to_owned();
    let end = to_usize(le32(header, 4).into());
    let mut rest = header.get(..end).and_then(|list| list.get(to_usize(le32(header, 0).into())..));
    loop {
        let list = rest.ok_or_else(damaged)?;
        let len = usize::from(le16(list, 8));
        require(len >= ENTRY && len.is_multiple_of(8) && len <= list.len(), damaged)?;
        if le16(list, 12) & LAST != 0 {
            return Ok(());
        }
        let entry = list.get(..len).unwrap_or_default();
        let chars = usize::from(bytes::<1>(entry, NAME_LENGTH)[0]);
        let name = entry.get(NAME_LENGTH + 2..).and_then(|rest| rest.get(..2 * chars)).ok_or_else(damaged)?;
        let (chars, _) = name.as_chunks::<2>();
        let is_it = chars.len() == NAME.len()
            && chars.iter().zip(NAME).all(|(char, own)| char[1] == 0 && char[0].eq_ignore_ascii_case(own));
        if is_it {
            found.push(le64(entry, 0));
        }
        rest = list.get(len..);
    }
}
