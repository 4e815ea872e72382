//! The server's side of the transmission phase: one client's requests, answered by several threads.

use std::io::{self, Read, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use super::answer::Agreed;
use super::link::Link;
use super::server::Disk;
use super::wire::{self, ALLOCATION_ID, REQUEST_LEN, Request, chunk, cmd, errno};
use crate::error::Result;
use crate::io::{AlignedBuf, ReadAt};
use crate::unit::{Extent, to_usize};

/// Requests of one client worked on at a time: reading an object is waiting for its store.
const WORKERS: usize = 4;
/// Most bytes read and sent at a time, so that 8 clients hold 16 MiB.
const PIECE: usize = 512 << 10;
/// Most descriptors of one answer about allocation.
const MAX_DESCRIPTORS: usize = 4096;
/// Descriptors begin and end at multiples of it, in bytes, or where the question or the disk does.
const GRAIN: u64 = 512;
/// Most bytes of an error's text sent.
const MAX_TEXT: usize = 1024;

/// Answers a client's requests until it leaves or breaks the protocol, at its leisure.
pub fn serve(disk: &Disk, agreed: Agreed, mut link: Link) -> io::Result<()> {
    link.at_leisure();
    let sender = Mutex::new(link.try_clone()?);
    let conversation = Conversation { disk, agreed, receiver: Mutex::new(Some(link)), sender };
    thread::scope(|scope| {
        for _ in 1..WORKERS {
            // With fewer threads it is slower, no more.
            let _ =
                thread::Builder::new().name("nbd-client".into()).spawn_scoped(scope, || conversation.work());
        }
        conversation.work();
    });
    Ok(())
}

struct Conversation<'a> {
    disk: &'a Disk,
    agreed: Agreed,
    /// `None` once the client has left.
    receiver: Mutex<Option<Link>>,
    sender: Mutex<Link>,
}

impl Conversation<'_> {
    fn sender(&self) -> MutexGuard<'_, Link> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers requests until there are no more.
    fn work(&self) {
        let mut buf = AlignedBuf::new(PIECE);
        while let Some((request, payload)) = self.request() {
            if self.answer(&request, &payload, &mut buf).is_err() {
                // The client is gone, or half an answer was sent: there is no going on.
                self.sender().shut_down();
                return;
            }
        }
    }

    /// The next request, and what it is to write; `None` when there are no more.
    fn request(&self) -> Option<(Request, Vec<u8>)> {
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        let request = receiver.as_mut().and_then(|link| {
            let mut payload = Vec::new();
            let request = Request::decode(&wire::read_array::<REQUEST_LEN>(link).ok()?)?;
            match request.command {
                cmd::DISC => return None,
                cmd::WRITE if request.len > wire::MAX_REQUEST => return None,
                cmd::WRITE if self.disk.is_writable() => {
                    payload.resize(to_usize(request.len.into()), 0);
                    link.read_exact(&mut payload).ok()?;
                }
                cmd::WRITE => wire::skip(link, request.len.into()).ok()?,
                _ => {}
            }
            Some((request, payload))
        });
        if request.is_none() {
            *receiver = None;
        }
        request
    }

    fn answer(&self, request: &Request, payload: &[u8], buf: &mut [u8]) -> io::Result<()> {
        let asked = Extent::at(request.offset, request.len.into());
        let inside = !asked.is_empty() && Extent::new(0, self.disk.size()).contains(asked);
        match request.command {
            cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES if !self.disk.is_writable() => {
                self.refuse(request, errno::EPERM, "the disk is read-only")
            }
            cmd::WRITE if inside && request.flags == 0 => {
                let written = self.disk.change(|sink| sink.write_at(payload, request.offset));
                self.done(request, written)
            }
            cmd::FLUSH if self.disk.is_writable() && request.flags == 0 => {
                self.done(request, self.disk.change(|sink| sink.sync()))
            }
            cmd::READ | cmd::BLOCK_STATUS if !inside => {
                self.refuse(request, errno::EINVAL, "the request is empty or leaves the disk")
            }
            cmd::READ if request.flags != 0 || request.len > wire::MAX_REQUEST => {
                self.refuse(request, errno::EINVAL, "the request is too long or has unknown flags")
            }
            cmd::READ if self.agreed.structured => self.read_in_chunks(request, asked, buf),
            cmd::READ => self.read_bare(request, asked, buf),
            cmd::BLOCK_STATUS if self.agreed.allocation && request.flags & !cmd::FLAG_REQ_ONE == 0 => {
                self.status(request, asked)
            }
            _ => self.refuse(request, errno::EINVAL, "the command was not agreed on"),
        }
    }

    /// Tells how something without an answer of its own went.
    fn done(&self, request: &Request, outcome: std::result::Result<(), String>) -> io::Result<()> {
        match outcome {
            Err(text) => self.refuse(request, errno::EIO, &text),
            Ok(()) if self.agreed.structured => self.chunk(request, chunk::FLAG_DONE, chunk::NONE, &[]),
            Ok(()) => self.sender().write_all(&wire::simple_reply(request.cookie, 0)),
        }
    }

    fn refuse(&self, request: &Request, errno: u32, text: &str) -> io::Result<()> {
        if self.agreed.structured {
            self.chunk(request, chunk::FLAG_DONE, chunk::ERROR, &[&errno.to_be_bytes(), &words(text)])
        } else {
            self.sender().write_all(&wire::simple_reply(request.cookie, errno))
        }
    }

    /// Sends one chunk of a reply, whole: other threads send theirs before or after it.
    fn chunk(&self, request: &Request, flags: u16, kind: u16, payload: &[&[u8]]) -> io::Result<()> {
        let len = payload.iter().map(|part| part.len()).sum::<usize>();
        let len = u32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut sender = self.sender();
        sender.write_all(&wire::chunk_header(flags, kind, request.cookie, len))?;
        payload.iter().try_for_each(|part| sender.write_all(part))
    }

    fn read_in_chunks(&self, request: &Request, asked: Extent, buf: &mut [u8]) -> io::Result<()> {
        let mut at = asked.start;
        while at < asked.end {
            let part = Extent::at(at, buf.len() as u64).intersect(asked);
            let bytes = &mut buf[..to_usize(part.len())];
            let place = at.to_be_bytes();
            if let Err(text) = self.disk.read(bytes, at) {
                let errno = errno::EIO.to_be_bytes();
                return self.chunk(
                    request,
                    chunk::FLAG_DONE,
                    chunk::ERROR_OFFSET,
                    &[&errno, &words(&text), &place],
                );
            }
            let flags = if part.end == asked.end { chunk::FLAG_DONE } else { 0 };
            self.chunk(request, flags, chunk::OFFSET_DATA, &[&place, bytes])?;
            at = part.end;
        }
        Ok(())
    }

    /// Without chunks, an error can only be told before the first byte.
    fn read_bare(&self, request: &Request, asked: Extent, buf: &mut [u8]) -> io::Result<()> {
        let mut at = asked.start;
        let mut sender = None;
        while at < asked.end {
            let part = Extent::at(at, buf.len() as u64).intersect(asked);
            let bytes = &mut buf[..to_usize(part.len())];
            if let Err(text) = self.disk.read(bytes, at) {
                return match sender {
                    None => self.refuse(request, errno::EIO, &text),
                    Some(_) => Err(io::Error::other(text)),
                };
            }
            let sender = match &mut sender {
                Some(sender) => sender,
                none => {
                    let sender = none.insert(self.sender());
                    sender.write_all(&wire::simple_reply(request.cookie, 0))?;
                    sender
                }
            };
            sender.write_all(bytes)?;
            at = part.end;
        }
        Ok(())
    }

    fn status(&self, request: &Request, asked: Extent) -> io::Result<()> {
        let most = if request.flags & cmd::FLAG_REQ_ONE != 0 { 1 } else { MAX_DESCRIPTORS };
        match descriptors(self.disk.source(), asked, most) {
            Ok(descriptors) => {
                let id = ALLOCATION_ID.to_be_bytes();
                self.chunk(request, chunk::FLAG_DONE, chunk::BLOCK_STATUS, &[&id, &descriptors])
            }
            Err(error) => self.refuse(request, errno::EIO, &self.disk.failed(error)),
        }
    }
}

/// What is known of `asked`, from its start on, in at most `most` descriptors ("Structured reply types").
fn descriptors(disk: &dyn ReadAt, asked: Extent, most: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut put = |len: u64, flags: u32| {
        // No longer than the question, whose length has 32 bits.
        bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    };
    let hole = wire::STATE_HOLE | wire::STATE_ZERO;
    let mut at = asked.start;
    let mut next = next_run(disk, asked, at)?;
    for _ in 0..most {
        if at == asked.end {
            break;
        }
        match next {
            None => {
                put(asked.end - at, hole);
                break;
            }
            Some(data) if data.start > at => {
                put(data.start - at, hole);
                at = data.start;
            }
            Some(mut data) => {
                // Runs that touch are one.
                next = next_run(disk, asked, data.end)?;
                while let Some(more) = next.filter(|more| more.start == data.end && data.end < asked.end) {
                    data.end = more.end;
                    next = next_run(disk, asked, data.end)?;
                }
                put(data.end - at, 0);
                at = data.end;
            }
        }
    }
    Ok(bytes)
}

/// The next run of data at or after `from`, in whole grains, inside `asked`.
fn next_run(disk: &dyn ReadAt, asked: Extent, from: u64) -> Result<Option<Extent>> {
    if from >= asked.end {
        return Ok(None);
    }
    let run = disk.next_data(from)?.map(|run| run.widened(GRAIN).intersect(Extent::new(from, asked.end)));
    Ok(run.filter(|run| !run.is_empty()))
}

/// A text as error chunks carry it: after its length in 16 bits.
fn words(text: &str) -> Vec<u8> {
    let (text, _) = text.split_at(text.floor_char_boundary(MAX_TEXT));
    let bytes = text.as_bytes();
    [&u16::try_from(bytes.len()).unwrap_or(0).to_be_bytes(), bytes].concat()
}
