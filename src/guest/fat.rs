//! Carries out a step in a FAT file system of the copy: by a library, since the kernel may lack the driver, and hardly any
//! program of the guest's writes there.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use fatfs::{Dir, FileSystem, FormatVolumeOptions, FsOptions, format_volume};

use super::plan::{Fix, PlannedMount, changed};
use super::tree::{Node, Volume};
use super::volume::FilesVolume;
use crate::error::{Error, Kind, Result};
use crate::host::export::Disk;
use crate::io::{ReadAt, Window};
use crate::layout;
use crate::unit::{Extent, MIB, to_usize};

/// Longest file that is copied, in bytes: boot loaders have a few MiB.
pub const MAX_FILE: u64 = 64 * MIB;
/// The attribute of a folder's entry.
const FOLDER: u8 = 0x10;

/// Makes an empty file system in `extent` of `disk`, with this serial number.
pub fn make(disk: &Arc<dyn Disk>, extent: Extent, serial: u32) -> Result<()> {
    let storage = Storage { disk: Arc::clone(disk), extent, at: 0, known: None };
    let options = FormatVolumeOptions::new().volume_id(serial).volume_label(*b"EFI        ");
    format_volume(storage, options).map_err(|error| {
        Error::new(Kind::Image, "guest.step", "cannot make a FAT file system in the copy").caused_by(error)
    })
}

/// Carries out `fix`, whose file lies in `mount` of `disk`; returns what it did.
pub fn step(disk: &Arc<dyn Disk>, mount: &PlannedMount, fix: &Fix) -> Result<String> {
    let fat = Fat { disk, mount };
    match fix {
        Fix::Edit { path, old, new, .. } => {
            fat.expect(path, old)?;
            fat.write(path, Some(new.as_bytes()))?;
            Ok(format!("edited {path}"))
        }
        Fix::Create { path, text, .. } => {
            fat.expect_nothing(path)?;
            fat.write(path, Some(text.as_bytes()))?;
            Ok(format!("made {path}"))
        }
        Fix::Remove { path, old, .. } => {
            fat.expect(path, old)?;
            fat.write(path, None)?;
            Ok(format!("removed {path}"))
        }
        Fix::Copy { from, path, .. } => {
            put(disk, mount, path, &fat.read(from)?)?;
            Ok(format!("copied {from} to {path}"))
        }
        Fix::Partition { .. }
        | Fix::Grub { .. }
        | Fix::BootSector { .. }
        | Fix::Install { .. }
        | Fix::Initramfs { .. }
        | Fix::Append { .. } => Err(failed("write", fix.path()).because("it lies in a FAT file system")),
    }
}

/// Makes the file at `path`, which lies in `mount` of `disk` and is not there yet.
pub fn put(disk: &Arc<dyn Disk>, mount: &PlannedMount, path: &str, bytes: &[u8]) -> Result<()> {
    let fat = Fat { disk, mount };
    fat.expect_nothing(path)?;
    fat.write(path, Some(bytes))
}

/// Appends `bytes` to the file at `path`, which lies in `mount` of `disk` and has `len` bytes.
pub fn append(disk: &Arc<dyn Disk>, mount: &PlannedMount, path: &str, len: u64, bytes: &[u8]) -> Result<()> {
    let fat = Fat { disk, mount };
    if fat.volume()?.node(fat.inside(path))? != Some(Node::File(len)) {
        return Err(changed(path));
    }
    let inside = fat.inside(path).trim_matches('/');
    fat.by_library(path, |root| {
        let mut file = root.open_file(inside)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(bytes)?;
        file.flush()
    })
}

fn failed(verb: &str, path: &str) -> Error {
    Error::new(Kind::Image, "guest.step", format!("cannot {verb} the guest's {path}"))
}

struct Fat<'a> {
    disk: &'a Arc<dyn Disk>,
    mount: &'a PlannedMount,
}

impl Fat<'_> {
    fn extent(&self) -> Extent {
        Extent::new(self.mount.start, self.mount.end)
    }

    /// `path` as the file system itself counts.
    fn inside<'p>(&self, path: &'p str) -> &'p str {
        path.strip_prefix(self.mount.point.as_str()).unwrap_or(path)
    }

    fn window(&self) -> Arc<dyn ReadAt> {
        let name = format!("the copy's {}", self.mount.point);
        Arc::new(Window::new(Arc::clone(self.disk), self.extent(), name))
    }

    fn volume(&self) -> Result<FilesVolume> {
        let window = self.window();
        let name = window.name();
        Ok(FilesVolume::new(layout::fat_files(window)?, name))
    }

    fn read(&self, path: &str) -> Result<Vec<u8>> {
        let volume = self.volume()?;
        match volume.node(self.inside(path))? {
            Some(Node::File(size)) if size <= MAX_FILE => {}
            _ => return Err(changed(path)),
        }
        let mut bytes = Vec::new();
        volume
            .open(self.inside(path))?
            .read_to_end(&mut bytes)
            .map_err(|error| failed("read", path).caused_by(error))?;
        Ok(bytes)
    }

    fn expect(&self, path: &str, old: &str) -> Result<()> {
        if self.read(path)? == old.as_bytes() { Ok(()) } else { Err(changed(path)) }
    }

    fn expect_nothing(&self, path: &str) -> Result<()> {
        if self.volume()?.node(self.inside(path))?.is_none() { Ok(()) } else { Err(changed(path)) }
    }

    /// Gives the file at `path`, and the folders above it, this content, or takes it away.
    fn write(&self, path: &str, content: Option<&[u8]>) -> Result<()> {
        let inside = self.inside(path).trim_matches('/');
        for (end, _) in inside.match_indices('/').filter(|_| content.is_some()) {
            if self.volume()?.find(&format!("/{}", &inside[..end]))?.is_none() {
                self.make_folder(path, &inside[..end])?;
            }
        }
        self.by_library(path, |root| match content {
            None => root.remove(inside),
            Some(bytes) => {
                let mut file = root.create_file(inside)?;
                file.truncate()?;
                file.write_all(bytes)?;
                file.flush()
            }
        })
    }

    /// Makes the folder `inside`, for the file at `path`.
    fn make_folder(&self, path: &str, inside: &str) -> Result<()> {
        self.by_library(path, |root| root.create_dir(inside).map(drop))?;
        // The library gives the folder's entries of itself and its parent long names, which they must not have, and the
        // root's cluster to the latter, where 0 belongs.
        let place = |folder: &str| -> Result<(u64, u32)> {
            let found = self.volume()?.find(folder)?;
            let found =
                found.ok_or_else(|| failed("write", path).because(format!("{folder} was not made")))?;
            layout::fat_folder(self.window(), found)
        };
        let (start, own) = place(&format!("/{inside}"))?;
        let parent = inside.rsplit_once('/').map_or("", |(parent, _)| parent);
        let (_, parent) = place(&format!("/{parent}"))?;
        let entries = [(b".          ", own), (b"..         ", parent), (&[0; 11], 0), (&[0; 11], 0)];
        let mut bytes = [[0; 32]; 4];
        for (entry, (name, cluster)) in bytes.iter_mut().zip(entries) {
            entry[..11].copy_from_slice(name);
            entry[11] = if name[0] == 0 { 0 } else { FOLDER };
            let [low, high] = [cluster & 0xffff, cluster >> 16].map(u32::to_le_bytes);
            entry[20..22].copy_from_slice(&high[..2]);
            entry[26..28].copy_from_slice(&low[..2]);
        }
        self.disk.write_at(bytes.as_flattened(), self.mount.start + start)
    }

    /// Lets the library do `work`, for the file at `path`.
    fn by_library(&self, path: &str, work: impl FnOnce(&Dir<'_, Storage>) -> io::Result<()>) -> Result<()> {
        let storage = Storage { disk: Arc::clone(self.disk), extent: self.extent(), at: 0, known: None };
        let all = || {
            // Without a clock: the same copy becomes the same, wherever and whenever it is fixed.
            let fs = FileSystem::new(storage, FsOptions::new())?;
            work(&fs.root_dir())?;
            fs.unmount()
        };
        // The library asserts what a damaged file system may break; what it has written then is thrown away with the
        // overlay.
        let done = catch_unwind(AssertUnwindSafe(all))
            .unwrap_or_else(|_| Err(io::Error::other("its file system is damaged")));
        done.map_err(|error| {
            let full = error.to_string().contains("No space left");
            let error = failed("write", path).caused_by(error);
            if full {
                error.remedy("free space on the source's EFI system partition, then try again")
            } else {
                error
            }
        })
    }
}

/// The file system's part of the disk. Reads are of few bytes, one after the other: a piece is kept.
struct Storage {
    disk: Arc<dyn Disk>,
    extent: Extent,
    at: u64,
    known: Option<(u64, Vec<u8>)>,
}

/// Bytes read at once.
const PIECE: u64 = 64 << 10;

impl Storage {
    fn left(&self, len: usize) -> usize {
        to_usize(self.extent.len().saturating_sub(self.at)).min(len)
    }
}

impl Read for Storage {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let start = self.at / PIECE * PIECE;
        if self.left(1) == 0 {
            return Ok(0);
        }
        let piece = match self.known.take() {
            Some((known, piece)) if known == start => piece,
            _ => {
                let mut piece = vec![0; to_usize((self.extent.len() - start).min(PIECE))];
                self.disk.read_at(&mut piece, self.extent.start + start).map_err(io::Error::other)?;
                piece
            }
        };
        let (_, rest) = piece.split_at(to_usize(self.at - start));
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.known = Some((start, piece));
        self.at += n as u64;
        Ok(n)
    }
}

impl Write for Storage {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.left(buf.len());
        self.disk.write_at(&buf[..n], self.extent.start + self.at).map_err(io::Error::other)?;
        self.known = None;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Storage {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.extent.len().checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
