# SPDX-License-Identifier: Apache-2.0
"""What a config will build and hold, without weights: sizes, mesh, batch, memory per chip."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from di_star_jax import sharding
from di_star_jax.assembly import has_own_base, lora_of, reference_dtype, reward_sources
from di_star_jax.cost.chips import CHIPS, chip_of
from di_star_jax.errors import UserError
from di_star_jax.models import lora, published
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.families import FAMILIES, family_at
from di_star_jax.pipelines.family import DENOISER, Family
from di_star_jax.rewards import REWARDS
from di_star_jax.storage import buckets, folders

CPU = "cpu"  # its device kind
# Bytes of RAM beside the plan's: Python and the libraries, what the compiler works in, and pictures
# that are scored many at a time. Measured on the shapes world.
PROGRAM = 3.6e9
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Known(NamedTuple):
    """What is known of a run's models before anything is downloaded.

    family: of the reference; None where that is unknown.
    networks, rewards: config.json by component and by reward, from local folders, else as
      published.
    unknown: the config's fields that name neither, whose models' sizes are unknown.
    """

    family: Family | None
    networks: dict[str, dict]
    rewards: dict[str, dict]
    unknown: list[str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's size, known before anything is loaded.

    Args:
      config: checked.
      mesh: devices by axis.
      devices_here: of this machine, for which a dry run need not be; or of the slices named.
      device_kind: of these, as `jax.Device.device_kind` has it.
      parameters: how many, by component and reward.
      unknown: the config's fields that name models of unknown sizes.
      state: bytes on a chip by purpose; {} where the denoiser is unknown.
      image_bytes: on a chip for each image of its part of the batch, an estimate.
      checkpoint_bytes: of one checkpoint; 0 where the denoiser is unknown.
    """

    config: object
    mesh: dict[str, int]
    devices_here: int
    device_kind: str
    parameters: dict[str, int]
    unknown: list[str]
    state: dict[str, float]
    image_bytes: float
    checkpoint_bytes: int = 0

    @property
    def devices(self) -> int:
        """Those that the mesh is made of."""
        return math.prod(self.mesh.values())

    @property
    def images(self) -> float:
        """On a device in a step; less than one where devices share an image."""
        return self.config.data.batch_size / self.devices

    @property
    def activation_bytes(self) -> float:
        """On a chip, of the images it works on at a time."""
        return self.images / self.config.compute.microbatches * self.image_bytes

    @property
    def bytes(self) -> float:
        """On a chip in all."""
        return sum(self.state.values()) + self.activation_bytes

    @property
    def ram(self) -> float:
        """Of a machine whose CPU makes up all devices."""
        return self.bytes * self.devices_here + PROGRAM


def make(
    config,
    device_count: int,
    device_kind: str,
    planned: int | None = None,
) -> Plan:
    """The plan of a run on devices of one kind.

    Args: planned, devices that it is for; None for those given, and of a dry run for as many as the
      mesh asks for.
    Raises: UserError for an unusable model folder, and where the mesh cannot split the denoiser or
      the image.
    """
    if planned is None:
        planned = planned_devices(config, device_count) if config.dry_run else device_count
    sizes = sharding.mesh_shape(config.mesh.data, config.mesh.fsdp, config.mesh.context, planned)
    mesh = dict(zip(sharding.AXES, sizes))
    known = known_models(config)
    trees = abstract_params(_held(config, known))
    counts = {name: parameters(tree) for name, tree in trees.items()}
    state, image_bytes, on_disk = {}, 0.0, 0
    if DENOISER in trees:
        _check_rows(config, known, mesh["context"])
        sharding.params_sharding(AbstractMesh(sizes, sharding.AXES), trees[DENOISER])
        learnt = learnt_counts(config, trees[DENOISER])
        shards = mesh["fsdp"] * mesh["context"]
        state = memory_per_chip(config, counts, shards, learnt)
        if config.lora.rank:
            counts["adapters"] = max(learnt.generator, learnt.assistant)
        image_bytes = activation_bytes(config, *widths(known))
        on_disk = checkpoint_bytes(config, learnt)
    return Plan(
        config,
        mesh,
        device_count,
        device_kind,
        counts,
        known.unknown,
        state,
        image_bytes,
        on_disk,
    )


def _check_rows(
    config,
    known: Known,
    context: int,
) -> None:
    """Each device of a context needs whole rows at each level. Raises: UserError."""
    scale = pipeline.vae_scale(known.networks["vae"]) if "vae" in known.networks else 8
    least = scale * known.family.rows(known.networks[DENOISER]) * context
    seen = {"data.resolution": config.data.resolution}
    if config.decode.view != "full":
        seen["decode.resolution"] = config.decode.resolution
    for name, pixels in seen.items():
        if context > 1 and pixels % least:
            raise UserError(
                f"mesh.context={context} does not divide the rows of {name}={pixels} at the "
                f"denoiser's lowest level; use a {name} that is a multiple of {least}, or a "
                "smaller mesh.context"
            )


def planned_devices(config, device_count: int) -> int:
    """Devices that a dry run is for: this machine's where the mesh fits them, else the fewest."""
    given = [size for size in config.mesh.values() if size > 0]
    product = math.prod(given)
    return device_count if len(given) < 3 and device_count % product == 0 else product


def known_models(config) -> Known:
    """What can be said without a download.

    Raises: UserError for a local folder without a readable config.json.
    """
    reference, rewards, unknown = config.weights.reference, {}, []
    family, networks = None, {}
    if _has_configs(reference):
        family, networks = _local(folders.resolve_tokenizer(reference))
    elif reference in published.PIPELINES:
        name, networks = published.PIPELINES[reference]
        family = FAMILIES[name]
    else:
        unknown.append(f"weights.reference={reference}")
    for name, source in reward_sources(config).items():
        entry = REWARDS[name]
        if source == "":
            rewards[name] = entry.read_config(Path())
        elif _has_configs(source):
            rewards[name] = entry.read_config(folders.resolve_tokenizer(source))
        elif source == entry.weights:
            rewards[name] = entry.published
        else:
            unknown.append(f"weights.{name}={source}")
    return Known(family, networks, rewards, unknown)


def _held(config, known: Known) -> Known:
    """Without the text encoders, where a cache stands for them."""
    if not (config.data.cache and known.family):
        return known
    encoders = known.family.tokenizers.values()
    networks = {name: found for name, found in known.networks.items() if name not in encoders}
    return known._replace(networks=networks)


def _has_configs(source: str) -> bool:
    """Whether a model's config.json can be read without a download of its weights."""
    return buckets.is_remote(source) or Path(source).is_dir()


def _local(folder: Path) -> tuple[Family, dict[str, dict]]:
    family = family_at(folder)
    there = {
        name: part.folder
        for name, part in family.parts.items()
        if name == DENOISER or (folder / part.folder).is_dir()
    }
    return family, {name: pipeline.read_config(folder, part) for name, part in there.items()}


def abstract_params(known: Known) -> dict:
    """Shapes of the parameters, a tree for each network and reward."""
    networks = {k: pipeline.abstract_model(config) for k, config in known.networks.items()}
    rewards = {
        name: REWARDS[name].abstract(config, pipeline.PLAIN)
        for name, config in known.rewards.items()
    }
    return {name: model.params for name, model in (networks | rewards).items()}


def parameters(tree) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def widths(known: Known) -> tuple[float, float]:
    """The denoiser's and the VAE's activations over those of SDXL's at the same pixels.

    Raises: KeyError without a denoiser. A VAE that is not there counts as SDXL's.
    """
    vae = known.networks.get("vae", published.VAE_SDXL)
    first = pipeline.model_class(vae)[1].block_out_channels[0]
    return known.family.width(known.networks[DENOISER]), first / 128


def activation_bytes(
    config,
    width: float = 1.0,
    vae_width: float = 1.0,
) -> float:
    """A rough figure of what a device holds for each image of its part of the batch, bytes.

    Args: config; width, vae_width, as of `widths`.

    Counted on SDXL at 1024 pixels in bfloat16, per image (batch 1 of one network):
      UNet: keeps 0.46 GB and works in 0.80 GB (0.13 and one attention map in float32) with
        recomputation; keeps 13.0 GB (outputs 6.9, attention maps 6.1) without;
      VAE decoder: keeps 1.9 GB and works in 2.4 GB with recomputation; keeps 13.4 GB without.
    The generator's part waits while dL/dx0 is found: by assistant (1 image) and guided reference
    (2), then, these freed, by the reward through the VAE. So: generator + max(3 UNets + work of the
    guided 2, VAE). Scaled by pixels, width, dtypes; attention maps grow faster than that, and the
    reward's own network is small beside the VAE. What the TPU compiler makes of the finished step
    (docs/performance.md) is less where memory is short, 2.4 GB an image on v5e, and as much where
    it is not: 4.8 GB on v5p.

    The decoder has a width of its own: scaled by the denoiser's, four images of PixArt-512 on each
    chip of v5e:2x2 came to 9.5 GB with the state, 18 % less than the compiler's 11.5 (7.1 for 8.9
    with a text cache). Now these are 12.1 and 9.7. SD 1.5, one of four at a time: 10.2 for 11.0.
    """
    keep, work = (0.46, 0.80) if config.compute.remat_denoiser != "none" else (13.0, 0.0)
    vae = 4.3 if config.compute.remat_vae != "none" else 13.4
    pixels = (config.data.resolution / 1024) ** 2
    scale = pixels * jnp.dtype(config.compute.dtype).itemsize / 2
    scores = pixels * reference_dtype(config).itemsize / 2 * (3 * keep + 2 * work)
    return 1e9 * (scale * width * keep + max(width * scores, scale * vae_width * vae))


class Learnt(NamedTuple):
    """How many numbers each network learns: all of its own, or its adapters'."""

    generator: int
    assistant: int


def learnt_counts(config, denoiser) -> Learnt:
    """Args: denoiser, shapes of its parameters.

    Raises: UserError for a rank or targets that do not fit it.
    """
    whole = parameters(denoiser)
    low_rank = lora_of(config)
    if low_rank is None:
        return Learnt(whole, whole)
    adapters = parameters(lora.abstract(denoiser, low_rank))
    return Learnt(*(adapters if low_rank.adapts(name) else whole for name in Learnt._fields))


def memory_per_chip(
    config,
    counts: dict[str, int],
    shards: int,
    learnt: Learnt | None = None,
) -> dict[str, float]:
    """Bytes of state on one chip, by purpose.

    Args: counts, parameters by component; shards, chips that share one copy; learnt, None where
      whole networks learn.
    """
    compute = jnp.dtype(config.compute.dtype).itemsize
    scores = reference_dtype(config)
    denoiser = counts[DENOISER] / shards
    others = sum(counts.values()) / shards - denoiser
    moments = 2 if config.optim.b1 else 1  # at b1 = 0 the first is the gradient
    generator, assistant = learnt or Learnt(counts[DENOISER], counts[DENOISER])
    both = (generator + assistant) / shards
    what = "adapters of " if config.lora.rank else ""
    state = {
        f"{what}generator and assistant, float32": both * 4,
        "Adam's moments of both": moments * both * 4,
        "average of the generator (EMA)": generator / shards * 4,
        "gradients of both": both * 4,
        f"reference, {scores}": denoiser * scores.itemsize,
        f"other frozen networks, {config.compute.dtype}": others * compute,
    }
    if has_own_base(config):
        state[f"base of the generator, {config.compute.dtype}"] = denoiser * compute
    if config.compute.microbatches > 1:
        state["their sums over microbatches"] = state["gradients of both"]
    if config.compute.loop_networks and (has_own_base(config) or not config.lora.rank):
        state["networks picked in loops"] = denoiser * scores.itemsize
    # A block's weights are gathered while it is at work; SDXL has its largest in a thirtieth of
    # the UNet.
    state["gathered weights"] = counts[DENOISER] / 30 * scores.itemsize if shards > 1 else 0.0
    return state


def checkpoint_bytes(config, learnt: Learnt) -> int:
    """What one checkpoint holds: all that learns, its moments, and the generator's average."""
    moments = 2 if config.optim.b1 else 1
    return 4 * ((1 + moments) * sum(learnt) + learnt.generator)


def out_of_memory(
    need: float,
    have: float,
    device_kind: str,
    config,
) -> UserError:
    """What to do about it. Args: need, have, GB of one chip."""
    c = config.compute
    return UserError(
        f"the step needs {need:.1f} GB a device, {device_kind} has {have:.1f}; in this order raise "
        f"compute.microbatches={c.microbatches}, set compute.remat_denoiser={c.remat_denoiser!r}, "
        f"remat_vae={c.remat_vae!r} and remat_reward={c.remat_reward!r} to 'full', raise "
        f"mesh.fsdp={config.mesh.fsdp}, lower data.batch_size={config.data.batch_size}"
    )


def check_memory(plan: Plan, ram: float | None = None) -> None:
    """Refuses a run that cannot fit its devices, before anything is loaded. Raises: UserError.

    Says nothing where the device or the models are not known; what a compiler makes of the step may
    still be more. Args: ram, bytes that this machine has; None to ask it.
    """
    if plan.device_kind == CPU and not plan.unknown:
        have = ram_here() if ram is None else ram
        if plan.ram > have:
            raise UserError(
                f"the run needs about {plan.ram / 1e9:.1f} GB of RAM, this machine has "
                f"{have / 1e9:.1f} and no accelerator that JAX sees; run it on a TPU or GPU "
                "(--config.dry_run=True says on which), or try --config=shapes here"
            )
        return
    chip = CHIPS.get(chip_of(plan.device_kind))
    if chip is None or plan.unknown:
        return
    if plan.bytes > chip.memory:
        need, have = plan.bytes / 1e9, chip.memory / 1e9
        raise out_of_memory(need, have, plan.device_kind, plan.config)


def ram_here() -> float:
    """Bytes of RAM that this process may use: the machine's, or its container's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            limits.append(int(Path(name).read_text(encoding="utf-8")))
    return float(min(limits))


def describe(plan: Plan) -> list[str]:
    """What the run is, a line each: mesh, batch, parameters, memory per chip.

    Of memory only where a chip is known or asked for: on other devices nobody runs out of it.
    """
    lines = [_mesh_line(plan), *_batch_lines(plan)]
    lines += [f"parameters: {count:>13,} {name}" for name, count in plan.parameters.items()]
    lines += [f"parameters: unknown before its config.json is here: {f}" for f in plan.unknown]
    if plan.state and (plan.config.dry_run or chip_of(plan.device_kind)):
        lines += _memory_lines(plan)
    if plan.state and plan.device_kind == CPU and not plan.config.dry_run:
        lines.append(
            f"RAM: about {plan.ram / 1e9:.1f} GB, of which {PROGRAM / 1e9:.1f} are Python, the "
            f"compiler and scoring; this machine has {ram_here() / 1e9:.1f}"
        )
    return lines


def _mesh_line(plan: Plan) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    count = plan.devices_here
    here = f"{count} device{'s' if count > 1 else ''} ({plan.device_kind})"
    if plan.devices == count:
        return f"mesh: {mesh} over {here}"
    return f"mesh: {mesh}; this machine has {here}, the plan assumes {plan.devices}"


def _batch_lines(plan: Plan) -> list[str]:
    c = plan.config
    return [
        f"batch: {c.data.batch_size} images of {c.data.resolution} pixels a step, "
        f"{plan.images:g} on a device",
        f"steps: {c.assistant.warmup_steps} of the assistant alone, then {c.train.steps} of both, "
        f"{c.train.steps * c.data.batch_size:,} images",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    image, activations = plan.image_bytes, plan.activation_bytes
    room = {name: chip.memory - sum(plan.state.values()) for name, chip in CHIPS.items()}
    fits = [name for name in room if room[name] >= activations]
    most = [f"{name} {int(room[name] // image)}" for name in room if room[name] >= image]
    sizes = {
        **plan.state,
        f"activations (estimate), {image / 1e9:.2f} GB an image": activations,
        f"in all; fits {', '.join(fits) or 'none of the known chips'}": plan.bytes,
    }
    images = ", ".join(most) or "none on the known chips; raise mesh.fsdp"
    return [
        *(f"memory per chip: {size / 1e9:7.2f} GB {name}" for name, size in sizes.items()),
        f"images per chip that fit: {images}",
        f"checkpoint: {plan.checkpoint_bytes / 1e9:.2f} GB",
        *_verdict(plan),
    ]


def _verdict(plan: Plan) -> list[str]:
    """Of a chip that is known, and that the plan is for."""
    name = chip_of(plan.device_kind)
    if name is None or plan.devices != plan.devices_here:
        return []
    need, have = plan.bytes / 1e9, CHIPS[name].memory / 1e9
    verdict = "fits" if need <= have else "does not fit; raise compute.microbatches or mesh.fsdp"
    return [f"on {name}: {need:.2f} of {have:.2f} GB, {verdict}"]
