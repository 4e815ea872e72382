//! `haul lab`: the embedded cloud, on loopback.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use super::output::{Output, print};
use crate::boot::Accelerator;
use crate::cloud::tencent;
use crate::config::Edition;
use crate::error::{Error, Kind, Result};
use crate::host::programs::Programs;
use crate::io::atomic;
use crate::lab::cvm::hypervisor::Qemu;
use crate::lab::{cvm, s3};

/// Run a cloud on this machine: COS and CVM with real checks, instances in QEMU
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul lab --env-file lab.env &         then, in another shell: . ./lab.env
  haul migrate --to image server.raw

Keys are made at each start and are good for this lab only. It listens on 127.0.0.1 alone.")]
pub struct Arguments {
    /// The lab's folder: buckets, images, consoles
    #[arg(long, default_value = "haul-lab", value_name = "DIR")]
    dir: PathBuf,
    /// Port of the object store; 0 takes any
    #[arg(long, default_value = "0", value_name = "PORT")]
    cos_port: u16,
    /// Port of the CVM API; 0 takes any
    #[arg(long, default_value = "0", value_name = "PORT")]
    cvm_port: u16,
    /// The edition whose shapes the API speaks
    #[arg(long, value_enum, default_value = "public")]
    edition: Edition,
    /// A bucket to make
    #[arg(long, default_value = "images-1250000000", value_name = "BUCKET")]
    bucket: String,
    /// Import qcow2 images compressed with zstd, as newer importers do
    #[arg(long)]
    new_qcow2: bool,
    /// Write the settings a client needs, as shell commands, readable by the owner only
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
}

const REGION: &str = "ap-guangzhou";
/// The longest an imported image may take to boot, under software emulation on a busy machine.
const BOOT_TIME: Duration = Duration::from_secs(600);

/// Runs the command until a signal ends it.
pub fn run(arguments: &Arguments, output: &Output, stop: &AtomicBool) -> Result<()> {
    let keys = cvm::generate_keys();
    std::fs::create_dir_all(&arguments.dir).map_err(|error| {
        Error::new(Kind::Destination, "lab.folder", format!("cannot make {}", arguments.dir.display()))
            .caused_by(error)
    })?;
    let folder = std::fs::canonicalize(&arguments.dir).unwrap_or_else(|_| arguments.dir.clone());
    let mut store = s3::Config::new(folder.join("cos"), &keys.secret_id, keys.secret_key.expose());
    store.port = arguments.cos_port;
    let store = s3::Server::start(store)?;
    store.create_bucket(&arguments.bucket, false)?;

    let mut config = cvm::Config::new(&folder, vec![keys.clone()]);
    config.edition = match arguments.edition {
        Edition::Public => tencent::Edition::Public,
        Edition::Tce => tencent::Edition::Tce,
    };
    config.region = REGION.to_owned();
    config.port = arguments.cvm_port;
    config.cos = Some(store.addr.to_string());
    config.new_qcow2 = arguments.new_qcow2;
    config.hypervisor = Some(Arc::new(Qemu::new(Programs::default(), Accelerator::Auto, BOOT_TIME)));
    let api = cvm::start(config)?;

    // The names of COS do not resolve here: the client is told the address, and keeps the name.
    let port = store.addr.port();
    let settings = [
        ("TENCENTCLOUD_SECRET_ID", keys.secret_id.clone()),
        ("TENCENTCLOUD_SECRET_KEY", keys.secret_key.expose().clone()),
        ("HAUL_REGION", REGION.to_owned()),
        ("HAUL_COS_ENDPOINT", format!("http://cos.{REGION}.localhost:{port}")),
        ("HAUL_CONNECT_TO", "127.0.0.1".to_owned()),
        ("HAUL_CVM_ENDPOINT", api.url()),
        ("HAUL_EDITION", if arguments.edition == Edition::Tce { "tce" } else { "public" }.to_owned()),
    ];
    let mut exports = String::new();
    for (name, value) in &settings {
        let _ = writeln!(exports, "export {name}={value}");
    }
    if let Some(file) = &arguments.env_file {
        atomic::write(file, exports.as_bytes())?;
    }
    let document: serde_json::Map<_, _> =
        settings.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    output.result(
        &json!({"cos": store.endpoint(), "cvm": api.url(), "bucket": arguments.bucket, "environment": document}),
        &format!(
            "the lab is up: bucket {}, notifications at {}/lab/notifications\n{exports}",
            arguments.bucket,
            api.url()
        ),
    );
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
    }
    print("the lab is down");
    Ok(())
}
