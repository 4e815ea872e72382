//! virtio in the initramfs of every kernel the guest may boot.

use crate::error::Result;
use crate::guest::inspect::{Guest, Kernel, Place, VIRTIO_BOOT, module_list};
use crate::guest::plan::{Draft, Line, Severity};

const CONFIG: &str = "/etc/initramfs-tools/initramfs.conf";
const MODULES: &str = "/etc/initramfs-tools/modules";

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
    let mut rebuild: Vec<(&Kernel, &str)> = Vec::new();
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
            Some(image) => rebuild.push((kernel, image)),
            None => draft.warn(
                "kernel.no-initramfs",
                &format!("kernel {version} has no initramfs, and {} only as modules", lacking.join(", ")),
                "make one in the source: update-initramfs -c -k VERSION",
            ),
        }
    }
    if rebuild.is_empty() {
        return Ok(());
    }
    if !draft.tree().exists("/usr/sbin/mkinitramfs")? {
        let what = "initramfs-tools is not installed: haul cannot put virtio into the initramfs";
        draft.find("initramfs.no-tool", Severity::Fatal, what, "install initramfs-tools in the source");
        return Ok(());
    }
    configure(&rebuild, draft)?;
    for (kernel, image) in rebuild {
        let modules: Vec<String> = wanted(kernel).map(str::to_owned).collect();
        let reason =
            format!("the initramfs of kernel {} lacks {}", kernel.version, kernel.lacking().join(", "));
        draft.initramfs(&kernel.version, image, modules, &reason);
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

/// Tells initramfs-tools, now and for later kernels, to take virtio in.
fn configure(rebuild: &[(&Kernel, &str)], draft: &mut Draft<'_>) -> Result<()> {
    let mut paths = vec![CONFIG.to_owned()];
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
    let mut text = draft.text(MODULES)?.unwrap_or_default();
    let listed: Vec<String> = text
        .lines()
        .filter_map(|line| line.split('#').next()?.split_whitespace().next())
        .map(|name| name.replace('-', "_"))
        .collect();
    let mut names: Vec<&str> = rebuild.iter().flat_map(|(kernel, _)| wanted(kernel)).collect();
    let order: Vec<&str> = module_list(VIRTIO_BOOT).collect();
    names.sort_by_key(|name| (order.iter().position(|boot| boot == name).unwrap_or(order.len()), *name));
    names.dedup();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for name in names.iter().filter(|name| !listed.iter().any(|listed| listed == *name)) {
        text.push_str(name);
        text.push('\n');
    }
    draft.write(MODULES, &text, 0o644, "virtio in every initramfs, also of kernels to come")
}
