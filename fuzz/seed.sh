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
# A header and a few samples of each kind.
mkdir -p corpus/wav
printf 'RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data\x08\0\0\0\0\0\xff\x7f\0\x80\x01\0' \
    > corpus/wav/mono16
printf 'RIFF\x34\0\0\0WAVEfmt \x10\0\0\0\x03\0\x02\0\x44\xac\0\0\x20\x62\x05\0\x08\0\x20\0data\x10\0\0\0\0\0\x80\x3f\0\0\x80\xbf\0\0\0\x3f\0\0\0\0' \
    > corpus/wav/stereo32f
for folder in corpus/*; do
    echo "$folder: $(find "$folder" -type f | wc -l) inputs"
done
