//! Damaged, truncated and lying VHDX images: an error or a disk, never a panic, a hang or a huge allocation.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/allocations.rs"]
mod allocations;
#[path = "fuzz_bodies/mod.rs"]
mod bodies;
#[path = "support/bounds.rs"]
mod bounds;
#[path = "support/damage.rs"]
mod damage;
#[path = "support/images.rs"]
mod images;
#[path = "support/vhdx_image.rs"]
mod vhdx_image;

use std::fs::File;

use bodies::input::View;
use bodies::seal;
use bodies::vhdx::fuzz_vhdx;
use damage::{Sample, run_through};
use images::{Bench, Random};
use vhdx_image::{BAT, Entry, LOG, METADATA, SEALED, SECTOR, by_qemu, interrupted, name_log, put_entry};

/// Bytes held at once beyond the image: a bit for each MiB of a file that its log makes as long as it can be, and a
/// log.
const LIMIT: usize = 24 << 20;

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
        Sample { image, areas, seal: |image| seal::vhdx(&mut View::new(image)) }
    };
    [whole, fixed, short, cut_off].map(sample).into()
}

#[test]
fn a_few_damaged_images_are_errors_or_disks() {
    run_through("VHDX", &samples(), 120, LIMIT, |image| fuzz_vhdx(image).opened());
}

#[test]
#[ignore = "long: 1,000 damages; scripts/test.sh --long"]
fn a_thousand_damaged_images_are_errors_or_disks() {
    run_through("VHDX", &samples(), 1000, LIMIT, |image| fuzz_vhdx(image).opened());
}
