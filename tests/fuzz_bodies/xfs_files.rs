//! Bytes as an XFS file system whose files are read.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use haul::error::{Error, Kind};
use haul::layout::{FileKind, Files, xfs_files};

use super::watched::Watched;
use super::{Outcome, input, signature};

/// Longest file system, in bytes.
const LONGEST: u64 = 1 << 30;
/// Files that are looked at, names of one folder, and those of them that are looked up.
const FILES: usize = 400;
const NAMES: usize = 2000;
const LOOKED_UP: usize = 60;
/// Bytes read of a file from its start, in pieces of a length that no block has, and places all over it.
const READ: u64 = 64 << 10;
const PLACES: u64 = 32;
const PIECE: usize = 5000;

/// An error must blame the file system on `disk`.
fn judge(error: &Error, disk: &str) {
    assert_eq!(error.kind(), Kind::Image, "{error:?}");
    assert!(error.what().contains(disk), "the disk is not named: {error:?}");
}

/// Looks at the files of the file system on `disk`, within bounds. It is fine when all could be read, and some were
/// there.
pub fn walk(files: &dyn Files, disk: &str) -> Outcome {
    let mut seen = BTreeSet::new();
    let mut errors = BTreeSet::new();
    let mut todo = VecDeque::from([files.root()]);
    let mut known = BTreeSet::from([files.root()]);
    let mut left = FILES;
    let mut note = |error: Error| {
        judge(&error, disk);
        errors.insert(signature(&error));
    };
    while let Some(file) = todo.pop_front() {
        if left == 0 {
            break;
        }
        left -= 1;
        let info = match files.info(file) {
            Ok(info) => info,
            Err(error) => {
                note(error);
                continue;
            }
        };
        seen.insert(format!("{:?}", info.kind));
        match info.kind {
            FileKind::Folder => {
                let names = files.names(file, NAMES).unwrap_or_else(|error| {
                    note(error);
                    Vec::new()
                });
                assert!(names.len() <= NAMES);
                for (i, name) in names.iter().enumerate().take(LOOKED_UP) {
                    // FAT's have up to 255 characters, the others bytes.
                    assert!(!name.is_empty() && name.len() <= 765 && !name.contains(&b'/'), "{name:?}");
                    match files.lookup(file, name) {
                        Ok(Some(found)) if known.insert(found) => todo.push_back(found),
                        Ok(found) => drop(seen.insert(format!("found: {}", found.is_some()))),
                        Err(error) => note(error),
                    }
                    if i < 3 {
                        let absent = [name, &b"-"[..]].concat();
                        files.lookup(file, &absent).map(drop).unwrap_or_else(&mut note);
                    }
                }
            }
            FileKind::Link => match files.target(file) {
                Ok(target) => assert!(target.len() <= 4096, "{} bytes", target.len()),
                Err(error) => note(error),
            },
            FileKind::Regular => {
                let mut buf = [0; PIECE];
                let places = (0..PLACES).map(|i| info.size / PLACES * i);
                for at in (0..READ).step_by(PIECE).chain(places).chain([info.size.saturating_sub(10)]) {
                    match files.read(file, at, &mut buf) {
                        Ok(n) => assert_eq!(n as u64, info.size.saturating_sub(at).min(PIECE as u64)),
                        Err(error) => {
                            note(error);
                            break;
                        }
                    }
                }
            }
            FileKind::Other => {}
        }
    }
    let fine = errors.is_empty() && seen.len() > 1;
    let words = seen.into_iter().chain(errors).chain(files.stale().map(str::to_owned));
    let words = words.take(8).collect::<Vec<_>>().join("; ");
    if fine { Outcome::Fine(words) } else { Outcome::Broken(words) }
}

/// Takes `bytes` as an XFS file system: its files are read within bounds, or it cannot be opened.
pub fn fuzz_xfs_files(bytes: &[u8]) -> Outcome {
    let disk = Watched::within(input::disk(bytes, LONGEST), 400_000, 2 << 30);
    match xfs_files(Arc::new(disk)) {
        Ok(files) => walk(&*files, "fuzz"),
        Err(error) => {
            judge(&error, "fuzz");
            Outcome::Refused(signature(&error))
        }
    }
}
