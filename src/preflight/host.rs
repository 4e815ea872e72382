//! The machine haul runs on.

use super::{Check, Host, Run, Severity, Verdict};
use crate::unit::bytes::human;
use crate::unit::{GIB, MIB};

/// A journal, a manifest, and an overlay with the new initramfs of one kernel do not fit below.
const LEAST: u64 = 256 * MIB;
/// With several kernels they may not.
const WANTED: u64 = GIB;

pub const CHECKS: &[Check] =
    &[Check { id: "host.space", title: "there is room for haul's own files", run: Run::Host(space) }];

fn space(host: &Host<'_>) -> Option<Verdict> {
    let folder = host.options.state.as_deref()?;
    // It is made when it is needed: what counts is the file system it will be on.
    let there = std::path::absolute(folder).ok()?;
    let there = there.ancestors().find(|path| path.exists())?;
    let stat = match nix::sys::statvfs::statvfs(there) {
        Ok(stat) => stat,
        Err(error) => {
            let what = format!("cannot measure {}: {error}", there.display());
            return Some(Verdict::fail(what, "name another folder with --state-dir"));
        }
    };
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    Some(judge(free, &format!("{} free for {}", human(free), folder.display())))
}

fn judge(free: u64, evidence: &str) -> Verdict {
    let severity = match free {
        0..LEAST => Severity::Fail,
        LEAST..WANTED => Severity::Warn,
        _ => return Verdict::pass(evidence),
    };
    let remedy = format!("free {} there, or name another folder with --state-dir", human(WANTED));
    Verdict::new(severity, evidence, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_room_fails_and_little_room_warns() {
        let severity = |free| judge(free, "").severity;
        assert_eq!(severity(LEAST - 1), Severity::Fail);
        assert_eq!(severity(LEAST), Severity::Warn);
        assert_eq!(severity(WANTED), Severity::Pass);
    }
}
