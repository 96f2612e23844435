#!/usr/bin/env bash
# Reads a real long text (the manual of llama.cpp's server) into a small model, asks about it, and
# prints what the compressed cache cost beside FP16. Further arguments go to `zipcache run`; try
# --plain, --mode paper or --policy uniform --key-bits 2.
set -euo pipefail
cd "$(dirname "$0")/.."

zipcache=build/release/bin/zipcache
model=build/models/SmolLM2-135M-Instruct.Q4_1.gguf
text=build/llama.cpp/source/tools/server/README.md

for file in "$zipcache" "$model" "$text"; do
  if [[ ! -f $file ]]; then
    echo "demo: $file is missing; run: make run" >&2
    exit 1
  fi
done

# 6483 tokens end with the table of sampling options, where the answer is (a row says "default: 64").
exec "$zipcache" run --model "$model" --file "$text" --max-prompt-tokens 6483 \
  --prompt "What is the default value of --repeat-last-n? Answer with a number." -n 128 "$@"
