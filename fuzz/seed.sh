#!/usr/bin/env bash
# Fills corpus/ with small valid inputs from the golden files; run it once before fuzzing.
set -euo pipefail
cd "$(dirname "$0")"
golden=../tests/golden

# take TARGET FILE...: copies files under names that do not collide.
take() {
    local target=$1 file
    shift
    mkdir -p "corpus/$target"
    for file in "$@"; do
        cp "$file" "corpus/$target/$(echo "${file#"$golden"/}" | tr / -)"
    done
}

# The header and a little of the data are enough to start from, and keep the inputs small.
mkdir -p corpus/safetensors
for name in bf16 f16 tied other-names; do
    head -c 16384 "$golden/$name/model.safetensors" > "corpus/safetensors/$name"
done
printf '\x3c\0\0\0\0\0\0\0{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      \0\0\x80\x3f\0\0\0\x40' \
    > corpus/safetensors/tiny
take shard_index "$golden"/*/model.safetensors.index.json
printf '{"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}' > corpus/shard_index/tiny
take gguf "$golden"/gguf/*.gguf
take config "$golden"/*/config*.json ../models/*/config.json
take preprocessor_config "$golden"/*/preprocessor_config.json "$golden"/*/video_preprocessor_config.json
take tokenizer "$golden"/bf16/tokenizer.json
take chat_template "$golden"/default/chat_template.jinja "$golden"/default/tokenizer_config.json \
    ../models/*/chat_template.jinja
take image $(find "$golden/decode" "$golden/odd-sizes" -type f -size -24k \
    \( -name '*.png' -o -name '*.jpg' -o -name '*.webp' \))
mkdir -p corpus/data_url
for file in $(find "$golden/decode" -type f -size -4k \( -name '*.png' -o -name '*.jpg' -o -name '*.webp' \)); do
    kind=${file##*.}
    [ "$kind" = jpg ] && kind=jpeg
    printf 'data:image/%s;base64,%s' "$kind" "$(base64 -w0 "$file")" > "corpus/data_url/$(basename "$file")"
done
for folder in corpus/*; do
    echo "$folder: $(find "$folder" -type f | wc -l) inputs"
done
