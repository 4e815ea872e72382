//! Extents of files: where their bytes are.

use super::unpack::Packing;
use super::{MAX_SIZE, Step, require};
use crate::layout::btrfs::Superblock;
use crate::layout::field::{bytes, le16, le64};
use crate::unit::Extent;

/// Most bytes of an extent that is compressed, before and after it was.
pub(super) const MAX_PACKED: u64 = 128 << 10;
/// Length of an item before inline data, and of one that refers to data on the disk.
const HEADER: usize = 21;
const ITEM: usize = 53;
const INLINE: u8 = 0;
const REGULAR: u8 = 1;
const PREALLOCATED: u8 = 2;

/// A part of a file.
pub(super) struct FileExtent<'a> {
    /// Which bytes of the file.
    pub run: Extent,
    pub content: Content<'a>,
}

/// What a part of a file holds.
pub(super) enum Content<'a> {
    /// A hole, or room that was not written yet.
    Zeroes,
    /// These bytes, then zeroes.
    Inline(&'a [u8]),
    /// These bytes unpacked.
    InlinePacked(Packing, &'a [u8]),
    /// A part of what is stored.
    Disk(Stored),
}

/// An extent on the disk, and the part of it that is meant.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    /// Its addresses.
    pub place: Extent,
    /// How it is compressed.
    pub packing: Option<Packing>,
    /// Bytes in it when it is unpacked, at most [`MAX_PACKED`] if it is compressed.
    pub len: u64,
    /// The first byte that is meant, when it is unpacked.
    pub from: u64,
}

impl<'a> FileExtent<'a> {
    /// Reads the item of the extent at `start` of a file.
    pub fn parse(sb: &Superblock, start: u64, item: &'a [u8]) -> Step<FileExtent<'a>> {
        let wrong = |what: String| format!("its extent at {start} {what}");
        require(item.len() > HEADER, || wrong("is cut off".into()))?;
        let [packing, encryption] = bytes(item, 16);
        let [form] = bytes(item, 20);
        let plain = encryption == 0 && le16(item, 18) == 0;
        let packing = match packing {
            0 if plain => None,
            1 if plain => Some(Packing::Zlib),
            2 if plain => Some(Packing::Lzo),
            3 if plain => Some(Packing::Zstd),
            _ => return Err(wrong("is of an encoding that is not known".into()).into()),
        };
        let unpacked = le64(item, 8);
        if form == INLINE {
            let data = item.get(HEADER..).unwrap_or_default();
            require(start == 0, || wrong("is inline".into()))?;
            let most = if packing.is_some() { MAX_PACKED } else { data.len() as u64 };
            require((1..=most).contains(&unpacked), || wrong(format!("has {unpacked} bytes")))?;
            let content =
                packing.map_or(Content::Inline(data), |packing| Content::InlinePacked(packing, data));
            return Ok(FileExtent { run: Extent::at(0, unpacked), content });
        }
        require(matches!(form, REGULAR | PREALLOCATED), || wrong(format!("is of form {form}")))?;
        require(item.len() == ITEM, || wrong(format!("has an item of {} bytes", item.len())))?;
        let (address, stored, from, len) = (le64(item, 21), le64(item, 29), le64(item, 37), le64(item, 45));
        let whole = [start, address, stored, from, len].iter().all(|at| at.is_multiple_of(sb.sector_size));
        let ends = len > 0 && start.checked_add(len).is_some_and(|end| end <= MAX_SIZE);
        require(whole && ends, || wrong(format!("is {len} bytes from {from} of {stored} at {address}")))?;
        let run = Extent::at(start, len);
        if address == 0 || form == PREALLOCATED {
            return Ok(FileExtent { run, content: Content::Zeroes });
        }
        // What old kernels wrote as the unpacked length of an extent that is not compressed is not to be relied on.
        let unpacked = if packing.is_some() { unpacked } else { stored };
        let bounded = packing.is_none() || unpacked.max(stored) <= MAX_PACKED;
        let inside = from.checked_add(len).is_some_and(|end| end <= unpacked);
        require(bounded && inside && stored > 0, || {
            wrong(format!("is {len} bytes from {from} of {unpacked} in {stored}"))
        })?;
        let place = Extent::at(address, stored);
        Ok(FileExtent { run, content: Content::Disk(Stored { place, packing, len: unpacked, from }) })
    }
}
