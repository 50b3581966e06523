"""Writes the golden blocks of this folder with the PyPI package `gguf` (0.19.0), ggml's reference in numpy.

    pip install gguf==0.19.0 && python make.py

For each block format, NAME.blocks holds random blocks (every bit of the codes and sub-scales random, f16 scales of
a sane size) and NAME.values the f32 values that the package reads from them. input.values are 1024 values, and for the
formats that the package can write NAME.written are their blocks. All little-endian.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

HERE = Path(__file__).parent
# Where the f16 scales lie in a block.
SCALES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0],
}
WRITTEN = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]

random = np.random.default_rng(20250701)
for name, offsets in SCALES.items():
    size, width = GGML_QUANT_SIZES[Type[name]]
    blocks = random.integers(0, 256, (1024 // size, width), dtype=np.uint8)
    for at in offsets:
        scale = (random.standard_normal(len(blocks)) * 0.02).astype(np.float16)
        scale[0] = np.float16(6e-8)  # the smallest f16
        blocks[:, at:at + 2] = scale.view(np.uint8).reshape(-1, 2)
    values = dequantize(blocks, Type[name]).astype("<f4")
    (HERE / f"{name.lower()}.blocks").write_bytes(blocks.tobytes())
    (HERE / f"{name.lower()}.values").write_bytes(values.tobytes())

# Gaussian weights, then outliers, zeros, one sign only, a constant, ties, and very small values.
x = random.standard_normal(1024).astype(np.float32) * np.float32(0.03)
x[512:576] *= random.choice(np.array([1, 30], np.float32), 64, p=[0.9, 0.1])
x[576:608] = 0
x[608:640] = np.abs(x[608:640])
x[640:672] = -np.abs(x[640:672])
x[672:704] = 0.7
x[704:736] = np.arange(-16, 16)
x[736:768] = np.arange(-127, 129, 8)[:32] / 2
x[768:800] *= np.float32(1e-5)
(HERE / "input.values").write_bytes(x.astype("<f4").tobytes())
for name in WRITTEN:
    (HERE / f"{name.lower()}.written").write_bytes(quantize(x.reshape(1, -1), Type[name]).tobytes())
