//! Damaged, truncated and lying VHDX images: an error or a disk, never a panic, a hang or a huge allocation.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/allocations.rs"]
mod allocations;
#[path = "support/damage.rs"]
mod damage;
#[path = "fuzz_bodies/vhdx.rs"]
mod fuzz_vhdx;
#[path = "support/images.rs"]
mod images;
#[path = "support/vhdx_image.rs"]
mod vhdx_image;

use std::fs::File;

use damage::{Sample, run_through};
use fuzz_vhdx::fuzz_vhdx;
use images::{Bench, Random};
use vhdx_image::{
    BAT, Entry, LOG, METADATA, SEALED, SECTOR, by_qemu, interrupted, name_log, put_entry, seal,
};

/// Bytes held at once beyond the image: a bit for each MiB of a file that its log makes as long as it can be, and a
/// log.
const LIMIT: usize = 24 << 20;

/// Makes the checksums of the header section right again, and those of the log's entries of one sector.
fn seal_all(image: &mut [u8]) {
    seal(image);
    let Some(log) = image.get_mut(LOG) else { return };
    for at in (0..log.len()).step_by(SECTOR) {
        let len = u32::from_le_bytes(log[at + 8..at + 12].try_into().unwrap()) as usize;
        if log[at..].starts_with(b"loge") && len <= 1 << 20 && at + len <= log.len() {
            log[at + 4..at + 8].fill(0);
            let sum = crc32c::crc32c(&log[at..at + len]);
            log[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

/// Small images of each shape, made by QEMU; two whose log is not empty.
fn samples() -> Vec<Sample> {
    let bench = Bench::new(2 << 20, 72);
    let whole = by_qemu(&bench, "block_size=1M,block_state_zero=off");
    let fixed = by_qemu(&bench, "block_size=1M,subformat=fixed");
    File::options().write(true).open(&bench.raw).unwrap().set_len(700 << 20).unwrap();
    let long = by_qemu(&bench, "block_size=1M");
    let cut_off = interrupted(&long, &mut Random(72));
    let mut short = whole.clone();
    let size = short.len() as u64;
    let entry =
        Entry { guid: [3; 16], sequence: 1, tail: 0, flushed_size: size, last_size: size, changes: vec![] };
    put_entry(&mut short, 0, &entry.encode());
    name_log(&mut short, [3; 16]);
    let sample = |image: Vec<u8>| {
        let mut areas: Vec<_> = SEALED.iter().map(|(at, _)| (*at, 128)).collect();
        areas.extend([(0, 16), (METADATA, 200), (METADATA + (64 << 10), 48), (BAT, 40), (BAT, 8192)]);
        areas.extend([(LOG.start, LOG.len()), (0, image.len())]);
        // Where the log's entries begin.
        let heads = LOG.step_by(SECTOR).filter(|at| image[*at..].starts_with(b"loge"));
        areas.extend(heads.take(4).map(|at| (at, 192)));
        Sample { image, areas, seal: seal_all }
    };
    [whole, fixed, short, cut_off].map(sample).into()
}

#[test]
fn a_few_damaged_images_are_errors_or_disks() {
    run_through(&samples(), 120, LIMIT, fuzz_vhdx);
}

#[test]
#[ignore = "long: scripts/test.sh --long"]
fn a_thousand_damaged_images_are_errors_or_disks() {
    run_through(&samples(), 1000, LIMIT, fuzz_vhdx);
}
