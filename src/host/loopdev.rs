//! Loop devices over one range of a file, gone by themselves with their last user.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::unit::Extent;

const LOOP_SET_FD: libc::Ioctl = 0x4c00;
const LOOP_CLR_FD: libc::Ioctl = 0x4c01;
const LOOP_SET_STATUS64: libc::Ioctl = 0x4c04;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Others may take the free device between the question and the answer; this many tries are enough.
const TRIES: usize = 64;

/// `struct loop_info64` (linux/loop.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` (linux/loop.h, since Linux 5.8).
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

impl LoopInfo64 {
    const EMPTY: LoopInfo64 = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// An attached loop device. The kernel detaches it when the last user (this value, a mount) is gone.
pub struct LoopDevice {
    path: PathBuf,
    // Held open: an autoclear device nobody holds detaches at once.
    _file: File,
}

impl LoopDevice {
    /// Attaches the range `extent` of `backing` (whole 512-byte sectors) to a free loop device.
    pub fn attach(backing: &File, extent: Extent, read_only: bool) -> Result<Self> {
        let failed = |error: io::Error| {
            Error::new(Kind::Privilege, "loop.attach", "cannot attach a loop device")
                .remedy("run as root on a machine with the loop driver (modprobe loop)")
                .caused_by(error)
        };
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").map_err(failed)?;
        for _ in 0..TRIES {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a number.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(failed(io::Error::last_os_error()));
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let file = OpenOptions::new()
                .read(true)
                .write(!read_only)
                .custom_flags(libc::O_CLOEXEC)
                .open(&path)
                .map_err(failed)?;
            match configure(&file, backing, extent, read_only) {
                Ok(()) => return Ok(LoopDevice { path, _file: file }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Err(failed(io::Error::from_raw_os_error(libc::EBUSY)))
    }

    /// The device node, such as `/dev/loop0`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn configure(device: &File, backing: &File, extent: Extent, read_only: bool) -> io::Result<()> {
    let info = LoopInfo64 {
        offset: extent.start,
        sizelimit: extent.len(),
        flags: LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 },
        ..LoopInfo64::EMPTY
    };
    let fd = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
    let config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which `config` is, and keeps no pointer to it.
    match check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }) {
        // Before Linux 5.8 the ioctl is unknown: two steps do the same.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {}
        done => return done,
    }
    // SAFETY: LOOP_SET_FD takes a descriptor, open as long as `backing` lives.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_FD, backing.as_raw_fd()) })?;
    // SAFETY: LOOP_SET_STATUS64 reads one `struct loop_info64`, which `info` is.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_STATUS64, &raw const info) }).inspect_err(|_| {
        // SAFETY: LOOP_CLR_FD takes no argument. It undoes the first step; a failure leaves nothing to try.
        unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD, 0) };
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The file behind a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Device and inode number of the file, as `stat` gives them.
    pub node: (u64, u64),
    /// The device's number where the file is itself a block device, 0 otherwise.
    pub rdev: u64,
}

/// What is behind a loop device; `None` when nothing is attached.
pub fn backing(device: &Path) -> Option<Backing> {
    let file = File::open(device).ok()?;
    let mut info = LoopInfo64::EMPTY;
    // SAFETY: LOOP_GET_STATUS64 fills one `struct loop_info64`, which `info` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) }).ok()?;
    Some(Backing { node: (unpack(info.device), info.inode), rdev: unpack(info.rdevice) })
}

/// A device number as the loop driver packs it (`huge_encode_dev` in linux/kdev_t.h).
fn unpack(packed: u64) -> u64 {
    let major = (packed & 0xfff00) >> 8;
    let minor = (packed & 0xff) | ((packed >> 12) & 0xfff00);
    libc::makedev(u32::try_from(major).unwrap_or(0), u32::try_from(minor).unwrap_or(0))
}
