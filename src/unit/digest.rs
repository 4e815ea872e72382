//! BLAKE3 digests: of a chunk's bytes, and of a whole table of chunks.

use std::fmt;
use std::str::FromStr;

use super::Extent;
use crate::error::{Error, Kind};

/// A BLAKE3 digest (32 bytes), shown as hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Digest(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        blake3::Hash::from_hex(text).map(|hash| Digest(*hash.as_bytes())).map_err(|error| {
            Error::new(Kind::Image, "digest.parse", format!("{text:?} is not a digest")).caused_by(error)
        })
    }
}

/// The root over the chunks of a disk: BLAKE3 over (offset, length, digest) of each, in offset order.
#[derive(Clone)]
pub struct RootHasher(blake3::Hasher);

impl RootHasher {
    /// A root over no chunks yet of a disk of `size` bytes; the size is part of the root.
    pub fn new(size: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&size.to_le_bytes());
        RootHasher(hasher)
    }

    /// Adds the next chunk, at a higher offset than every one before.
    pub fn add(&mut self, extent: Extent, digest: &Digest) {
        self.0.update(&extent.start.to_le_bytes());
        self.0.update(&extent.len().to_le_bytes());
        self.0.update(&digest.0);
    }

    /// The root over every chunk added.
    pub fn finish(&self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_back_from_its_text() {
        let digest = Digest::of(b"haul");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("12".parse::<Digest>().is_err());
    }

    #[test]
    fn the_root_depends_on_place_length_and_content() {
        let root = |start, len, text: &[u8]| {
            let mut hasher = RootHasher::new(1 << 20);
            hasher.add(Extent::at(start, len), &Digest::of(text));
            hasher.finish()
        };
        let base = root(0, 64, b"a");
        assert_eq!(base, root(0, 64, b"a"));
        for other in [root(64, 64, b"a"), root(0, 65, b"a"), root(0, 64, b"b")] {
            assert_ne!(base, other);
        }
    }
}
