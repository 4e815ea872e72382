#!/usr/bin/env bash
# Builds the binary that ships: static, for any x86-64 Linux from 3.10 on. Prints its path.
# musl where the target can be had; else glibc linked statically.
set -euo pipefail
cd "$(dirname "$0")/.."
target=x86_64-unknown-linux-musl
if command -v rustup >/dev/null && rustup target add "$target" >/dev/null 2>&1; then
  if ! command -v musl-gcc >/dev/null; then
    sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get install -y -q musl-tools >&2
  fi
  cargo build --release --locked --target "$target" >&2
else
  target=x86_64-unknown-linux-gnu
  RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target "$target" >&2
fi
echo "${CARGO_TARGET_DIR:-target}/$target/release/haul"
