#!/usr/bin/env bash
# Fuzzes the parsers of tests/fuzz_bodies one after another, each for so many seconds of the processor, and adds what was
# done to docs/fuzzing.md. The build is optimised, checks its arithmetic, and counts the edges that an input takes, so that
# inputs that lead somewhere new are changed further. They are kept in $HAUL_FUZZ_DIR (default: target/fuzz), beside
# the findings, and taken up by the next run.
#   scripts/fuzz.sh SECONDS [PARSER…]      HAUL_SEED=N for a certain seed, HAUL_FUZZ_TABLE=FILE for another table
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?usage: scripts/fuzz.sh SECONDS [PARSER…]}
shift
export HAUL_FUZZ_SECONDS=$seconds HAUL_FUZZ_BODY=$* HAUL_SEED=${HAUL_SEED:-$(date +%s)}
export HAUL_FUZZ_DIR=${HAUL_FUZZ_DIR:-${CARGO_TARGET_DIR:-$PWD/target}/fuzz}
table=${HAUL_FUZZ_TABLE:-docs/fuzzing.md}
mkdir -p "$HAUL_FUZZ_DIR"
# Only the fuzzer knows what to do with the counters: the program itself cannot be run in this build.
export RUSTFLAGS="-C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=3 \
-C llvm-args=-sanitizer-coverage-inline-8bit-counters -C link-arg=-Wl,--unresolved-symbols=ignore-all"
target=$(rustc -vV | sed -n 's/^host: //p')
run=(cargo test -q --profile fuzz --no-default-features --target "$target" --test fuzz)
"${run[@]}" --no-run
log=$(mktemp)
trap 'rm -f "$log"' EXIT
commit=$(git rev-parse --short HEAD)
failed=0
"${run[@]}" -- --ignored --exact fuzz_for_a_while --nocapture 2>&1 | tee "$log" || failed=1
sed -nE 's/^.*figure: ([a-z0-9-]+): ([0-9]+) executions in ([0-9]+) s, (.*), ([0-9]+) findings.*/\1|\3|\2|\4|\5/p' "$log" |
  while IFS='|' read -r body seconds executions what findings; do
    printf '| %s | %s | %s | %s | %s | %s | %s |\n' "$(date -u +%F)" "$commit" "$body" "$seconds" "$executions" "$what" "$findings"
  done >> "$table"
exit "$failed"
