//! `haul boot`: whether an image boots as it would in a cloud.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::ValueEnum;

use super::input::{Firmware, Input};
use super::output::Output;
use crate::boot::{self, Expect, Machine, Outcome};
use crate::config::{Location, location_parser};
use crate::error::{Error, Kind, Result};
use crate::guest::disk::{BootMode, file_systems};
use crate::guest::inspect;
use crate::host::programs::Programs;
use crate::image::{Format, Image, qcow2};
use crate::io::ReadAt;
use crate::io::nbd::Server;
use crate::job::open::Opened;
use crate::job::probe::{Inside, MARKER, probed};
use crate::monitor::{Level, Monitor};

/// Boot an image in QEMU on a cloud's hardware, and say whether its user space came up
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul boot server.qcow2
  haul boot --script check-web.sh cos://images-1250000000/server.qcow2
  haul boot --hardware sata --expect 'web01 login:' --timeout 600 server.raw

By root, of a Linux that haul knows, it also says what the guest's root is on, and whether a network card has an address
and all of /etc/fstab is mounted: a script in what is thrown away tells, for which the image's file systems are mounted here
for a moment. With --expect, or where that cannot be, nothing is mounted, and a login prompt or the like is enough.

The image is not written, nor an object downloaded: what the guest reads is fetched, what it writes
is thrown away. The guest reaches no network.
Exit code 11 when it does not come up; the console and a picture of the screen are kept.")]
pub struct Arguments {
    /// A disk, an image, an object as cos://BUCKET/KEY, or an NBD export
    #[arg(value_parser = location_parser())]
    image: Location,
    #[command(flatten)]
    input: Input,
    /// Firmware (default: UEFI when the disk has an EFI system partition and no BIOS boot partition)
    #[arg(long, value_enum)]
    firmware: Option<Firmware>,
    /// Processor (default: the one that the disk's system is for)
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Disk controller and network card
    #[arg(long, value_enum, default_value = "virtio")]
    hardware: Hardware,
    /// Text that must appear on the serial console, and nothing else (default: see below)
    #[arg(long, value_name = "TEXT")]
    expect: Option<String>,
    /// Run this script in the guest, as root, once it is up: it must end with 0. What it says goes to the console
    #[arg(long, value_name = "FILE", conflicts_with = "expect")]
    script: Option<PathBuf>,
    /// Give up after so many seconds
    #[arg(long, default_value = "300", value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// The guest's memory
    #[arg(long, default_value = "1024", value_name = "MIB", value_parser = clap::value_parser!(u32).range(64..))]
    memory: u32,
    /// Keep the serial console in this file (default: IMAGE.console.log in this folder)
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Keep the picture of the screen in this file (default: beside the console, .png)
    #[arg(long, value_name = "FILE")]
    screenshot: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Arch {
    #[value(name = "x86_64")]
    X86_64,
    Aarch64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Hardware {
    Virtio,
    VirtioScsi,
    Sata,
}

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let console = arguments.console.clone().unwrap_or_else(|| {
        let name = arguments.image.file_name().to_string_lossy();
        PathBuf::from(format!("{name}.console.log"))
    });
    if console.extension().is_some_and(|extension| extension == "png") {
        return Err(Error::new(Kind::Usage, "usage.console", "the console cannot be kept in a .png file")
            .because("the picture of the screen gets that name")
            .remedy("name another file, such as console.log"));
    }
    let programs = Programs::default();
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let input = &arguments.input;
    let opened = input.open(&arguments.image, stop, &monitor)?;
    let image = opened.image(input.format, &input.references.gate())?;
    let uefi = match arguments.firmware {
        Some(firmware) => matches!(firmware, Firmware::Uefi),
        None => matches!(file_systems(&image.disk), Ok((_, BootMode::Uefi))),
    };
    let arch = match arguments.arch {
        Some(Arch::X86_64) => boot::Arch::X86_64,
        Some(Arch::Aarch64) => boot::Arch::Aarch64,
        None if uefi => {
            // What is no Linux that haul knows is for a PC.
            boot::Arch::of_guest(inspect::arch_on(Arc::clone(&image.disk)).unwrap_or("unknown"))
        }
        None => boot::Arch::X86_64,
    };
    programs.find(arch.program())?;
    let probed = match &arguments.expect {
        Some(_) => None,
        None => look_inside(&image, arguments.script.as_deref(), &*monitor)?,
    };
    let (served, path, format) = match &probed {
        Some(disk) => serve(Arc::clone(disk))?,
        None => present(&opened, image)?,
    };
    let machine = Machine {
        arch,
        firmware: if uefi { boot::Firmware::Uefi } else { boot::Firmware::Bios },
        hardware: match arguments.hardware {
            Hardware::Virtio => boot::Hardware::Virtio,
            Hardware::VirtioScsi => boot::Hardware::VirtioScsi,
            Hardware::Sata => boot::Hardware::Sata,
        },
        memory_mib: arguments.memory,
        ..Machine::new(&path, format)
    };
    let marker = arguments.expect.clone().or_else(|| probed.as_ref().map(|_| MARKER.to_owned()));
    let expect = marker.map_or(Expect::UserSpace, Expect::Marker);
    let timeout = Duration::from_secs(arguments.timeout);
    let outcome = boot::run(&programs, &machine, expect, timeout, &console, &*progress);
    progress.finish();
    // A disk that could not be read is why the guest did not come up.
    served.map_or(Ok(()), Server::stop)?;
    let mut outcome = outcome?;
    if let (Some(from), Some(to)) = (&outcome.screenshot, &arguments.screenshot) {
        keep(from, to)?;
        outcome.screenshot = Some(to.clone());
    }
    let outcome = outcome.up()?;
    let mut report = outcome.report();
    let mut evidence = outcome.verdict.evidence.clone();
    if probed.is_some() {
        let inside = inside(&outcome)?;
        report["inside"] = serde_json::json!(inside);
        evidence = format!("root on {}, {}", inside.root, inside.addresses.join(", "));
    }
    let text = format!(
        "the guest came up after {} s ({}): {evidence}\nconsole {}",
        outcome.elapsed.as_secs(),
        outcome.accelerator.name(),
        outcome.console.display()
    );
    output.result(&report, &text);
    Ok(())
}

/// The disk with what says how its guest came up; `None`, which is noted, where that cannot be had and no `script` needs it.
fn look_inside(
    image: &Image,
    script: Option<&Path>,
    monitor: &dyn Monitor,
) -> Result<Option<Arc<dyn ReadAt>>> {
    let text = script.map(|path| {
        fs::read_to_string(path).map_err(|error| {
            Error::new(Kind::Source, "boot.script", format!("cannot read the script {}", path.display()))
                .remedy("see that it is there, can be read, and is text")
                .caused_by(error)
        })
    });
    let text = text.transpose()?;
    match probed(Arc::clone(&image.disk), text.as_deref(), monitor) {
        Ok(disk) => Ok(Some(disk)),
        Err(error) if script.is_some() => Err(error),
        Err(error) => {
            let why = format!("not looked inside: {}: {}", error.what(), error.why());
            monitor.note(Level::Info, &why);
            Ok(None)
        }
    }
}

/// What the guest said of itself; an error where something is missing.
fn inside(outcome: &Outcome) -> Result<Inside> {
    let inside = Inside::parse(&outcome.verdict.evidence);
    let complaints = match &inside {
        Some(inside) => inside.complaints(),
        None => vec!["what it said of itself was cut off".to_owned()],
    };
    match inside {
        Some(inside) if complaints.is_empty() => Ok(inside),
        _ => Err(Error::new(Kind::Boot, "boot.incomplete", "the guest came up, but something is missing")
            .because(complaints.join("; "))
            .remedy(format!(
                "look at its console in {}; --expect 'login:' asks for no more than a prompt",
                outcome.console.display()
            ))
            .fact("console", outcome.console.display())),
    }
}

/// Shows a disk to QEMU: a local raw or qcow2 file by its name, everything else through haul's own reader.
fn present(opened: &Opened, image: Image) -> Result<(Option<Server>, PathBuf, boot::Format)> {
    if let (Some(path), false) = (opened.path(), opened.is_unwrapped()) {
        let alone = |info: &qcow2::Info| info.backing_file.is_none() && info.data_file.is_none();
        match image.format {
            Format::Raw => return Ok((None, path.to_owned(), boot::Format::Raw)),
            Format::Qcow2 if image.info.qcow2().is_some_and(alone) => {
                return Ok((None, path.to_owned(), boot::Format::Qcow2));
            }
            _ => {}
        }
    }
    serve(image.disk)
}

/// Shows a disk to QEMU through haul.
fn serve(disk: Arc<dyn ReadAt>) -> Result<(Option<Server>, PathBuf, boot::Format)> {
    let socket = std::env::temp_dir().join(format!("haul-boot-{}.sock", std::process::id()));
    let server = Server::start(disk, &socket)?;
    Ok((Some(server), socket, boot::Format::Served))
}

/// Moves a file, also to another file system.
fn keep(from: &Path, to: &Path) -> Result<()> {
    let same = from.canonicalize().ok().is_some_and(|from| to.canonicalize().is_ok_and(|to| from == to));
    if same {
        return Ok(());
    }
    fs::copy(from, to).and_then(|_| fs::remove_file(from)).map_err(|error| {
        Error::new(Kind::Destination, "boot.screenshot", format!("cannot write {}", to.display()))
            .caused_by(error)
    })
}
