# SPDX-License-Identifier: Apache-2.0
"""A run's denoiser as a whole network, also where only its adapters have learnt."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.models import lora
from di_star_jax.models.lora import Lora
from di_star_jax.pipelines.export import denoiser_in
from di_star_jax.pipelines.families import family_at
from di_star_jax.pipelines.folder import PLAIN, Options, abstract_model, check_like
from di_star_jax.storage import folders, weights
from di_star_jax.storage.checkpoint import Checkpoints

LORA = "lora"  # of a run's metadata


def metadata_of(low_rank: Lora, base: Path) -> dict:
    """What a checkpoint says of the adapters in it. Args: base, the generator's folder."""
    return {LORA: low_rank._asdict() | {"base": folders.digest(base)}}


def lora_in(metadata: dict) -> Lora | None:
    """The reverse of `metadata_of`."""
    if LORA not in metadata:
        return None
    fields = {name: metadata[LORA][name] for name in Lora._fields if name in metadata[LORA]}
    return Lora(**fields | {"targets": tuple(fields["targets"])})


def restored(
    checkpoints: Checkpoints,
    step: int,
    which: str,
    metadata: dict,
    reference: Path | None,
    options: Options = PLAIN,
) -> Any:
    """All parameters of one of a checkpoint's denoisers, adapters merged into their base.

    Args:
      which: "generator", "ema" or "assistant".
      metadata: of `checkpoint.located`.
      reference: folder of the run's reference pipeline; None where no adapters have learnt.
    Raises: UserError where the base is gone, or is another.
    """
    denoiser = abstract_model(metadata["denoiser_config"], options)
    low_rank = lora_in(metadata)
    if low_rank is None or not low_rank.adapts(which):
        return checkpoints.restore_item(step, which, denoiser.params)
    learnt = restored_adapters(checkpoints, step, which, metadata, options)
    base = weights.load(_base_of(which, metadata, reference), denoiser.params)
    return lora.merged(base, learnt, low_rank)


def restored_on_host(
    checkpoints: Checkpoints,
    step: int,
    which: str,
    metadata: dict,
    reference: Path | None,
) -> Any:
    """As `restored`, of the very bytes that the run itself exports. Args: as there."""
    low_rank = lora_in(metadata)
    if low_rank is None or not low_rank.adapts(which):
        return restored(checkpoints, step, which, metadata, reference)
    learnt = restored_adapters(checkpoints, step, which, metadata)
    folder = _base_of(which, metadata, reference)
    return merged_on_host(folder, metadata["denoiser_config"], learnt, low_rank)


def restored_adapters(
    checkpoints: Checkpoints,
    step: int,
    which: str,
    metadata: dict,
    options: Options = PLAIN,
) -> dict:
    """The adapters of one of a checkpoint's denoisers, {ADAPTERS: tree}, float32.

    Args: metadata, of a run whose adapters learn. options: whose shardings count.
    """
    shapes = lora.abstract(abstract_model(metadata["denoiser_config"]).params, lora_in(metadata))
    if options.shardings is not None:
        shapes = sharding.abstract(shapes, options.shardings(shapes))
    return checkpoints.restore_item(step, which, shapes)


def _base_of(
    which: str,
    metadata: dict,
    reference: Path,
) -> Path:
    """The folder of a base. Raises: UserError for another generator than the run began with."""
    family = family_at(reference)
    if which == "assistant":
        folder = denoiser_in(reference, family)
        check_like(folder, metadata["denoiser_config"])
        return folder
    try:
        folder = denoiser_in(folders.resolve(metadata["initial"]), family)
    except UserError as error:
        raise UserError(f"the generator that the run's adapters belong to: {error}") from None
    other = folders.other_world(folder, metadata[LORA]["base"], metadata.get("version"))
    if other:
        raise UserError(f"{other}, which its adapters belong to; put those back")
    check_like(folder, metadata["denoiser_config"])
    return folder


def merged_on_host(
    folder: Path,
    config: dict,
    learnt: dict,
    low_rank: Lora,
) -> dict:
    """As of `restored`, float32 NumPy arrays: no device has room for a whole network beside a run.

    Args: folder, of the base; config, the denoiser's config.json; learnt, if it is spread over
      several hosts, all must call this.
    """
    learnt = jax.tree.map(np.asarray, weights.whole_on_each_host(learnt))
    tensors = dict(weights.stored_tensors(folder))
    base = weights.params_from_tensors(tensors, abstract_model(config).params)
    return lora.merged(base, learnt, low_rank)
