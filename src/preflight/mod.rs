//! What can be known to go wrong before a byte is copied: a table of checks over disks, this host and the cloud.
//!
//! A check changes nothing and never fails itself: what it cannot find out is a finding, too.

#[cfg(feature = "net")]
mod cloud;
mod disk;
mod guest;
mod host;
mod limits;
mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::config::{Cloud, Edition, Location};
use crate::error::{Error, Kind, Result};
use crate::guest::{Guest, Plan, inspect, plan};
use crate::host::mounts::{self, Use};
use crate::image::{self, Format, Gate};
use crate::io::ReadAt;
use crate::layout::{UsedMap, used_map};

/// One check.
pub struct Check {
    /// Its stable id, such as `source.in-use`: what `--skip-check` takes.
    pub id: &'static str,
    /// What it looks at, for a reader.
    pub title: &'static str,
    run: Run,
}

/// A check looks at one disk or at the machine; `None` when there is nothing to say.
enum Run {
    Disk(fn(&Subject<'_>) -> Option<Verdict>),
    Host(fn(&Host<'_>) -> Option<Verdict>),
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Pass,
    /// Not as it should be, and haul mends it in the copy.
    Fixable,
    /// The job may go on; something may be missed.
    Warn,
    /// The job would fail, or what it makes would not boot.
    Fail,
}

/// What a check found.
struct Verdict {
    severity: Severity,
    evidence: String,
    remedy: Option<String>,
}

impl Verdict {
    fn pass(evidence: impl Into<String>) -> Self {
        Verdict { severity: Severity::Pass, evidence: evidence.into(), remedy: None }
    }

    fn new(severity: Severity, evidence: impl Into<String>, remedy: impl Into<String>) -> Self {
        Verdict { severity, evidence: evidence.into(), remedy: Some(remedy.into()) }
    }

    fn fail(evidence: impl Into<String>, remedy: impl Into<String>) -> Self {
        Verdict::new(Severity::Fail, evidence, remedy)
    }

    fn warn(evidence: impl Into<String>, remedy: impl Into<String>) -> Self {
        Verdict::new(Severity::Warn, evidence, remedy)
    }

    fn of_error(severity: Severity, error: &Error) -> Self {
        Verdict::new(severity, format!("{}: {}", error.what(), error.why()), error.what_to_do())
    }
}

/// What one check found about one disk, or about this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The check's id.
    pub id: &'static str,
    /// The check's title.
    pub title: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// The disk or image; none for this machine and the cloud.
    pub disk: Option<PathBuf>,
    /// What was seen.
    pub evidence: String,
    /// What to do about it, unless it passed.
    pub remedy: Option<String>,
}

/// A change that haul would make in the copy.
#[derive(Clone, Debug, Serialize)]
pub struct Mended {
    /// The disk or image.
    pub disk: PathBuf,
    /// The change, and why.
    pub what: String,
}

/// Everything that was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// In the order of the disks and of the checks; this machine and the cloud last.
    pub findings: Vec<Finding>,
    /// What haul would mend.
    pub fixes: Vec<Mended>,
}

impl Report {
    /// Whether something stands in the way of a job.
    pub fn blocks(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Fail)
    }

    /// An error with every failed check when something stands in the way of a job.
    pub fn pass(&self) -> Result<()> {
        let failed: Vec<&Finding> =
            self.findings.iter().filter(|finding| finding.severity == Severity::Fail).collect();
        let Some(first) = failed.first() else { return Ok(()) };
        let what = match failed.len() {
            1 => format!("check {} failed", first.id),
            n => format!("{n} checks failed, the first is {}", first.id),
        };
        let remedy = first.remedy.clone().unwrap_or_default();
        let error = Error::new(Kind::Preflight, "preflight.blocked", what)
            .because(&*first.evidence)
            .remedy(format!("{remedy}; or go on without it: --skip-check {}", first.id));
        Err(failed.iter().fold(error, |error, finding| error.fact(finding.id, finding.evidence.as_str())))
    }
}

/// A disk or image to check.
pub struct Target {
    /// Where it lies.
    pub location: Location,
    /// The virtual disk in it, or why it cannot be opened.
    pub disk: Result<Arc<dyn ReadAt>>,
}

impl Target {
    /// Opens the disk or image file at `path`; that it cannot be opened becomes a finding.
    pub fn open(path: &Path, format: Option<Format>, gate: &Gate) -> Self {
        let disk = image::open(path, format, gate).map(|image| image.disk);
        Target { location: Location::File(path.to_owned()), disk }
    }
}

/// How to check.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Checks to leave out, by id.
    pub skip: Vec<String>,
    /// Take failures as warnings.
    pub ignore: bool,
    /// Targets without a system are data disks, which is no failure.
    pub data_disks: bool,
    /// The cloud the copy goes to; its endpoints are asked when a region or an endpoint is set.
    pub cloud: Option<Cloud>,
    /// Its API, asked for the systems it imports where keys for it are known.
    #[cfg(feature = "net")]
    pub cvm: Option<crate::cloud::tencent::Cvm>,
    /// The bucket the copy goes to, which something is sent to on trial.
    #[cfg(feature = "net")]
    pub bucket: Option<Bucket>,
    /// The folder haul will keep its state in.
    pub state: Option<PathBuf>,
    /// How the guest will be fixed.
    pub fixes: plan::Options,
}

/// A bucket of an object store.
#[cfg(feature = "net")]
#[derive(Clone)]
pub struct Bucket(pub Arc<dyn crate::store::ObjectStore>);

#[cfg(feature = "net")]
impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Bucket").field(&self.0.name("")).finish()
    }
}

impl Options {
    fn edition(&self) -> Edition {
        self.cloud.as_ref().map_or(Edition::Public, |cloud| cloud.edition)
    }
}

/// A disk with all that the checks need to know of it, found out once.
struct Subject<'a> {
    disk: &'a Arc<dyn ReadAt>,
    /// Who uses it, where it is a device or a file here.
    uses: Option<Result<Vec<Use>>>,
    map: Result<UsedMap>,
    /// Bytes in use, all where no map tells.
    used: u64,
    guest: Result<Guest>,
    plan: Option<Result<Plan>>,
    options: &'a Options,
}

impl<'a> Subject<'a> {
    fn new(location: &'a Location, disk: &'a Arc<dyn ReadAt>, options: &'a Options) -> Self {
        let guest = inspect(disk.clone());
        let plan = guest.as_ref().ok().map(|guest| plan::plan(guest, &options.fixes));
        let map = used_map(disk.clone());
        let used = map.as_ref().map_or_else(|_| disk.size(), UsedMap::used_bytes);
        let uses = location.path().map(mounts::in_use);
        Subject { disk, uses, map, used, guest, plan, options }
    }

    /// The severity of what only a system disk must have.
    fn of_system(&self) -> Severity {
        let is_data = self.options.data_disks && self.guest.is_err();
        if is_data { Severity::Warn } else { Severity::Fail }
    }

    fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()?.as_ref().ok()
    }
}

/// This machine and the cloud.
struct Host<'a> {
    options: &'a Options,
    /// Bytes in use on all disks.
    #[cfg(feature = "net")]
    used: u64,
    #[cfg(feature = "net")]
    cvm: std::cell::OnceCell<Option<Result<Option<crate::cloud::tencent::client::Skew>>>>,
}

/// Every check, in the order of a report.
pub fn checks() -> impl Iterator<Item = &'static Check> {
    let groups = [source::CHECKS, disk::CHECKS, guest::CHECKS, limits::CHECKS, host::CHECKS];
    let all = groups.into_iter().flatten();
    #[cfg(feature = "net")]
    let all = all.chain(cloud::CHECKS);
    all
}

/// Runs every check but those to skip. Fails only when one to skip is unknown.
pub fn run(targets: &[Target], options: &Options) -> Result<Report> {
    if let Some(unknown) = options.skip.iter().find(|id| checks().all(|check| check.id != **id)) {
        let ids: Vec<&str> = checks().map(|check| check.id).collect();
        return Err(Error::new(Kind::Usage, "preflight.unknown", format!("there is no check {unknown:?}"))
            .because(format!("the checks are {}", ids.join(", ")))
            .remedy("name one of them"));
    }
    let wanted = || checks().filter(|check| !options.skip.iter().any(|id| id == check.id));
    let mut report = Report::default();
    let mut add = |check: &Check, disk: Option<&Path>, verdict: Verdict| {
        let ignored = options.ignore && verdict.severity == Severity::Fail;
        report.findings.push(Finding {
            id: check.id,
            title: check.title,
            severity: if ignored { Severity::Warn } else { verdict.severity },
            disk: disk.map(Path::to_owned),
            evidence: verdict.evidence,
            remedy: verdict.remedy,
        });
    };
    #[cfg(feature = "net")]
    let mut used = 0;
    for target in targets {
        let name = PathBuf::from(target.location.clone());
        let path = name.as_path();
        let disk = match &target.disk {
            Ok(disk) => disk,
            Err(error) => {
                // Without it there is nothing to check: not even skipping helps.
                add(&source::READABLE, Some(path), Verdict::of_error(Severity::Fail, error));
                continue;
            }
        };
        let subject = Subject::new(&target.location, disk, options);
        #[cfg(feature = "net")]
        (used += subject.used);
        for check in wanted() {
            if let Run::Disk(look) = check.run
                && let Some(verdict) = look(&subject)
            {
                add(check, Some(path), verdict);
            }
        }
        let fixes = subject.plan().into_iter().flat_map(|plan| &plan.fixes);
        report.fixes.extend(fixes.map(|fix| Mended { disk: path.to_owned(), what: guest::summary(fix) }));
    }
    let host = Host {
        options,
        #[cfg(feature = "net")]
        used,
        #[cfg(feature = "net")]
        cvm: std::cell::OnceCell::new(),
    };
    for check in wanted() {
        if let Run::Host(look) = check.run
            && let Some(verdict) = look(&host)
        {
            add(check, None, verdict);
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_an_unknown_one_is_refused() {
        let ids: std::collections::BTreeSet<&str> = checks().map(|check| check.id).collect();
        assert_eq!(ids.len(), checks().count());
        let options = Options { skip: vec!["guest.virtoi".into()], ..Options::default() };
        let error = run(&[], &options).unwrap_err();
        assert_eq!((error.kind(), error.id()), (Kind::Usage, "preflight.unknown"));
        assert!(error.why().contains("guest.virtio"));
    }
}
