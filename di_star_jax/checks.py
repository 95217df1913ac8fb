# SPDX-License-Identifier: Apache-2.0
"""Everything a user can get wrong in a config, refused before any compile or download.

Each function raises a UserError for the first thing that is wrong.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from di_star_jax.config import fields
from di_star_jax.diffusion import INPUTS, FewStep
from di_star_jax.errors import UserError, suggest
from di_star_jax.models.lora import TARGETS
from di_star_jax.objectives import DISTANCES, OBJECTIVES, OUTSIDE, WEIGHTINGS
from di_star_jax.prompts.sets import resolve
from di_star_jax.rewards import REWARDS, add, listed, rewards_used, scales_of
from di_star_jax.rewards.views import PARTIAL, VIEWS
from di_star_jax.samplers import generator_form
from di_star_jax.sharding import mesh_shape
from di_star_jax.storage.buckets import exists, is_remote
from di_star_jax.storage.checkpoint import check_path
from di_star_jax.storage.files import writable_folder

_CHOICES = {
    "objective.name": OBJECTIVES,
    "objective.distance": DISTANCES,
    "objective.weighting": WEIGHTINGS,
    "objective.reduction": ("sum", "mean"),
    "assistant.sharing": ("x0", "x_t"),
    "compute.dtype": ("bfloat16", "float32"),
    "compute.scores": ("auto", "bfloat16", "float32"),
    "compute.attention": ("auto", "splash", "cudnn", "xla"),
    "compute.remat": ("", "auto"),
    "compute.remat_denoiser": ("none", "dots", "full"),
    "compute.remat_vae": ("none", "dots", "full"),
    "compute.remat_reward": ("none", "dots", "full"),
    "decode.view": VIEWS,
    "eval.oracle": ("", "shapes"),
    "generator.input": ("", *INPUTS),
}
_POSITIVE = (
    "data.batch_size",
    "generator.steps",
    "objective.huber_c",
    "assistant.updates",
    "optim.generator_lr",
    "optim.assistant_lr",
    "optim.b2",
    "optim.eps",
    "optim.clip_norm",
    "ema.half_life_samples",
    "lora.alpha",
    "compute.microbatches",
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "eval.num_prompts",
    "eval.batch_size",
)
_NOT_NEGATIVE = (
    "seed",
    "eval_every",
    "objective.omega",
    "objective.alpha_cfg",
    "objective.sid_alpha",
    "reward.balance",
    "assistant.warmup_steps",
    "optim.lr_warmup_steps",
    "optim.weight_decay",
    "decode.slice",
    "lora.rank",
)
_NEW = (
    "data.prompts_file",
    "data.cache",
    "eval.prompts_file",
    "eval.samples",
    "eval.teacher",
    "reward.custom",
    "reward.custom_scale",
    "assistant.first",
    "generator.input",
    "objective.power",
    "compute.remat",
    "weights.tiny_vae",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "lora.generator",
    "lora.assistant",
    "lora.int8",
)  # copied configs may lack them
_ANY = FewStep((0,))  # a family's, of which nothing is checked
_FOLDER = (
    "give a folder in diffusers' layout with safetensors, or a name on the Hub such as "
    "stabilityai/stable-diffusion-xl-base-1.0"
)

_TINY_VAE = (
    "give the folder of an AutoencoderTiny in diffusers' layout, or a name on the Hub such as "
    "madebyollin/taesdxl"
)


def check_workdir(workdir: str | None) -> None:
    """Refuses what cannot become a run's folder. Raises: UserError."""
    if not workdir:
        raise UserError(
            "no --workdir; give a folder for checkpoints and results, e.g. --workdir=runs/first"
        )
    if is_remote(workdir):
        check_path(workdir)
        return
    parent = os.path.abspath(workdir)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise UserError(
            f"workdir={workdir}: {parent} is a file, expected a folder; give another name"
        )
    if not os.access(parent, os.W_OK):
        raise UserError(
            f"workdir={workdir}: {parent} may not be written; give a folder of your own"
        )
    check_path(workdir)


def make_workdir(workdir: str) -> Path:
    """The folder of a run, made where it is missing and tried. Raises: UserError."""
    return writable_folder(workdir, "workdir")


def check(config, device_count: int) -> None:
    """Refuses a config that cannot run.

    Args:
      config: ConfigDict with the fields of configs/sdxl.py.
      device_count: devices there are, over all hosts, or will be (dry run).
    Raises: UserError for the first thing that is wrong.
    """
    _check_environment()
    _check_values(config)
    _check_sharing(config)
    _check_lora(config)
    _check_pixels(config)
    _check_times(config)
    _check_rewards(config)
    _check_generator(config.generator)
    _check_objective(config.objective)
    _check_mesh(config, device_count)
    if not config.dry_run:
        _check_sources(config, ("reference", "generator", "assistant", "reward_tokenizer"))


def check_prompts(config) -> None:
    """As `check`, of what encodes a config's prompts and nothing else."""
    _check_environment()
    _check_values(config)
    _check_rewards(config)
    _check_sources(config, ("reference", "reward_tokenizer"))


def one_of(
    name: str,
    value: str,
    known,
) -> None:
    """Refuses a value that is not one of the known ones."""
    if value not in known:
        choices = ", ".join(map(repr, known))
        near = suggest(value, list(known))
        raise UserError(f"{name}={value!r}, expected one of {choices}{near}")


def check_signs(
    values: dict[str, Any],
    positive: Sequence[str],
    not_negative: Sequence[str],
    source: str,
) -> None:
    """Args: values, by field; source, the config file that has good ones. Raises: UserError."""
    for name in positive:
        if not values[name] > 0:
            raise UserError(
                f"{name}={values[name]}, expected more than 0; see {source} for a good value"
            )
    for name in not_negative:
        if not values[name] >= 0:
            raise UserError(
                f"{name}={values[name]}, expected 0 or more; see {source} for a good value"
            )


def _check_environment() -> None:
    if jax.config.jax_enable_x64:
        raise UserError(
            "JAX_ENABLE_X64=1 makes 64-bit numbers of what is computed in 32 bits here; unset "
            "JAX_ENABLE_X64"
        )


def _check_values(config) -> None:
    """Choices and ranges of single fields."""
    if config.compute.dtype == "float16":
        raise UserError(
            "compute.dtype='float16', in which SDXL's VAE overflows; use 'bfloat16', or 'float32'"
        )
    values = fields(config)
    for name in (*_CHOICES, *_POSITIVE, *_NOT_NEGATIVE, *_NEW):
        if name not in values:
            raise UserError(f"the config has no field {name}; add it, see configs/sdxl.py")
    for name, known in _CHOICES.items():
        one_of(name, values[name], known)
    check_signs(values, _POSITIVE, _NOT_NEGATIVE, "configs/sdxl.py")
    for name in ("optim.b1", "optim.b2"):
        if not 0 <= values[name] < 1:
            raise UserError(
                f"{name}={values[name]}, expected a number in [0, 1); 0.999 is usual for b2"
            )
    if config.eval.samples < 2:
        raise UserError(
            f"eval.samples={config.eval.samples}, expected 2 or more to measure diversity; use 8"
        )


def _check_sharing(config) -> None:
    if config.assistant.sharing != "x_t":
        return
    if config.assistant.first:
        raise UserError(
            "assistant.first=True with assistant.sharing='x_t', in which both learn from one pass; "
            "set assistant.first=False or assistant.sharing='x0'"
        )
    if config.assistant.updates != 1:
        raise UserError(
            f"assistant.updates={config.assistant.updates} with assistant.sharing='x_t', in which "
            "one forward pass serves one update; set assistant.updates=1 or assistant.sharing='x0'"
        )
    if config.compute.loop_networks:
        raise UserError(
            "compute.loop_networks=True with assistant.sharing='x_t', which has no loop; set "
            "compute.loop_networks=False or assistant.sharing='x0'"
        )


def _check_lora(config) -> None:
    given = config.lora
    if type(given.rank) is not int:
        raise UserError(f"lora.rank={given.rank!r}, expected a whole number; 64 is usual, 0 is off")
    if given.int8 and not (given.rank and given.generator and given.assistant):
        raise UserError(
            f"lora.int8=True with lora.rank={given.rank}, lora.generator={given.generator} and "
            f"lora.assistant={given.assistant}: only what is frozen can be held in 8 bits; set a "
            "rank and both to True, or lora.int8=False"
        )
    if not given.rank:
        return
    for target in given.targets:
        one_of("lora.targets", target, TARGETS)
    if not (given.generator or given.assistant):
        raise UserError(
            f"lora.rank={given.rank} with lora.generator=False and lora.assistant=False, in which "
            "no network has adapters; set one of the two to True, or lora.rank=0"
        )
    if given.generator != given.assistant and config.compute.loop_networks:
        raise UserError(
            f"compute.loop_networks=True with lora.generator={given.generator} and "
            f"lora.assistant={given.assistant}, which are no networks of one form to loop over; "
            "set compute.loop_networks=False"
        )
    if given.assistant and config.weights.assistant:
        raise UserError(
            f"weights.assistant={config.weights.assistant} with lora.assistant=True, whose base is "
            "the reference; leave weights.assistant empty, or set lora.assistant=False"
        )


def _check_pixels(config) -> None:
    for section in ("data", "decode"):
        pixels = config[section].resolution
        if pixels < 64 or pixels % 64:
            near = max(64, round(pixels / 64) * 64)
            raise UserError(f"{section}.resolution={pixels} is not a multiple of 64; use {near}")
    pixels, seen = config.data.resolution, config.decode.resolution
    if config.decode.view in PARTIAL and seen > pixels:
        raise UserError(
            f"decode.resolution={seen} is more than data.resolution={pixels}; use {pixels} or "
            "less, or decode.view='full'"
        )
    if config.decode.view == "tiny" and not config.weights.tiny_vae:
        raise UserError(
            "decode.view='tiny' with weights.tiny_vae='', for no tiny decoder of these latents is "
            "known; give the folder of one (an AutoencoderTiny), or set decode.view='full'"
        )


def _check_times(config) -> None:
    for section in ("objective", "assistant"):
        low, high = config[section].t_min, config[section].t_max
        if not 0 <= low <= high <= 999:
            raise UserError(
                f"{section}.t_min={low}, {section}.t_max={high}, expected 0 <= t_min <= t_max <= "
                "999; 20 and 980 are DMD2's"
            )


def _check_rewards(config) -> None:
    if config.reward.custom:
        add(config.reward.custom, config.data.resolution)
    scales = scales_of(config.reward)
    for name, scale in scales.items():
        one_of("reward", name, REWARDS)
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise UserError(
                f"reward.{name}={scale!r}, expected a number; 100 is the paper's for PickScore, 0 "
                "is off"
            )
    for name in config.eval.metrics:
        one_of("eval.metrics", name, list(scales))
    if config.objective.name == "reward_only" and not any(scales.values()):
        raise UserError(
            "objective.name='reward_only' with all scales in reward 0 trains nothing; set e.g. "
            "reward.pickscore=100, or another objective"
        )
    if config.reward.balance and not any(scales.values()):
        raise UserError(
            f"reward.balance={config.reward.balance:g} with all scales in reward 0 has nothing to "
            "balance; set e.g. reward.pickscore=100, or reward.balance=0"
        )
    if config.reward.balance and config.objective.name == "reward_only":
        raise UserError(
            f"reward.balance={config.reward.balance:g} with objective.name='reward_only', which "
            "has no regulariser to balance; set reward.balance=0, or another objective"
        )


def _check_generator(generator) -> None:
    if generator.steps > 100:
        raise UserError(
            f"generator.steps={generator.steps}, expected 1 to 100; 1, 2 and 4 are usual"
        )
    times = generator_form(generator, _ANY).timesteps
    if len(times) != generator.steps:
        raise UserError(
            f"generator.timesteps={times} are {len(times)}, but generator.steps={generator.steps}; "
            "give as many, or () for DMD2's"
        )
    if generator.steps > 1 and generator.input == "scaled":
        raise UserError(
            f"generator.input='scaled' with generator.steps={generator.steps}, whose first step is "
            "given noise; set generator.input='', or generator.steps=1"
        )
    known = all(isinstance(t, int) and 0 <= t <= 999 for t in times)
    if not known or not all(a > b for a, b in zip(times, times[1:])):
        raise UserError(
            f"generator.timesteps={times}, expected falling numbers in 0..999; 399 is DMD2's for "
            "one step, 999, 749, 499, 249 for four"
        )


def _check_objective(objective) -> None:
    known = OBJECTIVES[objective.name].weightings
    if objective.weighting not in known:
        raise UserError(
            f"objective.weighting={objective.weighting!r} with objective.name={objective.name!r}, "
            f"which has {', '.join(known)}; use one of these"
        )
    if objective.distance == "power" and not objective.power >= 1:
        raise UserError(
            f"objective.power={objective.power}, expected 1 or more; 2 is the squared distance"
        )
    if objective.name not in OUTSIDE and objective.alpha_cfg != 0.0:
        raise UserError(
            f"objective.alpha_cfg={objective.alpha_cfg} is guidance outside, which objective.name="
            f"{objective.name!r} does not have; set it to 0, or use {', '.join(OUTSIDE)}"
        )


def _check_mesh(config, device_count: int) -> None:
    mesh = config.mesh
    shape = mesh_shape(mesh.data, mesh.fsdp, mesh.context, device_count)
    _check_batch("data.batch_size", config.data.batch_size, shape)
    if config.eval.prompts:
        _check_batch("eval.batch_size", config.eval.batch_size, shape)
    data, fsdp, _ = shape
    each = config.data.batch_size // (data * fsdp)
    parts = config.compute.microbatches
    if each % parts:
        good = " or ".join(str(n) for n in range(1, each + 1) if each % n == 0)
        raise UserError(
            f"compute.microbatches={parts} does not divide the {each} images of a device; use "
            f"{good}"
        )
    if config.decode.slice and each // parts % config.decode.slice:
        raise UserError(
            f"decode.slice={config.decode.slice} does not divide the {each // parts} images that a "
            "device takes at a time; use 1, or 0 for all at once"
        )


def _check_batch(
    name: str,
    batch: int,
    shape: tuple[int, int, int],
) -> None:
    """Args: name, of the field; shape, of the mesh."""
    data, fsdp, context = shape
    shares = data * fsdp
    if batch % shares == 0:
        return
    below, above = batch // shares * shares, -(-batch // shares) * shares
    good = f"{below} or {above}" if below else str(above)
    more = "" if below else ", or give several chips one image with mesh.context"
    groups = f"devices of mesh data={data} x fsdp={fsdp}"
    if context > 1:
        groups = f"groups of {context} {groups} x context={context}"
    raise UserError(f"{name}={batch} is not divisible by the {shares} {groups}; use {good}{more}")


def _check_sources(config, names: Sequence[str]) -> None:
    """Files and folders that must be there: all that are not, in one line.

    Args: names, of the weights beside the rewards'.
    """
    wrong = []
    for section in ("data", "eval"):
        if config[section].prompts:
            wrong += _without_prompts(f"{section}.prompts", config[section])
    for name in names:
        wrong += _without_weights(f"weights.{name}", config.weights[name], _FOLDER)
    if config.decode.view == "tiny":
        wrong += _without_weights("weights.tiny_vae", config.weights.tiny_vae, _TINY_VAE)
    for name in rewards_used(scales_of(config.reward), config.eval.metrics):
        if name in config.weights:
            advice = f"it must hold {listed(REWARDS[name].needed)}"
            wrong += _without_weights(f"weights.{name}", config.weights[name], advice)
    if wrong:
        advices = list(dict.fromkeys(advice for _, advice in wrong))
        missing = "; ".join(what for what, _ in wrong)
        raise UserError("; ".join([missing, *advices]))


Missing = list[tuple[str, str]]  # (what is not there, what to do), one or none


def _without_prompts(option: str, section) -> Missing:
    """A file that is not there. Args: section, of the config."""
    name, path = resolve(section.prompts, section.prompts_file, option)
    there = os.path.exists(path) if name else os.path.isfile(path)
    if path.startswith(("http://", "https://")):
        return []
    if is_remote(path):
        there = exists(path)
    if there:
        return []
    option = f"{option}_file" if name else option
    return [
        (f"{option}={path}: no such file", "give a .txt, .tsv, .csv, .jsonl or .parquet of prompts")
    ]


def _without_weights(
    name: str,
    value: str,
    advice: str,
) -> Missing:
    """A path that is not there; names on the Hub are looked up when they are loaded."""
    if is_remote(value):
        return [] if exists(value) else [(f"{name}={value}: no such folder", advice)]
    looks_local = (
        value.startswith((".", "/", "~"))
        or value.count("/") != 1
        or os.path.exists(value.split("/")[0])
    )
    if value and looks_local and not os.path.isdir(value):
        what = "is a file, expected a folder" if os.path.isfile(value) else "no such folder"
        return [(f"{name}={value}: {what}", advice)]
    return []
