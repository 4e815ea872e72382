//! The files of FAT read without mounting it, judged by mtools, and written, judged by fsck.fat.

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
#[path = "support/damaged_map.rs"]
mod damaged_map;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use bodies::Outcome;
use bodies::xfs_files::walk;
use bounds::Bounds;
use damaged_map::Damaged;
use haul::error::Kind;
use haul::guest::fat;
use haul::guest::plan::{Fix, PlannedMount};
use haul::host::export::Disk;
use haul::io::fake::MemoryDisk;
use haul::io::{DiskFile, ReadAt, WriteAt};
use haul::layout::{FileKind, Files, fat_files};
use haul::unit::{KIB, MIB};
use support::{Random, empty_image, run, text};

/// Bits of a table's entry, length of the disk, and arguments of mkfs.fat.
const SHAPES: [(&str, u64, &str); 5] = [
    ("12", 3 * MIB, "-s 2"),
    ("16", 24 * MIB, "-s 1 -r 512"),
    ("16", 100 * MIB, "-s 8 -f 1"),
    ("32", 40 * MIB, "-s 1"),
    ("32", 300 * MIB, "-s 8 -S 512"),
];

/// Paths with what is there: the content of a file, or a folder.
type Tree = BTreeMap<String, Option<Vec<u8>>>;

fn mtools(program: &str, image: &Path, args: &[&str]) -> String {
    run("env", &[&["LC_ALL=C.UTF-8", "MTOOLS_SKIP_CHECK=1", program, "-i", text(image)], args].concat())
}

/// A tree of files whose names are of every kind.
fn tree(random: &mut Random, files: usize) -> Tree {
    let mut tree = Tree::new();
    for folder in ["EFI", "EFI/BOOT", "EFI/debian", "a folder with a long name", "lower", "many", "empty"] {
        tree.insert(folder.into(), None);
    }
    for (i, name) in [
        "EFI/debian/shimx64.efi",
        "EFI/debian/GRUBX64.EFI",
        "lower/case.txt",
        "UPPER.TXT",
        "Mixed.Txt",
        "a folder with a long name/two.dots.and more",
        "a folder with a long name/ÄÖÜ – ünïcode 漢字.conf",
        "no-extension",
        "exactly13char",
        "exactly26characters-long.x",
    ]
    .iter()
    .enumerate()
    {
        let len = [0, 1, 511, 512, 513, 4096, 5000, 70_000][i % 8];
        tree.insert((*name).into(), Some(random.bytes(len)));
    }
    for i in 0..files {
        let name = format!("many/{}-{i}", "n".repeat(random.below(200) as usize));
        let len = random.below(3000) as usize;
        tree.insert(name, Some(random.bytes(len)));
    }
    tree
}

/// A FAT with this tree, of which some files were deleted and others put in their place.
fn filled(folder: &Path, shape: (&str, u64, &str), tree: &mut Tree) -> std::path::PathBuf {
    let (bits, size, args) = shape;
    let (image, from) = (folder.join("fat"), folder.join("from"));
    empty_image(&image, size);
    let words: Vec<&str> = args.split(' ').collect();
    run("mkfs.fat", &[&["-F", bits, "--invariant"], &words[..], &[text(&image)]].concat());
    let _ = fs::remove_dir_all(&from);
    fs::create_dir(&from).unwrap();
    for (path, content) in tree.iter() {
        match content {
            None => fs::create_dir_all(from.join(path)).unwrap(),
            Some(bytes) => {
                fs::create_dir_all(from.join(path).parent().unwrap()).unwrap();
                fs::write(from.join(path), bytes).unwrap();
            }
        }
    }
    let mut tops: Vec<String> = Vec::new();
    for entry in fs::read_dir(&from).unwrap() {
        tops.push(text(&entry.unwrap().path()).to_owned());
    }
    tops.sort();
    let tops: Vec<&str> = tops.iter().map(String::as_str).collect();
    mtools("mcopy", &image, &[&["-s", "-m"], &tops[..], &["::/"]].concat());
    let gone: Vec<String> =
        tree.keys().filter(|path| path.starts_with("many/")).step_by(3).cloned().collect();
    for path in &gone {
        tree.remove(path);
        mtools("mdel", &image, &[&format!("::/{path}")]);
    }
    // In the holes that are left: a file in pieces.
    let pieces = vec![0xc5; 60_000];
    fs::write(from.join("pieces"), &pieces).unwrap();
    mtools("mcopy", &image, &[text(&from.join("pieces")), "::/EFI/BOOT/in pieces"]);
    tree.insert("EFI/BOOT/in pieces".into(), Some(pieces));
    run("fsck.fat", &["-n", text(&image)]);
    image
}

/// All that `files` has.
fn by_reader(files: &dyn Files) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![(String::new(), files.root())];
    while let Some((path, folder)) = todo.pop() {
        for name in files.names(folder, usize::MAX).unwrap() {
            let shown = String::from_utf8(name.clone()).unwrap();
            let file = files.lookup(folder, &name).unwrap().unwrap();
            for other in [shown.to_uppercase(), shown.to_lowercase()] {
                assert_eq!(files.lookup(folder, other.as_bytes()).unwrap(), Some(file), "{other}");
            }
            assert_eq!(files.lookup(folder, format!("{shown}x").as_bytes()).unwrap(), None);
            let path = if path.is_empty() { shown } else { format!("{path}/{shown}") };
            let info = files.info(file).unwrap();
            let content = (info.kind == FileKind::Regular).then(|| {
                let mut bytes = vec![0xa5; info.size as usize];
                // In pieces that no cluster has.
                for (i, piece) in bytes.chunks_mut(777).enumerate() {
                    assert_eq!(files.read(file, i as u64 * 777, piece).unwrap(), piece.len());
                }
                assert_eq!(files.read(file, info.size, &mut [0; 9]).unwrap(), 0);
                bytes
            });
            if content.is_none() {
                todo.push((path.clone(), file));
            }
            assert!(tree.insert(path, content).is_none(), "two files of one name");
        }
    }
    tree
}

fn assert_same(what: &str, expected: &Tree, read: &Tree) {
    for (path, content) in expected {
        assert!(read.get(path) == Some(content), "{what}: {path} is not what was put there");
    }
    let more: Vec<&String> = read.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(more.is_empty(), "{what}: {more:?}");
}

#[test]
fn files_are_read_as_mtools_put_them_there() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, shape) in (1..).zip(SHAPES) {
        let mut tree = tree(&mut Random::new(seed), 120);
        let image = filled(dir.path(), shape, &mut tree);
        let files = fat_files(Arc::new(DiskFile::open(&image).unwrap())).unwrap();
        assert_same(&format!("{shape:?}"), &tree, &by_reader(&*files));
    }
}

/// The image in memory, where steps are carried out as in an overlay.
fn in_memory(image: &Path) -> (Arc<MemoryDisk>, PlannedMount) {
    let bytes = fs::read(image).unwrap();
    let disk = MemoryDisk::sparse(bytes.len() as u64);
    disk.write_at(&bytes, 0).unwrap();
    let mount = PlannedMount {
        start: 0,
        end: bytes.len() as u64,
        kind: "fat32".into(),
        point: "/boot/efi".into(),
        options: String::new(),
    };
    (Arc::new(disk), mount)
}

fn write_back(disk: &MemoryDisk, image: &Path) {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    fs::write(image, bytes).unwrap();
}

/// What a boot entry's menu says before the steps.
const OLD: &str = "set root=/dev/sda1\n";

/// The steps of a plan on the EFI system partition with `tree`, and what they make of it.
fn steps(tree: &Tree) -> (Vec<Fix>, Tree) {
    let reason = String::new();
    let path = |name: &str| format!("/boot/efi/{name}");
    let long: String = ('a'..='z').cycle().take(9000).collect();
    let mut after = tree.clone();
    after.insert("EFI/BOOT/BOOTX64.EFI".into(), tree["EFI/debian/shimx64.efi"].clone());
    after.insert("EFI/new/folder/loader.efi".into(), tree["EFI/debian/loader.efi"].clone());
    for folder in ["EFI/new", "EFI/new/folder"] {
        after.insert(folder.into(), None);
    }
    after.insert("EFI/debian/grub.cfg".into(), Some(long.clone().into_bytes()));
    after.insert("EFI/debian/made anew.cfg".into(), Some(b"new\n".to_vec()));
    after.remove("unwanted.cfg");
    let old = OLD.to_owned();
    let fixes = vec![
        Fix::Copy {
            from: path("EFI/debian/shimx64.efi"),
            path: path("EFI/BOOT/BOOTX64.EFI"),
            reason: reason.clone(),
        },
        Fix::Copy {
            from: path("efi/Debian/LOADER.EFI"),
            path: path("EFI/new/folder/loader.efi"),
            reason: reason.clone(),
        },
        Fix::Edit { path: path("EFI/debian/grub.cfg"), old, new: long, reason: reason.clone() },
        Fix::Create {
            path: path("EFI/debian/made anew.cfg"),
            text: "new\n".into(),
            mode: 0o644,
            reason: reason.clone(),
        },
        Fix::Remove { path: path("unwanted.cfg"), old: "x\n".into(), reason },
    ];
    (fixes, after)
}

#[test]
fn steps_leave_a_sound_file_system_and_all_other_files_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, shape) in (1..).zip(SHAPES) {
        let mut random = Random::new(seed);
        let mut tree = tree(&mut random, 40);
        tree.insert("EFI/debian/loader.efi".into(), Some(random.bytes(200_000)));
        tree.insert("EFI/debian/grub.cfg".into(), Some(OLD.into()));
        tree.insert("unwanted.cfg".into(), Some(b"x\n".to_vec()));
        let image = filled(dir.path(), shape, &mut tree);
        let (fixes, after) = steps(&tree);
        let (disk, mount) = in_memory(&image);
        let shared: Arc<dyn Disk> = disk.clone();
        for fix in &fixes {
            fat::step(&shared, &mount, fix).unwrap();
        }
        let files = fat_files(disk.clone()).unwrap();
        assert_same(&format!("{shape:?}"), &after, &by_reader(&*files));
        write_back(&disk, &image);
        let report = run("fsck.fat", &["-n", "-v", text(&image)]);
        assert!(!report.contains("Dirty bit") && !report.contains("differences"), "{shape:?}: {report}");
        let listed = mtools("mdir", &image, &["-/", "-b", "::/"]);
        assert_eq!(listed.lines().count(), after.len(), "{shape:?}: {listed}");
        let out = dir.path().join("out");
        mtools("mcopy", &image, &["-n", "::/EFI/new/folder/loader.efi", text(&out)]);
        assert!(Some(fs::read(&out).unwrap()) == after["EFI/new/folder/loader.efi"], "{shape:?}");
        fs::remove_file(out).unwrap();
    }
}

#[test]
fn a_step_that_does_not_fit_its_plan_or_the_disk_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = tree(&mut Random::new(1), 0);
    let image = filled(dir.path(), SHAPES[0], &mut tree);
    let (disk, mount) = in_memory(&image);
    let disk: Arc<dyn Disk> = disk;
    let reason = String::new();
    let path = |name: &str| format!("/boot/efi/{name}");
    let edit = Fix::Edit {
        path: path("UPPER.TXT"),
        old: "not this".into(),
        new: String::new(),
        reason: reason.clone(),
    };
    assert_eq!(fat::step(&disk, &mount, &edit).unwrap_err().id(), "guest.changed");
    let copy = Fix::Copy { from: path("UPPER.TXT"), path: path("lower/CASE.TXT"), reason: reason.clone() };
    assert_eq!(fat::step(&disk, &mount, &copy).unwrap_err().id(), "guest.changed");
    let text = "x".repeat(4 << 20);
    let full = Fix::Create { path: path("full"), text, mode: 0o644, reason };
    let error = fat::step(&disk, &mount, &full).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Image, "guest.step"));
    assert!(error.what_to_do().contains("EFI system partition"), "{error:?}");
}

/// Damages the tables and folders of small file systems, reads them, and carries out steps in them.
fn damage(rounds: usize) {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random::new(2026);
    let mut bounds = Bounds::default();
    let (mut seen, mut refused, mut failed, mut total) = (0, 0, 0, 0);
    for shape in [SHAPES[0], SHAPES[1], SHAPES[3]] {
        let mut tree = tree(&mut random, 30);
        let image = filled(dir.path(), shape, &mut tree);
        let disk = Arc::new(fs::read(&image).unwrap());
        // Where anything is but in files of random bytes: the start, and folders.
        let folders = (0..disk.len()).step_by(KIB as usize).filter(|at| {
            disk[*at..].starts_with(b".          ") || disk[*at..].starts_with(b"B") && disk[at + 11] == 0x0f
        });
        let places: Vec<usize> = [0, 0, 0, 512, 1024, 32 * KIB as usize].into_iter().chain(folders).collect();
        for round in 0..rounds / 3 {
            let damaged = Damaged::new(&disk, &places, &mut random);
            let name = format!("round {round} of {shape:?}: {} bytes, {:?}", damaged.size, damaged.changes);
            total += 1;
            let mut bytes = vec![0; damaged.size];
            damaged.read_at(&mut bytes, 0).unwrap();
            bounds.hold(&name, 0, 64 << 20, || match fat_files(Arc::new(damaged)) {
                Ok(files) => {
                    seen += u32::from(!matches!(walk(&*files, "damaged disk"), Outcome::Fine(_)));
                }
                Err(error) => {
                    assert_eq!(error.kind(), Kind::Image, "{name}: {error:?}");
                    refused += 1;
                }
            });
            fs::write(&image, &bytes).unwrap();
            let (disk, mount) = in_memory(&image);
            let shared: Arc<dyn Disk> = disk;
            let fix = Fix::Copy {
                from: "/boot/efi/EFI/debian/shimx64.efi".into(),
                path: "/boot/efi/EFI/BOOT/BOOTX64.EFI".into(),
                reason: String::new(),
            };
            bounds.hold(&name, bytes.len(), 64 << 20, || {
                if let Err(error) = fat::step(&shared, &mount, &fix) {
                    assert!(matches!(error.kind(), Kind::Image | Kind::Source), "{name}: {error:?}");
                    failed += 1;
                }
            });
        }
    }
    assert!(seen + refused > total / 10 && refused < total / 2, "{seen} seen, {refused} refused of {total}");
    bounds.print(&format!(
        "damaged FATs, of which {seen} were seen as such and {refused} refused; {failed} steps failed"
    ));
}

#[test]
fn damage_is_told_or_does_not_matter() {
    damage(100);
}

#[test]
#[ignore = "long: 1,000 damaged file systems; scripts/test.sh --long"]
fn a_thousand_damages_are_told_or_do_not_matter() {
    damage(1000);
}
