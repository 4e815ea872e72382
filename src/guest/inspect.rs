//! What a guest is: its system, kernels, boot files, disks by name, identity. Facts only; judging them is the plan's.

use std::io::Read;
use std::sync::Arc;

use serde::Serialize;

use super::disk::{self, BootMode, FileSystem, Mounted, Parts};
use super::kernels::{Kernel, kernels};
use super::loader::{self, Menu};
use super::os::{self, Os};
use super::tree::{Tree, mount_of};
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;

/// A guest, as far as its disk tells.
#[derive(Serialize)]
pub struct Guest {
    /// Its files.
    #[serde(skip)]
    pub tree: Tree,
    /// The file systems and swap spaces on the disk.
    pub filesystems: Vec<FileSystem>,
    /// What its tree is put together from, the root first.
    pub mounts: Vec<Mounted>,
    /// Why files that were read may be older than what was committed.
    pub stale: Vec<String>,
    /// File systems that cannot be read, and why.
    pub unread: Vec<String>,
    /// How the disk boots.
    pub boot: BootMode,
    /// The table of its partitions.
    #[serde(skip)]
    pub parts: Option<Parts>,
    /// The operating system.
    pub os: Os,
    /// The machine it is built for: `x86_64`, `i386`, `aarch64`, or `unknown`.
    pub arch: &'static str,
    /// The menus of its boot loaders.
    pub menus: Vec<Menu>,
    /// The kernels in /boot and in the menus, by version.
    pub kernels: Vec<Kernel>,
    /// The host name in /etc/hostname.
    pub hostname: Option<String>,
    /// The machine's identity in /etc/machine-id.
    pub machine_id: Option<String>,
    /// cloud-init, where installed.
    pub cloud_init: Option<CloudInit>,
    /// What configures the network: `ifupdown`, `netplan`, `systemd-networkd`, `ifcfg` (Red Hat's), `wicked` (SUSE's
    /// ifcfg, whatever reads it), `NetworkManager`.
    pub network: Vec<&'static str>,
}

/// The file that switches cloud-init off.
pub const CLOUD_INIT_OFF: &str = "/etc/cloud/cloud-init.disabled";

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

impl Guest {
    /// Where its EFI system partition is mounted, or shown.
    pub fn esp(&self) -> Option<&str> {
        self.filesystems.iter().find(|fs| fs.esp).and_then(|fs| fs.point.as_deref())
    }

    /// Whether the file at `path`, no link on the way, lies in a FAT file system.
    pub fn is_on_fat(&self, path: &str) -> bool {
        let mounted = mount_of(&self.mounts, |mounted| &mounted.point, path);
        mounted.and_then(|mounted| self.filesystems.get(mounted.filesystem)).is_some_and(FileSystem::is_fat)
    }
}

/// Inspects the guest on `disk`, without mounting anything.
pub fn inspect(disk: Arc<dyn ReadAt>) -> Result<Guest> {
    let parts = disk::parts(&disk)?;
    let opened = disk::open(disk)?;
    let guest = from_tree(opened.tree, opened.filesystems, opened.boot)?;
    Ok(Guest { parts, mounts: opened.mounts, stale: opened.stale, unread: opened.unread, ..guest })
}

/// The machine that the guest on `disk` is for, as [`Guest::arch`]: far less is read than for all of it.
pub fn arch_on(disk: Arc<dyn ReadAt>) -> Result<&'static str> {
    arch(&disk::open(disk)?.tree)
}

/// Inspects a guest whose files are already at hand.
pub fn from_tree(tree: Tree, filesystems: Vec<FileSystem>, boot: BootMode) -> Result<Guest> {
    let menus = loader::menus(&tree)?;
    let mounted = |(filesystem, fs): (usize, &FileSystem)| {
        Some(Mounted { point: fs.point.clone()?, filesystem, options: String::new() })
    };
    Ok(Guest {
        os: os::detect(&tree)?,
        arch: arch(&tree)?,
        kernels: kernels(&tree, &menus)?,
        menus,
        hostname: hostname(&tree)?,
        machine_id: first_line(&tree, "/etc/machine-id")?,
        cloud_init: cloud_init(&tree)?,
        network: network(&tree)?,
        tree,
        mounts: filesystems.iter().enumerate().filter_map(mounted).collect(),
        stale: Vec::new(),
        unread: Vec::new(),
        filesystems,
        boot,
        parts: None,
    })
}

fn first_line(tree: &Tree, path: &str) -> Result<Option<String>> {
    let text = tree.text(path)?.unwrap_or_default();
    Ok(text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned))
}

/// hostname(5), or where it was kept before: SUSE's /etc/HOSTNAME, Red Hat's /etc/sysconfig/network.
fn hostname(tree: &Tree) -> Result<Option<String>> {
    for path in ["/etc/hostname", "/etc/HOSTNAME"] {
        if let Some(name) = first_line(tree, path)? {
            return Ok(Some(name));
        }
    }
    let text = tree.text("/etc/sysconfig/network")?.unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("HOSTNAME="));
    Ok(name.map(|name| name.trim().trim_matches('"').to_owned()))
}

/// What /etc/selinux/config says of SELinux: `enforcing`, `permissive` or `disabled`.
pub fn selinux(tree: &Tree) -> Result<Option<String>> {
    let config = tree.text("/etc/selinux/config")?.unwrap_or_default();
    Ok(config
        .lines()
        .find_map(|line| line.trim().strip_prefix("SELINUX="))
        .map(|mode| mode.trim().to_owned()))
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

fn cloud_init(tree: &Tree) -> Result<Option<CloudInit>> {
    if !tree.exists("/usr/bin/cloud-init")? {
        return Ok(None);
    }
    let mut text = String::new();
    for python in tree.names("/usr/lib")?.iter().filter(|name| name.starts_with("python")) {
        for packages in ["dist-packages", "site-packages"] {
            let path = format!("/usr/lib/{python}/{packages}/cloudinit/version.py");
            text = tree.text(&path)?.unwrap_or(text);
        }
    }
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
        disabled: tree.exists(CLOUD_INIT_OFF)?,
    }))
}

/// cloud-init's configuration files in the order it reads them.
pub fn cloud_configs(tree: &Tree) -> Result<Vec<String>> {
    let mut paths = vec!["/etc/cloud/cloud.cfg".to_owned()];
    paths.extend(tree.files("/etc/cloud/cloud.cfg.d", ".cfg")?);
    Ok(paths)
}

/// Where Red Hat's and SUSE's network scripts have a file for each card.
pub const IFCFG: [(&str, &str); 2] =
    [("/etc/sysconfig/network-scripts", "ifcfg"), ("/etc/sysconfig/network", "wicked")];

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
    for (folder, name) in IFCFG {
        if tree.names(folder)?.iter().any(|file| file.starts_with("ifcfg-") && file != "ifcfg-lo") {
            managers.push(name);
        }
    }
    if tree.exists("/usr/sbin/NetworkManager")? {
        managers.push("NetworkManager");
    }
    Ok(managers)
}
