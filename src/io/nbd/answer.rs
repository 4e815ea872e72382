//! The server's side of the negotiation: one export, with the context that tells holes.

use std::io::{self, Read, Write};

use super::wire::{self, ALLOCATION_ID, Fields, flag, info, opt, rep};

/// Longest option read, in bytes: two strings of the protocol's longest, and some numbers.
const MAX_OPTION: u32 = 16 << 10;
/// Longest option skipped, in bytes.
const MAX_SKIPPED: u32 = 1 << 20;
/// Most options of one client.
const MAX_OPTIONS: usize = 256;
/// Block sizes: any request is served, and whole pages are served best. In bytes.
const BLOCK_SIZES: [u32; 3] = [1, 4096, wire::MAX_REQUEST];

/// What a client and the server agreed on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreed {
    /// Replies come in chunks.
    pub structured: bool,
    /// The context `base:allocation` may be asked about.
    pub allocation: bool,
}

/// An option as it came.
struct Question {
    option: u32,
    data: Vec<u8>,
}

/// Negotiates for the one export, of `size` bytes, which may be `writable`; `None` when the client does not want it.
pub fn negotiate(stream: &mut (impl Read + Write), size: u64, writable: bool) -> io::Result<Option<Agreed>> {
    let flags =
        flag::HAS_FLAGS | if writable { flag::SEND_FLUSH } else { flag::READ_ONLY | flag::CAN_MULTI_CONN };
    let export = [&size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
    let offered = wire::FIXED_NEWSTYLE | wire::NO_ZEROES;
    let greeting = [wire::NBDMAGIC.to_be_bytes(), wire::IHAVEOPT.to_be_bytes()].concat();
    stream.write_all(&[&greeting[..], &offered.to_be_bytes()].concat())?;
    let taken = wire::read_u32(stream)?;
    if taken & !u32::from(offered) != 0 {
        return Ok(None);
    }
    let mut agreed = Agreed::default();
    for _ in 0..MAX_OPTIONS {
        let Some(Question { option, data }) = question(stream)? else { return Ok(None) };
        let mut answers = Vec::new();
        let mut answer = |kind: u32, payload: &[u8]| put_answer(&mut answers, option, kind, payload);
        let mut chosen = false;
        match option {
            opt::EXPORT_NAME if data.is_empty() => {
                stream.write_all(&export)?;
                if taken & u32::from(wire::NO_ZEROES) == 0 {
                    stream.write_all(&[0; wire::ZEROES])?;
                }
                return Ok(Some(agreed));
            }
            // There is no way to say no to this one.
            opt::EXPORT_NAME => return Ok(None),
            opt::LIST if data.is_empty() => {
                answer(rep::SERVER, &0u32.to_be_bytes());
                answer(rep::ACK, &[]);
            }
            opt::STRUCTURED_REPLY if data.is_empty() => {
                agreed.structured = true;
                answer(rep::ACK, &[]);
            }
            opt::INFO | opt::GO => match export_asked(&data) {
                Some([]) => {
                    answer(rep::INFO, &[&info::EXPORT.to_be_bytes(), &export[..]].concat());
                    let sizes = BLOCK_SIZES.map(u32::to_be_bytes).concat();
                    answer(rep::INFO, &[&info::BLOCK_SIZE.to_be_bytes(), &sizes[..]].concat());
                    answer(rep::ACK, &[]);
                    chosen = option == opt::GO;
                }
                Some(_) => answer(rep::ERR_UNKNOWN, b"there is one export, of the empty name"),
                None => answer(rep::ERR_INVALID, &[]),
            },
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => match contexts_asked(&data) {
                Some((name, queries)) if agreed.structured => {
                    let listing = option == opt::LIST_META_CONTEXT;
                    let wanted = |query: &&[u8]| {
                        *query == wire::ALLOCATION.as_bytes() || (listing && *query == b"base:".as_slice())
                    };
                    let found = queries.iter().any(wanted) || (listing && queries.is_empty());
                    if !listing {
                        agreed.allocation = found && name.is_empty();
                    }
                    if !name.is_empty() {
                        answer(rep::ERR_UNKNOWN, b"there is one export, of the empty name");
                    } else {
                        if found {
                            let id = if listing { 0 } else { ALLOCATION_ID };
                            let context = [&id.to_be_bytes()[..], wire::ALLOCATION.as_bytes()].concat();
                            answer(rep::META_CONTEXT, &context);
                        }
                        answer(rep::ACK, &[]);
                    }
                }
                _ => {
                    agreed.allocation &= option != opt::SET_META_CONTEXT;
                    answer(rep::ERR_INVALID, b"malformed, or before structured replies");
                }
            },
            opt::ABORT => {
                answer(rep::ACK, &[]);
                // A client may leave without waiting for it.
                let _ = stream.write_all(&answers);
                return Ok(None);
            }
            opt::LIST | opt::STRUCTURED_REPLY => answer(rep::ERR_INVALID, &[]),
            _ => answer(rep::ERR_UNSUP, &[]),
        }
        stream.write_all(&answers)?;
        if chosen {
            return Ok(Some(agreed));
        }
    }
    Ok(None)
}

/// Reads options up to the next one that is not too long, which is refused; `None` when it is no option.
fn question(stream: &mut (impl Read + Write)) -> io::Result<Option<Question>> {
    for _ in 0..MAX_OPTIONS {
        let (magic, option, len) =
            (wire::read_u64(stream)?, wire::read_u32(stream)?, wire::read_u32(stream)?);
        if magic != wire::IHAVEOPT || len > MAX_SKIPPED {
            return Ok(None);
        }
        if len <= MAX_OPTION {
            let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
            stream.read_exact(&mut data)?;
            return Ok(Some(Question { option, data }));
        }
        if option == opt::EXPORT_NAME {
            return Ok(None);
        }
        wire::skip(stream, len.into())?;
        let mut answer = Vec::new();
        put_answer(&mut answer, option, rep::ERR_TOO_BIG, &[]);
        stream.write_all(&answer)?;
    }
    Ok(None)
}

fn put_answer(answers: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    answers.extend(wire::OPTION_REPLY.to_be_bytes());
    answers.extend(option.to_be_bytes());
    answers.extend(kind.to_be_bytes());
    wire::put_string(answers, payload);
}

/// The name of the export in `NBD_OPT_INFO` and `NBD_OPT_GO`; what is asked to be told of it is told anyway.
fn export_asked(data: &[u8]) -> Option<&[u8]> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let infos = fields.u16()?;
    (fields.0.len() == usize::from(infos) * 2).then_some(name)
}

/// The name of the export and the queries in `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
fn contexts_asked(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let queries = fields.u32()?;
    let mut found = Vec::new();
    for _ in 0..queries {
        found.push(fields.string()?);
    }
    fields.0.is_empty().then_some((name, found))
}
