//! The virtual machine an image is booted in, and the QEMU command line that makes it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::host::programs::{Program, QEMU, QEMU_AARCH64};

/// The format of the image's file. Given, never guessed: a raw disk may hold anything at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk byte for byte.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// None: the image's path is the Unix socket of an NBD server whose default export is the disk.
    Served,
}

/// The processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// QEMU's `pc`.
    X86_64,
    /// QEMU's `virt`, which has UEFI only.
    Aarch64,
}

impl Arch {
    /// The machine for a guest of this architecture, named as the kernel does; a PC where no other is known.
    pub fn of_guest(name: &str) -> Self {
        if name == "aarch64" { Arch::Aarch64 } else { Arch::X86_64 }
    }

    /// The QEMU that has it.
    pub const fn program(self) -> &'static Program {
        match self {
            Arch::X86_64 => &QEMU,
            Arch::Aarch64 => &QEMU_AARCH64,
        }
    }

    /// Whether it is this machine's own.
    pub(super) const fn is_native(self) -> bool {
        match self {
            Arch::X86_64 => cfg!(target_arch = "x86_64"),
            Arch::Aarch64 => cfg!(target_arch = "aarch64"),
        }
    }
}

/// What starts the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF or AAVMF, without secure boot.
    Uefi,
}

/// The disk controller and network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// virtio-blk and virtio-net: a cloud's machine.
    Virtio,
    /// virtio-scsi and virtio-net.
    VirtioScsi,
    /// AHCI and e1000: like a physical server.
    Sata,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM where it is there and makes progress, else TCG.
    Auto,
    /// The processor.
    Kvm,
    /// QEMU's translator: works everywhere, many times slower.
    Tcg,
}

impl Accelerator {
    /// The name QEMU has for it.
    pub const fn name(self) -> &'static str {
        match self {
            Accelerator::Auto => "auto",
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }
}

/// A kernel that QEMU starts itself, past firmware and boot loader.
#[derive(Clone, Debug)]
pub struct Direct {
    /// The file of the kernel.
    pub kernel: PathBuf,
    /// The file of its initramfs.
    pub initramfs: PathBuf,
    /// Its arguments.
    pub arguments: String,
}

/// A machine with one disk, whose writes are thrown away, on a network that ends at its own DHCP server.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The image's file, a block device, or the socket it is served at.
    pub image: PathBuf,
    /// The image's format.
    pub format: Format,
    /// The processor.
    pub arch: Arch,
    /// BIOS or UEFI.
    pub firmware: Firmware,
    /// Disk controller and network card.
    pub hardware: Hardware,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// The network card's address.
    pub mac: [u8; 6],
    /// A second, read-only disk for cloud-init: [`crate::boot::config_drive`]. A virtio disk, or on SATA a CD.
    /// cloud-init decides before udev has loaded any driver, so it sees the drive only when the initramfs had its driver.
    pub config_drive: Option<PathBuf>,
    /// What runs the guest.
    pub accelerator: Accelerator,
    /// What is started in the place of what the disk boots. The disk's writes are kept then, and there is no network.
    pub direct: Option<Direct>,
}

impl Machine {
    /// A small cloud machine: virtio, 1 GiB, two processors, a network card address unlike any real one's.
    pub fn new(image: impl Into<PathBuf>, format: Format) -> Self {
        Machine {
            image: image.into(),
            format,
            arch: Arch::X86_64,
            firmware: Firmware::Bios,
            hardware: Hardware::Virtio,
            memory_mib: 1024,
            cpus: 2,
            mac: [0x52, 0x54, 0x00, 0x48, 0x41, 0x55],
            config_drive: None,
            accelerator: Accelerator::Auto,
            direct: None,
        }
    }

    /// QEMU's arguments. Its control protocol is on file descriptor 0 and the guest's serial port on 1, both sockets,
    /// so that nothing else can talk to them and nothing is left behind.
    pub(super) fn arguments(&self, accelerator: Accelerator) -> Result<Vec<String>> {
        refuse_references(&self.image, self.format)?;
        let mut words: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| {
            words.push(option.into());
            words.push(value);
        };
        let accel = if accelerator == Accelerator::Kvm { "kvm" } else { "tcg,thread=multi" };
        words_of_every_machine(&mut add);
        for (option, value) in self.hardware_words(accelerator) {
            add(option, value.into());
        }
        add("-accel", accel.into());
        add("-smp", self.cpus.to_string());
        add("-m", self.memory_mib.to_string());
        if let Some(Direct { kernel, initramfs, arguments }) = &self.direct {
            for (option, file) in [("-kernel", kernel), ("-initrd", initramfs)] {
                add(option, plain(file)?);
            }
            add("-append", arguments.clone());
        } else if self.firmware == Firmware::Uefi || self.arch == Arch::Aarch64 {
            let (code, variables) = uefi(self.arch)?;
            add("-drive", format!("if=pflash,unit=0,format=raw,readonly=on,file={code}"));
            add("-drive", format!("if=pflash,unit=1,format=raw,snapshot=on,file={variables}"));
        }
        let path = file_option(&self.image)?;
        let image = match self.format {
            Format::Raw => format!("format=raw,file={path}"),
            Format::Qcow2 => format!("format=qcow2,file={path}"),
            Format::Served => {
                format!("format=raw,file.driver=nbd,file.server.type=unix,file.server.path={path}")
            }
        };
        let writes = if self.direct.is_some() { "" } else { "cache.no-flush=on,snapshot=on," };
        add("-drive", format!("if=none,id=disk,{writes}{image}"));
        if let Some(drive) = &self.config_drive {
            let file = file_option(drive)?;
            add("-drive", format!("if=none,id=config,format=raw,readonly=on,file={file}"));
        }
        let (controller, disk, config, card) = match self.hardware {
            Hardware::Virtio => (None, "virtio-blk-pci", "virtio-blk-pci", "virtio-net-pci"),
            Hardware::VirtioScsi => (Some("virtio-scsi-pci"), "scsi-hd", "virtio-blk-pci", "virtio-net-pci"),
            Hardware::Sata => (Some("ich9-ahci,id=ahci"), "ide-hd,bus=ahci.0", "ide-cd,bus=ahci.1", "e1000"),
        };
        if let Some(controller) = controller {
            add("-device", controller.into());
        }
        let first = if self.direct.is_some() { "" } else { ",bootindex=0" };
        add("-device", format!("{disk},drive=disk{first}"));
        if self.config_drive.is_some() {
            add("-device", format!("{config},drive=config"));
        }
        if self.direct.is_some() {
            // It would begin again, on a disk that is not as it was.
            words.push("-no-reboot".into());
            return Ok(words);
        }
        let mac = self.mac.map(|byte| format!("{byte:02x}")).join(":");
        add("-netdev", "user,id=net,restrict=on".into());
        add("-device", format!("{card},netdev=net,mac={mac},romfile="));
        Ok(words)
    }

    fn hardware_words(&self, accelerator: Accelerator) -> [(&'static str, &'static str); 3] {
        match self.arch {
            // graphics=off has the firmware and GRUB's text console speak on the serial port too; the screen stays there.
            Arch::X86_64 => [("-machine", "pc,graphics=off"), ("-cpu", "max"), ("-vga", "std")],
            Arch::Aarch64 => {
                // Pointers signed as the architecture has it take TCG half of its time.
                let cpu = if accelerator == Accelerator::Tcg { "max,pauth-impdef=on" } else { "max" };
                [("-machine", "virt"), ("-cpu", cpu), ("-device", "ramfb")]
            }
        }
    }
}

fn words_of_every_machine(add: &mut impl FnMut(&str, String)) {
    add("-nodefaults", "-no-user-config".into());
    add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    add("-display", "none".into());
    add("-chardev", "socket,id=qmp,fd=0".into());
    add("-mon", "chardev=qmp,mode=control".into());
    add("-chardev", "socket,id=serial,fd=1".into());
    add("-serial", "chardev:serial".into());
    // Without it a first boot waits for entropy.
    add("-device", "virtio-rng-pci".into());
}

/// `path` as QEMU's `file=`: absolute, so that no part of it is a protocol, with its commas doubled.
fn file_option(path: &Path) -> Result<String> {
    Ok(plain(path)?.replace(',', ",,"))
}

/// `path` as it is, from the root on.
fn plain(path: &Path) -> Result<String> {
    let absolute = path.canonicalize().map_err(|error| cannot_open(path).caused_by(error))?;
    let text = absolute.to_str().ok_or_else(|| cannot_open(path).because("its path is not UTF-8"))?;
    Ok(text.to_owned())
}

fn cannot_open(path: &Path) -> Error {
    Error::new(Kind::Image, "boot.open", format!("cannot open {}", path.display()))
        .fact("path", path.display())
}

/// Refuses a qcow2 image that would have QEMU open another file: backing file at byte 8, incompatible feature bit 2
/// (external data file) at byte 72 (QEMU docs/interop/qcow2.rst).
fn refuse_references(path: &Path, format: Format) -> Result<()> {
    if format == Format::Served {
        return Ok(());
    }
    let mut header = Vec::new();
    File::open(path)
        .and_then(|file| file.take(80).read_to_end(&mut header))
        .map_err(|error| cannot_open(path).caused_by(error))?;
    if format == Format::Raw {
        return Ok(());
    }
    let refused = |why: &str| Err(cannot_open(path).because(why));
    let word = |at: usize| -> Option<u64> {
        Some(u64::from_be_bytes(header.get(at..at.checked_add(8)?)?.try_into().ok()?))
    };
    match (header.get(..4), word(8), header.get(4..8)) {
        (Some(b"QFI\xfb"), Some(0), Some(version)) => {
            let external = version != [0, 0, 0, 2] && word(72).is_none_or(|features| features & 4 != 0);
            if external { refused("its header at byte 72 names an external data file") } else { Ok(()) }
        }
        (Some(b"QFI\xfb"), ..) => {
            refused("its header at byte 8 names a backing file: convert it to a whole image first")
        }
        _ => refused("it has no qcow2 header at byte 0"),
    }
}

/// The firmware's code and its empty variables, where distributions put them, as QEMU's `file=`.
fn uefi(arch: Arch) -> Result<(String, String)> {
    const OVMF: &[(&str, &str)] = &[
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"), // Debian 12, Ubuntu 24.04
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),       // older
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"), // RHEL, Fedora
        ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"), // Arch
        ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"), // SUSE
    ];
    const AAVMF: &[(&str, &str)] = &[
        ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"), // Debian, Ubuntu
        (
            "/usr/share/edk2/aarch64/QEMU_EFI-silent-pflash.raw",
            "/usr/share/edk2/aarch64/vars-template-pflash.raw",
        ), // RHEL, Fedora
        ("/usr/share/qemu/aavmf-aarch64-code.bin", "/usr/share/qemu/aavmf-aarch64-vars.bin"), // SUSE
    ];
    let (places, debian, rhel) = match arch {
        Arch::X86_64 => (OVMF, "ovmf", "edk2-ovmf"),
        Arch::Aarch64 => (AAVMF, "qemu-efi-aarch64", "edk2-aarch64"),
    };
    places
        .iter()
        .find(|(code, variables)| Path::new(code).exists() && Path::new(variables).exists())
        .map(|(code, variables)| ((*code).to_owned(), (*variables).to_owned()))
        .ok_or_else(|| {
            Error::new(Kind::Privilege, "boot.ovmf", "UEFI firmware for QEMU is not installed")
                .because("it is needed to boot a UEFI image")
                .remedy(format!(
                    "install it: apt-get install {debian} (Debian, Ubuntu) or dnf install {rhel} (RHEL)"
                ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: &[u8], name: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn qcow2(version: u8, backing: u64, features: u64) -> Vec<u8> {
        let mut header = vec![0; 104];
        header[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
        header[8..16].copy_from_slice(&backing.to_be_bytes());
        header[72..80].copy_from_slice(&features.to_be_bytes());
        header
    }

    #[test]
    fn the_guest_gets_the_disk_and_nothing_to_start_it_by() {
        let (_dir, path) = image(&[0; 512], "a,file=b.raw");
        let all = [Hardware::Virtio, Hardware::VirtioScsi, Hardware::Sata];
        for (hardware, arch) in
            all.into_iter().flat_map(|hardware| [(hardware, Arch::X86_64), (hardware, Arch::Aarch64)])
        {
            let machine = Machine { hardware, arch, ..Machine::new(&path, Format::Raw) };
            let words = machine.arguments(Accelerator::Tcg).unwrap();
            assert!(words.iter().all(|word| !["-kernel", "-initrd", "-append"].contains(&word.as_str())));
            let disk = words.iter().find(|word| word.contains("id=disk")).unwrap();
            assert!(disk.contains("snapshot=on") && disk.ends_with("a,,file=b.raw"), "{disk}");
            let sata = words.iter().any(|word| word.contains("ahci") || word.contains("e1000"));
            assert_eq!(sata, hardware == Hardware::Sata);
        }
    }

    #[test]
    fn a_kernel_of_its_own_gets_the_disk_to_write_and_no_network_and_no_second_start() {
        let (dir, path) = image(&[0; 512], "disk.raw");
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        let (kernel, initramfs) = (file("vm,linuz"), file("initramfs"));
        let direct = Direct { kernel, initramfs, arguments: "console=ttyS0 quiet".into() };
        for arch in [Arch::X86_64, Arch::Aarch64] {
            let direct = Some(direct.clone());
            let machine = Machine { arch, direct, ..Machine::new(&path, Format::Raw) };
            let words = machine.arguments(Accelerator::Tcg).unwrap();
            let after = |option: &str| {
                let at = words.iter().position(|word| word == option).unwrap();
                words[at + 1].as_str()
            };
            // Only options with parts of their own double a comma.
            assert!(after("-kernel").ends_with("/vm,linuz"), "{words:?}");
            assert!(after("-initrd").ends_with("/initramfs"), "{words:?}");
            assert_eq!(after("-append"), "console=ttyS0 quiet");
            assert!(words.contains(&"-no-reboot".to_owned()), "{words:?}");
            let disk = words.iter().find(|word| word.contains("id=disk")).unwrap();
            assert!(!disk.contains("snapshot") && !disk.contains("no-flush"), "{disk}");
            assert!(words.iter().all(|word| !word.contains("net") && !word.contains("pflash")), "{words:?}");
        }
    }

    #[test]
    fn an_image_that_names_another_file_is_refused() {
        for (header, why) in [
            (qcow2(2, 512, 0), "backing file"),
            (qcow2(3, 512, 0), "backing file"),
            (qcow2(3, 0, 4), "external data file"),
            (vec![0; 104], "no qcow2 header"),
            (qcow2(3, 0, 0)[..40].to_vec(), "external data file"),
        ] {
            let (_dir, path) = image(&header, "x.qcow2");
            let error = Machine::new(&path, Format::Qcow2).arguments(Accelerator::Tcg).unwrap_err();
            assert!(error.kind() == Kind::Image && error.why().contains(why), "{error:?}");
        }
        let (_dir, path) = image(&qcow2(2, 0, 4), "x.qcow2");
        Machine::new(&path, Format::Qcow2).arguments(Accelerator::Tcg).unwrap();
    }

    #[test]
    fn a_missing_image_is_named() {
        let error = Machine::new("/nonexistent.raw", Format::Raw).arguments(Accelerator::Tcg).unwrap_err();
        assert!(error.what().contains("/nonexistent.raw"));
    }
}
