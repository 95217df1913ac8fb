# SPDX-License-Identifier: Apache-2.0
"""Frozen matrices in 8 bits: their rounding, their networks, and a step on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from test_config import load
from test_lora import (
    ALL,
    FAMILIES,
    SOME,
    assert_moved_alike,
    denoiser,
    inputs,
    moved,
    random_adapters,
    tiny_step,
)
from test_shapes import SHIPPED
from test_step import assert_close

from di_star_jax import checks, sharding
from di_star_jax.cost import plan
from di_star_jax.errors import UserError
from di_star_jax.models import int8, layers, published
from di_star_jax.models.lora import Lora
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.prompts.tokens import token_batch

LOW_RANK = Lora(4, 4.0, ALL, int8=True)


def widened(rounded):
    """The float32 parameters that rounded ones stand for, by NumPy."""
    flat = traverse_util.flatten_dict({k: v for k, v in rounded.items() if k != int8.SCALES})
    for path, scale in traverse_util.flatten_dict(rounded[int8.SCALES]).items():
        kernel, scale = np.asarray(flat[(*path, "kernel")], np.float64), np.asarray(scale)
        stacked = kernel.ndim == 3
        flat[(*path, "kernel")] = jnp.float32(kernel * (scale[:, None] if stacked else scale))
    return traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("family", SOME)
def test_each_number_is_off_by_half_a_step_at_most_and_all_else_stays(family):
    params = denoiser(FAMILIES[family]).params
    plain = traverse_util.flatten_dict(params)
    found = int8.rounded(params)
    scales = traverse_util.flatten_dict(found[int8.SCALES])
    back = traverse_util.flatten_dict(widened(found))
    assert back.keys() == plain.keys()
    for path, leaf in plain.items():
        if path[:-1] in scales and path[-1] == "kernel":
            scale = np.asarray(scales[path[:-1]], np.float64)
            step = scale[:, None] if leaf.ndim == 3 else scale
            assert np.all(np.abs(np.asarray(back[path]) - leaf) <= step / 2 * 1.0001)
            axes = tuple(range(leaf.ndim - 1))[leaf.ndim == 3 :]
            np.testing.assert_allclose(np.abs(leaf).max(axes), 127 * scale, rtol=1e-6)
        else:
            assert back[path] is leaf
    matrices = [path for path in plain if path[-1] == "kernel" and len(path) > 3]
    assert {path[:-1] for path in matrices} <= scales.keys()
    assert not any(path[0] in ("conv_in", "conv_out") for path in scales)


def test_a_channel_of_zeros_stays_zero():
    kernel = jnp.zeros((3, 2)).at[:, 0].set(jnp.array([1.0, -0.5, 0.25]))
    found = int8.rounded({"time_embedding": {"linear_1": {"kernel": kernel}}})
    assert jax.tree.leaves(found[int8.SCALES])[0].min() > 0  # 0 / 0 is no number
    np.testing.assert_allclose(
        widened(found)["time_embedding"]["linear_1"]["kernel"], kernel, atol=1 / 254
    )


@pytest.mark.parametrize("family", SOME)
def test_the_network_and_its_gradients_are_those_of_the_numbers_that_it_stands_for(family):
    model = denoiser(FAMILIES[family], LOW_RANK)
    rounded = int8.rounded(model.params)
    learnt = random_adapters(model.params, LOW_RANK)
    x_t, *given = inputs(model.config)

    @jax.jit
    def both(base, x_t, learnt):
        def loss(x_t, learnt):
            return jnp.sum(jnp.sin(model.network(base | learnt)(x_t, *given)))

        return model.network(base)(x_t, *given), jax.grad(loss, (0, 1))(x_t, learnt)

    ours, expected = (both(base, x_t, learnt) for base in (rounded, widened(rounded)))
    assert_close(ours, expected, rtol=1e-4)


def test_a_loop_over_networks_keeps_no_widened_matrices_of_their_base():
    """jax.lax.scan makes, and keeps, outside of the loop what does not vary in it."""
    module = layers.stacked(lambda rngs: Block(rngs=rngs), 2, nnx.Rngs(0))

    def loop(x):
        def one(x, first):
            return first * layers.scan_blocks(module, x, remat="full"), None

        return jax.lax.scan(one, x, jnp.array([1.0, 0.0]))[0]

    program = jax.make_jaxpr(lambda x: jax.vjp(loop, x)[1](x))(jnp.ones((4, 8)))
    found = [v.aval for eqn in program.jaxpr.eqns for v in eqn.outvars]
    assert not [x for x in found if x.shape == (2, 8, 8)], program


class Block(nnx.Module):
    """One matrix in 8 bits, with an adapter."""

    def __init__(self, rngs):
        self.linear = layers.Linear(8, 8, rngs=rngs)
        self.linear.kernel = nnx.Param(jnp.ones((8, 8), jnp.int8))
        self.linear.kernel_scale = nnx.Param(jnp.ones(8))
        self.linear.adapter = layers.Adapter(jnp.ones((8, 2)), jnp.ones((2, 8)), 2, 1.0)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


def test_sdxl_in_8_bits_is_half_as_large():
    params = pipeline.abstract_model(published.UNET_SDXL).params
    rounded = int8.rounded(sharding.abstract(params, dtype=jnp.bfloat16))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rounded))
    assert size == pytest.approx(2.57e9, rel=0.003)
    assert plan.parameters(params) == 2_567_463_684


@pytest.mark.long
def test_a_step_on_8_bits_is_the_same_looped_and_on_eight_devices(monkeypatch):
    def step(scheme, mesh=None):
        fn, (state, frozen, *rest) = tiny_step(LOW_RANK, scheme=scheme, mesh=mesh)
        mesh = mesh or sharding.make_mesh(1, 1, devices=jax.devices()[:1])
        here = jax.device_put(jax.device_get(frozen), jax.devices()[0])
        rounded = {name: int8.rounded(params) for name, params in here.items()}
        places = sharding.params_sharding(mesh, rounded)
        return moved((fn, (state, jax.device_put(rounded, places), *rest)))

    plain, metrics = step("separate")
    looped, _ = step("looped")
    monkeypatch.setattr(sharding, "SMALL", 1)  # splits every leaf that can be split
    many, on_many = step("looped", sharding.make_mesh(2, 2, 2))
    assert_moved_alike(looped, plain)
    assert_moved_alike(many, plain)
    assert on_many["generator/loss"] == pytest.approx(float(metrics["generator/loss"]), rel=2e-4)


@pytest.mark.long
def test_on_trained_networks_8_bits_are_as_near_as_bfloat16():
    """The shapes world's teacher on pictures of its generator; the error is that of eps."""
    world = pipeline.load_pipeline(SHIPPED)
    params = {name: model.params for name, model in world.models.items()}
    captions = ["two red circles on a gray background", "a small blue square left of a pink cross"]
    ids = token_batch(captions * 4, world.tokenizers)
    condition, _ = world.encode_text(params, ids, 64)
    z = jax.random.normal(jax.random.key(0), (8, 8, 8, 4))
    at_399 = jnp.full(8, 399)
    generator = pipeline.load_model(SHIPPED / "generator")
    eps = jax.jit(lambda p: generator.network(p)(z, at_399, condition))(generator.params)
    x0 = (z - world.schedule.sigma[399] * eps) / world.schedule.alpha[399]

    teacher = world.models["denoiser"]
    in_bfloat16 = pipeline.load_model(SHIPPED / "unet", pipeline.Options(dtype=jnp.bfloat16))
    tried = {
        "float32": (teacher, teacher.params),
        "8 bits": (teacher, int8.rounded(teacher.params)),
        "bfloat16": (in_bfloat16, in_bfloat16.params),
    }
    predict = {
        name: functools.partial(jax.jit(lambda p, *given, m=model: m.network(p)(*given)), params)
        for name, (model, params) in tried.items()
    }
    worst = {}
    for t in (50, 400, 700, 950):
        x_t = world.schedule.alpha[t] * x0 + world.schedule.sigma[t] * z
        found = {name: run(x_t, jnp.full(8, t), condition) for name, run in predict.items()}
        exact = found.pop("float32")
        for name, eps in found.items():
            error = float(jnp.sqrt(jnp.mean((eps - exact) ** 2) / jnp.mean(exact**2)))
            print(f"t {t}: eps of {name} is off by {100 * error:.2f} % of its rms")
            worst[name] = max(worst.get(name, 0.0), error)
    assert 0 < worst["8 bits"] < 1.5 * worst["bfloat16"]


@pytest.mark.parametrize(
    "changes", [{"lora.rank": 0}, {"lora.rank": 4, "lora.generator": False}], ids=str
)
def test_what_learns_cannot_be_held_in_8_bits(changes):
    config = load("sdxl")
    config.update_from_flattened_dict({"lora.int8": True, **changes})
    with pytest.raises(UserError, match="only what is frozen can be held in 8 bits"):
        checks.check(config, 1)
