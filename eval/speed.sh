#!/usr/bin/env bash
# Usage: eval/speed.sh [op|prefill|length|kernels|smollm2|llama3|policy]...     (default: all, in turn)
#
# Speed beside llama.cpp's own cache types, appended to eval/results/*.jsonl. Keep the machine
# otherwise idle; each part takes one to four minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

bench="build/release/bin/zipcache bench"
results=eval/results
threads=$(seq -s, 1 "$(nproc)")

op() {  # attention of one query
  $bench op --shapes 32/8x128,9/3x64,8/4x256 --n-kv 1024,4096,16384 -t "$threads" --rounds 9 \
    --json $results/op.jsonl
  $bench op --shapes 32/8x128,9/3x64 --n-kv 16384 --rounds 9 --isa avx2 --json $results/op.jsonl
}
prefill() {  # 512 queries; llama.cpp's quantized caches need seconds for each
  $bench op --shapes 9/3x64 --n-kv 4096,16384 --n-query 512 -t "$threads" --rounds 3 \
    --json $results/op.jsonl
  $bench op --shapes 32/8x128 --n-kv 4096,16384 --n-query 512 -t "$threads" --rounds 1 \
    --json $results/op.jsonl
}
length() {  # is time linear in length, is scratch constant
  $bench op --shapes 32/8x128,9/3x64 --n-kv 1024,2048,4096,8192,16384,32768,65536 --rounds 5 \
    --peers f16,q4_0 --json $results/by_length.jsonl
}
kernels() {
  $bench kernels --rows 1,4,64 --rounds 5 --json $results/kernels.jsonl
}
smollm2() {
  local model="--shape smollm2-135m -m build/models/random-smollm2-135m.gguf -t $threads"
  $bench model $model -d 256,1024 -p 128 -n 16 --rounds 5 --json $results/speed.jsonl
  $bench model $model -d 4096,8192 -p 64 -n 8 --rounds 3 --json $results/speed.jsonl
}
llama3() {
  $bench model --shape llama3-8b-4l -m build/models/random-llama3-8b-4l.gguf \
    -d 256,8192 -t "$threads" -p 64 -n 8 --rounds 3 --peers f16 --json $results/speed.jsonl
}
policy() {  # the share of saliency and sealing
  $bench model --shape smollm2-135m -m build/models/random-smollm2-135m.gguf -t "$threads" \
    -d 4096,8192 -p 512 -n 1 --rounds 5 --peers none --json $results/policy_share.jsonl
  $bench model --shape llama3-8b-4l -m build/models/random-llama3-8b-4l.gguf -t "$threads" \
    -d 4096 -p 512 -n 1 --rounds 3 --peers none --json $results/policy_share.jsonl
}

for part in "${@:-op prefill length kernels smollm2 llama3 policy}"; do
  for name in $part; do
    "$name"
  done
done
