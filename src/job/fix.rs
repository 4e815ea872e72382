//! Fix-ups of a stable source: planned from its tree, made in an overlay, proven, and laid over it for the copy.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::source::Source;
use crate::error::{Error, Kind, Result};
use crate::guest::{self, Executor, Guest, Plan, Proof, Severity};
use crate::image::overlay::Overlay;
use crate::io::ReadAt;
use crate::monitor::{Level, Monitor};

/// What was mended, and that it holds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Fixed {
    /// The changes.
    pub plan: Plan,
    /// What a fresh look at the copy found.
    pub proofs: Vec<Proof>,
}

/// Plans the fix-ups of `guest`; a finding that no fix-up mends and that keeps it from booting is an error.
pub fn plan(guest: &Guest, options: &guest::Options, monitor: &dyn Monitor) -> Result<Plan> {
    let plan = guest::plan(guest, options)?;
    for finding in &plan.findings {
        match finding.severity {
            Severity::Fatal => {
                return Err(Error::new(Kind::Preflight, "fix.fatal", "the copy would not boot")
                    .because(finding.what.clone())
                    .remedy(finding.remedy.clone())
                    .fact("finding", &finding.id));
            }
            Severity::Warning => monitor.note(Level::Warning, &finding.what),
            Severity::Info => monitor.note(Level::Info, &finding.what),
        }
    }
    Ok(plan)
}

/// Makes `plan` by `executor` in an overlay kept in `folder`, or takes up the one an earlier run sealed there; proves it, and lays
/// it over `source`.
pub fn fix(
    source: Source,
    plan: Plan,
    executor: Executor,
    folder: &Path,
    monitor: &dyn Monitor,
) -> Result<(Source, Fixed)> {
    let (overlay, proofs) = overlay(source.disk().clone(), &plan, executor, folder, monitor)?;
    let extents = overlay.dirty();
    Ok((source.amend(overlay, extents), Fixed { plan, proofs }))
}

/// Makes `plan` by `executor` in an overlay over `disk` kept in `folder`, or takes up the one an earlier run sealed there, and
/// proves it.
pub fn overlay(
    disk: Arc<dyn ReadAt>,
    plan: &Plan,
    executor: Executor,
    folder: &Path,
    monitor: &dyn Monitor,
) -> Result<(Arc<Overlay>, Vec<Proof>)> {
    let path = folder.join("overlay");
    let overlay = match Overlay::reopen(disk.clone(), &path)? {
        Some(sealed) => Arc::new(sealed),
        None => {
            let overlay = Arc::new(Overlay::create(disk, &path)?);
            let work = folder.join("fix");
            std::fs::create_dir_all(&work).map_err(|error| {
                Error::new(Kind::Destination, "fix.folder", format!("cannot make {}", work.display()))
                    .caused_by(error)
            })?;
            guest::apply(plan, &overlay, &guest::Setup { executor, ..guest::Setup::new(&work) }, monitor)?;
            overlay
        }
    };
    let proofs = guest::prove(plan, overlay.clone())?;
    if let Some(broken) = proofs.iter().find(|proof| !proof.holds) {
        return Err(Error::new(Kind::Boot, "fix.unproven", "the fixed copy would not boot")
            .because(format!("it does not hold that {}", broken.claim))
            .remedy("run `haul plan` on the source, and report this with its output"));
    }
    Ok((overlay, proofs))
}
