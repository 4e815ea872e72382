#!/usr/bin/env bash
# Runs the long tests and the benchmark, and records figure, command and commit in docs/evidence.md, section by section: one
# for each file of tests. A section that has passed is not run again while nothing but documents has changed since its commit,
# so a run that was cut short goes on where it stood, on another machine too.
#   scripts/evidence.sh [SECTION…]      those only: the name of a file of tests, bench, bench-fix
set -euo pipefail
cd "$(dirname "$0")/.."
out=docs/evidence.md
code=(. ':!docs' ':!*.md')
commit=$(git log -1 --format=%h -- "${code[@]}")
git diff --quiet HEAD -- "${code[@]}" || commit+=-dirty
# A test may lie in a module of a file of tests, tests/NAME/….rs.
long=$(grep -rl '#\[ignore' src tests | sed -E 's#^src/.*#lib#; s#^tests/([^/.]+).*#\1#' | sort -u)
mapfile -t sections < <(printf '%s\n' "$long" bench bench-fix)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

section() { awk -v heading="## $1" '/^## / { on = $0 == heading } on' "$out"; }

command_of() {
  case $1 in
    bench) echo scripts/bench.sh ;;
    bench-fix) echo scripts/bench.sh fix ;;
    lib) echo "cargo test --features fault-points --lib -- --ignored --nocapture --test-threads 1" ;;
    *) echo "cargo test --features fault-points --test $1 -- --ignored --nocapture --test-threads 1" ;;
  esac
}

# What a run printed, as a table of its tests and their figures.
tests_of() {
  printf '| what | result |\n| --- | --- |\n'
  # With --nocapture a result may follow on a later line than its name.
  awk '/^test [a-z_0-9:]+ \.\.\. / { name = $2 }
    /(^| )(ok|FAILED)$/ && name != "" { result = $NF; gsub("_", " ", name); print "| " name " | " result " |"; name = "" }' "$1"
  printf '\n```\n'
  grep -oE '(HAUL_SEED=|figure: ).*' "$1" | sed 's/^figure: //' || true
  printf '```\n'
}

record() { # SECTION RESULT
  {
    printf '# Evidence\n\nWritten by `scripts/test.sh --long`: the long tests with the figures they print, and the benchmark. '
    printf 'Fuzzing has [its own page](fuzzing.md).\n'
    for name in "${sections[@]}"; do
      if [ "$name" != "$1" ]; then
        old=$(section "$name")
        [ -z "$old" ] || printf '\n%s\n' "$old"
        continue
      fi
      # shellcheck disable=SC2016
      printf '\n## %s\n\n`%s` at commit %s on %s (%s cpus, Linux %s): %s\n\n' \
        "$name" "$(command_of "$name")" "$commit" "$(date -u +%F)" "$(nproc)" "$(uname -r)" "$2"
      if [[ $name = bench* ]]; then printf '```\n'; cat "$work/log"; printf '```\n'; else tests_of "$work/log"; fi
    done
  } > "$work/evidence"
  cp "$work/evidence" "$out"
}

failed=0
for name in "${@:-"${sections[@]}"}"; do
  [[ $commit = *-dirty ]] || ! section "$name" | grep "at commit $commit .*: passed$" > "$work/passed" || continue
  result=passed
  # shellcheck disable=SC2046
  case $name in
    bench*) $(command_of "$name") ;; # what it says besides its table is for the terminal only
    *) $(command_of "$name") 2>&1 ;;
  esac | tee "$work/log" || { result=FAILED failed=1; }
  record "$name" "$result"
done
exit "$failed"
