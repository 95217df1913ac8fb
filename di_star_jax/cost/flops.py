# SPDX-License-Identifier: Apache-2.0
"""What a function costs, counted on its trace: nothing is compiled or run.

FLOPs are those of matrix products and convolutions, 2 per multiply-add, as model-FLOP utilisation
counts them. Scanned bodies count as often as they run; what no output needs does not count. (XLA's
cost_analysis counts a scanned body once.)
"""

import math
from collections import Counter
from collections.abc import Callable

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(fn: Callable, *args) -> int:
    """FLOPs of one call. Args: fn, and its arguments as arrays or `jax.ShapeDtypeStruct`s.

    A `while_loop` counts as one turn: how many there will be is not known before it runs. What runs
    per device (shard_map) is counted for one device.
    """
    return count_traced(jax.make_jaxpr(fn)(*args))


def count_traced(closed: core.ClosedJaxpr) -> int:
    """`count` of a function that has been traced already."""
    return _total(_live(closed), _flops)["flops"]


def products(closed: core.ClosedJaxpr) -> tuple[int, int]:
    """FLOPs of products with weights, and of those between activations, as attention has.

    Between activations are those that have a batch axis on both sides.
    """
    total = _total(_live(closed), _by_operands)
    return total["weights"], total["activations"]


def collectives(closed: core.ClosedJaxpr) -> Counter:
    """{(kind, "count" or "bytes"): of one call on one device}; bytes are those it receives."""
    return _total(_live(closed), _traffic)


def _live(closed: core.ClosedJaxpr) -> core.Jaxpr:
    return partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]


def _inner(params: dict) -> list[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else [p])]
    # Once each: from JAX 0.11 on a closed jaxpr is a jaxpr too.
    return [
        v.jaxpr if isinstance(v, core.ClosedJaxpr) else v
        for v in values
        if isinstance(v, (core.ClosedJaxpr, core.Jaxpr))
    ]


def _total(
    jaxpr: core.Jaxpr,
    measure: Callable[[core.JaxprEqn], Counter],
    axes: dict | None = None,
) -> Counter:
    """The sum over a jaxpr's equations and all that they contain.

    Args: axes, the mesh's sizes where known.
    """
    total: Counter = Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inside = dict(eqn.params["mesh"].shape) if name == "shard_map" else axes
        total += measure(eqn, inside)
        parts = [_total(part, measure, inside) for part in _inner(eqn.params)]
        if name == "cond":
            parts = [max(parts, key=Counter.total)]
        times = eqn.params["length"] if name == "scan" else 1
        for part in parts:
            total += Counter({key: times * value for key, value in part.items()})
    return total


def _flops(eqn: core.JaxprEqn, axes: dict | None) -> Counter:
    del axes
    name, params = eqn.primitive.name, eqn.params
    out = eqn.outvars[0].aval if eqn.outvars else None
    if name == "dot_general":
        contracted, _ = params["dimension_numbers"][0]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return Counter(flops=2 * out.size * depth)
    if name == "conv_general_dilated":
        channels = out.shape[params["dimension_numbers"].out_spec[1]]
        # A product with a zero that dilation puts in is not counted.
        positions = out.size / channels / math.prod(params["lhs_dilation"])
        return Counter(flops=round(2 * positions * eqn.invars[1].aval.size))
    return Counter()


def _by_operands(eqn: core.JaxprEqn, axes: dict | None) -> Counter:
    is_dot = eqn.primitive.name == "dot_general"
    batched = is_dot and any(eqn.params["dimension_numbers"][1])
    return Counter({"activations" if batched else "weights": _flops(eqn, axes)["flops"]})


_KINDS = {
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
    "reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
    "ppermute": "permute",
}


def _traffic(eqn: core.JaxprEqn, axes: dict | None) -> Counter:
    kind = _KINDS.get(eqn.primitive.name)
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
