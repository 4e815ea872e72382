//! Unpacking of compressed clusters.

use libdeflater::Decompressor;
use zstd_safe::DCtx;

use super::header::Compression;
use crate::error::Result;
use crate::io::ReadAt;
use crate::unit::{Extent, to_usize};

/// A decompressor, kept between clusters because making one costs as much as a small cluster, and the compressed
/// bytes it read last.
pub(super) struct Unpacker {
    codec: Codec,
    window: Extent,
    bytes: Vec<u8>,
}

enum Codec {
    Zlib(Decompressor),
    Zstd(DCtx<'static>),
}

impl Unpacker {
    pub(super) fn new(compression: Compression) -> Self {
        let codec = match compression {
            Compression::Zlib => Codec::Zlib(Decompressor::new()),
            Compression::Zstd => Codec::Zstd(DCtx::create()),
        };
        Unpacker { codec, window: Extent::new(0, 0), bytes: Vec::new() }
    }

    /// Unpacks the cluster whose compressed bytes are in `packed` of `file` into `cluster`, all of it; `Ok(Err)`
    /// says why the bytes are no cluster. Reads up to `ahead` bytes for the next clusters.
    pub(super) fn unpack(
        &mut self,
        file: &dyn ReadAt,
        packed: Extent,
        ahead: u64,
        cluster: &mut [u8],
    ) -> Result<std::result::Result<(), &'static str>> {
        if !self.window.contains(packed) {
            let end = packed.end.max(packed.start.saturating_add(ahead)).min(file.size());
            let window = Extent::new(packed.start, end);
            self.window = Extent::new(0, 0);
            self.bytes.resize(to_usize(window.len()), 0);
            file.read_at(&mut self.bytes, window.start)?;
            self.window = window;
        }
        let from = to_usize(packed.start - self.window.start);
        let source = &self.bytes[from..from + to_usize(packed.len())];
        Ok(match &mut self.codec {
            Codec::Zlib(codec) => inflate(codec, source, cluster),
            Codec::Zstd(codec) => unzstd(codec, source, cluster),
        })
    }
}

fn inflate(
    codec: &mut Decompressor,
    source: &[u8],
    cluster: &mut [u8],
) -> std::result::Result<(), &'static str> {
    // The bytes after the deflate stream, the rest of its last sector, are ignored.
    match codec.deflate_decompress(source, cluster) {
        Ok(unpacked) if unpacked == cluster.len() => Ok(()),
        Ok(_) => Err("it unpacks to less than a cluster"),
        Err(_) => Err("it is no deflate stream of a cluster"),
    }
}

fn unzstd(codec: &mut DCtx, mut source: &[u8], cluster: &mut [u8]) -> std::result::Result<(), &'static str> {
    let mut done = 0;
    // The bytes after the frame are the rest of its last sector: a decoder given them would take them for a frame.
    while done < cluster.len() {
        let frame = zstd_safe::find_frame_compressed_size(source).ok().filter(|len| *len > 0);
        let (frame, rest) =
            frame.and_then(|len| source.split_at_checked(len)).ok_or("it is no whole zstd frame")?;
        done += codec.decompress(&mut cluster[done..], frame).map_err(|_| "its zstd frame is damaged")?;
        source = rest;
    }
    if done == cluster.len() { Ok(()) } else { Err("it unpacks to less than a cluster") }
}
