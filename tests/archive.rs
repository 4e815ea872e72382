//! Images in compressed streams and tar archives made by other people's programs, opened by haul.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/images.rs"]
mod images;

use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use haul::error::{Error, Kind, Result};
use haul::image::archive::{self, Codec, Layer, Opened, Options};
use haul::image::{self, Gate};
use haul::io::fake::{FaultyDisk, MemoryDisk};
use haul::io::{DataOf, DiskFile, ReadAt, is_zero};
use haul::unit::Extent;
use haul::unit::extents::collect;
use images::{Bench, Random, arg, run};
use tempfile::TempDir;

const MIB: usize = 1 << 20;
const GIB: u64 = 1 << 30;

/// A compressor.
type Make = fn(&[u8]) -> Vec<u8>;

/// A folder for files, and one inside for what is unpacked.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.scratch()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn scratch(&self) -> PathBuf {
        self.path("scratch")
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    fn open(&self, file: &Path, member: Option<&str>) -> Result<Opened> {
        self.open_on(Arc::new(DiskFile::open(file).unwrap()), member, GIB)
    }

    fn open_on(&self, source: Arc<dyn ReadAt>, member: Option<&str>, limit: u64) -> Result<Opened> {
        archive::open(source, &Options { member, scratch: &self.scratch(), limit, progress: &|_| Ok(()) })
    }

    fn refused(&self, bytes: &[u8], member: Option<&str>) -> Error {
        let opened = self.open_on(Arc::new(MemoryDisk::holding(bytes)), member, GIB);
        let error = opened.err().expect("it is refused");
        assert_eq!(fs::read_dir(self.scratch()).unwrap().count(), 0, "something is left");
        error
    }

    /// Runs tar in the folder.
    fn tar(&self, program: &str, name: &str, options: &[&str], files: &[&str]) -> PathBuf {
        let path = self.path(name);
        let mut args = vec!["-C", arg(self.0.path()), "-cf", arg(&path)];
        args.extend(options);
        args.extend(files);
        run(program, &args);
        path
    }
}

/// A disk of noise, text and zeroes with a boot sector's signature.
fn disk(size: usize, seed: u64) -> Vec<u8> {
    let mut bytes = images::contents(size, seed);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

/// What a program makes of `bytes`.
fn filter(program: &str, args: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("this test needs the program {program}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let out = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(out.status.success(), "{program} {args:?}");
    out.stdout
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    filter("gzip", &["-c"], bytes)
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    filter("zstd", &["-c"], bytes)
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    filter("xz", &["-c", "-0"], bytes)
}

/// The disk reads as `expected`, whole and at random places, and has nothing but zeroes outside its data.
fn assert_reads(disk: &dyn ReadAt, expected: &[u8], what: &str) {
    assert_eq!(disk.size(), expected.len() as u64, "{what}");
    let mut all = vec![0xa5; expected.len()];
    disk.read_at(&mut all, 0).unwrap();
    assert!(all == expected, "{what}: it reads otherwise");
    let mut random = Random(7);
    for _ in 0..100 {
        let at = usize::try_from(random.below(disk.size())).unwrap();
        let len = usize::try_from(random.below(100_000)).unwrap().min(expected.len() - at);
        let piece = &mut all[..len];
        piece.fill(0xa5);
        disk.read_at(piece, at as u64).unwrap();
        assert!(*piece == expected[at..at + len], "{what}: {len} bytes at {at}");
    }
    assert!(disk.read_at(&mut [0], disk.size()).is_err());
    let mut end = 0;
    for run in collect(&DataOf(disk), Extent::new(0, u64::MAX)).unwrap().iter() {
        let place = |at| usize::try_from(at).unwrap();
        assert!(is_zero(&expected[place(end)..place(run.start)]), "{what}: data before {run:?}");
        end = run.end;
    }
    assert!(is_zero(&expected[usize::try_from(end).unwrap()..]), "{what}");
}

fn offset(error: &Error) -> u64 {
    let (_, offset) = error.facts().iter().find(|(name, _)| *name == "offset").expect("an offset");
    offset.parse().unwrap()
}

#[test]
fn every_compressor_is_read_back_in_one_part_or_many() {
    let place = Place::new();
    let bytes = disk(3 * MIB + 700, 1);
    let (a, b) = bytes.split_at(MIB + 12_345);
    let both = |make: &dyn Fn(&[u8]) -> Vec<u8>| [make(a), make(&[]), make(b)].concat();
    let streams = [
        ("gzip", Codec::Gzip, gzip(&bytes)),
        ("gzip -n -9", Codec::Gzip, filter("gzip", &["-c", "-n", "-9"], &bytes)),
        ("pigz", Codec::Gzip, filter("pigz", &["-c", "-p2", "-b128"], &bytes)),
        ("gzip members", Codec::Gzip, both(&gzip)),
        ("zstd", Codec::Zstd, zstd(&bytes)),
        ("zstd -19 --long", Codec::Zstd, filter("zstd", &["-c", "-12", "--long=27"], &bytes)),
        ("zstd --no-check", Codec::Zstd, filter("zstd", &["-c", "--no-check"], &bytes)),
        ("pzstd", Codec::Zstd, filter("pzstd", &["-c", "-p2"], &bytes)),
        ("zstd frames", Codec::Zstd, both(&zstd)),
        (
            "zstd and skippable frames",
            Codec::Zstd,
            [b"\x50\x2a\x4d\x18\x03\0\0\0abc", &zstd(a)[..], b"\x5f\x2a\x4d\x18\0\0\0\0", &zstd(b)].concat(),
        ),
        ("xz", Codec::Xz, xz(&bytes)),
        ("xz blocks", Codec::Xz, filter("xz", &["-c", "-0", "-T2", "--block-size=300KiB"], &bytes)),
        ("xz crc32", Codec::Xz, filter("xz", &["-c", "-1", "--check=crc32"], &bytes)),
        ("xz sha256", Codec::Xz, filter("xz", &["-c", "-1", "--check=sha256"], &bytes)),
        ("xz no check", Codec::Xz, filter("xz", &["-c", "-1", "--check=none"], &bytes)),
        ("xz -9", Codec::Xz, filter("xz", &["-c", "-9"], &bytes)),
        (
            "xz filters",
            Codec::Xz,
            filter("xz", &["-c", "--delta=dist=4", "--x86", "--lzma2=preset=0"], &bytes),
        ),
        ("xz streams", Codec::Xz, both(&xz)),
        ("xz padding", Codec::Xz, [&xz(a)[..], &[0; 8], &xz(b), &[0; 4]].concat()),
    ];
    for (what, codec, stream) in streams {
        let file = place.put("a name that says nothing", &stream);
        let opened = place.open(&file, None).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        assert_eq!(opened.layers, [Layer::Stream(codec)], "{what}");
        assert_reads(&*opened.disk, &bytes, what);
        assert_eq!(fs::read_dir(place.scratch()).unwrap().count(), 0);
    }
}

#[test]
fn zeroes_in_a_stream_become_holes() {
    let place = Place::new();
    let mut bytes = vec![0; 32 * MIB];
    Random(3).fill(&mut bytes[5 * MIB..6 * MIB]);
    bytes[20 * MIB] = 1;
    let opened = place.open(&place.put("x", &zstd(&bytes)), None).unwrap();
    assert_reads(&*opened.disk, &bytes, "holes");
    let data = collect(&DataOf(&*opened.disk), Extent::new(0, u64::MAX)).unwrap();
    let held: u64 = data.iter().map(|run| run.len()).sum();
    assert_eq!(held, MIB as u64 + 65_536);
}

#[test]
fn a_file_that_is_not_wrapped_is_given_as_it_came() {
    let place = Place::new();
    for bytes in
        [vec![], vec![1; 100], disk(MIB, 4), vec![0; MIB], b"\x50\x2a\x4d\x18\x04\0\0\0abcdefgh".to_vec()]
    {
        let opened = place.open_on(Arc::new(MemoryDisk::holding(&bytes)), None, 0).unwrap();
        assert_eq!(opened.layers, []);
        assert_eq!(opened.disk.size(), bytes.len() as u64);
    }
    let error = place.refused(&disk(MIB, 4), Some("x"));
    assert_eq!((error.kind(), error.id()), (Kind::Usage, "archive.no-archive"));
}

#[test]
fn a_disk_made_to_look_like_an_archive_stays_a_disk() {
    let place = Place::new();
    place.put("x", &disk(MIB, 1));
    let mut bytes = fs::read(place.tar("tar", "x.tar", &["--format=ustar"], &["x"])).unwrap();
    // Bytes that tar leaves zero, with the checksum to match.
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[148..156].fill(b' ');
    let sum: u64 = bytes[..512].iter().map(|byte| u64::from(*byte)).sum();
    bytes[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let opened = place.open_on(Arc::new(MemoryDisk::holding(&bytes)), None, 0).unwrap();
    assert_eq!(opened.layers, []);
}

/// `size` bytes: runs of noise between holes, all cut at pages.
fn sparse(size: usize, seed: u64, runs: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; size];
    for _ in 0..runs {
        let at = usize::try_from(random.below(size as u64)).unwrap() / 4096 * 4096;
        let len = (4096 * usize::try_from(random.below(5)).unwrap()).min(size - at);
        random.fill(&mut bytes[at..at + len]);
    }
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

fn put_sparse(place: &Place, name: &str, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(place.path(name)).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (i, page) in bytes.chunks(4096).enumerate().filter(|(_, page)| !is_zero(page)) {
        file.write_all_at(page, i as u64 * 4096).unwrap();
    }
}

#[test]
fn members_of_every_tar_format_are_read_in_place() {
    let place = Place::new();
    let long = format!("{}/disk", "a-folder-with-a-long-name".repeat(7));
    fs::create_dir_all(place.path(&long).parent().unwrap()).unwrap();
    let longer = format!("{}/{}", "b".repeat(90), "disk".repeat(20));
    fs::create_dir_all(place.path(&longer).parent().unwrap()).unwrap();
    // Runs that fill the four entries of an old GNU header, one and several extension blocks, and none.
    let disks = [(300 << 10, 0), (2 * MIB + 512, 3), (4 * MIB, 12), (9 * MIB, 90), (16 * MIB, 500)]
        .map(|(size, runs)| sparse(size, 5, runs));
    let formats: [(&str, &[&str]); 10] = [
        ("tar", &["--format=ustar"]),
        ("tar", &["--format=gnu"]),
        ("tar", &["--format=posix"]),
        ("tar", &["--format=oldgnu", "-S"]),
        ("tar", &["--format=gnu", "-S"]),
        ("tar", &["--format=posix", "-S", "--sparse-version=0.0"]),
        ("tar", &["--format=posix", "-S", "--sparse-version=0.1"]),
        ("tar", &["--format=posix", "-S", "--sparse-version=1.0"]),
        ("bsdtar", &["--format=pax", "--read-sparse"]),
        ("bsdtar", &["--format=gnutar"]),
    ];
    for name in ["disk", &long, &longer] {
        for (i, bytes) in disks.iter().enumerate().filter(|(i, _)| name == "disk" || *i == 2) {
            put_sparse(&place, name, bytes);
            for (program, options) in formats {
                if options[0] == "--format=ustar" && name.len() > 150 {
                    continue;
                }
                let what = format!("{program} {options:?} {} {i}", name.len());
                let file = place.tar(program, "x.tar", options, &[name]);
                // What lies in a plain archive is not copied: there is no folder to copy it to.
                let source = Arc::new(DiskFile::open(&file).unwrap());
                let nowhere = Options {
                    member: Some(name),
                    scratch: Path::new("/nonexistent"),
                    limit: 0,
                    progress: &|_| Ok(()),
                };
                let opened = archive::open(source, &nowhere).unwrap_or_else(|e| panic!("{what}: {e:?}"));
                assert_eq!(opened.layers, [Layer::Member(name.to_owned())], "{what}");
                assert_reads(&*opened.disk, bytes, &what);
                if options.contains(&"-S") && bytes.len() > 4 * MIB {
                    let stored = fs::metadata(&file).unwrap().len();
                    assert!(stored < bytes.len() as u64 * 3 / 4, "{what}: tar did not take it for sparse");
                }
            }
        }
    }
}

#[test]
fn the_stack_of_wrappings_is_taken_off_whatever_it_is() {
    let place = Place::new();
    let bytes = disk(2 * MIB, 6);
    place.put("disk", &bytes);
    place.put("disk.gz", &gzip(&bytes));
    place.put("notes", b"what this is");
    place.put("notes.gz", &gzip(&vec![b'x'; 5000]));
    let member = |name: &str| Layer::Member(name.to_owned());
    let wrap: [(Codec, Make); 3] = [(Codec::Gzip, gzip), (Codec::Zstd, zstd), (Codec::Xz, xz)];
    for (codec, make) in wrap {
        let plain = fs::read(place.tar("tar", "x.tar", &[], &["notes", "disk", "notes.gz"])).unwrap();
        let opened = place.open(&place.put("x", &make(&plain)), None).unwrap();
        assert_eq!(opened.layers, [Layer::Stream(codec), member("disk")]);
        assert_reads(&*opened.disk, &bytes, "tar in a stream");

        let packed = fs::read(place.tar("tar", "x.tar", &["-S"], &["notes.gz", "disk.gz", "notes"])).unwrap();
        let opened = place.open(&place.put("x", &make(&packed)), None).unwrap();
        assert_eq!(opened.layers, [Layer::Stream(codec), member("disk.gz"), Layer::Stream(Codec::Gzip)]);
        assert_reads(&*opened.disk, &bytes, "stream in tar in a stream");
    }
    let five = (0..5).fold(bytes, |bytes, _| gzip(&bytes));
    assert_eq!(place.refused(&five, None).id(), "archive.depth");
}

#[test]
fn a_qcow2_image_in_a_vagrant_box_is_opened() {
    let place = Place::new();
    let bench = Bench::new(4 * MIB, 8);
    fs::copy(bench.convert("box.qcow2", "compat=1.1", &["-c"]), place.path("box.img")).unwrap();
    place.put("metadata.json", br#"{"provider": "libvirt"}"#);
    place.put("Vagrantfile", b"Vagrant.configure('2')");
    let file = place.tar("tar", "debian.box", &["-z"], &["metadata.json", "Vagrantfile", "box.img"]);
    let opened = place.open(&file, None).unwrap();
    let image = image::open_on(opened.disk, None, &Gate::closed()).unwrap();
    assert_eq!(image.format, image::Format::Qcow2);
    assert_reads(&*image.disk, &bench.bytes, "qcow2");
}

fn ovf(disks: &[&str], files: &[&str]) -> String {
    let all = disks.iter().chain(files).enumerate();
    let files: String =
        all.map(|(i, name)| format!("<File ovf:href='{name}' ovf:id='f{i}' ovf:size='1'/>")).collect();
    let disks: String = (0..disks.len())
        .map(|i| format!("<Disk ovf:capacity='1' ovf:diskId='d{i}' ovf:fileRef='f{i}'/>"))
        .collect();
    format!(
        "<?xml version='1.0'?><Envelope xmlns='http://schemas.dmtf.org/ovf/envelope/1' \
         xmlns:ovf='http://schemas.dmtf.org/ovf/envelope/1'>\
         <References>{files}</References><DiskSection><Info/>{disks}</DiskSection></Envelope>"
    )
}

#[test]
fn the_disk_of_an_ova_is_found_by_its_descriptor() {
    let place = Place::new();
    let bench = Bench::new(2 * MIB, 9);
    for name in ["system.vmdk", "data.vmdk"] {
        let options = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
        let path = place.path(name);
        run("qemu-img", &[&options[..], &[arg(&bench.raw), arg(&path)]].concat());
    }
    let vmdk = fs::read(place.path("system.vmdk")).unwrap();
    place.put("nvram", &disk(64 << 10, 2));
    place.put("vm.mf", b"SHA256(vm.ovf)= 00\n");

    place.put("vm.ovf", ovf(&["system.vmdk"], &["nvram"]).as_bytes());
    let file = place.tar("tar", "vm.ova", &["--format=ustar"], &["vm.ovf", "system.vmdk", "nvram", "vm.mf"]);
    let opened = place.open(&file, None).unwrap();
    assert_eq!(opened.layers, [Layer::Member("system.vmdk".into())]);
    assert_reads(&*opened.disk, &vmdk, "vmdk");

    // Two disks: the user says which, and is told which there are.
    place.put("vm.ovf", ovf(&["system.vmdk", "data.vmdk"], &[]).as_bytes());
    let file = place.tar("tar", "vm.ova", &["--format=ustar"], &["vm.ovf", "system.vmdk", "data.vmdk"]);
    let error = place.open(&file, None).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Usage, "archive.which-disk"));
    assert!(error.what_to_do().contains("--member") && error.what_to_do().contains("\"data.vmdk\""));
    assert_reads(
        &*place.open(&file, Some("./data.vmdk")).unwrap().disk,
        &fs::read(place.path("data.vmdk")).unwrap(),
        "named",
    );
    let error = place.open(&file, Some("other.vmdk")).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Usage, "archive.no-member"));

    // One of two disks of which the other is missing is not the only one.
    let file = place.tar("tar", "vm.ova", &["--format=ustar"], &["vm.ovf", "system.vmdk"]);
    assert_eq!(place.open(&file, None).err().unwrap().id(), "archive.which-disk");

    // A descriptor that names no file of the archive, or one that is no disk while another is, decides nothing.
    for named in ["missing.vmdk", "vm.mf"] {
        place.put("vm.ovf", ovf(&[named], &[]).as_bytes());
        let file = place.tar("tar", "vm.ova", &[], &["vm.ovf", "system.vmdk", "vm.mf"]);
        assert_eq!(place.open(&file, None).err().unwrap().id(), "archive.which-disk", "{named}");
    }
}

#[test]
fn the_disk_is_chosen_by_content_and_only_if_there_is_one() {
    let place = Place::new();
    let mut cd = disk(MIB, 3);
    cd[32_769..32_774].copy_from_slice(b"CD001");
    place.put("disk.txt", &disk(MIB, 1));
    place.put("other.qcow2", &disk(MIB, 2));
    place.put("install.img", &cd);
    place.put("readme.raw", &vec![b'x'; 70_000]);
    place.put("broken", &gzip(&disk(MIB, 1))[..20]);
    let open = |files: &[&str]| place.open(&place.tar("tar", "x.tar", &[], files), None);
    assert_eq!(
        open(&["install.img", "disk.txt", "readme.raw"]).unwrap().layers,
        [Layer::Member("disk.txt".into())]
    );
    assert_eq!(open(&["disk.txt", "other.qcow2"]).err().unwrap().id(), "archive.which-disk");
    assert_eq!(open(&["install.img", "readme.raw"]).err().unwrap().id(), "archive.no-disk");
    // The only file is what is meant, since a disk may begin with anything.
    assert_eq!(open(&["readme.raw"]).unwrap().layers, [Layer::Member("readme.raw".into())]);
    // What cannot be looked into may be a disk.
    assert_eq!(open(&["disk.txt", "broken"]).err().unwrap().id(), "archive.which-disk");
    assert_eq!(open(&["readme.raw", "broken"]).err().unwrap().id(), "archive.truncated");
    let twice = place.tar("tar", "x.tar", &["--hard-dereference"], &["disk.txt", "./disk.txt"]);
    assert_eq!(place.open(&twice, None).err().unwrap().id(), "archive.which-disk");
    assert_eq!(place.open(&twice, Some("disk.txt")).err().unwrap().id(), "archive.two-members");
    // Other entries are no files.
    std::os::unix::fs::symlink("disk.txt", place.path("link")).unwrap();
    fs::hard_link(place.path("disk.txt"), place.path("hard")).unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    for format in ["--format=gnu", "--format=posix", "--format=ustar"] {
        let file = place.tar("tar", "x.tar", &[format], &["folder", "link", "disk.txt", "hard"]);
        assert_eq!(place.open(&file, None).unwrap().layers, [Layer::Member("disk.txt".into())]);
    }
}

#[test]
fn a_stream_cut_off_anywhere_is_an_error_that_says_where() {
    let place = Place::new();
    let bytes = disk(200_000, 11);
    for stream in [gzip(&bytes), zstd(&bytes), xz(&bytes)] {
        let mut random = Random(5);
        let far = (0..60).map(|_| usize::try_from(random.below(stream.len() as u64)).unwrap());
        for cut in (6..60).chain(stream.len() - 60..stream.len()).chain(far).filter(|cut| *cut > 8) {
            let error = place.refused(&stream[..cut], None);
            assert_eq!((error.kind(), error.id()), (Kind::Image, "archive.truncated"), "{cut}: {error:?}");
            assert!(offset(&error) <= cut as u64, "{cut}: {error:?}");
        }
        // A second part that is cut off is no smaller error.
        let more = [&stream[..], &stream[..stream.len() - 1]].concat();
        assert_eq!(place.refused(&more, None).id(), "archive.truncated");
    }
}

#[test]
fn anything_behind_a_stream_is_an_error_that_says_where() {
    let place = Place::new();
    let bytes = disk(100_000, 12);
    for (stream, garbage) in [
        (gzip(&bytes), &b"x"[..]),
        (gzip(&bytes), &[0; 512]),
        (gzip(&bytes), b"\x1f\x8b"),
        (zstd(&bytes), b"garbage"),
        (zstd(&bytes), &[0; 8]),
        (xz(&bytes), b"garbage"),
        (xz(&bytes), &[0; 3]),
        (xz(&bytes), &gzip(b"x")),
    ] {
        let error = place.refused(&[&stream[..], garbage].concat(), None);
        assert_eq!((error.kind(), error.id()), (Kind::Image, "archive.trailing"), "{error:?}");
        assert_eq!(offset(&error), stream.len() as u64);
    }
    // Behind padding it is found, too.
    let stream = xz(&bytes);
    let error = place.refused(&[&stream[..], &[0; 4], b"x"].concat(), None);
    assert_eq!((error.id(), offset(&error)), ("archive.trailing", stream.len() as u64 + 4));
}

#[test]
fn a_changed_byte_is_found_by_the_checksum() {
    let place = Place::new();
    let bytes = disk(500_000, 13);
    for (stream, most) in [(gzip(&bytes), 4), (zstd(&bytes), 0), (xz(&bytes), 0)] {
        let mut random = Random(9);
        for _ in 0..30 {
            let at = 12 + usize::try_from(random.below(stream.len() as u64 - 12)).unwrap();
            let mut stream = stream.clone();
            stream[at] ^= 1 << random.below(8);
            match place.open_on(Arc::new(MemoryDisk::holding(&stream)), None, GIB) {
                Ok(opened) => {
                    assert_reads(&*opened.disk, &bytes, &format!("{at}, of which {most} may change"))
                }
                Err(error) => {
                    assert_eq!(error.kind(), Kind::Image);
                    assert!(offset(&error) <= stream.len() as u64, "{error:?}");
                }
            }
        }
    }
}

#[test]
fn windows_that_take_too_much_memory_are_refused() {
    let place = Place::new();
    // From a pipe zstd does not know the length, and writes the window that was asked for.
    let stream = filter("zstd", &["-c", "--long=28"], &disk(100_000, 14));
    assert_eq!(place.refused(&stream, None).id(), "archive.window");
    // The properties of LZMA2 are the last bytes of an xz block header before its padding and checksum.
    let mut stream = xz(&disk(100_000, 14));
    let header = &mut stream[12..24];
    assert_eq!(header[..4], [2, 0, 0x21, 1], "a block header of xz -0");
    for (size, id) in [(30, None), (31, Some("archive.window")), (40, Some("archive.window"))] {
        stream[16] = size;
        let crc = crc32fast::hash(&stream[12..20]).to_le_bytes();
        stream[20..24].copy_from_slice(&crc);
        let opened = place.open_on(Arc::new(MemoryDisk::holding(&stream)), None, GIB);
        assert_eq!(opened.err().map(|error| error.id()), id, "{size}");
    }
}

#[test]
fn a_stream_unpacks_to_no_more_than_the_limit() {
    let place = Place::new();
    let bytes = vec![0; 40 * MIB];
    for stream in [gzip(&bytes), zstd(&bytes), xz(&bytes)] {
        let open = |limit: usize| place.open_on(Arc::new(MemoryDisk::holding(&stream)), None, limit as u64);
        assert_eq!(open(bytes.len()).unwrap().disk.size(), bytes.len() as u64);
        for limit in [0, 5 * MIB, bytes.len() - 1] {
            let error = open(limit).err().unwrap();
            assert_eq!((error.kind(), error.id()), (Kind::Image, "archive.limit"));
        }
    }
}

#[test]
fn parts_that_unpack_to_nothing_end() {
    let place = Place::new();
    let mut stream = zstd(&disk(10_000, 1));
    for _ in 0..9 {
        stream.extend(b"\x50\x2a\x4d\x18\0\0\x80\0");
        stream.resize(stream.len() + (8 << 20), 0);
    }
    assert_eq!(place.refused(&stream, None).id(), "archive.idle");
}

/// A file system of its own, unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, size: usize) -> Self {
        fs::create_dir_all(at).unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", arg(at)]);
        Mount(at.to_owned())
    }

    fn ntfs(at: &Path, size: u64) -> Self {
        fs::create_dir_all(at).unwrap();
        let image = at.with_extension("ntfs");
        fs::File::create(&image).unwrap().set_len(size).unwrap();
        run("mkntfs", &["-qF", arg(&image)]);
        run("ntfs-3g", &[arg(&image), arg(at)]);
        Mount(at.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run("umount", &[arg(&self.0)]);
    }
}

#[test]
fn a_full_folder_is_an_error_of_the_destination_and_is_empty_afterwards() {
    let place = Place::new();
    let room = Mount::tmpfs(&place.path("room"), 100 * MIB);
    let mut noise = vec![0; 60 * MIB];
    Random(1).fill(&mut noise);
    let stream = filter("gzip", &["-c", "-1"], &noise);
    let open = |source: &[u8]| {
        let source = Arc::new(MemoryDisk::holding(source));
        archive::open(source, &Options { member: None, scratch: &room.0, limit: GIB, progress: &|_| Ok(()) })
    };
    let error = open(&stream).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Destination, "archive.space"), "{error:?}");
    let free = || {
        let out = run("stat", &["-f", "-c", "%f", arg(&room.0)]);
        String::from_utf8(out.stdout).unwrap().trim().parse::<u64>().unwrap() * 4096
    };
    assert_eq!(free(), 100 * MIB as u64);
    // Zeroes need no room.
    let opened = open(&gzip(&vec![0; 300 * MIB])).unwrap();
    assert_eq!((opened.disk.size(), free()), (300 * MIB as u64, 100 * MIB as u64));

    let missing =
        Options { member: None, scratch: Path::new("/nonexistent"), limit: 1, progress: &|_| Ok(()) };
    let error = archive::open(Arc::new(MemoryDisk::holding(&stream)), &missing).err().unwrap();
    assert_eq!(error.kind(), Kind::Destination);
}

#[test]
fn a_folder_that_cannot_have_unnamed_files_serves_too() {
    let place = Place::new();
    let room = Mount::ntfs(&place.path("room"), 256 << 20);
    let bytes = disk(3 * MIB + 11, 20);
    let source = Arc::new(MemoryDisk::holding(&gzip(&bytes)));
    let options = Options { member: None, scratch: &room.0, limit: GIB, progress: &|_| Ok(()) };
    let opened = archive::open(source, &options).unwrap();
    assert_reads(&*opened.disk, &bytes, "on NTFS");
    // FUSE keeps a removed file that is open under a hidden name.
    let names = fs::read_dir(&room.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|name| name.starts_with(".fuse_hidden")));
    drop(opened);
    // A process that another test is just starting may hold the file open between fork and exec.
    let deadline = Instant::now() + Duration::from_secs(30);
    while fs::read_dir(&room.0).unwrap().count() != 0 {
        assert!(Instant::now() < deadline, "the file is there still");
        std::thread::yield_now();
    }
}

#[test]
fn unpacking_tells_how_far_it_is_and_stops_when_told() {
    let place = Place::new();
    let stream = gzip(&disk(20 * MIB, 15));
    let calls = Cell::new(0);
    let stop = |progress: archive::Progress| {
        calls.set(calls.get() + 1);
        assert!(progress.read <= progress.of && progress.of == stream.len() as u64);
        assert_eq!(progress.unpacked, calls.get() << 20);
        if calls.get() == 3 { Err(Error::new(Kind::Interrupted, "test.stop", "stopped")) } else { Ok(()) }
    };
    let options = Options { member: None, scratch: &place.scratch(), limit: GIB, progress: &stop };
    let error = archive::open(Arc::new(MemoryDisk::holding(&stream)), &options).err().unwrap();
    assert_eq!((error.id(), calls.get()), ("test.stop", 3));
}

#[test]
fn an_unreadable_sector_is_an_error_of_the_source() {
    let place = Place::new();
    let bytes = disk(4 * MIB, 16);
    place.put("disk", &bytes);
    place.put("disk.gz", &gzip(&bytes));
    let archive = fs::read(place.tar("tar", "x.tar", &[], &["disk.gz"])).unwrap();
    for stream in [gzip(&bytes), zstd(&bytes), xz(&bytes), archive] {
        let bad = Extent::at(stream.len() as u64 / 2, 512);
        let source = Arc::new(FaultyDisk::new(MemoryDisk::holding(&stream), vec![bad]));
        let error = place.open_on(source, None, GIB).err().unwrap();
        assert_eq!((error.kind(), error.id()), (Kind::Source, "io.read"), "{error:?}");
    }
}

#[test]
fn a_tar_archive_must_end_with_its_end_mark_and_nothing_else() {
    let place = Place::new();
    place.put("disk", &disk(100 << 10, 17));
    let whole = fs::read(place.tar("tar", "x.tar", &["-b1", "--format=ustar"], &["disk"])).unwrap();
    let end = 512 + (100 << 10);
    assert_eq!(whole.len(), end + 1024);
    let open = |bytes: &[u8]| place.open_on(Arc::new(MemoryDisk::holding(bytes)), None, 0);
    for fill in [1024, 512, 20 << 20] {
        let mut bytes = whole[..end].to_vec();
        bytes.resize(end + fill, 0);
        assert!(open(&bytes).is_ok(), "{fill} zeroes");
    }
    for cut in [600, 512, end - 1, end, end + 511] {
        let error = place.refused(&whole[..cut], None);
        assert_eq!((error.id(), offset(&error)), ("archive.truncated", cut as u64), "{error:?}");
    }
    for (at, rest) in [(end + 512, &b"x"[..]), (end + 1024, b"\0\0x"), (end + 1024, &whole)] {
        let error = place.refused(&[&whole[..at], rest].concat(), None);
        assert_eq!(error.id(), "archive.trailing");
        assert!(offset(&error) >= at as u64 && offset(&error) < at as u64 + 3);
    }
    let mut bad = whole.clone();
    bad[3] ^= 1;
    let two = [&whole[..end], &bad].concat();
    let error = place.refused(&two, None);
    assert_eq!((error.id(), offset(&error)), ("archive.tar", end as u64));
}

/// A header of a tar archive: typeflag, name, size field.
fn header(kind: u8, name: &str, size: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..124 + size.len()].copy_from_slice(size);
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}

fn entry(kind: u8, name: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = header(kind, name, format!("{:011o}\0", data.len()).as_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn record(key: &str, value: &str) -> Vec<u8> {
    let body = format!(" {key}={value}\n");
    let len = (1..).find(|len| len - len.to_string().len() == body.len()).unwrap();
    format!("{len}{body}").into_bytes()
}

#[test]
fn entries_that_programs_read_differently_are_refused() {
    let place = Place::new();
    let end = [0; 1024];
    let file = entry(b'0', "disk", &disk(8192, 18));
    let size = |n: &str| record("size", n);
    let lying: [(&str, Vec<u8>); 14] = [
        ("a folder with data", entry(b'5', "d", b"data")),
        ("a link with data", entry(b'1', "l", b"data")),
        ("an unknown type", entry(b'Q', "q", b"")),
        ("a part of a file of another volume", entry(b'M', "m", b"")),
        ("a size of spaces", header(b'0', "f", b"            ")),
        ("a negative size", header(b'0', "f", &[0xff; 12])),
        ("a size beyond 64 bits", header(b'0', "f", b"\x80\0\0\x01\0\0\0\0\0\0\0\0")),
        ("a size beyond the end", header(b'0', "f", b"77777777777\0")),
        ("a name without a file", entry(b'L', "x", b"name\0")),
        ("records without a file", entry(b'x', "x", &record("path", "y"))),
        ("records for every file", entry(b'g', "x", &record("path", "y"))),
        ("records of nothing", entry(b'x', "x", b"nothing")),
        ("a name too long", [entry(b'L', "x", &[b'n'; 1025]), file.clone()].concat()),
        (
            "a sparse file of another kind",
            [entry(b'x', "x", &record("SUN.holesdata", "0 1")), file.clone()].concat(),
        ),
    ];
    for (what, bytes) in lying {
        let before = what.contains("without a file");
        let parts = if before { vec![&file[..], &bytes, &end] } else { vec![&bytes[..], &file, &end] };
        let error = place.refused(&parts.concat(), None);
        assert_eq!(error.kind(), Kind::Image, "{what}: {error:?}");
        assert!(matches!(error.id(), "archive.tar" | "archive.truncated"), "{what}: {error:?}");
        offset(&error);
    }
    // The size of the records holds, not the header's.
    let bytes = disk(8192, 18);
    let mut file = header(b'0', "disk", b"00000000000\0");
    file.extend(&bytes);
    let archive = [entry(b'x', "x", &size("8192")), file, end.to_vec()].concat();
    let opened = place.open_on(Arc::new(MemoryDisk::holding(&archive)), None, 0).unwrap();
    assert_reads(&*opened.disk, &bytes, "size in records");
}

#[test]
fn maps_of_sparse_files_that_lie_are_refused() {
    let place = Place::new();
    let version_1 = |size: u64, map: &str, data: &[u8]| {
        let records = [
            record("GNU.sparse.major", "1"),
            record("GNU.sparse.minor", "0"),
            record("GNU.sparse.name", "disk"),
            record("GNU.sparse.realsize", &size.to_string()),
        ];
        let mut stored = map.as_bytes().to_vec();
        stored.resize(stored.len().next_multiple_of(512), 0);
        stored.extend(data);
        [entry(b'x', "x", &records.concat()), entry(b'0', "GNUSparseFile.1/disk", &stored), vec![0; 1024]]
            .concat()
    };
    let version_0 = |size: u64, map: &str, data: &[u8]| {
        let records = [record("GNU.sparse.size", &size.to_string()), record("GNU.sparse.map", map)];
        [entry(b'x', "x", &records.concat()), entry(b'0', "disk", data), vec![0; 1024]].concat()
    };
    let data = [7; 1024];
    let open = |bytes: &[u8]| place.open_on(Arc::new(MemoryDisk::holding(bytes)), Some("disk"), 0);
    assert_eq!(open(&version_1(1 << 40, "2\n0\n512\n1048576\n512\n", &data)).unwrap().disk.size(), 1 << 40);
    assert_eq!(open(&version_0(1 << 40, "0,512,1048576,512", &data)).unwrap().disk.size(), 1 << 40);
    for map in [
        "2\n0\n512\n256\n512\n",
        "2\n4096\n512\n0\n512\n",
        "2\n0\n512\n1048576\n513\n",
        "2\n0\n512\n1048576\n511\n",
        "1\n0\n1024\n5\n",
        "2\n0\n512\n1099511627776\n512\n",
        "2\n0\n512\n18446744073709551615\n512\n",
        "2\n0\n18446744073709551615\n0\n512\n",
        "3\n0\n512\n1048576\n512\n",
        "99999999\n0\n512\n",
        "-1\n",
        "",
    ] {
        let result = open(&version_1(1 << 40, map, &data));
        // Another line of zeroes than the number of lines is what fills the block.
        if map.starts_with("1\n0\n1024") {
            assert!(result.is_ok());
            continue;
        }
        let error = result.err().unwrap_or_else(|| panic!("{map:?}"));
        assert_eq!((error.kind(), error.id()), (Kind::Image, "archive.sparse"), "{map:?}");
        offset(&error);
    }
    for map in ["0,512,256,512", "0,512,1048576", "0,512,1048576,x", "0,512", "0,512,1048576,512,2097152,512"]
    {
        assert_eq!(open(&version_0(1 << 40, map, &data)).err().unwrap().id(), "archive.sparse", "{map}");
    }
}
