# SPDX-License-Identifier: Apache-2.0
"""Image files: found, read, and put into batches. One that cannot be read stops nothing."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from di_star_jax.errors import UserError
from di_star_jax.log import Progress
from di_star_jax.prompts.files import Prompt

# What `sample` writes: pictures, all of them in one, and which prompt made which.
FIRST, GRID, LISTED = "0000.png", "grid.png", "prompts.json"
THREADS = 8  # that decode images ahead of the device, or write them
MAX_PIXELS = 64_000_000  # of an image: eight at a time are 1.5 GB
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_UNREADABLE = (  # what Pillow's readers raise
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
)


class Shot(NamedTuple):
    """One image: its prompt's place in the set and text, the number of the sample, and its file."""

    prompt: int
    sample: int
    text: str
    file: Path

    @property
    def place(self) -> tuple[int, int]:
        """(prompt, sample)."""
        return self.prompt, self.sample


def missing_from(found: np.ndarray, shots: list[Shot]) -> list[Shot]:
    """Those without a number. Args: found [P, K], or [P, K, D]; NaN where there is none."""
    return [shot for shot in shots if np.isnan(found[shot.place]).any()]


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


def check_given(given: Path) -> None:
    """Raises: UserError for what `find_images` cannot take."""
    if not given.is_dir() and not (given.suffix == ".json" and given.is_file()):
        raise UserError(
            f"--images={given} is no folder; give a folder of images, or a .json of prompt to file"
        )


def listed_images(folder: Path) -> dict[str, list[Path]]:
    """Images by prompt, as prompts.json in their folder has it, each prompt with equally many.

    It is {file: prompt}, or a list of prompts in the order of `images_in`.

    Raises: UserError where it does not say that.
    """
    file = folder / LISTED
    texts = _texts_of(file, _read_json(file, "expected {file: prompt}, as `sample` writes it"))
    found: dict[str, list[Path]] = {}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{file} has {text!r} for {name}, expected its prompt")
        if not (folder / name).is_file():
            raise UserError(f"{file} names {name}, which is not there; draw again, or remove it")
        found.setdefault(text.strip(), []).append(folder / name)
    counts = {len(files) for files in found.values()}
    if len(counts) != 1:
        raise UserError(
            f"{file} has {' or '.join(map(str, sorted(counts))) or 'no'} images a prompt, expected "
            "equally many of each; give --prompts and a .json of prompt to files"
        )
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


def find_images(
    given: Path,
    prompts: list[Prompt],
    samples: int,
    total: int,
) -> list[list[Path]]:
    """Images by prompt.

    Args:
      given: a folder, whose files are taken in the order of `images_in`; or a JSON file that maps
        prompts to files, or lists files in the order of the prompts, which may then have the same
        text.
      prompts: P. samples: K.
      total: prompts of the whole set; a folder may have the images of all, of which the first are
        taken.
    Returns: [P][K] files.
    Raises: UserError where they do not match the prompts.
    """
    check_given(given)
    if given.is_file():
        return _named_images(given, prompts, samples)
    files = images_in(given)
    wanted = len(prompts) * samples
    if len(files) not in (wanted, total * samples):
        raise UserError(
            f"--images={given} holds {len(files)} images, expected {wanted} for {len(prompts)} "
            f"prompts with --samples={samples}; give as many, or a .json of prompt to file"
        )
    return [files[i : i + samples] for i in range(0, wanted, samples)]


def _named_images(
    given: Path,
    prompts: list[Prompt],
    samples: int,
) -> list[list[Path]]:
    entries = _entries(given, prompts)
    found = []
    for prompt, names in zip(prompts, entries):
        names = _names(given, prompt.text, names, samples)
        found.append([given.parent / name for name in names])
    absent = [file for files in found for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"--images={given} names {len(absent)} files that are not there, the first is "
            f"{absent[0]}; give paths relative to {given.parent}"
        )
    return found


def _entries(given: Path, prompts: list[Prompt]) -> list:
    """What a JSON file has for each prompt."""
    expected = "expected {prompt: file, or a list of files}, or such a list with an entry a prompt"
    held = _read_json(given, expected)
    if isinstance(held, list):
        if len(held) != len(prompts):
            raise UserError(
                f"--images={given} lists {len(held)} entries, expected one for each of the "
                f"{len(prompts)} prompts"
            )
        return held
    if not isinstance(held, dict):
        raise UserError(f"--images={given} holds a {type(held).__name__}, {expected}")
    missing = [prompt.text for prompt in prompts if prompt.text not in held]
    if missing:
        raise UserError(
            f"--images={given} has no images for {len(missing)} of the {len(prompts)} prompts, the "
            f"first is {missing[0]!r}; add them, or lower --num_prompts"
        )
    return [held[prompt.text] for prompt in prompts]


def _read_json(file: Path, expected: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--images={file} is not readable as JSON ({reason}); {expected}") from None


def _names(
    given: Path,
    text: str,
    names: Any,
    samples: int,
) -> list[str]:
    """The file names of one prompt."""
    names = [names] if isinstance(names, str) else names
    fits = isinstance(names, list) and len(names) == samples
    if not fits or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"--images={given} gives {names!r} for {text!r}, expected {samples} file name(s); set "
            "--samples to how many there are"
        )
    return names


def listing_digest(files: list[Path], base: Path) -> str:
    """sha256 of the files' names below `base`, in their order, and their sizes."""
    lines = [f"{os.path.relpath(file, base)} {file.stat().st_size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


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


def _read_ahead(shots: list[Shot], window: int) -> Iterator[tuple[Shot, np.ndarray | None]]:
    with ThreadPoolExecutor(THREADS) as readers:
        for start in range(0, len(shots), window):
            part = shots[start : start + window]
            yield from zip(part, readers.map(lambda shot: read_image(shot.file), part))


def batches(shots: list[Shot], size: int) -> Iterator[tuple[list[Shot], np.ndarray | None]]:
    """Shots with their images uint8 [N, H, W, 3], N <= size, all of one size.

    What cannot be read comes alone, with None.
    """
    waiting: dict[tuple, list] = {}
    for shot, image in _read_ahead(shots, 4 * size):
        if image is None:
            yield [shot], None
            continue
        held = waiting.setdefault(image.shape, [])
        held.append((shot, image))
        if len(held) == size:
            yield _stacked(held)
            held.clear()
    for held in waiting.values():
        if held:
            yield _stacked(held)


def counted_batches(
    shots: list[Shot],
    size: int,
    *,
    what: str,
    done: str,
) -> Iterator[tuple[list[Shot], np.ndarray | None]]:
    """As `batches`, with a line of progress. Args: what is made; how it is called when done."""
    if not shots:
        return
    with Progress(len(shots), 0, unit=what) as progress:
        count = 0
        for part, images in batches(shots, size):
            yield part, images
            count += len(part)
            progress.update(count, done)


def _stacked(held: list[tuple[Shot, np.ndarray]]) -> tuple[list[Shot], np.ndarray]:
    return [shot for shot, _ in held], np.stack([image for _, image in held])


def to_unit(images: Any) -> Any:
    """uint8 [..., 3] -> float32 in [-1, 1]; of NumPy's arrays and of JAX's."""
    return images.astype(np.float32) / 127.5 - 1.0
