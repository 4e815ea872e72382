#!/usr/bin/env bash
# mkguest.sh TREE.tar.zst OUT.raw [key=value…]: a real Debian server as a raw disk, and what it is in OUT.raw.json.
# As made by default it boots on a SATA/e1000 machine and on no other: no virtio in its initramfs, root=/dev/sda1, its
# NIC pinned by MAC to a static address. Needs root and loop devices, mtools; no partition, device-mapper or vfat support.
#
#   size=3G               of the disk                      pt=mbr|gpt         partition table
#   firmware=bios|uefi    (uefi with pt=gpt, and a tree made for it)      arch=amd64|arm64 (arm64 by uefi, a tree made for it)
#   fs=ext4|xfs|btrfs     of the root (btrfs: in a subvolume)  on=partition|lvm|raid|raid-lvm  what it lies on: a partition, a
#                         volume of a group, a mirror of which this disk is one half, or both; the tree needs the programs for it
#   rootref=dev|uuid|label  in fstab and kernel command line  boot=no|yes     /boot on a partition of its own
#   initramfs=list|most|dep  MODULES= of initramfs-tools   bootfull=PERCENT   fill /boot to this (with boot=yes)
#             dracut       in its place, in the tree too     compress=default|gzip|lz4|…  COMPRESS= of initramfs-tools
#   fallback=no|yes       by UEFI: a loader also where firmware without boot entries looks, as grub-install --force-extra-removable has it
#   kernels=1|2           expected in the tree             swap=no|yes        partition, with resume from it
#   cloudinit=yes|no                                       net=mac|dhcp|networkd
#   payload=MB            random data in /srv/payload.bin  junk=MB            deleted random data, marked by a canary
set -euo pipefail

# A mount namespace of our own: whatever ends this script also ends its mounts and their loop devices.
if [ "${HAUL_GUEST_NAMESPACE:-}" != "$PPID" ]; then
  HAUL_GUEST_NAMESPACE=$$ exec unshare --mount --propagation private --fork --kill-child "$(readlink -f "$0")" "$@"
fi

here=$(dirname "$(readlink -f "$0")")
tree=$1 out=$2
declare -A key=(
  [size]=3G [pt]=mbr [firmware]=bios [rootref]=dev [boot]=no [bootfull]=0 [initramfs]=list [kernels]=1 [swap]=no [cloudinit]=yes
  [net]=mac [payload]=16 [junk]=256 [fs]=ext4 [on]=partition [compress]=default
  [arch]=amd64 [fallback]=no
)
for option in "${@:3}"; do
  [[ $option == *=* && -v key[${option%%=*}] ]] || { echo "unknown option $option" >&2; exit 2; }
  key[${option%%=*}]=${option#*=}
done
source_mac=52:54:00:aa:bb:01 source_address=192.168.77.5

work=$(mktemp -d)
root=$work/root
part=$out.part
attached= # a loop device that is no mount's
detach() { [ -z "$attached" ] || losetup -d "$attached"; attached=; }
trap 'umount -R "$root" "$work/files" 2>/dev/null || true; detach; rmdir "$root" "$work/files" "$work"; rm -f "$part"' EXIT
mkdir "$root" "$work/files"
mount -t tmpfs -o size=64m,mode=700 tmpfs "$work/files"
new_uuid() { cat /proc/sys/kernel/random/uuid; }

# --- The disk: its partitions by start and length, in MiB.
rm -f "$part"
truncate -s "${key[size]}" "$part"
end=$(($(stat -c %s "$part") / 1048576 - 1)) # the last MiB is the second GPT's
at=1 number=0 table=() boot_number= swap_start=
add() { # LENGTH TYPE [FLAGS]: sets $start
  number=$((number + 1)) start=$at
  table+=("start=${at}MiB, size=$1MiB, type=$2${3:+, $3}")
  at=$((at + $1))
}
swap_size=0
[ "${key[swap]}" = no ] || swap_size=128
case ${key[arch]} in
  amd64) efi=x64 efi_platform=x86_64-efi serial=ttyS0,115200 ;;
  arm64) efi=aa64 efi_platform=arm64-efi serial=ttyAMA0 ;;
  *) echo "unknown arch=${key[arch]}" >&2; exit 2 ;;
esac
linux=83 swap_type=82 root_type=83
if [ "${key[pt]}" = gpt ]; then
  linux=0FC63DAF-8483-4772-8E79-3D69D8477DE4 root_type=$linux swap_type=0657FD6D-A4AB-43C4-84E5-0933C84B4F4F
  case ${key[firmware]} in
    bios) add 1 21686148-6449-6E6F-744E-656564454649 ;;
    uefi) add 48 C12A7328-F81F-11D2-BA4B-00A0C93EC93B; esp_number=$number esp_start=$start ;;
  esac
fi
[ "${key[arch]}-${key[firmware]}" != arm64-bios ] || { echo "arch=arm64 needs firmware=uefi" >&2; exit 2; }
[ "${key[firmware]}" = bios ] || [ -n "${esp_number:-}" ] || { echo "firmware=uefi needs pt=gpt" >&2; exit 2; }
if [ "${key[boot]}" = yes ]; then
  boot_size=192
  add $boot_size $linux
  boot_number=$number boot_start=$start
fi
root_size=$((end - at - (swap_size ? swap_size + 1 : 0)))
case ${key[on]}-${key[pt]} in
  lvm-mbr) root_type=8e ;;
  raid*-mbr) root_type=fd ;;
  lvm-gpt) root_type=E6D6D379-F507-44C2-A23C-238F2A3DF928 ;;
  raid*-gpt) root_type=A19D880F-05FC-4D3B-A006-743F0F84911E ;;
esac
add $root_size $root_type "$([ "${key[pt]}" = gpt ] || echo bootable)"
root_number=$number root_start=$start
if [ $swap_size != 0 ]; then
  if [ "${key[pt]}" = mbr ]; then # as Debian's installer does: the first logical partition
    table+=("start=${at}MiB, size=$((swap_size + 1))MiB, type=5")
    at=$((at + 1)) number=4
  fi
  add $swap_size $swap_type
  swap_number=$number swap_start=$start
fi
[ "${key[pt]}" = gpt ] && label=gpt partmap=gpt || label=dos partmap=msdos
if [ "${key[pt]}" = mbr ] && [ $swap_size != 0 ]; then
  table[-1]="$swap_number : ${table[-1]}"
  for i in "${!table[@]}"; do [[ ${table[i]} == *' : '* ]] || table[i]="$((i + 1)) : ${table[i]}"; done
fi
printf '%s\n' "label: $label" "${table[@]}" | sfdisk -q "$part"

# --- File systems, with the features of Debian 12 whatever this machine's defaults are.
root_uuid=$(new_uuid) boot_uuid=$(new_uuid) swap_uuid=$(new_uuid)
attach() { # START SIZE
  attached=$(losetup -f --show -o "$(($1 * 1048576))" --sizelimit "$(($2 * 1048576))" "$part")
}
make_ext4() { # START SIZE UUID LABEL
  mke2fs -q -F -t ext4 -O 64bit,metadata_csum,^orphan_file,^metadata_csum_seed -U "$3" -L "$4" \
    -E "offset=$(($1 * 1048576))" "$part" "$(($2 * 1024))k"
}
mount_at() { # START SIZE FOLDER [FILE-SYSTEM [OPTION]]
  mkdir -p "$3"
  mount -t "${4:-ext4}" -o "loop,offset=$(($1 * 1048576)),sizelimit=$(($2 * 1048576))${5:+,$5}" "$part" "$3"
}

# What the root lies on. Both begin with a MiB of their own; no array or volume is ever active here.
array_uuid=$(new_uuid | tr -d -)
root_device=/dev/sda$root_number grub_root= abstraction=
make_mirror() {
  root_device=/dev/md0 grub_root=mduuid/$array_uuid abstraction='diskfilter mdraid1x '
  root_start=$((root_start + 1)) root_size=$((root_size - 1))
  # The superblock (version 1.2) of the first of two members: no mdadm writes one without the kernel's md.
  perl -e '
    my ($file, $at, $size, $uuid) = @ARGV;
    my $sb = "\0" x 260;
    sub put { my ($at, $as, @values) = @_; my $bytes = pack $as, @values; substr($sb, $at, length $bytes) = $bytes }
    put(0, "V2", 0xa92b4efc, 1); put(16, "H32 a32", $uuid, "source-01:0");
    put(64, "Q< V V Q< V V", 1, 1, 0, $size, 0, 2); # made, level, layout, size, chunk, disks
    put(128, "Q<3", 2048, $size, 8);                # data at, its size, this block at: in sectors
    put(168, "a16", "first member 001"); put(192, "Q<3", 1, 1, ~0);
    put(220, "V", 2); put(256, "v2", 0, 1);
    my $sum = 0;
    $sum += $_ for unpack "V*", $sb;
    put(216, "V", ($sum & 0xffffffff) + ($sum >> 32));
    open my $disk, "+<", $file or die "$!";
    seek $disk, $at, 0; print $disk $sb or die "$!"; close $disk or die "$!"
  ' "$part" $(((root_start - 1) * 1048576 + 4096)) $((root_size * 2048)) "$array_uuid"
}
make_volume() {
  root_device=/dev/mapper/vg0-root grub_root=lvm/vg0-root abstraction+=lvm
  attach $root_start $root_size
  root_start=$((root_start + 1)) root_size=$(((root_size - 1) / 4 * 4))
  # None of the host's devices, and none of its records.
  lvm() {
    LVM_SYSTEM_DIR=$work/files LVM_SUPPRESS_FD_WARNINGS=1 DM_DISABLE_UDEV=1 command lvm "$@" --config "devices { use_devicesfile=0 hints=\"none\"
      filter=[\"a|^$attached\$|\",\"r|.*|\"] obtain_device_list_from_udev=0 external_device_info_source=\"none\" }
      activation { udev_sync=0 udev_rules=0 monitoring=0 } global { activation=0 use_lvmpolld=0 } backup { backup=0 archive=0 }" \
      2>"$work/files/log" || { cat "$work/files/log" >&2; return 1; }
  }
  lvm pvcreate -q --dataalignment 1m "$attached" >/dev/null
  lvm vgcreate -q vg0 "$attached" >/dev/null
  lvm lvcreate -q -an -Zn -Wn -L "${root_size}m" -n root vg0 >/dev/null
  lvm pvs --noheadings -o pe_start | grep -q '^ *1.00m *$'
  lvm lvs --noheadings -o seg_pe_ranges vg0/root | grep -q ':0-'
  detach
}
case ${key[on]} in
  partition) ;;
  lvm) make_volume ;;
  raid) make_mirror ;;
  raid-lvm) make_mirror; make_volume ;;
  *) echo "unknown on=${key[on]}" >&2; exit 2 ;;
esac
case ${key[fs]} in
  ext4) make_ext4 $root_start $root_size "$root_uuid" root ;;
  xfs | btrfs)
    attach $root_start $root_size
    if [ "${key[fs]}" = xfs ]; then mkfs.xfs -q -m "uuid=$root_uuid" -L root "$attached"; else
      mkfs.btrfs -q -U "$root_uuid" -L root "$attached" >/dev/null
    fi
    detach
    ;;
  *) echo "unknown fs=${key[fs]}" >&2; exit 2 ;;
esac
subvolume=
if [ "${key[fs]}" = btrfs ]; then
  mount_at $root_start $root_size "$root" btrfs
  subvolume=@rootfs
  btrfs -q subvolume create "$root/$subvolume"
  umount "$root"
fi
[ -z "$boot_number" ] || make_ext4 $boot_start $boot_size "$boot_uuid" boot
mount_at $root_start $root_size "$root" "${key[fs]}" ${subvolume:+subvol=$subvolume}
[ -z "$boot_number" ] || mount_at $boot_start $boot_size "$root/boot"
if [ $swap_size != 0 ]; then
  truncate -s ${swap_size}M "$work/files/swap"
  chmod 600 "$work/files/swap"
  mkswap -q -U "$swap_uuid" "$work/files/swap" >/dev/null
  dd if="$work/files/swap" of="$part" bs=1M count=1 seek=$swap_start conv=notrunc status=none
fi
tar --zstd -C "$root" -xpf "$tree" --numeric-owner --exclude='./dev/*'
mapfile -t kernels < <(ls "$root/lib/modules" | sort -V)
[ ${#kernels[@]} = "${key[kernels]}" ] || { echo "$tree has kernels ${kernels[*]}, not ${key[kernels]}" >&2; exit 1; }

# --- Deleted data, with the tree already on the disk, so that it lies in free space from now on.
sync -f "$root"
canary=HAUL-DELETED-$(new_uuid)
if [ "${key[junk]}" != 0 ]; then
  CANARY=$canary perl -e '
    open my $random, "<", "/dev/urandom" or die; binmode STDOUT;
    for (1 .. $ARGV[0]) {
      my $block = ""; while (length $block < 1 << 20) { sysread $random, $block, (1 << 20) - length $block, length $block }
      substr($block, $_ * 4096, length $ENV{CANARY}) = $ENV{CANARY} for 0 .. 255;
      print $block or die "$!"
    }' "${key[junk]}" >"$root/srv/old.dump"
  sync "$root/srv/old.dump"
  rm "$root/srv/old.dump"
fi

# --- A root of its own for the guest's programs.
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null zero full random urandom tty; do
  touch "$root/dev/$node"
  mount --bind "/dev/$node" "$root/dev/$node"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir -p "$root/dev/shm" "$root/dev/pts" "$root/dev/disk/by-uuid"
in_guest() { env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive chroot "$root" "$@"; }

# --- What the server calls its disks.
device() { [ "$1" = "$root_number" ] && echo "$root_device" || echo "/dev/sda$1"; }
reference() { # NUMBER UUID LABEL
  # A volume goes by its name, as installers have it.
  case $([ "$1-$root_device" = "$root_number-/dev/mapper/vg0-root" ] && echo dev || echo "${key[rootref]}") in dev) device "$1" ;; uuid) echo "UUID=$2" ;; label) echo "LABEL=$3" ;; esac
}
{
  case ${key[fs]} in
    ext4) echo "$(reference "$root_number" "$root_uuid" root) / ext4 errors=remount-ro 0 1" ;;
    *) echo "$(reference "$root_number" "$root_uuid" root) / ${key[fs]} defaults${subvolume:+,subvol=$subvolume} 0 0" ;;
  esac
  [ -z "$boot_number" ] || echo "$(reference "$boot_number" "$boot_uuid" boot) /boot ext4 defaults 0 2"
  [ $swap_size = 0 ] || case ${key[rootref]} in
    dev) echo "$(device "$swap_number") none swap sw 0 0" ;;
    *) echo "UUID=$swap_uuid none swap sw 0 0" ;;
  esac
  [ "${key[firmware]}" = bios ] || echo "$(reference "$esp_number" 6696-244F ESP) /boot/efi vfat umask=0077 0 1"
} >"$root/etc/fstab"
[[ ${key[on]} != raid* ]] || printf 'HOMEHOST <system>\nMAILADDR root\nARRAY /dev/md0 metadata=1.2 UUID=%s name=source-01:0\n' \
  "$(sed 's/.\{8\}/&:/g; s/:$//' <<<"$array_uuid")" >"$root/etc/mdadm/mdadm.conf"

# --- Who it is.
echo source-01 >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 source-01\n' >"$root/etc/hosts"
echo 'LANG=C.UTF-8' >"$root/etc/default/locale" # as an installer does; without it a first boot's cloud-init fails
echo "nameserver 192.168.77.1" >"$root/etc/resolv.conf"
new_uuid | tr -d - >"$root/etc/machine-id"
rm -f "$root"/etc/ssh/ssh_host_*
in_guest ssh-keygen -A >/dev/null
root_password=$(new_uuid) ops_password=$(new_uuid)
in_guest useradd --create-home --shell /bin/bash --uid 1000 ops
printf 'root:%s\nops:%s\n' "$root_password" "$ops_password" | in_guest chpasswd
in_guest install -d -m 700 -o ops -g ops /home/ops/.ssh
in_guest ssh-keygen -q -t ed25519 -N '' -C ops@source-01 -f /home/ops/.ssh/authorized
in_guest sh -c 'cd /home/ops/.ssh && rm authorized && mv authorized.pub authorized_keys && chmod 600 authorized_keys && chown ops: authorized_keys'
head -c "${key[payload]}M" /dev/urandom >"$root/srv/payload.bin"

# --- Its network.
interfaces=$root/etc/network/interfaces
printf 'source /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n' >"$interfaces"
pin() { printf '[Match]\nMACAddress=%s\n\n[%s]\n%s\n' "$source_mac" "$1" "$2"; }
case ${key[net]} in
  mac)
    cat >>"$interfaces" <<N

auto eth0
iface eth0 inet static
	hwaddress ether $source_mac
	address $source_address/24
	gateway 192.168.77.1
N
    pin Link 'Name=eth0' >"$root/etc/systemd/network/10-eth0.link"
    echo "SUBSYSTEM==\"net\", ACTION==\"add\", ATTR{address}==\"$source_mac\", NAME=\"eth0\"" \
      >"$root/etc/udev/rules.d/70-persistent-net.rules"
    ;;
  dhcp) printf '\nallow-hotplug eth0\niface eth0 inet dhcp\n' >>"$interfaces" ;;
  networkd)
    pin Network "$(printf 'Address=%s/24\nGateway=192.168.77.1' "$source_address")" \
      >"$root/etc/systemd/network/10-lan.network"
    in_guest systemctl -q enable systemd-networkd
    ;;
  *) echo "unknown net=${key[net]}" >&2; exit 2 ;;
esac
if [ "${key[cloudinit]}" = no ]; then
  in_guest dpkg --purge cloud-init >/dev/null 2>&1
  rm -rf "$root/etc/cloud" "$root/var/lib/cloud"
fi

# --- The line it prints when it is up.
install -m 755 "$here/beacon" "$root/usr/local/sbin/beacon"
cat >"$root/etc/systemd/system/beacon.service" <<'N'
[Unit]
Description=Say on the serial console how this server came up
Wants=network-online.target
After=network-online.target multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/beacon
[Install]
WantedBy=multi-user.target
N
in_guest systemctl -q enable beacon

# --- Its initramfs: what a SATA server needs, or whatever it can hold.
conf=$root/etc/initramfs-tools
[ "${key[compress]}" = default ] || sed -i "s/^COMPRESS=.*/COMPRESS=${key[compress]}/" "$conf/initramfs.conf"
[ $swap_size = 0 ] || [ "${key[initramfs]}" = dracut ] || case ${key[rootref]} in
  dev) echo "RESUME=$(device "$swap_number")" ;;
  *) echo "RESUME=UUID=$swap_uuid" ;;
esac >"$conf/conf.d/resume"
case ${key[initramfs]} in
  list | dep)
    # `dep` looks at the hardware it runs on, which is not the server's: the image is made by the list of what `dep` finds there.
    [ "${key[initramfs]}" = dep ] && list=$(cat "$conf/modules") || list=
    printf '%s\n' ahci ata_piix ata_generic sd_mod ext4 "${key[fs]}" e1000 >>"$conf/modules"
    sed -i 's/^MODULES=.*/MODULES=list/' "$conf/initramfs.conf"
    ;;
  most) ;;
  dracut)
    for kernel in "${kernels[@]}"; do
      in_guest dracut -q --force --no-hostonly --omit-drivers 'virtio virtio_ring virtio_pci virtio_blk virtio_scsi virtio_net' \
        "/boot/initrd.img-$kernel" "$kernel" >"$work/files/log" 2>&1 || { cat "$work/files/log" >&2; exit 1; }
    done
    ;;
  *) echo "unknown initramfs=${key[initramfs]}" >&2; exit 2 ;;
esac
[ "${key[initramfs]}" = dracut ] ||
  in_guest update-initramfs -c -k all >"$work/files/log" 2>&1 || { cat "$work/files/log" >&2; exit 1; }
if [ "${key[initramfs]}" = dep ]; then
  echo "$list" >"$conf/modules"
  sed -i 's/^MODULES=.*/MODULES=dep/' "$conf/initramfs.conf"
fi
newest=${kernels[-1]}
prefix=boot/
ln -sf "${prefix}vmlinuz-$newest" "$root/vmlinuz"
ln -sf "${prefix}initrd.img-$newest" "$root/initrd.img"

# --- Its boot loader: GRUB's own generator, told by a stand-in for grub-probe what it would find on the server.
sed -i -e 's/^GRUB_TIMEOUT=.*/GRUB_TIMEOUT=0/' -e 's/^GRUB_CMDLINE_LINUX_DEFAULT=.*/GRUB_CMDLINE_LINUX_DEFAULT=""/' \
  -e 's/^GRUB_CMDLINE_LINUX=.*/GRUB_CMDLINE_LINUX="console=tty0 console='$serial' net.ifnames=0"/' "$root/etc/default/grub"
{
  # The firmware of an ARM machine has its console on the serial port by itself.
  [ "${key[arch]}" = arm64 ] || printf '%s\n' GRUB_TERMINAL=serial 'GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"'
  case ${key[rootref]} in
    dev) echo 'GRUB_DISABLE_LINUX_UUID=true' ;;
    label) printf 'GRUB_DEVICE=LABEL=root\nGRUB_DISABLE_LINUX_UUID=true\n' ;;
    uuid) touch "$root/dev/disk/by-uuid/$root_uuid" ;;
  esac
} >>"$root/etc/default/grub"
boot_on=${boot_number:-$root_number} boot_drive=
[ -n "$boot_number" ] || boot_drive=$grub_root
[ "${key[fs]}" = ext4 ] && grub_fs=ext2 || grub_fs=${key[fs]}
cat >"$work/files/grub-probe" <<P
#!/bin/sh
for word; do
  case \$word in --target=*) target=\${word#*=} ;; -*) ;; *) last=\$word ;; esac
done
[ "\$1" = -t ] && target=\$2
n=$root_number uuid=$root_uuid fs=$grub_fs root='$grub_root' abstraction='$abstraction' device=$root_device
case \$last in /boot* | $(device "$boot_on")) n=$boot_on uuid=$([ -n "$boot_number" ] && echo "$boot_uuid fs=ext2 root= abstraction= device=/dev/sda$boot_number" || echo "$root_uuid") ;; esac
case \$target in
  device) echo \$device ;;
  fs_uuid) echo \$uuid ;;
  fs) echo \$fs ;;
  abstraction) echo \$abstraction ;;
  partmap) echo $partmap ;;
  drive) echo "(\${root:-hd0,$partmap\$n})" ;;
  compatibility_hint) echo "\${root:-hd0,$partmap\$n}" ;;
  hints_string) [ -n "\$root" ] && echo "--hint='\$root'" || echo "--hint-bios=hd0,$partmap\$n --hint-efi=hd0,$partmap\$n --hint-baremetal=ahci0,$partmap\$n" ;;
esac
P
chmod 755 "$work/files/grub-probe"
mount --bind "$work/files/grub-probe" "$root/usr/sbin/grub-probe"
[ "${key[firmware]}" = bios ] && platform=i386-pc || platform=$efi_platform
mkdir -p "$root/boot/grub/$platform"
in_guest grub-mkconfig -o /boot/grub/grub.cfg 2>"$work/files/log" || { cat "$work/files/log" >&2; exit 1; }
umount "$root/usr/sbin/grub-probe"
cp "$root"/usr/lib/grub/$platform/*.{mod,lst} "$root/boot/grub/$platform/"
[ -n "$boot_number" ] && grub_path=/grub || grub_path=${subvolume:+/$subvolume}/boot/grub
if [ "${key[firmware]}" = uefi ]; then
  # As Debian's installer leaves it: named by a boot entry of the machine's own firmware, which is not on the disk.
  mkdir -p "$root/boot/efi"
  esp=$work/files/esp
  truncate -s 48M "$esp"
  mkfs.fat -F 32 -s 1 -i 6696244F -n ESP "$esp" >/dev/null
  cat >"$work/files/grub.cfg" <<G
search.fs_uuid $([ -n "$boot_number" ] && echo "$boot_uuid" || echo "$root_uuid") root hd0,gpt$boot_on
set prefix=(\$root)'$grub_path'
configfile \$prefix/grub.cfg
G
  export MTOOLS_SKIP_CHECK=1
  mmd -i "$esp" ::/EFI ::/EFI/debian
  mcopy -i "$esp" "$root/usr/lib/shim/shim$efi.efi.signed" ::/EFI/debian/shim$efi.efi
  mcopy -i "$esp" "$root/usr/lib/grub/$efi_platform-signed/grub$efi.efi.signed" ::/EFI/debian/grub$efi.efi
  mcopy -i "$esp" "$work/files/grub.cfg" ::/EFI/debian/grub.cfg
  if [ "${key[fallback]}" = yes ]; then
    mmd -i "$esp" ::/EFI/BOOT
    mcopy -i "$esp" "$root/usr/lib/shim/shim$efi.efi.signed" "::/EFI/BOOT/BOOT${efi^^}.EFI"
    mcopy -i "$esp" "$root/usr/lib/grub/$efi_platform-signed/grub$efi.efi.signed" ::/EFI/BOOT/grub$efi.efi
  fi
else
  cp "$root"/usr/lib/grub/i386-pc/*.img "$root/boot/grub/i386-pc/"
  in_guest grub-mkimage -O i386-pc -p "(${boot_drive:=,$partmap$boot_on})$grub_path" -o /boot/grub/i386-pc/core.img \
    biosdisk part_msdos part_gpt ext2 $grub_fs $abstraction
  little_endian() { # NUMBER: eight bytes
    local i
    for i in 0 8 16 24 32 40 48 56; do printf "\\x$(printf %02x $((($1 >> i) & 255)))"; done
  }
  cp "$root/usr/lib/grub/i386-pc/boot.img" "$work/files/boot.img"
  cp "$root/boot/grub/i386-pc/core.img" "$work/files/core.img"
  core_at=1
  if [ "${key[pt]}" = gpt ]; then # the core lies in the BIOS boot partition: where it starts, and where it goes on
    core_at=2048
    little_endian $core_at | dd of="$work/files/boot.img" bs=1 seek=92 conv=notrunc status=none
    little_endian $((core_at + 1)) | dd of="$work/files/core.img" bs=1 seek=500 conv=notrunc status=none
  fi
fi

# --- A nearly full /boot, like after years of kernel updates.
if [ "${key[bootfull]}" != 0 ]; then
  [ -n "$boot_number" ] || { echo "bootfull needs boot=yes" >&2; exit 2; }
  sync -f "$root/boot"
  read -r total used < <(stat -f -c '%b %f %S' "$root/boot" | awk '{print int($1 * $3 / 1048576), int(($1 - $2) * $3 / 1048576)}')
  fill=$((total * key[bootfull] / 100 - used))
  [ $fill -le 0 ] || head -c ${fill}M /dev/urandom >"$root/boot/initrd.img-old.bak"
fi

# --- What must be the same after the move.
in_guest /usr/local/sbin/beacon identity >"$work/files/identity"
rm -rf "${root:?}"/tmp/* "$root"/var/log/*.log
live=$(df --output=used -B1 "$root" | tail -n 1)
fuser -k -m "$root" 2>/dev/null || true
umount -R "$root"
losetup -j "$part" | grep . >&2 && { echo "a loop device is still on $part" >&2; exit 1; }
if [ "${key[firmware]}" = uefi ]; then
  dd if="$esp" of="$part" bs=1M seek=$esp_start conv=notrunc,sparse status=none
else
  dd if="$work/files/boot.img" of="$part" bs=440 count=1 conv=notrunc status=none
  dd if="$work/files/core.img" of="$part" bs=512 seek=$core_at conv=notrunc status=none
fi
options=$(for name in "${!key[@]}"; do echo "$name=${key[$name]}"; done | sort)
jq -n --rawfile identity "$work/files/identity" --arg options "$options" --arg canary "$canary" \
  --arg root_password "$root_password" --arg ops_password "$ops_password" --arg kernels "${kernels[*]}" \
  --arg mac "$source_mac" --arg address "$source_address" --arg root_uuid "$root_uuid" --argjson live "$live" '
  def pairs: split("\n") | map(select(. != "") | capture("^(?<key>[^=]+)=(?<value>.*)$")) | from_entries;
  {identity: ($identity | pairs), options: ($options | pairs), canary: $canary, kernels: ($kernels | split(" ")),
   mac: $mac, address: $address, root_uuid: $root_uuid, live_bytes: $live,
   root_password: $root_password, ops_password: $ops_password}' >"$out.json"
sync "$part"
mv "$part" "$out"
