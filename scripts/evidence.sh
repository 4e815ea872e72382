#!/usr/bin/env bash
# Runs the long tests and the benchmark, and records figure, command and commit in docs/evidence.md.
set -euo pipefail
cd "$(dirname "$0")/.."
out=docs/evidence.md
log=$(mktemp)
trap 'rm -f "$log"' EXIT
commit=$(git rev-parse --short HEAD)
{
  printf '# Evidence\n\nWritten by `scripts/test.sh --long` at commit %s on %s: %s cpus, Linux %s.\n\n' \
    "$commit" "$(date -u +%F)" "$(nproc)" "$(uname -r)"
  printf '| what | result | command |\n| --- | --- | --- |\n'
} > "$out"
failed=0
for suite in boot guests lab_cvm_boot store; do
  command="cargo test --features fault-points --test $suite -- --ignored --test-threads 1"
  $command 2>&1 | tee "$log" || failed=1
  sed -nE 's/^test (.*) \.\.\. (ok|FAILED).*/\1 \2/p' "$log" | while read -r name result; do
    printf '| %s | %s | `%s` |\n' "${name//_/ }" "$result" "$command" >> "$out"
  done
done
scripts/bench.sh | tee "$log" || failed=1
{ printf '\n## Benchmark\n\n`scripts/bench.sh`\n\n```\n'; cat "$log"; printf '```\n'; } >> "$out"
exit "$failed"
