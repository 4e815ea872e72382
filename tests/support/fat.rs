//! What the tests of FAT and exFAT share: judges, comparisons of files, and damage where it matters.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use haul::layout::Usage;
use haul::unit::{Extent, ExtentMap};

use crate::damaged_map::Damaged;
use crate::maps::{masked_copy, open, used};
use crate::support::{Random, run, text, try_run};

/// What partclone would copy of an image.
pub fn partclone_judge(program: &str, image: &Path) -> ExtentMap {
    let (list, log) = (image.with_extension("domain"), image.with_extension("log"));
    run(program, &["-q", "-D", "-s", text(image), "-o", text(&list), "-L", text(&log)]);
    let lines = fs::read_to_string(&list).unwrap();
    fs::remove_file(&list).unwrap();
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
    let used = lines.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words[..], [_, _, "+"]).then(|| Extent::at(hex(words[0]), hex(words[1])))
    });
    used.collect()
}

/// A mapped image without findings, whose summary is what its map calls used.
pub fn assert_mapped(name: &str, image: &Path) -> ExtentMap {
    let size = fs::metadata(image).unwrap().len();
    let map = open(image);
    let usage = &map.volumes()[0].usage;
    assert!(matches!(usage, Usage::Mapped { .. }), "{name}: {usage:?}");
    let used = used(&map, size);
    assert_eq!(map.findings(), [], "{name}");
    assert_eq!(map.used_bytes(), used.bytes(), "{name}");
    used
}

/// Every file below a folder, by its path in it.
pub fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(dir).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Runs `each` for every case, a few at a time: the judges mostly wait.
pub fn in_parallel<T: Sync>(cases: &[T], each: impl Fn(usize, &T) + Sync) {
    for (at, some) in cases.chunks(4).enumerate() {
        std::thread::scope(|scope| {
            for (i, case) in some.iter().enumerate() {
                let each = &each;
                scope.spawn(move || each(at * 4 + i, case));
            }
        });
    }
}

/// The first sector of an image.
pub fn boot_sector(image: &Path) -> [u8; 512] {
    let mut raw = [0; 512];
    File::open(image).unwrap().read_exact_at(&mut raw, 0).unwrap();
    raw
}

/// Writes bytes into an image.
pub fn put(image: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(image).unwrap().write_all_at(bytes, at).unwrap();
}

/// Where the parts of a volume are.
pub struct Sites {
    pub heap: Extent,
    /// Where the first allocation table begins, and its length.
    pub table: u64,
    pub table_len: u64,
    /// Everything that says where something is.
    pub metadata: Vec<Range<u64>>,
    /// The allocation bitmap of an exFAT.
    pub bitmap: Range<u64>,
}

/// Up to six bytes of `disk` at some of `sites`, and what becomes of them.
pub fn changes(disk: &[u8], sites: &[Range<u64>], random: &mut Random) -> BTreeMap<u64, u8> {
    let count = [1, 1, 2, 6][random.below(4) as usize];
    let change = |_| {
        let site = &sites[random.below(sites.len() as u64) as usize];
        let at = site.start + random.below(site.end - site.start);
        let byte = match random.below(4) {
            0 => 0,
            1 => 0xff,
            2 => disk[at as usize] ^ (1 << random.below(8)),
            _ => random.next() as u8,
        };
        (at, byte)
    };
    (0..count).map(change).collect()
}

/// A damaged volume, and the copy of what the map calls used of it.
pub struct Pair {
    pub damaged: PathBuf,
    pub copy: PathBuf,
}

impl Pair {
    pub fn new(dir: &Path, damaged: &Damaged) -> Pair {
        let pair = Pair { damaged: dir.join("damaged"), copy: dir.join("copy") };
        let mut bytes = damaged.disk.to_vec();
        damaged.changes.iter().for_each(|(at, byte)| bytes[*at as usize] = *byte);
        fs::write(&pair.damaged, bytes).unwrap();
        masked_copy(&pair.damaged, &pair.copy);
        pair
    }

    /// What a program says of both, which may be that they are broken.
    pub fn ask(&self, words: &[&str]) -> [(i32, String, String); 2] {
        [&self.damaged, &self.copy].map(|image| {
            let args: Vec<&str> = ["20"].iter().chain(words).copied().chain([text(image)]).collect();
            let (code, out, err) = try_run("timeout", &args);
            (code, out.replace(text(image), "image"), err.replace(text(image), "image"))
        })
    }
}
