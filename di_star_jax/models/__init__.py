# SPDX-License-Identifier: Apache-2.0
"""Flax NNX ports.

Attributes carry the PyTorch names, even ugly ones: it makes weight conversion mechanical.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class _OneKey(nnx.Pytree):
    """In place of `nnx.Rngs` where only shapes are asked for: one key, over and over.

    The counters of a stream, each a traced array, are two thirds of the time that building takes.
    """

    def __init__(self, key: jax.Array):
        self.key = nnx.Variable(key)

    def params(self) -> jax.Array:
        return self.key[...]

    def split(self, count: int) -> "_OneKey":
        return _OneKey(jax.random.split(self.key[...], count))


def abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
    """Builds a model without allocating it.

    Args:
      build: makes the module from an `nnx.Rngs`.
    Returns:
      (graphdef, params): params is a nested dict of `jax.ShapeDtypeStruct`; run it, once filled,
      with `nnx.merge(graphdef, params)(...)`.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(_OneKey(jax.random.key(0)))))
    return graphdef, nnx.to_pure_dict(state)


def init(
    build: Callable[[nnx.Rngs], nnx.Module],
    seed: int,
    shardings: Any = None,
) -> tuple[nnx.GraphDef, dict]:
    """Random parameters, created in place on their devices.

    Args:
      build: makes the module from an `nnx.Rngs`.
      seed: of the initialisers.
      shardings: a tree like params, or None for the default device.
    Returns:
      (graphdef, params): params is a nested dict of arrays.
    """
    graphdef, _ = abstract(build)

    def make(key: jax.Array) -> dict:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key))))

    return graphdef, jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
