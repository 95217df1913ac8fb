# SPDX-License-Identifier: Apache-2.0
"""How many pairs a core decodes, beside how many a device would take."""

import io
import time

import numpy as np
from PIL import Image

from di_star_jax.preference import stream
from di_star_jax.preference.records import Pair

SIDE = 512  # pixels of Pick-a-Pic's smaller images
SIZE = 224  # of ViT-H/14
_PAIRS = 16
_SECONDS = 3.0
# ViT-H/14: two images of 257 tokens and a text of 77 (632.1 M and 354.0 M parameters, of which the
# embedding table's 50.6 M multiply nothing), forward, its recomputation and twice that backward.
FLOPS = 4 * 2 * (2 * 257 * 632.1e6 + 77 * 303.4e6)
# Dense bfloat16 of an H100 SXM, at what large transformers reach.
H100 = 0.4 * 989e12


def pictures(count: int, side: int) -> list[bytes]:
    """JPEG files about as large as Pick-a-Pic's, 160 kB: large forms, fine ones and noise."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        image = np.zeros((side, side, 3))
        for cells in (4, 16, 64, 512):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            smooth = coarse.resize((side, side), Image.Resampling.BICUBIC)
            image += np.asarray(smooth, float) / cells**0.1
        image = 255 * (image - image.min()) / (image.max() - image.min())
        file = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=94)
        made.append(file.getvalue())
    return made


def pairs_per_second() -> tuple[float, float]:
    """(pairs of 512-pixel JPEGs that one core decodes in a second, kilobytes of such an image)."""
    images = pictures(2 * _PAIRS, SIDE)
    pairs = [Pair("", pair, 1.0, 1) for pair in zip(images[::2], images[1::2])]
    stream.decoded(pairs, SIZE, "clip")
    done, began = 0, time.process_time()
    while time.process_time() - began < _SECONDS:
        stream.decoded(pairs, SIZE, "clip")
        done += _PAIRS
    rate = done / (time.process_time() - began)
    return rate, sum(map(len, images)) / len(images) / 1000


def sentence() -> str:
    """The figure, and what a device needs."""
    rate, size = pairs_per_second()
    needed = H100 / FLOPS
    return (
        f"one core decodes {rate:.0f} pairs a second ({SIDE}-pixel JPEGs of {size:.0f} kB to "
        f"{SIZE} pixels); ViT-H/14 takes {FLOPS / 1e12:.2g} TFLOP a pair, so an H100 at 40 % of "
        f"its peak takes {needed:.0f} pairs a second: data.workers={int(needed / rate) + 1} keep "
        "up, computed"
    )
