#!/usr/bin/env bash
# Makes the seeds of the fuzzer in tests/corpus anew, with the programs that make such files. Seeds that were made by
# hand or found by the fuzzer (refused-…, broken-…, crash-…) stay. Needs root, and what scripts/deps.sh installs.
#   scripts/corpus.sh [PARSER…]
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=$PWD/tests/corpus
export SOURCE_DATE_EPOCH=1700000000 LC_ALL=C E2FSPROGS_FAKE_TIME=1700000000
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

# The pages of a file that are not zero (tests/fuzz_bodies/input.rs), compressed where that helps.
seed() { # PARSER NAME FILE
  mkdir -p "$corpus/$1"
  rm -f "$corpus/$1/$2" "$corpus/$1/$2.zst"
  python3 - "$3" "$dir/packed" <<'PY'
import sys, os
src, out = sys.argv[1:]
# NTFS's table of upper-case letters, 128 KiB that no map looks at, may stay away.
trims = os.environ.get('TRIM')
def dull(data):
    words = [int.from_bytes(data[i:i + 2], 'little') for i in range(0, len(data), 2)]
    return sum(b - a == 1 for a, b in zip(words, words[1:])) > len(words) // 2
size = os.path.getsize(src)
with open(src, 'rb') as f, open(out, 'wb') as o:
    o.write(b'haulpage' + size.to_bytes(8, 'little'))
    fd, at = f.fileno(), 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(fd, at, os.SEEK_HOLE)
        for page in range(at // 4096, -(-end // 4096)):
            data = os.pread(fd, 4096, page * 4096)
            if data.strip(b'\0') and not (trims and dull(data)):
                o.write(page.to_bytes(8, 'little') + bytes(8) + data.ljust(4096, b'\0'))
        at = end
PY
  plain "$1" "$2" packed
}
plain() { # PARSER NAME FILE
  mkdir -p "$corpus/$1"
  rm -f "$corpus/$1/$2" "$corpus/$1/$2.zst"
  zstd -q -19 --content-size -f "$3" -o z
  if [ $(($(stat -c %s z) * 3)) -lt $(($(stat -c %s "$3") * 2)) ]; then cp z "$corpus/$1/$2.zst"; else cp "$3" "$corpus/$1/$2"; fi
  [ "$(stat -c %s "$3")" -le 409600 ] || echo "$1/$2 is long: $(stat -c %s "$3") bytes"
}
# Leaves so many bytes of the log of the XFS in img: the kernel stamps 2 MiB of it when it mounts.
cut_log() {
  local start bits group blocks size at
  read -r start bits group blocks size < <(xfs_db -r -c 'sb 0' -c 'p logstart agblklog agblocks logblocks blocksize' img | awk '{print $3}' | xargs)
  at=$((((start >> bits) * group + (start & ((1 << bits) - 1))) * size + $1))
  fallocate -p -o $at -l $((blocks * size - $1)) img
}
wanted() { [ ${#only[@]} = 0 ] || [[ " ${only[*]} " == *" $1 "* ]]; }
only=("$@")

# A disk of 3 MiB with a little data.
disk() {
  truncate -s 0 disk; truncate -s 3M disk
  printf 'the first sectors of a disk' | dd of=disk conv=notrunc status=none
  printf 'in the middle' | dd of=disk conv=notrunc status=none bs=1 seek=1500000
  printf 'at its end' | dd of=disk conv=notrunc status=none bs=1 seek=3145718
}

if wanted qcow2; then
  disk
  make() { qemu-img convert -f raw -O qcow2 "${@:2}" disk "$1"; }
  make q -o cluster_size=4k; seed qcow2 good-4k q
  make q -o compat=0.10,cluster_size=4k; seed qcow2 good-v2-4k q
  make q -o cluster_size=16k,extended_l2=on; seed qcow2 good-subclusters q
  make q -c -o cluster_size=4k; qemu-img snapshot -c one q; seed qcow2 good-zlib-4k q
  make q -c -o cluster_size=16k,compression_type=zstd; seed qcow2 good-zstd-16k q
  make q -o cluster_size=4k,refcount_bits=1,lazy_refcounts=on; seed qcow2 good-lazy q
  qemu-io -f qcow2 -c 'write -z 0 64k' q >/dev/null; seed qcow2 good-zeroes q
fi

if wanted vhd; then
  disk
  make() { qemu-img convert -f raw -O vpc -o "$2" disk "$1"; }
  make v subformat=dynamic,force_size=on; seed vhd good-dynamic v
  truncate -s -512 v; seed vhd good-without-end v
  make v subformat=dynamic; seed vhd good-geometry v
  make v subformat=fixed,force_size=on; seed vhd good-fixed v
  qemu-img create -q -f vpc -o subformat=dynamic,force_size=on v 4G; seed vhd good-empty v
fi

if wanted vhdx; then
  disk
  make() { qemu-img convert -f raw -O vhdx -o "$2" disk "$1"; }
  make x block_size=1M; seed vhdx good-dynamic x
  make x block_size=1M,block_state_zero=off,subformat=fixed; seed vhdx good-fixed x
  make x block_size=1M,log_size=1M; # a killed program leaves its log
  qemu-io -f vhdx -c 'write 2M 4k' -c flush -c 'write 1M 4k' -c flush -c 'sigraise 9' x >/dev/null 2>&1 || true
  seed vhdx good-log x
fi

if wanted vmdk; then
  disk
  make() { rm -f v*; qemu-img convert -f raw -O vmdk -o "$1" disk v.vmdk; }
  make subformat=monolithicSparse; seed vmdk good-sparse-pages v.vmdk
  make subformat=monolithicSparse,zeroed_grain=on; qemu-io -f vmdk -c 'write -z 64k 64k' v.vmdk >/dev/null; seed vmdk good-zeroes v.vmdk
  make subformat=streamOptimized; seed vmdk good-stream-pages v.vmdk
  truncate -s 1M disk # as long as the descriptor says that the extent belongs to
  make subformat=twoGbMaxExtentSparse; seed vmdk-extent good-pages v-s001.vmdk
  make subformat=twoGbMaxExtentSparse,zeroed_grain=on; qemu-io -f vmdk -c 'write -z 64k 64k' v.vmdk >/dev/null; seed vmdk-extent good-zeroes v-s001.vmdk
fi

if wanted archive; then
  head -c 20000 /dev/zero > raw; printf '\x55\xaa' | dd of=raw conv=notrunc bs=1 seek=510 status=none
  for i in $(seq 600); do echo "line $i of a disk"; done | dd of=raw conv=notrunc bs=1 seek=9000 status=none
  echo 'this is no disk' > notes
  cp --sparse=always raw sparse; truncate -s 400k sparse; printf x | dd of=sparse conv=notrunc bs=1 seek=300000 status=none
  cat > vm.ovf <<'OVF'
<Envelope><References><File ovf:id="f" ovf:href="raw"/></References><DiskSection><Disk ovf:fileRef="f"/></DiskSection></Envelope>
OVF
  gzip -nk raw; head -c 9000 raw > a; tail -c +9001 raw > b
  tar() { command tar --mtime=@1700000000 --owner=0 --group=0 --numeric-owner --mode=0644 "$@"; }
  put() { cat > made; plain archive "$1" made; }
  gzip -nc raw | put good-gzip
  { gzip -nc a; gzip -nc b; } | put good-gzip-members
  zstd -qc raw | put good-zstd
  { zstd -qc a; zstd -qc --no-check b; printf '\x50\x2a\x4d\x18\x03\x00\x00\x00abc'; } | put good-zstd-frames
  xz -c raw | put good-xz
  xz -c --block-size=9KiB --check=sha256 raw | put good-xz-blocks
  xz -c --x86 --delta --lzma2=preset=0 raw | put good-xz-filters
  tar -c --format=ustar notes raw | put good-tar
  tar -c --format=posix notes raw | put good-tar-pax
  tar -cS --format=oldgnu notes sparse | put good-tar-sparse-old
  tar -cS --format=posix --sparse-version=0.0 notes sparse | put good-tar-sparse-0.0
  tar -cS --format=posix --sparse-version=0.1 sparse | put good-tar-sparse-0.1
  tar -cS --format=posix --sparse-version=1.0 sparse notes | put good-tar-sparse-1.0
  tar -c --format=ustar vm.ovf notes raw | put good-ova
  tar -cz notes raw | put good-tar-gz
  tar -c notes raw.gz | put good-tar-of-gzip
  tar -c notes raw a | put refused-two-disks
fi

if wanted layout; then
  tree() { rm -rf tree; mkdir -p tree/d; for i in 1 2 3; do echo "file $i" > "tree/d/f$i"; done; ln -s d/f1 tree/link; }
  new() { rm -f img; truncate -s "$1" img; }
  part() { # SIZE LABEL: makes img a disk of one partition at 1 MiB, holding fs
    new "$1"; printf 'label: %s\nlabel-id: 11111111-1111-4111-8111-111111111111\nstart=2048,uuid=22222222-2222-4222-8222-222222222222\n' "$2" | sed "$([ "$2" = gpt ] || echo 's/^label-id.*/label-id: 0x12345678/; s/,uuid.*//')" | sfdisk -q img
    dd if=fs of=img bs=1M seek=1 conv=notrunc,sparse status=none
  }
  uuid=33333333-3333-4333-8333-333333333333
  tree
  ext() { rm -f fs; truncate -s "$1" fs; mke2fs -q -U $uuid -E hash_seed=$uuid,lazy_itable_init=0,nodiscard -d tree "${@:2}" fs; }
  ext 1M -t ext2 -b 1024 -N 16; cp fs img; seed layout good-ext2 img
  ext 2M -t ext4 -b 1024 -N 32 -O ^has_journal,metadata_csum,64bit; cp fs img; seed layout good-ext4 img
  part 3M dos; seed layout good-mbr-ext4 img
  part 4M gpt; seed layout good-gpt-ext4 img
  ext 24M -t ext4 -b 1024 -N 48 -g 2048 -G 4 -O ^has_journal,meta_bg,^resize_inode,uninit_bg,^metadata_csum; cp fs img; seed layout good-ext4-groups img
  ext 8M -t ext4 -b 1024 -N 32 -J size=1; debugfs -w -R 'jo -c' fs >/dev/null 2>&1 || true
  printf 'jo\njw -b 333,444 /etc/hostname\njc\n' | debugfs -w fs >/dev/null 2>&1 || true
  cp fs img; seed layout good-ext4-journal img
  new 64M; mkfs.xfs -q -f -m crc=0,finobt=0,uuid=$uuid -d agcount=2 --unsupported img; seed layout good-xfs-v4 img
  new 64M; mkfs.xfs -q -f -m uuid=$uuid -d agcount=2 --unsupported -l size=6m img; seed layout good-xfs img
  new 110M; mkfs.btrfs -q -f -U $uuid -m single -n 4096 --rootdir tree img; seed layout good-btrfs img
  new 40M; mkfs.btrfs -q -f -U $uuid -M -n 4096 img; seed layout good-btrfs-mixed img
  # As a crash leaves them: a file made, another one deleted, and the image taken from under the mount.
  crashed() { # NAME
    mkdir -p mnt; mount -o loop img mnt
    echo one > mnt/one; echo two > mnt/two; sync -f mnt; rm mnt/one; echo three > mnt/three; sync mnt/three
    cp --sparse=always img taken; umount mnt; mv taken img
    [ "$1" != good-xfs-crashed ] || cut_log 65536
    seed layout "$1" img
  }
  new 8M; mke2fs -q -t ext4 -b 1024 -N 32 -U $uuid -E hash_seed=$uuid,nodiscard -J size=1 img; crashed good-ext4-crashed
  new 64M; mkfs.xfs -q -f -m uuid=$uuid -d agcount=2 --unsupported -l size=6m img 2>/dev/null; crashed good-xfs-crashed
  new 110M; mkfs.btrfs -q -f -U $uuid -m single -n 4096 img; crashed good-btrfs-crashed
  # With files of their own, put there without a mount where there is a tool for it.
  fat() { # NAME SIZE ARGUMENTS…
    new "$2"; mkfs.fat --invariant "${@:3}" img >/dev/null
    mcopy -i img tree/d/f1 ::one; mmd -i img ::folder; mcopy -i img tree/d/f2 "::folder/a long name"; mdel -i img ::one
    seed layout "$1" img
  }
  fat good-fat12 1M -F 12; fat good-fat16 5M -F 16 -s 1; fat good-fat32 34M -F 32 -s 1
  new 2M; mkntfs -qF -s 512 -c 512 img >/dev/null 2>&1
  ntfscp -q img tree/d/f1 one 2>/dev/null; TRIM=1 seed layout good-ntfs img
  new 8M; LC_ALL=C.UTF-8 mkfs.exfat -c 4K img >/dev/null
  seed layout good-exfat img
  new 1M; mkswap -q -U $uuid img; seed layout good-swap img
  lvm_on() { # DEVICE: a group with two volumes
    local c="devices { dir=\"/dev\" scan=\"/dev\" use_devicesfile=0 hints=\"none\" filter=[\"a|^$1\$|\",\"r|.*|\"] obtain_device_list_from_udev=0 external_device_info_source=\"none\" } activation { udev_sync=0 udev_rules=0 monitoring=0 } global { activation=0 use_lvmpolld=0 use_lvmlockd=0 } backup { backup=0 archive=0 }"
    export LVM_SYSTEM_DIR=$dir LVM_SUPPRESS_FD_WARNINGS=1 DM_DISABLE_UDEV=1
    pvcreate -q --metadatasize 60k --dataalignment 64k "$1" --config "$c" >/dev/null
    vgcreate -q -s 64k vg "$1" --config "$c" >/dev/null
    lvcreate -q -an -Zn -Wn -n root -l 20 vg --config "$c" >/dev/null
    lvcreate -q -an -Zn -Wn -n swap -l 4 vg --config "$c" >/dev/null
  }
  new 3M; dev=$(losetup -f --show img); lvm_on "$dev"; losetup -d "$dev"
  ext 1M -t ext2 -b 1024 -N 16; dd if=fs of=img bs=64k seek=1 conv=notrunc,sparse status=none
  cp img fs; seed layout good-lvm img
  part 5M gpt; seed layout good-gpt-lvm img
  new 4M
  printf 'label: dos\nlabel-id: 0x12345678\nstart=2048,size=1024\nstart=3072,type=5\nstart=3080,size=1000\nstart=4090,size=1000,type=82\n' | sfdisk -q img
  seed layout broken-mbr-logical img
  new 64k; seed layout broken-empty img
fi

if wanted btrfs-files; then
  # Data on the disk is of one letter, to be small; what is inline is not under the checksums of data.
  fill() { # FOLDER
    for len in 5 900 3000; do head -c $len <(yes "line $len") > "$1/inline $len"; done
    head -c 20000 /dev/zero | tr '\0' x > "$1/plain"; truncate -s 30k "$1/plain"; head -c 140000 /dev/zero | tr '\0' y > "$1/long"
    truncate -s 100k "$1/sparse"; printf z | dd of="$1/sparse" bs=1 seek=50000 conv=notrunc status=none
    ln -s "inline 5" "$1/link"; mkfifo "$1/pipe"
  }
  made() { # NAME MIB MKFS-ARGUMENTS MOUNT-OPTIONS
    rm -f img; truncate -s "$2M" img; mkfs.btrfs -q -f -U 33333333-3333-4333-8333-333333333333 $3 img
    mkdir -p mnt; mount -o "loop,$4" img mnt
    btrfs -q subvolume create mnt/@; fill mnt/@; btrfs -q subvolume create mnt/@/nested; echo nested > mnt/@/nested/file
    btrfs -q subvolume snapshot mnt/@ mnt/snapshot; cp --reflink=always mnt/@/long mnt/long
    printf over | dd of=mnt/long bs=1 seek=70000 conv=notrunc status=none; fallocate -o 200k -l 64k mnt/long
    btrfs -q subvolume set-default mnt/@; umount mnt; seed btrfs-files "$1" img
  }
  made good-plain 110 '-m single -n 4096' ''
  made good-zlib 110 '-m single -n 4096' compress-force=zlib,max_inline=3500
  made good-lzo 40 '-M -n 4096' compress-force=lzo,max_inline=3500
  made good-zstd 110 '-m single -n 4096 -O ^no-holes' compress-force=zstd,max_inline=3500
fi

if wanted xfs-files; then
  uuid=33333333-3333-4333-8333-333333333333
  new() { rm -f img; truncate -s "$1" img; }
  # Put there by mkfs.xfs: folders of each form but the longest.
  for i in 1 2 3; do echo "file $i" > "f$i"; done; : > f0
  files() { # COUNT PATTERN: a folder
    printf 'folder-%s d--755 0 0\n' "$1"; for i in $(seq "$1"); do printf "$2 ---644 0 0 f%s\\n" "$i" $((i < 4 ? i : 0)); done; echo '$'
  }
  proto() { printf '/stand/diag\n0 0\nd--755 0 0\n'; "$@"; printf 'short l--777 0 0 f1\npipe p--644 0 0\n$\n'; }
  few() { files 0; files 3 'name-%s'; files 20 'a-longer-name-%s.conf'; files 30 "$(printf 'n%.0s' $(seq 180))%s"; }
  many() { few; files 540 'entry-%s'; printf 'long l--777 0 0 %s\n' "$(printf 't%.0s' $(seq 700))"; }
  proto few > proto; new 64M
  mkfs.xfs -q -f -m uuid=$uuid -d agcount=2 --unsupported -l size=6m -p proto img; seed xfs-files good-v5 img
  proto many > proto; new 64M
  mkfs.xfs -q -f -m crc=0,finobt=0,uuid=$uuid -b size=512 -d agcount=2 --unsupported -p proto img 2>/dev/null; seed xfs-files good-v4 img
  # By the kernel: many names of few files, targets in blocks of their own, extents in a tree; data of zeroes.
  new 64M; mkfs.xfs -q -f -m uuid=$uuid -b size=1024 -d agcount=2 --unsupported -l size=6m img
  mkdir -p mnt; mount -o loop img mnt
  mkdir mnt/folder; echo content > mnt/folder/file
  for i in $(seq 600); do ln mnt/folder/file "mnt/folder/entry-$i"; done; rm mnt/folder/entry-2?
  for i in 400 700 1000; do ln -s "$(printf 't%.0s' $(seq $i))" mnt/link-$i; done
  python3 - <<'PY'
with open('mnt/pieces', 'wb') as file:
    for i in range(300):
        file.seek(i * 4096)
        file.write(bytes(1024))
PY
  xfs_io -f -c 'falloc 0 64k' -c 'pwrite -q -S 0 5k 3k' mnt/falloc; mknod mnt/device b 7 1
  umount mnt
  cut_log 0
  seed xfs-files good-kernel img
  # As a crash leaves it: what was done last is in its log alone.
  new 64M; mkfs.xfs -q -f -m uuid=$uuid -d agcount=2 --unsupported -l size=6m img; mount -o loop img mnt
  mkdir mnt/old; for i in $(seq 30); do echo "$i" > "mnt/old/n$i"; done; head -c 40000 /dev/zero > mnt/file; sync -f mnt
  for i in $(seq 20); do mv "mnt/old/n$i" "mnt/entry-$i"; done; mkdir mnt/new; echo new > mnt/new/file; rm mnt/old/n2?
  ln -s "$(printf 't%.0s' $(seq 500))" mnt/link; xfs_io -c 'truncate 20k' -c 'falloc 100k 30k' mnt/file
  xfs_io -x -c 'shutdown -f' mnt; cp --sparse=always img taken; umount mnt; mv taken img
  cut_log 131072
  seed xfs-files good-crashed img
fi

if wanted fat-files; then
  export MTOOLS_SKIP_CHECK=1
  rm -rf tree; mkdir -p tree/EFI/{BOOT,debian} tree/many; echo loader > tree/EFI/debian/shimx64.efi; : > tree/empty
  echo 'search.fs_uuid 11111111-1111-4111-8111-111111111111 root' > tree/EFI/debian/grub.cfg
  for i in $(seq 40); do echo "$i" > "tree/many/a name longer than eight and three $i.conf"; done
  head -c 20000 /dev/zero | tr '\0' x > tree/long
  for kind in 12:2M 16:9M 32:34M; do
    rm -f img; truncate -s "${kind#*:}" img
    mkfs.fat -F "${kind%:*}" -s 1 -i 6696244F --invariant img > /dev/null
    mcopy -s -m -i img tree/* ::/; mdel -i img '::/many/a name longer than eight and three 1*.conf'
    mcopy -i img tree/long ::/many/again
    seed fat-files "good-fat${kind%:*}" img
  done
fi

if wanted guest; then
  rm -rf tree; mkdir -p tree/{etc/network,boot/grub,bin,lib/modules/6.1.0-1-amd64,etc/default}
  printf 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian 12"\n' > tree/etc/os-release
  printf '/dev/sda1 / ext4 errors=remount-ro 0 1\n/dev/sda2 none swap sw 0 0\n' > tree/etc/fstab
  echo guest > tree/etc/hostname
  printf 'auto enp0s3\niface enp0s3 inet static\n  address 192.0.2.5/24\n  gateway 192.0.2.1\n' > tree/etc/network/interfaces
  printf '\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01' > tree/bin/sh
  printf 'menuentry one {\n linux /boot/vmlinuz-6.1.0-1-amd64 root=/dev/sda1 ro\n initrd /boot/initrd.img-6.1.0-1-amd64\n}\n' > tree/boot/grub/grub.cfg
  echo kernel > tree/boot/vmlinuz-6.1.0-1-amd64
  mkdir -p i/lib/modules/6.1.0-1-amd64; echo > i/lib/modules/6.1.0-1-amd64/ahci.ko
  (cd i && find . | sort | cpio -o -H newc --reproducible 2>/dev/null) | gzip -n > tree/boot/initrd.img-6.1.0-1-amd64
  rm -f img; truncate -s 1M img
  mke2fs -q -t ext4 -b 1024 -N 48 -O ^has_journal -U 33333333-3333-4333-8333-333333333333 -E hash_seed=33333333-3333-4333-8333-333333333333,nodiscard -d tree img
  seed guest good-ext4 img
  rm -f img; truncate -s 1M img
  mke2fs -q -t ext2 -b 1024 -N 48 -U 33333333-3333-4333-8333-333333333333 -d tree img; seed guest good-ext2 img
  for i in $(seq 60); do echo "# $i" > "tree/etc/a-file-with-a-long-name-so-that-the-folder-has-an-index-$i"; done
  rm -f img; truncate -s 8M img
  mke2fs -q -t ext4 -b 1024 -N 160 -O dir_index -J size=1 -U 33333333-3333-4333-8333-333333333333 -E hash_seed=33333333-3333-4333-8333-333333333333,nodiscard -d tree img
  seed guest good-ext4-journal img
fi

if wanted initramfs; then
  rm -rf i; mkdir -p i/lib/modules/6.1/kernel i/etc; for m in virtio_blk.ko virtio-net.ko.xz e1000.ko.zst; do echo "module $m" > i/lib/modules/6.1/kernel/$m; done
  ln -s lib i/usr; find i -exec touch -h -d @1700000000 {} +
  (cd i && find . | sort | cpio -o -H newc --reproducible 2>/dev/null) > cpio
  put() { cat > made; plain initramfs "$1" made; }
  put good-plain < cpio
  gzip -nc cpio | put good-gzip
  zstd -qc cpio | put good-zstd
  xz -c --check=crc32 cpio | put good-xz
  xz -c --format=lzma cpio | put good-lzma
  bzip2 -c cpio | put good-bzip2
  lz4 -lqc cpio | put good-lz4
  { cat cpio; head -c 512 /dev/zero; zstd -qc cpio; } | put good-microcode
  head -c 300 cpio | put refused-cut-off
fi

if wanted console; then
  for log in "$corpus"/../data/console/*; do plain console "good-$(basename "$log" .log)" "$log"; done
fi

if wanted guest-files; then
  mkdir -p "$corpus/guest-files"
  cat > "$corpus/guest-files/good-debian" <<'F'
=== /etc/os-release
ID=debian
VERSION_ID="12"
PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
=== /etc/fstab
# <file system> <mount point> <type> <options> <dump> <pass>
/dev/sda1 / ext4 errors=remount-ro 0 1
/dev/disk/by-label/label3 /data ext4 defaults,noatime 0 2
/dev/sda2 none swap sw 0 0
/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0
UUID=33333333-3333-4333-8333-333333333333 /srv ext4 defaults 0 2
=== /etc/hostname
source-01
=== /etc/machine-id
0123456789abcdef0123456789abcdef
=== /etc/network/interfaces
source /etc/network/interfaces.d/*
auto lo
iface lo inet loopback
allow-hotplug enp0s3
iface enp0s3 inet static
    address 192.0.2.5/24
    gateway 192.0.2.1
    dns-nameservers 192.0.2.53
    up ip route add 198.51.100.0/24 via 192.0.2.9 dev enp0s3
iface enp0s3 inet6 auto
=== /etc/network/interfaces.d/more
auto enp0s3:1
iface enp0s3:1 inet static
  address 192.0.2.6
  netmask 255.255.255.0
=== /etc/udev/rules.d/70-persistent-net.rules
SUBSYSTEM=="net", ACTION=="add", ATTR{address}=="52:54:00:12:34:56", NAME="enp0s3"
=== /etc/default/grub
GRUB_DEFAULT=0
GRUB_CMDLINE_LINUX_DEFAULT="quiet root=/dev/sda1"
GRUB_CMDLINE_LINUX=""
=== /boot/grub/grub.cfg
set default="0"
menuentry 'Debian' --class debian {
	search --no-floppy --fs-uuid --set=root 11111111-1111-4111-8111-111111111111
	linux /boot/vmlinuz-6.1.0-1-amd64 root=/dev/sda1 ro quiet
	initrd /boot/initrd.img-6.1.0-1-amd64
}
=== /boot/grub/device.map
(hd0) /dev/sda
=== /boot/vmlinuz-6.1.0-1-amd64
=== /boot/initrd.img-6.1.0-1-amd64
=== /boot/config-6.1.0-1-amd64
CONFIG_VIRTIO_BLK=m
CONFIG_VIRTIO=y
=== /lib/modules/6.1.0-1-amd64/modules.dep
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko
=== /lib/modules/6.1.0-1-amd64/modules.builtin
kernel/drivers/virtio/virtio_pci.ko
=== /etc/initramfs-tools/initramfs.conf
MODULES=dep
COMPRESS=zstd
RESUME=/dev/sda2
=== /etc/initramfs-tools/conf.d/resume
RESUME=/dev/sda2
=== /etc/initramfs-tools/modules
ahci
=== /usr/sbin/update-initramfs
#!/bin/sh
=== /bin -> usr/bin
=== /usr/bin/sh
F
  cat > "$corpus/guest-files/good-ubuntu" <<'F'
=== /etc/os-release -> ../usr/lib/os-release
=== /usr/lib/os-release
ID=ubuntu
VERSION_ID="22.04"
PRETTY_NAME="Ubuntu 22.04.4 LTS"
=== /etc/fstab
LABEL=label1 / ext4 defaults 0 1
PARTUUID=c4e5a5d0-0003-4000-8000-000000000000 /boot ext4 defaults 0 2
/swap.img none swap sw 0 0
=== /etc/netplan/00-installer-config.yaml
network:
  version: 2
  renderer: networkd
  ethernets:
    ens18:
      match: {macaddress: "52:54:00:12:34:56"}
      addresses: [192.0.2.5/24]
      routes:
        - to: default
          via: 192.0.2.1
=== /etc/systemd/network/10-lan.network
[Match]
Name=ens18
MACAddress=52:54:00:12:34:56

[Network]
Address=192.0.2.5/24
Gateway=192.0.2.1
=== /etc/systemd/network/10-lan.link
[Match]
MACAddress=52:54:00:12:34:56
[Link]
Name=lan0
=== /etc/NetworkManager/NetworkManager.conf
[main]
plugins=ifupdown,keyfile
=== /etc/NetworkManager/system-connections/wired.nmconnection
[connection]
id=wired
type=ethernet
interface-name=ens18
[ethernet]
mac-address=52:54:00:12:34:56
[ipv4]
method=manual
address1=192.0.2.5/24,192.0.2.1
=== /etc/cloud/cloud.cfg
datasource_list: [ NoCloud, None ]
network: {config: disabled}
=== /etc/cloud/cloud.cfg.d/99-disable.cfg
network:
  config: disabled
=== /etc/cloud/ds-identify.cfg
policy: enabled
=== /usr/bin/cloud-init
=== /boot/grub/grub.cfg
menuentry 'Ubuntu' {
	linux /vmlinuz-5.15.0-1-generic root=UUID=11111111-1111-4111-8111-111111111111 ro
	initrd /initrd.img-5.15.0-1-generic
}
=== /boot/vmlinuz-5.15.0-1-generic
=== /etc/default/grub.d/50-cloud.cfg
GRUB_CMDLINE_LINUX="root=/dev/sda1 net.ifnames=0 biosdevname=0"
=== /usr/sbin/update-initramfs
F
  printf '=== /etc/os-release\nID=fedora\n=== /etc/fstab\nUUID=x / btrfs subvol=root 0 0\n' > "$corpus/guest-files/good-fedora"
fi
if wanted manifest || wanted qcow2-round; then
  haul=${HAUL:-$(cargo build -q --manifest-path "$corpus/../../Cargo.toml" --message-format json | jq -r 'select(.executable) | .executable')}
  disk
  for compress in none zlib zstd; do
    "$haul" -q convert --force --compress $compress disk d.qcow2; seed qcow2-round good-$compress d.qcow2
    [ $compress = zlib ] || continue
    cp disk disk2; printf 'a round later' | dd of=disk2 conv=notrunc status=none bs=1 seek=700000
    "$haul" -q convert --update disk2 d.qcow2; seed qcow2-round good-updated d.qcow2
  done
  "$haul" -q convert --force disk d.qcow2; plain manifest good-qcow2 d.qcow2.manifest
  "$haul" -q convert --force -O raw disk d.raw; plain manifest good-raw d.raw.manifest
  truncate -s 100M disk; head -c 200000 /dev/zero | tr '\0' x | dd of=disk conv=notrunc status=none seek=40000
  "$haul" -q convert --force --compress zstd disk d.qcow2; plain manifest good-zstd d.qcow2.manifest
fi

if wanted journal; then
  mkdir -p "$corpus/journal"
  python3 - "$corpus/journal" <<'PY'
import struct, sys
def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return crc ^ 0xffffffff
def u64(*n): return struct.pack(f'<{len(n)}Q', *n)
def digests(some): return u64(len(some)) + b''.join(b'\1' + bytes([d]) * 32 if d else b'\0' for d in some)
def batch(start, end, position, now, before=None, cells=()):
    return (b'\1' + u64(start, end, position) + digests(now) + (b'\0' if before is None else b'\1' + digests(before))
            + u64(len(cells)) + b''.join(struct.pack('<II', *cell) for cell in cells))
def part(kind, number, start, end): return bytes([kind]) + u64(number, start, end, 0xc4c64) + b'"d41d8cd98f00b204"'
job = b'\0{"source":"disk","size":8388608}'
M = 1 << 20
file = [job, batch(0, 2*M, M, [1, 0, 2], cells=[(0, 65536), (2, 100 | 1 << 31)]), b'\2' + u64(M), batch(2*M, 4*M, 2*M, [3], [4]),
        b'\5' + u64(2*M, M), batch(2*M, 4*M, 2*M, [5]), b'\2' + u64(2*M), b'\6' + u64(3*M, 0, 0)]
upload = [job, b'\3upload-id', batch(0, 2*M, M, [1]), part(4, 2, M, 2*M), part(4, 3, 2*M, 3*M), b'\5' + u64(M, 2*M),
          part(4, 3, 2*M, 3*M), part(7, 1, 0, M), b'\6' + u64(3*M, 1, 77)]
def write(name, records, torn=0):
    data = b'haul-journal 1\n' + b''.join(struct.pack('<II', len(r), crc32c(r)) + r for r in records)
    open(f'{sys.argv[1]}/{name}', 'wb').write(data[:len(data) - torn])
write('good-file', file); write('good-upload', upload); write('broken-torn', file, 5)
PY
fi

if wanted nbd-client || wanted nbd-server; then
  mkdir -p "$corpus/nbd-client" "$corpus/nbd-server"
  python3 - "$corpus" <<'PY'
import struct, sys
be = lambda form, *n: struct.pack('>' + form, *n)
text = lambda b: be('I', len(b)) + b
def reply(option, kind, data=b''): return be('QII', 0x3e889045565a9, option, kind) + text(data)
def chunk(cookie, flags, kind, data): return be('IHHQ', 0x668e33ef, flags, kind, cookie) + text(data)
size = 65536
greeting = be('QQH', 0x4e42444d41474943, 0x49484156454f5054, 3)
structured = reply(8, 1)
contexts = reply(10, 4, be('I', 7) + b'base:allocation') + reply(10, 1)
def go(flags=3, blocks=(512, 4096, 1 << 20)):
    return reply(7, 3, be('HQH', 0, size, flags)) + reply(7, 3, be('HIII', 3, *blocks)) + reply(7, 1)
ready = greeting + structured + contexts + go()
data = chunk(1, 0, 2, be('QI', 4096, 4096)) + chunk(1, 1, 1, be('Q', 0) + b'\xda' * 4096)
status = chunk(2, 1, 5, be('I', 7) + be('IIII', 4096, 0, 61440, 3))
def client(name, script): open(f'{sys.argv[1]}/nbd-client/{name}', 'wb').write(script)
client('good-structured', ready + data + status)
client('broken-error', ready + chunk(1, 1, 0x8001, be('IH', 5, 3) + b'bad'))
client('broken-offset', ready + chunk(1, 1, 0x8002, be('IHQ', 5, 3, 512) + b'bad'))
# A server without structured replies, then without GO.
no = 1 << 31 | 1
client('good-simple', greeting + reply(8, no, b'no') + go() + be('IIQ', 0x67446698, 0, 1) + b'\xda' * 8192)
client('broken-old', greeting + reply(8, no) + reply(7, no) + be('QH', size, 3) + be('IIQ', 0x67446698, 5, 1))
client('refused-tls', greeting + reply(8, 1 << 31 | 5, b'TLS first'))
ask = lambda option, data=b'': be('QI', 0x49484156454f5054, option) + text(data)
def request(command, offset, length, flags=0): return be('IHHQQI', 0x25609513, flags, command, 5, offset, length)
context = be('I', 0) + be('I', 1) + text(b'base:allocation')
talk = (be('I', 3) + ask(3) + ask(99, bytes(100)) + ask(8) + ask(9, context) + ask(10, context) + ask(6, bytes(6))
        + ask(7, be('IHH', 0, 1, 3)))
def server(name, script): open(f'{sys.argv[1]}/nbd-server/{name}', 'wb').write(script)
server('good-structured', talk + request(0, 512, 4096) + request(7, 0, size) + request(7, 0, size, 8) + request(2, 0, 0))
server('good-odd', talk + request(0, 1 << 63, 1 << 31) + request(1, 0, 100) + bytes(100) + request(4, 0, 512) + request(99, 0, 1))
server('good-old', be('I', 1) + ask(1, b'') + request(0, size - 1, 2) + request(0, 8192, 4096) + request(2, 0, 0))
PY
fi
du -ch --apparent-size "$corpus"/* | sort -h
