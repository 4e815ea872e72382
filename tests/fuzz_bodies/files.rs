//! Bytes as a file system whose files are read without mounting it.

use std::collections::BTreeSet;
use std::sync::Arc;

use haul::error::Result;
use haul::layout::{BtrfsFiles, FileId, FileKind, Files};

use super::watched::{Watched, judge, refused};
use super::{Outcome, input, signature};

/// Longest disk, in bytes.
const LONGEST: u64 = 1 << 30;
/// Files that are looked at, and names in a folder.
const FILES: usize = 200;
const NAMES: usize = 100;

/// Takes `bytes` as a btrfs: some of its files are found and read within bounds, or that fails with an error.
pub fn fuzz_btrfs(bytes: &[u8]) -> Outcome {
    let disk = Watched::within(input::disk(bytes, LONGEST), 400_000, 1 << 30);
    let files = match BtrfsFiles::open(Arc::new(disk)) {
        Ok(files) => files,
        Err(error) => return refused(&error),
    };
    let default = files.default_subvolume().and_then(|id| files.subvolume(id));
    look(&files, default)
}

/// Looks at the files of `files`, and at the folder `other`.
fn look(files: &dyn Files, other: Result<Option<FileId>>) -> Outcome {
    let mut seen = Seen::default();
    let mut todo = vec![files.root()];
    todo.extend(seen.of(other).flatten());
    let mut buf = vec![0; 64 << 10];
    for _ in 0..FILES {
        let Some(file) = todo.pop() else { break };
        let Some(info) = seen.of(files.info(file)) else { continue };
        match info.kind {
            FileKind::Regular => {
                for at in [0, 3000, info.size / 2, info.size.saturating_sub(100), info.size] {
                    let len = info.size.saturating_sub(at).min(buf.len() as u64);
                    let read = seen.of(files.read(file, at, &mut buf));
                    assert!(read.is_none_or(|n| n as u64 == len), "{read:?} of {len} bytes");
                    // The same by itself as among others.
                    if read.is_some_and(|n| n > 700) {
                        let mut again = [0; 200];
                        let n = seen.of(files.read(file, at + 500, &mut again));
                        assert!(n.is_none_or(|n| again[..n] == buf[500..500 + n]), "read differently");
                    }
                }
            }
            FileKind::Link => {
                let target = seen.of(files.target(file));
                assert!(target.is_none_or(|target| target.len() <= 4096));
            }
            FileKind::Folder => {
                let names = seen.of(files.names(file, NAMES)).unwrap_or_default();
                assert!(names.len() <= NAMES);
                for name in names {
                    todo.extend(seen.of(files.lookup(file, &name)).flatten());
                }
                seen.of(files.lookup(file, b"default"));
            }
            FileKind::Other => {}
        }
        seen.kinds.insert(format!("{:?}", info.kind));
    }
    let kinds: Vec<String> = seen.kinds.into_iter().chain(files.stale().map(str::to_owned)).collect();
    match seen.errors.into_iter().next() {
        Some(error) => Outcome::Broken(error),
        None => Outcome::Fine(kinds.join(" ")),
    }
}

/// What came of the questions so far.
#[derive(Default)]
struct Seen {
    kinds: BTreeSet<String>,
    errors: BTreeSet<String>,
}

impl Seen {
    fn of<T>(&mut self, result: Result<T>) -> Option<T> {
        let keep = |error| {
            judge(&error);
            self.errors.insert(signature(&error));
        };
        result.map_err(keep).ok()
    }
}
