# SPDX-License-Identifier: Apache-2.0
"""The losses against closed forms: p_theta = N(theta, I), a Gaussian or mixture reference, exact scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from di_star_jax import diffusion
from di_star_jax.objectives import (OBJECTIVES, denoising_score_matching, di_star, l2_grad, pseudo_huber_grad,
                                    score_divergence)

SDXL = diffusion.make_schedule(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                               beta_schedule="scaled_linear")
SAMPLES = 400_000
T = 399
THETA = jnp.array([0.9, -0.6])
CENTRES = jnp.array([[0.0, 0.0], [2.5, 0.5], [-1.0, 2.0]])
WEIGHTS = jnp.array([0.5, 0.3, 0.2])


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


def gaussian_eps(mean):
    """eps(x_t, t) of data N(mean, I): x_t ~ N(alpha_t mean, I), eps = -sigma_t score."""
    def eps_fn(x_t, t):
        alpha_t, sigma_t = SDXL.alpha[t], SDXL.sigma[t]
        return sigma_t[:, None] * (x_t - alpha_t[:, None] * mean[None])
    return eps_fn


def mixture_eps(centres, weights):
    """eps(x_t, t) of a mixture of N(centre, I)."""
    def log_density(x, alpha):
        return jax.nn.logsumexp(-0.5 * jnp.sum((x[None] - alpha * centres) ** 2, axis=-1) + jnp.log(weights))

    def eps_fn(x_t, t):
        score = jax.vmap(jax.grad(log_density))(x_t, SDXL.alpha[t])
        return -SDXL.sigma[t][:, None] * score
    return eps_fn


REFERENCES = {"gaussian": gaussian_eps(jnp.zeros(2)), "mixture": mixture_eps(CENTRES, WEIGHTS)}
DISTANCES = {
    "l2": (l2_grad, lambda y: jnp.sum(y * y, axis=-1)),
    "pseudo_huber": (functools.partial(pseudo_huber_grad, c=0.3),
                     lambda y: jnp.sqrt(jnp.sum(y * y, axis=-1) + 0.3**2) - 0.3),
}


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_of_score_divergence_is_the_derivative_of_its_definition(reference, distance):
    eps_ref = REFERENCES[reference]
    distance_grad, d = DISTANCES[distance]
    t = jnp.full((SAMPLES,), T)
    key_z, key_eps, key_x = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def loss_gradient(theta):
        z, eps = jax.random.normal(key_z, (SAMPLES, 2)), jax.random.normal(key_eps, (SAMPLES, 2))

        def loss(theta):
            return score_divergence(theta[None] + z, t, eps, eps_psi=gaussian_eps(THETA), eps_ref=eps_ref,
                                    distance_grad=distance_grad, schedule=SDXL).mean()
        return jax.grad(loss)(theta)

    @jax.jit
    def divergence(theta):
        """Eq. 3.2 at one t, x_t drawn from p_THETA whatever theta is."""
        x_t = SDXL.alpha[T] * THETA[None] + jax.random.normal(key_x, (SAMPLES, 2))
        return d(gaussian_eps(theta)(x_t, t) - eps_ref(x_t, t)).mean()

    h = 0.05
    numerical = jnp.stack([(divergence(THETA + h * e) - divergence(THETA - h * e)) / (2 * h) for e in jnp.eye(2)])
    gradient = loss_gradient(THETA)
    error = jnp.linalg.norm(gradient - numerical) / jnp.linalg.norm(numerical)
    assert error < 0.01, f"gradient {gradient}, derivative {numerical}, relative error {error:.4f}"


def test_l2_gradient_between_unit_gaussians_is_its_closed_form():
    # y = alpha theta (sigma_t of it in eps-form), so ||y||^2 has the derivative 2 alpha^2 sigma^2 theta.
    t = jnp.full((SAMPLES,), T)
    z, eps = (jax.random.normal(k, (SAMPLES, 2)) for k in jax.random.split(jax.random.key(1)))

    def loss(theta):
        return score_divergence(theta[None] + z, t, eps, eps_psi=gaussian_eps(THETA), eps_ref=REFERENCES["gaussian"],
                                distance_grad=l2_grad, schedule=SDXL).mean()

    expected = 2 * SDXL.alpha[T] ** 2 * SDXL.sigma[T] ** 2 * THETA
    np.testing.assert_allclose(jax.grad(loss)(THETA), expected, rtol=0.01)


def test_pseudo_huber_grad_is_the_derivative_of_the_distance():
    y = jax.random.normal(jax.random.key(2), (3, 4, 5, 2))
    c = 0.7
    distance = lambda y: (jnp.sqrt(jnp.sum(y**2, axis=(1, 2, 3)) + c**2) - c).sum()  # Eq. 3.8
    np.testing.assert_allclose(pseudo_huber_grad(y, c=c), jax.grad(distance)(y), rtol=1e-5)


def test_pseudo_huber_of_equal_scores_has_finite_zero_gradient():
    x0 = jax.random.normal(jax.random.key(3), (4, 2))
    eps = jax.random.normal(jax.random.key(4), (4, 2))
    same = gaussian_eps(THETA)
    for t in (0, 999):
        grad = jax.grad(lambda x0: di_star(x0, jnp.full((4,), t), eps, eps_psi=same, eps_ref=same, huber_c=0.00054,
                                           schedule=SDXL).sum())(x0)
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_gradient_flows_through_x_t_into_both_score_networks():
    x0, eps = jax.random.normal(jax.random.key(5), (2, 8, 2))
    t = jnp.full((8,), T)
    stopped = lambda eps_fn: lambda x_t, t: eps_fn(jax.lax.stop_gradient(x_t), t)

    def gradient(eps_psi, eps_ref):
        return jax.grad(lambda x0: di_star(x0, t, eps, eps_psi=eps_psi, eps_ref=eps_ref, huber_c=0.1,
                                           schedule=SDXL).sum())(x0)
    psi, ref = gaussian_eps(THETA), REFERENCES["mixture"]
    full = gradient(psi, ref)
    assert not np.allclose(full, gradient(stopped(psi), ref), rtol=1e-2)
    assert not np.allclose(full, gradient(psi, stopped(ref)), rtol=1e-2)


def test_assistant_loss_is_least_at_the_true_score():
    z, eps = jax.random.normal(jax.random.key(6), (2, 100_000, 2))
    t = jax.random.randint(jax.random.key(7), (100_000,), 0, 1000)

    def loss(mean):
        return denoising_score_matching(THETA[None] + z, t, eps, eps_psi=gaussian_eps(mean), schedule=SDXL).mean()

    gradient = jax.grad(loss)(THETA)
    assert jnp.linalg.norm(gradient) < 0.01 * jnp.linalg.norm(jax.grad(loss)(THETA + 1.0))


def test_per_sample_losses_do_not_mix_samples():
    x0, eps = jax.random.normal(jax.random.key(8), (2, 6, 2))
    t = jnp.array([20, 200, 399, 500, 700, 980])
    kw = dict(eps_psi=gaussian_eps(THETA), eps_ref=REFERENCES["mixture"], huber_c=0.1, schedule=SDXL)
    for objective in OBJECTIVES.values():
        whole = objective(x0, t, eps, **kw)
        assert whole.shape == (6,)
        np.testing.assert_allclose(whole[2:3], objective(x0[2:3], t[2:3], eps[2:3], **kw), rtol=1e-5)
