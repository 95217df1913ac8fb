# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations a function does: counted on its trace, nothing is compiled or run.

Matrix products and convolutions only, 2 per multiply-add, as model-FLOP utilisation counts them. Scanned bodies count
as often as they run; what no output needs does not count. (XLA's cost_analysis counts a scanned body once.)
"""

import math
from collections.abc import Callable

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(fn: Callable, *args) -> int:
    """FLOPs of one call. Args: fn, and its arguments as arrays or `jax.ShapeDtypeStruct`s.

    A `while_loop` counts as one turn: how many there will be is not known before it runs.
    """
    closed = jax.make_jaxpr(fn)(*args)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _of_jaxpr(live)


def _inner(params: dict) -> list[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    return [v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in values
            if isinstance(v, (core.ClosedJaxpr, core.Jaxpr))]


def _of_jaxpr(jaxpr: core.Jaxpr) -> int:
    return sum(_of_equation(eqn) for eqn in jaxpr.eqns)


def _of_equation(eqn: core.JaxprEqn) -> int:
    if eqn.primitive.name == "dot_general":
        contract, _ = eqn.params["dimension_numbers"][0]
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
    if eqn.primitive.name == "conv_general_dilated":
        out, spec = eqn.outvars[0].aval, eqn.params["dimension_numbers"].out_spec
        positions = out.size // out.shape[spec[1]] / math.prod(eqn.params["lhs_dilation"])  # no product with a zero
        return round(2 * positions * eqn.invars[1].aval.size)
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inner(eqn.params)]
    if eqn.primitive.name == "scan":
        return eqn.params["length"] * sum(inner)
    return max(inner, default=0) if eqn.primitive.name == "cond" else sum(inner)
