# SPDX-License-Identifier: Apache-2.0
"""Preference pairs by index, from tables or parquet files, in this machine's files or a bucket's.

Each file becomes a piece: a tfds data source (ArrayRecord, read without TensorFlow) whose records
hold the images as they came, still encoded, and beside it an index of what a split needs to know.
So a stop loses one piece at most, and pieces are made by several processes. Together they take the
disk space that the files take, once more.
"""

import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import io
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from di_star_jax import log
from di_star_jax.errors import UserError
from di_star_jax.preference import records, workers
from di_star_jax.preference.records import BROKEN, EQUAL, TABLES, UNKNOWN, UNLABELLED, Fault
from di_star_jax.storage import buckets
from di_star_jax.storage.files import digest_of, expand, read_json, sampled_digest, write_text

SEAL = "whole.json"  # of a piece, written last: what it was made of, {file: its size}
INDEX = "index.npz"
FAULTS = "faults.json"
_VERSION = "1.0.0"
_HASHED = 8  # bytes of a sha256 that tell prompts and pictures apart
_COLUMNS = {
    "prompt": np.uint64,
    "content": np.uint64,
    "label_0": np.float32,
    "num_examples": np.int32,
}


class Origin(NamedTuple):
    """A file of pairs. name: as the user knows it; key: changes with it; here: makes it local."""

    name: str
    key: str
    here: Callable[[], Path]
    remote: bool


@dataclasses.dataclass(frozen=True)
class Found:
    """All usable pairs of a source.

    Attributes:
      pieces: folders.
      index: arrays of one value for each pair: the columns of an index, and "piece" and "record",
        where it is.
      faults: (file, fault) of the rows that are left out.
      counts: rows by what became of them: "usable", UNLABELLED or the kind of fault.
    """

    pieces: tuple[Path, ...]
    index: dict[str, np.ndarray]
    faults: tuple[tuple[str, Fault], ...]
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.index["prompt"])

    @property
    def digest(self) -> str:
        """Of captions, labels and pictures, wherever they lie."""
        digest = hashlib.sha256()
        for name in _COLUMNS:
            digest.update(np.ascontiguousarray(self.index[name]).tobytes())
        return digest.hexdigest()

    def take(self, chosen: np.ndarray) -> "Examples":
        """Some of the pairs. Args: chosen, their numbers."""
        index = {name: values[chosen] for name, values in self.index.items()}
        return Examples(self.pieces, index)


class Examples(Sequence):
    """Pairs by index, as `records.Pair`, read when asked for; may be sent to other processes.

    Args: pieces, index: as of `Found`; a prompt's number of pairs, where its source does not say
      it, is how many of these have it.
    """

    def __init__(self, pieces: tuple[Path, ...], index: dict[str, np.ndarray]):
        self.pieces = pieces
        self.index = index | {"num_examples": _counted(index["prompt"], index["num_examples"])}

    def __len__(self) -> int:
        return len(self.index["prompt"])

    def __getitem__(self, i: int) -> records.Pair:
        if not 0 <= i < len(self):  # what ends an iteration
            raise IndexError(f"pair {i} of {len(self)}")
        record = _data_source(self.pieces[self.index["piece"][i]])[int(self.index["record"][i])]
        images = (record["image_0"], record["image_1"])
        label, count = self.index["label_0"][i], self.index["num_examples"][i]
        return records.Pair(record["caption"].decode(), images, float(label), int(count))


def _counted(prompts: np.ndarray, given: np.ndarray) -> np.ndarray:
    """How many pairs each one's prompt has, where `given` is 0."""
    _, which, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    return np.where(given > 0, given, counts[which]).astype(np.int32)


@functools.cache
def _data_source(piece: Path) -> Sequence[dict[str, Any]]:
    """One for each process: an open file is not sent to another."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(piece / "pairs" / _VERSION))
    return builder.as_data_source(split="train")


# Where pairs lie.


def origins(name: str, option: str) -> list[Origin]:
    """The files of a source: a folder, a file, or FOLDER/PATTERN.parquet; here or in a bucket.

    Raises: UserError, which names the option, where there is nothing, or several splits.
    """
    found = _in_bucket(name, option) if buckets.is_remote(name) else _here(name, option)
    if not found:
        raise UserError(
            f"{option}={name}: no pairs there; give a folder with {' or '.join(TABLES)}, or with "
            "Pick-a-Pic's .parquet files, or a pattern such as FOLDER/train-*.parquet"
        )
    names = [Path(origin.name).name for origin in found]
    splits = sorted({n.partition("-")[0] for n in names if re.fullmatch(r".+-\d+-of-\d+.*", n)})
    if len(splits) > 1:
        raise UserError(
            f"{option}={name} holds the splits {', '.join(splits)}, expected one; give "
            f"{name.rstrip('/')}/{splits[0]}-*.parquet, or that of another"
        )
    return found


def _here(name: str, option: str) -> list[Origin]:
    path = expand(name)
    if path.is_file():
        if path.suffix not in records.SUFFIXES:
            raise UserError(
                f"{option}={name} is a {path.suffix or 'file'}, expected one of "
                f"{', '.join(records.SUFFIXES)}"
            )
        return [_local(path)]
    if path.is_dir():
        tables = [path / table for table in TABLES if (path / table).is_file()]
        return [_local(file) for file in tables[:1] or sorted(path.glob("*.parquet"))]
    if path.parent.is_dir() and path.suffix == ".parquet":
        return [_local(file) for file in sorted(path.parent.glob(path.name))]
    if not path.exists() and not re.search(r"[*?\[]", path.name):
        raise UserError(
            f"{option}={name}: no such file or folder; give a folder with {TABLES[0]} and its "
            "images, or with Pick-a-Pic's .parquet files"
        )
    return []


def _local(path: Path) -> Origin:
    path = path.absolute()
    if path.suffix == ".parquet":
        return Origin(str(path), sampled_digest(path), lambda: path, remote=False)
    images = records.check_images(path)
    stats = [(str(image), image.stat().st_size, image.stat().st_mtime_ns) for image in images]
    return Origin(str(path), f"{digest_of(path)} {stats}", lambda: path, remote=False)


def _in_bucket(url: str, option: str) -> list[Origin]:
    parent, _, last = url.rstrip("/").rpartition("/")
    folder, pattern = (parent, last) if last.endswith(".parquet") else (url, "*.parquet")
    listed = buckets.listing(folder)
    if any(table in listed for table in TABLES):
        return _here(str(buckets.local(url)), option)
    if Path(last).suffix in records.SUFFIXES and last != pattern:
        return _here(str(buckets.local(parent) / last), option)
    names = [name for name in listed if fnmatch.fnmatch(name, pattern) and "/" not in name]
    return [_remote(buckets.child(folder, name), listed[name]) for name in sorted(names)]


def _remote(url: str, version: tuple[str, int]) -> Origin:
    return Origin(url, f"{url} {version}", lambda: buckets.fetch(url), remote=True)


# Pieces.


def load(
    name: str,
    folder: Path,
    processes: int,
    option: str,
) -> Found:
    """The pairs of a source; what was read before is found again.

    Args:
      name: as of `origins`.
      folder: where the pieces are, and go.
      processes: that read files at a time, each a file.
      option: what the user gave `name` as.
    Raises: UserError for what cannot be read.
    """
    found = origins(name, option)
    pieces = [folder / hashlib.sha256(origin.key.encode()).hexdigest()[:16] for origin in found]
    missing = [i for i, piece in enumerate(pieces) if not _is_sealed(piece)]
    if missing:
        _make_all([(found[i], pieces[i]) for i in missing], processes)
    return _together(found, pieces)


def _make_all(missing: list[tuple[Origin, Path]], processes: int) -> None:
    if len(missing) == 1 or processes < 2:
        with log.Progress(len(missing), 0, "data: file of pairs") as progress:
            for done, (origin, piece) in enumerate(missing, 1):
                with log.waiting(f"reading {origin.name}"):
                    make(origin, piece)
                progress.update(done, "")
        return
    # None of the threads and devices of this process is to be copied.
    context = multiprocessing.get_context("spawn")
    with (
        log.Progress(len(missing), 0, "data: file of pairs") as progress,
        concurrent.futures.ProcessPoolExecutor(processes, context, workers.begin) as pool,
    ):
        log.say(f"reading {len(missing)} files of pairs by {processes} processes")
        waiting = [pool.submit(_make_here, *_fetched(*each)) for each in missing]
        try:
            for done, each in enumerate(concurrent.futures.as_completed(waiting), 1):
                each.result()
                progress.update(done, "")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetched(origin: Origin, piece: Path) -> tuple[str, Path, Path, bool]:
    return origin.name, origin.here(), piece, origin.remote


def make(origin: Origin, piece: Path) -> None:
    """Reads one file into a piece, whole. Raises: UserError for a file that cannot be read."""
    _make_here(*_fetched(origin, piece))


def _make_here(
    name: str,
    path: Path,
    piece: Path,
    remote: bool,
) -> None:
    shutil.rmtree(piece, ignore_errors=True)
    faults: list[Fault] = []
    index: dict[str, list] = {column: [] for column in _COLUMNS}
    try:
        _write(piece, _examples(path, index, faults))
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None
    arrays = {column: np.array(index[column], kind) for column, kind in _COLUMNS.items()}
    np.savez(piece / INDEX, **arrays)
    said = [dataclasses.astuple(fault) for fault in faults]
    write_text(piece / FAULTS, json.dumps(said))
    write_text(piece / SEAL, json.dumps(_sizes(piece), indent=1) + "\n")
    if remote:
        path.unlink()  # a copy, of which there is one in the piece now


def _examples(
    path: Path,
    index: dict[str, list],
    faults: list[Fault],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered records of the data source; fills the index and the faults on its way."""
    number = 0
    for row in records.rows(path):
        if isinstance(row, Fault):
            faults.append(row)
            continue
        index["prompt"].append(_hash(row.caption.encode()))
        index["content"].append(_hash(b"".join(hashlib.sha256(i).digest() for i in row.images)))
        index["label_0"].append(row.label_0)
        index["num_examples"].append(row.num_examples)
        images = dict(zip(records.IMAGES, row.images))
        yield number, {"caption": row.caption, **images}
        number += 1
    if number == 0:  # which tfds does not write
        yield 0, {"caption": "", **dict.fromkeys(records.IMAGES, b"")}


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:_HASHED], "little")


def _write(piece: Path, examples: Iterator[tuple[int, dict[str, Any]]]) -> None:
    import tensorflow_datasets as tfds

    # tfds knows a builder by its name; here the folder tells them apart.
    with tfds.core.registered.skip_registration():

        class Pairs(tfds.core.GeneratorBasedBuilder):
            """Preference pairs of one file, in its order, their images still encoded."""

            VERSION = tfds.core.Version(_VERSION)

            def _info(self) -> tfds.core.DatasetInfo:
                # Text takes bytes as they are; Image would encode them anew.
                texts = {name: tfds.features.Text() for name in ("caption", *records.IMAGES)}
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(texts),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
                del dl_manager
                return {"train": examples}

            def _generate_examples(self) -> Iterator:
                return examples

    builder = Pairs(data_dir=str(piece), file_format="array_record")
    quiet = io.StringIO()  # tfds's own bars
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        builder.download_and_prepare()


def _sizes(piece: Path) -> dict[str, int]:
    """Of the files of a piece, but for its seal."""
    found = sorted(file for file in piece.rglob("*") if file.is_file() and file.name != SEAL)
    return {str(file.relative_to(piece)): file.stat().st_size for file in found}


def _is_sealed(piece: Path) -> bool:
    """Whether a piece is there, as large as when it was finished."""
    try:
        return (piece / SEAL).is_file() and read_json(piece / SEAL) == _sizes(piece)
    except ValueError:
        return False


def _together(found: list[Origin], pieces: list[Path]) -> Found:
    parts = []
    faults = []
    for number, (origin, piece) in enumerate(zip(found, pieces, strict=True)):
        with np.load(piece / INDEX) as stored:
            part = dict(stored)
        count = len(part["prompt"])
        part["piece"] = np.full(count, number, np.int32)
        part["record"] = np.arange(count, dtype=np.int32)
        parts.append(part)
        said = json.loads((piece / FAULTS).read_text(encoding="utf-8"))
        faults += [(origin.name, Fault(*each)) for each in said]
    index = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    kinds = [fault.kind for _, fault in faults]
    counts = {"usable": len(index["prompt"])}
    counts |= {kind: kinds.count(kind) for kind in (UNLABELLED, BROKEN, EQUAL, UNKNOWN)}
    real = [(name, fault) for name, fault in faults if fault.kind != UNLABELLED]
    return Found(tuple(pieces), index, tuple(real), counts)


# Which are trained on.


def by_prompt(
    found: Found,
    share: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the pairs to train on, and of those held out, in an order of their own).

    All pairs of a prompt go the same way, which depends on it and the seed alone.

    Args: share, of the prompts, that are held out.
    """
    place = _places(found.index["prompt"], seed)
    held_out = np.flatnonzero(place < share)
    return np.flatnonzero(place >= share), held_out[np.argsort(place[held_out], kind="stable")]


def _places(prompts: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each prompt."""
    unique, which = np.unique(prompts, return_inverse=True)
    hashed = [_hash(f"{seed} {prompt}".encode()) for prompt in unique]
    return (np.array(hashed, np.float64) / 2.0**64)[which]


def shared_prompts(first: Found, second: Found) -> np.ndarray:
    """Numbers of the second's pairs whose prompts the first has too."""
    return np.flatnonzero(np.isin(second.index["prompt"], first.index["prompt"]))
