//! Preflight: each check on a disk that fails it and on one that passes, and the commands that look and change
//! nothing. Needs root for loop mounts, mkfs.ext4 and sfdisk.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

#[cfg(feature = "net")]
#[path = "support/cloud.rs"]
mod lab;
mod support;

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use haul::config::{Cloud, Edition};
use haul::image::Gate;
use haul::io::DiskFile;
use haul::io::fake::FaultyDisk;
use haul::preflight::{self, Options, Report, Severity, Target};
use haul::unit::Extent;
use serde_json::Value;
use support::{LoopMount, empty_image, run, text};
use tempfile::TempDir;

const KERNEL: &str = "6.1.0-1-test";
const MIB: u64 = 1 << 20;
const VIRTIO: [&str; 5] = ["virtio", "virtio_ring", "virtio_pci", "virtio_blk", "virtio_scsi"];

/// An uncompressed cpio archive ("newc") of modules.
fn initramfs(modules: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    let names = modules.iter().map(|name| format!("usr/lib/modules/x/kernel/{name}.ko"));
    for name in names.chain(["TRAILER!!!".to_owned()]) {
        out.extend(format!("070701{}{:08x}{:08x}", "0".repeat(88), name.len() + 1, 0).bytes());
        out.extend(name.bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// A server's disk in the making: a file tree, to be put on the first partition.
struct Server {
    dir: TempDir,
    table: &'static str,
    boot_code: bool,
}

impl Server {
    /// One that only has to be copied: MBR, boot code, Debian, virtio in its initramfs, cloud-init.
    fn ready() -> Self {
        let server = Server {
            dir: tempfile::tempdir().unwrap(),
            table: "label: dos\nstart=2048, size=61440, type=83, bootable\n",
            boot_code: true,
        };
        let modules: String = VIRTIO.iter().map(|name| format!("kernel/{name}.ko:\n")).collect();
        server
            .os("debian")
            .initramfs(&VIRTIO)
            .file("/etc/fstab", "/dev/sda1 / ext4 defaults 0 1\n")
            .file("/etc/hostname", "web01\n")
            .file("/usr/sbin/mkinitramfs", "")
            .file(&format!("/boot/vmlinuz-{KERNEL}"), "kernel")
            .file(&format!("/lib/modules/{KERNEL}/modules.dep"), &modules)
            .file("/usr/bin/cloud-init", "")
            .file("/sbin/ifup", "")
            .file("/etc/network/interfaces", "auto lo eth0\niface lo inet loopback\niface eth0 inet dhcp\n")
            // The head of a program for x86_64: ELF, `e_machine` 62 at byte 18.
            .file("/bin/sh", &format!("\u{7f}ELF{}\u{3e}\0", "\0".repeat(14)))
            .file(
                "/boot/grub/grub.cfg",
                &format!("linux /boot/vmlinuz-{KERNEL} root=/dev/sda1\ninitrd /boot/initrd.img-{KERNEL}\n"),
            )
    }

    fn os(self, id: &str) -> Self {
        self.file("/etc/os-release", &format!("ID={id}\nVERSION_ID=12\nPRETTY_NAME=\"Test {id}\"\n"))
    }

    fn initramfs(self, modules: &[&str]) -> Self {
        let archive = String::from_utf8(initramfs(modules)).unwrap();
        self.file(&format!("/boot/initrd.img-{KERNEL}"), &archive)
    }

    fn file(self, path: &str, content: &str) -> Self {
        let path = self.dir.path().join("tree").join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    fn without(self, path: &str) -> Self {
        fs::remove_file(self.dir.path().join("tree").join(path.trim_start_matches('/'))).unwrap();
        self
    }

    fn table(self, table: &'static str) -> Self {
        Server { table, ..self }
    }

    fn without_boot_code(self) -> Self {
        Server { boot_code: false, ..self }
    }

    fn disk(self) -> Disk {
        let image = self.dir.path().join("disk.raw");
        empty_image(&image, 40 * MIB);
        partition(&image, self.table);
        let tree = self.dir.path().join("tree");
        let args = ["-qF", "-E", "offset=1048576", "-d", text(&tree), text(&image), "30M"];
        run("mkfs.ext4", &args);
        if self.boot_code {
            let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
            file.write_all_at(&[0xeb, 0x63, 0x90], 0).unwrap();
        }
        Disk { image, _dir: self.dir }
    }
}

/// Writes a partition table as sfdisk reads it.
fn partition(image: &Path, table: &str) {
    run("sh", &["-c", &format!("printf '{table}' | sfdisk -q {}", text(image))]);
}

struct Disk {
    image: PathBuf,
    _dir: TempDir,
}

impl Disk {
    fn check(&self, options: &Options) -> Report {
        check(&self.image, options)
    }
}

fn check(image: &Path, options: &Options) -> Report {
    preflight::run(&[Target::open(image, None, &Gate::closed())], options).unwrap()
}

/// A disk without a guest, divided by `table`.
fn bare(table: &str) -> Disk {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    empty_image(&image, 40 * MIB);
    if !table.is_empty() {
        partition(&image, table);
    }
    Disk { image, _dir: dir }
}

/// What a check said: its severity and evidence.
#[track_caller]
fn finding<'a>(report: &'a Report, id: &str) -> (Severity, &'a str) {
    let found = report.findings.iter().find(|finding| finding.id == id);
    let found = found.unwrap_or_else(|| panic!("no {id} in {:#?}", report.findings));
    assert_eq!(found.remedy.is_none(), found.severity == Severity::Pass, "{found:?}");
    (found.severity, &found.evidence)
}

#[track_caller]
fn assert_fails(report: &Report, id: &str, evidence: &str) {
    let (severity, seen) = finding(report, id);
    assert_eq!(severity, Severity::Fail, "{id}: {seen}");
    assert!(seen.contains(evidence), "{id}: {seen}");
    assert!(report.blocks());
    let error = report.pass().unwrap_err();
    assert!(error.facts().iter().any(|(name, _)| *name == id), "{error:?}");
    assert_eq!(error.kind().exit_code(), 3);
}

fn tce() -> Options {
    Options { cloud: Some(cloud(Edition::Tce)), ..Options::default() }
}

fn cloud(edition: Edition) -> Cloud {
    Cloud {
        region: None,
        cos_endpoint: None,
        path_style: false,
        connect_to: None,
        cvm_endpoint: None,
        edition,
        bandwidth_limit: "0".into(),
    }
}

#[test]
fn a_ready_server_passes_every_check_in_both_editions() {
    let disk = Server::ready().disk();
    for options in [Options::default(), tce()] {
        let report = disk.check(&options);
        for finding in &report.findings {
            let expected = if finding.id == "guest.fix" { Severity::Fixable } else { Severity::Pass };
            assert_eq!(finding.severity, expected, "{finding:?}");
        }
        let ids: Vec<&str> = report.findings.iter().map(|finding| finding.id).collect();
        let all: Vec<&str> = preflight::checks().map(|check| check.id).collect();
        let asked: Vec<&str> =
            all.into_iter().filter(|id| !id.starts_with("cloud.") && *id != "host.space").collect();
        assert_eq!(ids, asked);
        assert!(
            report.fixes.iter().any(|fix| fix.what.starts_with("edit /etc/fstab: ")),
            "{:?}",
            report.fixes
        );
        report.pass().unwrap();
    }
}

#[test]
fn an_unreadable_sector_at_the_head_of_a_partition_fails() {
    let disk = Server::ready().disk();
    let file = DiskFile::open(&disk.image).unwrap();
    // Beyond what the file system's readers look at, within what is sampled.
    let faulty = FaultyDisk::new(file, vec![Extent::at(MIB + 60 * 1024, 512)]);
    let target = Target { location: disk.image.clone().into(), disk: Ok(Arc::new(faulty)) };
    let report = preflight::run(&[target], &Options::default()).unwrap();
    assert_fails(&report, "source.readable", "cannot read");
}

#[test]
fn a_disk_that_cannot_be_opened_fails_and_the_others_are_checked() {
    let disk = Server::ready().disk();
    let missing = disk.image.with_extension("missing");
    let open = |path: &Path| Target::open(path, None, &Gate::closed());
    let report = preflight::run(&[open(&missing), open(&disk.image)], &Options::default()).unwrap();
    assert_fails(&report, "source.readable", "No such file");
    assert!(report.findings.iter().any(|finding| finding.disk.as_ref() == Some(&disk.image)));
}

#[test]
fn a_mounted_disk_is_in_use_and_one_mounted_read_only_is_not() {
    let disk = Server::ready().disk();
    {
        let mount = LoopMount::new(&disk.image, "offset=1048576,sizelimit=31457280");
        assert_fails(&disk.check(&Options::default()), "source.in-use", text(mount.path()));
    }
    let _mount = LoopMount::new(&disk.image, "ro,offset=1048576,sizelimit=31457280");
    assert_eq!(finding(&disk.check(&Options::default()), "source.in-use").0, Severity::Pass);
}

#[test]
fn who_writes_to_a_mounted_disk_is_told_as_what_a_freeze_would_hold_up() {
    let disk = Server::ready().disk();
    assert_eq!(
        finding(&disk.check(&Options::default()), "source.freeze"),
        (Severity::Pass, "nothing on it is mounted for writing")
    );
    let mount = LoopMount::new(&disk.image, "offset=1048576,sizelimit=31457280");
    // It writes to two files, reads one, and tells when it has them open.
    let script = "cd $1; exec 3>log 4>>data 5<etc/hostname; echo open; read until";
    let mut writer = Command::new("sh")
        .args(["-c", script, "sh", text(mount.path())])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 5];
    writer.stdout.take().unwrap().read_exact(&mut said).unwrap();
    let report = disk.check(&Options::default());
    let (severity, evidence) = finding(&report, "source.freeze");
    let expected =
        format!("a freeze of {} holds up sh (process {}, files: 2)", text(mount.path()), writer.id());
    assert_eq!((severity, evidence), (Severity::Pass, expected.as_str()));
    drop(writer.stdin.take());
    writer.wait().unwrap();
}

#[test]
fn a_disk_beyond_500_gb_fails() {
    let disk = Server::ready().disk();
    fs::OpenOptions::new().write(true).open(&disk.image).unwrap().set_len(501 << 30).unwrap();
    assert_fails(&disk.check(&Options::default()), "source.size", "501.00 GiB");
}

#[test]
fn a_disk_without_partitions_fails_and_a_gpt_fails_in_the_private_edition_only() {
    assert_fails(&bare("").check(&Options::default()), "disk.table", "no partition table");
    assert_fails(&bare("label: dos\\n").check(&Options::default()), "disk.table", "no partition");
    let gpt = bare("label: gpt\\nstart=2048, size=61440, type=linux\\n");
    assert_eq!(finding(&gpt.check(&Options::default()), "disk.table").0, Severity::Pass);
    assert_fails(&gpt.check(&tce()), "disk.table", "GPT");
}

#[test]
fn a_gpt_is_reported_when_one_copy_is_damaged_and_fails_when_both_are() {
    let gpt = bare("label: gpt\\nstart=2048, size=61440, type=linux\\n");
    let file = fs::OpenOptions::new().write(true).open(&gpt.image).unwrap();
    file.write_all_at(&[0xff; 8], 512 + 16).unwrap();
    assert_eq!(finding(&gpt.check(&Options::default()), "disk.table").0, Severity::Warn);
    file.write_all_at(&[0xff; 8], 40 * MIB - 512 + 16).unwrap();
    assert_fails(&gpt.check(&Options::default()), "disk.table", "GPT");
}

#[test]
fn files_that_name_a_disk_or_an_own_address_are_listed() {
    let disk = Server::ready()
        .file("/etc/network/interfaces", "auto eth0\niface eth0 inet static\n\taddress 192.0.2.5/24\n")
        .file("/etc/app/app.conf", "# /dev/sda\ndata = /dev/sdb1\n")
        .file("/etc/httpd.conf", "Listen 192.0.2.5:80\n")
        .file("/etc/other.conf", "peer 192.0.2.6\n")
        .disk();
    let report = disk.check(&Options::default());
    let (severity, evidence) = finding(&report, "guest.names");
    assert_eq!(severity, Severity::Warn);
    assert_eq!(evidence, "/etc/httpd.conf names 192.0.2.5; /etc/app/app.conf names /dev/sdb1");
    let mut keep = Options::default();
    keep.fixes.keep_network = true;
    assert_eq!(finding(&report, "guest.network"), (Severity::Fixable, "set up by ifupdown, with 192.0.2.5"));
    let report = disk.check(&keep);
    assert_eq!(finding(&report, "guest.names").1, "/etc/app/app.conf names /dev/sdb1");
    assert_eq!(finding(&report, "guest.network").0, Severity::Warn);
}

#[test]
fn an_encrypted_partition_is_told_with_what_it_needs() {
    let table = "label: dos\nstart=2048, size=61440, type=83, bootable\nstart=63488, type=83\n";
    let disk = Server::ready().table(table).disk();
    assert_eq!(finding(&disk.check(&Options::default()), "disk.opaque").0, Severity::Pass);
    let luks = disk.image.with_extension("luks");
    empty_image(&luks, 9 * MIB);
    let weak =
        ["--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-size", "256", "--keyfile-size", "32"];
    let format = [&["-q", "luksFormat"][..], &weak, &[text(&luks), text(&disk.image)]].concat();
    run("cryptsetup", &format);
    let file = fs::OpenOptions::new().write(true).open(&disk.image).unwrap();
    file.write_all_at(&fs::read(&luks).unwrap()[..4 << 20], 31 * MIB).unwrap();
    let report = disk.check(&Options::default());
    let (severity, evidence) = finding(&report, "disk.opaque");
    assert_eq!(severity, Severity::Warn);
    assert!(evidence.starts_with("partition 2 is LUKS1"), "{evidence}");
}

#[test]
fn what_refuses_changed_files_is_told_where_haul_changes_some() {
    let booted_with = |arguments: &str| {
        let menu = format!(
            "linux /boot/vmlinuz-{KERNEL} root=/dev/sda1 {arguments}\ninitrd /boot/initrd.img-{KERNEL}\n"
        );
        Server::ready().file("/boot/grub/grub.cfg", &menu)
    };
    let said = |server: Server| {
        let report = server.disk().check(&Options::default());
        let (severity, evidence) = finding(&report, "guest.security");
        (severity, evidence.to_owned())
    };
    for (arguments, word) in [
        ("ima_appraise=enforce", "IMA"),
        ("ima_policy=tcb|appraise_tcb", "IMA"),
        ("roothash=00ff systemd.verity=yes", "dm-verity"),
    ] {
        let (severity, evidence) = said(booted_with(arguments));
        assert!(severity == Severity::Warn && evidence.contains(word), "{arguments}: {evidence}");
    }
    let policy =
        said(Server::ready().file("/etc/ima/ima-policy", "measure func=X\nappraise func=FILE_CHECK\n"));
    assert!(policy.0 == Severity::Warn && policy.1.contains("/etc/ima/ima-policy"), "{policy:?}");
    // What lets them pass is no finding, but is said.
    let selinux = booted_with("fips=1")
        .file("/etc/selinux/config", "# mode\nSELINUX=enforcing\nSELINUXTYPE=targeted\n");
    let (severity, evidence) = said(selinux);
    assert_eq!(severity, Severity::Pass);
    assert!(evidence.contains("SELinux is enforcing") && evidence.contains("FIPS mode, "), "{evidence}");
    for arguments in ["", "ima_appraise=off", "systemd.verity=no"] {
        assert_eq!(said(booted_with(arguments)).0, Severity::Pass, "{arguments}");
    }
}

#[test]
fn a_disk_without_boot_code_fails() {
    let report = Server::ready().without_boot_code().disk().check(&Options::default());
    assert_fails(&report, "disk.boot", "no boot code");
}

#[test]
fn a_uefi_disk_is_for_the_public_edition() {
    let disk = Server::ready()
        .table("label: gpt\nstart=2048, size=61440, type=linux\nstart=63488, size=4096, type=uefi\n")
        .disk();
    let report = disk.check(&Options::default());
    assert_eq!(finding(&report, "disk.boot").0, Severity::Pass);
    // Nothing is on its EFI system partition.
    let (severity, evidence) = finding(&report, "guest.fix");
    assert!(
        severity == Severity::Warn && evidence.contains("cannot read its EFI system partition"),
        "{evidence}"
    );
    assert_fails(&disk.check(&tce()), "disk.boot", "UEFI");
}

#[test]
fn a_disk_without_a_system_fails_unless_data_disks_are_expected() {
    let disk = bare("label: dos\\nstart=2048, size=61440, type=82\\n");
    let swap = disk.image.with_extension("swap");
    empty_image(&swap, 30 * MIB);
    run("mkswap", &["-q", text(&swap)]);
    let file = fs::OpenOptions::new().write(true).open(&disk.image).unwrap();
    file.write_all_at(&fs::read(&swap).unwrap(), MIB).unwrap();
    assert_fails(&disk.check(&Options::default()), "guest.root", "partition 1 is swap");
    let report = disk.check(&Options { data_disks: true, ..Options::default() });
    assert_eq!(finding(&report, "guest.root").0, Severity::Warn);
    assert!(!report.blocks(), "{report:?}");
}

#[test]
fn an_initramfs_without_virtio_is_mended_where_haul_can_and_fails_where_not() {
    let sata = Server::ready().initramfs(&["ahci"]).disk().check(&Options::default());
    let (severity, evidence) = finding(&sata, "guest.virtio");
    assert_eq!(severity, Severity::Fixable);
    assert!(evidence.contains(KERNEL) && evidence.contains("initramfs lacks virtio"), "{evidence}");
    assert!(sata.fixes.iter().any(|fix| fix.what.starts_with("rebuild /boot/initrd.img-")));

    // What counts is the tools it has, not its name.
    let unknown = Server::ready().os("slackware").initramfs(&["ahci"]).disk().check(&Options::default());
    assert_eq!(finding(&unknown, "guest.virtio").0, Severity::Fixable);
    let toolless = Server::ready().initramfs(&["ahci"]).without("/usr/sbin/mkinitramfs").disk();
    assert_fails(&toolless.check(&Options::default()), "guest.virtio", "virtio_blk");
    let old = Server::ready()
        .initramfs(&["ahci"])
        .file(&format!("/lib/modules/{KERNEL}/modules.dep"), "kernel/virtio.ko:\n");
    assert_fails(&old.disk().check(&Options::default()), "guest.virtio", "has no virtio_ring");
    let none = Server::ready().without(&format!("/boot/vmlinuz-{KERNEL}")).disk();
    assert_fails(&none.check(&Options::default()), "guest.virtio", "no kernel");
}

#[test]
fn a_server_without_cloud_init_or_with_it_switched_off_is_warned_of() {
    for server in [
        Server::ready().without("/usr/bin/cloud-init"),
        Server::ready().file("/etc/cloud/cloud-init.disabled", ""),
    ] {
        let report = server.disk().check(&Options::default());
        assert_eq!(finding(&report, "guest.cloud-init").0, Severity::Warn);
        assert!(!report.blocks());
    }
    let version = "/usr/lib/python3/dist-packages/cloudinit/version.py";
    let report = Server::ready().file(version, "__VERSION__ = \"23.4\"\n").disk().check(&Options::default());
    let (severity, evidence) = finding(&report, "guest.cloud-init");
    assert!(severity == Severity::Pass && evidence.contains("23.4"), "{evidence}");
}

#[test]
fn a_boot_loader_haul_does_not_know_fails() {
    let report = Server::ready().without("/boot/grub/grub.cfg").disk().check(&Options::default());
    assert_fails(&report, "guest.fix", "no boot loader's menu");
}

#[test]
fn a_full_state_folder_fails_and_one_to_be_made_is_measured_where_it_will_be() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("small.img");
    empty_image(&image, 8 * MIB);
    run("mkfs.ext4", &["-qF", text(&image)]);
    let mount = LoopMount::new(&image, "");
    let state = |path: PathBuf| Options { state: Some(path), ..Options::default() };
    let report = preflight::run(&[], &state(mount.path().join("haul/state"))).unwrap();
    assert_fails(&report, "host.space", "free for");
    let report = preflight::run(&[], &state(PathBuf::from("/dev/shm/haul"))).unwrap();
    assert_eq!(report.findings.len(), 1);
    drop(mount);
}

#[test]
fn failures_can_be_skipped_by_id_or_taken_as_warnings() {
    let disk = Server::ready().without_boot_code().disk();
    let report = disk.check(&Options { skip: vec!["disk.boot".into()], ..Options::default() });
    assert!(!report.blocks() && report.findings.iter().all(|finding| finding.id != "disk.boot"));
    let report = disk.check(&Options { ignore: true, ..Options::default() });
    assert!(!report.blocks());
    assert_eq!(finding(&report, "disk.boot").0, Severity::Warn);
}

#[cfg(feature = "net")]
mod cloud {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use time::OffsetDateTime;
    use time::macros::format_description;

    use super::*;

    /// An HTTP server whose clock is `ahead` of ours; it ends with the test.
    fn server(ahead: Duration) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), ahead);
            }
        });
        url
    }

    fn answer(mut stream: TcpStream, ahead: Duration) {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
            head.push(byte[0]);
        }
        let format = format_description!(
            "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
        );
        let date = (OffsetDateTime::now_utc() + ahead).format(format).unwrap();
        // A reader that went away is no finding of this test.
        let _ = write!(
            stream,
            "HTTP/1.1 403 Forbidden\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }

    /// A port nobody listens on.
    fn nobody() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    }

    fn asked(cvm: &str, cos: &str, connect_to: Option<&str>) -> Report {
        let cloud = Cloud {
            cvm_endpoint: Some(cvm.into()),
            cos_endpoint: Some(cos.into()),
            connect_to: connect_to.map(|address| address.parse().unwrap()),
            ..cloud(Edition::Public)
        };
        preflight::run(&[], &Options { cloud: Some(cloud), ..Options::default() }).unwrap()
    }

    #[test]
    fn endpoints_that_answer_with_our_time_pass() {
        let url = server(Duration::ZERO);
        let report = asked(&url, &url, None);
        assert_eq!(report.findings.len(), 3);
        assert!(report.findings.iter().all(|finding| finding.severity == Severity::Pass), "{report:?}");
        let port = url.rsplit(':').next().unwrap();
        let named = format!("http://cos.nowhere.invalid:{port}");
        assert_eq!(finding(&asked(&url, &named, Some("127.0.0.1")), "cloud.cos").0, Severity::Pass);
    }

    #[test]
    fn endpoints_nobody_listens_on_fail() {
        let report = asked(&nobody(), &nobody(), None);
        assert_fails(&report, "cloud.cvm", "cannot reach");
        assert_fails(&report, "cloud.cos", "cannot reach");
        assert!(report.findings.iter().all(|finding| finding.id != "cloud.clock"));
        assert_fails(&asked(&nobody(), &nobody(), Some("127.0.0.1")), "cloud.cos", "127.0.0.1");
    }

    #[test]
    fn a_clock_that_signatures_are_refused_for_fails_and_one_on_its_way_warns() {
        let clock = |ahead| {
            let url = server(Duration::from_secs(ahead));
            asked(&url, &url, None)
        };
        assert_fails(&clock(3600), "cloud.clock", "behind");
        assert_eq!(finding(&clock(120), "cloud.clock").0, Severity::Warn);
    }

    #[test]
    fn a_system_is_looked_up_among_those_the_cloud_imports() {
        use haul::cloud::tencent::Edition;
        use haul::lab::cvm::Shapes;

        let of = |server: Server, lab: &super::lab::Lab, edition| {
            let cvm = super::lab::cvm_at(
                &lab.handle.url(),
                lab.keys.clone(),
                edition,
                super::lab::TestClock::right(),
            );
            server.disk().check(&Options { cvm: Some(cvm), ..Options::default() })
        };
        let public = super::lab::Lab::start(|_| {});
        let report = of(Server::ready(), &public, Edition::Public);
        let (severity, evidence) = finding(&report, "cloud.os");
        assert_eq!((severity, evidence.ends_with(", for x86_64")), (Severity::Pass, true), "{evidence}");
        // This edition names systems alone, and no other Linux.
        let tce = super::lab::Lab::start(|config| {
            (config.edition, config.shapes) = (Edition::Tce, Shapes::Old);
        });
        assert_fails(&of(Server::ready().os("arch"), &tce, Edition::Tce), "cloud.os", "it lists");
        // Whose keys are wrong is told, and can still copy.
        let mut stranger = public;
        stranger.keys = haul::lab::cvm::generate_keys();
        assert_eq!(finding(&of(Server::ready(), &stranger, Edition::Public), "cloud.os").0, Severity::Warn);
    }

    #[test]
    fn a_bucket_is_sent_something_on_trial_and_keeps_nothing() {
        use haul::preflight::Bucket;
        use haul::store::ObjectStore;
        use haul::store::fault::Faulty;
        use haul::store::memory::Memory;

        let memory = Arc::new(Memory::new("images-1250000000"));
        let of = |store: Arc<dyn ObjectStore>| {
            let options = Options { bucket: Some(Bucket(store)), ..Options::default() };
            Server::ready().disk().check(&options)
        };
        let report = of(memory.clone());
        let (severity, evidence) = finding(&report, "cloud.bucket");
        assert_eq!(severity, Severity::Pass);
        assert!(evidence.contains("a second to memory://images-1250000000/: the "), "{evidence}");
        assert!(evidence.ends_with(" in use would take about 1 min, less when compressed"), "{evidence}");
        assert!(memory.uploads("").unwrap().is_empty());
        assert_fails(&of(Arc::new(Faulty::new(memory, 1, 1000))), "cloud.bucket", "haul-check-");
    }

    #[test]
    fn nobody_is_asked_unless_the_user_said_where() {
        let options = Options { cloud: Some(cloud(Edition::Public)), ..Options::default() };
        assert!(preflight::run(&[], &options).unwrap().findings.is_empty());
    }
}

// --- The commands.

fn haul(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
    // Settings of the machine that runs the tests are not theirs.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HAUL_")) {
        command.env_remove(name);
    }
    command.env("HAUL_STATE_DIR", "/dev/shm").args(args).output().unwrap()
}

fn stdout(out: &Output) -> String {
    String::from_utf8(out.stdout.clone()).unwrap()
}

#[track_caller]
fn document(args: &[&str], code: i32) -> Value {
    let out = haul(args);
    assert_eq!(out.status.code(), Some(code), "{}{}", stdout(&out), String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn check_prints_80_columns_and_exits_with_3_when_something_blocks() {
    let disk = Server::ready().initramfs(&["ahci"]).without_boot_code().disk();
    let image = text(&disk.image);
    let out = haul(&["check", "--fixable", image]);
    assert_eq!(out.status.code(), Some(3), "{}", String::from_utf8_lossy(&out.stderr));
    let printed = stdout(&out);
    let long = printed.lines().find(|line| line.chars().count() > 80 && !line.contains(image));
    assert_eq!(long, None, "{printed}");
    for part in ["FAIL  disk.boot", "fix   guest.virtio", "> ", "* rebuild /boot/initrd.img-", "1 failed"] {
        assert!(printed.contains(part), "no {part:?} in\n{printed}");
    }

    let report = document(&["check", "--json", image], 3);
    let boot = report["findings"].as_array().unwrap().iter().find(|f| f["id"] == "disk.boot").unwrap();
    assert_eq!((boot["severity"].as_str(), boot["disk"].as_str()), (Some("fail"), Some(image)));
    document(&["check", "--json", "--skip-check", "disk.boot", image], 0);
    assert_eq!(haul(&["check", "--skip-check", "disk.boto", image]).status.code(), Some(2));
}

#[test]
fn plan_prints_the_diff_with_reasons_and_exits_with_3_when_it_is_no_use() {
    let disk = Server::ready().initramfs(&["ahci"]).disk();
    let out = haul(&["plan", text(&disk.image)]);
    let printed = stdout(&out);
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    for part in ["--- a/etc/fstab\n", "+++ b/etc/fstab\n", "-/dev/sda1 /", "+UUID=", "# ", "! rebuild /boot/"]
    {
        assert!(printed.contains(part), "no {part:?} in\n{printed}");
    }
    let plan = document(&["plan", "--json", text(&disk.image)], 0);
    assert_eq!(plan["guest"]["hostname"], "web01");
    assert!(plan["diff"].as_str().unwrap().contains("+++ b/etc/fstab"));
    assert!(plan["fixes"].as_array().unwrap().iter().any(|fix| fix["fix"] == "initramfs"));

    let fatal = Server::ready().without("/boot/grub/grub.cfg").disk();
    assert_eq!(haul(&["plan", text(&fatal.image)]).status.code(), Some(3));
    let data = bare("label: dos\\nstart=2048, size=61440, type=83\\n");
    assert_eq!(haul(&["plan", text(&data.image)]).status.code(), Some(5));
}

#[test]
fn plan_looks_at_the_data_disks_that_are_named() {
    let fstab = "/dev/sda1 / ext4 defaults 0 1\n/dev/sdb1 /srv ext4 defaults 0 2\n";
    let disk = Server::ready().file("/etc/fstab", fstab).disk();
    let data = bare("label: gpt\\nstart=2048, size=61440\\n");
    let uuid = "da7ada7a-0000-4000-8000-000000000000";
    run("mkfs.ext4", &["-qF", "-U", uuid, "-E", "offset=1048576", text(&data.image), "30720k"]);
    let (image, named) = (text(&disk.image), format!("/dev/sdb={}", text(&data.image)));
    let printed = stdout(&haul(&["plan", "--data-disk", &named, image]));
    assert!(printed.contains(&format!("+UUID={uuid} /srv ext4 defaults 0 2")), "{printed}");
    let printed = stdout(&haul(&["plan", image]));
    assert!(printed.contains("+/dev/sdb1 /srv ext4 defaults,nofail 0 2"), "{printed}");
    // Without its name, nobody knows which of the server's disks an image is; two of one name are in doubt.
    let other = named.replace("/dev/sdb=", "/dev/sdb1=");
    for (arguments, says) in [
        (vec![text(&data.image)], format!(" {named}\n")),
        (vec![&other], "does not say which disk".into()),
        (vec![&named, &named], "two data disks are called /dev/sdb".into()),
    ] {
        let options = arguments.into_iter().flat_map(|disk| ["--data-disk", disk]);
        let out = haul(&["plan", image].into_iter().chain(options).collect::<Vec<_>>());
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(2) && error.contains(&says), "{error}");
    }
    // A migration on trial tells the same, and nothing where nothing is to be fixed.
    let folder = tempfile::tempdir().unwrap();
    let trial = ["migrate", "--dry-run", "--bucket", "b-1250000000", "--state-dir", text(folder.path())];
    let told = |more: &[&str]| {
        let out = haul(&[&trial[..], &["--data-disk", &named, image], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        stdout(&out).contains(&format!("+UUID={uuid} /srv ext4 defaults 0 2"))
    };
    assert!(told(&[]) && !told(&["--no-fix"]));
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}

#[test]
fn inspect_tells_the_system_and_that_there_is_none_is_no_error() {
    let disk = Server::ready().initramfs(&["ahci"]).disk();
    let printed = stdout(&haul(&["inspect", text(&disk.image)]));
    for part in ["Test debian", "BIOS", "web01", KERNEL, "virtio_blk", "cloud-init unknown"] {
        assert!(printed.contains(part), "no {part:?} in\n{printed}");
    }
    let facts = document(&["inspect", "--json", text(&disk.image)], 0);
    assert_eq!((&facts["guest"]["os"]["id"], &facts["guest"]["boot"]), (&"debian".into(), &"bios".into()));
    let none = document(&["inspect", "--json", text(&bare("").image)], 0);
    assert!(none["guest"].is_null() && none["findings"].as_array().unwrap().is_empty(), "{none}");
}

#[test]
fn boot_refuses_to_overwrite_its_console_with_the_picture_and_names_a_missing_image() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.raw");
    let console = dir.path().join("c.png");
    let out = haul(&["boot", "--console", text(&console), text(&missing)]);
    assert_eq!(out.status.code(), Some(2));
    let out = haul(&["boot", text(&missing)]);
    assert_eq!(out.status.code(), Some(4), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(String::from_utf8_lossy(&out.stderr).contains("missing.raw"));
}
