//! The numbers and messages of the NBD protocol (doc/proto.md), and reading and writing them.

use std::io::{self, Read};

/// First bytes of every server.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of a server that negotiates; also before each option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Second magic of a server that does not negotiate ("oldstyle").
pub const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// Before each reply to an option.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST: u32 = 0x2560_9513;
/// Before a simple reply.
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Before a chunk of a structured reply.
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Handshake and client flag: options may be refused one by one.
pub const FIXED_NEWSTYLE: u16 = 1;
/// Handshake and client flag: no padding after `NBD_OPT_EXPORT_NAME`.
pub const NO_ZEROES: u16 = 2;
/// Bytes of that padding.
pub const ZEROES: usize = 124;

/// Options (`NBD_OPT_*`).
pub mod opt {
    #![allow(missing_docs, reason = "the names of the specification")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options (`NBD_REP_*`).
pub mod rep {
    #![allow(missing_docs, reason = "the names of the specification")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR + 1;
    pub const ERR_INVALID: u32 = ERROR + 3;
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
}

/// Items of information about an export (`NBD_INFO_*`).
pub mod info {
    #![allow(missing_docs, reason = "the names of the specification")]
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags (`NBD_FLAG_*`).
pub mod flag {
    #![allow(missing_docs, reason = "the names of the specification")]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Commands (`NBD_CMD_*`).
pub mod cmd {
    #![allow(missing_docs, reason = "the names of the specification")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    /// Command flag of `BLOCK_STATUS`: one descriptor is enough.
    pub const FLAG_REQ_ONE: u16 = 1 << 3;
}

/// Chunks of structured replies (`NBD_REPLY_TYPE_*`).
pub mod chunk {
    #![allow(missing_docs, reason = "the names of the specification")]
    /// Flag: the last chunk of its reply.
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT + 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// Values of errors (`NBD_E*`).
pub mod errno {
    #![allow(missing_docs, reason = "the names of the specification")]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ESHUTDOWN: u32 = 108;
}

/// The metadata context which says what is a hole and what is zero.
pub const ALLOCATION: &str = "base:allocation";
/// The number that our server gives that context.
pub const ALLOCATION_ID: u32 = 1;
/// Flag of that context: the bytes are not allocated. Says nothing about how they read.
pub const STATE_HOLE: u32 = 1;
/// Flag of that context: the bytes read as zeroes.
pub const STATE_ZERO: u32 = 2;

/// Longest string the protocol allows, in bytes ("Values of strings").
pub const MAX_STRING: usize = 4096;
/// Longest request every server takes ("Block size constraints"), in bytes.
pub const MAX_REQUEST: u32 = 32 << 20;
/// Largest minimum block size a server may ask for, in bytes.
pub const MAX_MIN_BLOCK: u32 = 1 << 16;
/// Bytes of a request's header.
pub const REQUEST_LEN: usize = 28;

/// Reads `N` bytes.
pub fn read_array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads a number of 16 bits.
pub fn read_u16(stream: &mut impl Read) -> io::Result<u16> {
    read_array(stream).map(u16::from_be_bytes)
}

/// Reads a number of 32 bits.
pub fn read_u32(stream: &mut impl Read) -> io::Result<u32> {
    read_array(stream).map(u32::from_be_bytes)
}

/// Reads a number of 64 bits.
pub fn read_u64(stream: &mut impl Read) -> io::Result<u64> {
    read_array(stream).map(u64::from_be_bytes)
}

/// Reads and drops `len` bytes, with little memory however many they are.
pub fn skip(stream: &mut impl Read, len: u64) -> io::Result<()> {
    match io::copy(&mut stream.by_ref().take(len), &mut io::sink())? {
        skipped if skipped == len => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// A message read from front to back; each part is `None` where it ends early.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (first, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(first)
    }

    /// A string after its length in 32 bits.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(usize::try_from(len).ok()?)
    }
}

/// Puts a string and its length in 32 bits at the end of `message`. Every string is bounded far below 4 GiB.
pub fn put_string(message: &mut Vec<u8>, text: &[u8]) {
    message.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    message.extend(text);
}

/// A request of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// One of [`cmd`].
    pub command: u16,
    /// The client's name for it, repeated in each reply.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u32,
}

impl Request {
    /// The header as it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(REQUEST_LEN);
        bytes.extend(REQUEST.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes.extend(self.len.to_be_bytes());
        bytes
    }

    /// Reads a header; `None` when the magic number is wrong.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        fields.u32().filter(|magic| *magic == REQUEST)?;
        Some(Request {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u32()?,
        })
    }
}

/// The header of a simple reply.
pub fn simple_reply(cookie: u64, error: u32) -> Vec<u8> {
    [&SIMPLE_REPLY.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

/// The header of a chunk of a structured reply with `len` bytes of payload.
pub fn chunk_header(flags: u16, kind: u16, cookie: u64, len: u32) -> Vec<u8> {
    [
        &STRUCTURED_REPLY.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_back_and_a_wrong_magic_does_not() {
        let request =
            Request { flags: 8, command: cmd::BLOCK_STATUS, cookie: u64::MAX - 1, offset: 1 << 40, len: 7 };
        let mut bytes: [u8; REQUEST_LEN] = request.encode().try_into().unwrap();
        assert_eq!(Request::decode(&bytes), Some(request));
        bytes[3] ^= 1;
        assert_eq!(Request::decode(&bytes), None);
    }

    #[test]
    fn a_message_that_ends_early_has_no_more_parts() {
        let mut message = Vec::new();
        put_string(&mut message, b"haul");
        assert_eq!(Fields(&message).string(), Some(&b"haul"[..]));
        for len in 0..message.len() {
            assert_eq!(Fields(&message[..len]).string(), None, "{len}");
        }
    }
}
