//! The used map of XFS, judged by xfs_db, xfs_repair and the kernel. Needs root for loop mounts.

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

use std::fmt::Write;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bounds::Bounds;
use damaged_map::{survives_damage, written};
use haul::io::DiskFile;
use haul::io::fake::FaultyDisk;
use haul::layout::{self, Content, Usage, UsedMap};
use haul::unit::{Extent, ExtentMap, MIB};
use maps::{masked_copy, open, rest, tree, used, whole_because};
use support::{LoopMount, Random, age, copy_image, empty_image, run, text, try_run};

/// Makes a file system by mkfs.xfs's arguments in an image of `mib` MiB and a bit.
fn mkfs(image: &Path, mib: u64, args: &str) {
    empty_image(image, mib * MIB + 12_288);
    // These let mkfs.xfs make what is too small for its taste.
    let mut words = vec!["TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs.xfs", "-q", "-f"];
    words.extend(args.split_whitespace());
    words.push(text(image));
    run("env", &words);
}

/// What xfs_db reads out of an image.
struct Judge {
    block: u64,
    ag_blocks: u64,
    /// Bytes that the free-space trees list.
    free: ExtentMap,
    /// Bytes of the blocks kept for these trees, which xfs_db calls free as well.
    agfl: ExtentMap,
    /// Most levels of a tree by block.
    levels: u64,
}

fn xfs_db(image: &Path) -> Judge {
    let ask = |commands: &[String]| {
        let args = commands.iter().flat_map(|command| ["-c", command]);
        run("xfs_db", &["-r"].into_iter().chain(args).chain([text(image)]).collect::<Vec<_>>())
    };
    let sb = ask(&["sb 0".into(), "p blocksize agblocks agcount".into()]);
    let field = |line: &str| line.split('=').nth(1).unwrap().trim().parse::<u64>().unwrap();
    let [block, ag_blocks, ags] = sb.lines().map(field).collect::<Vec<_>>()[..] else { panic!("{sb}") };
    let place = |ag: u64, at: u64, len: u64| Extent::at((ag * ag_blocks + at) * block, len * block);

    let mut agfl = ExtentMap::new();
    let mut levels = 0;
    for ag in 0..ags {
        let commands =
            [format!("agf {ag}"), "p bnolevel flfirst fllast flcount".into(), format!("agfl {ag}")];
        let out = ask(&[&commands[..], &["p bno".into()]].concat());
        let (numbers, list) = out.split_once("bno[").unwrap();
        let [level, first, last, count] = numbers.lines().map(field).collect::<Vec<_>>()[..] else {
            panic!("{out}")
        };
        levels = levels.max(level);
        let list: Vec<&str> =
            list.split_whitespace().skip(2).map(|entry| entry.split_once(':').unwrap().1).collect();
        let mut at = first as usize;
        for _ in 0..count {
            agfl.insert(place(ag, list[at].parse().unwrap(), 1));
            at = if at == last as usize { usize::MAX } else { (at + 1) % list.len() };
        }
    }
    // Extents that are free, one a line, then a histogram with more columns.
    let mut free = ExtentMap::new();
    for line in ask(&["freesp -d".into()]).lines() {
        let numbers: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
        if let [ag, at, len] = numbers[..] {
            free.insert(place(ag, at, len));
        }
    }
    agfl.iter().for_each(|run| free.remove(run));
    Judge { block, ag_blocks, free, agfl, levels }
}

/// Every block outside xfs_db's lists is used, and every block in them is not.
fn assert_blocks_are_exact(name: &str, image: &Path) -> (Judge, UsedMap) {
    let size = fs::metadata(image).unwrap().len();
    let map = open(image);
    let usage = &map.volumes()[0].usage;
    assert!(matches!(usage, Usage::Mapped { .. }), "{name}: {usage:?}");
    let judge = xfs_db(image);
    let unused = rest(&used(&map, size), size);
    assert_eq!(unused, judge.free, "{name}");
    assert_eq!(map.findings(), [], "{name}");
    (judge, map)
}

/// The blocks are exact, and so is their count. Returns the levels of the trees.
fn assert_map_is_exact(name: &str, image: &Path) -> u64 {
    let (judge, map) = assert_blocks_are_exact(name, image);
    // The superblock counts the trees' blocks and those kept for them as free.
    let size = fs::metadata(image).unwrap().len();
    let counted = size - map.used_bytes();
    let extra = judge.free.bytes() + judge.agfl.bytes();
    assert!((extra..extra + 4096 * judge.block).contains(&counted), "{name}: {counted} and {extra}");
    judge.levels
}

/// A copy of only the used bytes passes xfs_repair, and mounts, with the same files.
fn assert_copy_is_whole(name: &str, image: &Path) {
    let copy = image.with_extension("copy");
    masked_copy(image, &copy);
    let (code, out, err) = try_run("xfs_repair", &["-n", "-o", "force_geometry", text(&copy)]);
    assert_eq!(code, 0, "{name}: {out}{err}");
    let before = tree(LoopMount::new(image, "ro").path());
    let after = tree(LoopMount::new(&copy, "ro").path());
    assert!(before == after, "{name}: files differ");
    assert!(before.len() > 1000, "{name}: there are no files to compare");
    fs::remove_file(&copy).unwrap();
}

/// Name, size in MiB, arguments of mkfs.xfs, files to write and their largest size.
const MOUNTABLE: &[(&str, u64, &str, u64, u64)] = &[
    ("default", 320, "", 300, 400_000),
    ("few features", 320, "-m finobt=0,reflink=0,bigtime=0,inobtcount=0 -i sparse=0", 200, 400_000),
    ("rmapbt", 320, "-m rmapbt=1", 300, 400_000),
    ("1k", 100, "-b size=1024 -d agcount=2", 3000, 20_000),
    ("2k", 100, "-b size=2048 -s size=2048", 600, 100_000),
    ("16k", 320, "-b size=16384", 200, 400_000),
    ("64k", 640, "-b size=65536", 200, 400_000),
    ("4k sectors", 100, "-s size=4096 -d agcount=1", 400, 200_000),
    ("many groups", 640, "-d agcount=40", 300, 400_000),
    ("stripes", 320, "-d su=64k,sw=4 -l su=256k", 100, 400_000),
    ("nrext64", 100, "-i nrext64=1,size=2048", 100, 400_000),
    ("large groups", 40 << 10, "-b size=1024 -l size=16m", 100, 400_000),
];

#[test]
fn fresh_and_aged_file_systems_are_mapped_as_xfs_db_lists_them() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut levels = 0;
    for (seed, (name, mib, args, files, largest)) in (1..).zip(MOUNTABLE) {
        mkfs(&image, *mib, args);
        assert_map_is_exact(&format!("fresh {name}"), &image);
        let mount = LoopMount::new(&image, "");
        age(mount.path(), seed, *files, *largest);
        drop(mount);
        levels = levels.max(assert_map_is_exact(&format!("aged {name}"), &image));
        assert_copy_is_whole(name, &image);
        fs::remove_file(&image).unwrap();
    }
    assert!(levels >= 2, "no tree has more than its root");
}

#[test]
fn repaired_and_renamed_file_systems_are_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 64, "");
    age(LoopMount::new(&image, "").path(), 5, 60, 100_000);
    run("xfs_admin", &["-U", "generate", "-L", "renamed", text(&image)]);
    assert_map_is_exact("new UUID", &image);
    let Content::Xfs(info) = layout::identify(&DiskFile::open(&image).unwrap()).unwrap() else { panic!() };
    assert_eq!((info.version, info.label.as_str(), info.block_size), (5, "renamed", 4096));
    let uuid = run("blkid", &["-o", "value", "-s", "UUID", text(&image)]);
    assert_eq!(info.uuid.to_string(), uuid.trim());
    age(LoopMount::new(&image, "").path(), 6, 60, 100_000);
    assert_map_is_exact("new UUID, aged", &image);
    run("xfs_repair", &["-L", text(&image)]);
    assert_map_is_exact("log zeroed", &image);
    assert_copy_is_whole("log zeroed", &image);
    age(LoopMount::new(&image, "").path(), 7, 60, 100_000);
    assert_map_is_exact("log zeroed, aged", &image);
}

/// A prototype for mkfs.xfs: a flat folder with files from `from`.
fn prototype(from: &Path, files: u64, largest: u64) -> String {
    let mut random = Random::new(files);
    let mut lines = "/stand/diag\n0 0\nd--755 0 0\n".to_owned();
    for i in 0..files {
        let path = from.join(format!("f{i}"));
        fs::write(&path, random.bytes(1 + random_len(&mut Random::new(i), largest))).unwrap();
        writeln!(lines, "f{i} ---644 0 0 {}", text(&path)).unwrap();
    }
    lines + "$\n"
}

fn random_len(random: &mut Random, largest: u64) -> usize {
    random.below(largest) as usize
}

/// This host's kernel need not mount version 4: mkfs.xfs makes the files, xfs_repair takes some away.
#[test]
fn version_4_is_mapped_as_xfs_db_lists_it() {
    let dir = tempfile::tempdir().unwrap();
    let (image, from, proto) = (dir.path().join("fs"), dir.path().join("from"), dir.path().join("proto"));
    fs::create_dir(&from).unwrap();
    fs::write(&proto, prototype(&from, 400, 60_000)).unwrap();
    let mut levels = 0;
    for (name, args) in [
        ("default", ""),
        ("512", "-b size=512 -d agcount=2"),
        ("old", "-l version=1,lazy-count=0 -i attr=1,projid32bit=0 -n ftype=0"),
        ("stripes", "-b size=1024 -d su=64k,sw=2 -l su=64k"),
    ] {
        mkfs(&image, 128, &format!("-m crc=0 {args} -p {}", text(&proto)));
        levels = levels.max(assert_map_is_exact(name, &image));
        // Inodes that are no more: xfs_repair frees their blocks.
        let list = run("xfs_db", &["-r", "-c", "path /", "-c", "ls", text(&image)]);
        let inodes = list.lines().filter(|line| line.contains(" f")).step_by(2);
        let mut commands = vec!["-x".to_owned()];
        for inode in inodes.map(|line| line.split_whitespace().nth(1).unwrap()) {
            for command in [format!("inode {inode}"), "write core.mode 0".into()] {
                commands.extend(["-c".into(), command]);
            }
        }
        assert!(commands.len() > 100, "{name}: {list}");
        commands.push(text(&image).into());
        run("xfs_db", &commands.iter().map(String::as_str).collect::<Vec<_>>());
        let before = xfs_db(&image).free.bytes();
        run("xfs_repair", &[text(&image)]);
        levels = levels.max(assert_map_is_exact(&format!("{name}, repaired"), &image));
        let judge = xfs_db(&image);
        assert!(judge.free.bytes() > before && judge.free.len() > 60, "{name}: nothing was freed");
        let copy = dir.path().join("copy");
        masked_copy(&image, &copy);
        run("xfs_repair", &["-n", text(&copy)]);
        // Every file read through xfs_repair's eyes only: its own metadata. The files by their blocks.
        for run in rest(&judge.free, fs::metadata(&image).unwrap().len()).iter() {
            let read = |path: &Path| {
                let mut bytes = vec![0; run.len() as usize];
                File::open(path).unwrap().read_exact_at(&mut bytes, run.start).unwrap();
                bytes
            };
            assert!(judge.agfl.covers(run) || read(&image) == read(&copy), "{name}: {run:?}");
        }
    }
    assert!(levels >= 2, "no tree has more than its root");
}

/// Writes files and makes each safe, so that the log gets a record each time.
fn fsync_files(dir: &Path, count: u64, bytes: &[u8]) {
    for i in 0..count {
        let file = File::create(dir.join(format!("s{i}"))).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file.sync_all().unwrap();
    }
}

#[test]
fn a_log_is_clean_after_an_unmount_wherever_its_head_is() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    // Records are as long as the log's stripe unit: the head goes round in few of them.
    let mut went_round = 0;
    for (args, rounds, files) in [("-d su=64k,sw=1 -l su=64k", 6, 22), ("-d su=256k,sw=1 -l su=256k", 5, 15)]
    {
        mkfs(&image, 160, args);
        let mut last = 0;
        for round in 0..rounds {
            fsync_files(LoopMount::new(&image, "").path(), files + round, b"x");
            assert_map_is_exact(&format!("{args} round {round}"), &image);
            let log = run("xfs_logprint", &["-t", text(&image)]);
            assert!(log.contains("<CLEAN>"), "{log}");
            let head = log.split("head: ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
            let head: u64 = head.parse().unwrap();
            went_round += u64::from(head < last);
            last = head;
        }
    }
    assert!(went_round > 0, "no head reached the end of its log");
}

/// What a power cut leaves: files made safe by fsync are in the log and need not be anywhere else.
#[test]
fn with_a_log_to_be_replayed_the_map_is_of_afterwards_and_no_fsynced_file_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (image, stopped, replayed, copy) = (path("fs"), path("stopped"), path("replayed"), path("masked"));
    let fsynced = Random::new(11).bytes(3_000_000);
    for (name, args, files, shutdown) in [
        ("default", "", 1, "shutdown"),
        ("log flushed", "", 1, "shutdown -f"),
        ("1k", "-b size=1024", 5, "shutdown -f"),
        ("all features", "-m rmapbt=1 -i nrext64=1 -n size=16384", 5, "shutdown -f"),
        (
            "4k sectors, few features",
            "-s size=4096 -m finobt=0,reflink=0,bigtime=0,inobtcount=0",
            5,
            "shutdown -f",
        ),
        ("long records", "-d su=256k,sw=1 -l su=256k", 5, "shutdown -f"),
        ("log gone round", "-d su=64k,sw=1 -l su=64k", 90, "shutdown"),
        ("mounted", "", 1, ""),
    ] {
        mkfs(&image, 160, args);
        let mount = LoopMount::new(&image, "");
        age(mount.path(), 3, 300, 60_000);
        run("sync", &["-f", text(mount.path())]);
        age(mount.path(), 4, 200, 90_000);
        fsync_files(mount.path(), files, b"small");
        let file = File::create(mount.path().join("fsynced")).unwrap();
        file.write_all_at(&fsynced, 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        if !shutdown.is_empty() {
            run("xfs_io", &["-x", "-c", shutdown, text(mount.path())]);
        }
        copy_image(&image, &stopped);
        drop(mount);
        let log = run("xfs_logprint", &["-t", text(&stopped)]);
        assert!(log.contains("<DIRTY>"), "{name}: {log}");
        let map = open(&stopped);
        assert!(matches!(map.volumes()[0].usage, Usage::Mapped { .. }), "{name}: {:?}", map.volumes());
        let size = fs::metadata(&stopped).unwrap().len();
        let unused = rest(&used(&map, size), size);
        assert_eq!(map.findings(), [], "{name}");

        copy_image(&stopped, &replayed);
        let expected = tree(LoopMount::new(&replayed, "nouuid").path());
        let judge = xfs_db(&replayed);
        let mut taken = unused.clone();
        judge.free.iter().chain(judge.agfl.iter()).for_each(|run| taken.remove(run));
        println!(
            "figure: {name}: {} MiB free, of {} MiB after a replay; {} blocks taken by the replay",
            unused.bytes() / MIB,
            judge.free.bytes() / MIB,
            taken.bytes() / judge.block
        );
        // The mount that replays the log may take blocks for its trees.
        assert!(taken.bytes() <= 8 * judge.block, "{name}: {taken:?}");
        assert!(unused.bytes() >= judge.free.bytes() / 10 * 9, "{name}");
        let counted = size - map.used_bytes();
        assert!(counted.abs_diff(unused.bytes()) < 4 * MIB, "{name}: {counted} and {}", unused.bytes());

        masked_copy(&stopped, &copy);
        let mount = LoopMount::new(&copy, "nouuid");
        assert!(fs::read(mount.path().join("fsynced")).unwrap() == fsynced, "{name}: the file is lost");
        assert!(tree(mount.path()) == expected, "{name}: files differ");
        drop(mount);
        // Replayed and unmounted, it is mapped as ever.
        assert_map_is_exact(name, &copy);
        run("xfs_repair", &["-n", text(&copy)]);
    }
}

/// Freezes a mounted file system while its image is copied.
fn copy_frozen(mount: &LoopMount, image: &Path, copy: &Path) {
    run("xfs_freeze", &["-f", text(mount.path())]);
    copy_image(image, copy);
    run("xfs_freeze", &["-u", text(mount.path())]);
}

/// A freeze leaves a log in which there is nothing but the superblock's counters.
#[test]
fn a_frozen_file_system_is_mapped_though_its_log_is_to_be_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let (image, frozen, copy) = (dir.path().join("fs"), dir.path().join("frozen"), dir.path().join("masked"));
    for (name, args, files) in [
        ("default", "", 5),
        ("4k sectors", "-s size=4096", 5),
        ("1k", "-b size=1024", 5),
        ("stripes", "-d su=256k,sw=1 -l su=256k", 5),
        ("log gone round", "-d su=64k,sw=1 -l su=64k", 90),
    ] {
        mkfs(&image, 160, args);
        let mount = LoopMount::new(&image, "");
        age(mount.path(), 3, 60, 60_000);
        fsync_files(mount.path(), files, b"small");
        // A file that is open and has no name any more: its blocks are freed by the next mount.
        let open = File::create_new(mount.path().join("unlinked")).unwrap();
        open.write_all_at(&[7; 100_000], 0).unwrap();
        fs::remove_file(mount.path().join("unlinked")).unwrap();
        copy_frozen(&mount, &image, &frozen);
        let before = tree(mount.path());
        drop(open);
        drop(mount);
        let log = run("xfs_logprint", &["-t", text(&frozen)]);
        assert!(log.contains("<DIRTY>"), "{name}: {log}");
        // Its superblock leaves out of the free blocks what the mounted system has set aside.
        assert_blocks_are_exact(name, &frozen);
        masked_copy(&frozen, &copy);
        assert!(tree(LoopMount::new(&copy, "nouuid").path()) == before, "{name}: files differ");
        assert_map_is_exact(&format!("{name}, replayed"), &copy);
        run("xfs_repair", &["-n", text(&copy)]);
    }
}

/// Changes bytes of an image, and the checksum of `len` bytes at `start` whose own place is `crc`.
fn forge(image: &Path, at: u64, bytes: &[u8], start: u64, len: usize, crc: usize) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    file.write_all_at(bytes, at).unwrap();
    let mut structure = vec![0; len];
    file.read_exact_at(&mut structure, start).unwrap();
    structure[crc..crc + 4].fill(0);
    let sum = crc32c::crc32c(&structure);
    file.write_all_at(&sum.to_le_bytes(), start + crc as u64).unwrap();
}

#[test]
fn what_cannot_be_mapped_for_sure_is_copied_whole() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let whole = |name: &str, reason: &str| {
        let found = whole_because(name, &image);
        assert!(found.contains(reason), "{name}: {found}");
    };
    let set = |at: u64, bytes: &[u8]| forge(&image, at, bytes, 0, 512, 224);
    for (name, at, bytes, reason) in [
        ("unknown incompatible feature", 216, &[0x80, 0, 0, 1][..], "incompatible features 0x80000000"),
        ("metadata directory", 216, &[0, 0, 1, 1], "incompatible features 0x100"),
        ("unknown read-only feature", 212, &[0, 0, 1, 0], "read-only compatible features 0x100"),
        ("unknown compatible feature", 208, &[0, 0, 0, 1], "compatible features 0x1"),
        ("unknown log feature", 220, &[0, 0, 0, 2], "log incompatible features 0x2"),
        ("needs repair", 216, &[0, 0, 0, 0x11], "needing repair"),
        ("in progress", 126, &[1], "never finished"),
        ("realtime", 16, &[0, 0, 0, 0, 0, 1, 0, 0], "realtime"),
        ("external log", 48, &[0; 8], "another device"),
        ("version 3", 101, &[0xb3], "version 3"),
        ("version 6", 101, &[0xb6], "version 6"),
        ("longer than the disk", 8, &[0, 0, 0, 0, 0, 1, 0, 0], "block count"),
        ("no groups", 88, &[0; 4], "group count"),
        ("tiny groups", 84, &[0, 0, 0, 1], "group size"),
        ("no block size", 4, &[0; 4], "block size"),
        ("log outside", 48, &[0xff; 8], "log's place"),
        ("log elsewhere", 48, &[0, 0, 0, 0, 0, 0, 0, 8], "its log"),
    ] {
        mkfs(&image, 64, "");
        set(at, bytes);
        whole(name, reason);
    }
    mkfs(&image, 64, "-b size=1024");
    set(48, &[0, 0, 0, 0, 0, 0, 0, 1]);
    whole("log over the headers", "log's place");
    mkfs(&image, 64, "");
    File::options().write(true).open(&image).unwrap().write_all_at(&[1], 300).unwrap();
    whole("a flipped bit", "checksum");
    mkfs(&image, 64, "");
    File::options().write(true).open(&image).unwrap().set_len(50 * MIB).unwrap();
    whole("truncated", "block count");
    mkfs(&image, 64, &format!("-l logdev={},size=1368b", text(&log_device(dir.path()))));
    whole("external log", "another device");
    mkfs(&image, 64, &format!("-r rtdev={}", text(&log_device(dir.path()))));
    whole("realtime", "realtime");
}

fn log_device(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("device");
    empty_image(&path, 32 * MIB);
    path
}

#[test]
fn a_damaged_group_is_used_and_reported_and_the_others_are_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    for crc in ["-m crc=1", "-m crc=0"] {
        mkfs(&image, 100, &format!("{crc} -d agcount=4"));
        let size = fs::metadata(&image).unwrap().len();
        let judge = xfs_db(&image);
        let group = Extent::at(2 * judge.ag_blocks * judge.block, judge.ag_blocks * judge.block);
        let expected = {
            let mut free = judge.free.clone();
            free.remove(group);
            free
        };
        let header = group.start + 512;
        let tree = group.start + judge.block;
        let records = tree + if crc == "-m crc=1" { 56 } else { 16 };
        for (what, at, bytes, start, len, field) in [
            ("magic of the header", header, &b"YAGF"[..], header, 512, 216),
            ("number of the group", header + 11, &[3], header, 512, 216),
            ("length of the group", header + 15, &[3], header, 512, 216),
            ("free blocks", header + 55, &[3], header, 512, 216),
            ("longest run", header + 59, &[3], header, 512, 216),
            ("levels", header + 31, &[2], header, 512, 216),
            ("no levels", header + 31, &[0], header, 512, 216),
            ("many levels", header + 28, &[0xff; 4], header, 512, 216),
            ("root outside", header + 16, &[0xff; 4], header, 512, 216),
            ("magic of the root", tree, b"AB3C", tree, 4096, 52),
            ("level of the root", tree + 5, &[1], tree, 4096, 52),
            ("many records", tree + 6, &[0xff; 2], tree, 4096, 52),
            ("no records", tree + 6, &[0; 2], tree, 4096, 52),
            ("left sibling", tree + 11, &[7], tree, 4096, 52),
            ("right sibling", tree + 15, &[7], tree, 4096, 52),
            ("run over the headers", records, &[0, 0, 0, 0], tree, 4096, 52),
            ("run beyond the end", records + 4, &[0, 0xff], tree, 4096, 52),
            ("empty run", records + 4, &[0; 4], tree, 4096, 52),
        ] {
            let damaged = dir.path().join("damaged");
            copy_image(&image, &damaged);
            forge(&damaged, at, bytes, start, len, field);
            let map = open(&damaged);
            assert_eq!(rest(&used(&map, size), size), expected, "{crc} {what}");
            assert!(map.findings()[0].what.contains("allocation group 2"), "{what}: {:?}", map.findings());
        }
        // A header that cannot be read is no better than a wrong one, and stops nothing.
        let disk = FaultyDisk::new(DiskFile::open(&image).unwrap(), vec![Extent::at(header, 512)]);
        let map = layout::used_map(Arc::new(disk)).unwrap();
        assert_eq!(rest(&used(&map, size), size), expected);
    }
}

/// Damage of small file systems with and without checksums, clean and with a log to be replayed.
fn damage(rounds: u64) {
    let dir = tempfile::tempdir().unwrap();
    let (image, dirty) = (dir.path().join("fs"), dir.path().join("dirty"));
    let mut random = Random::new(2025);
    let mut bounds = Bounds::default();
    let mut seen = 0;
    let mut total = 0;
    for args in
        ["-m crc=1 -b size=1024 -d agcount=2 -l size=4m", "-m crc=0 -b size=512 -d agcount=2 -l size=4m"]
    {
        mkfs(&image, 34, args);
        let checked = args.starts_with("-m crc=1");
        if checked {
            // Data of zeroes: all that is not zero is metadata.
            let mount = LoopMount::new(&image, "");
            for i in 0..400 {
                fs::write(mount.path().join(format!("f{i}")), vec![0; 3000]).unwrap();
            }
            run("sync", &["-f", text(mount.path())]);
            (0..400).step_by(2).for_each(|i| fs::remove_file(mount.path().join(format!("f{i}"))).unwrap());
            fsync_files(mount.path(), 3, b"");
            for freeze in [false, true] {
                if freeze {
                    copy_frozen(&mount, &image, &dirty);
                } else {
                    copy_image(&image, &dirty);
                }
                let before = used(&open(&dirty), fs::metadata(&dirty).unwrap().len());
                assert!(before.len() > 1, "it is copied whole");
                let disk = Arc::new(fs::read(&dirty).unwrap());
                let places = written(&disk);
                for _ in 0..rounds / 4 {
                    survives_damage(&mut bounds, &disk, &places, Some(&before), &mut random);
                }
            }
        }
        let disk = Arc::new(fs::read(&image).unwrap());
        let before = checked.then(|| used(&open(&image), disk.len() as u64));
        // What the map reads is little of what is written: the groups' headers and trees, and the log. The log is
        // in the second of two groups.
        let places = written(&disk);
        let group = disk.len() / 2;
        let near = |at: &usize| at % group < 16 << 10;
        let log = group + (16 << 10)..group + (4 << 20);
        let headers: Vec<_> = places.iter().copied().filter(near).collect();
        let logged: Vec<_> = places.iter().copied().filter(|at| log.contains(at)).collect();
        for i in 0..rounds {
            // The log of a file system that was never mounted is one short record, right behind the headers.
            let logged = if logged.is_empty() { &headers } else { &logged };
            let places = [&headers, logged, &headers, &places][i as usize % 4];
            seen += u64::from(survives_damage(&mut bounds, &disk, places, before.as_ref(), &mut random));
            total += 1;
        }
    }
    assert!(seen > total / 10, "only {seen} of {total} are seen");
    bounds
        .print(&format!("damaged XFS file systems, of which {seen} of {total} were seen as such by the map"));
}

#[test]
fn damage_neither_breaks_haul_nor_loses_checksummed_blocks() {
    damage(100);
}

#[test]
#[ignore = "long: 1,250 damaged file systems; scripts/test.sh --long"]
fn a_thousand_damages_neither_break_haul_nor_lose_checksummed_blocks() {
    damage(500);
}
