//! Damaged images read by haul and by QEMU: what both read must be the same.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use haul::error::Result;
use haul::image::{self, Format, Gate};
use haul::io::{ReadAt, is_zero};

use super::bodies::input::{self, View};
use super::bodies::{BODIES, Body, signature, words};
use super::images::{Random, arg};
use super::mutate;
use super::run::{Until, corpus_dir, seeds, worked};

/// Longest disk that is compared, in bytes.
const LONGEST: u64 = 64 << 20;

/// A format that both read.
pub struct Reader {
    /// The parser's name, and that of its corpus.
    pub name: &'static str,
    format: Format,
    /// QEMU's name of the format.
    qemu: &'static str,
}

pub const READERS: [Reader; 4] = [
    Reader { name: "qcow2", format: Format::Qcow2, qemu: "qcow2" },
    Reader { name: "vhd", format: Format::Vhd, qemu: "vpc" },
    Reader { name: "vhdx", format: Format::Vhdx, qemu: "vhdx" },
    Reader { name: "vmdk", format: Format::Vmdk, qemu: "vmdk" },
];

/// How often each outcome came.
#[derive(Debug, Default)]
pub struct Tally {
    pub executions: u64,
    pub seconds: f64,
    pub alike: u64,
    /// Read by neither.
    pub neither: u64,
    /// Read by haul alone, by QEMU's words.
    pub haul_alone: BTreeMap<String, u64>,
    /// Read by QEMU alone, by haul's words.
    pub qemu_alone: BTreeMap<String, u64>,
    /// Inputs that are read differently, with what differs.
    pub different: Vec<(String, Vec<u8>)>,
}

/// The disk in `input` as haul reads it, none if it is too long to compare.
fn by_haul(reader: &Reader, input: &[u8]) -> Result<Option<Vec<u8>>> {
    let file = Arc::new(input::disk(input, u64::MAX));
    let image = image::open_on(file, Some(reader.format), &Gate::closed())?;
    let size = image.disk.size();
    if size > LONGEST {
        return Ok(None);
    }
    let mut disk = vec![0; usize::try_from(size).unwrap()];
    image.disk.read_at(&mut disk, 0)?;
    Ok(Some(disk))
}

/// The disk in the image `path` as QEMU reads it, or why it does not.
fn by_qemu(reader: &Reader, path: &Path) -> std::result::Result<Vec<u8>, String> {
    let raw = path.with_extension("raw");
    let _ = fs::remove_file(&raw);
    // A file as long as a damaged size field says is not written; one who reads for ever is stopped.
    let limits = ["10", "prlimit", "--fsize=134217728", "--as=4294967296", "qemu-img"];
    let convert = ["convert", "-f", reader.qemu, "-O", "raw", arg(path), arg(&raw)];
    let done = Command::new("timeout").args(limits).args(convert).output().unwrap();
    if done.status.success() {
        Ok(fs::read(&raw).unwrap())
    } else {
        Err(words(&String::from_utf8_lossy(&done.stderr)))
    }
}

/// Whether a VHD has two footers that are not the same. QEMU believes the copy at the start whatever it says, haul the
/// footer at the end unless both are intact: then it refuses them.
fn has_two_footers(input: &mut [u8]) -> bool {
    let view = View::new(input);
    let Some(end) = view.size().checked_sub(512) else { return false };
    let both = view.has(0, b"conectix") && view.has(end, b"conectix");
    both && view.get(0, 512) != view.get(end, 512)
}

/// What both read of one image, and how it may differ.
fn differ(reader: &Reader, ours: &[u8], theirs: &[u8]) -> Option<String> {
    let same = theirs.starts_with(ours);
    let more = theirs.len().checked_sub(ours.len());
    let allowed = match reader.format {
        // Where the capacity is rounded up to a grain, QEMU takes that for the disk, haul what the descriptor says.
        Format::Vmdk => more.is_some_and(|more| more < 2 << 20),
        _ => more == Some(0),
    };
    if same && allowed {
        return None;
    }
    // QEMU counts qcow2's disk in whole sectors.
    let less = ours.len().checked_sub(theirs.len());
    if reader.format == Format::Qcow2 && ours.starts_with(theirs) && less.is_some_and(|less| less < 512) {
        return None;
    }
    // QEMU takes no notice of the sector bitmaps: sectors never written, which are zeroes, are what the file has there.
    let unwritten = |(ours, theirs): (&[u8], &[u8])| ours == theirs || is_zero(ours);
    if reader.format == Format::Vhd
        && more == Some(0)
        && ours.chunks(512).zip(theirs.chunks(512)).all(unwritten)
    {
        return None;
    }
    // A creator whose geometry QEMU believes, and a geometry of no sectors: to QEMU the disk is empty.
    if reader.format == Format::Vhd && theirs.is_empty() {
        return None;
    }
    let at = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs);
    Some(format!("{} and {} bytes, the first that differs {at:?}", ours.len(), theirs.len()))
}

/// Changes images of the corpus, and those that a run of the fuzzer kept in `keep`, and has them read by both.
pub fn run(reader: &Reader, seed: u64, until: &Until, keep: Option<&Path>) -> Tally {
    let start = worked();
    let mut random = Random(seed);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let body: &Body = BODIES.iter().find(|body| body.name == reader.name).unwrap();
    let mut corpus: Vec<Vec<u8>> =
        seeds(&corpus_dir(reader.name)).into_iter().map(|(_, bytes)| bytes).collect();
    if let Some(keep) = keep {
        corpus.extend(seeds(&keep.join("corpus").join(reader.name)).into_iter().map(|(_, bytes)| bytes));
    }
    // What haul refuses teaches little here.
    corpus.retain(|input| (body.run)(input).opened());
    let mut tally = Tally::default();
    let is_done = |executions| match until {
        Until::Executions(most) => executions >= *most,
        Until::Worked(longest) => worked() - start >= *longest,
    };
    while !is_done(tally.executions) {
        let mut input = mutate::next(&corpus, &mut random);
        if random.below(8) > 0 {
            (body.seal)(&mut View::new(&mut input));
        }
        if reader.format == Format::Vhd && has_two_footers(&mut input) {
            continue;
        }
        let ours = match by_haul(reader, &input) {
            // What they name is not opened, here and there.
            Err(error) if error.id().starts_with("image.") => continue,
            Ok(None) => continue,
            Ok(Some(disk)) => Ok(disk),
            Err(error) => Err(error),
        };
        // QEMU takes a long time to say no: of what haul refuses, some will do.
        if ours.is_err() && random.below(4) > 0 {
            continue;
        }
        tally.executions += 1;
        let file = File::create(&path).unwrap();
        input::write(&input, &file);
        match (ours, by_qemu(reader, &path)) {
            (Ok(ours), Ok(theirs)) => match differ(reader, &ours, &theirs) {
                None => tally.alike += 1,
                Some(how) => tally.different.push((how, input)),
            },
            (Ok(_), Err(why)) => *tally.haul_alone.entry(why).or_default() += 1,
            (Err(error), Ok(_)) => *tally.qemu_alone.entry(signature(&error)).or_default() += 1,
            (Err(_), Err(_)) => tally.neither += 1,
        }
    }
    tally.seconds = (worked() - start).as_secs_f64();
    tally
}
