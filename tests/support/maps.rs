//! What the tests of used maps share: maps of image files and the copies they lead to.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use haul::io::{DiskFile, ReadAt, is_zero};
use haul::layout::{self, Usage, UsedMap};
use haul::unit::{Extent, ExtentMap, MIB, extents};

use crate::support::{empty_image, run, text};

/// The used map of an image file.
pub fn open(image: &Path) -> UsedMap {
    layout::used_map(Arc::new(DiskFile::open(image).unwrap())).unwrap()
}

/// What is used of the first `size` bytes.
pub fn used(map: &UsedMap, size: u64) -> ExtentMap {
    extents::collect(map, Extent::new(0, size)).unwrap()
}

/// What is in `size` bytes but not in `set`.
pub fn rest(set: &ExtentMap, size: u64) -> ExtentMap {
    let mut rest: ExtentMap = [Extent::new(0, size)].into_iter().collect();
    set.iter().for_each(|run| rest.remove(run));
    rest
}

/// Why the image, a single volume, is copied whole; fails the test when it is not.
pub fn whole_because(name: &str, image: &Path) -> String {
    let map = open(image);
    let Usage::Whole { reason } = &map.volumes()[0].usage else { panic!("{name} is mapped") };
    let size = fs::metadata(image).unwrap().len();
    assert_eq!(layout::count_used(&map, Extent::new(0, size)).unwrap(), size, "{name}");
    assert_eq!(map.used_bytes(), size, "{name}");
    reason.clone()
}

/// The copy haul would make: used bytes, the rest zero.
pub fn masked_copy(image: &Path, copy: &Path) {
    let disk = DiskFile::open(image).unwrap();
    empty_image(copy, disk.size());
    let out = File::options().write(true).open(copy).unwrap();
    for run in used(&open(image), disk.size()).iter() {
        let mut at = run.start;
        while at < run.end {
            let mut bytes = vec![0; (run.end - at).min(MIB) as usize];
            disk.read_at(&mut bytes, at).unwrap();
            if !is_zero(&bytes) {
                out.write_all_at(&bytes, at).unwrap();
            }
            at += bytes.len() as u64;
        }
    }
}

/// Every name below `dir` with its mode, owner and length, and the SHA-256 of every file.
pub fn tree(dir: &Path) -> String {
    let list =
        "find . -printf '%p %M %U %s %l\\n' | sort; find . -type f -print0 | sort -z | xargs -0 -r sha256sum";
    run("sh", &["-c", &format!("cd {} && {{ {list}; }}", text(dir))])
}
