//! fstab(5), crypttab and the resume device: disks named by what is on them, and nothing awaited that will not come.

use crate::error::Result;
use crate::guest::disk::{DataDisk, FileSystem};
use crate::guest::extended::device_names;
use crate::guest::inspect::Guest;
use crate::guest::plan::{Draft, Line, Severity};

/// One entry of fstab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What is mounted.
    pub spec: String,
    /// Where.
    pub point: String,
    /// File system type.
    pub kind: String,
    /// Options, separated by commas.
    pub options: String,
}

/// The entry on one line, if there is one.
pub fn parse_line(line: &str) -> Option<Entry> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let mut fields = line.split_whitespace().map(str::to_owned);
    let (spec, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
    Some(Entry { spec, point, kind, options: fields.next().unwrap_or_else(|| "defaults".into()) })
}

/// All entries, in order.
pub fn parse(text: &str) -> Vec<Entry> {
    text.lines().filter_map(parse_line).collect()
}

/// What the root is mounted from.
pub fn root_spec(entries: &[Entry]) -> Option<&str> {
    entries.iter().find(|entry| entry.point == "/").map(|entry| entry.spec.as_str())
}

/// A disk's name and the number of a partition on it, from a name such as `/dev/sda1`, `/dev/nvme0n1p2` or
/// `/dev/disk/by-id/ata-X-part1`; no number for the whole disk. `None` for anything that is no such name.
pub fn split_device(spec: &str) -> Option<(&str, Option<u32>)> {
    let name = spec.strip_prefix("/dev/")?;
    if name.starts_with("disk/by-id/") || name.starts_with("disk/by-path/") {
        return match spec.rsplit_once("-part") {
            Some((disk, number)) => Some((disk, Some(number.parse().ok()?))),
            None => Some((spec, None)),
        };
    }
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (stem, number) = name.split_at(name.len() - digits);
    let letters = |prefix: &str| {
        stem.strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty() && rest.chars().all(|c| c.is_ascii_lowercase()))
    };
    if ["sd", "hd", "vd", "xvd"].iter().any(|prefix| letters(prefix)) {
        let disk = &spec[.."/dev/".len() + stem.len()];
        return Some((disk, if number.is_empty() { None } else { Some(number.parse().ok()?) }));
    }
    if name.starts_with("nvme") || name.starts_with("mmcblk") || name.starts_with("cciss/") {
        return match stem.strip_suffix('p') {
            Some(disk) if disk.ends_with(|c: char| c.is_ascii_digit()) => {
                Some((&spec[.."/dev/".len() + disk.len()], Some(number.parse().ok()?)))
            }
            _ => Some((spec, None)),
        };
    }
    None
}

/// Which file system a name in the guest means.
pub struct Names<'a> {
    filesystems: &'a [FileSystem],
    /// What the guest calls this disk.
    own: Option<String>,
    data_disks: &'a [DataDisk],
}

/// Where what a name means is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// On the guest's own disk.
    Here,
    /// On one of the data disks that were named.
    DataDisk,
    /// On neither.
    Elsewhere,
    /// The name does not tell.
    Unknown,
}

/// What a first disk is called when the guest does not say.
const FIRST_DISKS: &[&str] =
    &["/dev/sda", "/dev/hda", "/dev/vda", "/dev/xvda", "/dev/nvme0n1", "/dev/mmcblk0", "/dev/cciss/c0d0"];

impl<'a> Names<'a> {
    /// Names as used by a guest whose root is mounted from `root`, on a server that has `data_disks`, too.
    pub fn new(filesystems: &'a [FileSystem], root: Option<&str>, data_disks: &'a [DataDisk]) -> Self {
        let own = root.and_then(split_device).map(|(disk, _)| disk.to_owned());
        Names { filesystems, own, data_disks }
    }

    /// Names that mean the same on any machine: none by device.
    pub fn lasting(filesystems: &'a [FileSystem], data_disks: &'a [DataDisk]) -> Self {
        Names { filesystems, own: Some(String::new()), data_disks }
    }

    /// Whether `spec` names a disk, partition, or what is on one: not a network share or `tmpfs`.
    pub fn is_device(spec: &str) -> bool {
        spec.starts_with("/dev/")
            || ["UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="].iter().any(|tag| spec.starts_with(tag))
    }

    /// The index of the file system `spec` means; `None` when it is not on this disk.
    pub fn find(&self, spec: &str) -> Option<usize> {
        let is_first = |disk: &str| {
            FIRST_DISKS.contains(&disk) && self.data_disks.iter().all(|other| other.name != disk)
        };
        position(self.filesystems, spec, |disk| match &self.own {
            // A name by id says nothing of the kernel's name.
            Some(own) if own.starts_with("/dev/disk/") => own == disk || is_first(disk),
            Some(own) => own == disk,
            None => is_first(disk),
        })
    }

    /// The file system on a data disk that `spec` means.
    fn on_data_disk(&self, spec: &str) -> Option<&'a FileSystem> {
        self.data_disks.iter().find_map(|disk| {
            let found = position(&disk.filesystems, spec, |name| name == disk.name)?;
            disk.filesystems.get(found)
        })
    }

    /// Where what `spec` names is.
    pub fn home(&self, spec: &str) -> Home {
        if self.find(spec).is_some() {
            return Home::Here;
        }
        if self.on_data_disk(spec).is_some() {
            return Home::DataDisk;
        }
        let has = |filesystems: &[FileSystem], group: &str| {
            filesystems.iter().any(|fs| fs.group.as_deref() == Some(group))
        };
        match group_of(spec) {
            Some(group) if has(self.filesystems, &group) => Home::Here,
            Some(group) if self.data_disks.iter().any(|disk| has(&disk.filesystems, &group)) => {
                Home::DataDisk
            }
            Some(_) if self.filesystems.iter().any(FileSystem::is_opaque) => Home::Unknown,
            None if spec.starts_with("/dev/mapper/") => Home::Unknown,
            _ => Home::Elsewhere,
        }
    }

    /// The name by UUID for a name by device; `None` when it is not such a name, or of no disk that is known.
    pub fn by_uuid(&self, spec: &str) -> Option<String> {
        // An array may get another number where nobody knows its home.
        if split_device(spec).is_none() && !spec.starts_with("/dev/md") {
            return None;
        }
        let here = self.find(spec).and_then(|found| self.filesystems.get(found));
        let uuid = here.or_else(|| self.on_data_disk(spec))?.uuid.as_ref()?;
        Some(format!("UUID={uuid}"))
    }
}

/// The index of the one of a disk's `filesystems` that `spec` means; `is_disk` knows the disk by its names.
fn position(filesystems: &[FileSystem], spec: &str, is_disk: impl Fn(&str) -> bool) -> Option<usize> {
    let by = |matches: &dyn Fn(&FileSystem) -> bool| filesystems.iter().position(matches);
    let tag = |name: &str| {
        let spec = spec.strip_prefix(name)?.trim_matches('"');
        Some(spec.to_owned())
    };
    let same = |a: &Option<String>, b: &str| a.as_deref().is_some_and(|a| a.eq_ignore_ascii_case(b));
    if let Some(uuid) = tag("UUID=").or_else(|| tag("/dev/disk/by-uuid/")) {
        return by(&|fs| same(&fs.uuid, &uuid));
    }
    if let Some(label) = tag("LABEL=").or_else(|| tag("/dev/disk/by-label/")) {
        return by(&|fs| fs.label.as_deref() == Some(&label));
    }
    if let Some(uuid) = tag("PARTUUID=").or_else(|| tag("/dev/disk/by-partuuid/")) {
        return by(&|fs| same(&fs.partition_uuid, &uuid));
    }
    let named = |fs: &FileSystem| {
        let names = fs.logical.as_ref().map(|logical| device_names(&logical.group, &logical.name));
        names.is_some_and(|names| names.iter().any(|name| name == spec))
    };
    let array = |fs: &FileSystem| {
        fs.array.as_ref().is_some_and(|array| array.devices.iter().any(|device| device == spec))
    };
    if let Some(found) = by(&named).or_else(|| by(&array)) {
        return Some(found);
    }
    let (disk, number) = split_device(spec)?;
    match is_disk(disk) {
        true => by(&|fs| fs.partition == number && fs.logical.is_none() && fs.array.is_none()),
        false => None,
    }
}

/// Folders of /dev that are no volume groups.
const NO_GROUPS: [&str; 6] = ["block", "cciss", "disk", "ida", "mapper", "md"];

/// The volume group of the logical volume that `spec` names, such as `/dev/group/name` or `/dev/mapper/group-name` with its
/// dashes doubled. A name that something else than LVM may have given is none.
fn group_of(spec: &str) -> Option<String> {
    let name = spec.strip_prefix("/dev/")?;
    let Some(mapped) = name.strip_prefix("mapper/") else {
        let (group, volume) = name.split_once('/')?;
        return Some(group)
            .filter(|group| !NO_GROUPS.contains(group) && !volume.contains('/'))
            .map(str::to_owned);
    };
    // Partitions of multipath devices, and volumes that systems name after their LUKS header.
    if mapped.starts_with("mpath") || mapped.starts_with("luks-") || mapped.contains("-part") {
        return None;
    }
    let bytes = mapped.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'-', Some(b'-')) => at += 2,
            (b'-', Some(_)) => return Some(mapped[..at].replace("--", "-")),
            _ => at += 1,
        }
    }
    None
}

/// What the guest's root is called in fstab, or on the kernel's command line where fstab does not say.
pub fn names<'a>(guest: &'a Guest, draft: &Draft<'a>) -> Result<Names<'a>> {
    let entries = parse(&draft.tree().text("/etc/fstab")?.unwrap_or_default());
    let by_fstab = root_spec(&entries).filter(|spec| split_device(spec).is_some()).map(str::to_owned);
    let by_menu = guest
        .menus
        .iter()
        .flat_map(|menu| &menu.entries)
        .flat_map(|entry| &entry.arguments)
        .find_map(|argument| argument.strip_prefix("root=").filter(|spec| split_device(spec).is_some()))
        .map(str::to_owned);
    Ok(Names::new(&guest.filesystems, by_fstab.or(by_menu).as_deref(), draft.data_disks()))
}

/// Mount points a system cannot do without.
const NEEDED: &[&str] = &["/", "/usr", "/boot", "/var"];

/// Fixes fstab and its kin.
pub fn fix(guest: &Guest, draft: &mut Draft<'_>) -> Result<()> {
    let names = names(guest, draft)?;
    draft.edit_lines(
        "/etc/fstab",
        "disks change their names on virtio (sda becomes vda): name file systems by UUID",
        |line| match parse_line(line).and_then(|entry| Some((names.by_uuid(&entry.spec)?, entry.spec))) {
            Some((uuid, spec)) => Line::Replace(line.replacen(&spec, &uuid, 1)),
            None => Line::Keep,
        },
    )?;

    let crypttab = draft.text("/etc/crypttab")?.unwrap_or_default();
    let crypttab =
        || crypttab.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let is_encrypted = |spec: &str| {
        let name = spec.strip_prefix("/dev/mapper/");
        name.is_some_and(|name| crypttab().any(|line| line.split_whitespace().next() == Some(name)))
    };
    let mut missing = Vec::new();
    let mut on_data_disks = Vec::new();
    draft.edit_lines(
        "/etc/fstab",
        "what is not on this disk must not keep the machine from booting: nofail",
        |line| {
            let Some(entry) = parse_line(line) else { return Line::Keep };
            let listed = |option: &str| entry.options.split(',').any(|one| one == option);
            if !Names::is_device(&entry.spec) || is_encrypted(&entry.spec) || listed("noauto") {
                return Line::Keep;
            }
            match names.home(&entry.spec) {
                Home::Elsewhere => {}
                Home::DataDisk if entry.point.starts_with('/') && !listed("nofail") => {
                    on_data_disks.push(entry.point);
                    return Line::Keep;
                }
                Home::Here | Home::DataDisk | Home::Unknown => return Line::Keep,
            }
            missing.push(entry.clone());
            match listed("nofail") || NEEDED.contains(&entry.point.as_str()) {
                true => Line::Keep,
                false => with_option(line, &entry, "nofail").map_or(Line::Keep, Line::Replace),
            }
        },
    )?;
    if !on_data_disks.is_empty() {
        let what = format!("the copy waits for the data disks that hold {}", on_data_disks.join(" and "));
        draft.find(
            "fstab.data-disk",
            Severity::Info,
            &what,
            "attach them before it starts for the first time",
        );
    }
    for entry in missing {
        let what = format!("fstab mounts {} at {}, which is not on this disk", entry.spec, entry.point);
        if NEEDED.contains(&entry.point.as_str()) {
            draft.find(
                "fstab.missing",
                Severity::Fatal,
                &what,
                "migrate that disk by itself, and name it with --data-disk; or mend fstab in the source",
            );
        } else {
            let remedy = "migrate that disk by itself, and name it with --data-disk";
            draft.warn("fstab.other-disk", &what, remedy);
        }
    }

    for path in draft.tree().files("/etc/initramfs-tools/conf.d", "")? {
        draft.edit_lines(&path, "the swap space to resume from, by UUID", |line| {
            let found = line.strip_prefix("RESUME=").and_then(|spec| names.by_uuid(spec.trim_matches('"')));
            found.map_or(Line::Keep, |uuid| Line::Replace(format!("RESUME={uuid}")))
        })?;
    }
    if crypttab().next().is_some() {
        draft.warn(
            "crypttab",
            "/etc/crypttab names encrypted disks",
            "see that their keys exist in the cloud",
        );
    }
    Ok(())
}

/// `line` with `option` added to the entry's options.
fn with_option(line: &str, entry: &Entry, option: &str) -> Option<String> {
    if line.split_whitespace().nth(3).is_none() {
        return Some(format!("{} {},{option}", line.trim_end(), entry.options));
    }
    // The fourth field, found by skipping three, so that an equal word elsewhere on the line is left alone.
    let mut rest = line;
    for _ in 0..3 {
        rest = rest.trim_start();
        rest = &rest[rest.find(char::is_whitespace)?..];
    }
    let at = line.len() - rest.trim_start().len();
    let tail = line[at..].strip_prefix(entry.options.as_str())?;
    Some(format!("{}{},{option}{tail}", &line[..at], entry.options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_fall_apart_into_disk_and_partition() {
        for (spec, found) in [
            ("/dev/sda1", Some(("/dev/sda", Some(1)))),
            ("/dev/sdab12", Some(("/dev/sdab", Some(12)))),
            ("/dev/vda", Some(("/dev/vda", None))),
            ("/dev/nvme0n1p2", Some(("/dev/nvme0n1", Some(2)))),
            ("/dev/nvme0n1", Some(("/dev/nvme0n1", None))),
            ("/dev/cciss/c0d0p3", Some(("/dev/cciss/c0d0", Some(3)))),
            ("/dev/disk/by-id/ata-X-part5", Some(("/dev/disk/by-id/ata-X", Some(5)))),
            ("/dev/mapper/vg-root", None),
            ("/dev/sd", None),
            ("/dev/sr0", None),
            ("UUID=1", None),
            ("/dev/sda99999999999", None),
        ] {
            assert_eq!(split_device(spec), found, "{spec}");
        }
    }

    #[test]
    fn an_option_goes_into_the_options_field_and_nowhere_else() {
        let line = "/dev/sdb1\tdefaults\text4  defaults  0 2";
        let entry = parse_line(line).unwrap();
        assert_eq!(
            with_option(line, &entry, "nofail").unwrap(),
            "/dev/sdb1\tdefaults\text4  defaults,nofail  0 2"
        );
        let short = "/dev/sdb1 /x ext4 ";
        let with = with_option(short, &parse_line(short).unwrap(), "nofail");
        assert_eq!(with.unwrap(), "/dev/sdb1 /x ext4 defaults,nofail");
    }

    #[test]
    fn the_group_of_a_volume_is_told_by_its_name_and_by_no_other_name() {
        for (spec, group) in [
            ("/dev/mapper/data-srv", Some("data")),
            ("/dev/mapper/data--1-srv--2", Some("data-1")),
            ("/dev/data/srv", Some("data")),
            ("/dev/mapper/cryptroot", None),
            ("/dev/mapper/luks-0a1b-2c3d", None),
            ("/dev/mapper/mpatha-part1", None),
            ("/dev/mapper/36005-part1", None),
            ("/dev/mapper/a--b", None),
            ("/dev/mapper/a-", None),
            ("/dev/disk/by-id/x", None),
            ("/dev/cciss/c0d0p1", None),
            ("/dev/sdb1", None),
            ("UUID=1", None),
        ] {
            assert_eq!(group_of(spec).as_deref(), group, "{spec}");
        }
    }
}
