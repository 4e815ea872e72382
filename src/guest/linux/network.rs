//! The network: no card pinned by its old address or slot, DHCP on eth0.

use super::{cloud_init, ifcfg, ifupdown, ini};
use crate::error::Result;
use crate::guest::inspect::Guest;
use crate::guest::plan::{Draft, Line, Options};

/// The name of the cloud's first network card.
pub const NIC: &str = "eth0";
/// Why pins go.
const PIN: &str = "it pins a network card by the old machine's address: the cloud's card is another";
/// Why addresses go.
pub const DHCP: &str = "the cloud hands out addresses by DHCP, on eth0";

/// Fixes whatever configures the network.
pub fn fix(guest: &Guest, options: &Options, draft: &mut Draft<'_>) -> Result<()> {
    pins(draft)?;
    ifcfg::unpin(draft, PIN)?;
    if options.keep_network {
        return Ok(());
    }
    let before = draft.fixes().len();
    // Where cloud-init configures the network it overwrites these very files: what haul writes is what stays
    // when it finds nothing to go by, and there is never a second definition beside its own.
    let cloud = cloud_init::configures_network(guest, options, draft)?;
    if guest.network.contains(&"ifupdown") {
        ifupdown::fix(cloud, draft)?;
    }
    ifcfg::fix(draft)?;
    netplan(draft)?;
    ini::networkd(draft)?;
    ini::network_manager(draft)?;
    if guest.network.is_empty() && draft.fixes().len() == before {
        draft.warn(
            "network.unknown",
            "nothing haul knows configures the network (ifupdown, netplan, systemd-networkd, ifcfg, NetworkManager)",
            "see that eth0 gets an address by DHCP in the cloud",
        );
    }
    Ok(())
}

/// udev rules and .link files that give a card its name by its address.
fn pins(draft: &mut Draft<'_>) -> Result<()> {
    for path in draft.tree().files("/etc/udev/rules.d", ".rules")? {
        let Some(text) = draft.text(&path)? else { continue };
        let pinned = |line: &str| {
            let line: String = line.split_whitespace().collect();
            !line.starts_with('#')
                && line.contains("SUBSYSTEM==\"net\"")
                && line.contains("NAME=\"")
                && ["ATTR{address}==", "ATTRS{address}==", "KERNELS==", "ID_PATH"]
                    .iter()
                    .any(|key| line.contains(key))
        };
        if !text.lines().any(pinned) {
            continue;
        }
        let rest = text.lines().filter(|line| !pinned(line));
        if rest.map(str::trim).all(|line| line.is_empty() || line.starts_with('#')) {
            draft.remove(&path, PIN)?;
        } else {
            draft.edit_lines(&path, PIN, |line| if pinned(line) { Line::Drop } else { Line::Keep })?;
        }
    }
    for path in draft.tree().files("/etc/systemd/network", ".link")? {
        let text = draft.text(&path)?.unwrap_or_default();
        let pinned = |line: &str| {
            let key = line.split('=').next().unwrap_or_default().trim();
            matches!(key, "MACAddress" | "PermanentMACAddress" | "Path")
        };
        if text.lines().any(pinned) {
            draft.remove(&path, PIN)?;
        }
    }
    Ok(())
}

/// Netplan's files: those that define plain cards give way to one for eth0.
fn netplan(draft: &mut Draft<'_>) -> Result<()> {
    const OURS: &str = "/etc/netplan/50-cloud-init.yaml";
    let mut plain = Vec::new();
    let mut renderer = None;
    for path in draft.tree().files("/etc/netplan", ".yaml")? {
        let text = draft.text(&path)?.unwrap_or_default();
        let key = |line: &str| line.trim().split(':').next().unwrap_or_default().to_owned();
        let has = |name: &str| text.lines().any(|line| key(line) == name);
        if ["bonds", "bridges", "vlans", "wifis", "tunnels"].iter().any(|kind| has(kind)) {
            complex(draft, &path);
            return Ok(());
        }
        if let Some(line) = text.lines().find(|line| key(line) == "renderer") {
            renderer = line.split_once(':').map(|(_, value)| value.trim().to_owned());
        }
        if has("ethernets") {
            plain.push((path, text));
        }
    }
    let fits = |text: &str| {
        let line_is = |wanted: &[&str]| text.lines().any(|line| wanted.contains(&line.trim()));
        line_is(&["eth0:"])
            && line_is(&["dhcp4: true", "dhcp4: yes", "dhcp4: on"])
            && !["macaddress", "addresses:", "gateway4", "set-name"].iter().any(|word| text.contains(word))
    };
    if plain.is_empty() || plain.len() == 1 && fits(&plain[0].1) {
        return Ok(());
    }
    for (path, _) in plain.iter().filter(|(path, _)| path != OURS) {
        draft.remove(path, DHCP)?;
    }
    let renderer = match renderer.as_deref() {
        Some(renderer @ ("networkd" | "NetworkManager")) => format!("  renderer: {renderer}\n"),
        _ => String::new(),
    };
    let text = format!("network:\n  version: 2\n{renderer}  ethernets:\n    {NIC}:\n      dhcp4: true\n");
    draft.write(OURS, &text, 0o600, DHCP)
}

/// Bonds, bridges and VLANs are left to the user.
pub fn complex(draft: &mut Draft<'_>, path: &str) {
    draft.warn(
        "network.complex",
        &format!("{path} configures a bond, bridge, VLAN or tunnel, which haul leaves as it is"),
        "see that it works with one card, eth0, and an address by DHCP",
    );
}

/// Whether a card's name is one the kernel or udev gives to Ethernet.
pub fn is_card(name: &str) -> bool {
    ["eth", "en", "em"].iter().any(|prefix| name.starts_with(prefix))
        && name.chars().all(|c| c.is_ascii_alphanumeric())
}
