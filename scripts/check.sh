#!/usr/bin/env bash
# What can be judged without running anything: formatting, lints, both feature sets.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --check
cargo clippy --all-targets --features fault-points -- -D warnings
cargo clippy --all-targets --no-default-features -- -D warnings
