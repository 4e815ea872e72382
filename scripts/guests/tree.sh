#!/usr/bin/env bash
# tree.sh SUITE OUT.tar.zst [kernels=1|2] [builder=initramfs-tools|dracut]
# [firmware=bios|uefi] [arch=amd64|arm64] [packages=A,B]: a Debian server as a tree, for mkguest.sh to put on a disk. Needs root.
# It is made once per recipe and kept in the cache (HAUL_CACHE, else XDG_CACHE_HOME/haul, else ~/.cache/haul); OUT becomes
# a link to it. kernels=2 adds the suite's other kernel of the same flavour. HAUL_MIRROR names another package mirror.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
. "$here/deps.sh"
suite=$1 out=$2 kernels=1 builder=initramfs-tools firmware=bios arch=amd64 more=()
for option in "${@:3}"; do
  case $option in
    kernels=1 | kernels=2) kernels=${option#*=} ;;
    builder=initramfs-tools | builder=dracut) builder=${option#*=} ;;
    firmware=bios | firmware=uefi) firmware=${option#*=} ;;
    arch=amd64 | arch=arm64) arch=${option#*=} ;;
    packages=*) IFS=, read -ra more <<<"${option#*=}" ;;
    *) echo "unknown option $option" >&2; exit 2 ;;
  esac
done

[ $firmware = bios ] && loader=(grub-pc) || loader=("grub-efi-$arch" "grub-efi-$arch-signed" shim-signed)
packages=(
  "linux-image-$arch" systemd-sysv udev "$builder" "${loader[@]}" cloud-init ifupdown iproute2 openssh-server e2fsprogs
  netbase isc-dhcp-client kmod procps dbus "${more[@]}"
)
# What a server does not need to boot: its documents, and the drivers of what no server or virtual machine has.
exclude=(
  '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/info/*' '/usr/share/grub/themes/*'
  '/usr/lib/grub/'{i386-pc,x86_64-efi,arm64-efi}'/*.module'
  '/lib/modules/*/kernel/sound/*'
  '/lib/modules/*/kernel/drivers/'{gpu/drm/{amd,i915,nouveau,radeon,gma500,vmwgfx},media,isdn,iio,staging,infiniband,bluetooth,mmc,usb/gadget,comedi,thunderbolt,accel}'/*'
  '/lib/modules/*/kernel/drivers/net/'{wireless,can,wwan,usb,ieee802154}'/*'
  '/lib/modules/*/kernel/drivers/net/ethernet/'{mellanox,chelsio,qlogic,broadcom/bnx2x,cavium,netronome,sfc}'/*'
  '/lib/modules/*/kernel/net/'{bluetooth,mac80211,wireless,can,nfc}'/*'
)
other_kernel='set -e
have=$(ls /lib/modules)
other=$(apt-cache pkgnames linux-image-6. | sed -n "s/^linux-image-\([0-9.]*-[0-9]*-'"$arch"'\)$/\1/p" | grep -vxF "$have" | sort -V | tail -n 1)
[ -n "$other" ] || { echo "this suite has no other kernel" >&2; exit 1; }
apt-get -qy install --no-install-recommends "linux-image-$other"'

[ "$(. /etc/os-release && echo "$ID")" = debian ] && mirror=${HAUL_MIRROR:-$(apt_mirror)} || mirror=${HAUL_MIRROR:-}
recipe=("$suite" "$kernels" "${packages[@]}" "${exclude[@]}" "$other_kernel" 2)
cache=${HAUL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/haul}
tree=$cache/tree-$suite-$(printf '%s\n' "${recipe[@]}" | sha256sum | cut -c 1-16).tar.zst

if [ ! -e "$tree" ]; then
  install_guest_packages
  mkdir -p "$cache"
  # One builder at a time: the others find the finished tree.
  exec 9>"$tree.lock"
  flock 9
fi
if [ ! -e "$tree" ]; then
  start=$SECONDS
  part=$(mktemp "$tree.XXXXXX")
  trap 'rm -f "$part"' EXIT
  options=("--architectures=$arch" --variant=minbase --mode=root --format=tar "--include=$(IFS=,; echo "${packages[*]}")")
  options+=(--aptopt='Acquire::Languages "none"' --dpkgopt=force-unsafe-io)
  for path in "${exclude[@]}"; do options+=("--dpkgopt=path-exclude=$path"); done
  [ "$kernels" = 1 ] || options+=("--customize-hook=chroot \"\$1\" sh -c '$other_kernel'")
  # The initramfs is made when the disk is: INITRD=No is the kernel packages' own switch.
  INITRD=No DEBIAN_FRONTEND=noninteractive mmdebstrap "${options[@]}" "$suite" - ${mirror:+"$mirror"} 2>"$tree.log" |
    zstd -q -1 -T0 >"$part" || { tail -n 20 "$tree.log" >&2; exit 1; }
  sync "$part"
  mv "$part" "$tree"
  echo "made $(basename "$tree"): $(du -h "$tree" | cut -f 1) in $((SECONDS - start)) s" >&2
fi
[ "$(readlink -f "$out")" = "$(readlink -f "$tree")" ] || ln -sfn "$tree" "$out"
