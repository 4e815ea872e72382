//! A store and a cloud in the test's process, and the program `haul` told where they are.

#![allow(dead_code, reason = "each test binary uses its own part")]

#[path = "cloud.rs"]
mod cloud;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use cloud::{FakeHypervisor, TestClock, cvm_at};
use haul::cloud::Credentials;
use haul::cloud::tencent::client::Repeat;
use haul::cloud::tencent::{Cvm, Edition};
use haul::lab::{cvm, s3};
use serde_json::Value;

use super::support::text;

/// The bucket of the lab.
pub const BUCKET: &str = "images-1250000000";

/// A store and a CVM API in this process, whose importer judges images and boots none.
pub struct Lab {
    pub store: s3::Handle,
    api: cvm::Handle,
    keys: Credentials,
    folder: tempfile::TempDir,
}

impl Lab {
    pub fn start() -> Lab {
        let folder = tempfile::tempdir().unwrap();
        let keys = cvm::generate_keys();
        let store = s3::Config::new(folder.path().join("cos"), &keys.secret_id, keys.secret_key.expose());
        let store = s3::Server::start(store).unwrap();
        store.create_bucket(BUCKET, false).unwrap();
        let mut config = cvm::Config::new(folder.path(), vec![keys.clone()]);
        config.cos = Some(format!("cos.ap-guangzhou.localhost:{}", store.addr.port()));
        config.hypervisor = Some(Arc::new(FakeHypervisor::default()));
        Lab { store, api: cvm::start(config).unwrap(), keys, folder }
    }

    /// haul, told where this cloud is.
    pub fn haul(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
        command
            .args(args)
            .arg("--json")
            .env("TENCENTCLOUD_SECRET_ID", &self.keys.secret_id)
            .env("TENCENTCLOUD_SECRET_KEY", self.keys.secret_key.expose())
            .env("HAUL_REGION", "ap-guangzhou")
            .env("HAUL_COS_ENDPOINT", format!("http://cos.ap-guangzhou.localhost:{}", self.store.addr.port()))
            .env("HAUL_CONNECT_TO", "127.0.0.1")
            .env("HAUL_CVM_ENDPOINT", self.api.url())
            .env("HAUL_STATE_DIR", self.state());
        command
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn migrate(&self, name: &str, disk: &Path, more: &[&str]) -> Command {
        let args =
            ["migrate", "--to", "image", "--bucket", BUCKET, "--poll", "1", "--keep-object", "--name", name];
        self.haul(&[&args[..], more, &[text(disk)]].concat())
    }

    /// How many images there are.
    pub fn images(&self) -> usize {
        let filter = serde_json::json!({"Name": "image-type", "Values": ["PRIVATE_IMAGE"]});
        let asked = serde_json::json!({"Filters": [filter], "Limit": 100});
        let answer = self.cvm().client().call("DescribeImages", &asked, Repeat::Freely).unwrap();
        usize::try_from(answer["TotalCount"].as_u64().unwrap()).unwrap()
    }

    /// How many uploads were begun and neither completed nor aborted.
    pub fn uploads(&self) -> usize {
        fs::read_dir(self.folder.path().join("cos").join(BUCKET).join("uploads")).unwrap().count()
    }

    /// The newest job's id.
    pub fn job(&self) -> String {
        let jobs = fs::read_dir(self.state().join("jobs")).unwrap().map(|entry| entry.unwrap());
        let newest = jobs.max_by_key(|entry| entry.metadata().unwrap().created().unwrap()).unwrap();
        newest.file_name().into_string().unwrap()
    }

    /// Drops a checked image, and with it the gigabyte that its disk takes here.
    pub fn delete_image(&self, id: &str) {
        self.cvm().delete_images(&[id.to_owned()]).unwrap();
    }

    pub fn cvm(&self) -> Cvm {
        cvm_at(&self.api.url(), self.keys.clone(), Edition::Public, TestClock::right())
    }
}

impl Drop for Lab {
    /// Why an import failed is told to the account only.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the account was told: {:?}", self.api.notifications());
        }
    }
}

/// What a command that must succeed printed as its result.
pub fn result(output: &Output) -> Value {
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}\n{stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "result", "{last}");
    last["result"].clone()
}

/// The event of a command that must fail, and its exit code.
pub fn failed(output: &Output) -> (Option<i32>, Value) {
    let stdout = String::from_utf8_lossy(&output.stdout);
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap_or("{}")).unwrap();
    assert_eq!(last["event"], "error", "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), last)
}
