//! What each program that builds an initramfs is told in its settings, so that virtio is in those of later kernels too.

use crate::error::Result;
use crate::guest::builder::Builder;
use crate::guest::plan::{Draft, Line};

/// Why.
const REASON: &str = "virtio in every initramfs, also of kernels to come";

/// Tells `builder` to take in `modules` from now on.
pub fn configure(builder: Builder, modules: &[&str], draft: &mut Draft<'_>) -> Result<()> {
    let all = modules.join(" ");
    match builder {
        Builder::InitramfsTools => initramfs_tools(modules, draft),
        Builder::Dracut => {
            let text = format!(
                "# Written by haul: the disks and the network of the cloud.\nadd_drivers+=\" {all} \"\n"
            );
            draft.write("/etc/dracut.conf.d/90-haul-virtio.conf", &text, 0o644, REASON)
        }
        // An array in bash since 2018, a string before.
        Builder::Mkinitcpio => add_to("/etc/mkinitcpio.conf", "MODULES", modules, draft),
        Builder::MkinitrdSuse => add_to("/etc/sysconfig/kernel", "INITRD_MODULES", modules, draft),
        Builder::Booster => {
            let text = draft.text("/etc/booster.yaml")?.unwrap_or_default();
            match text.lines().any(|line| line.starts_with("modules:")) {
                true => Ok(()),
                false => {
                    let text = format!("{text}modules: {}\n", modules.join(","));
                    draft.write("/etc/booster.yaml", &text, 0o644, REASON)
                }
            }
        }
        Builder::MakeInitrd => {
            let text = draft.text("/etc/initrd.mk")?.unwrap_or_default();
            let line = format!("MODULES_ADD += {all}\n");
            let new = if text.contains(&line) { text } else { text + &line };
            draft.write("/etc/initrd.mk", &new, 0o644, REASON)
        }
        Builder::MkinitrdRedHat => modprobe_conf(modules, draft),
    }
}

/// initramfs-tools: its list of modules, and no choice of them by the machine it runs on.
fn initramfs_tools(modules: &[&str], draft: &mut Draft<'_>) -> Result<()> {
    const LIST: &str = "/etc/initramfs-tools/modules";
    let mut paths = vec!["/etc/initramfs-tools/initramfs.conf".to_owned()];
    paths.extend(draft.tree().files("/etc/initramfs-tools/conf.d", "")?);
    for path in paths {
        draft.edit_lines(
            &path,
            "`dep` takes the modules from the machine that builds: the cloud's would be missing",
            |line| match line.split('#').next().unwrap_or_default().trim() {
                "MODULES=dep" | "MODULES=\"dep\"" => Line::Replace("MODULES=most".into()),
                _ => Line::Keep,
            },
        )?;
    }
    let mut text = draft.text(LIST)?.unwrap_or_default();
    let listed: Vec<String> = text
        .lines()
        .filter_map(|line| line.split('#').next()?.split_whitespace().next())
        .map(|name| name.replace('-', "_"))
        .collect();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for name in modules.iter().filter(|name| !listed.iter().any(|listed| listed == *name)) {
        text.push_str(name);
        text.push('\n');
    }
    draft.write(LIST, &text, 0o644, REASON)
}

/// Adds `modules` to the value of a shell variable that is a list of names: `NAME="a b"` or `NAME=(a b)`.
fn add_to(path: &str, variable: &str, modules: &[&str], draft: &mut Draft<'_>) -> Result<()> {
    draft.edit_lines(path, REASON, |line| {
        let value = line.strip_prefix(variable).and_then(|rest| rest.strip_prefix('='));
        value
            .and_then(|value| with_names(value, modules))
            .map_or(Line::Keep, |value| Line::Replace(format!("{variable}={value}")))
    })
}

/// A list of names with those added that are not in it; `None` when all are, or it is written in another way.
fn with_names(value: &str, names: &[&str]) -> Option<String> {
    let value = value.trim_end();
    let (open, close) = [("(", ")"), ("\"", "\""), ("'", "'")]
        .into_iter()
        .find(|(open, close)| value.len() > 1 && value.starts_with(open) && value.ends_with(close))?;
    let inner = &value[1..value.len() - 1];
    let absent: Vec<&str> =
        names.iter().copied().filter(|name| !inner.split_whitespace().any(|one| one == *name)).collect();
    let gap = if inner.is_empty() || inner.ends_with(' ') { "" } else { " " };
    (!absent.is_empty()).then(|| format!("{open}{inner}{gap}{}{close}", absent.join(" ")))
}

/// Red Hat's mkinitrd up to 5 takes in what is called a disk controller, and modprobe what is called a network card.
fn modprobe_conf(modules: &[&str], draft: &mut Draft<'_>) -> Result<()> {
    const CONF: &str = "/etc/modprobe.conf";
    let Some(text) = draft.text(CONF)? else { return Ok(()) };
    let mut new = String::new();
    let mut used = 0;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["alias", card, _] if card.starts_with("eth") && modules.contains(&"virtio_net") => {
                new.push_str(&format!("alias {card} virtio_net\n"));
                continue;
            }
            ["alias", controller, _] if controller.starts_with("scsi_hostadapter") => {
                let number = controller.trim_start_matches("scsi_hostadapter").parse().unwrap_or(0);
                used = used.max(number + 1);
            }
            _ => {}
        }
        new.push_str(line);
        new.push('\n');
    }
    for module in ["virtio_pci", "virtio_blk"].iter().filter(|module| modules.contains(module)) {
        if !text.lines().any(|line| line.ends_with(&format!(" {module}"))) {
            let number = if used == 0 { String::new() } else { used.to_string() };
            new.push_str(&format!("alias scsi_hostadapter{number} {module}\n"));
            used += 1;
        }
    }
    draft.write(CONF, &new, 0o644, REASON)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_into_a_list_however_it_is_written() {
        let names = ["virtio_blk", "virtio_net"];
        assert_eq!(with_names("()", &names).as_deref(), Some("(virtio_blk virtio_net)"));
        assert_eq!(
            with_names("(btrfs virtio_blk)", &names).as_deref(),
            Some("(btrfs virtio_blk virtio_net)")
        );
        assert_eq!(
            with_names("\"ata_piix \"", &names).as_deref(),
            Some("\"ata_piix virtio_blk virtio_net\"")
        );
        assert_eq!(with_names("\"virtio_net virtio_blk\"", &names), None);
        assert_eq!(with_names("$MODULES", &names), None);
    }
}
