# SPDX-License-Identifier: Apache-2.0
"""What each metric depends on besides images and prompts: loaded once before anything compiles."""

from pathlib import Path

from jax.sharding import Mesh

from di_star_jax.errors import UserError
from di_star_jax.evaluation import cleanfid, metrics
from di_star_jax.evaluation.features import load_features
from di_star_jax.evaluation.frechet import FeatureStatistics
from di_star_jax.evaluation.images import listing_digest
from di_star_jax.evaluation.job import Job
from di_star_jax.evaluation.scores import load_reward, params_digest
from di_star_jax.rewards import REWARDS, resolve
from di_star_jax.shapes import scenes
from di_star_jax.storage.buckets import local
from di_star_jax.storage.files import digest_of
from di_star_jax.storage.images import images_in


def check_metrics(job: Job, mesh: Mesh) -> dict[str, dict]:
    """Loads what will score, one after the other, so that what is missing or wrong is said early.

    Returns: by metric: weights and their sha256, tokenizer, features, reference.
    Raises: UserError.
    """
    if "frechet" in job.metrics and len(job.shots) < 2:
        raise UserError(
            "--metrics=frechet of one image, expected 2 or more; give more prompts or --samples"
        )
    found: dict[str, dict] = {name: {} for name in job.metrics}
    found |= {name: _of_reward(job, name, mesh) for name in job.metrics if name in REWARDS}
    by_features = [name for name in metrics.BY_FEATURES if name in job.metrics]
    if by_features:
        found |= dict.fromkeys(by_features, _of_features(job, mesh))
    by_clean_fid = [name for name in metrics.BY_CLEAN_FID if name in job.metrics]
    if by_clean_fid:
        cleanfid.check(by_clean_fid, job.request.reference)
    for name in metrics.WITH_REFERENCE:
        if name in job.metrics:
            found[name] = found[name] | _of_reference(job.request.reference)
    if "oracle" in job.metrics:
        for prompt in job.prompts:
            scenes.parse(prompt.text)
    return found


def _of_reward(
    job: Job,
    name: str,
    mesh: Mesh,
) -> dict:
    if REWARDS[name].file:
        file = Path(REWARDS[name].file)
        return {"weights": str(file), "sha256": digest_of(file)}
    source = job.sources[name]
    resolve(name, source)  # before the tokenizer, which is the lesser thing to miss
    found = {"weights": source, "sha256": params_digest(load_reward(job, name, mesh).params)}
    if not REWARDS[name].uses_tokenizer:
        return found
    return found | {"tokenizer": job.tokenizer}


def _of_features(job: Job, mesh: Mesh) -> dict:
    name = job.request.features
    model = load_features(job, mesh)
    reference = job.request.reference
    if "frechet" in job.metrics and local(reference).is_file():
        FeatureStatistics.load(local(reference), model.name)
    return {"features": name, "weights": job.sources[name], "sha256": model.digest}


def _of_reference(reference: str) -> dict:
    return {"reference": reference, "reference_digest": _digest(reference)}


def _digest(reference: str) -> str:
    if reference.startswith(cleanfid.STATISTICS):
        return reference
    path = local(reference)
    if path.is_file():
        return digest_of(path)
    return listing_digest(images_in(path), path)
