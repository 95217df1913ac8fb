# SPDX-License-Identifier: Apache-2.0
"""What chips can do."""

from typing import NamedTuple


class Chip(NamedTuple):
    """The limits of a device: a chip, of tpu7x half of one.

    flops: dense bfloat16, 1/s; memory: bytes that arrays can have; bandwidth: bytes/s of HBM;
    network: bytes/s that it can send to its neighbours, all links together, one way; torus: the
    dimensions of a network where neighbours alone are linked, 0 where all are linked to a switch.
    """

    flops: float
    memory: float
    bandwidth: float
    network: float
    torus: int = 0

    def links(self, devices: int) -> float:
        """How many links a byte goes over from one of so many devices to another, on average."""
        return max(self.torus * devices ** (1 / self.torus) / 4, 1.0) if self.torus else 1.0


# Vendors' data sheets; memory of TPUs as libtpu's compiler reports it, of the H200 what its driver
# shows.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 270e9, 3),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 180e9, 2),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 540e9, 3),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 360e9, 2),
    # JAX sees a chip (2,307 TF, 192 GB) as two devices.
    "tpu7x": Chip(2307e12 / 2, 95 * 2**30, 7380e9 / 2, 270e9, 3),
    "A100": Chip(312e12, 79.2 * 2**30, 2039e9, 300e9),
    "H100": Chip(989e12, 79.2 * 2**30, 3350e9, 450e9),
    "H200": Chip(989e12, 139.8 * 2**30, 4800e9, 450e9),
    # of bfloat16 with sums in float32; cards talk over PCIe alone
    "RTX 4090": Chip(165e12, 23.5 * 2**30, 1008e9, 32e9),
}
# What CUDA shows of a card of so many GB, GiB: of an RTX 4080, 4090, 5090, RTX 6000, of an A100 or
# H100 and of an H200 (as PyTorch's messages have it; a card that corrects errors in its own memory,
# such as an L4 of 24 GB, shows up to 8 % less).
_SEEN = {16: 15.6, 24: 23.6, 32: 31.4, 48: 47.4, 80: 79.2, 141: 139.8}
# Of that XLA_PYTHON_CLIENT_MEM_FRACTION gives arrays so much; without it JAX takes 0.75. The rest
# holds CUDA's context, what libraries load, and a desktop.
FRACTION = 0.95
# Bytes that arrays can have on a card, by its GB.
CARDS = {size: seen * FRACTION * 2**30 for size, seen in _SEEN.items()}
# How `jax.Device.device_kind` names them.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


def chip_of(device_kind: str) -> str | None:
    """The key of CHIPS for a device, or None for one that is not there, such as a CPU."""
    gpus = ("H200", "H100", "A100", "RTX 4090")
    named = next((name for name in gpus if name in device_kind), None)
    return _KINDS.get(device_kind, named)


def device_kind(chip: str) -> str:
    """What JAX calls a TPU. Args: chip, a key of CHIPS."""
    return next(kind for kind, name in _KINDS.items() if name == chip)
