# SPDX-License-Identifier: Apache-2.0
"""The study whose optimum is known: closed forms, quadrature, and that training ends there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from di_star_jax.objectives import Constants
from di_star_jax.studies import optimum, quadrature
from di_star_jax.studies.optimum import KL, REFERENCE, Row
from di_star_jax.studies.page import with_section

POINTS = np.random.default_rng(0).normal(size=(64, 2)) * 1.5


def modes(mixture):
    return optimum.Modes(*(jnp.asarray(x, jnp.float32) for x in mixture[1:]))


def log_density(mixture, x):
    """[N], in NumPy."""
    logs = []
    for weight, mean, cov in zip(
        mixture.weight, mixture.mean, np.asarray(quadrature.covariance(mixture.factor))
    ):
        off = x - mean
        square = np.einsum("ni,ij,nj->n", off, np.linalg.inv(cov), off)
        logs.append(np.log(weight) - 0.5 * (square + np.log(np.linalg.det(2 * np.pi * cov))))
    return np.logaddexp.reduce(logs, axis=0)


def test_samples_have_the_modes_weights_means_and_covariances():
    z = jax.random.normal(jax.random.key(0), (400_000, 2))
    x0 = np.asarray(optimum.sample(modes(REFERENCE.cond), z))
    nearest = ((x0[:, None] - REFERENCE.cond.mean) ** 2).sum(-1).argmin(-1)
    np.testing.assert_allclose(np.bincount(nearest) / len(x0), optimum.WEIGHTS, atol=0.003)
    for k, cov in enumerate(np.asarray(quadrature.covariance(REFERENCE.cond.factor))):
        np.testing.assert_allclose(x0[nearest == k].mean(0), REFERENCE.cond.mean[k], atol=0.005)
        np.testing.assert_allclose(np.cov(x0[nearest == k].T), cov, atol=0.003)


def test_a_mixtures_noise_prediction_is_minus_sigma_times_its_score():
    t = jnp.full(len(POINTS), 300)
    alpha, sigma = (float(of_t[300]) for of_t in optimum.SCHEDULE)
    cov = alpha**2 * np.asarray(quadrature.covariance(REFERENCE.cond.factor)) + sigma**2 * np.eye(2)
    factor = np.linalg.cholesky(cov)[:, [0, 1, 1], [0, 0, 1]]
    noised = REFERENCE.cond._replace(mean=alpha * REFERENCE.cond.mean, factor=factor)
    moves = 1e-5 * np.eye(2)
    score = [
        (log_density(noised, POINTS + m) - log_density(noised, POINTS - m)) / 2e-5 for m in moves
    ]
    found = optimum.noise_of(modes(REFERENCE.cond), jnp.asarray(optimum.WEIGHTS), POINTS, t)
    np.testing.assert_allclose(found, -sigma * np.stack(score, axis=-1), atol=1e-4)


def test_the_tilted_mixture_is_the_reference_times_the_exponential_of_the_reward():
    tilted = optimum.tilted(REFERENCE.cond, 4.0)
    ratio = log_density(tilted, POINTS) - log_density(REFERENCE.cond, POINTS)
    ratio -= 4.0 * np.asarray(optimum.reward(POINTS))
    np.testing.assert_allclose(ratio, ratio[0], atol=1e-5)


@pytest.mark.parametrize(("nodes", "within"), [(quadrature.NODES, 1e-3), (32, 5e-5)])
def test_quadrature_finds_the_closed_form_of_the_rewarded_kl(nodes, within, monkeypatch):
    monkeypatch.setattr(quadrature, "NODES", nodes)
    quadrature.field.clear_cache()
    row = Row(KL | {"generator_times": (0, 0)}, 0.0034)
    found = quadrature.optimum(REFERENCE, quadrature.define(row.settings, row.scale))
    quadrature.field.clear_cache()
    wanted = optimum.optimum_of(row)
    np.testing.assert_allclose(found.mean, wanted.mean, atol=within)
    np.testing.assert_allclose(found.factor, wanted.factor, atol=within)


def test_the_reference_is_a_least_point_of_the_score_divergence_and_not_of_a_rewarded_one():
    settings = Row({"constants": Constants(distance="l2"), "generator_times": (300, 300)}).settings
    with jax.enable_x64(True):
        theta = np.asarray(quadrature.flat(jax.tree.map(jnp.asarray, REFERENCE.cond)))
        alone, rewarded = (
            np.asarray(quadrature.field(theta, REFERENCE, quadrature.define(settings, scale)))
            for scale in (0.0, 0.1)
        )
    assert np.linalg.norm(alone) < 1e-10
    np.testing.assert_allclose(  # of the reward, -|x|^2 / 2
        rewarded[:8].reshape(4, 2), 0.1 * optimum.WEIGHTS[:, None] * REFERENCE.cond.mean, atol=1e-9
    )


@pytest.mark.parametrize("times", [(20, 980), (0, 999), (7, 7), (0, 5)])
def test_the_mean_over_a_few_times_is_that_over_all(times):
    few, share = quadrature.thinned(*times)
    every = np.arange(times[0], times[1] + 1)
    sigma = [quadrature.schedule(t)[1] for t in (few, every)]
    np.testing.assert_allclose(share @ sigma[0] ** 2, np.mean(sigma[1] ** 2), rtol=1e-5)


# The closed form, and the theorem: rewarded KL, and the score divergence without a reward. The
# standard errors of 8 blocks of 60 steps are 0.01 at most; the start is 0.5 and more away.
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            Row(KL | {"generator_times": (0, 0)}, 0.0034), id="tilted", marks=pytest.mark.slow
        ),
        pytest.param(Row({}), id="reference", marks=pytest.mark.long),
    ],
)
def test_training_ends_at_the_known_optimum(row):
    plan = optimum.Plan(approach=8, averaged=8, block=60)
    result = optimum.run_row(row, plan, optimum.STARTS[1:])
    assert np.abs(result.error).max() < 0.03  # three of them
    assert np.sqrt((result.in_standard_errors**2).mean()) < 2.0


def test_a_section_is_replaced_and_all_others_stay(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(with_section(page, "Title", "One", "first\n"))
    page.write_text(with_section(page, "Title", "Two", "second"))
    page.write_text(with_section(page, "Title", "One", "third"))
    assert page.read_text() == "# Title\n\n## One\n\nthird\n\n## Two\n\nsecond\n"
