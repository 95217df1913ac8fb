# SPDX-License-Identifier: Apache-2.0
"""Images of an evaluation: drawn from prompts, kept as PNG, and with a record of how and by what,
in drawn.json.
"""

import json
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from di_star_jax import drawing, pictures, sample
from di_star_jax import log as metrics
from di_star_jax.errors import UserError
from di_star_jax.evaluation import results
from di_star_jax.evaluation import scores as scoring
from di_star_jax.evaluation.scores import Shot
from di_star_jax.storage.files import read_json, write_text

IMAGES, DRAWN = "images", "drawn.json"


def draw(out: Path, shots: list[Shot], rows: list[int], args, mesh: Mesh) -> dict:
    """Makes the images that are not there yet, as PNG.

    Args:
      out: folder of the evaluation. shots: all images. rows: of the prompts in their published
        file, by index.
      args: flags, as of `sample.define_flags`, and batch_size.
    Returns: what drawn.json holds: how the images were made, by which weights, and at what cost.
    Raises: UserError where images are there that other weights or settings made.
    """
    kept = read_json(out / DRAWN)
    missing = [shot for shot in shots if not shot.file.exists()]
    if kept and not missing:
        return kept
    loaded, times = drawing.load(args.checkpoint, args.which, mesh, jnp.dtype(args.dtype))
    sampling = sample.sampling_of(args, loaded, times)
    record = _continued(out, kept, _how(loaded, sampling), _where(mesh, args.batch_size))
    (out / IMAGES).mkdir(exist_ok=True)
    write_text(out / DRAWN, json.dumps(record))
    make = drawing.make_draw(
        loaded,
        sampler=sampling.sampler,
        timesteps=sampling.timesteps,
        guidance_scale=sampling.guidance_scale,
        mesh=mesh,
    )
    metrics.say(
        f"drawing {len(missing)} images of {record['how']['resolution']} pixels; the first {args.batch_size} "
        "wait for the compiler"
    )
    done = len(shots) - len(missing)
    progress = metrics.Progress(len(shots), done, unit="image")
    for start in range(0, len(missing), args.batch_size):
        part = missing[start : start + args.batch_size]
        padded = part + part[-1:] * (args.batch_size - len(part))  # one shape, one compilation
        began = time.time()
        images = make(
            [shot.text for shot in padded], noise(rows, args.seed, padded, sampling.noise_shape)
        )
        seconds = (time.time() - began) / args.batch_size
        _save(part, images)
        record["seconds"] += [seconds] if start else []  # the first has waited for the compiler
        record["peak_memory_gb"] = max(record["peak_memory_gb"], _peak_memory_gb(mesh))
        write_text(out / DRAWN, json.dumps(record))
        progress.update(done + start + len(part), f"{1 / seconds:.1f} images/s")
    progress.close()
    return record


def _save(shots: list[Shot], images: np.ndarray) -> None:
    def save(shot, image):
        partial = shot.file.with_suffix(".partial")
        pictures.save_png(partial, pictures.to_uint8(image))
        partial.rename(shot.file)

    with ThreadPoolExecutor(scoring.READERS) as writers:
        list(writers.map(save, shots, images))


def _how(loaded, sampling: drawing.Sampling) -> dict:
    """What an image depends on besides prompt and noise, as it is and not as it was asked for."""
    others = {name: model.params for name, model in loaded.models.items() if name != "unet"}
    return {
        "unet_sha256": scoring.params_digest(loaded.models["unet"].params),
        "vae_and_text_sha256": scoring.params_digest(others),
        "sampler": sampling.sampler,
        "timesteps": sampling.timesteps.tolist(),
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


def _continued(out: Path, kept: dict, how: dict, where: dict) -> dict:
    """The record to go on with; what was timed elsewhere is dropped.

    Raises: UserError for images made otherwise.
    """
    for name, now in how.items():
        if kept and kept["how"][name] != now:
            raise UserError(
                f"--out={out} holds images drawn with {name}={results.short(kept['how'][name])}, this "
                f"generator has {results.short(now)}; give another --out"
            )
    if kept and kept["where"] == where:
        return kept
    return {"how": how, "where": where, "seconds": [], "peak_memory_gb": 0.0}


def _peak_memory_gb(mesh: Mesh) -> float:
    stats = mesh.devices.flat[0].memory_stats()
    return (
        stats["peak_bytes_in_use"]
        if stats
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ) / 1e9


def noise(rows: list[int], seed: int, shots: list[Shot], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal, of seed, prompt's row and sample alone.

    Args: rows, of the prompts by index; shots, B; shape, [h, w, C], or [steps, h, w, C] for
      few_step, whose first step has the noise of the others.
    Returns: float32 [B, h, w, C] or [steps, B, h, w, C].
    """
    keys = [
        jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), rows[shot.prompt]), shot.sample)
        for shot in shots
    ]
    z = jax.vmap(lambda key: jax.random.normal(key, shape))(jnp.stack(keys))
    return np.asarray(z if len(shape) == 3 else jnp.moveaxis(z, 1, 0))


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
    seconds, peak = drawn["seconds"], drawn["peak_memory_gb"]
    return {
        "seconds_per_image": statistics.median(seconds) if seconds else None,
        "timed_batches": len(seconds),
        "peak_memory_gb": peak or None,
        "steps": len(drawn["how"]["timesteps"]),
        **drawn["where"],
    }
