//! Whose the blocks are in which two disks differ: judged block by block by debugfs, and through `haul compare`. Needs
//! root for loop mounts.

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
#[path = "support/damage.rs"]
mod damage;
#[path = "support/images.rs"]
mod images;
#[path = "support/lvm.rs"]
#[allow(dead_code, reason = "each test binary uses its own part")]
mod lvm;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use haul::io::fake::{FaultyDisk, MemoryDisk};
use haul::io::{DiskFile, ReadAt, WriteAt};
use haul::layout::{self, Owner, Part, VolumeOwners};
use haul::unit::{Extent, MIB};
use lvm::Lvm;
use support::{LoopMount, Random, copy_image, empty_image, run, text};

const HAUL: &str = env!("CARGO_BIN_EXE_haul");

fn mkfs(image: &Path, mib: u64, command: &str) {
    empty_image(image, mib * MIB);
    let mut words = command.split(' ');
    let program = words.next().unwrap();
    run(program, &words.chain(["-q", "-F", text(image)]).collect::<Vec<_>>());
}

fn owners(image: &Path, extents: &[Extent]) -> Vec<VolumeOwners> {
    let disk: Arc<dyn ReadAt> = Arc::new(DiskFile::open(image).unwrap());
    layout::owners(&disk, extents).unwrap()
}

/// Answers of debugfs to `commands`.
fn debugfs(image: &Path, commands: &[String]) -> String {
    let script = image.with_extension("debugfs");
    fs::write(&script, commands.join("\n")).unwrap();
    run("debugfs", &["-f", text(&script), text(image)])
}

/// Everything that makes block maps and directories difficult.
fn populate(root: &Path, random: &mut Random) {
    // Two files that grow in turns: many extents, or pointers in blocks of pointers.
    let files = ["turns-a", "turns-b"].map(|name| File::create(root.join(name)).unwrap());
    for i in 0..400 {
        for file in &files {
            file.write_all_at(&random.bytes(5000), i * 9000).unwrap();
            file.sync_data().unwrap();
        }
    }
    // Holes, and blocks that only the third level of pointers reaches when they have 1 KiB.
    let sparse = File::create(root.join("sparse")).unwrap();
    for at in [0, 13_000, 300_000, 70_000_000, 90_000_000, 2_000_000_000] {
        sparse.write_all_at(&random.bytes(3000), at).unwrap();
    }
    fs::create_dir(root.join("names")).unwrap();
    fs::write(root.join("names/one"), random.bytes(20_000)).unwrap();
    fs::hard_link(root.join("names/one"), root.join("names/two")).unwrap();
    fs::hard_link(root.join("names/one"), root.join("three")).unwrap();
    fs::write(root.join("names/主页"), random.bytes(9000)).unwrap();
    fs::write(root.join("names/with space"), random.bytes(9000)).unwrap();
    std::os::unix::fs::symlink("a".repeat(200), root.join("names/long-link")).unwrap();
    std::os::unix::fs::symlink("one", root.join("names/short-link")).unwrap();
    fs::write(root.join("tiny"), "a few bytes").unwrap();
    let mut deep = root.join("deep");
    for i in 0..60 {
        deep.push(format!("level-{i}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), random.bytes(5000)).unwrap();
    // Large enough for a hashed index of two levels when blocks have 1 KiB.
    let large = root.join("large");
    fs::create_dir(&large).unwrap();
    for i in 0..4000 {
        File::create(large.join(format!("a-name-that-takes-some-room-{i}"))).unwrap();
    }
    for i in [17, 1234, 3999] {
        fs::write(large.join(format!("a-name-that-takes-some-room-{i}")), random.bytes(2500)).unwrap();
    }
    for i in 0..40 {
        fs::write(root.join(format!("gone-{i}")), random.bytes(30_000)).unwrap();
    }
    run("sync", &["-f", text(root)]);
    for i in 0..40 {
        fs::remove_file(root.join(format!("gone-{i}"))).unwrap();
    }
}

/// What debugfs says of a file system.
struct Judge<'a> {
    image: &'a Path,
    block: u64,
    first: u64,
    blocks: u64,
}

impl Judge<'_> {
    fn new(image: &Path) -> Judge<'_> {
        let out = run("dumpe2fs", &["-h", text(image)]);
        let field = |name: &str| {
            let line = out.lines().find(|line| line.starts_with(name)).unwrap();
            line.split(':').nth(1).unwrap().trim().parse().unwrap()
        };
        Judge {
            image,
            block: field("Block size:"),
            first: field("First block:"),
            blocks: field("Block count:"),
        }
    }

    /// The inode of each block that has one.
    fn inodes(&self, blocks: &[u64]) -> BTreeMap<u64, u32> {
        let list: Vec<String> = blocks.iter().map(u64::to_string).collect();
        let commands: Vec<String> =
            list.chunks(100).map(|some| format!("icheck {}", some.join(" "))).collect();
        let out = debugfs(self.image, &commands);
        let rows = out.lines().filter_map(|line| line.split_once('\t'));
        rows.filter_map(|(block, inode)| Some((block.parse().ok()?, inode.parse().ok()?))).collect()
    }

    /// The names of each inode that has some.
    fn names(&self, inodes: &BTreeSet<u32>) -> BTreeMap<u32, BTreeSet<String>> {
        let list: Vec<String> = inodes.iter().map(u32::to_string).collect();
        let commands: Vec<String> =
            list.chunks(100).map(|some| format!("ncheck {}", some.join(" "))).collect();
        let mut names: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
        for line in debugfs(self.image, &commands).lines() {
            if let Some((inode, name)) = line.split_once('\t')
                && let Ok(inode) = inode.parse()
            {
                names.entry(inode).or_default().insert(name.trim_end_matches('/').replace("//", "/"));
            }
        }
        names
    }

    fn free(&self, blocks: &[u64]) -> BTreeSet<u64> {
        let commands: Vec<String> = blocks.iter().map(|block| format!("testb {block}")).collect();
        let out = debugfs(self.image, &commands);
        let free = out.lines().filter_map(|line| line.strip_prefix("Block ")?.strip_suffix(" not in use"));
        free.map(|block| block.parse().unwrap()).collect()
    }

    /// The blocks of the file at `path`.
    fn blocks_of(&self, path: &str) -> Vec<u64> {
        let out = debugfs(self.image, &[format!("blocks {path}")]);
        out.split_whitespace().filter_map(|word| word.parse().ok()).filter(|block| *block != 0).collect()
    }
}

/// Asks for the owners of single sectors of `blocks`, and holds every answer against debugfs's. Returns how many blocks
/// were of a file with a name.
fn assert_owners(name: &str, judge: &Judge<'_>, blocks: &BTreeSet<u64>) -> usize {
    let asked: Vec<u64> = blocks.iter().copied().collect();
    let mut owner_of = BTreeMap::new();
    for some in asked.chunks(1000) {
        // The last sector of each block.
        let extents: Vec<Extent> =
            some.iter().map(|block| Extent::at((block + 1) * judge.block - 512, 512)).collect();
        let told = owners(judge.image, &extents);
        assert_eq!(told.len(), 1, "{name}: {told:?}");
        assert_eq!((&told[0].unnamed[..], &told[0].notes[..]), (&[][..], &[][..]), "{name}");
        for (owner, extents) in &told[0].owners {
            for run in extents {
                for block in run.start / judge.block..run.end.div_ceil(judge.block) {
                    assert!(owner_of.insert(block, owner.clone()).is_none(), "{name}: block {block} twice");
                }
            }
        }
    }
    let inodes = judge.inodes(&asked);
    let names = judge.names(&inodes.values().copied().collect());
    let without: Vec<u64> = asked.iter().copied().filter(|block| !inodes.contains_key(block)).collect();
    let free = judge.free(&without);
    let mut named = 0;
    for block in &asked {
        let owner = owner_of.get(block).unwrap_or_else(|| panic!("{name}: no owner of block {block}"));
        match (inodes.get(block), owner) {
            (None, Owner::Free) => assert!(free.contains(block), "{name}: block {block} is not free"),
            (None, Owner::Metadata(what)) => {
                assert!(!free.contains(block), "{name}: {what} at {block} is free");
            }
            (Some(7), Owner::Metadata(what)) => {
                assert!(what == "resize inode" || what.starts_with("reserved"), "{name}: {what}");
            }
            (Some(3 | 4), Owner::Metadata(what)) => assert!(what.ends_with("quota"), "{name}: {what}"),
            (Some(8), owner) => assert_eq!(*owner, Owner::Metadata("journal".into()), "{name}: {block}"),
            (Some(inode), Owner::Inode { number, path, more, kind, .. }) => {
                assert_eq!(inode, number, "{name}: block {block}");
                if *inode == 2 {
                    assert_eq!(path.as_deref(), Some("/"), "{name}: {block}");
                    continue;
                }
                let Some(expected) = names.get(inode) else {
                    assert_eq!((path, *kind), (&None, "extended attribute value"), "{name}: {block}");
                    continue;
                };
                let path = path.as_ref().unwrap_or_else(|| panic!("{name}: inode {inode} has no name"));
                // debugfs climbs 30 levels, and then writes an ellipsis.
                let is = |known: &String| match known.strip_prefix("...") {
                    Some(end) => path.ends_with(end) && path.starts_with("/deep/level-0/level-1/"),
                    None => known == path.trim_end_matches('/'),
                };
                assert!(expected.iter().any(is), "{name}: {path} is none of {expected:?}");
                assert_eq!(*more + 1, expected.len() as u64, "{name}: {path}");
                named += 1;
            }
            (expected, owner) => panic!("{name}: block {block} is {expected:?}'s, not {owner:?}"),
        }
    }
    named
}

const FILE_SYSTEMS: &[(&str, u64, &str)] = &[
    ("ext2 1k", 64, "mkfs.ext2 -b 1024 -N 6000"),
    ("ext3 1k", 64, "mkfs.ext3 -b 1024 -N 6000"),
    ("ext3 4k", 200, "mkfs.ext3 -b 4096 -N 6000"),
    ("ext2 no filetype", 64, "mkfs.ext2 -b 2048 -O ^filetype,^dir_index -N 6000"),
    ("ext4", 200, "mkfs.ext4 -b 4096 -N 6000"),
    ("ext4 1k", 64, "mkfs.ext4 -b 1024 -N 6000"),
    ("ext4 32bit", 100, "mkfs.ext4 -b 4096 -O ^64bit,^flex_bg -N 6000"),
    ("ext4 uninit_bg", 300, "mkfs.ext4 -b 1024 -O ^metadata_csum,uninit_bg -N 20000"),
    ("ext4 meta_bg", 300, "mkfs.ext4 -b 1024 -O meta_bg,^resize_inode -N 20000"),
    (
        "ext4 more",
        100,
        "mkfs.ext4 -b 1024 -I 512 -O inline_data,ea_inode,mmp,large_dir,verity,encrypt -N 6000",
    ),
    // This host cannot mount these two: mkfs fills them.
    ("ext4 quota", 100, "mkfs.ext4 -b 4096 -O quota,project,casefold -N 6000 -d TREE"),
    ("ext4 64k", 400, "mkfs.ext4 -b 65536 -N 6000 -d TREE"),
    ("ext4 sparse_super2", 100, "mkfs.ext4 -b 4096 -O sparse_super2,^resize_inode -N 6000"),
];

#[test]
fn every_block_is_whose_debugfs_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random::new(77);
    for (name, mib, command) in FILE_SYSTEMS {
        let image = dir.path().join("fs");
        if command.contains("TREE") {
            let tree = dir.path().join(name.replace(' ', "-"));
            fs::create_dir(&tree).unwrap();
            populate(&tree, &mut random);
            mkfs(&image, *mib, &command.replace("TREE", text(&tree)));
        } else {
            mkfs(&image, *mib, command);
            let mount = LoopMount::new(&image, "");
            populate(mount.path(), &mut random);
            drop(mount);
        }
        // Too long for the inode; and, where a value may have an inode of its own, for an attribute block.
        let value = dir.path().join("value");
        fs::write(&value, "v".repeat(if command.contains("ea_inode") { 1024 } else { 700 })).unwrap();
        let set = format!("ea_set -f {} /names/one user.large", text(&value));
        run("debugfs", &["-w", "-R", &set, text(&image)]);
        let judge = Judge::new(&image);
        let mut blocks: BTreeSet<u64> =
            (0..1500).map(|_| judge.first + random.below(judge.blocks - judge.first)).collect();
        // The start, with the metadata.
        blocks.extend(judge.first..judge.first + 300);
        blocks.retain(|block| *block < judge.blocks);
        let own = ["<3>", "/turns-a", "/turns-b", "/sparse", "/names", "/names/one", "/large", "/", "<8>"];
        let bottom =
            format!("/deep/{}/bottom", (0..60).map(|i| format!("level-{i}")).collect::<Vec<_>>().join("/"));
        for path in own.iter().copied().chain([&*bottom, "/names/long-link"]) {
            blocks.extend(judge.blocks_of(path).into_iter().take(500));
        }
        if command.contains("ea_inode") {
            let told = owners(&image, &[Extent::new(0, mib * MIB)]);
            let is_value =
                |owner: &Owner| matches!(owner, Owner::Inode { kind: "extended attribute value", .. });
            let (_, runs) = told[0].owners.iter().find(|(owner, _)| is_value(owner)).unwrap();
            assert_eq!(runs.iter().map(Extent::len).sum::<u64>(), 1024);
            blocks.extend(runs.iter().flat_map(|run| run.start / 1024..run.end / 1024));
        }
        let named = assert_owners(name, &judge, &blocks);
        println!("{name}: {} blocks, {named} of named files", blocks.len());
        assert!(named > 100, "{name}: {named}");
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn names_in_a_journal_not_yet_replayed_count() {
    let dir = tempfile::tempdir().unwrap();
    let (image, copy) = (dir.path().join("fs"), dir.path().join("copy"));
    // The kernel may write metadata back at any time, and then the journal has nothing to add.
    for attempt in 0.. {
        mkfs(&image, 64, "mkfs.ext4 -b 1024");
        let mount = LoopMount::new(&image, "");
        fs::create_dir(mount.path().join("new")).unwrap();
        let file = File::create(mount.path().join("new/file")).unwrap();
        file.write_all_at(&[7; 5000], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        File::open(mount.path().join("new")).unwrap().sync_all().unwrap();
        copy_image(&image, &copy);
        drop(mount);
        let (_, out, _) = support::try_run("debugfs", &["-R", "blocks /new/file", text(&copy)]);
        let hidden = out.trim().is_empty();
        let blocks = Judge::new(&image).blocks_of("/new/file");
        let told = owners(&copy, &[Extent::at(blocks[0] * 1024, 512)]);
        let Owner::Inode { path, .. } = &told[0].owners[0].0 else { panic!("{told:?}") };
        assert_eq!(path.as_deref(), Some("/new/file"), "{told:?}");
        if hidden {
            return;
        }
        assert!(attempt < 20, "the journal never has anything");
    }
}

/// Writes over one byte of `disk`.
fn flip(disk: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(disk).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
}

fn compare(a: &Path, b: &Path, json: bool) -> (i32, String) {
    let mut command = Command::new(HAUL);
    command.args(["compare", text(a), text(b)]);
    if json {
        command.arg("--json");
    }
    let out = command.output().unwrap();
    (out.status.code().unwrap(), String::from_utf8(out.stdout).unwrap())
}

#[test]
fn haul_compare_prints_just_the_files_that_differ() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (dir.path().join("disk"), dir.path().join("copy"));
    empty_image(&disk, 200 * MIB);
    let script = dir.path().join("script");
    fs::write(
        &script,
        "label: gpt\nstart=1MiB, size=90MiB\nstart=100MiB, size=60MiB\nstart=170MiB, size=20MiB\n",
    )
    .unwrap();
    run("sh", &["-c", &format!("sfdisk -q --no-reread {} < {}", text(&disk), text(&script))]);
    let mut changes = Vec::new();
    let mut random = Random::new(5);
    for (start, mib, command) in [(1, 90, "mkfs.ext4 -b 4096"), (100, 60, "mkfs.ext3 -b 1024")] {
        let part = dir.path().join("part");
        mkfs(&part, mib, command);
        let mount = LoopMount::new(&part, "");
        let root = mount.path();
        fs::create_dir_all(root.join("etc/app")).unwrap();
        for i in 0..50 {
            fs::write(root.join(format!("etc/app/file-{i}")), random.bytes(40_000)).unwrap();
        }
        fs::write(root.join(OsStr::from_bytes(b"etc/new\nline \xff\x1b[31m")), random.bytes(40_000)).unwrap();
        drop(mount);
        let judge = Judge::new(&part);
        let inode = |path: &str| judge.blocks_of(path);
        // The last byte of a block in the middle, and a directory's.
        changes.push((start * MIB) + (inode("/etc/app/file-7")[5] + 1) * judge.block - 1);
        changes.push((start * MIB) + inode("/etc/app/file-33")[0] * judge.block);
        changes.push((start * MIB) + inode("/etc/app")[0] * judge.block + 700);
        let odd = debugfs(&part, &["ls -l /etc".into()]);
        let odd = odd.lines().find(|line| line.contains("31m")).unwrap();
        let odd: u32 = odd.split_whitespace().next().unwrap().parse().unwrap();
        changes.push((start * MIB) + inode(&format!("<{odd}>"))[2] * judge.block);
        let file = File::options().write(true).open(&disk).unwrap();
        file.write_all_at(&fs::read(&part).unwrap(), start * MIB).unwrap();
    }
    copy_image(&disk, &copy);
    assert_eq!(compare(&disk, &copy, false), (0, "the disks are the same\n".into()));
    changes.iter().for_each(|at| flip(&copy, *at));
    // Of no file system: the boot code, and a partition that holds nothing known.
    flip(&copy, 100);
    flip(&copy, 180 * MIB);
    let (code, out) = compare(&disk, &copy, false);
    assert_eq!(code, 10);
    let lines: Vec<&str> = out.lines().map(|line| line.split(": bytes").next().unwrap()).collect();
    let own = [
        "  /etc/app (directory)",
        "  /etc/app/file-33",
        "  /etc/app/file-7",
        "  /etc/new\\nline \\xff\\u{1b}[31m",
    ];
    let mut expected = vec!["partition 1 (ext4):"];
    expected.extend(own);
    expected.push("partition 2 (ext3):");
    expected.extend(own);
    let mut sorted = lines[..10].to_vec();
    sorted[1..5].sort_unstable();
    sorted[6..10].sort_unstable();
    assert_eq!(sorted, expected, "{out}");
    assert_eq!(lines[10..], ["partition 3 (empty)", "outside of all partitions"], "{out}");

    let (code, out) = compare(&disk, &copy, true);
    assert_eq!(code, 10);
    let events: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let result = &events.iter().find(|event| event["event"] == "result").unwrap()["result"];
    assert_eq!(events.last().unwrap()["id"], "compare.differ");
    let files = result["files"].as_array().unwrap();
    assert_eq!(files.len(), 8);
    for file in files {
        assert_eq!((&file["on"], &file["part"]), (&"both".into(), &"content".into()), "{file}");
        assert_eq!(file["more_names"], 0);
        let extent = file["extents"][0].as_array().unwrap();
        let (start, end) = (extent[0].as_u64().unwrap(), extent[1].as_u64().unwrap());
        assert_eq!(changes.iter().filter(|at| (start..end).contains(*at)).count(), 1, "{file}");
    }
    assert_eq!(result["unnamed"].as_array().unwrap().len(), 2);
}

#[test]
fn a_file_only_one_disk_has_is_named_by_that_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (dir.path().join("disk"), dir.path().join("copy"));
    mkfs(&disk, 60, "mkfs.ext4 -b 4096");
    copy_image(&disk, &copy);
    let mount = LoopMount::new(&copy, "");
    fs::write(mount.path().join("new"), vec![1; 50_000]).unwrap();
    drop(mount);
    let (code, out) = compare(&disk, &copy, false);
    assert_eq!(code, 10);
    let line = |start: &str| out.lines().any(|line| line.starts_with(start));
    for start in [
        "the whole disk (ext4):",
        "  /new, on B only: bytes",
        "  free blocks, on A only: bytes",
        "  inode table of group 0: bytes",
        "  superblock: bytes",
        "  / (directory): bytes",
        "  journal: bytes",
    ] {
        assert!(line(start), "no line starts {start:?} in\n{out}");
    }
    // Where one of them is no file system any more, the other tells.
    copy_image(&disk, &copy);
    flip(&copy, 1024 + 0x38);
    let (_, out) = compare(&disk, &copy, false);
    assert!(out.contains("the whole disk (ext4):\n  superblock, on A only: bytes"), "{out}");
    assert!(out.contains("the whole disk (unknown), on B only"), "{out}");
}

#[test]
fn files_in_logical_volumes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (dir.path().join("disk"), dir.path().join("copy"));
    empty_image(&disk, 120 * MIB);
    let script = dir.path().join("script");
    fs::write(&script, "label: gpt\nstart=1MiB, size=50MiB\nstart=60MiB, size=50MiB\n").unwrap();
    run("sh", &["-c", &format!("sfdisk -q --no-reread {} < {}", text(&disk), text(&script))]);
    let parts = [Extent::at(MIB, 50 * MIB), Extent::at(60 * MIB, 50 * MIB)];
    let lvm = Lvm::attach(&[(&disk, parts[0]), (&disk, parts[1])]);
    lvm.group("vg", "", "-s 1m");
    lvm.create("wide", "-L 40m -i 2 -I 4k vg");
    lvm.create("root", "-L 20m vg");
    let places = lvm.places("vg");
    drop(lvm);
    let mut changes = Vec::new();
    for (name, command) in [("wide", "mkfs.ext4 -b 4096"), ("root", "mkfs.ext2 -b 1024")] {
        let part = dir.path().join("part");
        let len: u64 = places[name].iter().map(|place| place.len).sum();
        mkfs(&part, len / MIB, command);
        let mount = LoopMount::new(&part, "");
        fs::write(mount.path().join("before"), vec![2; 3_000_000]).unwrap();
        fs::write(mount.path().join(name), vec![3; 3_000_000]).unwrap();
        drop(mount);
        lvm::write(&places[name], &fs::read(&part).unwrap());
        let judge = Judge::new(&part);
        let at = judge.blocks_of(&format!("/{name}"))[200] * judge.block;
        let place =
            places[name].iter().find(|place| Extent::at(place.offset, place.len).contains(Extent::at(at, 1)));
        let place = place.unwrap();
        changes.push((name, place.at + at - place.offset));
    }
    copy_image(&disk, &copy);
    for (name, at) in changes {
        flip(&copy, at);
        let (code, out) = compare(&disk, &copy, false);
        let kind = if name == "wide" { "ext4" } else { "ext2" };
        let sector = at / 512 * 512;
        let expected = format!("vg/{name} ({kind}):\n  /{name}: bytes {sector}..{}\n", sector + 512);
        assert_eq!((code, out), (10, expected));
        flip(&copy, at);
    }
}

/// A small file system with all that [`populate`] makes but the largest, in memory.
fn small(command: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 8, command);
    let mount = LoopMount::new(&image, "");
    let root = mount.path();
    fs::create_dir_all(root.join("a/b/c/d/e")).unwrap();
    let files = ["a/one", "a/b/c/two"].map(|name| File::create(root.join(name)).unwrap());
    for i in 0..150 {
        for file in &files {
            file.write_all_at(&[1; 900], i * 3000).unwrap();
            file.sync_data().unwrap();
        }
    }
    drop(files);
    for i in 0..300 {
        fs::write(root.join(format!("a/b/file-with-a-long-name-{i}")), [5; 1100]).unwrap();
    }
    drop(mount);
    fs::read(&image).unwrap()
}

/// Every eighth KiB in the first 8 MiB: what a test asks the owners of.
fn scattered() -> Vec<Extent> {
    (0..1000).map(|i| Extent::at(i * 8192, 512)).collect()
}

fn owners_in(bytes: &[u8]) -> bool {
    let disk: Arc<dyn ReadAt> = Arc::new(MemoryDisk::holding(bytes));
    let told = layout::owners(&disk, &scattered()).unwrap();
    let whole = told.iter().all(|told| told.unnamed.is_empty() && told.notes.is_empty());
    let is_lost = |owner: &Owner| matches!(owner, Owner::Unknown | Owner::Inode { path: None, .. });
    whole && !told.iter().flat_map(|told| &told.owners).any(|(owner, _)| is_lost(owner))
}

#[test]
fn a_thousand_damaged_file_systems_are_named_or_not_in_bounded_time_and_memory() {
    let commands = [
        "mkfs.ext3 -b 1024 -N 512",
        "mkfs.ext4 -b 1024 -N 512 -O ^metadata_csum,^uninit_bg",
        "mkfs.ext4 -b 1024 -I 256 -N 512 -O inline_data,^has_journal",
    ];
    let samples: Vec<damage::Sample> = commands
        .into_iter()
        .map(|command| {
            let image = small(command);
            // Superblock, descriptors, bitmaps, inodes; then whatever is directories, maps and content.
            let areas = vec![(1024, 2048), (1024, 140 << 10), (1024, 400 << 10)];
            damage::Sample { image, areas, seal: |_| {} }
        })
        .collect();
    damage::run_through("ext4, whose owners are asked for,", &samples, 1000, 64 << 20, owners_in);
}

/// Puts bytes over those of a file system.
fn patch(image: &mut [u8], at: u64, bytes: &[u8]) {
    image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn maps_and_directories_that_loop_end() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 16, "mkfs.ext4 -b 1024 -O ^metadata_csum,^uninit_bg,^has_journal");
    let mount = LoopMount::new(&image, "");
    fs::create_dir_all(mount.path().join("x/y")).unwrap();
    fs::write(mount.path().join("x/y/file"), [1; 9000]).unwrap();
    fs::write(mount.path().join("victim"), [1; 9000]).unwrap();
    fs::write(mount.path().join("nodes"), [1; 9000]).unwrap();
    drop(mount);
    let judge = Judge::new(&image);
    let nodes = judge.blocks_of("/nodes");
    let where_is = |path: &str| {
        let out = debugfs(&image, &[format!("imap {path}")]);
        let place = out.lines().find(|line| line.contains("located at block")).unwrap();
        let place = place.split("block ").last().unwrap();
        let (block, offset) = place.split_once(", offset ").unwrap();
        let offset = u64::from_str_radix(offset.trim().trim_start_matches("0x"), 16).unwrap();
        block.parse::<u64>().unwrap() * 1024 + offset
    };
    let mut bytes = fs::read(&image).unwrap();
    // A tree of depth 5 in which every entry of a node leads to the same node below: 84 to the 5th leaves.
    let node = |depth: u16, count: u16, child: u64| {
        let mut node =
            [&[0x0a, 0xf3][..], &count.to_le_bytes(), &84_u16.to_le_bytes(), &depth.to_le_bytes(), &[0; 4]]
                .concat();
        for i in 0..u32::from(count) {
            node.extend(i.to_le_bytes());
            node.extend((child as u32).to_le_bytes());
            node.extend([0; 4]);
        }
        node
    };
    let root = where_is("/victim") + 0x28;
    patch(&mut bytes, root, &node(5, 4, nodes[4]));
    for (depth, (at, child)) in (0..5_u16).zip(nodes.iter().zip([nodes[5]].iter().chain(&nodes))) {
        patch(&mut bytes, at * 1024, &node(depth, 84, *child));
    }
    // Directories whose parents are each other.
    let (x, y) = (judge.blocks_of("/x")[0] * 1024, judge.blocks_of("/x/y")[0] * 1024);
    let inode = |at: u64| u32::from_le_bytes(bytes[at as usize..at as usize + 4].try_into().unwrap());
    let (x_inode, y_inode) = (inode(x), inode(y));
    patch(&mut bytes, x + 12, &y_inode.to_le_bytes());
    // "x" as a name in "y", in place of "file".
    let name_at = y + 24;
    patch(&mut bytes, name_at, &x_inode.to_le_bytes());
    let disk = Arc::new(FaultyDisk::new(MemoryDisk::holding(&bytes), Vec::new()));
    let asked = [Extent::at(x, 512), Extent::at(y, 512), Extent::at(nodes[7] * 1024, 512)];
    let told = layout::owners(&(disk.clone() as Arc<dyn ReadAt>), &asked).unwrap();
    let paths: Vec<_> = told[0].owners.iter().map(|(owner, _)| owner.to_string()).collect();
    assert!(told[0].notes.iter().any(|note| note.contains("too large")), "{told:?}");
    assert!(disk.bytes_read() < 64 * MIB, "{} bytes read", disk.bytes_read());
    assert!(paths.iter().any(|path| path.contains("no name was found")), "{paths:?}");
}

#[test]
fn a_share_of_a_block_map_is_told_from_content() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 16, "mkfs.ext2 -b 1024");
    let mount = LoopMount::new(&image, "");
    fs::write(mount.path().join("file"), vec![1; 300_000]).unwrap();
    drop(mount);
    // Data blocks 0 to 11, the indirect block, data, the double indirect block and those below it.
    let out = debugfs(&image, &["stat /file".into()]);
    let indirect: Vec<u64> = out
        .split([',', '\n', ' '])
        .filter_map(|word| word.trim().strip_prefix("(IND):").or(word.trim().strip_prefix("(DIND):")))
        .map(|block| block.parse().unwrap())
        .collect();
    assert!(indirect.len() >= 2, "{out}");
    for block in indirect {
        let told = owners(&image, &[Extent::at(block * 1024, 512)]);
        let Owner::Inode { part, path, .. } = &told[0].owners[0].0 else { panic!("{told:?}") };
        assert_eq!((*part, path.as_deref()), (Part::Map, Some("/file")));
    }
}

#[test]
fn unknown_features_give_a_reason_and_no_names() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    for (command, why) in [
        ("mkfs.ext4 -O bigalloc", "bigalloc"),
        ("mkfs.ext4 -O ^metadata_csum,^has_journal", "features 0x40000000"),
    ] {
        mkfs(&image, 60, command);
        if why.contains("0x4") {
            let file = File::options().write(true).open(&image).unwrap();
            // Bit 30 of the incompatible features.
            let mut byte = [0];
            file.write_all_at(&[0x40], 1024 + 0x63).unwrap();
            File::open(&image).unwrap().read_exact_at(&mut byte, 1024 + 0x63).unwrap();
        }
        let told = owners(&image, &[Extent::at(MIB, 512)]);
        assert!(told[0].owners.is_empty() && told[0].notes[0].contains(why), "{told:?}");
        assert_eq!(told[0].unnamed, [Extent::at(MIB, 512)]);
    }
}

#[test]
fn a_disk_that_differs_everywhere_is_named_within_bounds() {
    let bytes = small("mkfs.ext4 -b 1024 -N 512");
    let disk = MemoryDisk::holding(&bytes);
    disk.write_at(&[0; 1], 8 * MIB - 1).unwrap();
    let disk: Arc<dyn ReadAt> = Arc::new(disk);
    let (told, peak) = allocations::watched(|| layout::owners(&disk, &[Extent::new(0, 8 * MIB)]).unwrap());
    let all: u64 = told[0].owners.iter().flat_map(|(_, runs)| runs).map(Extent::len).sum();
    assert_eq!((all, &told[0].notes[..]), (8 * MIB, &[][..]));
    assert!(told[0].owners.len() > 300, "{}", told[0].owners.len());
    assert!(peak < 64 << 20, "{peak} bytes held");
}
