//! What is really inside an initramfs: the kernel modules and its init, through every segment and compression.
//!
//! The format is that of Linux' Documentation/driver-api/early-userspace/buffer-format.rst: any number of cpio
//! archives ("newc"), each plain or compressed, with zero bytes between them.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read};

use crate::error::{Error, Kind, Result};
use crate::unit::to_usize;

/// Most entries in all archives together; a large real one has 20,000.
const MAX_ENTRIES: u64 = 1 << 20;
/// Most bytes before decompression, and after it, of all parts together; a large real one has 1 GiB.
const MAX_BYTES: u64 = 2 << 30;
/// Most zero bytes in a row between parts: programs that make one fill up to a block or a MiB.
const MAX_PADDING: u64 = 16 << 20;
/// Longest name, its terminating zero included.
const MAX_NAME: u64 = 4097;
/// Memory a stream of xz or lzma may ask for, in KiB.
pub(super) const XZ_MEMORY: u32 = 131_072;
/// The uncompressed size of a block of the old lz4 format, which the kernel reads.
pub(super) const LZ4_BLOCK: usize = 8 << 20;
pub(super) const LZ4_MAGIC: u32 = 0x184c_2102;
const CPIO_HEADER: usize = 110;
/// Largest `/init` that is kept, in bytes: a script has 20 KiB, systemd 2 MiB.
const MAX_INIT: u64 = 32 << 20;
/// What `/init` is called after a program of ours has taken its place.
pub const REPLACED_INIT: &str = "init.haul";
/// The file type in a mode, and that of a link (stat(2)).
const TYPE: u64 = 0o170_000;
const LINK: u64 = 0o120_000;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Names of the kernel modules, `-` written as `_`.
    pub modules: BTreeSet<String>,
    /// How the parts are compressed, in order: `none`, `gzip`, `zstd`, `xz`, `lz4`, `lzma`, `bzip2`.
    pub parts: Vec<&'static str>,
    /// What the kernel starts.
    pub init: Option<Init>,
    /// What was `init` before a program of ours.
    pub replaced_init: Option<Init>,
    /// Whether zero bytes follow a stream of lz4, whose end nothing else marks.
    pub lz4_padded: bool,
    entries: u64,
    unpacked: u64,
}

/// The file `/init`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Init {
    /// A regular file with this content.
    File(Vec<u8>),
    /// A link to this.
    Link(Vec<u8>),
}

/// The name of the kernel module in a file of this path: `virtio_blk` for `…/virtio-blk.ko.xz`.
pub fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem =
        [".ko", ".ko.xz", ".ko.zst", ".ko.gz", ".ko.bz2"].iter().find_map(|end| file.strip_suffix(end))?;
    (!stem.is_empty()).then(|| stem.replace('-', "_"))
}

/// Reads an initramfs from its beginning to its end; `name` is what to call it in a message.
pub fn read(stream: impl Read, name: &str) -> Result<Contents> {
    read_within(stream, name, MAX_BYTES)
}

/// The same of a stream of fewer than `longest` bytes: a file that is one hole can be as long as its owner likes.
fn read_within(stream: impl Read, name: &str, longest: u64) -> Result<Contents> {
    let mut found = Contents::default();
    let mut bounded = BufReader::with_capacity(1 << 16, stream.take(longest));
    match segments(&mut bounded, &mut found, true) {
        Ok(()) if bounded.get_ref().limit() > 0 => Ok(found),
        Ok(()) => Err(Error::new(Kind::Image, "initramfs.read", format!("cannot read {name}"))
            .because(format!("it has {longest} bytes or more"))
            .fact("file", name)),
        Err(error) => Err(Error::new(Kind::Image, "initramfs.read", format!("cannot read {name}"))
            .fact("file", name)
            .caused_by(error)),
    }
}

fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

fn segments(stream: &mut dyn BufRead, found: &mut Contents, outer: bool) -> io::Result<()> {
    loop {
        skip_zeroes(stream)?;
        let mut head = [0; 6];
        let got = read_up_to(stream, &mut head)?;
        if got == 0 {
            return Ok(());
        }
        let mut whole = io::Cursor::new(&head[..got]).chain(&mut *stream);
        if matches!(&head, b"070701" | b"070702") {
            if outer {
                found.parts.push("none");
            }
            archive(&mut whole, found)?;
            continue;
        }
        if !outer {
            return Err(bad("what follows an archive inside a compressed part is no archive"));
        }
        let padded = Cell::new(false);
        let (method, mut plain): (_, Box<dyn Read + '_>) = match head {
            [0x1f, 0x8b, ..] => ("gzip", Box::new(flate2::bufread::GzDecoder::new(&mut whole))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", Box::new(Zstd::new(&mut whole))),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => {
                ("xz", Box::new(lzma_rust2::XzReader::new_mem_limit(&mut whole, false, XZ_MEMORY)))
            }
            // Parameters that all programs choose, and a dictionary of whole pages.
            [0x5d, 0, ..] => (
                "lzma",
                Box::new(lzma_rust2::LzmaReader::new_mem_limit(ByteByByte(&mut whole), XZ_MEMORY, None)?),
            ),
            [b'B', b'Z', b'h', ..] => ("bzip2", Box::new(bzip2::bufread::BzDecoder::new(&mut whole))),
            [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", Box::new(Lz4::new(&mut whole, &padded))),
            _ => {
                return Err(bad(format!(
                    "it is compressed in a way haul does not know (it begins {head:02x?})"
                )));
            }
        };
        found.parts.push(method);
        let room = MAX_BYTES.saturating_sub(found.unpacked);
        let mut bounded = BufReader::with_capacity(1 << 16, (&mut plain).take(room));
        segments(&mut bounded, found, false)?;
        let left = bounded.get_ref().limit();
        found.unpacked += room - left;
        if left == 0 {
            return Err(bad(format!("it holds more than {MAX_BYTES} bytes")));
        }
        drop(plain);
        found.lz4_padded |= padded.get();
    }
}

fn skip_zeroes(stream: &mut dyn BufRead) -> io::Result<()> {
    let mut skipped = 0;
    loop {
        let ready = stream.fill_buf()?;
        let zeroes = ready.iter().take_while(|byte| **byte == 0).count();
        let all = zeroes == ready.len();
        stream.consume(zeroes);
        skipped += zeroes as u64;
        if skipped > MAX_PADDING {
            return Err(bad(format!("it has more than {MAX_PADDING} zero bytes in a row")));
        }
        if !all || zeroes == 0 {
            return Ok(());
        }
    }
}

fn read_up_to(stream: &mut dyn BufRead, bytes: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match stream.read(&mut bytes[got..])? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

/// One archive, up to its trailer.
fn archive(stream: &mut impl Read, found: &mut Contents) -> io::Result<()> {
    loop {
        let mut header = [0; CPIO_HEADER];
        stream.read_exact(&mut header)?;
        if !matches!(&header[..6], b"070701" | b"070702") {
            return Err(bad("an archive entry has no header"));
        }
        let field = |i: usize| {
            let digits =
                header.get(6 + 8 * i..14 + 8 * i).and_then(|digits| std::str::from_utf8(digits).ok());
            digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).map(u64::from)
        };
        let (Some(mode), Some(size), Some(name_len)) = (field(1), field(6), field(11)) else {
            return Err(bad("an archive entry's header is not hexadecimal"));
        };
        if name_len == 0 || name_len > MAX_NAME {
            return Err(bad(format!("an archive entry's name has {name_len} bytes")));
        }
        found.entries += 1;
        if found.entries > MAX_ENTRIES {
            return Err(bad(format!("it has more than {MAX_ENTRIES} entries")));
        }
        let head_len = CPIO_HEADER as u64 + name_len;
        let mut name = Vec::new();
        stream.take(head_len.next_multiple_of(4) - CPIO_HEADER as u64).read_to_end(&mut name)?;
        name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
        if name == b"TRAILER!!!" {
            return Ok(());
        }
        let name =
            std::str::from_utf8(&name).unwrap_or_default().trim_start_matches("./").trim_start_matches('/');
        if let Some(module) = module_name(name) {
            found.modules.insert(module);
        }
        let padded = size.next_multiple_of(4);
        if matches!(name, "init" | REPLACED_INIT) && size <= MAX_INIT {
            let mut bytes = vec![0; to_usize(padded)];
            stream.read_exact(&mut bytes)?;
            bytes.truncate(to_usize(size));
            let init = if mode & TYPE == LINK { Init::Link(bytes) } else { Init::File(bytes) };
            // Without content it has another name, too, under which that is.
            let init = (size > 0).then_some(init);
            *(if name == "init" { &mut found.init } else { &mut found.replaced_init }) = init;
            continue;
        }
        if io::copy(&mut stream.take(padded), &mut io::sink())? != padded {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// For a reader that keeps what it has read too far.
struct ByteByByte<R>(R);

impl<R: Read> Read for ByteByByte<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let most = bytes.len().min(1);
        self.0.read(&mut bytes[..most])
    }
}

/// One zstd frame; reads nothing beyond it.
pub(super) struct Zstd<R> {
    source: R,
    context: zstd_safe::DCtx<'static>,
    done: bool,
}

impl<R: BufRead> Zstd<R> {
    pub(super) fn new(source: R) -> Self {
        Zstd { source, context: zstd_safe::DCtx::create(), done: false }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        while !self.done {
            let ready = self.source.fill_buf()?;
            let at_end = ready.is_empty();
            let mut input = zstd_safe::InBuffer::around(ready);
            let mut output = zstd_safe::OutBuffer::around(&mut *bytes);
            let hint = self
                .context
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| bad(format!("zstd: {}", zstd_safe::get_error_name(code))))?;
            let (used, made) = (input.pos(), output.pos());
            self.source.consume(used);
            self.done = hint == 0;
            if made > 0 {
                return Ok(made);
            }
            if at_end && !self.done {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(0)
    }
}

/// The old ("legacy") lz4 format: blocks of 8 MiB, each after its compressed size.
struct Lz4<'a, R> {
    source: R,
    /// Set when zero bytes end it.
    padded: &'a Cell<bool>,
    block: Vec<u8>,
    at: usize,
    begun: bool,
}

impl<'a, R: Read> Lz4<'a, R> {
    fn new(source: R, padded: &'a Cell<bool>) -> Self {
        Lz4 { source, padded, block: Vec::new(), at: 0, begun: false }
    }

    /// The next block's compressed size; `None` at the end.
    fn next_size(&mut self) -> io::Result<Option<u64>> {
        loop {
            let mut word = [0; 4];
            let mut got = 0;
            while got < word.len() {
                match self.source.read(&mut word[got..])? {
                    0 => return Ok(None),
                    n => got += n,
                }
            }
            match u32::from_le_bytes(word) {
                LZ4_MAGIC => self.begun = true,
                0 => {
                    self.padded.set(true);
                    return Ok(None);
                }
                size if self.begun => return Ok(Some(u64::from(size))),
                _ => return Err(bad("lz4: no magic number")),
            }
        }
    }
}

impl<R: Read> Read for Lz4<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() {
            let Some(size) = self.next_size()? else { return Ok(0) };
            if size > lz4_bound(LZ4_BLOCK) {
                return Err(bad(format!("lz4: a block of {size} bytes")));
            }
            let mut packed = Vec::new();
            (&mut self.source).take(size).read_to_end(&mut packed)?;
            self.block.resize(LZ4_BLOCK, 0);
            let len = lz4_flex::block::decompress_into(&packed, &mut self.block)
                .map_err(|error| bad(format!("lz4: {error}")))?;
            self.block.truncate(len);
            self.at = 0;
        }
        let n = bytes.len().min(self.block.len() - self.at);
        bytes[..n].copy_from_slice(&self.block[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// The most bytes `len` bytes can become (lz4.h, `LZ4_COMPRESSBOUND`).
const fn lz4_bound(len: usize) -> u64 {
    (len + len / 255 + 16) as u64
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// A cpio archive of empty files.
    pub(crate) fn cpio(names: &[&str]) -> Vec<u8> {
        let mut out = Vec::new();
        for name in names.iter().chain(&["TRAILER!!!"]) {
            out.extend(format!("070701{}{:08x}{:08x}", "0".repeat(88), name.len() + 1, 0).bytes());
            out.extend(name.bytes());
            out.push(0);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![0; zstd_safe::compress_bound(bytes.len())];
        let len = zstd_safe::compress(&mut out[..], bytes, 1).unwrap();
        out.truncate(len);
        out
    }

    #[test]
    fn every_segment_is_read_whatever_its_compression() {
        let mut image = cpio(&["kernel/x86/microcode/GenuineIntel.bin"]);
        image.resize(image.len() + 512, 0);
        image.extend(gzip(&cpio(&["usr/lib/modules/6.1/virtio_blk.ko"])));
        image.extend([0; 7]);
        image.extend(zstd(&cpio(&["lib/modules/6.1/drivers/net/virtio-net.ko.xz", "etc/fstab"])));
        let found = read(image.as_slice(), "test").unwrap();
        assert_eq!(found.parts, ["none", "gzip", "zstd"]);
        assert_eq!(found.modules.into_iter().collect::<Vec<_>>(), ["virtio_blk", "virtio_net"]);
    }

    #[test]
    fn what_old_programs_compressed_is_read_and_what_follows_it() {
        let whole = |method: &str, packed: &[u8]| {
            for padding in [0, 3, 512] {
                let image = [packed, &vec![0; padding], &gzip(&cpio(&["lib/modules/6.1/more.ko"]))].concat();
                let found = read(&*image, "test").unwrap();
                assert_eq!(found.parts, [method, "gzip"]);
                let modules: Vec<&str> = found.modules.iter().map(String::as_str).collect();
                assert_eq!(modules, ["e1000", "more", "virtio_blk", "virtio_net"]);
            }
            for len in [6, 20, packed.len() - 20, packed.len() - 1] {
                assert!(read(&packed[..len], "test").is_err(), "{method} cut off at {len}");
            }
        };
        whole("lzma", include_bytes!("../../tests/corpus/initramfs/good-lzma"));
        whole("bzip2", include_bytes!("../../tests/corpus/initramfs/good-bzip2"));
        // Memory for what a header claims is not taken.
        let error = read(&b"\x5d\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0"[..], "x").unwrap_err();
        assert!(error.why().contains("mem"), "{error:?}");
    }

    #[test]
    fn a_cut_off_image_is_an_error_and_no_answer() {
        for packed in [cpio(&["a/virtio.ko"]), gzip(&cpio(&["a/virtio.ko"])), zstd(&cpio(&["a/virtio.ko"]))] {
            let error = read(&packed[..packed.len() - 20], "initrd.img").unwrap_err();
            assert_eq!(error.id(), "initramfs.read");
            assert!(error.what().contains("initrd.img"));
        }
        assert!(read(&b"LRZIP\0"[..], "x").unwrap_err().why().contains("does not know"));
    }

    #[test]
    fn zeroes_without_end_are_an_error() {
        let error = read_within(io::repeat(0), "initrd.img", 1 << 20).unwrap_err();
        assert!(error.why().contains("1048576 bytes"), "{error:?}");
        // A file that is one hole costs nothing to make, and would take seconds to read.
        let error = read(io::repeat(0), "initrd.img").unwrap_err();
        assert!(error.why().contains("16777216 zero bytes"), "{error:?}");
        let mut image = cpio(&["a/virtio.ko"]);
        image.resize(1000, 0);
        assert_eq!(read_within(&*image, "initrd.img", 1001).unwrap().modules.len(), 1);
        assert!(read_within(&*image, "initrd.img", 1000).is_err());
    }

    #[test]
    fn every_suffix_of_a_module_is_known() {
        for end in ["", ".xz", ".zst", ".gz", ".bz2"] {
            assert_eq!(module_name(&format!("/lib/virtio-pci.ko{end}")).as_deref(), Some("virtio_pci"));
        }
        assert_eq!(module_name("virtio.konf"), None);
        assert_eq!(module_name(".ko"), None);
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(
            start in prop::sample::select(vec![
                b"070701".to_vec(), b"\x1f\x8b".to_vec(), b"\x28\xb5\x2f\xfd".to_vec(), b"\xfd7zXZ\0".to_vec(),
                b"\x02\x21\x4c\x18".to_vec(), b"\x5d\0\0\0\x04".to_vec(), b"BZh91AY&SY".to_vec(), Vec::new(),
            ]),
            rest in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut bytes = start;
            bytes.extend(rest);
            let _ = read(bytes.as_slice(), "test");
        }
    }
}
