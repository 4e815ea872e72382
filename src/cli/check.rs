//! `haul check`: what would go wrong, before anything is done.

use std::fmt::Write;
use std::path::PathBuf;

use super::output::Output;
use crate::config;
use crate::error::{Error, Kind, Result};
use crate::guest::plan;
use crate::host::disks;
use crate::image::{Format, Gate};
use crate::preflight::{self, Finding, Report, Severity, Target};
#[cfg(feature = "net")]
use crate::{cloud::tencent::Cvm, job::services::Services};

/// Check disks or images, this machine and the cloud before a job; changes nothing
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul check                            every disk of this machine
  haul check --fixable server.qcow2     with the changes haul would make in the copy
  haul check --region ap-guangzhou --bucket images-1250000000 /dev/sda

Exit code 3 when a job would fail. The endpoints are asked when a region or an endpoint is set, and with keys whether the
cloud imports the system.")]
pub struct Arguments {
    /// Disks or images (default: this machine's disks)
    disks: Vec<PathBuf>,
    /// Format of the images (default: probed; a device is raw)
    #[arg(short, value_name = "FORMAT")]
    format: Option<Format>,
    /// A backing file that a qcow2 image may read
    #[arg(long, value_name = "FILE")]
    backing: Vec<PathBuf>,
    /// List what haul would mend in the copy
    #[arg(long)]
    fixable: bool,
    /// Send some bytes to this bucket, which are dropped again: whether the keys may, and how fast
    #[cfg(feature = "net")]
    #[arg(long, value_name = "BUCKET")]
    bucket: Option<String>,
    /// Leave a check out
    #[arg(long, value_name = "ID")]
    skip_check: Vec<String>,
    #[command(flatten)]
    cloud: config::Cloud,
    #[command(flatten)]
    state: config::State,
}

/// Columns of the report.
const WIDTH: usize = 80;

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output) -> Result<()> {
    let of_host = arguments.disks.is_empty();
    let paths = if of_host { disks::whole()? } else { arguments.disks.clone() };
    if paths.is_empty() {
        return Err(Error::new(Kind::Usage, "check.nothing", "this machine has no disk to check")
            .remedy("name a disk or an image"));
    }
    let gate = arguments.backing.iter().fold(Gate::closed(), Gate::backing);
    let targets: Vec<Target> = paths.iter().map(|path| Target::open(path, arguments.format, &gate)).collect();
    #[cfg(feature = "net")]
    let bucket = match &arguments.bucket {
        Some(bucket) => Some(preflight::Bucket(Services::new(&arguments.cloud)?.bucket(bucket)?)),
        None => None,
    };
    let options = preflight::Options {
        #[cfg(feature = "net")]
        bucket,
        skip: arguments.skip_check.clone(),
        ignore: false,
        data_disks: of_host,
        cloud: Some(arguments.cloud.clone()),
        state: Some(arguments.state.folder()?),
        fixes: plan::Options::default(),
        #[cfg(feature = "net")]
        cvm: if arguments.cloud.is_named() { api(&arguments.cloud)? } else { None },
    };
    let report = preflight::run(&targets, &options)?;
    output.result(&report, &text(&report, arguments.fixable));
    if report.blocks() {
        output.fail(Kind::Preflight);
    }
    Ok(())
}

/// The cloud's API where keys and a region are known: without them that one question is not asked.
#[cfg(feature = "net")]
fn api(cloud: &config::Cloud) -> Result<Option<Cvm>> {
    match Services::new(cloud).and_then(|services| services.cvm(&std::sync::Arc::default())) {
        Err(error) if ["credentials.none", "config.region"].contains(&error.id()) => Ok(None),
        found => found.map(Some),
    }
}

fn text(report: &Report, fixable: bool) -> String {
    let mut text = String::new();
    let mut last = None;
    for finding in &report.findings {
        if last != Some(&finding.disk) {
            let _ = match &finding.disk {
                Some(disk) => writeln!(text, "{}", disk.display()),
                None => writeln!(text, "this machine"),
            };
            last = Some(&finding.disk);
        }
        row(finding, &mut text);
    }
    if fixable {
        let _ = writeln!(text, "haul would mend in the copy:");
        for fix in &report.fixes {
            paragraph(&fix.what, "  * ", "    ", &mut text);
        }
    }
    let count = |severity| report.findings.iter().filter(|finding| finding.severity == severity).count();
    let _ = writeln!(
        text,
        "{} passed, {} to be mended in the copy, {} warnings, {} failed",
        count(Severity::Pass),
        count(Severity::Fixable),
        count(Severity::Warn),
        count(Severity::Fail)
    );
    text
}

fn row(finding: &Finding, text: &mut String) {
    let mark = match finding.severity {
        Severity::Pass => "ok",
        Severity::Fixable => "fix",
        Severity::Warn => "warn",
        Severity::Fail => "FAIL",
    };
    let indent = " ".repeat(26);
    paragraph(&finding.evidence, &format!("  {mark:<4}  {:<17} ", finding.id), &indent, text);
    if let (Some(remedy), true) = (&finding.remedy, finding.severity != Severity::Pass) {
        paragraph(remedy, &format!("{:24}> ", ""), &indent, text);
    }
}

/// Adds `what` in lines of at most [`WIDTH`] columns, the first behind `first`, the others behind `rest`. A word that
/// is longer stays whole: it is a path or a URL to copy.
fn paragraph(what: &str, first: &str, rest: &str, text: &mut String) {
    let mut line = first.to_owned();
    let mut empty = true;
    for word in what.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(text, "{line}");
            rest.clone_into(&mut line);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    let _ = writeln!(text, "{}", line.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_fits_80_columns_and_tells_what_to_do() {
        let words = "virtio_pci ".repeat(30);
        let finding = |severity, remedy: Option<&str>| Finding {
            id: "guest.cloud-init",
            title: "",
            severity,
            disk: Some("/dev/sda".into()),
            evidence: words.clone(),
            remedy: remedy.map(Into::into),
        };
        let findings = vec![finding(Severity::Fail, Some("mend it")), finding(Severity::Pass, None)];
        let text = text(&Report { findings, fixes: Vec::new() }, false);
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
        assert_eq!(text.matches("virtio_pci").count(), 60);
        assert_eq!((text.matches("> mend it").count(), text.matches("FAIL").count()), (1, 1));
        assert!(text.ends_with("1 passed, 0 to be mended in the copy, 0 warnings, 1 failed\n"), "{text}");
    }
}
