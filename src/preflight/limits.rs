//! What haul cannot look into, and what in a system refuses a copy that was changed.

use super::{Check, Run, Subject, Verdict};
use crate::error::Result;
use crate::guest::Guest;
use crate::guest::inspect::selinux;
use crate::layout::Content;

pub const CHECKS: &[Check] = &[
    Check { id: "disk.opaque", title: "haul can look into all of it", run: Run::Disk(opaque) },
    Check { id: "guest.security", title: "its own guards let a changed copy run", run: Run::Disk(security) },
];

/// What is said of a volume that is known by name only.
fn limit(name: &str) -> Option<&'static str> {
    match name {
        "LUKS1" | "LUKS2" => {
            Some("somebody must enter its passphrase at the cloud's console, unless a file opens it")
        }
        "bcache" => Some("it works only beside the disk that caches it, which must come along"),
        "zfs" => Some("import its pool by name in the copy: zpool import -f POOL"),
        _ => None,
    }
}

fn opaque(subject: &Subject<'_>) -> Option<Verdict> {
    let volumes = subject.map.as_ref().ok()?.volumes();
    let (mut found, mut remedies) = (Vec::new(), Vec::new());
    for volume in volumes {
        let Content::Other(name) = volume.content else { continue };
        let Some(remedy) = limit(name) else { continue };
        let place = match (&volume.logical, volume.partition) {
            (Some(logical), _) => format!("{logical} is {name}"),
            (None, Some(number)) => format!("partition {number} is {name}"),
            (None, None) => format!("it is {name}"),
        };
        found.push(format!("{place}, which is copied whole and not looked into"));
        remedies.push(remedy);
    }
    remedies.dedup();
    Some(match found.is_empty() {
        true => Verdict::pass("nothing is encrypted or in a format that haul knows by name only"),
        false => Verdict::warn(found.join("; "), remedies.join("; ")),
    })
}

fn security(subject: &Subject<'_>) -> Option<Verdict> {
    let guest = subject.guest.as_ref().ok()?;
    match guards(guest) {
        Ok(Guards { state, refuses }) if refuses.is_empty() => Some(Verdict::pass(state)),
        Ok(Guards { state, refuses }) => {
            let changes = subject.plan().is_some_and(|plan| !plan.is_empty());
            let evidence = format!("{}; {state}", refuses.join("; "));
            let remedy =
                "switch it off in the source, or sign in the copy what haul changes; `haul plan` lists it";
            Some(if changes { Verdict::warn(evidence, remedy) } else { Verdict::pass(evidence) })
        }
        Err(error) => Some(Verdict::of_error(super::Severity::Warn, &error)),
    }
}

/// What guards a system.
struct Guards {
    /// In words, for a reader.
    state: String,
    /// What does not let files run or be read that haul changed.
    refuses: Vec<String>,
}

fn guards(guest: &Guest) -> Result<Guards> {
    let arguments = || guest.menus.iter().flat_map(|menu| &menu.entries).flat_map(|entry| &entry.arguments);
    let is_given = |wanted: &str| arguments().any(|argument| argument == wanted);
    let text = |path: &str| guest.tree.text(path).map(Option::unwrap_or_default);

    let selinux = match selinux(&guest.tree)?.as_deref() {
        _ if is_given("selinux=0") => "SELinux is off",
        Some("enforcing") if is_given("enforcing=0") => "SELinux is permissive",
        Some("enforcing") => "SELinux is enforcing, and what haul makes gets labels",
        Some("permissive") => "SELinux is permissive",
        _ => "no SELinux",
    };
    let fips = is_given("fips=1") || text("/etc/crypto-policies/state/current")?.trim().starts_with("FIPS");
    let fips = if fips { "FIPS mode, whose checksum of the kernel still holds" } else { "no FIPS mode" };

    let mut refuses = Vec::new();
    let appraises = |argument: &&String| {
        let (key, value) = argument.split_once('=').unwrap_or((argument, ""));
        match key {
            "ima_appraise" => value != "off" && value != "log",
            "ima_policy" => value.split('|').any(|policy| matches!(policy, "appraise_tcb" | "secure_boot")),
            _ => false,
        }
    };
    if let Some(argument) = arguments().find(appraises) {
        refuses.push(format!("IMA appraises files ({argument}): those that haul changes have no signature"));
    }
    let policy = text("/etc/ima/ima-policy")?;
    if policy.lines().any(|line| line.trim_start().starts_with("appraise")) {
        refuses.push(
            "IMA appraises files (/etc/ima/ima-policy): those that haul changes have no signature".into(),
        );
    }
    let verifies = |argument: &&String| {
        let key = argument.split('=').next().unwrap_or_default();
        key.starts_with("systemd.verity") && !argument.ends_with("=no")
            || matches!(key, "roothash" | "usrhash")
            || matches!(key, "dm-mod.create" | "dm") && argument.contains("verity")
    };
    if let Some(argument) = arguments().find(verifies) {
        refuses.push(format!("dm-verity holds the root against a hash ({argument}): every change breaks it"));
    }
    Ok(Guards { state: format!("{selinux}; {fips}"), refuses })
}
