# SPDX-License-Identifier: Apache-2.0
"""What of the generated latents the rewards see, and how many images are decoded at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from di_star_jax.diffusion import per_sample


def full_view(
    latents: jax.Array,
    crop: jax.Array,
    size: int,
) -> jax.Array:
    """All of the latents."""
    del crop, size
    return latents


def resized_view(
    latents: jax.Array,
    crop: jax.Array,
    size: int,
) -> jax.Array:
    """[B, h, w, C] -> [B, size, size, C], linear with antialiasing: the whole, but smaller."""
    del crop
    b, _, _, c = latents.shape
    return jax.image.resize(latents, (b, size, size, c), "linear")


def cropped_view(
    latents: jax.Array,
    crop: jax.Array,
    size: int,
) -> jax.Array:
    """[B, h, w, C] -> [B, size, size, C]: a window of each.

    Args: crop, [B, 2] in [0, 1) of the places that there are.
    """
    room = jnp.array(latents.shape[1:3]) - size + 1
    corners = (crop * room[None]).astype(jnp.int32)
    channels = latents.shape[-1]

    def window(x: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (corner[0], corner[1], 0), (size, size, channels))

    return jax.vmap(window)(latents, corners)


# "tiny" is all of them, by another decoder.
VIEWS = {"full": full_view, "resized": resized_view, "crop": cropped_view, "tiny": full_view}
PARTIAL = ("resized", "crop")  # of decode.resolution


def _map_slices(
    run: Callable[..., Any],
    size: int,
    x0: jax.Array,
    others: tuple[Any, ...],
) -> Any:
    """`run`(x0, *others), a tree of [B, ...], of `size` images after the other."""
    split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (x0, others))
    results = jax.lax.map(lambda part: run(part[0], *part[1]), split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def in_slices(score: Callable[..., Any], size: int) -> Callable[..., Any]:
    """`score`, computed for `size` images after the other; 0 takes all images at once.

    A decoder's activations are then those of `size` images.

    Args: score, (x0 [B, ...], *others) -> ([B], others [B, ...]).
    Returns: a function like it, whose first result has a gradient, to x0.
    """

    def with_gradient(x0: jax.Array, *others: Any) -> tuple[Any, jax.Array]:
        value, pull_back, rest = jax.vjp(lambda x0: score(x0, *others), x0, has_aux=True)
        (gradient,) = pull_back(jnp.ones_like(value))
        return (value, rest), gradient

    @jax.custom_vjp
    def sliced(x0: jax.Array, *others: Any) -> Any:
        return _map_slices(score, size, x0, others)

    def forward(x0: jax.Array, *others: Any) -> tuple[Any, tuple]:
        # The gradient is found with the value, slice by slice: later, every slice would have to be
        # decoded again.
        results, gradient = _map_slices(with_gradient, size, x0, others)
        return results, (gradient, others)

    def backward(residuals: tuple, cotangents: tuple) -> tuple:
        gradient, others = residuals
        return per_sample(cotangents[0], gradient) * gradient, *(None for _ in others)

    sliced.defvjp(forward, backward)

    def sliced_or_whole(x0: jax.Array, *others: Any) -> Any:
        run = score if size in (0, len(x0)) else sliced
        return run(x0, *others)

    return sliced_or_whole
