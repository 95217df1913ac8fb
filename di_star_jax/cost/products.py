# SPDX-License-Identifier: Apache-2.0
"""FLOP of matrix products, convolutions and attention in a compiled program, 2 per multiply-add.

Sources: XLA's operation semantics; for libraries' calls XLA's `backend_configs.proto` of GPUs; for
splash attention its kernels in jax.experimental.pallas.
"""

import functools
import math
import re
from typing import NamedTuple

from di_star_jax.cost import hlo
from di_star_jax.cost.hlo import Array, Instruction

_ROWS, _DEPTH = 8, 16  # of an mma of tensor cores, rows or columns
_LANES, _SUBLANES = 128, 8  # of a TPU


class Product(NamedTuple):
    """FLOP of an instruction, and with the zeros that fill its tiles; kind, see `ops.Op`."""

    flop: float
    padded: float
    kind: str


def of(one: Instruction, operands: list[Array]) -> Product | None:
    """Of an instruction that is no fusion; None where it multiplies nothing, or nobody knows."""
    count = {"dot": _dot, "convolution": _convolution, "custom-call": _custom_call}.get(one.opcode)
    return count(one, operands) if count else None


def _dot(one: Instruction, operands: list[Array]) -> Product:
    left, right = operands[:2]
    of_left = _axes(one, "lhs", left, "m")
    of_right = _axes(one, "rhs", right, "n")
    of_result = [label for label in of_left if label[0] == "b"]
    of_result += [label for label in [*of_left, *of_right] if label[0] in "mn"]
    extents = dict(zip([*of_left, *of_right], [*left.dims, *right.dims]))
    rows, columns, depth = (
        math.prod(n for label, n in extents.items() if label[0] == kind) for kind in "mnk"
    )
    labelled = [(left, of_left), (right, of_right), (one.result[0], of_result)]
    flop = 2.0 * math.prod(extents.values())
    return Product(flop, flop * _padding(labelled, rows, columns, depth), "matmul")


def _axes(
    one: Instruction,
    side: str,
    array: Array,
    free: str,
) -> list[str]:
    """A dot's operand's axes by name: b for batch, k for what is summed over, and a free one."""
    names = {axis: f"b{i}" for i, axis in enumerate(hlo.integers(one, f"{side}_batch_dims"))}
    summed = hlo.integers(one, f"{side}_contracting_dims")
    names |= {axis: f"k{i}" for i, axis in enumerate(summed)}
    return [names.get(axis, f"{free}{axis}") for axis in range(len(array.dims))]


def _convolution(one: Instruction, operands: list[Array]) -> Product:
    left, right, result = operands[0], operands[1], one.result[0]
    of_left, of_right, of_result = _labels(one)
    taps = dict(zip(of_right, right.dims))
    axes = hlo.window(one)
    pairs = math.prod(
        _pairs(result.dims[of_result.index(f"{i}")], left.dims[of_left.index(f"{i}")], axis)
        for i, axis in enumerate(axes)
    )
    channels = result.dims[of_result.index("f")]
    batch = result.dims[of_result.index("b")]
    flop = 2.0 * pairs * batch * channels * taps["i"]
    # Channels have one name wherever they stand.
    labelled = [
        (left, ["i" if label == "f" else label for label in of_left]),
        (right, of_right),
        (result, ["o" if label == "f" else label for label in of_result]),
    ]
    depth = taps["i"] * -(-pairs // max(result.size // (batch * channels), 1))
    padding = _padding(labelled, result.size // channels, channels, depth)
    return Product(flop, flop * padding, "convolution" if axes else "matmul")


def _labels(one: Instruction) -> tuple[list[str], list[str], list[str]]:
    """Of a convolution's operands and result: b, f, i, o and the numbers of its spatial axes."""
    left, right, result = re.split("_|->", hlo.attribute(one, "dim_labels"))
    return list(left), list(right), list(result)


@functools.lru_cache(maxsize=4096)
def _pairs(
    outputs: int,
    inputs: int,
    axis: hlo.Axis,
) -> int:
    """Along an axis, the products of an output's and a tap's place.

    Those with the zeros around an image count as work, those with the holes of a dilation do not:
    so does `flops.count`. XLA for TPUs writes a batch of matrix products as such holes, and one
    product with many heads' kernels as a window that is wider than its image: then what lies
    outside does not count either.
    """
    if axis.lhs_dilate == 1 and inputs >= axis.size:
        return outputs * axis.size
    if axis.lhs_dilate == 1:
        places = (
            place * axis.stride + tap * axis.rhs_dilate - axis.pad[0]
            for place in range(outputs)
            for tap in range(axis.size)
        )
        return sum(0 <= place < inputs for place in places)
    holes = axis.lhs_dilate
    taps = [0] * holes
    for tap in range(axis.size):
        taps[tap * axis.rhs_dilate % holes] += 1
    return sum(taps[(axis.pad[0] - place * axis.stride) % holes] for place in range(outputs))


def _padding(
    labelled: list[tuple[Array, list[str]]],
    rows: int,
    columns: int,
    depth: int,
) -> float:
    """By which a product grows to fill its tiles.

    On tensor cores rows, columns and depth to those of an instruction. On a TPU depth, and rows or
    columns, to the sides of its array of multipliers; or each axis to the tiles of its arrays,
    whichever is more. (The arrays of v6e and tpu7x, 256 wide, count as two of 128.)
    """
    if not any(array.tile for array, _ in labelled):
        return _grown(rows, _ROWS) * _grown(columns, _ROWS) * _grown(depth, _DEPTH)
    flat = min(
        _grown(rows, _SUBLANES) * _grown(columns, _LANES),
        _grown(rows, _LANES) * _grown(columns, _SUBLANES),
    )
    growth: dict[str, float] = {}
    for array, labels in labelled:
        for label, n, padded in zip(labels, array.dims, array.padded):
            growth[label] = max(growth.get(label, 1.0), padded / n if n else 1.0)
    return max(_grown(depth, _LANES) * flat, math.prod(growth.values()))


def _grown(n: int, tile: int) -> float:
    return -(-n // tile) * tile / n if n else 1.0


def _custom_call(one: Instruction, operands: list[Array]) -> Product | None:
    target = hlo.attribute(one, "custom_call_target")
    if target.startswith("__cudnn$conv"):
        return _cudnn_convolution(one, operands, target)
    if target.startswith("__cudnn$fmha"):
        return _cudnn_attention(one, operands, target)
    if target.startswith("__cublas"):
        return _cublas(one, operands)
    if target == "tpu_custom_call":
        return _mosaic(one, operands)
    return None


def _cudnn_convolution(
    one: Instruction,
    operands: list[Array],
    target: str,
) -> Product:
    """Its labels and window are those of the forward convolution, whichever way it goes."""
    image, kernel, result = operands[0], operands[1], one.result[0]
    if target.endswith("BackwardInput"):
        image, result = result, image
    elif target.endswith("BackwardFilter"):
        kernel, result = result, kernel
    _, of_kernel, of_result = _labels(one)
    channels = result.dims[of_result.index("f")]
    inputs = kernel.dims[of_kernel.index("i")]
    taps = kernel.size // (channels * inputs)
    flop = 2.0 * result.size * inputs * taps
    places = result.size // channels
    return Product(flop, flop * _padding([], places, channels, inputs * taps), "convolution")


def _cudnn_attention(
    one: Instruction,
    operands: list[Array],
    target: str,
) -> Product:
    """Two products of scores by head forward, five backward, for it makes the scores again."""
    shape = re.search(
        r'"intermediate_tensor_shape":\s*\{[^[]*"dimensions":\s*\[([^\]]*)\]', one.attributes
    )
    batch, heads, rows, columns = (int(n) for n in re.findall(r"\d+", shape[1]))
    head = operands[0].dims[-1]
    products = 5 if "Backward" in target else 2
    flop = 2.0 * products * batch * heads * rows * columns * head
    return Product(flop, flop * _padding([], rows, columns, head), "attention")


def _cublas(one: Instruction, operands: list[Array]) -> Product:
    found = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', one.attributes)
    summed = [int(n) for n in re.findall(r"\d+", found[1])]
    depth = math.prod(operands[0].dims[axis] for axis in summed)
    result = one.result[0]
    flop = 2.0 * result.size * depth
    columns = result.dims[-1]
    return Product(flop, flop * _padding([], result.size // columns, columns, depth), "matmul")


def _mosaic(one: Instruction, operands: list[Array]) -> Product | None:
    """Of splash attention, whose kernels have their names in op_name; others are not known."""
    found = re.search(r"splash_mha_(fwd|dkv|dq)", hlo.attribute(one, "op_name"))
    if not found:
        return None
    queries, keys = [array for array in operands if len(array.dims) > 2 and array.dtype != "s8"][:2]
    products = {"fwd": 2, "dkv": 4, "dq": 3}[found[1]]  # scores again in each that goes backward
    flop = 2.0 * products * queries.size * keys.dims[-2]
    padding = queries.padded[-1] / queries.dims[-1]
    return Product(flop, flop * padding, "attention")
