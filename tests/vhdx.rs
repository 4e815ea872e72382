//! VHDX images: made by QEMU, and read by haul as QEMU and libvhdi read them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/images.rs"]
mod images;
#[path = "support/reads.rs"]
mod reads;
#[path = "support/vhdx_image.rs"]
mod vhdx_image;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use haul::error::{Kind, Result};
use haul::image::vhdx::{Reader, Subformat, inspect, probe};
use haul::io::fake::MemoryDisk;
use haul::io::{ReadAt, WriteAt, is_zero};
use haul::unit::{Extent, MIB, TIB};
use images::{Bench, Random, arg, output, run};
use reads::{VhdiMount, as_qemu_reads, assert_reads, differing, file, padded};
use vhdx_image::{
    BAT, Change, DATA, Entry, LOG, METADATA, SECTOR, by_qemu, fixed, interrupted, name_log, put, put_entry,
    seal,
};

const M: usize = 1 << 20;
/// Where QEMU puts the items of the metadata.
const ITEMS: usize = METADATA + (64 << 10);

fn open(path: &Path) -> Reader {
    Reader::open(file(path)).unwrap()
}

fn open_bytes(bytes: &[u8]) -> Result<Reader> {
    Reader::open(Arc::new(MemoryDisk::holding(bytes)))
}

#[test]
fn every_kind_of_image_qemu_writes_reads_as_its_source() {
    for (size, seed, options) in [
        (41 * M + 512, 51, "subformat=dynamic"),
        (41 * M + 512, 52, "subformat=dynamic,block_size=1M,log_size=3M"),
        (9 * M, 53, "subformat=dynamic,block_size=2M,block_state_zero=off"),
        (9 * M + 1024, 54, "subformat=fixed,block_size=1M"),
        (512, 55, "subformat=fixed,block_size=256M"),
    ] {
        println!("{size} {options}");
        let bench = Bench::new(size, seed);
        let path = bench.path("a.vhdx");
        run("qemu-img", &["convert", "-f", "raw", "-O", "vhdx", "-o", options, arg(&bench.raw), arg(&path)]);
        assert!(probe(&*file(&path)).unwrap());
        let image = open(&path);
        let info = image.info();
        let fixed = options.contains("fixed");
        assert_eq!(info.subformat, if fixed { Subformat::Fixed } else { Subformat::Dynamic });
        assert_eq!((info.virtual_size, info.log_replayed), (size as u64, false));
        assert_eq!((info.logical_sector_size, info.physical_sector_size), (512, 512));
        assert!(info.creator.starts_with("QEMU"), "{info:?}");
        assert_eq!(inspect(&*file(&path)).unwrap(), *info);
        let data = assert_reads(&image, &bench.bytes);
        let block = usize::try_from(info.block_size).unwrap();
        let live = bench.bytes.chunks(block).filter(|block| !is_zero(block)).count() * block;
        assert!(data.bytes() <= live as u64, "{} bytes called data, {live} live", data.bytes());
        let qemu = as_qemu_reads(&path, "vhdx").unwrap();
        assert_eq!((qemu.size(), differing(&qemu, &image)), (image.size(), vec![]));
        let mount = VhdiMount::new(&path);
        let libvhdi = mount.disk();
        assert_eq!((libvhdi.size(), differing(&libvhdi, &image)), (image.size(), vec![]));
    }
}

#[test]
fn a_disk_of_many_chunks_is_read_past_the_entries_of_bitmaps() {
    // 4096 blocks of 1 MiB make a chunk of sectors of 512 bytes; an entry of a bitmap follows each.
    let bench = Bench::new(0, 0);
    let path = bench.path("a.vhdx");
    run("qemu-img", &["create", "-q", "-f", "vhdx", "-o", "block_size=1M", arg(&path), "13G"]);
    let mut args = vec!["-f".to_owned(), "vhdx".into()];
    let mut random = Random(61);
    let around = (1..4u64).flat_map(|chunk| [(chunk << 32) - 512, chunk << 32, (chunk << 32) + MIB]);
    let anywhere = (0..20).map(|_| random.below(13 << 21) * 512).collect::<Vec<_>>();
    for (i, at) in around.chain(anywhere).enumerate() {
        args.extend(["-c".into(), format!("write -q -P {} {at} 512", i + 1)]);
    }
    args.push(arg(&path).to_owned());
    run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
    let image = open(&path);
    let qemu = as_qemu_reads(&path, "vhdx").unwrap();
    assert_eq!((qemu.size(), differing(&qemu, &image)), (image.size(), vec![]));
    let data = image.next_data((3 << 32) - 512).unwrap().unwrap();
    assert_eq!(data.start, (3 << 32) - 512);
}

/// The image in the file `path` has a log, which haul replays in memory so that it reads as QEMU reads what it itself
/// replayed. Returns the disk, and whether QEMU replays this log at all: it refuses some that [MS-VHDX] allows.
fn assert_replayed(path: &Path) -> (Reader, bool) {
    let before = std::fs::read(path).unwrap();
    assert!(!output("qemu-img", &["check", "-f", "vhdx", arg(path)]).status.success(), "the log is empty");
    let image = open(path);
    assert!(image.info().log_replayed && inspect(&*file(path)).unwrap().log_replayed);
    let copy = path.with_extension("replayed.vhdx");
    std::fs::write(&copy, &before).unwrap();
    let judged = output("qemu-img", &["check", "-q", "-f", "vhdx", "-r", "all", arg(&copy)]).status.success();
    if judged {
        let qemu = as_qemu_reads(&copy, "vhdx").unwrap();
        assert_eq!((qemu.size(), differing(&qemu, &image)), (image.size(), vec![]));
    }
    assert!(std::fs::read(path).unwrap() == before, "the image was written");
    (image, judged)
}

#[test]
fn the_log_of_a_program_that_could_not_go_on_is_replayed() {
    let bench = Bench::new(3 * M, 62);
    let path = bench.path("by-qemu.vhdx");
    let written = by_qemu(&bench, "block_size=1M");
    // QEMU has written the log when it fails to write the block allocation table.
    let fault = "file.driver=blkdebug,file.inject-error.0.event=none,file.inject-error.0.iotype=write";
    let sector = BAT / 512;
    let image = format!("file.image.driver=file,file.image.filename={}", arg(&path));
    let open_it = format!("open -o driver=vhdx,{fault},file.inject-error.0.sector={sector},{image}");
    std::fs::write(&path, &written).unwrap();
    let raw = File::options().write(true).open(&bench.raw).unwrap();
    raw.set_len(9 << 20).unwrap();
    let written = by_qemu(&bench, "block_size=1M");
    let done = output("qemu-io", &["-c", &open_it, "-c", "write -P 9 7M 1M"]);
    println!("{}", String::from_utf8_lossy(&done.stdout));
    let left = std::fs::read(&path).unwrap();
    assert!(left[BAT..BAT + M] == written[BAT..BAT + M], "the table was written");
    let (image, judged) = assert_replayed(&path);
    assert!(judged, "QEMU refuses its own log");
    let mut expected = padded(&bench.bytes, 9 * MIB);
    expected[7 * M..8 * M].fill(9);
    assert_reads(&image, &expected);
}

#[test]
fn whatever_an_interrupted_log_looks_like_it_is_replayed() {
    let bench = Bench::new(3 * M, 63);
    // A table of more than one sector of the log.
    File::options().write(true).open(&bench.raw).unwrap().set_len(700 << 20).unwrap();
    for options in ["block_size=1M,block_state_zero=off", "block_size=1M"] {
        let whole = by_qemu(&bench, options);
        let mut judged = 0;
        for seed in 0..8 {
            println!("{options} {seed}");
            let path = bench.path("interrupted.vhdx");
            std::fs::write(&path, interrupted(&whole, &mut Random(seed))).unwrap();
            let (image, by_qemu_too) = assert_replayed(&path);
            judged += usize::from(by_qemu_too);
            assert_eq!(differing(&image, &*file(&bench.raw)), []);
        }
        assert!(judged >= 4, "QEMU replays {judged} of 8");
    }
}

#[test]
fn a_log_may_make_the_file_longer() {
    let bench = Bench::new(3 * M, 64);
    let whole = fixed(&bench);
    // The last block lies where the file is not yet.
    let mut image = whole.clone();
    let mut table = whole[BAT..BAT + SECTOR].to_vec();
    let end = whole.len() as u64;
    put(&mut table, 16, &(end | 6).to_le_bytes());
    let sector = vec![5; SECTOR];
    let changes = vec![Change::Data(BAT as u64, table), Change::Data(end + MIB - 4096, sector.clone())];
    let entry =
        Entry { guid: [1; 16], sequence: 1, tail: 0, flushed_size: end, last_size: end + MIB, changes };
    put_entry(&mut image, 0, &entry.encode());
    name_log(&mut image, [1; 16]);
    let path = bench.path("a.vhdx");
    std::fs::write(&path, image).unwrap();
    let mut expected = bench.bytes.clone();
    expected[2 * M..].fill(0);
    put(&mut expected, 3 * M - 4096, &sector);
    let (image, judged) = assert_replayed(&path);
    assert!(judged, "QEMU refuses the image");
    assert_reads(&image, &expected);
}

#[test]
fn a_log_that_cannot_be_replayed_is_refused() {
    let bench = Bench::new(M, 65);
    let whole = by_qemu(&bench, "block_size=1M");
    let refused = |entry: Option<Entry>| {
        let mut image = whole.clone();
        if let Some(entry) = entry {
            put_entry(&mut image, 0, &entry.encode());
        }
        name_log(&mut image, [1; 16]);
        let error = open_bytes(&image).err().unwrap();
        assert_eq!(error.kind(), Kind::Image);
        format!("{} {}", error.id(), error.why())
    };
    let entry = |changes| {
        let size = whole.len() as u64;
        Entry { guid: [1; 16], sequence: 5, tail: 0, flushed_size: size, last_size: size, changes }
    };
    // Nothing there that the header's GUID names: none, another's, one whose tail is nowhere.
    let empty = refused(None);
    assert!(empty.contains("vhdx.log no valid sequence"), "{empty}");
    assert_eq!(refused(Some(Entry { guid: [2; 16], ..entry(vec![]) })), empty);
    assert_eq!(refused(Some(Entry { tail: 9, ..entry(vec![]) })), empty);
    assert_eq!(refused(Some(Entry { sequence: 0, ..entry(vec![]) })), empty);
    let cut = refused(Some(Entry { flushed_size: 1 << 40, ..entry(vec![]) }));
    assert!(cut.contains(&format!("the file ends at {}, and was", whole.len())), "{cut}");
    let zeroes = (0..6000).map(|i| Change::Zeroes(i * 8192, 4096)).collect();
    let many = refused(Some(entry(zeroes)));
    assert!(many.contains("zeroes of more than 4096 places"), "{many}");
    // A log of 17 MiB, of an unknown version.
    let mut image = whole.clone();
    image.resize(64 * M, 0);
    for at in [64 << 10, 128 << 10] {
        put(&mut image, at + 68, &(17u32 << 20).to_le_bytes());
        put(&mut image, at + 72, &(32u64 << 20).to_le_bytes());
    }
    name_log(&mut image, [1; 16]);
    assert!(open_bytes(&image).err().unwrap().why().contains("16 MiB are read"));
    name_log(&mut image, [0; 16]);
    assert_reads(&open_bytes(&image).unwrap(), &bench.bytes);
}

#[test]
fn the_newer_intact_header_counts_and_one_region_table_is_enough() {
    let bench = Bench::new(M, 66);
    let whole = by_qemu(&bench, "block_size=1M");
    let sequence = |image: &[u8], at: usize| u64::from_le_bytes(image[at + 8..at + 16].try_into().unwrap());
    let headers = [64 << 10, 128 << 10];
    let newer = headers.into_iter().max_by_key(|at| sequence(&whole, *at)).unwrap();
    let older = headers.into_iter().find(|at| *at != newer).unwrap();
    // The version says which one was looked at.
    let with = |damage: &dyn Fn(&mut [u8])| {
        let mut image = whole.clone();
        put(&mut image, older + 66, &[2, 0]);
        seal(&mut image);
        damage(&mut image);
        open_bytes(&image)
    };
    assert_reads(&with(&|_| {}).unwrap(), &bench.bytes);
    let version = |result: Result<Reader>| {
        let error = result.err().unwrap();
        assert!(error.facts().contains(&("offset", (older + 66).to_string())), "{error:?}");
    };
    version(with(&|image| image[newer + 4000] ^= 1));
    version(with(&|image| image[newer] ^= 1));
    version(with(&|image| {
        put(image, older + 8, &(sequence(image, newer) + 1).to_le_bytes());
        seal(image);
    }));
    let error = with(&|image| {
        put(image, older + 8, &sequence(image, newer).to_le_bytes());
        seal(image);
    });
    assert!(error.err().unwrap().why().contains("both headers have it, and they differ"));
    let error = with(&|image| [newer, older].into_iter().for_each(|at| image[at + 4000] ^= 1)).err().unwrap();
    assert!(error.facts().iter().any(|(name, _)| *name == "second_header"), "{error:?}");

    for table in [192 << 10, 256 << 10] {
        let mut image = whole.clone();
        image[table + 5000] ^= 1;
        assert_reads(&open_bytes(&image).unwrap(), &bench.bytes);
        seal(&mut image);
        let error = open_bytes(&image).err().unwrap();
        assert!(
            error.why().contains("differs from the first region table, and both are intact"),
            "{error:?}"
        );
    }
}

#[test]
fn a_differencing_disk_is_refused_and_its_facts_can_be_had() {
    let bench = Bench::new(M, 67);
    let mut image = by_qemu(&bench, "block_size=1M");
    image[ITEMS + 4] = 2;
    let error = open_bytes(&image).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Image, "vhdx.differencing"));
    let info = inspect(&MemoryDisk::holding(&image)).unwrap();
    assert_eq!((info.subformat, info.virtual_size), (Subformat::Differencing, MIB));
    let json = serde_json::to_value(info).unwrap();
    assert_eq!((&json["subformat"], &json["block_size"]), (&"differencing".into(), &(1 << 20).into()));
}

#[test]
fn other_files_are_no_vhdx_images() {
    for len in [0, 7, 8, 519, 520, 64 << 10, 1 << 20] {
        for begin in [&b""[..], b"vhdxfile"] {
            let mut bytes = vec![0; len];
            let n = begin.len().min(len);
            put(&mut bytes, 0, &begin[..n]);
            let probed = probe(&MemoryDisk::holding(&bytes)).unwrap();
            assert_eq!(probed, begin.len() == 8 && len >= 8);
            assert!(open_bytes(&bytes).is_err());
        }
    }
}

/// Puts entry `i` of the metadata table of `image`: 16 bytes of an id are at its start.
fn item(i: usize) -> usize {
    METADATA + 32 + i * 32
}

#[test]
fn each_bad_field_is_named_with_its_offset() {
    type Damage = fn(&mut Vec<u8>);
    // In both headers and both region tables.
    fn header(image: &mut [u8], at: usize, value: &[u8]) {
        [64 << 10, 128 << 10].into_iter().for_each(|start| put(image, start + at, value));
    }
    fn part(image: &[u8], at: usize, len: usize) -> Vec<u8> {
        image[at..at + len].to_vec()
    }
    fn region(image: &mut [u8], at: usize, value: &[u8]) {
        [192 << 10, 256 << 10].into_iter().for_each(|start| put(image, start + at, value));
    }
    fn entry(image: &mut [u8], i: usize, word: u64) {
        put(image, BAT + i * 8, &word.to_le_bytes());
    }
    fn mib(n: u64) -> [u8; 8] {
        (n << 20).to_le_bytes()
    }
    const HEADER: usize = 64 << 10;
    const TABLE: usize = 192 << 10;
    let cases: [(Damage, &str, usize); 34] = [
        (|b| b[0] = 0, "signature", 0),
        (|b| b.truncate(519), "file type identifier", 0),
        (|b| b.truncate(100_000), "log_offset", HEADER + 72),
        (|b| header(b, 68, &[1]), "log_length", HEADER + 68),
        (|b| header(b, 72, &mib(0)), "log_offset", HEADER + 72),
        (|b| header(b, 72, &[1]), "log_offset", HEADER + 72),
        (|b| header(b, 72, &mib(1 << 40)), "log_offset", HEADER + 72),
        (|b| region(b, 8, &2048u32.to_le_bytes()), "entry_count", TABLE + 8),
        (|b| region(b, 8, &[1]), "entry_count", TABLE + 8),
        (|b| (region(b, 16, &[0; 16]), region(b, 44, &[1])).0, "guid", TABLE + 16),
        (|b| (region(b, 16, &[0; 16]), region(b, 44, &[0])).0, "entry_count", TABLE + 8),
        (
            |b| {
                let id = part(b, TABLE + 16, 16);
                region(b, 48, &id)
            },
            "guid",
            TABLE + 48,
        ),
        (|b| region(b, 32, &[1]), "file_offset", TABLE + 32),
        (|b| region(b, 32, &mib(0)), "file_offset", TABLE + 32),
        (|b| region(b, 32, &mib(1 << 43)), "file_offset", TABLE + 32),
        (|b| region(b, 32, &mib(1)), "file_offset", TABLE + 32),
        (|b| region(b, 64, &mib(2)), "file_offset", TABLE + 64),
        (|b| region(b, 40, &[0; 4]), "length", TABLE + 40),
        (|b| region(b, 40, &[1]), "length", TABLE + 40),
        (|b| b[METADATA] = 0, "signature", METADATA),
        (|b| put(b, METADATA + 10, &[0, 8]), "entry_count", METADATA + 10),
        (|b| put(b, METADATA + 10, &[4]), "physical sector size", METADATA),
        (|b| put(b, item(1), &[0; 16]), "item_id", item(1)),
        (
            |b| {
                let first = part(b, item(0), 32);
                put(b, item(1), &first)
            },
            "item_id",
            item(1),
        ),
        (|b| put(b, item(0) + 16, &65_535u32.to_le_bytes()), "offset", item(0) + 16),
        (|b| put(b, item(0) + 16, &(1u32 << 20).to_le_bytes()), "offset", item(0) + 16),
        (|b| put(b, item(0) + 20, &[9]), "length", item(0) + 20),
        (|b| put(b, ITEMS, &(3u32 << 20).to_le_bytes()), "block_size", ITEMS),
        (|b| put(b, ITEMS, &(512u32 << 20).to_le_bytes()), "block_size", ITEMS),
        (|b| put(b, ITEMS, &(512u32 << 10).to_le_bytes()), "block_size", ITEMS),
        (|b| put(b, ITEMS + 8, &(64 * TIB + 512).to_le_bytes()), "virtual_disk_size", ITEMS + 8),
        (|b| put(b, ITEMS + 8, &513u64.to_le_bytes()), "virtual_disk_size", ITEMS + 8),
        (|b| put(b, ITEMS + 8, &(TIB).to_le_bytes()), "block allocation table", BAT),
        (|b| entry(b, 1, 7 | 5 << 20), "block allocation table entry", BAT + 8),
    ];
    let entries: [(u64, &str); 8] = [
        (5, "state"),
        (6 | 1 << 10, "reserved bits"),
        (6 | 5 << 20, "another block"),
        (6, "header section"),
        (6 | 1 << 20, "the log"),
        (6 | 2 << 20, "a region"),
        (6 | 7 << 20, "beyond the end"),
        (6 | u64::MAX << 20, "beyond the end"),
    ];
    let bench = Bench::new(3 * M, 68);
    let mut whole = fixed(&bench);
    assert_eq!(whole.len(), DATA + 3 * M);
    // The first header counts.
    put(&mut whole, HEADER + 8, &u64::MAX.to_le_bytes());
    seal(&mut whole);
    let check = |i: usize, image: &[u8], field: &str, offset: usize| {
        let error = open_bytes(image).err().unwrap_or_else(|| panic!("case {i}"));
        let facts: Vec<_> = error.facts().iter().map(|(name, value)| (*name, value.as_str())).collect();
        let offset = offset.to_string();
        let expected = [("image", "memory disk"), ("field", field), ("offset", &*offset)];
        assert_eq!(facts[..3], expected, "case {i}: {error:?}");
        assert_eq!((error.kind(), error.id()), (Kind::Image, "vhdx.field"));
        error
    };
    for (i, (damage, field, offset)) in cases.into_iter().enumerate() {
        let mut image = whole.clone();
        damage(&mut image);
        seal(&mut image);
        check(i, &image, field, offset);
    }
    for (i, (word, why)) in entries.into_iter().enumerate() {
        let mut image = whole.clone();
        entry(&mut image, 2, word);
        let error = check(100 + i, &image, "block allocation table entry", BAT + 16);
        assert!(error.why().contains(why), "{error:?}");
        assert!(error.facts().contains(&("block", "2".into())), "{error:?}");
    }
    assert_reads(&open_bytes(&whole).unwrap(), &bench.bytes);
}

#[test]
fn unknown_regions_and_items_that_are_not_required_are_passed_over() {
    let bench = Bench::new(3 * M, 69);
    let mut image = by_qemu(&bench, "block_size=1M");
    let end = image.len() as u64;
    image.resize(image.len() + M, 1);
    for table in [192 << 10, 256 << 10] {
        put(&mut image, table + 8, &[3]);
        put(
            &mut image,
            table + 16 + 64,
            &[&[9; 16][..], &end.to_le_bytes(), &(1u32 << 20).to_le_bytes()].concat(),
        );
    }
    put(&mut image, METADATA + 10, &[6]);
    put(&mut image, item(5), &[8; 16]);
    seal(&mut image);
    assert_reads(&open_bytes(&image).unwrap(), &bench.bytes);
    // No block of the disk lies in that region.
    put(&mut image, BAT, &(end | 6).to_le_bytes());
    assert!(open_bytes(&image).err().unwrap().why().contains("a region"));
}

#[test]
fn sectors_of_4_kib_and_the_largest_disk_are_read() {
    let bench = Bench::new(3 * M, 70);
    let whole = fixed(&bench);
    let file = MemoryDisk::sparse(2 << 30);
    for (i, page) in whole.chunks(4096).enumerate().filter(|(_, page)| !is_zero(page)) {
        file.write_at(page, i as u64 * 4096).unwrap();
    }
    // A table of 64 Mi blocks, and entries of bitmaps after each 32,768 of them, in a new place: 1 GiB.
    let mut image = whole.clone();
    let bat =
        image[192 << 10..256 << 10].chunks(16).position(|id| id.starts_with(&[0x66, 0x77, 0xc2])).unwrap()
            * 16;
    for table in [192 << 10, 256 << 10] {
        put(&mut image, table + bat + 16, &(1u64 << 30).to_le_bytes());
        put(&mut image, table + bat + 24, &(1u32 << 30).to_le_bytes());
    }
    put(&mut image, ITEMS + 8, &(64 * TIB).to_le_bytes());
    put(&mut image, ITEMS + 32, &4096u32.to_le_bytes());
    put(&mut image, ITEMS + 36, &4096u32.to_le_bytes());
    seal(&mut image);
    file.write_at(&image[..METADATA + M], 0).unwrap();
    let last = (64 << 20) - 1;
    for (i, block) in [0, 32_768, last].into_iter().enumerate() {
        let entry = block + block / 32_768;
        file.write_at(&((DATA + i * M) as u64 | 6).to_le_bytes(), (1 << 30) + entry * 8).unwrap();
        // Where the entry of a bitmap is, is no block.
        file.write_at(&u64::MAX.to_le_bytes(), (1 << 30) + 32_768 * 8).unwrap();
    }
    let image = Reader::open(Arc::new(file)).unwrap();
    assert_eq!((image.size(), image.info().logical_sector_size), (64 * TIB, 4096));
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(data) = image.next_data(at).unwrap() {
        found.push(data.start / MIB);
        at = (data.start / MIB + 1) * MIB;
    }
    assert_eq!(found, [0, 32_768, last]);
    for (i, block) in [0, 32_768, last].into_iter().enumerate() {
        let mut bytes = vec![0; M];
        image.read_at(&mut bytes, block * MIB).unwrap();
        assert!(bytes == bench.bytes[i * M..(i + 1) * M], "block {block}");
    }
    let hole = Extent::new(MIB, 32_768 * MIB);
    assert_eq!(image.next_data(hole.start).unwrap().map(|data| data.start / MIB), Some(32_768));
    assert!(!LOG.is_empty());
}
