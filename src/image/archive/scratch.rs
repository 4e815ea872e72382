//! Unpacking of a stream into a sparse file without a name.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use super::stream::Stream;
use super::{Options, Progress};
use crate::error::{Error, Kind, Result};
use crate::io::{AlignedBuf, DiskFile, OutFile, WriteAt, is_zero};
use crate::unit::bytes::human;
use crate::unit::{KIB, MIB, to_usize};

/// Bytes unpacked before they are written.
const BLOCK: usize = 1 << 20;
/// Blocks under way between decoder and writer.
const BLOCKS: usize = 4;
/// Cells of this many zero bytes become holes.
const CELL: usize = to_usize(64 * KIB);
/// Bytes of the file system that are left to others.
const RESERVE: u64 = 64 * MIB;
/// The free space is looked at before each so many bytes are written.
const LOOK_EVERY: u64 = 16 * MIB;

/// Bytes of the unpacked stream, at their offset.
struct Block {
    offset: u64,
    bytes: AlignedBuf,
    filled: usize,
}

/// Unpacks `stream`. One thread decodes while another writes.
pub(super) fn spool(stream: Stream, options: &Options<'_>) -> Result<DiskFile> {
    let file = OutFile::unnamed(options.scratch)?;
    let name = stream.name().to_owned();
    let (full, to_write) = sync_channel(BLOCKS);
    let (free, to_fill) = channel();
    for _ in 0..BLOCKS {
        // The receiver is at hand.
        let _ = free.send(AlignedBuf::new(BLOCK));
    }
    let size = thread::scope(|scope| {
        let writer = thread::Builder::new()
            .name("unpack".into())
            .spawn_scoped(scope, || write(&file, &name, to_write, free))
            .map_err(|error| internal("cannot start a thread").caused_by(error))?;
        let decoded = decode(stream, options, &to_fill, full);
        // A writer that failed is why a decoder found nobody to give its blocks to.
        writer.join().map_err(|_| internal("the thread that writes panicked"))??;
        decoded
    })?;
    file.set_len(size)?;
    file.into_disk()
}

fn internal(what: &str) -> Error {
    Error::new(Kind::Internal, "archive.thread", what)
}

/// Decodes all of `stream`; returns its unpacked length.
fn decode(
    mut stream: Stream,
    options: &Options<'_>,
    free: &Receiver<AlignedBuf>,
    full: SyncSender<Block>,
) -> Result<u64> {
    let mut offset = 0;
    loop {
        let Ok(mut bytes) = free.recv() else { return Ok(offset) };
        let filled = stream.read_full(&mut bytes)?;
        if options.limit - offset < filled as u64 {
            return Err(Error::new(
                Kind::Image,
                "archive.limit",
                format!("{} unpacks to more than {}", stream.name(), human(options.limit)),
            )
            .because("that is the most it may become")
            .remedy("if it is no mistake, allow more")
            .fact("image", stream.name())
            .fact("offset", stream.consumed())
            .fact("limit", options.limit));
        }
        let end = filled < bytes.len();
        let block = Block { offset, bytes, filled };
        offset += filled as u64;
        if full.send(block).is_err() {
            return Ok(offset);
        }
        (options.progress)(Progress { read: stream.consumed(), of: stream.size(), unpacked: offset })?;
        if end {
            return Ok(offset);
        }
    }
}

/// Writes the blocks that come, without their zeroes, as long as there is room.
fn write(file: &OutFile, name: &str, blocks: Receiver<Block>, free: Sender<AlignedBuf>) -> Result<()> {
    let mut written = 0;
    let mut look_at = 0;
    for block in blocks {
        let filled = &block.bytes[..block.filled];
        let mut run = 0..0;
        for cell in filled.chunks(CELL).chain([&[][..]]) {
            if !is_zero(cell) {
                run.end += cell.len();
                continue;
            }
            if !run.is_empty() {
                if written >= look_at {
                    check_room(file, name, block.offset)?;
                    look_at = written + LOOK_EVERY;
                }
                written += run.len() as u64;
                file.write_at(&filled[run.clone()], block.offset + run.start as u64)?;
            }
            run = run.end + cell.len()..run.end + cell.len();
        }
        // A decoder that stopped needs no more blocks.
        let _ = free.send(block.bytes);
    }
    Ok(())
}

/// Fails when `offset` bytes of `name` are unpacked and there is no room for more.
fn check_room(file: &OutFile, name: &str, offset: u64) -> Result<()> {
    let left = file.free_space()?;
    if left >= RESERVE {
        return Ok(());
    }
    let folder = file.path().display();
    Err(Error::new(Kind::Destination, "archive.space", format!("cannot unpack {name} in {folder}"))
        .because(format!(
            "{} of it are unpacked, {} are free there, of which {} are kept for others",
            human(offset),
            human(left),
            human(RESERVE)
        ))
        .remedy("free space there, or have it unpacked in another folder")
        .fact("path", folder)
        .fact("unpacked", offset)
        .fact("free", left))
}
