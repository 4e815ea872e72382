//! The kernels a guest may boot, and where each of them has its virtio drivers.

use serde::Serialize;

use super::initramfs;
use super::loader::{self, Menu};
use super::tree::{Node, Tree};
use crate::error::Result;

/// The modules without which a kernel on KVM cannot reach its disk.
pub const VIRTIO_BOOT: &str = include_str!("../../drivers/linux/virtio-boot.list");
/// More virtio modules, wanted in the initramfs where the kernel has them.
pub const VIRTIO_MORE: &str = include_str!("../../drivers/linux/virtio-more.list");
/// Most kernels looked at; /boot has no room for more.
const MAX_KERNELS: usize = 64;

/// What the initramfs of a kernel is called in /boot: what stands before the version, and behind it.
const INITRAMFS: [(&str, &str); 5] =
    [("initrd.img-", ""), ("initramfs-", ".img"), ("initrd-", ""), ("initrd-", ".img"), ("initramfs-", "")];

/// The names in a module list.
pub fn module_list(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines().filter_map(|line| line.split('#').next()?.split_whitespace().next())
}

/// One kernel that the guest may boot.
#[derive(Clone, Debug, Serialize)]
pub struct Kernel {
    /// Its release, such as `6.1.0-18-amd64`.
    pub version: String,
    /// The path of its image.
    pub image: String,
    /// The path of its initramfs, where there is one.
    pub initrd: Option<String>,
    /// Whether the boot loader's menu names it.
    pub in_menu: bool,
    /// Whether its modules are installed.
    pub has_modules: bool,
    /// Where each module of the lists in drivers/linux is.
    pub virtio: Vec<(&'static str, Place)>,
}

/// Where a kernel module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Built into the kernel.
    BuiltIn,
    /// In the initramfs.
    Initramfs,
    /// Installed on the root file system only.
    Installed,
    /// Nowhere: this kernel was built without it.
    Missing,
}

impl Kernel {
    /// The modules of drivers/linux/virtio-boot.list that are not there when the kernel looks for its root.
    pub fn lacking(&self) -> Vec<&'static str> {
        let needed: Vec<&str> = module_list(VIRTIO_BOOT).collect();
        let late = |(name, place): &(&'static str, Place)| {
            (needed.contains(name) && *place > Place::Initramfs).then_some(*name)
        };
        self.virtio.iter().filter_map(late).collect()
    }
}

/// The kernels in /boot and in the menus, by version. Those that only make a crash dump are left out.
pub fn kernels(tree: &Tree, menus: &[Menu]) -> Result<Vec<Kernel>> {
    let mut found: Vec<Kernel> = Vec::new();
    let mut add = |image: String, initrd: Option<String>, in_menu: bool| {
        let Some(version) = version(&image) else { return };
        let room = found.len() < MAX_KERNELS;
        match found.iter_mut().find(|kernel| kernel.version == version) {
            Some(kernel) => {
                kernel.in_menu |= in_menu;
                kernel.initrd = kernel.initrd.take().or(initrd);
            }
            None if room => found.push(Kernel {
                version: version.to_owned(),
                image,
                initrd,
                in_menu,
                has_modules: false,
                virtio: Vec::new(),
            }),
            None => {}
        }
    };
    for (menu, entry) in menus.iter().flat_map(|menu| menu.entries.iter().map(move |entry| (menu, entry))) {
        let Some(image) = loader::file(tree, menu, &entry.kernel)? else { continue };
        let initrd = match entry.initrds.last() {
            Some(written) => loader::file(tree, menu, written)?,
            None => None,
        };
        // A menu entry through a link (/vmlinuz) boots the version the link leads to.
        let image = tree.resolve(&image)?.unwrap_or(image);
        let initrd = match initrd {
            Some(initrd) => tree.resolve(&initrd)?,
            None => None,
        };
        add(image, initrd, true);
    }
    for name in tree.names("/boot")?.iter().filter(|name| version(name).is_some()) {
        add(format!("/boot/{name}"), None, false);
    }
    for kernel in &mut found {
        complete(tree, kernel)?;
    }
    found.retain(|kernel| kernel.in_menu || kernel.has_modules);
    found.sort_by(|a, b| a.version.cmp(&b.version));
    Ok(found)
}

/// Finds a kernel's modules and initramfs, and looks into them.
fn complete(tree: &Tree, kernel: &mut Kernel) -> Result<()> {
    if kernel.initrd.is_none() {
        for (before, after) in INITRAMFS {
            let usual = format!("/boot/{before}{}{after}", kernel.version);
            if matches!(tree.node(&usual)?, Some(Node::File(_))) {
                kernel.initrd = Some(usual);
                break;
            }
        }
    }
    if !tree.exists(&format!("/lib/modules/{}", kernel.version))?
        && let Some(release) = release_of(tree, &kernel.version)?
    {
        kernel.version = release;
    }
    let version = &kernel.version;
    let folder = format!("/lib/modules/{version}");
    kernel.has_modules = tree.exists(&format!("{folder}/modules.dep"))?;
    let names = |text: Option<String>| -> Vec<String> {
        let text = text.unwrap_or_default();
        text.lines().filter_map(|line| initramfs::module_name(line.split(':').next()?)).collect()
    };
    let built_in = names(tree.text(&format!("{folder}/modules.builtin"))?);
    let installed = names(tree.text(&format!("{folder}/modules.dep"))?);
    let config = tree.text(&format!("/boot/config-{version}"))?.unwrap_or_default();
    let packed = match &kernel.initrd {
        Some(path) => match tree.open(path)? {
            Some(stream) => initramfs::read(stream, path)?,
            None => initramfs::Contents::default(),
        },
        None => initramfs::Contents::default(),
    };
    let place = |name: &'static str| {
        let set_in = format!("{}=y", option_of(name));
        if built_in.iter().any(|built| built == name) || config.lines().any(|line| line == set_in) {
            Place::BuiltIn
        } else if packed.modules.contains(name) {
            Place::Initramfs
        } else if installed.iter().any(|installed| installed == name) {
            Place::Installed
        } else {
            Place::Missing
        }
    };
    let all = module_list(VIRTIO_BOOT).chain(module_list(VIRTIO_MORE));
    kernel.virtio = all.map(|name| (name, place(name))).collect();
    Ok(())
}

/// The kernel's configuration symbol that builds a module.
fn option_of(module: &str) -> String {
    match module {
        "virtio_ring" => "CONFIG_VIRTIO".into(),
        "virtio_scsi" => "CONFIG_SCSI_VIRTIO".into(),
        other => format!("CONFIG_{}", other.to_uppercase()),
    }
}

/// The version in the name of a kernel's image; `None` for any other file, and for a crash kernel.
fn version(image: &str) -> Option<&str> {
    let name = image.rsplit('/').next()?;
    let version =
        ["vmlinuz-", "vmlinux-", "kernel-", "Image-"].iter().find_map(|start| name.strip_prefix(start))?;
    let compressed = [".gz", ".bz2", ".xz", ".zst"].iter().any(|end| version.ends_with(end));
    (!version.is_empty() && !compressed && !version.contains("kdump")).then_some(version)
}

/// The release of a kernel whose image is called by its package (`vmlinuz-linux`), as Arch does.
fn release_of(tree: &Tree, package: &str) -> Result<Option<String>> {
    for release in tree.names("/lib/modules")? {
        let base = tree.text(&format!("/lib/modules/{release}/pkgbase"))?;
        if base.is_some_and(|base| base.trim() == package) {
            return Ok(Some(release));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_hold_names_only() {
        assert_eq!(
            module_list(VIRTIO_BOOT).collect::<Vec<_>>(),
            ["virtio", "virtio_ring", "virtio_pci", "virtio_blk"]
        );
        assert!(module_list(VIRTIO_MORE).any(|name| name == "virtio_net"));
    }

    #[test]
    fn a_kernel_is_known_by_the_name_of_its_image() {
        assert_eq!(version("/boot/vmlinuz-6.1.0-18-amd64"), Some("6.1.0-18-amd64"));
        assert_eq!(version("vmlinuz-0-rescue-0123"), Some("0-rescue-0123"));
        for other in
            ["vmlinuz", "vmlinux-5.3.18-default.gz", "vmlinuz-4.18.0kdump", "initrd.img-6.1", "kernel-"]
        {
            assert_eq!(version(other), None, "{other}");
        }
    }
}
