# SPDX-License-Identifier: Apache-2.0
"""Scores of image files, kept as they come; an image that cannot be read has none (NaN)."""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from di_star_jax import log, sharding
from di_star_jax.errors import UserError
from di_star_jax.evaluation import measures
from di_star_jax.evaluation.images import Shot, counted_batches, missing_from, to_unit
from di_star_jax.evaluation.job import READ, Job
from di_star_jax.evaluation.metrics import metric_of
from di_star_jax.evaluation.store import Store
from di_star_jax.pipelines.folder import Options
from di_star_jax.rewards import load_rewards
from di_star_jax.rewards.reward import Reward
from di_star_jax.shapes import scenes
from di_star_jax.storage.images import fault_of

READABLE = "readable"  # kept as if it were a metric: which images can be read

# (shots, their images uint8 [N, H, W, 3]) -> scores [N]
Scorer = Callable[[list[Shot], np.ndarray], np.ndarray]


def exact() -> Any:
    """A context in which float32 is multiplied as float32, for scores to have published digits.

    Left to themselves, TPUs multiply float32 in bfloat16 and GPUs in TF32.
    """
    return jax.default_matmul_precision("highest")


def padded(x: np.ndarray, size: int) -> np.ndarray:
    """[N, ...] -> [size, ...], the last repeated: one shape, one compilation."""
    if len(x) == size:
        return x
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def params_digest(params: Any) -> str:
    """sha256 of a tree's names, shapes, dtypes and values, however it lies on the devices."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def load_reward(
    job: Job,
    name: str,
    mesh: Mesh,
) -> Reward:
    """One reward, its weights over the mesh."""
    options = Options(shardings=functools.partial(sharding.params_sharding, mesh))
    return load_rewards({name: job.sources[name]}, job.tokenizer, options)[name]


def by_reward(
    reward: Reward,
    mesh: Mesh,
    batch_size: int,
) -> Scorer:
    """Scores by a reward's `evaluate`. Args: batch_size, a multiple of the mesh's data x fsdp."""

    def evaluate(params, images, prompts):
        return reward.evaluate(params, to_unit(images), prompts)

    batch = sharding.batch_spec()
    in_specs = (sharding.params_spec(mesh, reward.params), batch, batch)
    run = jax.jit(sharding.on_each(mesh, evaluate, in_specs, batch))

    def scorer(shots, images):
        prompts = reward.tokenize([shot.text for shot in shots])
        prompts = jax.tree.map(lambda x: padded(x, batch_size), prompts)
        with exact():
            scores = run(reward.params, padded(images, batch_size), prompts)
        return np.asarray(scores)[: len(shots)]

    return scorer


def by_oracle(shots: list[Shot], images: np.ndarray) -> np.ndarray:
    """As `measures.attributes_right`. Raises: UserError for images of another size than its."""
    height, width = images.shape[1:3]
    if (height, width) != (scenes.SIZE, scenes.SIZE):
        raise UserError(
            f"{shots[0].file} has {width} x {height} pixels, the oracle reads images of "
            f"{scenes.SIZE} x {scenes.SIZE}; leave oracle out of --metrics"
        )
    return measures.attributes_right([shot.text for shot in shots], images)


def _by_saturation(shots: list[Shot], images: np.ndarray) -> np.ndarray:
    return measures.saturation(to_unit(images))


def _by_contrast(shots: list[Shot], images: np.ndarray) -> np.ndarray:
    return measures.contrast(to_unit(images))


def _by_being_readable(shots: list[Shot], images: np.ndarray) -> np.ndarray:
    return np.ones(len(shots))


ON_HOST: dict[str, Scorer] = {
    "oracle": by_oracle,
    "saturation": _by_saturation,
    "contrast": _by_contrast,
    READABLE: _by_being_readable,
}


def score(
    metric: str,
    scorer: Scorer,
    shots: list[Shot],
    store: Store,
    batch_size: int,
) -> np.ndarray:
    """Scores what the store lacks, batch by batch. Returns: all [P, K], NaN where unreadable."""
    missing = missing_from(store.scores(metric), shots)
    for part, images in counted_batches(missing, batch_size, what=metric, done="images scored"):
        if images is not None:
            store.add_scores(metric, [shot.place for shot in part], scorer(part, images))
    return store.scores(metric)


def find_broken(job: Job, store: Store) -> list[Path]:
    """Files that cannot be read as images, each said once.

    Raises: UserError where none can be read.
    """
    log.say(job.stage(READ))
    scorer = ON_HOST[READABLE]
    readable = score(READABLE, scorer, job.shots, store, job.request.batch_size)
    broken = list(dict.fromkeys(shot.file for shot in missing_from(readable, job.shots)))
    if np.isnan(readable).all():
        raise UserError(
            f"none of the {len(job.shots)} images can be read, the first is {broken[0]} "
            f"({fault_of(broken[0])}); give PNG, JPEG or WebP files"
        )
    for file in broken:
        log.say(f"no readable image: {file} ({fault_of(file)}); it is left out")
    return broken


def score_images(
    job: Job,
    store: Store,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """Printed numbers [P, K] of each metric that has one an image."""
    found = {}
    for name in job.scored:
        log.say(job.stage(name))
        scores = store.scores(name)
        if missing_from(scores, job.shots):
            scores = score(name, _scorer(job, name, mesh), job.shots, store, job.request.batch_size)
        found[name] = scores * metric_of(name).factor
    return {name: found[name] for name in job.metrics if name in found}


def _scorer(
    job: Job,
    name: str,
    mesh: Mesh,
) -> Scorer:
    if name in ON_HOST:
        return ON_HOST[name]
    with log.waiting(f"loading {name}"):
        reward = load_reward(job, name, mesh)
    return compiled_first(by_reward(reward, mesh, job.request.batch_size), name)


def compiled_first(function: Callable, name: str) -> Callable:
    """`function`, whose first call says that it waits for the compiler. Args: name, in print."""
    waits = [log.waiting(f"compiling {name}")]

    def call(*arguments):
        with waits.pop() if waits else contextlib.nullcontext():
            return function(*arguments)

    return call
