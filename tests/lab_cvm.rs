//! The lab's CVM: its importer, its instances and its signature checks, judged by the official SDK too.

#![cfg(feature = "net")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

#[path = "support/cloud.rs"]
mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use haul::cloud::tencent::cvm::{BootMode, Instance, RunRequest};
use haul::cloud::tencent::{Cvm, import};
use haul::error::Kind;
use haul::lab::s3;
use haul::monitor::Tally;
use haul::store::ObjectStore;
use haul::store::s3::{Keys, S3};
use haul::unit::Secret;

use support::disk::{self, Server};
use support::{Lab, OneObject, WAITING, request, start};

/// Imports the file through the whole flow; the lab's code when that fails.
fn outcome(lab: &Lab, name: &str, object: &Path, force: bool) -> Option<String> {
    let store = OneObject::serve(object);
    let cvm = lab.cvm();
    let mut request = request(name);
    request.force = force;
    let id = start(&cvm, &request, &store).unwrap();
    let before = lab.codes().len();
    match import::wait(&cvm, &id, WAITING, &Tally::default()) {
        Ok(image) => {
            assert_eq!(image.image_name, name);
            assert_eq!(lab.codes().len(), before, "a good image earned a message");
            None
        }
        Err(error) => {
            assert_eq!((error.kind(), error.id()), (Kind::Cloud, "cloud.import-failed"), "{error:?}");
            lab.codes().pop()
        }
    }
}

fn earned(lab: &Lab, name: &str, object: &Path) -> String {
    outcome(lab, name, object, false).expect("the image was taken")
}

#[test]
fn a_good_disk_of_each_format_becomes_normal() {
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    let raw = disk::raw(folder.path(), Server::WHOLE);
    assert_eq!(outcome(&lab, "raw", &raw, false), None);
    for (format, options) in
        [("qcow2", &["-O", "qcow2", "-c"][..]), ("vpc", &["-O", "vpc"]), ("vmdk", &["-O", "vmdk"])]
    {
        assert_eq!(outcome(&lab, format, &disk::converted(&raw, options, format), false), None, "{format}");
    }
    let machines = lab.hypervisor.machines.lock().unwrap();
    assert_eq!(machines.len(), 4, "every image is booted before it is NORMAL");
    assert!(machines.iter().all(|machine| !machine.uefi));
}

#[test]
fn what_the_guest_lacks_has_its_own_code() {
    let lab = Lab::start(|_| {});
    let server = |change: fn(&mut Server)| {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Server::WHOLE;
        change(&mut server);
        (disk::raw(folder.path(), server), folder)
    };
    let (object, _folder) = server(|s| s.virtio = false);
    assert_eq!(earned(&lab, "no-virtio", &object), "VirtioNotInstall");
    let (object, _folder) = server(|s| s.init = false);
    assert_eq!(earned(&lab, "no-root", &object), "RootPartitionNotFound");
    let (object, _folder) = server(|s| s.cloud_init = false);
    assert_eq!(earned(&lab, "no-cloud-init", &object), "CloudInitNotInstalled");
    assert_eq!(outcome(&lab, "forced", &object, true), None);
    let blank = tempfile::NamedTempFile::new().unwrap();
    blank.as_file().set_len(1 << 20).unwrap();
    assert_eq!(earned(&lab, "blank", blank.path()), "PartitionNotPresent");
    assert!(lab.hypervisor.machines.lock().unwrap().iter().all(|machine| machine.disk.exists()));
}

#[test]
fn an_image_that_does_not_boot_is_an_internal_error() {
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    lab.hypervisor.broken.store(true, Ordering::SeqCst);
    assert_eq!(earned(&lab, "unbootable", &disk::raw(folder.path(), Server::WHOLE)), "InternalError");
}

#[test]
fn formats_and_sizes_outside_the_rules_are_refused() {
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    let raw = disk::raw(folder.path(), Server::WHOLE);
    let wrong = |name: &str, object: &Path| {
        assert_eq!(earned(&lab, name, object), "InvalidFormatSize", "{name}");
    };
    wrong("vdi", &disk::converted(&raw, &["-O", "vdi"], "vdi"));
    wrong("vhdx", &disk::converted(&raw, &["-O", "vhdx"], "vhdx"));
    let zstd = disk::converted(&raw, &["-O", "qcow2", "-c", "-o", "compression_type=zstd"], "zstd");
    wrong("zstd", &zstd);
    let at = |name: &str| folder.path().join(name);
    disk::run("qemu-img", &["create", "-q", "-f", "qcow2", "large", "501G"], folder.path(), "");
    wrong("large", &at("large"));
    let backed = ["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "backed"];
    disk::run("qemu-img", &backed, folder.path(), "");
    wrong("backed", &at("backed"));
    let descriptor =
        "# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"/etc/passwd\" 0\n";
    std::fs::write(at("descriptor"), descriptor).unwrap();
    wrong("descriptor", &at("descriptor"));
    let mut corrupt = std::fs::read(disk::converted(&raw, &["-O", "qcow2"], "qcow2")).unwrap();
    // The first L1 entry, at the offset the header names, points far beyond the file.
    let l1 = usize::try_from(u64::from_be_bytes(corrupt[40..48].try_into().unwrap())).unwrap();
    corrupt[l1 + 1] ^= 0x70;
    std::fs::write(at("corrupt"), corrupt).unwrap();
    wrong("corrupt", &at("corrupt"));

    let newer = Lab::start(|config| config.new_qcow2 = true);
    assert_eq!(outcome(&newer, "zstd", &zstd, false), None);
}

#[test]
fn a_link_is_fetched_once_whole_and_never_by_a_dry_run() {
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    let store = OneObject::serve(&disk::raw(folder.path(), Server::WHOLE));
    let (cvm, link) = (lab.cvm(), Secret::new(format!("{}?signature=x", store.url)));
    cvm.import_image(&request("first"), &link, true).unwrap();
    let first = cvm.import_image(&request("first"), &link, false).unwrap().unwrap();
    import::wait(&cvm, &first, WAITING, &Tally::default()).unwrap();
    assert_eq!((store.gets.load(Ordering::SeqCst), store.odd.load(Ordering::SeqCst)), (1, 0));

    let second = cvm.import_image(&request("second"), &link, false).unwrap().unwrap();
    import::wait(&cvm, &second, WAITING, &Tally::default()).unwrap_err();
    assert_eq!(lab.codes(), ["InvalidUrl"]);
    assert_eq!(store.gets.load(Ordering::SeqCst), 1, "a used link was fetched again");
}

#[test]
fn a_link_to_another_store_is_no_cos_link() {
    let lab = Lab::start(|config| config.cos = Some("127.0.0.1:1".into()));
    let folder = tempfile::tempdir().unwrap();
    let object = folder.path().join("object");
    std::fs::write(&object, "x").unwrap();
    assert_eq!(earned(&lab, "elsewhere", &object), "InvalidUrl");
}

#[test]
fn an_object_of_the_labs_store_is_imported_by_its_signed_link() {
    let folder = tempfile::tempdir().unwrap();
    let store_lab = s3::Server::start(s3::Config::new(folder.path().join("cos"), "AKIDlab", "key")).unwrap();
    store_lab.create_bucket("img-1250000000", false).unwrap();
    let cos = format!("cos.ap-guangzhou.localhost:{}", store_lab.addr.port());
    let keys = || Ok(Keys { id: "AKIDlab".into(), secret: Secret::new("key".into()), token: None });
    let store = S3::new(haul::store::s3::Config {
        endpoint: format!("http://{cos}"),
        region: "ap-guangzhou".into(),
        bucket: "img-1250000000".into(),
        path_style: false,
        connect_to: Some([127, 0, 0, 1].into()),
        keys: Arc::new(keys),
    })
    .unwrap();
    let raw = disk::raw(folder.path(), Server::WHOLE);
    let image = disk::converted(&raw, &["-O", "qcow2", "-c"], "image");
    let key = "servers/web 1 (ü)+&.qcow2";
    store.put(key, std::fs::read(image).unwrap().into()).unwrap();

    let lab = Lab::start(|config| config.cos = Some(cos));
    let cvm = lab.cvm();
    let mut link = || store.presign_get(key, Duration::from_secs(3600));
    import::rehearse(&cvm, &request("cos"), &mut link).unwrap();
    let id = import::start(&cvm, &request("cos"), WAITING, &mut link).unwrap();
    import::wait(&cvm, &id, WAITING, &Tally::default()).unwrap();
    let reads: Vec<_> = store_lab.requests().into_iter().filter(|r| r.operation != "PutObject").collect();
    assert_eq!((reads.len(), reads[0].operation.as_str(), &reads[0].range), (1, "GetObject", &None));

    let stale = Secret::new(link().unwrap().expose().replace("X-Amz-Expires=3600", "X-Amz-Expires=3601"));
    let id = cvm.import_image(&request("forged"), &stale, false).unwrap().unwrap();
    import::wait(&cvm, &id, WAITING, &Tally::default()).unwrap_err();
    assert_eq!(lab.codes(), ["InvalidUrl"]);
}

#[test]
fn a_gpt_is_taken_by_the_public_edition_only() {
    let folder = tempfile::tempdir().unwrap();
    let raw = disk::raw(folder.path(), Server::WHOLE);
    disk::run("sfdisk", &["-q", "disk.raw"], folder.path(), "label: gpt\nstart=2048, size=124928\n");
    assert_eq!(outcome(&Lab::start(|_| {}), "gpt", &raw, false), None);
    let private = Lab::start(|config| config.edition = haul::cloud::tencent::Edition::Tce);
    let tce = support::cvm_at(
        &private.handle.url(),
        private.keys.clone(),
        haul::cloud::tencent::Edition::Tce,
        support::TestClock::right(),
    );
    let store = OneObject::serve(&raw);
    let id = start(&tce, &request("gpt"), &store).unwrap();
    import::wait(&tce, &id, WAITING, &Tally::default()).unwrap_err();
    assert_eq!(private.codes(), ["PartitionNotPresent"]);
}

fn in_state(cvm: &Cvm, id: &str, state: &str) -> Instance {
    for _ in 0..10_000 {
        let instance = cvm.instance(id).unwrap().expect("the instance vanished");
        if instance.instance_state == state {
            return instance;
        }
        cvm.client().clock().sleep(WAITING.interval).unwrap();
    }
    panic!("instance {id} never was {state}");
}

#[test]
fn an_instance_runs_its_image_with_a_config_drive_until_it_is_terminated() {
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    let store = OneObject::serve(&disk::raw(folder.path(), Server::WHOLE));
    let cvm = lab.cvm();
    let mut asked = request("server");
    asked.boot_mode = BootMode::Uefi;
    let image_id = start(&cvm, &asked, &store).unwrap();
    import::wait(&cvm, &image_id, WAITING, &Tally::default()).unwrap();
    let run = RunRequest {
        image_id: image_id.clone(),
        zone: "ap-guangzhou-6".into(),
        name: "web-1".into(),
        client_token: "token-1".into(),
        ..RunRequest::default()
    };
    let id = cvm.run_instance(&run).unwrap();
    assert_eq!(cvm.run_instance(&run).unwrap(), id, "a client token buys once");
    let instance = in_state(&cvm, &id, "RUNNING");
    assert_eq!((instance.image_id, instance.instance_name.as_str()), (image_id.clone(), "web-1"));
    {
        let machines = lab.hypervisor.machines.lock().unwrap();
        let machine = machines.last().unwrap();
        assert!(machine.uefi, "the declared boot mode counts");
        assert_eq!(machine.config_drive.instance_id, id);
        assert_eq!(machine.config_drive.hostname.as_deref(), Some("VM-0"));
    }
    assert_eq!(cvm.delete_images(std::slice::from_ref(&image_id)).unwrap_err().kind(), Kind::Cloud, "in use");
    cvm.terminate_instances(std::slice::from_ref(&id)).unwrap();
    assert_eq!(cvm.instance(&id).unwrap(), None);
    cvm.delete_images(std::slice::from_ref(&image_id)).unwrap();
    assert_eq!(cvm.image(&image_id).unwrap(), None);
    assert!(!lab.folder.path().join("cvm").join(&image_id).exists(), "a deleted image keeps its disk");
}

#[test]
fn the_official_sdk_gets_what_it_expects() {
    let python = support::python();
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    let store = OneObject::serve(&disk::raw(folder.path(), Server::WHOLE));
    let output = std::process::Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/foreign/cvm_sdk.py"))
        .args([&lab.handle.addr().to_string(), &lab.keys.secret_id, &store.url])
        .env("SECRET_KEY", lab.keys.secret_key.expose())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.ends_with("all good\n"), "{text}");
    assert_eq!(store.gets.load(Ordering::SeqCst), 1);
}
