//! Files of the guest's configuration that name what the move changes: disks by their old names, its own addresses.

use std::collections::{BTreeSet, VecDeque};
use std::net::Ipv4Addr;

use super::inspect::{Guest, IFCFG};
use super::tree::{Node, Tree};
use crate::error::Result;

/// Where programs keep their configuration.
const ROOT: &str = "/etc";
/// Most names that are looked at, and the longest file, in bytes: configuration is short, and a guest may be hostile.
const NAMES: usize = 10_000;
const LONGEST: u64 = 128 << 10;
/// Folders within folders.
const DEPTH: usize = 6;
/// What the plan looks after, and what names disks only as an example or for all machines.
const LEFT_OUT: &[&str] = &[
    "/etc/NetworkManager/",
    "/etc/alternatives/",
    "/etc/apparmor.d/",
    "/etc/crypttab",
    "/etc/default/grub",
    "/etc/dracut",
    "/etc/fstab",
    "/etc/grub",
    "/etc/initramfs-tools/",
    "/etc/kernel/",
    "/etc/lvm/",
    "/etc/mtab",
    "/etc/netplan/",
    "/etc/network/",
    "/etc/selinux/",
    "/etc/ssl/",
    "/etc/sysconfig/bootloader",
    "/etc/sysconfig/grub",
    "/etc/sysconfig/network",
    "/etc/systemd/network/",
    "/etc/udev/",
];
/// How names of disks begin that are others on virtio.
const DISKS: &[&str] = &["/dev/sd", "/dev/hd", "/dev/xvd", "/dev/nvme", "/dev/cciss/"];

/// A file, and the first thing in it that will be called otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mention {
    /// The file.
    pub path: String,
    /// What it names, such as `/dev/sdb1` or `192.0.2.5`.
    pub what: String,
}

/// The files below /etc that name a disk, or, with `addresses`, one of the guest's own addresses. Links are not followed.
pub fn find(guest: &Guest, addresses: bool) -> Result<Vec<Mention>> {
    let tree = &guest.tree;
    let own = if addresses { own_addresses(tree)? } else { BTreeSet::new() };
    walk(tree, &own)
}

fn walk(tree: &Tree, own: &BTreeSet<Ipv4Addr>) -> Result<Vec<Mention>> {
    let mut found = Vec::new();
    let mut left = NAMES;
    let mut todo = VecDeque::from([(ROOT.to_owned(), 0)]);
    while let Some((folder, depth)) = todo.pop_front().filter(|_| left > 0) {
        for name in tree.names(&folder)?.into_iter().take(left) {
            left -= 1;
            let path = format!("{folder}/{name}");
            if LEFT_OUT.iter().any(|left_out| format!("{path}/").starts_with(left_out))
                || tree.link(&path)?.is_some()
            {
                continue;
            }
            match tree.node(&path)? {
                Some(Node::Folder) if depth < DEPTH => todo.push_back((path, depth + 1)),
                Some(Node::File(size)) if size <= LONGEST => {
                    let text = tree.text(&path)?.unwrap_or_default();
                    if let Some(what) = first(&text, own) {
                        found.push(Mention { path, what });
                    }
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

/// The first disk or own address that `text` names outside its comments.
fn first(text: &str, own: &BTreeSet<Ipv4Addr>) -> Option<String> {
    let lines = text
        .lines()
        .map(str::trim_start)
        .filter(|line| !line.starts_with(['#', ';', '!']) && !line.starts_with("//"));
    lines.flat_map(words).find_map(|word| {
        let disk = DISKS.iter().any(|disk| {
            word.strip_prefix(disk)
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()))
        });
        (disk || address(word).is_some_and(|address| own.contains(&address))).then(|| word.to_owned())
    })
}

/// Words of anything a path or an address is written of.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '/' | '.' | '-' | '_'))
}

fn address(word: &str) -> Option<Ipv4Addr> {
    word.split('/').next()?.parse().ok()
}

/// The addresses that the guest's network is set up with.
pub fn own_addresses(tree: &Tree) -> Result<BTreeSet<Ipv4Addr>> {
    let mut files = vec!["/etc/network/interfaces".to_owned()];
    for (folder, suffix) in [
        ("/etc/network/interfaces.d", ""),
        ("/etc/netplan", ".yaml"),
        ("/etc/systemd/network", ".network"),
        ("/etc/NetworkManager/system-connections", ""),
    ] {
        files.extend(tree.files(folder, suffix)?);
    }
    for (folder, _) in IFCFG {
        files.extend(tree.files(folder, "")?.into_iter().filter(|path| path.contains("/ifcfg-")));
    }
    let mut found = BTreeSet::new();
    for path in files {
        let text = tree.text(&path)?.unwrap_or_default();
        for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
            // `address 192.0.2.5`, `IPADDR=192.0.2.5`, `- 192.0.2.5/24`: an address has a name or a length.
            let is_named = line.to_ascii_lowercase().contains("addr");
            let addresses = words(line).filter(|word| is_named || word.contains('/')).filter_map(address);
            found.extend(addresses.filter(|address| {
                !address.is_loopback() && !address.is_unspecified() && address.octets()[0] != 255
            }));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tree::TextVolume;

    #[test]
    fn a_guest_with_any_number_of_folders_is_looked_at_within_bounds() {
        let mut volume = TextVolume::default();
        for i in 0..600 {
            for j in 0..30 {
                volume = volume.file(&format!("/etc/a{i:03}/b{j:02}"), "/dev/sda");
            }
        }
        let found = walk(&Tree::new(Box::new(volume)), &BTreeSet::new()).unwrap();
        assert!(!found.is_empty() && found.len() < NAMES, "{}", found.len());
    }

    #[test]
    fn disks_and_own_addresses_are_named_outside_comments_only() {
        let own = BTreeSet::from([Ipv4Addr::new(192, 0, 2, 5)]);
        for (text, what) in [
            ("data = /dev/sdb1\n", Some("/dev/sdb1")),
            ("x\n  device: \"/dev/nvme0n1p2\",\n", Some("/dev/nvme0n1p2")),
            ("listen=192.0.2.5:8080\n", Some("192.0.2.5")),
            ("allow 192.0.2.5/32;", Some("192.0.2.5/32")),
            ("# /dev/sdb1\n; 192.0.2.5\n// /dev/sda\n", None),
            ("peer 192.0.2.55 /dev/sdX /dev/disk/by-id/sda /dev/sd", None),
            ("peer 192.0.2.55, /dev/shm, /var/dev/sda", None),
        ] {
            assert_eq!(first(text, &own).as_deref(), what, "{text}");
        }
    }
}
