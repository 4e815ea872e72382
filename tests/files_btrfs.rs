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
use haul::io::fake::FaultyDisk;
use haul::io::{DiskFile, ReadAt};
use haul::layout::{BtrfsFiles, FileId, Files};
use haul::unit::{Extent, MIB};
use support::{LoopDevice, LoopMount, Random, age, copy_image, empty_image, run, text, try_run};

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

fn check(kinds: &[(&str, &str, &str)]) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    for (seed, (name, args, options)) in (1..).zip(kinds) {
        live(&image, args, options, seed);
        let count = assert_as_mounted(name, &image);
        println!("figure: {name}: {count} files are as the kernel reads them");
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
