//! `haul verify --sample`: which chunks are read, what is found in them, and what of an object is fetched.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test: a failure is the finding"
)]

#[path = "support/images.rs"]
mod images;
#[cfg(feature = "net")]
#[path = "support/lab.rs"]
mod lab;
mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::text;

const CHUNK: u64 = 64 << 10;

/// A raw copy of noise, every chunk of it listed but the zeroes in the middle, and its manifest.
fn copied(dir: &Path, chunks: u64) -> (PathBuf, PathBuf) {
    let (disk, copy) = (dir.join("disk.raw"), dir.join("copy.raw"));
    let mut bytes = vec![0; usize::try_from((chunks + 8) * CHUNK).unwrap()];
    let middle = usize::try_from(chunks / 2 * CHUNK).unwrap();
    let mut random = images::Random(images::seed());
    random.fill(&mut bytes[..middle]);
    random.fill(&mut bytes[middle + 8 * usize::try_from(CHUNK).unwrap()..]);
    fs::write(&disk, &bytes).unwrap();
    support::run(env!("CARGO_BIN_EXE_haul"), &["-q", "convert", "--all-blocks", text(&disk), text(&copy)]);
    (copy, dir.join("copy.raw.manifest"))
}

/// The exit code and last event of `haul verify`.
fn verify(manifest: &Path, copy: &Path, more: &[&str]) -> (i32, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
    let out = command.args(["verify", "--json", text(manifest), text(copy)]).args(more).output().unwrap();
    let stdout = String::from_utf8(out.stdout).unwrap();
    let last = stdout.lines().last().map_or(Value::Null, |line| serde_json::from_str(line).unwrap());
    (out.status.code().unwrap(), last)
}

/// The chunks that a failed verification names.
fn named(event: &Value) -> BTreeSet<u64> {
    let facts = event["facts"].as_array().unwrap().iter().filter(|fact| fact["name"] == "extent");
    facts
        .flat_map(|fact| {
            let (start, end) = fact["value"].as_str().unwrap().split_once("..").unwrap();
            let (start, end): (u64, u64) = (start.parse().unwrap(), end.parse().unwrap());
            start / CHUNK..end.div_ceil(CHUNK)
        })
        .collect()
}

fn flip(copy: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(copy).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_seed_draws_the_same_chunks_and_all_of_them_are_all() {
    let dir = tempfile::tempdir().unwrap();
    let (copy, manifest) = copied(dir.path(), 400);
    let (code, event) = verify(&manifest, &copy, &["--sample", "1%", "--seed", "7"]);
    assert_eq!(code, 0, "{event}");
    let result = &event["result"];
    let expected = serde_json::json!({
        "millionths": 10_000, "seed": 7, "chunks_read": 4, "chunks_listed": 400, "chunks_unread": 396,
        "bytes_read": 4 * CHUNK, "bytes_listed": 400 * CHUNK, "zeroes_read": false,
        "found_with_99_percent": {"chunks": 273, "bytes": 273 * CHUNK},
    });
    assert_eq!((&result["sample"], &result["proven"]), (&expected, &Value::Bool(false)));

    // Every listed chunk is damaged: what is named is what was read.
    (0..200).chain(208..408).for_each(|chunk| flip(&copy, chunk * CHUNK + 77));
    let drawn = |seed: &str| {
        let (code, event) = verify(&manifest, &copy, &["--sample", "2.6%", "--seed", seed]);
        assert_eq!((code, event["id"].as_str()), (10, Some("verify.differs")));
        named(&event)
    };
    let first = drawn("1");
    // 10.4, rounded up.
    assert_eq!(first.len(), 11);
    assert_eq!(first, drawn("1"));
    assert_ne!(first, drawn("2"));
    let (_, event) = verify(&manifest, &copy, &["--sample", "100%"]);
    assert_eq!(named(&event), (0..200).chain(208..408).collect());

    // Without a seed two runs draw different ones.
    let seed_of = |event: &Value| {
        let facts = event["facts"].as_array().unwrap();
        facts.iter().find(|fact| fact["name"] == "sample_seed").unwrap()["value"].as_str().unwrap().to_owned()
    };
    let (_, one) = verify(&manifest, &copy, &["--sample", "2.6%"]);
    let (_, two) = verify(&manifest, &copy, &["--sample", "2.6%"]);
    assert_ne!(seed_of(&one), seed_of(&two));
    assert_eq!(named(&one), drawn(&seed_of(&one)));
}

#[test]
fn a_damaged_chunk_is_found_when_all_are_read_and_only_when_it_is_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let (copy, manifest) = copied(dir.path(), 60);
    let damaged = 41;
    flip(&copy, damaged * CHUNK);
    let (code, event) = verify(&manifest, &copy, &["--sample", "100%"]);
    assert_eq!((code, named(&event)), (10, [damaged].into()));
    // One half is drawn: one time in two. All of 40 or none would be one in 2^39.
    let found = (0..40).filter(|seed| {
        let (code, _) = verify(&manifest, &copy, &["--sample", "50%", "--seed", &seed.to_string()]);
        assert!(code == 0 || code == 10, "{code}");
        code == 10
    });
    let found = found.count();
    assert!((1..40).contains(&found), "found {found} times of 40");

    // What should be zeroes is not read by a sample, and is by a proof.
    flip(&copy, damaged * CHUNK);
    flip(&copy, 33 * CHUNK);
    assert_eq!(verify(&manifest, &copy, &["--sample", "100%"]).0, 0);
    assert_eq!(verify(&manifest, &copy, &[]).0, 10);
}

#[test]
fn what_a_sample_proves_and_leaves_unread_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (copy, manifest) = copied(dir.path(), 60);
    let said = |more: &[&str]| {
        let args = [&["verify", text(&manifest), text(&copy)], more].concat();
        support::run(env!("CARGO_BIN_EXE_haul"), &args)
    };
    let text = said(&["--sample", "25%", "--seed", "3"]);
    for part in [
        "15 of 60 chunks read (960.00 KiB of 3.75 MiB)",
        "a sample, no proof",
        "--sample 250000ppm --seed 3",
        "if 14 or more chunks (896.00 KiB) were damaged",
        "99 %",
        "unread: the other 45 chunks (2.81 MiB), and whether all else is zeroes",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    assert!(said(&["--sample", "100%"]).contains("if any chunk were damaged"));
    assert!(said(&[]).contains("proven"));
    for wrong in [&["--sample", "0%"][..], &["--sample", "100.1%"], &["--sample", "7"], &["--seed", "1"]] {
        assert_eq!(verify(&manifest, &copy, wrong).0, 2, "{wrong:?}");
    }
}

#[cfg(feature = "net")]
#[test]
fn of_an_object_only_the_ranges_of_the_sample_are_fetched() {
    let cloud = lab::Lab::start();
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = vec![0; 64 << 20];
    images::Random(images::seed()).fill(&mut bytes);
    fs::write(dir.path().join("disk.raw"), &bytes).unwrap();
    let haul = |args: &[&str]| {
        let mut command = cloud.haul(args);
        lab::result(&command.current_dir(dir.path()).output().unwrap())
    };
    let fetched = || cloud.store.requests().iter().map(|request| request.sent).sum::<u64>();
    for format in ["raw", "qcow2"] {
        let url = format!("cos://{}/disk.{format}", lab::BUCKET);
        haul(&["convert", "--all-blocks", "disk.raw", &url]);
        let manifest = format!("disk.{format}.manifest");
        let before = fetched();
        let told = haul(&["verify", "--sample", "2%", &manifest, &url]);
        let sent = fetched() - before;
        // 20.48 of 1024 chunks, rounded up, each in up to two pieces of 64 KiB; and what opening reads: format
        // probing, and for qcow2 its tables.
        assert_eq!(told["sample"]["chunks_read"], 21);
        let most = 2 * 21 * CHUNK + 12 * CHUNK;
        println!("{format}: {sent} bytes fetched of {} MiB", bytes.len() >> 20);
        assert!(sent >= 21 * CHUNK && sent <= most, "{format}: {sent} bytes fetched, {most} at most");
    }
}
