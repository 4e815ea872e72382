//! `haul migrate --to image`, killed in every phase and resumed, against a lab in this process: the server counts what is
//! sent again, the kernel counts writes to the source, and nothing is made twice or left behind.
//!
//! Needs root, FUSE, loop devices, tracefs, and the network once, for the disk (scripts/guests/disk.sh).

#![cfg(feature = "net")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test: a failure is the finding"
)]

mod support;
#[path = "support/images.rs"]
mod images;
#[path = "support/lab.rs"]
mod lab;
#[path = "support/trace.rs"]
mod trace;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
#[cfg(feature = "fault-points")]
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{BUCKET, Lab, failed, result};
use serde_json::Value;
use support::{LoopDevice, run, text};
use trace::WriteTrace;

#[cfg(feature = "fault-points")]
const PART: u64 = 16 << 20;

/// A server's disk as a block device, watched, with its checksum.
struct Source {
    device: LoopDevice,
    image: PathBuf,
    trace: WriteTrace,
    sum: String,
    identity: Value,
}

impl Source {
    fn new(options: &[&str]) -> Source {
        let image = PathBuf::from(run("scripts/guests/disk.sh", options).trim());
        let facts: Value =
            serde_json::from_slice(&fs::read(image.with_extension("raw.json")).unwrap()).unwrap();
        let device = LoopDevice::new(&image, 512);
        let (trace, sum) = (WriteTrace::of(&device.path), checksum(&image));
        Source { device, image, trace, sum, identity: facts["identity"].clone() }
    }

    /// The source was not written: the kernel saw no write, and its bytes are the same.
    fn assert_untouched(&self) {
        assert_eq!(self.trace.writes(), [] as [String; 0]);
        assert_eq!(checksum(&self.image), self.sum);
    }
}

fn checksum(path: &Path) -> String {
    run("b2sum", &[text(path)]).split(' ').next().unwrap().to_owned()
}

/// Mounts, loop devices and FUSE connections of this machine that haul may have made.
fn traces_on_the_host() -> BTreeSet<String> {
    let mut found: BTreeSet<String> = run("losetup", &["-nlO", "NAME,BACK-FILE"])
        .lines()
        .filter(|line| line.contains("haul-guest-copy"))
        .map(str::to_owned)
        .collect();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let mounts = fs::read_to_string(process.path().join("mountinfo")).unwrap_or_default();
        found.extend(mounts.lines().filter(|line| line.contains("fuse.haul")).map(str::to_owned));
    }
    found
}

/// Waits, far longer than it may take, until a killed haul has left nothing on the host.
fn assert_nothing_left() {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !traces_on_the_host().is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:#?}", traces_on_the_host());
        std::thread::yield_now();
    }
}

/// Proves the object of a finished job by haul's own verification through the command line.
fn verify(cloud: &Lab, job: &str) {
    let manifest = cloud.state().join("jobs").join(job).join("manifest");
    let object = format!("cos://{BUCKET}/{job}.qcow2");
    let verdict = result(&cloud.haul(&["verify", text(&manifest), &object]).output().unwrap());
    assert!(verdict["compared"].as_u64().unwrap() > 0);
}

#[test]
fn a_planted_write_is_seen_by_the_trace() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    support::empty_image(&image, 1 << 20);
    let device = LoopDevice::new(&image, 512);
    let trace = WriteTrace::of(&device.path);
    let file = fs::File::options().read(true).write(true).open(&device.path).unwrap();
    file.read_exact_at(&mut [0; 4096], 0).unwrap();
    assert_eq!(trace.writes(), [] as [String; 0]);
    file.write_all_at(&[1; 4096], 8192).unwrap();
    file.sync_all().unwrap();
    assert!(trace.writes().iter().any(|line| line.contains(" 16 + 8 ")), "{:?}", trace.writes());
}

#[test]
fn what_the_cloud_refuses_is_told_apart_and_leaves_nothing_in_the_store() {
    let cloud = Lab::start();
    let source = Source::new(&[]);
    let disk = source.device.path.clone();
    // Wrong keys.
    let mut command = cloud.migrate("refused", &disk, &[]);
    let (code, error) = failed(&command.env("TENCENTCLOUD_SECRET_KEY", "wrong").output().unwrap());
    assert_eq!(code, Some(9), "{error}");
    // A bucket that is not there.
    let args = ["migrate", "--to", "image", "--bucket", "none-1250000000", "--ignore-check", text(&disk)];
    let (code, error) = failed(&cloud.haul(&args).output().unwrap());
    assert_eq!(code, Some(7), "{error}");
    // The store's clock is an hour ahead of ours.
    cloud.store.set_clock(3600);
    let (code, error) = failed(&cloud.migrate("refused", &disk, &["--ignore-check"]).output().unwrap());
    assert_eq!(code, Some(9), "{error}");
    assert!(error["why"].as_str().unwrap().contains("clock"), "{error}");
    cloud.store.set_clock(0);
    // No root: fix-ups need it.
    let mut command = Command::new("setpriv");
    let inner = cloud.migrate("refused", &disk, &["--ignore-check"]);
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(inner.get_program())
        .args(inner.get_args());
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let state = tempfile::tempdir().unwrap();
    run("chown", &["65534", text(state.path())]);
    let (code, error) =
        failed(&command.env("HAUL_STATE_DIR", state.path()).env("HOME", state.path()).output().unwrap());
    assert_eq!(code, Some(13), "{error}");
    for three in [error["what"].as_str(), error["why"].as_str(), error["do"].as_str()] {
        assert!(three.is_some_and(|line| !line.is_empty()), "{error}");
    }
    assert_eq!(cloud.store.received("UploadPart"), 0);
    assert_nothing_left();
    source.assert_untouched();
}

/// Kills a migration `kills` times in each of `phases`, each in a job of its own, resumes it, and holds it against a
/// migration that was left alone. Returns the last job's object, as an image file.
#[cfg(feature = "fault-points")]
fn killed_and_resumed(phases: &[(&str, u64)], kills: usize) -> (Source, tempfile::TempDir, PathBuf) {
    let cloud = Lab::start();
    let source = Source::new(&[]);
    let mut random = images::Random(images::seed());
    let whole = result(&cloud.migrate("whole", &source.device.path, &[]).output().unwrap());
    let image_bytes = whole["results"]["image_bytes"].as_u64().unwrap();
    verify(&cloud, whole["job"].as_str().unwrap());

    let mut last = String::new();
    for (phase, points) in phases {
        for kill in 0..kills {
            let name = format!("killed-{phase}-{kill}");
            let before = cloud.store.received("UploadPart");
            let at = 1 + random.below(*points);
            let mut command = cloud.migrate(&name, &source.device.path, &[]);
            let output = command.env("HAUL_FAULT", format!("{phase}:{at}")).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert_eq!(output.status.signal(), Some(9), "{phase}:{at} was not reached: {said}");
            let job = cloud.job();
            println!("figure: {name}: killed at {phase}:{at}");
            assert_nothing_left();
            let resumed = result(&cloud.haul(&["migrate", "--resume", &job]).output().unwrap());
            let bytes = resumed["results"]["image_bytes"].as_u64().unwrap();
            assert_eq!(resumed["results"]["source_root"], whole["results"]["source_root"], "{name}");
            let sent = cloud.store.received("UploadPart") - before;
            println!("figure: {name}: {sent} bytes sent for an object of {bytes}");
            // At most four parts were under way; a part ends at the first batch border after its size.
            assert!(sent <= bytes + 4 * (PART + (2 << 20)), "{name}: {sent} of {bytes} bytes were sent");
            assert!(bytes.abs_diff(image_bytes) < image_bytes / 50, "{name}: {bytes}, {image_bytes}");
            verify(&cloud, &job);
            let id = resumed["image"].as_str().unwrap();
            let found = cloud.cvm().image_by_name(&name).unwrap().unwrap();
            assert_eq!((found.image_id.as_str(), found.image_state.as_str()), (id, "NORMAL"));
            assert!(cloud.cvm().image_by_name(&name).unwrap().is_some());
            assert!(resumed["results"]["proofs"].as_array().is_some_and(|proofs| !proofs.is_empty()));
            // This job has one image: none was made twice.
            assert_eq!(cloud.images(), 2);
            cloud.delete_image(id);
            last = job;
        }
    }
    source.assert_untouched();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let object = format!("cos://{BUCKET}/{last}.qcow2");
    result(&cloud.haul(&["convert", "--all-blocks", &object, text(&image)]).output().unwrap());
    run("qemu-img", &["check", "-q", text(&image)]);
    (source, dir, image)
}

/// About how many places of each phase there are to be killed at: fewer, never more, or a test would say so.
#[cfg(feature = "fault-points")]
const PHASES: [(&str, u64); 5] = [("read", 200), ("fix", 13), ("upload", 16), ("complete", 6), ("import", 6)];

#[cfg(feature = "fault-points")]
#[test]
fn a_migration_killed_in_any_phase_resumes_to_one_image_of_the_same_source() {
    killed_and_resumed(&PHASES, 1);
}

#[cfg(feature = "fault-points")]
#[test]
#[ignore = "long: fifteen migrations killed, five boots; scripts/test.sh --long"]
fn a_migration_killed_three_times_in_each_phase_resumes_and_boots() {
    for phase in PHASES {
        let (source, _dir, image) = killed_and_resumed(&[phase], 3);
        boots_as_itself(&image, &source.identity, haul::boot::Firmware::Bios);
    }
}

#[test]
#[ignore = "long: boots a guest under TCG for minutes; scripts/test.sh --long"]
fn what_a_server_lacks_comes_with_its_migration() {
    let cloud = Lab::start();
    let source = Source::new(&["cloudinit=no"]);
    let (code, error) = failed(&cloud.migrate("lacking", &source.device.path, &[]).output().unwrap());
    assert_eq!(code, Some(3), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let mut more = vec!["--firmware".to_owned(), "uefi".to_owned()];
    for name in ["cloud-init", "grub-efi-amd64-bin"] {
        let package = run("scripts/guests/package.sh", &["bookworm", name, text(dir.path())]);
        more.extend(["--package".to_owned(), package.trim().to_owned()]);
    }
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    let done = result(&cloud.migrate("whole", &source.device.path, &more).output().unwrap());
    assert_eq!(done["results"]["boot"], "UEFI", "{done}");
    source.assert_untouched();
    assert_nothing_left();
    let image = dir.path().join("image.qcow2");
    let object = format!("cos://{BUCKET}/{}.qcow2", done["job"].as_str().unwrap());
    result(&cloud.haul(&["convert", "--all-blocks", &object, text(&image)]).output().unwrap());
    boots_as_itself(&image, &source.identity, haul::boot::Firmware::Uefi);
}

fn boots_as_itself(image: &Path, identity: &Value, firmware: haul::boot::Firmware) {
    use haul::boot::{Accelerator, Expect, Format, Machine, State};
    let lock = fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    let machine = Machine { accelerator: Accelerator::Tcg, firmware, ..Machine::new(image, Format::Qcow2) };
    let expect = Expect::Marker("HAUL-BEACON up".into());
    let (time, log) = (Duration::from_secs(400), image.with_extension("console.log"));
    let programs = haul::host::programs::Programs::default();
    let outcome =
        haul::boot::run(&programs, &machine, expect, time, &log, &haul::monitor::Tally::default()).unwrap();
    assert_eq!(outcome.verdict.state, State::Up, "{:?}", outcome.verdict);
    println!("figure: the image boots in {} s: {}", outcome.elapsed.as_secs(), outcome.verdict.evidence);
    let evidence = &outcome.verdict.evidence;
    for (key, value) in identity.as_object().unwrap() {
        let word = format!(" {key}={} ", value.as_str().unwrap());
        assert!(evidence.contains(&word), "no{word}in {evidence}");
    }
    assert!(evidence.contains(" root=/dev/vda1 ") && evidence.contains(" failed= "), "{evidence}");
}
