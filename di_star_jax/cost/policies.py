# SPDX-License-Identifier: Apache-2.0
"""What the backward pass may recompute in place of holding it, and the choice by formula.

With compute.remat='auto' the plan takes this choice; before a run the compiler has the last word,
see remat.py.
"""

import itertools
import math
from typing import Any, NamedTuple, Self

from di_star_jax.models.layers import REMAT

AUTO = "auto"
SPARE = 0.08  # of a device's memory that stays free
FIELDS = (
    "compute.remat_denoiser",
    "compute.remat_vae",
    "compute.remat_reward",
    "compute.microbatches",
    "decode.slice",
)
# TFLOP of an image that the backward pass repeats, of SDXL at 1024 pixels: of five passes of the
# UNet 6.0 each, of which 0.02 are maps of attention on the text; of the decoder 10.5, nearly all in
# convolutions; of PickScore 0.33. Only their order counts here; what is as much as nothing is not
# nothing, for norms and activations are repeated too.
_REPEATED = {
    "denoiser": {"none": 0.0, "dots": 0.1, "full": 30.0},
    "vae": {"none": 0.0, "dots": 0.01, "full": 10.5},
    "reward": {"none": 0.0, "dots": 0.02, "full": 0.33},
}


class Choice(NamedTuple):
    """Values of FIELDS: by network a key of layers.REMAT, then two numbers."""

    denoiser: str
    vae: str
    reward: str
    microbatches: int
    slice: int

    @classmethod
    def of(cls, config) -> Self:
        """What a config has."""
        return cls(*(config[section][name] for section, name in (f.split(".") for f in FIELDS)))

    @property
    def policies(self) -> tuple[str, str, str]:
        """Of denoiser, VAE and rewards: on these alone the executed FLOP depend."""
        return self[:3]

    @property
    def fields(self) -> dict[str, Any]:
        """By their names in a config."""
        return dict(zip(FIELDS, self))

    @property
    def coarseness(self) -> tuple[int, float]:
        """Sorts those of as many FLOP: the fewer and larger the parts, the better for a device."""
        return self.microbatches, -(self.slice or math.inf)

    def __str__(self) -> str:
        return ", ".join(f"{name.split('.')[1]}={value}" for name, value in self.fields.items())


def is_asked(config) -> bool:
    """Whether FIELDS are to be chosen."""
    return config.compute.remat == AUTO


def choices(images: int) -> list[Choice]:
    """All that there are. Args: images, of those devices that share them."""
    parts = [
        (count, size)
        for count in _divisors(images)
        for size in (0, *_divisors(images // count)[:-1])
    ]
    kinds = itertools.product(REMAT, repeat=3)
    return [Choice(*of_networks, *one) for of_networks in kinds for one in parts]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def repeated(choice: Choice) -> float:
    """About how much work it repeats."""
    of_networks = zip(_REPEATED.values(), choice.policies)
    return sum(of_one[policy] for of_one, policy in of_networks)


def room(memory: float) -> float:
    """Bytes that may be used of a device's. Args: memory, of it."""
    return (1 - SPARE) * memory


def least(sized: dict[Choice, float]) -> Choice:
    """What is most likely to fit. Args: sized, planned bytes of each."""
    return min(sized, key=lambda choice: (sized[choice], -repeated(choice)))


def by_size(sized: dict[Choice, float], memory: float) -> Choice:
    """The least work of what fits a device by the plan, or else the least memory.

    Args: sized, planned bytes of each; memory, bytes of a device.
    """
    fitting = [choice for choice, size in sized.items() if size <= room(memory)]
    if not fitting:
        return least(sized)
    return min(fitting, key=lambda choice: (repeated(choice), choice.coarseness))
