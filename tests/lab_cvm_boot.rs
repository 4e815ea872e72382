//! The lab with real servers in QEMU: a disk that boots is NORMAL and runs, one that does not is an InternalError.
//!
//! Needs root and the network once, for the disks (scripts/guests/disk.sh); QEMU.

#![cfg(feature = "net")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test: a failure is the finding")]

#[path = "support/cloud.rs"]
mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use haul::boot::Accelerator;
use haul::cloud::tencent::cvm::RunRequest;
use haul::cloud::tencent::import::{self, Waiting};
use haul::cloud::{Clock, SystemClock};
use haul::host::programs::Programs;
use haul::lab::cvm::hypervisor::Qemu;
use haul::monitor::Tally;

use support::{Lab, OneObject, cvm_at, request};

/// A disk of scripts/guests, as qcow2 beside the test's other files.
fn server(options: &[&str], folder: &std::path::Path) -> PathBuf {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/guests/disk.sh");
    let output = Command::new(script).args(options).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{script} {options:?}");
    let disk = String::from_utf8(output.stdout).unwrap();
    let arguments = ["convert", "-f", "raw", "-O", "qcow2", "-c", disk.trim(), "image.qcow2"];
    support::disk::run("qemu-img", &arguments, folder, "");
    folder.join("image.qcow2")
}

struct Run {
    lab: Lab,
    image: haul::error::Result<haul::cloud::tencent::cvm::Image>,
    cvm: haul::cloud::tencent::Cvm,
}

/// One boot at a time, over all tests and processes: two slow each other down to the time limit.
fn import(options: &[&str]) -> (Run, std::fs::File) {
    let lock = std::fs::File::create(std::env::temp_dir().join("haul-test-boot.lock")).unwrap();
    lock.lock().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = OneObject::serve(&server(options, folder.path()));
    let qemu = Qemu::new(Programs::default(), Accelerator::Tcg, Duration::from_secs(400));
    let lab = Lab::start(|config| config.hypervisor = Some(Arc::new(qemu)));
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let cvm = cvm_at(&lab.handle.url(), lab.keys.clone(), haul::cloud::tencent::Edition::Public, clock);
    let waiting = Waiting { interval: Duration::from_secs(1), timeout: Duration::from_secs(900) };
    let id = import::start(&cvm, &request("server"), waiting, &mut || Ok(store.link())).unwrap();
    let image = import::wait(&cvm, &id, waiting, &Tally::default());
    (Run { lab, image, cvm }, lock)
}

#[test]
#[ignore = "long: imports a server and boots it under TCG for minutes; scripts/test.sh --long"]
fn a_server_ready_for_virtio_is_imported_and_runs() {
    let (run, _lock) = import(&["initramfs=most", "rootref=uuid", "net=dhcp"]);
    let image = run.image.unwrap();
    let asked = RunRequest {
        image_id: image.image_id,
        zone: "ap-guangzhou-6".into(),
        name: "moved".into(),
        client_token: "once".into(),
        ..RunRequest::default()
    };
    let id = run.cvm.run_instance(&asked).unwrap();
    let console = run.lab.folder.path().join("cvm").join(&id).join("console.log");
    let clock = run.cvm.client().clock();
    for _ in 0..400 {
        let text = String::from_utf8_lossy(&std::fs::read(&console).unwrap_or_default()).into_owned();
        if let Some(line) = text.lines().find(|line| line.contains("HAUL-BEACON up") && line.contains(" END"))
        {
            // The host name comes from the config drive: cloud-init has read it.
            for seen in ["root=/dev/vda1 ", "livehost=VM-0 ", "addrs=eth0:10.0.2.15/24 "] {
                assert!(line.contains(seen), "no {seen}in {line}");
            }
            assert_eq!(run.cvm.instance(&id).unwrap().unwrap().instance_state, "RUNNING");
            run.cvm.terminate_instances(std::slice::from_ref(&id)).unwrap();
            return;
        }
        clock.sleep(Duration::from_secs(1)).unwrap();
    }
    panic!("the instance never came up: see {}", console.display());
}

#[test]
#[ignore = "long: imports a server and boots it under TCG for minutes; scripts/test.sh --long"]
fn a_server_that_looks_for_its_root_on_sata_is_an_internal_error() {
    let (run, _lock) = import(&["initramfs=most", "rootref=dev"]);
    assert_eq!(run.image.unwrap_err().id(), "cloud.import-failed");
    assert_eq!(run.lab.codes(), ["InternalError"]);
}

#[test]
#[ignore = "long: imports a server and boots it under TCG for minutes; scripts/test.sh --long"]
fn a_server_without_virtio_in_its_initramfs_is_refused_unbooted() {
    let (run, _lock) = import(&[]);
    assert_eq!(run.image.unwrap_err().id(), "cloud.import-failed");
    assert_eq!(run.lab.codes(), ["VirtioNotInstall"]);
}
