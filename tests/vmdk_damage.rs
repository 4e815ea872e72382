//! Damaged, truncated and lying VMDK images: an error or a disk, never a panic, a hang or a huge allocation.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/allocations.rs"]
mod allocations;
#[path = "fuzz_bodies/mod.rs"]
mod bodies;
#[path = "support/bounds.rs"]
mod bounds;
#[path = "support/images.rs"]
mod images;
#[path = "support/lay_out.rs"]
mod lay_out;

use std::sync::Arc;

use bodies::vmdk::fuzz_vmdk;
use bounds::Bounds;
use haul::image::vmdk::Reader;
use haul::image::vmdk::header::{Header, MAX_TABLES, flag};
use haul::image::vmdk::writer::StreamOptimized;
use haul::io::fake::MemoryDisk;
use haul::io::{ReadAt, WriteAt, is_zero};
use haul::unit::{Extent, to_usize};
use images::{Random, arg, run, seed};
use lay_out::lay_out;

/// The most bytes haul may hold at once beyond those of the files: one cache of tables, one of grains, a window of
/// compressed bytes and a grain for each.
const MOST_HELD: usize = 24 << 20;
/// Bytes of the disk in every sample: parts of two grain tables.
const SIZE: u64 = (33 << 20) + 512;

/// An image, and what its extent files hold.
struct Sample {
    name: &'static str,
    image: Vec<u8>,
    extent: Vec<u8>,
    /// Where damage matters: start and length.
    areas: Vec<(usize, usize)>,
}

/// A disk with a little in both grain tables, and at its end.
fn disk() -> MemoryDisk {
    let disk = MemoryDisk::sparse(SIZE);
    let mut random = Random(41);
    for (at, len) in [(0, 700), (65_536, 5000), (300_000, 100_000), (32 << 20, 3000), (SIZE - 512, 512)] {
        let mut bytes = vec![0; len];
        random.fill(&mut bytes);
        bytes.iter_mut().step_by(3).for_each(|byte| *byte = 7);
        disk.write_at(&bytes, at).unwrap();
    }
    disk
}

/// A stream as haul writes it.
fn stream(disk: &MemoryDisk) -> Vec<u8> {
    let mut writer = StreamOptimized::new(SIZE, "disk.vmdk").unwrap();
    let mut image = Vec::new();
    let whole = [Extent::new(0, SIZE)].into_iter().collect();
    let (front, _) = lay_out(&mut writer, disk, &whole, |bytes, at| {
        image.resize(to_usize(at), 0);
        image.extend(bytes);
    });
    image[..front.len()].copy_from_slice(&front);
    image
}

fn samples() -> Vec<Sample> {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let disk = disk();
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    std::fs::write(&raw, bytes).unwrap();
    let make = |options: &str| {
        let path = dir.path().join("a.vmdk");
        run("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", "-o", options, arg(&raw), arg(&path)]);
        std::fs::read(&path).unwrap()
    };
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap_or_default();
    let sparse = make("subformat=monolithicSparse,zeroed_grain=on");
    let qemu_stream = make("subformat=streamOptimized");
    let split = make("subformat=twoGbMaxExtentSparse");
    let split_extent = read("a-s001.vmdk");
    let flat = make("subformat=monolithicFlat");
    let areas_of_text = |text: &[u8]| vec![(0, text.len()), (0, text.len().min(200))];
    vec![
        Sample { name: "monolithicSparse", areas: metadata(&sparse), image: sparse, extent: Vec::new() },
        Sample {
            name: "QEMU's stream",
            areas: metadata(&qemu_stream),
            image: qemu_stream,
            extent: Vec::new(),
        },
        Sample { name: "stream", areas: metadata(&stream(&disk)), image: stream(&disk), extent: Vec::new() },
        Sample { name: "split", areas: areas_of_text(&split), image: split, extent: split_extent },
        Sample { name: "flat", areas: areas_of_text(&flat), image: flat, extent: read("a-flat.vmdk") },
    ]
}

/// Where damage matters in a sparse extent: header, descriptor, directory, tables, the markers of grains, the last
/// sectors, and anywhere.
fn metadata(image: &[u8]) -> Vec<(usize, usize)> {
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize * 512;
    let end = image.len();
    let at_end = word(56) == 0xffff_ffff * 512;
    let directory = if at_end { word(end - 1024 + 56) } else { word(56) };
    let mut areas = vec![(0, 80), (0, 80), (512, 400), (directory, 8), (end - 1536, 1536), (0, end)];
    for table in [word(directory), word(directory + 4)] {
        areas.push((table, 32));
        areas.push((table, 2048));
        let grains = (0..512).map(|i| word(table + i * 4)).filter(|at| *at > 512);
        areas.extend(grains.map(|at| (at, 32)));
    }
    areas
}

/// One damage: bytes of the metadata overwritten, mostly with values of consequence, or the file cut off.
fn damage(image: &mut Vec<u8>, areas: &[(usize, usize)], random: &mut Random) {
    let below = |random: &mut Random, n: usize| usize::try_from(random.below(n as u64)).unwrap();
    if random.below(8) == 0 {
        let cut = match random.below(3) {
            0 => below(random, image.len()),
            1 => below(random, 1200),
            _ => image.len() - below(random, 3000).min(image.len()),
        };
        image.truncate(cut);
        return;
    }
    for _ in 0..=random.below(3) {
        let (start, len) = areas[below(random, areas.len())];
        let at = start + below(random, len);
        let sectors = image.len() as u64 / 512;
        let interesting = [
            0,
            1,
            2,
            u64::MAX,
            1 << 63,
            0x3030_3030_3030_3030,
            sectors,
            sectors.wrapping_sub(1),
            sectors.wrapping_sub(4),
            sectors.wrapping_sub(128),
            areas.get(3).map_or(0, |area| area.0 / 512) as u64,
            u64::from(b'\n'),
            random.next(),
            random.next() >> 32,
        ];
        let value = interesting[below(random, interesting.len())].to_le_bytes();
        let (at, bytes) = match random.below(4) {
            0 => (at, &value[..1]),
            1 => (at, &value[..2]),
            2 => (at / 4 * 4, &value[..4]),
            _ => (at / 4 * 4, &value[..8]),
        };
        for (to, from) in image.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
}

fn damaged_images_are_errors_or_disks(count: usize) {
    let seed = seed();
    let mut random = Random(seed);
    let samples = samples();
    for sample in &samples {
        assert_eq!(
            fuzz_vmdk(&sample.image, &sample.extent).both(),
            (true, true),
            "{} is undamaged",
            sample.name
        );
    }
    let mut bounds = Bounds::default();
    let mut outcomes = [0usize; 3];
    for i in 0..count {
        let sample = &samples[i % samples.len()];
        let (mut image, mut extent) = (sample.image.clone(), sample.extent.clone());
        // A split disk is damaged in its descriptor or in its extent.
        if sample.name == "split" && random.below(2) == 0 {
            damage(&mut extent, &metadata(&sample.extent), &mut random);
        } else {
            damage(&mut image, &sample.areas, &mut random);
        }
        let name = format!("damage {i} of HAUL_SEED={seed}, {}", sample.name);
        // The files themselves are in memory, in pages.
        let own = (image.len() + extent.len()) / 64 * 65;
        let outcome = bounds.hold(&name, own, MOST_HELD, || fuzz_vmdk(&image, &extent).both());
        outcomes[usize::from(outcome.0) + usize::from(outcome.1)] += 1;
    }
    let [refused, broken, fine] = outcomes;
    bounds.print(&format!(
        "damaged VMDK images, of which {refused} did not open and {broken} broke while they were read"
    ));
    assert!(
        refused > count / 10 && broken > count / 50 && fine > count / 10,
        "{outcomes:?}: the damage misses its mark"
    );
}

#[test]
fn some_damaged_images_are_errors_or_disks() {
    damaged_images_are_errors_or_disks(200);
}

#[test]
#[ignore = "long: 1,000 damages; scripts/test.sh --long"]
fn many_damaged_images_are_errors_or_disks() {
    damaged_images_are_errors_or_disks(1000);
}

/// A header of a disk of `capacity` sectors whose directory is at sector 16.
fn header(capacity: u64, grain: u64) -> Header {
    Header {
        version: 1,
        flags: flag::LINE_ENDS,
        capacity,
        grain,
        descriptor_offset: 1,
        descriptor_size: 8,
        redundant_offset: 0,
        directory_offset: 16,
        overhead: 0,
        unclean: false,
    }
}

/// A sparse file with the header of such a disk and its descriptor.
fn file_of(header: &Header, size: u64) -> MemoryDisk {
    let file = MemoryDisk::sparse(size);
    file.write_at(&header.encode(), 0).unwrap();
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW {} SPARSE \"a\"\n",
        header.capacity
    );
    file.write_at(descriptor.as_bytes(), 512).unwrap();
    file
}

#[test]
fn the_largest_tables_are_looked_through_in_bounded_steps() {
    // 8 MiB of directory entries, each with a grain table of its own in the hole of a sparse file.
    let header = header(MAX_TABLES * 512 * 128, 128);
    let first = 16 + u32::try_from(MAX_TABLES * 4 / 512).unwrap();
    let tables = u32::try_from(MAX_TABLES).unwrap();
    let file = file_of(&header, u64::from(first + tables * 4) * 512);
    let directory: Vec<u8> = (0..tables).flat_map(|i| (first + i * 4).to_le_bytes()).collect();
    file.write_at(&directory, 16 * 512).unwrap();
    let disk = Reader::open(Arc::new(file), |_| unreachable!()).unwrap();
    assert_eq!(disk.size(), 64 << 40);
    assert_eq!(disk.next_data(0).unwrap(), None);
}

#[test]
fn a_directory_larger_than_its_file_is_refused_before_it_is_allocated() {
    let file = file_of(&header(MAX_TABLES * 512 * 128, 128), 1 << 20);
    let error = Reader::open(Arc::new(file), |_| unreachable!()).err().unwrap();
    assert!(error.what().contains("gdOffset"), "{error:?}");
}

#[test]
fn directories_of_many_extents_are_bounded_together() {
    // One entry more than half of the largest directory has.
    let half = header((MAX_TABLES / 2 + 1) * 512 * 128, 128);
    let file = Arc::new(file_of(&half, 8 << 20));
    let line = format!("RW {} SPARSE \"a\"\n", half.capacity);
    let disk = |lines: &str| {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\n{lines}"
        );
        let file: Arc<MemoryDisk> = Arc::clone(&file);
        Reader::open(Arc::new(MemoryDisk::holding(text.as_bytes())), move |_| Ok(file.clone()))
    };
    assert_eq!(disk(&line).unwrap().size(), half.capacity * 512);
    let error = disk(&line.repeat(2)).err().unwrap();
    assert!(error.what().contains("capacity") && error.why().contains("too many"), "{error:?}");
}

#[test]
fn grains_of_every_size_are_read() {
    for grain in (0..=12).map(|bits| 1u64 << bits) {
        // A grain, a hole, a zeroed grain, and a grain that is cut off at the disk's end.
        let capacity = 3 * grain + grain.div_ceil(2);
        let mut header = header(capacity, grain);
        header.flags |= flag::ZEROED_GRAINS;
        let file = file_of(&header, 64 * 512 + 2 * grain * 512);
        file.write_at(&32u32.to_le_bytes(), 16 * 512).unwrap();
        let first = 64u32;
        let second = first + u32::try_from(grain).unwrap();
        let table: Vec<u8> = [first, 0, 1, second].iter().flat_map(|entry| entry.to_le_bytes()).collect();
        file.write_at(&table, 32 * 512).unwrap();
        let len = usize::try_from(grain * 512).unwrap();
        let mut data = vec![0; 2 * len];
        Random(grain).fill(&mut data);
        file.write_at(&data, 64 * 512).unwrap();
        let disk = Reader::open(Arc::new(file), |_| unreachable!()).unwrap();
        let mut read = vec![1; usize::try_from(disk.size()).unwrap()];
        disk.read_at(&mut read, 0).unwrap();
        let rest = read.len() - 3 * len;
        assert!(read[..len] == data[..len] && is_zero(&read[len..3 * len]), "grains of {grain} sectors");
        assert!(read[3 * len..] == data[len..len + rest], "the last grain of {grain} sectors");
        assert_eq!(disk.next_data(grain * 512).unwrap().unwrap().start, 3 * grain * 512);
    }
}
