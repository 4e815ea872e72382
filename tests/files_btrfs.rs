//! The files of btrfs as haul reads them without a mount, judged by the kernel's mount of the same image. Needs root.

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
#[path = "support/file_trees.rs"]
mod file_trees;
mod support;

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bounds::Bounds;
use damaged_map::{Damaged, changed};
use file_trees::{assert_same, crowd, walk};
use haul::error::Kind;
use haul::io::fake::FaultyDisk;
use haul::io::{DiskFile, ReadAt};
use haul::layout::{BtrfsFiles, Content, FileId, Files, identify};
use haul::unit::MIB;
use support::{LoopMount, Random, age, copy_image, empty_image, run, text};

/// Makes a file system by mkfs.btrfs's arguments in an image of `mib` MiB.
fn mkfs(image: &Path, mib: u64, args: &str) {
    empty_image(image, mib * MIB);
    let words = ["-q", "-f"].into_iter().chain(args.split_whitespace()).chain([text(image)]);
    run("mkfs.btrfs", &words.collect::<Vec<_>>());
}

fn open(image: &Path) -> BtrfsFiles {
    BtrfsFiles::open(Arc::new(DiskFile::open(image).unwrap())).unwrap()
}

fn subvolume(verb: &str, paths: &[&Path]) {
    let paths = paths.iter().map(|path| text(path));
    run("btrfs", &["subvolume"].into_iter().chain(verb.split(' ')).chain(paths).collect::<Vec<_>>());
}

/// Holds what haul reads of `image` against the kernel's mount of all of it; how many files there are.
fn assert_as_mounted(name: &str, image: &Path) -> usize {
    let mount = LoopMount::new(image, "ro,subvolid=5");
    let files = open(image);
    assert_eq!(files.stale(), None, "{name}");
    assert_same(name, &files, mount.path())
}

/// Text and noise in turns, of which text can be compressed.
fn content(random: &mut Random, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let part = random.below(60_000) as usize;
        match random.below(3) {
            0 => bytes.extend(random.bytes(part / 8)),
            1 => bytes.resize(bytes.len() + part, b'a' + random.below(26) as u8),
            _ => bytes
                .extend((0..part / 12).flat_map(|i| format!("line {:5} {}\n", i * i, i % 7).into_bytes())),
        }
    }
    bytes.truncate(len);
    bytes
}

/// Files of every kind and form of extent.
fn shapes(dir: &Path, random: &mut Random) {
    let at = |name: &str| dir.join(name);
    fs::create_dir_all(dir).unwrap();
    for len in [0, 1, 100, 2047, 2048, 2049, 3900, 4095, 4096, 4097, 70_000, 131_071, 131_073, 1_500_000] {
        fs::write(at(&format!("of {len}")), content(random, len)).unwrap();
        fs::write(at(&format!("noise of {len}")), random.bytes(len)).unwrap();
        fs::write(at(&format!("zeroes of {len}")), vec![0; len]).unwrap();
    }
    let open = |name: &str| File::options().create(true).write(true).truncate(false).open(at(name)).unwrap();
    let sparse = open("sparse");
    sparse.write_all_at(&content(random, 50_000), 1 << 20).unwrap();
    sparse.write_all_at(b"end", 9 << 20).unwrap();
    sparse.set_len(20 << 20).unwrap();
    open("only a hole").set_len(5_000_001).unwrap();
    let huge = open("huge");
    huge.write_all_at(b"far away", 1 << 50).unwrap();
    huge.set_len((1 << 60) + 5).unwrap();
    // Inline data that was cut, and a file that grew behind some.
    fs::write(at("cut"), content(random, 1900)).unwrap();
    fs::write(at("grown"), content(random, 100)).unwrap();
    run("sync", &["-f", text(dir)]);
    open("cut").set_len(700).unwrap();
    open("grown").set_len(3_000_000).unwrap();
    let scattered = open("scattered");
    for i in 0..2500 {
        scattered.write_all_at(&content(random, 4096), i * 12_288).unwrap();
    }
    run("fallocate", &["-l", "1M", text(&at("reserved"))]);
    open("reserved").write_all_at(&content(random, 9000), 300_000).unwrap();
    fs::write(at("reserved behind"), content(random, 5000)).unwrap();
    run("fallocate", &["-n", "-o", "65536", "-l", "1M", text(&at("reserved behind"))]);
    // Extents that are referred to in part, from several files.
    fs::write(at("whole"), content(random, 600_000)).unwrap();
    run("sync", &["-f", text(dir)]);
    run("cp", &["--reflink=always", text(&at("whole")), text(&at("shared"))]);
    let (whole, shared) = (open("whole"), open("shared"));
    for i in 0..40 {
        let file = if i % 2 == 0 { &whole } else { &shared };
        file.write_all_at(&content(random, 1 + i * 300), random.below(590_000)).unwrap();
        if i % 8 == 0 {
            run("sync", &["-f", text(dir)]);
        }
    }
    let command = format!("reflink {} 131072 4096 69632", text(&at("shared")));
    run("xfs_io", &["-f", "-c", &command, text(&at("cloned"))]);
    run("fallocate", &["-p", "-o", "40960", "-l", "20480", text(&at("shared"))]);
    fs::hard_link(at("of 100"), at("linked")).unwrap();
    for len in [1, 60, 255, 3000] {
        std::os::unix::fs::symlink("x".repeat(len), at(&format!("link of {len}"))).unwrap();
    }
    std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(b"any \xff\xfe bytes"), at("link of bytes"))
        .unwrap();
    run("mkfifo", &[text(&at("pipe"))]);
    run("mknod", &[text(&at("device")), "c", "1", "3"]);
    fs::create_dir(at("without checksums")).unwrap();
    run("chattr", &["+C", text(&at("without checksums"))]);
    fs::write(at("without checksums/file"), content(random, 300_000)).unwrap();
}

/// A server's subvolumes, nested ones, snapshots of them, and names that are left of ones that are gone.
fn subvolumes(top: &Path, random: &mut Random) {
    let (root, home) = (top.join("@"), top.join("@home"));
    for path in [&root, &home] {
        subvolume("create", &[path]);
    }
    fs::create_dir_all(root.join("var/lib")).unwrap();
    fs::create_dir_all(root.join(".snapshots/1")).unwrap();
    let (nested, inner, gone) =
        (root.join("var/lib/nested"), root.join("var/lib/nested/inner"), home.join("gone"));
    for path in [&nested, &inner, &gone] {
        subvolume("create", &[path]);
        fs::write(path.join("file"), content(random, 5000)).unwrap();
    }
    age(&root, 3, 60, 60_000);
    age(&home, 4, 60, 60_000);
    subvolume("snapshot -r", &[&root, &root.join(".snapshots/1/snapshot")]);
    subvolume("snapshot", &[&home, &top.join("of home")]);
    age(&root, 5, 60, 60_000);
    subvolume("delete -c", &[&gone]);
    subvolume("snapshot", &[&top.join("of home"), &top.join("of that")]);
    age(&top.join("of that"), 6, 30, 30_000);
    fs::rename(&nested, root.join("moved")).unwrap();
    subvolume("set-default", &[&root]);
}

/// Everything there is, in a file system made and mounted by these arguments and options.
fn live(image: &Path, args: &str, options: &str, seed: u64) {
    let mut random = Random::new(seed);
    mkfs(image, if args.contains("-M") { 250 } else { 700 }, args);
    let mount = LoopMount::new(image, options);
    shapes(&mount.path().join("shapes"), &mut random);
    subvolumes(mount.path(), &mut random);
    shapes(&mount.path().join("@/shapes"), &mut random);
    for count in [0, 3, 60, 3000] {
        crowd(&mount.path().join(format!("@/folder of {count}")), count, seed);
    }
}

/// Fails unless the files of an image take every form that its arguments and options make.
fn assert_forms(name: &str, image: &Path, args: &str, options: &str) {
    let dump = run("btrfs", &["inspect-internal", "dump-tree", text(image)]);
    let items: Vec<&str> = dump.split("\titem ").collect();
    let count =
        |words: &[&str]| items.iter().filter(|item| words.iter().all(|word| item.contains(word))).count();
    let no_offset = ["extent data offset 0 ", "prealloc data offset 0 "];
    let in_part =
        |item: &&&str| item.contains("extent data offset") && no_offset.iter().all(|no| !item.contains(no));
    assert!(count(&["EXTENT_DATA", "(prealloc)"]) > 3, "{name}: prealloc");
    assert!(count(&["EXTENT_DATA", "(inline)"]) > 20, "{name}: inline");
    assert!(items.iter().filter(in_part).count() > 20, "{name}: extents in part");
    assert_eq!(
        count(&["EXTENT_DATA", "extent data disk byte 0 "]) > 20,
        args.contains("^no-holes"),
        "{name}: holes"
    );
    let collide = |item: &&&str| item.contains(" DIR_ITEM ") && item.matches("location key").count() == 2;
    assert!(items.iter().filter(collide).count() >= 3, "{name}: names of the same hash");
    let how = options.split(['=', ',']).nth(1).filter(|_| options.starts_with("compress"));
    if let Some(how) = how {
        let packed = format!("({how})");
        let in_part = items.iter().filter(in_part).filter(|item| item.contains(&packed)).count();
        let counts = ["(regular)", "(inline)"].map(|form| count(&["EXTENT_DATA", form, &packed]));
        assert!(counts[0] > 40 && counts[1] > 3 && in_part > 5, "{name}: {counts:?}, {in_part} in part");
    }
}

fn check(kinds: &[(&str, &str, &str)]) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    for (seed, (name, args, options)) in (1..).zip(kinds) {
        live(&image, args, options, seed);
        let count = assert_as_mounted(name, &image);
        println!("figure: {name}: {count} files are as the kernel reads them");
        assert_forms(name, &image, args, options);
        assert!(count > 3300, "{name}: {count} files");
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn files_are_as_the_kernel_reads_them() {
    check(&[("default", "", ""), ("mixed", "-M -n 4096", ""), ("explicit holes", "-O ^no-holes", "")]);
}

#[test]
fn compressed_files_are_as_the_kernel_reads_them() {
    check(&[
        ("zlib", "", "compress-force=zlib"),
        ("lzo", "", "compress-force=lzo"),
        ("zstd", "", "compress-force=zstd"),
        ("lzo, explicit holes", "-n 4096 -O ^no-holes", "compress-force=lzo,max_inline=4096"),
    ]);
}

#[test]
fn files_are_read_whatever_nodes_checksums_and_profiles_are() {
    check(&[
        ("large nodes", "-n 65536", ""),
        ("sha256", "--csum sha256 -n 4096", "compress=zstd"),
        ("two copies", "-d dup -m dup", ""),
        ("no checksums", "-m single", "nodatasum"),
    ]);
}

#[test]
fn a_folder_of_forty_thousand_names_is_as_the_kernel_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 500, "");
    crowd(&LoopMount::new(&image, "").path().join("folder"), 40_000, 9);
    assert_eq!(assert_as_mounted("many names", &image), 40_002);
}

/// Trees whose blocks were all moved, and whose shared blocks belong to a subvolume that is gone.
#[test]
fn a_balanced_file_system_with_snapshots_of_what_is_gone_is_as_the_kernel_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    live(&image, "-n 4096", "compress=lzo", 20);
    let mount = LoopMount::new(&image, "subvolid=5");
    run("btrfs", &["balance", "start", "--full-balance", text(mount.path())]);
    subvolume("delete -c", &[&mount.path().join("of home")]);
    run("btrfs", &["subvolume", "sync", text(mount.path())]);
    age(&mount.path().join("of that"), 21, 30, 30_000);
    run("btrfs", &["filesystem", "defragment", "-czstd", text(&mount.path().join("shapes/scattered"))]);
    drop(mount);
    assert_as_mounted("balanced", &image);
}

#[test]
fn a_file_system_converted_from_ext4_is_as_the_kernel_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let (ext4, image) = (dir.path().join("ext4"), dir.path().join("fs"));
    empty_image(&ext4, 300 * MIB);
    run("mkfs.ext4", &["-q", "-F", "-b", "4096", text(&ext4)]);
    age(LoopMount::new(&ext4, "").path(), 8, 200, 100_000);
    copy_image(&ext4, &image);
    run("btrfs-convert", &["--no-progress", text(&image)]);
    age(&LoopMount::new(&image, "").path().join("d1"), 9, 100, 100_000);
    assert!(assert_as_mounted("converted", &image) > 150);
}

/// What mkfs.btrfs makes of a folder, with sectors that no kernel of this machine mounts.
#[test]
fn files_put_there_by_mkfs_are_read_whatever_sectors_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let (image, tree) = (dir.path().join("fs"), dir.path().join("tree"));
    age(&tree, 12, 100, 300_000);
    for count in [0, 3, 2000] {
        crowd(&tree.join(format!("folder of {count}")), count, 5);
    }
    std::os::unix::fs::symlink("d1/f1", tree.join("link")).unwrap();
    for (args, sector) in [("", 4096), ("-s 16384 -n 16384", 16_384), ("-s 65536 -n 65536", 65_536)] {
        mkfs(&image, 300, &format!("{args} --rootdir {}", text(&tree)));
        let Content::Btrfs(info) = identify(&DiskFile::open(&image).unwrap()).unwrap() else {
            panic!("{args}")
        };
        assert_eq!(info.sector_size, sector);
        assert!(assert_same(args, &open(&image), &tree) > 2000);
    }
}

#[test]
fn subvolumes_are_found_as_fstab_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    mkfs(&image, 300, "");
    assert_eq!(open(&image).default_subvolume().unwrap(), 5);
    let mount = LoopMount::new(&image, "");
    subvolumes(mount.path(), &mut Random::new(7));
    let id = |path: &str| -> u64 {
        run("btrfs", &["inspect-internal", "rootid", text(&mount.path().join(path))]).trim().parse().unwrap()
    };
    let ids = ["@", "@home", "@/moved", "@/moved/inner", "@/.snapshots/1/snapshot", "of that"]
        .map(|path| (path, id(path)));
    drop(mount);
    let files = open(&image);
    assert_eq!(files.default_subvolume().unwrap(), ids[0].1);
    for (path, id) in ids {
        let by_path = path
            .split('/')
            .fold(files.root(), |folder, name| files.lookup(folder, name.as_bytes()).unwrap().unwrap());
        assert_eq!(files.subvolume(id).unwrap(), Some(by_path), "{path}");
        assert_eq!(by_path.tree, id, "{path}");
        let mount = LoopMount::new(&image, &format!("ro,subvolid={id}"));
        assert_same(path, &open(&image).rooted_at(id).unwrap().unwrap(), mount.path());
    }
    assert_same(
        "default",
        &open(&image).rooted_at(ids[0].1).unwrap().unwrap(),
        LoopMount::new(&image, "ro").path(),
    );
    assert_eq!(files.subvolume(5).unwrap(), Some(files.root()));
    for id in [0, 1, 2, 6, 255, 4000, 1 << 48, 7_u64.wrapping_neg(), u64::MAX] {
        assert_eq!(files.subvolume(id).unwrap(), None, "{id}");
        assert!(open(&image).rooted_at(id).unwrap().is_none(), "{id}");
        let error = files.info(FileId { tree: id, number: 256 }).unwrap_err();
        assert_eq!((error.kind(), error.id()), (Kind::Image, "btrfs.files"), "{id}");
    }
    // A snapshot has names of subvolumes that are not in it.
    let find = |path: &str| {
        path.split('/').fold(files.root(), |at, name| files.lookup(at, name.as_bytes()).unwrap().unwrap())
    };
    for stub in ["of home/gone", "@/.snapshots/1/snapshot/var/lib/nested"] {
        assert_eq!(find(stub).number, 2, "{stub}");
        assert_eq!(files.names(find(stub), 9).unwrap(), Vec::<Vec<u8>>::new(), "{stub}");
        assert_eq!(files.lookup(find(stub), b"file").unwrap(), None, "{stub}");
    }
}

#[test]
fn what_is_no_file_system_of_one_known_device_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (image, second) = (dir.path().join("fs"), dir.path().join("second"));
    let refused = |reason: &str| {
        let error = BtrfsFiles::open(Arc::new(DiskFile::open(&image).unwrap())).err().unwrap();
        assert_eq!((error.kind(), error.id()), (Kind::Image, "btrfs.files"), "{reason}");
        assert!(error.what().contains("fs:") && error.why().contains(reason), "{}", error.why());
    };
    empty_image(&image, 10 * MIB);
    refused("superblock is gone");
    empty_image(&second, 200 * MIB);
    mkfs(&image, 200, &format!("-d single -m raid1 {}", text(&second)));
    refused("2 devices");
    for kind in ["xxhash", "blake2"] {
        mkfs(&image, 130, &format!("--csum {kind}"));
        refused("checksums of type");
    }
    mkfs(&image, 200, "-d raid0 -m raid0");
    refused("type");
}

/// What a power cut leaves: the last commit, and log trees.
#[test]
fn files_made_safe_by_fsync_alone_are_as_before_and_the_reader_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (image, stopped) = (dir.path().join("fs"), dir.path().join("stopped"));
    mkfs(&image, 300, "");
    let mount = LoopMount::new(&image, "");
    let path = mount.path().join("file");
    fs::write(&path, b"before").unwrap();
    run("sync", &["-f", text(mount.path())]);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"behind", 0).unwrap();
    file.sync_all().unwrap();
    copy_image(&image, &stopped);
    drop((file, mount));
    let files = open(&stopped);
    assert!(files.stale().is_some_and(|why| why.contains("fsync")));
    let found = files.lookup(files.root(), b"file").unwrap().unwrap();
    let mut bytes = [0; 9];
    assert_eq!(files.read(found, 0, &mut bytes).unwrap(), 6);
    assert_eq!(&bytes, b"before\0\0\0");
    assert_eq!(open(&image).stale(), None);
}

/// Where the bytes `needle` are in an image.
fn places(image: &[u8], needle: &[u8]) -> Vec<usize> {
    image
        .chunks(4096)
        .zip((0..).step_by(4096))
        .filter(|(page, _)| page.starts_with(needle))
        .map(|(_, at)| at)
        .collect()
}

#[test]
fn data_of_another_checksum_is_an_error_and_a_second_copy_serves() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    for (args, copies) in [("-d single -m single", 1), ("-d dup -m dup", 2), ("-d dup --csum sha256", 2)] {
        mkfs(&image, 300, args);
        let content = [&b"the needle"[..], &Random::new(3).bytes(200_000)].concat();
        fs::write(LoopMount::new(&image, "").path().join("file"), &content).unwrap();
        let bytes = Arc::new(fs::read(&image).unwrap());
        let found = places(&bytes, b"the needle");
        assert_eq!(found.len(), copies, "{args}");
        let read = |changed: &[usize]| {
            let changes = changed.iter().map(|at| (*at as u64 + 70_000, bytes[at + 70_000] ^ 1)).collect();
            let files =
                BtrfsFiles::open(Arc::new(Damaged { disk: Arc::clone(&bytes), size: bytes.len(), changes }))
                    .unwrap();
            let file = files.lookup(files.root(), b"file").unwrap().unwrap();
            let mut buf = vec![0; 300_000];
            files.read(file, 0, &mut buf).map(|n| buf[..n] == content)
        };
        let error = read(&found).unwrap_err();
        assert!(error.why().contains("checksum"), "{args}: {}", error.why());
        assert_eq!(error.kind(), Kind::Image);
        assert!(read(&[]).unwrap(), "{args}");
        for one in found.iter().filter(|_| copies == 2) {
            assert!(read(&[*one]).unwrap(), "{args}");
        }
    }
}

/// A file system with some of everything, small, as a disk in memory.
fn small(args: &str, seed: u64) -> Arc<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut random = Random::new(seed);
    mkfs(&image, 130, args);
    for options in ["", "compress-force=zlib", "compress-force=lzo", "compress-force=zstd"] {
        let mount = LoopMount::new(&image, &format!("subvolid=5,{options}"));
        let name = options.split('=').next_back().unwrap();
        let top = mount.path().join(format!("volume {name}"));
        subvolume("create", &[&top]);
        for len in [10, 1500, 3000, 4097, 100_000, 300_000] {
            fs::write(top.join(format!("of {len}")), content(&mut random, len)).unwrap();
        }
        std::os::unix::fs::symlink("of 10", top.join("link")).unwrap();
        crowd(&top.join("folder"), 150, seed);
        let sparse = File::create(top.join("sparse")).unwrap();
        (0..100).for_each(|i| sparse.write_all_at(&[1; 5000], i * 20_000).unwrap());
        subvolume("snapshot", &[&top, &top.join("snapshot")]);
        subvolume("set-default", &[&top]);
    }
    fs::read(&image).unwrap().into()
}

/// Where the tree blocks of 4096 bytes are: pages that bear the file system's UUID and, up to the copy, their address.
fn tree_blocks(disk: &[u8]) -> Vec<usize> {
    let uuid = &disk[(64 << 10) + 32..][..16];
    let is_block = |at: &usize| disk[at + 32..at + 48] == *uuid && *at != 64 << 10 && *at != 64 << 20;
    (0..disk.len()).step_by(4096).filter(is_block).collect()
}

/// Changes bytes of some tree blocks, or of the superblock, and makes their checksums right.
fn sealed_damage(disk: &Arc<Vec<u8>>, blocks: &[usize], random: &mut Random) -> Damaged {
    let mut damaged = Damaged { disk: Arc::clone(disk), size: disk.len(), changes: Default::default() };
    for _ in 0..1 + random.below(3) {
        let block =
            if random.below(12) == 0 { 64 << 10 } else { blocks[random.below(blocks.len() as u64) as usize] };
        for _ in 0..1 + random.below(4) {
            // Headers and keys at the start, items at the end.
            let most = [120, 700, 4096][random.below(3) as usize];
            let at = random.below(most) as usize;
            let at = block + if random.below(2) == 0 { at } else { 4095 - at };
            damaged.changes.insert(at as u64, changed(disk[at], random));
        }
        let mut bytes = vec![0; 4096];
        damaged.read_at(&mut bytes, block as u64).unwrap();
        let sum = crc32c::crc32c(&bytes[32..]).to_le_bytes();
        damaged.changes.extend((block as u64..).zip(sum));
    }
    damaged
}

/// Bytes a reader may hold of a damaged file system.
const MOST_HELD: usize = 64 << 20;

fn damage(rounds: u64) {
    let mut random = Random::new(2027);
    let mut bounds = Bounds::default();
    let (mut refused, mut broken) = (0, 0);
    for (args, seed) in [("-m single -n 4096", 1), ("-M -n 4096 -O ^no-holes", 2)] {
        let disk = small(args, seed);
        let blocks = tree_blocks(&disk);
        let whole = walk(
            &BtrfsFiles::open(Arc::new(Damaged {
                disk: Arc::clone(&disk),
                size: disk.len(),
                changes: Default::default(),
            }))
            .unwrap(),
        );
        assert!(whole.errors.is_empty() && whole.files > 400, "{whole:?}");
        for _ in 0..rounds / 2 {
            let damaged = sealed_damage(&disk, &blocks, &mut random);
            let name = format!("{args}: a disk with {:?}", damaged.changes);
            let damaged = Arc::new(FaultyDisk::new(damaged, Vec::new()));
            let walked = bounds.hold(&name, 0, MOST_HELD, || {
                let files = BtrfsFiles::open(Arc::clone(&damaged) as Arc<dyn ReadAt>)?;
                let default = files.default_subvolume().and_then(|id| files.subvolume(id));
                let mut walked = walk(&files);
                walked.errors.extend(default.err());
                Ok(walked)
            });
            let read = damaged.bytes_read();
            assert!(read < 512 * MIB, "{name}: {read} bytes read");
            match walked {
                Err(error) => {
                    refused += 1;
                    assert_eq!(haul::error::Error::kind(&error), Kind::Image, "{name}: {error}");
                }
                Ok(walked) => {
                    broken += u64::from(!walked.errors.is_empty());
                    for error in walked.errors {
                        assert_eq!(error.kind(), Kind::Image, "{name}: {error}");
                    }
                }
            }
        }
    }
    bounds.print(&format!(
        "damaged btrfs file systems read, {refused} refused, {broken} with files that cannot be read"
    ));
    assert!(refused > rounds / 50 && broken > rounds / 10, "{refused} {broken} of {rounds}");
}

#[test]
fn damaged_trees_are_errors_within_bounds() {
    damage(100);
}

#[test]
#[ignore = "long: 1,000 damaged file systems; scripts/test.sh --long"]
fn a_thousand_damaged_trees_are_errors_within_bounds() {
    damage(1000);
}
