# SPDX-License-Identifier: Apache-2.0
"""Scores of image files, kept as they come, so that a stopped evaluation continues.

P prompts with K images each; an image that cannot be read has no score (NaN) and stops nothing.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from di_star_jax import log as metrics
from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.evaluation import measures
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.prompts.files import Prompt
from di_star_jax.rewards import REWARDS
from di_star_jax.rewards.pixels import clip_pixels_rounded
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.similarity import image_embeddings
from di_star_jax.shapes import oracle, scenes
from di_star_jax.storage.open_clip import to_transformers

# Left to themselves, TPUs multiply float32 in bfloat16 and GPUs in TF32, and lose digits that
# published scores have.
_EXACT = functools.partial(jax.default_matmul_precision, "highest")
READERS = 8  # threads that decode images ahead of the device
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
)  # what Pillow's readers raise


class Shot(NamedTuple):
    """One image: its prompt's place in the set and text, the number of the sample, and its file."""

    prompt: int
    sample: int
    text: str
    file: Path


# Files.


def _natural(path: Path) -> list:
    """Orders 2.png before 10.png. Parts alternate, so that text never meets a number."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]


def images_in(folder: Path) -> list[Path]:
    """PNG, JPEG and WebP files in a folder and those below it, in order of their names, 2.png
    before 10.png.
    """
    return sorted(
        (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES),
        key=lambda path: _natural(path.relative_to(folder)),
    )


def find_images(given: Path, texts: list[Prompt], samples: int, total: int) -> list[list[Path]]:
    """Images by prompt.

    Args:
      given: a folder, whose files are taken in the order of `images_in`; or a JSON file that maps
        prompts to files, or lists files in the order of the prompts, which may then have the same
        text.
      texts: P prompts. samples: K.
      total: prompts of the whole set; a folder may have the images of all, of which the first are
        taken.
    Returns: [P][K] files.
    Raises: UserError where they do not match the prompts.
    """
    if given.suffix == ".json" and given.is_file():
        return _named_images(given, texts, samples)
    if not given.is_dir():
        raise UserError(
            f"--images={given} is no folder; give a folder of images, or a .json of prompt to file"
        )
    files = images_in(given)
    if len(files) not in (len(texts) * samples, total * samples):
        raise UserError(
            f"--images={given} holds {len(files)} images, expected {len(texts) * samples} for {len(texts)} "
            f"prompts with --samples={samples}; give as many, or a .json of prompt to file"
        )
    return [files[i : i + samples] for i in range(0, len(texts) * samples, samples)]


def _named_images(given: Path, texts: list[Prompt], samples: int) -> list[list[Path]]:
    expected = "expected {prompt: file, or a list of files}, or such a list with an entry a prompt"
    try:
        mapping = json.loads(given.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"--images={given} is not readable as JSON ({error}); {expected}") from None
    if not isinstance(mapping, (dict, list)):
        raise UserError(f"--images={given} holds a {type(mapping).__name__}, {expected}")
    if isinstance(mapping, list) and len(mapping) != len(texts):
        raise UserError(
            f"--images={given} lists {len(mapping)} entries, expected one for each of the {len(texts)} prompts"
        )
    missing = [
        prompt.text for prompt in texts if isinstance(mapping, dict) and prompt.text not in mapping
    ]
    if missing:
        raise UserError(
            f"--images={given} has no images for {len(missing)} of the {len(texts)} prompts, the first is "
            f"{missing[0]!r}; add them, or lower --num_prompts"
        )
    entries = mapping if isinstance(mapping, list) else [mapping[prompt.text] for prompt in texts]
    found = [
        [given.parent / name for name in _names(given, prompt.text, names, samples)]
        for prompt, names in zip(texts, entries)
    ]
    absent = [file for files in found for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"--images={given} names {len(absent)} files that are not there, the first is {absent[0]}; "
            f"give paths relative to {given.parent}"
        )
    return found


def _names(given: Path, text: str, names: Any, samples: int) -> list[str]:
    names = [names] if isinstance(names, str) else names
    if (
        not isinstance(names, list)
        or len(names) != samples
        or not all(isinstance(name, str) for name in names)
    ):
        raise UserError(
            f"--images={given} gives {names!r} for {text!r}, expected {samples} file name(s); set "
            "--samples to how many there are"
        )
    return names


def listing_digest(files: list[Path], base: Path) -> str:
    """sha256 of the files' names below `base`, in their order, and their sizes."""
    lines = [f"{os.path.relpath(file, base)} {file.stat().st_size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def params_digest(params: Any) -> str:
    """sha256 of a tree's names, shapes, dtypes and values, however it lies on the devices."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


# Scores.


class Scores:
    """The scores of one metric, [P, K] float64, kept in a file line by line.

    An image without a score is missing again for the next run, which may find it mended.

    Args: file, of JSON lines; shape, (P, K).
    """

    def __init__(self, file: Path, shape: tuple[int, int]):
        self.values = np.full(shape, np.nan)
        self._file = file
        text = file.read_text() if file.exists() else ""
        if not text.endswith("\n"):  # cut short by the end of the last run
            text = text[: text.rfind("\n") + 1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        for prompt, sample, value in map(json.loads, text.splitlines()):
            self.values[prompt, sample] = value

    def missing(self, shots: list[Shot]) -> list[Shot]:
        """Those without a score."""
        return [shot for shot in shots if np.isnan(self.values[shot.prompt, shot.sample])]

    def add(self, shots: list[Shot], values: np.ndarray) -> None:
        """Args: values [len(shots)]; those that are not finite are no scores."""
        with self._file.open("a") as out:
            for shot, value in zip(shots, np.asarray(values, np.float64).tolist()):
                if np.isfinite(value):
                    self.values[shot.prompt, shot.sample] = value
                    out.write(json.dumps([shot.prompt, shot.sample, value]) + "\n")


def read_image(file: str | os.PathLike) -> np.ndarray | None:
    """uint8 [H, W, 3], or None for a file that is no readable image.

    Transparency is dropped, gray becomes RGB.
    """
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except _UNREADABLE:
        return None


def _read_ahead(shots: list[Shot], window: int) -> Iterator[tuple[Shot, np.ndarray | None]]:
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(shots), window):
            part = shots[start : start + window]
            yield from zip(part, readers.map(lambda shot: read_image(shot.file), part))


def batches(shots: list[Shot], size: int) -> Iterator[tuple[list[Shot], np.ndarray | None]]:
    """Shots with their images uint8 [N, H, W, 3], N <= size, all of one size; with None for what
    cannot be read.
    """
    waiting: dict[tuple, list] = {}
    for shot, image in _read_ahead(shots, 4 * size):
        if image is None:
            yield [shot], None
            continue
        held = waiting.setdefault(image.shape, [])
        held.append((shot, image))
        if len(held) == size:
            yield [shot for shot, _ in held], np.stack([image for _, image in held])
            held.clear()
    for held in waiting.values():
        if held:
            yield [shot for shot, _ in held], np.stack([image for _, image in held])


def to_unit(images) -> jax.Array:
    """uint8 [..., 3] -> float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


def score(
    what: str,
    per_batch: Callable[[list[Shot], np.ndarray], np.ndarray],
    shots: list[Shot],
    scores: Scores,
    batch_size: int,
) -> None:
    """Fills in what `scores` lacks.

    Args:
      what: the metric, for the progress.
      per_batch: (shots, uint8 images [N, H, W, 3]) -> scores [N].
      shots: all images. batch_size: at a time, at most.
    """
    missing = scores.missing(shots)
    if not missing:
        return
    progress = metrics.Progress(len(missing), 0, unit=what)
    for done, (part, images) in _counted(batches(missing, batch_size)):
        scores.add(part, np.full(len(part), np.nan) if images is None else per_batch(part, images))
        progress.update(done, "images scored")
    progress.close()


def _counted(parts: Iterator) -> Iterator[tuple[int, tuple]]:
    done = 0
    for part in parts:
        done += len(part[0])
        yield done, part


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    """[N, ...] -> [size, ...], the last repeated: one shape, one compilation."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]) if len(x) < size else x


def by_reward(
    reward: Reward, mesh: Mesh, batch_size: int
) -> Callable[[list[Shot], np.ndarray], np.ndarray]:
    """Scores by a reward's `evaluate`. Args: batch_size, a multiple of the mesh's data x fsdp."""
    batch = sharding.batch_spec()
    run = jax.jit(
        sharding.on_each(
            mesh,
            lambda params, images, prompts: reward.evaluate(params, to_unit(images), prompts),
            (sharding.params_spec(mesh, reward.params), batch, batch),
            batch,
        )
    )

    def per_batch(shots, images):
        prompts = jax.tree.map(
            lambda x: _padded(x, batch_size), reward.tokenize([shot.text for shot in shots])
        )
        with _EXACT():
            return np.asarray(run(reward.params, _padded(images, batch_size), prompts))[
                : len(shots)
            ]

    return per_batch


class Features:
    """Image embeddings of a CLIP, unit vectors, for diversity and Frechet distance.

    Args: folder and config of a `CLIPModel`; mesh; batch_size, a multiple of its data x fsdp.
    Raises: UserError for a folder of another model.

    Attributes: digest, sha256 of the parameters.
    """

    def __init__(self, folder: Path, config: dict, mesh: Mesh, batch_size: int):
        options = pipeline.Options(shardings=functools.partial(sharding.params_sharding, mesh))
        model = pipeline.load_model(folder, options, config=config, arrange=to_transformers)
        self.digest = params_digest(model.params)
        self._params, self._batch_size = model.params, batch_size
        self._width = model.config["projection_dim"]
        self._run = jax.jit(
            sharding.on_each(
                mesh,
                lambda params, images: image_embeddings(
                    model.graphdef, params, to_unit(images), pixels=clip_pixels_rounded
                ),
                (sharding.params_spec(mesh, model.params), sharding.batch_spec()),
                sharding.batch_spec(),
            )
        )

    def of(self, shots: list[Shot], shape: tuple[int, int], file: Path | None) -> np.ndarray:
        """Embeds what is not in `file` yet.

        Args: shots; shape, (P, K); file, .npy that keeps what is done, or None.
        Returns: float32 [P, K, D], NaN for images that are broken.
        """
        whole = (*shape, self._width)
        found = np.full(whole, np.nan, np.float32) if file is None else _kept(file, whole)
        missing = [shot for shot in shots if np.isnan(found[shot.prompt, shot.sample]).any()]
        progress = metrics.Progress(len(missing), 0, unit="features")
        for done, (part, images) in _counted(batches(missing, self._batch_size)):
            if images is not None:
                with _EXACT():
                    rows = np.asarray(self._run(self._params, _padded(images, self._batch_size)))[
                        : len(part)
                    ]
                found[[shot.prompt for shot in part], [shot.sample for shot in part]] = rows
            progress.update(done, "images embedded")
        progress.close()
        return np.array(found)


def _kept(file: Path, shape: tuple[int, ...]) -> np.memmap:
    """The array in a file, which is made, full of NaN, where it is missing; what is written to it
    stays.
    """
    if not file.exists():
        partial = file.with_suffix(".partial")
        with partial.open("wb") as out:
            np.save(out, np.full(shape, np.nan, np.float32))
        partial.rename(file)
    return np.lib.format.open_memmap(file, "r+")


def attributes_right(shots: list[Shot], images: np.ndarray) -> np.ndarray:
    """Share of a caption's attributes that the oracle of the shapes world reads back, [N].

    Raises: UserError for a prompt that is no caption of the shapes world, and for images of another
      size than its.
    """
    if images.shape[1:3] != (scenes.SIZE, scenes.SIZE):
        raise UserError(
            f"{shots[0].file} has {images.shape[2]} x {images.shape[1]} pixels, the oracle reads images of "
            f"{scenes.SIZE} x {scenes.SIZE}; leave oracle out of --metrics"
        )
    found = []
    for shot, image in zip(shots, images):
        right, total = oracle.attributes(scenes.parse(shot.text), image / 255.0)
        found.append(right / total)
    return np.array(found)


def broken_among(files: list[Path]) -> list[Path]:
    """Those that cannot be read as images."""
    with ThreadPoolExecutor(READERS) as readers:
        return [file for file, image in zip(files, readers.map(read_image, files)) if image is None]


# Metrics that are computed on the host, image by image: (shots, uint8 images [N, H, W, 3]) -> [N].
ON_IMAGES = {
    "oracle": attributes_right,
    "saturation": lambda shots, images: measures.saturation(to_unit(images)),
    "contrast": lambda shots, images: measures.contrast(to_unit(images)),
}
PER_IMAGE = (*REWARDS, *ON_IMAGES)
ON_SETS = ("diversity", "frechet", "fid", "clip_fid")
