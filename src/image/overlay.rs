//! A copy-on-write view over a disk: fix-ups write into it, the disk below is never written.
//!
//! Changed 4 KiB blocks live at their own offsets in a sparse private spool file; which blocks those are is kept
//! in memory. [`Overlay::seal`] makes the whole durable and writes a record beside it, so that a killed job finds
//! the finished overlay again; an overlay without a record was not finished and is thrown away.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, WriteAt, atomic, check_range};
use crate::unit::digest::RootHasher;
use crate::unit::{Digest, Extent, ExtentMap, Extents, to_usize};

/// The unit of copy-on-write, in bytes.
pub const BLOCK: u64 = 4096;
/// Most separate dirty runs held in memory (16 bytes each).
const MAX_RUNS: usize = 1 << 20;
/// The version of the record beside a sealed overlay.
const RECORD_VERSION: u32 = 1;
/// Bytes hashed at a time.
const STEP: u64 = 1 << 20;

/// A disk with changes on top.
pub struct Overlay {
    base: Arc<dyn ReadAt>,
    spool: File,
    path: PathBuf,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    dirty: ExtentMap,
    sealed: Option<Digest>,
}

/// What a sealed overlay holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The changed bytes, in whole blocks (the last one cut off at the disk's end).
    pub dirty: ExtentMap,
    /// BLAKE3 over (offset, length, digest) of the changed runs, each cut at 1 MiB of its own length.
    pub digest: Digest,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    size: u64,
    dirty: Vec<(u64, u64)>,
    digest: String,
}

impl Overlay {
    /// An overlay with no changes over `base`; its blocks go to a new file at `path`, replacing any there.
    pub fn create(base: Arc<dyn ReadAt>, path: &Path) -> Result<Self> {
        remove_if_there(&record_path(path))?;
        let spool = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .and_then(|file| file.set_len(base.size()).map(|()| file))
            .map_err(|error| spool_error(path, error))?;
        Ok(Overlay { base, spool, path: path.to_owned(), state: RwLock::default() })
    }

    /// The sealed overlay at `path` over the same `base`; `None`, with its remains removed, when there is none or
    /// it was never sealed. Fails when a sealed overlay is not what its record says.
    pub fn reopen(base: Arc<dyn ReadAt>, path: &Path) -> Result<Option<Self>> {
        let bytes = match fs::read(record_path(path)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                remove_if_there(path)?;
                return Ok(None);
            }
            Err(error) => return Err(spool_error(path, error)),
        };
        let damaged = |why: String| {
            Error::new(Kind::Mismatch, "overlay.damaged", format!("cannot reuse {}", path.display()))
                .because(why)
                .remedy("remove it together with its .sealed record and run the fix-ups again")
                .fact("path", path.display())
        };
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if record.version != RECORD_VERSION || record.size != base.size() {
            return Err(damaged(format!(
                "its record is of version {} for a disk of {} bytes, not {RECORD_VERSION} and {}",
                record.version,
                record.size,
                base.size()
            )));
        }
        let digest: Digest = record.digest.parse()?;
        let size = base.size();
        let dirty: ExtentMap = record
            .dirty
            .iter()
            .map(|&(start, end)| Extent::new(start, end).intersect(Extent::new(0, size)))
            .collect();
        let spool =
            OpenOptions::new().read(true).write(true).open(path).map_err(|error| spool_error(path, error))?;
        let overlay = Overlay {
            base,
            spool,
            path: path.to_owned(),
            state: RwLock::new(State { dirty, sealed: Some(digest) }),
        };
        if overlay.hash(&overlay.dirty())? != digest {
            return Err(damaged("its changed blocks do not hash to the digest in its record".into()));
        }
        Ok(Some(overlay))
    }

    /// Which bytes differ, or may differ, from the disk below: whole blocks.
    pub fn dirty(&self) -> ExtentMap {
        self.read_state().dirty.clone()
    }

    /// Whether the overlay was sealed: it takes no more writes.
    pub fn is_sealed(&self) -> bool {
        self.read_state().sealed.is_some()
    }

    /// The disk below.
    pub fn base(&self) -> &Arc<dyn ReadAt> {
        &self.base
    }

    /// Where the changed blocks are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the changes durable and final: the blocks first, then the record naming them and their digest.
    pub fn seal(&self) -> Result<Sealed> {
        let mut state = self.write_state();
        let digest = match state.sealed {
            Some(digest) => digest,
            None => {
                self.sync()?;
                let digest = self.hash(&state.dirty)?;
                let record = Record {
                    version: RECORD_VERSION,
                    size: self.size(),
                    dirty: state.dirty.iter().map(|run| (run.start, run.end)).collect(),
                    digest: digest.to_string(),
                };
                let bytes = serde_json::to_vec(&record).map_err(|error| {
                    Error::new(Kind::Internal, "overlay.record", "cannot write the overlay's record")
                        .caused_by(error)
                })?;
                atomic::write(&record_path(&self.path), &bytes)?;
                state.sealed = Some(digest);
                digest
            }
        };
        Ok(Sealed { dirty: state.dirty.clone(), digest })
    }

    /// Removes the spool file and its record.
    pub fn discard(self) -> Result<()> {
        remove_if_there(&record_path(&self.path))?;
        remove_if_there(&self.path)
    }

    fn hash(&self, dirty: &ExtentMap) -> Result<Digest> {
        let mut root = RootHasher::new(self.size());
        let mut buf = vec![0; to_usize(STEP)];
        for run in dirty.iter() {
            let mut at = run.start;
            while at < run.end {
                let piece = Extent::new(at, run.end.min(at + STEP));
                let bytes = &mut buf[..to_usize(piece.len())];
                self.read_spool(bytes, at)?;
                root.add(piece, &Digest::of(bytes));
                at = piece.end;
            }
        }
        Ok(root.finish())
    }

    fn read_spool(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.spool.read_exact_at(buf, offset).map_err(|error| {
            Error::new(Kind::Destination, "overlay.read", format!("cannot read {}", self.path.display()))
                .fact("offset", offset)
                .caused_by(error)
        })
    }

    /// Copies the block around `offset` up from the base unless it is dirty already.
    fn copy_up(&self, state: &mut State, offset: u64) -> Result<()> {
        let block = Extent::at(offset / BLOCK * BLOCK, BLOCK).intersect(Extent::new(0, self.size()));
        if state.dirty.covers(block) {
            return Ok(());
        }
        let mut bytes = [0; to_usize(BLOCK)];
        let bytes = &mut bytes[..to_usize(block.len())];
        self.base.read_at(bytes, block.start)?;
        self.spool.write_all_at(bytes, block.start).map_err(|error| spool_error(&self.path, error))?;
        state.dirty.insert(block);
        Ok(())
    }

    fn read_state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadAt for Overlay {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let asked = Extent::at(offset, buf.len() as u64);
        let state = self.read_state();
        let mut at = asked.start;
        while at < asked.end {
            let dirty = state.dirty.next_extent(at)?.map(|run| run.intersect(asked));
            let (end, from_spool) = match dirty.filter(|run| !run.is_empty()) {
                Some(run) if run.start == at => (run.end, true),
                Some(run) => (run.start, false),
                None => (asked.end, false),
            };
            let piece = &mut buf[to_usize(at - asked.start)..to_usize(end - asked.start)];
            match from_spool {
                true => self.read_spool(piece, at)?,
                false => self.base.read_at(piece, at)?,
            }
            at = end;
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        let below = self.base.next_data(from)?;
        let above = self.read_state().dirty.next_extent(from)?;
        Ok(match (below, above) {
            (Some(below), Some(above)) if below.start <= above.start => Some(below),
            (_, Some(above)) => Some(above),
            (below, None) => below,
        })
    }

    fn name(&self) -> String {
        self.base.name()
    }
}

impl WriteAt for Overlay {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        check_range(self, bytes.len(), offset)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let mut state = self.write_state();
        if state.sealed.is_some() {
            return Err(Error::new(Kind::Internal, "overlay.sealed", "cannot write to a sealed overlay"));
        }
        if state.dirty.len() >= MAX_RUNS {
            return Err(Error::new(
                Kind::Destination,
                "overlay.scattered",
                format!("cannot change more than {MAX_RUNS} separate places of {}", self.name()),
            ));
        }
        let extent = Extent::at(offset, bytes.len() as u64);
        let disk = Extent::new(0, self.size());
        if !extent.start.is_multiple_of(BLOCK) {
            self.copy_up(&mut state, extent.start)?;
        }
        if !extent.end.is_multiple_of(BLOCK) && extent.end < disk.end {
            self.copy_up(&mut state, extent.end)?;
        }
        self.spool.write_all_at(bytes, offset).map_err(|error| spool_error(&self.path, error))?;
        state.dirty.insert(extent.widened(BLOCK).intersect(disk));
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.spool.sync_data().map_err(|error| spool_error(&self.path, error))
    }
}

fn record_path(path: &Path) -> PathBuf {
    atomic::with_suffix(path, ".sealed")
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(spool_error(path, error)),
        _ => Ok(()),
    }
}

fn spool_error(path: &Path, error: std::io::Error) -> Error {
    Error::new(
        Kind::Destination,
        "overlay.spool",
        format!("cannot keep changed blocks in {}", path.display()),
    )
    .fact("path", path.display())
    .caused_by(error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::io::fake::MemoryDisk;
    use crate::io::read_vec;

    const SIZE: usize = 5 * 4096 + 100;

    fn base() -> (Arc<dyn ReadAt>, Vec<u8>) {
        let bytes: Vec<u8> = (0..SIZE).map(|i| u8::try_from(i % 251).unwrap()).collect();
        (Arc::new(MemoryDisk::holding(&bytes)), bytes)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn reads_see_the_last_write_and_the_base_sees_none(
            writes in prop::collection::vec((0..SIZE, 0..9000usize, any::<u8>()), 0..12),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (disk, original) = base();
            let overlay = Overlay::create(disk.clone(), &dir.path().join("spool")).unwrap();
            let mut model = original.clone();
            for (start, len, byte) in writes {
                let end = (start + len).min(SIZE);
                overlay.write_at(&vec![byte; end - start], start as u64).unwrap();
                model[start..end].fill(byte);
            }
            prop_assert_eq!(read_vec(&overlay, 0, SIZE).unwrap(), &model[..]);
            prop_assert_eq!(read_vec(&overlay, 777, SIZE - 1000).unwrap(), &model[777..SIZE - 223]);
            prop_assert_eq!(read_vec(&disk, 0, SIZE).unwrap(), &original[..]);
            for (i, (new, old)) in model.iter().zip(&original).enumerate() {
                prop_assert!(new == old || overlay.dirty().covers(Extent::at(i as u64, 1)));
            }
            let sealed = overlay.seal().unwrap();
            drop(overlay);
            let again = Overlay::reopen(disk, &dir.path().join("spool")).unwrap().unwrap();
            prop_assert_eq!(again.seal().unwrap(), sealed);
            prop_assert_eq!(read_vec(&again, 0, SIZE).unwrap(), model);
            prop_assert_eq!(again.write_at(b"x", 0).unwrap_err().id(), "overlay.sealed");
        }
    }

    #[test]
    fn an_unsealed_overlay_is_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spool");
        let overlay = Overlay::create(base().0, &path).unwrap();
        overlay.write_at(b"half a fix", 5000).unwrap();
        drop(overlay);
        assert!(Overlay::reopen(base().0, &path).unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_block_changed_behind_the_record_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spool");
        let overlay = Overlay::create(base().0, &path).unwrap();
        overlay.write_at(b"fix", 5000).unwrap();
        overlay.seal().unwrap();
        overlay.spool.write_all_at(b"!", 5001).unwrap();
        drop(overlay);
        let error = Overlay::reopen(base().0, &path).err().unwrap();
        assert_eq!((error.kind(), error.id()), (Kind::Mismatch, "overlay.damaged"));
    }

    #[test]
    fn data_is_where_the_base_or_a_change_is() {
        let dir = tempfile::tempdir().unwrap();
        let disk = MemoryDisk::sparse(1 << 20);
        disk.write_at(b"a", 65536).unwrap();
        let overlay = Overlay::create(Arc::new(disk), &dir.path().join("spool")).unwrap();
        overlay.write_at(b"b", 8192).unwrap();
        let map =
            crate::unit::extents::collect(&crate::io::DataOf(&overlay), Extent::new(0, 1 << 20)).unwrap();
        assert_eq!(map.iter().collect::<Vec<_>>(), [Extent::at(8192, 4096), Extent::at(65536, 4096)]);
    }
}
