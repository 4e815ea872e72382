#!/usr/bin/env bash
# Builds the binary that ships: static, for any x86-64 Linux from 3.10 on. Prints its path.
# musl where the target can be had; else glibc linked statically.
#   scripts/build.sh aarch64     the one for ARM's 64-bit machines
set -euo pipefail
cd "$(dirname "$0")/.."
arch=${1:-$(uname -m)}
case $arch in
  x86_64) debian=amd64 ;;
  aarch64) debian=arm64 ;;
  *) echo "haul is built for x86_64 and aarch64, not for $arch" >&2; exit 2 ;;
esac
target=$arch-unknown-linux-musl
install() {
  local sudo=
  [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get install -y -q "$@" >&2
}
if command -v rustup >/dev/null && rustup target add "$target" >/dev/null 2>&1; then
  if [ "$arch" = "$(uname -m)" ]; then
    command -v musl-gcc >/dev/null || install musl-tools
  else
    # Its compiler is GNU's, for the libraries in C; its start-up code and C library are those that come with Rust.
    gcc=$arch-linux-gnu-gcc name=${target//-/_}
    command -v "$gcc" >/dev/null || install "gcc-${arch//_/-}-linux-gnu" "libc6-dev-$debian-cross"
    export "CC_$name=$gcc" "CARGO_TARGET_${name^^}_LINKER=$gcc"
  fi
  cargo build --release --locked --target "$target" >&2
else
  [ "$arch" = "$(uname -m)" ] || { echo "rustup cannot add $target, which is needed to build for another machine" >&2; exit 1; }
  target=$arch-unknown-linux-gnu
  RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target "$target" >&2
fi
echo "${CARGO_TARGET_DIR:-target}/$target/release/haul"
