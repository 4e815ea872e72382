#!/usr/bin/env bash
# Runs the long tests and the benchmark, and records figure, command and commit in docs/evidence.md.
set -euo pipefail
cd "$(dirname "$0")/.."
out=docs/evidence.md
log=$(mktemp)
trap 'rm -f "$log"' EXIT
commit=$(git rev-parse --short HEAD)
command="cargo test --features fault-points --no-fail-fast -- --ignored --nocapture --test-threads 1"
failed=0
$command 2>&1 | tee "$log" || failed=1
{
  printf '# Evidence\n\nWritten by `scripts/test.sh --long` at commit %s on %s: %s cpus, Linux %s.\n\n' \
    "$commit" "$(date -u +%F)" "$(nproc)" "$(uname -r)"
  printf '## Long tests\n\n`%s`\n\n| what | result |\n| --- | --- |\n' "$command"
  # With --nocapture a result may follow on a later line than its name.
  awk '/^test [a-z_0-9:]+ \.\.\. / { name = $2 }
       /(^| )(ok|FAILED)$/ && name != "" { result = $NF; gsub("_", " ", name); print "| " name " | " result " |"; name = "" }' "$log"
  printf '\nFigures, as the tests print them:\n\n```\n'
  grep -oE '(HAUL_SEED=|figure: ).*' "$log" | sed 's/^figure: //' || true
  printf '```\n'
} > "$out"
scripts/bench.sh | tee "$log" || failed=1
printf '\n## Fuzzing\n\nParser by parser in [fuzzing.md](fuzzing.md).\n' >> "$out"
{ printf '\n## Benchmark\n\n`scripts/bench.sh`\n\n```\n'; cat "$log"; printf '```\n'; } >> "$out"
exit "$failed"
