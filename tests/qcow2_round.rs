//! Rounds appended to a finished qcow2 image: judged by qemu-img after each, the old image until the header is replaced
//! and again after it is put back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

mod support;
#[path = "support/images.rs"]
mod images;
#[path = "support/lay_out.rs"]
mod lay_out;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use haul::error::{Kind, Result};
use haul::image::Compress;
use haul::image::qcow2::round::{Round, live_bytes};
use haul::image::qcow2::writer::Writer;
use haul::io::batch::{Encoder, Geometry, Piece};
use haul::io::fake::MemoryDisk;
use haul::io::{DiskFile, ReadAt};
use haul::unit::{Extent, ExtentMap, to_usize};
use images::{Random, contents, seed};
use lay_out::{lay_out, place};
use support::{run, text};

const CLUSTER: u64 = 1 << 16;
const ALL: [Compress; 3] = [Compress::None, Compress::Zlib, Compress::Zstd];

/// Puts what `set` names of `disk` through `encoder` into `file`; returns the front, not yet written.
fn fill(encoder: &mut dyn Encoder, disk: &[u8], set: &ExtentMap, file: &File) -> Vec<u8> {
    let disk = MemoryDisk::holding(disk);
    let (front, length) = lay_out(encoder, &disk, set, |bytes, at| file.write_all_at(bytes, at).unwrap());
    file.set_len(length).unwrap();
    front
}

fn whole(disk: &[u8]) -> ExtentMap {
    [Extent::new(0, disk.len() as u64)].into_iter().collect()
}

fn create(path: &Path, disk: &[u8], compress: Compress) {
    let file = File::create(path).unwrap();
    let mut writer = Writer::new(disk.len() as u64, compress).unwrap();
    let front = fill(&mut writer, disk, &whole(disk), &file);
    file.write_all_at(&front, 0).unwrap();
}

fn round(path: &Path, compress: Compress, changed: ExtentMap) -> Result<Round> {
    Round::new(Arc::new(DiskFile::open(path).unwrap()), compress, changed)
}

/// qemu-img finds the image sound, without a leak, and `raw` in it.
fn assert_holds(image: &Path, raw: &Path, disk: &[u8]) {
    std::fs::write(raw, disk).unwrap();
    let report: serde_json::Value =
        serde_json::from_str(&run("qemu-img", &["check", "--output=json", "-f", "qcow2", text(image)]))
            .unwrap();
    assert!(report["leaks"].is_null() && report["corruptions"].is_null(), "{report}");
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(raw), text(image)]);
}

/// Changes some clusters of `disk`: other bytes, zeroes, or data where there was none.
fn change(disk: &mut [u8], random: &mut Random, count: u64) -> ExtentMap {
    let clusters = (disk.len() as u64).div_ceil(CLUSTER);
    let mut changed = ExtentMap::new();
    for _ in 0..count {
        let start = random.below(clusters) * CLUSTER;
        let run = Extent::new(start, (start + (1 + random.below(3)) * CLUSTER).min(disk.len() as u64));
        let bytes = &mut disk[usize::try_from(run.start).unwrap()..usize::try_from(run.end).unwrap()];
        match random.below(4) {
            0 => bytes.fill(0),
            1 => bytes.fill(7),
            _ => random.fill(bytes),
        }
        changed.insert(run);
    }
    changed
}

#[test]
fn rounds_leave_a_sound_image_of_the_changed_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (image, raw) = (dir.path().join("image.qcow2"), dir.path().join("disk.raw"));
    let mut random = Random(seed());
    for compress in ALL {
        let mut disk =
            contents((24 << 20) + 512 * usize::try_from(random.below(128)).unwrap(), random.next());
        create(&image, &disk, compress);
        for _ in 0..6 {
            let count = 1 + random.below(40);
            let changed = change(&mut disk, &mut random, count);
            let mut round = round(&image, compress, changed.clone()).unwrap();
            let file = File::options().read(true).write(true).open(&image).unwrap();
            let front = fill(&mut round, &disk, &changed, &file);
            file.write_all_at(&front, 0).unwrap();
            assert_holds(&image, &raw, &disk);
            let live = live_bytes(&DiskFile::open(&image).unwrap()).unwrap();
            assert!(live > 0 && live < image.metadata().unwrap().len());
        }
    }
}

#[test]
fn until_its_header_is_written_a_round_changes_nothing_and_the_old_header_undoes_it() {
    let dir = tempfile::tempdir().unwrap();
    let (image, raw) = (dir.path().join("image.qcow2"), dir.path().join("disk.raw"));
    let mut random = Random(seed());
    for compress in ALL {
        let before = contents(9 << 20, random.next());
        create(&image, &before, compress);
        let (old, length) = (std::fs::read(&image).unwrap(), image.metadata().unwrap().len());
        let mut disk = before.clone();
        let changed = change(&mut disk, &mut random, 20);
        let mut round = round(&image, compress, changed.clone()).unwrap();
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let front = fill(&mut round, &disk, &changed, &file);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(raw_of(&raw, &before)), text(&image)]);
        file.write_all_at(&front, 0).unwrap();
        assert_holds(&image, &raw, &disk);
        file.write_all_at(&old[..front.len()], 0).unwrap();
        file.set_len(length).unwrap();
        assert!(std::fs::read(&image).unwrap() == old);
    }
}

fn raw_of<'a>(raw: &'a Path, disk: &[u8]) -> &'a Path {
    std::fs::write(raw, disk).unwrap();
    raw
}

#[test]
fn the_tables_of_a_large_disk_grow_with_its_rounds() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    // 3 TiB: 6,144 windows, most of them empty; the disk's bytes are never all in memory.
    let size = 3u64 << 40;
    let file = File::create(&image).unwrap();
    let mut writer = Writer::new(size, Compress::None).unwrap();
    let (_, front) = writer.finish().unwrap();
    drop(front);
    let mut writer = Writer::new(size, Compress::None).unwrap();
    let mut position = writer.position();
    let (pieces, front) = writer.finish().unwrap();
    for piece in pieces {
        if let Piece::Meta(bytes) = piece {
            file.write_all_at(&bytes, position).unwrap();
            position += bytes.len() as u64;
        }
    }
    file.write_all_at(&front, 0).unwrap();
    for step in 0..3u64 {
        let at = (step << 40) + 5 * CLUSTER;
        let mut round =
            round(&image, Compress::None, [Extent::at(at, CLUSTER)].into_iter().collect()).unwrap();
        let extent = Geometry::of(size).batch_at(at);
        let cell = haul::io::batch::Cell {
            start: u32::try_from(at - extent.start).unwrap(),
            stored: u32::try_from(CLUSTER).unwrap(),
            compressed: false,
        };
        let mut position = round.position();
        let data = vec![u8::try_from(step + 1).unwrap(); to_usize(extent.len())];
        let mut write = |bytes: &[u8], at| file.write_all_at(bytes, at).unwrap();
        place(round.put(extent, &[cell]).unwrap(), &data, &mut position, &mut write);
        let (pieces, front) = round.finish().unwrap();
        place(pieces, &[], &mut position, &mut write);
        file.write_all_at(&front, 0).unwrap();
    }
    run("qemu-img", &["check", "-f", "qcow2", text(&image)]);
    let opened = haul::image::open(&image, None, &haul::image::Gate::closed()).unwrap();
    for step in 0..3u64 {
        let byte = haul::io::read_array::<1>(&*opened.disk, (step << 40) + 5 * CLUSTER).unwrap();
        assert_eq!(u64::from(byte[0]), step + 1);
    }
    assert_eq!(opened.disk.size(), size);
}

#[test]
fn an_image_of_another_shape_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    for options in [
        "compat=0.10",
        "cluster_size=4096",
        "refcount_bits=8",
        "extended_l2=on",
        "lazy_refcounts=on",
        "compression_type=zstd",
    ] {
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), "10M"]);
        let error = round(&path, Compress::Zlib, ExtentMap::new()).err().unwrap();
        assert_eq!((error.kind(), error.id()), (Kind::Image, "qcow2.round"), "{options}: {error:?}");
    }
}
