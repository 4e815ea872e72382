//! Rounds on a finished copy, on the command line: updated, stopped anywhere, taken back; files here, objects in a lab.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

mod support;
#[path = "support/images.rs"]
mod images;
#[cfg(feature = "net")]
#[path = "support/lab.rs"]
mod lab;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
#[cfg(feature = "fault-points")]
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use images::{Random, contents, seed};
use serde_json::Value;
use support::{run, text};

const PIECE: u64 = 64 << 10;

fn haul(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
    command.args(args).arg("--json");
    command
}

fn output(args: &[&str]) -> Output {
    haul(args).output().unwrap()
}

/// The result of a command that must succeed.
fn done(args: &[&str]) -> Value {
    let out = output(args);
    let stdout = String::from_utf8(out.stdout).unwrap();
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap_or("{}")).unwrap();
    assert!(out.status.success(), "{args:?}: {stdout}{}", String::from_utf8_lossy(&out.stderr));
    last.get("result").cloned().unwrap_or(last)
}

/// The id of the error of a command that must fail.
fn refused(args: &[&str]) -> String {
    let out = output(args);
    let stdout = String::from_utf8(out.stdout).unwrap();
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap_or("{}")).unwrap();
    assert!(!out.status.success(), "{args:?} succeeded: {stdout}");
    last["id"].as_str().unwrap_or_else(|| panic!("{last}")).to_owned()
}

/// Writes noise, text or zeroes over `count` pieces of a disk, at offsets of its choice.
fn change(disk: &Path, random: &mut Random, count: u64, aligned: bool) {
    let file = File::options().write(true).open(disk).unwrap();
    let size = file.metadata().unwrap().len();
    for _ in 0..count {
        let mut piece = vec![0; usize::try_from(PIECE).unwrap()];
        match random.below(4) {
            0 => {}
            1 => piece.fill(b'x'),
            _ => random.fill(&mut piece),
        }
        let at = random.below(size - PIECE);
        file.write_all_at(&piece, if aligned { at / PIECE * PIECE } else { at }).unwrap();
    }
}

/// Names in `folder` that a finished job must not leave.
fn left(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(".haul-") && !name.ends_with(".haul-undo")).collect()
}

#[test]
fn a_round_makes_the_copy_what_its_source_is_and_undo_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let mut random = Random(seed());
    fs::write(&disk, contents((48 << 20) + 512, seed())).unwrap();
    for method in ["none", "zlib", "zstd"] {
        let copy = dir.path().join(format!("{method}.qcow2"));
        let manifest = dir.path().join(format!("{method}.qcow2.manifest"));
        done(&["convert", "--all-blocks", "--compress", method, text(&disk), text(&copy)]);
        for round in 0..4 {
            change(&disk, &mut random, 12, round % 2 == 0);
            let before = (fs::read(&copy).unwrap(), fs::read(&manifest).unwrap());
            let updated = done(&["convert", "--all-blocks", "--update", text(&disk), text(&copy)]);
            run("qemu-img", &["check", text(&copy)]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&disk), text(&copy)]);
            done(&["verify", text(&manifest), text(&copy)]);
            let fresh = dir.path().join("fresh.qcow2");
            let whole = ["convert", "--all-blocks", "--force", text(&disk), text(&fresh)];
            assert_eq!(done(&whole)["source_root"], updated["source_root"]);
            let grown = fs::metadata(&copy).unwrap().len() - before.0.len() as u64;
            let changed = updated["changed"].as_u64().unwrap();
            assert!(grown <= changed + (1 << 20), "{grown} bytes more for {changed}");
            if round % 2 == 0 {
                done(&["undo", text(&copy)]);
                assert!((fs::read(&copy).unwrap(), fs::read(&manifest).unwrap()) == before, "{method}");
                assert_eq!(refused(&["undo", text(&copy)]), "undo.nothing");
                done(&["convert", "--all-blocks", "--update", text(&disk), text(&copy)]);
            }
        }
        let same = done(&["convert", "--all-blocks", "--update", text(&disk), text(&copy)]);
        assert_eq!(same["changed"], 0);
        assert!(left(dir.path()).is_empty(), "{:?}", left(dir.path()));
    }
}

#[cfg(feature = "fault-points")]
#[test]
fn a_round_killed_anywhere_is_taken_up_or_dropped_and_never_half_there() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    let manifest = dir.path().join("disk.qcow2.manifest");
    let mut random = Random(seed());
    fs::write(&disk, contents(24 << 20, seed())).unwrap();
    done(&["convert", "--all-blocks", "--compress", "zstd", text(&disk), text(&copy)]);
    let update = ["convert", "--all-blocks", "--update", text(&disk), text(&copy)];
    for (phase, points) in [("journal", 4), ("complete", 3), ("complete", 3), ("journal", 4)] {
        for then in [&["--resume"][..], &[]] {
            let before = (fs::read(&disk).unwrap(), fs::read(&copy).unwrap());
            change(&disk, &mut random, 30, false);
            let fault = format!("{phase}:{}", 1 + random.below(points));
            let out = haul(&update).env("HAUL_FAULT", &fault).output().unwrap();
            assert_eq!(out.status.signal(), Some(9), "{fault} was not reached");
            // It is the disk before or after, whatever its tail holds.
            let back = images::as_qemu_reads(&copy);
            assert!(back == before.0 || back == fs::read(&disk).unwrap(), "{fault}");
            done(&[&update[..], then].concat());
            run("qemu-img", &["check", text(&copy)]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&disk), text(&copy)]);
            done(&["verify", text(&manifest), text(&copy)]);
            assert!(left(dir.path()).is_empty(), "{fault} {then:?}: {:?}", left(dir.path()));
        }
    }
}

#[cfg(feature = "fault-points")]
#[test]
fn a_round_that_can_neither_go_on_nor_be_taken_back_is_neither_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    let mut random = Random(seed());
    fs::write(&disk, contents(24 << 20, seed())).unwrap();
    done(&["convert", "--all-blocks", text(&disk), text(&copy)]);
    let update = ["convert", "--all-blocks", "--update", text(&disk), text(&copy)];
    for (fault, then) in
        [("complete:2", &["--resume"][..]), ("complete:2", &[]), ("complete:3", &["--resume"])]
    {
        change(&disk, &mut random, 30, false);
        let out = haul(&update).env("HAUL_FAULT", fault).output().unwrap();
        assert_eq!(out.status.signal(), Some(9), "{fault} was not reached");
        run("chattr", &["+i", text(&copy)]);
        assert_eq!(refused(&[&update[..], then].concat()), "io.write");
        run("chattr", &["-i", text(&copy)]);
        done(&update);
        run("qemu-img", &["check", text(&copy)]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&disk), text(&copy)]);
        assert!(left(dir.path()).is_empty(), "{:?}", left(dir.path()));
    }
}

#[test]
fn rounds_refuse_a_copy_they_do_not_know_and_give_way_to_a_whole_copy_when_most_is_dead() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let mut random = Random(seed());
    let mut bytes = vec![0; 80 << 20];
    random.fill(&mut bytes);
    fs::write(&disk, &bytes).unwrap();
    let copy = dir.path().join("disk.qcow2");
    let update = ["convert", "--all-blocks", "--update", text(&disk), text(&copy)];
    assert_eq!(refused(&update), "io.open");
    let raw = dir.path().join("copy.raw");
    done(&["convert", "--all-blocks", text(&disk), text(&raw)]);
    assert_eq!(refused(&["convert", "--all-blocks", "--update", text(&disk), text(&raw)]), "round.format");
    done(&["convert", "--all-blocks", text(&disk), text(&copy)]);

    // A copy that is longer than its manifest says is another one.
    let len = fs::metadata(&copy).unwrap().len();
    File::options().write(true).open(&copy).unwrap().set_len(len + 512).unwrap();
    assert_eq!(refused(&update), "round.other");
    File::options().write(true).open(&copy).unwrap().set_len(len).unwrap();

    // Everything new: 80 MiB of the image are dead, and the next round is a whole copy.
    random.fill(&mut bytes);
    fs::write(&disk, &bytes).unwrap();
    done(&update);
    assert!(fs::metadata(&copy).unwrap().len() > 160 << 20);
    change(&disk, &mut random, 1, true);
    done(&update);
    assert!(fs::metadata(&copy).unwrap().len() < 90 << 20, "the image was not made again");
    run("qemu-img", &["check", text(&copy)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&disk), text(&copy)]);
    assert_eq!(refused(&["undo", text(&copy)]), "undo.nothing");
    assert!(left(dir.path()).is_empty(), "{:?}", left(dir.path()));

    // What an older round replaced is not put into a copy that came from elsewhere.
    change(&disk, &mut random, 1, true);
    done(&update);
    let other = dir.path().join("other.qcow2");
    done(&["convert", "--all-blocks", text(&disk), text(&other)]);
    for suffix in ["", ".manifest"] {
        let name = |path: &Path| format!("{}{suffix}", text(path));
        fs::rename(name(&other), name(&copy)).unwrap();
    }
    assert_eq!(refused(&["undo", text(&copy)]), "undo.other");
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&disk), text(&copy)]);
}

/// A Debian disk of scripts/guests, whose initramfs knows no virtio.
fn debian() -> String {
    let out = Command::new("scripts/guests/disk.sh").output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    fs::canonicalize(String::from_utf8(out.stdout).unwrap().trim()).unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_compressed_copy_is_fixed_where_it_lies_and_put_back() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (debian(), dir.path().join("debian.qcow2"));
    let manifest = dir.path().join("debian.qcow2.manifest");
    let made = done(&["convert", "--compress", "zlib", &disk, text(&copy)]);
    let bytes = fs::metadata(&copy).unwrap().len();
    let before = fs::read(&manifest).unwrap();
    let fixed = done(&["fix", text(&copy)]);
    assert_eq!(fixed["source_root"], made["source_root"]);
    assert_ne!(fixed["image_root"], made["image_root"]);
    assert!(!fixed["proofs"].as_array().unwrap().is_empty());
    run("qemu-img", &["check", text(&copy)]);
    done(&["verify", text(&manifest), text(&copy)]);
    assert!(fs::metadata(&copy).unwrap().len() < bytes + (64 << 20));
    assert_eq!(done(&["fix", text(&copy)])["changed"], 0);
    assert_eq!(refused(&["convert", "--update", &disk, text(&copy)]), "round.fixed");
    done(&["undo", text(&copy)]);
    assert_eq!((fs::metadata(&copy).unwrap().len(), fs::read(&manifest).unwrap()), (bytes, before));
    done(&["verify", text(&manifest), text(&copy)]);
    assert_eq!(done(&["convert", "--update", &disk, text(&copy)])["changed"], 0);
    assert!(left(dir.path()).is_empty(), "{:?}", left(dir.path()));
}

#[cfg(feature = "net")]
mod objects {
    use super::*;
    use haul::lab::s3::{Effect, Fault};
    use lab::{BUCKET, Lab, result};

    /// The id of the error of a command that must fail.
    fn failure(output: &Output) -> String {
        lab::failed(output).1["id"].as_str().unwrap().to_owned()
    }

    const RAW: &[&str] = &["-O", "raw"];
    const FIXED: &[&str] = &["-O", "vhd", "-o", "subformat=fixed"];

    /// The disk, a store, and the copy of one in the other.
    struct Copied {
        cloud: Lab,
        dir: tempfile::TempDir,
        url: String,
    }

    impl Copied {
        fn new(method: &str, bytes: &[u8]) -> Copied {
            Self::with(&["-O", "qcow2", "--compress", method], bytes)
        }

        fn with(options: &[&str], bytes: &[u8]) -> Copied {
            let (cloud, dir) = (Lab::start(), tempfile::tempdir().unwrap());
            fs::write(dir.path().join("disk.raw"), bytes).unwrap();
            let copied = Copied { cloud, dir, url: format!("cos://{BUCKET}/copy") };
            copied.done(&[&["convert", "--all-blocks", "disk.raw", &copied.url], options].concat());
            copied
        }

        fn command(&self, args: &[&str]) -> Command {
            let mut command = self.cloud.haul(args);
            command.current_dir(self.dir.path());
            command
        }

        fn done(&self, args: &[&str]) -> Value {
            result(&self.command(args).output().unwrap())
        }

        fn update(&self, more: &[&str]) -> Value {
            let args = ["convert", "--all-blocks", "--update", "disk.raw", &self.url];
            self.done(&[&args[..], more].concat())
        }

        /// The object holds what the disk does, by its manifest, by comparison and by QEMU.
        fn prove(&self) {
            self.done(&["verify", "copy.manifest", &self.url]);
            self.done(&["compare", "disk.raw", &self.url]);
            let left = left(self.dir.path());
            assert!(left.is_empty(), "{left:?}");
        }

        fn received(&self) -> u64 {
            ["UploadPart", "PutObject"].iter().map(|operation| self.cloud.store.received(operation)).sum()
        }
    }

    #[test]
    fn a_round_sends_what_changed_and_copies_the_rest_inside_the_store() {
        let mut random = Random(seed());
        let mut bytes = vec![0; 96 << 20];
        random.fill(&mut bytes);
        for method in ["none", "zlib", "zstd"] {
            let copied = Copied::new(method, &bytes);
            let disk = copied.dir.path().join("disk.raw");
            for _ in 0..3 {
                change(&disk, &mut random, 15, true);
                let before = copied.received();
                let changed = copied.update(&[])["changed"].as_u64().unwrap();
                let sent = copied.received() - before;
                assert!(sent <= changed * 3 / 2 + (32 << 20), "{sent} bytes sent for {changed} changed");
                assert!(
                    copied.cloud.store.requests().iter().any(|asked| asked.operation == "UploadPartCopy")
                );
                copied.prove();
            }
            copied.done(&["undo", &copied.url]);
            copied.done(&["verify", "copy.manifest", &copied.url]);
            copied.update(&[]);
            copied.prove();
        }
    }

    /// How many bytes a round on a raw or fixed VHD object may send, given what differs: whole granules of 8 MiB, the first
    /// always and the last for its footer.
    fn granules(before: &[u8], after: &[u8], footer: bool) -> u64 {
        let all: Vec<bool> =
            before.chunks(8 << 20).zip(after.chunks(8 << 20)).map(|(old, new)| old != new).collect();
        let last = all.len() - 1;
        let sent = |(i, differs): &(usize, &bool)| **differs || *i == 0 || (footer && *i == last);
        let count = all.iter().enumerate().filter(sent).count() as u64;
        count * (8 << 20) + 512
    }

    #[test]
    fn a_round_on_a_raw_or_fixed_vhd_object_sends_the_touched_parts_again() {
        let mut random = Random(seed());
        for (options, format) in [(RAW, "raw"), (FIXED, "vpc")] {
            let copied = Copied::with(options, &contents((150 << 20) + 512, seed()));
            let disk = copied.dir.path().join("disk.raw");
            for round in 0..3 {
                let before = fs::read(&disk).unwrap();
                change(&disk, &mut random, 4, round == 1);
                if round == 2 {
                    // The end of the disk, and an answer lost at the switch.
                    let file = File::options().write(true).open(&disk).unwrap();
                    file.write_all_at(&[9; 512], 150 << 20).unwrap();
                    copied.cloud.store.inject(Fault::once("CompleteMultipartUpload", Effect::LoseAnswer));
                }
                let sent = copied.received();
                let updated = copied.update(&[]);
                let sent = copied.received() - sent;
                let most = granules(&before, &fs::read(&disk).unwrap(), format == "vpc");
                assert!(sent <= most, "{format} {round}: {sent} bytes sent, {most} at most");
                println!(
                    "figure: {format}: {sent} bytes sent of {} for {}",
                    before.len(),
                    updated["changed"]
                );
                let asked = copied.cloud.store.requests();
                assert!(asked.iter().any(|asked| asked.operation == "UploadPartCopy"));
                copied.prove();
                let whole = copied.done(&["convert", "--all-blocks", "--force", "disk.raw", "whole.qcow2"]);
                assert_eq!(whole["source_root"], updated["source_root"]);
                // The object is byte for byte what a whole copy is, and QEMU finds the disk in it.
                copied
                    .done(&[&["convert", "--all-blocks", "--force", "disk.raw", "fresh"], options].concat());
                let object = download(&copied);
                assert!(fs::read(&object).unwrap() == fs::read(copied.dir.path().join("fresh")).unwrap());
                run("qemu-img", &["compare", "-f", "raw", "-F", format, text(&disk), text(&object)]);
                assert_eq!(copied.update(&[])["changed"], 0);
            }
            let refused = |args: &[&str]| failure(&copied.command(args).output().unwrap());
            assert_eq!(refused(&["fix", &copied.url]), "round.format");
            assert_eq!(refused(&["undo", &copied.url]), "round.format");

            // Another disk of the same length was put there: what is not touched would be of that one.
            change(&disk, &mut random, 1, true);
            let other = copied.dir.path().join("other");
            fs::copy(download(&copied), &other).unwrap();
            File::options().write(true).open(&other).unwrap().write_all_at(b"other", 77 << 20).unwrap();
            copied.done(&["upload", "other", &copied.url]);
            let update = ["convert", "--all-blocks", "--update", "disk.raw", &copied.url];
            assert_eq!(refused(&update), "round.other");
            assert!(fs::read(download(&copied)).unwrap() == fs::read(&other).unwrap());
        }
    }

    /// The object as it is, in a file.
    fn download(copied: &Copied) -> std::path::PathBuf {
        copied.done(&["convert", "--all-blocks", "--force", "-f", "raw", "-O", "raw", &copied.url, "object"]);
        copied.dir.path().join("object")
    }

    #[test]
    fn a_dynamic_vhd_object_gets_no_round() {
        let copied = Copied::with(&["-O", "vhd"], &contents(3 << 20, seed()));
        let update = ["convert", "--all-blocks", "--update", "disk.raw", &copied.url];
        assert_eq!(failure(&copied.command(&update).output().unwrap()), "round.format");
    }

    #[test]
    fn a_fixed_object_boots_on_virtio() {
        let (cloud, dir) = (Lab::start(), tempfile::tempdir().unwrap());
        let url = format!("cos://{BUCKET}/debian.qcow2");
        let done = |args: &[&str]| result(&cloud.haul(args).current_dir(dir.path()).output().unwrap());
        done(&["convert", "--compress", "zlib", &debian(), &url]);
        done(&["fix", &url]);
        done(&["verify", "debian.qcow2.manifest", &url]);
        let lock = File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
        lock.lock().unwrap();
        let console = dir.path().join("console.log");
        // It is read where it is.
        let booted = done(&["boot", "--timeout", "400", "--console", text(&console), &url]);
        assert_eq!(booted["inside"]["root"], "/dev/vda1", "{booted}");
        assert_eq!(booted["inside"]["addresses"][0], "eth0:10.0.2.15/24", "{booted}");
        assert_eq!(booted["inside"]["unmounted"], serde_json::json!([]), "{booted}");
    }

    /// The disk: Debian on its first 3 GiB, noise on the other five, where every round changes 1 % of 8 GiB.
    #[test]
    #[ignore = "long: thirty rounds on 8 GiB; scripts/test.sh --long"]
    fn thirty_rounds_of_an_8_gib_disk_send_what_changed_and_the_object_stays_importable() {
        const PIECES: u64 = 8 * (1 << 30) / 100 / PIECE;
        let (cloud, dir) = (Lab::start(), tempfile::tempdir().unwrap());
        let disk = dir.path().join("disk.raw");
        support::copy_image(Path::new(&debian()), &disk);
        let file = File::options().write(true).open(&disk).unwrap();
        let noise = fs::metadata(&disk).unwrap().len();
        let mut random = Random(seed());
        let mut bytes = vec![0; 16 << 20];
        for at in (noise..8 << 30).step_by(bytes.len()) {
            random.fill(&mut bytes);
            file.write_all_at(&bytes, at).unwrap();
        }
        let url = format!("cos://{BUCKET}/disk.qcow2");
        let done = |args: &[&str]| result(&cloud.haul(args).current_dir(dir.path()).output().unwrap());
        let received = |operation| cloud.store.received(operation);
        done(&["convert", "--all-blocks", "disk.raw", &url]);
        let (mut most, mut least, mut compacted) = (0.0_f64, u64::MAX, 0);
        for _ in 0..30 {
            let mut pieces = std::collections::BTreeSet::new();
            while (pieces.len() as u64) < PIECES {
                pieces.insert(noise + random.below(((8 << 30) - noise) / PIECE) * PIECE);
            }
            for at in &pieces {
                random.fill(&mut bytes[..1 << 16]);
                file.write_all_at(&bytes[..1 << 16], *at).unwrap();
            }
            let before = received("UploadPart");
            let changed =
                done(&["convert", "--all-blocks", "--update", "disk.raw", &url])["changed"].as_u64();
            let sent = received("UploadPart") - before;
            // More than a quarter of the object is dead: it was made anew.
            let Some(changed) = changed else {
                compacted += 1;
                continue;
            };
            assert_eq!(changed, PIECES * PIECE);
            assert!(sent <= changed * 3 / 2 + (32 << 20), "{sent} bytes sent for {changed} changed");
            most = most.max(sent as f64 / changed as f64);
            least = least.min(sent);
        }
        assert!(compacted <= 1, "{compacted} of 30 rounds were whole copies");
        println!(
            "figure: 30 rounds of 1 % of 8 GiB, {compacted} of them a compaction; the others sent at least {least} \
             bytes, at most {most:.3} x what changed"
        );
        done(&["verify", "disk.qcow2.manifest", &url]);
        done(&["compare", "disk.raw", &url]);
        done(&["fix", &url]);
        done(&["import", "--name", "thirty-rounds", "--poll", "1", &url]);
        assert_eq!(cloud.images(), 1);
    }

    #[cfg(feature = "fault-points")]
    #[test]
    fn a_round_killed_before_its_switch_leaves_an_object_alone_that_took_its_place() {
        for (then, error) in [(&["--resume"][..], "round.replaced"), (&[], "round.other")] {
            let copied = Copied::with(RAW, &contents(32 << 20, seed()));
            let file = File::options().write(true).open(copied.dir.path().join("disk.raw")).unwrap();
            file.write_all_at(b"changed", 20 << 20).unwrap();
            let update =
                [&["convert", "--all-blocks", "--update", "disk.raw", &copied.url][..], then].concat();
            // The manifest is the round's, the object not yet.
            let out = copied.command(&update).env("HAUL_FAULT", "complete:4").output().unwrap();
            assert_eq!(out.status.signal(), Some(9));
            let other = vec![7; 32 << 20];
            fs::write(copied.dir.path().join("other"), &other).unwrap();
            copied.done(&["upload", "other", &copied.url]);
            assert_eq!(failure(&copied.command(&update).output().unwrap()), error);
            assert!(fs::read(download(&copied)).unwrap() == other);
        }
    }

    #[cfg(feature = "fault-points")]
    #[test]
    fn a_round_on_an_object_killed_anywhere_is_taken_up_or_dropped() {
        let mut random = Random(seed());
        let mut bytes = vec![0; 64 << 20];
        random.fill(&mut bytes);
        for options in [&["-O", "qcow2", "--compress", "zlib"], RAW, FIXED] {
            let copied = Copied::with(options, &bytes);
            let disk = copied.dir.path().join("disk.raw");
            let places = [
                ("journal", 4),
                ("journal", 9),
                ("round", 1),
                ("upload", 1),
                ("complete", 5),
                ("complete", 5),
            ];
            for (phase, points) in places {
                for then in [&["--resume"][..], &[]] {
                    let old = fs::read(&disk).unwrap();
                    // Something is sent besides the first part, and something is copied inside the store.
                    let count = if options[1] == "qcow2" { 30 } else { 2 };
                    change(&disk, &mut random, count, false);
                    let file = File::options().write(true).open(&disk).unwrap();
                    file.write_all_at(&random.next().to_le_bytes(), 40 << 20).unwrap();
                    let fault = format!("{phase}:{}", 1 + random.below(points));
                    let args = ["convert", "--all-blocks", "--update", "disk.raw", &copied.url];
                    let out = copied.command(&args).env("HAUL_FAULT", &fault).output().unwrap();
                    assert_eq!(out.status.signal(), Some(9), "{options:?}: {fault} was not reached");
                    // It is the disk before or after, never a mixture.
                    copied.done(&["convert", "--all-blocks", "--force", "-O", "raw", &copied.url, "now"]);
                    let now = fs::read(copied.dir.path().join("now")).unwrap();
                    assert!(now == old || now == fs::read(&disk).unwrap(), "{options:?}: {fault}");
                    copied.update(then);
                    copied.prove();
                    assert_eq!(copied.cloud.uploads(), 0, "{options:?}: {fault} {then:?}");
                }
            }
        }
    }
}
