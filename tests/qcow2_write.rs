//! The forward writer's tables on images too large to fill: only tables are written, data stays a hole, and
//! qemu-img counts every reference.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

mod support;
#[path = "support/images.rs"]
mod images;

use std::fs::File;
use std::os::unix::fs::FileExt;

use haul::image::Compress;
use haul::image::qcow2::writer::{CLUSTER, Writer};
use haul::io::batch::{Cell, Encoder, Geometry, Piece};
use images::{Random, seed};
use support::{run, text};

/// Lays out a disk of `size` bytes with `cells` for each batch, checks it, and returns the image's length.
fn checked(size: u64, compress: Compress, mut cells: impl FnMut(u64) -> Vec<Cell>) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let file = File::create(&path).unwrap();
    let mut writer = Writer::new(size, compress).unwrap();
    let geometry = Geometry::of(size);
    let mut position = writer.front_len();
    let mut place = |pieces: Vec<Piece>| {
        for piece in pieces {
            position += match piece {
                Piece::Meta(bytes) => {
                    file.write_all_at(&bytes, position).unwrap();
                    bytes.len() as u64
                }
                Piece::Data(range) => range.len() as u64,
                Piece::Zeros(count) => count,
                Piece::Kept(_) => unreachable!("only a round in place keeps anything"),
            };
        }
        position
    };
    let mut start = 0;
    while start < size {
        let extent = geometry.batch_at(start);
        let pieces = writer.put(extent, &cells(start)).unwrap();
        assert_eq!(place(pieces), writer.position());
        start = extent.end;
    }
    let (pieces, front) = writer.finish().unwrap();
    let length = place(pieces);
    assert_eq!(front.len() as u64, writer.front_len());
    file.write_all_at(&front, 0).unwrap();
    file.set_len(length).unwrap();
    run("qemu-img", &["check", "-f", "qcow2", text(&path)]);
    length
}

fn plain(start: u64) -> Cell {
    Cell { start: u32::try_from(start).unwrap(), stored: u32::try_from(CLUSTER).unwrap(), compressed: false }
}

#[test]
fn refcounts_add_up_across_blocks_of_plain_clusters() {
    let size = 7 << 30;
    let length = checked(size, Compress::None, |_| (0..32).map(|i| plain(i * CLUSTER)).collect());
    assert!(length > size && length < size + (4 << 20), "{length}");
}

#[test]
fn refcounts_add_up_however_compressed_and_plain_clusters_mix() {
    let mut random = Random(seed());
    let length = checked(9 << 30, Compress::Zstd, |_| {
        (0..32)
            .filter_map(|i| match random.below(8) {
                0 => None,
                1 => Some(plain(i * CLUSTER)),
                2 => Some(Cell { stored: 20, compressed: true, ..plain(i * CLUSTER) }),
                _ => {
                    let stored = u32::try_from(random.below(65_000) + 20).unwrap();
                    Some(Cell { stored, compressed: true, ..plain(i * CLUSTER) })
                }
            })
            .collect()
    });
    assert!(length > 3 << 30, "{length}");
}

#[test]
fn the_tables_of_a_huge_disk_hold_what_little_is_on_it() {
    let size = 40 << 40;
    let length = checked(size, Compress::None, |start| {
        if start % (1 << 40) == 0 { vec![plain(3 * CLUSTER)] } else { Vec::new() }
    });
    assert!(length < 32 << 20, "{length}");
}
