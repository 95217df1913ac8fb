# SPDX-License-Identifier: Apache-2.0
"""Image files: which a folder has, of which prompt each is, and their pixels."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from di_star_jax.errors import UserError

# What `sample` writes: pictures, all of them in one, and which prompt made which.
FIRST, GRID, LISTED = "0000.png", "grid.png", "prompts.json"
THREADS = 8  # that decode images, or write them
MAX_PIXELS = 64_000_000  # of an image: eight at a time are 1.5 GB
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_UNREADABLE = (  # what Pillow's readers raise
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
)


# Files.


def _natural(path: Path) -> list:
    """Orders 2.png before 10.png. Parts alternate, so that text never meets a number."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]


def images_in(folder: Path) -> list[Path]:
    """PNG, JPEG and WebP files in a folder and those below it, 2.png before 10.png.

    Hidden ones are none, such as ._0.png of macOS and what is in .ipynb_checkpoints, nor is the
    grid of all pictures that `sample` writes beside them.
    """
    found = []
    for path in folder.rglob("*"):
        below = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in below.parts)
        is_grid = path.name == GRID and path.with_name(FIRST).exists()
        if path.suffix.lower() in _SUFFIXES and not (is_hidden or is_grid) and path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: _natural(path.relative_to(folder)))


def listed_images(folder: Path) -> dict[str, list[Path]]:
    """Images by prompt, as prompts.json in their folder has it.

    It is {file: prompt}, or a list of prompts in the order of `images_in`.

    Raises: UserError where it does not say that.
    """
    file = folder / LISTED
    texts = _texts_of(file, read_listing(file, "expected {file: prompt}, as `sample` writes it"))
    found: dict[str, list[Path]] = {}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{file} has {text!r} for {name}, expected its prompt")
        if not (folder / name).is_file():
            raise UserError(f"{file} names {name}, which is not there; draw again, or remove it")
        found.setdefault(text.strip(), []).append(folder / name)
    return found


def _texts_of(file: Path, held: Any) -> dict[str, Any]:
    """Prompts by file name."""
    if isinstance(held, list):
        files = images_in(file.parent)
        if len(files) != len(held):
            raise UserError(f"{file} lists {len(held)} prompts for {len(files)} images")
        return {str(path.relative_to(file.parent)): text for path, text in zip(files, held)}
    if not isinstance(held, dict):
        raise UserError(f"{file} holds a {type(held).__name__}, expected {{file: prompt}}")
    return held


def read_listing(file: Path, expected: str) -> Any:
    """What a JSON file holds. Args: expected, of it, for the error. Raises: UserError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not readable as JSON ({reason}); {expected}") from None


# Pixels.


def read_image(file: str | os.PathLike) -> np.ndarray | None:
    """uint8 [H, W, 3], or None for a file that is no readable image.

    Gray becomes RGB, 16 bits become 8. Transparency is dropped, as scorers do that have been
    published (Pillow's convert("RGB")): nothing is laid under it.
    """
    try:
        return _pixels(file)
    except _UNREADABLE:
        return None


def fault_of(file: str | os.PathLike) -> str:
    """Why `read_image` has none, in one line; "" where it has one."""
    try:
        _pixels(file)
    except _UNREADABLE as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _pixels(file: str | os.PathLike) -> np.ndarray:
    """Raises: one of _UNREADABLE."""
    with Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, expected 64 million at most")
        if getattr(image, "is_animated", False) and image.format in ("PNG", "WEBP"):
            raise ValueError(f"{image.n_frames} pictures that move, expected one")
        if _is_16_bit(image):
            return _from_16_bits(np.asarray(image))
        if image.mode in ("I", "F"):
            raise ValueError(
                f"pixels of mode {image.mode}, whose range is not known, expected 8 or 16 bits"
            )
        return np.asarray(image.convert("RGB"))


def _is_16_bit(image: Image.Image) -> bool:
    """Whether it is gray of 16 bits; Pillow before 11 opens such a PNG as I."""
    return image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")


def is_16_bit(file: Path) -> bool:
    """Whether a readable image is gray of 16 bits, which other programs take for white."""
    with Image.open(file) as image:
        return _is_16_bit(image)


def _from_16_bits(gray: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 65535] -> [H, W, 3]. Pillow's convert clips at 255, and all is white."""
    eight = np.round(gray / 257.0).astype(np.uint8)
    return np.stack([eight] * 3, axis=-1)


def broken_among(files: list[Path]) -> list[Path]:
    """Those that cannot be read as images."""
    with ThreadPoolExecutor(THREADS) as readers:
        return [file for file, image in zip(files, readers.map(read_image, files)) if image is None]
