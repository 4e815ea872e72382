//! Damaged, truncated and lying streams and archives: an error or the right disk, never a panic, a hang or much memory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/allocations.rs"]
mod allocations;
#[path = "fuzz_bodies/mod.rs"]
mod bodies;
#[path = "support/bounds.rs"]
mod bounds;
#[path = "support/images.rs"]
mod images;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use bodies::archive::{judge, open};
use bodies::input::View;
use bodies::seal;
use bounds::{Bounds, MOST_HELD};
use haul::image::archive::{self, Options};
use images::{Random, arg, run, seed};

/// The most memory that the process may have had, in bytes: the decoder of zstd does not ask Rust's allocator.
const MEMORY: u64 = 256 << 20;

/// One stream or archive, and what is known of it.
struct Sample {
    name: &'static str,
    bytes: Vec<u8>,
    /// A checksum covers all of the disk: what can be opened is right.
    checked: bool,
    /// Where damage matters more than elsewhere.
    areas: Vec<(usize, usize)>,
}

fn samples(dir: &Path) -> (Vec<u8>, Vec<Sample>) {
    let mut disk = images::contents(260_000 / 4096 * 4096, 77);
    for hole in [40_000..90_000, 120_000..124_000, 200_000..230_000] {
        disk[hole].fill(0);
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let path = |name: &str| dir.join(name);
    fs::write(path("whole"), &disk).unwrap();
    run("cp", &["--sparse=always", arg(&path("whole")), arg(&path("disk"))]);
    fs::write(path("notes"), "this is no disk\n".repeat(100)).unwrap();
    let shell = |command: &str| run("sh", &["-ec", &format!("cd {} && {command}", arg(dir))]).stdout;
    shell("gzip -k disk; head -c 100000 disk > a; tail -c +100001 disk > b");
    let ovf = "<Envelope><References><File ovf:id=\"f\" ovf:href=\"disk\"/></References>\
               <DiskSection><Disk ovf:fileRef=\"f\"/></DiskSection></Envelope>";
    fs::write(path("vm.ovf"), ovf).unwrap();
    let commands = [
        ("gzip", "gzip -c disk", true),
        ("gzip members", "gzip -c a; gzip -c b", false),
        ("zstd", "zstd -c disk", true),
        ("zstd frames", "zstd -c a; zstd -c b", false),
        ("xz", "xz -c -0 disk", true),
        ("xz blocks", "xz -c -0 --block-size=50KiB --check=sha256 disk", true),
        ("xz filters", "xz -c --x86 --delta --lzma2=preset=0 disk", true),
        ("tar", "tar -c --format=ustar notes disk", false),
        ("tar pax", "tar -c --format=posix notes disk", false),
        ("tar old sparse", "tar -cS --format=oldgnu notes disk", false),
        ("tar sparse 0.0", "tar -cS --format=posix --sparse-version=0.0 notes disk", false),
        ("tar sparse 0.1", "tar -cS --format=posix --sparse-version=0.1 disk", false),
        ("tar sparse 1.0", "tar -cS --format=posix --sparse-version=1.0 disk notes", false),
        ("ova", "tar -c --format=ustar vm.ovf notes disk", false),
        ("tar.gz", "tar -cz notes disk", false),
        ("tar of gzip", "tar -c notes disk.gz", false),
    ];
    let sample = |(name, command, checked): (&'static str, &str, bool)| {
        let bytes = shell(command);
        let last = bytes.len();
        let mut areas = vec![(0, 64), (0, last), (last - 64, 64)];
        if name.starts_with("tar") || name == "ova" {
            areas = (0..last - 511)
                .step_by(512)
                .filter(|at| bytes[at + 257..].starts_with(b"ustar") || bytes[at + 257..].starts_with(b"GNU"))
                .flat_map(|at| [(at, 512), (at + 124, 40), (at + 380, 132), (at + 512, 200)])
                .collect();
            areas.push((0, last));
        }
        Sample { name, bytes, checked, areas }
    };
    (disk, commands.into_iter().map(sample).collect())
}

fn damage(sample: &Sample, random: &mut Random) -> Vec<u8> {
    let below = |random: &mut Random, n: usize| usize::try_from(random.below(n as u64)).unwrap();
    let mut bytes = sample.bytes.clone();
    if random.below(5) == 0 {
        let cut = match random.below(3) {
            0 => below(random, bytes.len()),
            1 => below(random, 200),
            _ => bytes.len() - below(random, 2000).min(bytes.len()),
        };
        bytes.truncate(cut);
        return bytes;
    }
    for _ in 0..=random.below(3) {
        let (start, len) = sample.areas[below(random, sample.areas.len())];
        let at = (start + below(random, len)).min(bytes.len() - 1);
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'7', b'0', b'S', b'x', b'L'][below(random, 10)],
            2 => random.fill(bytes[at..].chunks_mut(8).next().unwrap()),
            3 => {
                let n = below(random, 600).min(bytes.len() - at);
                bytes.drain(at..at + n);
                bytes.push(0);
            }
            4 => {
                let n = below(random, 600).min(bytes.len() - at);
                let piece = bytes[at..at + n].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let text = [
                    &b"77777777777"[..],
                    b"00000000000",
                    b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                    b"99999999999999999999",
                ][below(random, 4)];
                for (to, from) in bytes[at..].iter_mut().zip(text) {
                    *to = *from;
                }
            }
        }
        if random.below(4) != 0 {
            seal::archive(&mut View::new(&mut bytes));
        }
    }
    bytes
}

/// The most memory this process had at once, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Damages the samples `rounds` times each.
fn damaged(rounds: usize) {
    let dir = tempfile::tempdir().unwrap();
    let scratch = dir.path().join("scratch");
    fs::create_dir(&scratch).unwrap();
    let (disk, samples) = samples(dir.path());
    let seed = seed();
    let mut random = Random(seed);
    let (mut refused, mut opened, mut bounds) = (0, 0, Bounds::default());
    for sample in &samples {
        let (bytes, more, _) =
            open(&sample.bytes, &scratch).unwrap_or_else(|e| panic!("{}: {e:?}", sample.name));
        assert!(bytes == disk && more == 0, "{} is undamaged", sample.name);
        for i in 0..rounds {
            let bytes = damage(sample, &mut random);
            let what = format!("damage {i} of {:?}, HAUL_SEED={seed}", sample.name);
            match bounds.hold(&what, bytes.len(), MOST_HELD, || open(&bytes, &scratch).inspect_err(judge)) {
                Err(_) => refused += 1,
                // Without its magic number it is no stream but a raw disk.
                Ok((read, ..)) if read == bytes => opened += 1,
                Ok((read, more, _)) => {
                    assert!(
                        !sample.checked || (read == disk && more == 0),
                        "{what}: it reads as another disk"
                    );
                    opened += 1;
                }
            }
        }
    }
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0, "something is left");
    let memory = peak();
    bounds.print(&format!("damaged archives and streams, of which {opened} opened"));
    println!("figure: archives: the process had {} MiB at most", memory >> 20);
    assert!(refused > rounds * 5 && opened > rounds, "{refused} {opened}: the damage misses its mark");
    assert!(memory < MEMORY, "{memory} bytes of memory");
}

#[test]
fn damaged_archives_are_errors_or_disks() {
    damaged(60);
}

#[test]
#[ignore = "long: 16,000 damaged archives; scripts/test.sh --long"]
fn many_damaged_archives_are_errors_or_disks_and_none_hangs() {
    damaged(1000);
}

/// A bomb of 27 bits of window, the largest there is, that really fills it.
#[test]
#[ignore = "long: fills the largest windows; scripts/test.sh --long"]
fn the_largest_windows_fit_into_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    let noise = dir.path().join("noise");
    let mut file = fs::File::create(&noise).unwrap();
    let mut piece = vec![0; 1 << 20];
    let mut random = Random(3);
    for _ in 0..300 {
        random.fill(&mut piece);
        std::io::Write::write_all(&mut file, &piece).unwrap();
    }
    let packed = dir.path().join("packed");
    for command in
        ["zstd -1 --long=27 -c < noise > packed", "xz -0 --lzma2=preset=0,dict=128MiB -c noise > packed"]
    {
        run("sh", &["-ec", &format!("cd {} && {command}", arg(dir.path()))]);
        let source = Arc::new(haul::io::DiskFile::open(&packed).unwrap());
        let options = Options { member: None, scratch: dir.path(), limit: 1 << 30, progress: &|_| Ok(()) };
        assert_eq!(archive::open(source, &options).unwrap().disk.size(), 300 << 20);
        let memory = peak();
        println!("{command}: {} MiB", memory >> 20);
        assert!(memory < MEMORY, "{command}: {memory} bytes of memory");
    }
}
