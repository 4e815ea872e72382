//! The boot loader: its menu and its settings edited as text, never generated anew.

use super::fstab::{self, Names};
use super::has_systemd;
use crate::error::Result;
use crate::guest::inspect::Guest;
use crate::guest::loader::grub::with_variable;
use crate::guest::plan::{Draft, Line, Options, Severity};

/// Where GRUB 2 keeps variables that menu entries use.
const ENVIRONMENTS: [&str; 2] = ["/boot/grub2/grubenv", "/boot/grub/grubenv"];
/// The variable with the arguments of every entry that says `$kernelopts` (Red Hat 8 and its kin).
const KERNELOPTS: &str = "kernelopts";
/// Where the arguments of entries yet to be made come from.
const SETTINGS: [&str; 4] =
    ["/etc/default/grub", "/etc/sysconfig/grub", "/etc/sysconfig/bootloader", "/etc/kernel/cmdline"];

/// Why disks are renamed.
const BY_UUID: &str = "disks change their names on virtio: the kernel gets its disks by UUID";
/// The consoles of machines on Xen.
const XEN: [&str; 2] = ["hvc0", "xvc0"];
/// Why they go.
const NO_XEN: &str = "KVM has no Xen console";
/// The serial port, and the screen, which stays the first console as the last one named (the kernel's serial-console.rst).
const SERIAL: &str = "console=ttyS0,115200 console=tty0";
/// Why it comes.
const ON_SERIAL: &str = "where the screen cannot be reached, the serial port says what the server does";
/// Why cards are not.
const NO_SLOTS: &str = "the cloud's network card is eth0: no names by slot";

/// Fixes the menus and the settings they are made from.
pub fn fix(guest: &Guest, options: &Options, draft: &mut Draft<'_>) -> Result<()> {
    if guest.menus.iter().all(|menu| menu.entries.is_empty()) {
        draft.find(
            "boot.no-menu",
            Severity::Fatal,
            "no boot loader's menu was found",
            "haul knows GRUB, GRUB 2, entries of the Boot Loader Specification, and extlinux",
        );
    }
    let names = fstab::names(guest, draft)?;
    rewrite(guest, BY_UUID, draft, |arguments| devices_by_uuid(arguments, &names))?;
    for path in &settings(draft)? {
        draft.edit_lines(
            path,
            "the menu the guest makes after a kernel update must name disks by UUID too",
            |line| {
                let setting = line.trim_start().split('=').next().unwrap_or_default();
                match matches!(setting, "GRUB_DISABLE_LINUX_UUID" | "GRUB_DISABLE_UUID")
                    && line.contains("true")
                {
                    true => Line::Replace(format!("#{line}")),
                    false => Line::Keep,
                }
            },
        )?;
    }
    if !options.keep_network {
        without_slots(guest, draft)?;
    }
    consoles(guest, draft)?;
    device_maps(draft)
}

/// Changes the arguments of every entry, and of those yet to be made, as `edit` says: it is given a whole line.
fn rewrite(
    guest: &Guest,
    reason: &str,
    draft: &mut Draft<'_>,
    edit: impl Fn(&str) -> Option<String>,
) -> Result<()> {
    let edited = |line: &str, holds: bool| match holds {
        true => edit(line).map_or(Line::Keep, Line::Replace),
        false => Line::Keep,
    };
    for menu in &guest.menus {
        let holds = |line: &str| menu.style.arguments(line).is_some();
        draft.edit_lines(&menu.path, reason, |line| edited(line, holds(line)))?;
    }
    environments(draft, reason, &edit)?;
    for path in settings(draft)? {
        draft.edit_lines(&path, reason, |line| edited(line, is_setting(&path, line)))?;
    }
    Ok(())
}

/// The files with the arguments of menus yet to be made.
fn settings(draft: &Draft<'_>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let more = draft.tree().files("/etc/default/grub.d", ".cfg")?;
    for path in SETTINGS.iter().map(|path| (*path).to_owned()).chain(more) {
        // One of Red Hat's is a link to the other.
        if let Some(real) = draft.tree().real(&path)?
            && !found.contains(&real)
        {
            found.push(real);
        }
    }
    Ok(found)
}

fn is_setting(path: &str, line: &str) -> bool {
    let line = line.trim_start();
    path == "/etc/kernel/cmdline"
        || ["GRUB_CMDLINE_LINUX", "DEFAULT_APPEND", "FAILSAFE_APPEND", "XEN_KERNEL_APPEND"]
            .iter()
            .any(|name| line.starts_with(name))
}

/// Changes the arguments that entries take from GRUB's environment.
fn environments(draft: &mut Draft<'_>, reason: &str, edit: impl Fn(&str) -> Option<String>) -> Result<()> {
    for path in ENVIRONMENTS {
        if let Some(new) = draft.text(path)?.and_then(|block| with_variable(&block, KERNELOPTS, &edit)) {
            draft.write(path, &new, 0o600, reason)?;
        }
    }
    Ok(())
}

/// Has the first card called eth0 where udev would give it another name.
fn without_slots(guest: &Guest, draft: &mut Draft<'_>) -> Result<()> {
    let tree = draft.tree();
    let mut words = Vec::new();
    if has_systemd(tree)? {
        words.push("net.ifnames=0");
    }
    if tree.exists("/sbin/biosdevname")? || tree.exists("/usr/sbin/biosdevname")? {
        words.push("biosdevname=0");
    }
    words.into_iter().try_for_each(|word| add(guest, word, NO_SLOTS, draft))
}

/// Has the kernel print on the serial port, too, and nowhere that only the old machine has.
fn consoles(guest: &Guest, draft: &mut Draft<'_>) -> Result<()> {
    // There the firmware says which port there is.
    if guest.arch == "aarch64" {
        return Ok(());
    }
    rewrite(guest, NO_XEN, draft, without_xen)?;
    draft.edit_lines("/etc/inittab", NO_XEN, |line| {
        let on_xen = line.split([' ', '\t']).any(|word| XEN.contains(&word));
        match on_xen && !line.trim_start().starts_with('#') {
            true => Line::Replace(format!("#{line}")),
            false => Line::Keep,
        }
    })?;
    add(guest, SERIAL, ON_SERIAL, draft)
}

/// `line` with Xen's consoles replaced by the serial port; `None` when it has none.
fn without_xen(line: &str) -> Option<String> {
    let mut new = line.to_owned();
    for word in line.split([' ', '\t', '"', '\'']) {
        let Some(console) = word.strip_prefix("console=") else { continue };
        if XEN.contains(&console.split(',').next().unwrap_or_default()) {
            new = new.replace(word, "console=ttyS0,115200");
        }
    }
    (new != line).then_some(new)
}

/// Adds the argument `word`, or several of one name, to every entry that boots a Linux, now or later, and has none of its name.
fn add(guest: &Guest, word: &str, reason: &str, draft: &mut Draft<'_>) -> Result<()> {
    let (key, _) = word.split_once('=').unwrap_or((word, ""));
    let has = |text: &str| text.split([' ', '\t', '"', '\'']).any(|one| one.split('=').next() == Some(key));
    for menu in &guest.menus {
        draft.edit_lines(&menu.path, reason, |line| match menu.style.arguments(line) {
            Some(at) if boots_linux(&line[at..]) && !has(line) => {
                Line::Replace(format!("{} {word}", line.trim_end()))
            }
            _ => Line::Keep,
        })?;
    }
    environments(draft, reason, |value| (!has(value)).then(|| format!("{} {word}", value.trim_end())))?;
    for path in ["/etc/default/grub", "/etc/kernel/cmdline"] {
        if draft.text(path)?.is_none_or(|text| has(&text)) {
            continue;
        }
        draft.edit_lines(path, reason, |line| match line.strip_prefix("GRUB_CMDLINE_LINUX=") {
            Some(value) => Line::Replace(format!("GRUB_CMDLINE_LINUX={}", with_word(value, word))),
            None if path == "/etc/kernel/cmdline" => Line::Replace(format!("{} {word}", line.trim_end())),
            None => Line::Keep,
        })?;
    }
    Ok(())
}

/// Whether these arguments are those of a Linux with a root of its own; `$kernelopts` bring theirs along.
fn boots_linux(arguments: &str) -> bool {
    !arguments.contains("$kernelopts")
}

/// GRUB 2 finds the disks by itself; GRUB 0.97's shell asks its map.
fn device_maps(draft: &mut Draft<'_>) -> Result<()> {
    let reason = "it names disks of the old machine; GRUB finds them by itself";
    for (path, loader) in
        [("/boot/grub/device.map", "/boot/grub/grub.cfg"), ("/boot/grub2/device.map", "/boot/grub2/grub.cfg")]
    {
        if draft.text(path)?.is_some_and(|text| text.contains("/dev/")) && draft.is_file(loader)? {
            draft.remove(path, reason)?;
        }
    }
    Ok(())
}

/// `line` with the devices in `root=`, `resume=` and (FIPS mode's /boot) `boot=` by UUID; `None` when it has none.
fn devices_by_uuid(line: &str, names: &Names<'_>) -> Option<String> {
    let mut new = line.to_owned();
    for word in line.split([' ', '\t', '"', '\'']) {
        let Some((key @ ("root" | "resume" | "boot"), spec)) = word.split_once('=') else { continue };
        if let Some(uuid) = names.by_uuid(spec) {
            new = new.replace(word, &format!("{key}={uuid}"));
        }
    }
    (new != line).then_some(new)
}

/// A shell value with the argument added inside its quotes.
fn with_word(value: &str, word: &str) -> String {
    let value = value.trim_end();
    match value.chars().last().filter(|quote| matches!(quote, '"' | '\'') && value.len() > 1) {
        Some(quote) => {
            let inner = &value[..value.len() - 1];
            let gap = if inner.ends_with(quote) && inner.len() == 1 { "" } else { " " };
            format!("{inner}{gap}{word}{quote}")
        }
        None if value.is_empty() => word.to_owned(),
        None => format!("\"{value} {word}\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_of_xen_become_the_serial_port() {
        let line = "kernel /vmlinuz ro root=/dev/xvda1 console=hvc0 console=tty0 xencons=hvc0";
        let new = "kernel /vmlinuz ro root=/dev/xvda1 console=ttyS0,115200 console=tty0 xencons=hvc0";
        assert_eq!(without_xen(line).as_deref(), Some(new));
        assert_eq!(
            without_xen("GRUB_CMDLINE_LINUX=\"console=xvc0,9600\"").as_deref(),
            Some("GRUB_CMDLINE_LINUX=\"console=ttyS0,115200\"")
        );
        assert_eq!(without_xen("linux /hvc0 console=ttyS1"), None);
    }

    #[test]
    fn an_argument_goes_inside_the_quotes() {
        assert_eq!(with_word("\"\"", "net.ifnames=0"), "\"net.ifnames=0\"");
        assert_eq!(with_word("\"quiet\"", "net.ifnames=0"), "\"quiet net.ifnames=0\"");
        assert_eq!(with_word("'a b'", "net.ifnames=0"), "'a b net.ifnames=0'");
        assert_eq!(with_word("", "net.ifnames=0"), "net.ifnames=0");
        assert_eq!(with_word("quiet", "net.ifnames=0"), "\"quiet net.ifnames=0\"");
    }
}
