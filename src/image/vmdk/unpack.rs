//! Unpacking of compressed grains.

use libdeflater::Decompressor;

use crate::error::Result;
use crate::io::ReadAt;
use crate::unit::{Extent, to_usize};

/// Bytes of a grain marker: where the grain is in the extent, in sectors (u64), and bytes of its zlib stream (u32).
pub(super) const MARKER_LEN: usize = 12;

/// A packed grain.
pub(super) struct Packed {
    /// Number of the extent it is in.
    pub(super) owner: u64,
    /// Where its marker is in the extent's file, in bytes.
    pub(super) at: u64,
    /// Where the grain is in the extent's part of the disk, in sectors.
    pub(super) lba: u64,
}

/// A decompressor, kept between grains because making one costs as much as a small grain, and the compressed bytes
/// read last.
pub(super) struct Unpacker {
    codec: Decompressor,
    window: Window,
}

impl Unpacker {
    pub(super) fn new() -> Self {
        let window = Window { owner: 0, extent: Extent::new(0, 0), bytes: Vec::new() };
        Unpacker { codec: Decompressor::new(), window }
    }

    /// Unpacks the grain `packed` of `file` into `grain` and returns its length; `Ok(Err)` says why there is none.
    /// Reads up to `ahead` bytes for the grains after it.
    pub(super) fn unpack(
        &mut self,
        file: &dyn ReadAt,
        packed: &Packed,
        ahead: u64,
        grain: &mut [u8],
    ) -> Result<std::result::Result<usize, String>> {
        let grain_len = grain.len() as u64;
        let ahead = ahead.max(grain_len + 1024);
        let Some(marker) = self.window.load(file, packed, MARKER_LEN, ahead)? else {
            return Ok(Err("its marker ends beyond the end of the file".into()));
        };
        let (lba, len) = marker_fields(marker);
        if lba != packed.lba {
            return Ok(Err(format!("its marker is that of sector {lba}, not {}", packed.lba)));
        }
        // A stream that does not shrink is little longer than its grain; the bound is QEMU's.
        if len == 0 || u64::from(len) + MARKER_LEN as u64 > 2 * grain_len {
            return Ok(Err(format!("its marker says {len} compressed bytes")));
        }
        let Some(whole) = self.window.load(file, packed, MARKER_LEN + len as usize, ahead)? else {
            return Ok(Err(format!("its {len} compressed bytes end beyond the end of the file")));
        };
        let unpacked = self.codec.zlib_decompress(&whole[MARKER_LEN..], grain);
        Ok(unpacked.map_err(|_| "it is no zlib stream of a grain".into()))
    }
}

/// Sector and length of a grain marker.
fn marker_fields(marker: &[u8]) -> (u64, u32) {
    let (mut lba, mut len) = ([0; 8], [0; 4]);
    lba.copy_from_slice(&marker[..8]);
    len.copy_from_slice(&marker[8..MARKER_LEN]);
    (u64::from_le_bytes(lba), u32::from_le_bytes(len))
}

/// The bytes of a file read last.
struct Window {
    owner: u64,
    extent: Extent,
    bytes: Vec<u8>,
}

impl Window {
    /// The `len` bytes at the grain `packed` of `file`, read with up to `ahead` bytes from there on; `None` when they
    /// end beyond the end of the file.
    fn load(&mut self, file: &dyn ReadAt, packed: &Packed, len: usize, ahead: u64) -> Result<Option<&[u8]>> {
        let wanted = Extent::at(packed.at, len as u64);
        if self.owner != packed.owner || !self.extent.contains(wanted) {
            if wanted.end > file.size() {
                return Ok(None);
            }
            let end = wanted.end.max(wanted.start.saturating_add(ahead)).min(file.size());
            let extent = Extent::new(wanted.start, end);
            self.extent = Extent::new(0, 0);
            self.bytes.resize(to_usize(extent.len()), 0);
            file.read_at(&mut self.bytes, extent.start)?;
            (self.owner, self.extent) = (packed.owner, extent);
        }
        let from = to_usize(wanted.start - self.extent.start);
        Ok(self.bytes.get(from..from + len))
    }
}
