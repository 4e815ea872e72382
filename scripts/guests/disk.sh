#!/usr/bin/env bash
# disk.sh [key=value…]: prints the path of a disk made by mkguest.sh with these options, kept in the cache beside its
# tree (suite=bookworm chooses another one). For tests, which must not write it. Needs root.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
suite=bookworm kernels=1 builder=initramfs-tools firmware=bios arch=amd64 packages=() options=()
for option in "$@"; do
  case $option in
    suite=*) suite=${option#*=} ;;
    kernels=*) kernels=${option#*=} options+=("$option") ;;
    firmware=*) firmware=${option#*=} options+=("$option") ;;
    arch=*) arch=${option#*=} options+=("$option") ;;
    fs=xfs) packages+=(xfsprogs) options+=("$option") ;;
    fs=btrfs) packages+=(btrfs-progs) options+=("$option") ;;
    compress=lz4) packages+=(lz4) options+=("$option") ;;
    on=lvm) packages+=(lvm2) options+=("$option") ;;
    on=raid-lvm) packages+=(lvm2 mdadm) options+=("$option") ;;
    on=raid) packages+=(mdadm) options+=("$option") ;;
    initramfs=dracut) builder=dracut options+=("$option") ;;
    *) options+=("$option") ;;
  esac
done
. "$here/deps.sh"
[ "$arch" = amd64 ] || runs_arm64 # to make it, and for what the tests run of it
cache=${HAUL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/haul}
mkdir -p "$cache"
name=$( (printf '%s\n' "$suite" "${options[@]}" | sort; cat "$here"/{tree.sh,mkguest.sh,beacon}) | sha256sum | cut -c 1-16)
disk=$cache/disk-$name.raw
exec 9>"$disk.lock"
flock 9
if [ ! -e "$disk" ]; then
  "$here/tree.sh" "$suite" "$disk.tree" "kernels=$kernels" "builder=$builder" "firmware=$firmware" "arch=$arch" \
    "packages=$(IFS=,; echo "${packages[*]}")" 9>&-
  "$here/mkguest.sh" "$disk.tree" "$disk" "${options[@]}" >&2 9>&-
  rm "$disk.tree"
fi
echo "$disk"
