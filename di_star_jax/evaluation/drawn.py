# SPDX-License-Identifier: Apache-2.0
"""Images of an evaluation, drawn from prompts; drawn.json says how, by what, and at what cost."""

import json
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from di_star_jax import drawing, log, pictures
from di_star_jax.errors import UserError
from di_star_jax.evaluation.images import Shot
from di_star_jax.evaluation.job import DRAW, IMAGES, Job
from di_star_jax.evaluation.scores import compiled_first, params_digest
from di_star_jax.evaluation.settings import short
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.folder import Pipeline
from di_star_jax.storage.files import read_json, whole, write_text
from di_star_jax.storage.images import THREADS

DRAWN = "drawn.json"


def draw(job: Job, mesh: Mesh) -> dict:
    """Makes the images that are not there yet, as PNG.

    Returns: what drawn.json holds: how the images were made, by which weights, and at what cost.
    Raises: UserError where images are there that other weights or settings made.
    """
    request = job.request
    kept = read_json(job.out / DRAWN)
    missing = [shot for shot in job.shots if not shot.file.exists()]
    if kept and not missing:
        return kept
    dtype = jnp.dtype(request.dtype)
    reference = request.reference_pipeline
    log.say(job.stage(DRAW))
    with log.waiting(f"loading {request.checkpoint}"):
        loaded = drawing.load(request.checkpoint, request.which, mesh, dtype, reference)
    _say_what_is_cut(loaded, [shot.text for shot in missing])
    sampling = drawing.sampling_of(request.sampling, loaded)
    how = _how(loaded, sampling)
    record = _continued(job.out, kept, how, _where(mesh, request.batch_size))
    (job.out / IMAGES).mkdir(exist_ok=True)
    for left in (job.out / IMAGES).glob(".*.partial"):  # by a process that was killed
        left.unlink()
    _keep(job.out, record)
    log.say(
        f"drawing {len(missing)} image{'s' * (len(missing) > 1)} of {how['resolution']} pixels; "
        f"the first {request.batch_size} wait for the compiler"
    )
    return _draw(job, missing, _drawer(job, loaded, sampling, mesh), record)


def _say_what_is_cut(loaded: Pipeline, texts: list[str]) -> None:
    """Benchmarks are what they are: their long prompts are cut, as diffusers does."""
    told = [tokenizer.too_long(dict.fromkeys(texts)) for tokenizer in loaded.tokenizers.values()]
    for line in filter(None, told):
        log.say(f"warning: {line}: they are cut")


ImagesOf = Callable[[list[Shot]], np.ndarray]  # float32 [B, H, W, 3] in [-1, 1]


def _drawer(
    job: Job,
    loaded: Pipeline,
    sampling: drawing.Sampling,
    mesh: Mesh,
) -> ImagesOf:
    draw_prompts = drawing.draw_prompts(loaded, sampling, mesh)

    def images_of(shots):
        rows = [job.prompts[shot.prompt].row for shot in shots]
        samples = [shot.sample for shot in shots]
        z = drawing.noise(job.request.seed, rows, samples, sampling)
        return draw_prompts([shot.text for shot in shots], z)

    return compiled_first(images_of, "the generator")


def _draw(
    job: Job,
    missing: list[Shot],
    images_of: ImagesOf,
    record: dict,
) -> dict:
    """Draws what is missing. Returns: the record with its cost."""
    batch_size = job.request.batch_size
    done = len(job.shots) - len(missing)
    with log.Progress(len(job.shots), done, unit="image") as progress:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            padded = part + part[-1:] * (batch_size - len(part))  # one shape, one compilation
            began = time.time()
            images = images_of(padded)
            seconds = (time.time() - began) / batch_size
            _save(part, images)
            if start > 0:  # the first has waited for the compiler
                record["seconds"].append(seconds)
            record["peak_memory_gb"] = max(record["peak_memory_gb"], _peak_memory_gb())
            _keep(job.out, record)
            progress.update(done + start + len(part), f"{1 / seconds:.1f} images/s")
    return record


def _keep(out: Path, record: dict) -> None:
    write_text(out / DRAWN, json.dumps(record))


def _save(shots: list[Shot], images: np.ndarray) -> None:
    def save(shot, image):
        with whole(shot.file) as file:
            pictures.save_png(file, pictures.to_uint8(image))

    with ThreadPoolExecutor(THREADS) as writers:
        list(writers.map(save, shots, images))


def _how(loaded: Pipeline, sampling: drawing.Sampling) -> dict:
    """What an image depends on besides prompt and noise, as it is and not as it was asked for."""
    others = {name: model.params for name, model in loaded.models.items() if name != DENOISER}
    return {
        "denoiser_sha256": params_digest(loaded.models[DENOISER].params),
        "vae_and_text_sha256": params_digest(others),
        "sampler": sampling.sampler,
        "timesteps": sampling.timesteps.tolist(),
        **{name: np.asarray(value).tolist() for name, value in sampling.settings.items()},
        "guidance_scale": sampling.guidance_scale,
        "resolution": sampling.latent_shape[0] * loaded.vae_scale,
        "latent_shape": list(sampling.latent_shape),
    }


def _where(mesh: Mesh, batch_size: int) -> dict:
    device = mesh.devices.flat[0]
    return {
        "device": f"{mesh.size} x {device.device_kind}",
        "batch_size": batch_size,
        "memory_of": "device" if device.memory_stats() else "process",
    }


def _continued(
    out: Path,
    kept: dict,
    how: dict,
    where: dict,
) -> dict:
    """The record to go on with; what was timed elsewhere is dropped.

    Raises: UserError for images made otherwise.
    """
    for name, now in how.items():
        if kept and kept["how"][name] != now:
            raise UserError(
                f"--out={out} holds images drawn with {name}={short(kept['how'][name])}, this "
                f"generator has {short(now)}; give another --out"
            )
    if kept and kept["where"] == where:
        return kept
    return {"how": how, "where": where, "seconds": [], "peak_memory_gb": 0.0}


def _peak_memory_gb() -> float:
    """Of the first device, or of the process where that does not tell."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cost_of(drawn: dict) -> dict:
    """As results.json holds it: median seconds an image, transfers included and compilation not.

    Args: drawn, or {}.
    """
    if not drawn:
        return {
            "seconds_per_image": None,
            "timed_batches": 0,
            "peak_memory_gb": None,
            "steps": None,
        }
    seconds = drawn["seconds"]
    return {
        "seconds_per_image": statistics.median(seconds) if seconds else None,
        "timed_batches": len(seconds),
        "peak_memory_gb": drawn["peak_memory_gb"] or None,
        "steps": len(drawn["how"]["timesteps"]),
        **drawn["where"],
    }
