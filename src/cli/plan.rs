//! `haul plan`: what haul would change in the copy of a server, as a diff.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::input::Input;
use super::output::Output;
use crate::config::{Location, location_parser};
use crate::error::{Kind, Result};
use crate::guest::{self, Options, Plan, Severity};

/// Show what haul would change in the copy of a disk, as a unified diff with the reasons
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul plan /dev/sda
  haul plan --keep-network --json server.qcow2

Nothing is changed. Exit code 3 when something that haul cannot mend keeps it from booting.")]
pub struct Arguments {
    /// A disk, an image, or an object as cos://BUCKET/KEY
    #[arg(value_parser = location_parser())]
    disk: Location,
    #[command(flatten)]
    input: Input,
    /// Leave addresses and names of network cards as they are, instead of DHCP on eth0
    #[arg(long)]
    keep_network: bool,
    /// Keep cloud-init from configuring the network
    #[arg(long)]
    no_cloud_init_network: bool,
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
    let image = arguments.input.image(&arguments.disk, stop, &output.notes())?;
    let guest = guest::inspect(image.disk)?;
    let options = Options {
        keep_network: arguments.keep_network,
        no_cloud_init_network: arguments.no_cloud_init_network,
    };
    let plan = guest::plan(&guest, &options)?;
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
