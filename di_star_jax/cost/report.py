# SPDX-License-Identifier: Apache-2.0
"""A plan in words, a line each, for a terminal of 100 columns."""

import textwrap

from di_star_jax.cost import advice, policies, work
from di_star_jax.cost.chips import CARDS, CHIPS, FRACTION, chip_of
from di_star_jax.cost.plan import CPU, PROGRAM, ROOM, Plan, memory_of, ram_here

_ADVISED = (24, 48, 80)  # cards that a dry run says how to fit
_TPUS = {name: chip.memory for name, chip in CHIPS.items() if name.startswith(("v", "tpu"))}


def describe(plan: Plan) -> list[str]:
    """What the run is: mesh, batch, parameters, memory, and of a dry run what it takes.

    Of memory only where a chip is known or asked for: on other devices nobody runs out of it.
    """
    lines = [_mesh_line(plan), *_batch_lines(plan), *_remat_lines(plan)]
    lines += [f"parameters: {count:>13,} {name}" for name, count in plan.parameters.items()]
    lines += [f"parameters: unknown before its config.json is here: {f}" for f in plan.unknown]
    dry_run = plan.config.dry_run
    if plan.state and (dry_run or chip_of(plan.device_kind)):
        lines += _memory_lines(plan)
        lines += _work_lines(plan) if dry_run else []
        lines += _verdict(plan)
    if plan.state and plan.device_kind == CPU and not dry_run:
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


def _remat_lines(plan: Plan) -> list[str]:
    """What compute.remat='auto' comes to before a compiler is asked."""
    if not policies.is_asked(plan.config):
        return []
    choice = policies.Choice.of(plan.config)
    if memory_of(plan) is None:
        why = "what follows is of the fields as they are, for a device whose memory is not known"
        more = "; --topology=v5e:4x4 or the like names one" if plan.config.dry_run else ""
        return _wrapped(f"compute.remat=auto: {why}{more}")
    asks = "" if plan.device_kind == CPU else "; before its first step a run asks the compiler"
    return _wrapped(f"compute.remat=auto: {choice}, by the plan's formula{asks}")


def _memory_lines(plan: Plan) -> list[str]:
    lines = [f"{size / 1e9:8.2f} GB {name}" for name, size in plan.state.items()]
    lines += [
        f"{phase.bytes(plan.at_a_time) / 1e9:+8.2f} GB in turn: {name}, {phase.image / 1e9:.2f} GB "
        "an image"
        for name, phase in plan.phases.items()
    ]
    lines.append(f"{plan.bytes / 1e9:8.2f} GB at the peak, an estimate")
    fits = [name for name, memory in _TPUS.items() if plan.fits(memory)]
    cards = [str(size) for size, memory in CARDS.items() if plan.fits(memory)]
    fits += [f"GPUs of {', '.join(cards)} GB"] if cards else []
    of_gpu = {f"{size} GB": memory for size, memory in CARDS.items()}
    named = ", ".join(fits) or "no device that is known"
    return [
        *(f"memory per device: {line}" for line in lines),
        *_wrapped(f"fits, with {1 - ROOM:.0%} to spare: {named}"),
        *_wrapped(f"images at a time that fit a TPU: {_most(plan, _TPUS)}"),
        *_wrapped(f"images at a time that fit a GPU: {_most(plan, of_gpu)}"),
        f"memory of a GPU: of 24 GB {CARDS[24] / 1e9:.1f}, with "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION={FRACTION}",
        f"checkpoint: {plan.checkpoint_bytes / 1e9:.2f} GB",
    ]


def _most(plan: Plan, memory: dict[str, float]) -> str:
    """Images by device, those left out that hold none."""
    found = {name: plan.images_in(size) for name, size in memory.items()}
    return ", ".join(f"{name} {count}" for name, count in found.items() if count) or "none"


def _work_lines(plan: Plan) -> list[str]:
    """FLOPs of a sample, and the time that they would take."""
    found = work.of_plan(plan)
    if found is None:
        return []
    parts = {"denoiser": found.denoiser, "decoder and reward": found.decoder, "text": found.text}
    percent = {name: 100 * part / found.sample for name, part in parts.items() if part}
    shares = ", ".join(f"{name} {_short(share)} %" for name, share in percent.items())
    lines = [f"work: {_short(found.sample / 1e12, 4)} TFLOP a sample: {shares}"]
    c = plan.config
    if c.compute.dtype != "bfloat16":
        return [*lines, "time: not known, for the peaks that are known are of bfloat16"]
    run = c.assistant.warmup_steps * found.warmup + c.train.steps * found.sample
    hours = run * c.data.batch_size / plan.devices / 3600
    on = f"{plan.devices} devices" if plan.devices > 1 else "one device"
    peak = f"{work.UTILISATION * 100:.0f} % of the bfloat16 peak, assumed"
    return [
        *lines,
        *_wrapped(f"seconds a sample at {peak}: {_by_chip(found.sample, plan)}"),
        *_wrapped(f"hours of the run on {on}, likewise: {_by_chip(hours, plan)}"),
    ]


def _by_chip(flop: float, plan: Plan) -> str:
    """How long it takes the chip that the plan is for, or else each; in the unit of flop."""
    here = chip_of(plan.device_kind)
    names: dict[float, list[str]] = {}
    for name, chip in CHIPS.items():
        if here in (None, name):
            names.setdefault(chip.flops * work.UTILISATION, []).append(name)
    return ", ".join(f"{' and '.join(same)} {_short(flop / of)}" for of, same in names.items())


def _short(number: float, digits: int = 2) -> str:
    """With so many digits that say something, and without an exponent where that is readable."""
    return f"{float(f'{number:.{digits}g}'):g}"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent="  ", break_on_hyphens=False)


def _verdict(plan: Plan) -> list[str]:
    """Of the chip that the plan is for; of a dry run for none, how cards would hold it."""
    name = chip_of(plan.device_kind)
    if name and plan.devices == plan.devices_here:
        have = CHIPS[name].memory
        line = f"on {name}: {plan.bytes / 1e9:.2f} of {have / 1e9:.2f} GB, "
        if plan.fits(have):
            return [f"{line}fits"]
        tight = f"has less than {1 - ROOM:.0%} to spare, which a compiler may need"
        verdict = "does not fit" if plan.bytes > have else tight
        return [f"{line}{verdict}", *_advice(plan, name, have)]
    if not plan.config.dry_run:
        return []
    needy = [size for size in _ADVISED if not plan.fits(CARDS[size])]
    return [line for size in needy for line in _advice(plan, f"{size} GB", CARDS[size])]


def _advice(
    plan: Plan,
    name: str,
    memory: float,
) -> list[str]:
    """The fields that make it fit, with what each brings, and what it then takes."""
    steps = advice.to_fit(plan, memory)
    if not steps:
        return [f"to fit {name}: no list of fields is enough"]
    before = [plan, *(after for after, _ in steps)]
    parts = [
        f"{field} ({(after.bytes - earlier.bytes) / 1e9:+.1f} GB)"
        for earlier, (after, field) in zip(before, steps)
    ]
    then = f"{steps[-1][0].bytes / 1e9:.1f} of {memory / 1e9:.1f} GB"
    return _wrapped(f"to fit {name}: {', '.join(parts)}; then {then}")
