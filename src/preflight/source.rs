//! The disk itself: can it be read, does somebody write to it, will the cloud take its size.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::{Check, Run, Severity, Subject, Verdict};
use crate::error::{Error, Result};
use crate::host::mounts::{self, Use};
use crate::host::writers::{Writer, writers};
use crate::io::{ReadAt, read_vec};
use crate::unit::bytes::human;
use crate::unit::{GIB, KIB, MIB, to_usize};

/// Read at the start, in the middle and at the end.
const SAMPLE: u64 = MIB;
/// Read at the head of each partition.
const HEAD: u64 = 64 * KIB;
/// The importer's limit of 500 GB, for the virtual disk and for what is used of it. It says neither which GB nor is
/// it consistent: beyond the smaller reading is a warning, beyond the larger one a failure.
const LIMITS: [u64; 2] = [500_000_000_000, 500 * GIB];

/// Also what a target that cannot be opened fails.
pub const READABLE: Check =
    Check { id: "source.readable", title: "the disk can be read", run: Run::Disk(readable) };

pub const CHECKS: &[Check] = &[
    READABLE,
    Check { id: "source.in-use", title: "nobody writes to the disk", run: Run::Disk(in_use) },
    Check { id: "source.freeze", title: "what waits while the disk is frozen", run: Run::Disk(freeze) },
    Check { id: "source.size", title: "the cloud takes a disk of this size", run: Run::Disk(size) },
];

fn readable(subject: &Subject<'_>) -> Option<Verdict> {
    let disk = subject.disk;
    let size = disk.size();
    let table = subject.map.as_ref().ok().and_then(|map| map.table());
    let heads = table.into_iter().flat_map(|table| &table.partitions).map(|part| (part.extent.start, HEAD));
    let samples = [0, size / 2, size.saturating_sub(SAMPLE)].map(|at| (at, SAMPLE));
    let mut count = 0;
    for (at, len) in samples.into_iter().chain(heads) {
        if let Err(error) = sample(disk, at, len) {
            return Some(unreadable(&error));
        }
        count += 1;
    }
    // The tables and file systems were read for the other checks; an unreadable sector may be there, too.
    if let Err(error) = &subject.map {
        return Some(unreadable(error));
    }
    Some(Verdict::pass(format!("{count} samples of {} were read", human(size))))
}

fn sample(disk: &dyn ReadAt, at: u64, len: u64) -> Result<()> {
    read_vec(disk, at, to_usize(len.min(disk.size().saturating_sub(at)))).map(drop)
}

fn unreadable(error: &Error) -> Verdict {
    Verdict::fail(
        format!("{}: {}", error.what(), error.why()),
        "look at the disk (dmesg, smartctl); --on-read-error zero copies zeroes in place of bad sectors",
    )
}

fn in_use(subject: &Subject<'_>) -> Option<Verdict> {
    let uses = match subject.uses.as_ref()? {
        Ok(uses) => uses,
        Err(error) => return Some(Verdict::of_error(Severity::Fail, error)),
    };
    if uses.is_empty() {
        return Some(Verdict::pass("it is not mounted for writing, no swap, and under no other device"));
    }
    let uses: Vec<String> = uses.iter().map(ToString::to_string).collect();
    Some(Verdict::fail(
        uses.join("; "),
        "unmount it, mount it read-only, or use a snapshot or an image of it",
    ))
}

/// Programs named of those that wait.
const NAMED: usize = 5;
/// File systems on disks that the kernel freezes: those that have `freeze_fs` or `freeze_super` (`ioctl_fsfreeze` of Linux).
const FROZEN: [&str; 11] =
    ["bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "gfs2", "jfs", "nilfs2", "reiserfs", "xfs"];

fn freeze(subject: &Subject<'_>) -> Option<Verdict> {
    // That this cannot be found out is told by the check for use.
    let uses = subject.uses.as_ref()?.as_ref().ok()?;
    let points = uses.iter().filter_map(|used| match used {
        Use::Mount { point, .. } => Some(point.clone()),
        _ => None,
    });
    let points: BTreeSet<PathBuf> = points.collect();
    if points.is_empty() {
        return Some(Verdict::pass("nothing on it is mounted for writing"));
    }
    let all = mounts::mounts().unwrap_or_default();
    let never = all.iter().filter(|mount| points.contains(&mount.point));
    let never: Vec<String> = never
        .filter(|mount| mount.source.starts_with('/') && !FROZEN.contains(&mount.kind.as_str()))
        .map(|mount| format!("{} ({})", mount.point.display(), mount.kind))
        .collect();
    Some(judge_freeze(&points, &writers(&points), &never))
}

fn judge_freeze(points: &BTreeSet<PathBuf>, writers: &[Writer], never: &[String]) -> Verdict {
    let points: Vec<String> = points.iter().map(|point| point.display().to_string()).collect();
    let named = writers.iter().take(NAMED);
    let mut programs: Vec<String> = named
        .map(|writer| format!("{} (process {}, files: {})", writer.name, writer.pid, writer.files))
        .collect();
    let more = writers.len() - programs.len();
    if more > 0 {
        programs.push(format!("{more} more"));
    }
    if programs.is_empty() {
        programs.push("no program with a file open for writing".to_owned());
    }
    let seen = if nix::unistd::geteuid().is_root() { "" } else { "; only root sees the programs of others" };
    let evidence = format!("a freeze of {} holds up {}{seen}", points.join(", "), programs.join(", "));
    if never.is_empty() {
        return Verdict::pass(evidence);
    }
    Verdict::warn(
        format!("{evidence}; the kernel cannot freeze {}", never.join(", ")),
        "mount that read-only, or unmount it, for the time of the copy",
    )
}

fn size(subject: &Subject<'_>) -> Option<Verdict> {
    Some(judge_size(subject.disk.size(), subject.used))
}

fn judge_size(size: u64, used: u64) -> Verdict {
    let evidence = format!("{}, {} of it in use", human(size), human(used));
    let larger = format!("{evidence}; the import takes at most 500 GB");
    match LIMITS.iter().filter(|limit| size > **limit).count() {
        0 => Verdict::pass(evidence),
        1 => Verdict::warn(larger, "it is between 500 GB and 500 GiB: the cloud may refuse it"),
        _ => Verdict::fail(larger, "move data to another disk and shrink this one"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_freeze_holds_up_is_named_and_what_cannot_be_frozen_is_a_warning() {
        let writer = |pid: u32| Writer { pid, name: format!("p{pid}"), files: 3 };
        let writers: Vec<Writer> = (1..8).map(writer).collect();
        let points = ["/", "/boot/efi"].map(PathBuf::from).into();
        let found = judge_freeze(&points, &writers, &[]);
        assert_eq!(found.severity, Severity::Pass);
        for part in ["a freeze of /, /boot/efi holds up p1 (process 1, files: 3), p2", "p5", "2 more"] {
            assert!(found.evidence.contains(part), "{}", found.evidence);
        }
        let found = judge_freeze(&points, &[], &["/boot/efi (vfat)".to_owned()]);
        assert_eq!(found.severity, Severity::Warn);
        assert!(found.evidence.contains("no program") && found.evidence.ends_with("/boot/efi (vfat)"));
    }

    #[test]
    fn the_limit_is_500_gb_and_what_lies_between_its_readings_is_a_warning() {
        let severity = |size| judge_size(size, size / 2).severity;
        assert_eq!(severity(500_000_000_000), Severity::Pass);
        assert_eq!(severity(500_000_000_001), Severity::Warn);
        assert_eq!(severity(500 * GIB), Severity::Warn);
        assert_eq!(severity(500 * GIB + 1), Severity::Fail);
    }
}
