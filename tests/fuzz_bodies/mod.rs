//! What any bytes must satisfy, parser by parser: plain functions, called by the fuzzer (tests/fuzz.rs), by the replay
//! of the corpora and by the tests of damaged images.

#![allow(dead_code, reason = "each test binary uses a part")]

pub mod archive;
pub mod files;
pub mod guest;
pub mod input;
pub mod layout;
pub mod manifest;
pub mod nbd;
pub mod qcow2;
pub mod seal;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
pub mod watched;
pub mod xfs_files;
pub mod fat_files;

use haul::error::Error;
use input::View;

/// What came of some bytes; the text tells outcomes of one kind apart, roughly.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// They could not be opened.
    Refused(String),
    /// They could be opened, but not all that was tried could be read.
    Broken(String),
    /// They could be read.
    Fine(String),
}

impl Outcome {
    /// The beginning of the name of a seed with this outcome.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Refused(_) => "refused",
            Outcome::Broken(_) => "broken",
            Outcome::Fine(_) => "good",
        }
    }

    /// Whether they could be opened.
    pub fn opened(&self) -> bool {
        !matches!(self, Outcome::Refused(_))
    }

    /// Whether they could be opened, and read.
    pub fn both(&self) -> (bool, bool) {
        (self.opened(), matches!(self, Outcome::Fine(_)))
    }
}

/// An error without what differs from input to input: its id and the words of its text.
pub fn signature(error: &Error) -> String {
    format!("{}: {} {}", error.id(), words(error.what()), words(&error.why()))
}

/// The first words of a text, without what is quoted.
pub fn words(text: &str) -> String {
    let unquoted: String = text.split('"').step_by(2).collect();
    let words = unquoted.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| word.len() > 2);
    words.take(12).collect::<Vec<_>>().join(" ")
}

/// A parser under test.
pub struct Body {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Gives it some bytes. Panics when they make it do what no bytes may.
    pub run: fn(&[u8]) -> Outcome,
    /// Makes the checksums right again.
    pub seal: fn(&mut View<'_>),
    /// The most bytes it may hold at once beyond three times its input.
    pub held: usize,
}

fn unsealed(_: &mut View<'_>) {}

/// Every parser of bytes that others wrote.
pub const BODIES: &[Body] = &[
    Body { name: "qcow2", run: qcow2::fuzz_qcow2, seal: unsealed, held: 64 << 20 },
    Body { name: "qcow2-round", run: qcow2::fuzz_round, seal: unsealed, held: 96 << 20 },
    Body { name: "vhd", run: vhd::fuzz_vhd, seal: seal::vhd, held: 24 << 20 },
    Body { name: "vhdx", run: vhdx::fuzz_vhdx, seal: seal::vhdx, held: 24 << 20 },
    Body { name: "vmdk", run: vmdk::fuzz_image, seal: unsealed, held: 24 << 20 },
    Body { name: "vmdk-extent", run: vmdk::fuzz_extent, seal: unsealed, held: 24 << 20 },
    Body { name: "archive", run: archive::fuzz_archive, seal: seal::archive, held: 256 << 20 },
    Body { name: "layout", run: layout::fuzz_layout, seal: seal::layout, held: 64 << 20 },
    Body { name: "xfs-files", run: xfs_files::fuzz_xfs_files, seal: seal::layout, held: 64 << 20 },
    Body { name: "btrfs-files", run: files::fuzz_btrfs, seal: seal::layout, held: 64 << 20 },
    Body { name: "fat-files", run: fat_files::fuzz_fat_files, seal: unsealed, held: 64 << 20 },
    Body { name: "guest", run: guest::fuzz_guest, seal: seal::layout, held: 64 << 20 },
    Body { name: "guest-files", run: guest::fuzz_files, seal: unsealed, held: 64 << 20 },
    Body { name: "initramfs", run: guest::fuzz_initramfs, seal: unsealed, held: 192 << 20 },
    Body { name: "console", run: guest::fuzz_console, seal: unsealed, held: 1 << 20 },
    Body { name: "manifest", run: manifest::fuzz_manifest, seal: seal::manifest, held: 32 << 20 },
    Body { name: "journal", run: manifest::fuzz_journal, seal: seal::journal, held: 32 << 20 },
    Body { name: "nbd-client", run: nbd::fuzz_client, seal: unsealed, held: 64 << 20 },
    Body { name: "nbd-server", run: nbd::fuzz_server, seal: unsealed, held: 8 << 20 },
];
