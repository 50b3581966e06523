#!/usr/bin/env bash
# Measures models on the GPU of this machine, which needs a Vulkan, Metal or DX12 driver and nothing else, and writes a line
# of JSON for each measurement: `cargo xtask bench --only gpu` makes bench/RESULTS.md's table of the files in bench/gpu/.
#   bench/gpu.sh OUT.jsonl MODEL...        MODEL: a GGUF or .pglm file (prompt of 512, decode, decode behind 4096 tokens)
#                                          or a checkpoint folder with a vision encoder (a screenshot of 1080x2400)
# Each measurement is followed by a round that times every kind of op by itself (--per-op), which the first rounds are not.
# POCKETGLM is the program; `cargo run` builds it where it is not given.
set -euo pipefail
out=$1
shift
if [ -z "${POCKETGLM:-}" ]; then
    cargo build --release -p pocketglm-cli
    POCKETGLM="$(dirname "$0")/../target/release/pocketglm"
fi
: > "$out"
for model in "$@"; do
    measure() {
        printf '{"model":"%s","bytes":%s,"result":%s}\n' "$(basename "$model")" "$(du -bsL "$model" | cut -f1)" \
            "$("$POCKETGLM" bench --model "$model" --backend wgpu --kv f16 --per-op --json "$@")" >> "$out"
    }
    if [ -d "$model" ]; then
        measure --step 1080x2400 --max-new-tokens 16 --rounds 3
    else
        measure --prompt-tokens 512 --max-new-tokens 128 --rounds 5
        measure --depth 4096 --max-new-tokens 64 --rounds 3
    fi
done
