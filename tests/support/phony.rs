//! Initramfs images for guests that are made up.

#![allow(dead_code, reason = "each test binary uses a part of it")]

/// The virtio modules of a kernel that has them all as modules.
pub const VIRTIO: &[&str] = &[
    "virtio",
    "virtio_ring",
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
];

/// An uncompressed cpio archive ("newc") of empty files.
pub fn cpio(names: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    let trailer = "TRAILER!!!".to_owned();
    for name in names.iter().chain([&trailer]) {
        out.extend(format!("070701{}{:08x}{:08x}", "0".repeat(88), name.len() + 1, 0).bytes());
        out.extend(name.bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// An initramfs with these modules.
pub fn initramfs(modules: &[&str]) -> Vec<u8> {
    cpio(&modules.iter().map(|name| format!("usr/lib/modules/x/kernel/{name}.ko")).collect::<Vec<_>>())
}

/// The same, with this text as `/init`.
pub fn with_init(modules: &[&str], init: &str) -> Vec<u8> {
    let mut out = initramfs(modules);
    let mode = 0o100_755;
    out.extend(
        format!("07070100000000{mode:08x}{}{:08x}{}", "0".repeat(32), init.len(), "0".repeat(32)).bytes(),
    );
    out.extend(b"0000000500000000init\0");
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(init.bytes());
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(cpio(&[]));
    out
}

/// What begins like a kernel module for x86-64.
pub fn module() -> Vec<u8> {
    [b"\x7fELF\x02\x01".as_slice(), &[0; 12], &[62, 0]].concat()
}
