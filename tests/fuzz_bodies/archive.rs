//! Bytes as a compressed stream or an archive.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use haul::error::{Error, Kind, Result};
use haul::image::archive::{self, Options};
use haul::io::ReadAt;

use super::watched::Watched;
use super::{Outcome, input, signature};

/// The most bytes that anything may unpack to.
pub const LIMIT: u64 = 4 << 20;

/// The disk in `bytes`, as far as [`LIMIT`], how much of it there is beyond, and what it was wrapped in.
pub fn open(bytes: &[u8], scratch: &Path) -> Result<(Vec<u8>, u64, String)> {
    let file = Watched::within(input::disk(bytes, 64 << 20), 20_000, 64 << 20);
    let options = Options { member: None, scratch, limit: LIMIT, progress: &|_| Ok(()) };
    let opened = archive::open(Arc::new(file), &options)?;
    let disk = opened.disk;
    let mut read = vec![0; usize::try_from(disk.size().min(LIMIT)).unwrap()];
    disk.read_at(&mut read, 0)?;
    let mut at = 0;
    for _ in 0..2000 {
        let Some(data) = disk.next_data(at)? else { break };
        assert!(at <= data.start && data.start < data.end && data.end <= disk.size(), "{at}: {data:?}");
        at = data.end;
    }
    let tail = disk.size().min(512);
    disk.read_at(&mut vec![0; usize::try_from(tail).unwrap()], disk.size() - tail)?;
    let codecs: Vec<_> =
        opened.layers.iter().map(|layer| layer.to_string().replace(char::is_numeric, "")).collect();
    let layers = codecs.iter().map(|codec| codec.split('"').next().unwrap_or_default());
    Ok((read, disk.size() - disk.size().min(LIMIT), layers.collect::<Vec<_>>().join(" ")))
}

/// An error must blame the archive and say where, or ask which member is meant.
pub fn judge(error: &Error) {
    let text = format!("{error:?}");
    assert!(error.what().contains("fuzz"), "the file is not named: {text}");
    match error.kind() {
        Kind::Usage => assert!(matches!(error.id(), "archive.which-disk" | "archive.no-disk"), "{text}"),
        Kind::Image => {
            let bare = matches!(error.id(), "archive.depth" | "archive.two-members");
            assert!(bare || error.facts().iter().any(|(name, _)| *name == "offset"), "no offset: {text}");
        }
        _ => panic!("{text}"),
    }
}

/// A folder for what is unpacked, the same for all.
pub fn scratch() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| tempfile::tempdir().unwrap()).path()
}

/// Takes `bytes` as a stream or an archive: what is in it is found and read within bounds, or it fails with an error.
pub fn fuzz_archive(bytes: &[u8]) -> Outcome {
    match open(bytes, scratch()) {
        Ok((_, more, layers)) => Outcome::Fine(format!("{layers} {}", more > 0)),
        Err(error) => {
            judge(&error);
            Outcome::Refused(signature(&error))
        }
    }
}
