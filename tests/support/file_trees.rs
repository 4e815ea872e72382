//! Files as a reader finds them, held against the same tree as the kernel shows it.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use haul::error::Result;
use haul::layout::{FileId, FileKind, Files};

use crate::support::Random;

/// Files that are read whole have at most so many bytes.
const WHOLE: u64 = 32 << 20;

/// Makes a folder of `count` names of all lengths and bytes, among them some whose CRC-32C is the same.
pub fn crowd(dir: &Path, count: usize, seed: u64) {
    let mut random = Random::new(seed ^ count as u64);
    fs::create_dir_all(dir).unwrap();
    let mut names = BTreeSet::new();
    if count > 1000 {
        names.extend(collisions(&mut random));
    }
    while names.len() < count {
        let len = match names.len() % 20 {
            0 => 255,
            1 => 1 + random.below(200) as usize,
            _ => 4 + random.below(20) as usize,
        };
        let name: Vec<u8> =
            random.bytes(len).into_iter().map(|byte| if byte == b'/' { b'_' } else { byte.max(1) }).collect();
        if name != b"." && name != b".." {
            names.insert(name);
        }
    }
    for (i, name) in names.iter().enumerate() {
        let path = dir.join(OsStr::from_bytes(name));
        match i % 50 {
            0 => fs::create_dir(path).unwrap(),
            _ => fs::write(path, &name[..i % 7 % name.len()]).unwrap(),
        }
    }
}

/// Pairs of names of the same CRC-32C.
pub fn collisions(random: &mut Random) -> Vec<Vec<u8>> {
    let mut seen: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut found = Vec::new();
    while found.len() < 6 {
        let name: Vec<u8> = random.bytes(10).into_iter().map(|byte| b'a' + byte % 26).collect();
        match seen.get(&crc32c::crc32c(&name)) {
            Some(other) if *other != name => found.extend([other.clone(), name]),
            _ => {
                seen.insert(crc32c::crc32c(&name), name);
            }
        }
    }
    found
}

/// Which parts of a file of `size` bytes are compared: all of it, or some if it is long.
fn parts(size: u64) -> Vec<(u64, usize)> {
    let mut random = Random::new(size);
    if size <= WHOLE {
        let mut parts = vec![(0, size as usize)];
        // Out of order, and across borders of all kinds.
        parts.extend((0..3).map(|_| (random.below(size.max(1)), 1 + random.below(200_000) as usize)));
        return parts;
    }
    let places = [0, 1 << 20, 1 << 30, (1 << 50) - 1000, size / 2, size - 5000, size - 1, size];
    places.iter().filter(|at| **at <= size).map(|at| (*at, 300_000)).collect()
}

fn read_full(mut read: impl FnMut(&mut [u8], u64) -> usize, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    let mut done = 0;
    while done < len {
        let step = (len - done).min(if at.is_multiple_of(2) { 65_536 } else { 50_001 });
        match read(&mut bytes[done..done + step], at + done as u64) {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    bytes
}

/// Fails unless the tree below `dir` is the one below the root of `files`: names, kinds, lengths, contents, targets, and
/// which names are not there. How many files there are.
pub fn assert_same(about: &str, files: &dyn Files, dir: &Path) -> usize {
    let mut count = 0;
    let mut todo = vec![(dir.to_owned(), files.root())];
    while let Some((path, file)) = todo.pop() {
        count += 1;
        let what = format!("{about}: {}", path.display());
        let theirs = fs::symlink_metadata(&path).unwrap();
        let ours = files.info(file).unwrap_or_else(|error| panic!("{what}: {error}: {}", error.why()));
        let kind = theirs.file_type();
        let expected = match () {
            () if kind.is_file() => FileKind::Regular,
            () if kind.is_dir() => FileKind::Folder,
            () if kind.is_symlink() => FileKind::Link,
            () => {
                assert!(
                    kind.is_fifo() || kind.is_char_device() || kind.is_block_device() || kind.is_socket()
                );
                FileKind::Other
            }
        };
        assert_eq!(ours.kind, expected, "{what}");
        match ours.kind {
            FileKind::Regular => {
                assert_eq!(ours.size, theirs.len(), "{what}");
                let other = File::open(&path).unwrap();
                for (at, len) in parts(ours.size) {
                    let a = read_full(
                        |buf, at| {
                            files
                                .read(file, at, buf)
                                .unwrap_or_else(|error| panic!("{what}: {error}: {}", error.why()))
                        },
                        at,
                        len,
                    );
                    let b = read_full(|buf, at| other.read_at(buf, at).unwrap(), at, len);
                    let differs = a.iter().zip(&b).position(|(a, b)| a != b);
                    assert!(
                        a == b,
                        "{what}: {len} bytes at {at} differ from {differs:?} on, {} {}",
                        a.len(),
                        b.len()
                    );
                }
            }
            FileKind::Link => {
                let target = fs::read_link(&path).unwrap();
                assert_eq!(files.target(file).unwrap(), target.as_os_str().as_bytes(), "{what}");
                assert_eq!(ours.size, theirs.len(), "{what}");
            }
            FileKind::Folder => {
                let names = files
                    .names(file, usize::MAX)
                    .unwrap_or_else(|error| panic!("{what}: {error}: {}", error.why()));
                let all: BTreeSet<Vec<u8>> = names.iter().cloned().collect();
                assert_eq!(all.len(), names.len(), "{what}: a name is there twice");
                let there =
                    fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name().as_bytes().to_vec());
                assert!(all == there.collect(), "{what}: other names");
                assert!(files.names(file, 2).unwrap() == names[..names.len().min(2)], "{what}");
                assert!(files.names(file, 0).unwrap().is_empty(), "{what}");
                for name in absent(&all) {
                    assert_eq!(files.lookup(file, &name).unwrap(), None, "{what}: {name:?}");
                }
                for name in all {
                    let found =
                        files.lookup(file, &name).unwrap().unwrap_or_else(|| panic!("{what}: no {name:?}"));
                    todo.push((path.join(OsStr::from_bytes(&name)), found));
                }
            }
            FileKind::Other => {}
        }
    }
    count
}

/// Names that are like those in `names` but not among them.
fn absent(names: &BTreeSet<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut others =
        vec![b"not there".to_vec(), vec![b'n'; 255], b"a".to_vec(), vec![0xff], vec![b'n'; 4000]];
    for name in names.iter().step_by(names.len() / 100 + 1) {
        others.push([name, &b"x"[..]].concat());
        others.push(name[1..].to_vec());
        others.push(name.iter().rev().copied().collect());
    }
    others.retain(|name| !names.contains(name));
    others
}

/// What a walk saw of files that may be damaged.
#[derive(Default, Debug)]
pub struct Walked {
    pub files: usize,
    pub bytes: u64,
    pub errors: Vec<haul::error::Error>,
}

impl Walked {
    fn ok<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.errors.push(error)).ok()
    }
}

/// Looks at all files, some hundreds if there are more, and reads from each; errors are kept.
pub fn walk(files: &dyn Files) -> Walked {
    let mut walked = Walked::default();
    let mut buf = vec![0; 64 << 10];
    let mut todo: Vec<FileId> = vec![files.root()];
    while let Some(file) = todo.pop() {
        walked.files += 1;
        if walked.files > 1500 || walked.errors.len() > 400 {
            break;
        }
        let Some(info) = walked.ok(files.info(file)) else { continue };
        match info.kind {
            FileKind::Regular => {
                for at in [0, 60_000, info.size / 2, info.size.saturating_sub(1000)] {
                    if let Some(n) = walked.ok(files.read(file, at, &mut buf)) {
                        assert!(
                            n as u64 == info.size.saturating_sub(at).min(buf.len() as u64),
                            "{file:?} {at} {n}"
                        );
                        walked.bytes += n as u64;
                    }
                }
            }
            FileKind::Link => {
                let target = walked.ok(files.target(file));
                assert!(target.is_none_or(|target| target.len() <= 4096));
            }
            FileKind::Folder => {
                for name in walked.ok(files.names(file, 300)).unwrap_or_default() {
                    todo.extend(walked.ok(files.lookup(file, &name)).flatten());
                }
                walked.ok(files.lookup(file, b"not there"));
            }
            FileKind::Other => {}
        }
    }
    walked
}
