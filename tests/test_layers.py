# SPDX-License-Identifier: Apache-2.0
"""Blocks that networks share: norms against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from di_star_jax.models import layers

GROUPS, EPS = 4, 1e-6


def exact_group_norm(x, scale, bias, weight):
    """Output and gradients of sum(weight * output), in NumPy. x, weight: [B, H, W, C]."""
    b, h, w, c = x.shape
    x, weight = (each.reshape(b, h * w, GROUPS, -1).astype(np.float64) for each in (x, weight))
    scale, bias = (each.reshape(GROUPS, -1).astype(np.float64) for each in (scale, bias))
    over = {"axis": (1, 3), "keepdims": True}
    inverse = (x.var(**over) + EPS) ** -0.5
    normal = (x - x.mean(**over)) * inverse
    pull = weight * scale
    of_x = inverse * (pull - pull.mean(**over) - normal * (pull * normal).mean(**over))
    found = normal * scale + bias, of_x, (weight * normal).sum((0, 1)), weight.sum((0, 1))
    shapes = (b, h, w, c), (b, h, w, c), (c,), (c,)
    return [each.reshape(shape) for each, shape in zip(found, shapes)]


def pictures(kind):
    """[2, 24, 16, 16] with what is hard on one pass over it."""
    x = np.random.default_rng(0).normal(size=(2, 24, 16, 16))
    if kind == "far from 0":
        x = 1000.0 + x
    if kind == "flat where it is looked at":
        x[:, ::8, ::8] = 100.0
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "far from 0", "flat where it is looked at"])
def test_group_norm_equals_float64_with_its_gradients(kind):
    x, weight = pictures(kind), np.random.default_rng(1).normal(size=(2, 24, 16, 16))
    scale, bias = np.random.default_rng(2).normal(size=(2, 16)).astype(np.float32)
    norm = layers.group_norm(16, GROUPS, EPS, rngs=nnx.Rngs(0), dtype=jnp.float32)
    norm.scale[...], norm.bias[...] = scale, bias
    graphdef, params = nnx.split(norm)
    out, pull_back = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    of_params, of_x = pull_back(weight.astype(np.float32))
    found = out, of_x, of_params["scale"][...], of_params["bias"][...]
    # 1000 has a step of 6e-5; the worst picture there is costs 6 of 24 bits.
    tolerance = {"normal": 2e-6, "far from 0": 2e-4}.get(kind, 64 * 6e-7)
    for ours, exact in zip(found, exact_group_norm(x, scale, bias, weight)):
        assert np.abs(ours - exact).max() / np.abs(exact).max() < tolerance


def test_a_gates_gradient_is_jaxs_own():
    def plain(both):
        h, gate = jnp.split(both, 2, axis=-1)
        return h * layers.gelu(gate)

    both, grad = (jax.random.normal(jax.random.key(size), (2, 5, size)) for size in (12, 6))
    out, pull_back = jax.vjp(layers.gated, both)
    exact, exactly = jax.vjp(plain, both)
    np.testing.assert_array_equal(out, exact)
    np.testing.assert_allclose(pull_back(grad)[0], exactly(grad)[0], rtol=1e-6)
