#!/usr/bin/env bash
# The main job from nothing, on a Debian or Ubuntu machine with Rust: installs what it needs, builds haul, makes a
# small real server disk, starts the embedded cloud, migrates the disk into it, and runs an instance of the image.
#   scripts/demo.sh [FOLDER]     (default: a new folder below /tmp; about 15 minutes on 2 cores)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d /tmp/haul-demo.XXXXXX)}
mkdir -p "$folder"
say() { printf '\n\033[1m%s\033[0m (%s s)\n' "$1" "$SECONDS"; }
[ -t 1 ] || say() { printf '\n%s (%s s)\n' "$1" "$SECONDS"; }

say "1. install what the demo needs"
scripts/deps.sh >/dev/null
say "2. build haul"
haul=$(scripts/build.sh)
"$haul" --version
say "3. make a server: Debian 12 that boots only on SATA, with a fixed network card and address"
disk=$(scripts/guests/disk.sh)
echo "disk $disk"
say "4. start the cloud"
"$haul" lab --dir "$folder/lab" --env-file "$folder/lab.env" > "$folder/lab.log" 2>&1 &
lab=$!
trap 'kill "$lab" 2>/dev/null; wait "$lab" 2>/dev/null || true' EXIT
until [ -s "$folder/lab.env" ]; do
  kill -0 "$lab" 2>/dev/null || { cat "$folder/lab.log" >&2; exit 1; }
  sleep 0.2
done
. "$folder/lab.env"
grep -v SECRET "$folder/lab.log" | head -1
say "5. check, and show what will change in the copy"
"$haul" check --fixable "$disk" || true
before=$(sha256sum < "$disk")
say "6. migrate"
"$haul" migrate --to image --bucket images-1250000000 --name demo-server --state-dir "$folder/state" --poll 2 \
  --run-in-zone ap-guangzhou-6 "$disk" | tee "$folder/migrate.txt"
say "7. what came of it"
[ "$before" = "$(sha256sum < "$disk")" ] && echo "the source disk is as it was: sha256 ${before%% *}"
instance=$(sed -n 's/^instance \(ins-[^ ]*\).*/\1/p' "$folder/migrate.txt")
console="$HAUL_CVM_ENDPOINT/lab/instances/$instance/console"
for _ in $(seq 150); do
  beacon=$(curl -fsS "$console" | tr -d '\r' | grep -ao 'HAUL-BEACON up.* END' | head -1) && break
  sleep 2
done
[ -n "$beacon" ] || { echo "the instance did not come up: $console" >&2; exit 1; }
echo "the instance says: $(grep -oE ' (root|addrs|livehost|failed)=[^ ]*' <<<"$beacon" | tr -d '\n')"
same=0
while IFS='=' read -r name value; do
  if grep -qF " $name=$value " <<<"$beacon"; then echo "  same $name"; same=$((same + 1)); else echo "  DIFFERENT $name" >&2; exit 1; fi
done < <(jq -r '.identity | to_entries[] | "\(.key)=\(.value)"' "$disk.json")
[ "$same" -ge 8 ]
echo "all of it is in $folder"
