#!/usr/bin/env python3
"""Makes every checkpoint and golden vector in this folder.

    python make.py --reference DIR [--only NAME ...]

DIR holds the reference script `make_tiny.py`, which builds a tiny random Glm4vForConditionalGeneration and
records what transformers computes with it. This file says which variants exist, changes the few things that the
script has no option for (tied embeddings, float16, other tensor names), and keeps only the tensors that a test
reads. `README.md` lists the versions and the files.
"""
import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))

# A checkpoint whose text and vision parts are as small as the reference allows.
SMALL = ("--vocab 352 --vocab-padding 24 --hidden 32 --heads 2 --kv-heads 1 --intermediate 40 --layers 2 "
         "--vision-hidden 24 --vision-heads 2 --vision-depth 1 --merger-intermediate 24 --gen-tokens 12 "
         "--dtype bfloat16").split()
F32 = ["--dtype", "float32"]

# name -> (arguments of make_tiny.py, cases that are kept, changes)
VARIANTS = {
    "default": ([], ["text", "image", "two_images", "video"], {}),
    "real-head-dim": ("--hidden 256 --heads 2 --kv-heads 1 --vision-hidden 256 --vision-heads 2 --pos-grid 24 "
                      "--vocab 352 --intermediate 64 --merger-intermediate 64 --layers 1 --vision-depth 1 "
                      "--patch 7 --max-pixels 16000 --dtype bfloat16 --gen-tokens 12".split(), ["image"], {}),
    # shapes
    "kv-heads-1": (SMALL + "--heads 4 --kv-heads 1 --hidden 64 --layers 1".split(), ["image"], {}),
    "kv-heads-all": (SMALL + "--heads 2 --kv-heads 2 --layers 4 --vision-depth 3".split(), ["image"], {}),
    "kv-heads-8-2": (SMALL + "--heads 8 --kv-heads 2 --hidden 96".split(), ["image"], {}),
    "patch-8": (SMALL + "--patch 8 --merge 2 --pos-grid 9 --max-pixels 16384".split(), ["image", "video"], {}),
    "merge-3": (SMALL + "--patch 6 --merge 3 --vision-hidden 36 --vision-heads 3 --max-pixels 16384".split(),
                ["image", "two_images"], {}),
    "temporal-1": (SMALL + "--temporal-patch 1 --min-pixels 1568 --max-pixels 10000".split(), ["image", "video"], {}),
    # formats
    "bf16": (SMALL, ["image"], {}),
    "f16": (SMALL + F32, ["image"], {"f16": True}),
    "tied": (SMALL, ["image"], {"tied": True}),
    # A wrong epsilon changes nothing visible at 1e-5.
    "eps": (SMALL + "--eps 0.01".split(), ["image"], {}),
}
# The same numbers as `bf16` in other files.
COPIES = ("sharded-v4", "other-names")
# The case that keeps every intermediate tensor.
FULL = ("default", "image")
# These keep the logits of every position of the prompt; the others those of the generated tokens.
WITH_LOGITS = ("default", "real-head-dim", "kv-heads-8-2", "merge-3", "bf16")

KEEP = re.compile(r"^(input_ids|position_ids|rope_delta|(image|video)_grid_thw|mm_token_type_ids|vision\.merger|logits|"
                  r"generated_ids|generation_logits|text\.layer\.\d+)$")
PICTURES = re.compile(r"^(pixel_values(_videos)?|(image\.\d+|video)\.(raw|resized)_u8)$")
# The raw pictures come from the seed alone and are stored once, in `default`; a variant stores only the SHA-256 of
# its resized pictures and of its pixel values, which the preprocessing reproduces bit for bit.
RAW = re.compile(r"^(image\.\d+|video)\.raw_u8$")


def load_make_tiny(reference):
    spec = importlib.util.spec_from_file_location("make_tiny", os.path.join(reference, "make_tiny.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_make_tiny(reference, args, changes):
    """Runs the reference script with some of its functions replaced; a fresh module each time."""
    mt = load_make_tiny(reference)
    configs, init_weights, greedy = mt.configs, mt.init_weights, mt.greedy

    def greedy_without_image_token(model, ids, kw, n_gen):
        """A draw that generates `<|image|>` is refused: the reference cannot recompute it without a cache."""
        gen, rows, margin = greedy(model, ids, kw, n_gen)
        return gen, rows, -1.0 if model.config.image_token_id in gen else margin

    mt.greedy = greedy_without_image_token
    if changes.get("tied"):
        def tied_configs(*a):
            v4, v5, sections, eos = configs(*a)
            for c in (v4, v5):
                c["tie_word_embeddings"] = True
                c["text_config"]["tie_word_embeddings"] = True
            return v4, v5, sections, eos

        def save_without_head(model, a):
            assert model.lm_head.weight is model.model.language_model.embed_tokens.weight, "the head is not tied"
            sd = {k: v.detach().to(torch.bfloat16).contiguous().clone() for k, v in sorted(model.state_dict().items())
                  if k != "lm_head.weight"}
            save_file(sd, os.path.join(a.out, "model.safetensors"), metadata={"format": "pt"})
            return {k: list(v.shape) for k, v in sd.items()}

        mt.configs, mt.save_weights = tied_configs, save_without_head
    if changes.get("f16"):
        def f16_configs(*a):
            v4, v5, sections, eos = configs(*a)
            v4["text_config"]["torch_dtype"] = "float16"
            v5["dtype"] = v5["text_config"]["dtype"] = v5["vision_config"]["dtype"] = "float16"
            return v4, v5, sections, eos

        def init_f16(model, a, attempt=0):
            init_weights(model, a, attempt)
            with torch.no_grad():  # the files hold exactly what was run
                for p in model.parameters():
                    p.copy_(p.to(torch.float16).to(torch.float32))

        def save_f16(model, a):
            sd = {k: v.detach().to(torch.float16).contiguous().clone() for k, v in sorted(model.state_dict().items())}
            save_file(sd, os.path.join(a.out, "model.safetensors"), metadata={"format": "pt"})
            return {k: list(v.shape) for k, v in sd.items()}

        mt.configs, mt.init_weights, mt.save_weights = f16_configs, init_f16, save_f16
    argv, sys.argv = sys.argv, ["make_tiny.py"] + args
    try:
        mt.main()
    finally:
        sys.argv = argv


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def strip(folder, cases, changes):
    """Keeps the tensors that tests read; checks that the raw pictures are those of `default`."""
    name = os.path.basename(folder)
    expected = json.load(open(os.path.join(folder, "golden", "expected.json")))
    if name != "default":
        del expected["smart_resize_vectors"]
        for f in ("config.v4.json", "config.v5.json"):
            os.remove(os.path.join(folder, f))
    for key in changes:
        expected["args"][key] = True
    for case in [c for c in expected["cases"] if c not in cases]:
        del expected["cases"][case]
        os.remove(os.path.join(folder, "golden", case + ".safetensors"))
    for case, info in expected["cases"].items():
        path = os.path.join(folder, "golden", case + ".safetensors")
        tensors = load_file(path)
        keep = {k for k in tensors if KEEP.match(k) or (name, case) == FULL}
        if name not in WITH_LOGITS:
            keep.remove("logits")
        pictures = {k for k in tensors if PICTURES.match(k)}
        info["sha256"] = {k: sha256(tensors[k]) for k in sorted(pictures)}
        if name == "default" and case != "two_images":
            keep |= pictures
        elif name == "default":
            keep.add("image.1.raw_u8")  # image.0 is that of the case `image`
        else:
            base = json.load(open(os.path.join(HERE, "default", "golden", "expected.json")))["cases"][case]["sha256"]
            assert all(base[k] == info["sha256"][k] for k in pictures if RAW.match(k)), "other raw pictures"
            keep -= pictures
        tensors = {k: v for k, v in tensors.items() if k in keep}
        info["tensors"] = {k: v for k, v in info["tensors"].items() if k in tensors}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    write_json(os.path.join(folder, "golden", "expected.json"), expected)


def make_variant(reference, name):
    args, cases, changes = VARIANTS[name]
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    run_make_tiny(reference, ["--out", folder] + args, changes)
    strip(folder, cases, changes)


def make_copy(reference, name):
    """`bf16` again, in three files with the older config layout, or under the names that vLLM uses internally."""
    source, folder = os.path.join(HERE, "bf16"), os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    if name == "sharded-v4":
        run_make_tiny(reference, ["--out", folder] + SMALL + "--shards 3 --config-style v4".split(), {})
        shutil.rmtree(os.path.join(folder, "golden"))
        for f in ("config.v4.json", "config.v5.json"):
            os.remove(os.path.join(folder, f))
        sd = {}
        for f in sorted(os.listdir(folder)):
            if f.endswith(".safetensors"):
                sd.update(load_file(os.path.join(folder, f)))
    else:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("golden", "*.safetensors"))
        names = {"model.language_model.": "language_model.model.", "model.visual.": "visual.",
                 "lm_head.": "language_model.lm_head."}
        sd = load_file(os.path.join(source, "model.safetensors"))
        renamed = {new + k[len(old):]: v for k, v in sd.items() for old, new in names.items() if k.startswith(old)}
        assert len(renamed) == len(sd)
        save_file(renamed, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    base = load_file(os.path.join(source, "model.safetensors"))
    assert base.keys() == sd.keys() and all(torch.equal(base[k], sd[k]) for k in base), "not the numbers of bf16"
    write_json(os.path.join(folder, "golden.json"), {"same_numbers_as": "bf16"})


def noise(h, w, seed):
    """Deterministic bytes [h, w, 3]: a mix of the index, so that a test can write the same in three lines."""
    x = np.arange(h * w * 3, dtype=np.uint32)
    x = (x + np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)) * np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return (x >> np.uint32(24)).astype(np.uint8).reshape(h, w, 3)


def smooth(h, w, seed):
    """A picture that compresses: ramps, a wave and a few blocks, with one noisy corner."""
    yy, xx = np.mgrid[0:h, 0:w].astype(np.int64)
    img = np.stack([xx * 255 // max(1, w - 1), yy * 255 // max(1, h - 1), (xx * 7 + yy * 3 + seed * 40) // 4 % 256], -1)
    img[h // 3: h // 2, w // 4: w // 2] = [seed * 37 % 256, 250, 5]
    n = noise(h, w, seed)
    img[: h // 4 + 1, : w // 4 + 1] = n[: h // 4 + 1, : w // 4 + 1]
    return img.astype(np.uint8)


def make_odd_sizes(reference):
    """One prompt with pictures of odd sizes, as PNG files, through the `default` checkpoint."""
    mt = load_make_tiny(reference)
    folder, checkpoint = os.path.join(HERE, "odd-sizes"), os.path.join(HERE, "default")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    p = json.load(open(os.path.join(checkpoint, "preprocessor_config.json")))
    settings = argparse.Namespace(patch=p["patch_size"], merge=p["merge_size"], temporal_patch=p["temporal_patch_size"],
                                  min_pixels=p["size"]["shortest_edge"], max_pixels=p["size"]["longest_edge"])
    sizes = [(1, 1), (3, 200), (57, 31), (640, 97), (29, 28), (113, 450), (28, 2), (211, 199)]
    rows, grids, pictures = [], [], []
    for i, (h, w) in enumerate(sizes):
        name = f"{h}x{w}.png"
        Image.fromarray(smooth(h, w, i)).save(os.path.join(folder, name), optimize=True)
        raw = np.asarray(Image.open(os.path.join(folder, name)).convert("RGB"))
        values, grid, resized = mt.preprocess([raw], settings)
        pil = np.asarray(Image.fromarray(raw).resize((resized.shape[2], resized.shape[1]), Image.Resampling.BICUBIC))
        assert np.array_equal(pil, resized[0]), "make_tiny resizes otherwise than Pillow"
        rows.append(values)
        grids.append(grid)
        pictures.append({"file": name, "height": h, "width": w, "grid": list(grid), "resized": list(resized.shape[1:3]),
                         "raw_sha256": hashlib.sha256(raw.tobytes()).hexdigest(),
                         "resized_sha256": hashlib.sha256(resized[0].tobytes()).hexdigest(),
                         "pixel_values_sha256": hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()})
    tok = mt.Tokenizer.from_file(os.path.join(checkpoint, "tokenizer.json"))
    model = mt.Glm4vForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    image_id = tok.token_to_id("<|image|>")
    kw = {"pixel_values": torch.from_numpy(np.concatenate(rows)), "image_grid_thw": torch.tensor(grids)}
    for question in [f"tap [{i},{999 - 3 * i}]" for i in range(60)]:
        prompt = "[gMASK]<sop><|user|>\n"
        for g in grids:
            prompt += "<|begin_of_image|>" + "<|image|>" * (g[1] * g[2] // settings.merge ** 2) + "<|end_of_image|>"
        prompt += question + "<|assistant|>\n"
        ids = torch.tensor([tok.encode(prompt, add_special_tokens=False).ids])
        kw["mm_token_type_ids"] = (ids == image_id).to(torch.int32)
        gen, _, margin = mt.greedy(model, ids, kw, 12)
        if margin >= 0.05 and image_id not in gen:
            break
    else:
        raise SystemExit("no question gives clear-cut tokens")
    t, info = mt.run_case(model, ids, kw, 12)
    keep = ("input_ids", "position_ids", "rope_delta", "image_grid_thw", "vision.merger", "generated_ids", "generation_logits")
    out = {k: t[k].contiguous().clone() for k in keep}
    out["logits_last_32"] = t["logits"][0, -32:].contiguous().clone()
    save_file(out, os.path.join(folder, "golden.safetensors"))
    write_json(os.path.join(folder, "expected.json"),
               {"checkpoint": "default", "question": question, "pictures": pictures, **info})


def make_resize(reference):
    """`resize.json`: the size rule of transformers and the resized bytes of Pillow."""
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize
    mt = load_make_tiny(reference)
    settings = [(14, 2, 2, 12544, 9633792), (14, 2, 2, 12544, 5000000), (14, 2, 2, 12544, 11760000), (14, 2, 2, 3136, 200000),
                (8, 2, 2, 4096, 65536), (6, 3, 2, 12544, 300000), (16, 1, 1, 256, 1000000), (14, 2, 1, 6272, 60000), (14, 3, 4, 50000, 400000)]
    sizes = [(1, 1), (1, 2), (2, 1), (1, 200), (1, 201), (200, 1), (1, 28), (27, 28), (28, 28), (29, 28), (14, 300), (14, 14), (42, 42),
             (42, 70), (70, 42), (41, 43), (3, 200), (57, 31), (640, 97), (113, 450), (70, 40), (93, 150), (60, 90), (336, 336),
             (100, 100), (4000, 100), (100, 4000), (28, 5600), (28, 5601), (28, 5628), (28, 6000), (6000, 28), (27, 5400), (13, 2600),
             (13, 2601), (1920, 1080), (1080, 1920), (2400, 1080), (1080, 2400), (2340, 1080), (3200, 1440), (4000, 3000), (2532, 1170),
             (2796, 1290), (1600, 720), (8192, 8192), (98, 98), (126, 154), (210, 350), (1000, 1001), (2197, 2197), (77, 91)]
    rng = np.random.default_rng(7)
    sizes += [(int(h), int(w)) for h, w in np.stack([rng.integers(1, 700, 24), rng.integers(1, 700, 24)], 1)]
    groups, count, errors = [], 0, 0
    for patch, merge, tf, lo, hi in settings:
        vectors = []
        frames = [tf] * len(sizes) + [tf + i for i in range(1, 8)] + [tf - 1]
        for t, (h, w) in zip(frames, sizes + [(60, 90), (113, 450), (300, 200), (31, 33), (600, 400), (97, 640), (45, 45), (60, 90)]):
            results = []
            for f in (lambda: smart_resize(t, h, w, temporal_factor=tf, factor=patch * merge, min_pixels=lo, max_pixels=hi),
                      lambda: mt.smart_resize(t, h, w, patch * merge, tf, lo, hi)):
                try:
                    results.append(list(f()))
                except ValueError as e:
                    results.append("aspect" if "aspect" in str(e) else "frames")
            assert results[0] == results[1], (t, h, w, results)
            vectors.append([t, h, w] + (results[0] if isinstance(results[0], list) else [results[0]]))
            errors += isinstance(results[0], str)
        count += len(vectors)
        groups.append({"patch_size": patch, "merge_size": merge, "temporal_patch_size": tf, "shortest_edge": lo, "longest_edge": hi,
                       "vectors": vectors})
    pairs = [((1, 1), (84, 84)), ((3, 200), (28, 1876)), ((57, 31), (112, 56)), ((640, 97), (644, 84)), ((29, 28), (84, 84)),
             ((113, 450), (112, 448)), ((93, 150), (84, 140)), ((60, 90), (56, 84)), ((1080, 2400), (1036, 2352)),
             ((2400, 1080), (1008, 448)), ((2, 2), (3, 3)), ((3, 3), (2, 2)), ((5, 7), (1, 1)), ((16, 16), (16, 16)),
             ((16, 16), (16, 8)), ((16, 16), (8, 16)), ((16, 8), (16, 16)), ((8, 16), (16, 16)), ((100, 100), (99, 101)),
             ((7, 300), (28, 28)), ((300, 7), (28, 28)), ((1, 50), (28, 28)), ((50, 1), (28, 28)), ((400, 300), (13, 11)), ((4, 4), (400, 300))]
    while len(pairs) < 80:
        pairs.append((tuple(int(v) for v in rng.integers(1, 200, 2)), tuple(int(v) for v in rng.integers(1, 200, 2))))
    pixels = []
    for seed, ((h, w), (oh, ow)) in enumerate(pairs):
        img = noise(h, w, seed)
        out = np.asarray(Image.fromarray(img).resize((ow, oh), Image.Resampling.BICUBIC))
        assert np.array_equal(out, mt.resize_u8(img, oh, ow)), "make_tiny resizes otherwise than Pillow"
        pixels.append({"seed": seed, "from": [h, w], "to": [oh, ow], "sha256": hashlib.sha256(out.tobytes()).hexdigest()})
        if oh * ow <= 64:
            pixels[-1]["rgb"] = out.reshape(-1).tolist()
    print(f"{count} sizes ({errors} errors), {len(pixels)} resized pictures")
    write_json(os.path.join(HERE, "resize.json"), {"smart_resize": groups, "pixels": pixels})


def make_decode():
    """Small files of every kind that Pillow decodes, with what `exif_transpose` and `convert("RGB")` make of them."""
    from PIL import ImageOps
    folder = os.path.join(HERE, "decode")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    h, w = 19, 26
    rgb = smooth(h, w, 5)
    alpha = (np.arange(h * w) * 255 // (h * w - 1)).astype(np.uint8).reshape(h, w)
    grey16 = (np.arange(h * w, dtype=np.uint32) * 65535 // (h * w - 1)).astype(np.uint16).reshape(h, w)
    im = Image.fromarray(rgb)
    rgba, grey = Image.fromarray(np.dstack([rgb, alpha])), im.convert("L")
    grey_alpha = Image.merge("LA", (grey, Image.fromarray(alpha)))
    palette = im.quantize(200)
    small = im.quantize(4)

    def exif(orientation):
        e = Image.Exif()
        e[0x0112] = orientation
        return e

    def save(name, image, **kw):
        image.save(os.path.join(folder, name), **kw)

    save("rgb.png", im)
    save("rgba.png", rgba)
    save("grey.png", grey)
    save("grey-alpha.png", grey_alpha)
    save("palette.png", palette)
    save("palette-2bit.png", small, bits=2)
    save("palette-alpha.png", palette, transparency=bytes(range(200)))
    save("rgb-colour-key.png", im, transparency=tuple(int(v) for v in rgb[3, 3]))
    save("grey-1bit.png", im.convert("1"))
    save("grey-16bit.png", Image.fromarray(grey16))
    save("orientation-6.png", im, exif=exif(6))
    save("lossless.webp", im, lossless=True)
    save("lossless-alpha.webp", rgba, lossless=True, exact=True)
    save("lossless-orientation-8.webp", im, lossless=True, exif=exif(8))
    save("lossy.webp", im, quality=80)
    save("animated.webp", im, save_all=True, append_images=[ImageOps.invert(im)], lossless=True, duration=50)
    save("444.jpg", im, quality=90, subsampling=0)
    save("420.jpg", im, quality=85, subsampling=2)
    save("422.jpg", im, quality=85, subsampling=1)
    save("grey.jpg", grey, quality=85)
    save("progressive.jpg", im, quality=85, progressive=True)
    save("cmyk.jpg", im.convert("CMYK"), quality=90)
    for o in range(1, 9):
        save(f"orientation-{o}.jpg", im, quality=90, subsampling=0, exif=exif(o))
    big = Image.fromarray(smooth(240, 108, 9))
    save("screen-420.jpg", big, quality=90, subsampling=2)
    write_png_16bit(os.path.join(folder, "rgb-16bit.png"), np.dstack([grey16, grey16[::-1], grey16.T.reshape(h, w)]))
    write_png_16bit(os.path.join(folder, "rgba-16bit.png"), np.dstack([grey16, grey16[::-1], grey16.T.reshape(h, w), grey16]))
    out = {}
    for name in sorted(os.listdir(folder)):
        image = ImageOps.exif_transpose(Image.open(os.path.join(folder, name))).convert("RGB")
        out[name] = torch.from_numpy(np.asarray(image).copy())
    save_file(out, os.path.join(folder, "rgb.safetensors"))


def write_png_16bit(path, samples):
    """Pillow reads 16-bit colour but does not write it."""
    import struct
    import zlib
    h, w, c = samples.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", w, h, 16, {3: 2, 4: 6}[c], 0, 0, 0)
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--reference", required=True, help="folder of make_tiny.py")
    ap.add_argument("--only", nargs="*", help="names of variants or copies, odd-sizes, resize, decode")
    a = ap.parse_args()
    names = a.only or list(VARIANTS) + list(COPIES) + ["odd-sizes", "resize", "decode"]
    for name in names:
        print(f"== {name}", flush=True)
        if name in COPIES:
            make_copy(a.reference, name)
        elif name == "odd-sizes":
            make_odd_sizes(a.reference)
        elif name == "resize":
            make_resize(a.reference)
        elif name == "decode":
            make_decode()
        else:
            make_variant(a.reference, name)


if __name__ == "__main__":
    main()
