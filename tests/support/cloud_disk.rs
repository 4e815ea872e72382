//! Small disks that look like servers to an importer, made by sfdisk, mkfs.ext4, cpio and qemu-img.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A program that a test needs; the failure names what is missing.
pub fn run(program: &str, arguments: &[&str], folder: &Path, input: &str) {
    use std::io::Write;
    let child = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap_or_else(|error| panic!("this test needs {program}: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What the disk has of what an importer wants.
#[derive(Clone, Copy, Debug)]
pub struct Server {
    pub init: bool,
    pub virtio: bool,
    pub cloud_init: bool,
}

impl Server {
    pub const WHOLE: Server = Server { init: true, virtio: true, cloud_init: true };
}

const VERSION: &str = "6.1.0-test";

fn write(root: &Path, path: &str, content: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Makes a raw disk of 64 MiB with one ext4 partition.
pub fn raw(folder: &Path, server: Server) -> PathBuf {
    let root = folder.join("root");
    write(&root, "etc/fstab", "");
    write(&root, &format!("boot/vmlinuz-{VERSION}"), "not a kernel");
    if server.init {
        write(&root, "usr/lib/systemd/systemd", "not an init");
        std::os::unix::fs::symlink("usr/lib", root.join("lib")).unwrap();
    }
    if server.cloud_init {
        write(&root, "usr/bin/cloud-init", "#!/bin/sh\n");
    }
    let modules = format!("usr/lib/modules/{VERSION}");
    write(&root, &format!("{modules}/modules.dep"), "kernel/drivers/net/virtio_net.ko.xz:\n");
    let drivers = if server.virtio { &["virtio_blk", "virtio_pci"][..] } else { &["ahci"] };
    let initramfs = folder.join("initramfs");
    for driver in drivers {
        write(&initramfs, &format!("{modules}/kernel/{driver}.ko.xz"), "not a module");
    }
    let pack = format!(
        "cd initramfs && find . | cpio --quiet -o -H newc | gzip > ../root/boot/initrd.img-{VERSION}"
    );
    run("sh", &["-c", &pack], folder, "");
    let disk = folder.join("disk.raw");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    run("sfdisk", &["-q", "disk.raw"], folder, "label: dos\nstart=2048, type=83, bootable\n");
    let options = ["-q", "-F", "-E", "offset=1048576", "-d", "root", "disk.raw", "62M"];
    run("mkfs.ext4", &options, folder, "");
    disk
}

/// `disk` as another format, by qemu-img.
pub fn converted(disk: &Path, options: &[&str], name: &str) -> PathBuf {
    let folder = disk.parent().unwrap();
    let arguments = [&["convert", "-f", "raw"][..], options, &["disk.raw", name]].concat();
    run("qemu-img", &arguments, folder, "");
    folder.join(name)
}
