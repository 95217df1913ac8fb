# SPDX-License-Identifier: Apache-2.0
"""Flax NNX ports.

Attributes carry the PyTorch names, even ugly ones: it makes weight conversion mechanical.
"""

from collections.abc import Callable

import jax
from flax import nnx


def abstract(build: Callable[[nnx.Rngs], nnx.Module]):
    """Builds a model without allocating it.

    Args:
      build: makes the module from an `nnx.Rngs`.
    Returns:
      (graphdef, params): params is a nested dict of `jax.ShapeDtypeStruct`; run it, once filled,
      with `nnx.merge(graphdef, params)(...)`.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def init(build: Callable[[nnx.Rngs], nnx.Module], seed: int, shardings=None):
    """Random parameters, created in place on their devices.

    Args:
      build: makes the module from an `nnx.Rngs`.
      seed: of the initialisers.
      shardings: a tree like params, or None for the default device.
    Returns:
      (graphdef, params): params is a nested dict of arrays.
    """
    graphdef, _ = abstract(build)
    make = jax.jit(
        lambda key: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)))), out_shardings=shardings
    )
    return graphdef, make(jax.random.key(seed))
