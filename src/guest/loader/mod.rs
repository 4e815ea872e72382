//! What a guest's boot loaders boot: the entries of every menu on its disk, read as text. What a menu computes when it
//! runs is not evaluated.

mod bls;
mod extlinux;
pub mod grub;

use serde::Serialize;

use super::tree::{Node, Tree};
use crate::error::Result;

/// Most menus and entry files read.
const MAX_MENUS: usize = 256;

/// The language a menu is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Style {
    /// GRUB 2's script.
    Grub,
    /// GRUB 0.97: `menu.lst`, `grub.conf`.
    GrubLegacy,
    /// One file an entry (the Boot Loader Specification), read by GRUB 2 and systemd-boot.
    Bls,
    /// SYSLINUX and extlinux.
    Extlinux,
}

/// A menu, or an entry's own file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Menu {
    /// Where it is, no link on the way.
    pub path: String,
    /// How it is written.
    pub style: Style,
    /// The entries that boot Linux, in order.
    pub entries: Vec<Entry>,
}

/// An entry of a menu.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// The kernel's path as written.
    pub kernel: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The initramfs files' paths as written.
    pub initrds: Vec<String>,
}

impl Style {
    /// The arguments on a line of such a menu: where they begin in the line; `None` on any other line.
    pub fn arguments(self, line: &str) -> Option<usize> {
        let words: &[&str] = match self {
            Style::Grub => &["linux", "linux16", "linuxefi"],
            Style::GrubLegacy => &["kernel", "module"],
            Style::Bls => &["options"],
            Style::Extlinux => &["append"],
        };
        let (first, rest) = split_word(line);
        let known = match self {
            Style::Extlinux => words.iter().any(|word| first.eq_ignore_ascii_case(word)),
            _ => words.contains(&first),
        };
        // The kernel comes first, but where it has a line of its own.
        let skipped = match self {
            Style::Grub | Style::GrubLegacy => split_word(rest).1,
            Style::Bls | Style::Extlinux => rest,
        };
        known.then(|| line.len() - skipped.trim_start().len())
    }
}

/// The first word, and what follows it.
fn split_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_at(text.find(char::is_whitespace).unwrap_or(text.len()))
}

/// A word without quotes around it.
fn unquoted(word: &str) -> String {
    word.trim_matches(['"', '\'']).to_owned()
}

/// All menus of the guest.
pub fn menus(tree: &Tree) -> Result<Vec<Menu>> {
    let mut found: Vec<Menu> = Vec::new();
    let mut add = |path: &str, style: Style| -> Result<()> {
        // A link is read once, as what it leads to.
        let Some(path) = tree.real(path)? else { return Ok(()) };
        if found.len() >= MAX_MENUS || found.iter().any(|menu| menu.path == path) {
            return Ok(());
        }
        let Some(text) = tree.text(&path)? else { return Ok(()) };
        let entries = match style {
            Style::Grub => grub::entries(&text),
            Style::GrubLegacy => grub::legacy_entries(&text),
            Style::Bls => bls::entries(&text),
            Style::Extlinux => extlinux::entries(&text),
        };
        found.push(Menu { path, style, entries });
        Ok(())
    };
    let mut folders = vec!["/boot/grub".to_owned(), "/boot/grub2".to_owned()];
    for esp in ["/boot/efi", "/efi", "/boot"] {
        folders.extend(tree.names(&format!("{esp}/EFI"))?.iter().map(|name| format!("{esp}/EFI/{name}")));
    }
    for folder in &folders {
        for name in ["grub.cfg", "custom.cfg"] {
            add(&format!("{folder}/{name}"), Style::Grub)?;
        }
    }
    for folder in folders.iter().skip(1).chain([&"/boot/grub".to_owned()]) {
        for name in ["grub.conf", "menu.lst"] {
            add(&format!("{folder}/{name}"), Style::GrubLegacy)?;
        }
    }
    for boot in ["/boot", "/boot/efi", "/efi"] {
        for path in tree.files(&format!("{boot}/loader/entries"), ".conf")? {
            add(&path, Style::Bls)?;
        }
    }
    for path in [
        "/boot/extlinux/extlinux.conf",
        "/boot/extlinux.conf",
        "/boot/syslinux/syslinux.cfg",
        "/boot/syslinux/extlinux.conf",
    ] {
        add(path, Style::Extlinux)?;
    }
    Ok(found)
}

/// The guest's path of a file that `menu` names: a loader counts from the file system it reads, which is that of /boot,
/// or from the menu's own folder.
pub fn file(tree: &Tree, menu: &Menu, written: &str) -> Result<Option<String>> {
    let beside = match (menu.style, menu.path.rsplit_once('/')) {
        (Style::Extlinux, Some((folder, _))) if !written.starts_with('/') => {
            Some(format!("{folder}/{written}"))
        }
        _ => None,
    };
    if let Some(path) = beside {
        return Ok(matches!(tree.node(&path)?, Some(Node::File(_))).then_some(path));
    }
    // `(hd0,1)/vmlinuz` and `($root)/vmlinuz`: the device in front says which file system, and /boot's is meant.
    let path = match written.split_once(')') {
        Some((device, path)) if device.starts_with('(') => path,
        _ => written,
    };
    let mut candidates = match tree.is_mount_point("/boot") {
        true => vec![format!("/boot{path}"), path.to_owned()],
        false => vec![path.to_owned(), format!("/boot{path}")],
    };
    // On btrfs it counts from the top level, where the root is a subvolume: `/@/boot/vmlinuz`.
    candidates.extend(path.find("/boot/").map(|at| path[at..].to_owned()));
    for candidate in candidates.iter().filter(|candidate| candidate.starts_with('/')) {
        if matches!(tree.node(candidate)?, Some(Node::File(_))) {
            return Ok(Some(candidate.clone()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_begin_behind_the_kernel_or_the_keyword() {
        for (style, line, arguments) in [
            (Style::Grub, "\tlinux\t/vmlinuz-6.1 root=/dev/sda1 ro", Some("root=/dev/sda1 ro")),
            (Style::Grub, "  linuxefi /vmlinuz", Some("")),
            (Style::Grub, "initrd /x", None),
            (Style::Grub, "# linux /x y", None),
            (Style::GrubLegacy, " kernel (hd0,0)/vmlinuz ro root=/dev/hda2", Some("ro root=/dev/hda2")),
            (Style::Bls, "options root=LABEL=x $kernelopts", Some("root=LABEL=x $kernelopts")),
            (Style::Bls, "options", Some("")),
            (Style::Extlinux, "    APPEND ro root=/dev/sda1", Some("ro root=/dev/sda1")),
            (Style::Extlinux, "LINUX /vmlinuz", None),
        ] {
            assert_eq!(style.arguments(line).map(|at| &line[at..]), arguments, "{line}");
        }
    }
}
