# SPDX-License-Identifier: Apache-2.0
"""Everything a user can get wrong in a config, refused before any compile or download."""

import math
import os

from di_star_jax.config import fields
from di_star_jax.errors import UserError, suggest
from di_star_jax.objectives import OBJECTIVES, OUTSIDE, WEIGHTINGS
from di_star_jax.prompts.sets import resolve
from di_star_jax.rewards import REWARDS, rewards_used
from di_star_jax.samplers import generator_timesteps
from di_star_jax.sharding import mesh_shape


def check_workdir(workdir: str | None) -> None:
    """Refuses what cannot become a run's folder. Raises: UserError."""
    if not workdir:
        raise UserError(
            "no --workdir; give a folder for checkpoints and results, e.g. --workdir=runs/first"
        )
    if "://" in workdir:
        raise UserError(
            f"workdir={workdir}, expected a folder; mount the bucket (gcsfuse) and give its folder"
        )
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


def check(config, device_count: int) -> None:
    """Refuses a config that cannot run.

    Args:
      config: ConfigDict with the fields of configs/sdxl.py.
      device_count: devices there are, over all hosts, or will be (dry run).
    Raises: UserError for the first thing that is wrong.
    """
    c = config
    _one_of("objective.name", c.objective.name, OBJECTIVES)
    if c.compute.dtype == "float16":
        raise UserError(
            "compute.dtype='float16', in which SDXL's VAE overflows; use 'bfloat16', or 'float32'"
        )
    _one_of("objective.weighting", c.objective.weighting, WEIGHTINGS)
    _one_of("objective.reduction", c.objective.reduction, ("sum", "mean"))
    _one_of("assistant.sharing", c.assistant.sharing, ("x0", "x_t"))
    if c.assistant.sharing == "x_t" and c.assistant.updates != 1:
        raise UserError(
            f"assistant.updates={c.assistant.updates} with assistant.sharing='x_t', in which one forward "
            "pass serves one update; set assistant.updates=1 or assistant.sharing='x0'"
        )
    if c.assistant.sharing == "x_t" and c.compute.loop_networks:
        raise UserError(
            "compute.loop_networks=True with assistant.sharing='x_t', which has no loop; set "
            "compute.loop_networks=False or assistant.sharing='x0'"
        )
    _one_of("compute.dtype", c.compute.dtype, ("bfloat16", "float32"))
    _one_of("compute.attention", c.compute.attention, ("auto", "splash", "cudnn", "xla"))
    for name in ("remat_unet", "remat_vae", "remat_reward"):
        _one_of(f"compute.{name}", c.compute[name], ("none", "dots", "full"))
    _one_of("eval.oracle", c.eval.oracle, ("", "shapes"))
    for section in ("data", "decode"):
        pixels = c[section].resolution
        if pixels < 64 or pixels % 64:
            near = max(64, round(pixels / 64) * 64)
            raise UserError(f"{section}.resolution={pixels} is not a multiple of 64; use {near}")
    _one_of("decode.view", c.decode.view, ("full", "resized", "crop"))
    if c.decode.view != "full" and c.decode.resolution > c.data.resolution:
        raise UserError(
            f"decode.resolution={c.decode.resolution} is more than data.resolution={c.data.resolution}; "
            f"use {c.data.resolution} or less, or decode.view='full'"
        )
    for name, value in fields(c).items():
        if name.rsplit(".", 1)[-1] in _POSITIVE and not value > 0:
            raise UserError(
                f"{name}={value}, expected more than 0; see configs/sdxl.py for a good value"
            )
        if name.rsplit(".", 1)[-1] in _NOT_NEGATIVE and not value >= 0:
            raise UserError(
                f"{name}={value}, expected 0 or more; see configs/sdxl.py for a good value"
            )
    for name in ("b1", "b2"):
        if not 0 <= c.optim[name] < 1:
            raise UserError(
                f"optim.{name}={c.optim[name]}, expected a number in [0, 1); 0.999 is usual for b2"
            )
    for section in ("objective", "assistant"):
        low, high = c[section].t_min, c[section].t_max
        if not 0 <= low <= high <= 999:
            raise UserError(
                f"{section}.t_min={low}, {section}.t_max={high}, expected 0 <= t_min <= t_max <= 999; "
                "20 and 980 are DMD2's"
            )
    for name in c.reward:
        _one_of("reward", name, REWARDS)
        if not isinstance(c.reward[name], (int, float)) or not math.isfinite(c.reward[name]):
            raise UserError(
                f"reward.{name}={c.reward[name]!r}, expected a number; 100 is the paper's for PickScore, 0 is "
                "off"
            )
    for name in c.eval.metrics:
        _one_of("eval.metrics", name, [name for name in c.reward])
    _check_generator(c.generator)
    _check_guidance(c.objective)
    if c.eval.num_per_prompt < 2:
        raise UserError(
            f"eval.num_per_prompt={c.eval.num_per_prompt}, expected 2 or more to measure diversity; use 8"
        )
    _check_mesh(c, device_count)
    if not c.dry_run:
        for section in ("data", "eval"):
            if c[section].prompts:
                _check_prompts(f"{section}.prompts", c[section])
        for name in ("reference", "generator", "assistant", "reward_tokenizer"):
            _check_weights(f"weights.{name}", c.weights[name], _FOLDER)
        for name in rewards_used(c):
            if name in c.weights:
                _check_weights(
                    f"weights.{name}",
                    c.weights[name],
                    "it must hold "
                    + "; ".join(
                        f"{file} ({where})" for file, where in REWARDS[name].file.NEEDED.items()
                    ),
                )


def _check_prompts(option: str, section) -> None:
    name, path = resolve(section.prompts, section.prompts_file, option)
    there = os.path.exists(path) if name else os.path.isfile(path)
    if "://" not in path and not there:
        option = f"{option}_file" if name else option
        raise UserError(
            f"{option}={path}: no such file; give a .txt, .tsv, .csv, .jsonl or .parquet of prompts"
        )


def _check_generator(generator) -> None:
    if not 1 <= generator.steps <= 100:
        raise UserError(
            f"generator.steps={generator.steps}, expected 1 to 100; 1, 2 and 4 are usual"
        )
    times = generator_timesteps(generator)
    if len(times) != generator.steps:
        raise UserError(
            f"generator.timesteps={times} are {len(times)}, but generator.steps={generator.steps}; give as "
            "many, or () for DMD2's"
        )
    if not all(0 <= t <= 999 for t in times) or any(a <= b for a, b in zip(times, times[1:])):
        raise UserError(
            f"generator.timesteps={times}, expected falling numbers in 0..999; 399 is DMD2's for one step, "
            "999, 749, 499, 249 for four"
        )


def _check_guidance(objective) -> None:
    if objective.name in OUTSIDE and objective.omega != 1.0:
        raise UserError(
            f"objective.name={objective.name!r} has its guidance outside, but objective.omega="
            f"{objective.omega} is inside; set objective.omega=1 and objective.alpha_cfg={objective.omega}"
        )
    if objective.name not in OUTSIDE and objective.alpha_cfg != 0.0:
        raise UserError(
            f"objective.alpha_cfg={objective.alpha_cfg} is guidance outside, which objective.name="
            f"{objective.name!r} does not have; set it to 0, or use {', '.join(OUTSIDE)}"
        )


_POSITIVE = {
    "batch_size",
    "huber_c",
    "updates",
    "generator_lr",
    "assistant_lr",
    "eps",
    "clip_norm",
    "half_life_samples",
    "microbatches",
    "steps",
    "log_every",
    "save_every",
    "keep",
    "num_prompts",
}


_NOT_NEGATIVE = {
    "seed",
    "slice",
    "omega",
    "alpha_cfg",
    "sid_alpha",
    "warmup_steps",
    "lr_warmup_steps",
    "weight_decay",
    "eval_every",
}


def _one_of(name: str, value: str, known) -> None:
    if value not in known:
        raise UserError(
            f"{name}={value!r}, expected one of {', '.join(map(repr, known))}{suggest(value, list(known))}"
        )


def _check_mesh(config, device_count: int) -> None:
    data, fsdp, context = mesh_shape(
        config.mesh.data, config.mesh.fsdp, config.mesh.context, device_count
    )
    shares = data * fsdp  # of the batch
    for name, batch in (
        ("data.batch_size", config.data.batch_size),
        *([("eval.batch_size", config.eval.batch_size)] if config.eval.prompts else []),
    ):
        if batch % shares:
            below, above = batch // shares * shares, -(-batch // shares) * shares
            good = f"{below} or {above}" if below else str(above)
            more = "" if below else ", or give several chips one image with mesh.context"
            groups = f"devices of mesh data={data} x fsdp={fsdp}"
            groups = groups if context == 1 else f"groups of {context} {groups} x context={context}"
            raise UserError(
                f"{name}={batch} is not divisible by the {shares} {groups}; use {good}{more}"
            )
    each, parts = config.data.batch_size // shares, config.compute.microbatches
    if each % parts:
        good = " or ".join(str(n) for n in range(1, each + 1) if each % n == 0)
        raise UserError(
            f"compute.microbatches={parts} does not divide the {each} images of a device; use {good}"
        )
    if config.decode.slice and each // parts % config.decode.slice:
        raise UserError(
            f"decode.slice={config.decode.slice} does not divide the {each // parts} images that a device "
            "takes at a time; use 1, or 0 for all at once"
        )
    # SDXL's UNet halves the latents' rows twice, its VAE makes eight of each: every chip needs
    # whole rows at each level.
    seen = config.decode.resolution if config.decode.view != "full" else config.data.resolution
    for name, pixels in (("data.resolution", config.data.resolution), ("decode.resolution", seen)):
        if context > 1 and pixels % (32 * context):
            raise UserError(
                f"mesh.context={context} does not divide the rows of {name}={pixels} at the UNet's lowest "
                f"level; use a {name} that is a multiple of {32 * context}, or a smaller mesh.context"
            )


_FOLDER = (
    "give a folder in diffusers' layout with safetensors, or a name on the Hub such as "
    "stabilityai/stable-diffusion-xl-base-1.0"
)


def _check_weights(name: str, value: str, advice: str) -> None:
    """A path that is not there is refused at once; names on the Hub are looked up when they are
    loaded.
    """
    looks_local = (
        value.startswith((".", "/", "~"))
        or value.count("/") != 1
        or os.path.exists(value.split("/")[0])
    )
    if value and looks_local and not os.path.isdir(value):
        raise UserError(f"{name}={value}: no such folder; {advice}")
