# SPDX-License-Identifier: Apache-2.0
"""Everything a user can get wrong in a config, checked before any compile or download."""

import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: one line that says what was given, what is expected and how to
    fix it.
    """


def exit_on_user_error(main: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`main` (or absl's flag parser), ending with one line on stderr and exit code 2 where the user
    erred.

    Quiets the libraries' information lines too: Orbax has one for every file.
    """
    from absl import flags, logging

    def wrapped(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            return main(argv)
        except (UserError, flags.Error) as error:
            # absl reports a config file's own error with its traceback: the last line says it,
            # after the class.
            line = re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flags, with config errors turned into UserError: missing or broken file, unknown
    field, wrong type.
    """
    from absl import flags

    path = _config_path(argv)
    if path is None and _overrides(argv):
        raise UserError(
            f"--config.{_overrides(argv)[0]} without --config; give e.g. --config=configs/shapes.py first"
        )
    if path is not None and not os.path.isfile(path):
        raise UserError(f"no config file {path}; give e.g. --config=configs/shapes.py")
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"unknown flag --{error.flagname}{suggest(error.flagname, list(flags.FLAGS))}"
        ) from None
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_field(argv, error)) from None
    except (TypeError, ValueError, ImportError, SyntaxError) as error:
        raise UserError(
            f"{path}: {' '.join(str(error).split())}; mend the file, or see configs/sdxl.py"
        ) from None


def fields(config) -> dict[str, Any]:
    """{dotted name: value} of all fields of a ConfigDict."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat |= {f"{name}.{inner}": v for inner, v in fields(value).items()}
        else:
            flat[name] = value
    return flat


def load_config(path: str, *preset: str) -> Any:
    """The ConfigDict of a config file. Raises: UserError where there is no such file, or preset."""
    if not os.path.isfile(path):
        raise UserError(f"no config file {path}; give e.g. configs/shapes.py")
    spec = importlib.util.spec_from_file_location("loaded_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*preset)


def suggest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean ...?" where a known dotted name is near, else ""."""
    last = name.rsplit(".", 1)[-1]
    leaves = {k: k.rsplit(".", 1)[-1] for k in known}
    same = [k for k in known if leaves[k] == last]
    near = difflib.get_close_matches(name, known, 1, 0.6) or [
        k
        for leaf in difflib.get_close_matches(last, leaves.values(), 1, 0.7)
        for k in known
        if leaves[k] == leaf
    ]
    if same:
        near = [max(same, key=lambda k: difflib.SequenceMatcher(None, name, k).ratio())]
    return f", did you mean {near[0]}?" if near else ""


def _overrides(argv: Sequence[str]) -> list[str]:
    """Dotted names of the fields that the command line sets."""
    return [
        arg.lstrip("-")[len("config.") :].split("=", 1)[0]
        for arg in argv
        if arg.lstrip("-").startswith("config.")
    ]


def _config_path(argv: Sequence[str]) -> str | None:
    """The file that --config gives, without the preset after the colon."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            return (value if equals else following).partition(":")[0] or None
    return None


def _unknown_field(argv: Sequence[str], error: Exception) -> str:
    """Names the field of the command line that the config file does not have, or passes on the
    file's own error.
    """
    path = _config_path(argv)
    try:
        known = list(fields(load_config(path)))
    except (AttributeError, KeyError):  # the file itself is at fault
        return f"{path}: {error}; a config file defines get_config(), see configs/sdxl.py"
    for name in _overrides(argv):
        if name not in known:
            return f"unknown config field {name}{suggest(name, known) or '; see configs/sdxl.py for all fields'}"
    return f"{path}: {error}"


def mesh_shape(data: int, fsdp: int, context: int, device_count: int) -> tuple[int, int, int]:
    """(data, fsdp, context) of the mesh, with -1 filled in.

    Raises: UserError where they do not make up `device_count`.
    """
    if data == -1 and fsdp == -1:
        raise UserError(
            "mesh.data=-1 and mesh.fsdp=-1: expected one of them at most; set mesh.fsdp to a number"
        )
    for name, size in (("data", data), ("fsdp", fsdp), ("context", context)):
        if size < 1 and (size != -1 or name == "context"):
            raise UserError(
                f"mesh.{name}={size}, expected 1 or more, or -1 (not context) for what is left; use 1"
            )
    given = f"mesh data={data} x fsdp={fsdp}" + (f" x context={context}" if context > 1 else "")
    data = device_count // (fsdp * context) if data == -1 else data
    fsdp = (
        device_count // (data * context) if fsdp == -1 and data * context <= device_count else fsdp
    )
    if data * fsdp * context != device_count:
        divisors = " or ".join(
            str(n) for n in range(1, device_count + 1) if device_count % (n * context) == 0
        )
        raise UserError(
            f"{given} does not make up the {device_count} devices; set mesh.data=-1 and mesh.fsdp to "
            f"{divisors or 'less, or mesh.context=1'}"
        )
    return data, fsdp, context


def planned_devices(config, device_count: int) -> int:
    """Devices that a dry run is for: this machine's `device_count` if the mesh fits them, else the
    smallest it fits.
    """
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.context]
    given = [size for size in sizes if size > 0]
    product = math.prod(given)
    return device_count if len(given) < 3 and device_count % product == 0 else product


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


def rewards_used(config) -> list[str]:
    """Names of the rewards that a run loads: those it trains on, and those it only measures."""
    return [name for name, scale in config.reward.items() if scale or name in config.eval.metrics]


def generator_timesteps(generator) -> tuple[int, ...]:
    """The times of the generator's steps.

    Args: the config's section; without timesteps they are DMD2's.
    """
    if generator.timesteps:
        return tuple(generator.timesteps)
    if generator.steps == 1:
        return (399,)
    return tuple(999 - i * 1000 // generator.steps for i in range(generator.steps))


def check(
    config,
    device_count: int,
    *,
    objectives: Sequence[str],
    outside: Sequence[str],
    rewards: Mapping[str, Any],
) -> None:
    """Refuses a config that cannot run.

    Args:
      config: ConfigDict with the fields of configs/sdxl.py.
      device_count: devices there are, over all hosts, or will be (dry run).
      objectives: known names of objective.name. outside: those of them with guidance outside.
      rewards: `rewards.REWARDS`: known names in reward and eval.metrics, and what their weights
        must be.
    Raises: UserError for the first thing that is wrong.
    """
    c = config
    _one_of("objective.name", c.objective.name, objectives)
    if c.compute.dtype == "float16":
        raise UserError(
            "compute.dtype='float16', in which SDXL's VAE overflows; use 'bfloat16', or 'float32'"
        )
    _one_of("objective.weighting", c.objective.weighting, ("eps", "score", "x0"))
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
        _one_of("reward", name, rewards)
        if not isinstance(c.reward[name], (int, float)) or not math.isfinite(c.reward[name]):
            raise UserError(
                f"reward.{name}={c.reward[name]!r}, expected a number; 100 is the paper's for PickScore, 0 is "
                "off"
            )
    for name in c.eval.metrics:
        _one_of("eval.metrics", name, [name for name in c.reward])
    _check_generator(c.generator)
    _check_guidance(c.objective, outside)
    if c.eval.num_per_prompt < 2:
        raise UserError(
            f"eval.num_per_prompt={c.eval.num_per_prompt}, expected 2 or more to measure diversity; use 8"
        )
    _check_mesh(c, device_count)
    if not c.dry_run:
        for name in ("data.prompts", "eval.prompts"):
            path = c[name.split(".")[0]].prompts
            if path and not os.path.isfile(path):
                raise UserError(
                    f"{name}={path}: no such file; give a .txt, .tsv, .csv, .jsonl or .parquet of prompts"
                )
        for name in ("reference", "generator", "assistant", "reward_tokenizer"):
            _check_weights(f"weights.{name}", c.weights[name], _FOLDER)
        for name in rewards_used(c):
            if name in c.weights:
                _check_weights(
                    f"weights.{name}",
                    c.weights[name],
                    "it must hold "
                    + "; ".join(
                        f"{file} ({where})" for file, where in rewards[name].file.NEEDED.items()
                    ),
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


def _check_guidance(objective, outside: Sequence[str]) -> None:
    if objective.name in outside and objective.omega != 1.0:
        raise UserError(
            f"objective.name={objective.name!r} has its guidance outside, but objective.omega="
            f"{objective.omega} is inside; set objective.omega=1 and objective.alpha_cfg={objective.omega}"
        )
    if objective.name not in outside and objective.alpha_cfg != 0.0:
        raise UserError(
            f"objective.alpha_cfg={objective.alpha_cfg} is guidance outside, which objective.name="
            f"{objective.name!r} does not have; set it to 0, or use {', '.join(outside)}"
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
