//! What `host` says about disks in use, judged on real mounts. Needs root, mkfs.ext4 and mount.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test: a failure is the finding")]

use std::path::Path;
use std::process::Command;

use haul::host::mounts::{Use, in_use};

fn run(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// An image file with an ext4, mounted at `mnt` beside it; unmounted when dropped.
struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Mounted { dir };
        std::fs::File::create(mounted.image()).unwrap().set_len(16 << 20).unwrap();
        std::fs::create_dir(mounted.point()).unwrap();
        run("mkfs.ext4", &["-qF", mounted.image().to_str().unwrap()]);
        run("mount", &["-o", options, mounted.image().to_str().unwrap(), mounted.point().to_str().unwrap()]);
        mounted
    }

    fn image(&self) -> std::path::PathBuf {
        self.dir.path().join("disk.raw")
    }

    fn point(&self) -> std::path::PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.point().to_str().unwrap()]);
    }
}

#[test]
fn an_image_mounted_through_a_loop_device_is_in_use_and_the_mount_is_named() {
    let mounted = Mounted::new("loop,rw");
    let uses = in_use(&mounted.image()).unwrap();
    let [Use::Mount { device, point }] = uses.as_slice() else { panic!("{uses:?}") };
    assert_eq!(point, &mounted.point());
    assert!(device.starts_with("/dev/loop"));
    let uses = in_use(Path::new(device)).unwrap();
    assert!(matches!(uses.as_slice(), [Use::Mount { .. }]), "{uses:?}");
}

#[test]
fn an_image_mounted_read_only_may_be_copied() {
    let mounted = Mounted::new("loop,ro");
    assert_eq!(in_use(&mounted.image()).unwrap(), []);
}
