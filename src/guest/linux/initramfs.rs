//! virtio in the initramfs of every kernel the guest may boot.

use std::collections::BTreeSet;

use super::builder;
use crate::error::Result;
use crate::guest::builder::Builder;
use crate::guest::inspect::Guest;
use crate::guest::kernels::{Kernel, Place, VIRTIO_BOOT, module_list};
use crate::guest::plan::{Draft, Severity};
use crate::guest::{hook, initramfs};

/// Plans a new initramfs for each kernel that lacks virtio in the one it has; or an addition to the one it has, where no
/// program of the guest can build one, or `append` says that none may.
pub fn fix(guest: &Guest, append: bool, draft: &mut Draft<'_>) -> Result<()> {
    if guest.kernels.is_empty() {
        let what = "no kernel was found in /boot or in the boot loader's menu";
        draft.find(
            "kernel.none",
            Severity::Fatal,
            what,
            "install a kernel of the distribution in the source",
        );
    }
    let mut rebuild: Vec<(&Kernel, &str, Option<Builder>)> = Vec::new();
    let mut builders = BTreeSet::new();
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
            Some(image) => {
                let builder = Builder::find(draft.tree(), image)?;
                // A program of the guest's writes to file systems that are mounted; FAT is written by haul.
                let used = builder.filter(|_| !append && !guest.is_on_fat(image));
                if used.is_some() {
                    builders.extend(builder);
                    rebuild.push((kernel, image, used));
                } else if let Some(why) = hindrance(guest, image)? {
                    draft.find(
                        "initramfs.no-tool",
                        Severity::Fatal,
                        &format!("nothing can put virtio into {image}: {why}"),
                        "put virtio into it in the source, by what builds it",
                    );
                } else {
                    builders.extend(builder);
                    rebuild.push((kernel, image, None));
                    if builder.is_none() {
                        draft.warn(
                            "initramfs.appended",
                            &format!(
                                "nothing that builds an initramfs is installed: haul appends to {image}"
                            ),
                            "give an initramfs that is made later the same modules",
                        );
                    }
                }
            }
            None => draft.warn(
                "kernel.no-initramfs",
                &format!("kernel {version} has no initramfs, and {} only as modules", lacking.join(", ")),
                "make one in the source: update-initramfs -c -k VERSION",
            ),
        }
    }
    for builder in builders {
        builder::configure(builder, &union(rebuild.iter().map(|(kernel, _, _)| *kernel)), draft)?;
    }
    for (kernel, image, builder) in rebuild {
        let modules: Vec<String> = wanted(kernel).map(str::to_owned).collect();
        let reason =
            format!("the initramfs of kernel {} lacks {}", kernel.version, kernel.lacking().join(", "));
        draft.initramfs(&kernel.version, image, builder, modules, &reason);
    }
    Ok(())
}

/// Why nothing can be appended to the initramfs `image`.
fn hindrance(guest: &Guest, image: &str) -> Result<Option<&'static str>> {
    let found = match guest.tree.open(image)? {
        Some(stream) => initramfs::read(stream, image)?,
        None => initramfs::Contents::default(),
    };
    Ok(hook::hindrance(&found))
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
