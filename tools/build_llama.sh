#!/usr/bin/env bash
# Builds the pinned, unmodified llama.cpp (tools/fetch.py llama.cpp) into build/llama.cpp/build.
# About six minutes on two cores the first time; nothing to do afterwards.
#
# With --cuda: with the CUDA backend into build/llama.cpp/build-cuda, for the GPU architectures in
# CUDA_ARCHITECTURES (90-real: Hopper), programs for bench/cuda_llama.py and tests/cuda_e2e.py only.
# Six minutes on 16 cores.
set -euo pipefail
cd "$(dirname "$0")/.."

source_dir=build/llama.cpp/source
build_dir=build/llama.cpp/build
log=build/llama.cpp/build.log
stamp=$build_dir/.zipcache-complete
jobs=${JOBS:-$(nproc)}

options=(
  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON
  -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
)
targets=(llama-perplexity llama-completion llama-server llama-bench llama-common)
program=llama-server
if [[ ${1:-} == --cuda ]]; then
  build_dir=build/llama.cpp/build-cuda
  log=build/llama.cpp/build-cuda.log
  stamp=$build_dir/.zipcache-complete
  options+=(
    -DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90-real}"
    -DGGML_NATIVE=OFF -DLLAMA_BUILD_APP=OFF
    # The driver's library need not be where the programs are built.
    -DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined
  )
  targets=(llama-perplexity llama-completion llama-server llama-bench llama-batched-bench)
  program=llama-batched-bench
fi

if [[ ! -f $source_dir/CMakeLists.txt ]]; then
  echo "llama.cpp: no source in $source_dir; run: tools/fetch.py llama.cpp" >&2
  exit 1
fi

# The stamp names what was built; ninja alone would relink the server each time. The pins are part
# of it, and the place, because CMake's build trees cannot be moved.
wanted="$PWD ${options[*]} ${targets[*]} $(cat build/.stamps/llama.cpp 2>/dev/null || true)"
if [[ -f $stamp && $(<"$stamp") == "$wanted" && -x $build_dir/bin/$program ]]; then
  echo "llama.cpp: built"
  exit 0
fi

fail() {
  echo "llama.cpp: $1; the end of $log:" >&2
  tail -n 30 "$log" >&2
  exit 1
}

# A tree that was configured with these options is left as it is.
if [[ ! -f $build_dir/build.ninja ]]; then
  echo "llama.cpp: configuring (log: $log)"
  cmake -S "$source_dir" -B "$build_dir" -G Ninja "${options[@]}" >"$log" 2>&1 || fail "configuring failed"
fi

echo "llama.cpp: building, some minutes (log: $log)"
# Every 20th line of ninja's is enough to see that it moves.
cmake --build "$build_dir" -j "$jobs" --target "${targets[@]}" 2>&1 | tee -a "$log" |
  awk '/^\[[0-9]+\/[0-9]+\]/ && ++n % 20 == 0 { print "llama.cpp: " $1; fflush() }' ||
  fail "the build failed"

printf '%s\n' "$wanted" >"$stamp"
echo "llama.cpp: built"
