#!/usr/bin/env bash
# Runs the long tests and the benchmark, and records figure, command and commit in docs/evidence.md. What has passed at this
# very commit is kept in target/evidence and not run again: a run that was cut short goes on where it stood.
set -euo pipefail
cd "$(dirname "$0")/.."
out=docs/evidence.md
commit=$(git describe --always --dirty --exclude '*')
kept=${CARGO_TARGET_DIR:-target}/evidence/$commit
mkdir -p "$kept"
# Changes that have no commit are never the same twice.
[[ $commit != *-dirty ]] || rm -f "$kept"/*
command="cargo test --features fault-points TARGET -- --ignored --nocapture --test-threads 1"
failed=0
run() { # NAME COMMAND…: its output is kept under this name once it ended well
  [ ! -e "$kept/$1" ] || return 0
  if "${@:2}" 2>&1 | tee "$kept/.part"; then mv "$kept/.part" "$kept/$1"; else mv "$kept/.part" "$kept/$1.failed"; failed=1; fi
}
rm -f "$kept"/*.failed
names=(lib)
# shellcheck disable=SC2086
run lib ${command/TARGET/--lib}
for path in tests/*.rs; do
  name=$(basename "$path" .rs)
  names+=("$name")
  # shellcheck disable=SC2086
  run "$name" ${command/TARGET/--test $name}
done
run bench scripts/bench.sh
run bench-fix scripts/bench.sh fix
logs() { for name in "${names[@]}"; do cat "$kept/$name" "$kept/$name.failed" 2>/dev/null || true; done; }
{
  printf '# Evidence\n\nWritten by `scripts/test.sh --long` at commit %s on %s: %s cpus, Linux %s.\n\n' \
    "$commit" "$(date -u +%F)" "$(nproc)" "$(uname -r)"
  printf '## Long tests\n\n`%s`\n\n| what | result |\n| --- | --- |\n' "$command"
  # With --nocapture a result may follow on a later line than its name.
  logs | awk '/^test [a-z_0-9:]+ \.\.\. / { name = $2 }
    /(^| )(ok|FAILED)$/ && name != "" { result = $NF; gsub("_", " ", name); print "| " name " | " result " |"; name = "" }'
  printf '\nFigures, as the tests print them:\n\n```\n'
  logs | grep -oE '(HAUL_SEED=|figure: ).*' | sed 's/^figure: //' || true
  printf '```\n\n## Fuzzing\n\nParser by parser in [fuzzing.md](fuzzing.md).\n'
  printf '\n## Benchmark\n\n`scripts/bench.sh; scripts/bench.sh fix`\n\n```\n'
  cat "$kept"/bench{,-fix}{,.failed} 2>/dev/null || true
  printf '```\n'
} > "$out"
exit "$failed"
