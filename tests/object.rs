//! A disk straight into an object store: killed at seeded journal positions and resumed, counted by the server.

#![cfg(feature = "net")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

mod support;
#[path = "support/images.rs"]
mod images;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use haul::config::Cloud;
use haul::image::{self, Compress, Format, Gate};
use haul::job::copy::{Base, Copied, Copy, Settings, Target};
use haul::job::open::Opener;
use haul::job::source::{Options, Source};
use haul::job::upload::upload;
use haul::lab::s3::{Config, Handle, Server};
use haul::manifest::{Manifest, verify};
use haul::monitor::{Monitor, Tally};
use haul::sink::object::RoundBase;
use haul::sink::touched::touched;
use haul::source::OnReadError;
use haul::store::fault::Faulty;
use haul::store::s3::{Keys, S3};
use haul::store::{ObjectDisk, ObjectStore};
use haul::unit::{Extent, ExtentMap, Secret};
use images::{Random, contents, seed};

const PART: u64 = 16 << 20;

fn lab(folder: &Path) -> (Handle, Arc<dyn ObjectStore>) {
    let lab = Server::start(Config::new(folder, "id", "secret")).unwrap();
    lab.create_bucket("images-1250000000", false).unwrap();
    let keys = Keys { id: "id".into(), secret: Secret::new("secret".into()), token: None };
    let store = S3::new(haul::store::s3::Config {
        endpoint: lab.endpoint(),
        region: "ap-guangzhou".into(),
        bucket: "images-1250000000".into(),
        path_style: true,
        connect_to: None,
        keys: Arc::new(move || Ok(keys.clone())),
    });
    (lab, Arc::new(store.unwrap()))
}

fn open(disk: &Path) -> Source {
    let options = Options { format: None, gate: &Gate::closed(), all_blocks: true, inconsistent: false };
    let monitor: Arc<dyn Monitor> = Arc::new(Tally::default());
    let opener = Opener::new(&Cloud::default(), &Arc::default(), &monitor);
    Source::open(opener.open(&disk.to_owned().into()).unwrap(), &options, &*monitor).unwrap()
}

fn copy<'a>(source: &'a Source, store: Arc<dyn ObjectStore>, folder: &Path, format: Format) -> Copy<'a> {
    fs::create_dir_all(folder).unwrap();
    Copy {
        source,
        settings: Settings {
            format,
            subformat: None,
            compress: if format == Format::Raw { Compress::None } else { Compress::Zstd },
            all_blocks: true,
            on_read_error: OnReadError::Fail,
        },
        target: Target::Object { store, key: "disk".into(), folder: folder.to_owned() },
        journal: folder.join("journal"),
        manifest: folder.join("manifest"),
        threads: 2,
        base: None,
    }
}

fn run(copy: &Copy<'_>) -> haul::error::Result<Copied> {
    let monitor: Arc<dyn Monitor> = Arc::new(Tally::default());
    copy.run(true, &AtomicBool::new(false), &monitor)
}

/// The object, read by ranged GETs, is the source; and a fresh multipart upload is all that ever was in the bucket.
fn prove(store: &Arc<dyn ObjectStore>, disk: &Path, copied: &Copied, format: Format) {
    assert!(store.uploads("").unwrap().is_empty(), "an unfinished upload is left");
    let object = ObjectDisk::open(store.clone(), "disk", 32 << 20).unwrap();
    let image = image::open_on(Arc::new(object), Some(format), &Gate::closed()).unwrap();
    let verdict =
        verify::verify(&copied.manifest, &*image.disk, 2, &AtomicBool::new(false), &|_| {}).unwrap();
    assert!(verdict.differing.is_empty(), "{:?}", verdict.differing);
    let same = image::compare(&*image.disk, &*open(disk).disk().clone(), &image::compare::Options::default());
    assert!(same.unwrap().same());
}

#[test]
fn an_object_is_the_disk_and_its_crc_is_on_record() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    fs::write(&disk, contents((90 << 20) + 512, seed())).unwrap();
    let (_lab, store) = lab(&dir.path().join("lab"));
    for format in [Format::Qcow2, Format::Raw] {
        let source = open(&disk);
        let copied =
            run(&copy(&source, store.clone(), &dir.path().join(format.to_string()), format)).unwrap();
        let object = store.head("disk").unwrap().unwrap();
        assert_eq!(
            (Some(object.size), object.crc64),
            (Some(copied.manifest.head.image_bytes), copied.manifest.head.crc64)
        );
        prove(&store, &disk, &copied, format);
    }
}

#[test]
fn an_upload_cut_off_anywhere_resumes_and_sends_at_most_what_was_in_flight_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let seed = seed();
    let mut random = Random(seed);
    let mut bytes = vec![0; 200 << 20];
    random.fill(&mut bytes);
    fs::write(&disk, &bytes).unwrap();
    let source = open(&disk);
    let (_whole_lab, whole) = lab(&dir.path().join("whole-lab"));
    let expected = run(&copy(&source, whole, &dir.path().join("whole"), Format::Qcow2)).unwrap();

    let (lab, store) = lab(&dir.path().join("lab"));
    for round in 0..3 {
        let folder = dir.path().join(format!("job-{round}"));
        let before = lab.received("UploadPart");
        // Every fifth request or so fails for good: the run ends wherever that is, again and again.
        let mut tries = 0;
        let copied = loop {
            let faulty: Arc<dyn ObjectStore> = Arc::new(Faulty::new(store.clone(), random.next(), 150));
            match run(&copy(&source, faulty, &folder, Format::Qcow2)) {
                Ok(copied) => break copied,
                Err(_) if tries < 40 => tries += 1,
                Err(error) => panic!("{error:?}"),
            }
        };
        println!("round {round}: {tries} runs were cut off");
        assert_eq!(copied.manifest.head.source_root, expected.manifest.head.source_root);
        assert_eq!(copied.manifest.head.crc64, expected.manifest.head.crc64);
        copy(&source, store.clone(), &folder, Format::Qcow2).clear();
        let sent = lab.received("UploadPart") - before;
        let most = copied.manifest.head.image_bytes + (tries + 1) * 5 * (PART + (2 << 20));
        assert!(sent <= most, "{sent} bytes were sent in {} runs, {most} at most", tries + 1);
        prove(&store, &disk, &copied, Format::Qcow2);
        store.delete("disk").unwrap();
    }
}

#[test]
fn a_round_in_place_cut_off_anywhere_resumes_to_the_changed_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let mut random = Random(seed());
    let mut bytes = contents((200 << 20) + 512, random.next());
    fs::write(&disk, &bytes).unwrap();
    let (lab, store) = lab(&dir.path().join("lab"));
    let folder = dir.path().join("whole");
    run(&copy(&open(&disk), store.clone(), &folder, Format::Raw)).unwrap();
    let mut manifest = folder.join("manifest");
    for round in 0..4 {
        let mut changed = ExtentMap::new();
        for _ in 0..6 {
            let at = usize::try_from(random.below(200 << 20)).unwrap();
            bytes[at] ^= 0x5a;
            changed.insert(Extent::at(at as u64, 1).widened(64 << 10));
        }
        fs::write(&disk, &bytes).unwrap();
        let touched = touched(&changed, bytes.len() as u64, 2 << 20);
        let source = open(&disk).restricted(&touched);
        let folder = dir.path().join(format!("round-{round}"));
        let info = store.head("disk").unwrap().unwrap();
        let base = || Base {
            manifest: Manifest::open(&manifest).unwrap(),
            image: Arc::new(ObjectDisk::open(store.clone(), "disk", 0).unwrap()),
            object: Some(RoundBase {
                size: info.size,
                etag: info.etag.clone(),
                crc64: info.crc64,
                front: None,
                in_place: true,
            }),
            changed: touched.clone(),
            fixes: false,
        };
        let before = lab.received("UploadPart");
        let mut tries = 0;
        let copied = loop {
            let faulty: Arc<dyn ObjectStore> = Arc::new(Faulty::new(store.clone(), random.next(), 150));
            let copy = Copy { base: Some(base()), ..copy(&source, faulty, &folder, Format::Raw) };
            match run(&copy) {
                Ok(copied) => break copied,
                Err(_) if tries < 40 => tries += 1,
                Err(error) => panic!("{error:?}"),
            }
        };
        println!("round {round}: {tries} runs were cut off");
        copy(&source, store.clone(), &folder, Format::Raw).clear();
        let sent = lab.received("UploadPart") - before;
        let most = touched.bytes() + (tries + 1) * 5 * PART;
        assert!(sent <= most, "{sent} bytes were sent in {} runs, {most} at most", tries + 1);
        assert_eq!(copied.manifest.head.crc64, store.head("disk").unwrap().unwrap().crc64);
        prove(&store, &disk, &copied, Format::Raw);
        manifest = folder.join("manifest");
    }
}

#[test]
fn a_resumed_upload_sends_only_the_parts_that_are_not_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk.raw");
    let bytes = contents((70 << 20) + 512, seed());
    fs::write(&file, &bytes).unwrap();
    let (lab, store) = lab(&dir.path().join("lab"));
    let go = AtomicBool::new(false);
    let tally = Tally::default();

    // An earlier run sent part 1, and part 3 of another file.
    let earlier = store.begin("disk").unwrap();
    store.put_part(&earlier, 1, bytes[..16 << 20].to_vec().into()).unwrap();
    store.put_part(&earlier, 3, vec![1; 16 << 20].into()).unwrap();
    let before = lab.received("UploadPart");
    let uploaded = upload(&file, &store, "disk", true, &go, &tally).unwrap();
    assert_eq!((uploaded.size, uploaded.already_there), (bytes.len() as u64, PART));
    assert_eq!(lab.received("UploadPart") - before, bytes.len() as u64 - PART);
    let object = ObjectDisk::open(store.clone(), "disk", 32 << 20).unwrap();
    let same = image::compare(
        &object,
        &haul::io::DiskFile::open(&file).unwrap(),
        &image::compare::Options::default(),
    );
    assert!(same.unwrap().same());
    assert!(store.uploads("").unwrap().is_empty());

    fs::write(&file, b"").unwrap();
    assert_eq!(upload(&file, &store, "empty", false, &go, &tally).unwrap().size, 0);
    assert_eq!(store.head("empty").unwrap().unwrap().size, 0);
}
