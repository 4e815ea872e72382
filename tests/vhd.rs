//! VHD images: made by QEMU and read by haul; made by haul and read by QEMU, libvhdi and haul.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/images.rs"]
mod images;
#[path = "support/lay_out.rs"]
mod lay_out;
#[path = "support/reads.rs"]
mod reads;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use haul::error::Kind;
use haul::image::vhd::footer::{Chs, DiskType, Footer};
use haul::image::vhd::header::Header;
use haul::image::vhd::writer::{BLOCK, Dynamic, Fixed};
use haul::image::vhd::{MAX_SIZE, Reader, Subformat, inspect, probe};
use haul::io::batch::{Cell, Encoder, Geometry, Piece, RawBatch};
use haul::io::fake::MemoryDisk;
use haul::io::{AlignedBuf, DataOf, DiskFile, ReadAt, WriteAt, is_zero};
use haul::unit::extents::collect;
use haul::unit::{Extent, MIB};
use images::{Bench, Random, arg, run};
use lay_out::lay_out;
use reads::{VhdiMount, as_qemu_reads, assert_reads, differing, file, padded};

const M: usize = 1 << 20;

fn open(path: &Path) -> Reader {
    Reader::open(file(path)).unwrap()
}

fn qemu_convert(bench: &Bench, name: &str, options: &str) -> PathBuf {
    let path = bench.path(name);
    run("qemu-img", &["convert", "-f", "raw", "-O", "vpc", "-o", options, arg(&bench.raw), arg(&path)]);
    path
}

#[test]
fn every_kind_of_image_qemu_writes_reads_as_its_source() {
    for (size, seed) in [(101 * M + 512, 31), (8 * M, 32), (512, 33)] {
        let bench = Bench::new(size, seed);
        for options in ["subformat=dynamic", "subformat=fixed"] {
            for exact in [false, true] {
                println!("{size} {options} force_size={exact}");
                let options = format!("{options},force_size={}", if exact { "on" } else { "off" });
                let path = qemu_convert(&bench, "a.vhd", &options);
                assert!(probe(&*file(&path)).unwrap());
                let image = open(&path);
                let info = image.info();
                let fixed = options.contains("fixed");
                assert_eq!(info.subformat, if fixed { Subformat::Fixed } else { Subformat::Dynamic });
                assert_eq!(info.block_size, if fixed { None } else { Some(2 << 20) });
                assert_eq!(info.creator, if exact { "qem2" } else { "qemu" });
                assert_eq!(exact, image.size() == size as u64);
                assert_eq!(inspect(&*file(&path)).unwrap(), *info);
                let data = assert_reads(&image, &padded(&bench.bytes, image.size()));
                let live = bench.bytes.chunks(2 * M).filter(|block| !is_zero(block)).count() * 2 * M;
                assert!(data.bytes() <= live as u64, "{} bytes called data, {live} live", data.bytes());
                let qemu = as_qemu_reads(&path, "vpc").unwrap();
                assert_eq!((qemu.size(), differing(&qemu, &image)), (image.size(), vec![]));
            }
        }
    }
}

#[test]
fn an_image_written_in_pieces_reads_as_qemu_and_libvhdi_read_it() {
    let bench = Bench::new(0, 0);
    let path = bench.path("a.vhd");
    run("qemu-img", &["create", "-q", "-f", "vpc", "-o", "force_size=on", arg(&path), "41M"]);
    let mut random = Random(34);
    let mut args = vec!["-f".into(), "vpc".into()];
    for i in 1..60 {
        let (at, len) = (random.below(40 * 2048) * 512, (random.below(300) + 1) * 512);
        args.extend(["-c".into(), format!("write -P {i} {at} {len}")]);
    }
    args.push(arg(&path).to_owned());
    run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
    let image = open(&path);
    let mut qemu = vec![0; 41 * M];
    as_qemu_reads(&path, "vpc").unwrap().read_at(&mut qemu, 0).unwrap();
    assert_reads(&image, &qemu);
    assert_eq!(differing(&VhdiMount::new(&path).disk(), &image), []);
}

/// Lays the disk `source` out as the image file `path`, as a job does.
fn write(source: &dyn ReadAt, mut encoder: impl Encoder, path: &Path) {
    let out = File::create(path).unwrap();
    let set = collect(&DataOf(source), Extent::new(0, u64::MAX)).unwrap();
    let (front, length) =
        lay_out(&mut encoder, source, &set, |bytes, at| out.write_all_at(bytes, at).unwrap());
    assert_eq!((front.len() as u64, length), (encoder.front_len(), encoder.position()));
    out.write_all_at(&front, 0).unwrap();
    out.set_len(length).unwrap();
}

fn write_both(source: &dyn ReadAt, bench: &Bench) -> [PathBuf; 2] {
    let [fixed, dynamic] = ["fixed.vhd", "dynamic.vhd"].map(|name| bench.path(name));
    write(source, Fixed::new(source.size()).unwrap(), &fixed);
    write(source, Dynamic::new(source.size()).unwrap(), &dynamic);
    [fixed, dynamic]
}

/// The image at `path` is valid for everyone, is `size` bytes long, and holds `source` and zeroes after it.
fn assert_image(path: &Path, source: &dyn ReadAt, size: u64, subformat: Subformat) {
    let image = open(path);
    assert_eq!((image.size(), image.info().subformat), (size, subformat));
    assert_eq!(image.info().creator, "win");
    assert!(probe(&*file(path)).unwrap());
    assert_eq!(differing(&image, source), []);

    let json = run("qemu-img", &["info", "-f", "vpc", "--output=json", arg(path)]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["virtual-size"], size);
    // The bytes by QEMU: identical, but for the zeroes that fill the last MiB.
    let raw = path.with_extension("ours.raw");
    let out = File::create(&raw).unwrap();
    out.set_len(source.size()).unwrap();
    let mut at = 0;
    while let Some(data) = source.next_data(at).unwrap() {
        let mut buf = vec![0; usize::try_from(data.len()).unwrap()];
        source.read_at(&mut buf, data.start).unwrap();
        out.write_all_at(&buf, data.start).unwrap();
        at = data.end;
    }
    run("qemu-img", &["compare", "-q", "-f", "vpc", "-F", "raw", arg(path), arg(&raw)]);

    let info = String::from_utf8(run("vhdiinfo", &[arg(path)]).stdout).unwrap();
    assert!(info.contains(&format!("{size} bytes")), "{info}");
    let kind = if subformat == Subformat::Fixed { "Fixed" } else { "Dynamic" };
    assert!(info.contains(kind), "{info}");
    let mount = VhdiMount::new(path);
    let libvhdi = mount.disk();
    assert_eq!(libvhdi.size(), size);
    // libvhdi knows no holes: what haul calls data is compared, and 64 KiB on either side of it.
    let mut at = 0;
    while let Some(data) = image.next_data(at).unwrap() {
        let around = Extent::new(data.start.saturating_sub(65_536), (data.end + 65_536).min(size));
        let part = |disk: &dyn ReadAt| {
            let mut bytes = vec![0; usize::try_from(around.len()).unwrap()];
            disk.read_at(&mut bytes, around.start).unwrap();
            bytes
        };
        assert!(part(&image) == part(&libvhdi), "{around:?}");
        at = data.end;
    }
}

#[test]
fn images_of_every_size_are_read_by_qemu_and_libvhdi() {
    for (size, seed) in [(512, 41), (M, 42), (101 * M + 512, 43)] {
        let bench = Bench::new(size, seed);
        let source = DiskFile::open(&bench.raw).unwrap();
        let rounded = (size as u64).next_multiple_of(MIB);
        let [fixed, dynamic] = write_both(&source, &bench);
        assert_image(&fixed, &source, rounded, Subformat::Fixed);
        assert_image(&dynamic, &source, rounded, Subformat::Dynamic);
        assert_eq!(fixed.metadata().unwrap().len(), rounded + 512);
        let expected = padded(&bench.bytes, rounded);
        assert_reads(&open(&fixed), &expected);
        assert_reads(&open(&dynamic), &expected);
    }
}

#[test]
fn a_disk_beyond_the_largest_geometry_keeps_its_size() {
    let bench = Bench::new(0, 0);
    let size = (131 << 30) + 512;
    let source = MemoryDisk::sparse(size);
    for (at, len) in [(0, 5000), (3 << 30, 3 * M), (130 << 30, 70_000), (size - 512, 512)] {
        let mut bytes = vec![0; len];
        Random(at).fill(&mut bytes);
        source.write_at(&bytes, at).unwrap();
    }
    let rounded = size.next_multiple_of(MIB);
    let [fixed, dynamic] = write_both(&source, &bench);
    assert_image(&fixed, &source, rounded, Subformat::Fixed);
    assert_image(&dynamic, &source, rounded, Subformat::Dynamic);
    assert!(dynamic.metadata().unwrap().len() < 20 << 20);
}

#[test]
fn an_empty_disk_has_no_blocks() {
    let bench = Bench::new(0, 0);
    for size in [0, 1, 5 * MIB] {
        let [fixed, dynamic] = write_both(&MemoryDisk::sparse(size), &bench);
        for path in [&fixed, &dynamic] {
            assert_eq!(open(path).size(), size.next_multiple_of(MIB).max(MIB));
            assert_eq!(open(path).next_data(0).unwrap(), None);
        }
        assert_eq!(dynamic.metadata().unwrap().len(), 4096 + 512);
    }
}

#[test]
fn zeroes_in_a_block_are_holes_of_the_image_file() {
    let bench = Bench::new(0, 0);
    let mut bytes = vec![0; 6 * M];
    bytes[100_000..100_100].fill(1);
    bytes[900_000..1_000_000].fill(2);
    bytes[1_020_000..1_020_001].fill(3);
    let source = MemoryDisk::holding(&bytes);
    let [_, path] = write_both(&source, &bench);
    let data = assert_reads(&open(&path), &bytes);
    assert!(data.bytes() < 300_000, "{data:?}");
}

/// The pieces of a run, without the bytes: what a resumed run must lay out again from its journal alone.
fn layout(
    encoder: &mut impl Encoder,
    batches: &[(Extent, Vec<Cell>)],
) -> (Vec<Vec<Piece>>, Vec<u64>, Vec<u8>) {
    let mut positions = Vec::new();
    let mut put = |(extent, cells): &(Extent, Vec<Cell>)| {
        let pieces = encoder.put(*extent, cells).unwrap();
        positions.push(encoder.position());
        pieces
    };
    let mut pieces: Vec<_> = batches.iter().map(&mut put).collect();
    let (end, front) = encoder.finish().unwrap();
    pieces.push(end);
    (pieces, positions, front)
}

#[test]
fn the_same_source_gives_the_same_bytes_and_a_journal_replays_them() {
    let size = 40 * MIB + 512;
    let bench = Bench::new(usize::try_from(size).unwrap(), 44);
    let source = DiskFile::open(&bench.raw).unwrap();
    let first = write_both(&source, &bench).map(|path| std::fs::read(path).unwrap());
    let second = write_both(&source, &bench).map(|path| std::fs::read(path).unwrap());
    assert!(first == second);

    let geometry = Geometry::of(size);
    let mut packer = Dynamic::new(size).unwrap().packer().unwrap();
    let mut batches = Vec::new();
    let mut at = 0;
    while at < size {
        let extent = geometry.batch_at(at);
        let mut buf = AlignedBuf::new(usize::try_from(geometry.batch()).unwrap());
        source.read_at(&mut buf[..usize::try_from(extent.len()).unwrap()], at).unwrap();
        batches.push((extent, packer.pack(RawBatch::new(extent, buf).hash(&geometry)).unwrap().cells));
        at = extent.end;
    }
    batches[3].1.clear();
    let all = layout(&mut Dynamic::new(size).unwrap(), &batches);
    // Batches of zeroes are not in the journal.
    let kept: Vec<_> = batches.iter().filter(|(_, cells)| !cells.is_empty()).cloned().collect();
    let replayed = layout(&mut Dynamic::new(size).unwrap(), &kept);
    assert!(kept.len() < batches.len());
    assert_eq!(all.0.concat(), replayed.0.concat());
    assert_eq!(all.2, replayed.2);
    // A fixed disk's positions follow from the disk alone.
    let bare: Vec<_> = kept.iter().map(|(extent, _)| (*extent, Vec::new())).collect();
    let mut fixed = Fixed::new(size).unwrap();
    assert!(!fixed.cells_matter());
    assert_eq!(layout(&mut fixed, &bare).1, layout(&mut Fixed::new(size).unwrap(), &kept).1);
}

#[test]
fn a_disk_beyond_2040_gib_is_refused_and_one_of_2040_gib_is_not() {
    for size in [MAX_SIZE + 1, u64::MAX] {
        assert_eq!(Fixed::new(size).err().unwrap().kind(), Kind::Usage);
        assert_eq!(Dynamic::new(size).err().unwrap().kind(), Kind::Usage);
    }
    let bench = Bench::new(0, 0);
    let source = MemoryDisk::sparse(MAX_SIZE);
    source.write_at(b"the end", MAX_SIZE - 7).unwrap();
    let path = bench.path("a.vhd");
    write(&source, Dynamic::new(MAX_SIZE).unwrap(), &path);
    let image = open(&path);
    assert_eq!(image.next_data(0).unwrap().unwrap().end, MAX_SIZE);
    let mut end = [0; 7];
    image.read_at(&mut end, MAX_SIZE - 7).unwrap();
    assert_eq!(&end, b"the end");
    run("qemu-io", &["-r", "-f", "vpc", "-c", &format!("read -P 0 {} 2M", MAX_SIZE - 4 * MIB), arg(&path)]);
}

#[test]
fn a_batch_that_is_no_block_is_an_internal_error() {
    let cell = |start, stored| Cell { start, stored, compressed: false };
    for (extent, cells) in [
        (Extent::at(4096, 4096), vec![cell(0, 4096)]),
        (Extent::at(0, 2 * BLOCK), vec![cell(0, 4096)]),
        (Extent::at(0, BLOCK), vec![cell(4096, 4096), cell(0, 4096)]),
        (Extent::at(0, 4096), vec![cell(0, 8192)]),
        (Extent::at(10 * BLOCK, BLOCK), vec![cell(0, 4096)]),
    ] {
        let mut writer = Dynamic::new(10 * BLOCK).unwrap();
        assert_eq!(writer.put(extent, &cells).unwrap_err().kind(), Kind::Internal, "{extent:?}");
    }
    let mut writer = Dynamic::new(10 * BLOCK).unwrap();
    writer.put(Extent::at(BLOCK, BLOCK), &[cell(0, 512)]).unwrap();
    assert!(writer.put(Extent::at(BLOCK, BLOCK), &[cell(0, 512)]).is_err());
}

/// A dynamic image of three blocks of 4 KiB, all there, in memory. The table is at 1536, the blocks at 2048, 6656,
/// 11264, their bitmaps first, and the footer at 15872.
struct Small {
    footer: Footer,
    header: Header,
    table: [u32; 3],
    bytes: Vec<u8>,
}

impl Small {
    fn new() -> Self {
        let mut bytes = vec![0; 16_384];
        for i in 0..3 {
            let at = 2048 + i * 4608;
            bytes[at..at + 512].fill(0xff);
            bytes[at + 512..at + 4608].fill(u8::try_from(i + 1).unwrap());
        }
        let header = Header { table_offset: 1536, max_entries: 3, block_size: 4096 };
        Small { footer: Footer::new(3 * 4096, DiskType::Dynamic), header, table: [4, 13, 22], bytes }
    }

    /// The image, with `front` and `end` as its footers where they are given.
    fn image(&self, front: Option<&Footer>, end: Option<&Footer>) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[512..1536].copy_from_slice(&self.header.encode());
        for (place, entry) in bytes[1536..1548].chunks_mut(4).zip(self.table) {
            place.copy_from_slice(&entry.to_be_bytes());
        }
        if let Some(front) = front {
            bytes[..512].copy_from_slice(&front.encode());
        }
        if let Some(end) = end {
            bytes[15_872..].copy_from_slice(&end.encode());
        }
        bytes
    }

    fn whole(&self) -> Vec<u8> {
        self.image(Some(&self.footer), Some(&self.footer))
    }
}

fn open_bytes(bytes: &[u8]) -> haul::error::Result<Reader> {
    Reader::open(Arc::new(MemoryDisk::holding(bytes)))
}

fn three_blocks() -> Vec<u8> {
    [[1; 4096], [2; 4096], [3; 4096]].concat()
}

#[test]
fn sectors_never_written_read_as_zeroes() {
    let mut small = Small::new();
    // Of the second block only the first and the last two sectors were written.
    small.bytes[6656] = 0b1000_0011;
    let mut expected = three_blocks();
    expected[4096 + 512..4096 + 6 * 512].fill(0);
    assert_reads(&open_bytes(&small.whole()).unwrap(), &expected);
    small.table[1] = u32::MAX;
    expected[4096..8192].fill(0);
    assert_reads(&open_bytes(&small.whole()).unwrap(), &expected);
}

#[test]
fn one_good_footer_is_enough_and_two_that_differ_are_refused() {
    let small = Small::new();
    let footer = &small.footer;
    for (front, end, copied) in
        [(Some(footer), Some(footer), false), (Some(footer), None, true), (None, Some(footer), false)]
    {
        let image = open_bytes(&small.image(front, end)).unwrap();
        assert_eq!(image.info().footer_damaged, copied);
        assert_reads(&image, &three_blocks());
    }
    // A file cut off in its footer.
    assert_reads(&open_bytes(&small.whole()[..16_000]).unwrap(), &three_blocks());
    let error = open_bytes(&small.image(None, None)).err().unwrap();
    assert_eq!(error.kind(), Kind::Image);

    let shorter = Footer { current_size: 8192, ..footer.clone() };
    let error = open_bytes(&small.image(Some(footer), Some(&shorter))).err().unwrap();
    assert!(error.why().contains("both footers are intact"), "{error:?}");
    let fixed = Footer::new(15_872, DiskType::Fixed);
    let error = open_bytes(&small.image(Some(footer), Some(&fixed))).err().unwrap();
    assert!(error.why().contains("both footers are intact"), "{error:?}");
    // A fixed disk may begin with anything, a footer of a fixed disk included.
    let image = open_bytes(&small.image(Some(&fixed), Some(&fixed))).unwrap();
    assert_eq!((image.size(), image.info().subformat), (15_872, Subformat::Fixed));
}

#[test]
fn a_fixed_disk_is_recognised_by_a_footer_that_fits_the_file() {
    let with = |footer: &Footer, area: usize| [vec![7; area], footer.encode().to_vec()].concat();
    let footer = Footer::new(MIB, DiskType::Fixed);
    let probed = |bytes: &[u8]| probe(&MemoryDisk::holding(bytes)).unwrap();
    assert!(probed(&with(&footer, M)));
    assert_reads(&open_bytes(&with(&footer, M)).unwrap(), &vec![7; M]);
    for (footer, area) in [(&footer, M + 512), (&footer, M - 512), (&Footer::new(MIB, DiskType::Dynamic), M)]
    {
        assert!(!probed(&with(footer, area)));
        assert!(open_bytes(&with(footer, area)).is_err());
    }
    let mut damaged = with(&footer, M);
    damaged[M + 70] ^= 1;
    assert!(!probed(&damaged) && open_bytes(&damaged).is_err());
    for len in [0, 7, 511, 512] {
        assert!(!probed(&vec![0; len]) && open_bytes(&vec![0; len]).is_err());
    }
    // Virtual PC's images are as long as their geometry or their size says.
    let vpc = Footer { creator: *b"vpc ", ..Footer::new(MIB, DiskType::Fixed) };
    let area = usize::try_from(vpc.geometry.bytes()).unwrap();
    assert!(area < M && probed(&with(&vpc, area)) && probed(&with(&vpc, M)) && !probed(&with(&footer, area)));
}

#[test]
fn a_dynamic_disk_is_recognised_by_either_footer() {
    let small = Small::new();
    let footer = &small.footer;
    let differencing = &Footer { disk_type: DiskType::Differencing, ..footer.clone() };
    let probed = |bytes: &[u8]| probe(&MemoryDisk::holding(bytes)).unwrap();
    for (front, end) in [(Some(footer), None), (None, Some(footer)), (None, Some(differencing))] {
        assert!(probed(&small.image(front, end)), "{front:?} {end:?}");
    }
    // A footer at the end of a disk is a raw disk's data when the header or table it names is not there.
    let mut image = small.image(None, Some(footer));
    image[512] ^= 1;
    assert!(!probed(&image));
    let mut image = small.image(None, Some(footer));
    image[600] ^= 1;
    assert!(!probed(&image));
    assert!(!probed(&small.image(None, None)));
}

#[test]
fn no_creator_makes_a_dynamic_disk_shorter_than_its_size() {
    let small = Small::new();
    let geometry = |cylinders| Chs { cylinders, heads: 4, sectors: 2 };
    for (creator, chs, size) in [
        // The geometry is more than `current_size`, and what its creator means.
        (b"vpc ", geometry(3), 3 * 4096),
        (b"qemu", geometry(3), 3 * 4096),
        // It is less: QEMU would cut the disk off here.
        (b"vpc ", geometry(1), 2 * 4096),
        // It is more, and its creator does not mean it, or it is the largest there is.
        (b"win ", geometry(3), 2 * 4096),
        (b"vbox", geometry(3), 2 * 4096),
        (b"qem2", Chs::MAX, 2 * 4096),
        (b"qemu", Chs::MAX, 2 * 4096),
    ] {
        let footer =
            Footer { current_size: 2 * 4096, creator: *creator, geometry: chs, ..small.footer.clone() };
        let image = open_bytes(&small.image(Some(&footer), Some(&footer))).unwrap();
        assert_eq!(image.size(), size, "{creator:?} {chs:?}");
        assert_reads(&image, &three_blocks()[..usize::try_from(size).unwrap()]);
    }
}

#[test]
fn each_bad_field_is_named_with_its_offset() {
    type Damage = fn(&mut Small);
    let cases: [(Damage, &str, u64); 16] = [
        (|s| s.footer.data_offset = 511, "data_offset", 15_888),
        (|s| s.footer.data_offset = 15_361, "data_offset", 15_888),
        (|s| s.footer.data_offset = u64::MAX - 1, "data_offset", 15_888),
        (|s| s.footer.data_offset = 1024, "cookie", 1024),
        (|s| s.footer.current_size = MAX_SIZE + 512, "current_size", 15_920),
        (|s| (s.footer.current_size, s.header.block_size) = (MAX_SIZE, 1 << 18), "block_size", 544),
        (|s| s.header.max_entries = 2, "max_table_entries", 540),
        (|s| s.header.table_offset = 16_380, "table_offset", 528),
        (|s| s.header.table_offset = u64::MAX, "table_offset", 528),
        (|s| s.header.table_offset = 504, "table_offset", 528),
        (|s| s.header.table_offset = 1532, "table_offset", 528),
        // Blocks beyond the footer, over the table, over another block, twice.
        (|s| s.table[2] = 23, "block allocation table entry", 1544),
        (|s| s.table[1] = u32::MAX - 1, "block allocation table entry", 1540),
        (|s| s.table[1] = 3, "block allocation table entry", 1540),
        (|s| s.table[1] = 14, "block allocation table entry", 1544),
        (|s| s.table[0] = 22, "block allocation table entry", 1544),
    ];
    for (i, (damage, field, offset)) in cases.into_iter().enumerate() {
        let mut small = Small::new();
        damage(&mut small);
        let error = open_bytes(&small.whole()).err().unwrap_or_else(|| panic!("case {i}"));
        let facts: Vec<_> = error.facts().iter().map(|(name, value)| (*name, value.as_str())).collect();
        let expected = [("image", "memory disk"), ("field", field), ("offset", &offset.to_string())];
        assert_eq!(facts[..3], expected, "case {i}: {error:?}");
        assert_eq!((error.kind(), error.id()), (Kind::Image, "vhd.field"));
    }
    assert_reads(&open_bytes(&Small::new().whole()).unwrap(), &three_blocks());
}

#[test]
fn a_differencing_disk_is_refused_and_its_facts_can_be_had() {
    let small = Small::new();
    let footer = Footer { disk_type: DiskType::Differencing, ..small.footer.clone() };
    let bytes = small.image(Some(&footer), Some(&footer));
    let error = open_bytes(&bytes).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Image, "vhd.differencing"));
    let info = inspect(&MemoryDisk::holding(&bytes)).unwrap();
    assert_eq!((info.subformat, info.virtual_size), (Subformat::Differencing, 3 * 4096));
    let json = serde_json::to_value(info).unwrap();
    assert_eq!((&json["subformat"], &json["block_size"]), (&"differencing".into(), &4096.into()));
}

#[test]
fn the_end_of_the_last_block_need_not_be_there() {
    let small = Small::new();
    let footer = Footer { current_size: 2 * 4096 + 512, ..small.footer.clone() };
    let mut bytes = small.image(Some(&footer), None);
    bytes.truncate(11_264 + 1024);
    assert_reads(&open_bytes(&bytes).unwrap(), &three_blocks()[..2 * 4096 + 512]);
    bytes.truncate(11_264 + 1023);
    assert!(open_bytes(&bytes).is_err());
}

#[test]
fn overlaps_are_found_however_many_blocks_there_are() {
    // Blocks of one sector in a file so long that they are looked at in more than one stretch.
    const COUNT: u32 = 1 << 20;
    let footer = Footer::new(u64::from(COUNT) * 512, DiskType::Dynamic);
    let header = Header { table_offset: 1536, max_entries: COUNT, block_size: 512 };
    let file = MemoryDisk::sparse(8 << 30);
    file.write_at(&footer.encode(), 0).unwrap();
    file.write_at(&header.encode(), 512).unwrap();
    let entry = |i: u32| 100_000 + i * 15;
    let mut table: Vec<u8> = (0..COUNT).rev().flat_map(|i| entry(i).to_be_bytes()).collect();
    file.write_at(&table, 1536).unwrap();
    let file = Arc::new(file);
    Reader::open(file.clone()).unwrap();
    for (i, other) in [(7, 100_000), (COUNT - 1, 500), (COUNT / 2, 3)] {
        let at = usize::try_from(i).unwrap() * 4;
        let kept = table[at..at + 4].to_vec();
        table[at..at + 4].copy_from_slice(&(entry(COUNT - 1 - other) + 1).to_be_bytes());
        file.write_at(&table, 1536).unwrap();
        let error = Reader::open(file.clone()).err().unwrap();
        assert!(error.why().contains("overlaps another block"), "{error:?}");
        assert!(error.facts().contains(&("block", i.to_string())), "{error:?}");
        table[at..at + 4].copy_from_slice(&kept);
    }
}
