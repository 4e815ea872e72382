//! Compressed streams: gzip (RFC 1952), zstd (RFC 8878) and xz, each of one or more parts that follow each other.

use std::fmt;
use std::io::{self, BufRead, ErrorKind, Read};
use std::rc::Rc;
use std::sync::Arc;

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use super::damaged;
use super::input::{Input, State};
use crate::error::{Error, Result};
use crate::io::{ReadAt, read_array};
use crate::unit::bytes::human;

/// The largest window (zstd) or dictionary (xz) that is accepted, as a power of two: 128 MiB is what `xz -9` needs
/// twice, and what `zstd` itself refuses to go beyond unless told to.
const MAX_WINDOW_LOG: u32 = 27;
/// The same for the xz reader, in KiB, with room for its other tables.
const XZ_MEMORY_KIB: u32 = (1 << (MAX_WINDOW_LOG - 10)) + 1024;
/// Most skippable frames before the first one with data that are looked over for its magic number.
const MAX_SKIPPED: usize = 4;

const GZIP: [u8; 3] = [0x1f, 0x8b, 8];
const XZ: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: u32 = 0xfd2f_b528;
/// The first of the sixteen magic numbers of skippable frames.
const ZSTD_SKIPPABLE: u32 = 0x184d_2a50;

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Deflate in gzip members, each with a CRC-32.
    Gzip,
    /// Zstandard frames; a checksum is theirs to have.
    Zstd,
    /// LZMA2 in xz streams, each block with a check.
    Xz,
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Codec::Gzip => "gzip",
            Codec::Zstd => "zstd",
            Codec::Xz => "xz",
        })
    }
}

fn skippable(magic: u32) -> bool {
    magic & !0xf == ZSTD_SKIPPABLE
}

impl Codec {
    /// How `disk` is compressed, if it is, by its magic number.
    pub(super) fn probe(disk: &(impl ReadAt + ?Sized)) -> Result<Option<Codec>> {
        let mut at = 0u64;
        for _ in 0..=MAX_SKIPPED {
            if at.checked_add(8).is_none_or(|end| end > disk.size()) {
                return Ok(None);
            }
            let head: [u8; 8] = read_array(disk, at)?;
            if at == 0 && head.starts_with(&GZIP) && head[3] & 0xe0 == 0 {
                return Ok(Some(Codec::Gzip));
            }
            if at == 0 && head.starts_with(&XZ) {
                return Ok(Some(Codec::Xz));
            }
            let [a, b, c, d, len @ ..] = head;
            let magic = u32::from_le_bytes([a, b, c, d]);
            if magic == ZSTD {
                return Ok(Some(Codec::Zstd));
            }
            // A skippable frame says how long it is. lz4 has the same ones, so what follows decides.
            if !skippable(magic) {
                return Ok(None);
            }
            at += 8 + u64::from(u32::from_le_bytes(len));
        }
        Ok(None)
    }

    /// What one part of the stream is called.
    fn part(self) -> &'static str {
        match self {
            Codec::Gzip => "member",
            Codec::Zstd => "frame",
            Codec::Xz => "stream",
        }
    }

    /// Whether another part begins with `head`, its first bytes.
    fn begins(self, head: &[u8]) -> bool {
        match self {
            Codec::Gzip => head.starts_with(&GZIP),
            Codec::Xz => head.starts_with(&XZ),
            Codec::Zstd => head
                .first_chunk()
                .map(|magic| u32::from_le_bytes(*magic))
                .is_some_and(|magic| magic == ZSTD || skippable(magic)),
        }
    }
}

/// One part of a stream being decoded.
enum Part {
    Gzip(Box<GzDecoder<Input>>),
    Xz(Box<XzReader<Input>>),
    Zstd(Frame),
}

impl Part {
    fn begin(codec: Codec, input: Input) -> Self {
        match codec {
            Codec::Gzip => Part::Gzip(Box::new(GzDecoder::new(input))),
            Codec::Xz => Part::Xz(Box::new(XzReader::new_mem_limit(input, false, XZ_MEMORY_KIB))),
            Codec::Zstd => Part::Zstd(Frame { input, context: DCtx::create(), done: false }),
        }
    }

    fn input(&mut self) -> &mut Input {
        match self {
            Part::Gzip(decoder) => decoder.get_mut(),
            Part::Xz(decoder) => decoder.inner_mut(),
            Part::Zstd(frame) => &mut frame.input,
        }
    }

    /// The next part, which begins where this one ended.
    fn next(self) -> Self {
        match self {
            Part::Gzip(decoder) => Part::begin(Codec::Gzip, decoder.into_inner()),
            Part::Xz(decoder) => Part::begin(Codec::Xz, decoder.into_inner()),
            // Small frames are common, and a context takes longer to make than to use for one.
            Part::Zstd(frame) => Part::Zstd(Frame { done: false, ..frame }),
        }
    }
}

impl Read for Part {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Part::Gzip(decoder) => decoder.read(bytes),
            Part::Xz(decoder) => decoder.read(bytes),
            Part::Zstd(frame) => frame.read(bytes),
        }
    }
}

/// One zstd frame; reads nothing beyond it.
struct Frame {
    input: Input,
    context: DCtx<'static>,
    done: bool,
}

impl Read for Frame {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while !self.done && !bytes.is_empty() {
            let ready = self.input.fill_buf()?;
            let at_end = ready.is_empty();
            let mut input = InBuffer::around(ready);
            let mut output = OutBuffer::around(&mut *bytes);
            let hint = self.context.decompress_stream(&mut output, &mut input).map_err(zstd_error)?;
            let (used, made) = (input.pos(), output.pos());
            self.input.consume(used);
            self.done = hint == 0;
            if made > 0 {
                return Ok(made);
            }
            if at_end && !self.done {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(0)
    }
}

fn zstd_error(code: usize) -> io::Error {
    let name = zstd_safe::get_error_name(code);
    // ZSTD_error_frameParameter_windowTooLarge, which has a number only in the unsafe bindings.
    let kind = if name.contains("too much memory") { ErrorKind::OutOfMemory } else { ErrorKind::InvalidData };
    io::Error::new(kind, name)
}

/// A compressed stream being unpacked.
pub(super) struct Stream {
    codec: Codec,
    /// The part being decoded; `None` after the end and after an error.
    part: Option<Part>,
    state: Rc<State>,
    name: String,
    size: u64,
}

impl Stream {
    /// The stream on `source`, which is read in pieces of `step` bytes.
    pub(super) fn new(source: Arc<dyn ReadAt>, codec: Codec, step: usize) -> Self {
        let (name, size) = (source.name(), source.size());
        let input = Input::new(source, step);
        let state = input.state().clone();
        let mut part = Part::begin(codec, input);
        if let Part::Zstd(frame) = &mut part {
            // It cannot fail: the value is in range, and no frame has begun.
            let _ = frame.context.reset(ResetDirective::SessionOnly);
            let _ = frame.context.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG));
        }
        Stream { codec, part: Some(part), state, name, size }
    }

    /// What the stream is called.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Length of the stream in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the stream taken so far.
    pub(super) fn consumed(&self) -> u64 {
        self.state.consumed.get()
    }

    /// Fills `bytes` as far as the stream goes; less than all of it only at the end, whose checksums were right.
    pub(super) fn read_full(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < bytes.len() {
            let Some(part) = &mut self.part else { break };
            match part.read(&mut bytes[done..]) {
                Ok(0) => self.next_part()?,
                Ok(n) => {
                    done += n;
                    self.state.useful.set(self.consumed());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fail(error)),
            }
        }
        Ok(done)
    }

    /// Goes on with the part behind the one that ended; there may be none, but nothing else.
    fn next_part(&mut self) -> Result<()> {
        let Some(mut part) = self.part.take() else { return Ok(()) };
        let input = part.input();
        let padding = if self.codec == Codec::Xz { skip_padding(input) } else { Ok(()) };
        let codec = self.codec;
        match padding.and_then(|()| input.peek(8).map(|head| (head.is_empty(), codec.begins(head)))) {
            Ok((true, _)) => Ok(()),
            Ok((false, true)) => {
                self.part = Some(part.next());
                Ok(())
            }
            Ok((false, false)) => {
                let end = self.consumed();
                let what = format!("there is something that is no {codec} {}", codec.part());
                Err(damaged("archive.trailing", &self.name, end, what)
                    .because(format!("a {codec} stream may be followed by nothing else"))
                    .remedy(format!(
                        "if the rest does not belong to it, cut it off a copy: truncate --size={end}"
                    )))
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// The error behind a decoder's.
    fn fail(&mut self, error: io::Error) -> Error {
        self.part = None;
        if let Some(error) = self.state.failed.borrow_mut().take() {
            return error;
        }
        let (codec, at) = (self.codec, self.consumed());
        match error.kind() {
            ErrorKind::UnexpectedEof => {
                let what = format!("the {codec} {} is cut off", codec.part());
                damaged("archive.truncated", &self.name, at, what)
                    .because("the file ends before its compressed data does")
                    .remedy("fetch the file again")
            }
            ErrorKind::OutOfMemory => {
                let what = format!("the {codec} {} wants too much memory", codec.part());
                damaged("archive.window", &self.name, at, what)
                    .because(format!(
                        "its window is larger than {}, the most haul gives a decoder",
                        human(1 << MAX_WINDOW_LOG)
                    ))
                    .remedy(format!("unpack it with {codec} first"))
            }
            _ => {
                let what = format!("the {codec} {} is damaged", codec.part());
                damaged("archive.stream", &self.name, at, what).caused_by(error)
            }
        }
    }
}

/// Takes stream padding: zeroes, a multiple of four (the .xz file format, section 2.2).
fn skip_padding(input: &mut Input) -> io::Result<()> {
    while input.peek(4)? == [0; 4] {
        input.consume(4);
    }
    Ok(())
}
