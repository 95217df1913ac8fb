# SPDX-License-Identifier: Apache-2.0
"""What the pretraining learns from, made once and kept in files."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from di_star_jax.shapes import scenes, taste


def to_image(pixels: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def render_dataset(folder: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """Training scenes.

    Returns: images uint8 [count, 64, 64, 3] (memory-mapped), captions.
    """
    images_file, captions_file = folder / "images.npy", folder / "captions.json"
    if not captions_file.exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        images = np.empty((count, scenes.SIZE, scenes.SIZE, 3), np.uint8)
        captions = []
        for i in range(count):
            rng = np.random.default_rng((1, i))
            scene = scenes.sample_scene(rng, held_out=False)
            images[i] = np.round(255.0 * scenes.render(scene, rng))
            captions.append(scene.caption)
            if i % 5000 == 0:
                print(f"data: {i} of {count} scenes", flush=True)
        np.save(images_file, images)
        captions_file.write_text(json.dumps(captions), encoding="utf-8")
    return np.load(images_file, mmap_mode="r"), json.loads(
        captions_file.read_text(encoding="utf-8")
    )


def render_pairs(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Preference pairs.

    Returns: images uint8 [count, 2, 64, 64, 3], probability [count] that the first is preferred,
      captions.
    """
    pairs_file, captions_file = folder / "pairs.npz", folder / "captions.json"
    if not captions_file.exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        images = np.empty((count, 2, scenes.SIZE, scenes.SIZE, 3), np.uint8)
        prob = np.empty(count, np.float32)
        captions = []
        for i in range(count):
            rng = np.random.default_rng((4, i))
            scene = scenes.sample_scene(rng, held_out=False)
            *pair, prob[i] = taste.preference_pair(scene, rng)
            images[i] = np.round(255.0 * np.stack(pair))
            captions.append(scene.caption)
        np.savez(pairs_file, images=images, prob=prob)
        captions_file.write_text(json.dumps(captions), encoding="utf-8")
    stored = np.load(pairs_file)
    return stored["images"], stored["prob"], json.loads(captions_file.read_text(encoding="utf-8"))


def encode(
    folder: Path,
    graphdef: nnx.GraphDef,
    params: Any,
    images: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of all latents by a VAE with scaling factor 1.

    Returns: float32 [N, 16, 16, 4] each.
    """
    file = folder / "latents.npz"
    if not file.exists():
        encode_batch = jax.jit(lambda image: nnx.merge(graphdef, params).encode(image))
        starts = range(0, len(images), 500)
        parts = [jax.device_get(encode_batch(to_image(images[i : i + 500]))) for i in starts]
        mean, std = (np.concatenate(part) for part in zip(*parts, strict=True))
        np.savez(file, mean=mean, std=std)
    stored = np.load(file)
    return stored["mean"], stored["std"]


def write_captions(folder: Path) -> None:
    """prompts.txt: 5,000 training captions; prompts_held_out.txt: 500 that no stage has seen."""
    _write(folder / "prompts.txt", 5000, held_out=False)
    _write(folder / "prompts_held_out.txt", 500, held_out=True)


def _write(
    file: Path,
    count: int,
    *,
    held_out: bool,
) -> None:
    rng = np.random.default_rng(8)
    drawn = [scenes.sample_scene(rng, held_out=held_out).caption for _ in range(2 * count)]
    captions = list(dict.fromkeys(drawn))[:count]
    file.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
