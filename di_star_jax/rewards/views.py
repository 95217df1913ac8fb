# SPDX-License-Identifier: Apache-2.0
"""What of the generated latents the rewards see in training, and how many images are decoded at a
time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def full_view(latents: jax.Array, crop: jax.Array, size: int) -> jax.Array:
    """All of the latents."""
    del crop, size
    return latents


def resized_view(latents: jax.Array, crop: jax.Array, size: int) -> jax.Array:
    """[B, h, w, C] -> [B, size, size, C], linear with antialiasing: a smaller picture of the whole."""
    del crop
    b, _, _, c = latents.shape
    return jax.image.resize(latents, (b, size, size, c), "linear")


def cropped_view(latents: jax.Array, crop: jax.Array, size: int) -> jax.Array:
    """[B, h, w, C] -> [B, size, size, C]: a window of each at its crop [B, 2] in [0, 1) of the
    places there are.
    """
    room = jnp.array(latents.shape[1:3]) - size + 1
    corner = (crop * room[None]).astype(jnp.int32)
    window = lambda x, yx: jax.lax.dynamic_slice(x, (yx[0], yx[1], 0), (size, size, x.shape[-1]))
    return jax.vmap(window)(latents, corner)


VIEWS = {"full": full_view, "resized": resized_view, "crop": cropped_view}


def in_slices(score: Callable[..., jax.Array], size: int) -> Callable[..., jax.Array]:
    """`score`(x0 [B, ...], *others) -> ([B], others [B, ...]), computed for `size` images after the
    other.

    A decoder's activations are then those of `size` images. The first result has a gradient, to x0.
    0 takes all images at once.
    """

    def slices(run, x0, others):
        split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (x0, others))
        results = jax.lax.map(lambda part: run(part[0], *part[1]), split)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

    def with_gradient(x0, *others):
        value, pull_back, rest = jax.vjp(lambda x0: score(x0, *others), x0, has_aux=True)
        return (value, rest), pull_back(jnp.ones_like(value))[0]

    @jax.custom_vjp
    def sliced(x0, *others):
        return slices(score, x0, others)

    def forward(x0, *others):
        # The gradient is found with the value, slice by slice: later, every slice would have to be
        # decoded again.
        results, grad = slices(with_gradient, x0, others)
        return results, (grad, others)

    def backward(kept, g):
        grad, others = kept
        return g[0].reshape(-1, *(1,) * (grad.ndim - 1)) * grad, *(None for _ in others)

    sliced.defvjp(forward, backward)
    return lambda x0, *others: (score if size in (0, x0.shape[0]) else sliced)(x0, *others)
