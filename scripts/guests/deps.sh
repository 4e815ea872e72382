#!/usr/bin/env bash
# Installs what building and booting guests needs (Debian, Ubuntu). Quick when all of it is there. Run it or source it.
# On other systems it lists what is missing and fails.

guest_packages=(
  arch-test dosfstools e2fsprogs fdisk iproute2 jq kmod mmdebstrap mtools openssh-client openssl ovmf procps
  qemu-efi-aarch64 qemu-system-arm qemu-system-x86 qemu-user-static qemu-utils util-linux xorriso xz-utils zstd
)

# What of "$@" is not installed. Its keyring lets a machine that is not Debian fetch Debian's suites.
missing_packages() {
  local name status
  for name in "$@"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) || status=none
    [ "$status" = installed ] || echo "$name"
  done
}

# The host's own package mirror: its first source, whatever machine that is.
apt_mirror() {
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | sed -n 1p
}

# apt-get that waits for another one to finish, with the options of use_backports.
apt_options=(-o DPkg::Lock::Timeout=600 -o APT::Get::List-Cleanup=0)
apt_get() { ${SUDO:+sudo} env DEBIAN_FRONTEND=noninteractive apt-get "${apt_options[@]}" -qy "$@"; }

# A qemu-utils from backports can only be joined by a qemu-system-x86 from there: for this run alone, the same mirror's
# backports are a source too. /etc/apt stays as it is.
use_backports() {
  local release=$1 suite sources=$2
  case $(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null) in *~bpo*) ;; *) return 0 ;; esac
  suite=$release-backports
  if ! apt-get indextargets --format '$(RELEASE)' 'Created-By: Packages' | grep -qx "$suite"; then
    { cat /etc/apt/sources.list 2>/dev/null || true; echo "deb $(apt_mirror) $suite main"; } >"$sources"
    chmod 644 "$sources"
    apt_options+=(-o "Dir::Etc::SourceList=$sources")
  fi
  apt_options+=(-t "$suite")
}

install_packages() (
  missing=$(missing_packages "$@")
  [ -n "$missing" ] || exit 0
  [ "$(id -u)" = 0 ] || SUDO=1
  if [ -n "${SUDO:-}" ] && ! command -v sudo >/dev/null; then
    echo "not root, no sudo, and these packages are missing:" $missing >&2
    exit 1
  fi
  release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  sources=$(mktemp --suffix=.list)
  trap 'rm -f "$sources"' EXIT
  apt_get update >&2
  # Only QEMU may come from backports; the rest keeps the machine's own release.
  rest=$(grep -vx 'qemu-.*' <<<"$missing" || true)
  [ -z "$rest" ] || apt_get install --no-install-recommends $rest >&2
  qemu=$(grep -x 'qemu-.*' <<<"$missing" || true)
  if [ -n "$qemu" ]; then
    use_backports "$release" "$sources"
    [ ! -s "$sources" ] || apt_get update >&2
    apt_get install --no-install-recommends $qemu >&2
  fi
)

# Lets this machine run programs for ARM's 64-bit machines, by QEMU, in whatever folder tree they lie (flag F).
runs_arm64() {
  arch-test arm64 >/dev/null 2>&1 && return 0
  local at=/proc/sys/fs/binfmt_misc
  [ -e $at/register ] || mount -t binfmt_misc binfmt_misc $at
  cat /usr/lib/binfmt.d/qemu-aarch64.conf >$at/register 2>/dev/null || true
  arch-test arm64 >/dev/null && return 0
  echo "this machine cannot run programs for arm64: qemu-user-static is not registered in $at" >&2
  return 1
}

install_guest_packages() {
  if ! command -v dpkg-query >/dev/null; then
    local name absent=
    for name in sfdisk jq mmdebstrap qemu-system-x86_64 qemu-img xorriso zstd mkfs.ext4; do
      command -v "$name" >/dev/null || absent+=" $name"
    done
    [ -z "$absent" ] || { echo "not a Debian system; install by hand:$absent" >&2; return 1; }
    return 0
  fi
  local extra=()
  (. /etc/os-release && [ "$ID" = debian ]) || extra=(debian-archive-keyring)
  install_packages "${guest_packages[@]}" "${extra[@]}"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  install_guest_packages
fi
