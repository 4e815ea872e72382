#!/usr/bin/env bash
# Times haul against its peers on the same disk, in turn, in one run, and prints medians and ratios. Needs root.
#   scripts/bench.sh [images [RUNS [DISK…]]]  qemu-img and nbdcopy (default 3 stale live; 20 GiB of room in $HAUL_BENCH_DIR
#                                             or /var/tmp). DISK stale has 38 % deleted data in what it allocates, live none
#   scripts/bench.sh fix [RUNS [initramfs=…]] fix-ups of a Debian server's copy, and its own build of an initramfs
# haul is the shipped binary with everything on: digests, journal, manifest. The file timed is checked afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
suite=${1:-images}
case $suite in images | fix) ;; *) echo "usage: $0 [images [RUNS [DISK…]] | fix [RUNS [initramfs=…]]]" >&2; exit 2 ;; esac
shift || true
runs=${1:-3}
shift || true
disks=("$@")
[ ${#disks[@]} != 0 ] || disks=(stale live)
dir=${HAUL_BENCH_DIR:-/var/tmp/haul-bench}
mkdir -p "$dir"
haul=${HAUL:-$(scripts/build.sh)}
[ -x /usr/bin/time ] || apt-get install -y -q time >&2
command -v nbdcopy > /dev/null || apt-get install -y -q libnbd-bin >&2

# An 8 GiB server disk: GPT, ext4, about 3 GiB of files, then 2 GiB written and deleted without trim.
make_disk() { # OUT STALE_MIB
  local out=$1 stale=$2 mount loop
  mount=$(mktemp -d)
  rm -f "$out.new"; truncate -s 8G "$out.new"
  printf 'label: gpt\nstart=2048,size=2048,type=21686148-6449-6E6F-744E-656564454649\nstart=4096,size=16771072,type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n' | sfdisk -q "$out.new"
  loop=$(losetup -f --show -o $((4096 * 512)) --sizelimit $((16771072 * 512)) "$out.new")
  trap 'umount "$mount" 2>/dev/null || true; losetup -d "$loop" 2>/dev/null || true; rmdir "$mount" 2>/dev/null || true' RETURN
  mkfs.ext4 -q -L root "$loop"
  mount "$loop" "$mount"
  mkdir "$mount/usr"
  (cd /usr && tar cf - . 2>/dev/null) | head -c 2350M | tar xf - -C "$mount/usr" 2>/dev/null || true
  for i in 1 2 3 4 5 6 7; do head -c 80M /dev/urandom > "$mount/db$i"; done
  sync -f "$mount"
  if [ "$stale" != 0 ]; then
    mkdir "$mount/junk"
    for i in $(seq 1 8); do head -c 100M /dev/urandom > "$mount/junk/r$i"; done
    (cd /usr && tar cf - lib share 2>/dev/null) | head -c $((stale - 800))M > "$mount/junk/t" || true
    sync -f "$mount"
    rm -rf "$mount/junk"
  fi
  sync -f "$mount"
  umount "$mount"; losetup -d "$loop"; rmdir "$mount"
  trap - RETURN
  mv "$out.new" "$out"
}

median() { sort -n | awk '{v[NR]=$1} END {print v[int((NR+1)/2)]}'; }
once() { # LOG COMMAND…: appends "wall resident_kib seconds_with_sync"
  local log=$1 begin; shift
  begin=$EPOCHREALTIME
  /usr/bin/time -o "$dir/time" -f '%M' "$@" > /dev/null 2> "$dir/err" || { cat "$dir/err" >&2; exit 1; }
  local end=$EPOCHREALTIME
  sync -f "$dir"
  echo "$begin $end $EPOCHREALTIME $(tail -1 "$dir/time")" | awk '{printf "%.3f %d %.3f\n", $2-$1, $4, $3-$1}' >> "$log"
}
field() { cut -d' ' -f"$2" "$dir/$1.log" | median; }

# A row of the table: haul's image against qemu-img's of the same format and codec.
row() { # NAME EXTENSION "QEMU-IMG OPTIONS" HAUL OPTIONS…
  local name=$1 ext=$2 peer=$3; shift 3
  rm -f "$dir"/*.log
  for _ in $(seq "$runs"); do
    rm -f "$dir/q.$ext" "$dir/h.$ext"
    # shellcheck disable=SC2086 -- the options are words
    once "$dir/q.log" qemu-img convert -m 8 -W $peer "$dir/$disk.raw" "$dir/q.$ext"
    once "$dir/h.log" "$haul" -q convert --force "$@" "$dir/$disk.raw" "$dir/h.$ext"
  done
  case $ext in
    qcow2) qemu-img check -q "$dir/h.$ext" ;;
    vmdk) 7zz t "$dir/h.$ext" > /dev/null ;;
    vhd) vhdiinfo "$dir/h.$ext" > /dev/null ;;
  esac
  "$haul" -q verify "$dir/h.$ext.manifest" "$dir/h.$ext" > /dev/null
  awk -v c="$name" -v q="$(field q 1)" -v qs="$(field q 3)" -v h="$(field h 1)" -v hs="$(field h 3)" \
    -v qm="$(du -m "$dir/q.$ext" | cut -f1)" -v hm="$(du -m "$dir/h.$ext" | cut -f1)" \
    -v r="$(cut -d' ' -f2 "$dir/h.log" | sort -n | tail -1)" \
    'BEGIN {printf "%-8s %8.2f %8.2f %6.2fx %8.2f %8.2f %6.2fx %9d %9d %5.0f%% %5d MiB\n", c, q, h, q/h, qs, hs, qs/hs, qm, hm, 100*hm/qm, r/1024}'
  rm -f "$dir/q.$ext" "$dir/h.$ext" "$dir/h.$ext.manifest"
}

# The guest's own build, in its own root, for the kernel it has.
own_build() { # DISK COMMAND…
  local disk=$1; shift
  cp --sparse=always "$disk" "$dir/own.raw"
  # shellcheck disable=SC2016 -- for the inner shell
  unshare --mount --fork --pid --mount-proc bash -ec '
    root=$(mktemp -d) dir=$1 start=$2; shift 2
    mount -o "loop,offset=$((start * 512))" "$dir/own.raw" "$root"
    mount --rbind /dev "$root/dev"; mount -t proc proc "$root/proc"; mount -t sysfs -o ro sysfs "$root/sys"
    begin=$EPOCHREALTIME
    chroot "$root" "$@" > /dev/null 2> "$dir/err"
    echo "$begin $EPOCHREALTIME" | awk "{print \$2 - \$1}" >> "$dir/q.log"
    umount -R "$root"; rmdir "$root"
  ' - "$dir" "$(sfdisk -J "$disk" | jq '.partitiontable.partitions[0].start')" "$@" || { cat "$dir/err" >&2; exit 1; }
}

bench_fix() {
  local name disk kernel own
  [ $# != 0 ] || set -- initramfs=list initramfs=dep initramfs=dracut
  for name; do
    disk=$(scripts/guests/disk.sh "$name")
    kernel=$(jq -r '.kernels[0]' "$disk.json")
    case $name in
      *dracut) own=(dracut -f --no-hostonly /var/tmp/own "$kernel") ;;
      # The fix-ups make it `most`.
      *dep) own=(sh -c "sed -i s/^MODULES=dep/MODULES=most/ /etc/initramfs-tools/initramfs.conf; mkinitramfs -o /var/tmp/own $kernel") ;;
      *) own=(mkinitramfs -o /var/tmp/own "$kernel") ;;
    esac
    rm -rf "$dir"/*.log "$dir"/h*.qcow2*
    "$haul" -q convert --compress none "$disk" "$dir/h.qcow2" > /dev/null
    for _ in $(seq "$runs"); do
      own_build "$disk" "${own[@]}"
      for options in "" --no-guest-programs; do
        cp "$dir/h.qcow2" "$dir/h1.qcow2"
        cp "$dir/h.qcow2.manifest" "$dir/h1.qcow2.manifest"
        # shellcheck disable=SC2086 -- an option or none
        once "$dir/h$options.log" "$haul" -q fix $options "$dir/h1.qcow2"
        rm -r "$dir"/h1.qcow2*
      done
    done
    awk -v n="$name" -v q="$(field q 1)" -v h="$(field h 1)" -v a="$(field h--no-guest-programs 1)" 'BEGIN {
      printf "%s: its own build %.2f s; haul fix %.2f s, %.2f times as long; --no-guest-programs %.2f s\n", n, q, h, h/q, a }'
  done
  rm -rf "$dir"/*.log "$dir"/h.qcow2* "$dir/own.raw"
}

echo "machine: $(nproc) cpus, $(awk -F: '/model name/ {print $2; exit}' /proc/cpuinfo | xargs), Linux $(uname -r), $(qemu-img --version | head -1)"
if [ "$suite" = fix ]; then
  bench_fix "${@}"
  exit
fi
for disk in "${disks[@]}"; do
  if [ ! -f "$dir/$disk.raw" ]; then make_disk "$dir/$disk.raw" "$([ "$disk" = live ] && echo 0 || echo 2050)"; fi
  cat "$dir/$disk.raw" > /dev/null
  echo "disk $disk: $(du -m "$dir/$disk.raw" | cut -f1) MiB allocated, $("$haul" inspect "$dir/$disk.raw" | awk '/a copy holds/ {print $4, $5}') in use"
  printf '%-8s %8s %8s %7s %8s %8s %7s %9s %9s %6s %9s\n' copy qemu_s haul_s faster +sync_s +sync_s faster qemu_MiB haul_MiB size resident
  row none qcow2 "-O qcow2" --compress none
  row zstd qcow2 "-O qcow2 -c -o compression_type=zstd" --compress zstd
  row zlib qcow2 "-O qcow2 -c" --compress zlib
  row stream vmdk "-O vmdk -o subformat=streamOptimized" -O vmdk -o subformat=streamOptimized
  row vhd vhd "-O vpc -o subformat=dynamic,force_size=on" -O vhd -o subformat=dynamic
  for cache in warm cold; do
    rm -f "$dir"/*.log
    for _ in $(seq "$runs"); do
      for peer in q h; do
        [ $cache = warm ] || echo 3 > /proc/sys/vm/drop_caches
        case $peer in
          q) once "$dir/q.log" nbdcopy "$dir/$disk.raw" null: ;;
          h) once "$dir/h.log" "$haul" -q convert -O raw "$dir/$disk.raw" null: ;;
        esac
      done
    done
    awk -v c="$cache" -v q="$(field q 1)" -v h="$(field h 1)" \
      'BEGIN {printf "null:, page cache %s: nbdcopy %.2f s, haul %.2f s, %.2f times as long\n", c, q, h, h/q}'
  done
  rm -f "$dir"/*.log
  for _ in 1 2 3; do once "$dir/h.log" "$haul" -q convert --dry-run -O raw "$dir/$disk.raw" null:; done
  echo "used map: $(field h 1) s with the start and end of the process that reads it"
done
rm -f "$dir"/*.log "$dir/time" "$dir/err"
