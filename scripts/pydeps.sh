#!/usr/bin/env bash
# Installs the foreign clients and servers that tests judge haul by, pinned, into a virtual environment of its own
# (${HAUL_CACHE:-target}/pydeps), and prints its folder. Does nothing when it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
# moto 5.1.22: later ones (to 5.2.5) answer ListParts with a root element S3 does not have.
env_dir=${HAUL_CACHE:-$PWD/target}/pydeps
want='boto3==1.43.11
botocore==1.43.11
moto[server]==5.1.22
cos-python-sdk-v5==1.9.38
tencentcloud-sdk-python-cvm==3.1.178'
if [ "$(cat "$env_dir/installed" 2>/dev/null)" != "$want" ]; then
    rm -rf "$env_dir"
    python3 -m venv "$env_dir"
    printf '%s\n' "$want" >"$env_dir/want"
    "$env_dir/bin/pip" install --quiet --disable-pip-version-check -r "$env_dir/want" >&2
    mv "$env_dir/want" "$env_dir/installed"
fi
printf '%s\n' "$env_dir"
