# SPDX-License-Identifier: Apache-2.0
"""What the pretraining learns from, made once and kept in files."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from di_star_jax import log
from di_star_jax.errors import UserError
from di_star_jax.shapes import scenes
from di_star_jax.storage import files


def to_image(pixels: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def render_dataset(folder: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """Training scenes.

    Returns: images uint8 [count, 64, 64, 3] (memory-mapped), captions.
    """
    images_file = folder / "images.npy"
    if not _captions_file(folder).exists():  # written last
        images, captions = _rendered(count)
        folder.mkdir(parents=True, exist_ok=True)
        _write_array(images_file, lambda file: np.save(file, images))
        files.write_text(_captions_file(folder), json.dumps(captions))
    return _stored(images_file, mmap_mode="r"), _captions(folder, count)


def _rendered(count: int) -> tuple[np.ndarray, list[str]]:
    images = np.empty((count, scenes.SIZE, scenes.SIZE, 3), np.uint8)
    captions = []
    with log.Progress(count, 0, "data: scene") as progress:
        for i in range(count):
            rng = np.random.default_rng((1, i))
            scene = scenes.sample_scene(rng, held_out=False)
            images[i] = np.round(255.0 * scenes.render(scene, rng))
            captions.append(scene.caption)
            if len(captions) % 100 == 0 or len(captions) == count:
                progress.update(len(captions), "")
    return images, captions


def _captions_file(folder: Path) -> Path:
    return folder / "captions.json"


def _captions(folder: Path, count: int) -> list[str]:
    """Raises: UserError where another command made other data in this folder."""
    file = _captions_file(folder)
    try:
        captions = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file} is damaged; delete it, and it is made again") from None
    if len(captions) != count:
        raise UserError(
            f"{folder} holds {len(captions)} scenes, expected {count}, so another command or "
            "version made it; give another --workdir"
        )
    return captions


def _write_array(path: Path, write: Callable[[Any], None]) -> None:
    """A file that is never seen half written. Args: write, to an open file."""
    with files.whole(path) as partial, partial.open("wb") as file:
        write(file)


def _stored(file: Path, mmap_mode: str | None = None) -> Any:
    """Raises: UserError for what numpy cannot read."""
    try:
        return np.load(file, mmap_mode=mmap_mode)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(
            f"{file} is missing or damaged; delete {file.parent}, and it is made again"
        ) from None


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
        parts = []
        with log.Progress(len(images), 0, "data: encoded scene") as progress:
            for i in range(0, len(images), 500):
                parts.append(jax.device_get(encode_batch(to_image(images[i : i + 500]))))
                progress.update(min(i + 500, len(images)), "")
        mean, std = (np.concatenate(part) for part in zip(*parts, strict=True))
        _write_array(file, lambda file: np.savez(file, mean=mean, std=std))
    stored = _stored(file)
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
