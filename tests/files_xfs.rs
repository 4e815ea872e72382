//! The files of XFS read without mounting it, judged by the kernel's mount. Needs root for loop mounts.

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
#[path = "fuzz_bodies/mod.rs"]
mod bodies;
#[path = "support/bounds.rs"]
mod bounds;
mod support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bodies::{Outcome, xfs_files};
use bounds::Bounds;
use haul::error::{Kind, Result};
use haul::io::{DiskFile, ReadAt};
use haul::layout::{self, FileId, FileKind, Files};
use haul::unit::MIB;
use support::{LoopMount, Random, age, copy_image, empty_image, run, text};

/// Makes a file system by mkfs.xfs's arguments in an image of `mib` MiB and a bit.
fn mkfs(image: &Path, mib: u64, args: &str) {
    empty_image(image, mib * MIB + 12_288);
    // These let mkfs.xfs make what is too small for its taste.
    let mut words = vec!["TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs.xfs", "-q", "-f"];
    words.extend(args.split_whitespace());
    words.push(text(image));
    run("env", &words);
}

fn open(image: &Path) -> Box<dyn Files> {
    layout::xfs_files(Arc::new(DiskFile::open(image).unwrap())).unwrap()
}

fn refusal(image: &Path) -> String {
    let error = layout::xfs_files(Arc::new(DiskFile::open(image).unwrap())).err().expect("it is refused");
    assert_eq!(error.kind(), Kind::Image, "{error:?}");
    error.why()
}

/// What a file is: its kind, size, and a digest of its content or of what a link leads to.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    File(u64, blake3::Hash),
    Folder,
    Link(Vec<u8>),
    Other,
}

type Tree = BTreeMap<Vec<u8>, Seen>;

/// Of longer files only some parts are read.
const WHOLE: u64 = 256 * MIB;

/// The digest of a file of `size` bytes that `read` reads at any offset.
fn digest(size: u64, mut read: impl FnMut(u64, &mut [u8])) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0; 128 << 10];
    let parts = if size <= WHOLE {
        vec![(0, size)]
    } else {
        vec![(0, MIB), (size / 2, size / 2 + MIB), (size - MIB, size)]
    };
    for (mut at, end) in parts {
        while at < end {
            let n = (end - at).min(buf.len() as u64) as usize;
            read(at, &mut buf[..n]);
            hasher.update(&buf[..n]);
            at += n as u64;
        }
    }
    hasher.finalize()
}

/// What the kernel sees in the folder `root`.
fn by_kernel(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![root.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let seen = if meta.is_dir() {
                todo.push(path.clone());
                Seen::Folder
            } else if meta.is_symlink() {
                Seen::Link(fs::read_link(&path).unwrap().into_os_string().into_vec())
            } else if meta.is_file() {
                let file = File::open(&path).unwrap();
                Seen::File(meta.len(), digest(meta.len(), |at, buf| file.read_exact_at(buf, at).unwrap()))
            } else {
                Seen::Other
            };
            tree.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), seen);
        }
    }
    tree
}

/// What `files` has; on the way, names that are not there are not found.
fn by_reader(files: &dyn Files) -> Tree {
    let mut tree = Tree::new();
    let mut todo: Vec<(Vec<u8>, FileId)> = vec![(Vec::new(), files.root())];
    while let Some((path, folder)) = todo.pop() {
        let names = files.names(folder, usize::MAX).unwrap();
        let some = files.names(folder, 2).unwrap();
        assert_eq!(some, names[..names.len().min(2)]);
        for name in &names {
            let file = files.lookup(folder, name).unwrap();
            let file = file.unwrap_or_else(|| panic!("{} is lost", String::from_utf8_lossy(name)));
            let info = files.info(file).unwrap();
            let path = if path.is_empty() { name.clone() } else { [&path, &b"/"[..], name].concat() };
            let seen = match info.kind {
                FileKind::Folder => {
                    todo.push((path.clone(), file));
                    Seen::Folder
                }
                FileKind::Link => Seen::Link(files.target(file).unwrap()),
                FileKind::Other => Seen::Other,
                FileKind::Regular => {
                    let read = |at, buf: &mut [u8]| {
                        buf.fill(0xa5);
                        assert_eq!(files.read(file, at, buf).unwrap(), buf.len());
                    };
                    let seen = Seen::File(info.size, digest(info.size, read));
                    let mut beyond = [0; 10];
                    assert_eq!(files.read(file, info.size, &mut beyond).unwrap(), 0);
                    let tail = info.size.min(3);
                    assert_eq!(files.read(file, info.size - tail, &mut beyond).unwrap() as u64, tail);
                    seen
                }
            };
            assert!(tree.insert(path, seen).is_none(), "two files of one name");
        }
        let present: std::collections::BTreeSet<&Vec<u8>> = names.iter().collect();
        for name in names.iter().take(500).chain([&b"x".to_vec()]) {
            let mut shorter = name.clone();
            shorter.pop();
            let mut other = name.clone();
            *other.last_mut().unwrap() ^= 1;
            for absent in [shorter, other, [name, &b"x"[..]].concat()] {
                if !absent.is_empty() && !present.contains(&absent) {
                    assert_eq!(files.lookup(folder, &absent).unwrap(), None, "{absent:?}");
                }
            }
        }
    }
    tree
}

fn assert_same(name: &str, expected: &Tree, read: &Tree) {
    for (path, seen) in expected {
        let shown = String::from_utf8_lossy(path);
        assert_eq!(read.get(path), Some(seen), "{name}: {shown}");
    }
    let more: Vec<_> = read.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(more.is_empty(), "{name}: {more:?}");
}

/// A name of `len` bytes.
fn any_name(random: &mut Random, len: usize) -> Vec<u8> {
    random.bytes(len).into_iter().map(|byte| if matches!(byte, 0 | b'/') { b'_' } else { byte }).collect()
}

/// A folder of `count` names for a few files.
fn folder(path: &Path, count: usize, random: &mut Random) -> Vec<PathBuf> {
    fs::create_dir(path).unwrap();
    let mut names: Vec<PathBuf> = Vec::new();
    for i in 0..count {
        let name = match random.below(3) {
            0 => format!("{i}"),
            1 => format!("a-name-{i:08}.conf"),
            _ => format!("{i}-{}", "x".repeat(random.below(60) as usize)),
        };
        let name = path.join(name);
        // A new file every thousand names: links are made faster.
        if i % 1000 == 0 {
            fs::write(&name, format!("{i}")).unwrap();
        } else {
            fs::hard_link(&names[i - i % 1000], &name).unwrap();
        }
        names.push(name);
    }
    names
}

/// Puts files of every kind into `root`, whose blocks have `block` bytes.
fn fill(root: &Path, seed: u64, block: u64, reflink: bool) {
    let mut random = Random::new(seed);
    age(root, seed, 200, 80_000);
    for count in [0, 3, 60, 3000, 40_000] {
        let names = folder(&root.join(format!("names-{count}")), count, &mut random);
        // Freed entries, and blocks of a folder that are no more.
        let again = folder(&root.join(format!("fewer-{count}")), count, &mut random);
        for (i, name) in again.iter().enumerate() {
            if i % 3 == 1 || (count / 4..count / 2).contains(&i) {
                fs::remove_file(name).unwrap();
            }
        }
        drop(names);
    }
    let odd = root.join("odd");
    fs::create_dir(&odd).unwrap();
    for byte in (1..=255).filter(|byte| *byte != b'/' && *byte != b'.') {
        File::create(odd.join(OsStr::from_bytes(&[byte]))).unwrap();
    }
    for i in 0..300 {
        let name = any_name(&mut random, 8 + i % 248);
        fs::write(odd.join(OsStr::from_bytes(&name)), &name).unwrap();
    }
    let deep = (0..100).fold(root.join("deep"), |path, i| path.join(format!("d{i}")));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("file"), "at the bottom").unwrap();
    let links = root.join("links");
    fs::create_dir(&links).unwrap();
    for len in [1, 10, 100, 300, 335, 336, 337, 400, 500, 900, 967, 968, 969, 1000, 1023] {
        let target = any_name(&mut random, len);
        symlink(OsStr::from_bytes(&target), links.join(format!("l{len}"))).unwrap();
    }

    let content = root.join("content");
    fs::create_dir(&content).unwrap();
    let sparse = File::create(content.join("sparse")).unwrap();
    for at in [0, 70_000, 5 * MIB, 200 * MIB - 10] {
        sparse.write_all_at(&random.bytes(9000), at).unwrap();
    }
    let huge = File::create(content.join("huge")).unwrap();
    huge.set_len(1 << 42).unwrap();
    huge.write_all_at(&random.bytes(100_000), (1 << 42) - 60_000).unwrap();
    huge.write_all_at(&random.bytes(100_000), 1 << 41).unwrap();
    let pieces = File::create(content.join("pieces")).unwrap();
    for i in 0..(100 * MIB / block).min(4000) {
        let len = 1 + random.below(block) as usize;
        pieces.write_all_at(&random.bytes(len), i * 2 * block).unwrap();
    }
    fs::write(content.join("large"), random.bytes(30 << 20)).unwrap();
    fs::write(content.join("empty"), "").unwrap();
    let falloc = content.join("falloc");
    let commands =
        ["falloc 0 3m", "pwrite -q 300k 10k", "falloc -k 5m 1m", "pwrite -q 2m 70001", "fpunch 1m 100k"];
    let args = commands.iter().flat_map(|command| ["-c", command]);
    run("xfs_io", &["-f"].into_iter().chain(args).chain([text(&falloc)]).collect::<Vec<_>>());
    if reflink {
        let clone = content.join("clone");
        run("cp", &["--reflink=always", text(&content.join("large")), text(&clone)]);
        let clone = File::options().write(true).open(&clone).unwrap();
        for _ in 0..20 {
            clone.write_all_at(&random.bytes(3000), random.below(29 << 20)).unwrap();
        }
    }
    run("mkfifo", &[text(&root.join("pipe"))]);
    run("mknod", &[text(&root.join("device")), "b", "7", "200"]);
    UnixListener::bind(root.join("socket")).unwrap();
}

/// Name, size in MiB, arguments of mkfs.xfs, block size and whether files may share blocks.
const MOUNTABLE: &[(&str, u64, &str, u64, bool)] = &[
    ("default", 420, "", 4096, true),
    ("few features", 420, "-m finobt=0,reflink=0,bigtime=0,inobtcount=0 -i sparse=0", 4096, false),
    ("1k", 420, "-b size=1024", 1024, true),
    ("1k, folders 64k", 420, "-b size=1024 -n size=65536 -d agcount=3", 1024, true),
    ("folders 16k, large inodes", 420, "-n size=16384 -i size=2048", 4096, true),
    ("nrext64", 420, "-i nrext64=1 -m rmapbt=1", 4096, true),
    ("64k", 1500, "-b size=65536 -i size=1024", 65_536, true),
];

#[test]
fn files_are_read_as_the_kernel_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    for (seed, (name, mib, args, block, reflink)) in (1..).zip(MOUNTABLE) {
        mkfs(&image, *mib, args);
        fill(LoopMount::new(&image, "").path(), seed, *block, *reflink);
        let expected = by_kernel(LoopMount::new(&image, "ro").path());
        assert!(expected.len() > 60_000, "{name}: {} files", expected.len());
        let files = open(&image);
        assert_eq!(files.stale(), None, "{name}");
        let start = bounds::processor_time();
        let (read, held) = allocations::watched(|| by_reader(&*files));
        println!(
            "figure: {name}: {} files as the kernel reads them, in {} ms of the processor, {} KiB held with the list",
            read.len(),
            (bounds::processor_time() - start) / 1_000_000,
            held >> 10
        );
        assert_same(name, &expected, &read);
        fs::remove_file(&image).unwrap();
    }
}

/// A prototype for mkfs.xfs of a folder: its names, and the files in `from` with their content.
struct Prototype {
    text: String,
    tree: Tree,
    from: PathBuf,
}

impl Prototype {
    fn new(from: &Path) -> Self {
        fs::create_dir(from).unwrap();
        Prototype { text: "/stand/diag\n0 0\nd--755 0 0\n".into(), tree: Tree::new(), from: from.to_owned() }
    }

    fn folder(&mut self, name: &str, count: usize, random: &mut Random) {
        writeln!(self.text, "{name} d--755 0 0").unwrap();
        self.tree.insert(name.into(), Seen::Folder);
        for i in 0..count {
            let (file, seen) = match i % 50 {
                1 => {
                    let target = "t".repeat(1 + random.below(1023) as usize);
                    (format!("l{i} l--777 0 0 {target}"), Seen::Link(target.into()))
                }
                2 => (format!("p{i} p--644 0 0"), Seen::Other),
                _ => {
                    let len = if i % 50 == 3 { random.below(30_000) } else { 3 };
                    let content = random.bytes(len as usize);
                    let path = self.from.join(format!("{len}"));
                    fs::write(&path, &content).unwrap();
                    let digest = digest(len, |at, buf| buf.copy_from_slice(&content[at as usize..][..buf.len()]));
                    (format!("f{i}-{} ---644 0 0 {}", "n".repeat(i % 40), text(&path)), Seen::File(len, digest))
                }
            };
            let path = format!("{name}/{}", file.split(' ').next().unwrap());
            self.tree.insert(path.into(), seen);
            writeln!(self.text, "{file}").unwrap();
        }
        self.text += "$\n";
    }
}
