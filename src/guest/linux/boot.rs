//! The boot loader: its menu and its settings edited as text, never generated anew.

use super::fstab::{self, Names};
use crate::error::Result;
use crate::guest::disk::BootMode;
use crate::guest::inspect::{GRUB_CFG, Guest};
use crate::guest::plan::{Draft, Line, Options, Severity};

/// The kernel argument that keeps `eth0` the name of the first network card.
const IFNAMES: &str = "net.ifnames=0";

/// Fixes GRUB's menu and settings.
pub fn fix(guest: &Guest, options: &Options, draft: &mut Draft<'_>) -> Result<()> {
    if guest.boot == BootMode::Uefi {
        draft.warn(
            "boot.uefi",
            "the disk boots by UEFI, which haul does not fix yet",
            "see that the ESP has EFI/BOOT/BOOTX64.EFI",
        );
    }
    if draft.text(GRUB_CFG)?.is_none() {
        draft.find(
            "boot.no-menu",
            Severity::Fatal,
            "there is no /boot/grub/grub.cfg",
            "haul knows GRUB 2 only: install it in the source",
        );
    }
    let names = fstab::names(guest, draft)?;
    let by_uuid = "disks change their names on virtio: the kernel gets its disks by UUID";
    for path in [GRUB_CFG, "/boot/grub/custom.cfg"] {
        draft.edit_lines(path, by_uuid, |line| match is_kernel_line(line) {
            true => devices_by_uuid(line, &names).map_or(Line::Keep, Line::Replace),
            false => Line::Keep,
        })?;
    }
    let mut settings = vec!["/etc/default/grub".to_owned()];
    settings.extend(draft.tree().files("/etc/default/grub.d", ".cfg")?);
    for path in &settings {
        draft.edit_lines(path, by_uuid, |line| {
            match line.trim_start().starts_with("GRUB_CMDLINE_LINUX") {
                true => devices_by_uuid(line, &names).map_or(Line::Keep, Line::Replace),
                false => Line::Keep,
            }
        })?;
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
        let reason = "the cloud's network card is eth0: no names by slot";
        draft.edit_lines(GRUB_CFG, reason, |line| {
            match is_kernel_line(line) && !line.contains("net.ifnames=") {
                true => Line::Replace(format!("{} {IFNAMES}", line.trim_end())),
                false => Line::Keep,
            }
        })?;
        let main = "/etc/default/grub";
        if draft.text(main)?.is_some_and(|text| !text.contains("net.ifnames=")) {
            draft.edit_lines(main, reason, |line| {
                line.strip_prefix("GRUB_CMDLINE_LINUX=").map_or(Line::Keep, |value| {
                    Line::Replace(format!("GRUB_CMDLINE_LINUX={}", with_word(value)))
                })
            })?;
        }
    }
    if draft.text("/boot/grub/device.map")?.is_some_and(|text| text.contains("/dev/")) {
        draft.remove(
            "/boot/grub/device.map",
            "it names disks of the old machine; GRUB finds them by itself",
        )?;
    }
    Ok(())
}

fn is_kernel_line(line: &str) -> bool {
    matches!(line.split_whitespace().next(), Some("linux" | "linux16" | "linuxefi"))
}

/// `line` with the devices in `root=` and `resume=` by UUID; `None` when it has none.
fn devices_by_uuid(line: &str, names: &Names<'_>) -> Option<String> {
    let mut new = line.to_owned();
    for word in line.split([' ', '\t', '"', '\'']) {
        let Some((key @ ("root" | "resume"), spec)) = word.split_once('=') else { continue };
        if let Some(uuid) = names.by_uuid(spec) {
            new = new.replace(word, &format!("{key}={uuid}"));
        }
    }
    (new != line).then_some(new)
}

/// A shell value with the argument added inside its quotes.
fn with_word(value: &str) -> String {
    let value = value.trim_end();
    match value.chars().last().filter(|quote| matches!(quote, '"' | '\'') && value.len() > 1) {
        Some(quote) => {
            let inner = &value[..value.len() - 1];
            let gap = if inner.ends_with(quote) && inner.len() == 1 { "" } else { " " };
            format!("{inner}{gap}{IFNAMES}{quote}")
        }
        None if value.is_empty() => IFNAMES.to_owned(),
        None => format!("\"{value} {IFNAMES}\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_argument_goes_inside_the_quotes() {
        assert_eq!(with_word("\"\""), "\"net.ifnames=0\"");
        assert_eq!(with_word("\"quiet\""), "\"quiet net.ifnames=0\"");
        assert_eq!(with_word("'a b'"), "'a b net.ifnames=0'");
        assert_eq!(with_word(""), "net.ifnames=0");
        assert_eq!(with_word("quiet"), "\"quiet net.ifnames=0\"");
    }
}
