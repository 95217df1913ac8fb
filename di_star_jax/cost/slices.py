# SPDX-License-Identifier: Apache-2.0
"""TPU slices by name."""

import math
import re
from typing import NamedTuple

from di_star_jax.cost import gpus
from di_star_jax.cost.chips import device_kind
from di_star_jax.errors import UserError

EXAMPLES = "v5e:4x4, v6e:2x4, v5p:2x2x1 or tpu7x:2x2x1, and 2xv5e:4x4 for two slices"


class Generation(NamedTuple):
    """prefix: of Cloud's accelerator types; units: that such a type counts for a chip; devices:
    that JAX sees of a chip; dimensions: of a slice's shape.
    """

    prefix: str
    units: int
    devices: int
    dimensions: int


GENERATIONS = {
    "v4": Generation("v4", 2, 1, 3),
    "v5e": Generation("v5litepod", 1, 1, 2),
    "v5p": Generation("v5p", 2, 1, 3),
    "v6e": Generation("v6e", 1, 1, 2),
    "tpu7x": Generation("tpu7x", 2, 2, 3),
}


class Slices(NamedTuple):
    """generation: a key of GENERATIONS; shape: of one, as "4x4"; count: of slices."""

    generation: str
    shape: str
    count: int

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(int(n) for n in self.shape.split("x"))

    @property
    def devices(self) -> int:
        """That JAX sees, of all slices."""
        return self.count * self.chips * GENERATIONS[self.generation].devices

    @property
    def device_kind(self) -> str:
        """As `jax.Device.device_kind` has it."""
        return device_kind(self.generation)

    @property
    def accelerator_type(self) -> str:
        """Cloud's name for one slice, such as v5litepod-16."""
        generation = GENERATIONS[self.generation]
        return f"{generation.prefix}-{self.chips * generation.units}"


def parse(name: str) -> Slices:
    """Args: name, as "v5e:4x4", or "2xv5e:4x4" for two slices. Raises: UserError."""
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\w+):([1-9]\d{0,4}(?:x[1-9]\d{0,4})+)", name)
    generation = found and GENERATIONS.get(found[2])
    if not generation or found[3].count("x") + 1 != generation.dimensions:
        raise UserError(
            f"topology={name!r}, expected a generation ({', '.join(GENERATIONS)}) and the shape of "
            f"its chips, e.g. {EXAMPLES}, or how many GPUs of a host ({', '.join(gpus.GPUS)}), "
            "e.g. h100:8"
        )
    return Slices(found[2], found[3], int(found[1] or 1))


def describe(wanted: Slices) -> str:
    """In a line: chips, devices, and what goes between slices."""
    each = GENERATIONS[wanted.generation].devices
    devices = f", {each} devices each" if each > 1 else ""
    chips = f"{wanted.chips} chips{devices} ({wanted.accelerator_type})"
    if wanted.count == 1:
        return f"slice: {wanted.generation} {wanted.shape}, {chips}"
    return (
        f"slices: {wanted.count} of {wanted.generation} {wanted.shape}, each {chips}; only "
        "gradients cross the network between them"
    )
