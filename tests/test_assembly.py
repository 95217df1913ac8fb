# SPDX-License-Identifier: Apache-2.0
"""A config's numbers arrive where they belong."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_config import dry
from test_step import CONFIGS, random_model

from di_star_jax import assembly, gradients, sharding, step
from di_star_jax.diffusion import FewStep
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines.folder import abstract_model
from di_star_jax.pipelines.sdxl import SDXL

SHAPE = (128, 128, 4)


def settings(**changes):
    return assembly.settings_of(dry(**changes), SHAPE, SDXL.one_step)


def test_times_of_generator_and_assistant_are_not_exchanged():
    times = {"objective.t_min": 21, "objective.t_max": 22}
    found = settings(**times, **{"assistant.t_min": 1, "assistant.t_max": 2})
    assert found.generator_times == (21, 22) and found.assistant_times == (1, 2)


def test_the_average_follows_the_images_of_the_config():
    found = settings(**{"ema.half_life_samples": 1000, "assistant.warmup_steps": 7})
    assert (found.ema_half_life, found.warmup_steps) == (1000, 7)


def test_guidance_order_balance_and_parts_of_the_batch_are_those_of_the_config():
    found = settings(
        **{
            "objective.name": "kl",
            "objective.omega": 3.5,
            "objective.t_min": 21,
            "assistant.updates": 4,
            "assistant.first": True,
            "reward.balance": 0.25,
            "compute.microbatches": 2,
        }
    )
    assert (found.objective, found.omega) == ("kl", 3.5)
    assert (found.assistant_updates, found.assistant_first) == (4, True)
    assert (found.balance, found.microbatches) == (0.25, 2)


def test_what_learns_is_float32_whatever_the_reference_is_kept_in():
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    options = assembly.model_options(dry(), mesh)["denoiser"]
    unet = abstract_model(CONFIGS["unet"], options)
    assert {leaf.dtype for leaf in jax.tree.leaves(unet.params)} == {jnp.dtype("bfloat16")}
    state = assembly.abstract_state(unet, assembly.optimizers_of(dry()), mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(state._replace(step=()))} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),  # the optimizers' counts
    }
    for tree in (state.generator, state.assistant, state.ema):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "sharing, loops, scheme",
    [("x0", False, "separate"), ("x_t", False, "shared"), ("x0", True, "looped")],
)
def test_two_fields_choose_the_scheme(sharing, loops, scheme):
    fields = {"assistant.sharing": sharing, "compute.loop_networks": loops}
    assert settings(**fields).scheme == scheme


def test_constants_and_weights_of_the_loss_come_from_their_fields():
    found = settings(
        **{
            "objective.distance": "power",
            "objective.huber_c": 0.1,
            "objective.power": 1.5,
            "objective.alpha_cfg": 0.2,
            "objective.sid_alpha": 0.3,
            "objective.weighting": "x0",
            "objective.reduction": "mean",
            "generator.steps": 2,
        }
    )
    assert found.constants == ("power", 0.1, 1.5, 0.2, 0.3)
    assert (found.weighting, found.reduction) == ("x0", "mean")
    assert found.generator == FewStep((999, 499)) and found.latent_shape == SHAPE


def step_sizes(**changes):
    """How far a parameter moves at the first and the second update, by network."""
    optimizers = assembly.optimizers_of(dry(**changes))
    sizes = {}
    for name, optimizer in zip(step.Optimizers._fields, optimizers):
        params = {"w": jnp.ones(3)}
        state = optimizer.init(params)
        sizes[name] = []
        for _ in range(2):
            (after, state), _ = step.update(optimizer, {"w": jnp.ones(3)}, params, state, np.inf)
            sizes[name].append(float(np.abs(after["w"] - params["w"]).max()))
            params = after
    return sizes


def test_each_network_has_its_own_learning_rate_and_both_the_warm_up():
    fields = {
        "optim.generator_lr": 1e-2,
        "optim.assistant_lr": 3e-2,
        "optim.weight_decay": 0.0,
        "optim.lr_warmup_steps": 1,
    }
    found = step_sizes(**fields)
    np.testing.assert_allclose(found["generator"], [0.5e-2, 1e-2], rtol=1e-4)
    np.testing.assert_allclose(found["assistant"], [1.5e-2, 3e-2], rtol=1e-4)


def test_weight_decay_and_the_clip_norm_are_those_of_the_config():
    plain = step_sizes(**{"optim.generator_lr": 1e-2, "optim.weight_decay": 0.0})
    decayed = step_sizes(**{"optim.generator_lr": 1e-2, "optim.weight_decay": 0.1})
    assert decayed["generator"][0] - plain["generator"][0] == pytest.approx(1e-3, rel=1e-3)
    # Of losses that are means over the elements; a sum's gradient is as many times as large.
    limit = {"optim.clip_norm": 0.5}
    count = np.prod(SHAPE)
    assert settings(**limit).clip_norms == (0.5 * count, 0.5 * count)
    mean = settings(**limit, **{"objective.reduction": "mean"})
    assert mean.clip_norms == (0.5, 0.5 * count)


FLAT = CONFIGS["unet"] | {
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "transformer_layers_per_block": [1],
    "attention_head_dim": [1],
}


def score_gap(**changes):
    """eps_psi - eps_ref [4, 8, 8, 4] as a config has it computed, and how the reference is kept.

    The assistant is a tiny UNet 0.2 % of the way from the reference to another.
    """
    config = dry(**{"objective.omega": 1.0, "compute.remat_denoiser": "none", **changes})
    options = assembly.model_options(config, sharding.make_mesh(1, 1, devices=jax.devices()[:1]))
    model = abstract_model(FLAT, options["denoiser"])
    params = [random_model(FLAT, seed)[1] for seed in (0, 1)]
    reference = params[0]
    assistant = jax.tree.map(lambda a, b: a + 0.002 * (b - a), *params)
    method = gradients.Method(
        denoiser=functools.partial(nnx.merge, model.graphdef),
        encode_text=None,
        reward=None,
        schedule=None,
        settings=None,
        score_denoiser=assembly.score_denoiser(config, SimpleNamespace(models={"denoiser": model})),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    condition = Condition(
        jax.random.normal(keys[0], (4, 8, 32)),
        jax.random.normal(keys[1], (4, 16)),
        jnp.ones((4, 6)),
    )
    x_t, t = jax.random.normal(keys[2], (4, 8, 8, 4)), jnp.array([60, 250, 400, 800])
    predict = jax.jit(lambda params: method.score(params)(x_t, t, condition))
    return np.asarray(predict(assistant) - predict(reference)), options["denoiser"].param_dtype


def cosines(a, b):
    """Per sample."""
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.slow
def test_where_nothing_guides_the_direction_is_that_of_float32():
    exact, _ = score_gap(**{"compute.dtype": "float32"})
    found, kept_in = score_gap()
    assert cosines(found, exact).min() > 0.999 and kept_in == jnp.float32
    # What the default spares a run: rounding to 8 bits, which a distance of length one passes on.
    rounded, kept_in = score_gap(**{"compute.scores": "bfloat16"})
    assert cosines(rounded, exact).max() < 0.9 and kept_in == jnp.bfloat16


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"objective.omega": 7.5}, "bfloat16"),
        ({"objective.omega": 1.0}, "float32"),
        ({"objective.name": "kl_outside", "objective.omega": 7.5}, "float32"),
        ({"objective.omega": 7.5, "compute.scores": "float32"}, "float32"),
        ({"objective.omega": 1.0, "compute.scores": "bfloat16"}, "bfloat16"),
        ({"objective.omega": 7.5, "compute.dtype": "float32"}, "float32"),
    ],
)
def test_scores_are_float32_by_default_where_nothing_guides(fields, expected):
    assert assembly.scores_dtype(dry(**fields)) == jnp.dtype(expected)
