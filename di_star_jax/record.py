# SPDX-License-Identifier: Apache-2.0
"""What a run is: in words, and in a file of its workdir that a later start must agree with."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from di_star_jax import disk, lock, log, processes
from di_star_jax.config import fields
from di_star_jax.errors import UserError
from di_star_jax.objectives import OUTSIDE
from di_star_jax.rewards import rewards_used, scales_of
from di_star_jax.stop import Stop
from di_star_jax.storage import files, folders
from di_star_jax.storage.workdir import Workdir

FILE = "config.json"  # in the workdir

# A later start may change these: where and how fast it runs, how often it says and saves, how long
# it goes on, what is measured beside it, and the first remedies for a gradient that is not finite.
# A name ending in . stands for a section.
RESUMABLE = (
    "mesh.",
    "compute.",
    "train.",
    "eval.",
    "eval_every",
    "decode.slice",
    "data.cache",
    "dry_run",
    "optim.generator_lr",
    "optim.assistant_lr",
    "optim.clip_norm",
)
# Compared by content, not by name.
_BY_CONTENT = ("data.prompts", "data.prompts_file")

_DIVERGENCES = {
    "di_star": "score divergence",
    "di_star_outside": "score divergence",
    "sid": "SiD's score distance",
    "kl": "integral KL divergence",
    "kl_outside": "integral KL divergence",
    "reward_only": "no divergence",
}
_DISTANCES = {
    "pseudo_huber": "pseudo-Huber",
    "l2": "squared",
    "huber": "Huber",
    "power": "power",
}
_AT_START = 300.0  # seconds for all processes to come, once they are connected
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "di_star_jax")


def sentence(config, arguments: Sequence[str] = ()) -> str:
    """What a run is, in one line. Args: arguments, of the command line, for what they change."""
    rewards = [f"{scale:g} x {name}" for name, scale in scales_of(config.reward).items() if scale]
    optim = config.optim
    parts = [
        f"{config.objective.name}: {_divergence(config.objective)}, {_guidance(config.objective)}",
        f"reward {' + '.join(rewards)}" if rewards else "no reward",
        f"learning rates {optim.generator_lr:g} (generator) and {optim.assistant_lr:g} (assistant)",
        f"batch {config.data.batch_size}, seed {config.seed}",
        f"{config.train.steps} steps after {config.assistant.warmup_steps} of the assistant alone",
        f"prompts {config.data.prompts}",
    ]
    changed = [f"{name}={value}" for name, value in changes(config, arguments).items()]
    if changed:
        parts.append(f"changed: {', '.join(changed)}")
    return "; ".join(parts)


def _divergence(objective) -> str:
    name = _DIVERGENCES[objective.name]
    if objective.name == "reward_only":
        return name
    distance = f"{_DISTANCES[objective.distance]} " if name == "score divergence" else ""
    return f"{distance}{name} in {objective.weighting}"


def _guidance(objective) -> str:
    if objective.name == "reward_only":
        return "no guidance"
    inside = [] if objective.omega == 1.0 else [f"guidance {objective.omega:g} inside"]
    outside = objective.name in OUTSIDE and objective.alpha_cfg
    parts = inside + [f"guidance {objective.alpha_cfg:g} outside"] * bool(outside)
    return " and ".join(parts) or "no guidance"


def changes(config, arguments: Sequence[str]) -> dict[str, Any]:
    """The config's fields that a command line sets, with their values."""
    names = [arg.lstrip("-").partition("=")[0] for arg in arguments if arg.startswith("-")]
    values = fields(config)
    set_here = [name.removeprefix("config.") for name in names if name.startswith("config.")]
    return {name: values[name] for name in set_here if name in values}


def agree(
    config,
    folder: Path,
    arguments: Sequence[str],
    prompts: str,
    step: int | None,
) -> None:
    """Checks that a workdir's run is the one of `config`, and writes what this start is.

    Args:
      folder: the workdir.
      prompts: digest of those of data.prompts.
      step: of the newest checkpoint; None where there is none, and nothing to agree with.
    Raises: UserError in one line with the fields that differ.
    """
    now = _plain(describe(config, arguments, prompts))
    kept = read(folder) if step is not None else {}
    if step is not None and not kept:
        log.say(
            f"warning: {folder} has no {FILE}, for an older version began it: whether its config "
            "was this one is not checked"
        )
    said = list(kept.get("changes", []))
    if kept:
        _check(folder, kept, now)
        changed = _differences(kept["config"], now["config"])
        if changed:
            log.say(f"changed since the last start: {_told(changed)}")
            said.append({"step": step} | {name: list(both) for name, both in changed.items()})
    processes.gather("config read")
    if jax.process_index() == 0:
        content = now | {"changes": said, "finished": kept.get("finished", {})}
        files.write_text(folder / FILE, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def begun(config, workdir: str) -> Iterator[tuple[Workdir, Stop]]:
    """A run's folder, held until the run ends, with signals listened to.

    Args: workdir, a folder or a gs:// address.
    Raises: UserError where processes are asked for different things, where another run holds the
      folder, and later where the disk is full.
    """
    with processes.one_for_all(), Stop() as stop, contextlib.ExitStack() as stack:
        with stop.free():
            agree_on_start(config)
            stack.enter_context(lock.held(workdir))
        place = stack.enter_context(Workdir(workdir))
        stack.enter_context(disk.full_in_one_line(place.folder))
        log.say(stop.promise())
        yield place, stop


def agree_on_start(config) -> None:
    """Raises: UserError where the processes of a run were not started alike."""
    code = {f"version of {name}": version for name, version in versions().items()}
    devices = {"local devices": jax.local_device_count(), "device": jax.devices()[0].device_kind}
    processes.agree("start", fields(config) | code | devices | {"commit": git_hash()}, _AT_START)


def describe(
    config,
    arguments: Sequence[str],
    prompts: str,
) -> dict[str, Any]:
    """All that is written of a start. Args: prompts, their digest."""
    device = jax.devices()[0]
    rewards = list(rewards_used(scales_of(config.reward), config.eval.metrics))
    found = _weights(fields(config), rewards)
    return {
        "config": fields(config),
        "arguments": [arg for arg in arguments if arg.lstrip("-").startswith("config")],
        "run": sentence(config, arguments),
        "prompts": prompts,
        "weights": {name: folders.digest(folder) for name, folder in found.items()},
        "rewards": rewards,
        "versions": versions(),
        "git": git_hash(),
        "devices": {
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def _weights(config: dict[str, Any], rewards: Sequence[str]) -> dict[str, Path]:
    """Folders of weights that a run uses and that are here, by field. Args: config, its fields."""
    tiny = ("tiny_vae",) if config["decode.view"] == "tiny" else ()
    used = {f"weights.{name}" for name in ("reference", "generator", "assistant", *tiny, *rewards)}
    named = {
        name: Path(files.expand(config[name])) for name in used & config.keys() if config[name]
    }
    return {name: named[name] for name in sorted(named) if named[name].is_dir()}


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a run's numbers depend on; None for what has none."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_hash() -> str | None:
    """The commit of this package's checkout, with -dirty where it has changes; None without."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def read(folder: Path) -> dict[str, Any]:
    """What a workdir says of its run; {} where it says nothing.

    Raises: UserError for a damaged file.
    """
    path = folder / FILE
    try:
        content = files.read_json(path)
        if content and not isinstance(content["config"], dict):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is not what a run wrote; delete it to go on unchecked, or give another workdir"
        ) from None
    return content


def finished(folder: Path) -> dict[str, Any]:
    """{"step", "scored"} of what a run left at its end; {} before."""
    return read(folder).get("finished", {})


def finish(folder: Path, what: dict[str, Any]) -> None:
    """Notes that all results are there. Args: what, as `finished` returns it."""
    if jax.process_index() == 0:
        content = read(folder) | {"finished": what}
        files.write_text(folder / FILE, json.dumps(content, indent=1) + "\n")


def _check(
    folder: Path,
    kept: dict,
    now: dict,
) -> None:
    """Raises: UserError where a later start is another run."""
    check_fields(folder, kept, now, lambda name, both: _may_change(name, both, now))
    known = kept.get("weights")  # an older version did not keep any
    for name, source in _weights(now["config"], now["rewards"]).items():
        if known and name not in known:
            continue  # was not here then
        of_run = known and known[name]
        other = folders.other_world(source, of_run, kept.get("versions", {}).get("di_star_jax"))
        if other:
            raise UserError(
                f"{folder} holds another run: {name}: {other}; give another --workdir, or the "
                "weights it had"
            )
    if kept.get("prompts") not in (None, now["prompts"]):
        raise UserError(
            f"{folder} holds a run on other prompts: data.prompts={now['config']['data.prompts']} "
            "has another content than at its start; give another --workdir, or the prompts it had"
        )


def check_fields(
    folder: Path,
    kept: dict,
    now: dict,
    may_change: Callable[[str, tuple[Any, Any]], bool],
) -> None:
    """Compares the "config" of two starts.

    Args: may_change, whether a field of these two values may differ.
    Raises: UserError with the fields that differ and may not.
    """
    differ = _differences(kept["config"], now["config"])
    refused = {name: both for name, both in differ.items() if not may_change(name, both)}
    if refused:
        raise UserError(
            f"{folder} holds another run: {_told(refused)}; give another --workdir, or the same "
            "values"
        )


def check_kind(folder: Path, field: str) -> None:
    """Raises: UserError where a folder holds a run of another command, without such a field."""
    kept = read(folder)
    if kept and field not in kept["config"]:
        raise UserError(
            f"{folder} holds a run of another command: its {FILE} has no {field}; give another "
            "--workdir"
        )


def _differences(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
    """{field: (old value, new value)}; what one of two versions does not have is no difference."""
    return {
        name: (old[name], value)
        for name, value in new.items()
        if name in old and old[name] != value
    }


def _may_change(
    name: str,
    both: tuple[Any, Any],
    now: dict,
) -> bool:
    if name in _BY_CONTENT:
        return True
    if any(name == free or (free[-1] == "." and name.startswith(free)) for free in RESUMABLE):
        return True
    if not name.startswith("weights."):
        return False
    reward = name.removeprefix("weights.")
    unused = f"reward.{reward}" in now["config"] and reward not in now["rewards"]
    unused |= reward == "tiny_vae" and now["config"]["decode.view"] != "tiny"
    return unused or _gone(both[0])


def _gone(source: str) -> bool:
    """Whether a source of weights was a folder that is not there any more: it has been moved."""
    is_path = source.startswith((".", "/", "~")) or source.count("/") != 1
    return bool(source) and is_path and not os.path.exists(os.path.expanduser(source))


def _told(differ: dict[str, tuple[Any, Any]]) -> str:
    told = [f"{name} was {old!r}, is {new!r}" for name, (old, new) in differ.items()]
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    return "; ".join(told[:8]) + more


def _plain(content: dict) -> dict:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(content))
