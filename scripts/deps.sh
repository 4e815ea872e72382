#!/usr/bin/env bash
# Installs every program the tests run: those of the guests, reference file system tools, and the judges' Python.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/guests/deps.sh
install_guest_packages
if command -v dpkg-query >/dev/null; then
  install_packages 7zip binutils-aarch64-linux-gnu btrfs-progs cpio cryptsetup-bin curl dosfstools exfat-fuse exfatprogs fuse3 gdisk \
    initramfs-tools-core libarchive-tools libnbd-bin libvhdi-utils libvmdk-utils lvm2 lz4 mdadm mount mtools nbdkit ntfs-3g \
    partclone pigz python3 python3-venv tar time xfsprogs
fi
