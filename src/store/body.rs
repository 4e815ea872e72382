//! What is sent: bytes in memory or a range of a file, cloned for each try at no cost, held to a rate on the way.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use super::crc64;
use super::limit::Limiter;
use crate::error::{Error, Kind, Result};
use crate::unit::{Extent, to_usize};

/// How much of a file is in memory at once.
const STEP: u64 = 1 << 20;

/// The bytes of one request. Clones share them.
#[derive(Clone)]
pub struct Body {
    source: Source,
    pub(super) limiter: Option<Arc<Limiter>>,
}

#[derive(Clone)]
enum Source {
    Memory(Bytes),
    File(Arc<File>, Extent),
}

impl Body {
    /// A range of a file: for parts too large to hold in memory. The file must not change until the request ends.
    pub fn file(file: Arc<File>, range: Extent) -> Self {
        Body { source: Source::File(file, range), limiter: None }
    }

    /// The same bytes, sent no faster than `limiter` allows.
    #[must_use]
    pub fn limited(mut self, limiter: Arc<Limiter>) -> Self {
        self.limiter = Some(limiter);
        self
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match &self.source {
            Source::Memory(bytes) => bytes.len() as u64,
            Source::File(_, range) => range.len(),
        }
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `range` of the body, which must lie inside it.
    pub(super) fn read(&self, range: Extent) -> Result<Bytes> {
        match &self.source {
            Source::Memory(bytes) => Ok(bytes.slice(to_usize(range.start)..to_usize(range.end))),
            Source::File(file, whole) => {
                let mut bytes = vec![0; to_usize(range.len())];
                let offset = whole.start + range.start;
                file.read_exact_at(&mut bytes, offset).map_err(|error| {
                    Error::new(Kind::Destination, "store.spool", "cannot read back a spooled part")
                        .fact("offset", offset)
                        .caused_by(error)
                })?;
                Ok(bytes.into())
            }
        }
    }

    /// Shows every byte, in order, to `see`.
    pub(super) fn scan(&self, mut see: impl FnMut(&[u8])) -> Result<()> {
        let mut at = 0;
        while at < self.len() {
            let piece = Extent::at(at, STEP).intersect(Extent::new(0, self.len()));
            see(&self.read(piece)?);
            at = piece.end;
        }
        Ok(())
    }

    /// The CRC-64/XZ of the bytes.
    pub fn crc64(&self) -> Result<u64> {
        let mut hasher = crc64::Hasher::new();
        self.scan(|bytes| hasher.update(bytes))?;
        Ok(hasher.finish())
    }

    /// All of it in memory.
    pub(super) fn bytes(&self) -> Result<Bytes> {
        self.read(Extent::new(0, self.len()))
    }

    /// Whether reading it never waits for a disk.
    pub(super) fn in_memory(&self) -> bool {
        matches!(self.source, Source::Memory(_))
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Body { source: Source::Memory(bytes), limiter: None }
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

impl From<&'static [u8]> for Body {
    fn from(bytes: &'static [u8]) -> Self {
        Bytes::from_static(bytes).into()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_range_and_its_bytes_are_the_same_body() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
        file.write_all(&bytes).unwrap();
        let range = Extent::at(5, 9_000_001);
        let spooled = Body::file(Arc::new(file), range);
        let held = Body::from(bytes[5..9_000_006].to_vec());
        assert_eq!((spooled.len(), spooled.crc64().unwrap()), (held.len(), held.crc64().unwrap()));
        assert_eq!(spooled.bytes().unwrap(), held.bytes().unwrap());
    }
}
