//! UEFI: a boot loader where firmware looks that knows no boot entries, as that of a new machine does.

use crate::error::Result;
use crate::guest::disk::BootMode;
use crate::guest::inspect::Guest;
use crate::guest::os::Os;
use crate::guest::plan::{Draft, Severity};
use crate::guest::tree::Tree;

/// Where loaders for removable media lie on an EFI system partition (UEFI specification, 3.5.1.1).
const REMOVABLE: &str = "EFI/BOOT";
/// Folders beside the distributions' own.
const OTHERS: [&str; 4] = ["boot", "microsoft", "tools", "linux"];

/// Where the file is that firmware without boot entries starts; `None` for a machine that has no such name.
pub fn removable_loader(guest: &Guest) -> Option<String> {
    let name = format!("BOOT{}.EFI", suffix(guest.arch)?.to_uppercase());
    Some(format!("{}/{REMOVABLE}/{name}", guest.esp()?))
}

/// How file names tell the machine a loader is for.
fn suffix(arch: &str) -> Option<&'static str> {
    match arch {
        "x86_64" => Some("x64"),
        "i386" => Some("ia32"),
        "aarch64" => Some("aa64"),
        _ => None,
    }
}

/// Has a disk that boots by UEFI boot where no boot entries are known.
pub fn fix(guest: &Guest, draft: &mut Draft<'_>) -> Result<()> {
    match guest.boot {
        BootMode::Uefi => make_removable(guest, draft),
        BootMode::Bios => Ok(()),
    }
}

/// Puts a copy of the distribution's loader there, with what that loader starts.
pub fn make_removable(guest: &Guest, draft: &mut Draft<'_>) -> Result<()> {
    let (Some(esp), Some(target), Some(suffix)) = (guest.esp(), removable_loader(guest), suffix(guest.arch))
    else {
        draft.warn(
            "boot.uefi",
            "the disk boots by UEFI, and haul cannot read its EFI system partition",
            "see that it has EFI/BOOT/BOOTX64.EFI, and test the copy: haul boot --firmware uefi",
        );
        return Ok(());
    };
    let tree = draft.tree();
    if tree.exists(&target)? {
        return Ok(());
    }
    let Some((folder, loader)) = loader(tree, esp, suffix, &guest.os)? else {
        draft.find(
            "boot.no-efi-loader",
            Severity::Fatal,
            "the EFI system partition has no boot loader haul knows",
            "install one in the source: grub-install --removable, or bootctl install",
        );
        return Ok(());
    };
    let reason = "a new machine's firmware knows no boot entries: it starts the loader it finds here";
    draft.copy(&format!("{folder}/{loader}"), &target, reason);
    // What shim starts and GRUB reads are looked for beside them.
    let beside =
        [format!("grub{suffix}.efi"), "grub.efi".into(), format!("mm{suffix}.efi"), "grub.cfg".into()];
    for name in beside.iter().filter(|name| **name != loader) {
        let (from, to) = (format!("{folder}/{name}"), format!("{esp}/{REMOVABLE}/{name}"));
        if draft.is_file(&from)? && !tree.exists(&to)? {
            draft.copy(&from, &to, "the loader looks for it in its own folder");
        }
    }
    Ok(())
}

/// The folder and the name of the loader that firmware with boot entries starts: the system's own before others.
fn loader(tree: &Tree, esp: &str, suffix: &str, os: &Os) -> Result<Option<(String, String)>> {
    let own =
        |name: &str| os.is_like(name) || name == "redhat" && (os.is_like("rhel") || os.is_like("fedora"));
    let mut folders = tree.names(&format!("{esp}/EFI"))?;
    folders.retain(|name| !OTHERS.contains(&name.to_lowercase().as_str()));
    folders.sort_by_key(|name| (os.id != name.to_lowercase(), !own(&name.to_lowercase()), name.clone()));
    let names = [
        format!("shim{suffix}.efi"),
        "shim.efi".into(),
        format!("grub{suffix}.efi"),
        "grub.efi".into(),
        format!("systemd-boot{suffix}.efi"),
    ];
    for folder in folders.iter().map(|name| format!("{esp}/EFI/{name}")) {
        for name in &names {
            if tree.exists(&format!("{folder}/{name}"))? {
                return Ok(Some((folder, name.clone())));
            }
        }
    }
    Ok(None)
}
