#!/usr/bin/env python3
"""A Wav2Vec2 checkpoint in ONNX Runtime, as the peer of `cargo xtask bench --only audio`.

    python audio_peer.py --model DIR --onnx FILE --threads N

Needs numpy and onnxruntime; torch, transformers and onnx as well where FILE is not there yet: then the checkpoint is
exported first, by another process, so that the memory of this one is that of ONNX Runtime. Prints one line of JSON when it
is ready and one for each request: `audio SECONDS` gives `{"audio", "seconds", "peak_bytes", "sample"}`. The audio is that
of `pocketglm bench`.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np

RATE, SAMPLED = 16000, 997


def export(model, path):
    """The graph of transformers' Wav2Vec2ForCTC with attention written out, any length."""
    import torch
    from transformers import Wav2Vec2ForCTC

    net = Wav2Vec2ForCTC.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.onnx.export(net, (torch.zeros(1, 5 * RATE),), path + ".part", input_names=["input_values"],
                          output_names=["logits"], dynamic_axes={"input_values": {1: "n"}, "logits": {1: "t"}},
                          opset_version=17, dynamo=False)
    os.replace(path + ".part", path)


def samples(seconds):
    i = np.arange(seconds * RATE, dtype=np.uint64)
    noise = (i * i % np.uint64(65521) * np.uint64(7919) + i * np.uint64(104729)) % np.uint64(65521)
    loud = np.float32(1) + (i // np.uint64(8000) % np.uint64(4)).astype(np.float32) * np.float32(0.25)
    return ((noise.astype(np.float32) - np.float32(32760)) / np.float32(32768) * loud)[None]


def peak_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def say(value):
    print(json.dumps(value), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True)
    ap.add_argument("--onnx", required=True)
    ap.add_argument("--threads", type=int, required=True)
    ap.add_argument("--export", action="store_true", help="write the graph and end")
    a = ap.parse_args()
    if a.export:
        return export(a.model, a.onnx)
    if not os.path.exists(a.onnx):
        subprocess.run([sys.executable, __file__, "--export", "--model", a.model, "--onnx", a.onnx, "--threads", "1"],
                       check=True, stdout=subprocess.DEVNULL)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = a.threads
    options.inter_op_num_threads = 1
    # Threads that spin for work would take the processor from the other program's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(a.onnx, options, providers=["CPUExecutionProvider"])
    say({"peer": "ONNX Runtime", "version": ort.__version__, "threads": a.threads, "ready": True})
    for line in sys.stdin:
        words = line.split()
        if words == ["quit"]:
            break
        if len(words) != 2 or words[0] != "audio" or not words[1].isdigit():
            say({"error": f"{line.strip()!r} is no request"})
            continue
        audio = samples(int(words[1]))
        start = time.perf_counter()
        logits = session.run(["logits"], {"input_values": audio})[0]
        seconds = time.perf_counter() - start
        say({"audio": int(words[1]), "seconds": seconds, "peak_bytes": peak_bytes(),
             "sample": [float(v) for v in logits.reshape(-1)[::SAMPLED]]})


if __name__ == "__main__":
    main()
