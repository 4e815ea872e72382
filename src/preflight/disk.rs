//! How the disk is divided, and how it boots.

use super::{Check, Run, Severity, Subject, Verdict};
use crate::config::Edition;
use crate::error::Kind;
use crate::guest::disk::{BootMode, file_systems};
use crate::io::{is_zero, read_array};
use crate::layout::{TableKind, read_table};

pub const CHECKS: &[Check] = &[
    Check { id: "disk.table", title: "the cloud can read the partition table", run: Run::Disk(table) },
    Check { id: "disk.boot", title: "the cloud can boot it", run: Run::Disk(boot) },
];

fn table(subject: &Subject<'_>) -> Option<Verdict> {
    let table = match read_table(subject.disk) {
        Ok(Some(table)) => table,
        Ok(None) => {
            let what = "there is no partition table";
            let remedy = "the cloud imports system disks with partitions only; this may be the wrong disk";
            return Some(Verdict::new(subject.of_system(), what, remedy));
        }
        Err(error) if error.kind() == Kind::Image => return Some(Verdict::of_error(Severity::Fail, &error)),
        // source.readable tells.
        Err(_) => return None,
    };
    let name = match table.kind {
        TableKind::Mbr => "MBR",
        TableKind::Gpt => "GPT",
    };
    if table.partitions.is_empty() {
        let remedy = "this may be the wrong disk";
        return Some(Verdict::new(subject.of_system(), format!("the {name} has no partition"), remedy));
    }
    if table.kind == TableKind::Gpt && subject.options.edition() == Edition::Tce {
        return Some(Verdict::new(
            subject.of_system(),
            "GPT: the private edition imports disks with an MBR only",
            "convert the table (sgdisk --gpttombr) on a copy and make that boot by BIOS",
        ));
    }
    if !table.findings.is_empty() {
        let findings: Vec<&str> = table.findings.iter().map(|finding| finding.what.as_str()).collect();
        return Some(Verdict::warn(findings.join("; "), "check it with fdisk -l or sgdisk -v"));
    }
    let numbers: Vec<String> = table.partitions.iter().map(|part| part.number.to_string()).collect();
    Some(Verdict::pass(format!("{name} with partition {}", numbers.join(", "))))
}

fn boot(subject: &Subject<'_>) -> Option<Verdict> {
    // Without a table there is nothing to boot from, which disk.table tells.
    read_table(subject.disk).ok().flatten()?;
    let (_, mode) = file_systems(subject.disk).ok()?;
    let wanted = subject.options.fixes.firmware;
    Some(match (mode, subject.options.edition()) {
        // Whether that can be done is told with the fix-ups.
        _ if wanted.is_some_and(|firmware| firmware != mode) => Verdict::new(
            Severity::Fixable,
            "it boots by firmware of another kind than the copy is to boot by",
            "haul gives the copy a boot loader for it",
        ),
        (BootMode::Uefi, Edition::Tce) => Verdict::new(
            subject.of_system(),
            "it boots by UEFI, which the private edition does not import",
            "migrate with --firmware bios",
        ),
        (BootMode::Uefi, Edition::Public) => Verdict::pass("UEFI, which the import declares"),
        // The first 440 bytes are the boot loader's: an empty one is no loader at all.
        (BootMode::Bios, _) => match read_array::<440>(subject.disk, 0) {
            Ok(code) if is_zero(&code) => Verdict::new(
                subject.of_system(),
                "it has no EFI system partition, and no boot code in its first sector",
                "this may be a data disk; else install the boot loader: grub-install DISK",
            ),
            Ok(_) => Verdict::pass("BIOS, with boot code in the first sector"),
            Err(_) => return None,
        },
    })
}
