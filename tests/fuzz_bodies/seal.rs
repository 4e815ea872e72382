//! Makes the checksums of damaged files right again, so that what lies behind them is looked at.

use super::input::View;

/// The most structures of one kind that are looked at.
const MOST: u64 = 64;

/// Makes a checksum right that is stored little-endian in its own structure, taken as zero there.
fn own(view: &mut View<'_>, at: u64, len: usize, field: usize, sum: fn(&[u8]) -> u32) {
    let mut bytes = view.get(at, len);
    let Some(stored) = bytes.get_mut(field..field + 4) else { return };
    stored.fill(0);
    view.put(at + field as u64, &sum(&bytes).to_le_bytes());
}

/// Footers and header of a VHD: the inverted sum of the bytes.
pub fn vhd(view: &mut View<'_>) {
    let end = view.size().saturating_sub(512);
    for (at, len, field) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
        if at + len as u64 <= view.size() && (view.has(at, b"conectix") || view.has(at, b"cxsparse")) {
            own(view, at, len, field, |bytes| {
                (!bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>()).to_be()
            });
        }
    }
}

/// Headers, region tables and log entries of a VHDX.
pub fn vhdx(view: &mut View<'_>) {
    for (at, len) in [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10), (256 << 10, 64 << 10)] {
        own(view, at, len, 4, crc32c::crc32c);
    }
    let pages: Vec<u64> =
        view.pieces().iter().flat_map(|(at, _, len)| (*at..at + *len as u64).step_by(4096)).collect();
    for at in pages {
        let len = view.le32(at + 8);
        if view.has(at, b"loge") && len <= 1 << 20 {
            own(view, at, usize::try_from(len).unwrap(), 4, crc32c::crc32c);
        }
    }
}

/// Headers of tar, and the first block's header of an xz stream.
pub fn archive(view: &mut View<'_>) {
    for at in (0..view.size().min(1 << 20)).step_by(512) {
        if view.has(at + 257, b"ustar") {
            let mut block = view.get(at, 512);
            block[148..156].fill(b' ');
            let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
            view.put(at + 148, format!("{sum:06o}\0").as_bytes());
        }
    }
    if view.has(0, b"\xfd7zXZ\0") {
        let flags = crc32fast::hash(&view.get(6, 2)).to_le_bytes();
        view.put(8, &flags);
        let len = (usize::from(view.get(12, 1)[0]) + 1) * 4;
        if len >= 8 {
            let crc = crc32fast::hash(&view.get(12, len - 4)).to_le_bytes();
            view.put(12 + len as u64 - 4, &crc);
        }
    }
}

/// A manifest's digest of itself.
pub fn manifest(view: &mut View<'_>) {
    if let Some(end) = view.size().checked_sub(32) {
        let bytes = view.get(0, usize::try_from(end).unwrap());
        view.put(end, blake3::hash(&bytes).as_bytes());
    }
}

/// The records of a journal.
pub fn journal(view: &mut View<'_>) {
    let mut at = 15;
    while at + 8 <= view.size() {
        let len = view.le32(at);
        let Some(payload) = usize::try_from(len).ok().filter(|_| at + 8 + len <= view.size()) else { return };
        let sum = crc32c::crc32c(&view.get(at + 8, payload));
        view.put(at + 4, &sum.to_le_bytes());
        at += 8 + len;
    }
}

/// A partition table, and the file systems and volumes that begin where partitions begin in the seeds.
pub fn layout(view: &mut View<'_>) {
    let mut starts = vec![0, 1 << 20];
    for unit in [512, 4096] {
        starts.extend(gpt(view, unit));
    }
    starts.extend((0..4).map(|i| view.le32(446 + i * 16 + 8) * 512));
    starts.sort_unstable();
    starts.dedup();
    starts.retain(|start| *start < view.size());
    for start in starts.into_iter().take(16) {
        lvm(view, start);
        ext(view, start);
        xfs(view, start);
        btrfs(view, start);
        for seal in MORE {
            seal(view, start);
        }
    }
}

/// What else lies in partitions and has checksums: given the start of one.
const MORE: &[fn(&mut View<'_>, u64)] = &[exfat];

/// The boot region of an exFAT and its backup: the sum of eleven sectors fills the twelfth.
fn exfat(view: &mut View<'_>, start: u64) {
    if !view.has(start + 3, b"EXFAT   ") {
        return;
    }
    let sector = 1usize << view.get(start + 108, 1)[0].clamp(9, 12);
    for region in [start, start + 12 * sector as u64] {
        // Flags, and percentage used, may change without it.
        let bytes = view.get(region, 11 * sector);
        let summed = bytes.iter().enumerate().filter(|(at, _)| ![106, 107, 112].contains(at));
        let sum = summed.fold(0_u32, |sum, (_, byte)| sum.rotate_right(1).wrapping_add(u32::from(*byte)));
        view.put(region + 11 * sector as u64, &sum.to_le_bytes().repeat(sector / 4));
    }
}

/// Header and array of a GPT, and its copy; where its first partitions begin.
fn gpt(view: &mut View<'_>, unit: u64) -> Vec<u64> {
    let mut starts = Vec::new();
    let end = view.size().saturating_sub(unit) / unit * unit;
    for at in [unit, end] {
        if !view.has(at, b"EFI PART") {
            continue;
        }
        let (array, entries, size) = (view.le64(at + 72), view.le32(at + 80), view.le32(at + 84));
        if entries.saturating_mul(size) <= 64 << 10 && array < view.size() {
            let len = usize::try_from(entries * size).unwrap();
            let sum = crc32fast::hash(&view.get(array * unit, len));
            view.put(at + 88, &sum.to_le_bytes());
            starts.extend(
                (0..entries.min(8)).map(|i| view.le64(array * unit + i * size + 32).saturating_mul(unit)),
            );
        }
        let len = usize::try_from(view.le32(at + 12)).unwrap();
        if len <= 4096 {
            own(view, at, len, 16, crc32fast::hash);
        }
    }
    starts
}

/// LVM's checksum.
fn lvm_crc(bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new_with_initial(!0xf597_a6cf);
    crc.update(bytes);
    !crc.finalize()
}

/// The label of a physical volume, the headers of its metadata areas, and their texts.
fn lvm(view: &mut View<'_>, start: u64) {
    for sector in (0..4).map(|i| start + i * 512) {
        if !view.has(sector, b"LABELONE") {
            continue;
        }
        let sum = lvm_crc(&view.get(sector + 20, 492));
        view.put(sector + 16, &sum.to_le_bytes());
        let header = sector + view.le32(sector + 20).min(512);
        // After the one data area and its end.
        let areas: Vec<u64> = (0..2).map(|i| view.le64(header + 72 + i * 16)).collect();
        for area in areas.into_iter().map(|area| start.saturating_add(area)) {
            if !view.has(area.saturating_add(4), b" LVM2 x[5A%r0N*>") {
                continue;
            }
            let (offset, size) = (view.le64(area + 40), view.le64(area + 48));
            if size <= 64 << 10 {
                let len = usize::try_from(size).unwrap();
                let sum = lvm_crc(&view.get(area.saturating_add(offset), len));
                view.put(area + 56, &sum.to_le_bytes());
            }
            let sum = lvm_crc(&view.get(area + 4, 508));
            view.put(area, &sum.to_le_bytes());
        }
    }
}

/// CRC-32C without the usual inversion at either end.
fn crc32c_raw(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// The superblock of ext4, its group descriptors and their bitmaps, as far as its own numbers are small.
fn ext(view: &mut View<'_>, start: u64) {
    let sb = start + 1024;
    if !view.has(sb + 0x38, &[0x53, 0xef]) || view.le32(sb + 0x64) & 0x400 == 0 {
        return;
    }
    let seed = crc32c_raw(!0, &view.get(sb + 0x68, 16));
    let block = 1024 << view.le32(sb + 0x18).min(6);
    let first = view.le32(sb + 0x14);
    let per_group = view.le32(sb + 0x20).max(1);
    let wide = view.le32(sb + 0x60) & 0x80 != 0;
    let len = if wide { view.le16(sb + 0xfe).clamp(32, 1024) } else { 32 };
    let groups = view.le32(sb + 4).saturating_sub(first).div_ceil(per_group).min(MOST);
    for group in 0..groups {
        let at = start + (first + 1) * block + group * len;
        let bits = start + view.le32(at) * block;
        let bytes = usize::try_from((per_group / 8).min(block)).unwrap();
        let sum = crc32c_raw(seed, &view.get(bits, bytes)).to_le_bytes();
        view.put(at + 0x18, &sum[..2]);
        if len >= 64 {
            view.put(at + 0x38, &sum[2..]);
        }
        let mut descriptor = view.get(at, usize::try_from(len).unwrap());
        descriptor[0x1e..0x20].fill(0);
        let number = u32::try_from(group).unwrap().to_le_bytes();
        let sum = crc32c_raw(crc32c_raw(seed, &number), &descriptor).to_le_bytes();
        view.put(at + 0x1e, &sum[..2]);
    }
    let sum = crc32c_raw(!0, &view.get(sb, 0x3fc));
    view.put(sb + 0x3fc, &sum.to_le_bytes());
}

/// A record of XFS's log: its header without padding, the further basic blocks of it without theirs, and its data.
fn xfs_record(view: &mut View<'_>, at: u64) {
    let be = |at| u64::from(u32::from_be_bytes(view.get(at, 4).try_into().unwrap()));
    let (len, headers) = (be(at + 12).min(256 << 10), be(at + 320).div_ceil(32 << 10).clamp(1, 8));
    let mut summed = view.get(at, 328);
    summed[32..36].fill(0);
    for further in 1..len.div_ceil(32 << 10) {
        summed.extend(view.get(at + further * 512, 260));
    }
    summed.extend(view.get(at + headers * 512, usize::try_from(len).unwrap()));
    view.put(at + 32, &crc32c::crc32c(&summed).to_le_bytes());
}

/// The structures of XFS's version 5 in the first sectors of pages, by their magic numbers, and the records of its log.
fn xfs(view: &mut View<'_>, start: u64) {
    if !view.has(start, b"XFSB") {
        return;
    }
    let be = |at, len| view.get(start + at, len).iter().fold(0, |n, byte| n << 8 | usize::from(*byte));
    let (sector, block) = (be(102, 2).clamp(512, 4096), be(4, 4).clamp(512, 65536));
    let inode = be(104, 2).clamp(512, 2048);
    let folder = block << be(192, 1).min(7);
    let kinds: [(&[u8], usize, usize); 10] = [
        (b"XFSB", sector, 224),
        (b"XAGF", sector, 216),
        (b"XAGI", sector, 312),
        (b"XAFL", sector, 32),
        (b"AB3B", block, 52),
        (b"AB3C", block, 52),
        (b"BMA3", block, 64),
        (b"XSLM", block, 12),
        (b"XDB3", folder, 4),
        (b"XDD3", folder, 4),
    ];
    // A folder's index has its magic numbers behind two pointers.
    let index = [[0x3d, 0xf1], [0x3d, 0xff], [0x3e, 0xbe]];
    let places: Vec<u64> = view
        .pieces()
        .iter()
        .flat_map(|(at, _, len)| (*at..at + *len as u64).step_by(512))
        .take(4096)
        .collect();
    for at in places {
        let magic = view.get(at, 4);
        if let Some((_, len, field)) = kinds.iter().find(|(known, ..)| magic == *known) {
            own(view, at, *len, *field, crc32c::crc32c);
        } else if magic == [0xfe, 0xed, 0xba, 0xbe] {
            xfs_record(view, at);
        } else if magic.starts_with(b"IN") {
            own(view, at, inode, 100, crc32c::crc32c);
        } else if index.iter().any(|magic| view.has(at + 8, magic)) {
            own(view, at, folder, 12, crc32c::crc32c);
        }
    }
}

/// The superblock of btrfs and its tree blocks, which are told by the file system's UUID.
fn btrfs(view: &mut View<'_>, start: u64) {
    let sb = start + (64 << 10);
    if !view.has(sb + 64, b"_BHRfS_M") {
        return;
    }
    let (fsid, node) =
        (view.get(sb + 32, 16), usize::try_from(view.le32(sb + 148).clamp(4096, 65536)).unwrap());
    let places: Vec<u64> = view
        .pieces()
        .iter()
        .flat_map(|(at, _, len)| (*at..at + *len as u64).step_by(4096))
        .take(512)
        .collect();
    for at in places {
        if at == sb || !view.has(at + 32, &fsid) {
            continue;
        }
        let sum = crc32c::crc32c(&view.get(at + 32, node - 32));
        view.put(at, &sum.to_le_bytes());
    }
    let sum = crc32c::crc32c(&view.get(sb + 32, 4096 - 32));
    view.put(sb, &sum.to_le_bytes());
}
