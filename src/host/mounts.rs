//! Who on this machine uses a disk or an image file: mounts, swap, and the devices stacked on top of it.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::loopdev::{self, Backing};
use crate::error::{Error, Kind, Result};

/// One line of `/proc/PID/mountinfo` (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number of it.
    pub id: u64,
    /// Device number of the file system, as (major, minor).
    pub device: (u32, u32),
    /// Where it is mounted.
    pub point: PathBuf,
    /// File system type, such as `ext4`.
    pub kind: String,
    /// The device or pseudo-device it came from.
    pub source: String,
    /// Whether the file system itself (not just this mount of it) may be written.
    pub writable: bool,
    /// The file system's own options, as the kernel writes them.
    pub options: String,
}

/// Who uses a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// Mounted, and the file system may be written.
    Mount {
        /// The device that is mounted.
        device: String,
        /// Where.
        point: PathBuf,
    },
    /// Active swap space.
    Swap {
        /// The device or file.
        device: String,
    },
    /// Another device (LVM, md, dm-crypt, multipath) is active on top of it.
    Holder {
        /// The device underneath.
        device: String,
        /// The name of the device on top.
        holder: String,
    },
    /// The kernel says somebody has claimed the device, but not who.
    Claimed {
        /// The device.
        device: String,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Use::Mount { device, point } => {
                write!(f, "{device} is mounted read-write at {}", point.display())
            }
            Use::Swap { device } => write!(f, "{device} is active swap space"),
            Use::Holder { device, holder } => write!(f, "{device} is in use by {holder}"),
            Use::Claimed { device } => write!(f, "{device} is claimed by another driver or program"),
        }
    }
}

/// Undoes the octal escapes (`\040`) of the kernel's tables.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads the text of a mountinfo file; lines it does not understand are left out.
pub fn parse_mountinfo(text: &str) -> Vec<Mount> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let mut left = left.skip(1);
    let (major, minor) = left.next()?.split_once(':')?;
    let point = unescape(left.nth(1)?);
    let mut right = right.split(' ');
    let kind = right.next()?.to_owned();
    let source = unescape(right.next()?);
    let options = unescape(right.next()?);
    Some(Mount {
        id,
        device: (major.parse().ok()?, minor.parse().ok()?),
        point: point.into(),
        kind,
        source,
        writable: options.split(',').any(|option| option == "rw"),
        options,
    })
}

/// The devices and files of `/proc/swaps`.
pub fn parse_swaps(text: &str) -> Vec<String> {
    text.lines().skip(1).filter_map(|line| Some(unescape(line.split_whitespace().next()?))).collect()
}

/// Where the kernel tells of btrfs.
pub const BTRFS: &str = "/sys/fs/btrfs";

/// Whether the btrfs with this UUID is mounted, in whatever namespace, by what is told in the folder `btrfs`.
pub fn has_btrfs(btrfs: &Path, uuid: &Uuid) -> bool {
    btrfs.join(uuid.hyphenated().to_string()).exists()
}

/// Whether the kernel mounts a btrfs whose tree blocks have another UUID than it (Linux 5.0), by the same folder.
pub fn knows_btrfs_aliases(btrfs: &Path) -> bool {
    btrfs.join("features/metadata_uuid").exists()
}

/// The mounts of this process's namespace.
pub fn mounts() -> Result<Vec<Mount>> {
    read_table("/proc/self/mountinfo").map(|text| parse_mountinfo(&text))
}

/// The mounts of every mount namespace this process may look into: a container may hold a disk, too.
fn mounts_everywhere() -> Result<Vec<Mount>> {
    let mut all = mounts()?;
    let mut seen: BTreeSet<PathBuf> = fs::read_link("/proc/self/ns/mnt").into_iter().collect();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let process = entry.path();
        // Processes come and go, and some may not be looked into: they are no answer, not an error.
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if seen.insert(namespace)
            && let Ok(text) = fs::read_to_string(process.join("mountinfo"))
        {
            all.extend(parse_mountinfo(&text));
        }
    }
    Ok(all)
}

fn read_table(path: &str) -> Result<String> {
    fs::read_to_string(path).map_err(|error| {
        Error::new(Kind::Internal, "mounts.read", format!("cannot read {path}")).caused_by(error)
    })
}

/// Who may write to, or has activated something on, the block device or image file at `path`: itself, its
/// partitions, and everything stacked on them (loop devices, LVM, md, dm-crypt). File systems mounted read-only
/// do not count.
pub fn in_use(path: &Path) -> Result<Vec<Use>> {
    let meta = fs::metadata(path).map_err(|error| {
        Error::new(Kind::Source, "io.open", format!("cannot open {}", path.display())).caused_by(error)
    })?;
    let loops = attached_loops();
    let mut stack = Stack { loops, ..Stack::default() };
    if meta.file_type().is_block_device() {
        stack.add(meta.rdev());
    } else {
        stack.add_loops(|behind| behind.node == (meta.dev(), meta.ino()));
    }
    stack.grow();

    let mounts = mounts_everywhere()?;
    let mut uses = stack.holders.clone();
    let mut quiet = 0;
    for mount in &mounts {
        let by_number = libc::makedev(mount.device.0, mount.device.1);
        // btrfs shows an anonymous device number; its source is a device of the pool.
        let by_source = fs::metadata(&mount.source).ok().map(|meta| meta.rdev());
        let Some(device) =
            stack.devices.get(&by_number).or_else(|| by_source.and_then(|rdev| stack.devices.get(&rdev)))
        else {
            continue;
        };
        let found = Use::Mount { device: device.clone(), point: mount.point.clone() };
        if !mount.writable {
            quiet += 1;
        } else if !uses.contains(&found) {
            uses.push(found);
        }
    }
    uses.extend(stack.other_btrfs_members(&mounts));
    for device in parse_swaps(&fs::read_to_string("/proc/swaps").unwrap_or_default()) {
        let Ok(meta) = fs::metadata(&device) else { continue };
        if meta.file_type().is_block_device() && stack.devices.contains_key(&meta.rdev()) {
            uses.push(Use::Swap { device });
        }
    }
    if uses.is_empty() && quiet == 0 && meta.file_type().is_block_device() && claimed(path) {
        uses.push(Use::Claimed { device: path.display().to_string() });
    }
    Ok(uses)
}

/// Whether an exclusive open is refused: a file system, md or device-mapper has claimed the device.
fn claimed(path: &Path) -> bool {
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// Every attached loop device: its name and the file behind it.
fn attached_loops() -> Vec<(String, Backing)> {
    let names = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("loop") && Path::new("/sys/block").join(name).join("loop").exists())
        .filter_map(|name| Some((name.clone(), loopdev::backing(&Path::new("/dev").join(&name))?)))
        .collect()
}

/// A disk and everything built on it, by device number.
#[derive(Default)]
struct Stack {
    loops: Vec<(String, Backing)>,
    devices: BTreeMap<u64, String>,
    fresh: Vec<u64>,
    holders: Vec<Use>,
}

impl Stack {
    fn add(&mut self, device: u64) {
        if let Entry::Vacant(new) = self.devices.entry(device) {
            new.insert(format!("/dev/{}", sys_name(device).replace('!', "/")));
            self.fresh.push(device);
        }
    }

    fn add_loops(&mut self, over: impl Fn(&Backing) -> bool) {
        let over: Vec<String> =
            self.loops.iter().filter(|(_, behind)| over(behind)).map(|(name, _)| name.clone()).collect();
        over.iter()
            .filter_map(|name| device_number(&Path::new("/sys/block").join(name)))
            .for_each(|n| self.add(n));
    }

    /// Adds partitions, holders, and loop devices over any of them, until nothing new turns up.
    fn grow(&mut self) {
        while let Some(device) = self.fresh.pop() {
            let sys = sys_path(device);
            for entry in fs::read_dir(&sys).into_iter().flatten().flatten() {
                if entry.path().join("partition").exists()
                    && let Some(number) = device_number(&entry.path())
                {
                    self.add(number);
                }
            }
            for entry in fs::read_dir(sys.join("holders")).into_iter().flatten().flatten() {
                let Some(number) = device_number(&entry.path()) else { continue };
                if fs::read_to_string(entry.path().join("ro")).is_ok_and(|ro| ro.trim() == "1") {
                    self.add(number);
                    continue;
                }
                let kernel_name = entry.file_name().to_string_lossy().into_owned();
                let holder = match fs::read_to_string(entry.path().join("dm/name")) {
                    Ok(name) => format!("/dev/mapper/{}", name.trim()),
                    Err(_) => format!("/dev/{kernel_name}"),
                };
                let under = self.devices.get(&device).cloned().unwrap_or_default();
                self.holders.push(Use::Holder { device: under, holder });
                self.add(number);
            }
            self.add_loops(|behind| behind.rdev == device);
        }
    }

    /// A btrfs over several devices names only one of them in the table of mounts.
    fn other_btrfs_members(&self, mounts: &[Mount]) -> Vec<Use> {
        let mut uses = Vec::new();
        for pool in fs::read_dir("/sys/fs/btrfs").into_iter().flatten().flatten() {
            let members: Vec<u64> = fs::read_dir(pool.path().join("devices"))
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|entry| device_number(&entry.path()))
                .collect();
            let Some(ours) = members.iter().find_map(|member| self.devices.get(member)) else { continue };
            for mount in mounts.iter().filter(|mount| mount.kind == "btrfs" && mount.writable) {
                let rdev = fs::metadata(&mount.source).map(|meta| meta.rdev()).unwrap_or_default();
                if members.contains(&rdev) && !self.devices.contains_key(&rdev) {
                    uses.push(Use::Mount { device: ours.clone(), point: mount.point.clone() });
                }
            }
        }
        uses
    }
}

fn sys_path(device: u64) -> PathBuf {
    format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device)).into()
}

fn sys_name(device: u64) -> String {
    let target = fs::read_link(sys_path(device)).unwrap_or_default();
    match target.file_name() {
        Some(name) => name.to_string_lossy().into_owned(),
        None => format!("block/{}:{}", libc::major(device), libc::minor(device)),
    }
}

fn device_number(sys: &Path) -> Option<u64> {
    let text = fs::read_to_string(sys.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mountinfo_line_is_read_with_its_escapes_and_the_super_block_options() {
        let text = "36 35 98:1 /mnt1 /mnt/a\\040b ro,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                    37 35 0:44 / /x rw - btrfs /dev/sdb2 ro,ssd\nnonsense\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].point, Path::new("/mnt/a b"));
        assert_eq!((mounts[0].device, mounts[0].writable), ((98, 1), true));
        assert_eq!((mounts[1].source.as_str(), mounts[1].writable), ("/dev/sdb2", false));
    }

    #[test]
    fn swaps_are_named() {
        let text =
            "Filename Type Size Used Priority\n/dev/sda5 partition 1 0 -2\n/swap\\040file file 1 0 -3\n";
        assert_eq!(parse_swaps(text), ["/dev/sda5", "/swap file"]);
    }

    #[test]
    fn an_image_nobody_uses_is_free() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(in_use(file.path()).unwrap(), []);
    }
}
