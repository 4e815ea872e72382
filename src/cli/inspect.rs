//! `haul inspect`: what a disk or image is and holds.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::input::Input;
use super::output::Output;
use crate::config::{Location, location_parser};
use crate::error::Result;
use crate::guest::disk::BootMode;
use crate::guest::kernels::Kernel;
use crate::guest::{self, Guest};
use crate::image::{Details, Info};
use crate::io::ReadAt;
use crate::layout::{self, Content, PartitionType, TableKind, Usage, UsedMap};
use crate::unit::bytes::human;

/// Say what a disk or image is: format, partitions, file systems, bytes in use
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul inspect /dev/sda
  haul inspect --json server.qcow2
  haul inspect --region ap-guangzhou cos://images-1250000000/server.qcow2")]
pub struct Arguments {
    /// A disk, an image, or an object as cos://BUCKET/KEY
    #[arg(value_parser = location_parser())]
    disk: Location,
    #[command(flatten)]
    input: Input,
}

#[derive(Serialize)]
struct Document {
    image: Info,
    /// `mbr`, `gpt` or none.
    table: Option<&'static str>,
    volumes: Vec<Volume>,
    /// The system on it, where haul finds one.
    guest: Option<Guest>,
    /// Bytes a copy reads, by the used maps.
    used_bytes: Option<u64>,
    findings: Vec<String>,
}

#[derive(Serialize)]
struct Volume {
    partition: Option<u32>,
    /// `group/volume`; then `start` and `end` are 0 and its length.
    logical_volume: Option<String>,
    /// The volume group of a physical volume.
    volume_group: Option<String>,
    start: u64,
    end: u64,
    kind: Option<String>,
    name: Option<String>,
    bootable: bool,
    content: String,
    label: Option<String>,
    uuid: Option<String>,
    used_bytes: Option<u64>,
    whole_because: Option<String>,
}

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let input = &arguments.input;
    let opened = input.open(&arguments.disk, stop, &output.notes())?;
    let info = opened.inspect(input.format)?;
    let mut document = Document {
        image: info,
        table: None,
        volumes: Vec::new(),
        guest: None,
        used_bytes: None,
        findings: Vec::new(),
    };
    let image = opened.image(input.format, &input.references.gate());
    match image.and_then(|image| look(image.disk, &mut document)) {
        Ok(()) => {}
        // The image's own facts are worth printing even when its disk cannot be read.
        Err(error) => document.findings.push(error.to_string()),
    }
    output.result(&document, &text(&arguments.disk.to_string(), &document));
    Ok(())
}

fn look(disk: Arc<dyn ReadAt>, document: &mut Document) -> Result<()> {
    describe(&layout::used_map(disk.clone())?, document);
    match guest::inspect(disk) {
        Ok(guest) => document.guest = Some(guest),
        // Most disks hold no system, or one haul does not know.
        Err(error) if error.id() == "guest.no-root" => {}
        Err(error) => document.findings.push(error.to_string()),
    }
    Ok(())
}

fn describe(map: &UsedMap, document: &mut Document) {
    document.table = map.table().map(|table| match table.kind {
        TableKind::Mbr => "mbr",
        TableKind::Gpt => "gpt",
    });
    document.used_bytes = Some(map.used_bytes());
    document.findings = map.findings().into_iter().map(|finding| finding.what).collect();
    let partitions = map.table().map(|table| &table.partitions[..]).unwrap_or_default();
    for volume in map.volumes() {
        let partition = partitions.iter().find(|part| Some(part.number) == volume.partition);
        let (label, uuid) = match &volume.content {
            Content::Ext(ext) => (Some(ext.label.clone()), Some(ext.uuid.to_string())),
            Content::Xfs(xfs) => (Some(xfs.label.clone()), Some(xfs.uuid.to_string())),
            Content::Btrfs(btrfs) => (Some(btrfs.label.clone()), Some(btrfs.uuid.to_string())),
            Content::Fat(fat) => (Some(fat.label.clone()), fat.serial.clone()),
            Content::Exfat(exfat) => (Some(exfat.label.clone()), exfat.serial.clone()),
            Content::Ntfs(ntfs) => (Some(ntfs.label.clone()), Some(ntfs.uuid())),
            Content::Swap(swap) => (Some(swap.label.clone()), Some(swap.uuid.to_string())),
            Content::Lvm(pv) => (None, pv.uuid.clone()),
            _ => (None, None),
        };
        let (used_bytes, whole_because) = match &volume.usage {
            Usage::Mapped { used_bytes } => (Some(*used_bytes), None),
            Usage::Whole { reason } => (None, Some(reason.clone())),
        };
        let volume_group = match &volume.content {
            Content::Lvm(pv) => pv.group.clone(),
            _ => None,
        };
        document.volumes.push(Volume {
            partition: volume.partition,
            logical_volume: volume.logical.clone(),
            volume_group,
            start: volume.extent.start,
            end: volume.extent.end,
            kind: partition.map(|part| match part.kind {
                PartitionType::Mbr(byte) => format!("{byte:#04x}"),
                PartitionType::Gpt(guid) => guid.to_string(),
            }),
            name: partition.and_then(|part| part.name.clone()),
            bootable: partition.is_some_and(|part| part.bootable),
            content: volume.content.name().to_owned(),
            label: label.filter(|label| !label.is_empty()),
            uuid,
            used_bytes,
            whole_because,
        });
    }
}

fn text(name: &str, document: &Document) -> String {
    let info = &document.image;
    let mut text = format!("{name}: {} disk, {}", human(info.virtual_size), info.format);
    if info.file_size != info.virtual_size {
        let _ = write!(text, " image of {}", human(info.file_size));
    }
    let _ = match document.table {
        Some(table) => writeln!(text, ", {} partition table", table.to_uppercase()),
        None => writeln!(text, ", no partition table"),
    };
    if let Some(details) = &info.details {
        describe_image(details, &mut text);
    }
    for volume in &document.volumes {
        let place = match (&volume.logical_volume, volume.partition) {
            (Some(name), _) => name.clone(),
            (None, Some(number)) => number.to_string(),
            (None, None) => "disk".to_owned(),
        };
        let size = human(volume.end - volume.start);
        let _ = write!(text, "{place:>4} {size:>11}  {:<10}", volume.content);
        let _ = match (volume.used_bytes, &volume.whole_because) {
            (Some(used), _) => write!(text, " {} used", human(used)),
            (None, Some(why)) => write!(text, " copied whole: {why}"),
            (None, None) => Ok(()),
        };
        if let Some(group) = &volume.volume_group {
            let _ = write!(text, ", of group {group}");
        }
        if let Some(label) = &volume.label {
            let _ = write!(text, ", label {label:?}");
        }
        let _ = writeln!(text);
    }
    if let Some(guest) = &document.guest {
        describe_guest(guest, &mut text);
    }
    if let Some(used) = document.used_bytes {
        let _ = writeln!(text, "a copy holds {}", human(used));
    }
    for finding in &document.findings {
        let _ = writeln!(text, "finding: {finding}");
    }
    text
}

fn describe_image(details: &Details, text: &mut String) {
    let _ = match details {
        Details::Qcow2(qcow2) => {
            let _ = writeln!(text, "qcow2 version {}, {} clusters", qcow2.version, human(qcow2.cluster_size));
            qcow2.backing_file.iter().try_for_each(|backing| writeln!(text, "backing file {backing:?}"))
        }
        Details::Vhd(vhd) => writeln!(text, "{} vhd, made by {:?}", vhd.subformat, vhd.creator),
        Details::Vhdx(vhdx) => {
            let log = if vhdx.log_replayed { ", its log replayed" } else { "" };
            writeln!(text, "{} vhdx, {} blocks{log}", vhdx.subformat, human(vhdx.block_size))
        }
        Details::Vmdk(vmdk) => {
            let _ = writeln!(text, "{} vmdk", vmdk.create_type);
            vmdk.extents.iter().try_for_each(|extent| writeln!(text, "extent file {extent:?}"))
        }
    };
}

fn describe_guest(guest: &Guest, text: &mut String) {
    let boot = match guest.boot {
        BootMode::Bios => "BIOS",
        BootMode::Uefi => "UEFI",
    };
    let name = if guest.os.name.is_empty() { "unnamed system" } else { &guest.os.name };
    let _ = write!(text, "{name}, {}, boots by {boot}", guest.arch);
    if let Some(hostname) = &guest.hostname {
        let _ = write!(text, ", host name {hostname}");
    }
    let _ = writeln!(text);
    for kernel in &guest.kernels {
        let _ = writeln!(text, "kernel {}: {}", kernel.version, virtio(kernel));
    }
    if !guest.network.is_empty() {
        let _ = writeln!(text, "network by {}", guest.network.join(", "));
    }
    let _ = match &guest.cloud_init {
        Some(installed) if installed.disabled => {
            writeln!(text, "cloud-init {}, switched off", installed.version)
        }
        Some(installed) => writeln!(text, "cloud-init {}", installed.version),
        None => writeln!(text, "no cloud-init"),
    };
}

/// Whether a kernel finds its root on virtio.
fn virtio(kernel: &Kernel) -> String {
    match kernel.lacking() {
        none if none.is_empty() => "virtio when it boots".to_owned(),
        names => format!("{} not there when it boots", names.join(", ")),
    }
}
