# SPDX-License-Identifier: Apache-2.0
"""What a config will build and hold, without weights: sizes, mesh, batch, memory per chip."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from di_star_jax import pipeline
from di_star_jax.config import UserError, mesh_shape
from di_star_jax.models import published

# Usable memory of one chip, GB (10^9 bytes). See a vendor's data sheet.
CHIPS = {"TPU v5e": 17.2, "TPU v4": 34.4, "TPU v6e": 34.4, "H100 or A100-80": 85.9, "TPU v5p": 102.0, "H200": 149.0}
HEADROOM = 0.92  # what of it XLA can give to arrays


def model_configs(config) -> dict[str, dict]:
    """config.json by component, reward included: from local folders, else as published, else refused."""
    reference, reward = Path(config.weights.reference), Path(config.weights.reward)
    if reference.is_dir():
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        found = {part: json.loads((reference / part / "config.json").read_text()) for part in parts
                 if (reference / part / "config.json").is_file()}
    else:
        found = _published("weights.reference", str(reference), published.PIPELINES)
    known = (json.loads((reward / "config.json").read_text()) if reward.is_dir()
             else _published("weights.reward", str(reward), published.REWARDS))
    return {**found, "reward": known}


def _published(field: str, name: str, known: dict) -> dict:
    if name not in known:
        raise UserError(f"{field}={name} is no local folder and not known here, so its size is unknown; give a folder, "
                        f"or {' or '.join(known)}")
    return known[name]


def count_parameters(configs: dict[str, dict]) -> dict[str, int]:
    """Parameters by component. Args: from `model_configs`. Allocates nothing."""
    return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(pipeline.abstract_model(c).params))
            for name, c in configs.items()}


def activation_bytes(config, per_device: float) -> float:
    """A rough figure of what one device holds for its part of the batch, bytes.

    From counted SDXL shapes at 1024 pixels, bfloat16, per image: with recomputation a UNet keeps 0.46 GB and works in
    0.80 GB, a VAE decoder keeps 1.9 GB and works in 2.4 GB; without, 6.4 GiB and 12 GiB. Scaled by pixels and dtype.
    The UNet's and the VAE's peaks do not coincide. At least one image is held by each device.
    """
    pixels = (config.data.resolution / 1024) ** 2 * jnp.dtype(config.compute.dtype).itemsize / 2
    unet = 1.26e9 if config.compute.remat_unet else 6.9e9
    vae = 4.3e9 if config.compute.remat_vae else 12.9e9
    return max(unet, vae) * pixels * max(per_device, 1.0)


def memory_per_chip(config, counts: dict[str, int], fsdp: int, per_device: float) -> dict[str, float]:
    """Bytes on one chip, by purpose. Args: counts from `count_parameters`; fsdp chips share one copy."""
    compute = jnp.dtype(config.compute.dtype).itemsize
    frozen = sum(counts.values()) * compute
    unet = counts["unet"]
    widest = unet / 30 * compute  # gathered weights of the block at work
    return {
        "generator, assistant (float32)": 2 * unet * 4 / fsdp,
        "moments of both": 4 * unet * 4 / fsdp,
        "average (EMA)": unet * 4 / fsdp,
        "gradients of both": 2 * unet * 4 / fsdp,
        "frozen networks": frozen / fsdp,
        "activations (estimate)": activation_bytes(config, per_device) + (widest if fsdp > 1 else 0.0),
    }


def describe(config, device_count: int) -> list[str]:
    """What the run is, a line each: mesh, batch, parameters, memory per chip.

    Args: config, checked; device_count: devices there are. A dry run of another mesh says so.
    Raises: UserError where a model's size cannot be known.
    """
    needed = device_count
    if config.dry_run and config.mesh.fsdp > 0:
        needed = config.mesh.fsdp * max(config.mesh.data, 1)
    data, fsdp = mesh_shape(config.mesh.data, config.mesh.fsdp, needed)
    lines = [f"mesh: data={data} x fsdp={fsdp} over {needed} {jax.devices()[0].device_kind} devices"]
    if needed != device_count:
        lines = [f"mesh: data={data} x fsdp={fsdp}, {needed} devices; this machine has {device_count}, the plan is for "
                 f"{needed}"]
    per_device = config.data.batch_size / needed
    lines.append(f"batch: {config.data.batch_size} images of {config.data.resolution} pixels a step, "
                 f"{per_device:g} on each device")
    configs = model_configs(config)
    counts = count_parameters(configs)
    lines += [f"parameters: {name} {count:,}" for name, count in counts.items()]
    memory = memory_per_chip(config, counts, fsdp, per_device)
    total = sum(memory.values())
    lines += [f"memory per chip: {name} {size / 1e9:.2f} GB" for name, size in memory.items()]
    fits = [chip for chip, size in CHIPS.items() if total <= HEADROOM * 1e9 * size]
    lines.append(f"memory per chip: {total / 1e9:.2f} GB in all; fits {', '.join(fits) or 'none of the known chips'}")
    return lines
