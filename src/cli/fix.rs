//! `haul fix` and `haul undo`: a finished copy fixed where it lies, and put back.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::input::Fixes;
use super::output::Output;
use crate::config::{Cloud, Location, location_parser};
use crate::error::Result;
use crate::job::open::Opener;
use crate::job::round::{self, Finished, Report};
use crate::monitor::Monitor;
use crate::unit::bytes::human;

/// Fix a finished copy so that it boots on virtio hardware: the changes of `haul plan`, appended to the image
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul fix server.qcow2
  haul fix cos://images-1250000000/server.qcow2
  haul undo server.qcow2                           takes the changes back

The copy is one that `haul convert` made as qcow2, with its manifest beside it (for an object: in this folder).
Needs root and FUSE. Until all of it is written the copy stays what it was.")]
pub struct Fix {
    /// The copy: an image file, or an object as cos://BUCKET/KEY
    #[arg(value_parser = location_parser())]
    copy: Location,
    #[command(flatten)]
    fixes: Fixes,
    /// Go on with an interrupted run
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    cloud: Cloud,
}

/// Take back the last round of a finished copy: its fix-ups, or its last update
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul undo server.qcow2

Image and manifest become what they were before the round, from the folder .haul-undo beside them.")]
pub struct Undo {
    /// The copy: an image file, or an object as cos://BUCKET/KEY
    #[arg(value_parser = location_parser())]
    copy: Location,
    #[command(flatten)]
    cloud: Cloud,
}

fn finished(copy: &Location, cloud: &Cloud, resume: bool) -> Finished {
    Finished { copy: copy.clone(), cloud: cloud.clone(), resume, threads: super::default_threads() }
}

/// Runs `haul fix`.
pub fn run(arguments: &Fix, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let opener = Opener::new(&arguments.cloud, stop, &monitor);
    let options = arguments.fixes.options(&opener)?;
    let job = finished(&arguments.copy, &arguments.cloud, arguments.resume);
    let fixed = round::fix(&job, &options, stop, &monitor);
    progress.finish();
    let report = fixed?;
    output.result(&report, &text(&report));
    Ok(())
}

/// Runs `haul undo`.
pub fn undo(arguments: &Undo, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let job = finished(&arguments.copy, &arguments.cloud, false);
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let undone = round::undo(&job, stop, &monitor);
    progress.finish();
    let report = undone?;
    let text =
        format!("{}: as it was before its last round\nimage root  {}", report.copy, report.image_root.0);
    output.result(&report, &text);
    Ok(())
}

/// What a round did, for a reader.
pub fn text(report: &Report) -> String {
    let mut text = report.fixes.clone().unwrap_or_default();
    let changed = human(report.changed);
    let _ = match report.changed {
        0 => writeln!(text, "{}: nothing changed", report.copy),
        _ => writeln!(text, "{}: {changed} changed, the image is {}", report.copy, human(report.image_bytes)),
    };
    let _ = writeln!(text, "source root {}\nimage root  {}", report.source_root.0, report.image_root.0);
    text
}
