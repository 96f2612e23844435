#!/usr/bin/env bash
# Usage: tools/check.sh fast|full|format
#   fast    format, words, development build (warnings are errors), fast tests: under 90 s when built
#   full    fast, then sanitizers, headers alone, clang-tidy on changed files, fuzzers, ISA symbols
#   format  rewrites the sources in place
set -euo pipefail
cd "$(dirname "$0")/.."

jobs=${JOBS:-$(nproc)}

step() { echo "== $*"; }

# Prints the first of the given commands that exists.
need() {
  local tool
  for tool in "$@"; do
    if command -v "$tool"; then
      return
    fi
  done
  echo "check: $1 is missing; run: apt-get install $1" >&2
  return 1
}

sources() {
  # `ls-files` still lists what was deleted but not yet committed.
  git ls-files -co --exclude-standard -- src tests bench fuzz |
    grep -E '\.(h|cc|cuh|cu)$' | while read -r file; do
      [[ ! -f $file ]] || echo "$file"
    done
}

format() {
  local tool
  tool=$(need clang-format-14 clang-format)
  sources | xargs -r "$tool" "$@"
}

# build_and_test PRESET
build_and_test() {
  step "$1: build and fast tests"
  cmake --preset "$1" >"build/check-$1.log" 2>&1 || { cat "build/check-$1.log" >&2; return 1; }
  nice cmake --build --preset "$1" -j "$jobs"
  ctest --preset "$1" -L fast -j2 --quiet --output-on-failure --output-log "build/check-$1-tests.log" ||
    { cat "build/check-$1-tests.log" >&2; return 1; }
  grep 'tests passed' "build/check-$1-tests.log"
}

headers() {
  if grep -q '^build all_verify_interface_header_sets:' build/dev/build.ninja; then
    step "headers compile alone"
    nice cmake --build --preset dev -j "$jobs" --target all_verify_interface_header_sets
  fi
}

# What changed since the last commit that passed here, or by the last commit.
tidy() {
  local tool base files passed=build/check-tidy-passed
  tool=$(need clang-tidy-14 clang-tidy)
  base=$(cat "$passed" 2>/dev/null || true)
  git merge-base --is-ancestor "${base:-none}" HEAD 2>/dev/null || base=HEAD~1
  # The first commit has no parent: compare with git's empty tree.
  git rev-parse -q --verify "$base" >/dev/null || base=$(git hash-object -t tree /dev/null)
  mapfile -t files < <({
    git diff --name-only --diff-filter=d "$base" -- src tests bench
    git ls-files -o --exclude-standard -- src tests bench
  } | sort -u | grep '\.cc$' | while read -r file; do
    # Rooms that are not configured here have no compile command.
    ! grep -qF "/$file\"" build/dev/compile_commands.json || echo "$file"
  done)
  step "clang-tidy on ${#files[@]} changed files"
  if ((${#files[@]} > 0)); then
    printf '%s\0' "${files[@]}" | nice xargs -0 -n 1 -P "$jobs" "$tool" -p build/dev --quiet
  fi
  git rev-parse HEAD >"$passed"
}

fuzz() {
  local seconds=30 fuzzer name
  [[ -f fuzz/CMakeLists.txt ]] || return 0
  need clang++-14 >/dev/null
  step "fuzzers, $seconds s each"
  cmake --preset fuzz >build/check-fuzz.log 2>&1 || { cat build/check-fuzz.log >&2; return 1; }
  nice cmake --build --preset fuzz -j "$jobs"
  for fuzzer in build/fuzz/bin/fuzz/*; do
    name=$(basename "$fuzzer")
    mkdir -p "build/fuzz/found/$name"
    # The first folder receives new inputs; the committed corpus is only read.
    "$fuzzer" -max_total_time="$seconds" -verbosity=0 -artifact_prefix="build/fuzz/$name-" \
      "build/fuzz/found/$name" "fuzz/corpus/$name"
    echo "$name: no crash"
  done
}

fast() {
  step "format"
  format --dry-run -Werror
  step "words"
  tools/check_words.sh
  build_and_test dev
}

full() {
  # Missing tools should be reported now, not after ten minutes.
  need clang-tidy-14 clang-tidy >/dev/null
  fast
  headers
  tools/check_isa_symbols.sh dev
  build_and_test asan
  build_and_test tsan
  tidy
  fuzz
}

mkdir -p build
case ${1:-} in
  fast) fast ;;
  full) full ;;
  format) format -i ;;
  *)
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
    ;;
esac
echo "check: passed"
