//! Services of the hypervisor or cloud the guest comes from: elsewhere they fail, or set up what is not theirs.

use super::has_systemd;
use crate::error::Result;
use crate::guest::plan::{Draft, Severity};
use crate::guest::tree::Tree;

/// Whose they are, and the names of their services. Agents that also serve machines elsewhere (Amazon's SSM) are left
/// alone, and so is QEMU's.
const AGENTS: &[(&str, &[&str])] = &[
    ("VMware", &["open-vm-tools", "vgauth", "vgauthd", "vmtoolsd", "vmware-tools", "vmware-tools-thinprint"]),
    ("VirtualBox", &["vboxadd", "vboxadd-service", "vboxadd-x11", "vboxservice", "virtualbox-guest-utils"]),
    ("XenServer", &["xe-daemon", "xe-linux-distribution"]),
    (
        "Hyper-V",
        &["hv-fcopy-daemon", "hv-kvp-daemon", "hv-vss-daemon", "hypervfcopyd", "hypervkvpd", "hypervvssd"],
    ),
    ("Parallels", &["prltoolsd"]),
    ("Nutanix", &["ngt_guest_agent"]),
    ("Azure", &["waagent", "walinuxagent"]),
    (
        "Google Cloud",
        &[
            "google-accounts-daemon",
            "google-clock-skew-daemon",
            "google-guest-agent",
            "google-guest-agent-manager",
            "google-instance-setup",
            "google-network-daemon",
            "google-shutdown-scripts",
            "google-startup-scripts",
        ],
    ),
];

/// Where units lie, the first one found counts.
const UNITS: [&str; 3] = ["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];

/// Keeps them from starting, by a file whose removal brings them back.
pub fn fix(draft: &mut Draft<'_>) -> Result<()> {
    let tree = draft.tree();
    let has_systemd = has_systemd(tree)?;
    for (owner, names) in AGENTS {
        for name in *names {
            let is_script = tree.exists(&format!("/etc/init.d/{name}"))?;
            if !has_systemd {
                if is_script {
                    let what = format!("{name}, a service of {owner}, would start in the cloud, too");
                    let remedy = format!(
                        "switch it off in the copy: chkconfig {name} off, or update-rc.d {name} disable"
                    );
                    draft.find("agents.script", Severity::Info, &what, &remedy);
                }
                continue;
            }
            // systemd makes a unit of a script without one.
            if !starts_anywhere(tree, name)?.unwrap_or(is_script) {
                continue;
            }
            let text = format!(
                "# {name} belongs to {owner}, where this system came from: it does not start.\n\
                 # Remove this file to have it back.\n\
                 [Unit]\nConditionPathExists=!/\n"
            );
            let path = format!("/etc/systemd/system/{name}.service.d/50-haul.conf");
            draft.write(
                &path,
                &text,
                0o644,
                &format!("{name} is a service of {owner}, which this machine leaves"),
            )?;
        }
    }
    Ok(())
}

/// Whether the service's unit lets it start whatever the machine is; `None` when it has no unit.
fn starts_anywhere(tree: &Tree, name: &str) -> Result<Option<bool>> {
    for folder in UNITS {
        let path = format!("{folder}/{name}.service");
        if let Some(unit) = tree.text(&path)? {
            return Ok(Some(!unit.contains("ConditionVirtualization=")));
        }
        // To /dev/null, which is nothing in the tree: it is masked.
        if tree.link(&path)?.is_some() {
            return Ok(Some(false));
        }
    }
    Ok(None)
}
