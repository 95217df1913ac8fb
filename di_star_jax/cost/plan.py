# SPDX-License-Identifier: Apache-2.0
"""What a config will build and hold, without weights: sizes, mesh, batch, memory per chip."""

import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from di_star_jax import sharding
from di_star_jax.assembly import has_own_base, is_tiny, lora_of, reference_dtype, reward_sources
from di_star_jax.cost import policies
from di_star_jax.cost.activations import Phase, activations, phases
from di_star_jax.cost.chips import CHIPS, chip_of
from di_star_jax.errors import UserError
from di_star_jax.models import lora, published
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.families import FAMILIES, family_at
from di_star_jax.pipelines.family import DENOISER, TINY_VAE, Family
from di_star_jax.pipelines.folder import Model
from di_star_jax.rewards import REWARDS
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.views import PARTIAL
from di_star_jax.storage import buckets, folders

CPU = "cpu"  # its device kind
# Bytes of RAM beside the plan's: Python and the libraries, what the compiler works in, and pictures
# that are scored many at a time. Measured on the shapes world.
PROGRAM = 3.6e9
# Share of a device's memory that a plan may fill where it is said to fit. XLA's compilers have made
# up to 13 % more of a step than this plan (SD 1.5 on v5e, 11.02 GB for 9.72; docs/performance.md).
ROOM = 0.88
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class OutOfMemory(UserError):
    """A step that a device cannot hold. Attributes: need, have, bytes of a device."""

    def __init__(self, line: str, need: float, have: float):
        super().__init__(line)
        self.need, self.have = need, have


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
    """A run's size, known before anything is loaded. All but what it is given follows from that.

    Args:
      config: checked.
      mesh: devices by axis.
      devices_here: of this machine, for which a dry run need not be; or of the slices named.
      device_kind: of these, as `jax.Device.device_kind` has it.
      known: of its models.
      models: these networks and rewards without weights, by name.
    """

    config: object
    mesh: dict[str, int]
    devices_here: int
    device_kind: str
    known: Known
    models: dict[str, Model | Reward]

    @property
    def unknown(self) -> list[str]:
        """The config's fields that name models of unknown sizes."""
        return self.known.unknown

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """How many, by component and reward, of what the run holds, and "adapters".

        A cache stands for the text encoders.
        """
        left_out = encoders(self.known) if self.config.data.cache else ()
        counts = {
            name: parameters(model.params)
            for name, model in self.models.items()
            if name not in left_out
        }
        if self.config.lora.rank and self.learnt:
            counts["adapters"] = max(self.learnt)
        return counts

    @functools.cached_property
    def learnt(self) -> "Learnt | None":
        """None where the denoiser is unknown. Raises: UserError as of `learnt_counts`."""
        denoiser = self.models.get(DENOISER)
        return denoiser and learnt_counts(self.config, denoiser.params)

    @property
    def shards(self) -> int:
        """Devices that share one copy."""
        return self.mesh["fsdp"] * self.mesh["context"]

    @property
    def state(self) -> dict[str, float]:
        """Bytes on a device by purpose, all the time; {} where the denoiser is unknown."""
        if self.learnt is None:
            return {}
        return memory_per_chip(self.config, self._networks, self.shards, self.learnt)

    @property
    def phases(self) -> dict[str, Phase]:
        """What a device holds beside the state, one after the other; {} as of `state`."""
        if self.learnt is None:
            return {}
        denoiser = self._networks[DENOISER] / self.shards
        grads = gradients_at_once(self.config, self.learnt) / self.shards
        of_image = activations(self.config, *widths(self.known), flash=self._is_flash)
        return phases(self.config, denoiser, grads, of_image)

    @property
    def _is_flash(self) -> bool:
        """Whether long self-attention keeps no maps."""
        asked = self.config.compute.attention
        return asked in ("splash", "cudnn") or (asked == "auto" and self.device_kind != CPU)

    @property
    def _networks(self) -> dict[str, int]:
        return {name: count for name, count in self.parameters.items() if name != "adapters"}

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint; 0 where the denoiser is unknown."""
        return checkpoint_bytes(self.config, self.learnt) if self.learnt else 0

    @property
    def devices(self) -> int:
        """Those that the mesh is made of."""
        return math.prod(self.mesh.values())

    @property
    def images(self) -> float:
        """On a device in a step; less than one where devices share an image."""
        return self.config.data.batch_size / self.devices

    @property
    def at_a_time(self) -> float:
        """Images that a device works on at a time."""
        return self.images / self.config.compute.microbatches

    @property
    def bytes(self) -> float:
        """On a device in all, when it is most."""
        at_most = [phase.bytes(self.at_a_time) for phase in self.phases.values()]
        return sum(self.state.values()) + max(at_most, default=0.0)

    @property
    def ram(self) -> float:
        """Of a machine whose CPU makes up all devices."""
        return self.bytes * self.devices_here + PROGRAM

    def fits(self, memory: float) -> bool:
        """Whether a device of so many bytes holds it, with room for what an estimate lacks."""
        return self.bytes <= ROOM * memory

    def having(self, fields: dict[str, Any]) -> "Plan":
        """The plan with other values of fields on which parameters do not depend."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(fields)
        made = dataclasses.replace(self, config=config)
        # They take long to count, and hundreds of plans may be compared.
        vars(made).update(parameters=self.parameters, learnt=self.learnt)
        return made

    @functools.cached_property
    def choices(self) -> dict[policies.Choice, float]:
        """All that compute.remat='auto' may choose, with the bytes of each."""
        sharing = self.mesh["data"] * self.mesh["fsdp"]
        known = policies.choices(self.config.data.batch_size // sharing)
        return {choice: self.having(choice.fields).bytes for choice in known}

    def images_in(self, memory: float) -> int:
        """The most images at a time with which it `fits` a device of so many bytes; 0 for none."""
        room = ROOM * memory - sum(self.state.values())
        return max(0, min(phase.images(room) for phase in self.phases.values()))


def make(
    config,
    device_count: int,
    device_kind: str,
    planned: int | None = None,
) -> Plan:
    """The plan of a run on devices of one kind.

    Args: planned, devices that it is for; None for those given, and of a dry run for as many as the
      mesh asks for.
    Returns: of a config that asks for compute.remat='auto', with what that is by formula where the
      device's memory is known.
    Raises: UserError for an unusable model folder, and where the mesh cannot split the denoiser or
      the image.
    """
    if planned is None:
        planned = planned_devices(config, device_count) if config.dry_run else device_count
    sizes = sharding.mesh_shape(config.mesh.data, config.mesh.fsdp, config.mesh.context, planned)
    mesh = dict(zip(sharding.AXES, sizes))
    known = known_models(config)
    made = Plan(config, mesh, device_count, device_kind, known, abstract_models(known))
    check_mesh(made)
    memory = memory_of(made)
    if not policies.is_asked(config) or memory is None:
        return made
    return made.having(policies.by_size(made.choices, memory).fields)


def memory_of(plan: Plan) -> float | None:
    """Bytes that a device has for a plan, of a CPU its share of the machine's RAM.

    None where that or the models are unknown, and of a CPU that a dry run is not for.
    """
    chip = CHIPS.get(chip_of(plan.device_kind))
    if plan.learnt is None:
        return None
    if plan.device_kind == CPU and not plan.config.dry_run:
        return (ram_here() - PROGRAM) / plan.devices_here
    return chip.memory if chip else None


def check_mesh(plan: Plan) -> None:
    """Raises: UserError where the mesh cannot split the denoiser or the image."""
    if DENOISER in plan.models:
        _check_rows(plan.config, plan.known, plan.mesh["context"])
        mesh = AbstractMesh(tuple(plan.mesh.values()), sharding.AXES)
        sharding.params_sharding(mesh, plan.models[DENOISER].params)


def _check_rows(
    config,
    known: Known,
    context: int,
) -> None:
    """Each device of a context needs whole rows at each level. Raises: UserError."""
    scale = pipeline.vae_scale(known.networks["vae"]) if "vae" in known.networks else 8
    least = scale * known.family.rows(known.networks[DENOISER]) * context
    seen = {"data.resolution": config.data.resolution}
    if config.decode.view in PARTIAL:
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
    if is_tiny(config):
        tiny = _tiny_vae(config.weights.tiny_vae, networks)
        unknown += [] if tiny else [f"weights.tiny_vae={config.weights.tiny_vae}"]
        networks = networks | ({TINY_VAE: tiny} if tiny else {})
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


def _tiny_vae(source: str, networks: dict[str, dict]) -> dict | None:
    """The tiny decoder's config.json; None where it is unknown. Args: networks, the reference's.

    Raises: UserError as of `check_tiny_vae`.
    """
    found, file = published.TINY_VAES.get(source), source
    if _has_configs(source):
        folder = folders.resolve_tokenizer(source)
        found, file = folders.read_config(folder), str(folder / "config.json")
    if found and "vae" in networks:
        pipeline.check_tiny_vae(found, networks["vae"], file)
    return found


def encoders(known: Known) -> list[str]:
    """Names of the text encoders."""
    return list(known.family.tokenizers.values()) if known.family else []


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


def abstract_models(known: Known) -> dict[str, Model | Reward]:
    """Each network and reward without weights."""
    networks = {k: pipeline.abstract_model(config) for k, config in known.networks.items()}
    rewards = {
        name: REWARDS[name].abstract(config, pipeline.PLAIN)
        for name, config in known.rewards.items()
    }
    return networks | rewards


def parameters(tree) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def widths(known: Known) -> tuple[float, float]:
    """The denoiser's and the decoder's activations over those of SDXL's at the same pixels.

    Raises: KeyError without a denoiser. A VAE that is not there counts as SDXL's.
    """
    vae = known.networks.get("vae", published.VAE_SDXL)
    share = pipeline.model_class(vae)[1].block_out_channels[0] / 128
    if TINY_VAE in known.networks:
        tiny = pipeline.model_class(known.networks[TINY_VAE])[1]
        share = tiny.decoder_block_out_channels[0] / 64
    return known.family.width(known.networks[DENOISER]), share


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


def gradients_at_once(config, learnt: Learnt) -> int:
    """Numbers whose gradients a step holds together; see `step.make_train_step`."""
    looped, sharing = config.compute.loop_networks, config.assistant.sharing
    apart = config.assistant.first or (not looped and sharing == "x0")
    return max(learnt) if apart else sum(learnt)


def memory_per_chip(
    config,
    counts: dict[str, int],
    shards: int,
    learnt: Learnt | None = None,
) -> dict[str, float]:
    """Bytes on one device all the time, by purpose.

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
    # 8 bits: of all but biases, norms, the first and the last layer, 0.2 % of SDXL's UNet.
    kinds = ("int8", "int8") if config.lora.int8 else (config.compute.dtype, f"{scores}")
    own, shared = (denoiser * jnp.dtype(kind).itemsize for kind in kinds)
    state = {
        f"{what}generator and assistant, float32": both * 4,
        "Adam's moments of both": moments * both * 4,
        "average of the generator (EMA)": generator / shards * 4,
        f"reference, {kinds[1]}": shared,
        f"other frozen networks, {config.compute.dtype}": others * compute,
    }
    if has_own_base(config):
        state[f"base of the generator, {kinds[0]}"] = own
    if config.compute.microbatches > 1:
        sums = gradients_at_once(config, Learnt(generator, assistant)) / shards
        state["gradients' sums over microbatches"] = 4 * sums
    # A block's weights are gathered while it is at work; SDXL has its largest in a thirtieth of
    # the UNet.
    if shards > 1:
        state["gathered weights"] = counts[DENOISER] / 30 * scores.itemsize
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
) -> OutOfMemory:
    """What to do about it. Args: need, have, GB of one chip."""
    c = config.compute
    return OutOfMemory(
        f"the step needs {need:.1f} GB a device, {device_kind} has {have:.1f}; in this order raise "
        f"compute.microbatches={c.microbatches}, set compute.remat_denoiser={c.remat_denoiser!r}, "
        f"remat_vae={c.remat_vae!r} and remat_reward={c.remat_reward!r} to 'full', raise "
        f"mesh.fsdp={config.mesh.fsdp}, lower data.batch_size={config.data.batch_size}",
        need * 1e9,
        have * 1e9,
    )


def check_memory(
    plan: Plan,
    ram: float | None = None,
    tolerance: float = 0.0,
) -> None:
    """Refuses a run that cannot fit its devices, before anything is loaded. Raises: UserError.

    Says nothing where the device or the models are not known; what a compiler makes of the step may
    still be more, or less, so that lack of ROOM is no reason.

    Args: ram, bytes that this machine has; None to ask it; tolerance, by which the plan may be
      above the device's memory.
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
    if plan.bytes > (1 + tolerance) * chip.memory:
        need, have = plan.bytes / 1e9, chip.memory / 1e9
        raise out_of_memory(need, have, plan.device_kind, plan.config)


def ram_here() -> float:
    """Bytes of RAM that this process may use: the machine's, or its container's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            limits.append(int(Path(name).read_text(encoding="utf-8")))
    return float(min(limits))
