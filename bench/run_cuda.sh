#!/usr/bin/env bash
# Usage: bench/run_cuda.sh BIN_DIR OUT_DIR [--quick]
#
# Everything that needs a GPU, in one go: correctness first, then our kernels and the peers in the same
# run with clocks sampled beside them, then the sanitizers and a profile. BIN_DIR holds cuda_test and
# cuda_bench (they need nothing but the driver). Tools that are missing are left out.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "$1" && pwd)
out=$2
quick=${3:-}
mkdir -p "$out"

have() { command -v "$1" >/dev/null; }
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit \
  --format=csv,noheader | tee "$out/device.csv"
date -u +%F >"$out/date"

timeout 200 "$bin/cuda_test" >"$out/test.log" 2>&1
test_status=$?
grep -E '^\[  (FAILED|PASSED)|C\+\+ exception' "$out/test.log" | sort | uniq -c | head -40
grep -A8 'Failure' "$out/test.log" | head -60

nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv,noheader -l 1 \
  >"$out/clocks.txt" &
sampler=$!
timeout 200 "$bin/cuda_bench" $quick --json "$out/cuda_decode.jsonl" 2>&1 | tee "$out/bench.log"
if have python3 && python3 -c 'import torch' 2>/dev/null; then
  timeout 120 python3 "$root/bench/cuda_peers.py" $quick --json "$out/cuda_peers.jsonl" 2>&1 |
    tee "$out/peers.log"
fi
kill "$sampler"
sort "$out/clocks.txt" | uniq -c | sort -rn | head -6

if have compute-sanitizer; then
  for tool in memcheck racecheck synccheck; do
    timeout 100 compute-sanitizer --tool "$tool" "$bin/cuda_test" \
      --gtest_filter='DecodeTest.SegmentsWith*:DecodeTest.EmptyClasses:DecodeTest.RowsInClusters:PackTest.Classes*:TailTest.*:PrefillTest.Segments*:PrefillTest.Masks' \
      >"$out/$tool.txt" 2>&1
    echo "$tool: $(tail -1 "$out/$tool.txt")"
  done
fi
if have ncu; then  # the first decode launch of the bench: batch 8 x 32k, mixed
  timeout 90 ncu --clock-control none --set full -k regex:decode_kernel --launch-skip 0 \
    --launch-count 1 "$bin/cuda_bench" --quick >"$out/ncu.txt" 2>&1
  grep -E 'Duration|DRAM Throughput|Issue Slots Busy|Registers Per|Achieved Occ|No Eligible' \
    "$out/ncu.txt" | head -12
fi
exit "$test_status"
