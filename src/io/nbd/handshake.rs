//! What a client agrees on with a server before it reads: the export, its size, and what requests it takes. What a
//! server sends is bounded in length and number, and held to the protocol (doc/proto.md).

use std::io::{self, Read, Write};

use super::fault::{Fault, protocol, readable};
use super::wire::{self, Fields, flag, info, opt, rep};
use super::{Uri, no_tls};
use crate::error::{Error, Kind};
use crate::io::is_zero;
use crate::unit::{Extent, KIB, to_usize};

/// Longest request made, in bytes: several are under way together, so none need be long.
pub const MAX_REQUEST: u64 = 512 * KIB;
/// Longest answer to an option, in bytes: two strings of the protocol's longest, and some numbers.
const MAX_ANSWER: u32 = 16 << 10;
/// Most answers to one option before its last.
const MAX_ANSWERS: usize = 64;
/// Alignment of requests to a server that names none, in bytes ("Block size constraints").
const DEFAULT_BLOCK: u64 = 512;

/// What a server said of an export.
#[derive(Clone, Copy, Debug)]
pub struct Export {
    /// Length in bytes.
    pub size: u64,
    /// Whether several connections see the same bytes.
    pub multi_conn: bool,
    /// What requests it takes.
    pub block: BlockSize,
    /// The number of the context that tells holes, where there is one.
    pub allocation: Option<u32>,
    /// Whether replies come in chunks.
    pub structured: bool,
}

/// Which requests a server takes ("Block size constraints"), all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Every request begins and ends at a multiple of it, or at the end of the export. A power of two.
    pub minimum: u64,
    /// Long reads are cut at multiples of it. A power of two.
    pub preferred: u64,
    /// The longest request: a multiple of the minimum.
    pub maximum: u64,
}

impl BlockSize {
    /// What a server takes that says nothing.
    const DEFAULT: BlockSize = BlockSize { minimum: DEFAULT_BLOCK, preferred: 4096, maximum: MAX_REQUEST };

    /// Checks what a server asks for.
    fn checked(minimum: u32, preferred: u32, maximum: u32) -> Option<BlockSize> {
        let fine = minimum.is_power_of_two()
            && minimum <= wire::MAX_MIN_BLOCK
            && preferred.is_power_of_two()
            && preferred >= minimum
            && maximum >= minimum;
        let (minimum, maximum) = (u64::from(minimum), u64::from(maximum).min(MAX_REQUEST));
        fine.then(|| BlockSize {
            minimum,
            preferred: u64::from(preferred),
            maximum: maximum / minimum * minimum,
        })
    }

    /// The first request for `wanted`, not empty and inside an export of `size` bytes. It holds the first byte wanted;
    /// it holds others than wanted only where it is a single block.
    pub fn request(&self, wanted: Extent, size: u64) -> Extent {
        let start = wanted.start / self.minimum * self.minimum;
        let block = Extent::new(start, size.min(start + self.minimum));
        if !wanted.contains(block) {
            return block;
        }
        let end = if wanted.end == size { size } else { wanted.end / self.minimum * self.minimum };
        if end - start <= self.maximum {
            return Extent::new(start, end);
        }
        let end = start + self.maximum;
        let cut = end / self.preferred * self.preferred;
        Extent::new(start, if cut > start { cut } else { end })
    }
}

/// Negotiates for the export that `uri` names.
pub fn negotiate(stream: impl Read + Write, uri: &Uri) -> Result<Export, Fault> {
    let export = Handshake { stream, uri }.run()?;
    if export.size > i64::MAX as u64 {
        return Err(protocol(format!("an export of {} bytes", export.size)));
    }
    if !export.size.is_multiple_of(export.block.minimum) && export.block.minimum != DEFAULT_BLOCK {
        return Err(Fault::Unusable(
            Error::new(Kind::Source, "nbd.blocks", format!("the end of {uri} cannot be read"))
                .because(format!(
                    "it has {} bytes and is read in blocks of {}",
                    export.size, export.block.minimum
                ))
                .remedy("let the server round it up, such as nbdkit with --filter=truncate round-up=4096")
                .fact("export", uri),
        ));
    }
    Ok(export)
}

/// A refused option.
struct Refusal {
    kind: u32,
    words: String,
}

struct Handshake<'a, S> {
    stream: S,
    uri: &'a Uri,
}

impl<S: Read + Write> Handshake<'_, S> {
    fn run(&mut self) -> Result<Export, Fault> {
        let (first, second) = (wire::read_u64(&mut self.stream)?, wire::read_u64(&mut self.stream)?);
        let offered = match (first, second) {
            (wire::NBDMAGIC, wire::IHAVEOPT) => wire::read_u16(&mut self.stream)?,
            (wire::NBDMAGIC, wire::OLDSTYLE) => 0,
            _ => return Err(protocol(format!("a greeting of {first:#018x} {second:#018x}"))),
        };
        if offered & wire::FIXED_NEWSTYLE == 0 {
            return Err(Fault::Unusable(
                Error::new(Kind::Network, "nbd.oldstyle", format!("{} cannot be negotiated with", self.uri))
                    .because("the server speaks NBD as it was before 2011")
                    .remedy("serve the disk by nbdkit, qemu-nbd or a newer nbd-server")
                    .fact("export", self.uri),
            ));
        }
        let flags = wire::FIXED_NEWSTYLE | offered & wire::NO_ZEROES;
        self.stream.write_all(&u32::from(flags).to_be_bytes())?;

        let nothing = |kind, _: &[u8]| Err(protocol(format!("an answer of type {kind} to an option")));
        let structured = self.ask(opt::STRUCTURED_REPLY, &[], nothing)?.is_ok();
        let allocation = if structured { self.allocation()? } else { None };

        let mut wanted = Vec::new();
        wire::put_string(&mut wanted, self.uri.export.as_bytes());
        wanted.extend([1u16, info::BLOCK_SIZE].iter().flat_map(|n| n.to_be_bytes()));
        let (mut said, mut block) = (None, BlockSize::DEFAULT);
        let answer = self.ask(opt::GO, &wanted, |kind, payload| {
            let wrong = || protocol(format!("an answer of type {kind} and {} bytes to GO", payload.len()));
            let mut fields = Fields(payload);
            match (kind, fields.u16().ok_or_else(wrong)?) {
                (rep::INFO, info::EXPORT) => {
                    let (size, flags) = (fields.u64(), fields.u16());
                    said = Some(size.zip(flags).filter(|_| fields.0.is_empty()).ok_or_else(wrong)?);
                }
                (rep::INFO, info::BLOCK_SIZE) => {
                    let mut size = || fields.u32().ok_or_else(wrong);
                    let (minimum, preferred, maximum) = (size()?, size()?, size()?);
                    block = BlockSize::checked(minimum, preferred, maximum).ok_or_else(|| {
                        protocol(format!("block sizes of {minimum}, {preferred} and {maximum}"))
                    })?;
                }
                (rep::INFO, _) => {}
                _ => return Err(wrong()),
            }
            Ok(())
        })?;
        let (size, flags) = match answer {
            Ok(()) => said.ok_or_else(|| protocol("no word about the size of the export"))?,
            Err(Refusal { kind: rep::ERR_UNSUP, .. }) => self.export_name(flags & wire::NO_ZEROES == 0)?,
            Err(refusal) => return Err(self.refused(&refusal)),
        };
        Ok(Export { size, multi_conn: flags & flag::CAN_MULTI_CONN != 0, block, allocation, structured })
    }

    /// Asks for the context that tells holes; none is no error.
    fn allocation(&mut self) -> Result<Option<u32>, Fault> {
        let mut wanted = Vec::new();
        wire::put_string(&mut wanted, self.uri.export.as_bytes());
        wanted.extend(1u32.to_be_bytes());
        wire::put_string(&mut wanted, wire::ALLOCATION.as_bytes());
        let mut found = None;
        let answer = self.ask(opt::SET_META_CONTEXT, &wanted, |kind, payload| {
            let mut fields = Fields(payload);
            match (kind, fields.u32()) {
                (rep::META_CONTEXT, Some(id)) if fields.0 == wire::ALLOCATION.as_bytes() => found = Some(id),
                (rep::META_CONTEXT, Some(_)) => {}
                _ => return Err(protocol(format!("an answer of type {kind} to SET_META_CONTEXT"))),
            }
            Ok(())
        })?;
        Ok(found.filter(|_| answer.is_ok()))
    }

    /// Takes the export the way servers know that do not know `NBD_OPT_GO`.
    fn export_name(&mut self, padded: bool) -> Result<(u64, u16), Fault> {
        self.send(opt::EXPORT_NAME, self.uri.export.as_bytes())?;
        let said = (wire::read_u64(&mut self.stream)?, wire::read_u16(&mut self.stream)?);
        if padded && !is_zero(&wire::read_array::<{ wire::ZEROES }>(&mut self.stream)?) {
            return Err(protocol("a padding that is not zero"));
        }
        Ok(said)
    }

    fn send(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut message = [&wire::IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes()].concat();
        wire::put_string(&mut message, data);
        self.stream.write_all(&message)
    }

    /// Sends an option and gives its answers to `take`, up to the one that ends them.
    fn ask(
        &mut self,
        option: u32,
        data: &[u8],
        mut take: impl FnMut(u32, &[u8]) -> Result<(), Fault>,
    ) -> Result<Result<(), Refusal>, Fault> {
        self.send(option, data)?;
        for _ in 0..MAX_ANSWERS {
            let magic = wire::read_u64(&mut self.stream)?;
            let to = wire::read_u32(&mut self.stream)?;
            let (kind, len) = (wire::read_u32(&mut self.stream)?, wire::read_u32(&mut self.stream)?);
            if magic != wire::OPTION_REPLY || to != option || len > MAX_ANSWER {
                return Err(protocol(format!(
                    "an answer {magic:#018x} of {len} bytes to option {to}, after option {option}"
                )));
            }
            let mut payload = vec![0; to_usize(len.into())];
            self.stream.read_exact(&mut payload)?;
            match kind {
                rep::ACK => return Ok(Ok(())),
                rep::ERR_TLS_REQD => return Err(Fault::Unusable(no_tls(&self.uri.to_string()))),
                kind if kind & rep::ERROR != 0 => {
                    return Ok(Err(Refusal { kind, words: readable(&payload) }));
                }
                kind => take(kind, &payload)?,
            }
        }
        Err(protocol(format!("more than {MAX_ANSWERS} answers to option {option}")))
    }

    fn refused(&self, Refusal { kind, words }: &Refusal) -> Fault {
        let uri = self.uri;
        let error = match *kind {
            rep::ERR_SHUTDOWN => return Fault::Broken(io::Error::other("the server is shutting down")),
            rep::ERR_UNKNOWN => {
                Error::new(Kind::Network, "nbd.export", format!("{uri}: the server has no such export"))
                    .remedy("list the server's exports with nbdinfo --list")
            }
            _ => Error::new(Kind::Network, "nbd.refused", format!("{uri}: the server refuses ({kind:#x})")),
        };
        let error = error.fact("export", uri);
        Fault::Unusable(if words.is_empty() {
            error
        } else {
            error.because(format!("the server says: {words}"))
        })
    }
}
