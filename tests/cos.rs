//! Objects as disks on the command line: `cos://` in place of a path, against a lab in this process.

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
#[path = "support/lab.rs"]
mod lab;

use std::fs;
#[cfg(feature = "fault-points")]
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use lab::{BUCKET, Lab, failed, result};

fn url(key: &str) -> String {
    format!("cos://{BUCKET}/{key}")
}

/// haul in `folder`, where an object's manifest and journal go.
fn haul(cloud: &Lab, folder: &Path, args: &[&str]) -> Command {
    let mut command = cloud.haul(args);
    command.current_dir(folder);
    command
}

fn names(folder: &Path) -> Vec<String> {
    let entries =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

#[test]
fn an_object_is_written_read_proven_and_compared_like_a_file() {
    let cloud = Lab::start();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    fs::write(folder.join("disk.raw"), images::contents((40 << 20) + 512, images::seed())).unwrap();
    let done = |args: &[&str]| result(&haul(&cloud, folder, args).output().unwrap());
    let made = done(&["convert", "--all-blocks", "--compress", "zstd", "disk.raw", &url("a/disk.qcow2")]);
    assert_eq!(names(folder), ["disk.qcow2.manifest", "disk.raw"]);
    done(&["verify", "disk.qcow2.manifest", &url("a/disk.qcow2")]);
    done(&["compare", "disk.raw", &url("a/disk.qcow2")]);
    let facts = haul(&cloud, folder, &["inspect", &url("a/disk.qcow2")]).output().unwrap();
    let facts: serde_json::Value = serde_json::from_slice(&facts.stdout).unwrap();
    assert_eq!(facts["image"]["format"], "qcow2");
    assert_eq!(facts["image"]["virtual_size"], (40 << 20) + 512);

    // From object to object, and back into a file.
    let copied = done(&["convert", "--all-blocks", &url("a/disk.qcow2"), &url("b.raw")]);
    assert_eq!(copied["source_root"], made["source_root"]);
    done(&["convert", "--all-blocks", &url("b.raw"), "back.raw"]);
    assert!(fs::read(folder.join("back.raw")).unwrap() == fs::read(folder.join("disk.raw")).unwrap());

    // What is there is not replaced unasked, and nothing is its own source.
    let refused = |args: &[&str]| failed(&haul(&cloud, folder, args).output().unwrap());
    assert_eq!(refused(&["convert", "disk.raw", &url("b.raw")]).0, Some(2));
    assert_eq!(refused(&["convert", "--force", &url("b.raw"), &url("b.raw")]).0, Some(2));
    assert_eq!(refused(&["convert", &url("nothing"), "x.raw"]).0, Some(7));
    let no_key = haul(&cloud, folder, &["inspect", "cos://no-key"]).output().unwrap();
    assert_eq!(no_key.status.code(), Some(2));
    done(&["convert", "--force", "--all-blocks", "disk.raw", &url("b.raw")]);
    assert_eq!(
        names(folder),
        ["b.raw.manifest", "back.raw", "back.raw.manifest", "disk.qcow2.manifest", "disk.raw"]
    );
}

#[cfg(feature = "fault-points")]
#[test]
fn a_conversion_into_an_object_killed_anywhere_resumes() {
    let cloud = Lab::start();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let mut random = images::Random(images::seed());
    let mut bytes = vec![0; 90 << 20];
    random.fill(&mut bytes);
    fs::write(folder.join("disk.raw"), &bytes).unwrap();
    let whole = ["convert", "--all-blocks", "disk.raw", &url("whole.qcow2")];
    let expected = result(&haul(&cloud, folder, &whole).output().unwrap());
    for (phase, points) in [("journal", 50), ("upload", 8), ("complete", 5)] {
        let key = url(&format!("{phase}.qcow2"));
        let convert = ["convert", "--all-blocks", "disk.raw", &key];
        let fault = format!("{phase}:{}", 1 + random.below(points));
        let output = haul(&cloud, folder, &convert).env("HAUL_FAULT", &fault).output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "{fault} was not reached");
        let resumed =
            result(&haul(&cloud, folder, &[&convert[..], &["--resume"]].concat()).output().unwrap());
        assert_eq!(resumed["source_root"], expected["source_root"], "{fault}");
        let manifest = format!("{phase}.qcow2.manifest");
        result(&haul(&cloud, folder, &["verify", &manifest, &key]).output().unwrap());
        let left: Vec<String> = names(folder).into_iter().filter(|name| name.contains(".haul-")).collect();
        assert!(left.is_empty(), "{fault}: {left:?}");
    }
}
