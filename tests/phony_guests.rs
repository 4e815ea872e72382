//! Fix-ups planned for guests that are trees of text, one for each system haul knows, and compared with golden diffs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test: a failure is the finding"
)]

#[path = "support/phony.rs"]
mod phony;

use std::fs;
use std::path::Path;

use haul::error::Kind;
use haul::guest;
use haul::guest::disk::{BootMode, DataDisk, FileSystem};
use haul::guest::inspect::{self, Guest};
use haul::guest::plan::{Fix, Options, Plan, Severity};
use haul::guest::tree::{TextVolume, Tree};
use haul::unit::Extent;
use phony::{VIRTIO, initramfs};

const ROOT: &str = "11111111-2222-3333-4444-555555555555";
const SWAP: &str = "99999999-8888-7777-6666-555555555555";
fn filesystems() -> Vec<FileSystem> {
    let fs = |partition, kind: &str, uuid: &str, point: Option<&str>| FileSystem {
        partition: Some(partition),
        logical: None,
        array: None,
        extent: Extent::at(u64::from(partition) << 20, 1 << 20),
        kind: kind.into(),
        uuid: Some(uuid.into()),
        label: (kind == "ext4").then(|| "root".into()),
        partition_uuid: None,
        group: None,
        point: point.map(Into::into),
        esp: false,
    };
    vec![fs(1, "ext4", ROOT, Some("/")), fs(5, "swap", SWAP, None)]
}

/// What every phony guest has: one kernel whose initramfs knows SATA only.
fn base(id: &str, version: &str, kernel: &str, root: &str, arguments: &str) -> TextVolume {
    let modules: String = VIRTIO.iter().map(|name| format!("kernel/drivers/{name}.ko:\n")).collect();
    TextVolume::default()
        .file("/usr/lib/os-release", format!("ID={id}\nVERSION_ID=\"{version}\"\nPRETTY_NAME=\"{id} {version}\"\n"))
        .symlink("/etc/os-release", "../usr/lib/os-release")
        .file("/usr/sbin/mkinitramfs", "")
        .file("/usr/lib/systemd/systemd", "")
        .file("/etc/hostname", "source-01\n")
        .file("/etc/ssh/ssh_host_ed25519_key", "secret")
        .file("/etc/ssh/ssh_host_ed25519_key.pub", "public")
        .file("/etc/ssh/ssh_host_rsa_key", "secret")
        .file(&format!("/boot/vmlinuz-{kernel}"), "")
        .file(&format!("/boot/initrd.img-{kernel}"), initramfs(&["ahci", "sd_mod", "ext4"]))
        .file(&format!("/lib/modules/{kernel}/modules.dep"), modules)
        .file(&format!("/lib/modules/{kernel}/modules.builtin"), "kernel/fs/ext4/ext4.ko\n")
        .file(
            "/boot/grub/grub.cfg",
            format!(
                "menuentry '{id}' {{\n\tsearch --fs-uuid --set=root {ROOT}\n\tlinux\t/boot/vmlinuz-{kernel} root={root} ro {arguments}\n\tinitrd\t/boot/initrd.img-{kernel}\n}}\n"
            ),
        )
        .file("/etc/default/grub", format!("GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"{arguments}\"\n"))
        .file("/etc/initramfs-tools/modules", "# List of modules\n")
}

fn cloud_init(volume: TextVolume, version: &str) -> TextVolume {
    volume
        .file("/usr/bin/cloud-init", "")
        .file(
            "/usr/lib/python3/dist-packages/cloudinit/version.py",
            format!("__VERSION__ = \"{version}\"\n_PACKAGED_VERSION = '@@PACKAGED_VERSION@@'\n"),
        )
        .file("/etc/cloud/cloud.cfg", "users:\n - default\n")
        .file("/etc/cloud/cloud.cfg.d/90_dpkg.cfg", "datasource_list: [ NoCloud, Ec2, None ]\n")
}

fn inspected(volume: TextVolume) -> Guest {
    inspect::from_tree(Tree::new(Box::new(volume)), filesystems(), BootMode::Bios).unwrap()
}

fn debian_11() -> TextVolume {
    base("debian", "11", "5.10.0-28-amd64", "/dev/sda1", "console=ttyS0,115200")
        .file("/sbin/ifup", "")
        .file("/etc/initramfs-tools/initramfs.conf", "MODULES=dep\nBUSYBOX=auto\n")
        .file("/etc/initramfs-tools/conf.d/resume", "RESUME=/dev/sda5\n")
        .file("/boot/grub/device.map", "(hd0)\t/dev/disk/by-id/ata-QEMU_HARDDISK_QM00001\n")
        .file(
            "/etc/fstab",
            "# <file system> <mount point>\n/dev/sda1 / ext4 errors=remount-ro 0 1\n/dev/sda5 none swap sw 0 0\n\
             /dev/sdb1\t/srv/data\text4\tdefaults\t0 2\n#/dev/sda9 /old ext4 defaults 0 2\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n\
             nas:/home /home nfs rw 0 0\n",
        )
        .file(
            "/etc/network/interfaces",
            "source /etc/network/interfaces.d/*\n\n# The loopback network interface\nauto lo\niface lo inet loopback\n\n\
             # The primary network interface\nallow-hotplug ens33\niface ens33 inet static\n\taddress 10.1.2.3/24\n\tgateway 10.1.2.1\n\
             \thwaddress ether 00:0c:29:aa:bb:cc\n\tpost-up iptables-restore < /etc/iptables.rules\n\tup ip route add 10.9.0.0/16 via 10.1.2.254\n\
             auto ens34\niface ens34 inet static\n\taddress 192.168.7.1/24\n",
        )
        .file(
            "/etc/udev/rules.d/70-persistent-net.rules",
            "# PCI device\nSUBSYSTEM==\"net\", ACTION==\"add\", ATTR{address}==\"00:0c:29:aa:bb:cc\", NAME=\"ens33\"\n",
        )
}

fn debian_12() -> TextVolume {
    let volume = base("debian", "12", "6.1.0-18-amd64", "/dev/sda1", "console=ttyS0,115200 net.ifnames=0")
        .file("/sbin/ifup", "")
        .file("/etc/initramfs-tools/initramfs.conf", "MODULES=list\n")
        .file("/etc/fstab", "/dev/sda1 / ext4 defaults 0 1\n")
        .file("/etc/systemd/network/10-eth0.link", "[Match]\nMACAddress=52:54:00:aa:bb:01\n[Link]\nName=eth0\n")
        .file(
            "/etc/network/interfaces",
            "auto lo\niface lo inet loopback\nauto eth0\niface eth0 inet static\n  hwaddress ether 52:54:00:aa:bb:01\n  address 192.168.77.5/24\n  gateway 192.168.77.1\n",
        );
    cloud_init(volume, "22.4.2")
}

fn debian_13() -> TextVolume {
    base("debian", "13", "6.12.38+deb13-amd64", "LABEL=root", "")
        .file("/etc/fstab", "LABEL=root / ext4 defaults 0 1\nUUID=deadbeef-0000-0000-0000-000000000000 /data ext4 defaults 0 2\n")
        .file(
            "/etc/systemd/network/20-wired.network",
            "[Match]\nMACAddress=52:54:00:aa:bb:01\n\n[Network]\nAddress=10.0.0.5/24\nGateway=10.0.0.1\nDNS=10.0.0.53\n\n[Route]\nDestination=10.9.0.0/16\nGateway=10.0.0.2\n",
        )
}

fn ubuntu(version: &str, kernel: &str, netplan: (&str, &str), cloud: &str) -> TextVolume {
    let volume = base("ubuntu", version, kernel, &format!("UUID={ROOT}"), "")
        .file(
            "/etc/fstab",
            format!("/dev/disk/by-uuid/{ROOT} / ext4 defaults 0 1\n/swap.img none swap sw 0 0\n"),
        )
        .file(netplan.0, netplan.1);
    cloud_init(volume, cloud)
}

fn ubuntu_18() -> TextVolume {
    let netplan = "network:\n  version: 2\n  renderer: networkd\n  ethernets:\n    ens160:\n      addresses: [ 10.1.1.9/24 ]\n      gateway4: 10.1.1.1\n";
    ubuntu("18.04", "4.15.0-213-generic", ("/etc/netplan/01-netcfg.yaml", netplan), "23.1.2")
        .file("/etc/cloud/cloud.cfg.d/50-curtin-networking.cfg", "network: {config: disabled}\n")
}

fn ubuntu_20() -> TextVolume {
    let netplan = "network:\n  ethernets:\n    ens3:\n      dhcp4: true\n      match:\n        macaddress: fa:16:3e:00:00:01\n      set-name: ens3\n  version: 2\n";
    ubuntu("20.04", "5.4.0-190-generic", ("/etc/netplan/50-cloud-init.yaml", netplan), "24.4.1")
}

fn ubuntu_22() -> TextVolume {
    let netplan = "# This is the network config written by 'subiquity'\nnetwork:\n  ethernets:\n    enp0s3:\n      dhcp4: true\n  version: 2\n";
    ubuntu("22.04", "5.15.0-119-generic", ("/etc/netplan/00-installer-config.yaml", netplan), "24.4.1")
        .file(
            "/etc/cloud/cloud.cfg.d/99-installer.cfg",
            "datasource_list: [None]\ndatasource:\n  None:\n    userdata_raw: |\n      #cloud-config\n",
        )
        .file(
            "/etc/cloud/cloud.cfg.d/subiquity-disable-cloudinit-networking.cfg",
            "network: {config: disabled}\n",
        )
}

fn ubuntu_24() -> TextVolume {
    let netplan = "network:\n  version: 2\n  ethernets:\n    eth0:\n      dhcp4: true\n";
    ubuntu("24.04", "6.8.0-41-generic", ("/etc/netplan/50-cloud-init.yaml", netplan), "24.4.1")
        .file("/boot/initrd.img-6.8.0-41-generic", initramfs(VIRTIO))
}

/// A kernel with virtio as modules, and an initramfs that knows SATA only.
fn kernel(volume: TextVolume, version: &str, image: &str) -> TextVolume {
    let modules: String = VIRTIO.iter().map(|name| format!("kernel/drivers/{name}.ko.xz:\n")).collect();
    volume
        .file(&format!("/boot/vmlinuz-{version}"), "")
        .file(&format!("/boot/{image}"), initramfs(&["ahci", "sd_mod", "xfs"]))
        .file(&format!("/lib/modules/{version}/modules.dep"), modules)
        .file(&format!("/lib/modules/{version}/modules.builtin"), "")
}

fn os_release(id: &str, version: &str, like: &str, name: &str) -> String {
    format!(
        "NAME=\"{name}\"\nID=\"{id}\"\nID_LIKE=\"{like}\"\nVERSION_ID=\"{version}\"\nPRETTY_NAME=\"{name} {version}\"\n"
    )
}

/// A system of systemd, dracut and GRUB 2, with Red Hat's network scripts.
fn dracut(id: &str, version: &str, like: &str, name: &str, release: &str, image: &str) -> TextVolume {
    let volume = TextVolume::default()
        .file("/etc/os-release", os_release(id, version, like, name))
        .file("/usr/lib/systemd/systemd", "")
        .file("/usr/bin/dracut", "")
        .file("/etc/hostname", "source-01.example.com\n");
    kernel(volume, release, image)
}

const IFCFG: &str = "TYPE=Ethernet\nBOOTPROTO=none\nNAME=ens192\nUUID=0c9b9c6e-0000-4000-8000-000000000001\nDEVICE=ens192\n\
                     ONBOOT=yes\nHWADDR=00:50:56:aa:bb:cc\nIPADDR=10.1.2.3\nPREFIX=24\nGATEWAY=10.1.2.1\nDNS1=10.1.2.53\n";

fn grub2(volume: TextVolume, release: &str, image: &str, root: &str) -> TextVolume {
    volume
        .file(
            "/boot/grub2/grub.cfg",
            format!(
                "menuentry 'Linux' {{\n\tset root='hd0,msdos1'\n\tlinux16 /boot/vmlinuz-{release} root={root} ro crashkernel=auto rhgb quiet\n\tinitrd16 /boot/{image}\n}}\n"
            ),
        )
        .file("/etc/default/grub", "GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX=\"crashkernel=auto rhgb quiet\"\nGRUB_DISABLE_RECOVERY=\"true\"\n")
        .file("/boot/grub2/device.map", "(hd0) /dev/sda\n")
}

/// RHEL 5 and its kin: no os-release, mkinitrd, GRUB 0.97.
fn centos_5() -> TextVolume {
    let release = "2.6.18-419.el5";
    let volume = TextVolume::default()
        .file("/etc/redhat-release", "CentOS release 5.11 (Final)\n")
        .file("/sbin/mkinitrd", "")
        .file("/etc/sysconfig/network", "NETWORKING=yes\nHOSTNAME=source-01\n")
        .file("/etc/modprobe.conf", "alias eth0 e1000\nalias scsi_hostadapter ata_piix\nalias snd-card-0 snd-intel8x0\n")
        .file("/etc/fstab", "/dev/hda1 / ext3 defaults 1 1\n/dev/hda5 swap swap defaults 0 0\nproc /proc proc defaults 0 0\n")
        .file("/etc/sysconfig/network-scripts/ifcfg-lo", "DEVICE=lo\nIPADDR=127.0.0.1\n")
        .file(
            "/etc/sysconfig/network-scripts/ifcfg-eth0",
            "# Intel card\nDEVICE=eth0\nBOOTPROTO=static\nHWADDR=00:0C:29:AA:BB:CC\nIPADDR=192.168.1.5\nNETMASK=255.255.255.0\nONBOOT=yes\n",
        )
        .file(
            "/boot/grub/grub.conf",
            format!("default=0\ntitle CentOS\n\troot (hd0,0)\n\tkernel /boot/vmlinuz-{release} ro root=/dev/hda1 rhgb quiet\n\tinitrd /boot/initrd-{release}.img\n"),
        )
        .symlink("/boot/grub/menu.lst", "./grub.conf")
        .file("/boot/grub/device.map", "(hd0) /dev/hda\n");
    kernel(volume, release, &format!("initrd-{release}.img"))
}

/// RHEL 6: dracut without systemd.
fn red_hat_6(path: &str, line: &str) -> TextVolume {
    let release = "2.6.32-754.el6.x86_64";
    let volume = TextVolume::default()
        .file("/etc/redhat-release", "Red Hat Enterprise Linux Server release 6.10 (Santiago)\n")
        .file(path, line)
        .file("/sbin/dracut", "")
        .file("/sbin/biosdevname", "")
        .file("/etc/sysconfig/network", "NETWORKING=yes\nHOSTNAME=source-01\n")
        .file("/etc/fstab", format!("UUID={ROOT} / ext4 defaults 1 1\n/dev/sdb1 /data ext4 defaults 1 2\n"))
        .file("/etc/sysconfig/network-scripts/ifcfg-eth0", "DEVICE=eth0\nHWADDR=00:50:56:AA:BB:CC\nONBOOT=yes\nNM_CONTROLLED=yes\nBOOTPROTO=dhcp\n")
        .file(
            "/etc/udev/rules.d/70-persistent-net.rules",
            "# PCI device 0x15ad:0x07b0 (vmxnet3)\nSUBSYSTEM==\"net\", ACTION==\"add\", DRIVERS==\"?*\", ATTR{address}==\"00:50:56:aa:bb:cc\", ATTR{type}==\"1\", KERNEL==\"eth*\", NAME=\"eth0\"\n",
        )
        .file(
            "/boot/grub/grub.conf",
            format!("default=0\ntitle Linux\n\troot (hd0,0)\n\tkernel /boot/vmlinuz-{release} ro root=UUID={ROOT} rd_NO_LUKS KEYBOARDTYPE=pc rhgb quiet\n\tinitrd /boot/initramfs-{release}.img\n"),
        );
    kernel(volume, release, &format!("initramfs-{release}.img"))
        .file("/boot/vmlinuz-2.6.32-754.el6.x86_64kdump", "")
}

/// RHEL 7: GRUB 2, network scripts, a rescue kernel.
fn red_hat_7(id: &str, version: &str, like: &str, name: &str, release: &str) -> TextVolume {
    let image = format!("initramfs-{release}.img");
    grub2(dracut(id, version, like, name, release, &image), release, &image, "/dev/sda1")
        .file("/etc/fstab", "/dev/sda1 / xfs defaults 0 0\n/dev/sda5 swap swap defaults 0 0\n")
        .file("/etc/sysconfig/network-scripts/ifcfg-lo", "DEVICE=lo\n")
        .file("/etc/sysconfig/network-scripts/ifcfg-ens192", IFCFG)
        .file(
            "/etc/sysconfig/network-scripts/ifcfg-ens224",
            "TYPE=Ethernet\nDEVICE=ens224\nONBOOT=yes\nBOOTPROTO=none\nIPADDR=172.16.0.3\nPREFIX=16\n",
        )
        .file("/boot/vmlinuz-0-rescue-0123456789abcdef", "")
        .file("/boot/initramfs-0-rescue-0123456789abcdef.img", initramfs(VIRTIO))
        .file("/usr/sbin/NetworkManager", "")
}

/// RHEL 8: entries of their own that take their arguments from GRUB's environment.
fn red_hat_8(id: &str, version: &str, name: &str, release: &str) -> TextVolume {
    let mut environment = "# GRUB Environment Block\nsaved_entry=x\nkernelopts=root=/dev/sda1 ro crashkernel=auto rhgb quiet \nboot_success=0\n".to_owned();
    environment.push_str(&"#".repeat(1024 - environment.len()));
    dracut(id, version, "rhel fedora", name, release, &format!("initramfs-{release}.img"))
        .file("/etc/fstab", "/dev/sda1 / xfs defaults 0 0\n")
        .file("/etc/sysconfig/network-scripts/ifcfg-ens192", IFCFG)
        .file("/boot/grub2/grub.cfg", "set timeout=5\nload_env\ninsmod blscfg\nblscfg\n")
        .file("/boot/grub2/grubenv", environment)
        .file(
            &format!("/boot/loader/entries/0123-{release}.conf"),
            format!("title {name} ({release})\nversion {release}\nlinux /boot/vmlinuz-{release}\ninitrd /boot/initramfs-{release}.img $tuned_initrd\noptions $kernelopts $tuned_params\ngrub_class kernel\n"),
        )
        .file("/etc/default/grub", "GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX=\"crashkernel=auto rhgb quiet\"\nGRUB_ENABLE_BLSCFG=true\n")
        .file("/usr/sbin/NetworkManager", "")
}

/// RHEL 9: arguments in each entry, NetworkManager's own profiles.
fn red_hat_9(id: &str, version: &str, name: &str, release: &str) -> TextVolume {
    dracut(id, version, "rhel centos fedora", name, release, &format!("initramfs-{release}.img"))
        .file("/etc/fstab", format!("UUID={ROOT} / xfs defaults 0 0\n"))
        .file(
            "/etc/NetworkManager/system-connections/ens192.nmconnection",
            "[connection]\nid=ens192\nuuid=1\ntype=ethernet\ninterface-name=ens192\n\n[ethernet]\nmac-address=00:50:56:AA:BB:CC\n\n[ipv4]\naddress1=10.1.2.3/24,10.1.2.1\ndns=10.1.2.53;\nmethod=manual\n\n[ipv6]\nmethod=auto\n",
        )
        .file("/boot/grub2/grub.cfg", "set timeout=5\nload_env\ninsmod blscfg\nblscfg\n")
        .file(
            &format!("/boot/loader/entries/0123-{release}.conf"),
            format!("title {name} ({release})\nversion {release}\nlinux /boot/vmlinuz-{release}\ninitrd /boot/initramfs-{release}.img $tuned_initrd\noptions root=UUID={ROOT} ro crashkernel=1G-4G:192M rhgb quiet $tuned_params\n"),
        )
        .file("/etc/default/grub", "GRUB_CMDLINE_LINUX=\"crashkernel=1G-4G:192M rhgb quiet\"\nGRUB_ENABLE_BLSCFG=true\n")
        .file("/etc/kernel/cmdline", format!("root=UUID={ROOT} ro crashkernel=1G-4G:192M rhgb quiet\n"))
        .file("/usr/sbin/NetworkManager", "")
}

/// Amazon Linux 2: made for a cloud, with its network by DHCP already.
fn amazon_2() -> TextVolume {
    let release = "4.14.336-257.562.amzn2.x86_64";
    let image = format!("initramfs-{release}.img");
    let root = format!("UUID={ROOT}");
    let volume = dracut("amzn", "2", "centos rhel fedora", "Amazon Linux", release, &image);
    cloud_init(grub2(volume, release, &image, &root), "19.3-46.amzn2.0.1")
        .file("/etc/fstab", format!("UUID={ROOT}     /           xfs    defaults,noatime  1   1\n"))
        .file(
            "/etc/sysconfig/network-scripts/ifcfg-eth0",
            "DEVICE=eth0\nBOOTPROTO=dhcp\nONBOOT=yes\nTYPE=Ethernet\nUSERCTL=yes\n",
        )
}

/// TencentOS: virtio is built into its kernel.
fn tencentos(version: &str, release: &str) -> TextVolume {
    let config: String = ["VIRTIO", "VIRTIO_PCI", "VIRTIO_BLK", "VIRTIO_NET", "SCSI_VIRTIO"]
        .iter()
        .map(|name| format!("CONFIG_{name}=y\n"))
        .collect();
    red_hat_8("tencentos", version, "TencentOS Server", release)
        .file(&format!("/boot/config-{release}"), config)
}

/// SLES 11: mkinitrd, GRUB 0.97, disks by id.
fn sles_11() -> TextVolume {
    let release = "3.0.101-63-default";
    let volume = TextVolume::default()
        .file("/etc/SuSE-release", "SUSE Linux Enterprise Server 11 (x86_64)\nVERSION = 11\nPATCHLEVEL = 4\n")
        .file("/etc/HOSTNAME", "source-01.example.com\n")
        .file("/sbin/mkinitrd", "")
        .file("/lib/mkinitrd/scripts/setup-storage.sh", "")
        .file("/etc/sysconfig/kernel", "INITRD_MODULES=\"ata_piix ahci ext3\"\nDOMU_INITRD_MODULES=\"xennet xenblk\"\n")
        .file("/etc/sysconfig/bootloader", "DEFAULT_APPEND=\"resume=/dev/sda5 splash=silent showopts\"\n")
        .file("/etc/fstab", "/dev/disk/by-id/ata-VMware_Virtual_0001-part1 / ext3 acl,user_xattr 1 1\n/dev/disk/by-id/ata-VMware_Virtual_0001-part5 swap swap defaults 0 0\n")
        .file("/etc/sysconfig/network/ifcfg-eth0", "BOOTPROTO='static'\nIPADDR='10.1.2.3/24'\nNAME='82545EM Gigabit'\nSTARTMODE='auto'\nUSERCONTROL='no'\n")
        .file("/etc/sysconfig/network/routes", "default 10.1.2.1 - -\n10.9.0.0/16 10.1.2.254 - -\n")
        .file(
            "/boot/grub/menu.lst",
            format!("default 0\ntitle SLES 11 SP4\n    root (hd0,0)\n    kernel /boot/vmlinuz-{release} root=/dev/disk/by-id/ata-VMware_Virtual_0001-part1 resume=/dev/disk/by-id/ata-VMware_Virtual_0001-part5 splash=silent showopts vga=0x317\n    initrd /boot/initrd-{release}\n"),
        )
        .file("/boot/grub/device.map", "(hd0)\t/dev/disk/by-id/ata-VMware_Virtual_0001\n");
    kernel(volume, release, &format!("initrd-{release}"))
}

/// SLES from 12 on, and openSUSE: dracut, GRUB 2, wicked.
fn suse(id: &str, version: &str, name: &str, release: &str) -> TextVolume {
    let image = format!("initrd-{release}");
    let root = format!("UUID={ROOT}");
    grub2(dracut(id, version, "suse", name, release, &image), release, &image, &root)
        .file("/etc/fstab", format!("UUID={ROOT} / xfs defaults 0 0\n/dev/sda5 swap swap defaults 0 0\n"))
        .file("/etc/sysconfig/network/ifcfg-lo", "IPADDR='127.0.0.1'\n")
        .file("/etc/sysconfig/network/ifcfg-eth0", "BOOTPROTO='static'\nSTARTMODE='auto'\nIPADDR='10.1.2.3/24'\nLLADDR='00:50:56:aa:bb:cc'\n")
        .file("/etc/sysconfig/network/routes", "default 10.1.2.1 - -\n")
        .file("/etc/udev/rules.d/70-persistent-net.rules", "SUBSYSTEM==\"net\", ACTION==\"add\", DRIVERS==\"?*\", ATTR{address}==\"00:50:56:aa:bb:cc\", ATTR{dev_id}==\"0x0\", ATTR{type}==\"1\", KERNEL==\"eth*\", NAME=\"eth0\"\n")
        .file("/boot/grub2/device.map", "(hd0) /dev/disk/by-id/ata-VMware_Virtual_0001\n")
}

/// Arch: a kernel called by its package, mkinitcpio, systemd-networkd.
fn arch() -> TextVolume {
    let release = "6.9.7-arch1-1";
    let modules: String = VIRTIO.iter().map(|name| format!("kernel/drivers/{name}.ko.zst:\n")).collect();
    TextVolume::default()
        .file("/etc/os-release", "NAME=\"Arch Linux\"\nPRETTY_NAME=\"Arch Linux\"\nID=arch\nBUILD_ID=rolling\n")
        .file("/usr/lib/systemd/systemd", "")
        .file("/usr/bin/mkinitcpio", "")
        .file("/etc/mkinitcpio.conf", "# vim:set ft=sh\nMODULES=()\nBINARIES=()\nHOOKS=(base udev autodetect microcode modconf block filesystems fsck)\n")
        .file("/etc/hostname", "source-01\n")
        .file("/etc/fstab", format!("UUID={ROOT} / ext4 rw,relatime 0 1\n"))
        .file("/boot/vmlinuz-linux", "")
        .file("/boot/initramfs-linux.img", initramfs(&["ahci", "sd_mod"]))
        .file(&format!("/lib/modules/{release}/pkgbase"), "linux\n")
        .file(&format!("/lib/modules/{release}/modules.dep"), modules)
        .file("/etc/systemd/network/20-wired.network", "[Match]\nName=ens3\n\n[Network]\nDHCP=yes\n")
        .file("/boot/syslinux/syslinux.cfg", "DEFAULT arch\nLABEL arch\n    LINUX ../vmlinuz-linux\n    APPEND root=/dev/sda1 rw\n    INITRD ../initramfs-linux.img\n")
        .file("/boot/grub/grub.cfg", "menuentry 'Arch Linux' {\n\tlinux /boot/vmlinuz-linux root=/dev/sda1 rw quiet\n\tinitrd /boot/initramfs-linux.img\n}\n")
}

/// Ubuntu before systemd: no os-release yet in 10.04, names of cards by a rule.
fn ubuntu_10() -> TextVolume {
    let mut volume = base("ubuntu", "10.04", "2.6.32-74-server", "/dev/sda1", "")
        .file("/sbin/ifup", "")
        .file("/etc/lsb-release", "DISTRIB_ID=Ubuntu\nDISTRIB_RELEASE=10.04\nDISTRIB_CODENAME=lucid\nDISTRIB_DESCRIPTION=\"Ubuntu 10.04.4 LTS\"\n")
        .file("/etc/fstab", format!("# / was on /dev/sda1 during installation\nUUID={ROOT} / ext4 errors=remount-ro 0 1\n"))
        .file("/etc/network/interfaces", "auto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet static\n\taddress 10.1.2.3\n\tnetmask 255.255.255.0\n\tgateway 10.1.2.1\n")
        .file("/etc/udev/rules.d/70-persistent-net.rules", "SUBSYSTEM==\"net\", ACTION==\"add\", DRIVERS==\"?*\", ATTR{address}==\"00:50:56:aa:bb:cc\", NAME=\"eth0\"\n");
    for path in ["/usr/lib/os-release", "/etc/os-release", "/usr/lib/systemd/systemd"] {
        volume.remove(path);
    }
    volume
}

fn ubuntu_ifupdown(version: &str, kernel: &str, systemd: bool) -> TextVolume {
    let mut volume = base("ubuntu", version, kernel, &format!("UUID={ROOT}"), "")
        .file("/sbin/ifup", "")
        .file("/etc/fstab", format!("UUID={ROOT} / ext4 errors=remount-ro 0 1\n"))
        .file("/etc/network/interfaces", "auto lo\niface lo inet loopback\n\nauto ens160\niface ens160 inet static\n\taddress 10.1.2.3\n\tnetmask 255.255.255.0\n\tgateway 10.1.2.1\n\tdns-nameservers 10.1.2.53\n");
    if !systemd {
        volume.remove("/usr/lib/systemd/systemd");
    }
    volume
}

/// Every system there is a golden diff for.
fn phony() -> Vec<(&'static str, TextVolume)> {
    vec![
        ("debian-11", debian_11()),
        ("debian-12", debian_12()),
        ("debian-13", debian_13()),
        ("ubuntu-10.04", ubuntu_10()),
        ("ubuntu-14.04", ubuntu_ifupdown("14.04", "4.4.0-148-generic", false)),
        ("ubuntu-16.04", ubuntu_ifupdown("16.04", "4.4.0-210-generic", true)),
        ("ubuntu-18.04", ubuntu_18()),
        ("ubuntu-20.04", ubuntu_20()),
        ("ubuntu-22.04", ubuntu_22()),
        ("ubuntu-24.04", ubuntu_24()),
        ("centos-5", centos_5()),
        ("centos-6", red_hat_6("/etc/centos-release", "CentOS release 6.10 (Final)\n")),
        ("oracle-6", red_hat_6("/etc/oracle-release", "Oracle Linux Server release 6.10\n")),
        ("centos-7", red_hat_7("centos", "7", "rhel fedora", "CentOS Linux", "3.10.0-1160.el7.x86_64")),
        ("oracle-7", red_hat_7("ol", "7.9", "fedora", "Oracle Linux Server", "5.4.17-2136.el7uek.x86_64")),
        ("rhel-8", red_hat_8("rhel", "8.10", "Red Hat Enterprise Linux", "4.18.0-553.el8_10.x86_64")),
        ("anolis-8", red_hat_8("anolis", "8.9", "Anolis OS", "5.10.134-18.an8.x86_64")),
        ("rocky-9", red_hat_9("rocky", "9.4", "Rocky Linux", "5.14.0-427.el9.x86_64")),
        ("opencloudos-9", red_hat_9("opencloudos", "9.2", "OpenCloudOS", "6.6.34-9.oc9.x86_64")),
        ("amazon-2", amazon_2()),
        ("tencentos-3", tencentos("3.3", "5.4.241-1-tlinux4-0017.7")),
        ("sles-11", sles_11()),
        ("sles-12", suse("sles", "12.5", "SUSE Linux Enterprise Server", "4.12.14-122.37-default")),
        ("sles-15", suse("sles", "15.6", "SUSE Linux Enterprise Server", "6.4.0-150600.21-default")),
        ("opensuse-15", suse("opensuse-leap", "15.6", "openSUSE Leap", "6.4.0-150600.21-default")),
        ("arch", arch()),
    ]
}

#[test]
fn phony_guests_get_the_plans_that_were_reviewed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/guest");
    let mut wrong = Vec::new();
    for (name, volume) in phony() {
        let plan = guest::plan(&inspected(volume), &Options::default()).unwrap().to_string();
        let golden = folder.join(format!("{name}.diff"));
        if std::env::var_os("HAUL_BLESS").is_some() {
            fs::write(&golden, &plan).unwrap();
        }
        if fs::read_to_string(&golden).unwrap_or_default() != plan {
            wrong.push(format!("{}:\n{plan}", golden.display()));
        }
    }
    assert!(wrong.is_empty(), "changed (HAUL_BLESS=1 accepts them after review):\n{}", wrong.join("\n"));
}

/// The server's second disk: a file system and swap space, or a physical volume of LVM.
fn second_disk() -> [DataDisk; 2] {
    let fs = |i: usize| filesystems().remove(i);
    let data = FileSystem { uuid: Some("da7a".into()), point: None, ..fs(0) };
    let swap = FileSystem { uuid: Some("5a4b".into()), partition: Some(2), ..fs(1) };
    let volume =
        FileSystem { uuid: None, group: Some("data".into()), kind: "LVM2 physical volume".into(), ..fs(0) };
    [vec![data, swap], vec![volume]].map(|filesystems| DataDisk { name: "/dev/sdb".into(), filesystems })
}

#[test]
fn what_is_mounted_of_a_data_disk_is_named_by_uuid_and_stays_required() {
    let fstab = format!(
        "UUID={ROOT} / ext4 defaults 0 1\n/dev/sdb1 /srv/data ext4 defaults 0 2\n/dev/sdb2 none swap sw 0 0\n\
         LABEL=root2 /srv/more ext4 defaults 0 2\n"
    );
    let resume = "/etc/initramfs-tools/conf.d/resume";
    let volume = debian_11().file("/etc/fstab", fstab).file(resume, "RESUME=/dev/sdb2\n");
    let [disk, _] = second_disk();
    let options = Options { data_disks: vec![disk], ..Options::default() };
    let plan = guest::plan(&inspected(volume.clone()), &options).unwrap();
    let fixed = inspected(applied(volume.clone(), &plan)).tree;
    assert_eq!(fixed.text(resume).unwrap().unwrap(), "RESUME=UUID=5a4b\n");
    let text = fixed.text("/etc/fstab").unwrap().unwrap();
    assert!(text.contains("\nUUID=da7a /srv/data ext4 defaults 0 2\nUUID=5a4b none swap sw 0 0\n"), "{text}");
    assert!(text.contains("\nLABEL=root2 /srv/more ext4 defaults,nofail 0 2\n"), "{text}");
    let told = |id: &str| plan.findings.iter().filter(|finding| finding.id == id).count();
    assert_eq!((told("fstab.data-disk"), told("fstab.other-disk")), (1, 1), "{plan}");
    let again = guest::plan(&inspected(applied(volume, &plan)), &options).unwrap();
    assert!(again.is_empty(), "{again}");
}

#[test]
fn a_first_disk_that_is_no_longer_the_first_is_told_from_the_one_that_is() {
    // The root is on sdb, and fstab does not say so.
    let fstab = format!("UUID={ROOT} / ext4 defaults 0 1\n/dev/sda1 /srv/data ext4 defaults 0 2\n");
    let volume = debian_11().file("/etc/fstab", fstab).file("/boot/grub/grub.cfg", "");
    let [mut disk, _] = second_disk();
    disk.name = "/dev/sda".into();
    let options = Options { data_disks: vec![disk], ..Options::default() };
    let plan = guest::plan(&inspected(volume.clone()), &options).unwrap();
    let text = inspected(applied(volume, &plan)).tree.text("/etc/fstab").unwrap().unwrap();
    assert!(text.contains("\nUUID=da7a /srv/data ext4 defaults 0 2\n"), "{text}");
}

#[test]
fn a_logical_volume_of_another_disk_is_not_waited_for_and_one_that_may_be_here_is() {
    let line = "/dev/mapper/data-srv /srv xfs defaults 0 0";
    let fstab = format!("UUID={ROOT} / ext4 defaults 0 1\n{line}\n");
    let volume = debian_11().file("/etc/fstab", fstab);
    let [_, pv] = second_disk();
    let planned = |volume: TextVolume, filesystems: Vec<FileSystem>, data_disks: Vec<DataDisk>| {
        let tree = Tree::new(Box::new(volume.clone()));
        let guest = guest::inspect::from_tree(tree, filesystems, BootMode::Bios).unwrap();
        let plan = guest::plan(&guest, &Options { data_disks, ..Options::default() }).unwrap();
        let told = plan.findings.iter().any(|finding| finding.id == "fstab.other-disk");
        let text = inspected(applied(volume, &plan)).tree.text("/etc/fstab").unwrap().unwrap();
        assert_eq!(told, text.contains("/srv xfs defaults,nofail 0 0"), "{text}");
        told
    };
    let with = |fs: FileSystem| [filesystems(), vec![fs]].concat();
    let part = |kind: &str, group: Option<&str>| FileSystem {
        partition: Some(2),
        kind: kind.into(),
        uuid: None,
        group: group.map(Into::into),
        ..filesystems().remove(1)
    };
    assert!(planned(volume.clone(), filesystems(), vec![]));
    assert!(planned(volume.clone(), with(part("unknown", None)), vec![]));
    assert!(planned(volume.clone(), with(part("LVM2 physical volume", Some("vg0"))), vec![]));
    // A thin volume, one in a group whose metadata is damaged, one in a container.
    assert!(!planned(volume.clone(), with(part("LVM2 physical volume", Some("data"))), vec![]));
    assert!(!planned(volume.clone(), with(part("LVM2 physical volume", Some(""))), vec![]));
    assert!(!planned(volume.clone(), with(part("LUKS", None)), vec![]));
    assert!(!planned(volume.clone(), filesystems(), vec![pv]));
    assert!(!planned(
        volume.file("/etc/crypttab", "# x\ndata-srv UUID=1 none luks\n"),
        filesystems(),
        vec![]
    ));
}

#[test]
fn the_boot_partition_of_fips_mode_is_named_by_what_is_on_it() {
    let menu = "\tlinux16 /boot/vmlinuz-3.10.0-1160.el7.x86_64 root=/dev/sda1 fips=1 boot=/dev/sda1 boot=live\n\
                \tinitrd16 /boot/initramfs-3.10.0-1160.el7.x86_64.img\n";
    let guest = red_hat_7("centos", "7", "rhel fedora", "CentOS Linux", "3.10.0-1160.el7.x86_64")
        .file("/boot/grub2/grub.cfg", menu);
    let plan = guest::plan(&inspected(guest), &Options::default()).unwrap().to_string();
    assert!(plan.contains(&format!(" boot=UUID={ROOT} boot=live")), "{plan}");
}

/// The tree after the plan's text changes.
fn applied(mut volume: TextVolume, plan: &Plan) -> TextVolume {
    for fix in &plan.fixes {
        match fix {
            Fix::Edit { path, new, .. } => volume = volume.file(path, new.as_str()),
            Fix::Create { path, text, .. } => volume = volume.file(path, text.as_str()),
            Fix::Remove { path, .. } => volume.remove(path),
            Fix::Copy { .. } => panic!("no phony guest has an EFI system partition"),
            Fix::Install { .. } | Fix::Partition { .. } | Fix::Grub { .. } | Fix::BootSector { .. } => {
                panic!("no phony guest has a disk or programs")
            }
            Fix::Initramfs { image, .. } | Fix::Append { image, .. } => {
                volume = volume.file(image, initramfs(VIRTIO));
            }
        }
    }
    volume
}

#[test]
fn each_phony_guest_is_known_for_what_it_is() {
    for (name, volume) in phony() {
        let guest = inspected(volume);
        let (id, version) = name.split_once('-').unwrap_or((name, ""));
        let id = match id {
            "oracle" => "ol",
            "amazon" => "amzn",
            "opensuse" => "opensuse-leap",
            other => other,
        };
        assert!(guest.os.id == id && guest.os.version.starts_with(version), "{name}: {:?}", guest.os);
        assert!(guest.hostname.is_some_and(|host| host.starts_with("source-01")), "{name}");
        let kernel = guest.kernels.iter().find(|kernel| kernel.has_modules).unwrap();
        assert!(kernel.in_menu && kernel.initrd.is_some(), "{name}: {kernel:?}");
        assert!(guest.kernels.iter().all(|kernel| !kernel.version.contains("kdump")), "{name}");
        assert!(!guest.network.is_empty(), "{name}");
    }
}

#[test]
fn a_fixed_guest_needs_nothing_more() {
    for force_import in [false, true] {
        let options = Options { force_import, ..Options::default() };
        for (name, volume) in phony() {
            let plan = guest::plan(&inspected(volume.clone()), &options).unwrap();
            let again = guest::plan(&inspected(applied(volume, &plan)), &options).unwrap();
            assert!(again.is_empty(), "{name}: {again}");
        }
    }
}

#[test]
fn where_nothing_can_be_appended_what_builds_is_left_as_it_is() {
    let options = Options { no_guest_programs: true, ..Options::default() };
    let mut refused = 0;
    for (name, volume) in phony() {
        // None of them has an /init in its initramfs; some need nothing there.
        let plan = guest::plan(&inspected(volume), &options).unwrap().to_string();
        refused += usize::from(plan.contains("[initramfs.no-tool]"));
        assert!(!plan.contains("virtio in every initramfs"), "{name}: {plan}");
    }
    assert!(refused > 10, "{refused}");
}

#[test]
fn a_forced_import_has_the_password_set_without_cloud_init() {
    let options = Options { force_import: true, ..Options::default() };
    let planned = |volume| guest::plan(&inspected(volume), &options).unwrap().to_string();
    let script = "/usr/local/sbin/haul-cloud-settings";
    let by_systemd = planned(debian_11());
    assert!(by_systemd.contains(&format!("b{script}")), "{by_systemd}");
    assert!(by_systemd.contains("+Wants=haul-cloud-settings.service"), "{by_systemd}");
    assert!(!by_systemd.contains("cloud-init.none"), "{by_systemd}");
    let by_script =
        planned(centos_5().file("/etc/rc.d/rc.local", "#!/bin/sh\ntouch /var/lock/subsys/local\n"));
    assert!(by_script.contains(&format!("local\n+{script}\n")), "{by_script}");
    let not_at_all = planned(centos_5());
    assert!(not_at_all.contains("[cloud-init.no-start]"), "{not_at_all}");
    // Where there is cloud-init, it does this.
    assert!(!planned(debian_12()).contains(script));
}

#[test]
fn a_package_of_cloud_init_counts_as_cloud_init() {
    let planned = |volume: TextVolume, file: &str| {
        let options = Options { packages: vec![file.into()], ..Options::default() };
        guest::plan(&inspected(volume), &options).unwrap().to_string()
    };
    let deb = "/tmp/cloud-init_20.4.1-2+deb11u1_all.deb";
    let plan = planned(debian_11().file("/usr/bin/dpkg", ""), deb);
    let install = "# given by --package\n! install cloud-init_20.4.1-2+deb11u1_all.deb by dpkg\n";
    // It comes first, and cloud-init is configured after it.
    assert!(plan.starts_with(install), "{plan}");
    assert!(plan.contains("b/etc/cloud/cloud.cfg.d/99-haul.cfg"), "{plan}");
    assert!(!plan.contains("[cloud-init.none]") && !plan.contains("autorelabel"), "{plan}");
    // What is there in this very version is not installed again.
    let status = "Package: x\nStatus: install ok installed\nVersion: 1\n\nPackage: cloud-init\n\
                  Status: install ok installed\nVersion: 20.4.1-2+deb11u1\n";
    let there = debian_11().file("/usr/bin/dpkg", "").file("/usr/bin/cloud-init", "");
    let plan = planned(there.clone().file("/var/lib/dpkg/status", status), deb);
    assert!(!plan.contains("! install"), "{plan}");
    let status = status.replace("install ok installed", "deinstall ok config-files");
    let plan = planned(there.file("/var/lib/dpkg/status", status), deb);
    assert!(plan.contains("! install"), "{plan}");

    let rpm = "/tmp/cloud-init-0.6.3-1.el5.noarch.rpm";
    let selinux = centos_5().file("/etc/selinux/config", "SELINUX=enforcing\n");
    let plan = planned(selinux.clone().file("/bin/rpm", ""), rpm);
    assert!(plan.contains("! install cloud-init-0.6.3-1.el5.noarch.rpm by rpm\n"), "{plan}");
    assert!(plan.contains("b/.autorelabel"), "{plan}");
    let plan = planned(selinux, rpm);
    assert!(plan.contains("[packages.no-tool]") && !plan.contains("! install"), "{plan}");
    let options = Options { packages: vec!["cloud-init.rpm".into()], ..Options::default() };
    let error = guest::plan(&inspected(debian_11()), &options).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Usage, "guest.package"));
}

#[test]
fn what_cannot_boot_by_the_other_firmware_is_told_why() {
    let planned = |volume: TextVolume, firmware| {
        let options = Options { firmware: Some(firmware), ..Options::default() };
        guest::plan(&inspected(volume), &options).unwrap()
    };
    let machine = || {
        let mut elf = vec![0; 64];
        elf[..4].copy_from_slice(b"\x7fELF");
        elf[18] = 62;
        debian_12().file("/bin/sh", elf)
    };
    for (volume, why) in [
        (debian_12(), "another processor"),
        (machine().file("/boot/grub/grub.cfg", ""), "no menu of GRUB 2"),
        (machine(), "grub-efi-amd64-bin (Debian, Ubuntu)"),
        (machine().file("/usr/lib/grub/x86_64-efi/moddep.lst", ""), "no partitions"),
    ] {
        let plan = planned(volume, BootMode::Uefi);
        let finding = plan.findings.iter().find(|finding| finding.id == "firmware.other").unwrap();
        let told = format!("{}: {}", finding.what, finding.remedy);
        assert!(finding.severity == Severity::Fatal && told.contains(why), "{why}: {told}");
        assert!(
            !plan.fixes.iter().any(|fix| matches!(fix, Fix::Partition { .. } | Fix::Grub { .. })),
            "{plan}"
        );
    }
    // It does already.
    let plan = planned(debian_12(), BootMode::Bios);
    assert!(plan.findings.iter().all(|finding| finding.id != "firmware.other"), "{plan}");
}

#[test]
fn a_guest_from_xen_prints_on_the_serial_port() {
    let inittab = "id:3:initdefault:\n1:2345:respawn:/sbin/mingetty tty1\nco:2345:respawn:/sbin/agetty xvc0 9600 vt100-nav\n";
    let volume = centos_5().file("/etc/inittab", inittab).file(
        "/boot/grub/grub.conf",
        "title CentOS\n\troot (hd0,0)\n\tkernel /boot/vmlinuz-2.6.18-419.el5 ro root=/dev/hda1 console=xvc0\n\
         \tinitrd /boot/initrd-2.6.18-419.el5.img\n",
    );
    let plan = guest::plan(&inspected(volume.clone()), &Options::default()).unwrap();
    let guest = inspected(applied(volume, &plan));
    let arguments = &guest.menus[0].entries[0].arguments;
    assert!(arguments.iter().any(|argument| argument == "console=ttyS0,115200"), "{plan}");
    assert!(!arguments.iter().any(|argument| argument.contains("xvc0")), "{plan}");
    let text = guest.tree.text("/etc/inittab").unwrap().unwrap();
    assert!(text.contains("\n#co:2345") && text.contains("\n1:2345"), "{text}");
}

#[test]
fn the_network_stays_when_asked_and_cloud_init_leaves_it_alone_when_asked() {
    let keep = Options { keep_network: true, ..Options::default() };
    let plan = guest::plan(&inspected(debian_12()), &keep).unwrap();
    assert!(!plan.to_string().contains("inet dhcp"), "{plan}");
    let alone = Options { no_cloud_init_network: true, ..Options::default() };
    let plan = guest::plan(&inspected(debian_12()), &alone).unwrap().to_string();
    assert!(plan.contains("+  config: disabled") && plan.contains("+iface eth0 inet dhcp"), "{plan}");
    assert!(!plan.contains("50-cloud-init"), "{plan}");
}

#[test]
fn services_of_other_hypervisors_and_clouds_do_not_start() {
    let unit = "[Unit]\nDescription=x\n[Service]\nExecStart=/usr/bin/x\n";
    let volume = debian_12()
        .file("/lib/systemd/system/walinuxagent.service", unit)
        .file("/usr/lib/systemd/system/open-vm-tools.service", "[Unit]\nConditionVirtualization=vmware\n")
        .file("/lib/systemd/system/qemu-guest-agent.service", unit)
        .symlink("/etc/systemd/system/hv-kvp-daemon.service", "/dev/null")
        .file("/usr/lib/systemd/system/hv-kvp-daemon.service", unit)
        .file("/etc/init.d/vboxadd", "#!/bin/sh\n");
    let plan = guest::plan(&inspected(volume), &Options::default()).unwrap();
    let made: Vec<&str> =
        plan.fixes.iter().map(Fix::path).filter(|path| path.starts_with("/etc/systemd/system/")).collect();
    let drop_in = |name| format!("/etc/systemd/system/{name}.service.d/50-haul.conf");
    assert_eq!(made, [drop_in("vboxadd"), drop_in("walinuxagent")], "{plan}");
    let text = plan.to_string();
    assert!(text.contains("+ConditionPathExists=!/\n") && text.contains("of Azure"), "{text}");
}

#[test]
fn links_of_a_hostile_guest_lead_nowhere_outside() {
    let volume = debian_12()
        .symlink("/etc/fstab", "/proc/1/root/etc/shadow")
        .symlink("/etc/network/interfaces", "interfaces")
        .symlink("/etc/default/grub", "../../../../../../etc/default/real")
        .file("/etc/default/real", "GRUB_CMDLINE_LINUX=\"root=/dev/sda1\"\n")
        .symlink("/etc/cloud/cloud.cfg.d/99-haul.cfg", "/etc/passwd-to-be");
    let plan = guest::plan(&inspected(volume), &Options::default()).unwrap();
    let paths: Vec<&str> = plan.fixes.iter().map(Fix::path).collect();
    assert!(paths.contains(&"/etc/default/real"), "{paths:?}");
    for path in [
        "/etc/default/grub",
        "/etc/passwd-to-be",
        "/etc/cloud/cloud.cfg.d/99-haul.cfg",
        "/etc/network/interfaces",
    ] {
        assert!(!paths.contains(&path), "{path} in {paths:?}");
    }
}

#[test]
fn a_fstab_of_10_megabytes_is_refused_by_name() {
    let volume = debian_12().file("/etc/fstab", vec![b'#'; 10 << 20]);
    let error = guest::plan(&inspected(volume), &Options::default()).unwrap_err();
    assert_eq!(error.id(), "guest.file-too-long");
    assert!(error.what().contains("/etc/fstab"));
}

#[test]
fn a_kernel_without_virtio_is_said_to_be_hopeless() {
    let volume = debian_12().file("/lib/modules/6.1.0-18-amd64/modules.dep", "kernel/drivers/virtio.ko:\n");
    let plan = guest::plan(&inspected(volume), &Options::default()).unwrap();
    let finding = plan.findings.iter().find(|finding| finding.id == "kernel.no-virtio").unwrap();
    assert_eq!(finding.severity, Severity::Fatal);
    let built_in = debian_12()
        .file("/boot/config-6.1.0-18-amd64", "CONFIG_VIRTIO=y\nCONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_BLK=y\n");
    let plan = guest::plan(&inspected(built_in), &Options::default()).unwrap();
    assert!(!plan.fixes.iter().any(|fix| matches!(fix, Fix::Initramfs { .. })), "{plan}");
}
