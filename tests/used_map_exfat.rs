//! The used map of exFAT, judged by exfatprogs, partclone and the FUSE driver. Needs root for loop devices and FUSE.

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
#[path = "support/fat.rs"]
mod fat;
#[path = "support/maps.rs"]
mod maps;
mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bounds::Bounds;
use damaged_map::{Damaged, survives};
use fat::{Pair, Sites, assert_mapped, boot_sector, changes, files, in_parallel, partclone_judge, put};
use haul::io::DiskFile;
use haul::io::fake::FaultyDisk;
use haul::layout::{self, Content, Usage};
use haul::unit::{Extent, ExtentMap, MIB};
use maps::{masked_copy, whole_because};
use support::{LoopDevice, Random, age, copy_image, empty_image, run, text, try_run, unmount};

/// Makes an exFAT by mkfs.exfat's arguments in an image of `mib` MiB and a bit.
fn mkfs_exfat(image: &Path, mib: u64, args: &str) {
    empty_image(image, mib * MIB + 700);
    let words = ["LC_ALL=C.UTF-8", "mkfs.exfat"].into_iter().chain(args.split_whitespace());
    run("env", &words.chain([text(image)]).collect::<Vec<_>>());
}

/// An exFAT mounted by its FUSE driver; unmounted when dropped.
struct FuseMount {
    dir: Option<tempfile::TempDir>,
    _device: LoopDevice,
}

impl FuseMount {
    fn new(image: &Path, options: &str) -> FuseMount {
        let (dir, device) = (tempfile::tempdir().unwrap(), LoopDevice::new(image, 512));
        run("mount.exfat-fuse", &["-o", options, text(&device.path), text(dir.path())]);
        FuseMount { dir: Some(dir), _device: device }
    }

    fn path(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        self.dir.take().into_iter().for_each(unmount);
    }
}

/// Name, size in MiB, arguments of mkfs.exfat, files to write and their largest size.
const EXFATS: &[(&str, u64, &str, u64, u64)] = &[
    ("exfat", 64, "", 300, 100_000),
    ("exfat 512", 20, "-c 512", 300, 30_000),
    ("exfat 32K", 400, "-c 32K", 200, 400_000),
    ("exfat 1M", 900, "-c 1M", 100, 400_000),
    ("exfat 32M", 2000, "-c 32M", 10, 400_000),
    ("exfat packed", 33, "-c 4K --pack-bitmap", 300, 100_000),
    ("exfat aligned", 200, "-c 8K -b 4M", 200, 400_000),
];

/// What partclone copies of an exFAT. It leaves out what lies between the tables and the first cluster, and what is
/// behind the last.
fn exfat_judge(image: &Path) -> ExtentMap {
    let size = fs::metadata(image).unwrap().len();
    let raw = boot_sector(image);
    let sector = 1_u64 << raw[108];
    let field = |at: usize| u64::from(u32::from_le_bytes(raw[at..at + 4].try_into().unwrap()));
    let heap = Extent::at(field(88) * sector, (field(92) * sector) << raw[109]);
    let mut judge = partclone_judge("partclone.exfat", image);
    judge.insert(Extent::new(0, heap.start));
    judge.insert(Extent::new(heap.end, size));
    judge
}

/// Clusters in use as dump.exfat counts them, in bytes; none when it finds no file system.
fn dump_exfat(image: &Path) -> Option<u64> {
    let (code, out, _) = try_run("dump.exfat", &[text(image)]);
    let field = |name: &str| {
        let line = out.lines().find(|line| line.starts_with(name))?;
        line.split(':').nth(1)?.trim().parse::<u64>().ok()
    };
    let counts = (field("Cluster size")?, field("Total Clusters")?, field("Free Clusters")?);
    (code == 0).then(|| counts.0 * (counts.1 - counts.2))
}

#[test]
fn fresh_and_aged_exfats_are_mapped_as_partclone_and_dump_see_them() {
    let dir = tempfile::tempdir().unwrap();
    in_parallel(EXFATS, |i, (name, mib, args, files_written, largest)| {
        let image = dir.path().join(format!("fs{i}"));
        mkfs_exfat(&image, *mib, args);
        assert_eq!(assert_mapped(name, &image), exfat_judge(&image), "fresh {name}");
        let mount = FuseMount::new(&image, "rw");
        age(mount.path(), i as u64 + 1, *files_written, *largest);
        // Into the gaps: in pieces, a file needs the table.
        fs::write(mount.path().join("large"), Random::new(9).bytes(*largest as usize * 4)).unwrap();
        drop(mount);
        let map = assert_mapped(name, &image);
        assert_eq!(map, exfat_judge(&image), "aged {name}");
        let heap = exfat_sites(&image).heap;
        let in_heap: u64 = map.within(heap).map(|run| run.len()).sum();
        assert_eq!(dump_exfat(&image), Some(in_heap), "{name}");
        // The files of a copy of the used bytes only are the same.
        let copy = image.with_extension("copy");
        masked_copy(&image, &copy);
        run("fsck.exfat", &["-n", text(&copy)]);
        let before = files(FuseMount::new(&image, "ro").path());
        let after = files(FuseMount::new(&copy, "ro").path());
        assert!(before.len() as u64 >= files_written / 2, "{name}: {} files", before.len());
        assert!(before == after, "{name}: files differ");
        fs::remove_file(&copy).unwrap();
        fs::remove_file(&image).unwrap();
    });
}

#[test]
fn label_and_serial_are_those_blkid_prints() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let blkid =
        |tag: &str| try_run("blkid", &["-p", "-o", "value", "-s", tag, text(&image)]).1.trim().to_owned();
    for (args, label) in [("-L données", "données"), ("", ""), ("-L abcdefghijk", "abcdefghijk")] {
        mkfs_exfat(&image, 8, args);
        let content = layout::identify(&DiskFile::open(&image).unwrap()).unwrap();
        let Content::Exfat(info) = content else { panic!("{args}: {content:?}") };
        assert_eq!((info.label.as_str(), info.cluster_size), (label, 4096), "{args}");
        assert_eq!(info.label, blkid("LABEL"), "{args}");
        assert_eq!(info.serial.unwrap_or_default(), blkid("UUID"), "{args}");
    }
}

fn exfat_sites(image: &Path) -> Sites {
    let out = run("dump.exfat", &[text(image)]);
    let field = |name: &str| {
        let line = out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {out}"));
        line.split(':').nth(1).unwrap().trim().parse::<u64>().unwrap()
    };
    let sector = 1 << field("Sector Size Bits");
    let cluster = sector << field("Sector per Cluster bits");
    let heap = Extent::at(field("Cluster Heap Offset") * sector, field("Cluster Count") * cluster);
    let table = field("FAT Offset") * sector;
    let place = |name: &str| heap.start + (field(name) - 2) * cluster;
    let (root, bitmap) = (place("Root Cluster"), place("Bitmap start cluster"));
    let metadata = vec![
        0..128,
        0..12 * sector,
        table..table + 64,
        table..table + field("FAT Length") * sector,
        root..root + 128,
        root..root + 512,
    ];
    Sites {
        heap,
        table,
        table_len: field("FAT Length") * sector,
        metadata,
        bitmap: bitmap..bitmap + field("Bitmap size"),
    }
}

/// The same for exFAT; where the bitmap is damaged, it is still the bitmap that counts.
fn damage_exfat(rounds: u64, judged: u64) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut random = Random::new(2027);
    mkfs_exfat(&image, 8, "-c 512");
    let mount = FuseMount::new(&image, "rw");
    age(mount.path(), 4, 60, 20_000);
    drop(mount);
    let sites = exfat_sites(&image);
    let mut before = assert_mapped("exfat", &image);
    before.remove(Extent::new(sites.heap.end, u64::MAX));
    let disk = Arc::new(fs::read(&image).unwrap());
    let (mut seen, mut compared, mut bounds) = (0, 0, Bounds::default());
    for i in 0..rounds {
        let in_bitmap = i % 4 == 0;
        let places = if in_bitmap { vec![sites.bitmap.clone()] } else { sites.metadata.clone() };
        let changes = changes(&disk, &places, &mut random);
        let damaged = || Damaged { disk: Arc::clone(&disk), size: disk.len(), changes: changes.clone() };
        let (used, whole) = survives(&mut bounds, damaged(), (!in_bitmap).then_some(&before));
        seen += u64::from(whole);
        if whole || compared >= judged {
            continue;
        }
        compared += 1;
        let pair = Pair::new(dir.path(), &damaged());
        let in_heap = used.within(sites.heap).map(|run| run.len()).sum();
        assert_eq!(dump_exfat(&pair.damaged), Some(in_heap), "{changes:?}");
        let [one, other] = pair.ask(&["fsck.exfat", "-n"]);
        assert!(in_bitmap || one == other, "{changes:?}: {one:?} and {other:?}");
    }
    bounds.print(&format!(
        "damaged exFAT file systems, of which the map saw {seen} and others read {compared}"
    ));
    assert!(seen > rounds / 10 && compared >= judged.min(rounds / 10), "{seen} of {rounds} are seen");
}

#[test]
fn damaged_exfats_lose_no_used_byte() {
    damage_exfat(150, 20);
}

#[test]
#[ignore = "long: 2,000 damaged file systems, hundreds of them read by others; scripts/test.sh --long"]
fn thousands_of_damaged_exfats_lose_no_used_byte() {
    damage_exfat(2000, 300);
}

/// The checksum of an exFAT's boot region made right again.
fn seal(image: &Path) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let sector = 1 << boot_sector(image)[108];
    let mut region = vec![0; 11 * sector];
    file.read_exact_at(&mut region, 0).unwrap();
    let mut sum = 0_u32;
    for (_, byte) in region.iter().enumerate().filter(|(at, _)| ![106, 107, 112].contains(at)) {
        sum = sum.rotate_right(1).wrapping_add(u32::from(*byte));
    }
    file.write_all_at(&sum.to_le_bytes().repeat(sector / 4), region.len() as u64).unwrap();
}

#[test]
fn an_exfat_that_contradicts_itself_is_copied_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (image, fresh) = (dir.path().join("fs"), dir.path().join("fresh"));
    mkfs_exfat(&fresh, 20, "");
    let mount = FuseMount::new(&fresh, "rw");
    fs::write(mount.path().join("file"), [7; 20_000]).unwrap();
    drop(mount);
    assert_mapped("fresh", &fresh);
    let heap = exfat_sites(&fresh).heap.start;
    let raw = fs::read(&fresh).unwrap();
    let sector = 512;
    let field = |at: usize| u64::from(u32::from_le_bytes(raw[at..at + 4].try_into().unwrap()));
    let (table, root) = (field(80) * sector, heap + (field(96) - 2) * 4096);
    let entry = |kind: u8| {
        let entries = raw[root as usize..].chunks(32).take(16);
        root + 32 * entries.map(|entry| entry[0]).position(|found| found == kind).unwrap() as u64
    };
    let (bitmap, upcase, stream) = (entry(0x81), entry(0x82), entry(0xc0));
    let root_entry = table + 4 * field(96);
    let number = |at: u64| u32::from_le_bytes(raw[at as usize..at as usize + 4].try_into().unwrap());
    let bits = heap + u64::from(number(bitmap + 20) - 2) * 4096;
    let file = u64::from(number(stream + 20) - 2);
    let lost = raw[(bits + file / 8) as usize] & !(1 << (file % 8));
    for (name, at, bytes, reason) in [
        ("mounted", 106, &[2][..], "not unmounted"),
        ("second table in use", 106, &[1], "volume flags are 0x1"),
        ("errors of the disk", 106, &[4], "volume flags are 0x4"),
        ("two tables", 110, &[2], "number of tables is 2"),
        ("newer", 105, &[2], "revision"),
        ("parameter block", 11, &[2], "BIOS parameter block"),
        ("sector size", 108, &[8], "size exponents are 8"),
        ("cluster size", 109, &[17], "size exponents are 9 and 17"),
        ("longer than its volume", 74, &[9], "length"),
        ("table in the boot region", 80, &[23, 0, 0, 0], "table's place"),
        ("short table", 84, &[1, 0, 0, 0], "table length"),
        ("clusters over the table", 88, &[24, 0, 0, 0], "cluster heap's place"),
        ("clusters behind the end", 92, &[0xfe, 0x13], "cluster count"),
        ("no clusters", 92, &[0; 4], "cluster count"),
        ("no signature", 510, &[0; 2], "no signature"),
        ("no root directory", 96, &[0; 4], "chain leads to cluster 0"),
        ("root directory behind the end", 98, &[1], "chain leads to cluster"),
        ("media byte", table, &[0xf0], "no allocation table"),
        ("second entry", table + 4, &[0; 4], "no allocation table"),
        ("root directory in a circle", root_entry, &field(96).to_le_bytes()[..4], "too long"),
        ("no bitmap", bitmap, &[1], "lists 0 allocation bitmaps"),
        ("second bitmap", bitmap + 1, &[1], "lists 1 allocation bitmaps"),
        ("two bitmaps", upcase, &[0x81, 0], "lists 2 allocation bitmaps"),
        ("no up-case table", upcase, &[2], "lists 0 up-case tables"),
        ("short bitmap", bitmap + 24, &[9, 0], "is not of 9 bytes"),
        ("endless bitmap", bitmap + 28, &[0xff; 4], "is not of"),
        ("bitmap elsewhere", bitmap + 20, &[99], "the chain of cluster 99 is not of"),
        ("lost bitmap", bits, &[0], "cluster 2 of its own metadata is not in use"),
        ("lost file", bits + file / 8, &[lost], "of a file is not in use"),
        ("file behind the end", stream + 22, &[9], "of a file is not in use"),
    ] {
        copy_image(&fresh, &image);
        put(&image, at, bytes);
        seal(&image);
        let found = whole_because(name, &image);
        assert!(found.contains(reason), "{name}: {found}");
    }
    copy_image(&fresh, &image);
    put(&image, 300, &[1]);
    assert!(whole_because("another boot program", &image).contains("checksum"));
    seal(&image);
    assert_eq!(assert_mapped("sealed", &image), assert_mapped("fresh", &fresh));
    // What changes while it is mounted is not in the checksum.
    put(&image, 106, &[8]);
    put(&image, 112, &[77]);
    assert_mapped("cleared", &image);
}

#[test]
fn a_bitmap_that_cannot_be_read_any_more_counts_as_used() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs_exfat(&image, 20, "");
    let bitmap = exfat_sites(&image).bitmap;
    let disk = FaultyDisk::new(DiskFile::open(&image).unwrap(), vec![Extent::new(bitmap.start, bitmap.end)]);
    let map = layout::used_map(Arc::new(disk)).unwrap();
    let Usage::Whole { reason } = &map.volumes()[0].usage else { panic!("it is mapped") };
    assert!(reason.contains("cannot read"), "{reason}");
}
