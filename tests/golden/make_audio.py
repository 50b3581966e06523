#!/usr/bin/env python3
"""Makes the Wav2Vec2 checkpoints and golden vectors in `hear/`, and the audio adapter of `bf16`.

    python make_audio.py --reference DIR [--only NAME ...]

DIR holds `make_tiny_wav2vec2.py`, which builds tiny random Wav2Vec2 checkpoints with transformers, and
`reference_numpy_wav2vec2.py`, a second implementation in NumPy. For every checkpoint and clip, this file records what
transformers computes, and how far the two implementations are apart. Clips come from the function `clip`, in integers,
so that a test makes the same ones. `README.md` lists the versions.
"""
import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Glm4vForConditionalGeneration, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC, Wav2Vec2Model

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "hear")
SMALL = "--hidden 32 --layers 2 --heads 2 --intermediate 48 --conv-dim 16 --pos-kernel 16 --pos-groups 4 --samples 3000 2000"

# name -> (arguments of make_tiny_wav2vec2.py, clip lengths in samples)
VARIANTS = {
    "base": ("--variant base " + SMALL, [400, 401, 719, 720, 1000, 5617, 16000, 160000, 960000]),
    "large": ("--variant large " + SMALL, [400, 720, 5617, 16000, 160000, 960000]),
    "base-odd-kernel": ("--variant base --dtype bfloat16 " + SMALL + " --pos-kernel 15 --pos-groups 2 --seed 3",
                        [400, 16000, 160000]),
    "large-old-names": ("--variant large --names old --dtype bfloat16 --shards 3 " + SMALL + " --seed 4",
                        [400, 16000, 160000]),
    "base-real-kernel": ("--variant base --names new --dtype bfloat16 " + SMALL +
                         " --pos-kernel 128 --pos-groups 16 --heads 4 --seed 5", [400, 16000, 160000]),
    "large-one-layer": ("--variant large " + SMALL + " --layers 1 --hidden 24 --conv-dim 20 --seed 6", [400, 16000, 160000]),
    "bare": (None, [400, 16000]),  # the encoder of `base` without its prefix and head
}
MIN_GAP = 1e-3


def clip(n, seed):
    """int16 [n]: three triangle waves whose periods jump, under an envelope, and noise; integers only."""
    i = np.arange(n, dtype=np.int64)
    v = np.zeros(n, dtype=np.int64)
    for j in range(3):
        x = mix((i // 3200 * 3 + j + seed * 1000).astype(np.uint32))
        period = 20 + (x % np.uint32(200)).astype(np.int64)
        v += np.abs(i % period * 2 - period) * 6000 // period - 3000
    v = v * np.abs(i % 8000 - 4000) // 4000
    v += (mix((i + seed * 7).astype(np.uint32)) >> np.uint32(24)).astype(np.int64) * 4 - 512
    return v.astype(np.int16)


def mix(x):
    x = x * np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def values(n, seed):
    x = clip(n, seed).astype(np.float32) / np.float32(32768)
    return ((x - x.mean()) / np.sqrt(x.var() + np.float32(1e-7))).astype(np.float32)


def load(reference, name):
    sys.path.insert(0, reference)
    spec = importlib.util.spec_from_file_location(name, os.path.join(reference, name + ".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(frames):
    return list(range(frames)) if frames <= 20 else sorted({round(i * (frames - 1) / 11) for i in range(12)})


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, ensure_ascii=False, separators=(",", ":"), default=int)
        f.write("\n")


def distance(a, b):
    return float(np.linalg.norm((a - b).astype(np.float64)) / max(np.linalg.norm(b.astype(np.float64)), 1e-30))


def make(reference, name):
    args, lengths = VARIANTS[name]
    folder = os.path.join(OUT, name)
    shutil.rmtree(folder, ignore_errors=True)
    source = os.path.join(OUT, "base") if args is None else None
    if args is None:
        os.makedirs(folder)
        state = load_file(os.path.join(source, "model.safetensors"))
        p = "wav2vec2."
        save_file({k[len(p):]: v for k, v in state.items() if k.startswith(p)}, os.path.join(folder, "model.safetensors"))
        conf = json.load(open(os.path.join(source, "config.json")))
        write_json(os.path.join(folder, "config.json"), dict(conf, architectures=["Wav2Vec2Model"]))
        shutil.copy(os.path.join(source, "preprocessor_config.json"), folder)
        model = Wav2Vec2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    else:
        with tempfile.TemporaryDirectory() as work:
            tiny = os.path.join(work, "tiny")
            subprocess.run([sys.executable, os.path.join(reference, "make_tiny_wav2vec2.py"), "--out", tiny] + args.split(), check=True)
            shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("golden", "bare", "special_tokens_map.json"))
        model = Wav2Vec2ForCTC.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    other = load(reference, "reference_numpy_wav2vec2")
    config = json.load(open(os.path.join(folder, "config.json")))
    weights = other.load_model(folder)
    tensors, cases = {}, []
    for at, n in enumerate(lengths):
        # A clip on which a best token is nearly another one is exchanged: two exact implementations may differ there.
        for seed in range(at * 100, at * 100 + 100):
            x = values(n, seed)
            with torch.no_grad():
                out = model(torch.from_numpy(x[None]), output_hidden_states=True)
            if args is None:
                break
            top = out.logits[0].topk(2, -1).values
            gap = float((top[:, 0] - top[:, 1]).min())
            if gap >= (MIN_GAP if n < 300000 else MIN_GAP / 3):
                break
        else:
            raise SystemExit(f"{name}: no clip of {n} samples without a near tie")
        record = {}
        second = other.encode(weights, config, x, None, P="" if args is None else "wav2vec2.", rec=record)
        hidden = [h[0].numpy() for h in out.hidden_states]
        last = (out.last_hidden_state if args is None else model.wav2vec2(torch.from_numpy(x[None])).last_hidden_state)[0].detach().numpy()
        case = {"samples": n, "seed": seed, "frames": hidden[0].shape[0], "rows": rows_of(hidden[0].shape[0])}
        apart = [distance(second, last)] + [distance(record[f"layer.{i}"], h) for i, h in enumerate(hidden[1:])]
        tensors[f"{n}.last_hidden_state"] = torch.from_numpy(last[case["rows"]].copy())
        for i, h in enumerate(hidden):
            tensors[f"{n}.hidden_states.{i}"] = torch.from_numpy(h[case["rows"]].copy())
        tensors[f"{n}.input_values"] = torch.from_numpy(x[:: max(1, n // 50)].copy())
        if args is not None:
            logits = out.logits[0].numpy()
            ours = second @ weights["lm_head.weight"].T + weights["lm_head.bias"]
            apart.append(distance(ours, logits))
            tensors[f"{n}.logits"] = torch.from_numpy(logits[case["rows"]].copy())
            ids = logits.argmax(-1)
            decoded = tokenizer.decode(ids, output_word_offsets=True, output_char_offsets=True)
            case.update(text=decoded.text, gap=gap, words=[[w["word"], w["start_offset"], w["end_offset"]] for w in decoded.word_offsets][:200])
            tensors[f"{n}.argmax_ids"] = torch.from_numpy(ids.astype(np.int64))
        case["implementations_apart"] = max(apart)
        cases.append(case)
        print(f"{name:18s} {n:7d} samples, seed {seed}, apart {max(apart):.1e}, {case.get('text', '')[:40]!r}")
    save_file(tensors, os.path.join(folder, "golden.safetensors"))
    write_json(os.path.join(folder, "golden.json"), {"cases": cases})


def make_adapter(reference):
    """`bf16` with ears: an adapter file, and what the reference decoder makes of one prompt of all modalities."""
    base, ear, folder = os.path.join(HERE, "bf16"), os.path.join(OUT, "large"), os.path.join(OUT, "adapter")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    tok = AutoTokenizer.from_pretrained(base)
    glm = Glm4vForConditionalGeneration.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    hear = Wav2Vec2ForCTC.from_pretrained(ear, dtype=torch.float32, attn_implementation="eager").eval().wav2vec2
    d, h = glm.config.text_config.hidden_size, hear.config.hidden_size
    g = torch.Generator().manual_seed(11)
    rnd = lambda *shape, std: torch.randn(*shape, generator=g) * std
    fusion = {
        "model.audio_projection.weight": rnd(d, h, std=0.6 / h ** 0.5), "model.audio_projection.bias": rnd(d, std=0.1),
        "model.audio_tag": rnd(d, std=0.3),
        "model.image_projection.weight": rnd(d, d, std=1.0 / d ** 0.5), "model.image_projection.bias": rnd(d, std=0.1),
        "model.image_tag": rnd(d, std=0.3),
    }
    state = load_file(os.path.join(ear, "model.safetensors"))
    p = "wav2vec2."
    state = {"model.audio_tower." + k[len(p):]: v for k, v in state.items() if k.startswith(p)}
    conf = json.load(open(os.path.join(ear, "config.json")))
    ids = {name: tok.convert_tokens_to_ids(t) for name, t in
           [("audio_token_id", "<|observation|>"), ("audio_start_token_id", "<|begin_of_video|>"), ("audio_end_token_id", "<|end_of_video|>")]}
    meta = {"pocketglm.adapter": json.dumps(dict(ids, format=1, audio_config=conf, audio_do_normalize=True), sort_keys=True)}
    save_file({**state, **fusion}, os.path.join(folder, "adapter.safetensors"), metadata=meta)

    picture = load_file(os.path.join(HERE, "bf16", "golden", "image.safetensors"))
    grid = picture["image_grid_thw"]
    merger = picture["vision.merger"].reshape(-1, d)
    image = merger @ fusion["model.image_projection.weight"].T + fusion["model.image_projection.bias"] + fusion["model.image_tag"]
    clips = [(4000, 900), (1500, 901)]
    with torch.no_grad():
        sounds = [hear(torch.from_numpy(values(n, s)[None])).last_hidden_state[0] for n, s in clips]
    sounds = [x @ fusion["model.audio_projection.weight"].T + fusion["model.audio_projection.bias"] + fusion["model.audio_tag"] for x in sounds]
    audio_id, start, end = ids["audio_token_id"], ids["audio_start_token_id"], ids["audio_end_token_id"]
    mark = "<|begin_of_video|><|observation|><|end_of_video|>"
    content = [{"type": "text", "text": "tap "}, {"type": "text", "text": mark}, {"type": "image"}, {"type": "text", "text": " then "},
               {"type": "text", "text": mark}, {"type": "text", "text": "?"}]
    text = tok.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image|>", "<|image|>" * image.shape[0])
    for x in sounds:
        text = text.replace("<|observation|>", "\0" * x.shape[0], 1)
    text = text.replace("\0", "<|observation|>")
    token_ids = torch.tensor([tok.encode(text, add_special_tokens=False)])
    image_id = glm.config.image_token_id
    types = (token_ids == image_id).long()
    positions, _ = glm.model.get_rope_index(token_ids, types, grid, None)
    embeds = glm.model.language_model.embed_tokens(token_ids).clone()
    embeds[token_ids == image_id] = image
    embeds[token_ids == audio_id] = torch.cat(sounds)
    generated = []
    with torch.no_grad():
        for step in range(7):
            x = glm.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
            logits = glm.lm_head(x)
            if step == 0:
                whole = logits
            top = logits[0, -1].topk(2).values
            assert float(top[0] - top[1]) > 1e-3, "a near tie"
            best = int(logits[0, -1].argmax())
            generated.append(best)
            embeds = torch.cat([embeds, glm.model.language_model.embed_tokens(torch.tensor([[best]]))], 1)
            positions = torch.cat([positions, positions.max() + 1 + torch.zeros(3, 1, 1, dtype=positions.dtype)], 2)
    n = token_ids.shape[1]
    save_file({"input_ids": token_ids, "position_ids": positions[:, :, :n].contiguous(), "logits": whole.contiguous(),
               "audio_embeds": torch.cat(sounds).contiguous(), "image_embeds": image.contiguous(),
               "generated_ids": torch.tensor(generated)}, os.path.join(folder, "golden.safetensors"))
    write_json(os.path.join(folder, "golden.json"), {"clips": clips, "text": text})
    print(f"adapter: {n} tokens, {[x.shape[0] for x in sounds]} of audio, {image.shape[0]} of the picture")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--reference", required=True)
    ap.add_argument("--only", nargs="*", default=[])
    a = ap.parse_args()
    torch.set_num_threads(1)
    for name in list(VARIANTS) + ["adapter"]:
        if not a.only or name in a.only:
            make_adapter(a.reference) if name == "adapter" else make(a.reference, name)


if __name__ == "__main__":
    main()
