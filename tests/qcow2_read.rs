//! qcow2 images made by QEMU's tools, read by haul, judged by QEMU's tools.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/images.rs"]
mod images;
#[path = "support/qcow2_rs.rs"]
mod qcow2_rs;
#[path = "support/reads.rs"]
mod reads;

use std::path::Path;
use std::sync::Arc;

use haul::error::Kind;
use haul::image::{self, Format, Gate, Image, compare};
use haul::io::fake::{FaultyDisk, MemoryDisk};
use haul::io::{DataOf, DiskFile, ReadAt, is_zero};
use haul::unit::Extent;
use haul::unit::extents::collect;
use images::{Bench, Random, arg, as_qemu_reads, run};
use reads::assert_reads;

const MIB: usize = 1 << 20;

fn open(path: &Path) -> Image {
    image::open(path, None, &Gate::closed()).unwrap()
}

/// Bytes of the `cluster`-sized pieces of `bytes` that are not all zero.
fn live(bytes: &[u8], cluster: usize) -> u64 {
    bytes.chunks(cluster).filter(|piece| !is_zero(piece)).map(|piece| piece.len() as u64).sum()
}

#[test]
fn every_kind_of_image_qemu_writes_reads_as_its_source() {
    let bench = Bench::new(101 * MIB + 512, 11);
    let small = Bench::new(9 * MIB + 512, 12);
    let cases = [
        (&bench, "compat=0.10", false, 65_536),
        (&bench, "compat=1.1", false, 65_536),
        (&small, "compat=0.10", true, 65_536),
        (&bench, "compat=1.1", true, 65_536),
        (&bench, "compression_type=zstd", true, 65_536),
        (&bench, "cluster_size=2M", false, 2 * MIB),
        (&bench, "cluster_size=2M", true, 2 * MIB),
        (&bench, "cluster_size=2M,compression_type=zstd", true, 2 * MIB),
        (&bench, "cluster_size=4k", false, 4096),
        (&small, "cluster_size=4k", true, 4096),
        (&small, "cluster_size=4k,compression_type=zstd", true, 4096),
        (&bench, "extended_l2=on", false, 65_536),
        (&small, "extended_l2=on,cluster_size=16k", false, 16_384),
        (&small, "extended_l2=on,cluster_size=2M", true, 2 * MIB),
        (&bench, "extended_l2=on,compression_type=zstd", true, 65_536),
        (&small, "refcount_bits=1", false, 65_536),
        (&small, "refcount_bits=64,lazy_refcounts=on", false, 65_536),
        (&small, "cluster_size=512,compat=0.10", false, 512),
        (&small, "cluster_size=512", true, 512),
        (&small, "cluster_size=512,compression_type=zstd", true, 512),
    ];
    for (bench, options, compressed, cluster) in cases {
        println!("{options} compressed={compressed}");
        let path = bench.convert("a.qcow2", options, if compressed { &["-c"] } else { &[] });
        let image = open(&path);
        assert_eq!(image.format, Format::Qcow2);
        let info = image.info.qcow2().unwrap().clone();
        assert_eq!((info.cluster_size, info.dirty, info.corrupt), (cluster as u64, false, false));
        let data = assert_reads(&*image.disk, &bench.bytes);
        // qemu-img looks for zeroes in pieces of 4 KiB.
        let live = live(&bench.bytes, cluster.max(4096));
        assert!(data.bytes() <= live, "{} bytes called data, {live} live", data.bytes());
        // qcow2-rs overflows on clusters of 512 bytes too.
        if !options.contains("zstd") && !options.contains("extended_l2") && cluster > 512 {
            let disk = &image.disk;
            let mut ours = vec![0; usize::try_from(qcow2_rs::PIECE).unwrap()];
            let size = qcow2_rs::read_all(&path, |at, theirs| {
                let ours = &mut ours[..theirs.len()];
                disk.read_at(ours, at).unwrap();
                assert!(ours == theirs, "qcow2-rs reads {at} otherwise");
            });
            assert_eq!(size, disk.size());
        }
    }
}

#[test]
fn sizes_at_the_edge_are_read() {
    for size in [0, 512, 65_536, 65_536 + 512, 512 * MIB] {
        for options in ["compat=0.10", "cluster_size=512", "cluster_size=2M", "extended_l2=on"] {
            if size == 512 * MIB && options == "cluster_size=512" {
                continue;
            }
            let bench = Bench::new(if size == 512 * MIB { 0 } else { size }, 3);
            let path = bench.path("a.qcow2");
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, arg(&path), &size.to_string()]);
            let image = open(&path);
            assert_eq!(
                (image.disk.size(), image.disk.next_data(0).unwrap()),
                (size as u64, None),
                "{options}"
            );
            if size == bench.bytes.len() {
                assert_reads(&*image.disk, &vec![0; size]);
                let path = bench.convert("b.qcow2", options, &[]);
                assert_reads(&*open(&path).disk, &bench.bytes);
            }
        }
    }
}

/// Writes, zeroes, discards and compressed writes in small pieces, so that clusters and subclusters of every state
/// lie side by side; then what QEMU reads.
#[test]
fn clusters_of_every_state_are_told_apart() {
    for options in
        ["compat=0.10", "compat=1.1", "cluster_size=4k", "extended_l2=on", "extended_l2=on,cluster_size=16k"]
    {
        let bench = Bench::new(0, 0);
        let path = bench.path("a.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, arg(&path), "9M"]);
        let mut random = Random(options.len() as u64);
        // QEMU compresses only what was never written.
        let compressed = (0..48).map(|i| format!("write -c -P {i} {} 65536", i * 3 * 65_536));
        let mut commands: Vec<String> = compressed.collect();
        for i in 0..120 {
            let (at, len) = (random.below(9 * 2048 - 400) * 512, (random.below(300) + 1) * 512);
            commands.push(match random.below(4) {
                0 if !options.contains("0.10") => format!("write -z {at} {len}"),
                1 if !options.contains("0.10") => format!("write -z -u {at} {len}"),
                2 => format!("discard {at} {len}"),
                _ => format!("write -P {i} {at} {len}"),
            });
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        bench.io(&path, &commands);
        assert_reads(&*open(&path).disk, &as_qemu_reads(&path));
    }
}

#[test]
fn a_dirty_image_with_lazy_refcounts_is_read() {
    let bench = Bench::new(0, 0);
    let path = bench.path("a.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", arg(&path), "10M"]);
    let commands = ["-f", "qcow2", "-c", "write -P 5 1M 3M", "-c", "flush", "-c", "abort", arg(&path)];
    assert!(!images::output("qemu-io", &commands).status.success(), "qemu-io was to be killed");
    let image = open(&path);
    assert!(image.info.qcow2().unwrap().clone().dirty);
    let mut expected = vec![0; 10 * MIB];
    expected[MIB..4 * MIB].fill(5);
    assert_reads(&*image.disk, &expected);
}

#[test]
fn snapshots_are_listed_and_the_active_disk_is_read() {
    let bench = Bench::new(3 * MIB, 4);
    let path = bench.convert("a.qcow2", "compat=1.1", &["-c"]);
    run("qemu-img", &["snapshot", "-c", "before", arg(&path)]);
    bench.io(&path, &["write -P 77 100k 1M"]);
    run("qemu-img", &["snapshot", "-c", "after the \u{1b}[31mchange", arg(&path)]);
    bench.io(&path, &["write -P 78 200k 10k"]);
    let image = open(&path);
    let snapshots = image.info.qcow2().unwrap().clone().snapshots;
    let names: Vec<_> = snapshots.iter().map(|s| (s.id.as_str(), s.name.as_str())).collect();
    assert_eq!(names, [("1", "before"), ("2", "after the \\u{1b}[31mchange")]);
    assert!(snapshots[0].taken > 1_700_000_000);
    assert_reads(&*image.disk, &as_qemu_reads(&path));
}

#[test]
fn a_preallocated_image_has_data_only_where_its_file_has() {
    let bench = Bench::new(0, 0);
    let path = bench.path("a.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", arg(&path), "64M"]);
    bench.io(&path, &["write -P 1 5M 1M"]);
    let mut expected = vec![0; 64 * MIB];
    expected[5 * MIB..6 * MIB].fill(1);
    let data = assert_reads(&*open(&path).disk, &expected);
    assert!(data.bytes() < 2 * MIB as u64, "{data:?}");
}

#[test]
fn a_backing_file_is_opened_only_when_named() {
    for format in ["raw", "qcow2"] {
        // The base is shorter than the image, and its end is inside a cluster.
        let bench = Bench::new(5 * MIB + 512, 5);
        let base = match format {
            "raw" => bench.raw.clone(),
            _ => bench.convert("base.qcow2", "cluster_size=4k", &["-c"]),
        };
        let (mid, top) = (bench.path("mid.qcow2"), bench.path("top.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", format, "-b", arg(&base), arg(&mid), "7M"]);
        bench.io(&mid, &["write -P 1 1M 100k", "write -z 2M 64k"]);
        let options = "extended_l2=on";
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b", arg(&mid), arg(&top)],
        );
        bench.io(&top, &["write -P 2 1000k 8k", "write -P 3 6M 10k"]);

        let error = image::open(&top, None, &Gate::closed()).err().unwrap();
        assert_eq!((error.kind(), error.id()), (Kind::Image, "image.backing-not-named"));
        assert!(error.what().contains(arg(&mid)) && error.what_to_do().contains("--backing"), "{error:?}");
        let error = image::open(&top, None, &Gate::closed().backing(&mid)).err().unwrap();
        assert!(error.what().contains(arg(&base)), "{error:?}");
        assert!(image::open(&top, None, &Gate::closed().data_file(&mid).data_file(&base)).is_err());

        let gate = Gate::closed().backing(&base).backing(&mid);
        let image = image::open(&top, None, &gate).unwrap();
        let data = assert_reads(&*image.disk, &as_qemu_reads(&top));
        assert!(data.bytes() < 6 * MIB as u64);
        let raw = bench.path("top.raw");
        run("qemu-img", &["convert", "-O", "raw", arg(&top), arg(&raw)]);
        let judged = compare(&*image.disk, &DiskFile::open(&raw).unwrap(), &Default::default()).unwrap();
        assert!(judged.same());
    }
}

#[test]
fn an_image_that_backs_itself_is_an_error() {
    let bench = Bench::new(0, 0);
    let (path, other) = (bench.path("a.qcow2"), bench.path("b.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", arg(&other), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", arg(&other), arg(&path)]);
    run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", arg(&path), arg(&path)]);
    let error = image::open(&path, None, &Gate::closed().backing(&path)).err().unwrap();
    assert_eq!(error.id(), "image.backing-not-named");
}

#[test]
fn an_external_data_file_is_opened_only_when_named() {
    for raw in ["on", "off"] {
        let bench = Bench::new(4 * MIB, 6);
        let (path, data) = (bench.path("a.qcow2"), bench.path("a.data"));
        let options = format!("data_file={},data_file_raw={raw}", arg(&data));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, arg(&path), "4M"]);
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "qcow2", arg(&bench.raw), arg(&path)]);
        let error = image::open(&path, None, &Gate::closed()).err().unwrap();
        assert_eq!(error.id(), "image.data-file-not-named");
        assert!(error.what().contains(arg(&data)));
        let image = image::open(&path, None, &Gate::closed().data_file(&data)).unwrap();
        assert_reads(&*image.disk, &bench.bytes);
    }
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let bench = Bench::new(MIB, 7);
    let luks = bench.path("luks.qcow2");
    let secret = "secret,id=s,data=abc";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    run("qemu-img", &["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, arg(&luks), "1M"]);
    let damaged = |bit: u32, name: &str| {
        let path = bench.convert(name, "compat=1.1", &[]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[72..80].copy_from_slice(&(1u64 << bit).to_be_bytes());
        std::fs::write(&path, bytes).unwrap();
        path
    };
    for (path, id, says) in [
        (luks, "qcow2.encrypted", "LUKS"),
        (damaged(1, "corrupt"), "qcow2.corrupt", "corrupt bit"),
        (damaged(40, "unknown"), "qcow2.unknown-feature", "bit 40"),
        (damaged(5, "next"), "qcow2.unknown-feature", "bit 5"),
    ] {
        let error = image::open(&path, None, &Gate::closed()).err().unwrap();
        assert_eq!((error.kind(), error.id()), (Kind::Image, id));
        assert!(error.why().contains(says), "{error:?}");
        // The facts can still be had.
        let info = image::inspect(&DiskFile::open(&path).unwrap(), None).unwrap().qcow2().unwrap().clone();
        assert_eq!(info.encryption.is_some(), id == "qcow2.encrypted");
        assert_eq!(info.corrupt, id == "qcow2.corrupt");
        assert_eq!(info.unknown_features.len(), usize::from(id == "qcow2.unknown-feature"));
    }
}

#[test]
fn a_format_given_is_not_guessed() {
    let bench = Bench::new(MIB, 8);
    let path = bench.convert("a.qcow2", "compat=1.1", &[]);
    let raw = image::open(&path, Some(Format::Raw), &Gate::closed()).unwrap();
    assert_reads(&*raw.disk, &std::fs::read(&path).unwrap());
    let error = image::open(&bench.raw, Some(Format::Qcow2), &Gate::closed()).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Image, "qcow2.field"));
    assert_eq!(image::open(&bench.raw, None, &Gate::closed()).unwrap().format, Format::Raw);
    let json = serde_json::to_value(open(&path).info).unwrap();
    assert_eq!((&json["format"], &json["qcow2"]["compression"]), (&"qcow2".into(), &"zlib".into()));
}

#[test]
fn holes_cost_no_reading() {
    let bench = Bench::new(0, 0);
    let path = bench.path("a.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", arg(&path), "16T"]);
    bench.io(&path, &["write -P 1 9T 64k", "write -z 10T 1G"]);
    let file = MemoryDisk::holding(&std::fs::read(&path).unwrap());
    let counted = Arc::new(FaultyDisk::new(file, Vec::new()));
    let image = image::open_on(counted.clone(), None, &Gate::closed()).unwrap();
    let data = collect(&DataOf(&*image.disk), Extent::new(0, u64::MAX)).unwrap();
    assert_eq!(data.iter().collect::<Vec<_>>(), [Extent::at(9 << 40, 65_536)]);
    assert!(counted.bytes_read() < 16 << 20, "{} bytes", counted.bytes_read());
}
