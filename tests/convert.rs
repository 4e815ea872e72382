//! `haul convert` through its command line: judged by qemu-img and qcow2-rs, killed and resumed, refused with the
//! right exit code.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

mod support;
#[path = "support/images.rs"]
mod images;
#[path = "support/qcow2_rs.rs"]
mod qcow2_rs;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
#[cfg(feature = "fault-points")]
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use images::{Random, contents, seed};
use support::{LoopMount, run, text};

fn haul(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_haul")).args(args).output().unwrap()
}

fn done(args: &[&str]) -> serde_json::Value {
    let out = haul(&[args, &["--json"]].concat());
    let stdout = String::from_utf8(out.stdout).unwrap();
    assert!(
        out.status.success(),
        "{args:?}: {}\n{stdout}{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    let last = stdout.lines().last().unwrap_or("{}");
    serde_json::from_str::<serde_json::Value>(last).map_or_else(
        |_| serde_json::from_str(&stdout).unwrap(),
        |event| event.get("result").cloned().unwrap_or(event),
    )
}

/// The three lines of a refused command, and its exit code.
fn refused(args: &[&str]) -> (i32, String) {
    let out = haul(args);
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert_eq!(stderr.trim_end().lines().count(), 3, "not three lines:\n{stderr}");
    (out.status.code().unwrap_or(-1), stderr)
}

/// Nothing but these names is in the folder.
fn assert_holds(dir: &Path, names: &[&str]) {
    let mut found: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    assert_eq!(found, names);
}

/// A disk with a partition table and an ext4 file system that has live files and deleted ones.
fn server_disk(dir: &Path) -> PathBuf {
    let (disk, part) = (dir.join("server.raw"), dir.join("part"));
    support::empty_image(&part, 95 << 20);
    run("mkfs.ext4", &["-q", "-F", text(&part)]);
    {
        let mount = LoopMount::new(&part, "");
        support::age(mount.path(), 7, 40, 1 << 20);
    }
    support::empty_image(&disk, 96 << 20);
    let mut sfdisk =
        Command::new("sfdisk").arg("-q").arg(&disk).stdin(std::process::Stdio::piped()).spawn().unwrap();
    sfdisk.stdin.take().unwrap().write_all(b"label: dos\nstart=2048, type=83, bootable\n").unwrap();
    assert!(sfdisk.wait().unwrap().success());
    File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .write_all_at(&fs::read(&part).unwrap(), 1 << 20)
        .unwrap();
    fs::remove_file(part).unwrap();
    disk
}

#[test]
fn every_format_holds_the_same_used_bytes_and_proves_it() {
    let dir = tempfile::tempdir().unwrap();
    let disk = server_disk(dir.path());
    let raw = dir.path().join("copy.raw");
    let report = done(&["convert", text(&disk), text(&raw)]);
    assert!(report["bytes"].as_u64().unwrap() < 90 << 20, "free blocks were copied: {report}");
    done(&["compare", "--used", text(&disk), text(&raw)]);
    for method in ["none", "zlib", "zstd"] {
        let copy = dir.path().join(format!("{method}.qcow2"));
        let other = done(&["convert", "--compress", method, text(&disk), text(&copy)]);
        assert_eq!(other["source_root"], report["source_root"]);
        run("qemu-img", &["check", text(&copy)]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&raw), text(&copy)]);
        done(&["verify", other["manifest"].as_str().unwrap(), text(&copy)]);
        done(&["verify", other["manifest"].as_str().unwrap(), text(&raw)]);
    }
}

#[test]
fn a_vhd_longer_than_its_source_says_where_the_backup_gpt_is() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (dir.path().join("disk.raw"), dir.path().join("disk.vhd"));
    for (table, size, says) in
        [("gpt", (16 << 20) + 512, true), ("gpt", 16 << 20, false), ("dos", (16 << 20) + 512, false)]
    {
        support::empty_image(&disk, size);
        let script = format!("printf 'label: {table}\\n2048,2048\\n' | sfdisk -q {}", text(&disk));
        run("sh", &["-c", &script]);
        let out = haul(&["convert", "--force", "-O", "vhd", text(&disk), text(&copy)]);
        assert!(out.status.success());
        let stderr = String::from_utf8(out.stderr).unwrap();
        assert_eq!(stderr.contains("1048064 bytes longer than the source"), says, "{table} {size}: {stderr}");
    }
}

#[test]
fn every_block_of_a_disk_survives_at_odd_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let seed = seed();
    for size in [0, 512, 65_536, (101 << 20) + 512] {
        let disk = dir.path().join("odd.raw");
        fs::write(&disk, contents(size, seed)).unwrap();
        for method in ["none", "zlib", "zstd"] {
            let copy = dir.path().join("odd.qcow2");
            done(&["convert", "--all-blocks", "--force", "--compress", method, text(&disk), text(&copy)]);
            run("qemu-img", &["check", text(&copy)]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&disk), text(&copy)]);
            let back = dir.path().join("back.raw");
            done(&["convert", "--all-blocks", "--force", text(&copy), text(&back)]);
            assert!(fs::read(&disk).unwrap() == fs::read(&back).unwrap(), "{size} {method}");
        }
    }
}

#[test]
fn a_disk_is_taken_out_of_streams_and_archives() {
    let dir = tempfile::tempdir().unwrap();
    let disk = server_disk(dir.path());
    let image = dir.path().join("image.qcow2");
    run("qemu-img", &["convert", "-O", "qcow2", text(&disk), text(&image)]);
    run("zstd", &["-q", "-1", text(&image)]);
    let (packed, copy) = (dir.path().join("image.qcow2.zst"), dir.path().join("copy.qcow2"));
    let plain = done(&["convert", text(&image), text(&copy)]);
    let other = done(&["convert", "--force", text(&packed), text(&copy)]);
    assert_eq!(other["source_root"], plain["source_root"]);

    let tar = dir.path().join("both.tar.gz");
    run("tar", &["-C", text(dir.path()), "-czf", text(&tar), "server.raw", "image.qcow2"]);
    let (code, message) = refused(&["inspect", text(&tar)]);
    assert_eq!(code, 2);
    assert!(message.contains("--member") && message.contains("server.raw"), "{message}");
    let inspected = done(&["inspect", "--member", "image.qcow2", text(&tar)]);
    assert_eq!(inspected["image"]["format"], "qcow2");
    done(&["compare", "--member", "server.raw", text(&tar), "--b-member", "image.qcow2", text(&tar)]);
    // What the user calls raw is not looked into.
    let size = fs::metadata(&packed).unwrap().len();
    assert_eq!(done(&["inspect", "-f", "raw", text(&packed)])["image"]["virtual_size"], size);
}

#[test]
fn an_independent_reader_sees_the_same_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let bytes = contents(40 << 20, seed());
    fs::write(&disk, &bytes).unwrap();
    // qcow2-rs reads no zstd images.
    for method in ["none", "zlib"] {
        let copy = dir.path().join(format!("{method}.qcow2"));
        done(&["convert", "--all-blocks", "--compress", method, text(&disk), text(&copy)]);
        let mut seen = vec![0; bytes.len()];
        qcow2_rs::read_all(&copy, |at, piece| {
            let at = usize::try_from(at).unwrap();
            seen[at..at + piece.len()].copy_from_slice(piece);
        });
        assert!(seen == bytes, "{method}");
    }
}

#[test]
fn the_same_source_gives_the_same_bytes_whatever_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    let disk = server_disk(dir.path());
    let images: Vec<_> = ["1", "5"]
        .iter()
        .map(|threads| {
            let copy = dir.path().join(format!("{threads}.qcow2"));
            done(&["convert", "--compress", "zstd", "--threads", threads, text(&disk), text(&copy)]);
            fs::read(copy).unwrap()
        })
        .collect();
    assert!(images[0] == images[1]);
}

#[cfg(feature = "fault-points")]
#[test]
fn a_conversion_killed_anywhere_resumes_to_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let seed = seed();
    fs::write(&disk, contents(300 << 20, seed)).unwrap();
    for method in ["none", "zstd"] {
        let whole = dir.path().join(format!("whole-{method}.qcow2"));
        let expected = done(&["convert", "--all-blocks", "--compress", method, text(&disk), text(&whole)]);
        let mut random = Random(seed);
        for _ in 0..4 {
            let copy = dir.path().join("killed.qcow2");
            let args = ["convert", "--all-blocks", "--compress", method, text(&disk), text(&copy)];
            // 150 batches, and a sync mark now and then: two kills in one job, then the end.
            let mut kills = 0;
            for _ in 0..2 {
                let at = random.below(90) + 2;
                println!("{method}: killed at journal position {at}");
                let out = Command::new(env!("CARGO_BIN_EXE_haul"))
                    .args(args)
                    .arg("--resume")
                    .env("HAUL_FAULT", format!("journal:{at}"))
                    .output()
                    .unwrap();
                kills += usize::from(out.status.signal() == Some(9));
                assert!(!copy.exists() || out.status.success());
                if out.status.success() {
                    break;
                }
            }
            assert!(kills > 0, "nothing was killed");
            let resumed =
                if copy.exists() { expected.clone() } else { done(&[&args[..], &["--resume"]].concat()) };
            assert_eq!(resumed["source_root"], expected["source_root"]);
            assert!(fs::read(&copy).unwrap() == fs::read(&whole).unwrap(), "the resumed image differs");
            for left in ["killed.qcow2.haul-part", "killed.qcow2.haul-journal"] {
                assert!(!dir.path().join(left).exists());
            }
            fs::remove_file(&copy).unwrap();
        }
    }
}

#[test]
fn a_damaged_copy_is_told_from_a_good_one() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    fs::write(&disk, contents(8 << 20, seed())).unwrap();
    let copy = dir.path().join("copy.raw");
    let manifest = dir.path().join("copy.raw.manifest");
    done(&["convert", "--all-blocks", text(&disk), text(&copy)]);
    let file = File::options().read(true).write(true).open(&copy).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 3 << 20).unwrap();
    let (code, message) = refused(&["verify", text(&manifest), text(&copy)]);
    assert_eq!(code, 10, "{message}");
    assert!(message.contains("3145728..3211264"), "{message}");
    let (code, message) = refused(&["compare", text(&disk), text(&copy)]);
    assert_eq!(code, 10, "{message}");
    assert!(message.contains("3145728..3146240"), "{message}");

    let mut bytes = fs::read(&manifest).unwrap();
    bytes[40] ^= 1;
    fs::write(&manifest, bytes).unwrap();
    let (code, message) = refused(&["verify", text(&manifest), text(&copy)]);
    assert_eq!(code, 5, "{message}");
}

#[test]
fn each_refusal_has_its_exit_code_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (disk, copy) = (path("disk.raw"), path("copy.qcow2"));
    fs::write(&disk, contents(4 << 20, 1)).unwrap();

    let (code, message) = refused(&["convert", "/nonexistent/disk", text(&copy)]);
    assert_eq!(code, 4, "{message}");
    let (code, message) = refused(&["convert", text(&disk), text(&disk)]);
    assert_eq!(code, 2, "{message}");
    let (code, message) = refused(&["convert", text(&disk), "/nonexistent/folder/copy"]);
    assert_eq!(code, 6, "{message}");
    let (code, message) = refused(&["convert", "--compress", "zstd", text(&disk), text(&path("copy.raw"))]);
    assert_eq!(code, 2, "{message}");
    fs::write(&copy, "mine").unwrap();
    let (code, message) = refused(&["convert", text(&disk), text(&copy)]);
    assert_eq!(code, 2, "{message}");
    assert_eq!(fs::read(&copy).unwrap(), b"mine");
    fs::remove_file(&copy).unwrap();

    let lying = path("lying.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&lying), "1G"]);
    File::options().write(true).open(&lying).unwrap().write_all_at(&[0xff; 8], 40).unwrap();
    let (code, message) = refused(&["convert", text(&lying), text(&copy)]);
    assert_eq!(code, 5, "{message}");
    assert!(message.contains("l1_table_offset") || message.contains("l1"), "{message}");

    let backed = path("backed.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", text(&backed)]);
    let (code, message) = refused(&["convert", text(&backed), text(&copy)]);
    assert_eq!(code, 5, "{message}");
    assert!(message.contains("/etc/shadow"), "{message}");
    assert_holds(dir.path(), &["backed.qcow2", "disk.raw", "lying.qcow2"]);
}

#[test]
fn a_full_disk_is_named_and_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let mut bytes = vec![0; 24 << 20];
    Random(3).fill(&mut bytes);
    fs::write(&disk, &bytes).unwrap();
    let small = dir.path().join("small");
    support::empty_image(&small, 16 << 20);
    run("mkfs.ext4", &["-q", "-F", "-m0", text(&small)]);
    let mount = LoopMount::new(&small, "");
    let copy = mount.path().join("copy.qcow2");
    let (code, message) = refused(&["convert", text(&disk), text(&copy)]);
    assert_eq!(code, 6, "{message}");
    assert!(message.contains("No space left"), "{message}");
    assert_holds(mount.path(), &["lost+found"]);
}

#[test]
fn a_disk_in_use_is_refused_with_its_mount_point() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    support::empty_image(&disk, 16 << 20);
    run("mkfs.ext4", &["-q", "-F", text(&disk)]);
    let copy = dir.path().join("copy.qcow2");
    {
        let mount = LoopMount::new(&disk, "");
        let (code, message) = refused(&["convert", text(&disk), text(&copy)]);
        assert_eq!(code, 4, "{message}");
        assert!(message.contains(text(mount.path())), "{message}");
        let out = haul(&["convert", "--inconsistent", text(&disk), text(&copy)]);
        assert_eq!(out.status.code(), Some(14), "a torn copy is done with a warning");
    }
    done(&["convert", "--force", text(&disk), text(&copy)]);
}

#[test]
fn unreadable_sectors_stop_the_copy_or_become_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    fs::write(&disk, vec![7; 8 << 20]).unwrap();
    // A loop device over a file cut short after it was attached fails to read what is gone.
    let device = support::LoopDevice::new(&disk, 512);
    File::options().write(true).open(&disk).unwrap().set_len(6 << 20).unwrap();
    let copy = dir.path().join("copy.raw");
    let (code, message) = refused(&["convert", text(&device.path), text(&copy)]);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("6291456"), "{message}");
    assert!(!copy.exists());
    let out = haul(&["convert", "--on-read-error", "zero", text(&device.path), text(&copy)]);
    assert_eq!(out.status.code(), Some(14), "{}", String::from_utf8_lossy(&out.stderr));
    let bytes = fs::read(&copy).unwrap();
    assert!(bytes[..6 << 20].iter().all(|byte| *byte == 7) && bytes[6 << 20..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_sparse_disk_of_16_tib_is_copied_at_once_and_in_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (dir.path().join("huge.raw"), dir.path().join("huge.qcow2"));
    // ext4 holds files of up to 16 TiB less a block.
    let size = (16 << 40) - 65_536;
    support::empty_image(&disk, size);
    let file = File::options().write(true).open(&disk).unwrap();
    for at in [0, 5 << 40, size - 4096] {
        file.write_all_at(&[9; 4096], at).unwrap();
    }
    let out = Command::new("/usr/bin/time")
        .args([
            "-f",
            "%M",
            env!("CARGO_BIN_EXE_haul"),
            "-q",
            "convert",
            "--all-blocks",
            text(&disk),
            text(&copy),
        ])
        .output()
        .expect("the program `time` (Debian package time)");
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{stderr}");
    let resident: u64 = stderr.trim().lines().last().unwrap().parse().unwrap();
    assert!(resident <= 256 << 10, "{resident} KiB resident");
    run("qemu-img", &["check", text(&copy)]);
    done(&["verify", &format!("{}.manifest", text(&copy)), text(&copy)]);
    done(&["compare", text(&disk), text(&copy)]);
}
