//! VMDK images made by QEMU's tools and read by haul, and written by haul and read by QEMU's tools, 7-Zip and libvmdk.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/images.rs"]
mod images;
#[path = "support/lay_out.rs"]
mod lay_out;
#[path = "support/reads.rs"]
mod reads;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use haul::error::{Error, Kind, Result};
use haul::image::vmdk::writer::{Sparse, StreamOptimized};
use haul::image::vmdk::{self, Metadata, Reader};
use haul::image::{Gate, compare};
use haul::io::batch::{Encoder, Geometry, RawBatch};
use haul::io::fake::{FaultyDisk, MemoryDisk};
use haul::io::{AlignedBuf, DataOf, DiskFile, ReadAt, WriteAt, is_zero};
use haul::unit::extents::collect;
use haul::unit::{Extent, to_usize};
use images::{Bench, Random, arg, as_qemu_reads, run};
use lay_out::place;
use reads::{assert_reads, file};

const MIB: usize = 1 << 20;
const GIB: u64 = 1 << 30;

fn open(path: &Path) -> Reader {
    vmdk::open(file(path), &mut Gate::closed()).unwrap()
}

fn refused(path: &Path, gate: &mut Gate) -> Error {
    vmdk::open(file(path), gate).err().unwrap()
}

/// The disk `raw` as a VMDK image made by qemu-img, and the extent files beside it, in order.
fn convert(raw: &Path, name: &str, options: &str) -> (PathBuf, Vec<PathBuf>) {
    let path = raw.with_file_name(format!("{name}.vmdk"));
    run("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", "-o", options, arg(raw), arg(&path)]);
    let prefix = format!("{name}-");
    let mut extents: Vec<_> = fs::read_dir(raw.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&prefix))
        .collect();
    extents.sort();
    (path, extents)
}

fn gate(extents: &[PathBuf]) -> Gate {
    extents.iter().fold(Gate::closed(), |gate, path| gate.extent(path))
}

/// A sparse file with `data` (offset, bytes) in it.
fn sparse_file(path: &Path, size: u64, data: &[(u64, usize)]) {
    let raw = File::create(path).unwrap();
    raw.set_len(size).unwrap();
    let mut random = Random(size);
    for (at, len) in data {
        let mut bytes = vec![0; *len];
        random.fill(&mut bytes);
        raw.write_all_at(&bytes, *at).unwrap();
    }
}

fn same(a: &dyn ReadAt, b: &dyn ReadAt) {
    let judged = compare(a, b, &Default::default()).unwrap();
    assert!(judged.same() && judged.sizes.0 == judged.sizes.1, "{judged:?}");
}

/// Bytes of the grains of `bytes` that are not all zero.
fn live(bytes: &[u8]) -> u64 {
    bytes.chunks(65_536).filter(|grain| !is_zero(grain)).map(|grain| grain.len() as u64).sum()
}

#[test]
fn every_kind_of_image_qemu_writes_reads_as_its_source() {
    let large = Bench::new(101 * MIB + 512, 31);
    let small = Bench::new(9 * MIB + 512, 32);
    for (bench, options, grains) in [
        (&large, "subformat=monolithicSparse", true),
        (&small, "subformat=monolithicSparse,adapter_type=lsilogic,hwversion=10", true),
        (&small, "subformat=monolithicSparse,zeroed_grain=on", true),
        (&small, "subformat=monolithicFlat", false),
        (&large, "subformat=streamOptimized", true),
        (&small, "subformat=twoGbMaxExtentSparse", true),
        (&small, "subformat=twoGbMaxExtentFlat", false),
    ] {
        println!("{options}");
        let (path, extents) = convert(&bench.raw, "a", options);
        assert!(vmdk::probe(&*file(&path)).unwrap());
        let disk = vmdk::open(file(&path), &mut gate(&extents)).unwrap();
        let data = assert_reads(&disk, &bench.bytes).bytes();
        if grains {
            assert!(data <= live(&bench.bytes), "{data} bytes called data");
        }
        let info = Metadata::read(&*file(&path)).unwrap().info();
        assert!(options.contains(&info.create_type), "{info:?}");
        assert_eq!(info.compressed, options.contains("stream"));
        assert_eq!(info.extents.len(), extents.len());
        let adapter = if options.contains("lsilogic") { ("lsilogic", "10") } else { ("ide", "4") };
        assert_eq!(
            (info.adapter_type.as_deref(), info.hardware_version.as_deref()),
            (Some(adapter.0), Some(adapter.1))
        );
        extents.iter().for_each(|extent| fs::remove_file(extent).unwrap());
    }
}

#[test]
fn disks_of_several_extents_are_put_together() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    // Data at the start, across both borders between extents, and at the end.
    let border = 2047 * MIB as u64;
    let ends = [0, border - 100_000, 2 * border - 512, 5 * GIB - 1024];
    sparse_file(&raw, 5 * GIB - 512, &ends.map(|at| (at, 200_000.min(to_usize(5 * GIB - 512 - at)))));
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let (path, extents) = convert(&raw, subformat, &format!("subformat={subformat}"));
        assert_eq!(extents.len(), 3, "{extents:?}");
        let disk = vmdk::open(file(&path), &mut gate(&extents)).unwrap();
        same(&disk, &*file(&raw));
        let data = collect(&DataOf(&disk), Extent::new(0, u64::MAX)).unwrap();
        assert!(data.bytes() < 2 << 20, "{data:?}");
        // A read over the border of two extents.
        let mut both = [vec![0; 300_000], vec![1; 300_000]];
        disk.read_at(&mut both[0], border - 150_000).unwrap();
        file(&raw).read_at(&mut both[1], border - 150_000).unwrap();
        assert!(both[0] == both[1]);

        let error = refused(&path, &mut Gate::closed());
        assert_eq!((error.kind(), error.id()), (Kind::Image, "image.extent-not-named"));
        assert!(error.what_to_do().contains("--extent"), "{error:?}");
        let error = refused(&path, &mut gate(&extents[..2]));
        assert!(error.what().contains(extents[2].file_name().unwrap().to_str().unwrap()), "{error:?}");
        // The wrong file under the right name.
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir_all(&elsewhere).unwrap();
        let wrong = elsewhere.join(extents[0].file_name().unwrap());
        fs::write(&wrong, b"nothing").unwrap();
        let error = refused(&path, &mut gate(&[&[wrong], &extents[1..]].concat()));
        assert_eq!(error.id(), "vmdk.field");
    }
}

/// A descriptor of `lines` for a disk of type `create_type`.
fn descriptor(create_type: &str, lines: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n\n\
         # Extent description\n{lines}\n\nddb.adapterType = \"lsilogic\"\n"
    )
}

#[test]
fn the_flat_disks_of_esx_are_read_and_zero_extents_are_holes() {
    let bench = Bench::new(3 * MIB, 33);
    let (path, flat) = (bench.path("vm.vmdk"), bench.path("vm-flat.vmdk"));
    fs::copy(&bench.raw, &flat).unwrap();
    let sectors = 3 * MIB / 512;
    fs::write(&path, descriptor("vmfs", &format!("RW {sectors} VMFS \"vm-flat.vmdk\""))).unwrap();
    assert!(vmdk::probe(&*file(&path)).unwrap());
    assert_reads(&vmdk::open(file(&path), &mut Gate::closed().extent(&flat)).unwrap(), &bench.bytes);

    // The end of the file, zeroes, then its start.
    let lines = format!(
        "RW {} FLAT \"vm-flat.vmdk\" 2048\nRW 4096 ZERO\nRDONLY 0 ZERO\nRW 2048 FLAT \"b\" 0",
        sectors - 2048
    );
    fs::write(&path, descriptor("twoGbMaxExtentFlat", &lines)).unwrap();
    let b = bench.path("b");
    fs::copy(&flat, &b).unwrap();
    let disk = vmdk::open(file(&path), &mut gate(&[b, flat])).unwrap();
    let expected = [&bench.bytes[MIB..], &vec![0; 2 * MIB], &bench.bytes[..MIB]].concat();
    let data = assert_reads(&disk, &expected).bytes();
    assert!(data <= 3 * MIB as u64, "{data}");
}

#[test]
fn extents_that_do_not_fit_their_file_are_errors() {
    let bench = Bench::new(MIB, 34);
    let (path, flat) = (bench.path("vm.vmdk"), bench.path("vm-flat.vmdk"));
    fs::copy(&bench.raw, &flat).unwrap();
    for line in [
        "RW 2049 FLAT \"vm-flat.vmdk\"",
        "RW 2048 FLAT \"vm-flat.vmdk\" 1",
        "RW 1 FLAT \"vm-flat.vmdk\" 18446744073709551615",
        "RW 2048 SPARSE \"vm-flat.vmdk\"",
    ] {
        fs::write(&path, descriptor("monolithicFlat", line)).unwrap();
        let error = refused(&path, &mut Gate::closed().extent(&flat));
        assert_eq!((error.kind(), error.id()), (Kind::Image, "vmdk.field"), "{line}");
    }
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let bench = Bench::new(MIB, 35);
    let (base, _) = convert(&bench.raw, "base", "subformat=monolithicSparse");
    let delta = bench.path("delta.vmdk");
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", arg(&base), arg(&delta)]);
    let text = |name: &str, create_type: &str, line: &str| {
        let path = bench.path(name);
        fs::write(&path, descriptor(create_type, line)).unwrap();
        path
    };
    let cowd = bench.path("cowd.vmdk");
    fs::write(&cowd, [b"COWD".as_slice(), &[0; 2044]].concat()).unwrap();
    let (_, extents) = convert(&bench.raw, "split", "subformat=twoGbMaxExtentSparse");
    let hinted = text("hinted", "vmfs", "parentFileNameHint=\"x.vmdk\"\nRW 1 ZERO");
    for (path, id, says) in [
        (&delta, "vmdk.delta", arg(&base)),
        (&hinted, "vmdk.delta", "x.vmdk"),
        (&text("a", "vmfsSparse", "RW 2048 ZERO"), "vmdk.create-type", "vmfsSparse"),
        (&text("b", "fullDevice", "RW 2048 FLAT \"x\""), "vmdk.create-type", "fullDevice"),
        (&text("c", "vmfs", "RW 2048 VMFSSPARSE \"x\""), "vmdk.extent-type", "VMFSSPARSE"),
        (&text("d", "vmfs", "RW 2048 VMFSRDM \"x\""), "vmdk.extent-type", "VMFSRDM"),
        (&text("e", "vmfs", "NOACCESS 2048 VMFS \"x\""), "vmdk.no-access", "NOACCESS"),
        (&text("f", "vmfs", "RW 1 VMFS \"../disk.raw\""), "vmdk.extent-path", "../disk.raw"),
        (&text("g", "vmfs", "RW 1 VMFS \"/etc/shadow\""), "vmdk.extent-path", "/etc/shadow"),
        (&text("h", "vmfs", "RW 1 VMFS \"..\""), "vmdk.extent-path", ".."),
        (&text("i", "vmfs", "RW 1 VMFS \"c:\\x\""), "vmdk.extent-path", "c:"),
        (&cowd, "vmdk.cowd", "COWD"),
        (&extents[0], "vmdk.extent-alone", "descriptor"),
    ] {
        assert!(vmdk::probe(&*file(path)).unwrap());
        let error = refused(path, &mut Gate::closed().extent(&bench.raw).extent("/etc/shadow"));
        assert_eq!((error.kind(), error.id()), (Kind::Image, id), "{error:?}");
        assert!(error.why().contains(says), "{says}: {error:?}");
    }
    // The facts can still be had.
    let info = Metadata::read(&*file(&delta)).unwrap().info();
    assert_eq!(info.parent.as_deref(), Some(arg(&base)));
    assert!(!vmdk::probe(&*file(&bench.raw)).unwrap());
    assert_eq!(refused(&bench.raw, &mut Gate::closed()).id(), "vmdk.field");
    // A COWD file behind a descriptor.
    let path = text("j", "twoGbMaxExtentSparse", "RW 2048 SPARSE \"cowd.vmdk\"");
    assert_eq!(refused(&path, &mut Gate::closed().extent(&cowd)).id(), "vmdk.cowd");
}

#[test]
fn zeroed_grains_read_as_zeroes() {
    let bench = Bench::new(0, 0);
    let path = bench.path("a.vmdk");
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on", arg(&path), "9M"]);
    let commands = [
        "-c",
        "write -P 1 0 1M",
        "-c",
        "write -z 64k 128k",
        "-c",
        "write -z 4M 1M",
        "-c",
        "write -P 2 5M 1k",
    ];
    run("qemu-io", &[&["-f", "vmdk"], &commands[..], &[arg(&path)]].concat());
    let data = assert_reads(&open(&path), &as_qemu_reads(&path)).bytes();
    assert_eq!(data, (16 - 2 + 1) * 65_536);
    // Without the flag an entry of 1 is a grain over the descriptor.
    let mut bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[8], 7);
    bytes[8] = 3;
    let disk = Reader::open(Arc::new(MemoryDisk::holding(&bytes)), |_| unreachable!()).unwrap();
    let error = disk.read_at(&mut [0; 512], 64 * 1024).unwrap_err();
    assert!(error.what().contains("grain table entry") && error.why().contains("overlaps"), "{error:?}");
}

#[test]
fn holes_cost_no_reading() {
    let bench = Bench::new(0, 0);
    let path = bench.path("a.vmdk");
    run("qemu-img", &["create", "-q", "-f", "vmdk", arg(&path), "2000G"]);
    run("qemu-io", &["-f", "vmdk", "-c", "write -P 1 1000G 64k", arg(&path)]);
    let counted = Arc::new(FaultyDisk::new(DiskFile::open(&path).unwrap(), Vec::new()));
    let disk = Reader::open(counted.clone(), |_| unreachable!()).unwrap();
    let data = collect(&DataOf(&disk), Extent::new(0, u64::MAX)).unwrap();
    assert_eq!(data.iter().collect::<Vec<_>>(), [Extent::at(1000 << 30, 65_536)]);
    assert!(counted.bytes_read() < 1 << 20, "{} bytes", counted.bytes_read());
}

/// What must be wrong for an error: a place in the image and what to write there.
type Damage = (u64, Vec<u8>);

fn assert_damage_is_named(image: &[u8], damage: &Damage, field: &str, offset: u64, says: &str) {
    let file = MemoryDisk::holding(image);
    file.write_at(&damage.1, damage.0).unwrap();
    let opened = Reader::open(Arc::new(file), |_| unreachable!());
    let error = opened.and_then(|disk| disk.read_at(&mut vec![0; to_usize(disk.size())], 0)).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Image, "vmdk.field"), "{error:?}");
    let what = format!("memory disk: VMDK field `{field}` at offset {offset} is malformed");
    assert!(error.what() == what && error.why().contains(says), "{what}: {says}: {error:?}");
}

#[test]
fn every_bad_entry_of_a_sparse_extent_is_named_with_its_offset() {
    let bench = Bench::new(40 * MIB, 36);
    let image = fs::read(convert(&bench.raw, "a", "subformat=monolithicSparse").0).unwrap();
    let word = |at: u64| u32::from_le_bytes(image[to_usize(at)..to_usize(at) + 4].try_into().unwrap());
    let directory = u64::from(word(56)) * 512;
    let (first, second) = (word(directory), word(directory + 4));
    let table = u64::from(first) * 512;
    let used = (0..512).find(|i| word(table + i * 4) != 0).unwrap();
    let end = u32::try_from(image.len() / 512).unwrap();
    let put = |at: u64, value: u32| (at, value.to_le_bytes().to_vec());
    let extent = image.windows(3).position(|text| text == b"RW ").unwrap() as u64;
    let entry = directory + 4;
    let grain = table + used * 4;
    for (damage, field, offset, says) in [
        (put(12, word(12) + 128), "capacity", 12, "contradicts the descriptor"),
        (put(12, word(12) - 1), "capacity", 12, "contradicts the descriptor"),
        (put(28, end - 19), "descriptorOffset", 28, "beyond the end"),
        (put(56, end), "gdOffset", 56, "beyond the end"),
        (put(56, 20), "gdOffset", 56, "overlaps"),
        (put(entry, end - 3), "grain directory entry", entry, "beyond the end"),
        (put(entry, 0xffff_ffff), "grain directory entry", entry, "beyond the end"),
        (put(entry, 17), "grain directory entry", entry, "overlaps header"),
        (
            put(entry, u32::try_from(directory / 512).unwrap() - 3),
            "grain directory entry",
            entry,
            "overlaps header",
        ),
        (put(entry, first), "grain directory entry", entry, "overlaps another one"),
        (put(directory, second + 3), "grain directory entry", directory, "overlaps another one"),
        (put(grain, end - 127), "grain table entry", grain, "beyond the end"),
        (put(grain, 0xffff_ffff), "grain table entry", grain, "beyond the end"),
        (put(grain, 1), "grain table entry", grain, "overlaps header"),
        ((extent, b"RW 1".to_vec()), "capacity", 12, "contradicts"),
        ((extent, b"RX".to_vec()), "descriptor", extent, "no extent"),
    ] {
        assert_damage_is_named(&image, &damage, field, offset, says);
    }
}

#[test]
fn every_bad_part_of_a_stream_is_named_with_its_offset() {
    let bench = Bench::new(40 * MIB, 37);
    let mut image = Vec::new();
    write(&MemoryDisk::holding(&bench.bytes), stream, |bytes, at| {
        image.resize(image.len().max(to_usize(at) + bytes.len()), 0);
        image[to_usize(at)..to_usize(at) + bytes.len()].copy_from_slice(bytes);
    });
    let end = image.len() as u64;
    let footer = end - 1024;
    let first = 65_536;
    for (damage, field, offset, says) in [
        ((end - 1536 + 12, vec![2]), "footer marker", end - 1536, "cut off"),
        ((footer, vec![0]), "magicNumber", footer, "no header"),
        ((footer + 12, vec![1]), "capacity", footer + 12, "differ"),
        ((footer + 20, vec![64]), "grainSize", footer + 20, "differ"),
        ((footer + 8, vec![0]), "flags", footer + 8, "differ"),
        ((footer + 56, vec![0xff; 8]), "gdOffset", footer + 56, "does not say"),
        ((footer + 58, vec![0xff]), "gdOffset", footer + 56, "beyond the end"),
        ((end - 512 + 12, vec![3]), "end-of-stream marker", end - 512, "cut off"),
        ((first, vec![1]), "grain", first, "marker is that of sector"),
        ((first + 8, vec![0; 4]), "grain", first, "0 compressed bytes"),
        ((first + 8, vec![0, 0, 2, 0]), "grain", first, "131072 compressed bytes"),
        ((first + 12, vec![0, 0, 0, 0]), "grain", first, "no zlib stream"),
    ] {
        assert_damage_is_named(&image, &damage, field, offset, says);
    }
    for cut in [512, 1024, 1536, end - 65_536] {
        let cut = MemoryDisk::holding(&image[..to_usize(end - cut)]);
        let error = Reader::open(Arc::new(cut), |_| unreachable!()).err().unwrap();
        assert!(error.what().contains("footer marker"), "{error:?}");
    }
}

/// Makes an encoder for a disk of so many bytes.
type Make = fn(u64) -> Result<Box<dyn Encoder>>;

/// Lays `disk` out as the pipeline and a sink do, and hands each piece of the image to `write` with its offset; the
/// front comes last. A second encoder, given nothing but the cells, must stand at the same places.
fn write(disk: &dyn ReadAt, make: Make, mut write: impl FnMut(&[u8], u64)) -> u64 {
    let geometry = Geometry::of(disk.size());
    let (mut encoder, mut replayed) = (make(disk.size()).unwrap(), make(disk.size()).unwrap());
    assert!(encoder.cells_matter());
    let mut packer = encoder.packer().unwrap();
    let mut position = encoder.front_len();
    let mut from = 0;
    while let Some(data) = disk.next_data(from).unwrap() {
        let extent = geometry.batch_at(data.start);
        let mut buf = AlignedBuf::new(to_usize(geometry.batch()));
        disk.read_at(&mut buf[..to_usize(extent.len())], extent.start).unwrap();
        let batch = packer.pack(RawBatch::new(extent, buf).hash(&geometry)).unwrap();
        let pieces = encoder.put(batch.extent, &batch.cells).unwrap();
        place(pieces, &batch.buf, &mut position, &mut write);
        assert_eq!(position, encoder.position());
        assert!(batch.buf.len() as u64 >= geometry.batch(), "the buffer is too small to read into");
        replayed.put(batch.extent, &batch.cells).unwrap();
        assert_eq!(replayed.position(), encoder.position());
        from = extent.end;
    }
    let finished = encoder.finish().unwrap();
    assert_eq!(replayed.finish().unwrap(), finished);
    let (pieces, front) = finished;
    place(pieces, &[], &mut position, &mut write);
    assert_eq!(position, encoder.position());
    assert_eq!(front.len() as u64, encoder.front_len());
    write(&front, 0);
    position
}

/// The disk `raw` as an image at `path`.
fn write_file(raw: &Path, path: &Path, make: Make) {
    let image = File::create(path).unwrap();
    let disk = DiskFile::open(raw).unwrap();
    let length = write(&disk, make, |bytes, at| image.write_all_at(bytes, at).unwrap());
    assert_eq!(image.metadata().unwrap().len(), length);
}

fn stream(size: u64) -> Result<Box<dyn Encoder>> {
    Ok(Box::new(StreamOptimized::new(size, "disk.vmdk")?))
}

fn sparse(size: u64) -> Result<Box<dyn Encoder>> {
    Ok(Box::new(Sparse::new(size, "disk.vmdk")?))
}

/// An image mounted by libvmdk; unmounted when dropped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(image: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        run("vmdkmount", &[arg(image), arg(dir.path())]);
        Mounted(dir)
    }

    fn disk(&self) -> PathBuf {
        self.0.path().join("vmdk1")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a process another test just starts may hold a file open between fork and exec.
        let _ = images::output("umount", &["-l", arg(self.0.path())]);
    }
}

/// QEMU, 7-Zip and libvmdk take `image`, which is called disk.vmdk as its descriptor says, for the disk `raw`.
fn judge(image: &Path, raw: &Path) {
    run("qemu-img", &["check", "-q", "-f", "vmdk", arg(image)]);
    let compared = run("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", arg(raw), arg(image)]).stdout;
    assert_eq!(String::from_utf8(compared).unwrap(), "Images are identical.\n");
    let size = raw.metadata().unwrap().len();
    let listed = String::from_utf8(run("7zz", &["l", "-slt", arg(image)]).stdout).unwrap();
    assert!(listed.lines().any(|line| line == format!("Size = {size}")), "{listed}");
    assert!(!listed.contains("ERROR") && !listed.contains("WARNING"), "{listed}");
    let info = String::from_utf8(run("vmdkinfo", &[arg(image)]).stdout).unwrap();
    assert!(info.contains(&format!("{size} bytes")), "{info}");
    let disk = DiskFile::open(raw).unwrap();
    let mounted = Mounted::new(image);
    let theirs = File::open(mounted.disk()).unwrap();
    assert_eq!(theirs.metadata().unwrap().len(), size);
    let data = collect(&DataOf(&disk), Extent::new(0, size)).unwrap();
    for run in data.iter() {
        for at in (run.start..run.end).step_by(MIB) {
            let len = to_usize((run.end - at).min(MIB as u64));
            let mut both = [vec![0; len], vec![1; len]];
            disk.read_at(&mut both[0], at).unwrap();
            theirs.read_exact_at(&mut both[1], at).unwrap();
            assert!(both[0] == both[1], "libvmdk reads {at} otherwise");
        }
    }
    same(&open(image), &disk);
}

#[test]
fn what_is_written_reads_as_its_source_everywhere() {
    for size in [512, 64 * 1024, 33 * MIB, 101 * MIB + 512] {
        let bench = Bench::new(size, 38);
        for make in [stream, sparse] {
            let image = bench.path("disk.vmdk");
            write_file(&bench.raw, &image, make);
            judge(&image, &bench.raw);
            run("7zz", &["t", arg(&image)]);
            let unpacked = run("7zz", &["e", "-so", arg(&image)]).stdout;
            assert!(unpacked == bench.bytes, "7-Zip reads {size} bytes otherwise");
            assert_reads(&open(&image), &bench.bytes);
        }
    }
}

#[test]
fn large_disks_with_little_on_them_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("disk.vmdk"));
    let size = 129 * GIB + 512;
    let places = [0, 32 << 20, (32 << 20) - 512, 70 * GIB + 1, size - 512];
    sparse_file(&raw, size, &places.map(|at| (at, to_usize((size - at).min(70_000)))));
    for make in [stream, sparse] {
        write_file(&raw, &image, make);
        judge(&image, &raw);
    }
    assert_eq!(Metadata::read(&*file(&image)).unwrap().virtual_size(), size);
}

#[test]
fn empty_disks_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("disk.vmdk"));
    for make in [stream, sparse] {
        sparse_file(&raw, 40 << 20, &[]);
        write_file(&raw, &image, make);
        judge(&image, &raw);
        assert_eq!(open(&image).next_data(0).unwrap(), None);
        sparse_file(&raw, 0, &[]);
        write_file(&raw, &image, make);
        // Programs refuse a disk without sectors.
        assert_eq!((open(&image).size(), open(&image).next_data(0).unwrap()), (512, None));
    }
}

/// Batches above 8 TiB are longer, and a stream's grain tables still follow each 32 MiB.
#[test]
fn disks_with_large_batches_are_written() {
    let size = 40u64 << 40;
    let disk = MemoryDisk::sparse(size);
    for at in [0, 16 << 20, 9 << 40, size - 512] {
        disk.write_at(&[7; 512], at).unwrap();
    }
    let image = MemoryDisk::sparse(64 << 20);
    let length = write(&disk, stream, |bytes, at| image.write_at(bytes, at).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vmdk");
    let mut bytes = vec![0; to_usize(length)];
    image.read_at(&mut bytes, 0).unwrap();
    fs::write(&path, &bytes).unwrap();
    same(&open(&path), &disk);
    run("qemu-img", &["check", "-q", "-f", "vmdk", arg(&path)]);
    run("7zz", &["l", arg(&path)]);
}

#[test]
fn the_same_disk_gives_the_same_bytes_and_no_trace_of_an_earlier_batch() {
    let bench = Bench::new(9 * MIB, 39);
    for make in [stream, sparse] {
        let images = ["one", "two"].map(|name| {
            let path = bench.path(name);
            write_file(&bench.raw, &path, make);
            fs::read(path).unwrap()
        });
        assert!(images[0] == images[1]);
    }
    // Padding behind a grain is zero though its buffer was used before, by grains that do not shrink.
    let disk = MemoryDisk::sparse(16 << 20);
    let mut noise = vec![0; 8 << 20];
    Random(1).fill(&mut noise);
    disk.write_at(&noise, 0).unwrap();
    for at in (8 << 20..16 << 20).step_by(65_536) {
        disk.write_at(b"a", at).unwrap();
    }
    let mut image = Vec::new();
    write(&disk, stream, |bytes, at| {
        image.resize(image.len().max(to_usize(at) + bytes.len()), 0);
        image[to_usize(at)..to_usize(at) + bytes.len()].copy_from_slice(bytes);
    });
    let (mut at, mut grains) = (65_536, 0);
    while grains < 256 {
        let len = 12 + u32::from_le_bytes(image[at + 8..at + 12].try_into().unwrap()) as usize;
        let next = (at + len).next_multiple_of(512);
        assert!(is_zero(&image[at + len..next]), "grain {grains}");
        (at, grains) = (next, grains + 1);
    }
}

#[test]
fn an_image_says_the_name_of_its_file() {
    let bench = Bench::new(MIB, 40);
    let named: Make = |size| Ok(Box::new(StreamOptimized::new(size, "größe 1.vmdk")?));
    let image = bench.path("größe 1.vmdk");
    write_file(&bench.raw, &image, named);
    judge(&image, &bench.raw);
}

/// VMware's products know a disk that changed by its content id.
#[test]
fn a_disk_with_its_data_elsewhere_has_another_content_id() {
    let ids: std::collections::BTreeSet<_> = (0..4u64)
        .map(|i| {
            let disk = MemoryDisk::sparse(4 << 20);
            disk.write_at(&[1; 512], i << 16).unwrap();
            let image = MemoryDisk::sparse(8 << 20);
            write(&disk, sparse, |bytes, at| image.write_at(bytes, at).unwrap());
            Metadata::read(&image).unwrap().info().content_id.unwrap()
        })
        .collect();
    assert_eq!(ids.len(), 4, "{ids:?}");
}
