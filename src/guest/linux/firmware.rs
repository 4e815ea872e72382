//! The other firmware: what a disk that boots by BIOS needs in order to boot by UEFI, too, and the other way round.

use crate::error::Result;
use crate::guest::disk::{BootMode, ESP_POINT, Parts};
use crate::guest::grub::{INDEX, MODULES};
use crate::guest::inspect::Guest;
use crate::guest::linux::efi::{self, removable_loader};
use crate::guest::loader::Style;
use crate::guest::package::Package;
use crate::guest::partition::Purpose;
use crate::guest::plan::{Draft, Fix, Line, Options, PlannedMount, Severity};
use crate::guest::tree::mount_of;
use crate::layout;
use crate::unit::{Extent, MIB};

/// What a boot loader for a firmware is made of.
struct Platform {
    /// The firmware.
    firmware: BootMode,
    /// What GRUB calls machine and firmware.
    name: &'static str,
    /// How GRUB's core is called on it.
    core: &'static str,
    /// What reads the disk there.
    modules: &'static [&'static str],
    /// The partition it needs.
    purpose: Purpose,
    /// The least and the most bytes of that.
    size: (u64, u64),
    /// What its packages are called: two of Debian and Ubuntu, one of Red Hat, one of SUSE.
    packages: [&'static str; 4],
}

/// Commands that GRUB has for one firmware alone, and those that do the same for both.
const COMMANDS: [(&str, &str); 4] =
    [("linux16", "linux"), ("initrd16", "initrd"), ("linuxefi", "linux"), ("initrdefi", "initrd")];

const UEFI: Platform = Platform {
    firmware: BootMode::Uefi,
    name: "x86_64-efi",
    core: "core.efi",
    modules: &[],
    purpose: Purpose::EfiSystem,
    // GRUB has some 200 KiB, and the tables of a FAT a few.
    size: (448 << 10, 64 * MIB),
    packages: ["grub-efi-amd64-bin", "grub-efi-amd64", "grub2-efi-x64-modules", "grub2-x86_64-efi"],
};

const BIOS: Platform = Platform {
    firmware: BootMode::Bios,
    name: "i386-pc",
    core: "core.img",
    modules: &["biosdisk"],
    purpose: Purpose::BiosBoot,
    size: (128 << 10, MIB),
    packages: ["grub-pc-bin", "grub-pc", "grub2-pc-modules", "grub2-i386-pc"],
};

/// Gives the disk a boot loader for the firmware of `options`, beside the one it has.
pub fn fix(guest: &Guest, options: &Options, draft: &mut Draft<'_>) -> Result<()> {
    let Some(wanted) = options.firmware else { return Ok(()) };
    if boots_by(guest, wanted)? {
        return Ok(());
    }
    if wanted == BootMode::Uefi && guest.esp().is_some() {
        // A disk for both already, but for a loader that a new machine's firmware finds.
        return efi::make_removable(guest, draft);
    }
    let platform = if wanted == BootMode::Uefi { &UEFI } else { &BIOS };
    match loader(guest, options, platform)? {
        Ok(loader) => loader.plan(guest, platform, draft),
        Err((why, remedy)) => {
            let what = format!("the copy cannot be made to boot by {}: {why}", name(wanted));
            draft.find("firmware.other", Severity::Fatal, &what, &remedy);
            Ok(())
        }
    }
}

fn name(firmware: BootMode) -> &'static str {
    match firmware {
        BootMode::Bios => "BIOS",
        BootMode::Uefi => "UEFI",
    }
}

/// Whether the disk has a boot loader for `firmware`, be it beside that for another one.
fn boots_by(guest: &Guest, firmware: BootMode) -> Result<bool> {
    if guest.boot == firmware {
        return Ok(true);
    }
    match firmware {
        BootMode::Uefi => match removable_loader(guest) {
            Some(loader) => guest.tree.exists(&loader),
            None => Ok(false),
        },
        // A disk with a GPT that boots by BIOS has a partition for that, or is one that boots by BIOS already.
        BootMode::Bios => Ok(guest
            .parts
            .as_ref()
            .is_some_and(|parts| parts.table.kind == layout::TableKind::Mbr && parts.boot_code)),
    }
}

/// A boot loader to be made.
struct Loader<'a> {
    /// The folder with the menu, such as /boot/grub.
    folder: &'a str,
    /// The file system it is in, and its path there.
    uuid: &'a str,
    inside: String,
    modules: Vec<String>,
    extent: Extent,
}

/// What can be made for `platform`; or why nothing can, and what to do.
fn loader<'a>(
    guest: &'a Guest,
    options: &Options,
    platform: &Platform,
) -> Result<std::result::Result<Loader<'a>, (String, String)>> {
    let no = |why: &str, remedy: &str| Ok(Err((why.to_owned(), remedy.to_owned())));
    if !matches!(guest.arch, "x86_64" | "i386") {
        return no("it is for another processor than x86-64", "leave --firmware out");
    }
    // It boots something itself, or the entries that have files of their own.
    let boots = |style| guest.menus.iter().any(|menu| menu.style == style && !menu.entries.is_empty());
    let menu = |folder: &&str| {
        let path = format!("{folder}/grub.cfg");
        guest.menus.iter().any(|menu| {
            menu.style == Style::Grub && menu.path == path && (!menu.entries.is_empty() || boots(Style::Bls))
        })
    };
    let Some(folder) = ["/boot/grub", "/boot/grub2"].into_iter().find(menu) else {
        return no("there is no menu of GRUB 2 in /boot", "haul does this for GRUB 2 alone");
    };
    let mut has_modules = options.packages.iter().any(|file| {
        Package::named(file).is_ok_and(|package| platform.packages.contains(&package.name.as_str()))
    });
    for from in MODULES {
        has_modules |= guest.tree.exists(&format!("{from}/{}/{INDEX}", platform.name))?;
    }
    if !has_modules {
        let why = format!("its GRUB has no modules for {}", platform.name);
        let [debian, _, red_hat, suse] = platform.packages;
        let remedy = format!(
            "give the guest's own package of them with --package: {debian} (Debian, Ubuntu), {red_hat} (Red Hat), {suse} (SUSE)"
        );
        return Ok(Err((why, remedy)));
    }
    let mounted = mount_of(&guest.mounts, |mounted| &mounted.point, folder);
    let Some((mounted, fs)) = mounted.and_then(|m| Some((m, guest.filesystems.get(m.filesystem)?))) else {
        return no("the file system of its menu was not found", "see what haul inspect says of the disk");
    };
    let mut modules: Vec<String> = ["part_msdos", "part_gpt", "search_fs_uuid"].map(str::to_owned).to_vec();
    modules.extend(platform.modules.iter().map(|module| (*module).to_owned()));
    modules.push(match fs.kind.as_str() {
        kind if kind.starts_with("ext") => "ext2".to_owned(),
        kind @ ("xfs" | "btrfs") => kind.to_owned(),
        kind => return no(&format!("its menu is on {kind}"), "haul does this for ext, XFS and btrfs"),
    });
    if fs.logical.is_some() {
        modules.push("lvm".into());
    }
    if fs.array.is_some() {
        modules.extend(["diskfilter", "mdraid09", "mdraid1x"].map(str::to_owned));
    }
    let Some(uuid) = fs.uuid.as_deref() else {
        return no("the file system of its menu has no UUID", "give it one");
    };
    let Some(Parts { table, size, .. }) = &guest.parts else {
        return no("the disk has no partitions", "haul does this for disks with partitions");
    };
    if platform.purpose == Purpose::BiosBoot && table.kind == layout::TableKind::Mbr {
        return no(
            "it has an MBR and no boot code in it",
            "install grub-pc in the source: grub-install DISK",
        );
    }
    let extent = match layout::room(table, *size, platform.size.0, platform.size.1) {
        Ok(extent) => extent,
        Err(why) => {
            let remedy = "make room on the disk or image, also at its end: a MiB is enough";
            return no(&format!("there is no room for the {}: {why}", platform.purpose.name()), remedy);
        }
    };
    let below = folder.strip_prefix(mounted.point.trim_end_matches('/')).unwrap_or(folder);
    let subvolume = mounted.options.strip_prefix("subvol=").unwrap_or_default().trim_end_matches('/');
    Ok(Ok(Loader { folder, uuid, inside: format!("{subvolume}{below}"), modules, extent }))
}

impl Loader<'_> {
    fn plan(self, guest: &Guest, platform: &Platform, draft: &mut Draft<'_>) -> Result<()> {
        let Extent { start, end } = self.extent;
        let reason = || format!("the copy is to boot by {}, too", name(platform.firmware));
        let core = format!("{}/{}/{}", self.folder, platform.name, platform.core);
        draft.push(Fix::Partition { start, end, purpose: platform.purpose, reason: reason() });
        draft.push(Fix::Grub {
            platform: platform.name.to_owned(),
            core: core.clone(),
            modules: self.modules,
            config: format!("search.fs_uuid {} root\nset prefix=($root){}\n", self.uuid, self.inside),
            reason: reason(),
        });
        match platform.purpose {
            Purpose::EfiSystem => {
                let (kind, point) = ("fat".to_owned(), ESP_POINT.to_owned());
                draft.mount(PlannedMount { start, end, kind, point, options: String::new() });
                draft.copy(&core, &format!("{ESP_POINT}/EFI/BOOT/BOOTX64.EFI"), "UEFI looks for it there");
                draft.find(
                    "firmware.unsigned",
                    Severity::Info,
                    "the boot loader that haul adds has no signature: it starts where Secure Boot is off",
                    "install the distribution's signed one in the new server, if it must",
                );
            }
            Purpose::BiosBoot => draft.push(Fix::BootSector { core, start, end, reason: reason() }),
        }
        for menu in guest.menus.iter().filter(|menu| menu.style == Style::Grub) {
            draft.edit_lines(&menu.path, "GRUB has this command for one firmware alone", |line| {
                let word = line.split_whitespace().next().unwrap_or_default();
                match COMMANDS.iter().find(|(from, _)| *from == word) {
                    Some((from, to)) => Line::Replace(line.replacen(from, to, 1)),
                    None => Line::Keep,
                }
            })?;
        }
        Ok(())
    }
}
