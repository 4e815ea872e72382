//! Fix-ups carried out on real file systems. Needs root, FUSE, loop devices and mkfs.ext4; the last tests make Debian
//! disks and boot them in QEMU.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test: a failure is the finding"
)]

#[path = "support/images.rs"]
mod images;
#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "support/lvm.rs"]
mod lvm;
#[path = "support/mirror.rs"]
mod mirror;
#[path = "support/phony.rs"]
mod phony;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use haul::boot::config_drive::ConfigDrive;
use haul::boot::{Accelerator, Arch, Expect, Firmware, Format, Hardware, Machine, State};
use haul::error::Kind;
use haul::guest::disk::BootMode;
use haul::guest::plan::{Fix, Options};
use haul::guest::{self, Executor, Setup};
use haul::host::programs::Programs;
use haul::image::overlay::Overlay;
use haul::io::{DiskFile, ReadAt};
use haul::monitor::{Monitor, Tally};
use haul::unit::Extent;
use lvm::Lvm;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use phony::{VIRTIO, initramfs};
use support::text;

fn run(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// A guest small enough for a quick test: a shell, a few tools, and a mkinitramfs that runs `build`, with the
/// path to make in `$out` and a good initramfs at /good.img.
fn small_guest(folder: &Path, build: &str) -> PathBuf {
    small_guest_with(folder, build, &initramfs(&["ahci"]))
}

/// The same, with this initramfs.
fn small_guest_with(folder: &Path, build: &str, initrd: &[u8]) -> PathBuf {
    small_tree(folder, build, initrd);
    on_ext4(folder)
}

/// The tree of a small guest on a disk.
fn on_ext4(folder: &Path) -> PathBuf {
    on_ext_by(folder, "ext4")
}

/// The same, made by mkfs.`made`.
fn on_ext_by(folder: &Path, made: &str) -> PathBuf {
    let (root, disk) = (folder.join("tree"), folder.join("disk.raw"));
    fs::File::create(&disk).unwrap().set_len(256 << 20).unwrap();
    let mut words = made.split(' ');
    let program = format!("mkfs.{}", words.next().unwrap());
    let files = ["-qF", "-d", root.to_str().unwrap(), disk.to_str().unwrap()];
    run(&program, &words.chain(files).collect::<Vec<_>>());
    disk
}

/// Its tree, in a folder of this machine.
fn small_tree(folder: &Path, build: &str, initrd: &[u8]) -> PathBuf {
    let root = folder.join("tree");
    let put = |path: &str, text: &[u8]| {
        let path = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    };
    for dir in ["dev", "proc", "sys", "run", "var/tmp", "root", "boot"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for program in [
        "/bin/sh",
        "/usr/bin/dd",
        "/usr/bin/cp",
        "/usr/bin/sleep",
        "/usr/bin/touch",
        "/usr/bin/mknod",
        "/usr/bin/cat",
        "/usr/bin/mount",
    ] {
        let real = fs::canonicalize(program).unwrap();
        let libraries = run("ldd", &[real.to_str().unwrap()]);
        let paths = libraries.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned);
        for path in paths.chain([program.to_owned()]) {
            let to = put(&path, &fs::read(fs::canonicalize(&path).unwrap()).unwrap());
            run("chmod", &["755", to.to_str().unwrap()]);
        }
    }
    let kernel = "6.1.0-1-test";
    let modules: String = VIRTIO.iter().map(|name| format!("kernel/{name}.ko:\n")).collect();
    put("/etc/os-release", b"ID=debian\nVERSION_ID=12\n");
    put("/etc/fstab", b"/dev/sda / ext4 defaults 0 1\n/dev/sdb1 /data ext4 defaults 0 2\n");
    put("/etc/initramfs-tools/modules", b"ahci\n");
    put("/usr/bin/cloud-init", b"");
    put("/etc/cloud/cloud.cfg", b"users:\n - default\n");
    put(
        "/boot/grub/grub.cfg",
        format!("linux /boot/vmlinuz-{kernel} root=/dev/sda\ninitrd /boot/initrd.img-{kernel}\n").as_bytes(),
    );
    put(&format!("/boot/vmlinuz-{kernel}"), b"kernel");
    put(&format!("/boot/initrd.img-{kernel}"), initrd);
    for name in VIRTIO {
        put(&format!("/lib/modules/{kernel}/kernel/{name}.ko"), &phony::module());
    }
    put(&format!("/lib/modules/{kernel}/modules.dep"), modules.as_bytes());
    put(&format!("/var/lib/initramfs-tools/{kernel}"), b"old checksum\n");
    put("/good.img", &initramfs(VIRTIO));
    let tool = put("/usr/sbin/mkinitramfs", format!("#!/bin/sh\nout=$2\n{build}\n").as_bytes());
    run("chmod", &["755", tool.to_str().unwrap()]);
    root
}

fn setup(folder: &Path) -> Setup {
    let own = folder.join("own");
    fs::create_dir_all(&own).unwrap();
    Setup { program: env!("CARGO_BIN_EXE_haul").into(), ..Setup::new(own) }
}

fn opened(disk: &Path) -> Arc<dyn ReadAt> {
    Arc::new(DiskFile::open(disk).unwrap())
}

fn checksum(path: &Path) -> String {
    run("sha256sum", &[path.to_str().unwrap()])
}

/// What a job could leave behind on this machine: loop devices, mounts, FUSE connections of haul.
fn left_behind(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let name = folder.to_str().unwrap();
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if backing.contains(name) {
            found.insert(format!("{} over {backing}", entry.path().display()));
        }
    }
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let mounts = fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
        found.extend(mounts.lines().filter(|line| line.contains(name)).map(str::to_owned));
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(&format!("{name}/own")) {
            found.insert(format!("process {}", entry.path().display()));
        }
    }
    found
}

/// Waits for one of `events` until `deadline`; false if none came.
fn ready(events: &[BorrowedFd<'_>], deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let mut events: Vec<PollFd<'_>> = events.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    poll(&mut events, PollTimeout::try_from(left).unwrap()).unwrap() > 0
}

/// Waits until nothing is left behind, far longer than it may take. A process that ends, and a loop device that is
/// given up, are events; the mounts go with the one and before the other.
fn gone(folder: &Path) {
    let uevents = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .unwrap();
    bind(uevents.as_raw_fd(), &NetlinkAddr::new(0, 1)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let left = left_behind(folder);
        if left.is_empty() {
            return;
        }
        let pids = left.iter().filter_map(|left| left.strip_prefix("process /proc/")?.parse().ok());
        let ends: Vec<OwnedFd> = pids.filter_map(pidfd).collect();
        let events: Vec<BorrowedFd<'_>> =
            std::iter::once(uevents.as_fd()).chain(ends.iter().map(AsFd::as_fd)).collect();
        if !ready(&events, deadline) {
            let left = left_behind(folder);
            assert!(left.is_empty(), "left behind: {left:#?}");
            return;
        }
        let mut event = [0; 8192];
        while recv(uevents.as_raw_fd(), &mut event, MsgFlags::empty()).is_ok() {}
    }
}

/// What becomes readable when the process ends; none when it has.
fn pidfd(pid: libc::c_int) -> Option<OwnedFd> {
    // SAFETY: pidfd_open takes plain numbers (Linux 5.3); what it returns is a descriptor of our own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: as above.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Tries to get out, notes what it sees, then does its work.
const HOSTILE: &str = "\
mknod /var/tmp/sda b 8 0; mknod /dev/sda b 8 0; mknod /run/sda b 8 0
mount -o remount,rw /proc/sys; mount -t proc none /var/tmp
echo /haul-was-here > /proc/sys/kernel/core_pattern
kill -9 -1
cat /proc/self/status > /etc/box-status
cat /proc/self/mountinfo > /etc/box-mounts
echo /dev/* > /etc/box-dev
echo /sys/* > /etc/box-sys
echo /proc/[0-9]* > /etc/box-processes
cp /good.img $out";

#[test]
fn a_plan_is_carried_out_on_the_overlay_and_the_source_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let disk = small_guest(dir.path(), HOSTILE);
    // As a system under SELinux: what is new must not be the one thing without a label.
    for path in ["/", "/etc"] {
        let command = format!("ea_set {path} security.selinux system_u:object_r:etc_t:s0");
        run("debugfs", &["-w", "-R", &command, disk.to_str().unwrap()]);
    }
    let before = checksum(&disk);
    let source = opened(&disk);
    let guest = guest::inspect(Arc::clone(&source)).unwrap();
    assert_eq!(guest.kernels[0].lacking(), ["virtio", "virtio_ring", "virtio_pci", "virtio_blk"]);
    assert_eq!(guest::inspect::arch_on(Arc::clone(&source)).unwrap(), guest.arch);
    let plan = guest::plan(&guest, &Options::default()).unwrap();
    let overlay = Arc::new(Overlay::create(source, &dir.path().join("spool")).unwrap());
    let tally = Tally::default();
    let sealed = guest::apply(&plan, &overlay, &setup(dir.path()), &tally).unwrap();
    assert!(!sealed.dirty.is_empty());
    gone(dir.path());
    assert_eq!(checksum(&disk), before);

    let proofs = guest::prove(&plan, overlay.clone()).unwrap();
    assert!(proofs.len() > 5 && proofs.iter().all(|proof| proof.holds), "{proofs:#?}");
    let fixed = guest::inspect(overlay.clone()).unwrap();
    assert!(fixed.kernels[0].lacking().is_empty());
    let record = fixed.tree.text("/var/lib/initramfs-tools/6.1.0-1-test").unwrap().unwrap();
    assert!(record.ends_with("  /boot/initrd.img-6.1.0-1-test\n"), "{record}");
    assert!(!fixed.tree.exists("/var/tmp/sda").unwrap(), "a guest's program made a device node");
    let seen = |name: &str| fixed.tree.text(&format!("/etc/box-{name}")).unwrap().unwrap();
    // CHOWN to SETUID without SETPCAP, LINUX_IMMUTABLE, SYS_CHROOT, SETFCAP.
    assert!(seen("status").contains("CapEff:\t00000000800402ff\n"), "{}", seen("status"));
    assert!(seen("status").contains("CapBnd:\t00000000800402ff\n"), "{}", seen("status"));
    assert!(seen("status").contains("NoNewPrivs:\t1\n"), "{}", seen("status"));
    let points: Vec<String> =
        seen("mounts").lines().map(|line| line.split(' ').nth(4).unwrap().to_owned()).collect();
    let expected = |point: &String| {
        point == "/" || ["/dev", "/proc", "/sys", "/run"].iter().any(|at| point.starts_with(at))
    };
    assert!(points.iter().all(expected), "{points:?}");
    for covered in ["/proc/kallsyms", "/proc/swaps", "/proc/fs", "/proc/sys"] {
        assert!(points.iter().any(|point| point == covered), "{covered} in {points:?}");
    }
    let dev = "/dev/fd /dev/full /dev/null /dev/random /dev/shm /dev/stderr /dev/stdin /dev/stdout /dev/tty /dev/urandom /dev/zero\n";
    assert_eq!((seen("dev").as_str(), seen("sys").as_str()), (dev, "/sys/*\n"));
    assert!(seen("processes").split(' ').count() < 6, "{}", seen("processes"));
    assert!(!fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap().contains("haul-was-here"));
    // The copy passes the file system's own check.
    let copy = dir.path().join("copy.raw");
    let mut bytes = vec![0; 256 << 20];
    overlay.read_at(&mut bytes, 0).unwrap();
    fs::write(&copy, bytes).unwrap();
    run("e2fsck", &["-fn", copy.to_str().unwrap()]);
    let made: Vec<&str> =
        plan.fixes.iter().filter(|fix| matches!(fix, Fix::Create { .. })).map(Fix::path).collect();
    assert!(!made.is_empty(), "{plan}");
    for path in made {
        let command = format!("ea_get {path} security.selinux");
        let label = run("debugfs", &["-R", &command, copy.to_str().unwrap()]);
        assert!(label.contains("system_u:object_r:etc_t:s0"), "{path}: {label}");
    }
}

/// The small guest's tree on another file system: on btrfs in the subvolume `root`, and /var in one of its own.
fn on_file_system(folder: &Path, kind: &str, root: &str) -> PathBuf {
    small_guest(folder, "cp /good.img $out");
    let (tree, disk, mount) = (folder.join("tree"), folder.join(format!("{kind}.raw")), folder.join("mount"));
    let (tree, path, point) = (tree.to_str().unwrap(), disk.to_str().unwrap(), mount.to_str().unwrap());
    fs::File::create(&disk).unwrap().set_len(400 << 20).unwrap();
    fs::create_dir_all(&mount).unwrap();
    run(&format!("mkfs.{kind}"), &["-q", path]);
    run("mount", &["-o", "loop", path, point]);
    let fstab = match kind {
        "btrfs" => {
            run("btrfs", &["-q", "subvolume", "create", &format!("{point}/{root}")]);
            run("btrfs", &["-q", "subvolume", "create", &format!("{point}/@var")]);
            run("cp", &["-a", &format!("{tree}/."), &format!("{point}/{root}")]);
            run("sh", &["-c", &format!("mv {point}/{root}/var/* {point}/@var/")]);
            format!(
                "/dev/sda / btrfs defaults,subvol=/{root} 0 0\n/dev/sda /var btrfs compress=zstd,subvol=@var 0 0\n"
            )
        }
        _ => {
            run("cp", &["-a", &format!("{tree}/."), point]);
            "/dev/sda / xfs defaults 0 0\n".to_owned()
        }
    };
    let top = format!("{point}/{root}");
    fs::write(format!("{top}/etc/fstab"), fstab).unwrap();
    if kind == "btrfs" {
        // As GRUB writes it: counted from the top level.
        let menu = fs::read_to_string(format!("{top}/boot/grub/grub.cfg")).unwrap();
        fs::write(format!("{top}/boot/grub/grub.cfg"), menu.replace(" /boot/", &format!(" /{root}/boot/")))
            .unwrap();
    }
    run("umount", &[point]);
    // A mount namespace that another test opens at this moment holds it, and it is written until it is let go.
    gone(folder);
    disk
}

/// Fixes the small guest on `disk`, which has these mount points, in an overlay: the plan, which it proves.
fn fixed_where_it_lies(folder: &Path, disk: &Path, points: &[&str]) -> String {
    let before = checksum(disk);
    let source = opened(disk);
    let guest = guest::inspect(Arc::clone(&source)).unwrap();
    assert!(guest.stale.is_empty() && guest.unread.is_empty(), "{:?} {:?}", guest.stale, guest.unread);
    let found: Vec<&str> = guest.mounts.iter().map(|mounted| mounted.point.as_str()).collect();
    assert_eq!(found, points);
    let plan = guest::plan(&guest, &Options::default()).unwrap();
    let overlay = Arc::new(Overlay::create(source, &folder.join("spool")).unwrap());
    guest::apply(&plan, &overlay, &setup(folder), &Tally::default()).unwrap();
    gone(folder);
    assert_eq!(checksum(disk), before);
    let proofs = guest::prove(&plan, overlay.clone()).unwrap();
    assert!(proofs.len() > 5 && proofs.iter().all(|proof| proof.holds), "{proofs:#?}");
    let fixed = guest::inspect(overlay.clone()).unwrap();
    assert!(fixed.kernels[0].lacking().is_empty());
    if let Some(record) = fixed.tree.text("/var/lib/initramfs-tools/6.1.0-1-test").unwrap() {
        assert!(record.ends_with("  /boot/initrd.img-6.1.0-1-test\n"), "{record}");
    }
    let again = guest::plan(&fixed, &Options::default()).unwrap();
    assert!(again.is_empty(), "{again}");
    plan.to_string()
}

#[test]
fn a_guest_on_xfs_or_in_subvolumes_of_btrfs_is_fixed_where_it_lies() {
    let cases =
        [("xfs", "", &["/"][..]), ("btrfs", "@", &["/", "/var"]), ("btrfs", "@rootfs", &["/", "/var"])];
    for (kind, root, points) in cases {
        let dir = tempfile::tempdir().unwrap();
        let disk = on_file_system(dir.path(), kind, root);
        fixed_where_it_lies(dir.path(), &disk, points);
    }
}

#[test]
fn a_btrfs_whose_original_is_mounted_is_fixed_and_keeps_its_uuid() {
    let dir = tempfile::tempdir().unwrap();
    let disk = on_file_system(dir.path(), "btrfs", "@");
    let original = dir.path().join("original.raw");
    run("cp", &["--sparse=always", disk.to_str().unwrap(), original.to_str().unwrap()]);
    let mounted = support::LoopMount::new(&original, "");
    let source = opened(&disk);
    let plan = guest::plan(&guest::inspect(Arc::clone(&source)).unwrap(), &Options::default()).unwrap();
    let overlay = Arc::new(Overlay::create(source, &dir.path().join("spool")).unwrap());
    let seen = SeesBtrfs::default();
    guest::apply(&plan, &overlay, &setup(dir.path()), &seen).unwrap();
    drop(mounted);
    gone(dir.path());
    assert!(guest::prove(&plan, overlay.clone()).unwrap().iter().all(|proof| proof.holds));

    let copy = dir.path().join("copy.raw");
    let bytes = haul::io::read_vec(&overlay, 0, usize::try_from(overlay.size()).unwrap()).unwrap();
    fs::write(&copy, bytes).unwrap();
    run("btrfs", &["check", "--readonly", "--check-data-csum", copy.to_str().unwrap()]);
    let identity = |path: &Path, copy: &str| {
        let all = run("btrfs", &["inspect-internal", "dump-super", "-s", copy, path.to_str().unwrap()]);
        let of = ["fsid", "metadata_uuid", "incompat_flags", "dev_item.fsid", "dev_item.uuid"];
        let lines = all.lines().filter(|line| of.contains(&line.split_whitespace().next().unwrap_or("")));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    for superblock in ["0", "1"] {
        let identity = |path: &Path| identity(path, superblock);
        assert_eq!(identity(&copy), identity(&original));
        assert_eq!(identity(&copy).len(), 5);
    }
    let fsid = &identity(&original, "0")[0];
    let others = seen.0.into_inner().unwrap();
    assert!(others.iter().any(|other| !fsid.contains(other.as_str())), "{others:?}");
}

/// The UUIDs of the btrfs that are mounted while a plan is carried out.
#[derive(Default)]
struct SeesBtrfs(std::sync::Mutex<BTreeSet<String>>);

impl Monitor for SeesBtrfs {
    fn begin(&self, _: &'static str, _: Option<u64>) {}
    fn count(&self, _: haul::monitor::Counter, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: haul::monitor::Level, _: &str) {
        let names = fs::read_dir("/sys/fs/btrfs").unwrap().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        self.0.lock().unwrap().extend(names.filter(|name| name.len() == 36));
    }
}

/// A GPT with an EFI system partition of these files, in folders of these names, and `tree` as the root.
fn with_esp(folder: &Path, tree: &Path, folders: &[&str], files: &[(&str, &[u8])]) -> PathBuf {
    let image = |name: &str, size: u64| {
        let path = folder.join(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (esp, root) = (image("esp.fs", 40 << 20), image("root.fs", 256 << 20));
    run("mkfs.ext4", &["-qF", "-d", tree.to_str().unwrap(), &root]);
    run("mkfs.fat", &["-F", "32", "-s", "1", "-i", "6696244F", &esp]);
    for made in folders {
        run("mmd", &["-i", &esp, &format!("::/{made}")]);
    }
    for (name, content) in files {
        let from = folder.join("from");
        fs::write(&from, content).unwrap();
        run("mcopy", &["-i", &esp, from.to_str().unwrap(), &format!("::/{name}")]);
    }
    let disk = folder.join("uefi.raw");
    fs::File::create(&disk).unwrap().set_len(300 << 20).unwrap();
    let table = "label: gpt\nstart=1MiB, size=40MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n\
                 start=41MiB, size=256MiB, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n";
    run("sh", &["-c", &format!("printf '{table}' | sfdisk -q {}", disk.to_str().unwrap())]);
    let out = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    out.write_all_at(&fs::read(esp).unwrap(), 1 << 20).unwrap();
    out.write_all_at(&fs::read(root).unwrap(), 41 << 20).unwrap();
    disk
}

/// The small guest on a GPT, booted by UEFI: with a loader that only its own firmware's boot entry names.
fn by_uefi(folder: &Path) -> PathBuf {
    small_guest(folder, "cp /good.img $out");
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("boot/efi")).unwrap();
    let fstab = "/dev/sda2 / ext4 defaults 0 1\n/dev/sda1 /boot/efi vfat umask=0077 0 1\n";
    fs::write(tree.join("etc/fstab"), fstab).unwrap();
    let menu = fs::read_to_string(tree.join("boot/grub/grub.cfg")).unwrap();
    fs::write(tree.join("boot/grub/grub.cfg"), menu.replace("root=/dev/sda", "root=/dev/sda2")).unwrap();
    let menu = b"linux /boot/vmlinuz-6.1.0-1-test root=/dev/sda2\ninitrd /boot/initrd.img-6.1.0-1-test\n";
    let files = [
        ("EFI/debian/shimx64.efi", &[1; 900_000][..]),
        ("EFI/debian/grubx64.efi", &[2; 2_500_000]),
        ("EFI/debian/grub.cfg", menu),
    ];
    with_esp(folder, &tree, &["EFI", "EFI/debian"], &files)
}

/// The small guest booted by systemd-boot: kernel and initramfs lie on the EFI system partition.
fn with_boot_on_the_esp(folder: &Path) -> PathBuf {
    small_guest(folder, "exit 1");
    let tree = folder.join("tree");
    let fstab = "/dev/sda2 / ext4 defaults 0 1\n/dev/sda1 /boot vfat umask=0077 0 1\n";
    fs::write(tree.join("etc/fstab"), fstab).unwrap();
    fs::remove_dir_all(tree.join("var/lib/initramfs-tools")).unwrap();
    fs::remove_dir_all(tree.join("boot")).unwrap();
    fs::create_dir(tree.join("boot")).unwrap();
    let entry = b"title Small\nlinux /vmlinuz-6.1.0-1-test\ninitrd /initrd.img-6.1.0-1-test\noptions root=/dev/sda2\n";
    let initrd = phony::with_init(&["ahci"], "#!/bin/sh\n");
    let files = [
        ("EFI/systemd/systemd-bootx64.efi", &[1; 100_000][..]),
        ("EFI/BOOT/BOOTX64.EFI", &[1; 100_000]),
        ("vmlinuz-6.1.0-1-test", b"kernel"),
        ("initrd.img-6.1.0-1-test", &initrd),
        ("loader/loader.conf", b"timeout 3\n"),
        ("loader/entries/small.conf", entry),
    ];
    with_esp(folder, &tree, &["EFI", "EFI/BOOT", "EFI/systemd", "loader", "loader/entries"], &files)
}

#[test]
fn an_initramfs_on_the_efi_system_partition_gets_drivers_appended() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_boot_on_the_esp(dir.path());
    let plan = fixed_where_it_lies(dir.path(), &disk, &["/", "/boot"]);
    assert!(plan.contains("! append to /boot/initrd.img-6.1.0-1-test"), "{plan}");
}

#[test]
fn a_guest_by_uefi_gets_a_loader_where_new_firmware_looks() {
    let dir = tempfile::tempdir().unwrap();
    let disk = by_uefi(dir.path());
    let plan = fixed_where_it_lies(dir.path(), &disk, &["/", "/boot/efi"]);
    for copied in
        ["shimx64.efi to /boot/efi/EFI/BOOT/BOOTX64.EFI", "grubx64.efi to /boot/efi/EFI/BOOT/grubx64.efi"]
    {
        assert!(plan.contains(&format!("! copy /boot/efi/EFI/debian/{copied}")), "{plan}");
    }
    assert!(plan.contains("+UUID=6696-244F /boot/efi vfat"), "{plan}");
    let edited = plan.find("b/boot/efi/EFI/debian/grub.cfg").unwrap();
    assert!(edited < plan.find("grub.cfg to /boot/efi/EFI/BOOT/grub.cfg").unwrap(), "{plan}");
}

/// The small guest with its root in a logical volume that lies on two partitions, and /var in a striped one.
fn in_logical_volumes(folder: &Path) -> PathBuf {
    small_guest(folder, "cp /good.img $out");
    let tree = folder.join("tree");
    let at = |path: &str| tree.join(path.trim_start_matches('/'));
    fs::write(
        at("/etc/fstab"),
        "/dev/mapper/vg--x-root / ext4 defaults 0 1\n/dev/vg-x/var /var ext4 defaults 0 2\n",
    )
    .unwrap();
    let menu = fs::read_to_string(at("/boot/grub/grub.cfg")).unwrap();
    fs::write(at("/boot/grub/grub.cfg"), menu.replace("root=/dev/sda", "root=/dev/mapper/vg--x-root"))
        .unwrap();
    fs::create_dir_all(at("/etc/lvm/devices")).unwrap();
    fs::write(at("/etc/lvm/devices/system.devices"), "IDTYPE=sys_wwid IDNAME=naa.6000\n").unwrap();
    fs::write(at("/etc/lvm/lvm.conf"), "devices {\n\tfilter = [ \"a|/dev/sda|\", \"r|.*|\" ]\n}\n").unwrap();
    fs::rename(at("/var"), folder.join("var")).unwrap();
    fs::create_dir(at("/var")).unwrap();
    let made = |name: &str, size: u64, from: &Path| {
        let image = folder.join(name);
        fs::File::create(&image).unwrap().set_len(size).unwrap();
        run("mkfs.ext4", &["-qF", "-d", from.to_str().unwrap(), image.to_str().unwrap()]);
        fs::read(image).unwrap()
    };
    let (root, var) = (made("root.fs", 256 << 20, &tree), made("var.fs", 64 << 20, &folder.join("var")));

    let disk = folder.join("lvm.raw");
    fs::File::create(&disk).unwrap().set_len(480 << 20).unwrap();
    let table = "label: dos\n2048,407552,8e\n409600,,8e\n";
    run("sh", &["-c", &format!("printf '{table}' | sfdisk -q {}", disk.to_str().unwrap())]);
    let parts = [Extent::new(1 << 20, 200 << 20), Extent::new(200 << 20, 480 << 20)];
    let lvm = Lvm::attach(&parts.map(|part| (disk.as_path(), part)));
    lvm.group("vg-x", "", "");
    lvm.create("var", "-i 2 -I 64k -L 64m vg-x");
    lvm.create("root", "-L 256m vg-x");
    let places = lvm.places("vg-x");
    assert!(places["root"].len() > 1, "the root is in one piece");
    lvm::write(&places["root"], &root);
    lvm::write(&places["var"], &var);
    disk
}

#[test]
fn a_guest_in_logical_volumes_is_fixed_where_it_lies() {
    let dir = tempfile::tempdir().unwrap();
    let disk = in_logical_volumes(dir.path());
    let plan = fixed_where_it_lies(dir.path(), &disk, &["/", "/var"]);
    assert!(plan.contains("a/etc/lvm/devices/system.devices") && plan.contains("+# \tfilter = "), "{plan}");
    assert!(!plan.contains("fstab"), "names of volumes last: {plan}");
}

/// The small guest with its root on a mirror of which this disk has one member, or in a logical volume on it.
fn on_a_mirror(folder: &Path, version: &str, logical: bool) -> PathBuf {
    let (device, most) = if logical { ("/dev/mapper/vg-root", 200 << 20) } else { ("/dev/md0", u64::MAX) };
    small_guest(folder, "cp /good.img $out");
    let tree = folder.join("tree");
    fs::write(tree.join("etc/fstab"), format!("{device} / ext4 defaults 0 1\n")).unwrap();
    fs::create_dir_all(tree.join("etc/mdadm")).unwrap();
    let arrays = format!("ARRAY /dev/md0 metadata={version} UUID={} name=source:root\n", mirror::ARRAY);
    fs::write(tree.join("etc/mdadm/mdadm.conf"), arrays).unwrap();
    let menu = fs::read_to_string(tree.join("boot/grub/grub.cfg")).unwrap();
    fs::write(tree.join("boot/grub/grub.cfg"), menu.replace("root=/dev/sda", &format!("root={device}")))
        .unwrap();
    let part = folder.join("part");
    fs::File::create(&part).unwrap().set_len(256 << 20).unwrap();
    let (start, len) = mirror::member(&part, version, "source:root");
    let seen = run("mdadm", &["--examine", part.to_str().unwrap()]);
    let told = ["Raid Level : raid1", "State : clean", "- correct", mirror::ARRAY];
    assert!(told.iter().all(|told| seen.contains(told)), "{seen}");
    let data = folder.join("data");
    fs::File::create(&data).unwrap().set_len(most.min(len & !0xfff)).unwrap();
    run("mkfs.ext4", &["-qF", "-d", tree.to_str().unwrap(), data.to_str().unwrap()]);
    let disk = folder.join("mirror.raw");
    let out = fs::File::create(&disk).unwrap();
    out.set_len(260 << 20).unwrap();
    let table = "label: dos\n2048,524288,fd\n";
    run("sh", &["-c", &format!("printf '{table}' | sfdisk -q {}", disk.to_str().unwrap())]);
    out.write_all_at(&fs::read(part).unwrap(), 1 << 20).unwrap();
    let data = fs::read(data).unwrap();
    if logical {
        let lvm = Lvm::attach(&[(&disk, Extent::at((1 << 20) + start, len))]);
        lvm.group("vg", "", "");
        lvm.create("root", "-L 200m vg");
        lvm::write(&lvm.places("vg")["root"], &data);
    } else {
        out.write_all_at(&data, (1 << 20) + start).unwrap();
    }
    disk
}

#[test]
fn a_guest_on_one_half_of_a_mirror_is_fixed_where_it_lies() {
    for version in ["1.2", "1.1", "1.0", "0.90"] {
        let dir = tempfile::tempdir().unwrap();
        let disk = on_a_mirror(dir.path(), version, false);
        let plan = fixed_where_it_lies(dir.path(), &disk, &["/"]);
        assert!(plan.contains("-/dev/md0 / ext4") && plan.contains("+UUID="), "{version}: {plan}");
        assert!(
            plan.contains("mirror of 2 disks") && plan.contains("mdadm --grow /dev/md0"),
            "{version}: {plan}"
        );
    }
}

#[test]
fn a_guest_in_a_logical_volume_on_one_half_of_a_mirror_is_fixed_where_it_lies() {
    for version in ["1.2", "1.0"] {
        let dir = tempfile::tempdir().unwrap();
        let disk = on_a_mirror(dir.path(), version, true);
        let plan = fixed_where_it_lies(dir.path(), &disk, &["/"]);
        assert!(!plan.contains("fstab"), "names of volumes last: {version}: {plan}");
        assert!(
            plan.contains("/ is on a mirror of 2 disks") && plan.contains("mdadm --grow /dev/md0"),
            "{version}: {plan}"
        );
    }
}

#[test]
fn a_data_volume_that_cannot_be_read_is_told_and_no_hindrance() {
    let dir = tempfile::tempdir().unwrap();
    let disk = small_guest(dir.path(), "cp /good.img $out");
    let root = fs::read(&disk).unwrap();
    let both = dir.path().join("both.raw");
    fs::File::create(&both).unwrap().set_len(512 << 20).unwrap();
    let table = "label: dos\n2048,524288,83\n526336,,83\n";
    run("sh", &["-c", &format!("printf '{table}' | sfdisk -q {}", both.to_str().unwrap())]);
    let data = dir.path().join("data.fs");
    fs::File::create(&data).unwrap().set_len(120 << 20).unwrap();
    run("mkfs.btrfs", &["-q", data.to_str().unwrap()]);
    let mut data = fs::read(data).unwrap();
    // Its chunk tree and every other tree: the superblock alone is left.
    data[1 << 20..].fill(0xff);
    let file = fs::OpenOptions::new().write(true).open(&both).unwrap();
    for (bytes, at) in [(root, 1 << 20), (data, 257 << 20)] {
        file.write_all_at(&bytes, at).unwrap();
    }
    let guest = guest::inspect(opened(&both)).unwrap();
    assert!(guest.unread.len() == 1 && guest.unread[0].contains("partition 2"), "{:?}", guest.unread);
    let plan = guest::plan(&guest, &Options::default()).unwrap();
    assert!(plan.findings.iter().any(|finding| finding.id == "disk.unread"), "{plan}");
}

#[test]
fn a_guest_program_that_fails_or_leaves_virtio_out_fails_the_job_and_leaves_nothing() {
    for (build, id) in
        [("exit 3", "guest.initramfs"), ("cp /boot/initrd.img-6.1.0-1-test $out", "guest.initramfs")]
    {
        let dir = tempfile::tempdir().unwrap();
        let disk = small_guest(dir.path(), build);
        let source = opened(&disk);
        let plan = guest::plan(&guest::inspect(Arc::clone(&source)).unwrap(), &Options::default()).unwrap();
        let overlay = Arc::new(Overlay::create(source, &dir.path().join("spool")).unwrap());
        let error = guest::apply(&plan, &overlay, &setup(dir.path()), &Tally::default()).unwrap_err();
        assert_eq!(error.facts(), [("cause", id.to_owned())], "{error:?}");
        assert!(!overlay.is_sealed());
        gone(dir.path());
    }
}

/// A dpkg that writes down how it is called, then does this.
fn with_dpkg(folder: &Path, then: &str) -> PathBuf {
    let tree = small_tree(folder, "cp /good.img $out", &initramfs(&["ahci"]));
    fs::remove_file(tree.join("usr/bin/cloud-init")).unwrap();
    fs::remove_dir_all(tree.join("etc/cloud")).unwrap();
    let dpkg = tree.join("usr/bin/dpkg");
    let script = format!(
        "#!/bin/sh\nexec 3> /etc/told\necho \"$@\" >&3\n/usr/sbin/policy-rc.d\necho \"$? $DEBIAN_FRONTEND\" >&3\n\
         for last; do :; done\ncat $last >&3\n{then}\n"
    );
    fs::write(&dpkg, script).unwrap();
    run("chmod", &["755", dpkg.to_str().unwrap()]);
    fs::create_dir_all(tree.join("var/lib/dpkg")).unwrap();
    on_ext4(folder)
}

#[test]
fn packages_are_installed_by_the_guests_own_program_and_nothing_of_it_stays() {
    let dir = tempfile::tempdir().unwrap();
    let installs = "touch /usr/bin/cloud-init\n\
                    printf 'Package: cloud-init\\nVersion: 22.4.2-1\\nStatus: install ok installed\\n' > /var/lib/dpkg/status";
    let source = opened(&with_dpkg(dir.path(), installs));
    let names = ["python3-netifaces_0.11.0-2_amd64.deb", "cloud-init_22.4.2-1_all.deb"];
    let packages: Vec<PathBuf> = names.iter().map(|name| dir.path().join(name)).collect();
    for package in &packages {
        fs::write(package, format!("this is {}\n", package.file_name().unwrap().display())).unwrap();
    }
    let options = Options { packages: packages[1..].to_vec(), ..Options::default() };
    // Named twice, it is installed once.
    let packages = [&packages[..], &packages[1..]].concat();
    let options_of_both = Options { packages, ..Options::default() };
    let plan = guest::plan(&guest::inspect(Arc::clone(&source)).unwrap(), &options_of_both).unwrap();
    assert!(matches!(&plan.fixes[0], Fix::Install { .. }), "{plan}");
    let overlay = Arc::new(Overlay::create(Arc::clone(&source), &dir.path().join("spool")).unwrap());
    guest::apply(&plan, &overlay, &setup(dir.path()), &Tally::default()).unwrap();
    gone(dir.path());
    let fixed = guest::inspect(overlay.clone()).unwrap();
    let told = fixed.tree.text("/etc/told").unwrap().unwrap();
    let lines: Vec<&str> = told.lines().collect();
    let [called, answer, content] = lines[..] else { panic!("{told}") };
    let words: Vec<&str> = called.split(' ').map(|word| word.rsplit('/').next().unwrap()).collect();
    assert_eq!(words, ["--install", "--force-confdef", "--force-confold", names[0], names[1]]);
    assert_eq!((answer, content), ("101 noninteractive", "this is cloud-init_22.4.2-1_all.deb"));
    assert!(!fixed.tree.exists("/usr/sbin/policy-rc.d").unwrap());
    assert!(fixed.tree.names("/var/tmp").unwrap().iter().all(|name| !name.starts_with("haul")));
    let again = guest::plan(&fixed, &options).unwrap();
    assert!(again.is_empty(), "{again}");
    // The other one is in no record of this dpkg.
    let broken: Vec<_> =
        guest::prove(&plan, overlay).unwrap().into_iter().filter(|proof| !proof.holds).collect();
    assert!(broken.len() == 1 && broken[0].claim == "python3-netifaces 0.11.0-2 is installed", "{broken:#?}");
}

#[test]
fn a_package_that_cannot_be_installed_fails_the_job_and_leaves_nothing() {
    for is_there in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let source = opened(&with_dpkg(dir.path(), "echo cloud-init depends on python3 >&2; exit 1"));
        let package = dir.path().join("cloud-init_22.4.2-1_all.deb");
        fs::write(&package, "").unwrap();
        let options = Options { packages: vec![package.clone()], ..Options::default() };
        let plan = guest::plan(&guest::inspect(Arc::clone(&source)).unwrap(), &options).unwrap();
        if !is_there {
            fs::remove_file(package).unwrap();
        }
        let overlay = Arc::new(Overlay::create(source, &dir.path().join("spool")).unwrap());
        let error = guest::apply(&plan, &overlay, &setup(dir.path()), &Tally::default()).unwrap_err();
        assert_eq!(error.facts(), [("cause", "guest.package".to_owned())], "{error:?}");
        let expected = if is_there { "depends on python3" } else { "No such file" };
        assert!(error.why().contains(expected), "{error:?}");
        assert!(!overlay.is_sealed());
        gone(dir.path());
    }
}

/// The small guest on a disk with this table, whose last partition it is in, and with the modules of GRUB for both firmwares.
fn on_partition(folder: &Path, table: &str, number: u32, start: u64) -> PathBuf {
    let tree = small_tree(folder, "cp /good.img $out", &initramfs(&["ahci"]));
    let put = |path: &str, text: &str| {
        fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
        fs::write(tree.join(path), text).unwrap();
    };
    for path in ["etc/fstab", "boot/grub/grub.cfg"] {
        let text = fs::read_to_string(tree.join(path)).unwrap();
        put(
            path,
            &text
                .replace("/dev/sda\n", &format!("/dev/sda{number}\n"))
                .replace("/dev/sda ", &format!("/dev/sda{number} "))
                // As Red Hat 7 writes it for BIOS; for UEFI it says `linuxefi`.
                .replace("linux ", "linux16 ")
                .replace("initrd ", "initrd16 "),
        );
    }
    for platform in ["x86_64-efi", "i386-pc"] {
        for name in ["moddep.lst", "normal.mod", "boot.img", "grub.efi"] {
            put(&format!("usr/lib/grub/{platform}/{name}"), &format!("{name} {}", "x".repeat(500)));
        }
    }
    put(
        "usr/bin/grub-mkimage",
        "#!/bin/sh\necho $* > /etc/told\nwhile [ $1 != -o ]; do shift; done\ndd if=/dev/urandom of=$2 bs=1k count=100\n",
    );
    run("chmod", &["755", tree.join("usr/bin/grub-mkimage").to_str().unwrap()]);
    let (fs, disk) = (folder.join("fs"), folder.join("disk.raw"));
    fs::File::create(&fs).unwrap().set_len(200 << 20).unwrap();
    run("mkfs.ext4", &["-qF", "-d", tree.to_str().unwrap(), fs.to_str().unwrap()]);
    let bytes = fs::read(&fs).unwrap();
    fs::File::create(&disk).unwrap().set_len(start + (201 << 20)).unwrap();
    let script = folder.join("table");
    fs::write(&script, table).unwrap();
    run("sh", &["-c", &format!("sfdisk -q {} < {}", disk.display(), script.display())]);
    let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    file.write_all_at(b"boot code", 0).unwrap();
    file.write_all_at(&bytes, start).unwrap();
    disk
}

/// Puts an EFI system partition of 4 MiB, with a distribution's loader, at this MiB of `disk`.
fn put_shim(disk: &Path, at: u64) {
    let (offset, image) = ((at * 2048).to_string(), format!("{}@@{at}M", disk.display()));
    run("mkfs.fat", &["--offset", &offset, "-F", "12", disk.to_str().unwrap(), "4096"]);
    run("mmd", &["-i", &image, "::/EFI", "::/EFI/debian"]);
    run("mcopy", &["-i", &image, "/etc/hostname", "::/EFI/debian/shimx64.efi"]);
}

#[test]
fn a_disk_for_both_firmwares_gets_its_own_loader_where_new_firmware_looks() {
    let dir = tempfile::tempdir().unwrap();
    let table = "label: gpt\nstart=1MiB, size=1MiB, type=21686148-6449-6E6F-744E-656564454649\n\
                 start=2MiB, size=4MiB, type=U\nstart=6MiB, size=200MiB\n";
    let disk = on_partition(dir.path(), table, 3, 6 << 20);
    put_shim(&disk, 2);
    let guest = guest::inspect(opened(&disk)).unwrap();
    assert_eq!(guest.boot, BootMode::Bios);
    let options = Options { firmware: Some(BootMode::Uefi), ..Options::default() };
    let plan = guest::plan(&guest, &options).unwrap();
    let copied = "! copy /boot/efi/EFI/debian/shimx64.efi to /boot/efi/EFI/BOOT/BOOTX64.EFI";
    assert!(plan.to_string().contains(copied), "{plan}");
    assert!(!plan.fixes.iter().any(|fix| matches!(fix, Fix::Partition { .. } | Fix::Grub { .. })), "{plan}");
    let overlay = Arc::new(Overlay::create(opened(&disk), &dir.path().join("spool")).unwrap());
    guest::apply(&plan, &overlay, &setup(dir.path()), &Tally::default()).unwrap();
    gone(dir.path());
    assert!(guest::prove(&plan, overlay.clone()).unwrap().iter().all(|proof| proof.holds), "{plan}");
    let again = guest::plan(&guest::inspect(overlay).unwrap(), &options).unwrap();
    assert!(again.is_empty(), "{again}");
}

#[test]
fn a_disk_gets_a_boot_loader_for_the_other_firmware_beside_its_own() {
    const MIB: u64 = 1 << 20;
    let esp = "start=1MiB, size=4MiB, type=U\n";
    let bios_boot = "start=1MiB, size=1MiB, type=21686148-6449-6E6F-744E-656564454649\n";
    let root = |start: u64| format!("start={start}MiB, size=200MiB\n");
    for (table, number, start, wanted) in [
        (format!("label: dos\n{}", root(1)), 1, MIB, BootMode::Uefi),
        (format!("label: gpt\n{bios_boot}{}", root(2)), 2, 2 * MIB, BootMode::Uefi),
        (format!("label: gpt\n{esp}{}", root(5)), 2, 5 * MIB, BootMode::Bios),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let disk = on_partition(dir.path(), &table, number, start);
        if wanted == BootMode::Bios {
            put_shim(&disk, 1);
        }
        let source = opened(&disk);
        let guest = guest::inspect(Arc::clone(&source)).unwrap();
        assert_ne!(guest.boot, wanted);
        let options = Options { firmware: Some(wanted), ..Options::default() };
        let plan = guest::plan(&guest, &options).unwrap();
        let overlay = Arc::new(Overlay::create(source, &dir.path().join("spool")).unwrap());
        guest::apply(&plan, &overlay, &setup(dir.path()), &Tally::default()).unwrap();
        gone(dir.path());
        let proofs = guest::prove(&plan, overlay.clone()).unwrap();
        assert!(proofs.len() > 5 && proofs.iter().all(|proof| proof.holds), "{plan}{proofs:#?}");
        let fixed = guest::inspect(overlay.clone()).unwrap();
        let again = guest::plan(&fixed, &options).unwrap();
        assert!(again.is_empty(), "{again}");

        let copy = dir.path().join("copy.raw");
        fs::write(&copy, haul::io::read_vec(&overlay, 0, usize::try_from(overlay.size()).unwrap()).unwrap())
            .unwrap();
        let copy = copy.to_str().unwrap();
        run("sfdisk", &["--verify", copy]);
        let added = plan.fixes.iter().find_map(|fix| match fix {
            Fix::Partition { start, end, .. } => Some((*start, *end)),
            _ => None,
        });
        let (start, end) = added.unwrap();
        let part = haul::io::read_vec(&overlay, start, usize::try_from(end - start).unwrap()).unwrap();
        let read = |path: &str| {
            let mut bytes = Vec::new();
            fixed.tree.open(path).unwrap().unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        let told = fixed.tree.text("/etc/told").unwrap().unwrap();
        let first = haul::io::read_vec(&overlay, 0, 512).unwrap();
        if wanted == BootMode::Uefi {
            assert!(
                told.contains("-O x86_64-efi -d /usr/lib/grub/x86_64-efi") && told.ends_with("ext2\n"),
                "{told}"
            );
            // It boots by BIOS as before.
            assert!(first.starts_with(b"boot code"));
            let esp = dir.path().join("esp");
            fs::write(&esp, part).unwrap();
            run("fsck.fat", &["-n", esp.to_str().unwrap()]);
            let loader = dir.path().join("loader");
            run("mcopy", &["-i", esp.to_str().unwrap(), "::/EFI/BOOT/BOOTX64.EFI", loader.to_str().unwrap()]);
            assert_eq!(fs::read(loader).unwrap(), read("/boot/grub/x86_64-efi/core.efi"));
        } else {
            assert!(told.contains("-O i386-pc") && told.contains(" biosdisk "), "{told}");
            let core = read("/boot/grub/i386-pc/core.img");
            let sector = (start / 512).to_le_bytes();
            assert_eq!(first[..0x5c], read("/boot/grub/i386-pc/boot.img")[..0x5c]);
            assert_eq!((&first[0x5c..0x64], &first[0x64..0x68]), (&sector[..], b"\xffx\x90\x90".as_slice()));
            assert_eq!(first[440..], haul::io::read_vec(&opened(&disk), 440, 72).unwrap());
            assert_eq!(part[..0x1f4], core[..0x1f4]);
            assert_eq!(part[0x1f4..0x1fc], (start / 512 + 1).to_le_bytes());
            assert_eq!(part[0x1fc..core.len()], core[0x1fc..]);
        }
        // Both firmwares read this menu.
        let menu = fixed.tree.text("/boot/grub/grub.cfg").unwrap().unwrap();
        assert!(menu.starts_with("linux /boot/vmlinuz-") && menu.contains("\ninitrd /boot/"), "{menu}");
        let text = fixed.tree.text("/boot/grub/x86_64-efi/load.cfg").unwrap();
        let text = text.or_else(|| fixed.tree.text("/boot/grub/i386-pc/load.cfg").unwrap()).unwrap();
        let uuid = fixed
            .filesystems
            .iter()
            .find_map(|fs| fs.uuid.clone().filter(|_| fs.point.as_deref() == Some("/")));
        assert_eq!(text, format!("search.fs_uuid {} root\nset prefix=($root)/boot/grub\n", uuid.unwrap()));
    }
}

/// A monitor that keeps the warnings.
#[derive(Default)]
struct Warnings(std::sync::Mutex<Vec<String>>);

impl Monitor for Warnings {
    fn begin(&self, _: &'static str, _: Option<u64>) {}
    fn count(&self, _: haul::monitor::Counter, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, level: haul::monitor::Level, text: &str) {
        if level == haul::monitor::Level::Warning {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }
}

#[test]
fn where_the_guests_program_fails_drivers_are_appended_to_the_initramfs_that_is_there() {
    for (build, no_guest_programs) in [("exit 1", false), ("touch /ran", true)] {
        let dir = tempfile::tempdir().unwrap();
        let disk = small_guest_with(dir.path(), build, &phony::with_init(&["ahci"], "#!/bin/sh\n"));
        let source = opened(&disk);
        let options = Options { no_guest_programs, ..Options::default() };
        let plan = guest::plan(&guest::inspect(Arc::clone(&source)).unwrap(), &options).unwrap();
        assert_eq!(plan.to_string().contains("! append to /boot/initrd.img"), no_guest_programs, "{plan}");
        let overlay = Arc::new(Overlay::create(source, &dir.path().join("spool")).unwrap());
        let said = Warnings::default();
        guest::apply(&plan, &overlay, &setup(dir.path()), &said).unwrap();
        gone(dir.path());
        let said = said.0.into_inner().unwrap();
        // That the guest's own program fails is to be mended; that it was not to run is not.
        assert_eq!(said.len(), usize::from(!no_guest_programs), "{said:?}");
        assert!(
            said.iter().all(|text| text.contains("6.1.0-1-test") && text.contains("drivers")),
            "{said:?}"
        );
        let proofs = guest::prove(&plan, overlay.clone()).unwrap();
        assert!(proofs.len() > 5 && proofs.iter().all(|proof| proof.holds), "{proofs:#?}");
        let fixed = guest::inspect(overlay).unwrap();
        assert!(fixed.kernels[0].lacking().is_empty());
        assert!(!fixed.tree.exists("/ran").unwrap(), "a program of the guest ran");
        let image = "/boot/initrd.img-6.1.0-1-test";
        let mut bytes = Vec::new();
        fixed.tree.open(image).unwrap().unwrap().read_to_end(&mut bytes).unwrap();
        let copy = dir.path().join("initrd");
        fs::write(&copy, &bytes).unwrap();
        // update-initramfs takes it for its own work still.
        let record = fixed.tree.text("/var/lib/initramfs-tools/6.1.0-1-test").unwrap().unwrap();
        let sum = run("sha1sum", &[copy.to_str().unwrap()]);
        assert_eq!(record, format!("{}  {image}\n", &sum[..40]));
    }
}

#[test]
fn what_a_journal_not_yet_replayed_has_committed_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    small_tree(dir.path(), "exit 0", &initramfs(&["ahci"]));
    let point = dir.path().join("mnt");
    fs::create_dir(&point).unwrap();
    for (options, mounted) in [
        ("ext4", "loop"),
        // Servers of before 2015: no checksums, numbers of 32 bits, no extents.
        ("ext4 -O ^metadata_csum,^64bit", "loop"),
        ("ext4 -O ^metadata_csum,64bit -b 1024", "loop,journal_checksum"),
        ("ext3", "loop"),
    ] {
        let disk = on_ext_by(dir.path(), options);
        let (from, to) = (disk.to_str().unwrap(), point.to_str().unwrap());
        run("mount", &["-o", mounted, from, to]);
        // Below a new folder: the file's name, its inode and the folder's are in the journal.
        fs::rename(point.join("etc"), point.join("old")).unwrap();
        run("cp", &["-a", &format!("{to}/old"), &format!("{to}/etc")]);
        fs::write(point.join("etc/hostname"), "from-the-journal\n").unwrap();
        run("sync", &["-f", to]);
        // As a power cut would leave it: committed, in part only in the journal.
        let torn = dir.path().join("torn.raw");
        run("cp", &[from, torn.to_str().unwrap()]);
        run("umount", &[to]);
        assert!(run("dumpe2fs", &["-h", torn.to_str().unwrap()]).contains("needs_recovery"));
        let guest = guest::inspect(opened(&torn)).unwrap();
        assert_eq!(guest.hostname.as_deref(), Some("from-the-journal"), "{options}");
    }
}

/// A monitor that prints, for the process that is killed below.
struct Printer;

impl Monitor for Printer {
    fn begin(&self, phase: &'static str, _: Option<u64>) {
        println!("begin {phase}");
    }
    fn count(&self, _: haul::monitor::Counter, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: haul::monitor::Level, text: &str) {
        println!("note {text}");
    }
}

/// Not a test of its own: the process that the kill tests kill. Does nothing without its variable.
#[test]
fn helper_applies_a_plan() {
    let Some(folder) = std::env::var_os("HAUL_TEST_APPLY").map(PathBuf::from) else { return };
    let source = opened(&folder.join("disk.raw"));
    let plan = guest::plan(&guest::inspect(Arc::clone(&source)).unwrap(), &Options::default()).unwrap();
    let overlay = Arc::new(Overlay::create(source, &folder.join("spool")).unwrap());
    let outcome = guest::apply(&plan, &overlay, &setup(&folder), &Printer);
    println!("ended {}", outcome.is_ok());
}

/// Who is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Server,
    Owner,
    Both,
}

/// Starts the job, waits for `ready`, kills, and checks that nothing is left, and that the next job ends well: how long it
/// took until nothing was left.
fn kill_at(build: &str, victim: Victim, mut ready: impl FnMut(&str, &Path) -> bool) -> Duration {
    let dir = tempfile::tempdir().unwrap();
    let disk = small_guest_with(dir.path(), build, &phony::with_init(&["ahci"], "#!/bin/sh\n"));
    let before = checksum(&disk);
    // Not by its path: a build may have put another program there.
    let mut job = Command::new("/proc/self/exe")
        .args(["--exact", "helper_applies_a_plan", "--nocapture"])
        .env("HAUL_TEST_APPLY", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(job.stdout.take().unwrap()).lines();
    let spool = dir.path().join("spool");
    loop {
        let line = lines.next().expect("the job ended before it could be killed").unwrap();
        assert!(!line.contains("ended"), "the job ended before it could be killed: {line}");
        if ready(&line, &spool) {
            break;
        }
    }
    let children = run("pgrep", &["-P", &job.id().to_string()]);
    let owner = children.lines().next().expect("the job has no child");
    let killed = Instant::now();
    match victim {
        Victim::Server => job.kill().unwrap(),
        Victim::Owner => drop(run("kill", &["-KILL", owner])),
        Victim::Both => drop(run("kill", &["-KILL", owner, &job.id().to_string()])),
    }
    gone(dir.path());
    let time = killed.elapsed();
    job.wait().unwrap();
    assert_eq!(checksum(&disk), before);
    assert!(
        Overlay::reopen(opened(&disk), &spool).unwrap().is_none(),
        "a killed job left a finished overlay"
    );
    let source = opened(&disk);
    let options = Options { no_guest_programs: true, ..Options::default() };
    let plan = guest::plan(&guest::inspect(Arc::clone(&source)).unwrap(), &options).unwrap();
    let overlay = Arc::new(Overlay::create(source, &spool).unwrap());
    guest::apply(&plan, &overlay, &setup(dir.path()), &Tally::default()).unwrap();
    gone(dir.path());
    assert!(guest::prove(&plan, overlay).unwrap().iter().all(|proof| proof.holds));
    time
}

/// Dirty pages in the loop device and in the guest's file system, then a long wait.
const DIRTY: &str = "dd if=/dev/urandom of=/var/tmp/dirty bs=1M count=64 2>/dev/null; sleep 1000";

fn after_edit(line: &str, _: &Path) -> bool {
    line.contains("edited /etc/fstab")
}

fn after_dirt(line: &str, spool: &Path) -> bool {
    if !line.contains("edited /etc/initramfs-tools/modules") {
        return false;
    }
    wait_for_writes(spool, 8 << 20);
    true
}

/// Waits until the overlay has taken this much, in bytes: it does when the kernel thinks fit; the rest is dirty.
fn wait_for_writes(spool: &Path, bytes: u64) {
    let written = Inotify::init(InitFlags::empty()).unwrap();
    written.add_watch(spool, AddWatchFlags::IN_MODIFY).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::os::unix::fs::MetadataExt::blocks(&fs::metadata(spool).unwrap()) * 512 < bytes {
        if !ready(&[written.as_fd()], deadline) {
            break;
        }
        written.read_events().unwrap();
    }
}

#[test]
fn killing_the_server_early_leaves_nothing() {
    kill_at(DIRTY, Victim::Server, after_edit);
}

#[test]
fn killing_the_server_with_dirty_pages_leaves_nothing() {
    kill_at(DIRTY, Victim::Server, after_dirt);
}

#[test]
fn killing_the_owner_of_the_mounts_with_dirty_pages_leaves_nothing() {
    kill_at(DIRTY, Victim::Owner, after_dirt);
}

#[test]
#[ignore = "long: thirty fix-ups killed; scripts/test.sh --long"]
fn a_fix_up_killed_at_thirty_places_leaves_nothing() {
    let mut random = images::Random(images::seed());
    let mut times = Vec::new();
    for round in 0..30 {
        let victim = [Victim::Server, Victim::Owner, Victim::Both][round % 3];
        let (mut steps, bytes) = (1 + random.below(12), random.below(12 << 20));
        println!("killing {victim:?} after {steps} steps, or with {bytes} bytes written");
        times.push(kill_at(DIRTY, victim, |line, spool| {
            steps -= u64::from(line.contains("note "));
            let dirty = line.contains("edited /etc/initramfs-tools/modules");
            if dirty {
                wait_for_writes(spool, bytes);
            }
            dirty || steps == 0
        }));
    }
    println!("figure: of 30 killed fix-ups nothing was left after {:?} at most", times.iter().max().unwrap());
}

/// A disk of scripts/guests, and what is known of it.
fn debian_disk(options: &[&str]) -> (PathBuf, serde_json::Value) {
    let disk = PathBuf::from(run("scripts/guests/disk.sh", options).trim());
    let facts = fs::read(disk.with_extension("raw.json")).unwrap();
    (disk, serde_json::from_slice(&facts).unwrap())
}

/// Fixes a copy of the disk, proves it, and boots it on virtio hardware only, without a config drive: the beacon's
/// words, with the identity the source had.
fn fixed_and_booted(
    options: &[&str],
    drive: Option<&ConfigDrive>,
    fixes: &Options,
) -> BTreeMap<String, String> {
    let (disk, facts) = debian_disk(options);
    let before = checksum(&disk);
    let dir = tempfile::tempdir().unwrap();
    let source = opened(&disk);
    let guest = guest::inspect(Arc::clone(&source)).unwrap();
    let arch = if options.contains(&"arch=arm64") { "aarch64" } else { "x86_64" };
    assert_eq!((guest.os.id.as_str(), guest.arch), ("debian", arch));
    assert_eq!(guest.kernels.len(), facts["kernels"].as_array().unwrap().len());
    assert!(guest.kernels.iter().all(|kernel| !kernel.lacking().is_empty()));
    let plan = guest::plan(&guest, fixes).unwrap();
    let overlay = Arc::new(Overlay::create(source, &dir.path().join("spool")).unwrap());
    let sealed = guest::apply(&plan, &overlay, &setup(dir.path()), &Tally::default()).unwrap();
    gone(dir.path());
    println!("{plan}{} bytes amended in {} runs", sealed.dirty.bytes(), sealed.dirty.len());
    assert_eq!(checksum(&disk), before);
    let proofs = guest::prove(&plan, overlay.clone()).unwrap();
    assert!(proofs.iter().all(|proof| proof.holds), "{plan}\n{proofs:#?}");
    let again = guest::plan(&guest::inspect(overlay.clone()).unwrap(), fixes).unwrap();
    assert!(again.is_empty(), "{again}");

    let copy = dir.path().join("copy.raw");
    run("cp", &["--sparse=always", disk.to_str().unwrap(), copy.to_str().unwrap()]);
    let file = fs::OpenOptions::new().write(true).open(&copy).unwrap();
    for run in sealed.dirty.iter() {
        let bytes = haul::io::read_vec(&overlay, run.start, usize::try_from(run.len()).unwrap()).unwrap();
        file.write_all_at(&bytes, run.start).unwrap();
    }
    let config_drive = drive.map(|drive| {
        let path = dir.path().join("config.iso");
        fs::write(&path, drive.iso().unwrap()).unwrap();
        path
    });
    let own = own_firmware(options);
    let firmware = match fixes.firmware {
        Some(BootMode::Bios) => Firmware::Bios,
        Some(BootMode::Uefi) => Firmware::Uefi,
        None => own,
    };
    if firmware != own {
        // As before, too.
        assert_eq!(boots_unfixed(&copy, Hardware::Virtio, own), State::Up);
    }
    let lock = fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    let (accelerator, arch) = (Accelerator::Tcg, Arch::of_guest(arch));
    let machine = Machine { accelerator, arch, config_drive, firmware, ..Machine::new(&copy, Format::Raw) };
    let outcome = haul::boot::run(
        &Programs::default(),
        &machine,
        Expect::Marker("HAUL-BEACON up".into()),
        Duration::from_secs(400),
        &dir.path().join("console.log"),
        &Tally::default(),
    )
    .unwrap();
    let seconds = outcome.elapsed.as_secs();
    println!("figure: {options:?} boots on virtio in {seconds} s: {}", outcome.verdict.evidence);
    assert_eq!(outcome.verdict.state, State::Up, "{:?}", outcome.verdict);
    let pairs = outcome.verdict.evidence.split(' ').filter_map(|word| word.split_once('='));
    let words: BTreeMap<String, String> =
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let given = drive.is_some_and(|drive| drive.password.is_some());
    for (key, value) in
        facts["identity"].as_object().unwrap().iter().filter(|(key, _)| !given || *key != "rootpw")
    {
        assert_eq!(words.get(key).map(String::as_str), value.as_str(), "{key}");
    }
    let root = match options {
        _ if options.iter().any(|option| option.starts_with("on=") && option.ends_with("lvm")) => {
            "/dev/mapper/vg0-root"
        }
        _ if options.contains(&"on=raid") => "/dev/md0",
        _ => "/dev/vda",
    };
    assert!(words["root"].starts_with(root), "{words:?}");
    assert_eq!(words["failed"], "", "{words:?}");
    words
}

/// How the disk boots as it is, on hardware that its own system knows or not.
fn boots_unfixed(disk: &Path, hardware: Hardware, firmware: Firmware) -> State {
    let dir = tempfile::tempdir().unwrap();
    let lock = fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    // The card's address is the one that the system is pinned to.
    let mac = [0x52, 0x54, 0x00, 0xaa, 0xbb, 0x01];
    let accelerator = Accelerator::Tcg;
    let machine = Machine { accelerator, hardware, mac, firmware, ..Machine::new(disk, Format::Raw) };
    let expect = Expect::Marker("HAUL-BEACON up".into());
    let (time, log) = (Duration::from_secs(400), dir.path().join("console.log"));
    let outcome = haul::boot::run(&Programs::default(), &machine, expect, time, &log, &Tally::default());
    outcome.unwrap().verdict.state
}

#[test]
fn a_real_debian_is_fixed_proven_and_boots_on_virtio_as_itself() {
    let (disk, _) = debian_disk(&[]);
    assert_eq!(boots_unfixed(&disk, Hardware::Sata, Firmware::Bios), State::Up);
    assert_eq!(boots_unfixed(&disk, Hardware::Virtio, Firmware::Bios), State::InitramfsShell);
    let words = fixed_and_booted(&[], None, &Options::default());
    assert!(words["addrs"].starts_with("eth0:10.0.2."), "{words:?}");
}

/// Holds a disk against the promise: it boots where it comes from, not in the cloud, and fixed it boots there as itself.
fn moves(options: &[&str]) -> BTreeMap<String, String> {
    let (disk, _) = debian_disk(options);
    let own = own_firmware(options);
    assert_eq!(boots_unfixed(&disk, Hardware::Sata, own), State::Up, "{options:?} at home");
    let stopped = boots_unfixed(&disk, Hardware::Virtio, own);
    // dracut waits for as long as it is let.
    let expected = match options.contains(&"initramfs=dracut") {
        true => [State::InitramfsShell, State::EmergencyMode, State::Timeout].as_slice(),
        false => &[State::InitramfsShell],
    };
    assert!(expected.contains(&stopped), "{options:?}: {stopped:?}");
    let words = fixed_and_booted(options, None, &Options::default());
    assert!(words["addrs"].starts_with("eth0:10.0.2."), "{words:?}");
    words
}

fn own_firmware(options: &[&str]) -> Firmware {
    if options.contains(&"firmware=uefi") { Firmware::Uefi } else { Firmware::Bios }
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_on_xfs_moves() {
    moves(&["fs=xfs"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_in_a_subvolume_of_btrfs_moves() {
    moves(&["fs=btrfs"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_in_a_logical_volume_moves() {
    moves(&["on=lvm"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_on_one_half_of_a_mirror_moves() {
    moves(&["on=raid"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_in_a_logical_volume_on_one_half_of_a_mirror_moves() {
    moves(&["on=raid-lvm"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_11_moves() {
    moves(&["suite=bullseye"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_13_moves() {
    moves(&["suite=trixie"]);
}

/// Fixes without a program of the guest's: drivers are appended to the initramfs, whatever built and packed it.
fn moves_with_drivers_appended(options: &[&str]) {
    let fixes = Options { no_guest_programs: true, ..Options::default() };
    let words = fixed_and_booted(options, None, &fixes);
    assert!(words["addrs"].starts_with("eth0:10.0.2."), "{words:?}");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_drivers_appended_to_its_initramfs_boots_on_virtio() {
    moves_with_drivers_appended(&[]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_drivers_appended_to_an_initramfs_by_dracut_boots_on_virtio() {
    moves_with_drivers_appended(&["initramfs=dracut"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_drivers_appended_to_an_lz4_initramfs_boots_on_virtio() {
    moves_with_drivers_appended(&["compress=lz4"]);
}

const ARM: [&str; 4] = ["arch=arm64", "pt=gpt", "firmware=uefi", "rootref=uuid"];

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn an_arm64_debian_is_fixed_by_its_own_programs_on_another_machine_and_boots_on_virtio() {
    let words = fixed_and_booted(&ARM, None, &Options::default());
    assert!(words["addrs"].starts_with("eth0:10.0.2."), "{words:?}");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn an_arm64_debian_with_drivers_appended_boots_on_virtio() {
    moves_with_drivers_appended(&ARM);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn haul_boot_takes_the_processor_that_an_image_is_for() {
    let (disk, _) = debian_disk(&ARM);
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy.qcow2");
    let (haul, copy) = (env!("CARGO_BIN_EXE_haul"), copy.to_str().unwrap());
    run(haul, &["convert", disk.to_str().unwrap(), copy]);
    run(haul, &["fix", "--no-guest-programs", copy]);
    let lock = fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    let console = dir.path().join("console.log");
    let came_up = run(haul, &["boot", "--timeout", "400", "--console", console.to_str().unwrap(), copy]);
    println!("figure: {}", came_up.lines().next().unwrap());
    assert!(fs::read_to_string(&console).unwrap().contains("-arm64"), "{came_up}");
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn haul_boot_looks_inside_runs_a_script_and_says_what_is_missing() {
    let (disk, _) = debian_disk(&[]);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (haul, copy) = (env!("CARGO_BIN_EXE_haul"), path("copy.qcow2"));
    run(haul, &["convert", disk.to_str().unwrap(), &copy]);
    run(haul, &["fix", &copy]);
    let lock = fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    let before = checksum(Path::new(&copy));
    for (script, code) in [
        ("#!/bin/sh\necho I am $(hostname)\ntest -e /etc/fstab\n", Some(0)),
        // What was mounted is gone, and so is the address.
        ("#!/bin/sh\nip addr flush dev eth0\nexit 3\n", Some(11)),
    ] {
        fs::write(path("script"), script).unwrap();
        let arguments =
            ["boot", "--timeout", "400", "--console", &path("console"), "--script", &path("script"), &copy];
        let done = Command::new(haul).args(arguments).output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        println!("figure: {said}");
        assert_eq!(done.status.code(), code, "{said}");
        if code == Some(0) {
            assert!(said.contains("root on /dev/vda1, eth0:10.0.2.15/24"), "{said}");
            let console = fs::read_to_string(path("console")).unwrap();
            assert!(console.contains("HAUL-SCRIPT I am source-01"), "{console}");
        } else {
            for missing in ["no network card has an address", "the script ended with exit code 3"] {
                assert!(said.contains(missing), "{said}");
            }
        }
    }
    assert_eq!(checksum(Path::new(&copy)), before);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_two_kernels_and_dep_and_swap_moves() {
    let words = moves(&["kernels=2", "initramfs=dep", "swap=yes"]);
    assert!(words["swap"].starts_with("/dev/vda"), "{words:?}");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_dracut_moves() {
    moves(&["initramfs=dracut"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_by_uefi_moves() {
    moves(&["pt=gpt", "firmware=uefi", "rootref=uuid", "fallback=yes"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_by_uefi_boots_on_virtio_with_firmware_that_knows_no_boot_entries() {
    let options = ["pt=gpt", "firmware=uefi", "rootref=uuid"];
    let (disk, _) = debian_disk(&options);
    assert_eq!(boots_unfixed(&disk, Hardware::Virtio, Firmware::Uefi), State::NoBootableDevice);
    let words = fixed_and_booted(&options, None, &Options::default());
    assert!(words["root"].starts_with("/dev/vda2"), "{words:?}");
    // The ESP, too.
    assert_eq!(words["failed"], "", "{words:?}");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_a_full_boot_partition_and_gpt_moves() {
    moves(&["pt=gpt", "boot=yes", "bootfull=95", "rootref=uuid"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_networkd_and_labels_and_no_cloud_init_moves() {
    moves(&["net=networkd", "rootref=label", "cloudinit=no"]);
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_without_cloud_init_takes_its_password_from_a_forced_import() {
    let password = run("openssl", &["passwd", "-6", "-salt", "haul", "secret"]).trim().to_owned();
    let drive = ConfigDrive { password: Some(password.clone()), ..ConfigDrive::default() };
    let fixes = Options { force_import: true, ..Options::default() };
    let words = fixed_and_booted(&["net=networkd", "rootref=label", "cloudinit=no"], Some(&drive), &fixes);
    let dir = tempfile::tempdir().unwrap();
    let hash = dir.path().join("hash");
    fs::write(&hash, password + "\n").unwrap();
    assert_eq!(words["rootpw"], checksum(&hash).split(' ').next().unwrap());
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_given_the_package_of_cloud_init_is_set_up_by_it_and_stays_itself() {
    let dir = tempfile::tempdir().unwrap();
    let script = "scripts/guests/package.sh";
    let package = run(script, &["bookworm", "cloud-init", dir.path().to_str().unwrap()]);
    let fixes = Options { packages: vec![package.trim().into()], ..Options::default() };
    let drive = config_drive();
    let words = fixed_and_booted(&["cloudinit=no"], Some(&drive), &fixes);
    assert_eq!((words["cloud"].as_str(), words["livehost"].as_str()), ("done", "source-01"), "{words:?}");
    assert!(words["addrs"].starts_with("eth0:10.0.2."), "{words:?}");
}

#[test]
fn an_appliance_that_cannot_start_fails_the_job_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // Its kernel is a few bytes that no machine starts.
    let source = opened(&small_guest(dir.path(), "cp /good.img $out"));
    let plan = guest::plan(&guest::inspect(Arc::clone(&source)).unwrap(), &Options::default()).unwrap();
    // The header of a program without an interpreter.
    let program = dir.path().join("static");
    let mut header = vec![0; 120];
    (header[32], header[54], header[56], header[64]) = (64, 56, 1, 1);
    fs::write(&program, header).unwrap();
    for (program, kind, why) in [
        (Path::new("/bin/sh"), Kind::Image, "this haul needs libraries"),
        (&program, Kind::Boot, "linux kernel too old to load a ram disk"),
    ] {
        let overlay = Arc::new(Overlay::create(Arc::clone(&source), &dir.path().join("spool")).unwrap());
        let setup = Setup { program: program.into(), executor: Executor::Appliance, ..setup(dir.path()) };
        let error = guest::apply(&plan, &overlay, &setup, &Tally::default()).unwrap_err();
        assert!(error.kind() == kind && error.why().contains(why), "{error:?}");
        assert!(!overlay.is_sealed());
        gone(dir.path());
    }
}

/// A process that `parent` started, with `word` among its arguments, once there is one.
fn child_of(parent: u32, word: &str) -> OwnedFd {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = Command::new("pgrep").args(["-P", &parent.to_string(), "-f", word]).output().unwrap();
        let text = String::from_utf8(found.stdout).unwrap();
        if let Some(child) = text.lines().next().and_then(|pid| pidfd(pid.parse().unwrap())) {
            return child;
        }
        assert!(Instant::now() < deadline, "process {parent} starts nothing with {word}");
    }
}

/// Fixes a copy as a user who may mount nothing, after a run that was killed, and boots it.
fn moves_by_an_appliance(options: &[&str]) {
    let (disk, facts) = debian_disk(options);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (haul, copy) = (path("haul"), path("copy.qcow2"));
    // The first process of an appliance has no libraries.
    run("cp", &[run("scripts/build.sh", &[]).trim(), &haul]);
    run(&haul, &["convert", disk.to_str().unwrap(), &copy]);
    run("chown", &["-R", "65534:65534", dir.path().to_str().unwrap()]);
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"];
    let fix = [&nobody[..], &[&haul, "fix", &copy]].concat();
    let mut killed = Command::new("setpriv").args(&fix).stdout(Stdio::null()).spawn().unwrap();
    let machine = child_of(killed.id(), "haul-fix");
    killed.kill().unwrap();
    assert!(ready(&[machine.as_fd()], Instant::now() + Duration::from_secs(30)), "QEMU outlives haul");
    killed.wait().unwrap();
    let start = Instant::now();
    let said = run("setpriv", &fix);
    println!("figure: {options:?} is fixed in an appliance in {} s", start.elapsed().as_secs());
    assert!(said.contains("initrd.img"), "{said}");
    let lock = fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    let machine = Machine { accelerator: Accelerator::Tcg, ..Machine::new(&copy, Format::Qcow2) };
    let (expect, time) = (Expect::Marker("HAUL-BEACON up".into()), Duration::from_secs(400));
    let log = dir.path().join("console.log");
    let outcome =
        haul::boot::run(&Programs::default(), &machine, expect, time, &log, &Tally::default()).unwrap();
    assert_eq!(outcome.verdict.state, State::Up, "{:?}", outcome.verdict);
    println!("figure: and boots in {} s: {}", outcome.elapsed.as_secs(), outcome.verdict.evidence);
    let evidence = &outcome.verdict.evidence;
    for (key, value) in facts["identity"].as_object().unwrap() {
        assert!(evidence.contains(&format!(" {key}={} ", value.as_str().unwrap())), "{key}: {evidence}");
    }
    assert!(evidence.contains(" failed= ") && evidence.contains(" addrs=eth0:10.0.2."), "{evidence}");
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn a_debian_is_fixed_in_an_appliance_by_nobody_and_boots() {
    moves_by_an_appliance(&[]);
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn a_debian_in_a_subvolume_of_btrfs_is_fixed_in_an_appliance_and_boots() {
    moves_by_an_appliance(&["fs=btrfs"]);
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn a_debian_in_a_logical_volume_is_fixed_in_an_appliance_and_boots() {
    moves_by_an_appliance(&["on=lvm"]);
}

/// Has the disk boot by `firmware`, too, by GRUB's modules for it from this package.
fn boots_by(options: &[&str], firmware: BootMode, package: &str) {
    let dir = tempfile::tempdir().unwrap();
    let package = run("scripts/guests/package.sh", &["bookworm", package, dir.path().to_str().unwrap()]);
    let packages = vec![package.trim().into()];
    fixed_and_booted(options, None, &Options { packages, firmware: Some(firmware), ..Options::default() });
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_by_bios_boots_by_uefi_too() {
    boots_by(&[], BootMode::Uefi, "grub-efi-amd64-bin");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_by_bios_with_gpt_and_a_boot_partition_boots_by_uefi_too() {
    boots_by(&["pt=gpt", "boot=yes", "rootref=uuid"], BootMode::Uefi, "grub-efi-amd64-bin");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_in_a_subvolume_of_btrfs_boots_by_uefi_too() {
    boots_by(&["fs=btrfs"], BootMode::Uefi, "grub-efi-amd64-bin");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_by_uefi_boots_by_bios_too() {
    boots_by(&["pt=gpt", "firmware=uefi", "rootref=uuid"], BootMode::Bios, "grub-pc-bin");
}

/// What is mounted by the name that the second disk has at home is mounted on virtio, where the start waits for it.
#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_a_data_disk_mounted_by_its_name_finds_it_on_virtio() {
    let (disk, _) = debian_disk(&[]);
    let dir = tempfile::tempdir().unwrap();
    let [source, data, copy] = ["source.raw", "data.raw", "copy.qcow2"].map(|name| dir.path().join(name));
    run("cp", &["--sparse=always", text(&disk), text(&source)]);
    support::empty_image(&data, 64 << 20);
    run("sh", &["-c", &format!("printf 'label: dos\\nstart=2048\\n' | sfdisk -q {}", text(&data))]);
    run("mkfs.ext4", &["-qF", "-E", "offset=1048576", text(&data), "60m"]);
    let guest = guest::inspect(opened(&source)).unwrap();
    let root = guest.filesystems.iter().find(|fs| fs.point.as_deref() == Some("/")).unwrap().extent.start;
    let mounted = support::LoopMount::new(&source, &format!("offset={root}"));
    fs::create_dir(mounted.path().join("srv/data")).unwrap();
    let fstab = mounted.path().join("etc/fstab");
    // A machine's second disk can be read only here.
    let line = "/dev/sdb1 /srv/data ext4 ro 0 0\n";
    fs::write(&fstab, fs::read_to_string(&fstab).unwrap() + line).unwrap();
    drop(mounted);

    let haul = env!("CARGO_BIN_EXE_haul");
    run(haul, &["convert", text(&source), text(&copy)]);
    let said = run(haul, &["fix", "--data-disk", &format!("/dev/sdb={}", text(&data)), text(&copy)]);
    assert!(said.contains(" /srv/data ext4 ro 0 0") && said.contains("[fstab.data-disk]"), "{said}");
    let lock = fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    let (accelerator, config_drive) = (Accelerator::Tcg, Some(data));
    let machine = Machine { accelerator, config_drive, ..Machine::new(&copy, Format::Qcow2) };
    let (expect, time) = (Expect::Marker("HAUL-BEACON up".into()), Duration::from_secs(400));
    let log = dir.path().join("console.log");
    let outcome =
        haul::boot::run(&Programs::default(), &machine, expect, time, &log, &Tally::default()).unwrap();
    println!("figure: with a data disk it boots in {} s", outcome.elapsed.as_secs());
    assert_eq!(outcome.verdict.state, State::Up, "{:?}", outcome.verdict);
    assert!(outcome.verdict.evidence.contains(" failed= "), "{:?}", outcome.verdict);
}

/// The settings that a cloud gives a server.
fn config_drive() -> ConfigDrive {
    ConfigDrive {
        instance_id: "ins-12345678".into(),
        hostname: Some("vm-10-0-2-15".into()),
        public_keys: Vec::new(),
        macs: vec![Machine::new("", Format::Raw).mac],
        user_data: None,
        password: None,
    }
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_debian_with_a_config_drive_takes_it_in_and_stays_itself() {
    let words = fixed_and_booted(&[], Some(&config_drive()), &Options::default());
    assert_eq!(words["cloud"], "done", "{words:?}");
    assert_eq!(words["livehost"], "source-01", "{words:?}");
    assert!(words["addrs"].starts_with("eth0:10.0.2."), "{words:?}");
}
