//! Replies to a client's requests, read chunk by chunk and held to the protocol ("Transmission phase").

use std::io::{self, BufReader, Read};

use super::fault::{Fault, protocol, readable};
use super::wire::{self, Fields, chunk, errno};
use crate::unit::{Extent, ExtentMap, to_usize};

/// Longest answer about allocation, in bytes: nbdkit gives up to a mebi of descriptors.
const MAX_STATUS: u32 = 4 + (8 << 20);
/// Most runs of data kept of one such answer; what follows is asked again.
const MAX_RUNS: usize = 16 << 10;
/// Most chunks of an answer about allocation: the answer itself, an error, and an end.
const MAX_STATUS_CHUNKS: u64 = 4;

/// The header of a reply, or of one chunk of it.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Which request it is about.
    pub cookie: u64,
    content: Content,
}

#[derive(Clone, Copy, Debug)]
enum Content {
    Simple { error: u32 },
    Chunk { flags: u16, kind: u16, len: u32 },
}

impl Head {
    /// Reads the next header; chunks are known only where they were agreed on (`structured`).
    pub fn read(stream: &mut impl Read, structured: bool) -> Result<Self, Fault> {
        // A simple reply has 16 bytes, a chunk's header 20.
        let first = wire::read_array::<16>(stream)?;
        let mut fields = Fields(&first);
        let head = match fields.u32() {
            Some(wire::SIMPLE_REPLY) => fields.u32().zip(fields.u64()).map(|(error, cookie)| {
                let content = Content::Simple { error };
                Head { cookie, content }
            }),
            Some(wire::STRUCTURED_REPLY) if structured => {
                let len = wire::read_u32(stream)?;
                fields.u16().zip(fields.u16()).zip(fields.u64()).map(|((flags, kind), cookie)| {
                    let content = Content::Chunk { flags, kind, len };
                    Head { cookie, content }
                })
            }
            _ => None,
        };
        head.ok_or_else(|| protocol(format!("a reply that begins with {first:02x?}")))
    }
}

/// One reply under way.
struct Reply {
    /// What was asked.
    asked: Extent,
    structured: bool,
    /// How many more chunks it may have.
    left: u64,
    refused: Option<Fault>,
}

/// What a reply brings.
enum Payload {
    /// The bytes asked for, without more.
    Bare,
    /// A chunk of this type and length.
    Chunk(u16, u32),
}

impl Reply {
    /// Takes what `head` announces, by `content` if it is neither an error nor the end; whether it was the last.
    fn step<R: Read>(
        &mut self,
        head: Head,
        stream: &mut R,
        content: impl FnOnce(&mut R, Payload) -> Result<(), Fault>,
    ) -> Result<bool, Fault> {
        let (flags, kind, len) = match head.content {
            Content::Simple { error: 0 } if !self.structured => {
                content(stream, Payload::Bare)?;
                return Ok(true);
            }
            Content::Simple { error: 0 } => {
                return Err(protocol("a simple reply where a structured one was agreed on"));
            }
            Content::Simple { error } => {
                self.refused = Some(self.refusal(error, None, &[]));
                return Ok(true);
            }
            Content::Chunk { flags, kind, len } => (flags, kind, len),
        };
        let done = flags & chunk::FLAG_DONE != 0;
        self.left = match self.left.checked_sub(1) {
            Some(left) => left,
            None => return Err(protocol(format!("too many chunks in the reply for {:?}", self.asked))),
        };
        match kind {
            kind if kind & chunk::ERROR_BIT != 0 => {
                let fault = self.error_chunk(stream, kind, len)?;
                self.refused.get_or_insert(fault);
            }
            chunk::NONE if done && len == 0 => {}
            chunk::NONE => return Err(protocol("an empty chunk that is not the last of its reply")),
            kind => content(stream, Payload::Chunk(kind, len))?,
        }
        Ok(done)
    }

    fn error_chunk(&self, stream: &mut impl Read, kind: u16, len: u32) -> Result<Fault, Fault> {
        let wrong = || protocol(format!("an error of type {kind:#x} and {len} bytes"));
        if to_usize(len.into()) > wire::MAX_STRING + 64 {
            return Err(wrong());
        }
        let mut payload = vec![0; to_usize(len.into())];
        stream.read_exact(&mut payload)?;
        let mut fields = Fields(&payload);
        let errno = fields.u32().filter(|errno| *errno != 0).ok_or_else(wrong)?;
        let words = fields.u16().and_then(|len| fields.bytes(len.into())).ok_or_else(wrong)?;
        let offset = (kind == chunk::ERROR_OFFSET).then(|| fields.u64().ok_or_else(wrong)).transpose()?;
        Ok(self.refusal(errno, offset, words))
    }

    fn refusal(&self, errno: u32, offset: Option<u64>, words: &[u8]) -> Fault {
        if errno == errno::ESHUTDOWN {
            return Fault::Broken(io::Error::other("the server is shutting down"));
        }
        // The server's own place counts if it can be one.
        let offset = offset.filter(|at| self.asked.contains(Extent::at(*at, 1))).unwrap_or(self.asked.start);
        Fault::Refused { errno, offset, words: readable(words) }
    }
}

/// A request to read, and where its bytes go.
pub struct ReadReply<'a> {
    reply: Reply,
    wanted: Extent,
    target: &'a mut [u8],
    /// All bytes asked for, where they are more than those wanted.
    block: Vec<u8>,
    covered: ExtentMap,
}

impl<'a> ReadReply<'a> {
    /// The reply for `asked`, of which `wanted` goes into `target`, which is as long.
    pub fn new(asked: Extent, wanted: Extent, target: &'a mut [u8], structured: bool) -> Self {
        // Fewer than 512 bytes in each of many chunks serve nobody.
        let reply = Reply { asked, structured, left: asked.len() / 512 + 16, refused: None };
        let block = if asked == wanted { Vec::new() } else { vec![0; to_usize(asked.len())] };
        ReadReply { reply, wanted, target, block, covered: ExtentMap::new() }
    }

    /// What is asked.
    pub fn asked(&self) -> Extent {
        self.reply.asked
    }

    /// Takes what `head` announces; whether it was the last of this reply.
    pub fn take(&mut self, head: Head, stream: &mut impl Read) -> Result<bool, Fault> {
        let asked = self.reply.asked;
        let all = if self.block.is_empty() { &mut *self.target } else { &mut self.block[..] };
        let covered = &mut self.covered;
        let done = self.reply.step(head, stream, |stream, payload| {
            let Payload::Chunk(kind, len) = payload else {
                covered.insert(asked);
                return Ok(stream.read_exact(all)?);
            };
            let at = match len {
                8.. => wire::read_u64(stream)?,
                _ => return Err(protocol(format!("a chunk of type {kind} and {len} bytes for a read"))),
            };
            let content = match (kind, len) {
                (chunk::OFFSET_DATA, 9..) => Extent::at(at, u64::from(len) - 8),
                (chunk::OFFSET_HOLE, 12) => Extent::at(at, u64::from(wire::read_u32(stream)?)),
                _ => return Err(protocol(format!("a chunk of type {kind} and {len} bytes for a read"))),
            };
            if content.is_empty() || !asked.contains(content) || covered.within(content).next().is_some() {
                return Err(protocol(format!("bytes {content:?} in a reply for {asked:?}")));
            }
            covered.insert(content);
            let part = &mut all[to_usize(content.start - asked.start)..to_usize(content.end - asked.start)];
            if kind == chunk::OFFSET_DATA {
                stream.read_exact(part)?;
            } else {
                part.fill(0);
            }
            Ok(())
        })?;
        if done && self.reply.refused.is_none() {
            if !self.covered.covers(asked) {
                return Err(protocol(format!("{} bytes in a reply for {asked:?}", self.covered.bytes())));
            }
            if !self.block.is_empty() {
                let skipped = to_usize(self.wanted.start - asked.start);
                self.target.copy_from_slice(&self.block[skipped..skipped + self.target.len()]);
            }
        }
        Ok(done)
    }

    /// Why the server did not give the bytes, if it did not.
    pub fn refused(self) -> Option<Fault> {
        self.reply.refused
    }
}

/// What is known of a stretch of an export.
#[derive(Debug)]
pub struct Stretch {
    /// What it says something about.
    pub covered: Extent,
    /// The runs in there that may hold other bytes than zeroes: in order, not touching.
    pub data: Vec<Extent>,
}

impl Stretch {
    /// Nothing is known: all of it may hold data.
    pub fn unknown(covered: Extent) -> Self {
        Stretch { covered, data: vec![covered] }
    }
}

/// A request for what the server knows of a stretch.
pub struct StatusReply {
    reply: Reply,
    /// The number of the context asked about.
    context: u32,
    /// The end of the export.
    end: u64,
    found: Option<Stretch>,
}

impl StatusReply {
    /// The reply for `asked` in an export of `size` bytes, about the context of the number `context`.
    pub fn new(asked: Extent, size: u64, context: u32) -> Self {
        let reply = Reply { asked, structured: true, left: MAX_STATUS_CHUNKS, refused: None };
        StatusReply { reply, context, end: size, found: None }
    }

    /// Takes what `head` announces; whether it was the last of this reply.
    pub fn take(&mut self, head: Head, stream: &mut impl Read) -> Result<bool, Fault> {
        let (start, end) = (self.reply.asked.start, self.end);
        let (context, found) = (self.context, &mut self.found);
        self.reply.step(head, stream, |stream, payload| {
            let (kind, len) = match payload {
                Payload::Chunk(kind, len) => (kind, len),
                Payload::Bare => return Err(protocol("a simple reply for a block status")),
            };
            let descriptors = len.saturating_sub(4) / 8;
            let fine = descriptors > 0 && len == 4 + descriptors * 8 && len <= MAX_STATUS;
            if kind != chunk::BLOCK_STATUS || !fine {
                return Err(protocol(format!("a chunk of type {kind} and {len} bytes for a block status")));
            }
            if wire::read_u32(stream)? != context || found.is_some() {
                return Err(protocol("a block status of a context not asked for"));
            }
            *found = Some(descriptors_of(stream, descriptors, start, end)?);
            Ok(())
        })
    }

    /// What the server said: a stretch that begins where it was asked, and may end before or after the end asked.
    pub fn stretch(self) -> Result<Stretch, Fault> {
        match (self.reply.refused, self.found) {
            (Some(fault), _) => Err(fault),
            (None, Some(stretch)) => Ok(stretch),
            (None, None) => Err(protocol("a block status without descriptors")),
        }
    }
}

/// Reads so many descriptors of what lies from `start` on in an export that ends at `end`.
fn descriptors_of(stream: &mut impl Read, descriptors: u32, start: u64, end: u64) -> Result<Stretch, Fault> {
    let len = u64::from(descriptors) * 8;
    let mut stream = BufReader::with_capacity(to_usize(len.min(64 << 10)), stream.by_ref().take(len));
    let mut data: Vec<Extent> = Vec::new();
    let (mut at, mut full) = (start, false);
    for _ in 0..descriptors {
        let (len, flags) = (wire::read_u32(&mut stream)?, wire::read_u32(&mut stream)?);
        if len == 0 {
            return Err(protocol("a block status of no bytes"));
        }
        let run = Extent::at(at, len.into()).intersect(Extent::new(0, end));
        // Only "zero" says how bytes read. A hole alone does not.
        if flags & wire::STATE_ZERO == 0 && !run.is_empty() && !full {
            let kept = data.len();
            match data.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ if kept == MAX_RUNS => full = true,
                _ => data.push(run),
            }
        }
        if !full {
            at = run.end.max(at);
        }
    }
    Ok(Stretch { covered: Extent::new(start, at), data })
}
