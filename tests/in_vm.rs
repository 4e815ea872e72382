//! haul on a server of its own, in QEMU: what a fix-up does to the machine it runs on, or lets the guest do to it. The
//! kernel there has device-mapper, udev and systemd. Needs root, QEMU, and a Debian by scripts/guests.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test: a failure is the finding"
)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use haul::guest::{self, Guest};
use haul::image::{self, Gate};
use support::{LoopMount, copy_image, empty_image, run, text};

/// How long a server may take to boot and do its job, under TCG, in seconds.
const TIME: &str = "2400";

/// A disk of scripts/guests, which no test may write.
fn debian(options: &[&str]) -> PathBuf {
    PathBuf::from(run("scripts/guests/disk.sh", options).trim())
}

/// The binary that ships, for a machine: it runs on any guest.
fn static_haul(arch: &str) -> PathBuf {
    let built = Command::new("scripts/build.sh").arg(arch).stderr(Stdio::inherit()).output().unwrap();
    assert!(built.status.success(), "scripts/build.sh");
    PathBuf::from(String::from_utf8(built.stdout).unwrap().trim())
}

fn inspected(path: &Path) -> Guest {
    guest::inspect(image::open(path, None, &Gate::closed()).unwrap().disk).unwrap()
}

/// A server with the disk of a guest, and with another disk that is mounted at /job.
struct Server {
    dir: tempfile::TempDir,
    disk: PathBuf,
    guest: Guest,
    root: &'static str,
}

impl Server {
    /// The server of `disk`, whose root its kernel is told to be `root`.
    fn new(disk: &Path, root: &'static str) -> Server {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("job")).unwrap();
        let guest = inspected(disk);
        fs::copy(static_haul(guest.arch), dir.path().join("job/haul")).unwrap();
        Server { dir, disk: disk.to_owned(), guest, root }
    }

    /// A folder that is at /job of the server, as it will be when the job begins.
    fn job(&self) -> PathBuf {
        self.dir.path().join("job")
    }

    /// Boots the server, on the hardware that its disk comes from, and runs `script` as root, in a folder that has what
    /// `job` has: what the folder then has.
    fn run(&self, script: &str) -> LoopMount {
        let version = &self.guest.kernels[0].version;
        let out = |name: &str| {
            let path = self.dir.path().join(name);
            let mut file = self.guest.tree.open(&format!("/boot/{name}-{version}")).unwrap().unwrap();
            std::io::copy(&mut file, &mut fs::File::create(&path).unwrap()).unwrap();
            path
        };
        let (kernel, initrd) = (out("vmlinuz"), out("initrd.img"));
        // What the job leaves is whole only if the last line says so: a machine that is reset has no such line.
        let script = format!(
            "cd /job; exec >out 2>&1; set -eux; udevadm settle\n{script}\nset +x; sync; echo HAUL-JOB done\n"
        );
        fs::write(self.job().join("run"), script).unwrap();
        let job = self.dir.path().join("job.ext4");
        empty_image(&job, 6 << 30);
        run("mkfs.ext4", &["-qF", "-L", "job", "-d", text(&self.job()), text(&job)]);

        let lock = fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
        lock.lock().unwrap();
        let command = "mkdir /job; udevadm wait -t 300 /dev/disk/by-label/job; mount LABEL=job /job; sh /job/run; umount /job; sync; echo o >/proc/sysrq-trigger; sleep 60";
        let arm = self.guest.arch == "aarch64";
        let (console, qemu, machine) = match arm {
            true => ("ttyAMA0", "qemu-system-aarch64", ["-machine", "virt", "-cpu", "max,pauth-impdef=on"]),
            false => ("ttyS0", "qemu-system-x86_64", ["-machine", "q35", "-cpu", "max"]),
        };
        let line = format!(
            "console={console} panic=10 root={} rw systemd.run=\"/bin/sh -c '{command}'\"",
            self.root
        );
        let drive = |path: &Path, name: &str, more: &str| {
            format!("file={},format=raw,if=none,id={name}{more}", text(path))
        };
        let qemu = Command::new("timeout")
            .args(["-k", "10", TIME, qemu, "-accel", "tcg,thread=multi", "-smp", "1", "-m", "3072"])
            .args(machine)
            .args(["-nodefaults", "-no-user-config"])
            .args(arm.then_some(["-device", "ich9-ahci,id=ide"]).into_iter().flatten())
            .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-kernel", text(&kernel), "-initrd", text(&initrd), "-append", &line])
            .args([
                "-drive",
                &drive(&self.disk, "disk", ",snapshot=on"),
                "-device",
                "ide-hd,drive=disk,bus=ide.0",
            ])
            // No second SATA disk: which of two becomes sda is a matter of chance.
            .args(["-drive", &drive(&job, "job", ""), "-device", "nvme,drive=job,serial=job"])
            .args(["-netdev", "user,id=net", "-device", "e1000,netdev=net,mac=52:54:00:aa:bb:01"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let console = String::from_utf8_lossy(&qemu.stdout).into_owned();
        let mounted = LoopMount::new(&job, "");
        let said = fs::read_to_string(mounted.path().join("out")).unwrap_or_default();
        assert!(
            said.ends_with("HAUL-JOB done\n"),
            "{console}\n{}\n{said}",
            String::from_utf8_lossy(&qemu.stderr)
        );
        mounted
    }
}

/// A finished copy of `disk` in the folder: what `haul fix` takes.
fn copied(haul: &Path, disk: &Path, folder: &Path) {
    run(text(haul), &["convert", text(disk), text(&folder.join("twin.qcow2"))]);
}

/// The names in the initramfs of the first kernel of this copy.
fn initramfs_names(copy: &Path) -> BTreeSet<String> {
    let guest = inspected(copy);
    let image = guest.kernels[0].initrd.as_ref().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::io::copy(&mut guest.tree.open(image).unwrap().unwrap(), &mut file.as_file()).unwrap();
    run("lsinitramfs", &[text(file.path())]).lines().map(str::to_owned).collect()
}

/// Shell: what a server says of its disks, file systems and volumes.
const LOOK: &str = "
look() { # of btrfs only the one of $1: a twin is there while it is fixed, by another UUID
  # A loop device that is given back gets a new number, with nothing on it.
  find /dev/disk /dev/mapper -type l -printf '%p %l\\n' | grep -v '^/dev/disk/by-diskseq/.*loop' | sort
  cat /proc/self/mountinfo /proc/swaps
  for of in pvs vgs lvs; do if command -v $of >/dev/null; then $of --noheadings; fi; done
  if command -v btrfs >/dev/null; then btrfs filesystem show ${1:-} | sed 's|used [^ ]*||g'; fi
}
watch() { # until /run/watched is gone, in a process of its own: what differs from $1
  looks=0
  while [ -e /run/watched ]; do
    look / >/run/now 2>&1
    looks=$((looks + 1))
    cmp -s /run/now $1 || diff $1 /run/now >>noticed || true
  done
  echo $looks >looks
}
";

/// Has a server fix a copy of its own disk, and checks that its devices, volumes and mounts are what they were, while it
/// does and afterwards; and that the copy is what another machine makes of it.
fn fixes_its_own_twin(options: &[&str], root: &'static str) {
    let disk = debian(options);
    let server = Server::new(&disk, root);
    copied(&static_haul("x86_64"), &disk, &server.job());
    let here = tempfile::tempdir().unwrap();
    run("cp", &["-a", &format!("{}/.", text(&server.job())), text(here.path())]);

    let job = format!(
        "{LOOK}
        look / >before
        look >all-before
        touch /run/watched
        (set +x; watch before) & watcher=$!
        ./haul fix twin.qcow2 || {{ dmesg | tail -n 20; exit 1; }}
        rm /run/watched
        wait $watcher
        udevadm settle
        look >all-after
        diff all-before all-after
        losetup --list --noheadings
        test -z \"$(losetup --list --noheadings)\""
    );
    let done = server.run(&job);
    let at = |name: &str| done.path().join(name);
    let read = |name: &str| fs::read_to_string(at(name)).unwrap_or_default();
    assert!(!at("noticed").exists(), "{}", read("noticed"));
    let looks: u32 = read("looks").trim().parse().unwrap();
    assert!(looks > 3, "{looks}");
    println!("figure: {options:?}: {looks} looks while its twin was fixed, and nothing had changed");

    // This machine has no PCI, the server had AHCI and a card of Intel's.
    run(text(&static_haul("x86_64")), &["fix", text(&here.path().join("twin.qcow2"))]);
    let (there, here) =
        (initramfs_names(&at("twin.qcow2")), initramfs_names(&here.path().join("twin.qcow2")));
    assert!(there.iter().any(|name| name.contains("virtio_blk.ko")) && there.len() > 200, "{}", there.len());
    assert_eq!(there.symmetric_difference(&here).collect::<Vec<_>>(), Vec::<&String>::new());
    println!("figure: the initramfs made there and here have the same {} names", there.len());
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_server_in_logical_volumes_notices_nothing_of_its_twin() {
    fixes_its_own_twin(&["on=lvm", "swap=yes", "initramfs=dep"], "/dev/mapper/vg0-root");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_server_on_btrfs_notices_nothing_of_its_twin() {
    fixes_its_own_twin(&["fs=btrfs"], "/dev/sda1 rootflags=subvol=@rootfs");
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_server_with_an_arm_processor_notices_nothing_of_its_twin() {
    fixes_its_own_twin(&["arch=arm64", "pt=gpt", "firmware=uefi", "rootref=uuid"], "/dev/sda2");
}

/// A hook of initramfs-tools that tries to get at the machine. Each line that gets through leaves a word.
const EVIL: &str = r#"#!/bin/sh
case $1 in prereqs) exit 0 ;; esac
exec 2>/dev/null
tried() { echo "$1" >>/etc/evil-tried; }
through() { echo "$1" >>/etc/evil; }
for at in /dev /run /tmp /var/tmp /; do
  tried mknod; mknod "$at/evil-disk" b 8 0 && { dd if="$at/evil-disk" of=/dev/null bs=512 count=1 && through "read $at/evil-disk"; }
done
tried devices; for of in /dev/sd* /dev/nvme* /dev/loop* /dev/dm-* /dev/mapper/* /dev/fuse /dev/mem /dev/kmsg /dev/ttyS0; do [ -e "$of" ] && through "saw $of"; done
tried modules; modprobe dummy && through modprobe
for of in $(find /lib/modules -name dummy.ko* | head -n 1); do insmod "$of" && through insmod; done
tried reboot; reboot -f && through reboot
tried poweroff; poweroff -f && through poweroff
tried sysrq; echo b >/proc/sysrq-trigger && through sysrq
tried core; echo /evil >/proc/sys/kernel/core_pattern && through core_pattern
tried hotplug; echo /evil >/sys/kernel/uevent_helper && through uevent_helper
tried mount; mount -t tmpfs none /mnt && through mount
mount -o remount,rw /proc/sys && through remount
mount -t sysfs none /mnt && through sysfs
tried time; date -s 2001-01-01 && through date
tried name; hostname evil && through hostname
tried net; ip link add evil type dummy && through "ip link"
ip -o link | grep -v ' lo:' | grep -q . && through "saw a network card"
tried root; [ -e /proc/1/root/job ] && through "the root of another process"
[ "$(ls -d /proc/[0-9]* | wc -l)" -lt 40 ] || through "saw the processes"
tried keys; cat /proc/keys /proc/kcore | head -c 1 | grep -q . && through "kernel memory"
tried nice; renice -n -20 1 && through renice
tried flood; head -c 3G /dev/zero >/dev/shm/flood && through flood
tried all
kill -KILL -1
exit 0
"#;

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn a_guests_hook_gets_at_nothing_of_the_server() {
    let disk = debian(&[]);
    let server = Server::new(&disk, "/dev/sda1");
    let haul = server.job().join("haul");
    let hostile = server.dir.path().join("hostile.raw");
    copy_image(&disk, &hostile);
    let mounted = LoopMount::new(&hostile, "offset=1048576");
    let hook = mounted.path().join("etc/initramfs-tools/hooks/evil");
    fs::write(&hook, EVIL).unwrap();
    run("chmod", &["755", text(&hook)]);
    drop(mounted);
    copied(&haul, &hostile, &server.job());

    let done = server.run(&format!(
        "{LOOK}
        all() {{
          look; cut -d' ' -f1 /proc/modules | grep -vE '^(fuse|loop|autofs4)$' | sort
          hostname; cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/core_pattern
          ip -o address | sed 's/valid_lft.*//'; sysctl kernel.sysrq kernel.hostname
        }}
        dd if=/dev/sda bs=1M count=1 2>/dev/null | sha256sum >before
        all >>before
        date +%s >began
        sleep 1000 & bystander=$!
        ./haul fix twin.qcow2 || [ $? = 14 ] # the hook ended its builder
        kill -0 $bystander
        date +%s >ended
        dd if=/dev/sda bs=1M count=1 2>/dev/null | sha256sum >after
        all >>after
        diff before after"
    ));
    let at = |name: &str| done.path().join(name);
    let number = |name: &str| fs::read_to_string(at(name)).unwrap().trim().parse::<u64>().unwrap();
    assert!((number("began")..number("began") + 1500).contains(&number("ended")));
    let tree = inspected(&at("twin.qcow2")).tree;
    let tried = tree.text("/etc/evil-tried").unwrap().unwrap();
    assert!(tried.ends_with("all\n"), "{tried}");
    assert_eq!(tree.text("/etc/evil").unwrap(), None, "what got through");
    println!("figure: a hook tried {} ways out, and none led anywhere", tried.lines().count() - 1);
}
