//! virtio in the initramfs of every kernel the guest may boot.

use std::collections::BTreeSet;

use super::builder;
use crate::error::Result;
use crate::guest::builder::Builder;
use crate::guest::inspect::Guest;
use crate::guest::kernels::{Kernel, Place, VIRTIO_BOOT, module_list};
use crate::guest::plan::{Draft, Severity};

/// Plans a new initramfs for each kernel that lacks virtio in the one it has.
pub fn fix(guest: &Guest, draft: &mut Draft<'_>) -> Result<()> {
    if guest.kernels.is_empty() {
        let what = "no kernel was found in /boot or in the boot loader's menu";
        draft.find(
            "kernel.none",
            Severity::Fatal,
            what,
            "install a kernel of the distribution in the source",
        );
    }
    let mut rebuild: Vec<(&Kernel, &str, Builder)> = Vec::new();
    for kernel in &guest.kernels {
        let lacking = kernel.lacking();
        let version = &kernel.version;
        if lacking.is_empty() {
            continue;
        }
        let missing =
            kernel.virtio.iter().any(|(name, place)| *place == Place::Missing && lacking.contains(name));
        if missing || !kernel.has_modules {
            let what = format!("kernel {version} has no {}", lacking.join(", "));
            draft.find(
                "kernel.no-virtio",
                if guest.kernels.len() == 1 { Severity::Fatal } else { Severity::Warning },
                &what,
                "do not boot it in the cloud: install a kernel of the distribution",
            );
            continue;
        }
        match &kernel.initrd {
            Some(image) if guest.is_on_fat(image) => draft.find(
                "initramfs.on-fat",
                Severity::Fatal,
                &format!("{image} lies in a FAT file system, where haul cannot replace it yet"),
                "put virtio into it in the source, by a setting of what builds it",
            ),
            Some(image) => match Builder::find(draft.tree(), image)? {
                Some(builder) => rebuild.push((kernel, image, builder)),
                None => draft.find(
                    "initramfs.no-tool",
                    Severity::Fatal,
                    "nothing that builds an initramfs is installed: haul cannot put virtio into it",
                    "install initramfs-tools or dracut in the source",
                ),
            },
            None => draft.warn(
                "kernel.no-initramfs",
                &format!("kernel {version} has no initramfs, and {} only as modules", lacking.join(", ")),
                "make one in the source: update-initramfs -c -k VERSION",
            ),
        }
    }
    for builder in rebuild.iter().map(|(_, _, builder)| *builder).collect::<BTreeSet<_>>() {
        let kernels = rebuild.iter().filter(|(_, _, used)| *used == builder).map(|(kernel, _, _)| *kernel);
        builder::configure(builder, &union(kernels), draft)?;
    }
    for (kernel, image, builder) in rebuild {
        let modules: Vec<String> = wanted(kernel).map(str::to_owned).collect();
        let reason =
            format!("the initramfs of kernel {} lacks {}", kernel.version, kernel.lacking().join(", "));
        draft.initramfs(&kernel.version, image, builder, modules, &reason);
    }
    Ok(())
}

/// The modules a kernel's initramfs should hold: all it has that are not built in.
fn wanted(kernel: &Kernel) -> impl Iterator<Item = &'static str> + '_ {
    kernel
        .virtio
        .iter()
        .filter_map(|(name, place)| matches!(place, Place::Initramfs | Place::Installed).then_some(*name))
}

/// The modules that any of `kernels` should have, those first that others depend on.
fn union<'a>(kernels: impl Iterator<Item = &'a Kernel>) -> Vec<&'static str> {
    let mut names: Vec<&str> = kernels.flat_map(wanted).collect();
    let order: Vec<&str> = module_list(VIRTIO_BOOT).collect();
    names.sort_by_key(|name| (order.iter().position(|boot| boot == name).unwrap_or(order.len()), *name));
    names.dedup();
    names
}
