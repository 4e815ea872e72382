#!/usr/bin/env bash
# Runs the long tests and the benchmark, and records figure, command and commit in docs/evidence.md: a section for each file
# of tests. Each test is recorded as it ends, and one that has passed is not run again while nothing has changed but documents
# and other files of tests: a run that was cut short goes on where it stood, on another machine too.
#   scripts/evidence.sh [SECTION…]      those only: the name of a file of tests, bench, bench-fix
set -euo pipefail
cd "$(dirname "$0")/.."
out=docs/evidence.md
# A test may lie in a module of a file of tests, tests/NAME/….rs.
long=$(grep -rl '#\[ignore' src tests | sed -E 's#^src/.*#lib#; s#^tests/([^/.]+).*#\1#' | sort -u)
mapfile -t sections < <(printf '%s\n' "$long" bench bench-fix)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

section() { awk -v heading="## $1" '/^## / { on = $0 == heading } on' "$out"; }

# The commit of what a section depends on.
commit_of() {
  local files commit
  mapfile -t files < <(
    git ls-files | grep -vE '^docs/|\.md$|^scripts/evidence\.sh$|^tests/[a-z_0-9]+\.rs$'
    git ls-files "tests/$1.rs"
  )
  commit=$(git log -1 --format=%h -- "${files[@]}")
  git diff --quiet HEAD -- "${files[@]}" || commit+=-dirty
  echo "$commit"
}

command_of() {
  case $1 in
    bench) echo scripts/bench.sh ;;
    bench-fix) echo scripts/bench.sh fix ;;
    lib) echo "cargo test --features fault-points --lib -- --ignored --nocapture --test-threads 1" ;;
    *) echo "cargo test --features fault-points --test $1 -- --ignored --nocapture --test-threads 1" ;;
  esac
}

record() { # SECTION RESULT
  {
    # shellcheck disable=SC2016
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
      [[ $name = bench* ]] || { printf '| what | result |\n| --- | --- |\n'; cat "$work/rows"; echo; }
      printf '```\n'; cat "$work/figures"; printf '```\n'
    done
  } > "$work/evidence"
  cp "$work/evidence" "$out"
}

benchmark() { # SECTION
  ! grep -q ': passed$' "$work/known" || return 0
  local run result=passed
  read -ra run < <(command_of "$1")
  # What it says besides its table is for the terminal only.
  "${run[@]}" | tee "$work/figures" || { result=FAILED failed=1; }
  record "$1" "$result"
}

tests() { # SECTION
  local run names test row passed
  read -ra run < <(command_of "$1")
  # shellcheck disable=SC2016
  sed -n '/^```$/,/^```$/ { /^```$/!p }' "$work/known" > "$work/figures"
  grep -xE '\| .* \| ok \|' "$work/known" > "$work/rows" || true
  "${run[@]}" --list > "$work/list"
  mapfile -t names < <(sed -n 's/: test$//p' "$work/list")
  for test in "${names[@]}"; do
    row="| ${test//_/ } |"
    ! grep -qxF "$row ok |" "$work/rows" || continue
    if "${run[@]}" --exact "$test" 2>&1 | tee "$work/log"; then row+=' ok |'; else row+=' FAILED |' failed=1; fi
    echo "$row" >> "$work/rows"
    grep -oE '(HAUL_SEED=|figure: ).*' "$work/log" | sed 's/^figure: //' >> "$work/figures" || true
    passed=$(grep -c 'ok |$' "$work/rows" || true)
    case $passed in
      "${#names[@]}") record "$1" passed ;;
      *) record "$1" "$passed of ${#names[@]} passed" ;;
    esac
  done
}

failed=0
for name in "${@:-"${sections[@]}"}"; do
  commit=$(commit_of "$name")
  : > "$work/known"
  if [[ $commit != *-dirty ]] && section "$name" | grep -q " at commit $commit on "; then
    section "$name" > "$work/known"
  fi
  case $name in
    bench*) benchmark "$name" ;;
    *) tests "$name" ;;
  esac
done
exit "$failed"
