//! Network scripts with a file for each card: Red Hat's /etc/sysconfig/network-scripts (also read by NetworkManager) and
//! SUSE's /etc/sysconfig/network (also read by wicked). Both are shell variables.

use super::network::{DHCP, NIC, complex, is_card};
use crate::error::Result;
use crate::guest::inspect::IFCFG;
use crate::guest::plan::{Draft, Line};

/// Why other cards stay down.
const OTHER: &str = "the cloud's machine has one card: the others are not waited for";
/// Where SUSE keeps the default route.
const SUSE_ROUTES: &str = "/etc/sysconfig/network/routes";

/// Variables that pin a card by its address, or to the old machine's place of it.
const PINS: &[&str] = &["HWADDR", "LLADDR", "_nm_name"];
/// What goes with an address of the old network, numbered or not (`IPADDR`, `IPADDR0`, `GATEWAY`).
const ADDRESSES: &[&str] = &[
    "IPADDR",
    "NETMASK",
    "PREFIX",
    "PREFIXLEN",
    "GATEWAY",
    "NETWORK",
    "BROADCAST",
    "REMOTE_IPADDR",
    "ETHTOOL_OPTIONS",
];
/// What tells of a card that is a part of something else, or made of others.
const COMPLEX: &[&str] = &[
    "MASTER",
    "SLAVE",
    "BONDING_OPTS",
    "BONDING_MASTER",
    "BRIDGE",
    "TEAM_MASTER",
    "TEAM_CONFIG",
    "VLAN",
    "ETHERDEVICE",
    "DEVICETYPE",
];

/// Drops the addresses of cards that no longer exist.
pub fn unpin(draft: &mut Draft<'_>, reason: &str) -> Result<()> {
    for (folder, _) in IFCFG {
        for path in files(draft, folder)? {
            draft.edit_lines(&path, reason, |line| match PINS.contains(&key(line)) {
                true => Line::Drop,
                false => Line::Keep,
            })?;
        }
    }
    Ok(())
}

/// Turns the card that has the machine's address into eth0 by DHCP.
pub fn fix(draft: &mut Draft<'_>) -> Result<()> {
    for (folder, _) in IFCFG {
        let is_suse = folder.ends_with("/network");
        let mut cards = Vec::new();
        for path in files(draft, folder)? {
            let text = draft.text(&path)?.unwrap_or_default();
            if COMPLEX.iter().any(|name| has(&text, name)) {
                complex(draft, &path);
                return Ok(());
            }
            let name = value(&text, "DEVICE").unwrap_or_else(|| suffix(&path).to_owned());
            if is_card(&name) {
                cards.push((path, text));
            }
        }
        let main = cards.iter().position(|(_, text)| is_started(text) && is_addressed(text));
        let Some(main) = main.or_else(|| cards.iter().position(|(_, text)| is_started(text))) else {
            continue;
        };
        let (path, text) = cards.remove(main);
        for (other, _) in cards.iter().filter(|(_, text)| is_started(text)) {
            draft.edit_lines(other, OTHER, |line| match key(line) {
                "ONBOOT" => Line::Replace("ONBOOT=no".into()),
                "STARTMODE" => Line::Replace("STARTMODE='manual'".into()),
                _ => Line::Keep,
            })?;
        }
        let wanted = format!("{folder}/ifcfg-{NIC}");
        let new = by_dhcp(&text, is_suse);
        if path != wanted {
            draft.remove(&path, DHCP)?;
        }
        draft.write(&wanted, &new, 0o644, DHCP)?;
        if is_suse {
            draft.edit_lines(SUSE_ROUTES, "the default route comes by DHCP", |line| {
                match line.split_whitespace().next() {
                    Some("default") => Line::Drop,
                    _ => Line::Keep,
                }
            })?;
        }
    }
    Ok(())
}

/// The cards' files in a folder: no backups, no loopback.
fn files(draft: &Draft<'_>, folder: &str) -> Result<Vec<String>> {
    let paths = draft.tree().files(folder, "")?;
    let is_card = |path: &String| {
        let name = suffix(path);
        let is_backup = [".bak", ".orig", "~", ".rpmsave", ".rpmnew", ".old", ".template"]
            .iter()
            .any(|end| name.ends_with(end));
        path.starts_with(&format!("{folder}/ifcfg-")) && name != "lo" && !is_backup
    };
    Ok(paths.into_iter().filter(is_card).collect())
}

fn suffix(path: &str) -> &str {
    path.rsplit_once("/ifcfg-").map_or("", |(_, name)| name)
}

fn key(line: &str) -> &str {
    line.trim_start().split('=').next().unwrap_or_default()
}

fn value(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| key(line) == name)?;
    let value = line.split_once('=')?.1.trim().trim_matches(['"', '\'']);
    Some(value.to_owned())
}

fn has(text: &str, name: &str) -> bool {
    value(text, name).is_some_and(|value| !matches!(value.as_str(), "" | "no"))
}

/// Whether it is brought up at boot: Red Hat's default is yes, SUSE's says so.
fn is_started(text: &str) -> bool {
    let no = |name: &str, off: &[&str]| value(text, name).is_some_and(|value| off.contains(&value.as_str()));
    !no("ONBOOT", &["no"]) && !no("STARTMODE", &["off", "manual"])
}

fn is_addressed(text: &str) -> bool {
    let is_address = |line: &str| numbered(key(line), "IPADDR");
    text.lines().any(is_address) || value(text, "BOOTPROTO").is_some_and(|proto| proto.starts_with("dhcp"))
}

/// Whether `key` is `name`, or `name` with a number or label behind it.
fn numbered(key: &str, name: &str) -> bool {
    key.strip_prefix(name).is_some_and(|rest| {
        rest.is_empty() || rest.starts_with('_') || rest.chars().all(|c| c.is_ascii_digit())
    })
}

/// The card's file with its addresses gone and DHCP in their place.
fn by_dhcp(text: &str, is_suse: bool) -> String {
    let proto = if is_suse { "BOOTPROTO='dhcp'" } else { "BOOTPROTO=dhcp" };
    let mut new = String::new();
    let mut said = false;
    for line in text.lines() {
        let name = key(line);
        if ADDRESSES.iter().any(|address| numbered(name, address)) || PINS.contains(&name) {
            continue;
        }
        match name {
            "BOOTPROTO" => {
                said = true;
                new.push_str(proto);
            }
            "DEVICE" | "NAME" if !is_suse => new.push_str(&format!("{name}={NIC}")),
            // It belongs to the connection of the old name.
            "UUID" if !is_suse && value(text, "DEVICE").is_none_or(|device| device != NIC) => continue,
            _ => new.push_str(line),
        }
        new.push('\n');
    }
    if !said {
        new.push_str(proto);
        new.push('\n');
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_and_the_rest_stays() {
        let old = "TYPE=Ethernet\nDEVICE=ens192\nNAME=\"System ens192\"\nUUID=1\nHWADDR=00:50:56:aa:bb:cc\nBOOTPROTO=none\nONBOOT=yes\n\
                   IPADDR0=10.0.0.5\nPREFIX0=24\nGATEWAY0=10.0.0.1\nDNS1=10.0.0.2\nIPV6INIT=no\n";
        assert_eq!(
            by_dhcp(old, false),
            "TYPE=Ethernet\nDEVICE=eth0\nNAME=eth0\nBOOTPROTO=dhcp\nONBOOT=yes\nDNS1=10.0.0.2\nIPV6INIT=no\n"
        );
        assert_eq!(by_dhcp(&by_dhcp(old, false), false), by_dhcp(old, false));
        let suse = "BOOTPROTO='static'\nIPADDR='10.0.0.5/24'\nIPADDR_1='10.0.0.6/24'\nSTARTMODE='auto'\n";
        assert_eq!(by_dhcp(suse, true), "BOOTPROTO='dhcp'\nSTARTMODE='auto'\n");
    }
}
