# SPDX-License-Identifier: Apache-2.0
"""Image embeddings of a CLIP, and what is computed from them: diversity and Frechet distance."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from di_star_jax import sharding
from di_star_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from di_star_jax.evaluation.images import Shot, counted_batches, missing_from, to_unit
from di_star_jax.evaluation.job import Job
from di_star_jax.evaluation.scores import compiled_first, exact, padded, params_digest
from di_star_jax.evaluation.store import Store
from di_star_jax.pipelines.folder import Options, load_model
from di_star_jax.rewards import REWARDS, resolve
from di_star_jax.rewards.similarity import eight_bit_features
from di_star_jax.storage.files import shown, whole
from di_star_jax.storage.images import images_in
from di_star_jax.storage.open_clip import to_transformers


@dataclasses.dataclass(frozen=True)
class Features:
    """What embeds images.

    name: of the features, in print. digest: sha256 of the parameters.
    embed: uint8 images [N, H, W, 3] -> float32 [N, width], unit vectors; N at most batch_size.
    """

    name: str
    digest: str
    width: int
    batch_size: int
    embed: Callable[[np.ndarray], np.ndarray]


def load_features(job: Job, mesh: Mesh) -> Features:
    """The CLIP of --features, its weights over the mesh.

    Raises: UserError for a folder of another model.
    """
    reward = job.request.features
    batch_size = job.request.batch_size
    folder = resolve(reward, job.sources[reward])
    options = Options(shardings=functools.partial(sharding.params_sharding, mesh))
    config = REWARDS[reward].read_config(folder)
    model = load_model(folder, options, config=config, arrange=to_transformers)

    def embeddings(params, images):
        return eight_bit_features(model.graphdef, params, to_unit(images))

    batch = sharding.batch_spec()
    in_specs = (sharding.params_spec(mesh, model.params), batch)
    run = jax.jit(sharding.on_each(mesh, embeddings, in_specs, batch))

    def embed(images):
        with exact():
            return np.asarray(run(model.params, padded(images, batch_size)))[: len(images)]

    digest = params_digest(model.params)
    name = f"unit CLIP embeddings of {reward} (weights' sha256 {digest[:8]}), bicubic resize"
    embed = compiled_first(embed, "the features")
    return Features(name, digest, model.config["projection_dim"], batch_size, embed)


def _embedded(model: Features, shots: list[Shot]) -> Iterator[tuple[list[Shot], np.ndarray]]:
    """Readable shots with their embeddings [N, D]."""
    parts = counted_batches(shots, model.batch_size, what="features", done="images embedded")
    for part, images in parts:
        if images is not None:
            yield part, model.embed(images)


def features_of(
    shots: list[Shot],
    store: Store,
    model: Features,
) -> np.ndarray:
    """Embeds what the store lacks. Returns: float32 [P, K, D], NaN where unreadable."""
    missing = missing_from(store.features(model.digest, model.width), shots)
    for part, rows in _embedded(model, missing):
        store.add_features(model.digest, [shot.place for shot in part], rows)
    return store.features(model.digest, model.width)


def distance_to_reference(
    features: np.ndarray,
    model: Features,
    reference: Path,
    kept: Path,
) -> tuple[float, str]:
    """Frechet distance to a folder of images or a file of statistics, and a note.

    Args: features [P, K, D] of `model`, NaN where broken; kept, .npz for the statistics of a
      folder, made once.
    """
    ours = FeatureStatistics(model.name)
    ours.update(features.reshape(-1, model.width))
    if reference.is_file() or kept.exists():
        theirs = FeatureStatistics.load(reference if reference.is_file() else kept, model.name)
    else:
        theirs = FeatureStatistics(model.name)
        theirs.update(_features_in(reference, model))
        with whole(kept) as file:
            theirs.save(file)
    count = "an unknown number of" if theirs.count is None else f"{theirs.count:,}"
    left_out = f", {theirs.left_out} more not readable" if theirs.left_out else ""
    return frechet_distance(ours, theirs), (
        f"{ours.count:,} images against {count} of {shown(reference)}{left_out}; {model.name}; "
        "float64, in this package"
    )


def _features_in(folder: Path, model: Features) -> np.ndarray:
    """[N, D] of the images in a folder, NaN where unreadable."""
    shots = [Shot(i, 0, "", file) for i, file in enumerate(images_in(folder))]
    found = np.full((len(shots), model.width), np.nan, np.float32)
    for part, rows in _embedded(model, shots):
        found[[shot.prompt for shot in part]] = rows
    return found
