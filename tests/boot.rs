//! Boots real disks in QEMU: a Debian server that knows SATA and nothing else comes up on SATA and not on virtio.
//!
//! Needs root and the network once, for the disk (scripts/guests/disk.sh); QEMU.

#![allow(clippy::unwrap_used, reason = "a test: a failure is the finding")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use haul::boot::config_drive::ConfigDrive;
use haul::boot::{self, Accelerator, Expect, Firmware, Format, Hardware, Machine, Outcome, State};
use haul::error::Kind;
use haul::host::programs::{Programs, QEMU};
use haul::monitor::Tally;
use serde_json::Value;

const SOURCE_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xaa, 0xbb, 0x01];

/// A disk of scripts/guests with `options`, and the facts beside it.
fn disk(options: &[&str]) -> (PathBuf, Value) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guests/disk.sh");
    let output = Command::new(&script).args(options).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{} {options:?}", script.display());
    let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    let facts = std::fs::read(path.with_extension("raw.json")).unwrap();
    (path, serde_json::from_slice(&facts).unwrap())
}

/// One boot at a time, over all tests and processes: two slow each other down to the time limit.
fn boot_lock() -> std::fs::File {
    let lock = std::fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    lock
}

fn boot(machine: &Machine, expect: Expect, console: &Path) -> Outcome {
    let _one = boot_lock();
    let machine = Machine { accelerator: Accelerator::Tcg, ..machine.clone() };
    let timeout = Duration::from_secs(400);
    boot::run(&Programs::default(), &machine, expect, timeout, console, &Tally::default()).unwrap()
}

fn beacon() -> Expect {
    Expect::Marker("HAUL-BEACON up".into())
}

/// The beacon's `key=value` words.
fn words(outcome: &Outcome) -> BTreeMap<String, String> {
    assert_eq!(outcome.verdict.state, State::Up, "{:?}", outcome.verdict);
    assert!(outcome.verdict.evidence.ends_with(" END"), "{}", outcome.verdict.evidence);
    let pairs = outcome.verdict.evidence.split(' ').filter_map(|word| word.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn assert_identity(words: &BTreeMap<String, String>, facts: &Value) {
    for (key, value) in facts["identity"].as_object().unwrap() {
        assert_eq!(words.get(key).map(String::as_str), value.as_str(), "{key}");
    }
}

fn sata(image: &Path) -> Machine {
    Machine { hardware: Hardware::Sata, mac: SOURCE_MAC, ..Machine::new(image, Format::Raw) }
}

#[test]
fn a_sata_server_boots_on_sata() {
    let (image, facts) = disk(&[]);
    let dir = tempfile::tempdir().unwrap();
    let outcome = boot(&sata(&image), beacon(), &dir.path().join("console.log"));
    let words = words(&outcome);
    assert_identity(&words, &facts);
    assert_eq!(words["root"], "/dev/sda1");
    assert_eq!(words["addrs"], format!("eth0:{}/24", facts["address"].as_str().unwrap()));
    assert_eq!(words["failed"], "");
    let picture = std::fs::read(outcome.screenshot.unwrap()).unwrap();
    assert_eq!(&picture[..8], b"\x89PNG\r\n\x1a\n");
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn a_system_disk_boots_from_every_format_it_was_written_in() {
    let (image, _) = disk(&[]);
    let dir = tempfile::tempdir().unwrap();
    let haul = env!("CARGO_BIN_EXE_haul");
    for (name, options) in [
        ("copy.raw", &["-O", "raw"][..]),
        ("copy.qcow2", &["-O", "qcow2", "--compress", "zlib"]),
        ("zstd.qcow2", &["-O", "qcow2", "--compress", "zstd"]),
        ("fixed.vhd", &["-O", "vhd", "-o", "subformat=fixed"]),
        ("dynamic.vhd", &["-O", "vhd"]),
        ("sparse.vmdk", &["-O", "vmdk"]),
        ("stream.vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"]),
    ] {
        let copy = dir.path().join(name);
        let made =
            Command::new(haul).args(["-q", "convert"]).args(options).args([&image, &copy]).status().unwrap();
        assert!(made.success(), "{name}");
        let _one = boot_lock();
        let booted = Command::new(haul)
            .args(["boot", "--json", "--hardware", "sata", "--expect", "HAUL-BEACON up", "--console"])
            .args([&dir.path().join("console.log"), &copy])
            .output()
            .unwrap();
        assert!(booted.status.success(), "{name}: {}", String::from_utf8_lossy(&booted.stdout));
        std::fs::remove_file(copy).unwrap();
    }
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn a_sata_server_stops_in_its_initramfs_on_virtio() {
    let (image, _) = disk(&[]);
    let dir = tempfile::tempdir().unwrap();
    for hardware in [Hardware::Virtio, Hardware::VirtioScsi] {
        let machine = Machine { hardware, ..Machine::new(&image, Format::Raw) };
        let outcome = boot(&machine, beacon(), &dir.path().join("console.log"));
        assert_eq!(outcome.verdict.state, State::InitramfsShell);
        assert!(outcome.verdict.evidence.contains("/dev/sda1 does not exist"), "{:?}", outcome.verdict);
        let error = outcome.up().unwrap_err();
        assert_eq!(error.kind(), Kind::Boot);
        assert!(error.what_to_do().contains("console.log"));
    }
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn every_kind_of_source_boots_on_its_own_hardware() {
    for options in [
        &["kernels=2", "rootref=uuid", "initramfs=most", "boot=yes", "net=dhcp"][..],
        &["pt=gpt", "rootref=label", "initramfs=dep", "swap=yes", "net=networkd", "cloudinit=no"],
        &["swap=yes", "boot=yes", "bootfull=95"],
    ] {
        let (image, facts) = disk(options);
        let dir = tempfile::tempdir().unwrap();
        let outcome = boot(&sata(&image), beacon(), &dir.path().join("console.log"));
        let words = words(&outcome);
        assert_identity(&words, &facts);
        assert_eq!(words["failed"], "", "{options:?}");
        assert_eq!(words["swap"].is_empty(), !options.contains(&"swap=yes"), "{options:?}");
        let newest = facts["kernels"].as_array().unwrap().last().unwrap().as_str().unwrap();
        assert_eq!(words["kernel"], newest);
    }
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn cloud_init_reads_the_config_drive() {
    let (image, _) = disk(&["rootref=uuid", "initramfs=most", "net=dhcp"]);
    let dir = tempfile::tempdir().unwrap();
    let drive = dir.path().join("config.iso");
    let told = ConfigDrive {
        instance_id: "ins-12345678".into(),
        hostname: Some("named-by-cloud".into()),
        macs: vec![[2, 0, 0, 0, 0, 7]],
        ..ConfigDrive::default()
    };
    std::fs::write(&drive, told.iso().unwrap()).unwrap();
    let machine =
        Machine { config_drive: Some(drive), mac: [2, 0, 0, 0, 0, 7], ..Machine::new(&image, Format::Raw) };
    let words = words(&boot(&machine, beacon(), &dir.path().join("console.log")));
    assert_eq!(words["cloud"], "done");
    assert!(words["root"].starts_with("/dev/vda"), "{words:?}");
    assert_eq!(words["livehost"], "named-by-cloud");
    assert!(words["addrs"].contains(":10.0.2.15/24"), "{words:?}");
}

#[test]
#[ignore = "long: boots guests under TCG for minutes; scripts/test.sh --long"]
fn a_guest_comes_up_whatever_kvm_does() {
    let (image, facts) = disk(&[]);
    let dir = tempfile::tempdir().unwrap();
    let tally = Tally::default();
    let (timeout, log) = (Duration::from_secs(400), dir.path().join("console.log"));
    let _one = boot_lock();
    let outcome = boot::run(&Programs::default(), &sata(&image), beacon(), timeout, &log, &tally).unwrap();
    assert_identity(&words(&outcome), &facts);
    assert!([Accelerator::Kvm, Accelerator::Tcg].contains(&outcome.accelerator));
    let told = tally.notes().iter().any(|(_, text)| text.contains("under TCG"));
    let tried = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    assert_eq!(told, tried && outcome.accelerator == Accelerator::Tcg);
}

#[test]
fn an_empty_disk_is_no_bootable_device() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("empty.raw");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    for firmware in [Firmware::Bios, Firmware::Uefi] {
        let machine = Machine { firmware, ..Machine::new(&image, Format::Raw) };
        let outcome = boot(&machine, Expect::UserSpace, &dir.path().join("console.log"));
        assert_eq!(outcome.verdict.state, State::NoBootableDevice, "{firmware:?}: {:?}", outcome.verdict);
    }
}

#[test]
fn the_config_drive_is_read_by_another_reader() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.iso");
    let told = ConfigDrive {
        instance_id: "ins-1".into(),
        hostname: Some("h".into()),
        macs: vec![[2, 0, 0, 0, 0, 1]],
        user_data: Some("#cloud-config\n".into()),
        password: Some("$6$x".into()),
        ..ConfigDrive::default()
    };
    std::fs::write(&path, told.iso().unwrap()).unwrap();
    let out = dir.path().join("out");
    let output = Command::new("xorriso")
        .args(["-osirrox", "on", "-indev"])
        .arg(&path)
        .args(["-pvd_info", "-extract", "/"])
        .arg(&out)
        .output()
        .expect("xorriso is missing: scripts/guests/deps.sh installs it");
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("config-2"), "{said}");
    let mut found = Vec::new();
    let mut folders = vec![out.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(&out).unwrap().to_str().unwrap().to_ascii_lowercase();
                found.push((name.trim_end_matches('.').to_owned(), std::fs::read(path).unwrap()));
            }
        }
    }
    found.sort();
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "openstack/latest/meta_data.json",
            "openstack/latest/network_data.json",
            "openstack/latest/user_data",
            "qcloud_action/os.conf"
        ]
    );
    let meta: Value = serde_json::from_slice(&found[0].1).unwrap();
    assert_eq!(meta["uuid"], "ins-1");
    assert_eq!(found[2].1, b"#cloud-config\n");
    assert_eq!(found[3].1, b"password=$6$x\n");
}

/// A program that speaks as much of QEMU's protocol as a boot needs, says `console`, and then runs `after`.
fn fake_qemu(dir: &Path, console: &str, after: &str) -> PathBuf {
    let path = dir.join("qemu");
    let script = format!(
        "#!/bin/sh\necho $$ >{0}/pid\nsay() {{ echo \"$1\" >&0; }}\nsay '{{\"QMP\": {{}}}}'\nread line\n\
         say '{{\"return\": {{}}}}'\nprintf '{console}'\n{after}\nwhile read line; do say '{{\"return\": {{}}}}'; done\n",
        dir.display()
    );
    let text = dir.join("qemu.sh");
    std::fs::write(&text, script).unwrap();
    // By another process: what is open here for writing, a child that another test starts meanwhile would hold open,
    // too, and the kernel runs nothing that is (ETXTBSY).
    let installed = Command::new("install").args(["-m", "755"]).args([&text, &path]).status().unwrap();
    assert!(installed.success());
    path
}

fn fake_boot(
    console: &str,
    after: &str,
    timeout: Duration,
) -> (haul::error::Result<Outcome>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.raw");
    std::fs::write(&image, [0; 512]).unwrap();
    let programs = Programs::default().replace(&QEMU, fake_qemu(dir.path(), console, after));
    let machine = Machine { accelerator: Accelerator::Tcg, ..Machine::new(&image, Format::Raw) };
    let log = dir.path().join("console.log");
    let outcome = boot::run(&programs, &machine, Expect::UserSpace, timeout, &log, &Tally::default());
    (outcome, dir)
}

fn assert_gone(dir: &Path) {
    let pid = std::fs::read_to_string(dir.join("pid")).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists(), "process {pid} is left");
}

#[test]
fn qemu_is_gone_after_a_verdict() {
    let (outcome, dir) = fake_boot("Kernel panic - not syncing: VFS\\n", "", Duration::from_secs(60));
    let outcome = outcome.unwrap();
    assert_eq!(outcome.verdict.state, State::KernelPanic);
    assert_eq!(std::fs::read(&outcome.console).unwrap(), b"Kernel panic - not syncing: VFS\n");
    assert_gone(dir.path());
}

#[test]
fn a_guest_that_prints_for_ever_is_stopped_and_its_log_bounded() {
    let (outcome, dir) = fake_boot("", "exec yes", Duration::from_secs(3));
    let outcome = outcome.unwrap();
    assert_eq!(outcome.verdict.state, State::Timeout);
    assert!(std::fs::metadata(&outcome.console).unwrap().len() <= 64 << 20);
    assert_gone(dir.path());
}

#[test]
fn a_qemu_that_ends_early_is_an_error_with_its_own_words() {
    let (outcome, dir) = fake_boot("", "echo 'no space left' >&2; exit 1", Duration::from_secs(60));
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), Kind::Boot);
    assert!(error.why().contains("no space left"), "{error:?}");
    assert_gone(dir.path());
}

#[test]
fn a_qemu_that_fails_under_kvm_is_started_again_under_tcg() {
    let refuses = "case \"$*\" in *'-accel kvm'*) echo 'failed to set MSR' >&2; exit 1;; esac";
    // As QEMU fails: before it takes commands, and after.
    for (early, late) in [(refuses, ""), ("", refuses)] {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image.raw");
        std::fs::write(&image, [0; 512]).unwrap();
        let qemu = fake_qemu(dir.path(), "", &format!("{late}\nprintf 'host login: '"));
        let script = std::fs::read_to_string(&qemu).unwrap();
        std::fs::write(&qemu, script.replacen('\n', &format!("\n{early}\n"), 1)).unwrap();
        let programs = Programs::default().replace(&QEMU, qemu);
        let log = dir.path().join("console.log");
        let (machine, timeout) = (Machine::new(&image, Format::Raw), Duration::from_secs(60));
        let tally = Tally::default();
        let outcome = boot::run(&programs, &machine, Expect::UserSpace, timeout, &log, &tally).unwrap();
        assert_eq!((outcome.verdict.state, outcome.accelerator), (State::Up, Accelerator::Tcg));
        let tried = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        let told = tally.notes().iter().any(|(_, text)| text.contains("failed to set MSR"));
        assert_eq!(told, tried, "{:?}", tally.notes());
    }
}

#[test]
fn a_guest_that_restarts_again_and_again_is_a_loop_and_one_restart_is_not() {
    let reset = "say '{\"event\": \"RESET\", \"data\": {\"guest\": true}}';";
    let (outcome, _dir) = fake_boot("", &reset.repeat(4), Duration::from_secs(60));
    assert_eq!(outcome.unwrap().verdict.state, State::RebootLoop);
    let (outcome, _dir) = fake_boot("", &format!("{reset} printf 'host login: '"), Duration::from_secs(60));
    assert_eq!(outcome.unwrap().verdict.state, State::Up);
}

#[test]
fn qemu_refusing_an_image_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("bad.qcow2");
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    std::fs::write(&image, header).unwrap();
    let machine = Machine { accelerator: Accelerator::Tcg, ..Machine::new(&image, Format::Qcow2) };
    let log = dir.path().join("console.log");
    let timeout = Duration::from_secs(60);
    let error =
        boot::run(&Programs::default(), &machine, Expect::UserSpace, timeout, &log, &Tally::default())
            .unwrap_err();
    assert!(error.why().contains("bad.qcow2"), "{error:?}");
}
