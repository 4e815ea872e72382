//! Images inside compressed streams and tar archives, opened as the disk or image file in them.
//!
//! What a file is wrapped in is told by its content, never by its name. A member of a plain archive (tar, OVA) is read
//! where it lies. A compressed stream cannot be read at any offset: it is unpacked once, from front to back, into a
//! sparse file without a name.

mod choose;
mod input;
mod ovf;
mod scratch;
mod sniff;
mod stream;
mod tar;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, Window, read_array};
use crate::unit::{Extent, to_usize};

pub use stream::Codec;

/// Most wrappings around one image: a compressed image in a compressed archive has three.
const MAX_LAYERS: usize = 4;
/// Bytes read at once of a stream that is unpacked.
pub const READ: u64 = 1 << 20;

/// How to open what may be wrapped.
pub struct Options<'a> {
    /// The archive's member that holds the image, as the archive calls it; needed only where more than one may.
    pub member: Option<&'a str>,
    /// The folder for the unnamed files that streams are unpacked into.
    pub scratch: &'a Path,
    /// The most bytes that one stream may unpack to.
    pub limit: u64,
    /// Told after every MiB unpacked; its error ends the unpacking.
    pub progress: &'a dyn Fn(Progress) -> Result<()>,
}

/// How far the unpacking of a stream has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes of the stream read.
    pub read: u64,
    /// Length of the stream in bytes.
    pub of: u64,
    /// Bytes it unpacked to so far.
    pub unpacked: u64,
}

/// What a file turns out to be wrapped in, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapping {
    /// A compressed stream.
    Stream(Codec),
    /// A tar archive; an OVA is one.
    Tar,
}

/// A wrapping that was taken off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// A stream that was unpacked.
    Stream(Codec),
    /// A tar archive, of which the member of this name was opened.
    Member(String),
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layer::Stream(codec) => write!(f, "{codec}"),
            Layer::Member(name) => write!(f, "tar member {name:?}"),
        }
    }
}

/// The innermost file.
pub struct Opened {
    /// The disk or image file, read at any offset. A file that was not wrapped is given as it came.
    pub disk: Arc<dyn ReadAt>,
    /// What it was wrapped in, the outermost first; empty if it was not.
    pub layers: Vec<Layer>,
}

/// What `disk` is wrapped in, if anything. A raw disk whose owner writes such a beginning to it looks wrapped, so a
/// block device is never asked, nor a file of which the user says that it is raw.
pub fn probe(disk: &(impl ReadAt + ?Sized)) -> Result<Option<Wrapping>> {
    if let Some(codec) = Codec::probe(disk)? {
        return Ok(Some(Wrapping::Stream(codec)));
    }
    if disk.size() < tar::BLOCK {
        return Ok(None);
    }
    Ok(tar::begins(&read_array(disk, 0)?).then_some(Wrapping::Tar))
}

/// Takes every wrapping off `source`.
///
/// Fails with [`Kind::Usage`] when the user must say which member is meant, [`Kind::Image`] when the archive or stream
/// is damaged, cut off, followed by something else, or asks for too much, [`Kind::Destination`] when what it unpacks
/// to finds no room.
pub fn open(source: Arc<dyn ReadAt>, options: &Options<'_>) -> Result<Opened> {
    let outermost = source.name();
    let mut opened = Opened { disk: source, layers: Vec::new() };
    let mut member = options.member;
    while let Some(wrapping) = probe(&opened.disk)? {
        if opened.layers.len() == MAX_LAYERS {
            return Err(Error::new(Kind::Image, "archive.depth", format!("cannot unpack {outermost}"))
                .because(format!("it is wrapped more than {MAX_LAYERS} times"))
                .remedy("unpack it by hand")
                .fact("image", &outermost));
        }
        let (disk, layer): (Arc<dyn ReadAt>, _) = match wrapping {
            Wrapping::Stream(codec) => (unpack(&opened.disk, codec, options)?, Layer::Stream(codec)),
            Wrapping::Tar => {
                let members = tar::members(&opened.disk)?;
                let chosen = choose::choose(&opened.disk, &members, member.take())?;
                (chosen.open(&opened.disk)?, Layer::Member(chosen.name.clone()))
            }
        };
        opened.disk = disk;
        opened.layers.push(layer);
    }
    match member {
        Some(name) => {
            Err(Error::new(Kind::Usage, "archive.no-archive", format!("{outermost} has no members"))
                .because("it is no tar archive, nor one that is compressed")
                .remedy(format!("leave out the member {name:?}"))
                .fact("image", &outermost))
        }
        None => Ok(opened),
    }
}

/// `packed` unpacked.
fn unpack(packed: &Arc<dyn ReadAt>, codec: Codec, options: &Options<'_>) -> Result<Arc<dyn ReadAt>> {
    let stream = stream::Stream::new(packed.clone(), codec, to_usize(READ));
    let name = format!("{} (unpacked)", packed.name());
    let file = scratch::spool(stream, options)?;
    let whole = Extent::new(0, file.size());
    Ok(Arc::new(Window::new(file, whole, name)))
}

/// A damage at `offset` of the archive or stream `name`.
fn damaged(id: &'static str, name: &str, offset: u64, what: impl fmt::Display) -> Error {
    Error::new(Kind::Image, id, format!("{name}: {what} at offset {offset}"))
        .fact("image", name)
        .fact("offset", offset)
}
