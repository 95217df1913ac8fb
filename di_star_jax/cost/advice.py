# SPDX-License-Identifier: Apache-2.0
"""Which fields of a config would make it fit a device: the fewest, and what each brings."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from di_star_jax.cost.plan import OutOfMemory, Plan, check_mesh, encoders
from di_star_jax.errors import UserError

# A field and the values to try, in order of what they take away.
Option = tuple[str, list[Any]]


def to_fit(plan: Plan, memory: float) -> list[tuple[Plan, str]]:
    """The shortest list of fields with which a plan fits, [] where there is none.

    Returns: after each field of the list the plan so far, and the field with its value. Of lists
    as short, the first by the order of `options`; of values, the first that is enough.
    Args: memory, bytes that arrays can have on a device.
    """
    known = options(plan)
    for count in range(1, len(known) + 1):
        for chosen in itertools.combinations(known, count):
            names, values = zip(*chosen)
            strongest = zip(names, (of_one[-1] for of_one in values))
            if not _fits(plan, strongest, memory):
                continue
            tried = (zip(names, one_each) for one_each in itertools.product(*values))
            return next(filter(None, (_fits(plan, fields, memory) for fields in tried)))
    return []


def out_of_memory(
    plan: Plan,
    need: float,
    have: float,
) -> OutOfMemory:
    """What a device lacks for a plan, and the fields with which it would fit, in one line.

    Args: need, have, bytes; need may be a compiler's, by which what the plan says is corrected.
    """
    off = max(1.0, need / plan.bytes)
    steps = to_fit(plan, have / off)
    fields = ", ".join(field for _, field in steps)
    then = steps[-1][0].bytes * off / 1e9 if steps else 0.0
    way = f"set {fields} for about {then:.1f}" if steps else "no list of fields is enough"
    return OutOfMemory(
        f"the step needs {need / 1e9:.1f} GB a device, {plan.device_kind} has {have / 1e9:.1f}; "
        f"{way}, or take devices with more memory",
        need,
        have,
    )


def _fits(
    plan: Plan,
    fields: Iterable[tuple[str, Any]],
    memory: float,
) -> list[tuple[Plan, str]]:
    """The plan after each field is set; [] where it does not fit, or they do not go together."""
    steps = []
    for name, value in fields:
        plan = changed(plan, name, value)
        steps.append((plan, f"{name}={value}"))
    if plan.config.lora.int8 and not plan.config.lora.rank:  # only what is frozen
        return []
    try:
        if not plan.fits(memory):
            return []
        check_mesh(plan)
    except UserError:  # a rank above a matrix, a mesh that cannot split the denoiser or the image
        return []
    return steps


def changed(
    plan: Plan,
    name: str,
    value: Any,
) -> Plan:
    """The plan of a config with another value of a field."""
    config = plan.config.copy_and_resolve_references()
    config.update_from_flattened_dict({name: value})
    mesh = plan.mesh
    if name == "mesh.fsdp":
        mesh = mesh | {"data": plan.devices // (value * mesh["context"]), "fsdp": value}
    return dataclasses.replace(plan, config=config, mesh=mesh)


def options(plan: Plan) -> list[Option]:
    """Fields that may bring memory, those first that leave what is computed as it is."""
    c = plan.config
    found: list[Option] = [("compute.microbatches", _microbatches(plan))]
    found += [
        (f"compute.remat_{part}", ["full"])
        for part in ("denoiser", "vae")
        if c.compute[f"remat_{part}"] == "none"
    ]
    if c.compute.loop_networks and not c.lora.rank:
        found.append(("compute.loop_networks", [False]))
    fsdp = plan.mesh["fsdp"]
    copies = plan.mesh["data"]
    found.append(("mesh.fsdp", [fsdp * n for n in range(2, copies + 1) if copies % n == 0]))
    if encoders(plan.known) and not c.data.cache:
        found.append(("data.cache", ["./text_cache"]))
    if c.decode.view == "full" and c.decode.resolution < c.data.resolution:
        found.append(("decode.view", ["resized"]))
    if not c.lora.rank and not c.weights.assistant:
        found.append(("lora.rank", [64]))
    if (c.lora.rank or not c.weights.assistant) and not c.lora.int8:
        found.append(("lora.int8", [True]))
    return [(name, values) for name, values in found if values]


def _microbatches(plan: Plan) -> list[int]:
    """Numbers of parts in which the images of a device can be taken, above the config's."""
    images = round(plan.images)
    size = plan.config.decode.slice
    return [
        parts
        for parts in range(plan.config.compute.microbatches + 1, images + 1)
        if images % parts == 0 and (not size or images // parts % size == 0)
    ]
