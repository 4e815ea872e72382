//! One disk shown to the kernel as one file, by FUSE: what a loop device can stand on.
//!
//! The server is this process; the mount belongs to another one, in its own mount namespace. One process doing
//! both cannot be killed while there are dirty pages: its exit waits for writeback that only it could serve.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyOpen, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};

use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, WriteAt};
use crate::unit::{Extent, to_usize};

/// How long the kernel may keep the file's attributes: they never change.
const FOREVER: Duration = Duration::from_secs(86_400);
/// `PR_SET_IO_FLUSHER` (linux/prctl.h, since Linux 5.6).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// A disk that can be read and written.
pub trait Disk: ReadAt + WriteAt {}

impl<T: ReadAt + WriteAt> Disk for T {}

/// An open `/dev/fuse`, not yet mounted.
pub struct FuseDevice(OwnedFd);

impl FuseDevice {
    /// Opens a new FUSE connection. Fails without root or without FUSE in the kernel.
    pub fn open() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|error| {
            Error::new(Kind::Privilege, "fuse.open", "cannot open /dev/fuse")
                .remedy("run as root on a machine with FUSE (modprobe fuse)")
                .caused_by(error)
        })?;
        Ok(FuseDevice(file.into()))
    }

    /// Serves `disk` on this connection from threads of this process, until the connection ends. Blocks until
    /// the other process has mounted it.
    pub fn serve(self, disk: Arc<dyn Disk>) -> JoinHandle<io::Result<()>> {
        std::thread::spawn(move || {
            // Memory this server asks for must not wait for pages which only this server can write back. Only a
            // precaution: refused before Linux 5.6 and without CAP_SYS_RESOURCE.
            // SAFETY: the call takes plain numbers and changes a flag of this thread, which its threads inherit.
            unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
            let mut config = Config::default();
            config.acl = SessionACL::Owner;
            Session::from_fd(OneFile { disk }, self.0, SessionACL::Owner, config)?.run()
        })
    }
}

impl AsFd for FuseDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Keeps this process's memory from being swapped out while it serves; undone when dropped.
pub struct MemoryLock(());

impl MemoryLock {
    /// Locks the process's memory as it is touched. Where that is refused, nothing is locked: it is a precaution.
    pub fn new() -> Self {
        // SAFETY: mlockall takes flags only and changes no memory content.
        unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
        MemoryLock(())
    }
}

impl Default for MemoryLock {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::munlockall() };
    }
}

/// Mounts the connection `fuse` on the empty regular file `point`: the file system is a single file. To be
/// called in the process that owns the mount namespace.
pub fn mount(fuse: BorrowedFd<'_>, point: &Path) -> Result<()> {
    File::create(point).map_err(|error| mount_error(point, error))?;
    let options = format!("fd={},rootmode=100600,user_id=0,group_id=0", fuse.as_raw_fd());
    nix::mount::mount(
        Some("haul"),
        point,
        Some("fuse.haul"),
        nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NOEXEC,
        Some(options.as_str()),
    )
    .map_err(|error| mount_error(point, error.into()))
}

fn mount_error(point: &Path, error: io::Error) -> Error {
    Error::new(Kind::Privilege, "fuse.mount", format!("cannot mount FUSE on {}", point.display()))
        .caused_by(error)
}

struct OneFile {
    disk: Arc<dyn Disk>,
}

impl OneFile {
    fn attributes(&self) -> FileAttr {
        FileAttr {
            ino: INodeNo::ROOT,
            size: self.disk.size(),
            blocks: self.disk.size().div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: FileType::RegularFile,
            perm: 0o600,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

/// What to tell the kernel about a failure: the disk's own error number where it has one.
fn errno(error: &Error) -> Errno {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    Errno::from_i32(source.and_then(io::Error::raw_os_error).unwrap_or(libc::EIO))
}

impl Filesystem for OneFile {
    fn getattr(&self, _: &Request, _: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes());
    }

    // The kernel's page cache of the loop device above is enough: another of this file would hold every page twice.
    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let asked = Extent::at(offset, u64::from(size)).intersect(Extent::new(0, self.disk.size()));
        let mut bytes = vec![0; to_usize(asked.len())];
        match self.disk.read_at(&mut bytes, offset) {
            Ok(()) => reply.data(&bytes),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = u32::try_from(data.len()).map_err(|_| Errno::EINVAL);
        let done = self.disk.write_at(data, offset).map_err(|error| errno(&error));
        match done.and(written) {
            Ok(written) => reply.written(written),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    // Durability is the overlay's seal, once, at the end: an fsync per journal commit of the guest's file system
    // would cost much and promise nothing, for an unsealed overlay is thrown away.
    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
