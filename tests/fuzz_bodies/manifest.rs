//! Bytes as a manifest and as a journal. Both are files of haul's own, but a folder is not under its lock alone.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use haul::error::{Error, Kind};
use haul::io::fake::MemoryDisk;
use haul::manifest::Manifest;
use haul::manifest::survey::Survey;
use haul::manifest::verify::verify;

use super::archive::scratch;
use super::{Outcome, signature};

/// Longest disk that is held against a manifest, in bytes.
const LONGEST: u64 = 4 << 20;

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch().join(format!("{name}-{:?}-fuzz", std::thread::current().id()));
    std::fs::write(&path, bytes).unwrap();
    path
}

fn judge(error: &Error) -> String {
    assert!(matches!(error.kind(), Kind::Image | Kind::Source), "{error:?}");
    assert!(error.what().contains("fuzz"), "the file is not named: {error:?}");
    signature(error)
}

/// Takes `bytes` as a manifest: it is read, and a disk held against it, or it fails with an error.
pub fn fuzz_manifest(bytes: &[u8]) -> Outcome {
    let manifest = match Manifest::open(&file("manifest", bytes)) {
        Ok(manifest) => manifest,
        Err(error) => return Outcome::Refused(judge(&error)),
    };
    let mut seen = String::new();
    for chunks in [manifest.chunks(), manifest.source_chunks()] {
        let walked = chunks
            .and_then(|chunks| chunks.take(bytes.len() + 1).try_fold(0, |n, chunk| chunk.map(|_| n + 1)));
        match walked {
            Ok(count) => assert!(count <= bytes.len() / 32, "{count} chunks in {} bytes", bytes.len()),
            Err(error) => seen = judge(&error),
        }
    }
    let size = manifest.geometry().size;
    if size <= LONGEST {
        match verify(&manifest, &MemoryDisk::sparse(size), 1, &AtomicBool::new(false), &|_| {}) {
            Ok(verdict) => assert!(verdict.compared <= size, "{} bytes of {size}", verdict.compared),
            Err(error) => seen = signature(&error),
        }
    }
    if seen.is_empty() { Outcome::Fine(seen) } else { Outcome::Broken(seen) }
}

/// Takes `bytes` as a journal: it is surveyed up to where it breaks off, and again, if that is all there is.
pub fn fuzz_journal(bytes: &[u8]) -> Outcome {
    let path = file("journal", bytes);
    let survey = match Survey::of(&path) {
        Ok(survey) => survey,
        Err(error) => return Outcome::Refused(judge(&error)),
    };
    let valid = usize::try_from(survey.valid).unwrap();
    assert!(valid <= bytes.len(), "{valid} of {} bytes are valid", bytes.len());
    let batches = |path| {
        let mut batches = Vec::new();
        survey
            .batches(path, |batch| {
                batches.push(batch);
                Ok(())
            })
            .unwrap();
        batches
    };
    let all = batches(&path);
    survey.uploaded(0);
    // What follows the valid part changes nothing.
    let cut_off = file("journal-cut", &bytes[..valid]);
    let again = Survey::of(&cut_off).unwrap();
    assert_eq!(format!("{survey:?}"), format!("{again:?}"));
    assert!(all == batches(&cut_off));
    let seen = format!("{} {} {}", all.len().min(4), survey.parts.len().min(4), survey.sealed.is_some());
    if valid == bytes.len() { Outcome::Fine(seen) } else { Outcome::Broken(seen) }
}
