# SPDX-License-Identifier: Apache-2.0
"""A config's numbers arrive where they belong."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_config import dry

from di_star_jax import assembly, step
from di_star_jax.pipelines.sdxl import SDXL

SHAPE = (128, 128, 4)


def settings(**changes):
    return assembly.settings_of(dry(**changes), SHAPE, SDXL)


def test_times_of_generator_and_assistant_are_not_exchanged():
    times = {"objective.t_min": 21, "objective.t_max": 22}
    found = settings(**times, **{"assistant.t_min": 1, "assistant.t_max": 2})
    assert found.generator_times == (21, 22) and found.assistant_times == (1, 2)


def test_the_average_halves_after_the_half_life():
    found = settings(**{"data.batch_size": 100, "ema.half_life_samples": 1000})
    assert found.ema_decay**10 == pytest.approx(0.5)


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
            "objective.huber_c": 0.1,
            "objective.alpha_cfg": 0.2,
            "objective.sid_alpha": 0.3,
            "objective.weighting": "x0",
            "objective.reduction": "mean",
            "generator.steps": 2,
        }
    )
    assert found.constants == (0.1, 0.2, 0.3)
    assert (found.weighting, found.reduction) == ("x0", "mean")
    assert found.generator_timesteps == (999, 499) and found.latent_shape == SHAPE


def step_sizes(**changes):
    """How far a parameter moves at the first and the second update, by network."""
    optimizers = assembly.optimizers_of(dry(**changes))
    sizes = {}
    for name, optimizer in zip(step.Optimizers._fields, optimizers):
        params = {"w": jnp.ones(3)}
        state = optimizer.init(params)
        sizes[name] = []
        for _ in range(2):
            after, state = step.update(optimizer, {"w": jnp.ones(3)}, params, state)
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
    optimizer = assembly.optimizers_of(dry(**{"optim.clip_norm": 0.5})).generator
    state = optimizer.init({"w": jnp.ones(4)})
    _, state = optimizer.update({"w": jnp.ones(4)}, state, {"w": jnp.ones(4)})
    second_moment = [leaf for leaf in state[1] if isinstance(leaf, dict)][0]["w"]
    np.testing.assert_allclose(second_moment, 0.001 * 0.25**2, rtol=1e-4)
