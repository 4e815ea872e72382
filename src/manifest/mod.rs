//! The manifest: what a copy holds, chunk by chunk, so that anyone can check it later (docs/manifest.md).
//!
//! ```text
//! "haul-manifest 1\n" | image table | source table | JSON head | u64 LE length of the head | BLAKE3 of all before
//! table: run …, end     run: u64 LE first chunk | u32 LE count | count × 32-byte digest     end: 12 × 0xff
//! ```
//! The image table lists every chunk of the copy that is not all zero. The source table lists the same for the
//! source, but only for batches that were amended; elsewhere both are equal.

pub mod journal;
pub mod merge;
pub mod sample;
pub mod survey;
pub mod verify;

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::io::atomic;
use crate::io::batch::Geometry;
use crate::unit::digest::RootHasher;
use crate::unit::{Digest, Extent, ExtentMap, to_usize};
use journal::BatchRecord;

const MAGIC: &[u8; 16] = b"haul-manifest 1\n";
const TAIL: u64 = 8 + 32;
const MAX_HEAD: u64 = 16 << 20;
const END: [u8; 12] = [0xff; 12];
/// Longest disk in bytes: no file or device of Linux is longer.
const MAX_SIZE: u64 = i64::MAX as u64;

/// The facts of a manifest; the chunk tables stay in the file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Format version; 1.
    pub version: u32,
    /// The program that wrote it, with its version.
    pub tool: String,
    /// When it was sealed, RFC 3339.
    pub created: String,
    /// What was copied: a path or URL.
    pub source: String,
    /// Whether the source was in use while it was copied (`--inconsistent`).
    pub inconsistent: bool,
    /// Length of the virtual disk in bytes.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk: u64,
    /// Root over (offset, length, BLAKE3) of each non-zero chunk of the source as read.
    pub source_root: Hex,
    /// The same over the copy.
    pub image_root: Hex,
    /// Bytes of the copy that lie in non-zero chunks.
    pub bytes: u64,
    /// Where the copy was made to differ from the source, as [start, end) in bytes.
    pub amended: Vec<(u64, u64)>,
    /// What could not be read and is zero in the copy, as [start, end) in bytes.
    #[serde(default)]
    pub unreadable: Vec<(u64, u64)>,
    /// Format of the copy: `raw` or `qcow2`.
    pub format: String,
    /// How it was compressed: `none`, `zlib` or `zstd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<String>,
    /// Length of the image in bytes.
    pub image_bytes: u64,
    /// CRC-64/XZ of the image, where its store keeps one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc64: Option<u64>,
    /// What the source consists of, for the reader.
    pub volumes: Vec<String>,
}

/// A digest as hexadecimal text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hex(pub Digest);

impl Default for Hex {
    fn default() -> Self {
        Hex(Digest([0; 32]))
    }
}

impl Serialize for Hex {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(from)?.parse().map(Hex).map_err(serde::de::Error::custom)
    }
}

/// A manifest on disk, its own digest checked.
pub struct Manifest {
    /// The facts.
    pub head: Head,
    path: PathBuf,
    tables: Extent,
}

impl Manifest {
    /// Opens the manifest at `path` and checks it against the digest at its end.
    pub fn open(path: &Path) -> Result<Self> {
        let damaged = |why: &str| {
            Error::new(Kind::Image, "manifest.damaged", format!("{} cannot be used", path.display()))
                .because(why)
                .remedy("use the manifest as haul wrote it, or make the copy again")
        };
        let unreadable = |error: std::io::Error| {
            Error::new(Kind::Source, "manifest.read", format!("cannot read {}", path.display()))
                .caused_by(error)
        };
        let mut file = File::open(path).map_err(unreadable)?;
        let length = file.metadata().map_err(unreadable)?.len();
        let mut magic = [0; MAGIC.len()];
        if length < MAGIC.len() as u64 + TAIL || file.read_exact(&mut magic).is_err() || magic != *MAGIC {
            return Err(damaged("it is not a manifest of this version of haul"));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&magic);
        let hashed = std::io::copy(&mut (&mut file).take(length - MAGIC.len() as u64 - 32), &mut hasher)
            .map_err(unreadable)?;
        let mut tail = [0; 32];
        file.read_exact(&mut tail).map_err(unreadable)?;
        if hashed + MAGIC.len() as u64 + 32 != length || *hasher.finalize().as_bytes() != tail {
            return Err(damaged("its contents do not match the digest at its end"));
        }
        file.seek(SeekFrom::Start(length - TAIL)).map_err(unreadable)?;
        let mut len = [0; 8];
        file.read_exact(&mut len).map_err(unreadable)?;
        let len = u64::from_le_bytes(len);
        if len > MAX_HEAD || len > length - TAIL - MAGIC.len() as u64 {
            return Err(damaged("its head is longer than the file"));
        }
        let start = length - TAIL - len;
        file.seek(SeekFrom::Start(start)).map_err(unreadable)?;
        let mut json = vec![0; to_usize(len)];
        file.read_exact(&mut json).map_err(unreadable)?;
        let head: Head =
            serde_json::from_slice(&json).map_err(|error| damaged("its head").caused_by(error))?;
        if head.version != 1 || head.chunk != Geometry::of(head.size).chunk {
            return Err(damaged("it was written by a version of haul this one does not know"));
        }
        if head.size > MAX_SIZE {
            return Err(damaged("it speaks of a disk longer than there are"));
        }
        Ok(Manifest { head, path: path.to_owned(), tables: Extent::new(MAGIC.len() as u64, start) })
    }

    /// How the disk is cut.
    pub fn geometry(&self) -> Geometry {
        Geometry { size: self.head.size, chunk: self.head.chunk }
    }

    /// The digests of the source's non-zero chunks in those batches that were amended, in order.
    pub fn source_chunks(&self) -> Result<Chunks> {
        let mut chunks = self.chunks()?;
        chunks.by_ref().try_for_each(|entry| entry.map(drop))?;
        chunks.ended = false;
        chunks.next = 0;
        Ok(chunks)
    }

    /// The digests of the copy's non-zero chunks, in order.
    pub fn chunks(&self) -> Result<Chunks> {
        let failed = |error: std::io::Error| {
            Error::new(Kind::Source, "manifest.read", format!("cannot read {}", self.path.display()))
                .caused_by(error)
        };
        let mut file = File::open(&self.path).map_err(failed)?;
        file.seek(SeekFrom::Start(self.tables.start)).map_err(failed)?;
        let input = BufReader::with_capacity(1 << 16, file.take(self.tables.len()));
        let end = self.head.size.div_ceil(self.head.chunk);
        Ok(Chunks { input, next: 0, end, left: 0, path: self.path.clone(), ended: false })
    }
}

/// Walks a table: the chunks of the disk that it lists, each once, in order. A table that lists others is damaged.
pub struct Chunks {
    input: BufReader<std::io::Take<File>>,
    /// The lowest index that may come.
    next: u64,
    /// How many chunks the disk has.
    end: u64,
    left: u32,
    path: PathBuf,
    ended: bool,
}

impl Chunks {
    fn read(&mut self) -> std::io::Result<Option<(u64, Digest)>> {
        if self.left == 0 {
            let mut head = [0; 12];
            self.input.read_exact(&mut head)?;
            if head == END {
                return Ok(None);
            }
            let [f0, f1, f2, f3, f4, f5, f6, f7, c0, c1, c2, c3] = head;
            let first = u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]);
            self.left = u32::from_le_bytes([c0, c1, c2, c3]);
            let fits = first.checked_add(self.left.into()).is_some_and(|end| end <= self.end);
            if self.left == 0 || first < self.next || !fits {
                let why =
                    format!("a run of {} chunks at {first} is not one of its disk, in order", self.left);
                return Err(std::io::Error::new(ErrorKind::InvalidData, why));
            }
            self.next = first;
        }
        let mut digest = [0; 32];
        self.input.read_exact(&mut digest)?;
        let index = self.next;
        self.next += 1;
        self.left -= 1;
        Ok(Some((index, Digest(digest))))
    }
}

impl Iterator for Chunks {
    type Item = Result<(u64, Digest)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let read = self.read();
        self.ended = !matches!(read, Ok(Some(_)));
        read.transpose().map(|entry| {
            entry.map_err(|error| {
                let (kind, id) = match error.kind() {
                    ErrorKind::InvalidData | ErrorKind::UnexpectedEof => (Kind::Image, "manifest.damaged"),
                    _ => (Kind::Source, "manifest.read"),
                };
                Error::new(kind, id, format!("cannot read {}", self.path.display())).caused_by(error)
            })
        })
    }
}

/// Writes a manifest from the batches of a finished copy.
pub struct Sealer {
    out: BufWriter<File>,
    path: PathBuf,
    hasher: blake3::Hasher,
    geometry: Geometry,
    /// The run of consecutive chunks being gathered: first index, digests end to end.
    run: (u64, Vec<u8>),
    source_root: RootHasher,
    image_root: RootHasher,
    bytes: u64,
    /// Source digests of amended chunks.
    before: Vec<(u64, Digest)>,
}

/// Digests of a run before it is written out, so that memory stays small.
const RUN: usize = 4096;

impl Sealer {
    /// Begins the manifest that will be at `path`, under a temporary name.
    pub fn begin(path: &Path, geometry: Geometry) -> Result<Self> {
        let file =
            File::create(atomic::with_suffix(path, ".tmp")).map_err(|error| cannot_write(path, error))?;
        let mut sealer = Sealer {
            out: BufWriter::new(file),
            path: path.to_owned(),
            hasher: blake3::Hasher::new(),
            geometry,
            run: (0, Vec::new()),
            source_root: RootHasher::new(geometry.size),
            image_root: RootHasher::new(geometry.size),
            bytes: 0,
            before: Vec::new(),
        };
        sealer.write(MAGIC)?;
        Ok(sealer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(|error| cannot_write(&self.path, error))
    }

    fn entry(&mut self, index: u64, digest: &Digest) -> Result<()> {
        let (first, digests) = &self.run;
        if index != first + (digests.len() / 32) as u64 || digests.len() >= RUN * 32 {
            self.end_run()?;
            self.run.0 = index;
        }
        self.run.1.extend_from_slice(&digest.0);
        Ok(())
    }

    fn end_run(&mut self) -> Result<()> {
        let (first, digests) = std::mem::take(&mut self.run);
        if digests.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(digests.len() / 32).unwrap_or(u32::MAX);
        self.write(&first.to_le_bytes())?;
        self.write(&count.to_le_bytes())?;
        self.write(&digests)
    }

    /// Adds the next batch; batches come in the order of the disk.
    pub fn add(&mut self, batch: &BatchRecord) -> Result<()> {
        let first = batch.start / self.geometry.chunk;
        for (index, digest) in (first..).zip(&batch.digests) {
            if let Some(digest) = digest {
                let extent = self.geometry.chunk_at(index);
                self.image_root.add(extent, digest);
                self.bytes += extent.len();
                self.entry(index, digest)?;
            }
        }
        let source = batch.before.as_ref().unwrap_or(&batch.digests);
        for (index, digest) in (first..).zip(source) {
            if let Some(digest) = digest {
                self.source_root.add(self.geometry.chunk_at(index), digest);
                if batch.before.is_some() {
                    self.before.push((index, *digest));
                }
            }
        }
        Ok(())
    }

    /// Ends the manifest with its facts, durably, under its own name. The sealer fills in version, roots, sizes
    /// and date of `head` itself.
    pub fn seal(mut self, head: Head, amended: &ExtentMap) -> Result<Manifest> {
        self.end_run()?;
        self.write(&END)?;
        for (index, digest) in std::mem::take(&mut self.before) {
            self.entry(index, &digest)?;
        }
        self.end_run()?;
        self.write(&END)?;
        let head = Head {
            version: 1,
            tool: concat!("haul ", env!("CARGO_PKG_VERSION")).into(),
            created: now(),
            size: self.geometry.size,
            chunk: self.geometry.chunk,
            source_root: Hex(self.source_root.finish()),
            image_root: Hex(self.image_root.finish()),
            bytes: self.bytes,
            amended: amended.iter().map(|run| (run.start, run.end)).collect(),
            ..head
        };
        let json = serde_json::to_vec_pretty(&head).map_err(|error| {
            Error::new(Kind::Internal, "manifest.encode", "cannot encode a manifest").caused_by(error)
        })?;
        self.write(&json)?;
        self.write(&(json.len() as u64).to_le_bytes())?;
        let digest = *self.hasher.finalize().as_bytes();
        self.write(&digest)?;
        let path = self.path;
        self.out
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .map_err(|error| cannot_write(&path, error))?;
        atomic::rename(&atomic::with_suffix(&path, ".tmp"), &path)?;
        Manifest::open(&path)
    }
}

fn now() -> String {
    let now = time::OffsetDateTime::now_utc();
    now.format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
}

fn cannot_write(path: &Path, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "manifest.write", format!("cannot write {}", path.display()))
        .caused_by(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest of a disk of `size` bytes whose image table has these runs: first chunk and count.
    fn manifest(dir: &Path, size: u64, runs: &[(u64, u32)]) -> Result<Manifest> {
        let mut bytes = MAGIC.to_vec();
        for (first, count) in runs {
            bytes.extend(first.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.resize(bytes.len() + 32 * to_usize((*count).into()), 7);
        }
        bytes.extend([END, END].concat());
        let head = Head { version: 1, size, chunk: Geometry::of(size).chunk, ..Head::default() };
        let json = serde_json::to_vec(&head).unwrap();
        bytes.extend(&json);
        bytes.extend((json.len() as u64).to_le_bytes());
        let digest = *blake3::hash(&bytes).as_bytes();
        bytes.extend(digest);
        let path = dir.join("manifest");
        std::fs::write(&path, bytes).unwrap();
        Manifest::open(&path)
    }

    #[test]
    fn a_table_lists_chunks_of_its_disk_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let listed = |size, runs: &[(u64, u32)]| -> Result<Vec<u64>> {
            manifest(dir.path(), size, runs)?.chunks()?.map(|entry| entry.map(|(index, _)| index)).collect()
        };
        assert_eq!(listed(300 << 10, &[(0, 2), (2, 1), (4, 1)]).unwrap(), [0, 1, 2, 4]);
        for runs in [
            // Beyond the disk's five chunks, back again, the same twice, and none.
            &[(5, 1)][..],
            &[(3, 3)],
            &[(u64::MAX, 1)],
            &[(2, 1), (0, 1)],
            &[(1, 2), (2, 1)],
            &[(1, 0)],
        ] {
            let error = listed(300 << 10, runs).unwrap_err();
            assert_eq!((error.kind(), error.id()), (Kind::Image, "manifest.damaged"), "{runs:?}: {error:?}");
        }
        assert_eq!(listed(u64::MAX, &[]).unwrap_err().id(), "manifest.damaged");
    }

    #[test]
    fn a_copy_is_not_proven_by_a_table_out_of_order() {
        use crate::io::fake::MemoryDisk;
        // The first run is beyond the disk: what follows it was once not looked at.
        let dir = tempfile::tempdir().unwrap();
        let manifest = manifest(dir.path(), 3 << 20, &[(54, 1), (0, 1)]).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let verdict = verify::verify(&manifest, &MemoryDisk::sparse(3 << 20), 1, &stop, &|_| {});
        assert_eq!(verdict.unwrap_err().id(), "manifest.damaged");
    }
}
