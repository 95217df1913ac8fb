# SPDX-License-Identifier: Apache-2.0
"""Images of an evaluation: theirs to prompts, and put into batches.

One that cannot be read stops nothing.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from di_star_jax.errors import UserError
from di_star_jax.log import Progress
from di_star_jax.prompts.files import Prompt
from di_star_jax.storage.images import (
    LISTED,
    THREADS,
    images_in,
    listed_images,
    read_image,
    read_listing,
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


def check_given(given: Path) -> None:
    """Raises: UserError for what `find_images` cannot take."""
    if not given.is_dir() and not (given.suffix == ".json" and given.is_file()):
        raise UserError(
            f"--images={given} is no folder; give a folder of images, or a .json of prompt to file"
        )


def evenly_listed(folder: Path) -> dict[str, list[Path]]:
    """As `listed_images`, each prompt with equally many.

    Raises: UserError where they are not.
    """
    found = listed_images(folder)
    counts = {len(files) for files in found.values()}
    if len(counts) != 1:
        raise UserError(
            f"{folder / LISTED} has {' or '.join(map(str, sorted(counts))) or 'no'} images a "
            "prompt, expected equally many of each; give --prompts and a .json of prompt to files"
        )
    return found


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
    held = read_listing(given, expected)
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
