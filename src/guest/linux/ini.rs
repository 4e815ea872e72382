//! Network settings in sections: systemd-networkd (systemd.network(5)) and NetworkManager's key files.

use super::network::{DHCP, NIC, complex};
use crate::error::Result;
use crate::guest::plan::Draft;

/// The lines of an INI text with the section each is in.
fn sections(text: &str) -> Vec<(String, &str)> {
    let mut section = String::new();
    text.lines()
        .map(|line| {
            if let Some(name) = line.trim().strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                name.clone_into(&mut section);
            }
            (section.clone(), line)
        })
        .collect()
}

fn key(line: &str) -> &str {
    match line.trim_start().starts_with(['#', ';', '[']) {
        true => "",
        false => line.split('=').next().unwrap_or_default().trim(),
    }
}

fn value(line: &str) -> &str {
    line.split_once('=').map_or("", |(_, value)| value.trim())
}

/// Whether a `Name=` of [Match] takes in eth0.
fn matches_nic(names: &str) -> bool {
    names
        .split_whitespace()
        .any(|name| name == NIC || name.strip_suffix('*').is_some_and(|prefix| NIC.starts_with(prefix)))
}

/// systemd-networkd: the first .network file for a card becomes eth0 by DHCP.
pub fn networkd(draft: &mut Draft<'_>) -> Result<()> {
    for path in draft.tree().files("/etc/systemd/network", ".network")? {
        let text = draft.text(&path)?.unwrap_or_default();
        let lines = sections(&text);
        let has =
            |section: &str, wanted: &str| lines.iter().any(|(s, line)| s == section && key(line) == wanted);
        if ["Bridge", "Bond", "VLAN", "MACVLAN"].iter().any(|kind| has("Network", kind)) {
            complex(draft, &path);
            return Ok(());
        }
        let name =
            lines.iter().find(|(s, line)| s == "Match" && key(line) == "Name").map(|(_, line)| value(line));
        if name.is_some_and(|name| name == "lo" || !name.starts_with('e') && !name.starts_with('*')) {
            continue;
        }
        let dhcp = lines.iter().any(|(s, line)| {
            s == "Network" && key(line) == "DHCP" && matches!(value(line), "yes" | "ipv4" | "true" | "both")
        });
        let pinned = ["MACAddress", "PermanentMACAddress", "Path"].iter().any(|pin| has("Match", pin));
        let fixed = has("Network", "Address") || has("Address", "Address");
        if dhcp && !pinned && !fixed && name.is_some_and(matches_nic) {
            return Ok(());
        }
        let mut new = String::new();
        let mut matched = false;
        for (section, line) in &lines {
            let drop = matches!(
                (section.as_str(), key(line)),
                ("Match", "Name" | "MACAddress" | "PermanentMACAddress" | "Path" | "OriginalName" | "Driver")
                    | ("Network", "Address" | "Gateway" | "DHCP")
                    | ("Link", "MACAddress")
                    | ("Address" | "Route" | "RoutingPolicyRule", _)
            );
            if !drop {
                new.push_str(line);
                new.push('\n');
            }
            match line.trim() {
                "[Match]" => {
                    new.push_str("Name=eth0\n");
                    matched = true;
                }
                "[Network]" => new.push_str("DHCP=yes\n"),
                _ => {}
            }
        }
        if matched {
            return draft.write(&path, &new, 0o644, DHCP);
        }
    }
    Ok(())
}

/// NetworkManager: the first profile of an Ethernet card becomes eth0 by DHCP.
pub fn network_manager(draft: &mut Draft<'_>) -> Result<()> {
    for path in draft.tree().files("/etc/NetworkManager/system-connections", "")? {
        let text = draft.text(&path)?.unwrap_or_default();
        let lines = sections(&text);
        let get = |section: &str, wanted: &str| {
            lines.iter().find(|(s, line)| s == section && key(line) == wanted).map(|(_, line)| value(line))
        };
        match get("connection", "type") {
            Some("ethernet" | "802-3-ethernet") if get("connection", "master").is_none() => {}
            Some("bridge" | "bond" | "vlan" | "team") => {
                complex(draft, &path);
                return Ok(());
            }
            _ => continue,
        }
        let mut new = String::new();
        for (section, line) in &lines {
            match (section.as_str(), key(line)) {
                ("connection", "interface-name") => new.push_str("interface-name=eth0\n"),
                ("ethernet" | "802-3-ethernet", "mac-address" | "cloned-mac-address") => {}
                ("ipv4" | "ipv6", "method") if value(line) == "manual" => new.push_str("method=auto\n"),
                ("ipv4" | "ipv6", name)
                    if name == "gateway"
                        || ["address", "route"].iter().any(|p| {
                            name.strip_prefix(p).is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()))
                        }) => {}
                _ => {
                    new.push_str(line);
                    new.push('\n');
                }
            }
        }
        return draft.write(&path, &new, 0o600, DHCP);
    }
    Ok(())
}
