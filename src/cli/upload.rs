//! `haul upload`: an image file into the object store.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::output::Output;
use crate::config::{Cloud, ObjectUrl};
use crate::error::Result;
use crate::job::services::Services;
use crate::job::upload;
use crate::monitor::Monitor;
use crate::unit::bytes::human;

/// Upload an image file to the object store, whole-object checksum proven
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul upload server.qcow2 cos://images-1250000000/server.qcow2
  haul upload --resume server.qcow2 cos://images-1250000000/server.qcow2")]
pub struct Arguments {
    /// The image file
    file: PathBuf,
    /// The object, as cos://BUCKET/KEY
    object: ObjectUrl,
    /// Take up an unfinished upload of the same object: parts that are the file's stay
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    cloud: Cloud,
}

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let store = Services::new(&arguments.cloud)?.store(&arguments.object.bucket, stop, &monitor)?;
    let sent =
        upload::upload(&arguments.file, &store, &arguments.object.key, arguments.resume, stop, &*monitor);
    progress.finish();
    let uploaded = sent?;
    let text = format!(
        "{}: {} uploaded{}{}",
        uploaded.object,
        human(uploaded.size),
        if uploaded.already_there > 0 {
            format!(", {} of it by an earlier run", human(uploaded.already_there))
        } else {
            String::new()
        },
        uploaded.crc64.map(|crc| format!(", CRC-64 {crc}")).unwrap_or_default(),
    );
    output.result(&uploaded, &text);
    Ok(())
}
