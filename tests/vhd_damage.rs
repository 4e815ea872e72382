//! Damaged, truncated and lying VHD images: an error or a disk, never a panic, a hang or a huge allocation.

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

use bodies::input::View;
use bodies::seal;
use bodies::vhd::fuzz_vhd;
use bounds::{Bounds, processor_time};
use damage::{Sample, run_through};
use images::{Bench, arg, run};

/// Bytes held at once beyond the image: a table of 4 Mi blocks, which its header may claim, and the caches.
const LIMIT: usize = 24 << 20;

/// Small images of each shape, made by QEMU.
fn samples() -> Vec<Sample> {
    let bench = Bench::new(5 << 20, 71);
    let by_qemu = |name: &str, options: &str| {
        let path = bench.path(name);
        run("qemu-img", &["convert", "-f", "raw", "-O", "vpc", "-o", options, arg(&bench.raw), arg(&path)]);
        std::fs::read(path).unwrap()
    };
    // Footer's copy, header, table, a bitmap, the footer.
    let sample = |image: Vec<u8>| {
        let end = (image.len() - 512, 100);
        let areas = if image.starts_with(b"conectix") {
            vec![(0, 100), (512, 60), (1536, 16), (1536, 512), (2048, 512), end, (0, image.len())]
        } else {
            vec![end, (0, image.len())]
        };
        Sample { image, areas, seal: |image| seal::vhd(&mut View::new(image)) }
    };
    let exact = by_qemu("a.vhd", "subformat=dynamic,force_size=on");
    // The footer at the end is lost: its copy counts.
    let copied = exact[..exact.len() - 512].to_vec();
    let rounded = by_qemu("b.vhd", "subformat=dynamic");
    let fixed = by_qemu("c.vhd", "subformat=fixed,force_size=on");
    [exact, copied, rounded, fixed].map(sample).into()
}

#[test]
fn a_few_damaged_images_are_errors_or_disks() {
    run_through("VHD", &samples(), 120, LIMIT, |image| fuzz_vhd(image).opened());
}

#[test]
#[ignore = "long: 1,000 damages; scripts/test.sh --long"]
fn a_thousand_damaged_images_are_errors_or_disks() {
    run_through("VHD", &samples(), 1000, LIMIT, |image| fuzz_vhd(image).opened());
}

/// What the bounds of all tests of damage rest on.
#[test]
fn an_input_that_breaks_a_bound_is_seen() {
    let seen = |work: fn() -> usize| {
        std::panic::catch_unwind(|| Bounds::default().hold("planted", 0, 1 << 20, work)).is_err()
    };
    assert!(!seen(|| std::hint::black_box(vec![1u8; 1 << 10]).len()));
    assert!(seen(|| std::hint::black_box(vec![1u8; 2 << 20]).len()));
    assert!(seen(|| panic!("planted")));
    assert!(seen(|| {
        let start = processor_time();
        (0..).find(|_| processor_time() - start > 2_000_000_000).unwrap()
    }));
}
