#!/usr/bin/env bash
# The quick tier: everything a change must pass. Installs what it needs; needs Rust and, on Debian/Ubuntu, root.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/check.sh
scripts/pydeps.sh >/dev/null
cargo test
