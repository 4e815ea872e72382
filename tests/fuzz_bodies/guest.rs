//! Bytes as the disk, the files, the initramfs and the serial console of a guest.

use std::sync::Arc;

use haul::boot::{Console, Expect, Verdict};
use haul::error::{Error, Kind};
use haul::guest::disk::{BootMode, DataDisk, FileSystem};
use haul::guest::tree::{TextVolume, Tree};
use haul::guest::{self, Guest, Options, initramfs, plan};
use haul::unit::Extent;

use super::watched::Watched;
use super::{Outcome, input, signature};

/// Longest disk, in bytes.
const LONGEST: u64 = 1 << 30;

/// An error must blame the guest.
fn judge(error: Error) -> Outcome {
    assert_eq!(error.kind(), Kind::Image, "{error:?}");
    Outcome::Refused(signature(&error))
}

/// Plans what `guest` needs.
fn look(guest: &Guest) -> Outcome {
    let mut seen =
        vec![guest.arch.to_owned(), guest.network.join(","), guest.kernels.len().min(3).to_string()];
    for keep_network in [false, true] {
        let twin = || DataDisk { name: "/dev/sdb".into(), filesystems: guest.filesystems.clone() };
        match plan(
            guest,
            &Options {
                keep_network,
                no_cloud_init_network: keep_network,
                no_guest_programs: keep_network,
                force_import: keep_network,
                packages: Vec::new(),
                firmware: None,
                data_disks: keep_network.then(twin).into_iter().collect(),
                appliance: false,
            },
        ) {
            Ok(plan) => {
                seen.push(plan.fixes.len().min(6).to_string());
                seen.extend(plan.findings.iter().map(|finding| finding.id.clone()).take(6));
                let _ = serde_json::to_string(&plan).unwrap();
            }
            Err(error) => seen.push(match judge(error) {
                Outcome::Refused(why) => why,
                other => panic!("{other:?}"),
            }),
        }
    }
    seen.sort();
    seen.dedup();
    Outcome::Fine(seen.join(" "))
}

/// Takes `bytes` as a disk: the guest on it is found and what it needs is planned, or it fails with an error.
pub fn fuzz_guest(bytes: &[u8]) -> Outcome {
    let disk = Watched::within(input::disk(bytes, LONGEST), 400_000, 1 << 30);
    guest::inspect(Arc::new(disk)).map_or_else(judge, |guest| look(&guest))
}

/// Takes `bytes` as the files of a guest: a line `=== PATH` before each, `=== PATH -> TARGET` for a link.
pub fn fuzz_files(bytes: &[u8]) -> Outcome {
    let mut root = TextVolume::default();
    for part in bytes
        .split_inclusive(|byte| *byte == b'\n')
        .collect::<Vec<_>>()
        .chunk_by(|_, line| !line.starts_with(b"=== "))
    {
        let head = String::from_utf8_lossy(part[0].strip_prefix(b"=== ").unwrap_or_default()).into_owned();
        let head = head.trim_end_matches('\n');
        root = match head.split_once(" -> ") {
            Some((path, target)) if path.starts_with('/') => root.symlink(path, target),
            None if head.starts_with('/') => root.file(head, part[1..].concat()),
            _ => root,
        };
    }
    let fs = |number: u32, kind: &str, uuid: &str, point: Option<&str>| FileSystem {
        partition: Some(number),
        logical: None,
        array: None,
        extent: Extent::at(u64::from(number) << 20, 1 << 20),
        kind: kind.into(),
        uuid: Some(uuid.into()),
        label: Some(format!("label{number}")),
        partition_uuid: Some(format!("c4e5a5d0-000{number}-4000-8000-000000000000")),
        group: None,
        point: point.map(str::to_owned),
        esp: false,
    };
    let filesystems = vec![
        fs(1, "ext4", "11111111-1111-4111-8111-111111111111", Some("/")),
        fs(2, "swap", "22222222-2222-4222-8222-222222222222", None),
        fs(3, "ext4", "33333333-3333-4333-8333-333333333333", None),
    ];
    let guest = guest::inspect::from_tree(Tree::new(Box::new(root)), filesystems, BootMode::Bios);
    guest.map_or_else(judge, |guest| look(&guest))
}

/// Takes `bytes` as an initramfs: its modules are listed, or it fails with an error.
pub fn fuzz_initramfs(bytes: &[u8]) -> Outcome {
    match initramfs::read(bytes, "fuzz") {
        Ok(found) => Outcome::Fine(format!(
            "{:?} {}",
            found.parts.iter().take(5).collect::<Vec<_>>(),
            found.modules.len().min(3)
        )),
        Err(error) => {
            assert!(error.what().contains("fuzz"), "the file is not named: {error:?}");
            judge(error)
        }
    }
}

/// Takes `bytes` as what a guest says on its console: how its boot went does not depend on how they come in.
pub fn fuzz_console(bytes: &[u8]) -> Outcome {
    let judge = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut console = Console::new(Expect::UserSpace);
        let verdict = pieces.fold(None, |verdict, piece| verdict.or(console.feed(piece)));
        (verdict, console.last_line().to_owned(), console.pause())
    };
    let whole = judge(&mut std::iter::once(bytes));
    assert!(whole == judge(&mut bytes.chunks(1)), "it is told otherwise byte by byte");
    let (verdict, last, pause) = whole;
    for shown in verdict.iter().chain(&pause).map(|verdict| &verdict.evidence).chain([&last]) {
        assert!(!shown.contains(char::is_control), "{shown:?}");
        assert!(shown.len() <= 3 * 3 * 4096, "{} bytes are shown", shown.len());
    }
    let marker = Console::new(Expect::Marker("HAUL-BEACON".into())).feed(bytes);
    let state =
        |verdict: &Option<_>| verdict.as_ref().map_or("none", |verdict: &Verdict| verdict.state.name());
    Outcome::Fine(format!("{} {} {}", state(&verdict), state(&pause), state(&marker)))
}
