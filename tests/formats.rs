//! Every format that is read into every format that is written, judged by the programs that own them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test: a failure is the finding"
)]

#[path = "support/images.rs"]
mod images;
#[path = "support/qcow2_rs.rs"]
mod qcow2_rs;
mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use images::contents;
use support::{LoopMount, empty_image, run, text};

const HAUL: &str = env!("CARGO_BIN_EXE_haul");
const MIB: u64 = 1 << 20;
/// A disk of this length or more is read whole by QEMU only, which leaps over holes.
const GIB: u64 = 1 << 30;

/// What is written: extension, and haul's options.
const TARGETS: [(&str, &[&str]); 8] = [
    ("raw", &["-O", "raw"]),
    ("qcow2", &["-O", "qcow2"]),
    ("zlib.qcow2", &["-O", "qcow2", "--compress", "zlib"]),
    ("zstd.qcow2", &["-O", "qcow2", "--compress", "zstd"]),
    ("fixed.vhd", &["-O", "vhd", "-o", "subformat=fixed"]),
    ("dynamic.vhd", &["-O", "vhd"]),
    ("sparse.vmdk", &["-O", "vmdk"]),
    ("stream.vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"]),
];

/// What is read: name, and the options of `qemu-img convert` that make it.
const SOURCES: [(&str, &[&str]); 15] = [
    ("qcow2", &["-O", "qcow2"]),
    ("v2.qcow2", &["-O", "qcow2", "-o", "compat=0.10,cluster_size=4k"]),
    ("zlib.qcow2", &["-c", "-O", "qcow2"]),
    ("zstd.qcow2", &["-c", "-O", "qcow2", "-o", "compression_type=zstd"]),
    ("extended.qcow2", &["-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k"]),
    ("fixed.vhd", &["-O", "vpc", "-o", "subformat=fixed,force_size=on"]),
    ("dynamic.vhd", &["-O", "vpc", "-o", "force_size=on"]),
    ("chs.vhd", &["-O", "vpc"]),
    ("fixed.vhdx", &["-O", "vhdx", "-o", "subformat=fixed"]),
    ("dynamic.vhdx", &["-O", "vhdx"]),
    ("sparse.vmdk", &["-O", "vmdk"]),
    ("flat.vmdk", &["-O", "vmdk", "-o", "subformat=monolithicFlat"]),
    ("stream.vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"]),
    ("split.vmdk", &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]),
    ("split-flat.vmdk", &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat"]),
];

/// A source as haul's command line names it.
struct Source {
    name: String,
    args: Vec<String>,
    /// Whether it is a program's export that lives as long as the conversion.
    served: bool,
}

impl Source {
    fn file(name: &str, path: &Path) -> Self {
        Source { name: name.into(), args: vec![text(path).into()], served: false }
    }

    /// Converts it to `copy`.
    fn convert(&self, options: &[&str], copy: &Path) {
        let mut args = vec!["-q", "convert", "--force", "--all-blocks"];
        args.extend(options);
        args.extend(self.args.iter().map(String::as_str));
        args.push(text(copy));
        if self.served {
            let quoted: Vec<_> = args.iter().map(|arg| format!("'{arg}'")).collect();
            let line = format!("{HAUL} {}", quoted.join(" ").replace("'$uri'", "\"$uri\""));
            run("nbdkit", &["-r", "-U", "-", "file", text(&copy.with_file_name("disk.raw")), "--run", &line]);
        } else {
            run(HAUL, &args);
        }
    }
}

/// The disk `raw` in every form that is read; a form that QEMU cannot make of so small a disk is left out. `wrapped` adds
/// streams and archives.
fn sources(raw: &Path, wrapped: bool) -> Vec<Source> {
    let dir = raw.parent().unwrap();
    let mut sources = vec![Source::file("raw", raw)];
    sources.push(Source { name: "nbd".into(), args: vec!["$uri".into()], served: true });
    for (name, options) in SOURCES {
        let path = dir.join(format!("from-{name}"));
        let made = images::output(
            "qemu-img",
            &[&["convert", "-f", "raw"], options, &[text(raw), text(&path)]].concat(),
        );
        if !made.status.success() {
            println!("QEMU makes no {name}: {}", String::from_utf8_lossy(&made.stderr).trim());
            continue;
        }
        let mut source = Source::file(name, &path);
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let mut extents: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|other| {
                let other = other.file_name().unwrap().to_str().unwrap();
                [format!("{stem}-flat"), format!("{stem}-s0"), format!("{stem}-f0")]
                    .iter()
                    .any(|start| other.starts_with(start.as_str()))
            })
            .collect();
        extents.sort();
        extents.iter().for_each(|extent| source.args.extend(["--extent".into(), text(extent).into()]));
        sources.push(source);
    }
    if wrapped {
        let named = |name: &str| dir.join(name);
        run("gzip", &["-1", "-k", text(raw)]);
        run("zstd", &["-q", "-1", text(raw), "-o", text(&named("disk.raw.zst"))]);
        run("xz", &["-0", "-k", text(raw)]);
        run("tar", &["-C", text(dir), "-czf", text(&named("disk.tar.gz")), "disk.raw"]);
        run("tar", &["-C", text(dir), "-cf", text(&named("disk.ova")), "from-stream.vmdk"]);
        for name in ["disk.raw.gz", "disk.raw.zst", "disk.raw.xz", "disk.tar.gz", "disk.ova"] {
            sources.push(Source::file(name, &named(name)));
        }
    }
    sources
}

/// The image `copy` holds the disk `raw`, as QEMU and the libraries for its format see it.
fn judge(raw: &Path, copy: &Path, target: &str, what: &str) {
    let format = match target.rsplit('.').next().unwrap() {
        "vhd" => "vpc",
        other => other,
    };
    let compared = images::output("qemu-img", &["compare", "-f", "raw", "-F", format, text(raw), text(copy)]);
    let said = String::from_utf8_lossy(&compared.stdout);
    assert!(compared.status.success(), "{what}: {said}{}", String::from_utf8_lossy(&compared.stderr));
    let size = fs::metadata(raw).unwrap().len();
    match format {
        "qcow2" => {
            run("qemu-img", &["check", "-q", text(copy)]);
            if target != "zstd.qcow2" && size > 0 && size < GIB {
                let file = File::open(raw).unwrap();
                let mut expected = Vec::new();
                qcow2_rs::read_all(copy, |at, bytes| {
                    let inside = usize::try_from(size.saturating_sub(at)).unwrap().min(bytes.len());
                    expected.resize(inside, 0);
                    file.read_exact_at(&mut expected, at).unwrap();
                    assert!(expected == bytes[..inside], "{what}: qcow2-rs differs at {at}");
                });
            }
        }
        "vpc" => {
            let info = run("vhdiinfo", &[text(copy)]);
            let kind = if target.starts_with("fixed") { "Fixed" } else { "Dynamic" };
            assert!(info.contains(kind), "{what}: {info}");
        }
        "vmdk" => {
            run("qemu-img", &["check", "-q", text(copy)]);
            run("vmdkinfo", &[text(copy)]);
            run("7zz", &[if size < GIB { "t" } else { "l" }, text(copy)]);
        }
        _ => {}
    }
}

/// Every source of `raw` into every target. Returns the number of pairs.
fn every_pair(raw: &Path, wrapped: bool) -> usize {
    let dir = raw.parent().unwrap();
    let sources = sources(raw, wrapped);
    for source in &sources {
        for (target, options) in TARGETS {
            let copy = dir.join(format!("copy.{target}"));
            source.convert(options, &copy);
            judge(raw, &copy, target, &format!("{} to {target}", source.name));
            fs::remove_file(copy).unwrap();
        }
    }
    sources.len() * TARGETS.len()
}

/// A folder with a disk of `size` bytes: a file system made by `mkfs`, with files, used and deleted.
fn file_system(size: u64, mkfs: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    empty_image(&raw, size);
    run(mkfs[0], &[&mkfs[1..], &[text(&raw)]].concat());
    let mount = LoopMount::new(&raw, "");
    support::age(mount.path(), 5, 30, MIB);
    drop(mount);
    (dir, raw)
}

fn bytes(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    fs::write(&raw, bytes).unwrap();
    (dir, raw)
}

#[test]
fn each_format_is_read_and_each_is_written() {
    let (dir, raw) = file_system(24 * MIB, &["mkfs.ext4", "-q", "-F"]);
    let sources = sources(&raw, true);
    let whole = dir.path().join("copy.qcow2");
    for source in &sources {
        source.convert(&["-O", "qcow2"], &whole);
        judge(&raw, &whole, "qcow2", &source.name);
    }
    for (target, options) in TARGETS {
        let copy = dir.path().join(format!("copy.{target}"));
        sources[0].convert(options, &copy);
        judge(&raw, &copy, target, target);
        // What is written is read back, and proven by its manifest.
        run(HAUL, &["compare", text(&raw), text(&copy)]);
        run(HAUL, &["verify", text(&dir.path().join(format!("copy.{target}.manifest"))), text(&copy)]);
    }
}

#[test]
fn the_smallest_disks_are_written_in_each_format() {
    for size in [0, 512] {
        let (_dir, raw) = bytes(&contents(size, 3));
        for (target, options) in TARGETS {
            let copy = raw.with_file_name(format!("copy.{target}"));
            Source::file("raw", &raw).convert(options, &copy);
            judge(&raw, &copy, target, &format!("{size} bytes to {target}"));
        }
    }
}

#[test]
fn an_image_goes_into_a_pipe_if_its_format_allows() {
    let (dir, raw) = file_system(24 * MIB, &["mkfs.ext4", "-q", "-F"]);
    for (target, options) in TARGETS {
        let copy = dir.path().join(format!("piped.{target}"));
        let manifest = dir.path().join("piped.manifest");
        let args = [&["convert", "--json", "--all-blocks", "--manifest", text(&manifest)], options].concat();
        let mut haul = Command::new(HAUL)
            .args(args)
            .args([text(&raw), "-"])
            .stdout(Stdio::from(File::create(&copy).unwrap()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        std::io::Read::read_to_string(&mut haul.stderr.take().unwrap(), &mut said).unwrap();
        let status = haul.wait().unwrap();
        if matches!(target, "raw" | "fixed.vhd" | "stream.vmdk") {
            assert!(status.success(), "{target}: {said}");
            judge(&raw, &copy, target, target);
            run(HAUL, &["verify", text(&manifest), text(&copy)]);
        } else {
            assert_eq!(status.code(), Some(2), "{target}: {said}");
            assert!(said.contains("pipe.front") && fs::metadata(&copy).unwrap().len() == 0, "{said}");
        }
    }
    let manifest = dir.path().join("null.manifest");
    run(HAUL, &["-q", "convert", "--all-blocks", "--manifest", text(&manifest), text(&raw), "null:"]);
    run(HAUL, &["verify", text(&manifest), text(&raw)]);
}

#[test]
#[ignore = "long: every readable format into every writable one; scripts/test.sh --long"]
fn every_pair_of_formats_holds_the_same_disk() {
    let mut pairs = 0;
    for mkfs in [&["mkfs.ext4", "-q", "-F"][..], &["mkfs.xfs", "-q", "-f"], &["mkfs.btrfs", "-q", "-f", "-M"]]
    {
        let size = if mkfs[0] == "mkfs.xfs" { 320 } else { 128 };
        let (_dir, raw) = file_system(size * MIB, mkfs);
        pairs += every_pair(&raw, true);
    }
    for size in [0, 512, (101 << 20) + 512] {
        let (_dir, raw) = bytes(&contents(size, images::seed()));
        pairs += every_pair(&raw, size > 512);
    }
    println!("figure: {pairs} pairs of formats and disks, each judged with all blocks");
}

#[test]
#[ignore = "long: every readable format into every writable one, of 130 GiB; scripts/test.sh --long"]
fn every_pair_of_formats_holds_the_same_large_disk() {
    // Beyond what a cylinder, head and sector address reaches: 127.5 GiB.
    let (_dir, raw) = bytes(&[]);
    let file = File::options().write(true).open(&raw).unwrap();
    file.set_len((130 << 30) + 512).unwrap();
    for at in [0, 1 << 30, (127 << 30) + (511 << 20), 130 << 30] {
        file.write_all_at(&[7; 512], at).unwrap();
    }
    let pairs = every_pair(&raw, false);
    println!("figure: {pairs} pairs of formats of a disk of 130 GiB, each judged with all blocks");
}
