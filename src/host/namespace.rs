//! Confinement: a mount namespace of our own for the copy's file systems, and a box without privileges, network
//! or devices in which programs of the guest may run.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid, pipe2, pivot_root};

use super::mounts;
use crate::error::{Error, Kind, Result};

/// What the box may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Memory in bytes, page cache included.
    pub memory: u64,
    /// Processes and threads.
    pub processes: u64,
    /// Wall-clock time.
    pub time: Duration,
}

/// Capabilities that remain in the box (linux/capability.h): those over files, identities and signals.
const KEPT: &[u32] = &[
    0,  // CHOWN
    1,  // DAC_OVERRIDE
    2,  // DAC_READ_SEARCH
    3,  // FOWNER
    4,  // FSETID
    5,  // KILL
    6,  // SETGID
    7,  // SETUID
    9,  // LINUX_IMMUTABLE
    18, // SYS_CHROOT
    31, // SETFCAP
];
/// The highest capability number a kernel may know; the kernel's 64-bit sets end there.
const LAST_CAPABILITY: u32 = 63;

/// Files of /proc that show or steer the host, each covered by an empty file.
const MASKED: &[&str] = &[
    "sysrq-trigger",
    "kcore",
    "kmsg",
    "keys",
    "key-users",
    "kallsyms",
    "modules",
    "swaps",
    "partitions",
    "mdstat",
    "diskstats",
    "cmdline",
    "timer_list",
    "sched_debug",
    "latency_stats",
    "kpagecount",
    "kpageflags",
    "mtrr",
    "devices",
];
/// Folders of /proc that show or steer the host, each covered by an empty folder.
const MASKED_FOLDERS: &[&str] = &["acpi", "asound", "bus", "fs", "irq", "scsi", "driver", "tty"];

/// How often a finished box is looked for.
const POLL: Duration = Duration::from_millis(5);

fn failed(what: &str, error: impl Into<io::Error>) -> Error {
    Error::new(Kind::Privilege, "namespace.setup", format!("cannot {what}"))
        .remedy("run as root, outside a container that forbids namespaces and mounts; or with --appliance")
        .caused_by(error.into())
}

/// Asks the kernel to kill this process with its parent. Fails when the parent is dead already.
pub fn die_with_parent(parent: Pid) -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| failed("bind to the parent", error))?;
    // In a new process namespace the parent has no number: 0.
    match getppid() {
        now if now == parent || now.as_raw() == 0 => Ok(()),
        _ => Err(failed("bind to the parent", Errno::ESRCH)),
    }
}

/// Gives this process mounts of its own: what it mounts is seen by no other and goes with it. Of the host's mounts it
/// keeps those `folder` lies on and the kernel's own (/dev, /proc, /sys): a file system that is held here would stay
/// mounted, and be written, after the host has unmounted it.
pub fn own_mounts(folder: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| failed("open a mount namespace", error))?;
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(|error| failed("detach from the host's mounts", error))?;
    let kept = |point: &Path| {
        folder.starts_with(point)
            || ["/dev", "/proc", "/sys"].iter().any(|kernels| point.starts_with(kernels))
    };
    // The last one first: it may lie on one before it.
    for point in mounts::mounts()?.iter().map(|mount| &mount.point).rev().filter(|point| !kept(point)) {
        match umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // Covered by another mount, or gone with the host's: it is not held by its name.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(failed(&format!("let go of the host's {}", point.display()), error)),
        }
    }
    Ok(())
}

/// Covers `folder` with an empty file system in memory, for mount points.
pub fn scratch(folder: &Path) -> Result<()> {
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("haul"), folder, Some("tmpfs"), flags, Some("size=1m,mode=700"))
        .map_err(|error| failed("mount a scratch folder", error))
}

/// Mounts the file system `kind` on `device` at the folder `inside` of `root`, following no link below `root`.
/// Device nodes and set-user-id bits on it mean nothing.
pub fn mount_beneath(device: &Path, kind: &str, root: &Path, inside: &str, options: &str) -> Result<()> {
    let point = open_folder(root, inside)
        .map_err(|error| failed(&format!("find the mount point {inside} of the guest"), error))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", point.as_raw_fd()));
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(Some(device), &path, Some(kind), flags, Some(options)).map_err(|error| {
        failed(&format!("mount the guest's {inside} ({kind})"), error).remedy(
            "the kernel of this machine must know the file system, and it must be sound (dmesg says more)",
        )
    })
}

/// Opens the folder `inside` of `root`, following no link below `root`.
pub(super) fn open_folder(root: &Path, inside: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut folder = nix::fcntl::open(root, flags, Mode::empty())?;
    for name in inside.split('/').filter(|name| !name.is_empty()) {
        if name == ".." {
            return Err(Errno::EINVAL);
        }
        folder = nix::fcntl::openat(&folder, name, flags, Mode::empty())?;
    }
    Ok(folder)
}

/// Unmounts `point`, waiting until everything in it is written.
pub fn unmount(point: &Path) -> Result<()> {
    umount2(point, MntFlags::UMOUNT_NOFOLLOW)
        .map_err(|error| failed(&format!("unmount {}", point.display()), error))
}

/// Replaces this process's standard input by nothing: drops what came in by it.
pub fn drop_stdin() -> Result<()> {
    let null = File::open("/dev/null").map_err(|error| failed("open /dev/null", error))?;
    nix::unistd::dup2_stdin(&null).map_err(|error| failed("close standard input", error))
}

/// Runs `body` in a child whose root folder is `root`, in new mount, process, network, IPC and host-name
/// namespaces, with few capabilities, a memory and process limit, and a time limit; the child and all it starts
/// are killed with this process. To be called while this process has a single thread. `body` must report
/// through a descriptor it holds; here only its being `true` is told.
pub fn confined(root: &Path, limits: Limits, body: impl FnOnce() -> bool) -> Result<bool> {
    let group = ControlGroup::create(limits);
    let (trouble, to_parent) = pipe2(OFlag::O_CLOEXEC).map_err(|error| failed("open a pipe", error))?;
    // Only children enter the new process namespace: this process stays where it can kill them.
    unshare(CloneFlags::CLONE_NEWPID).map_err(|error| failed("open a process namespace", error))?;
    let parent = nix::unistd::getpid();
    // SAFETY: this process has one thread (the caller's contract), so the child's memory is whole: no lock is
    // held by a thread that does not exist there.
    let child = match unsafe { fork() }.map_err(|error| failed("start a process", error))? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let ready = group
                .enter()
                .and_then(|()| die_with_parent(parent))
                .and_then(|()| enter_box(root))
                // Losing capabilities may have undone it.
                .and_then(|()| die_with_parent(parent));
            let code = match ready {
                Ok(()) if body() => 0,
                Ok(()) => 1,
                Err(error) => {
                    // Without it the parent knows by the code that it failed, though not why.
                    let _ = File::from(to_parent).write_all(format!("{error}: {}", error.why()).as_bytes());
                    2
                }
            };
            // SAFETY: _exit ends this process without running destructors, which belong to the parent's copy.
            unsafe { libc::_exit(code) }
        }
    };
    drop(to_parent);
    let outcome = wait(child, limits.time, File::from(trouble));
    drop(group);
    outcome
}

fn wait(child: Pid, time: Duration, mut trouble: File) -> Result<bool> {
    let deadline = Instant::now() + time;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, 2)) => {
                let mut why = String::new();
                let read = trouble.read_to_string(&mut why);
                return Err(failed(
                    "set up the box for the guest's programs",
                    read.err().unwrap_or_else(|| io::Error::other(why)),
                ));
            }
            Ok(WaitStatus::Exited(_, code)) => return Ok(code == 0),
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                return Err(Error::new(
                    Kind::Internal,
                    "namespace.killed",
                    "the guest's programs were killed",
                )
                .because(format!("signal {signal}; out of memory, most likely")));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(failed("wait for the guest's programs", error)),
        }
        if Instant::now() >= deadline {
            // Both fail only when the child is gone, which is what is wanted.
            let _ = kill(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            return Err(Error::new(
                Kind::Internal,
                "namespace.timeout",
                format!("the guest's programs did not end within {} s", time.as_secs()),
            ));
        }
        std::thread::sleep(POLL);
    }
}

/// From here on this process sees the guest's tree only.
fn enter_box(root: &Path) -> Result<()> {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(|error| failed("open namespaces", error))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(|error| failed("detach from the mounts outside", error))?;
    nix::unistd::chdir(root).map_err(|error| failed("enter the guest's tree", error))?;
    // The new root is put over the old one at the same place, and the old one is let go.
    pivot_root(".", ".").map_err(|error| failed("make the guest's tree the root", error))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(|error| failed("let go of the host's tree", error))?;
    nix::unistd::chdir("/").map_err(|error| failed("enter the guest's tree", error))?;
    pseudo_file_systems()?;
    give_up_privileges().map_err(|error| failed("give up privileges", error))
}

/// A /dev without disks, a /proc of the box's own processes with the host's knobs covered, an empty /sys.
fn pseudo_file_systems() -> Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let tmpfs = |point: &str, flags: MsFlags, options: &str| {
        mount(Some("tmpfs"), point, Some("tmpfs"), flags, Some(options))
            .map_err(|error| failed(&format!("mount {point} for the guest's programs"), error))
    };
    let known = |what: &'static str| move |error: Errno| failed(what, error);

    tmpfs("/dev", quiet, "size=64k,mode=755")?;
    umask(Mode::empty());
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        let path = Path::new("/dev").join(name);
        mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))
            .map_err(known("make the box's /dev"))?;
    }
    umask(Mode::from_bits_truncate(0o022));
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        std::os::unix::fs::symlink(target, link).map_err(|error| failed("make the box's /dev", error))?;
    }
    // The cover for single files lies in /dev, which is made read-only below.
    File::create("/dev/.nothing").map_err(|error| failed("make the box's /dev", error))?;
    fs::create_dir("/dev/shm").map_err(|error| failed("make the box's /dev", error))?;
    tmpfs("/dev/shm", quiet | MsFlags::MS_NODEV, "size=16m")?;
    tmpfs("/sys", quiet | MsFlags::MS_NODEV | MsFlags::MS_RDONLY, "size=4k,mode=555")?;
    tmpfs("/run", quiet | MsFlags::MS_NODEV, "size=16m,mode=755")?;

    mount(Some("proc"), "/proc", Some("proc"), quiet | MsFlags::MS_NODEV, None::<&str>)
        .map_err(known("mount the box's /proc"))?;
    for name in MASKED {
        cover(Path::new("/dev/.nothing"), &Path::new("/proc").join(name))?;
    }
    for name in MASKED_FOLDERS {
        cover(Path::new("/sys"), &Path::new("/proc").join(name))?;
    }
    // Settings belong to root, and root without capabilities is still root: they must not be writable at all.
    cover(Path::new("/proc/sys"), Path::new("/proc/sys"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | quiet;
    mount(None::<&str>, "/proc/sys", None::<&str>, read_only | MsFlags::MS_NODEV, None::<&str>)
        .map_err(known("close the box's /proc/sys"))?;
    // The file system itself: what covers files of /proc is a part of it.
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | quiet;
    mount(None::<&str>, "/dev", None::<&str>, read_only, None::<&str>).map_err(known("close the box's /dev"))
}

fn cover(with: &Path, target: &Path) -> Result<()> {
    match mount(Some(with), target, None::<&str>, MsFlags::MS_BIND, None::<&str>) {
        // This kernel does not have it.
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(failed(&format!("cover {}", target.display()), error)),
    }
}

/// `struct __user_cap_header_struct` and two `struct __user_cap_data_struct` (linux/capability.h).
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

fn give_up_privileges() -> io::Result<()> {
    nix::sys::prctl::set_no_new_privs()?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
    for capability in (0..=LAST_CAPABILITY).filter(|capability| !KEPT.contains(capability)) {
        // SAFETY: the call takes plain numbers. EINVAL: this kernel does not know the capability.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
        if dropped < 0 && Errno::last() != Errno::EINVAL {
            return Err(io::Error::last_os_error());
        }
    }
    let kept = KEPT.iter().fold(0u64, |set, capability| set | 1 << capability);
    let half = |shift: u32| u32::try_from((kept >> shift) & 0xffff_ffff).unwrap_or(0);
    let data = [0, 32].map(|shift| CapabilityData {
        effective: half(shift),
        permitted: half(shift),
        inheritable: 0,
    });
    let header = CapabilityHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    // SAFETY: capset reads one header and, at version 3, two data records, which is what it is given.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A box's group is named so, and by the number of the process that made it.
const GROUP: &str = "haul-";

/// A control group of the box's own, version 1 or 2, removed when dropped.
struct ControlGroup {
    folders: Vec<PathBuf>,
}

impl ControlGroup {
    /// Makes the group. A host that offers no control groups is no obstacle: the time limit still holds.
    fn create(limits: Limits) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("{GROUP}{}", std::process::id());
        let mut group = ControlGroup { folders: Vec::new() };
        if root.join("cgroup.controllers").exists() {
            // Only a group without processes of its own may hand controllers down; the root always may.
            group.add(root, &name, &[("memory.max", limits.memory), ("pids.max", limits.processes)]);
        } else {
            group.add(&root.join("memory"), &name, &[("memory.limit_in_bytes", limits.memory)]);
            group.add(&root.join("pids"), &name, &[("pids.max", limits.processes)]);
        }
        group
    }

    fn add(&mut self, parent: &Path, name: &str, settings: &[(&str, u64)]) {
        sweep(parent);
        let folder = parent.join(name);
        if fs::create_dir(&folder).is_err() {
            return;
        }
        for (file, value) in settings {
            if let Err(error) = fs::write(folder.join(file), value.to_string()) {
                tracing::debug!(%error, file, "this control group cannot be limited");
            }
        }
        self.folders.push(folder);
    }

    fn enter(&self) -> Result<()> {
        for folder in &self.folders {
            OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_CLOEXEC)
                .open(folder.join("cgroup.procs"))
                .and_then(|mut file| file.write_all(b"0"))
                .map_err(|error| failed("enter a control group", error))?;
        }
        Ok(())
    }
}

/// Removes groups left by jobs that were killed. One whose job lives may be empty, its box about to enter it.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let job = name.to_str().and_then(|name| name.strip_prefix(GROUP)?.parse::<u32>().ok());
        if job.is_some_and(|job| !Path::new("/proc").join(job.to_string()).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        for folder in &self.folders {
            // A group empties a moment after its last process is reaped; a later job sweeps what is left.
            let _ = fs::remove_dir(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_swept_when_its_job_is_dead_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let folder = |name: String| {
            let folder = dir.path().join(name);
            fs::create_dir(&folder).unwrap();
            folder
        };
        let [ours, left, others] =
            [format!("haul-{}", std::process::id()), format!("haul-{}", dead.id()), "haul-er".to_owned()]
                .map(folder);
        sweep(dir.path());
        assert!(ours.exists() && !left.exists() && others.exists());
    }

    #[test]
    fn a_box_that_cannot_be_set_up_says_why() {
        let (trouble, mut to_parent) = std::io::pipe().unwrap();
        to_parent.write_all(b"cannot mount /run").unwrap();
        drop(to_parent);
        let mut child = std::process::Command::new("sh").args(["-c", "exit 2"]).spawn().unwrap();
        let number = Pid::from_raw(child.id().cast_signed());
        let error = wait(number, Duration::from_secs(60), File::from(OwnedFd::from(trouble))).unwrap_err();
        assert!(child.wait().is_err(), "nobody has waited for it");
        assert_eq!((error.kind(), error.why().as_str()), (Kind::Privilege, "cannot mount /run"));
    }

    #[test]
    fn of_the_hosts_mounts_only_those_it_lies_on_are_held() {
        let dir = tempfile::tempdir().unwrap();
        let (others, ours) = (dir.path().join("others"), dir.path().join("ours"));
        for point in [&others, &ours] {
            fs::create_dir(point).unwrap();
            scratch(point).unwrap();
        }
        let folder = ours.join("folder");
        fs::create_dir(&folder).unwrap();
        // Mounts belong to a thread.
        let held = std::thread::spawn(move || {
            own_mounts(&folder).unwrap();
            fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
        });
        let held: Vec<PathBuf> =
            mounts::parse_mountinfo(&held.join().unwrap()).into_iter().map(|mount| mount.point).collect();
        for point in [&others, &ours] {
            unmount(point).unwrap();
        }
        assert!(held.contains(&ours) && held.contains(&"/proc".into()), "{held:?}");
        assert!(!held.contains(&others), "{held:?}");
    }
}
