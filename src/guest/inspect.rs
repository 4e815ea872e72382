//! What a guest is: its system, kernels, boot files, disks by name, identity. Facts only; judging them is the plan's.

use std::io::Read;
use std::sync::Arc;

use serde::Serialize;

use super::disk::{self, BootMode, FileSystem};
use super::initramfs;
use super::tree::{Node, Tree};
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;

/// The modules without which a kernel on KVM cannot reach its disk.
pub const VIRTIO_BOOT: &str = include_str!("../../drivers/linux/virtio-boot.list");
/// More virtio modules, wanted in the initramfs where the kernel has them.
pub const VIRTIO_MORE: &str = include_str!("../../drivers/linux/virtio-more.list");
/// Most kernels looked at; /boot has no room for more.
const MAX_KERNELS: usize = 64;

/// The names in a module list.
pub fn module_list(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines().filter_map(|line| line.split('#').next()?.split_whitespace().next())
}

/// A guest, as far as its disk tells.
#[derive(Serialize)]
pub struct Guest {
    /// Its files.
    #[serde(skip)]
    pub tree: Tree,
    /// The file systems and swap spaces on the disk.
    pub filesystems: Vec<FileSystem>,
    /// How the disk boots.
    pub boot: BootMode,
    /// The operating system.
    pub os: Os,
    /// The machine it is built for: `x86_64`, `i386`, `aarch64`, or `unknown`.
    pub arch: &'static str,
    /// The kernels in /boot and in the boot loader's menu, by version.
    pub kernels: Vec<Kernel>,
    /// The host name in /etc/hostname.
    pub hostname: Option<String>,
    /// The machine's identity in /etc/machine-id.
    pub machine_id: Option<String>,
    /// cloud-init, where installed.
    pub cloud_init: Option<CloudInit>,
    /// What configures the network: `ifupdown`, `netplan`, `systemd-networkd`, `NetworkManager`.
    pub network: Vec<&'static str>,
}

/// /etc/os-release (os-release(5)).
#[derive(Clone, Debug, Default, Serialize)]
pub struct Os {
    /// `ID`, such as `debian`.
    pub id: String,
    /// `VERSION_ID`, such as `12`.
    pub version: String,
    /// `PRETTY_NAME`.
    pub name: String,
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

/// cloud-init as installed.
#[derive(Clone, Debug, Serialize)]
pub struct CloudInit {
    /// Its version, `unknown` when it does not say.
    pub version: String,
    /// The last `datasource_list` of its configuration.
    pub datasources: Option<String>,
    /// Whether it was switched off by /etc/cloud/cloud-init.disabled.
    pub disabled: bool,
}

/// An entry of the boot loader's menu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MenuEntry {
    /// The kernel's path as written.
    pub kernel: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The initramfs files' paths as written.
    pub initrds: Vec<String>,
}

/// Where GRUB 2 keeps its menu on Debian and Ubuntu.
pub const GRUB_CFG: &str = "/boot/grub/grub.cfg";

/// Inspects the guest on `disk`, without mounting anything.
pub fn inspect(disk: Arc<dyn ReadAt>) -> Result<Guest> {
    let opened = disk::open(disk)?;
    from_tree(opened.tree, opened.filesystems, opened.boot)
}

/// Inspects a guest whose files are already at hand.
pub fn from_tree(tree: Tree, filesystems: Vec<FileSystem>, boot: BootMode) -> Result<Guest> {
    Ok(Guest {
        os: os(&tree)?,
        arch: arch(&tree)?,
        kernels: kernels(&tree)?,
        hostname: first_line(&tree, "/etc/hostname")?,
        machine_id: first_line(&tree, "/etc/machine-id")?,
        cloud_init: cloud_init(&tree)?,
        network: network(&tree)?,
        tree,
        filesystems,
        boot,
    })
}

fn first_line(tree: &Tree, path: &str) -> Result<Option<String>> {
    let text = tree.text(path)?.unwrap_or_default();
    Ok(text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned))
}

fn os(tree: &Tree) -> Result<Os> {
    let text = match tree.text("/etc/os-release")? {
        Some(text) => text,
        None => tree.text("/usr/lib/os-release")?.unwrap_or_default(),
    };
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.map(|value| value.trim().trim_matches(['"', '\'']).to_owned()).unwrap_or_default()
    };
    Ok(Os { id: value("ID"), version: value("VERSION_ID"), name: value("PRETTY_NAME") })
}

/// By the header of a program every system has (ELF, `e_machine`).
fn arch(tree: &Tree) -> Result<&'static str> {
    for program in ["/bin/sh", "/usr/bin/env", "/sbin/init"] {
        let Some(stream) = tree.open(program)? else { continue };
        let mut head = Vec::new();
        stream.take(20).read_to_end(&mut head).map_err(|error| {
            Error::new(Kind::Image, "guest.read", format!("cannot read the guest's {program}"))
                .caused_by(error)
        })?;
        if let [0x7f, b'E', b'L', b'F', .., low, high] = head[..]
            && head.len() == 20
        {
            return Ok(match u16::from_le_bytes([low, high]) {
                62 => "x86_64",
                3 => "i386",
                183 => "aarch64",
                _ => "unknown",
            });
        }
    }
    Ok("unknown")
}

/// The entries of a GRUB 2 menu that boot Linux, in order; what the text computes is not evaluated.
pub fn parse_menu(text: &str) -> Vec<MenuEntry> {
    let mut entries: Vec<MenuEntry> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("linux" | "linux16" | "linuxefi") => {
                let Some(kernel) = words.next() else { continue };
                entries.push(MenuEntry {
                    kernel: kernel.trim_matches(['"', '\'']).to_owned(),
                    arguments: words.map(str::to_owned).collect(),
                    initrds: Vec::new(),
                });
            }
            Some("initrd" | "initrd16" | "initrdefi") => {
                if let Some(entry) = entries.last_mut() {
                    entry.initrds.extend(words.map(|word| word.trim_matches(['"', '\'']).to_owned()));
                }
            }
            _ => {}
        }
    }
    entries
}

/// The guest's path of a file the menu names: GRUB counts from the file system that holds /boot.
pub fn menu_path(tree: &Tree, written: &str) -> Result<Option<String>> {
    // `(hd0,1)/vmlinuz` and `($root)/vmlinuz`: the device in front says which file system, and /boot's is meant.
    let path = match written.split_once(')') {
        Some((device, path)) if device.starts_with('(') => path,
        _ => written,
    };
    let candidates = match tree.is_mount_point("/boot") {
        true => [format!("/boot{path}"), path.to_owned()],
        false => [path.to_owned(), format!("/boot{path}")],
    };
    for candidate in candidates.iter().filter(|candidate| candidate.starts_with('/')) {
        if matches!(tree.node(candidate)?, Some(Node::File(_))) {
            return Ok(Some(candidate.clone()));
        }
    }
    Ok(None)
}

fn kernels(tree: &Tree) -> Result<Vec<Kernel>> {
    let menu = parse_menu(&tree.text(GRUB_CFG)?.unwrap_or_default());
    let mut found: Vec<Kernel> = Vec::new();
    let mut add = |image: String, initrd: Option<String>, in_menu: bool| {
        let Some((_, version)) = image.rsplit_once("vmlinuz-") else { return };
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
    for entry in &menu {
        let Some(image) = menu_path(tree, &entry.kernel)? else { continue };
        let initrd = match entry.initrds.last() {
            Some(written) => menu_path(tree, written)?,
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
    for name in tree.names("/boot")?.iter().filter(|name| name.starts_with("vmlinuz-")) {
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
    let version = &kernel.version;
    if kernel.initrd.is_none() {
        let usual = format!("/boot/initrd.img-{version}");
        kernel.initrd = matches!(tree.node(&usual)?, Some(Node::File(_))).then_some(usual);
    }
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

fn cloud_init(tree: &Tree) -> Result<Option<CloudInit>> {
    if !tree.exists("/usr/bin/cloud-init")? {
        return Ok(None);
    }
    let text = tree.text("/usr/lib/python3/dist-packages/cloudinit/version.py")?.unwrap_or_default();
    let quoted = |line: &str| line.split(['"', '\'']).nth(1).map(str::to_owned);
    let version = ["_PACKAGED_VERSION =", "__VERSION__ ="].iter().find_map(|key| {
        let value = text.lines().find(|line| line.starts_with(key)).and_then(quoted)?;
        // The source says `@@PACKAGED_VERSION@@` where the package did not fill it in.
        value.starts_with(|c: char| c.is_ascii_digit()).then_some(value)
    });
    let mut datasources = None;
    for path in cloud_configs(tree)? {
        let text = tree.text(&path)?.unwrap_or_default();
        if let Some(list) = text.lines().find_map(|line| line.strip_prefix("datasource_list:")) {
            datasources = Some(list.trim().to_owned());
        }
    }
    Ok(Some(CloudInit {
        version: version.unwrap_or_else(|| "unknown".into()),
        datasources,
        disabled: tree.exists("/etc/cloud/cloud-init.disabled")?,
    }))
}

/// cloud-init's configuration files in the order it reads them.
pub fn cloud_configs(tree: &Tree) -> Result<Vec<String>> {
    let mut paths = vec!["/etc/cloud/cloud.cfg".to_owned()];
    paths.extend(tree.files("/etc/cloud/cloud.cfg.d", ".cfg")?);
    Ok(paths)
}

fn network(tree: &Tree) -> Result<Vec<&'static str>> {
    let mut managers = Vec::new();
    if tree.exists("/etc/network/interfaces")? && tree.exists("/sbin/ifup")? {
        managers.push("ifupdown");
    }
    if !tree.files("/etc/netplan", ".yaml")?.is_empty() {
        managers.push("netplan");
    }
    if !tree.files("/etc/systemd/network", ".network")?.is_empty() {
        managers.push("systemd-networkd");
    }
    if tree.exists("/usr/sbin/NetworkManager")? {
        managers.push("NetworkManager");
    }
    Ok(managers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_menu_is_read_with_its_arguments_and_initramfs() {
        let text = "menuentry 'Debian' {\n\tlinux\t/vmlinuz-6.1 root=/dev/sda1 ro\n\tinitrd /ucode /initrd.img-6.1\n}\n\
                    # linux /commented\nlinux16 /memtest\n";
        let menu = parse_menu(text);
        assert_eq!(menu.len(), 2);
        assert_eq!(menu[0].arguments, ["root=/dev/sda1", "ro"]);
        assert_eq!(menu[0].initrds.last().unwrap(), "/initrd.img-6.1");
        assert_eq!(menu[1].kernel, "/memtest");
    }

    #[test]
    fn the_lists_hold_names_only() {
        assert_eq!(
            module_list(VIRTIO_BOOT).collect::<Vec<_>>(),
            ["virtio", "virtio_ring", "virtio_pci", "virtio_blk"]
        );
        assert!(module_list(VIRTIO_MORE).any(|name| name == "virtio_net"));
    }
}
