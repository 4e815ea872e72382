//! The lab's object store, judged by clients we did not write.
#![cfg(feature = "net")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

use std::path::PathBuf;
use std::process::Command;

use haul::lab::s3::{Config, Server};

/// A program of the environment scripts/pydeps.sh makes.
fn pydeps(program: &str) -> PathBuf {
    let cache = std::env::var_os("HAUL_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target"));
    let path = cache.join("pydeps/bin").join(program);
    assert!(path.exists(), "{} is missing: run scripts/pydeps.sh", path.display());
    path
}

#[test]
fn boto3_and_tencents_sdk_find_a_cos_in_the_lab() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Server::start(Config::new(dir.path(), "AKIDlab", "lab-secret")).unwrap();
    lab.create_bucket("images-1250000000", false).unwrap();
    let run = Command::new(pydeps("python"))
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/foreign/boto3_suite.py"))
        .args([&lab.addr.port().to_string(), "images-1250000000", "AKIDlab", "lab-secret"])
        .env_remove("AWS_PROFILE")
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{out}\n{}", String::from_utf8_lossy(&run.stderr));
    assert!(out.ends_with("ok all\n"), "{out}");
}
