//! Whether bytes are the beginning of a disk or of a disk image: for choosing among files, not for reading one.

/// Bytes of a file that are looked at, from its start.
pub(super) const HEAD: usize = 66 << 10;

/// Magic numbers of disk images and of what whole disks begin with: offset, bytes, name.
const MAGIC: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"QED\0", "QED"),
    (512, b"EFI PART", "disk with a GPT"),
    (4096, b"EFI PART", "disk with a GPT"),
    (510, b"\x55\xaa", "disk with a boot sector"),
    (1080, b"\x53\xef", "disk with ext2, ext3 or ext4"),
    (0, b"XFSB", "disk with XFS"),
    (65_600, b"_BHRfS_M", "disk with btrfs"),
    (512, b"LABELONE", "LVM physical volume"),
    (0, b"LUKS\xba\xbe", "LUKS volume"),
];
/// What a CD image has, which may have a boot sector too.
const CD: (usize, &[u8]) = (32_769, b"CD001");
/// What the last sector of a fixed VHD begins with.
const VHD_FOOTER: &[u8] = b"conectix";

/// What disk or disk image a file is that begins with `head` ([`HEAD`] bytes, or all) and, where its end is known, has
/// the last sector `tail`.
pub(super) fn disk(head: &[u8], tail: &[u8]) -> Option<&'static str> {
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if has(CD.0, CD.1) {
        return None;
    }
    if tail.starts_with(VHD_FOOTER) {
        return Some("VHD");
    }
    MAGIC.iter().find(|(at, magic, _)| has(*at, magic)).map(|(_, _, name)| *name)
}
