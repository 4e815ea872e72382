//! Damaged, truncated and lying qcow2 images: an error or a disk, never a panic, a hang or a huge allocation.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/allocations.rs"]
mod allocations;
#[path = "fuzz_bodies/mod.rs"]
mod bodies;
#[path = "support/bounds.rs"]
mod bounds;
#[path = "support/images.rs"]
mod images;

use bodies::Outcome;
use bodies::qcow2::fuzz_qcow2;
use bounds::Bounds;
use haul::image::qcow2::header::Header;
use images::{Bench, Random, arg, run, seed};

/// The most bytes haul may hold at once beyond those of the image: an L1 table of the 32 MiB QEMU allows, read and
/// decoded, and the caches.
const MOST_HELD: usize = 96 << 20;

/// Small images of each shape, made by QEMU.
fn samples() -> Vec<Vec<u8>> {
    let bench = Bench::new(900_000 / 512 * 512, 21);
    let shapes: [(&str, &[&str]); 6] = [
        ("compat=0.10", &[]),
        ("cluster_size=512", &["-c"]),
        ("cluster_size=4k,compression_type=zstd", &["-c"]),
        ("extended_l2=on,cluster_size=16k", &[]),
        ("lazy_refcounts=on,cluster_size=4k", &[]),
        ("compression_type=zstd", &["-c"]),
    ];
    let make = |(i, (options, flags)): (usize, &(&str, &[&str]))| {
        let path = bench.convert(&format!("{i}.qcow2"), options, flags);
        run("qemu-img", &["snapshot", "-c", "one", arg(&path)]);
        std::fs::read(path).unwrap()
    };
    shapes.iter().enumerate().map(make).collect()
}

/// Where damage matters in an image: header, extensions, L1, refcount table and first block, snapshots, every L2
/// table, and, since compressed clusters have a structure too, anywhere.
fn metadata(image: &[u8]) -> Vec<(usize, usize)> {
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    let header = Header::decode("sample", image).unwrap();
    let cluster = 1usize << header.cluster_bits;
    let place = |at: u64| usize::try_from(at).unwrap();
    let l1 = place(header.l1_offset);
    let refcounts = place(header.refcount_table_offset);
    let mut areas = vec![
        (0, 112),
        (112, 400),
        (l1, header.l1_entries as usize * 8),
        (refcounts, 64),
        (place(header.snapshots_offset), 64),
        (0, image.len()),
    ];
    let tables = (0..header.l1_entries as usize).map(|i| word(l1 + i * 8)).chain([word(refcounts)]);
    areas.extend(tables.filter(|at| *at != 0).map(|at| (place(at), cluster)));
    areas
}

/// One damage: bytes of the metadata overwritten, mostly with values of consequence, or the file cut off.
fn damage(image: &mut Vec<u8>, areas: &[(usize, usize)], random: &mut Random) {
    let below = |random: &mut Random, n: usize| usize::try_from(random.below(n as u64)).unwrap();
    if random.below(8) == 0 {
        let cut = match random.below(3) {
            0 => below(random, image.len()),
            1 => below(random, 200),
            _ => image.len() - below(random, 3000).min(image.len()),
        };
        image.truncate(cut);
        return;
    }
    for _ in 0..=random.below(3) {
        let (start, len) = areas[below(random, areas.len())];
        let at = start + below(random, len);
        let interesting = [
            0,
            1,
            u64::MAX,
            1 << 63,
            1 << 62,
            image.len() as u64,
            image.len() as u64 - 512,
            areas[2].0 as u64 | 1 << 63,
            0x7fff_ffff_ffff_fe00,
            random.next(),
            random.next() >> 32,
        ];
        let value = interesting[below(random, interesting.len())].to_be_bytes();
        let (at, bytes) = match random.below(3) {
            0 => (at, &value[7..]),
            1 => (at / 4 * 4, &value[4..]),
            _ => (at / 8 * 8, &value[..]),
        };
        for (to, from) in image.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
}

#[test]
fn damaged_images_are_errors_or_disks() {
    let seed = seed();
    let mut random = Random(seed);
    let samples: Vec<_> = samples().into_iter().map(|image| (metadata(&image), image)).collect();
    for (i, (_, image)) in samples.iter().enumerate() {
        assert_eq!(fuzz_qcow2(image).both(), (true, true), "sample {i} is undamaged");
    }
    let (mut refused, mut broken, mut fine) = (0, 0, 0);
    let mut bounds = Bounds::default();
    for i in 0..3000 {
        let (areas, image) = &samples[i % samples.len()];
        let mut image = image.clone();
        damage(&mut image, areas, &mut random);
        let name = format!("damage {i} of HAUL_SEED={seed}, sample {}", i % samples.len());
        match bounds.hold(&name, image.len(), MOST_HELD, || fuzz_qcow2(&image)) {
            Outcome::Refused(_) => refused += 1,
            Outcome::Broken(_) => broken += 1,
            Outcome::Fine(_) => fine += 1,
        }
    }
    bounds.print(&format!(
        "damaged qcow2 images, of which {refused} did not open and {broken} broke while they were read"
    ));
    assert!(
        refused > 200 && broken > 50 && fine > 200,
        "{refused} {broken} {fine}: the damage misses its mark"
    );
}

/// Writes `words` into the image as big-endian 64-bit numbers at `at`.
fn put(image: &mut [u8], at: u64, word: u64) {
    let at = usize::try_from(at).unwrap();
    image[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

#[test]
fn tables_that_point_at_each_other_are_refused() {
    let bench = Bench::new(3 << 20, 22);
    let path = bench.convert("a.qcow2", "cluster_size=4k", &[]);
    let image = std::fs::read(path).unwrap();
    let header = Header::decode("x", &image).unwrap();
    let entry = |i: u64| header.l1_offset + i * 8;
    let at = usize::try_from(entry(0)).unwrap();
    let first = u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    for (name, word) in [
        ("the L1 table", header.l1_offset | 1 << 63),
        ("another entry's table", first),
        ("beyond the end", (image.len() as u64).next_multiple_of(4096)),
        ("no cluster boundary", first + 512),
    ] {
        let mut image = image.clone();
        put(&mut image, entry(1), word);
        assert_eq!(fuzz_qcow2(&image).both(), (false, false), "{name}");
    }
    // A data cluster that is the L1 table is a strange disk, and one that ends.
    let mut image = image.clone();
    put(&mut image, first & !(1 << 63), header.l1_offset | 1 << 63);
    assert_eq!(fuzz_qcow2(&image).both(), (true, true));
}

#[test]
fn the_largest_tables_are_looked_through_in_bounded_steps() {
    // 32 MiB of L1 entries, each with an L2 table of its own in the hole of a sparse file.
    use haul::image::{Gate, open_on};
    use haul::io::WriteAt;
    use haul::io::fake::MemoryDisk;
    let entries = 4u64 << 20;
    let mut header = Header::new(entries << 29, 16, haul::image::qcow2::header::Compression::Zlib);
    header.l1_offset = 65_536;
    let tables = 65_536 + (32 << 20);
    let file = MemoryDisk::sparse(tables + entries * 65_536);
    file.write_at(&header.encode(), 0).unwrap();
    let l1: Vec<u8> = (0..entries).flat_map(|i| (tables + i * 65_536).to_be_bytes()).collect();
    file.write_at(&l1, header.l1_offset).unwrap();
    let image = open_on(std::sync::Arc::new(file), None, &Gate::closed()).unwrap();
    assert_eq!(image.disk.next_data(0).unwrap(), None);
}
