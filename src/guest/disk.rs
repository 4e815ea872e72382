//! A disk taken apart: its file systems by partition, and the guest's tree put together from them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::ext::ExtVolume;
use super::extended::Extended;
use super::linux::fstab;
use super::tree::{Node, Tree, Volume};
use super::volume::FilesVolume;
use crate::error::{Error, Kind, Result, Retry};
use crate::io::{ReadAt, Window, is_zero, read_array};
use crate::layout::{self, BtrfsFiles, Mirror, PartitionType, Table};
use crate::unit::Extent;

/// EFI system partition (UEFI specification, 5.3.3).
pub(super) const ESP: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
/// GRUB's BIOS boot partition.
pub(super) const BIOS_BOOT: &str = "21686148-6449-6e6f-744e-656564454649";
/// Where an EFI system partition is shown that the guest does not mount.
pub(super) const ESP_POINT: &str = "/boot/efi";
/// The MBR's type of an EFI system partition.
pub(super) const MBR_ESP: u8 = 0xef;

/// A file system or swap space on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// The partition's number; `None` when it fills the whole disk, or is in a logical volume.
    pub partition: Option<u32>,
    /// The logical volume it is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logical: Option<Logical>,
    /// The mirror (md RAID 1) it is in, of which its partition, or that of its logical volume, is a member.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub array: Option<Array>,
    /// Where it is, in bytes; what is in a logical volume lies behind the disk's end ([`Extended`]).
    #[serde(skip, default = "nowhere")]
    pub extent: Extent,
    /// What it is: `ext4`, `swap`, or another name.
    pub kind: String,
    /// Its UUID, in lower case.
    pub uuid: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// The partition's own UUID (GPT), in lower case.
    pub partition_uuid: Option<String>,
    /// The volume group, where it is a physical volume of LVM; empty where its metadata does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Where the guest mounts it, if it is part of its tree.
    pub point: Option<String>,
    /// Whether its partition is an EFI system partition.
    #[serde(skip)]
    pub esp: bool,
}

impl FileSystem {
    /// Whether more may be in it than haul knows: it is a container that haul does not look into.
    pub fn is_opaque(&self) -> bool {
        match &self.group {
            Some(group) => group.is_empty(),
            None => self.uuid.is_none() && !["empty", "unknown"].contains(&self.kind.as_str()),
        }
    }

    /// Whether it is a FAT, whose files haul writes itself.
    pub fn is_fat(&self) -> bool {
        is_fat(&self.kind)
    }
}

/// Whether `kind` names a FAT file system.
pub fn is_fat(kind: &str) -> bool {
    kind.starts_with("fat")
}

/// The name of a logical volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logical {
    /// That of its volume group.
    pub group: String,
    /// Its own.
    pub name: String,
}

/// A mirror of which this disk has one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Array {
    /// What the guest calls it, such as `/dev/md0`.
    pub devices: Vec<String>,
    /// How many members it has.
    pub members: u32,
    #[serde(skip)]
    id: Uuid,
}

impl Array {
    fn new(mirror: &Mirror) -> Self {
        // `host:name`, as mdadm gives it.
        let name = mirror.name.rsplit(':').next().unwrap_or_default();
        let mut devices = vec![format!("/dev/md/{name}")];
        if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()) {
            devices.push(format!("/dev/md{name}"));
        }
        Array { devices, members: mirror.members, id: mirror.array }
    }
}

/// Where mdadm.conf(5) lies.
const ARRAYS: [&str; 2] = ["/etc/mdadm/mdadm.conf", "/etc/mdadm.conf"];

/// Adds the names that mdadm.conf has for the arrays of `filesystems`.
fn name_arrays(tree: &Tree, filesystems: &mut [FileSystem]) -> Result<()> {
    let mut lines: Vec<String> = Vec::new();
    for path in ARRAYS {
        lines.extend(tree.text(path)?.unwrap_or_default().lines().map(str::to_owned));
    }
    for line in lines.iter().filter(|line| line.trim_start().to_ascii_uppercase().starts_with("ARRAY ")) {
        let mut words = line.split_whitespace().skip(1);
        let Some(device) = words.next().filter(|device| device.starts_with("/dev/md")) else { continue };
        let id = words.find_map(|word| {
            word.get(..5).filter(|key| key.eq_ignore_ascii_case("uuid=")).map(|_| &word[5..])
        });
        let Some(id) = id.and_then(|id| Uuid::parse_str(&id.replace(':', "")).ok()) else { continue };
        for array in filesystems.iter_mut().filter_map(|fs| fs.array.as_mut()).filter(|array| array.id == id)
        {
            if !array.devices.iter().any(|known| known == device) {
                array.devices.push(device.to_owned());
            }
        }
    }
    Ok(())
}

fn nowhere() -> Extent {
    Extent::new(0, 0)
}

/// How a disk boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootMode {
    /// By the BIOS, from the first sector.
    Bios,
    /// By UEFI, from the EFI system partition.
    Uefi,
}

/// The table of a disk's partitions, and what it leaves room for.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The table.
    pub table: Table,
    /// Bytes of the disk.
    pub size: u64,
    /// Whether the first sector has code that a BIOS would run.
    pub boot_code: bool,
}

/// The partitions of `disk`, if it has any.
pub fn parts(disk: &dyn ReadAt) -> Result<Option<Parts>> {
    let Some(table) = layout::read_table(disk)? else { return Ok(None) };
    // What follows belongs to the table.
    let boot_code = !is_zero(&read_array::<440>(disk, 0)?);
    Ok(Some(Parts { table, size: disk.size(), boot_code }))
}

/// A part of the guest's tree: where, and what of which file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounted {
    /// The guest's path.
    pub point: String,
    /// The file system's place in the list.
    pub filesystem: usize,
    /// What mount(8) must be told beside: `subvol=/@`, or nothing.
    pub options: String,
}

/// A disk taken apart.
pub struct Opened {
    /// The guest's files.
    pub tree: Tree,
    /// Everything recognised on the disk.
    pub filesystems: Vec<FileSystem>,
    /// How it boots.
    pub boot: BootMode,
    /// What the tree is put together from, the root first.
    pub mounts: Vec<Mounted>,
    /// Why files that were read may be older than what was committed.
    pub stale: Vec<String>,
    /// File systems that cannot be read, and why.
    pub unread: Vec<String>,
}

/// Subvolumes in which systems put their root on btrfs, where it is not the default one.
const ROOTS: [&str; 4] = ["@", "@rootfs", "root", "@/.snapshots/1/snapshot"];

/// Finds the guest on `disk`: its root is the file system with /etc/fstab or /etc/os-release, the rest follows
/// fstab. Fails when there is no root, or more than one.
pub fn open(disk: Arc<dyn ReadAt>) -> Result<Opened> {
    let (mut filesystems, boot) = file_systems(&disk)?;
    let disk = with_volumes(disk, &mut filesystems)?;
    let mut notes = Notes::default();
    let mut roots = Vec::new();
    for (i, fs) in filesystems.iter().enumerate().filter(|(_, fs)| !fs.is_fat()) {
        let candidates = match fs.kind.as_str() {
            "btrfs" => ROOTS.iter().map(|path| format!("subvol=/{path}")).collect(),
            _ => Vec::new(),
        };
        for options in std::iter::once(String::new()).chain(candidates) {
            let Some(volume) = volume(&disk, fs, &options, &mut notes)? else {
                // What cannot be read as a whole has no subvolumes either.
                if options.is_empty() {
                    break;
                }
                continue;
            };
            if volume.node("/etc")? == Some(Node::Folder)
                && volume.node("/etc/os-release")?.or(volume.node("/etc/fstab")?).is_some()
            {
                roots.push((i, options, volume));
                break;
            }
        }
    }
    let no_root = |why: &str| {
        Error::new(Kind::Image, "guest.no-root", format!("cannot find a Linux system on {}", disk.name()))
            .because(why)
            .remedy("haul fixes systems with one root on ext2/3/4, XFS or btrfs; `haul inspect` shows what is on the disk")
            .fact("disk", disk.name())
    };
    let (root, options, volume_of_root) = match roots.len() {
        0 if !notes.unread.is_empty() => return Err(no_root(&notes.unread.join("; "))),
        0 => return Err(no_root("no ext2/3/4, XFS or btrfs file system has /etc/os-release or /etc/fstab")),
        1 => roots.remove(0),
        _ => return Err(no_root("more than one file system has /etc/os-release")),
    };
    let mut tree = Tree::new(volume_of_root);
    filesystems[root].point = Some("/".into());
    name_arrays(&tree, &mut filesystems)?;
    let mut mounts = vec![Mounted { point: "/".into(), filesystem: root, options }];
    let entries = fstab::parse(&tree.text("/etc/fstab")?.unwrap_or_default());
    let names = fstab::Names::new(&filesystems, fstab::root_spec(&entries), &[]);
    let mut wanted: Vec<Mounted> = Vec::new();
    for entry in &entries {
        let Some(i) = names.find(&entry.spec) else { continue };
        let is_subvolume = filesystems[i].kind == "btrfs";
        let point = entry.point.trim_end_matches('/').to_owned();
        if point.starts_with('/')
            && (i != root || is_subvolume)
            && wanted.iter().all(|other| other.point != point && (other.filesystem != i || is_subvolume))
        {
            let subvolume = |option: &&str| option.starts_with("subvol=") || option.starts_with("subvolid=");
            let options = entry.options.split(',').find(subvolume).filter(|_| is_subvolume);
            wanted.push(Mounted { point, filesystem: i, options: options.unwrap_or_default().to_owned() });
        }
    }
    wanted.sort_by(|a, b| a.point.cmp(&b.point));
    for mounted in wanted {
        // A mount point is a folder of the guest, and no link: what it hides must be what the guest hides.
        if tree.resolve(&mounted.point)?.as_deref() == Some(mounted.point.as_str())
            && let Some(volume) =
                volume(&disk, &filesystems[mounted.filesystem], &mounted.options, &mut notes)?
        {
            tree.mount(&mounted.point, volume);
            filesystems[mounted.filesystem].point.get_or_insert_with(|| mounted.point.clone());
            mounts.push(mounted);
        }
    }
    // The firmware reads it wherever the guest mounts it, or not.
    if let Some(i) = filesystems.iter().position(|fs| fs.esp && fs.is_fat() && fs.point.is_none())
        && !filesystems
            .iter()
            .any(|fs| fs.esp && fs.point.is_some() || fs.point.as_deref() == Some(ESP_POINT))
        && let Some(volume) = volume(&disk, &filesystems[i], "", &mut notes)?
    {
        tree.mount(ESP_POINT, volume);
        filesystems[i].point = Some(ESP_POINT.to_owned());
        mounts.push(Mounted { point: ESP_POINT.to_owned(), filesystem: i, options: String::new() });
    }
    let Notes { stale, unread } = notes;
    Ok(Opened { tree, filesystems, boot, mounts, stale, unread })
}

/// The disk with its logical volumes behind its end, and what is in them among its file systems.
fn with_volumes(disk: Arc<dyn ReadAt>, filesystems: &mut Vec<FileSystem>) -> Result<Arc<dyn ReadAt>> {
    let extended = Arc::new(Extended::new(Arc::clone(&disk), &disk)?);
    let disk: Arc<dyn ReadAt> = Arc::clone(&extended) as _;
    for placed in extended.volumes() {
        let logical = Logical { group: placed.group.clone(), name: placed.name.clone() };
        let fs = file_system(&disk, Place::Logical(logical), placed.extent)?;
        let begin = extended.place(placed.extent.start);
        let below = filesystems.iter().find(|fs| begin.is_some_and(|begin| fs.extent.contains(begin)));
        let array = below.and_then(|below| below.array.clone());
        filesystems.push(FileSystem { array, ..fs });
    }
    Ok(disk)
}

/// Another disk of the guest's server, which comes to the cloud by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataDisk {
    /// What the server calls it, such as `/dev/sdb`.
    pub name: String,
    /// Everything recognised on it.
    pub filesystems: Vec<FileSystem>,
}

impl DataDisk {
    /// What is on `disk`, which the server calls `name`.
    pub fn look(name: String, disk: Arc<dyn ReadAt>) -> Result<Self> {
        let (mut filesystems, _) = file_systems(&disk)?;
        with_volumes(disk, &mut filesystems)?;
        Ok(DataDisk { name, filesystems })
    }
}

/// What was noticed of file systems when they were opened, each thing once.
#[derive(Default)]
struct Notes {
    stale: Vec<String>,
    unread: Vec<String>,
}

fn note(notes: &mut Vec<String>, text: String) {
    if !notes.contains(&text) {
        notes.push(text);
    }
}

/// The files of a file system, of btrfs those of the subvolume that `options` name, or else of the default one; `None`
/// when haul cannot read it, or there is no such subvolume. Fails only as reading fails.
fn volume(
    disk: &Arc<dyn ReadAt>,
    fs: &FileSystem,
    options: &str,
    notes: &mut Notes,
) -> Result<Option<Box<dyn Volume>>> {
    match open_volume(disk, fs, options, notes) {
        // It may hold data alone, which is copied whatever it is.
        Err(error) if error.kind() == Kind::Image && error.retry() == Retry::No => {
            note(&mut notes.unread, format!("{}: {}", error.what(), error.why()));
            Ok(None)
        }
        opened => opened,
    }
}

fn open_volume(
    disk: &Arc<dyn ReadAt>,
    fs: &FileSystem,
    options: &str,
    notes: &mut Notes,
) -> Result<Option<Box<dyn Volume>>> {
    let window = window(disk, fs);
    let name = window.name();
    let volume = match fs.kind.as_str() {
        kind if kind.starts_with("ext") => return Ok(Some(Box::new(ExtVolume::open(window)?))),
        "xfs" => FilesVolume::new(layout::xfs_files(Arc::new(window))?, name.clone()),
        kind if is_fat(kind) => FilesVolume::new(layout::fat_files(Arc::new(window))?, name.clone()),
        "btrfs" => match subvolume(BtrfsFiles::open(Arc::new(window))?, options, &name)? {
            Some(volume) => volume,
            None => return Ok(None),
        },
        _ => return Ok(None),
    };
    if let Some(why) = volume.stale() {
        note(&mut notes.stale, format!("{name}: {why}"));
    }
    Ok(Some(Box::new(volume)))
}

fn subvolume(files: BtrfsFiles, options: &str, name: &str) -> Result<Option<FilesVolume>> {
    if let Some(path) = options.strip_prefix("subvol=") {
        return FilesVolume::new(Box::new(files), name.to_owned())
            .below(&format!("/{}", path.trim_matches('/')));
    }
    let id = match options.strip_prefix("subvolid=") {
        Some(id) => id.parse().unwrap_or(0),
        None => files.default_subvolume()?,
    };
    Ok(files.rooted_at(id)?.map(|files| FilesVolume::new(Box::new(files), name.to_owned())))
}

fn window(disk: &Arc<dyn ReadAt>, fs: &FileSystem) -> Window<Arc<dyn ReadAt>> {
    let name = match (&fs.logical, fs.partition) {
        (Some(logical), _) => format!("{}/{} on {}", logical.group, logical.name, disk.name()),
        (None, Some(number)) => format!("partition {number} of {}", disk.name()),
        (None, None) => disk.name(),
    };
    Window::new(Arc::clone(disk), fs.extent, name)
}

/// What is on the disk, and how it boots.
pub fn file_systems(disk: &Arc<dyn ReadAt>) -> Result<(Vec<FileSystem>, BootMode)> {
    let Some(table) = layout::read_table(disk)? else {
        let whole = Extent::new(0, disk.size());
        return Ok((vec![file_system(disk, Place::Whole, whole)?], BootMode::Bios));
    };
    let mut found = Vec::new();
    let (mut esp, mut bios_boot) = (false, false);
    for part in &table.partitions {
        let is_esp = match part.kind {
            PartitionType::Mbr(kind) => kind == MBR_ESP,
            PartitionType::Gpt(kind) => kind.to_string() == ESP,
        };
        esp |= is_esp;
        bios_boot |= matches!(part.kind, PartitionType::Gpt(kind) if kind.to_string() == BIOS_BOOT);
        if !part.kind.is_extended() {
            let own = part.guid.map(|guid| guid.to_string());
            let fs = file_system(disk, Place::Partition(part.number, own), part.extent)?;
            found.push(FileSystem { esp: is_esp, ..fs });
        }
    }
    let mirrors = layout::mirrors(disk, &table)?;
    for fs in &mut found {
        if let Some((_, mirror)) = mirrors.iter().find(|(number, _)| fs.partition == Some(*number)) {
            *fs = file_system(disk, Place::Array(fs.partition, Array::new(mirror)), mirror.data)?;
        }
    }
    Ok((found, if esp && !bios_boot { BootMode::Uefi } else { BootMode::Bios }))
}

/// What a file system may be in.
enum Place {
    Whole,
    /// The number, and the partition's own UUID.
    Partition(u32, Option<String>),
    Logical(Logical),
    /// The number of the partition, if it is in one.
    Array(Option<u32>, Array),
}

fn file_system(disk: &Arc<dyn ReadAt>, place: Place, extent: Extent) -> Result<FileSystem> {
    let (partition, partition_uuid, logical, array) = match place {
        Place::Whole => (None, None, None, None),
        Place::Partition(number, uuid) => (Some(number), uuid, None, None),
        Place::Logical(logical) => (None, None, Some(logical), None),
        Place::Array(number, array) => (number, None, None, Some(array)),
    };
    let mut fs = FileSystem {
        partition,
        logical,
        array,
        extent,
        kind: String::new(),
        uuid: None,
        label: None,
        partition_uuid,
        group: None,
        point: None,
        esp: false,
    };
    let content = layout::identify(&window(disk, &fs))?;
    content.name().clone_into(&mut fs.kind);
    let (uuid, label) = match content {
        layout::Content::Ext(ext) => (Some(ext.uuid.to_string()), ext.label),
        layout::Content::Xfs(xfs) => (Some(xfs.uuid.to_string()), xfs.label),
        layout::Content::Btrfs(btrfs) => (Some(btrfs.uuid.to_string()), btrfs.label),
        layout::Content::Ntfs(ntfs) => (Some(ntfs.uuid()), ntfs.label),
        layout::Content::Fat(fat) => (fat.serial, fat.label),
        layout::Content::Exfat(exfat) => (exfat.serial, exfat.label),
        layout::Content::Lvm(pv) => {
            fs.group = Some(pv.group.unwrap_or_default());
            return Ok(fs);
        }
        layout::Content::Swap(swap) => (Some(swap.uuid.to_string()), swap.label),
        _ => return Ok(fs),
    };
    fs.uuid = uuid;
    fs.label = Some(label).filter(|label| !label.is_empty());
    Ok(fs)
}
