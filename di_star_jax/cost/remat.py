# SPDX-License-Identifier: Apache-2.0
"""compute.remat='auto': the least work that fits a device, by what its compiler makes of the step.

Executed FLOP, with all that the backward pass repeats, are counted on traces; what may fit by the
plan's formula is compiled, the least work first, until one fits.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from di_star_jax import log, processes, record
from di_star_jax.config import fields
from di_star_jax.cost import compile as aot
from di_star_jax.cost import flops, plan, policies
from di_star_jax.cost.chips import CHIPS, chip_of
from di_star_jax.cost.plan import OutOfMemory, Plan
from di_star_jax.cost.policies import SPARE, Choice
from di_star_jax.errors import UserError
from di_star_jax.storage import files

FILE = "remat.json"  # in the workdir
TOLERANCE = 0.15  # by which the plan may be wrong
MOST = 6  # compilations, of which the last is what is most likely to fit
# What changes neither the step's memory nor its work: fields, and sections with a dot at the end.
_BESIDE = (
    *policies.FIELDS,
    "seed",
    "eval_every",
    "dry_run",
    "train.",
    "ema.",
    "assistant.warmup_steps",
    "data.prompts",
    "data.prompts_file",
    "data.column",
    "eval.prompts",
    "eval.prompts_file",
    "eval.num_prompts",
    "eval.samples",
    "eval.batch_size",
    "eval.teacher",
    "eval.oracle",
    "optim.generator_lr",
    "optim.assistant_lr",
    "optim.clip_norm",
)


class Tried(NamedTuple):
    """What was compiled. flop: executed of an image; planned, need: bytes, by plan and compiler,
    infinite where the compiler failed.
    """

    choice: Choice
    flop: float
    planned: float
    need: float
    fits: bool


class Found(NamedTuple):
    """compiled: with this choice; None where the compiler was not asked."""

    choice: Choice
    tried: list[Tried]
    compiled: aot.Compiled | None


def settled(
    config,
    mesh: Mesh,
    folder: Path,
) -> Any:
    """The config of a run, with what compute.remat='auto' comes to; any other's as it is.

    The compiler is asked once: the answer is kept in `folder`, for as long as it is the answer to
    the same question. All processes come here, search alike, and take the first one's figures.

    Raises: UserError where nothing fits, and for models of unknown sizes.
    """
    if not policies.is_asked(config):
        return config
    device = mesh.devices.flat[0]
    planned = _planned(config, mesh)
    memory = memory_of(device)
    question = _question(planned, memory)
    # Compared by the first one alone, for the others may see another memory, or another folder.
    kept = json.loads(_of_first(json.dumps(_kept(folder / FILE, question))))
    if kept is not None:
        choice = Choice(**kept)
        log.say(f"compute.remat=auto: {choice}, as {FILE} of an earlier start has it")
        return with_choice(config, choice)
    found = search(config, mesh, memory, effort=0.0)
    if found.tried:  # else the plan has said it
        log.say(told(found, memory, device.device_kind))
    if found.tried and jax.process_index() == 0:
        rows = [
            row._asdict() | {"choice": row.choice._asdict()}
            for row in found.tried
            if math.isfinite(row.need)
        ]
        content = {"question": question, "choice": found.choice._asdict(), "tried": rows}
        files.write_text(folder / FILE, json.dumps(content, indent=1) + "\n")
    return with_choice(config, found.choice)


def with_choice(config, choice: Choice) -> Any:
    """A copy of a config."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(choice.fields)
    return config


def memory_of(device: jax.Device) -> float | None:
    """Bytes that arrays can have on a device; None of a CPU, and of one that is not known.

    Of one that is here what it says itself: a GPU gives JAX a part of its memory.
    """
    here = device.memory_stats() if device in jax.local_devices() else None
    if here and "bytes_limit" in here:
        return here["bytes_limit"]
    chip = CHIPS.get(chip_of(device.device_kind))
    return chip.memory if chip else None


def search(
    config,
    mesh: Mesh,
    memory: float | None,
    effort: float,
) -> Found:
    """Compiles until one fits, MOST times at most; without a memory takes what the plan has.

    Args: memory, bytes of a device; effort, of XLA, as of `compile.compile_work`.
    Raises: UserError where nothing fits, and for models of unknown sizes.
    """
    memory = json.loads(_of_first(json.dumps(memory)))
    planned = _planned(config, mesh)
    if memory is None:
        text = _of_first(json.dumps(Choice.of(planned.config)))  # another process, another RAM
        return Found(Choice(*json.loads(text)), [], None)
    have = policies.room(memory)
    with log.waiting("counting what recomputation costs", "some traces of the step"):
        flop = executed(config, mesh, planned, have)
    tried: list[Tried] = []
    while choice := following(planned.choices, flop, tried, have):
        what = f"compiling the step with {choice} ({len(tried) + 1} of at most {MOST})"
        with log.waiting(what, "minutes for SDXL"):
            need, compiled = _compiled(config, mesh, choice, effort)
        need = float(_of_first(str(need or planned.choices[choice])))
        size = planned.choices[choice]
        tried.append(Tried(choice, flop[choice.policies], size, need, need <= have))
        if tried[-1].fits:
            return Found(choice, tried, compiled)
    log.say(table(tried))
    best = min(tried, key=lambda row: row.need)
    if math.isinf(best.need):
        raise UserError(
            f"compute.remat='auto': the compiler fails on all {len(tried)} choices that were "
            "tried, as said above; set compute.remat='' and choose by the dry run"
        )
    kind = f"{planned.device_kind} with {SPARE:.0%} to spare"
    raise plan.out_of_memory(best.need / 1e9, have / 1e9, kind, with_choice(config, best.choice))


def following(
    sized: Mapping[Choice, float],
    flop: Mapping[tuple[str, str, str], float],
    tried: list[Tried],
    have: float,
) -> Choice | None:
    """What to compile next: of what may fit by the plan the least work; None after all.

    Passed over is what takes as much by the plan as something that did not fit, and what would not
    fit either where the plan is as wrong as it was with the same policies. Of what the compiler
    failed on nothing follows for others. The last one is what is most likely to fit.

    Args: sized, planned bytes; flop, executed, by policies; have, bytes.
    """
    failed = [row for row in tried if not row.fits and math.isfinite(row.need)]
    known = {row.choice for row in tried}

    def may_fit(choice: Choice) -> bool:
        size = sized[choice]
        if size > (1 + TOLERANCE) * have or any(size >= row.planned for row in failed):
            return False
        alike = [row for row in failed if row.choice.policies == choice.policies]
        return all(size * row.need / row.planned <= have for row in alike)

    last = policies.least(sized)
    if len(tried) < MOST - 1:
        may = [choice for choice in sized if choice not in known and may_fit(choice)]
        if may:
            return min(may, key=lambda c: (flop[c.policies], c.coarseness, sized[c]))
    return None if last in known else last


def executed(
    config,
    mesh: Mesh,
    planned: Plan,
    have: float,
) -> dict[tuple[str, str, str], float]:
    """FLOP that a step executes for an image, by policies of denoiser, VAE and rewards.

    What one network repeats does not depend on the others, so a trace of the step is needed for
    each policy of the denoiser, and one of decoder and reward for each of theirs. Parts of a batch,
    one after the other, have the same work.

    Args: planned, have: what is beyond a device's bytes by the plan is not traced.
    """
    near = {c for c, size in planned.choices.items() if size <= (1 + TOLERANCE) * have}
    near |= {policies.least(planned.choices)}
    whole = Choice("full", "full", "full", 1, 0)

    def count(make: Any, choice: Choice) -> float:
        work = make(with_choice(config, choice), mesh)
        return flops.count(work.fn, *work.args) / planned.images

    of_step = {p: count(aot.train_work, whole._replace(denoiser=p)) for p in {c[0] for c in near}}
    behind = count(aot.reward_work, whole)
    of_vae, of_reward = (
        {
            p: count(aot.reward_work, whole._replace(**{name: p})) - behind if p != "full" else 0.0
            for p in {getattr(c, name) for c in near}
        }
        for name in ("vae", "reward")
    )
    return {
        (denoiser, vae, reward): of_step[denoiser] + of_vae[vae] + of_reward[reward]
        for denoiser, vae, reward in sorted({c.policies for c in near})
    }


def told(
    found: Found,
    memory: float | None,
    device_kind: str,
) -> str:
    """What was chosen and why, with the table of what was tried. Args: memory, of a device."""
    if memory is None:
        why = f"as the plan has it, for {device_kind} has no memory of its own that is known"
        return f"compute.remat=auto: {found.choice}: {why}"
    why = f"the first that fits {memory / 1e9:.1f} GB of {device_kind} with {SPARE:.0%} to spare"
    return f"{table(found.tried)}\ncompute.remat=auto: {found.choice}: {why}"


def table(tried: list[Tried]) -> str:
    """A line for each that was compiled."""
    header = [name.split(".")[1] if "." in name else name for name in policies.FIELDS]
    header += ["executed TFLOP an image", "plan, GB", "compiler, GB", "fits"]
    rows = [
        [
            *map(str, row.choice),
            f"{row.flop / 1e12:.4g}",
            f"{row.planned / 1e9:.3g}",
            f"{row.need / 1e9:.3g}" if math.isfinite(row.need) else "failed",
            "yes" if row.fits else "no",
        ]
        for row in tried
    ]
    return log.markdown_table(header, rows)


def _compiled(
    config,
    mesh: Mesh,
    choice: Choice,
    effort: float,
) -> tuple[float, aot.Compiled | None]:
    """(bytes that the compiler wants a device to have, 0 where it does not say; the step).

    Its own faults are said and are no end: XLA finds no tiles for some products on a GPU.
    """
    config = with_choice(config, choice)
    try:
        compiled = aot.compile_work(aot.train_work(config, mesh), config, effort=effort)
    except OutOfMemory as error:
        return error.need, None
    except jax.errors.JaxRuntimeError as error:
        log.say(f"the compiler failed: {str(error).splitlines()[0]}")
        return math.inf, None
    return aot.held(compiled.memory), compiled


def _planned(config, mesh: Mesh) -> Plan:
    config = config.copy_and_resolve_references()
    config.dry_run = False  # for the devices of the mesh
    count, device = mesh.devices.size, mesh.devices.flat[0]
    planned = plan.make(config, count, device.device_kind, count)
    if planned.unknown:
        raise UserError(
            f"compute.remat='auto' with {planned.unknown[0]}, whose sizes are not known before its "
            "config.json is here; give a folder, or set compute.remat=''"
        )
    return planned


def _question(planned: Plan, memory: float | None) -> dict[str, Any]:
    """All that the answer depends on, as JSON has it."""
    asked = {
        name: value
        for name, value in fields(planned.config).items()
        if not any(name == one or (one[-1] == "." and name.startswith(one)) for one in _BESIDE)
    }
    content = {
        "config": asked,
        "parameters": planned.parameters,
        "device": [planned.device_kind, planned.devices, memory],
        "versions": record.versions(),
        "git": record.git_hash(),
        "flags": [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    }
    return json.loads(json.dumps(content))


def _kept(file: Path, question: dict[str, Any]) -> dict[str, Any] | None:
    """The choice of an earlier start that had the same question; None where there is none."""
    try:
        kept = files.read_json(file)
        return Choice(**kept["choice"])._asdict() if kept["question"] == question else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _of_first(text: str) -> str:
    """What the first process says, so that all choose alike."""
    return processes.gather("compute.remat", text)[0]
