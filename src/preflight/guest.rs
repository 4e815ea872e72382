//! The system on the disk: does haul find it, will it reach its disk on virtio, can the cloud set it up.

use super::{Check, Run, Severity, Subject, Verdict};
use crate::guest::Fix;
use crate::guest::kernels::{Kernel, Place};
use crate::guest::mentions;
use crate::guest::plan;

pub const CHECKS: &[Check] = &[
    Check { id: "guest.root", title: "a Linux system is on it", run: Run::Disk(root) },
    Check { id: "guest.virtio", title: "its kernels reach a virtio disk", run: Run::Disk(virtio) },
    Check { id: "guest.cloud-init", title: "the cloud can set it up", run: Run::Disk(cloud_init) },
    Check { id: "guest.fix", title: "haul can mend the rest", run: Run::Disk(fix) },
    Check { id: "guest.network", title: "it comes up with the cloud's address", run: Run::Disk(network) },
    Check { id: "guest.names", title: "its configuration names nothing that changes", run: Run::Disk(names) },
];

/// Findings of the plan that other checks give in more detail.
const TOLD_ELSEWHERE: [&str; 3] = ["kernel.", "cloud-init.", "initramfs.no-tool"];

fn root(subject: &Subject<'_>) -> Option<Verdict> {
    let guest = match &subject.guest {
        Ok(guest) => guest,
        Err(error) => {
            let volumes = subject.map.as_ref().map(|map| map.volumes()).unwrap_or_default();
            let seen: Vec<String> = volumes
                .iter()
                .map(|volume| match (&volume.logical, volume.partition) {
                    (Some(name), _) => format!("{name} is {}", volume.content.name()),
                    (None, Some(number)) => format!("partition {number} is {}", volume.content.name()),
                    (None, None) => format!("it is {}", volume.content.name()),
                })
                .collect();
            let mut verdict = Verdict::of_error(subject.of_system(), error);
            if !seen.is_empty() {
                verdict.evidence = format!("{} ({})", verdict.evidence, seen.join(", "));
            }
            return Some(verdict);
        }
    };
    let name = if guest.os.name.is_empty() { "an unnamed system" } else { &guest.os.name };
    let on = guest.filesystems.iter().find(|fs| fs.point.as_deref() == Some("/"));
    let on = on.map(|fs| match (&fs.logical, fs.partition) {
        (Some(logical), _) => format!(", root on {}/{} ({})", logical.group, logical.name, fs.kind),
        (None, Some(number)) => format!(", root on partition {number} ({})", fs.kind),
        (None, None) => format!(", root on the whole disk ({})", fs.kind),
    });
    let evidence = format!("{name} for {}{}", guest.arch, on.unwrap_or_default());
    Some(match guest.arch {
        "x86_64" | "i386" | "aarch64" => Verdict::pass(evidence),
        "unknown" => {
            Verdict::warn(evidence, "no program tells its architecture: see that its files are whole")
        }
        _ => {
            Verdict::warn(evidence, "haul was proven with systems for x86 and 64-bit ARM only: test the copy")
        }
    })
}

/// What a kernel lacks, in words; `None` when it has all it needs.
fn lack(kernel: &Kernel) -> Option<String> {
    let lacking = kernel.lacking();
    let place = |name: &str| kernel.virtio.iter().find(|(known, _)| *known == name).map(|(_, place)| *place);
    let (missing, late): (Vec<&str>, Vec<&str>) =
        lacking.into_iter().partition(|name| place(name) == Some(Place::Missing));
    let mut parts = Vec::new();
    if !missing.is_empty() {
        parts.push(format!("has no {}", missing.join(", ")));
    }
    if !late.is_empty() {
        parts.push(format!("its initramfs lacks {}", late.join(", ")));
    }
    (!parts.is_empty()).then(|| format!("kernel {}: {}", kernel.version, parts.join(", ")))
}

fn virtio(subject: &Subject<'_>) -> Option<Verdict> {
    let guest = subject.guest.as_ref().ok()?;
    let mended = |version: &str| {
        let mut fixes = subject.plan().into_iter().flat_map(|plan| &plan.fixes);
        fixes.any(|fix| {
            matches!(fix, Fix::Initramfs { kernel, .. } | Fix::Append { kernel, .. } if kernel == version)
        })
    };
    if guest.kernels.is_empty() {
        return Some(Verdict::fail(
            "no kernel is in /boot or in the boot loader's menu",
            "install a kernel of the distribution in the source",
        ));
    }
    let lacks: Vec<(&Kernel, String)> =
        guest.kernels.iter().filter_map(|kernel| Some((kernel, lack(kernel)?))).collect();
    let evidence: Vec<&str> = lacks.iter().map(|(_, lack)| lack.as_str()).collect();
    let evidence = evidence.join("; ");
    let hopeless = lacks.iter().filter(|(kernel, _)| !mended(&kernel.version)).count();
    Some(if lacks.is_empty() {
        let versions: Vec<&str> = guest.kernels.iter().map(|kernel| kernel.version.as_str()).collect();
        Verdict::pass(format!("virtio is built in or in the initramfs of {}", versions.join(", ")))
    } else if hopeless == 0 {
        Verdict::new(Severity::Fixable, evidence, "haul puts them into the initramfs of the copy")
    } else if hopeless < guest.kernels.len() {
        Verdict::warn(evidence, "see that the cloud boots one of the other kernels")
    } else {
        Verdict::fail(
            evidence,
            "put the modules into the initramfs in the source (initramfs-tools, dracut), or install a kernel of \
             the distribution",
        )
    })
}

fn cloud_init(subject: &Subject<'_>) -> Option<Verdict> {
    let guest = subject.guest.as_ref().ok()?;
    Some(match &guest.cloud_init {
        None if subject.plan().is_some_and(|plan| plan.installs("cloud-init")) => Verdict::new(
            Severity::Fixable,
            "cloud-init is not installed",
            "haul installs it in the copy, from the package given",
        ),
        None => Verdict::warn(
            "cloud-init is not installed: the cloud cannot set a password, keys or addresses",
            "migrate with --package and the package of cloud-init, or with --force-import, which sets a password without it",
        ),
        Some(installed) if installed.disabled => Verdict::warn(
            format!("cloud-init {} is switched off by /etc/cloud/cloud-init.disabled", installed.version),
            "remove that file in the source if the cloud should set the machine up",
        ),
        Some(installed) => {
            let list = installed.datasources.as_deref().unwrap_or("not set");
            Verdict::pass(format!("cloud-init {}, data sources {list}", installed.version))
        }
    })
}

fn fix(subject: &Subject<'_>) -> Option<Verdict> {
    let plan = match subject.plan.as_ref()? {
        Ok(plan) => plan,
        Err(error) => return Some(Verdict::of_error(Severity::Fail, error)),
    };
    // initramfs.no-tool makes guest.virtio fail.
    let mut left: Vec<&plan::Finding> = plan
        .findings
        .iter()
        .filter(|finding| finding.severity > plan::Severity::Info)
        .filter(|finding| !TOLD_ELSEWHERE.iter().any(|id| finding.id.starts_with(id)))
        .collect();
    left.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    if let Some(worst) = left.first() {
        let severity = if worst.severity == plan::Severity::Fatal { Severity::Fail } else { Severity::Warn };
        let mut whats: Vec<String> = left.iter().map(|finding| finding.what.clone()).collect();
        if !plan.fixes.is_empty() {
            whats.push(format!("haul makes {} changes in the copy", plan.fixes.len()));
        }
        let remedies: Vec<&str> = left.iter().map(|finding| finding.remedy.as_str()).collect();
        return Some(Verdict::new(severity, whats.join("; "), remedies.join("; ")));
    }
    Some(match plan.fixes.len() {
        0 => Verdict::pass("nothing needs mending"),
        n => Verdict::new(
            Severity::Fixable,
            format!("{n} changes in the copy"),
            "haul makes them; `haul plan` shows the diff",
        ),
    })
}

fn network(subject: &Subject<'_>) -> Option<Verdict> {
    let guest = subject.guest.as_ref().ok()?;
    let managers = match guest.network.is_empty() {
        true => "nothing haul knows".to_owned(),
        false => guest.network.join(" and "),
    };
    let addresses = match mentions::own_addresses(&guest.tree) {
        Ok(addresses) => addresses,
        Err(error) => return Some(Verdict::of_error(Severity::Warn, &error)),
    };
    if addresses.is_empty() {
        return Some(Verdict::pass(format!("set up by {managers}, with no address of its own")));
    }
    let mut list: Vec<String> = addresses.iter().take(LISTED).map(ToString::to_string).collect();
    if addresses.len() > LISTED {
        list.push(format!("{} more", addresses.len() - LISTED));
    }
    let evidence = format!("set up by {managers}, with {}", list.join(", "));
    Some(match subject.options.fixes.keep_network {
        true => Verdict::warn(
            evidence,
            "they are kept: give the instance the same address, and eth0 the gateway's subnet",
        ),
        false => Verdict::new(
            Severity::Fixable,
            evidence,
            "in the copy eth0 gets its address by DHCP; --keep-network keeps what there is",
        ),
    })
}

/// Files and addresses that are listed; the others are counted.
const LISTED: usize = 8;

fn names(subject: &Subject<'_>) -> Option<Verdict> {
    let guest = subject.guest.as_ref().ok()?;
    let addresses = !subject.options.fixes.keep_network;
    let found = match mentions::find(guest, addresses) {
        Ok(found) => found,
        Err(error) => return Some(Verdict::of_error(Severity::Warn, &error)),
    };
    if found.is_empty() {
        return Some(Verdict::pass(
            "no file below /etc that haul leaves alone names a disk or an own address",
        ));
    }
    let mut shown: Vec<String> =
        found.iter().take(LISTED).map(|mention| format!("{} names {}", mention.path, mention.what)).collect();
    if found.len() > LISTED {
        shown.push(format!("and {} more files", found.len() - LISTED));
    }
    Some(Verdict::warn(
        shown.join("; "),
        "change them in the source or after the move: disks by UUID, addresses by name",
    ))
}

/// A fix in one line.
pub fn summary(fix: &Fix) -> String {
    match fix {
        Fix::Edit { path, reason, .. } => format!("edit {path}: {reason}"),
        Fix::Create { path, reason, .. } => format!("create {path}: {reason}"),
        Fix::Remove { path, reason, .. } => format!("remove {path}: {reason}"),
        Fix::Copy { from, path, reason } => format!("copy {from} to {path}: {reason}"),
        Fix::Partition { purpose, reason, .. } => format!("add the {}: {reason}", purpose.name()),
        Fix::Grub { core, reason, .. } => format!("build {core}: {reason}"),
        Fix::BootSector { reason, .. } => format!("write the boot sector: {reason}"),
        Fix::Install { packages, reason, .. } => format!("install {} packages: {reason}", packages.len()),
        Fix::Initramfs { image, reason, .. } => format!("rebuild {image}: {reason}"),
        Fix::Append { image, reason, .. } => format!("append drivers to {image}: {reason}"),
    }
}
