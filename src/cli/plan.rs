//! `haul plan`: what haul would change in the copy of a server, as a diff.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::input::{Fixes, Input};
use super::output::Output;
use crate::config::{Location, location_parser};
use crate::error::{Kind, Result};
use crate::guest::{self, Plan, Severity};

/// Show what haul would change in the copy of a disk, as a unified diff with the reasons
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul plan /dev/sda
  haul plan --keep-network --json server.qcow2
  haul plan --data-disk /dev/sdb=data.raw server.raw     with the server's second disk

Nothing is changed. Exit code 3 when something that haul cannot mend keeps it from booting.")]
pub struct Arguments {
    /// A disk, an image, or an object as cos://BUCKET/KEY
    #[arg(value_parser = location_parser())]
    disk: Location,
    #[command(flatten)]
    input: Input,
    #[command(flatten)]
    fixes: Fixes,
}

#[derive(Serialize)]
struct Document<'a> {
    guest: &'a guest::Guest,
    #[serde(flatten)]
    plan: &'a Plan,
    /// All changes as one unified diff.
    diff: String,
}

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let monitor = output.notes();
    let image = arguments.input.image(&arguments.disk, stop, &monitor)?;
    let guest = guest::inspect(image.disk)?;
    let opener = arguments.input.opener(stop, &monitor);
    let plan = guest::plan(&guest, &arguments.fixes.options(&opener)?)?;
    let diff: String = plan.fixes.iter().map(|fix| format!("{fix}\n")).collect();
    let text = match plan.fixes.is_empty() && plan.findings.is_empty() {
        true => "nothing needs to be changed".to_owned(),
        false => plan.to_string(),
    };
    output.result(&Document { guest: &guest, plan: &plan, diff }, &text);
    if plan.findings.iter().any(|finding| finding.severity == Severity::Fatal) {
        output.fail(Kind::Preflight);
    }
    Ok(())
}
