#!/usr/bin/env bash
# The quick tier: everything a change must pass. Installs what it needs; needs Rust, root, Debian or Ubuntu, and 15 GB.
#   scripts/test.sh          formatting, lints, unit, property, interop and damage tests, two boots (about 20 minutes)
#   scripts/test.sh --long   the same, then every count an issue asks for, recorded in docs/evidence.md
set -euo pipefail
cd "$(dirname "$0")/.."
long=${1:-}
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "install"
# Kept steps of the compiler were 13 of the 18 GB that builds had left.
export CARGO_INCREMENTAL=${CARGO_INCREMENTAL:-0}
command -v cargo >/dev/null || { echo "Rust is needed: https://rustup.rs" >&2; exit 1; }
scripts/deps.sh
HAUL_TEST_PYTHON=$(scripts/pydeps.sh)/bin/python
export HAUL_TEST_PYTHON

step "format and lints"
scripts/check.sh

step "tests"
# One build for all: the fault points are for the kill tests. Boots share two processors, so tests run two at a time.
cargo test --features fault-points -- --test-threads 2

if [ "$long" = --long ]; then
  # Every test that is marked to be ignored, one file of tests after the other: cargo test --test NAME -- --ignored.
  step "long tests"
  scripts/evidence.sh
fi
step "done"
