//! `haul plan`: what haul would change in the copy of a server, as a diff.

use std::path::PathBuf;

use serde::Serialize;

use super::output::Output;
use crate::error::{Kind, Result};
use crate::guest::{self, Options, Plan, Severity};
use crate::image::{self, Format, Gate};

/// Show what haul would change in the copy of a disk, as a unified diff with the reasons
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul plan /dev/sda
  haul plan --keep-network --json server.qcow2

Nothing is changed. Exit code 3 when something that haul cannot mend keeps it from booting.")]
pub struct Arguments {
    /// A disk or an image
    disk: PathBuf,
    /// Its format (default: probed; a device is raw)
    #[arg(short, value_name = "FORMAT")]
    format: Option<Format>,
    /// A backing file that a qcow2 image may read
    #[arg(long, value_name = "FILE")]
    backing: Vec<PathBuf>,
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
pub fn run(arguments: &Arguments, output: &Output) -> Result<()> {
    let gate = arguments.backing.iter().fold(Gate::closed(), Gate::backing);
    let image = image::open(&arguments.disk, arguments.format, &gate)?;
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
