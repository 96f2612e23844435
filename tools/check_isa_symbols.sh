#!/usr/bin/env bash
# Usage: tools/check_isa_symbols.sh [PRESET]     (default: release)
#
# The kernels' AVX2, AVX-VNNI and AVX-512 translation units may define no weak or unique symbol: the linker
# keeps one copy of such a symbol for the whole program, and if it keeps the one compiled for
# AVX-512, a machine without it dies in an innocent std:: function.
set -euo pipefail
cd "$(dirname "$0")/.."

preset=${1:-release}
if [[ ! -d build/$preset ]]; then
  echo "isa symbols: no build in build/$preset" >&2
  exit 1
fi

mapfile -t objects < <(find "build/$preset" -regextype posix-extended -type f \
  -regex '.*/kernels/(.*[/_])?avx(2|512|vnni)[^/]*(/.*)?\.o' ! -name '*_test.cc.o' | sort)
if ((${#objects[@]} == 0)); then
  echo "isa symbols: no object files of per-ISA translation units in build/$preset" >&2
  exit 1
fi

n_bad=0
for object in "${objects[@]}"; do
  bad=$(nm --defined-only --demangle "$object" | grep -E '^[0-9a-f]* [WVwvu] ' || true)
  if [[ -n $bad ]]; then
    echo "isa symbols: $object defines weak or unique symbols:" >&2
    echo "$bad" >&2
    n_bad=$((n_bad + 1))
  fi
done
if ((n_bad > 0)); then
  exit 1
fi
echo "isa symbols: ${#objects[@]} object files, none weak or unique"
