# SPDX-License-Identifier: Apache-2.0
"""What a config will build and hold, without weights: sizes, mesh, batch, memory per chip."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from di_star_jax import sharding
from di_star_jax.cost import flops
from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.rewards import REWARDS, sources_of
from di_star_jax.sharding import mesh_shape
from di_star_jax.storage import folders

PARTS = SDXL.parts


def model_configs(config) -> tuple[dict[str, dict], list[str]]:
    """What is known of the models before anything is downloaded.

    Returns: config.json by component and by reward, from local folders, else as published; and the
      config's fields that name neither, whose models' sizes are unknown.
    Raises: UserError for a local folder without a readable config.json.
    """
    reference, unknown = config.weights.reference, []
    if Path(reference).is_dir():
        found = _local(Path(reference))
    else:
        found = dict(published.PIPELINES[reference]) if reference in published.PIPELINES else {}
        unknown += [] if found else [f"weights.reference={reference}"]
    for name, source in sources_of(config).items():
        entry = REWARDS[name]
        if source == "" or Path(source).is_dir():
            found[name] = entry.file.read_config(Path(source))
        elif source == entry.weights:
            found[name] = entry.published
        else:
            unknown.append(f"weights.{name}={source}")
    return found, unknown


def _local(folder: Path) -> dict[str, dict]:
    optional = [part for part in PARTS[1:] if (folder / part).is_dir()]
    return {part: folders.read_config(folder, part) for part in ["unet", *optional]}


def abstract_params(configs: dict[str, dict]) -> dict:
    """Shapes of the parameters. Args: configs, as of `model_configs`. Returns: a tree for each."""
    return {
        name: (
            pipeline.abstract_model(known) if name in PARTS else REWARDS[name].file.abstract(known)
        ).params
        for name, known in configs.items()
    }


def parameters(tree) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def activation_bytes(config, width: float = 1.0) -> float:
    """A rough figure of what a device holds for each image of its part of the batch, bytes.

    Args: config; width, the UNet's channels over SDXL's 320.

    Counted on SDXL at 1024 pixels in bfloat16, per image (batch 1 of one network):
      UNet: keeps 0.46 GB and works in 0.80 GB (0.13 and one attention map in float32) with
        recomputation; keeps 13.0 GB (outputs 6.9, attention maps 6.1) without;
      VAE decoder: keeps 1.9 GB and works in 2.4 GB with recomputation; keeps 13.4 GB without.
    The generator's part waits while dL/dx0 is found: by assistant (1 image) and guided reference
    (2), then, these freed, by the reward through the VAE. So: generator + max(3 UNets + work of the
    guided 2, VAE). Scaled by pixels, width and dtype; attention maps grow faster than that, and the
    reward's own network is small beside the VAE. What the TPU compiler makes of the finished step
    (docs/performance.md) is less where memory is short, 2.4 GB an image on v5e, and as much where
    it is not: 4.8 GB on v5p.
    """
    keep, work = (0.46, 0.80) if config.compute.remat_unet != "none" else (13.0, 0.0)
    vae = 4.3 if config.compute.remat_vae != "none" else 13.4
    scale = (
        width * (config.data.resolution / 1024) ** 2 * jnp.dtype(config.compute.dtype).itemsize / 2
    )
    return 1e9 * scale * (keep + max(3 * keep + 2 * work, vae))


def memory_per_chip(config, counts: dict[str, int], shards: int) -> dict[str, float]:
    """Bytes of state on one chip, by purpose.

    Args: counts, parameters by component; shards, chips that share one copy.
    """
    compute = jnp.dtype(config.compute.dtype).itemsize
    unet = counts["unet"]
    moments = 2 if config.optim.b1 else 1  # at b1 = 0 the first is the gradient
    return {
        "generator and assistant, float32": 2 * unet * 4 / shards,
        "Adam's moments of both": 2 * moments * unet * 4 / shards,
        "average of the generator (EMA)": unet * 4 / shards,
        "gradients of both": 2 * unet * 4 / shards,
        f"frozen networks, {config.compute.dtype}": sum(counts.values()) * compute / shards,
        **(
            {"networks picked in loops": unet * compute / shards}
            if config.compute.loop_networks
            else {}
        ),
        # A block's weights are gathered while it is at work; SDXL has its largest in a thirtieth of
        # the UNet.
        "gathered weights": unet / 30 * compute if shards > 1 else 0.0,
    }


def out_of_memory(need: float, have: float, chip: str, config) -> UserError:
    """What to do about it. Args: need, have, GB of one chip."""
    c = config.compute
    return UserError(
        f"the step needs {need:.1f} GB a device, {chip} has {have:.1f}; in this order raise compute.microbatches="
        f"{c.microbatches}, set compute.remat_unet={c.remat_unet!r}, remat_vae={c.remat_vae!r} and remat_reward="
        f"{c.remat_reward!r} to 'full', raise mesh.fsdp={config.mesh.fsdp}, lower data.batch_size={config.data.batch_size}"
    )


def check_memory(config, device: jax.Device, device_count: int) -> None:
    """Refuses a run that cannot fit its devices, before anything is loaded. Raises: UserError.

    Says nothing where the device or the models are not known; what a compiler makes of the step may
    still be more.
    """
    chip = flops.CHIPS.get(flops.chip_of(device.device_kind))
    configs, unknown = model_configs(config)
    if chip is None or unknown:
        return
    data, fsdp, context = mesh_shape(
        config.mesh.data, config.mesh.fsdp, config.mesh.context, device_count
    )
    counts = {name: parameters(tree) for name, tree in abstract_params(configs).items()}
    width = configs["unet"]["block_out_channels"][0] / 320
    each = config.data.batch_size // (data * fsdp) // config.compute.microbatches / context
    need = sum(memory_per_chip(config, counts, fsdp * context).values()) + each * activation_bytes(
        config, width
    )
    if need > chip.memory:
        raise out_of_memory(need / 1e9, chip.memory / 1e9, device.device_kind, config)


def _memory_lines(
    config, counts: dict[str, int], width: float, shards: int, per_device: float
) -> list[str]:
    state, each = memory_per_chip(config, counts, shards), activation_bytes(config, width)
    total = sum(state.values()) + per_device * each
    room = {name: chip.memory - sum(state.values()) for name, chip in flops.CHIPS.items()}
    fits = [chip for chip in room if room[chip] >= per_device * each]
    largest = [f"{chip} {int(room[chip] // each)}" for chip in room if room[chip] >= each]
    return [
        *(f"memory per chip: {size / 1e9:7.2f} GB {name}" for name, size in state.items()),
        f"memory per chip: {per_device * each / 1e9:7.2f} GB activations (estimate), {each / 1e9:.2f} GB an image",
        f"memory per chip: {total / 1e9:7.2f} GB in all; fits {', '.join(fits) or 'none of the known chips'}",
        f"images per chip that fit: {', '.join(largest) or 'none on the known chips; raise mesh.fsdp'}",
    ]


def describe(config, device_count: int) -> list[str]:
    """What the run is, a line each: mesh, batch, parameters, memory per chip.

    Args: config, checked; device_count: devices there are. A dry run of another mesh says so.
    Raises: UserError for an unusable model folder, and where mesh.fsdp cannot split the UNet.
    """
    planned = planned_devices(config, device_count) if config.dry_run else device_count
    data, fsdp, context = mesh_shape(
        config.mesh.data, config.mesh.fsdp, config.mesh.context, planned
    )
    here = (
        f"{device_count} device{'s' if device_count > 1 else ''} ({jax.devices()[0].device_kind})"
    )
    per_device = config.data.batch_size / planned
    where = (
        f" over {here}"
        if planned == device_count
        else f"; this machine has {here}, the plan assumes {planned}"
    )
    lines = [
        f"mesh: data={data} x fsdp={fsdp} x context={context}{where}",
        f"batch: {config.data.batch_size} images of {config.data.resolution} pixels a step, {per_device:g} on a device",
        f"steps: {config.assistant.warmup_steps} of the assistant alone, then {config.train.steps} of both, "
        f"{config.train.steps * config.data.batch_size:,} images",
    ]
    configs, unknown = model_configs(config)
    trees = abstract_params(configs)
    counts = {name: parameters(tree) for name, tree in trees.items()}
    lines += [f"parameters: {count:>13,} {name}" for name, count in counts.items()]
    lines += [f"parameters: unknown before its config.json is here: {field}" for field in unknown]
    if "unet" not in trees:
        return lines
    sharding.params_sharding(AbstractMesh((data, fsdp, context), sharding.AXES), trees["unet"])
    width = configs["unet"]["block_out_channels"][0] / 320
    at_once = per_device / config.compute.microbatches
    return lines + _memory_lines(config, counts, width, fsdp * context, at_once)


def planned_devices(config, device_count: int) -> int:
    """Devices that a dry run is for: this machine's `device_count` if the mesh fits them, else the
    smallest it fits.
    """
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.context]
    given = [size for size in sizes if size > 0]
    product = math.prod(given)
    return device_count if len(given) < 3 and device_count % product == 0 else product
