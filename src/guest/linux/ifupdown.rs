//! /etc/network/interfaces (interfaces(5)).

use super::network::{DHCP, NIC, complex, is_card};
use crate::error::Result;
use crate::guest::plan::Draft;

const MAIN: &str = "/etc/network/interfaces";
const FOLDER: &str = "/etc/network/interfaces.d";
const SOURCE: &str = "source /etc/network/interfaces.d/*";
const STANZA: &str = "auto eth0\niface eth0 inet dhcp\n";

/// A run of lines: one stanza with its options, or one other line.
struct Block {
    words: Vec<String>,
    lines: Vec<String>,
}

fn blocks(text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut in_stanza = false;
    for line in text.lines() {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let first = words.first().map_or("", String::as_str);
        let begins = matches!(first, "iface" | "mapping" | "auto" | "source" | "source-directory" | "rename")
            || first.starts_with("allow-")
            || first.starts_with("no-");
        if in_stanza && !begins && !first.is_empty() && !first.starts_with('#') {
            if let Some(block) = blocks.last_mut() {
                block.lines.push(line.to_owned());
            }
            continue;
        }
        in_stanza = matches!(first, "iface" | "mapping");
        // Comments and empty lines inside a stanza become blocks of their own: they stay where they are.
        let still_inside = first.is_empty() || first.starts_with('#');
        in_stanza |= still_inside
            && blocks.last().is_some_and(|block| block.words.first().is_some_and(|w| w == "iface"));
        blocks.push(Block { words, lines: vec![line.to_owned()] });
    }
    blocks
}

fn word(block: &Block, i: usize) -> &str {
    block.words.get(i).map_or("", String::as_str)
}

fn option<'a>(line: &'a str, names: &[&str]) -> Option<&'a str> {
    let key = line.split_whitespace().next()?;
    names.contains(&key).then_some(key)
}

/// Turns the card that has the machine's address into eth0 by DHCP; other cards are no longer waited for.
/// `cloud`: the file in interfaces.d that cloud-init overwrites, where it may configure the network.
pub fn fix(cloud: Option<&str>, draft: &mut Draft<'_>) -> Result<()> {
    let mut paths = vec![MAIN.to_owned()];
    paths.extend(draft.tree().files(FOLDER, "")?.into_iter().filter(|path| !path.ends_with(".dpkg-old")));
    let mut files = Vec::new();
    for path in paths {
        if let Some(text) = draft.text(&path)? {
            files.push((path, blocks(&text)));
        }
    }
    let tangled = |block: &Block| {
        block.lines.iter().any(|line| {
            line.split_whitespace().next().is_some_and(|key| {
                ["bridge_", "bridge-", "bond-", "bond_", "slaves", "vlan"].iter().any(|p| key.starts_with(p))
            })
        }) || word(block, 0) == "iface" && word(block, 1).contains('.')
    };
    if let Some((path, _)) = files.iter().find(|(_, blocks)| blocks.iter().any(tangled)) {
        complex(draft, path);
        return Ok(());
    }
    let all = || files.iter().flat_map(|(_, blocks)| blocks);
    let ifaces = || all().filter(|block| word(block, 0) == "iface" && is_card(word(block, 1)));
    let primary = ifaces()
        .find(|block| block.lines.iter().any(|line| option(line, &["gateway"]).is_some()))
        .or_else(|| ifaces().find(|block| word(block, 1) == NIC && word(block, 3) == "dhcp"))
        .or_else(|| ifaces().find(|block| word(block, 3) == "static"))
        .or_else(|| ifaces().next())
        .map(|block| word(block, 1).to_owned());
    // eth0 by DHCP, in the place it should have: it stays as it is.
    let place = cloud.unwrap_or(MAIN);
    let settled = primary.as_deref() == Some(NIC)
        && files.iter().all(|(path, blocks)| {
            let stanzas = || blocks.iter().filter(|b| word(b, 0) == "iface" && word(b, 1) == NIC);
            stanzas().all(|b| word(b, 3) == "dhcp" && (path == place || cloud.is_none()))
        });
    let kept: Vec<String> = ifaces()
        .filter(|block| Some(word(block, 1)) == primary.as_deref())
        .flat_map(|block| &block.lines[1..])
        .filter_map(|line| hook(line, primary.as_deref().unwrap_or(NIC)))
        .collect();
    let stanza = kept.iter().fold(STANZA.to_owned(), |text, line| format!("{text}{line}\n"));
    let mut has_source = false;
    let mut mains = String::new();
    for (path, blocks) in &files {
        let mut text = String::new();
        for block in blocks {
            if word(block, 0) == "source" || word(block, 0) == "source-directory" {
                has_source |= path == MAIN && block.words.iter().any(|word| word.starts_with(FOLDER));
            }
            match settled && block.words.iter().any(|word| word == NIC) {
                true => text.extend(block.lines.iter().map(|line| format!("{line}\n"))),
                false => rewrite(block, primary.as_deref(), &mut text),
            }
        }
        if path == MAIN {
            if settled {
                draft.write(MAIN, &text, 0o644, DHCP)?;
            }
            mains = text;
        } else if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            if Some(path.as_str()) != cloud {
                draft.remove(path, DHCP)?;
            }
        } else if Some(path.as_str()) != cloud {
            draft.write(path, &text, 0o644, DHCP)?;
        }
    }
    if settled {
        return Ok(());
    }
    let mut mains = format!("{}\n", mains.trim_end());
    match cloud {
        Some(path) => {
            if !has_source {
                mains = format!("{mains}\n{SOURCE}\n");
            }
            draft.write(MAIN, &mains, 0o644, "cloud-init keeps its part in interfaces.d")?;
            draft.write(path, &stanza, 0o644, DHCP)
        }
        None => draft.write(MAIN, &format!("{mains}\n{stanza}"), 0o644, DHCP),
    }
}

/// Adds what stays of `block` to `text`.
fn rewrite(block: &Block, primary: Option<&str>, text: &mut String) {
    let first = word(block, 0);
    let mut lines = block.lines.clone();
    if first == "iface" && (Some(word(block, 1)) == primary || word(block, 1) == NIC) {
        return;
    }
    if first == "auto" || first.starts_with("allow-") {
        let cards: Vec<&str> = block.words[1..].iter().map(String::as_str).collect();
        let others: Vec<&str> =
            cards.iter().copied().filter(|card| Some(*card) != primary && *card != NIC).collect();
        let (cards_left, rest): (Vec<&str>, Vec<&str>) = others.iter().partition(|card| is_card(card));
        lines.clear();
        if !rest.is_empty() {
            lines.push(format!("{first} {}", rest.join(" ")));
        }
        // A card that is not there would fail the whole of networking; hot-plugged, it is simply not there.
        if !cards_left.is_empty() {
            lines.push(format!("allow-hotplug {}", cards_left.join(" ")));
        }
    }
    lines.retain(|line| first != "iface" || option(line, &["hwaddress"]).is_none());
    for line in lines {
        text.push_str(&line);
        text.push('\n');
    }
}

/// A command of the old stanza, kept where it is not about addresses; its failure no longer stops the network.
fn hook(line: &str, card: &str) -> Option<String> {
    let key = option(line, &["pre-up", "up", "post-up", "down", "pre-down", "post-down"])?;
    let command = line.trim().strip_prefix(key)?.trim();
    let about_addresses = command
        .split(|c: char| !c.is_alphanumeric())
        .any(|word| matches!(word, "route" | "ip" | "ifconfig" | "ethtool" | "addr" | "macchanger"));
    if about_addresses || command.ends_with('\\') {
        return None;
    }
    let command = command.replace(card, NIC);
    Some(format!("    {key} {command} || true"))
}
