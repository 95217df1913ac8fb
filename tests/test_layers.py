# SPDX-License-Identifier: Apache-2.0
"""Blocks that networks share: norms against float64, and what stacks keep to go backwards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from di_star_jax import sharding
from di_star_jax.cost import flops
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


class Block(nnx.Module):
    """A convolution, a product with weights and one without."""

    def __init__(self, width, rngs, dtype):
        kw = {"rngs": rngs, "dtype": dtype}
        self.norm = layers.group_norm(width, GROUPS, EPS, **kw)
        self.conv = layers.conv3x3(width, width, **kw)
        self.linear = layers.Linear(width, width, **kw)

    def __call__(self, x):
        h = self.linear(self.conv(nnx.silu(self.norm(x))))
        rows = h.reshape(h.shape[0], -1, h.shape[-1])
        map_ = jax.nn.softmax(jnp.einsum("bnc,bmc->bnm", rows, rows))
        return x + jnp.einsum("bnm,bmc->bnc", map_, rows).reshape(x.shape)


def gradient_of(remat, dtype=jnp.float32, width=8):
    """(function of parameters and x, these) of a stack of three blocks."""
    blocks = layers.stacked(lambda rngs: Block(width, rngs, dtype), 3, nnx.Rngs(0))
    graphdef, params = nnx.split(blocks)

    def value(params, x):
        y = layers.scan_blocks(nnx.merge(graphdef, params), x, remat=remat)
        return (y * y).mean()

    return jax.grad(value, (0, 1)), params, jax.random.normal(jax.random.key(1), (2, 8, 8, width))


def test_what_a_stack_keeps_changes_no_gradient():
    found = [
        jax.tree.leaves(jax.jit(gradient)(*given))
        for gradient, *given in map(gradient_of, ("full", "dots", "none"))
    ]
    for looped, *others in zip(*found):
        for one in others:
            np.testing.assert_allclose(one, looped, rtol=1e-4, atol=1e-6 * np.abs(looped).max())


def test_dots_repeats_no_product_with_weights_and_no_convolution():
    full, dots, none = (
        flops.count(gradient, *given)
        for gradient, *given in map(gradient_of, ("full", "dots", "none"))
    )
    pixels, channels, depth = 2 * 64, 8, 3
    with_weights = depth * 2 * pixels * channels * channels * (9 + 1)
    maps = depth * 2 * pixels * 64 * channels  # of the last product nothing is needed again
    assert full - none == with_weights + maps
    assert dots - none == maps


def test_dots_keeps_kernels_that_it_rounded():
    gradient, *given = gradient_of("dots", jnp.bfloat16)
    text = str(jax.make_jaxpr(gradient)(*given))
    assert len(re.findall(r":bf16\[3,3,8,8\] = convert_element_type", text)) == 3


def test_dots_keeps_the_sums_of_residuals_in_place_of_what_was_added(capsys):
    config = layers.TransformerConfig(
        channels=16,
        heads=2,
        depth=1,
        context=8,
        groups=4,
        linear_projection=True,
        remat="dots",
        kernel="xla",
    )
    block = layers.BasicTransformerBlock(config, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def run(x, context):
        return layers.checkpointed(block, x, context, remat="dots").sum()

    jax.ad_checkpoint.print_saved_residuals(run, jnp.ones((2, 9, 16)), jnp.ones((2, 5, 8)))
    kept = capsys.readouterr().out
    assert kept.count("(BasicTransformerBlock.__call__)") == 2
    # Queries, keys and values of both attentions, and the gate's two halves.
    assert kept.count("(Linear.__call__)") == 7


def test_on_a_mesh_rounded_kernels_are_gathered_again():
    gradient, params, x = gradient_of("dots", jnp.bfloat16, width=256)  # split
    mesh = sharding.make_mesh(1, 2, devices=jax.devices()[:2])
    specs = sharding.params_spec(mesh, params)
    batch = sharding.batch_spec()
    on_mesh = sharding.on_each(mesh, gradient, (specs, batch), (specs, batch))
    text = str(jax.make_jaxpr(on_mesh)(params, x))
    assert "all_gather" in text and " scan[" in text
    assert "rounded" not in text


def test_only_what_keeps_its_input_alone_is_a_loop():
    def loops(remat):
        gradient, *given = gradient_of(remat)
        return str(jax.make_jaxpr(gradient)(*given)).count(" scan[")

    assert loops("full") == 2  # there and back
    assert loops("dots") == loops("none") == 0
