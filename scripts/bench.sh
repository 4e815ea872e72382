#!/usr/bin/env bash
# Times haul against qemu-img on the same disk, in turn, in one run, and prints medians and ratios.
# Usage: scripts/bench.sh [RUNS [DISK…]]     (default 3 stale live; needs root, qemu-img, and 20 GiB of room in
# $HAUL_BENCH_DIR or /var/tmp). DISK stale has 38 % deleted data in what it allocates, live has none.
# haul is the shipped binary with everything on: digests, journal, manifest. The file timed is checked afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-3}
shift || true
disks=("$@")
[ ${#disks[@]} != 0 ] || disks=(stale live)
dir=${HAUL_BENCH_DIR:-/var/tmp/haul-bench}
mkdir -p "$dir"
haul=${HAUL:-$(scripts/build.sh)}
[ -x /usr/bin/time ] || apt-get install -y -q time >&2

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
once() { # LOG COMMAND…: appends "wall cpu resident_kib"
  local log=$1; shift
  /usr/bin/time -o "$dir/time" -f '%e %U %S %M' "$@" >/dev/null 2>"$dir/err" || { cat "$dir/err" >&2; exit 1; }
  awk '{print $1, $2+$3, $4}' "$dir/time" >> "$log"
}
echo "machine: $(nproc) cpus, $(awk -F: '/model name/ {print $2; exit}' /proc/cpuinfo | xargs), Linux $(uname -r), $(qemu-img --version | head -1)"
for disk in "${disks[@]}"; do
  if [ ! -f "$dir/$disk.raw" ]; then make_disk "$dir/$disk.raw" "$([ "$disk" = live ] && echo 0 || echo 2050)"; fi
  cat "$dir/$disk.raw" > /dev/null
  echo "disk $disk: $(du -m "$dir/$disk.raw" | cut -f1) MiB allocated, $("$haul" inspect "$dir/$disk.raw" | awk '/a copy holds/ {print $4, $5}') in use"
  printf '%-8s %9s %9s %7s %9s %9s %7s %10s\n' codec qemu_s haul_s faster qemu_MiB haul_MiB size resident
  for codec in none zstd zlib; do
    rm -f "$dir"/*.log
    case $codec in
      none) q=() ;;
      zstd) q=(-c -o compression_type=zstd) ;;
      zlib) q=(-c) ;;
    esac
    for _ in $(seq "$runs"); do
      rm -f "$dir/q.qcow2" "$dir/h.qcow2"
      once "$dir/q.log" qemu-img convert -m 8 -W -O qcow2 "${q[@]}" "$dir/$disk.raw" "$dir/q.qcow2"
      once "$dir/h.log" "$haul" -q convert --force --compress "$codec" "$dir/$disk.raw" "$dir/h.qcow2"
    done
    qemu-img check -q "$dir/h.qcow2"
    "$haul" -q verify "$dir/h.qcow2.manifest" "$dir/h.qcow2" > /dev/null
    q=$(cut -d' ' -f1 "$dir/q.log" | median) h=$(cut -d' ' -f1 "$dir/h.log" | median)
    qs=$(du -m "$dir/q.qcow2" | cut -f1) hs=$(du -m "$dir/h.qcow2" | cut -f1)
    awk -v c="$codec" -v q="$q" -v h="$h" -v qs="$qs" -v hs="$hs" -v r="$(cut -d' ' -f3 "$dir/h.log" | sort -n | tail -1)" \
      'BEGIN {printf "%-8s %9.2f %9.2f %6.2fx %9d %9d %6.0f%% %6d MiB\n", c, q, h, q/h, qs, hs, 100*hs/qs, r/1024}'
  done
done
rm -f "$dir"/{q,h}.qcow2* "$dir"/*.log "$dir/time" "$dir/err"
