# SPDX-License-Identifier: Apache-2.0
"""What a function costs, counted on its trace: nothing is compiled or run. And what chips can do.

FLOPs are those of matrix products and convolutions, 2 per multiply-add, as model-FLOP utilisation
counts them. Scanned bodies count as often as they run; what no output needs does not count. (XLA's
cost_analysis counts a scanned body once.)
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval


class Chip(NamedTuple):
    """flops: dense bfloat16, 1/s; memory: bytes that arrays can have; bandwidth: bytes/s of HBM;
    network: bytes/s that a chip can send to its neighbours, all links together, one way.
    """

    flops: float
    memory: float
    bandwidth: float
    network: float


# Vendors' data sheets; memory of TPUs as libtpu's compiler reports it, of the H200 what its driver
# shows.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 180e9),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 540e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 360e9),
    "A100": Chip(312e12, 79.2 * 2**30, 2039e9, 300e9),
    "H100": Chip(989e12, 79.2 * 2**30, 3350e9, 450e9),
    "H200": Chip(989e12, 139.8 * 2**30, 4800e9, 450e9),
}
# How `jax.Device.device_kind` names them.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip_of(device_kind: str) -> str | None:
    """The key of CHIPS for a device, or None for one that is not there, such as a CPU."""
    named = next((name for name in ("H200", "H100", "A100") if name in device_kind), None)
    return _KINDS.get(device_kind, named)


def count(fn: Callable, *args) -> int:
    """FLOPs of one call. Args: fn, and its arguments as arrays or `jax.ShapeDtypeStruct`s.

    A `while_loop` counts as one turn: how many there will be is not known before it runs. What runs
    per device (shard_map) is counted for one device.
    """
    return count_traced(jax.make_jaxpr(fn)(*args))


def count_traced(closed: core.ClosedJaxpr) -> int:
    """`count` of a function that has been traced already."""
    return _total(_live(closed), _flops)["flops"]


def collectives(closed: core.ClosedJaxpr) -> Counter:
    """{(kind, "count" or "bytes"): of one call on one device}; bytes are those it receives."""
    return _total(_live(closed), _traffic)


def _live(closed: core.ClosedJaxpr) -> core.Jaxpr:
    return partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]


def _inner(params: dict) -> list[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    return [
        v.jaxpr if isinstance(v, core.ClosedJaxpr) else v
        for v in values
        if isinstance(v, (core.ClosedJaxpr, core.Jaxpr))
    ]


def _total(
    jaxpr: core.Jaxpr, measure: Callable[[core.JaxprEqn], Counter], axes: dict | None = None
) -> Counter:
    """The sum over a jaxpr's equations and all that they contain.

    Args: axes, the mesh's sizes where known.
    """
    total: Counter = Counter()
    for eqn in jaxpr.eqns:
        name, inside = eqn.primitive.name, axes
        if name == "shard_map":
            inside = dict(eqn.params["mesh"].shape)
        total += measure(eqn, inside)
        parts = [_total(part, measure, inside) for part in _inner(eqn.params)]
        if name == "cond":
            parts = [max(parts, key=Counter.total)]
        for part in parts:
            times = eqn.params["length"] if name == "scan" else 1
            total += Counter({key: times * value for key, value in part.items()})
    return total


def _flops(eqn: core.JaxprEqn, axes: dict | None) -> Counter:
    del axes
    if eqn.primitive.name == "dot_general":
        contract, _ = eqn.params["dimension_numbers"][0]
        return Counter(
            flops=2
            * eqn.outvars[0].aval.size
            * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        )
    if eqn.primitive.name == "conv_general_dilated":
        out, spec = eqn.outvars[0].aval, eqn.params["dimension_numbers"].out_spec
        positions = (
            out.size // out.shape[spec[1]] / math.prod(eqn.params["lhs_dilation"])
        )  # no product with a zero
        return Counter(flops=round(2 * positions * eqn.invars[1].aval.size))
    return Counter()


def _traffic(eqn: core.JaxprEqn, axes: dict | None) -> Counter:
    kinds = {
        "all_gather": "all-gather",
        "reduce_scatter": "reduce-scatter",
        "psum": "all-reduce",
        "ppermute": "permute",
    }
    kind = kinds.get(eqn.primitive.name)
    if kind is None or axes is None:
        return Counter()
    names = eqn.params.get("axes", eqn.params.get("axis_name"))
    n = math.prod(axes[name] for name in (names if isinstance(names, tuple) else (names,)))
    if n == 1:
        return Counter()
    side = eqn.outvars if kind == "all-gather" else eqn.invars
    size = sum(v.aval.size * v.aval.dtype.itemsize for v in side)
    share = {"all-reduce": 2 * (n - 1) / n, "permute": 1}.get(kind, (n - 1) / n)
    return Counter({(kind, "count"): 1, (kind, "bytes"): round(share * size)})
