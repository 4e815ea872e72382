//! `haul verify`: proves a copy against its manifest.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::json;

use super::input::Input;
use super::output::Output;
use crate::config::{Location, location_parser};
use crate::error::{Error, Kind, Result};
use crate::manifest::{Manifest, verify};
use crate::monitor::Monitor;
use crate::unit::bytes::human;

/// Prove a copy against its manifest: every chunk, and zeroes everywhere else
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul verify server.qcow2.manifest server.qcow2
  haul verify server.qcow2.manifest /dev/vdb        the image, written to a disk
  haul verify server.qcow2.manifest cos://images-1250000000/server.qcow2")]
pub struct Arguments {
    /// The manifest written beside the copy
    manifest: PathBuf,
    /// The copy: an image file, a disk, or an object as cos://BUCKET/KEY
    #[arg(value_parser = location_parser())]
    copy: Location,
    #[command(flatten)]
    input: Input,
    /// Worker threads (default: one per processor)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// Extents named in a message at most; JSON output lists them all.
const NAMED: usize = 8;

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let manifest = Manifest::open(&arguments.manifest)?;
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let image = arguments.input.image(&arguments.copy, stop, &monitor)?;
    let threads = arguments.threads.unwrap_or_else(super::default_threads);
    progress.begin("verify", Some(manifest.head.size));
    let verdict = verify::verify(&manifest, &*image.disk, threads, stop, &|done| progress.advance(done));
    progress.finish();
    let verdict = verdict?;
    let differing: Vec<_> = verdict.differing.iter().map(|run| (run.start, run.end)).collect();
    if !differing.is_empty() {
        let named: Vec<_> = verdict.differing.iter().take(NAMED).map(|run| format!("{run:?}")).collect();
        let more = if differing.len() > NAMED { ", …" } else { "" };
        let mut error = Error::new(
            Kind::Mismatch,
            "verify.differs",
            format!("{} is not the copy its manifest describes", arguments.copy),
        )
        .because(format!("{} extents differ (bytes {}{more})", differing.len(), named.join(", ")));
        for (start, end) in differing {
            error = error.fact("extent", format!("{start}..{end}"));
        }
        return Err(error);
    }
    output.result(
        &json!({
            "copy": arguments.copy, "size": manifest.head.size, "compared": verdict.compared,
            "image_root": manifest.head.image_root, "source_root": manifest.head.source_root,
        }),
        &format!(
            "{}: proven, {} compared\nimage root  {}\nsource root {}",
            arguments.copy,
            human(verdict.compared),
            manifest.head.image_root.0,
            manifest.head.source_root.0
        ),
    );
    Ok(())
}
