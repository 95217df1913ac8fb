# SPDX-License-Identifier: Apache-2.0
"""Frozen matrices of a denoiser in 8 bits: W ~ Q s, with a scale s for each output channel.

Q is int8, -127 to 127, in the place of W; the scales [C_out] (in stacked blocks [depth, C_out]) are
beside the modules, under SCALES, as a tree by the same paths. y = x W is (x Q) s: the scale is
common to all numbers that an output is summed from. Biases, norms, and the first and the last layer
stay as they are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import NamedSharding

from di_star_jax import sharding

SCALES = "scales"  # of a tree of parameters, beside its modules
# Few numbers, and all that the network sees or says goes through them.
_FIRST_AND_LAST = ("conv_in", "conv_out", "pos_embed", "proj_out")
_MOST = 127


def _summed_axes(kernel: Any) -> tuple[int, ...]:
    """Axes that an output is summed over. Four are a convolution's, three a stack's."""
    return tuple(range(kernel.ndim - 1))[kernel.ndim == 3 :]


def _rounded(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Q int8, scale float32) of one kernel."""
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(_summed_axes(kernel), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / _MOST
    return jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, _summed_axes(kernel))


def _placed(kernel: Any) -> tuple[Any, Any]:
    """`_rounded` of an array, or of its shape; Q lies where the kernel does."""
    shapes = jax.eval_shape(_rounded, kernel)
    if kernel.sharding is None:
        return shapes
    places = (kernel.sharding, kernel.sharding)
    if isinstance(kernel.sharding, NamedSharding):
        places = (kernel.sharding, sharding.params_sharding(kernel.sharding.mesh, shapes[1]))
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )
    # waiting frees one kernel before the next is rounded
    return jax.block_until_ready(_compiled(places)(kernel))


@functools.lru_cache
def _compiled(places: tuple[Any, Any]):
    return jax.jit(_rounded, out_shardings=places)


def rounded(params: dict) -> dict:
    """A denoiser's parameters with its matrices in 8 bits, and their scales under SCALES.

    Args: params, arrays or their shapes, of a denoiser without adapters.
    """
    flat = traverse_util.flatten_dict(params)
    scales = {}
    for path, leaf in flat.items():
        if path[-1] == "kernel" and path[0] not in _FIRST_AND_LAST:
            flat[path], scales[path[:-1]] = _placed(leaf)
    return traverse_util.unflatten_dict(flat) | {SCALES: traverse_util.unflatten_dict(scales)}


def attach(module: nnx.Module, scales: Any) -> None:
    """Hands each layer below a module the scale of its path."""
    if not isinstance(scales, dict):
        module.kernel_scale = nnx.Param(scales)
        return
    for name, part in scales.items():
        attach(module[name] if isinstance(name, int) else getattr(module, name), part)
