//! Compressed extents, unpacked whole.

use flate2::{Decompress, FlushDecompress, Status};
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::{Step, lzo, require};
use crate::layout::field::le32;
use crate::unit::to_usize;

/// Largest window of a zstd frame, as in Linux: 128 KiB.
const ZSTD_WINDOW: u32 = 17;
/// Bytes of the length before each LZO stream, and before all of them.
const LZO_LEN: usize = 4;

/// How an extent is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// A zlib stream.
    Zlib,
    /// An LZO1X stream for each sector.
    Lzo,
    /// A zstd frame.
    Zstd,
}

/// Unpacks the `len` bytes of an extent, which the caller has bounded, from `source`; what the stream does not have is
/// zeroes, and what it has more is left out, as in Linux.
pub(super) fn unpack(packing: Packing, source: &[u8], len: usize, sector: usize) -> Step<Vec<u8>> {
    let mut out = match packing {
        Packing::Zlib => zlib(source, len),
        Packing::Lzo => unlzo(source, len, sector),
        Packing::Zstd => zstd(source, len),
    }
    .ok_or_else(|| format!("a compressed extent is no whole stream of {packing:?}"))?;
    require(out.len() <= len, || "a compressed extent unpacks to more than its length".into())?;
    out.resize(len, 0);
    Ok(out)
}

fn zlib(source: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; len];
    let mut stream = Decompress::new(true);
    let status = stream.decompress(source, &mut out, FlushDecompress::Finish).ok()?;
    let made = usize::try_from(stream.total_out()).ok()?;
    out.truncate(made);
    (status == Status::StreamEnd || made == len).then_some(out)
}

fn zstd(source: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; len];
    let mut context = DCtx::create();
    context.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW)).ok()?;
    let mut input = InBuffer::around(source);
    let mut output = OutBuffer::around(&mut out[..]);
    let mut done = false;
    while !done && output.pos() < len {
        let before = (input.pos(), output.pos());
        done = context.decompress_stream(&mut output, &mut input).ok()? == 0;
        if !done && before == (input.pos(), output.pos()) {
            return None;
        }
    }
    let made = output.pos();
    out.truncate(made);
    Some(out)
}

/// btrfs's frame around LZO1X: the length of all, then for each sector the length of its stream, which is never cut by the
/// border of a sector, and the stream.
fn unlzo(source: &[u8], len: usize, sector: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let source = source.get(..to_usize(le32(source, 0).into()))?;
    let mut at = LZO_LEN;
    while at < source.len() && out.len() < len {
        if sector - at % sector < LZO_LEN {
            at = at.next_multiple_of(sector);
        }
        let start = at + LZO_LEN;
        let end = start.checked_add(to_usize(le32(source, at).into()))?;
        lzo::unpack(source.get(start..end)?, sector, &mut out)?;
        at = end;
    }
    // The last stream is of a whole sector even where the extent ends before.
    out.truncate(len);
    (!out.is_empty()).then_some(out)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn text() -> Vec<u8> {
        (0..9000).map(|i| b"the quick brown fox "[i * i % 20]).collect()
    }

    /// What `packed` unpacks to, whole and with more or less asked for.
    fn check(packing: Packing, packed: &[u8]) {
        let padded = [packed, &[0; 300]].concat();
        for source in [packed, &padded] {
            let whole = unpack(packing, source, 9000, 4096).unwrap();
            assert!(whole == text(), "{packing:?}");
            assert!(unpack(packing, source, 700, 4096).unwrap() == text()[..700], "{packing:?}");
            let more = unpack(packing, source, 10_000, 4096).unwrap();
            assert!(more[..9000] == text() && more[9000..] == [0; 1000], "{packing:?}");
        }
        for len in [0, 1, 3, 8, packed.len() / 2, packed.len() - 20] {
            assert!(unpack(packing, &packed[..len], 9000, 4096).is_err(), "{packing:?} {len}");
        }
    }

    #[test]
    fn streams_are_unpacked_and_what_is_cut_off_is_refused() {
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        zlib.write_all(&text()).unwrap();
        check(Packing::Zlib, &zlib.finish().unwrap());
        let mut zstd = vec![0; 10_000];
        let len = zstd_safe::compress(&mut zstd[..], &text(), 3).unwrap();
        check(Packing::Zstd, &zstd[..len]);
    }

    /// A sector of literals is longer packed, and the next length would be cut by a border.
    #[test]
    fn lzo_streams_skip_what_is_left_of_a_sector() {
        let literals = |len: usize| {
            let (zeroes, rest) = ((len - 19) / 255, (len - 19) % 255 + 1);
            [&[0][..], &vec![0; zeroes], &[u8::try_from(rest).unwrap()], &text()[..len], b"\x11\0\0"].concat()
        };
        let first = literals(4066);
        assert!(matches!((8 + first.len()) % 4096, 4093..), "{}", first.len());
        let second = literals(1000);
        let lens = [first.len(), second.len()].map(|len| u32::try_from(len).unwrap().to_le_bytes());
        let body = [&lens[0][..], &first, &vec![0; 4096 - 8 - first.len()], &lens[1], &second].concat();
        let all = u32::try_from(4 + body.len()).unwrap().to_le_bytes();
        let source = [&all[..], &body].concat();
        let unpacked = unpack(Packing::Lzo, &source, 5066, 4096).unwrap();
        assert!(unpacked == [&text()[..4066], &text()[..1000]].concat());
        for len in [0, 3, 6, 100, source.len() - 1] {
            assert!(unpack(Packing::Lzo, &source[..len], 5066, 4096).is_err(), "{len}");
        }
    }

    #[test]
    fn a_zstd_frame_of_a_large_window_is_refused() {
        // No length, and a window of 1 GiB.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa0, 0x01, 0x00, 0x00];
        assert!(unpack(Packing::Zstd, &frame, 4096, 4096).is_err());
    }
}
