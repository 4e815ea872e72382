//! The used map of NTFS, judged by partclone and ntfs-3g. Needs FUSE.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test: a failure is the finding"
)]
#![allow(clippy::cast_possible_truncation, reason = "sizes of test files")]

#[path = "support/allocations.rs"]
mod allocations;
#[path = "support/bounds.rs"]
mod bounds;
#[path = "support/damaged_map.rs"]
mod damaged_map;
#[path = "support/maps.rs"]
mod maps;
mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bounds::Bounds;
use damaged_map::{survives_damage, written};
use haul::io::DiskFile;
use haul::io::fake::FaultyDisk;
use haul::layout::{self, Content, Usage};
use haul::unit::{Extent, ExtentMap, GIB, MIB, TIB};
use maps::{masked_copy, open, rest, tree, used, whole_because};
use support::{Random, age, copy_image, empty_image, run, text, try_run, unmount};
use tempfile::TempDir;

/// Makes a file system by mkntfs's arguments in an image of `size` bytes.
fn mkfs(image: &Path, size: u64, args: &str) {
    empty_image(image, size);
    let words = ["-q", "-Q", "-F"].into_iter().chain(args.split_whitespace()).chain([text(image)]);
    run("mkntfs", &words.collect::<Vec<_>>());
}

/// An image mounted by ntfs-3g; unmounted when dropped.
struct Mount(Option<TempDir>);

impl Mount {
    fn new(image: &Path, options: &str) -> Mount {
        let dir = tempfile::tempdir().unwrap();
        run("ntfs-3g", &["-o", options, text(image), text(dir.path())]);
        Mount(Some(dir))
    }

    fn path(&self) -> &Path {
        self.0.as_ref().unwrap().path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Waits until ntfs-3g has written everything and is gone.
        self.0.take().into_iter().for_each(unmount);
    }
}

/// What partclone.ntfs lists as free.
fn partclone_free(image: &Path) -> ExtentMap {
    let map = image.with_extension("domain");
    run("partclone.ntfs", &["-D", "-I", "-L", "/dev/null", "-s", text(image), "-O", text(&map)]);
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
    let lines = fs::read_to_string(&map).unwrap();
    let rows = lines.lines().filter(|line| line.starts_with("0x")).skip(1);
    let mut total = ExtentMap::new();
    let mut free = ExtentMap::new();
    for row in rows {
        let [start, len, sign] = row.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{row}") };
        let run = Extent::at(hex(start), hex(len));
        total.insert(run);
        if sign == "?" {
            free.insert(run);
        }
    }
    assert_eq!(total.len(), 1, "{lines}");
    free
}

/// Every cluster that partclone calls used is used, and nothing else before the end of the last cluster.
fn assert_map_is_exact(name: &str, image: &Path) -> ExtentMap {
    let size = fs::metadata(image).unwrap().len();
    let map = open(image);
    let usage = &map.volumes()[0].usage;
    assert!(matches!(usage, Usage::Mapped { .. }), "{name}: {usage:?}");
    let used = used(&map, size);
    let free = partclone_free(image);
    assert_eq!(rest(&used, size), free, "{name}");
    assert_eq!(map.used_bytes(), used.bytes(), "{name}");
    assert_eq!(map.findings(), [], "{name}");
    free
}

/// A copy of only the used bytes passes ntfsfix, and mounts, with the same files.
fn assert_copy_is_whole(name: &str, image: &Path) {
    let copy = image.with_extension("copy");
    masked_copy(image, &copy);
    run("ntfsfix", &["-n", text(&copy)]);
    let before = tree(Mount::new(image, "ro").path());
    let after = tree(Mount::new(&copy, "ro").path());
    assert!(before == after, "{name}: files differ");
    assert!(before.len() > 1000, "{name}: there are no files to compare");
    run("ntfsfix", &[text(&copy)]);
    fs::remove_file(&copy).unwrap();
}

/// Size in bytes, arguments of mkntfs, files to write and their largest size.
const MADE: &[(u64, &str, u64, u64)] = &[
    (60 * MIB + 512, "-c 512", 300, 100_000),
    (100 * MIB, "-c 1024 -C", 300, 200_000),
    (100 * MIB + 7 * 512, "-c 2048 -I", 300, 200_000),
    (300 * MIB + 12_288, "-c 4096", 300, 400_000),
    (300 * MIB + 333, "-c 4096 -p 2048 -H 255 -S 63", 300, 400_000),
    (300 * MIB + 12_288, "-c 8192", 200, 400_000),
    (300 * MIB + 100 * 512, "-c 32768", 200, 400_000),
    (300 * MIB + 512, "-c 65536", 200, 400_000),
    (600 * MIB + 512, "-c 131072", 100, 400_000),
    (4 * GIB + 512, "-c 1048576", 100, 400_000),
    (8 * GIB + 512, "-c 2097152", 100, 400_000),
    (300 * MIB + 4096, "-s 4096 -c 4096", 200, 400_000),
    (300 * MIB + 12_288, "-s 4096 -c 65536", 200, 400_000),
    (300 * MIB, "-s 1024 -c 1024", 200, 400_000),
    (80 * GIB + 512, "-c 4096", 200, 400_000),
];

#[test]
fn fresh_and_aged_file_systems_are_mapped_as_partclone_lists_them() {
    // partclone waits a second at its end, again and again.
    std::thread::scope(|scope| {
        for (seed, (size, args, files, largest)) in (1..).zip(MADE) {
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                let image = dir.path().join("fs");
                mkfs(&image, *size, args);
                assert_map_is_exact(&format!("fresh {args}"), &image);
                age(Mount::new(&image, "rw").path(), seed, *files, *largest);
                let free = assert_map_is_exact(&format!("aged {args}"), &image);
                assert!(free.len() > 3, "{args}: {free:?}");
                assert_copy_is_whole(args, &image);
            });
        }
    });
}

#[test]
fn file_systems_made_larger_and_smaller_are_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 60 * MIB, "-c 512");
    age(Mount::new(&image, "rw").path(), 5, 300, 200_000);
    for size in [300 * MIB + 512, 150 * MIB + 1024] {
        let to = size.max(fs::metadata(&image).unwrap().len());
        File::options().write(true).open(&image).unwrap().set_len(to).unwrap();
        run("sh", &["-c", &format!("ntfsresize -ff -P -s {size} {} < /dev/null", text(&image))]);
        assert!(whole_because("just resized", &image).contains("dirty"));
        run("ntfsfix", &["-d", text(&image)]);
        // What is cut off is not cut off the image.
        let free = assert_map_is_exact("resized", &image);
        assert!(free.iter().all(|run| run.end <= size), "{free:?}");
        assert_copy_is_whole("resized", &image);
    }
}

#[test]
fn label_and_serial_number_are_those_that_blkid_reads() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 40 * MIB, "-c 1024");
    let info = || match layout::identify(&DiskFile::open(&image).unwrap()).unwrap() {
        Content::Ntfs(info) => info,
        other => panic!("{other:?}"),
    };
    for label in ["System reserved", "Gr\u{f6}\u{df}e \u{1f4be}", ""] {
        run("ntfslabel", &["-f", text(&image), label]);
        let blkid = |field: &str| {
            try_run("blkid", &["-c", "/dev/null", "-p", "-o", "value", "-s", field, text(&image)]).1
        };
        let info = info();
        assert_eq!(info.uuid(), blkid("UUID").trim());
        assert_eq!(info.label, blkid("LABEL").trim_end_matches('\n'));
        assert_eq!((info.cluster_size, info.clusters), (1024, (40 * MIB - 512) / 1024));
    }
}

/// An image whose records can be changed.
struct Patch {
    file: File,
    cluster: u64,
    record: usize,
    mft: u64,
    mirror: u64,
}

fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Puts what protects each 512 bytes of a structure on it, or takes it off.
fn protect(structure: &mut [u8], on: bool) {
    let at = le(structure, 4, 2) as usize;
    for i in 0..structure.len() / 512 {
        let (own, end) = (at + 2 + 2 * i, 512 * (i + 1) - 2);
        if on {
            structure.copy_within(end..end + 2, own);
            structure.copy_within(at..at + 2, end);
        } else {
            structure.copy_within(own..own + 2, end);
        }
    }
}

/// Where the attribute of that type begins in a record.
fn attribute(record: &[u8], kind: u64) -> usize {
    let mut at = le(record, 20, 2) as usize;
    while le(record, at, 4) != kind {
        at += le(record, at + 4, 4) as usize;
    }
    at
}

/// Where the first run of a file is: the first cluster's number, and how many.
fn first_run(record: &[u8], at: usize) -> (u64, u64) {
    let pairs = at + le(record, at + 32, 2) as usize;
    let (len, start) = (usize::from(record[pairs] & 15), usize::from(record[pairs] >> 4));
    (le(record, pairs + 1 + len, start), le(record, pairs + 1, len))
}

impl Patch {
    fn new(image: &Path) -> Patch {
        let file = File::options().read(true).write(true).open(image).unwrap();
        let mut boot = [0; 512];
        file.read_exact_at(&mut boot, 0).unwrap();
        let sectors = if boot[13] > 128 { 1 << (256 - u64::from(boot[13])) } else { u64::from(boot[13]) };
        let cluster = le(&boot, 11, 2) * sectors;
        let record =
            if boot[64] > 128 { 1 << (256 - u64::from(boot[64])) } else { u64::from(boot[64]) * cluster };
        let [mft, mirror] = [48, 56].map(|at| le(&boot, at, 8) * cluster);
        Patch { file, cluster, record: record as usize, mft, mirror }
    }

    fn set(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// The record of that number without its protection.
    fn record(&self, number: u64) -> Vec<u8> {
        let mut record = self.read(self.mft + number * self.record as u64, self.record as u64);
        protect(&mut record, false);
        record
    }

    /// Changes a record, and its copy.
    fn edit(&self, number: u64, change: impl FnOnce(&mut [u8])) {
        let mut record = self.record(number);
        change(&mut record);
        protect(&mut record, true);
        self.set(self.mft + number * self.record as u64, &record);
        if number < 4 {
            self.set(self.mirror + number * self.record as u64, &record);
        }
    }

    /// Where the first piece of a file begins and ends.
    fn place(&self, number: u64) -> Extent {
        let record = self.record(number);
        let (start, len) = first_run(&record, attribute(&record, 0x80));
        Extent::at(start * self.cluster, len * self.cluster)
    }
}

#[test]
fn a_bitmap_in_pieces_is_read_in_its_order() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 200 * MIB + 512, "-c 512");
    age(Mount::new(&image, "rw").path(), 9, 300, 200_000);
    let patch = Patch::new(&image);
    let old = patch.place(6);
    let mut bits = patch.read(old.start, old.len());
    let (first, len) = (old.start / 512, old.len() / 512);
    assert_eq!(len, 100);
    // The last 60 of its clusters go to the volume's end, the 20 before them right behind the middle.
    let (middle, end) = (220_001, 390_000);
    let mut pairs = vec![];
    let mut last = 0;
    for (start, len) in [(first, 20), (middle, 20), (end, 60)] {
        for i in 0..len {
            let (from, to) = (if start == first { first } else { 0 } + i, start + i);
            bits[to as usize / 8] |= 1 << (to % 8);
            assert!(start != first || from == to);
        }
        let delta = start as i64 - last;
        pairs.extend([0x41, len as u8]);
        pairs.extend(&delta.to_le_bytes()[..4]);
        last = start as i64;
    }
    for old in first + 20..first + len {
        bits[old as usize / 8] &= !(1 << (old % 8));
    }
    for (part, start) in [(0..20, first), (20..40, middle), (40..100, end)] {
        patch.set(start * 512, &bits[part.start * 512..part.end * 512]);
    }
    patch.set((first + 20) * 512, &vec![0; 80 * 512]);
    patch.edit(6, |record| {
        let at = attribute(record, 0x80);
        let (old, room) = (le(record, at + 4, 4) as usize, 24);
        record.copy_within(at + old..at + old + 8, at + 64 + room);
        record[at + 64..at + 64 + room].fill(0);
        record[at + 64..at + 64 + pairs.len()].copy_from_slice(&pairs);
        record[at + 4..at + 8].copy_from_slice(&(64 + room as u32).to_le_bytes());
        let used = (at + 64 + room + 8) as u32;
        record[24..28].copy_from_slice(&used.to_le_bytes());
    });
    assert!(run("ntfsinfo", &["-i", "6", "-v", text(&image)]).contains("fragments: 3"));
    assert_map_is_exact("in three pieces", &image);
    assert_copy_is_whole("in three pieces", &image);
}

/// Makes small changes to copies of one image, and asks why they are copied whole.
struct Changed {
    _dir: TempDir,
    image: PathBuf,
    copy: PathBuf,
}

impl Changed {
    fn new(args: &str) -> Changed {
        let dir = tempfile::tempdir().unwrap();
        let (image, copy) = (dir.path().join("fs"), dir.path().join("changed"));
        mkfs(&image, 40 * MIB + 512, args);
        age(Mount::new(&image, "rw").path(), 3, 100, 60_000);
        Changed { _dir: dir, image, copy }
    }

    fn with(&self, change: impl FnOnce(&Patch)) -> &Path {
        copy_image(&self.image, &self.copy);
        change(&Patch::new(&self.copy));
        &self.copy
    }

    fn whole(&self, name: &str, reason: &str, change: impl FnOnce(&Patch)) {
        let found = whole_because(name, self.with(change));
        assert!(found.contains(reason), "{name}: {found}");
    }
}

#[test]
fn what_cannot_be_mapped_for_sure_is_copied_whole() {
    let changed = Changed::new("-c 4096");
    let whole = |name: &str, reason: &str, change: &dyn Fn(&Patch)| changed.whole(name, reason, change);
    assert!(matches!(open(changed.with(|_| ())).volumes()[0].usage, Usage::Mapped { .. }));
    for (name, reason, at, bytes) in [
        ("no signature", "signature", 510, &[0][..]),
        ("a partition", "also a table of partitions", 446 + 4, &[0x83, 0, 0, 0, 1, 0, 0, 0, 1]),
        ("reserved sectors", "fields of FAT", 14, &[1]),
        ("FATs", "fields of FAT", 16, &[2]),
        ("length of FAT", "fields of FAT", 32, &[0, 1]),
        ("no sector size", "sector size", 11, &[0, 0]),
        ("odd sector size", "sector size", 11, &[1, 2]),
        ("sectors of 8 KiB", "sector size", 11, &[0, 32]),
        ("no cluster size", "cluster size", 13, &[0]),
        ("odd cluster size", "cluster size", 13, &[3]),
        ("clusters of 512", "MFT", 13, &[1]),
        ("clusters of 8 KiB", "MFT", 13, &[16]),
        ("clusters that are no size", "cluster size", 13, &[0x81]),
        ("clusters of 4 MiB", "cluster size", 12, &[0x10, 0xf6]),
        ("no sectors", "number of sectors", 40, &[0; 8]),
        ("more sectors than there are", "number of sectors", 40, &[0xff; 4]),
        ("MFT beyond the end", "first cluster of the MFT", 48, &[0xff; 8]),
        ("MFT elsewhere", "record 0", 48, &[5]),
        ("mirror beyond the end", "mirror", 56, &[0xff; 8]),
        ("mirror elsewhere", "mirror", 56, &[9]),
        ("records of 128 bytes", "record size", 64, &[0xf9]),
        ("records of 512 bytes", "record 0", 64, &[0xf7]),
        ("records of 8 KiB", "record size", 64, &[2]),
    ] {
        whole(name, reason, &|patch| patch.set(at, bytes));
    }
    whole("longer than the disk", "number of sectors", &|patch| patch.file.set_len(39 * MIB).unwrap());
    let cut = changed.with(|patch| patch.set(3, b"-FVE-FS-"));
    let map = open(cut);
    assert_eq!(map.volumes()[0].content.name(), "BitLocker");
    assert_eq!(map.used_bytes(), fs::metadata(cut).unwrap().len());

    for (flags, reason) in [
        (0x1_u16, "dirty"),
        (0x2, "flags 0x0002"),
        (0x4, "flags 0x0004"),
        (0x20, "flags 0x0020"),
        (0x40, "flags 0x0040"),
        (0x4000, "flags 0x4000"),
        (0x8000, "flags 0x8000"),
        (0x8001, "dirty"),
    ] {
        whole(&format!("{flags:#x}"), reason, &|patch| {
            patch.edit(3, |record| {
                let at = attribute(record, 0x70) + 24 + 10;
                record[at..at + 2].copy_from_slice(&flags.to_le_bytes());
            });
        });
    }
    for version in [[1, 1], [2, 0], [3, 2], [4, 0]] {
        whole("version", &format!("version {}.{}", version[0], version[1]), &|patch| {
            patch.edit(3, |record| {
                let at = attribute(record, 0x70) + 24 + 8;
                record[at..at + 2].copy_from_slice(&version);
            });
        });
    }
    for (name, number, reason, at, bytes) in [
        ("no magic", 0, "record 0", 0, &b"BAAD"[..]),
        ("no magic", 6, "record 6", 0, b"BAAD"),
        ("not in use", 6, "not in use", 22, &[0]),
        ("belongs to another", 6, "belongs to another", 32, &[9]),
        ("another number", 6, "another number", 44, &[7]),
        ("another number", 2, "another number", 44, &[7]),
        ("too long", 6, "wrong length", 24, &[0xff; 4]),
        ("long", 6, "wrong length", 28, &[0, 8]),
        ("attributes elsewhere", 6, "attributes", 20, &[0xf8, 3]),
        ("attributes far away", 6, "attributes", 20, &[0xf8, 0xff]),
        ("odd attributes", 6, "attributes", 20, &[0x39]),
        ("empty attribute", 6, "attributes", 0x38 + 4, &[0, 0]),
        ("long attribute", 6, "attributes", 0x38 + 4, &[0, 4]),
        ("other attributes", 6, "several records", 0x38, &[0x20]),
        ("other attributes", 2, "several records", 0x38, &[0x20]),
    ] {
        whole(name, reason, &|patch| {
            patch.edit(number, |record| record[at..at + bytes.len()].copy_from_slice(bytes))
        });
    }
    whole("torn", "in part", &|patch| patch.set(patch.mft + 6 * 1024 + 510, b"xx"));
    whole("mirror damaged", "mirror", &|patch| patch.set(patch.mirror + 1024, b"xx"));
    whole("mirror differs", "mirror", &|patch| patch.set(patch.mirror + 3 * 1024 + 16, b"\x33"));
    for (name, reason, at, bytes) in [
        ("resident", "attributes", 8, &[0][..]),
        ("compressed", "compressed", 12, &[1, 0]),
        ("encrypted", "compressed", 12, &[0, 0x40]),
        ("sparse", "compressed", 12, &[0, 0x80]),
        ("a part of it", "contradict", 16, &[1]),
        ("more than its runs", "contradict", 24, &[9]),
        ("allocated in part", "several records", 41, &[0x20]),
        ("shorter", "$Bitmap has", 48, &[0, 1, 0, 0, 0, 0, 0, 0, 0, 1]),
        ("written in part", "$Bitmap has", 56, &[0, 1]),
        ("run list elsewhere", "contradict", 32, &[0xff]),
        ("sparse run", "sparse", 64, &[0x01]),
        ("run beyond the end", "clusters", 64, &[0x31, 1, 0xff, 0xff, 0x7f]),
        ("run before the start", "clusters", 64, &[0x11, 1, 0xff]),
        ("run over the MFT", "share clusters", 64, &[0x11, 1, 4, 0]),
        ("run over the boot code", "share clusters", 64, &[0x11, 1, 0, 0]),
        ("run elsewhere", "metadata", 64, &[0x21, 1, 0, 9, 0]),
    ] {
        whole(name, reason, &|patch| {
            patch.edit(6, |record| {
                let at = attribute(record, 0x80) + at;
                record[at..at + bytes.len()].copy_from_slice(bytes);
            });
        });
    }
    // Each of the file system's own files as free.
    for (name, number) in [("MFT", 0), ("mirror", 1), ("log", 2), ("bitmap", 6), ("boot code", 7)] {
        whole(name, "free, which hold metadata", &|patch| {
            let (bitmap, last) = (patch.place(6).start, patch.place(number).start / patch.cluster);
            let byte = patch.read(bitmap + last / 8, 1)[0] & !(1 << (last % 8));
            patch.set(bitmap + last / 8, &[byte]);
        });
    }
}

/// A restart page of `size` bytes.
fn restart_page(size: usize, lsn: u64, in_use: u16, flags: u16, version: (u16, u16)) -> Vec<u8> {
    let mut page = vec![0; size];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    let usa = 1 + size / 512;
    let area = (0x1e + 2 * usa).next_multiple_of(8);
    put(0, b"RSTR");
    put(4, &0x1e_u16.to_le_bytes());
    put(6, &(usa as u16).to_le_bytes());
    put(16, &(size as u32).to_le_bytes());
    put(20, &4096_u32.to_le_bytes());
    put(24, &(area as u16).to_le_bytes());
    put(26, &version.1.to_le_bytes());
    put(28, &version.0.to_le_bytes());
    put(0x1e, &7_u16.to_le_bytes());
    // The restart area: one client, "NTFS", in use or free.
    put(area, &lsn.to_le_bytes());
    put(area + 8, &1_u16.to_le_bytes());
    put(area + 10, &(if in_use == 0 { 0xffff_u16 } else { 0 }).to_le_bytes());
    put(area + 12, &in_use.to_le_bytes());
    put(area + 14, &flags.to_le_bytes());
    let file_size = 2 * MIB;
    let bits = 67 - (64 - file_size.leading_zeros());
    put(area + 16, &bits.to_le_bytes());
    put(area + 20, &(0x30_u16 + 160).to_le_bytes());
    put(area + 22, &0x30_u16.to_le_bytes());
    put(area + 24, &file_size.to_le_bytes());
    put(area + 36, &0x30_u16.to_le_bytes());
    put(area + 38, &0x40_u16.to_le_bytes());
    let client = area + 0x30;
    put(client + 16, &0xffff_u16.to_le_bytes());
    put(client + 18, &0xffff_u16.to_le_bytes());
    put(client + 28, &8_u32.to_le_bytes());
    put(client + 32, b"N\0T\0F\0S\0");
    protect(&mut page, true);
    page
}

#[test]
fn a_log_to_be_replayed_makes_all_used_and_so_does_one_ntfs_3g_refuses() {
    let changed = Changed::new("-c 4096");
    let page = |lsn, in_use, flags| restart_page(4096, lsn, in_use, flags, (1, 1));
    let two = |first: &[u8], second: &[u8]| [first, second].concat();
    let clean = page(9, 0, 2);
    let large = |lsn, flags| restart_page(65_536, lsn, 0, flags, (1, 1));
    let torn = |at: usize| {
        let mut bytes = two(&page(9, 0, 2), &page(9, 0, 2));
        bytes[at] ^= 1;
        bytes
    };
    for (name, log, reason) in [
        ("clean", two(&clean, &clean), ""),
        ("no client", two(&page(8, 0xffff, 0), &page(9, 0xffff, 0)), ""),
        ("the newer is clean", two(&page(8, 0, 0), &page(9, 0, 2)), ""),
        ("the newer comes first and is clean", two(&page(9, 0, 2), &page(8, 0, 0)), ""),
        ("larger pages", two(&large(8, 0), &large(9, 2)), ""),
        ("open", two(&page(9, 0, 0), &page(9, 0, 0)), "must be replayed"),
        ("the newer is open", two(&page(8, 0, 2), &page(9, 0, 0)), "must be replayed"),
        ("the newer comes first and is open", two(&page(9, 0, 0), &page(8, 0, 2)), "must be replayed"),
        ("one of two is open", two(&page(9, 0, 2), &page(9, 0, 0)), "must be replayed"),
        ("larger pages, open", two(&large(8, 2), &large(9, 0)), "must be replayed"),
        ("fast start-up", restart_page(4096, 9, 0, 2, (2, 0)).repeat(2), "not let go"),
        ("fast start-up in one", two(&clean, &restart_page(4096, 9, 0, 2, (2, 0))), "not let go"),
        ("version 3", restart_page(4096, 9, 0, 2, (3, 0)).repeat(2), "version 3.0"),
        ("one page", two(&clean, &[0xff; 4096]), "damaged"),
        ("torn", torn(510), "in part"),
        ("torn in the other", torn(4096 + 1022), "in part"),
        ("checked by chkdsk", two(b"CHKD", &clean), "no restart page"),
        ("zeroes", vec![0; MIB as usize], "no restart page"),
        ("not quite empty", two(&[0xff; 8192], b"x"), "no restart page"),
    ] {
        let image = changed.with(|patch| patch.set(patch.place(2).start, &log));
        let (refused, _, err) = try_run("ntfs-3g.probe", &["--readwrite", text(image)]);
        if reason.is_empty() {
            assert_eq!(refused, 0, "{name}: {err}");
            assert_map_is_exact(name, image);
        } else {
            let found = whole_because(name, image);
            assert!(found.contains("$LogFile") && found.contains(reason), "{name}: {found}");
        }
    }
}

#[test]
fn a_volume_on_which_a_system_sleeps_is_copied_whole() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let start = |magic: &[u8]| [magic, &[0; 10_000]].concat();
    for (args, others) in [("-c 4096", 0), ("-c 4096", 700), ("-c 512", 300), ("-c 65536", 300)] {
        for (name, content, asleep) in [
            ("hiberfil.sys", start(b"hibr"), true),
            ("HIBERFIL.SYS", start(b"HIBR"), true),
            ("hiberfil.sys", b"hibr".to_vec(), true),
            ("hiberfil.sys", start(&[&[0; 4000][..], b"x"].concat()), true),
            ("hiberfil.sys", start(b""), false),
            ("hiberfil.sys", b"".to_vec(), true),
            ("hiberfil.sy", start(b"hibr"), false),
            ("xhiberfil.sys", start(b"hibr"), false),
        ] {
            mkfs(&image, 60 * MIB, args);
            let mount = Mount::new(&image, "rw");
            for i in 0..others {
                File::create(mount.path().join(format!("{i:03} a name that takes some room"))).unwrap();
            }
            fs::write(mount.path().join(name), &content).unwrap();
            // Some of the index's blocks are free again.
            (0..others).filter(|i| i % 10 > 1).for_each(|i| {
                fs::remove_file(mount.path().join(format!("{i:03} a name that takes some room"))).unwrap();
            });
            drop(mount);
            let name = format!("{args} {name} of {} bytes among {others}", content.len());
            let usage = open(&image).volumes()[0].usage.clone();
            let (refused, _, err) = try_run("ntfs-3g.probe", &["--readwrite", text(&image)]);
            assert!(asleep || refused == 0, "{name}: {err}");
            if asleep {
                assert!(whole_because(&name, &image).contains("sleep"), "{name}");
            } else {
                assert!(matches!(usage, Usage::Mapped { .. }), "{name}: {usage:?}");
            }
        }
    }
}

/// Only a part of a large bitmap is read before the copy gets there, and a part that cannot be read is used.
#[test]
fn a_large_bitmap_is_read_in_parts_and_a_part_in_doubt_is_used_and_reported() {
    const PART: u64 = 512 << 10;
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 4 * TIB, "-c 4096");
    let patch = Patch::new(&image);
    let (bitmap, size) = (patch.place(6), 4 * TIB);
    assert_eq!(bitmap.len() / PART, 256);
    let disk = Arc::new(FaultyDisk::new(DiskFile::open(&image).unwrap(), Vec::new()));
    let map = layout::used_map(Arc::clone(&disk) as _).unwrap();
    assert!(disk.bytes_read() < 40 * MIB, "{} bytes read", disk.bytes_read());
    let free = rest(&used(&map, size), size);
    assert!(disk.bytes_read() < 200 * MIB, "{} bytes read", disk.bytes_read());
    let estimated = size - map.used_bytes();
    assert!(estimated.abs_diff(free.bytes()) < size / 100, "{estimated} and {}", free.bytes());

    // Clusters by the numbers of the part that speaks of them.
    let spoken = |part: u64| Extent::at(part * PART * 8 * 4096, PART * 8 * 4096);
    let expected = |part: u64| {
        let mut expected = free.clone();
        expected.remove(spoken(part));
        expected
    };
    let bad = Extent::at(bitmap.start + 101 * PART + 4096, 512);
    let disk = FaultyDisk::new(DiskFile::open(&image).unwrap(), vec![bad]);
    let map = layout::used_map(Arc::new(disk)).unwrap();
    assert_eq!(rest(&used(&map, size), size), expected(101));
    assert!(map.findings()[0].what.contains("bitmap part 101"), "{:?}", map.findings());
    // What is read at once stops everything.
    let bad = Extent::at(bitmap.start + 100 * PART + 4096, 512);
    let disk = FaultyDisk::new(DiskFile::open(&image).unwrap(), vec![bad]);
    let map = layout::used_map(Arc::new(disk)).unwrap();
    assert_eq!(map.used_bytes(), size);
}

/// Damage of a small file system. What the bitmap itself loses is lost; damage of all else loses nothing.
fn damage(rounds: u64) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut random = Random::new(2025);
    let mut seen = 0;
    let mut total = 0;
    let mut bounds = Bounds::default();
    for (args, sleeps) in
        [("-c 512", false), ("-c 4096", false), ("-c 4096", true), ("-s 4096 -c 4096", false)]
    {
        mkfs(&image, 12 * MIB, args);
        let mount = Mount::new(&image, "rw");
        // Data of zeroes: all that is not zero is metadata.
        for i in 0..300 {
            fs::write(mount.path().join(format!("f{i}")), vec![0; 9000]).unwrap();
        }
        if sleeps {
            fs::write(mount.path().join("hiberfil.sys"), vec![0; 9000]).unwrap();
        }
        run("sync", &["-f", text(mount.path())]);
        (0..300).step_by(2).for_each(|i| fs::remove_file(mount.path().join(format!("f{i}"))).unwrap());
        drop(mount);
        let before = assert_map_is_exact(args, &image);
        let before = rest(&before, fs::metadata(&image).unwrap().len());
        let patch = Patch::new(&image);
        let bitmap = patch.place(6);
        let disk = Arc::new(fs::read(&image).unwrap());
        // The log is full of 0xff, which says nothing.
        let log = patch.place(2);
        let log = log.start as usize + 4096..log.end as usize;
        let within = |at: &usize| (bitmap.start as usize..bitmap.end as usize).contains(at);
        let places: Vec<_> = written(&disk).into_iter().filter(|at| !log.contains(at)).collect();
        let bits: Vec<_> = places.iter().copied().filter(within).collect();
        let places: Vec<_> = places.into_iter().filter(|at| !within(at)).collect();
        let mft = patch.mft as usize;
        let near = |at: &usize| (mft..mft + 8 * patch.record).contains(at);
        let records: Vec<_> = places.iter().copied().filter(near).collect();
        for i in 0..rounds {
            let (places, before) = match i % 4 {
                0 => (&places, Some(&before)),
                1 => (&vec![0], Some(&before)),
                2 => (&records, Some(&before)),
                _ => (&bits, None),
            };
            seen += u64::from(survives_damage(&mut bounds, &disk, places, before, &mut random));
            total += 1;
        }
    }
    assert!(seen > total / 10, "only {seen} of {total} are seen");
    bounds.print(&format!("damaged NTFS file systems, of which the map saw {seen}"));
}

#[test]
fn damage_neither_breaks_haul_nor_loses_what_the_bitmap_calls_used() {
    damage(50);
}

#[test]
#[ignore = "long: 2,000 damaged file systems; scripts/test.sh --long"]
fn a_thousand_damages_neither_break_haul_nor_lose_what_the_bitmap_calls_used() {
    damage(500);
}
