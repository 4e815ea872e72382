//! Judges an object as the cloud's importer does, with other people's tools only: qemu-img, sfdisk, blkid, debugfs,
//! lsinitramfs. None of haul's own parsers has a say here.

use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::host::child::{self, Finished};
use crate::host::programs::{Program, Programs};
use crate::unit::GIB;

/// Largest system disk, actual and virtual, in bytes.
pub const SIZE_LIMIT: u64 = 500 * GIB;
/// Largest initramfs looked into, in bytes.
const INITRAMFS_LIMIT: u64 = 1 << 30;
/// For tools that look at tables only.
const LOOK: Duration = Duration::from_secs(60);
/// For tools that read the whole image.
const READ: Duration = Duration::from_secs(3600);

const fn tool(name: &'static str, version: &'static str, package: &'static str) -> Program {
    Program {
        name,
        elsewhere: &[],
        version,
        purpose: "judge imported images",
        debian: package,
        rhel: package,
    }
}

const QEMU_IMG: Program = tool("qemu-img", "--version", "qemu-utils");
const SFDISK: Program = tool("sfdisk", "--version", "fdisk");
const BLKID: Program = tool("blkid", "--version", "util-linux");
const DEBUGFS: Program = tool("debugfs", "-V", "e2fsprogs");
const LSINITRAMFS: Program = tool("lsinitramfs", "-h", "initramfs-tools-core");

/// What the account is told of a failed import.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The link is no COS link of this region, has run out, or was used before.
    InvalidUrl,
    /// Not raw, qcow2, vhd or vmdk, or too large.
    InvalidFormatSize,
    /// The guest cannot see virtio hardware.
    VirtioNotInstall,
    /// There is no partition table.
    PartitionNotPresent,
    /// No partition holds a root file system.
    RootPartitionNotFound,
    /// There is no cloud-init, and the import was not forced.
    CloudInitNotInstalled,
    /// Anything else; here, that the image does not boot.
    InternalError,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Why an import failed. The reason is the lab's own: the real cloud gives the code only.
#[derive(Debug)]
pub struct Verdict {
    /// The documented code.
    pub code: Code,
    /// What was seen.
    pub why: String,
}

impl Verdict {
    /// A verdict and what it rests on.
    pub fn new(code: Code, why: impl Into<String>) -> Self {
        Verdict { code, why: why.into() }
    }
}

impl From<Error> for Verdict {
    /// A tool that cannot be run says nothing about the image.
    fn from(error: Error) -> Self {
        Verdict::new(Code::InternalError, error.to_string())
    }
}

/// What the importer insists on.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Import without cloud-init.
    pub force: bool,
    /// Take qcow2 with incompatible features (zstd, extended L2), which older importers cannot read.
    pub new_qcow2: bool,
    /// Take a GPT: the private edition wants an MBR.
    pub gpt: bool,
}

/// An image that passed, still to be booted.
#[derive(Debug)]
pub struct Passed {
    /// The disk as a sparse raw file.
    pub raw: PathBuf,
    /// Its size in bytes.
    pub size: u64,
}

/// The tools, and the folder they work in.
pub struct Judge<'a> {
    programs: &'a Programs,
    folder: &'a Path,
}

/// Finds every tool, so that a missing one is named when the lab starts and not when an import fails.
pub fn find_tools(programs: &Programs) -> Result<()> {
    [QEMU_IMG, SFDISK, BLKID, DEBUGFS, LSINITRAMFS].iter().try_for_each(|tool| programs.find(tool).map(drop))
}

impl<'a> Judge<'a> {
    /// A judge that works in `folder`, where the object is the file `object`.
    pub fn new(programs: &'a Programs, folder: &'a Path) -> Self {
        Judge { programs, folder }
    }

    /// Judges the object; what passes is left as `disk.raw`.
    pub fn judge(&self, rules: Rules) -> std::result::Result<Passed, Verdict> {
        let size = self.format(rules)?;
        let raw = self.folder.join("disk.raw");
        self.run(&QEMU_IMG, &["convert", "-O", "raw", "object", "disk.raw"], READ)?
            .success()
            .map_err(|error| Verdict::new(Code::InvalidFormatSize, error.why()))?;
        let partitions = self.partitions(rules)?;
        let root = self.root(&partitions)?;
        // Without an ext file system to look into, only the boot can tell.
        if let Some(root) = root {
            self.virtio(&root, &partitions)?;
            let cloud_init = ["/usr/bin/cloud-init", "/etc/cloud/cloud.cfg"];
            if !rules.force && !self.any_exists(&root, &cloud_init)? {
                return Err(Verdict::new(Code::CloudInitNotInstalled, "there is no /usr/bin/cloud-init"));
            }
        }
        Ok(Passed { raw, size })
    }

    /// The virtual size of a format that is imported here.
    fn format(&self, rules: Rules) -> std::result::Result<u64, Verdict> {
        let refused = |why: String| Verdict::new(Code::InvalidFormatSize, why);
        if self.is_text_vmdk()? {
            return Err(refused("a vmdk descriptor may name any file of this machine".into()));
        }
        let info = self.run(&QEMU_IMG, &["info", "--output=json", "object"], LOOK)?;
        let info = info.success().map_err(|error| refused(error.why()))?;
        let info: Value = serde_json::from_slice(&info.stdout).map_err(|error| refused(error.to_string()))?;
        let format = info["format"].as_str().unwrap_or_default();
        let data = &info["format-specific"]["data"];
        if !matches!(format, "raw" | "qcow2" | "vpc" | "vmdk") {
            return Err(refused(format!("the format is {format}")));
        }
        if info.get("backing-filename").is_some() || !data["data-file"].is_null() {
            return Err(refused("the image refers to another file".into()));
        }
        if !rules.new_qcow2 && (data["compression-type"] == "zstd" || data["extended-l2"] == true) {
            return Err(refused(
                "the qcow2 has features this importer does not know (zstd, extended L2)".into(),
            ));
        }
        let size = info["virtual-size"].as_u64().unwrap_or(u64::MAX);
        let actual = info["actual-size"].as_u64().unwrap_or(u64::MAX);
        if size == 0 || size > SIZE_LIMIT || actual > SIZE_LIMIT {
            return Err(refused(format!("it is {size} bytes large, {actual} of them stored")));
        }
        if matches!(format, "qcow2" | "vmdk") {
            let check = self.run(&QEMU_IMG, &["check", "-f", format, "object"], READ)?;
            // 3 means leaked clusters: wasteful, and harmless.
            if !matches!(check.status.code(), Some(0 | 3)) {
                return Err(refused(check.success().map_or_else(|e| e.why(), |_| "check failed".into())));
            }
        }
        Ok(size)
    }

    /// Whether qemu-img would take the object for a vmdk descriptor, whose extents it opens by name: a text, or a
    /// sparse header of zero capacity (block/vmdk.c, vmdk_open_vmdk4).
    fn is_text_vmdk(&self) -> std::result::Result<bool, Verdict> {
        let mut head = [0; 64];
        let opened = std::fs::File::open(self.folder.join("object")).and_then(|mut file| {
            let length = file.seek(SeekFrom::End(0))?;
            file.rewind()?;
            let known = usize::try_from(length).unwrap_or(usize::MAX).min(head.len());
            file.read_exact(&mut head[..known])
        });
        opened
            .map_err(|error| Verdict::new(Code::InternalError, format!("cannot read the object: {error}")))?;
        let text = head.trim_ascii_start();
        let text = text.starts_with(b"#") || text.starts_with(b"version");
        Ok(text || (head.starts_with(b"KDMV") && head[12..20] == [0; 8]))
    }

    /// Offset and length in bytes of each partition, with what blkid calls its content.
    fn partitions(&self, rules: Rules) -> std::result::Result<Vec<Partition>, Verdict> {
        let refused = |why: String| Verdict::new(Code::PartitionNotPresent, why);
        let table = self.run(&SFDISK, &["-J", "disk.raw"], LOOK)?.success().map_err(|e| refused(e.why()))?;
        let table: Value = serde_json::from_slice(&table.stdout).map_err(|e| refused(e.to_string()))?;
        let table = &table["partitiontable"];
        if table["label"] == "gpt" && !rules.gpt {
            return Err(refused("it is a GPT; this edition wants an MBR".into()));
        }
        let sector = table["sectorsize"].as_u64().unwrap_or(512);
        let mut partitions = Vec::new();
        for entry in table["partitions"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let bytes = |name: &str| entry[name].as_u64().and_then(|n| n.checked_mul(sector));
            let (Some(offset), Some(length)) = (bytes("start"), bytes("size")) else { continue };
            if matches!(entry["type"].as_str(), Some("5" | "f" | "85")) {
                continue;
            }
            let (at, long) = (offset.to_string(), length.to_string());
            let probe = ["-p", "-O", &at, "-S", &long, "-o", "value", "-s", "TYPE", "disk.raw"];
            let content = String::from_utf8_lossy(&self.run(&BLKID, &probe, LOOK)?.stdout).trim().to_owned();
            partitions.push(Partition { offset, content });
        }
        if partitions.is_empty() {
            return Err(refused("the partition table is empty".into()));
        }
        Ok(partitions)
    }

    /// The root file system; none when it may be one that no tool here looks into.
    fn root(&self, partitions: &[Partition]) -> std::result::Result<Option<Partition>, Verdict> {
        let inits = ["/sbin/init", "/usr/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd"];
        for partition in partitions.iter().filter(|partition| partition.is_ext()) {
            if self.any_exists(partition, &["/etc"])? && self.any_exists(partition, &inits)? {
                return Ok(Some(partition.clone()));
            }
        }
        let opaque = ["xfs", "btrfs", "LVM2_member"];
        if partitions.iter().any(|partition| opaque.contains(&partition.content.as_str())) {
            return Ok(None);
        }
        let found: Vec<&str> = partitions.iter().map(|p| p.content.as_str()).collect();
        Err(Verdict::new(Code::RootPartitionNotFound, format!("the partitions hold {found:?}, none an init")))
    }

    /// Every kernel must find its disk on virtio, and know virtio's network card.
    fn virtio(&self, root: &Partition, partitions: &[Partition]) -> std::result::Result<(), Verdict> {
        let missing = |why: String| Verdict::new(Code::VirtioNotInstall, why);
        let mut places = vec![(root, "/boot")];
        places.extend(partitions.iter().filter(|p| p.is_ext() && p.offset != root.offset).map(|p| (p, "/")));
        let mut kernels = 0;
        for (partition, folder) in places {
            let files = self.list(partition, folder)?;
            for (kernel, _) in &files {
                let Some(version) = kernel.strip_prefix("vmlinuz-").filter(|v| !v.contains("rescue")) else {
                    continue;
                };
                kernels += 1;
                let tree = format!("/lib/modules/{version}");
                let builtin = self.text(root, &format!("{tree}/modules.builtin"))?;
                let known = self.text(root, &format!("{tree}/modules.dep"))?;
                let initramfs = self.initramfs(partition, folder, &files, version)?;
                for module in ["virtio_blk", "virtio_pci"] {
                    if !has_module(&builtin, module) && !has_module(&initramfs, module) {
                        return Err(missing(format!("kernel {version} has no {module} in its initramfs")));
                    }
                }
                if ![&builtin, &known, &initramfs].iter().any(|list| has_module(list, "virtio_net")) {
                    return Err(missing(format!("kernel {version} has no virtio_net")));
                }
            }
        }
        if kernels == 0 { Err(missing("there is no kernel in /boot".into())) } else { Ok(()) }
    }

    /// The file list of a kernel's initramfs; empty when it has none.
    fn initramfs(
        &self,
        partition: &Partition,
        folder: &str,
        files: &[(String, u64)],
        version: &str,
    ) -> std::result::Result<String, Verdict> {
        let names = [
            format!("initrd.img-{version}"),
            format!("initramfs-{version}.img"),
            format!("initrd-{version}"),
        ];
        let Some((name, _)) =
            files.iter().find(|(file, size)| names.contains(file) && *size <= INITRAMFS_LIMIT)
        else {
            return Ok(String::new());
        };
        let path = format!("{}/{name}", folder.trim_end_matches('/'));
        self.debugfs(partition, &format!("dump {path} initramfs"))?;
        let list = self.run(&LSINITRAMFS, &["initramfs"], READ)?;
        Ok(String::from_utf8_lossy(&list.stdout).into_owned())
    }

    fn any_exists(&self, partition: &Partition, paths: &[&str]) -> std::result::Result<bool, Verdict> {
        for path in paths {
            if self.debugfs(partition, &format!("stat {path}"))?.starts_with("Inode:") {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn text(&self, partition: &Partition, path: &str) -> std::result::Result<String, Verdict> {
        self.debugfs(partition, &format!("cat {path}"))
    }

    /// Names and sizes in a folder. Names of other characters are left out: debugfs would read them as commands.
    fn list(&self, partition: &Partition, folder: &str) -> std::result::Result<Vec<(String, u64)>, Verdict> {
        let plain = |name: &str| {
            name.chars().all(|c| c.is_ascii_alphanumeric() || "._+~-".contains(c)) && !name.is_empty()
        };
        // Each line is /inode/mode/uid/gid/name/size/.
        let listing = self.debugfs(partition, &format!("ls -p {folder}"))?;
        let entries = listing.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split('/').collect();
            let name = *fields.get(5)?;
            plain(name).then(|| (name.to_owned(), fields.get(6).and_then(|n| n.parse().ok()).unwrap_or(0)))
        });
        Ok(entries.collect())
    }

    /// What debugfs prints for a request. It succeeds whatever it finds, so nothing found is empty text.
    fn debugfs(&self, partition: &Partition, request: &str) -> std::result::Result<String, Verdict> {
        let device = format!("disk.raw?offset={}", partition.offset);
        let output = self.run(&DEBUGFS, &["-c", "-R", request, &device], READ)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn run(
        &self,
        program: &Program,
        arguments: &[&str],
        timeout: Duration,
    ) -> std::result::Result<Finished, Verdict> {
        let mut command = self.programs.command(program)?;
        command.current_dir(self.folder).args(arguments);
        Ok(child::run(&mut command, timeout)?)
    }
}

/// A partition of the disk under judgement.
#[derive(Clone, Debug)]
struct Partition {
    /// Where it starts, in bytes.
    offset: u64,
    /// What blkid calls its content; empty when unknown.
    content: String,
}

impl Partition {
    fn is_ext(&self) -> bool {
        matches!(self.content.as_str(), "ext2" | "ext3" | "ext4")
    }
}

/// Whether a list of paths, one a line or as modules.dep has them, names a module, compressed or not.
fn has_module(list: &str, module: &str) -> bool {
    list.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default().trim();
        let name = path.rsplit('/').next().unwrap_or_default();
        name.strip_prefix(module).is_some_and(|rest| rest.starts_with(".ko"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_found_by_its_whole_name_only() {
        assert!(has_module("usr/lib/modules/6/virtio_blk.ko.xz", "virtio_blk"));
        assert!(has_module("kernel/drivers/net/virtio_net.ko: kernel/net/failover.ko", "virtio_net"));
        assert!(!has_module("kernel/drivers/x.ko: kernel/virtio_net.ko", "virtio_net"));
        assert!(!has_module("kernel/virtio_blk2.ko", "virtio_blk"));
    }
}
