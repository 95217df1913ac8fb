# SPDX-License-Identifier: Apache-2.0
"""What rewards put on top of a network."""

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax.models.layers import Dropout, Linear


class ScoreHead(nnx.Module):
    """[B, D] -> [B] float32 through widths 1024, 128, 64 and 16, without activation.

    Of LAION's aesthetic predictor and of ImageReward. Source: their `MLP`.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        kw = {"dtype": jnp.float32, "rngs": rngs}
        self.layers = nnx.List(
            [
                Linear(width, 1024, **kw),
                Dropout(),
                Linear(1024, 128, **kw),
                Dropout(),
                Linear(128, 64, **kw),
                Dropout(),
                Linear(64, 16, **kw),
                Linear(16, 1, **kw),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]
