#!/usr/bin/env bash
# package.sh SUITE NAME FOLDER: downloads a package of a Debian suite, from the mirror that tree.sh takes, and prints its path.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
. "$here/deps.sh"
suite=$1 name=$2 folder=$(readlink -f "$3")
[ "$(. /etc/os-release && echo "$ID")" = debian ] && mirror=${HAUL_MIRROR:-$(apt_mirror)} || mirror=${HAUL_MIRROR:-http://deb.debian.org/debian}
install_guest_packages
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists,cache}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/sources.list"
apt=(apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$work/lists"
  -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root -o APT::Architecture=amd64 -o Acquire::Languages=none)
"${apt[@]}" update >&2
cd "$folder"
"${apt[@]}" download "$name" >&2
ls "$folder/${name}"_*.deb
