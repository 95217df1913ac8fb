# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from di_star_jax import diffusion
from di_star_jax.studies import mixture


def test_exact_samples_have_no_divergence_and_the_right_modes():
    measured = mixture.measure(np.asarray(mixture.sample_mixture(jax.random.key(0), 200_000)))
    assert measured["kl"] < 0.02 and measured["outside"] < 1e-3
    np.testing.assert_allclose(
        measured["modes"], mixture.MODE_WEIGHTS, atol=0.03
    )  # nearest is not quite which


def test_exact_noise_prediction_is_the_mean_noise_given_x_t():
    # Among samples of (x0, eps) that land near one x_t, the mean eps is the prediction.
    x0, eps = (
        mixture.sample_mixture(jax.random.key(1), 2_000_000),
        jax.random.normal(jax.random.key(2), (2_000_000, 2)),
    )
    t = jnp.full(len(x0), 500)
    x_t = diffusion.add_noise(x0, eps, mixture.SCHEDULE.alpha[t], mixture.SCHEDULE.sigma[t])
    point = jnp.array([0.4, -0.3])
    near = jnp.linalg.norm(x_t - point, axis=-1) < 0.1
    np.testing.assert_allclose(
        mixture.exact_eps(point[None], jnp.array([500]))[0], eps[near].mean(0), atol=0.02
    )


@pytest.mark.parametrize("name", mixture.METHODS)
def test_every_method_trains(name):
    settings = dataclasses.replace(mixture.SETTINGS, **mixture.METHODS[name])
    start = mixture.init_network(0)
    trained = mixture.train(start, settings, 1.0, steps=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(trained)))
