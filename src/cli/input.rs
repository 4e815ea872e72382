//! The options of every command that reads a disk or an image.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::config::{Cloud, Location};
use crate::error::{Error, Kind, Result};
use crate::guest::disk::{BootMode, DataDisk};
use crate::guest::linux::fstab::split_device;
use crate::guest::{self, package};
use crate::image::{Format, Gate, Image};
use crate::job::open::{Opened, Opener};
use crate::monitor::Monitor;

/// How to read an image, and what it may refer to.
#[derive(clap::Args)]
pub struct Input {
    /// Its format (default: probed; a device is raw)
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// The member that holds the image, where a tar archive or OVA has several
    #[arg(long, value_name = "NAME")]
    pub member: Option<String>,
    #[command(flatten)]
    pub references: References,
    #[command(flatten)]
    pub cloud: Cloud,
}

/// The files an image may refer to: none but those named.
#[derive(clap::Args)]
pub struct References {
    /// A backing file that a qcow2 image may read
    #[arg(long, value_name = "FILE")]
    backing: Vec<PathBuf>,
    /// An external data file that a qcow2 image may read
    #[arg(long, value_name = "FILE")]
    data_file: Vec<PathBuf>,
    /// An extent file that a VMDK descriptor may name
    #[arg(long, value_name = "FILE")]
    extent: Vec<PathBuf>,
}

/// Firmware of a machine.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Firmware {
    Bios,
    Uefi,
}

/// Another disk of a server: what the server calls it, and where it is now.
#[derive(Clone)]
struct OtherDisk {
    name: String,
    location: Location,
}

impl OtherDisk {
    /// Parses `/dev/sdb=LOCATION`: a disk may have another name here than on the server.
    fn parse(text: OsString) -> Result<Self> {
        let named = text.to_str().and_then(|text| text.split_once('='));
        match named {
            Some((name, location)) if matches!(split_device(name), Some((_, None))) => {
                Ok(OtherDisk { name: name.to_owned(), location: Location::parse(location.into())? })
            }
            _ => {
                let disk = named.map_or(text.display().to_string(), |(_, location)| location.to_owned());
                let what = format!("{} does not say which disk of the server it is", text.display());
                Err(Error::new(Kind::Usage, "usage.data-disk", what)
                    .because(format!("put before it what the server calls it, as in /dev/sdb={disk}")))
            }
        }
    }

    fn parser() -> impl TypedValueParser<Value = OtherDisk> {
        OsStringValueParser::new().try_map(OtherDisk::parse)
    }
}

/// What to change in a guest, and how.
#[derive(clap::Args)]
pub struct Fixes {
    /// Leave addresses and names of network cards as they are, instead of DHCP on eth0
    #[arg(long)]
    keep_network: bool,
    /// Keep cloud-init from configuring the network
    #[arg(long)]
    no_cloud_init_network: bool,
    /// Run no program of the guest: append drivers to its initramfs instead of building a new one
    #[arg(long)]
    no_guest_programs: bool,
    /// The guest has no cloud-init: import it with force, and let the copy take its password from the cloud without
    #[arg(long)]
    pub force_import: bool,
    /// Install this package of the guest's distribution (.deb, .rpm) in the copy, such as cloud-init; all that are given
    /// at once
    #[arg(long = "package", value_name = "FILE", conflicts_with = "no_guest_programs")]
    packages: Vec<PathBuf>,
    /// Have the copy boot by this firmware, too, where the disk boots by the other one; by the guest's own GRUB
    #[arg(long, conflicts_with = "no_guest_programs")]
    firmware: Option<Firmware>,
    /// Another disk of the server, which is migrated by itself, after what the server calls it: /dev/sdb=data.qcow2.
    /// /etc/fstab names what is on it by UUID, and the copy waits for it
    #[arg(long = "data-disk", value_name = "NAME=DISK", value_parser = OtherDisk::parser())]
    data_disks: Vec<OtherDisk>,
    /// Fix in a virtual machine, by the guest's own kernel, as haul does by itself where it is not root; needs QEMU
    #[arg(long)]
    appliance: bool,
}

impl Fixes {
    /// The choices, once the packages are seen to be there, and the other disks looked at by what `opener` opens.
    pub fn options(&self, opener: &Opener) -> Result<guest::Options> {
        let packages: Vec<PathBuf> =
            self.packages.iter().map(|file| package::find(file)).collect::<Result<_>>()?;
        let mut names: Vec<&str> = self.data_disks.iter().map(|other| other.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let what = format!("two data disks are called {}", pair[0]);
            return Err(Error::new(Kind::Usage, "usage.data-disk", what)
                .because("what the server mounts of it is on one of them only")
                .remedy("say of each what the server calls it"));
        }
        let look = |other: &OtherDisk| {
            let image = opener.image(&other.location, None, &Gate::closed())?;
            DataDisk::look(other.name.clone(), image.disk)
        };
        Ok(guest::Options {
            data_disks: self.data_disks.iter().map(look).collect::<Result<_>>()?,
            keep_network: self.keep_network,
            no_cloud_init_network: self.no_cloud_init_network,
            no_guest_programs: self.no_guest_programs,
            force_import: self.force_import,
            packages,
            firmware: self.firmware.map(|firmware| match firmware {
                Firmware::Bios => BootMode::Bios,
                Firmware::Uefi => BootMode::Uefi,
            }),
            appliance: self.appliance,
        })
    }
}

impl References {
    pub fn gate(&self) -> Gate {
        let gate = self.backing.iter().fold(Gate::closed(), Gate::backing);
        let gate = self.data_file.iter().fold(gate, Gate::data_file);
        self.extent.iter().fold(gate, Gate::extent)
    }
}

impl Input {
    /// Opens what is at `location`.
    pub fn open(
        &self,
        location: &Location,
        stop: &Arc<AtomicBool>,
        monitor: &Arc<dyn Monitor>,
    ) -> Result<Opened> {
        self.opener(stop, monitor).unwrapped(location, self.format)
    }

    /// What opens its image.
    pub fn opener(&self, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Opener {
        Opener::new(&self.cloud, stop, monitor).member(self.member.as_deref())
    }

    /// Opens the image at `location`.
    pub fn image(
        &self,
        location: &Location,
        stop: &Arc<AtomicBool>,
        monitor: &Arc<dyn Monitor>,
    ) -> Result<Image> {
        self.open(location, stop, monitor)?.image(self.format, &self.references.gate())
    }
}
