//! The used map and partition tables, judged by e2fsprogs, the kernel and util-linux. Needs root for loop mounts.

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
use std::path::Path;
use std::sync::Arc;

use bounds::Bounds;
use damaged_map::{Damaged, changed, survives, survives_damage, written};
use haul::io::fake::FaultyDisk;
use haul::io::{DiskFile, WriteAt};
use haul::layout::{self, Content, PartitionType, TableKind, Usage};
use haul::unit::{Extent, ExtentMap, MIB};
use maps::{masked_copy, open, rest, used, whole_because};
use support::{LoopDevice, LoopMount, Random, age, copy_image, empty_image, run, text, try_run};

/// The free bytes of an ext image by dumpe2fs's lists.
fn dumpe2fs_free(image: &Path) -> ExtentMap {
    let out = run("dumpe2fs", &[text(image)]);
    let number = |line: &str| line.split(':').nth(1).unwrap().trim().parse::<u64>().unwrap();
    let block = out.lines().find(|line| line.starts_with("Block size:")).map(number).unwrap();
    let mut free = ExtentMap::new();
    for list in out.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for run in list.split(',').map(str::trim).filter(|run| !run.is_empty()) {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
            free.insert(Extent::new(first * block, (last + 1) * block));
        }
    }
    free
}

/// What dumpe2fs calls free before and after e2fsck replayed the journal in a copy.
fn free_before_and_after(image: &Path) -> ExtentMap {
    let before = dumpe2fs_free(image);
    let copy = image.with_extension("replayed");
    copy_image(image, &copy);
    let (code, out, err) = try_run("e2fsck", &["-y", "-E", "journal_only", text(&copy)]);
    assert!(code < 4, "e2fsck: {code} {out}{err}");
    let after = dumpe2fs_free(&copy);
    fs::remove_file(&copy).unwrap();
    before.iter().flat_map(|run| after.within(run).collect::<Vec<_>>()).collect()
}

/// Every block outside the oracle's lists is used, and every block in them is not.
fn assert_map_is_exact(name: &str, image: &Path, free: &ExtentMap) {
    let size = fs::metadata(image).unwrap().len();
    let map = open(image);
    let usage = &map.volumes()[0].usage;
    assert!(matches!(usage, Usage::Mapped { .. }), "{name}: {usage:?}");
    let used = used(&map, size);
    let unused = rest(&used, size);
    for run in unused.iter() {
        assert!(free.covers(run), "{name}: used by dumpe2fs, not by the map: somewhere in {run:?}");
    }
    assert_eq!(unused.bytes(), free.bytes(), "{name}: the map calls more used than dumpe2fs");
    assert_eq!(map.findings(), [], "{name}");
    assert_eq!(used.bytes(), layout::count_used(&map, Extent::new(0, size)).unwrap());
}

/// Name, size in MiB, mkfs and its arguments. All can be mounted with pages of 4 KiB.
const MOUNTABLE: &[(&str, u64, &str)] = &[
    ("ext2 1k", 40, "mkfs.ext2 -b 1024"),
    ("ext2 2k", 40, "mkfs.ext2 -b 2048"),
    ("ext2 4k dense super", 300, "mkfs.ext2 -b 4096 -O ^sparse_super,^resize_inode"),
    ("ext2 rev 0", 40, "mkfs.ext2 -b 1024 -r 0"),
    ("ext3 1k", 60, "mkfs.ext3 -b 1024"),
    ("ext3 4k", 300, "mkfs.ext3 -b 4096"),
    ("ext4", 600, "mkfs.ext4 -b 4096"),
    ("ext4 1k", 100, "mkfs.ext4 -b 1024"),
    ("ext4 2k", 100, "mkfs.ext4 -b 2048"),
    ("ext4 32bit", 300, "mkfs.ext4 -b 4096 -O ^64bit"),
    ("ext4 32bit 1k", 100, "mkfs.ext4 -b 1024 -O ^64bit"),
    ("ext4 no flex_bg", 600, "mkfs.ext4 -b 4096 -O ^flex_bg"),
    ("ext4 uninit_bg", 600, "mkfs.ext4 -b 4096 -O ^metadata_csum,uninit_bg"),
    ("ext4 uninit_bg 32bit 1k", 100, "mkfs.ext4 -b 1024 -O ^metadata_csum,^64bit,uninit_bg"),
    ("ext4 no checksums", 300, "mkfs.ext4 -b 4096 -O ^metadata_csum,^uninit_bg"),
    ("ext4 seed", 300, "mkfs.ext4 -b 4096 -O metadata_csum_seed"),
    ("ext4 sparse_super2", 600, "mkfs.ext4 -b 4096 -O sparse_super2,^resize_inode"),
    ("ext4 no journal", 300, "mkfs.ext4 -b 4096 -O ^has_journal"),
    ("ext4 meta_bg", 600, "mkfs.ext4 -b 4096 -O meta_bg,^resize_inode"),
    ("ext4 meta_bg 1k", 400, "mkfs.ext4 -b 1024 -O meta_bg,^resize_inode"),
    ("ext4 small groups", 64, "mkfs.ext4 -b 4096 -g 2048 -G 4"),
    ("ext4 odd groups", 64, "mkfs.ext4 -b 1024 -g 1000 -O ^resize_inode"),
    ("ext4 more features", 300, "mkfs.ext4 -O mmp,ea_inode,large_dir,inline_data,verity,encrypt"),
    ("ext4 large", 20_000, "mkfs.ext4 -b 4096"),
];

fn mkfs(image: &Path, mib: u64, command: &str) {
    empty_image(image, mib * MIB + 12_288);
    let mut words = command.split(' ');
    let program = words.next().unwrap();
    let mut args: Vec<&str> = words.collect();
    args.extend(["-q", "-F", text(image)]);
    run(program, &args);
}

#[test]
fn fresh_and_aged_file_systems_are_mapped_as_dumpe2fs_lists_them() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, (name, mib, command)) in (1..).zip(MOUNTABLE) {
        let image = dir.path().join("fs");
        mkfs(&image, *mib, command);
        assert_map_is_exact(&format!("fresh {name}"), &image, &dumpe2fs_free(&image));
        let mount = LoopMount::new(&image, "");
        age(mount.path(), seed, 200, (mib * MIB / 400).min(400_000));
        drop(mount);
        assert_map_is_exact(&format!("aged {name}"), &image, &dumpe2fs_free(&image));
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn what_this_host_cannot_mount_is_mapped_as_dumpe2fs_lists_it() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    age(&tree, 7, 60, 300_000);
    for options in ["-b 8192", "-b 16384", "-b 32768", "-b 65536", "-O quota,project,casefold"] {
        let image = dir.path().join("fs");
        mkfs(&image, 900, &format!("mkfs.ext4 {options} -d {}", text(&tree)));
        assert_map_is_exact(options, &image, &dumpe2fs_free(&image));
    }
}

/// Makes a crash-consistent copy of a mounted file system in which `fsynced` is safe but not checkpointed.
fn crash(image: &Path, copy: &Path, options: &str, fsynced: &[u8]) {
    let mount = LoopMount::new(image, options);
    age(mount.path(), 3, 60, 60_000);
    let file = File::create(mount.path().join("fsynced")).unwrap();
    file.write_all_at(fsynced, 0).unwrap();
    file.sync_all().unwrap();
    copy_image(image, copy);
}

#[test]
fn dirty_journals_are_replayed_and_no_fsynced_file_is_lost() {
    let fsynced = Random::new(11).bytes(9_000_000);
    let dir = tempfile::tempdir().unwrap();
    let variants: &[(&str, &str, &str)] = &[
        ("ext3 1k", "mkfs.ext3 -b 1024", ""),
        ("ext3 4k", "mkfs.ext3 -b 4096", ""),
        ("ext4", "mkfs.ext4 -b 4096", ""),
        ("ext4 1k", "mkfs.ext4 -b 1024", ""),
        ("ext4 small journal", "mkfs.ext4 -b 1024 -J size=2", ""),
        ("ext4 32bit", "mkfs.ext4 -b 4096 -O ^64bit", ""),
        ("ext4 uninit_bg", "mkfs.ext4 -b 4096 -O ^metadata_csum,uninit_bg", ""),
        ("ext4 sum v1", "mkfs.ext4 -b 4096 -O ^metadata_csum,uninit_bg", "journal_checksum"),
        (
            "ext4 async",
            "mkfs.ext4 -b 4096 -O ^metadata_csum,uninit_bg",
            "journal_async_commit,data=writeback",
        ),
        ("ext4 data=journal", "mkfs.ext4 -b 4096", "data=journal"),
        ("ext4 meta_bg", "mkfs.ext4 -b 1024 -O meta_bg,^resize_inode", ""),
    ];
    for (name, command, options) in variants {
        let (image, copy) = (dir.path().join("fs"), dir.path().join("copy"));
        // The kernel may write metadata back at any time, and then the replay has nothing to add.
        let free = (0..20).find_map(|_| {
            mkfs(&image, 160, command);
            crash(&image, &copy, options, &fsynced);
            let free = free_before_and_after(&copy);
            (free.bytes() < dumpe2fs_free(&copy).bytes()).then_some(free)
        });
        let free = free.unwrap_or_else(|| panic!("{name}: the replay never changes anything"));
        let Content::Ext(info) = layout::identify(&DiskFile::open(&copy).unwrap()).unwrap() else { panic!() };
        assert!(info.needs_recovery, "{name}: the journal was not left dirty");
        assert_map_is_exact(name, &copy, &free);

        let masked = dir.path().join("masked");
        masked_copy(&copy, &masked);
        let mount = LoopMount::new(&masked, "");
        assert!(
            fs::read(mount.path().join("fsynced")).unwrap() == fsynced,
            "{name}: the fsynced file is lost"
        );
        drop(mount);
        let (code, out, _) = try_run("e2fsck", &["-fn", text(&masked)]);
        assert_eq!(code, 0, "{name}: {out}");
    }
}

#[test]
fn what_cannot_be_mapped_for_sure_is_copied_whole() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let whole = |name: &str, reason: &str| {
        let found = whole_because(name, &image);
        assert!(found.contains(reason), "{name}: {found}");
    };
    mkfs(&image, 100, "mkfs.ext4 -O bigalloc");
    whole("bigalloc", "bigalloc");
    mkfs(&image, 100, "mkfs.ext4 -O journal_dev");
    whole("journal device", "");

    mkfs(&image, 100, "mkfs.ext4 -O ^has_journal");
    let copy = dir.path().join("copy");
    let mount = LoopMount::new(&image, "");
    fs::write(mount.path().join("x"), b"x").unwrap();
    run("sync", &["-f", text(mount.path())]);
    copy_image(&image, &copy);
    drop(mount);
    fs::rename(&copy, &image).unwrap();
    whole("unclean without a journal", "not unmounted cleanly");

    mkfs(&image, 100, "mkfs.ext4");
    run("debugfs", &["-w", "-R", "ssv state 3", text(&image)]);
    whole("errors", "errors");
    mkfs(&image, 100, "mkfs.ext4");
    File::options().write(true).open(&image).unwrap().set_len(50 * MIB).unwrap();
    whole("truncated", "block count");

    mkfs(&image, 100, "mkfs.ext4 -b 4096");
    let flip = |offset: u64| {
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    };
    flip(1024 + 0x200);
    whole("superblock", "superblock's checksum");
    flip(1024 + 0x200);
    flip(4096 + 0x10);
    whole("descriptor", "descriptor of block group 0");

    mkfs(&image, 100, "mkfs.ext4");
    let mut entry = [0; 66];
    entry[4] = 0x83;
    entry[8..16].copy_from_slice(&[0, 1, 0, 0, 0, 0, 1, 0]);
    entry[64..].copy_from_slice(&[0x55, 0xaa]);
    File::options().write(true).open(&image).unwrap().write_all_at(&entry, 446).unwrap();
    whole("a table before a file system", "partitioned but also");

    mkfs(&image, 100, "mkfs.ext4 -O fast_commit");
    let mount = LoopMount::new(&image, "");
    fs::write(mount.path().join("x"), b"x").unwrap();
    File::open(mount.path().join("x")).unwrap().sync_all().unwrap();
    copy_image(&image, &copy);
    drop(mount);
    fs::rename(&copy, &image).unwrap();
    whole("fast commits", "fast commits");
}

#[test]
fn a_damaged_bitmap_makes_its_group_used_and_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    for command in ["mkfs.ext4 -b 4096", "mkfs.ext3 -b 4096"] {
        mkfs(&image, 300, command);
        let free = dumpe2fs_free(&image);
        let out = run("dumpe2fs", &[text(&image)]);
        let place = out.split("Block bitmap at ").nth(1).unwrap();
        let bitmap: u64 = place.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
        // A bit near the end of group 0's bitmap: its last blocks are free.
        let file = File::options().write(true).open(&image).unwrap();
        file.write_all_at(&[0x10], bitmap * 4096 + 4000).unwrap();
        let map = open(&image);
        let size = fs::metadata(&image).unwrap().len();
        let unused = rest(&used(&map, size), size);
        let group = 32_768 * 4096;
        assert!(unused.iter().all(|run| run.start >= group), "{command}: group 0 is not copied whole");
        assert_eq!(unused.bytes(), free.within(Extent::new(group, size)).map(|run| run.len()).sum::<u64>());
        assert!(map.findings()[0].what.contains("group 0"), "{:?}", map.findings());
    }
    // A bitmap that cannot be read is no better than a wrong one, and stops nothing.
    mkfs(&image, 300, "mkfs.ext4 -b 4096 -O ^flex_bg");
    let out = run("dumpe2fs", &[text(&image)]);
    let place = out.split("Block bitmap at ").nth(2).unwrap();
    let bitmap: u64 = place.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
    let disk = FaultyDisk::new(DiskFile::open(&image).unwrap(), vec![Extent::at(bitmap * 4096, 4096)]);
    let map = layout::used_map(Arc::new(disk)).unwrap();
    let size = fs::metadata(&image).unwrap().len();
    let unused = rest(&used(&map, size), size);
    let group = Extent::new(32_768 * 4096, 2 * 32_768 * 4096);
    assert!(unused.within(group).next().is_none(), "{unused:?}");
    let free = dumpe2fs_free(&image);
    assert_eq!(unused.bytes(), free.bytes() - free.within(group).map(|run| run.len()).sum::<u64>());
}

/// The blocks in which two images of one file system differ, but for the superblock.
fn changed_blocks(old: &Path, new: &Path, block: usize) -> Vec<u64> {
    let (old, new) = (fs::read(old).unwrap(), fs::read(new).unwrap());
    old.chunks(block)
        .zip(new.chunks(block))
        .zip(0..)
        .filter(|((old, new), number)| old != new && *number != 1024 / block as u64)
        .map(|(_, number)| number)
        .collect()
}

#[test]
fn journals_written_by_debugfs_are_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let (image, after) = (dir.path().join("fs"), dir.path().join("after"));
    let payload = dir.path().join("payload");
    fs::write(&payload, Random::new(5).bytes(400_000)).unwrap();
    let write = format!("write {} file\n", text(&payload));
    // A bitmap whose first four bytes are the journal's magic number must be escaped in the journal.
    let magic = 0x9839_3bc0_u32;
    let blocks = (0..32).filter(|bit| magic & 1 << bit != 0).map(|bit| 2 * 32_768 + bit);
    let free = 300 * MIB / 4096 + 3 - 2 * 32_768 - 14;
    let escape: String = blocks.map(|block| format!("setb {block}\n")).collect();
    let escape = escape + &format!("set_bg 2 free_blocks_count {free}\nset_bg 2 checksum calc\n");
    for (name, command, edits, version, steps) in [
        ("no sum", "mkfs.ext4 -b 4096 -O ^metadata_csum,uninit_bg", &write, "", "w"),
        ("64bit 1k", "mkfs.ext4 -b 1024 -O ^metadata_csum", &write, "", "w"),
        ("ext3", "mkfs.ext3 -b 1024", &write, "", "w"),
        ("v2", "mkfs.ext4 -b 4096", &write, "-c -v 2", "w"),
        ("v2 32bit", "mkfs.ext4 -b 1024 -O ^64bit", &write, "-c -v 2", "w"),
        ("v3", "mkfs.ext4 -b 4096", &write, "-c -v 3", "w"),
        ("v3 32bit", "mkfs.ext4 -b 1024 -O ^64bit", &write, "-c -v 3", "w"),
        ("escaped", "mkfs.ext4 -b 4096 -O ^metadata_csum,^uninit_bg", &escape, "", "w"),
        ("revoked", "mkfs.ext4 -b 4096", &write, "-c -v 3", "wr"),
        ("revoked 32bit", "mkfs.ext4 -b 1024 -O ^64bit,^metadata_csum", &write, "", "wr"),
        ("written again", "mkfs.ext4 -b 4096", &write, "-c -v 3", "wrw"),
    ] {
        mkfs(&image, 300, command);
        copy_image(&image, &after);
        // The metadata after a change goes into the journal of the state before it.
        let commands = dir.path().join("commands");
        fs::write(&commands, edits).unwrap();
        run("debugfs", &["-w", "-f", text(&commands), text(&after)]);
        let block = if command.contains("1024") { 1024 } else { 4096 };
        let new = File::open(&after).unwrap();
        let changed = changed_blocks(&image, &after, block);
        let mut script = String::new();
        for step in steps.chars() {
            script += &format!("jo {version}\n");
            for number in &changed {
                let path = dir.path().join(format!("block{number}"));
                let mut bytes = vec![0; block];
                new.read_exact_at(&mut bytes, number * block as u64).unwrap();
                fs::write(&path, bytes).unwrap();
                script += &match step {
                    'w' => format!("jw -b {number} {}\n", text(&path)),
                    _ => format!("jw -r {number}\n"),
                };
            }
            script += "jc\n";
        }
        fs::write(&commands, script).unwrap();
        run("debugfs", &["-w", "-f", text(&commands), text(&image)]);
        let before = dumpe2fs_free(&image);
        let free = free_before_and_after(&image);
        assert_eq!(free.bytes() < before.bytes(), steps != "wr", "{name}: what the replay changes");
        assert_map_is_exact(name, &image, &free);
    }
}

/// Damage of `rounds` file systems with and without checksums, clean and with a dirty journal, and of as many tables of
/// partitions.
fn damage(rounds: u64) {
    let dir = tempfile::tempdir().unwrap();
    let (image, copy) = (dir.path().join("fs"), dir.path().join("copy"));
    let mut random = Random::new(2024);
    let mut bounds = Bounds::default();
    let mut dirty = Vec::new();
    for command in ["mkfs.ext4 -b 1024 -O metadata_csum", "mkfs.ext3 -b 1024"] {
        mkfs(&image, 12, command);
        let mount = LoopMount::new(&image, "");
        for i in 0..40 {
            fs::write(mount.path().join(format!("f{i}")), vec![0; 30_000]).unwrap();
        }
        run("sync", &["-f", text(mount.path())]);
        copy_image(&image, &copy);
        drop(mount);
        dirty.push(Arc::new(fs::read(&copy).unwrap()));
        let clean = Arc::new(fs::read(&image).unwrap());
        let places = written(&clean);
        let checked = command.contains("metadata_csum").then(|| used(&open(&image), clean.len() as u64));
        for _ in 0..rounds * 3 / 10 {
            survives_damage(&mut bounds, &clean, &places, checked.as_ref(), &mut random);
        }
    }
    for (disk, rounds) in dirty.iter().zip([rounds * 3 / 10, rounds / 10]) {
        let places = written(disk);
        for _ in 0..rounds {
            survives_damage(&mut bounds, disk, &places, None, &mut random);
        }
    }
    bounds.print("damaged ext3 and ext4 file systems");
    let mut bounds = Bounds::default();
    let mbr = "label: dos\nsize=14MiB, type=83\nsize=8MiB, type=5\nstart=16MiB, size=2MiB\nstart=20MiB, size=2MiB\n";
    for script in [mbr, "label: gpt\nsize=14MiB\nsize=8MiB\n"] {
        empty_image(&image, 26 * MIB);
        partition(&image, script);
        let start = ours(&image).1[0].1;
        let mut disk = fs::read(&image).unwrap();
        // Damage in the tables, wherever they are.
        let places = written(&disk);
        disk[start as usize..][..dirty[0].len()].copy_from_slice(&dirty[0]);
        let disk = Arc::new(disk);
        for _ in 0..rounds / 2 {
            survives_damage(&mut bounds, &disk, &places, None, &mut random);
        }
    }
    bounds.print("damaged tables of partitions");
}

#[test]
fn damaged_disks_neither_break_haul_nor_lose_checksummed_blocks() {
    damage(200);
}

#[test]
#[ignore = "long: 2,000 damaged disks; scripts/test.sh --long"]
fn thousands_of_damages_neither_break_haul_nor_lose_checksummed_blocks() {
    damage(1000);
}

/// A swap area has no checksums; whatever is damaged, its first page is copied.
#[test]
fn a_thousand_damaged_swap_areas_keep_their_headers() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("swap");
    let (mut random, mut bounds) = (Random::new(2027), Bounds::default());
    let mut seen = 0;
    for page in [4096_u64, 65_536] {
        empty_image(&image, 2 * MIB);
        run("mkswap", &["-q", "-p", &page.to_string(), text(&image)]);
        let disk = Arc::new(fs::read(&image).unwrap());
        // The version, the length and the number of bad pages, or where a signature of any size of page is.
        let places = [1024..1036, 4086..4096, 8182..8192, 16_374..16_384, 32_758..32_768, 65_526..65_536];
        let header: ExtentMap = [Extent::new(0, 4096)].into_iter().collect();
        for _ in 0..500 {
            let mut damaged = Damaged::new(&disk, &[0], &mut random);
            for _ in 0..1 + random.below(12) {
                let place = places[[0, random.below(6)][random.below(2) as usize] as usize].clone();
                let at = place.start + random.below(place.end - place.start);
                damaged.changes.insert(at, changed(disk[at as usize], &mut random));
            }
            seen += u64::from(survives(&mut bounds, damaged, Some(&header)).1);
        }
    }
    bounds.print(&format!("damaged swap areas, of which {seen} were seen as such by the map"));
    assert!(seen > 200, "the damage misses its mark");
}

#[test]
fn swap_keeps_its_header_only_unless_a_system_sleeps_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("swap");
    for page in [4096, 16_384, 65_536_u64] {
        empty_image(&image, 64 * MIB + 8192);
        run("mkswap", &["-q", "-p", &page.to_string(), "-L", "paging", text(&image)]);
        let map = open(&image);
        let Content::Swap(info) = &map.volumes()[0].content else { panic!("{:?}", map.volumes()) };
        assert_eq!((info.label.as_str(), u64::from(info.page_size)), ("paging", page));
        let kept: Vec<_> = used(&map, 64 * MIB + 8192).iter().collect();
        let last = (64 * MIB + 8192) / page * page;
        assert_eq!(kept[0], Extent::new(0, page));
        assert_eq!(
            kept.get(1).copied(),
            Some(Extent::new(last, 64 * MIB + 8192)).filter(|run| !run.is_empty())
        );

        let file = File::options().write(true).open(&image).unwrap();
        file.write_all_at(b"S1SUSPEND\0", page - 10).unwrap();
        let map = open(&image);
        assert_eq!(map.used_bytes(), 64 * MIB + 8192);
        assert!(matches!(&map.volumes()[0].usage, Usage::Whole { reason } if reason.contains("hibernated")));
    }
}

/// A partition as number, start in bytes, length in bytes, type, name.
type Row = (u32, u64, u64, String, Option<String>);

/// The disk's identifier and partitions as sfdisk reads them.
fn sfdisk(path: &Path) -> (String, Vec<Row>) {
    let out: serde_json::Value = serde_json::from_str(&run("sfdisk", &["-J", text(path)])).unwrap();
    let table = &out["partitiontable"];
    let unit = table["sectorsize"].as_u64().unwrap_or(512);
    let node = table["device"].as_str().unwrap();
    let row = |part: &serde_json::Value| {
        let number = part["node"].as_str().unwrap().strip_prefix(node).unwrap().trim_start_matches('p');
        (
            number.parse().unwrap(),
            part["start"].as_u64().unwrap() * unit,
            part["size"].as_u64().unwrap() * unit,
            part["type"].as_str().unwrap().to_lowercase(),
            part["name"].as_str().map(str::to_owned),
        )
    };
    let id = table["id"].as_str().unwrap().trim_start_matches("0x").to_lowercase();
    (id, table["partitions"].as_array().unwrap().iter().map(row).collect())
}

fn ours(image: &Path) -> (layout::Table, Vec<Row>) {
    let table = layout::read_table(&DiskFile::open(image).unwrap()).unwrap().unwrap();
    let rows = table.partitions.iter().map(|part| {
        let kind = match part.kind {
            PartitionType::Mbr(kind) => format!("{kind:x}"),
            PartitionType::Gpt(guid) => guid.to_string(),
        };
        (part.number, part.extent.start, part.extent.len(), kind, part.name.clone())
    });
    let rows = rows.collect();
    (table, rows)
}

fn partition(device: &Path, script: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), script).unwrap();
    run("sh", &["-c", &format!("sfdisk -q --no-reread {} < {}", text(device), text(file.path()))]);
}

const MBR: &str = "label: dos\nlabel-id: 0x1234abcd\n\
    size=20MiB, type=83, bootable\nsize=100MiB, type=5\nsize=10MiB, type=82\n\
    start=22MiB, size=10MiB, type=83\nsize=20MiB, type=8e\nsize=5MiB, type=83\n";
const GPT: &str = "label: gpt\n\
    size=20MiB, type=U, name=\"EFI system\"\nsize=30MiB, type=L, name=\"wurzel \u{e4}\", attrs=LegacyBIOSBootable\n\
    size=10MiB, type=S\n";

#[test]
fn tables_read_as_sfdisk_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    for (script, kind) in [(MBR, TableKind::Mbr), (GPT, TableKind::Gpt)] {
        empty_image(&image, 200 * MIB);
        partition(&image, script);
        let (table, rows) = ours(&image);
        let (id, theirs) = sfdisk(&image);
        assert_eq!((table.kind, table.sector_size, &table.id), (kind, 512, &id));
        assert_eq!(table.findings, []);
        assert_eq!(rows, theirs);
        assert_eq!(table.partitions.iter().filter(|part| part.bootable).count(), 1);
    }
    run("sgdisk", &["-p", text(&image)]);
    // The primary header destroyed, the backup must serve.
    let before = ours(&image);
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[0; 512], 512).unwrap();
    let (table, rows) = ours(&image);
    assert_eq!((&table.id, &rows), (&before.0.id, &before.1));
    assert_eq!(rows, sfdisk(&image).1);
    assert!(table.findings[0].what.contains("the backup is used"), "{:?}", table.findings);
    // With both gone the disk is copied whole, and says why.
    file.write_all_at(&[0; 512], 200 * MIB - 512).unwrap();
    assert_eq!(layout::read_table(&DiskFile::open(&image).unwrap()).unwrap_err().id(), "gpt.damaged");
    assert_eq!(open(&image).used_bytes(), 200 * MIB);
}

/// A file that is written.
struct Written(File);

impl WriteAt for Written {
    fn write_at(&self, bytes: &[u8], offset: u64) -> haul::error::Result<()> {
        self.0.write_all_at(bytes, offset).unwrap();
        Ok(())
    }

    fn sync(&self) -> haul::error::Result<()> {
        Ok(())
    }
}

#[test]
fn a_partition_is_added_in_a_gap_and_sfdisk_and_sgdisk_find_nothing_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let esp = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
    let guid = |text: &str| text.parse::<uuid::Uuid>().unwrap();
    let (mbr, gpt) = (PartitionType::Mbr(0xef), PartitionType::Gpt(guid(esp)));
    // A gap with room for all of it is taken, else the largest one.
    for (script, sector, kind, start, len, number) in [
        ("label: dos\nsize=20MiB, type=83\n", 512, mbr, 21 * MIB, 8 * MIB, 2),
        ("label: dos\nsize=39MiB, type=83\n", 512, mbr, 256 << 10, 768 << 10, 2),
        (
            "label: dos\n1 : start=1MiB, size=8MiB, type=83\n2 : start=14MiB, size=6MiB, type=5\n3 : start=26MiB, size=14MiB, type=83\n5 : size=2MiB, type=83\n",
            512,
            mbr,
            20 * MIB,
            6 * MIB,
            4,
        ),
        ("label: gpt\nsize=20MiB, type=L\nsize=2MiB, type=S\n", 512, gpt, 23 * MIB, 8 * MIB, 3),
        ("label: gpt\nsize=38MiB, type=L\n", 512, gpt, 24 << 10, 1000 << 10, 2),
        ("label: gpt\nsize=38MiB, type=L\n", 4096, gpt, 24 << 10, 1000 << 10, 2),
    ] {
        empty_image(&image, 40 * MIB);
        let device = LoopDevice::new(&image, sector);
        partition(&device.path, script);
        run("sync", &[text(&device.path)]);
        let (table, before) = ours(&image);
        let extent = layout::room(&table, 40 * MIB, 448 << 10, 8 * MIB).unwrap();
        assert_eq!((extent.start, extent.len()), (start, len), "{script}");
        let new = layout::NewPartition { extent, kind, guid: guid("11111111-2222-4333-8444-555555555555") };
        let disk = DiskFile::open(&image).unwrap();
        let out = Written(File::options().write(true).open(&image).unwrap());
        assert_eq!(layout::add_partition(&disk, &out, &new).unwrap(), number, "{script}");
        out.0.sync_all().unwrap();
        let (table, rows) = ours(&image);
        assert_eq!(table.findings, [], "{script}");
        let added: Vec<_> = rows.iter().filter(|row| !before.contains(row)).collect();
        assert_eq!((added.len(), added[0].0, added[0].1, added[0].2), (1, number, start, len), "{script}");
        // What the kernel keeps of the device is older than the file.
        drop(device);
        let device = LoopDevice::new(&image, sector);
        let mut theirs = sfdisk(&device.path).1;
        theirs.sort();
        let mut rows = rows;
        rows.sort();
        assert_eq!(rows, theirs, "{script}");
        run("sfdisk", &["--verify", text(&device.path)]);
        if matches!(kind, PartitionType::Gpt(_)) {
            assert!(run("sgdisk", &["-v", text(&device.path)]).contains("No problems found"), "{script}");
        }
        // There is no room twice in one place.
        assert_eq!(layout::add_partition(&disk, &out, &new).unwrap_err().id(), "table.add");
    }
    empty_image(&image, 40 * MIB);
    partition(&image, "label: dos\nsize=1MiB\nsize=1MiB\nsize=1MiB\nsize=1MiB\n");
    let table = ours(&image).0;
    assert!(layout::room(&table, 40 * MIB, MIB, MIB).unwrap_err().contains("four entries"));
    partition(&image, "label: gpt\nfirst-lba: 34\nstart=40, size=81000\n");
    let table = ours(&image).0;
    assert!(layout::room(&table, 40 * MIB, MIB, MIB).unwrap_err().contains("1024 KiB"));
}

#[test]
fn tables_of_disks_with_large_sectors_read_as_sfdisk_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    empty_image(&image, 200 * MIB);
    let device = LoopDevice::new(&image, 4096);
    partition(&device.path, GPT);
    run("sync", &[text(&device.path)]);
    let (table, rows) = ours(&image);
    assert_eq!((table.sector_size, rows), (4096, sfdisk(&device.path).1));
    assert_eq!(table.findings, []);
    // An MBR does not say how large its sectors are; the contents do.
    partition(&device.path, "label: dos\nsize=20MiB, type=83\n");
    let wide = ours(&image).0.sector_size;
    assert_eq!(wide, 512, "nothing in the partition tells");
    let start = sfdisk(&device.path).1[0].1;
    let fs_image = dir.path().join("fs");
    mkfs(&fs_image, 10, "mkfs.ext4");
    let out = File::options().write(true).open(&image).unwrap();
    out.write_all_at(&fs::read(&fs_image).unwrap(), start).unwrap();
    let (table, rows) = ours(&image);
    assert_eq!((table.sector_size, rows[0].1), (4096, start));
}

#[test]
fn a_partitioned_disk_is_used_but_for_what_its_file_systems_leave_free() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    empty_image(&image, 200 * MIB);
    partition(&image, MBR);
    let (_, rows) = ours(&image);
    let fs_image = dir.path().join("fs");
    let disk = File::options().write(true).open(&image).unwrap();
    let mut free = ExtentMap::new();
    for (number, command) in [(1, "mkfs.ext4"), (5, "mkfs.ext3 -b 1024")] {
        let row = rows.iter().find(|row| row.0 == number).unwrap();
        empty_image(&fs_image, row.2);
        let mut words = command.split(' ').chain(["-q", "-F", text(&fs_image)]);
        run(words.next().unwrap(), &words.collect::<Vec<_>>());
        disk.write_all_at(&fs::read(&fs_image).unwrap(), row.1).unwrap();
        free.extend(dumpe2fs_free(&fs_image).iter().map(|run| run.shifted(row.1)));
    }
    let map = open(&image);
    let unused = rest(&used(&map, 200 * MIB), 200 * MIB);
    assert_eq!(unused, free);
    assert_eq!(map.used_bytes(), 200 * MIB - free.bytes());
    let names: Vec<_> = map.volumes().iter().map(|v| (v.partition.unwrap(), v.content.name())).collect();
    assert_eq!(names, [(1, "ext4"), (3, "empty"), (4, "empty"), (5, "ext3"), (6, "empty")]);
}

#[test]
fn other_contents_are_named_and_copied_whole() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let path = text(&image);
    for (name, command) in [
        (
            "LUKS1",
            "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 --key-file /etc/os-release",
        ),
        (
            "LUKS2",
            "cryptsetup -q luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /etc/os-release",
        ),
    ] {
        empty_image(&image, 400 * MIB);
        let mut words = command.split(' ').chain([path]);
        let program = words.next().unwrap();
        let args: Vec<_> = words.collect();
        // cryptsetup takes the device before the options it does not know.
        run(program, &args);
        let map = open(&image);
        assert_eq!(map.volumes()[0].content.name(), name);
        assert_eq!(map.used_bytes(), 400 * MIB, "{name}");
    }
}
