//! Files and block devices: read with O_DIRECT where the bytes may change under the page cache, or are not in it;
//! written with it where the file system allows. So a copy neither evicts nor dirties pages it did not bring in.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nix::fcntl::{FallocateFlags, fallocate};

use super::buffer::{ALIGN, AlignedBuf};
use super::residency::Residency;
use super::{ReadAt, WriteAt, check_range};
use crate::error::{Error, Kind, Result};
use crate::unit::{Extent, to_usize};

/// Bytes from which reading around the page cache beats its readahead.
const DIRECT_FROM: usize = 256 << 10;

/// A regular file or block device, read-only. A block device is read with O_DIRECT only: buffered reads of a
/// device that is or was mounted return stale pages. Long reads of a file are direct where they would need the disk
/// anyway: half the work, and what the host keeps in memory stays there.
pub struct DiskFile {
    file: File,
    /// The same regular file for direct reads, and what tells when to make them.
    direct: Option<(File, Residency)>,
    path: PathBuf,
    size: u64,
    device: bool,
}

/// What tells one state of a source from another: a resumed job must find the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    /// Canonical path; for an object its URL and entity tag.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
    /// Device and inode number, or the device number of a block device.
    pub node: (u64, u64),
    /// Time of the last change in nanoseconds since 1970; 0 for a block device, which has none.
    pub modified: i128,
}

impl DiskFile {
    /// Opens `path`, a regular file or a block device, for reading.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| {
            let kind = match error.kind() {
                std::io::ErrorKind::PermissionDenied => Kind::Privilege,
                _ => Kind::Source,
            };
            Error::new(kind, "io.open", format!("cannot open {}", path.display()))
                .fact("path", path.display())
                .caused_by(error)
        };
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        let device = kind.is_block_device();
        if !device && !kind.is_file() {
            return Err(Error::new(Kind::Usage, "io.not-a-disk", format!("cannot read {}", path.display()))
                .because("it is neither a regular file nor a block device")
                .remedy("name a disk such as /dev/sda, or an image file"));
        }
        let flags = libc::O_CLOEXEC | if device { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
        let size = seek(&file, 0, libc::SEEK_END).map_err(failed)?;
        let direct = if device { None } else { direct(&file, size) };
        Ok(DiskFile { file, direct, path: path.to_owned(), size, device })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.device
    }

    /// What tells this state of the file from another.
    pub fn identity(&self) -> Result<Identity> {
        let meta = self.file.metadata().map_err(|error| self.read_error(error, 0))?;
        let path = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let modified = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        Ok(Identity {
            path: path.display().to_string(),
            size: seek(&self.file, 0, libc::SEEK_END).map_err(|error| self.read_error(error, 0))?,
            node: if self.device { (meta.rdev(), 0) } else { (meta.dev(), meta.ino()) },
            modified: if self.device { 0 } else { modified },
        })
    }

    fn read_error(&self, error: std::io::Error, offset: u64) -> Error {
        Error::new(Kind::Source, "io.read", format!("cannot read {} at offset {offset}", self.path.display()))
            .fact("disk", self.path.display())
            .fact("offset", offset)
            .caused_by(error)
    }

    /// Reads what O_DIRECT refuses as it stands: through an aligned buffer around it.
    fn read_unaligned(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        const STEP: usize = 1 << 20;
        let mut bounce = AlignedBuf::new(STEP.min(buf.len() + 2 * ALIGN).next_multiple_of(ALIGN));
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = to_usize(at % ALIGN as u64);
            let n = (bounce.len() - skip).min(buf.len() - done);
            let whole = (skip + n).next_multiple_of(ALIGN);
            let got = read_fully(&self.file, &mut bounce[..whole], at - skip as u64)?;
            if got < skip + n {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            buf[done..done + n].copy_from_slice(&bounce[skip..skip + n]);
            done += n;
        }
        Ok(())
    }
}

/// The open regular file `file` once more for direct reads; `None` where its file system has none.
fn direct(file: &File, size: u64) -> Option<(File, Residency)> {
    // By its number: the name may stand for another file by now.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = libc::O_CLOEXEC | libc::O_DIRECT;
    let direct = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    Some((direct, Residency::of(file, size)?))
}

/// Reads until `buf` is full or the file ends; returns the bytes read. At a device's end an aligned read may
/// come back short, which is no error as long as the bytes asked for are in it.
fn read_fully(file: &File, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> std::io::Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| std::io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: lseek takes no pointers; the descriptor is open as long as `file` lives.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(at).map_err(|_| std::io::Error::last_os_error())
}

fn aligned(address: usize, len: usize, offset: u64) -> bool {
    (address | len | to_usize(offset)).is_multiple_of(ALIGN)
}

impl ReadAt for DiskFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        if let Some((direct, residency)) = &self.direct
            && buf.len() >= DIRECT_FROM
            && aligned(buf.as_ptr() as usize, buf.len(), offset)
            && !residency.mostly(Extent::at(offset, buf.len() as u64))
            // Where it fails, the page cache is asked: it says why, or can.
            && direct.read_exact_at(buf, offset).is_ok()
        {
            return Ok(());
        }
        let read = if self.device && !aligned(buf.as_ptr() as usize, buf.len(), offset) {
            self.read_unaligned(buf, offset)
        } else {
            self.file.read_exact_at(buf, offset)
        };
        read.map_err(|error| self.read_error(error, offset))
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        if from >= self.size {
            return Ok(None);
        }
        let start = match seek(&self.file, from, libc::SEEK_DATA) {
            Ok(start) => start,
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
            // A block device, or a file system without holes: everything may be data.
            Err(_) => return Ok(Some(Extent::new(from, self.size))),
        };
        let end = seek(&self.file, start, libc::SEEK_HOLE).unwrap_or(self.size).min(self.size);
        Ok((start < end).then_some(Extent::new(start, end)))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// A file being written: with O_DIRECT where offset, length and memory are aligned and the file system
/// allows it, through the page cache otherwise.
pub struct OutFile {
    buffered: File,
    direct: Option<File>,
    path: PathBuf,
}

impl OutFile {
    /// Creates `path`, or empties it, readable by its owner only.
    pub fn create(path: &Path) -> Result<Self> {
        Self::open_with(path, true)
    }

    /// Opens the existing file `path` to go on writing it.
    pub fn reopen(path: &Path) -> Result<Self> {
        Self::open_with(path, false)
    }

    fn open_with(path: &Path, create: bool) -> Result<Self> {
        let buffered = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(create)
            .mode(0o600)
            .open(path)
            .map_err(|error| write_error(path, "create", error))?;
        // Where O_DIRECT is refused (some network and memory file systems), the page cache serves.
        let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).ok();
        Ok(OutFile { buffered, direct, path: path.to_owned() })
    }

    /// Creates a file in `folder` that has no name, readable by its owner only: it is gone with its last descriptor,
    /// however the process ends.
    pub fn unnamed(folder: &Path) -> Result<Self> {
        let failed = |error| write_error(folder, "create a file in", error);
        let mut open = OpenOptions::new();
        open.read(true).write(true).mode(0o600);
        let buffered = match open.clone().custom_flags(libc::O_TMPFILE).open(folder) {
            // What a file system without O_TMPFILE answers (NFS, most of FUSE), and a kernel without it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                let path = folder.join(format!(".haul-{}.tmp", uuid::Uuid::new_v4()));
                let file = open.create_new(true).open(&path).map_err(failed)?;
                std::fs::remove_file(&path).map_err(failed)?;
                file
            }
            opened => opened.map_err(failed)?,
        };
        let again = format!("/proc/self/fd/{}", buffered.as_raw_fd());
        let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(again).ok();
        Ok(OutFile { buffered, direct, path: folder.to_owned() })
    }

    /// The path it was created at; the folder of a file without a name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that this user may still write to the file system the file is on.
    pub fn free_space(&self) -> Result<u64> {
        let stat = nix::sys::statvfs::fstatvfs(&self.buffered)
            .map_err(|error| write_error(&self.path, "stat the file system of", error.into()))?;
        Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }

    /// The file as a disk to read: its length is what it is now.
    pub fn into_disk(self) -> Result<DiskFile> {
        let size = self.len()?;
        Ok(DiskFile { file: self.buffered, direct: None, path: self.path, size, device: false })
    }

    /// Makes the file `len` bytes long; new bytes are a hole.
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.buffered.set_len(len).map_err(|error| write_error(&self.path, "resize", error))
    }

    /// The present length in bytes.
    pub fn len(&self) -> Result<u64> {
        Ok(self.buffered.metadata().map_err(|error| write_error(&self.path, "stat", error))?.len())
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Returns once the bytes written before, but not all of the file's metadata, are on stable storage.
    pub fn sync_data(&self) -> Result<()> {
        self.buffered.sync_data().map_err(|error| write_error(&self.path, "sync", error))
    }

    /// Makes the file reach to the end of `extent`, with room on the disk for it, if the file system can. Several writes
    /// at once to such room go to the disk side by side; to a file that grows with them (ext4) or to a hole, in turn.
    /// Nothing depends on it: where there is no room, the write that needs it fails. The last of a file system is left to
    /// those who need it, the journal of the same job among them.
    pub fn reserve(&self, extent: Extent) {
        let plenty = extent.len().saturating_mul(4);
        if self.direct.is_some() && self.free_space().is_ok_and(|free| free > plenty) {
            self.fallocate(FallocateFlags::empty(), extent);
        }
    }

    /// Makes a hole of room that was reserved and not written. It reads as zeroes either way.
    pub fn punch(&self, extent: Extent) {
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, extent);
    }

    fn fallocate(&self, flags: FallocateFlags, extent: Extent) {
        if let (Ok(start), Ok(len)) = (extent.start.try_into(), extent.len().try_into()) {
            let _ = fallocate(&self.buffered, flags, start, len);
        }
    }

    /// Writes `pieces` one behind the other, at `offset`.
    pub fn write_pieces(&self, pieces: &[Bytes], offset: u64) -> Result<()> {
        let mut skip = self.write_gathered(pieces, offset).unwrap_or(0);
        // What one call did not write, for whatever reason: piece by piece, with the error of the piece.
        let mut at = offset;
        for piece in pieces {
            let done = skip.min(piece.len());
            skip -= done;
            if done < piece.len() {
                self.write_at(&piece[done..], at + done as u64)?;
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes several pieces with one call, as far as it gets.
    fn write_gathered(&self, pieces: &[Bytes], offset: u64) -> Option<usize> {
        let direct = self.direct.as_ref().filter(|_| pieces.len() > 1)?;
        let whole_pages = |piece: &Bytes| aligned(piece.as_ptr() as usize, piece.len(), offset);
        let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let at = offset.try_into().ok().filter(|_| pieces.iter().all(whole_pages))?;
        nix::sys::uio::pwritev(direct, &slices, at).ok()
    }

    fn write_fully(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        if let Some(direct) = &self.direct
            && aligned(bytes.as_ptr() as usize, bytes.len(), offset)
        {
            match direct.write_all_at(bytes, offset) {
                // The file system takes O_DIRECT at open but not for this write.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                done => return done,
            }
        }
        self.buffered.write_all_at(bytes, offset)
    }
}

fn write_error(path: &Path, verb: &str, error: std::io::Error) -> Error {
    let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
    let error = Error::new(Kind::Destination, "io.write", format!("cannot {verb} {}", path.display()))
        .fact("path", path.display())
        .caused_by(error);
    if full { error.remedy("free space there and run the same command again") } else { error }
}

impl WriteAt for OutFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.write_fully(bytes, offset)
            .map_err(|error| write_error(&self.path, "write", error).fact("offset", offset))
    }

    fn sync(&self) -> Result<()> {
        self.buffered.sync_all().map_err(|error| write_error(&self.path, "sync", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found_and_reads_are_exact() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let out = OutFile::create(&path).unwrap();
        out.set_len(10 << 20).unwrap();
        out.write_at(b"tail", (10 << 20) - 4).unwrap();
        let mut page = AlignedBuf::new(8192);
        page.fill(7);
        out.write_at(&page, 4 << 20).unwrap();
        out.sync().unwrap();
        drop(out);

        let disk = DiskFile::open(&path).unwrap();
        assert_eq!((disk.size(), disk.is_device()), (10 << 20, false));
        let first = disk.next_data(0).unwrap().unwrap();
        assert_eq!(first.start, 4 << 20);
        assert!(disk.next_data(first.end).unwrap().unwrap().start > 8 << 20);
        let mut tail = [0; 4];
        disk.read_at(&mut tail, (10 << 20) - 4).unwrap();
        assert_eq!(&tail, b"tail");
        assert_eq!(disk.read_at(&mut tail, (10 << 20) - 3).unwrap_err().kind(), Kind::Image);
    }

    #[test]
    fn a_long_read_brings_nothing_into_the_page_cache_and_takes_what_is_there() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("disk");
        let bytes: Vec<u8> = (0..1024u32).flat_map(|page| [page.to_le_bytes()[0]; 4096]).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.sync_all().unwrap();
        let drop = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, drop).unwrap();
        // Not on the disk yet: the rest of the read must be as new.
        file.write_all_at(&[9; 4096], 2 << 20).unwrap();

        let disk = DiskFile::open(&path).unwrap();
        let mut buf = AlignedBuf::new(4 << 20);
        disk.read_at(&mut buf, 0).unwrap();
        assert!(buf[..2 << 20] == bytes[..2 << 20] && buf[(2 << 20) + 4096..] == bytes[(2 << 20) + 4096..]);
        assert_eq!(buf[2 << 20..(2 << 20) + 4096], [9; 4096]);
        let residency = &disk.direct.as_ref().unwrap().1;
        assert!(!residency.mostly(Extent::new(0, 4 << 20)));
    }

    #[test]
    fn a_file_without_a_name_is_written_read_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = OutFile::unnamed(dir.path()).unwrap();
        assert!(out.free_space().unwrap() > 0);
        let mut page = AlignedBuf::new(8192);
        page.fill(7);
        out.write_at(&page, 4 << 20).unwrap();
        out.write_at(b"tail", (5 << 20) + 1).unwrap();
        out.set_len(6 << 20).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let disk = out.into_disk().unwrap();
        assert_eq!((disk.size(), disk.next_data(0).unwrap().unwrap().start), (6 << 20, 4 << 20));
        let mut tail = [0; 4];
        disk.read_at(&mut tail, (5 << 20) + 1).unwrap();
        assert_eq!(&tail, b"tail");
    }

    #[test]
    fn a_missing_file_and_a_folder_are_told_apart() {
        let missing = DiskFile::open(Path::new("/nonexistent/disk")).err().unwrap();
        assert_eq!((missing.kind(), missing.id()), (Kind::Source, "io.open"));
        let folder = DiskFile::open(Path::new("/proc")).err().unwrap();
        assert_eq!((folder.kind(), folder.id()), (Kind::Usage, "io.not-a-disk"));
    }
}
