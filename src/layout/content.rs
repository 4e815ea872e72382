//! What a partition, or a disk without a table, holds: told by magic numbers alone.

use super::field::{be16, has, le32, le64};
use super::lvm::{PvInfo, identify_pv};
use super::md::MAGIC as MD_MAGIC;
use super::swap::{self, SwapInfo};
use super::{BtrfsInfo, ExfatInfo, ExtInfo, FatInfo, NtfsInfo, XfsInfo, btrfs, ext, fat, ntfs, xfs};
use crate::error::Result;
use crate::io::{ReadAt, is_zero, read_vec};
use crate::unit::to_usize;

/// How much of the front is looked at: up to the end of the first ZFS label.
const HEAD: u64 = 256 << 10;
/// How much of the end is looked at: md's old superblocks lie in the last 128 KiB.
const TAIL: u64 = 128 << 10;

/// What a volume holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes where anything known would show.
    Empty,
    /// Something unknown.
    Unknown,
    /// An ext2, ext3 or ext4 file system.
    Ext(ExtInfo),
    /// An XFS file system.
    Xfs(XfsInfo),
    /// A btrfs file system, or one device of it.
    Btrfs(BtrfsInfo),
    /// A FAT12, FAT16 or FAT32 file system.
    Fat(FatInfo),
    /// An exFAT file system.
    Exfat(ExfatInfo),
    /// An NTFS file system.
    Ntfs(NtfsInfo),
    /// A swap area.
    Swap(SwapInfo),
    /// A physical volume of LVM2.
    Lvm(PvInfo),
    /// Something known by name only, such as `zfs` or `LUKS2`.
    Other(&'static str),
    /// Signs of more than one: the names, joined by "and".
    Ambiguous(String),
}

impl Content {
    /// Its name for a reader, such as `ext4`.
    pub fn name(&self) -> &str {
        match self {
            Content::Empty => "empty",
            Content::Unknown => "unknown",
            Content::Ext(ext) => ext.version,
            Content::Xfs(_) => "xfs",
            Content::Btrfs(_) => "btrfs",
            Content::Fat(fat) => fat.version,
            Content::Exfat(_) => "exfat",
            Content::Ntfs(_) => "ntfs",
            Content::Swap(_) => "swap",
            Content::Lvm(_) => LVM,
            Content::Other(name) => name,
            Content::Ambiguous(names) => names,
        }
    }

    /// Whether a used map can be made of what it holds, but for swap.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(
            self,
            Content::Ext(_)
                | Content::Xfs(_)
                | Content::Btrfs(_)
                | Content::Fat(_)
                | Content::Ntfs(_)
                | Content::Exfat(_)
                | Content::Lvm(_)
        )
    }
}

/// Says what `volume` holds. Fails only as reading fails.
pub fn identify(volume: &dyn ReadAt) -> Result<Content> {
    let size = volume.size();
    let head = read_vec(volume, 0, to_usize(size.min(HEAD)))?;
    let tail_at = size.saturating_sub(TAIL) & !4095;
    let tail = read_vec(volume, tail_at, to_usize(size - tail_at))?;

    let mut found: Vec<Content> = known(&head).into_iter().map(Content::Other).collect();
    found.extend(md_at_end(&tail, size - tail_at, size).map(Content::Other));
    found.extend(xfs::Superblock::parse(&head).map(|sb| Content::Xfs(sb.info())));
    found.extend(btrfs::Superblock::parse(&head).map(|sb| Content::Btrfs(sb.info())));
    found.extend(ext::Superblock::parse(&head).map(|sb| Content::Ext(sb.info())));
    found.extend(fat::identify(volume, &head)?);
    found.extend(ntfs::identify(volume, &head)?.map(Content::Ntfs));
    found.extend(swap::parse(&head).map(Content::Swap));
    found.extend(identify_pv(volume, &head)?.map(Content::Lvm));
    let only = found.pop();
    Ok(match only {
        None if is_zero(&head) && is_zero(&tail) => Content::Empty,
        None => Content::Unknown,
        Some(only) if found.is_empty() => only,
        Some(last) => {
            found.push(last);
            let names: Vec<&str> = found.iter().map(Content::name).collect();
            Content::Ambiguous(names.join(" and "))
        }
    })
}

/// The names of everything known by name only whose magic is in the first 256 KiB.
fn known(head: &[u8]) -> Vec<&'static str> {
    let mut found = Vec::new();
    let mut sign = |is: bool, name| {
        if is {
            found.push(name);
        }
    };
    let luks = has(head, 0, b"LUKS\xba\xbe");
    sign(luks && be16(head, 6) == 1, "LUKS1");
    sign(luks && be16(head, 6) == 2, "LUKS2");
    sign(le32(head, 0) == MD_MAGIC && le32(head, 4) == 1, "md 1.1 member");
    sign(le32(head, 4096) == MD_MAGIC && le32(head, 4100) == 1, "md 1.2 member");
    let bcache = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81";
    sign(has(head, 4096 + 24, bcache), "bcache");
    let zfs = (0x20000..0x40000).step_by(1024).any(|at| {
        has(head, at, &0x00ba_b10c_u64.to_le_bytes()) || has(head, at, &0x00ba_b10c_u64.to_be_bytes())
    });
    sign(zfs, "zfs");
    sign(has(head, 1024, b"\x10\x20\xf5\xf2"), "f2fs");
    sign(has(head, 32769, b"CD001"), "iso9660");
    let udf = |i: usize| has(head, 32769 + i * 2048, b"NSR02") || has(head, 32769 + i * 2048, b"NSR03");
    sign((0..16).any(udf), "udf");
    sign(has(head, 3, b"-FVE-FS-"), "BitLocker");
    found
}

const LVM: &str = "LVM2 physical volume";

/// Whether a sector is a file system's boot sector rather than a partition table.
pub(super) fn has_boot_sector(sector: &[u8; 512]) -> bool {
    [&b"NTFS    "[..], b"EXFAT   ", b"-FVE-FS-"].iter().any(|magic| has(sector, 3, magic))
        || fat::is_boot_sector(sector)
}

/// md superblocks 0.90 and 1.0 lie at the end of their member; `len` bytes of it are in `tail`.
fn md_at_end(tail: &[u8], len: u64, size: u64) -> Option<&'static str> {
    let at = |offset: u64| offset.checked_sub(size - len).map(to_usize);
    let old = (size & !0xffff).checked_sub(0x10000).and_then(at);
    if old.is_some_and(|at| le32(tail, at) == MD_MAGIC || le32(tail, at) == MD_MAGIC.swap_bytes()) {
        return Some("md 0.90 member");
    }
    let new_offset = (size / 512).checked_sub(16).map(|sector| (sector & !7) * 512);
    let new = new_offset.and_then(at)?;
    // The superblock names its own sector, which tells it from a copy that merely moved here.
    let is_new = le32(tail, new) == MD_MAGIC
        && le32(tail, new + 4) == 1
        && new_offset == le64(tail, new + 144).checked_mul(512);
    is_new.then_some("md 1.0 member")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::WriteAt;
    use crate::io::fake::MemoryDisk;

    const SIZE: u64 = (64 << 20) + 12_800;

    /// Bytes, and where they are put.
    type Mark<'a> = (u64, &'a [u8]);

    fn name_of(marks: &[Mark<'_>]) -> String {
        let disk = MemoryDisk::sparse(SIZE);
        for (at, bytes) in marks {
            disk.write_at(bytes, *at).unwrap();
        }
        identify(&disk).unwrap().name().to_owned()
    }

    #[test]
    fn magic_numbers_tell() {
        let md = MD_MAGIC.to_le_bytes();
        let md1 = [md, [1, 0, 0, 0]].concat();
        let end = (SIZE / 512 - 16) & !7;
        let own_sector = end.to_le_bytes();
        let cases: &[(&str, &[Mark<'_>])] = &[
            ("empty", &[]),
            ("unknown", &[(5, b"x")]),
            ("LVM2 physical volume", &[(512, b"LABELONE"), (536, b"LVM2 001")]),
            ("md 0.90 member", &[((SIZE & !0xffff) - 0x10000, &md)]),
            ("md 1.0 member", &[(end * 512, &md1), (end * 512 + 144, &own_sector)]),
            ("md 1.1 member", &[(0, &md1)]),
            ("md 1.2 member", &[(4096, &md1)]),
            ("zfs", &[(0x21000, &0x00ba_b10c_u64.to_le_bytes())]),
            ("bcache", &[(4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81")]),
            ("iso9660", &[(32769, b"CD001")]),
            ("udf", &[(32769, b"BEA01"), (34817, b"NSR02")]),
            ("swap", &[(1024, &[1]), (4086, b"SWAPSPACE2")]),
            ("swap", &[(16_374, b"LINHIB0001")]),
            ("xfs and swap", &[(0, b"XFSB"), (4086, b"SWAPSPACE2")]),
        ];
        for (name, marks) in cases {
            assert_eq!(name_of(marks), *name);
        }
    }

    #[test]
    fn tiny_volumes_are_looked_at_without_reading_beyond_them() {
        for size in [0, 1, 511, 512, 4095, 65_536, 131_073] {
            assert_eq!(identify(&MemoryDisk::sparse(size)).unwrap(), Content::Empty);
        }
    }
}
