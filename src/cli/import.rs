//! `haul import`: an object in the store into an image of the cloud.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::json;

use super::output::Output;
use crate::config::{Cloud, ObjectUrl};
use crate::error::Result;
use crate::image::Format;
use crate::job::migrate::{self, Import};
use crate::job::services::Services;
use crate::monitor::Monitor;

/// Import an object as an image, and wait until it can be used
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul import --name web-01 cos://images-1250000000/server.qcow2

What to declare (system, version, architecture, firmware) is read from the object itself.")]
pub struct Arguments {
    /// The object, as cos://BUCKET/KEY
    object: ObjectUrl,
    /// The image's name, at most 60 characters
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Format of the object (default: probed)
    #[arg(short, value_name = "FORMAT")]
    format: Option<Format>,
    /// The operating system to declare, such as Debian (default: derived)
    #[arg(long, value_name = "NAME", requires = "os_version")]
    os_type: Option<String>,
    /// Its version
    #[arg(long, value_name = "VERSION", requires = "os_type")]
    os_version: Option<String>,
    /// Import although the guest has no cloud-init
    #[arg(long)]
    force_import: bool,
    /// Seconds between two looks at the import
    #[arg(long, default_value = "10", value_name = "S")]
    poll: u64,
    #[command(flatten)]
    cloud: Cloud,
}

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let services = Services::new(&arguments.cloud)?;
    let import = Import {
        store: services.store(&arguments.object.bucket, stop, &monitor)?,
        cvm: services.cvm(stop)?,
        key: arguments.object.key.clone(),
        format: arguments.format,
        name: arguments.name.clone(),
        os: arguments.os_type.clone().zip(arguments.os_version.clone()),
        force: arguments.force_import,
        poll_seconds: arguments.poll,
    };
    let imported = migrate::import_object(&import, &*monitor);
    progress.finish();
    let (image, request) = imported?;
    output.result(
        &json!({"image": image, "name": request.name, "os": request.os.to_string()}),
        &format!("image {image} ({}) is ready", request.os),
    );
    Ok(())
}
