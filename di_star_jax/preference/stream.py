# SPDX-License-Identifier: Apache-2.0
"""Batches of decoded pairs, made by worker processes: what step k sees follows from seed and k."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from di_star_jax.preference import decode, workers
from di_star_jax.preference.records import Pair
from di_star_jax.preference.source import Examples
from di_star_jax.prompts.source import PromptStream

Batch = dict[str, Any]
AHEAD = 2  # batches that a worker has ready


@dataclasses.dataclass(frozen=True)
class Batches:
    """step -> its pairs, decoded: the same in whichever process.

    Args:
      examples: all pairs to train on.
      seed: of the shuffles, one for each pass over them.
      batch_size: pairs a step, over all hosts.
      rows: of the batch, those that this host has.
      size, crop: as of `decode.pixels`.
    """

    examples: Sequence[Pair]
    seed: int
    batch_size: int
    rows: tuple[int, ...]
    size: int
    crop: str

    @functools.cached_property
    def _stream(self) -> PromptStream:
        return PromptStream(self.examples, seed=self.seed, batch_size=self.batch_size)

    def __call__(self, k: int) -> Batch:
        return decoded(self._stream.at(int(k), self.rows), self.size, self.crop)


def decoded(
    pairs: Sequence[Pair],
    size: int,
    crop: str,
) -> Batch:
    """B pairs as arrays.

    Returns: pixels, uint8 [B, 2, size, size, 3]; label_0 and num_examples, float32 [B]; captions, a
      JSON list, which one process sends another faster than a list.
    """
    images = [[decode.pixels(image, size, crop) for image in pair.images] for pair in pairs]
    return {
        "pixels": np.array(images),
        "label_0": np.array([pair.label_0 for pair in pairs], np.float32),
        "num_examples": np.array([pair.num_examples for pair in pairs], np.float32),
        "captions": json.dumps([pair.caption for pair in pairs]),
    }


def tokenized(batch: Batch, tokenize: Callable[[list[str]], Any]) -> Batch:
    """A batch with "prompts", what the network reads, in place of its captions."""
    return {
        "pixels": batch["pixels"],
        "label_0": batch["label_0"],
        "num_examples": batch["num_examples"],
        "prompts": tokenize(json.loads(batch["captions"])),
    }


@contextlib.contextmanager
def batches(
    of_step: Callable[[int], Batch],
    first: int,
    until: int,
    processes: int,
) -> Iterator[Iterator[Batch]]:
    """The batches of the steps first, ..., until - 1, made ahead while the devices work.

    Args: of_step, such as `Batches`; processes, that make them, or 0 for a thread of this one.
    """
    import grain

    steps = grain.MapDataset.range(first, until).map(of_step)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    made = steps.to_iter_dataset(options)
    if processes:
        if not flags.FLAGS.is_parsed():  # as where no command was started; grain looks into its own
            flags.FLAGS.mark_as_parsed()
        many = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=1)
        made = made.mp_prefetch(many, worker_init_fn=workers.begin)
    iterator = iter(made)
    try:
        yield iterator
    finally:
        iterator.close()


def held_out(
    examples: Examples,
    size: int,
    crop: str,
) -> Batch:
    """All of some pairs as one batch, decoded by threads, for Pillow leaves other threads free."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda i: decoded([examples[i]], size, crop), range(len(examples))))
    captions = [caption for part in parts for caption in json.loads(part["captions"])]
    arrays = ("pixels", "label_0", "num_examples")
    return {name: np.concatenate([part[name] for part in parts]) for name in arrays} | {
        "captions": json.dumps(captions)
    }
