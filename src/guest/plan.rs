//! What to change in a guest so that it boots in the cloud, as data: made from the guest's tree alone, printed as a
//! diff with a reason for each change, carried out elsewhere.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::apply::Executor;
use super::builder::Builder;
use super::disk::{BootMode, DataDisk, is_fat};
use super::inspect::Guest;
use super::linux;
use super::package::{Installer, are_with};
use super::partition::Purpose;
use super::tree::{Node, Tree, mount_of};
use crate::error::{Error, Kind, Result};

/// Lines of context in a printed diff.
const CONTEXT: usize = 2;

/// What the user may choose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Leave addresses and interface names as they are, instead of DHCP on eth0.
    pub keep_network: bool,
    /// Keep cloud-init from configuring the network; what haul writes (DHCP on eth0) then stays.
    pub no_cloud_init_network: bool,
    /// Run none of the guest's programs: drivers are appended to an initramfs instead of building a new one.
    #[serde(default)]
    pub no_guest_programs: bool,
    /// The import is forced: without cloud-init, something else takes the cloud's settings.
    #[serde(default)]
    pub force_import: bool,
    /// Files of packages of the guest's distribution that are installed in the copy.
    #[serde(default)]
    pub packages: Vec<PathBuf>,
    /// The firmware that the copy must boot by.
    #[serde(default)]
    pub firmware: Option<BootMode>,
    /// The server's other disks, which come to the cloud by themselves.
    #[serde(default)]
    pub data_disks: Vec<DataDisk>,
    /// Carry out the plan in an appliance, also where this machine's kernel could.
    #[serde(default)]
    pub appliance: bool,
}

impl Options {
    /// Whose kernel carries out the plan.
    pub fn executor(&self) -> Executor {
        if self.appliance { Executor::Appliance } else { Executor::fitting() }
    }
}

#[expect(clippy::derivable_impls, reason = "the defaults are a promise to the user: they are spelled out")]
impl Default for Options {
    fn default() -> Self {
        Options {
            keep_network: false,
            no_cloud_init_network: false,
            no_guest_programs: false,
            force_import: false,
            packages: Vec::new(),
            firmware: None,
            data_disks: Vec::new(),
            appliance: false,
        }
    }
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fix", rename_all = "kebab-case")]
pub enum Fix {
    /// Replaces the text of a file, which keeps its owner, mode and attributes.
    Edit {
        /// The file, as the guest names it, no link on the way.
        path: String,
        /// Its text before; anything else at the time of applying is an error.
        old: String,
        /// Its text after.
        new: String,
        /// Why.
        reason: String,
    },
    /// Makes a new file, owned by root.
    Create {
        /// The file.
        path: String,
        /// Its text.
        text: String,
        /// Its permission bits.
        mode: u32,
        /// Why.
        reason: String,
    },
    /// Removes a file.
    Remove {
        /// The file.
        path: String,
        /// Its text before.
        old: String,
        /// Why.
        reason: String,
    },
    /// Copies a file to where there is none on an EFI system partition.
    Copy {
        /// The file to copy, as it is after the changes before.
        from: String,
        /// The new file.
        path: String,
        /// Why.
        reason: String,
    },
    /// Installs packages, with the guest's own tool.
    Install {
        /// Their files on this machine.
        packages: Vec<PathBuf>,
        /// The tool.
        installer: Installer,
        /// Why.
        reason: String,
    },
    /// Adds a partition, for a boot loader.
    Partition {
        /// Its first byte on the disk.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// What for.
        purpose: Purpose,
        /// Why.
        reason: String,
    },
    /// Builds GRUB for another firmware, with the guest's own tool.
    Grub {
        /// What GRUB calls machine and firmware, such as `x86_64-efi`.
        platform: String,
        /// The file to make; GRUB's modules go beside it.
        core: String,
        /// The modules in it.
        modules: Vec<String>,
        /// What it does first.
        config: String,
        /// Why.
        reason: String,
    },
    /// Puts GRUB where a BIOS looks: what starts it into the first sector, the rest into a partition.
    BootSector {
        /// The file with the latter.
        core: String,
        /// That partition's first byte on the disk.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// Why.
        reason: String,
    },
    /// Builds the initramfs of one kernel again, with the guest's own tool.
    Initramfs {
        /// The kernel's release.
        kernel: String,
        /// The initramfs to replace.
        image: String,
        /// The tool.
        builder: Builder,
        /// Modules that must be in it afterwards.
        modules: Vec<String>,
        /// Why.
        reason: String,
    },
    /// Appends modules to the initramfs of one kernel, and a program that loads them before its own init.
    Append {
        /// The kernel's release.
        kernel: String,
        /// The initramfs.
        image: String,
        /// The modules; what they depend on goes with them.
        modules: Vec<String>,
        /// Why.
        reason: String,
    },
}

impl Fix {
    /// The file it makes, changes or takes away, or the folder of the records of what it does.
    pub fn path(&self) -> &str {
        match self {
            Fix::Install { installer, .. } => installer.records(),
            // None: it changes the disk itself.
            Fix::Partition { .. } => "",
            Fix::Grub { core, .. } | Fix::BootSector { core, .. } => core,
            Fix::Edit { path, .. }
            | Fix::Create { path, .. }
            | Fix::Remove { path, .. }
            | Fix::Copy { path, .. }
            | Fix::Initramfs { image: path, .. }
            | Fix::Append { image: path, .. } => path,
        }
    }
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// It will boot, but something is likely to be missed.
    Warning,
    /// It will not boot, and haul cannot mend it.
    Fatal,
}

/// Something the plan does not mend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable id, such as `fstab.other-disk`.
    pub id: String,
    /// How much it matters.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// That the guest's file at `path` differs from what a plan was made from.
pub fn changed(path: &str) -> Error {
    Error::new(
        Kind::Source,
        "guest.changed",
        format!("the guest's {path} is not what the plan was made from"),
    )
    .remedy("make the plan again from this copy")
}

/// Everything to change, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The changes; later ones build on earlier ones.
    pub fixes: Vec<Fix>,
    /// What stays as it is.
    pub findings: Vec<Finding>,
    /// File systems to mount for it: byte range, kind, mount point; the root first.
    pub mounts: Vec<PlannedMount>,
    /// The server's other disks, of which something may be mounted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_disks: Vec<DataDisk>,
}

/// A file system the plan needs mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMount {
    /// First byte on the disk.
    pub start: u64,
    /// One past its last byte.
    pub end: u64,
    /// The kernel's name of the file system, such as `ext4`.
    pub kind: String,
    /// Where the guest mounts it.
    pub point: String,
    /// Options it needs for that: `subvol=/@`.
    #[serde(default)]
    pub options: String,
}

impl Plan {
    /// Whether there is anything to do.
    pub fn is_empty(&self) -> bool {
        self.fixes.is_empty()
    }

    /// Whether it installs the package `name`.
    pub fn installs(&self, name: &str) -> bool {
        self.fixes.iter().any(|fix| matches!(fix, Fix::Install { packages, .. } if are_with(packages, name)))
    }

    /// The FAT file system in which `fix` is carried out, if it is one.
    pub fn fat_of(&self, fix: &Fix) -> Option<&PlannedMount> {
        mount_of(&self.mounts, |mount| &mount.point, fix.path()).filter(|mount| mount.is_fat())
    }
}

impl PlannedMount {
    /// Whether it is a FAT, which is not mounted but written by haul.
    pub fn is_fat(&self) -> bool {
        is_fat(&self.kind)
    }
}

/// Plans the fixes `guest` needs. Reads the tree, changes nothing; the same tree gives the same plan.
pub fn plan(guest: &Guest, options: &Options) -> Result<Plan> {
    let mut draft = Draft::new(&guest.tree, &options.data_disks);
    for why in &guest.stale {
        draft.warn("disk.stale", why, "unmount it cleanly, or freeze it while it is copied");
    }
    for why in &guest.unread {
        draft.warn("disk.unread", why, "see that nothing the system needs to boot is there");
    }
    linux::fixes(guest, options, &mut draft)?;
    Ok(draft.plan(guest))
}

/// The root, and what the guest mounts below it and the fixes touch: /boot, /usr, /var and the like.
fn mounts(guest: &Guest) -> Vec<PlannedMount> {
    let mut mounts: Vec<PlannedMount> = Vec::new();
    for mounted in &guest.mounts {
        let Some(fs) = guest.filesystems.get(mounted.filesystem) else { continue };
        mounts.push(PlannedMount {
            start: fs.extent.start,
            end: fs.extent.end,
            kind: fs.kind.clone(),
            point: mounted.point.clone(),
            options: mounted.options.clone(),
        });
    }
    mounts.sort_by(|a, b| a.point.len().cmp(&b.point.len()).then(a.point.cmp(&b.point)));
    mounts
}

/// A plan in the making: the tree with the changes so far on top.
pub struct Draft<'a> {
    tree: &'a Tree,
    data_disks: &'a [DataDisk],
    texts: BTreeMap<String, Option<String>>,
    fixes: Vec<Fix>,
    findings: Vec<Finding>,
    mounts: Vec<PlannedMount>,
}

impl<'a> Draft<'a> {
    /// No changes yet to `tree`, of a server with `data_disks`.
    pub fn new(tree: &'a Tree, data_disks: &'a [DataDisk]) -> Self {
        Draft {
            tree,
            data_disks,
            texts: BTreeMap::new(),
            fixes: Vec::new(),
            findings: Vec::new(),
            mounts: Vec::new(),
        }
    }

    /// The changes as a plan for `guest`.
    pub fn plan(self, guest: &Guest) -> Plan {
        let data_disks = self.data_disks.to_vec();
        let mut plan = Plan { fixes: self.fixes, findings: self.findings, mounts: Vec::new(), data_disks };
        if !plan.is_empty() {
            plan.mounts = mounts(guest);
            plan.mounts.extend(self.mounts);
        }
        plan
    }

    /// The tree below, without the changes.
    pub fn tree(&self) -> &'a Tree {
        self.tree
    }

    /// The server's other disks.
    pub fn data_disks(&self) -> &'a [DataDisk] {
        self.data_disks
    }

    /// The changes so far.
    pub fn fixes(&self) -> &[Fix] {
        &self.fixes
    }

    /// The path without links of an existing file, or of one to be made in an existing folder.
    fn real(&self, path: &str) -> Result<String> {
        if self.texts.contains_key(path) {
            return Ok(path.to_owned());
        }
        match self.tree.resolve(path) {
            Ok(Some(real)) => return Ok(real),
            Ok(None) => {}
            Err(error) if error.id() == "guest.path" => {}
            Err(error) => return Err(error),
        }
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok(match self.tree.resolve(folder)? {
            Some(folder) if folder == "/" => format!("/{name}"),
            Some(folder) => format!("{folder}/{name}"),
            None => path.to_owned(),
        })
    }

    /// The text of a file as it will be after the changes so far.
    pub fn text(&self, path: &str) -> Result<Option<String>> {
        let real = self.real(path)?;
        match self.texts.get(&real) {
            Some(text) => Ok(text.clone()),
            None => self.tree.text(path),
        }
    }

    /// Gives the file at `path` the text `new`: an edit where it exists, a new file otherwise, nothing where it
    /// has this text already.
    pub fn write(&mut self, path: &str, new: &str, mode: u32, reason: &str) -> Result<()> {
        let real = self.real(path)?;
        let (new, reason) = (new.to_owned(), reason.to_owned());
        match self.text(path)? {
            Some(old) if old == new => return Ok(()),
            Some(old) => self.fixes.push(Fix::Edit { path: real.clone(), old, new: new.clone(), reason }),
            // A link to nowhere, or something that is no text: making a file there could land anywhere.
            None if self.tree.link(path)?.is_some()
                || self.tree.exists(path)? && !self.texts.contains_key(&real) =>
            {
                self.warn(
                    "plan.not-a-file",
                    &format!("{path} is not a text file haul could change"),
                    "look at it",
                );
                return Ok(());
            }
            None => self.fixes.push(Fix::Create { path: real.clone(), text: new.clone(), mode, reason }),
        }
        self.texts.insert(real, Some(new));
        Ok(())
    }

    /// Removes the file at `path`, if there is one. A link is followed: what it leads to is emptied, not unlinked.
    pub fn remove(&mut self, path: &str, reason: &str) -> Result<()> {
        let Some(old) = self.text(path)? else { return Ok(()) };
        if self.tree.link(path)?.is_some() {
            return self.write(path, "", 0o644, reason);
        }
        let real = self.real(path)?;
        self.fixes.push(Fix::Remove { path: real.clone(), old, reason: reason.to_owned() });
        self.texts.insert(real, None);
        Ok(())
    }

    /// Changes the file at `path`, if there is one, line by line.
    pub fn edit_lines(&mut self, path: &str, reason: &str, mut edit: impl FnMut(&str) -> Line) -> Result<()> {
        let Some(old) = self.text(path)? else { return Ok(()) };
        let mut new = String::with_capacity(old.len());
        for line in old.split_inclusive('\n') {
            let (body, end) = line.strip_suffix('\n').map_or((line, ""), |body| (body, "\n"));
            match edit(body) {
                Line::Keep => new.push_str(line),
                Line::Drop => {}
                Line::Replace(text) => {
                    new.push_str(&text);
                    new.push_str(end);
                }
            }
        }
        self.write(path, &new, 0o644, reason)
    }

    /// Adds `fix`, which changes no text of the tree.
    pub fn push(&mut self, fix: Fix) {
        self.fixes.push(fix);
    }

    /// Has the file system `mount`, which a fix makes, take part.
    pub fn mount(&mut self, mount: PlannedMount) {
        self.mounts.push(mount);
    }

    /// Copies a file of an EFI system partition to where there is none.
    pub fn copy(&mut self, from: &str, to: &str, reason: &str) {
        let (from, path, reason) = (from.to_owned(), to.to_owned(), reason.to_owned());
        self.fixes.push(Fix::Copy { from, path, reason });
    }

    /// Plans a new initramfs by `builder`, or without one an addition to that which is there.
    pub fn initramfs(
        &mut self,
        kernel: &str,
        image: &str,
        builder: Option<Builder>,
        modules: Vec<String>,
        reason: &str,
    ) {
        let (kernel, image, reason) = (kernel.to_owned(), image.to_owned(), reason.to_owned());
        self.fixes.push(match builder {
            Some(builder) => Fix::Initramfs { kernel, image, builder, modules, reason },
            None => Fix::Append { kernel, image, modules, reason },
        });
    }

    /// Notes something that is likely to be missed.
    pub fn warn(&mut self, id: &str, what: &str, remedy: &str) {
        self.find(id, Severity::Warning, what, remedy);
    }

    /// Notes something the plan does not mend.
    pub fn find(&mut self, id: &str, severity: Severity, what: &str, remedy: &str) {
        let finding =
            Finding { id: id.to_owned(), severity, what: what.to_owned(), remedy: remedy.to_owned() };
        if !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }

    /// Whether `path` is a regular file, in the tree below.
    pub fn is_file(&self, path: &str) -> Result<bool> {
        Ok(matches!(self.tree.node(path)?, Some(Node::File(_))))
    }
}

/// What becomes of a line.
pub enum Line {
    /// It stays.
    Keep,
    /// It goes.
    Drop,
    /// It becomes this.
    Replace(String),
}

/// Text from a guest, made fit for a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, old, new, reason) = match self {
            Fix::Edit { path, old, new, reason } => (path, old.as_str(), new.as_str(), reason),
            Fix::Create { path, text, reason, .. } => (path, "", text.as_str(), reason),
            Fix::Remove { path, old, reason } => (path, old.as_str(), "", reason),
            Fix::Copy { from, path, reason } => {
                writeln!(f, "# {}", printable(reason))?;
                return writeln!(f, "! copy {} to {}", printable(from), printable(path));
            }
            Fix::Partition { start, end, purpose, reason } => {
                writeln!(f, "# {}", printable(reason))?;
                let (start, len) = (start >> 10, (end - start) >> 10);
                return writeln!(f, "! add a partition at {start} KiB of {len} KiB: {}", purpose.name());
            }
            Fix::Grub { platform, core, modules, config, reason } => {
                writeln!(f, "# {}", printable(reason))?;
                let (core, modules) = (printable(core), printable(&modules.join(" ")));
                writeln!(
                    f,
                    "! build {core} by grub-mkimage for {platform} with {modules}, which does first"
                )?;
                return printable(config).lines().try_for_each(|line| writeln!(f, "+{line}"));
            }
            Fix::BootSector { core, start, reason, .. } => {
                writeln!(f, "# {}", printable(reason))?;
                let (core, start) = (printable(core), start >> 10);
                return writeln!(f, "! put {core} at {start} KiB, and what starts it into the first sector");
            }
            Fix::Install { packages, installer, reason } => {
                writeln!(f, "# {}", printable(reason))?;
                let name = |file: &PathBuf| file.file_name().map(|name| name.to_string_lossy().into_owned());
                let names: Vec<String> = packages.iter().filter_map(name).collect();
                return writeln!(f, "! install {} by {}", printable(&names.join(" ")), installer.name());
            }
            Fix::Initramfs { kernel, image, builder, modules, reason } => {
                writeln!(f, "# {}", printable(reason))?;
                return writeln!(
                    f,
                    "! rebuild {} for kernel {} by {} with {}",
                    printable(image),
                    printable(kernel),
                    builder.package(),
                    modules.join(" ")
                );
            }
            Fix::Append { kernel, image, modules, reason } => {
                writeln!(f, "# {}", printable(reason))?;
                return writeln!(
                    f,
                    "! append to {} what loads, for kernel {}: {}",
                    printable(image),
                    printable(kernel),
                    modules.join(" ")
                );
            }
        };
        let (old_name, new_name) = match self {
            Fix::Create { .. } => ("/dev/null".to_owned(), format!("b{path}")),
            Fix::Remove { .. } => (format!("a{path}"), "/dev/null".to_owned()),
            _ => (format!("a{path}"), format!("b{path}")),
        };
        writeln!(f, "# {}", printable(reason))?;
        if old == new {
            // An empty file comes or goes: no diff has a line of it.
            return writeln!(f, "--- {}\n+++ {}", printable(&old_name), printable(&new_name));
        }
        let diff = similar::TextDiff::from_lines(old, new);
        let text = diff.unified_diff().context_radius(CONTEXT).header(&old_name, &new_name).to_string();
        for line in printable(&text).lines() {
            // GRUB's environment is filled up with these.
            match line.trim_start_matches([' ', '+', '-']) {
                filling if filling.len() > 64 && filling.bytes().all(|byte| byte == b'#') => {
                    writeln!(f, "{}…", &line[..17])?;
                }
                _ => writeln!(f, "{line}")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Info => "note",
            Severity::Warning => "warning",
            Severity::Fatal => "fatal",
        };
        write!(f, "{severity}: {} [{}]: {}", printable(&self.what), self.id, printable(&self.remedy))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fix in &self.fixes {
            writeln!(f, "{fix}")?;
        }
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        Ok(())
    }
}
