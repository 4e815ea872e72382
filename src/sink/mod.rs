//! Where packed batches go: an image laid out by its encoder into a destination that takes bytes in order.

pub mod image_file;
#[cfg(feature = "net")]
pub mod object;
pub mod pipe;
#[cfg(feature = "net")]
pub mod touched;
pub mod writers;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Kind, Result};
use crate::io::batch::{Encoder, Pack, PackedBatch, Piece};
use crate::manifest::journal::{BatchRecord, Journal, Record};

/// The end of the data path. Batches come in the order of the disk.
pub trait Sink: Send {
    /// A packer for one worker thread.
    fn packer(&self) -> Result<Box<dyn Pack>>;

    /// Takes the next batch. What is safe, and when, the destination tells the journal.
    fn put(&mut self, batch: PackedBatch) -> Result<()>;

    /// Returns once everything put is safe and on record: before a pause.
    fn settle(&mut self) -> Result<()>;

    /// Ends the image. It is complete and safe when this returns, and has no final name yet.
    fn finish(self: Box<Self>) -> Result<Sealed>;
}

/// A complete image, safe at its destination, without its final name yet.
pub struct Sealed {
    /// Length of the image in bytes.
    pub bytes: u64,
    /// CRC-64/XZ of the image, where the destination keeps one.
    pub crc64: Option<u64>,
    publish: Box<dyn FnOnce() -> Result<Option<u64>> + Send>,
}

impl Sealed {
    /// An image that `publish` gives its name, after which it knows the CRC-64/XZ that a store keeps of it.
    pub fn new(
        bytes: u64,
        crc64: Option<u64>,
        publish: impl FnOnce() -> Result<Option<u64>> + Send + 'static,
    ) -> Self {
        Sealed { bytes, crc64, publish: Box::new(publish) }
    }

    /// Gives the image its name: the one switch after which it exists. Returns the CRC-64/XZ that its store keeps of
    /// it, where it keeps one.
    pub fn publish(self) -> Result<Option<u64>> {
        (self.publish)()
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({} bytes)", self.bytes)
    }
}

/// Takes the bytes of an image in order; the front, whose room is left out at first, comes last.
pub trait Destination: Send {
    /// Takes the next bytes. It holds none of them for want of more.
    fn append(&mut self, bytes: Bytes) -> Result<()>;

    /// Takes so many zero bytes.
    fn zeros(&mut self, count: u64) -> Result<()>;

    /// Takes so many bytes of the image that a round begins with, where it is made of that image.
    fn kept(&mut self, _count: u64) -> Result<()> {
        Err(Error::new(Kind::Internal, "sink.kept", "nothing is kept where an image is made anew"))
    }

    /// All of a batch was appended and is in the journal: a border at which a part may be cut or a sync begun.
    fn batch_border(&mut self) -> Result<()>;

    /// Returns once everything appended is safe and the journal says so.
    fn settle(&mut self) -> Result<()>;

    /// Writes the front and ends the image.
    fn finish(self: Box<Self>, front: Vec<u8>) -> Result<Sealed>;
}

/// An image in one of haul's formats.
pub struct ImageSink {
    encoder: Box<dyn Encoder>,
    destination: Box<dyn Destination>,
    journal: Arc<Journal>,
}

impl ImageSink {
    /// An image laid out by `encoder`, which stands where `destination` stands, on record in `journal`.
    pub fn new(encoder: Box<dyn Encoder>, destination: Box<dyn Destination>, journal: Arc<Journal>) -> Self {
        ImageSink { encoder, destination, journal }
    }

    fn place(&mut self, pieces: Vec<Piece>, data: &Bytes) -> Result<()> {
        pieces.into_iter().try_for_each(|piece| match piece {
            Piece::Meta(bytes) => self.destination.append(bytes.into()),
            Piece::Data(range) => self.destination.append(data.slice(range)),
            Piece::Zeros(count) => self.destination.zeros(count),
            Piece::Kept(count) => self.destination.kept(count),
        })
    }
}

impl Sink for ImageSink {
    fn packer(&self) -> Result<Box<dyn Pack>> {
        self.encoder.packer()
    }

    fn put(&mut self, batch: PackedBatch) -> Result<()> {
        let pieces = self.encoder.put(batch.extent, &batch.cells)?;
        let record = (batch.digests.iter().any(Option::is_some) || batch.before.is_some())
            .then(|| BatchRecord::of(&batch, self.encoder.position(), self.encoder.cells_matter()));
        self.place(pieces, &Bytes::from_owner(batch.buf))?;
        if let Some(record) = record {
            self.journal.append(&Record::Batch(record))?;
        }
        self.destination.batch_border()
    }

    fn settle(&mut self) -> Result<()> {
        self.destination.settle()
    }

    fn finish(mut self: Box<Self>) -> Result<Sealed> {
        let (pieces, front) = self.encoder.finish()?;
        self.place(pieces, &Bytes::new())?;
        let sealed = self.destination.finish(front)?;
        self.journal.append(&Record::Sealed { bytes: sealed.bytes, crc64: sealed.crc64 })?;
        self.journal.sync()?;
        Ok(sealed)
    }
}
