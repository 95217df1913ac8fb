# SPDX-License-Identifier: Apache-2.0
"""Every objective against closed forms: p_theta = N(theta, I), a Gaussian or mixture reference,
exact scores.

The networks' parameters are held at THETA, where the gradient is taken; the definitions are
differentiated numerically with common random numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from di_star_jax import diffusion
from di_star_jax.diffusion import add_noise, guide
from di_star_jax.gradients import evaluate
from di_star_jax.objectives import (
    OBJECTIVES,
    WEIGHTINGS,
    Constants,
    Point,
    denoising_score_matching,
    implicit_guidance,
    l2_grad,
    pseudo_huber_grad,
)

SDXL = diffusion.make_schedule(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
SAMPLES = 200_000
T = 399
ALPHA, SIGMA = SDXL.alpha[T], SDXL.sigma[T]
DIMS = (1, 2, 16)
CONSTANTS = Constants(huber_c=0.2, alpha_cfg=0.7, sid_alpha=1.2)


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


def log_normal(x, mean):
    """log N(mean, I) of x [B, d] up to a constant, at every t: data of unit variance keep it."""
    return -0.5 * jnp.sum((x - mean[None]) ** 2, axis=-1)


def log_mixture(x, centres, weights):
    """The same for a mixture of N(centre, I)."""
    parts = jnp.stack([log_normal(x, centre) for centre in centres], axis=-1)
    return jax.nn.logsumexp(parts + jnp.log(weights)[None], axis=-1)


def log_density(name, dim, part="cond"):
    """log p_ref,t of x_t [B, d] (alpha_t scales the means) for the reference's conditional or null
    part.
    """
    shift = 0.0 if part == "cond" else 0.4
    if name == "gaussian":
        mean = jnp.full((dim,), shift)
        return lambda x, alpha: log_normal(x, alpha * mean)
    centres = jnp.zeros((3, dim)).at[1, 0].set(2.5).at[2, -1].set(2.0).at[2, 0].add(-1.0) + shift
    weights = jnp.array([0.5, 0.3, 0.2]) if part == "cond" else jnp.ones(3) / 3
    return lambda x, alpha: log_mixture(x, alpha * centres, weights)


def eps_of(density):
    """eps(x_t, t) = -sigma_t score, for one time in the whole batch."""
    score = jax.grad(lambda x, alpha: density(x, alpha).sum())
    return lambda x_t, t: -SDXL.sigma[t[0]] * score(x_t, SDXL.alpha[t[0]])


def networks_of(psi, guided, cond, null):
    """Functions (x_t, t) -> eps by the names that objectives want."""
    return {"psi": psi, "guided": guided, "cond": cond, "null": null}


def scores(theta, name, omega=1.0):
    """The assistant knows theta; the reference has guidance inside and its parts."""
    dim = len(theta)
    cond, null = (eps_of(log_density(name, dim, part)) for part in ("cond", "null"))
    return networks_of(
        eps_of(lambda x, alpha: log_normal(x, alpha * theta)),
        lambda x, t: guide(cond(x, t), null(x, t), omega),
        cond,
        null,
    )


def loss_of(objective, x0, t, eps, networks, constants=CONSTANTS):
    """An objective's loss [B], its scores evaluated as the step of SDXL does."""
    alpha_t, sigma_t = SDXL.alpha[t], SDXL.sigma[t]
    point = Point(x0, add_noise(x0, eps, alpha_t, sigma_t), eps, alpha_t, sigma_t)
    row = OBJECTIVES[objective]
    return row.loss(evaluate(row, networks, t, point.x_t), point, constants)


def log_ref(x, name, omega):
    """log of the guided reference's density, up to a constant: its score is the guided one."""
    cond, null = (log_density(name, x.shape[1], part)(x, ALPHA) for part in ("cond", "null"))
    return null + omega * (cond - null)


def y_of(theta, x, name, omega):
    """y_t = eps_psi - eps_ref at x [B, d]."""
    t = jnp.full(x.shape[:1], T)
    networks = scores(theta, name, omega)
    return networks["psi"](x, t) - networks["guided"](x, t)


def huber(y):
    c = CONSTANTS.huber_c * y.shape[1] ** 0.5
    return jnp.sqrt(jnp.sum(y * y, axis=-1) + c**2) - c


def squared(y):
    return jnp.sum(y * y, axis=-1)


def divergence(distance):
    """Eq. 3.2 at one t: x_t from p_fixed whatever theta is; the distance of p_theta's score."""
    return lambda theta, fixed, x_theta, x_fixed, **kw: distance(y_of(theta, x_fixed, **kw)).mean()


def outside_definition(theta, fixed, x_theta, x_fixed, *, name, omega):
    """Pseudo-Huber to the unguided reference, minus alpha_cfg E sigma log p(x|c) / p(x), with x_t ~
    p_theta.
    """
    implicit = sum(
        sign * log_density(name, len(theta), part)(x_theta, ALPHA)
        for part, sign in (("cond", 1), ("null", -1))
    )
    return (
        divergence(huber)(theta, fixed, x_theta, x_fixed, name=name, omega=1.0)
        - CONSTANTS.alpha_cfg * SIGMA * implicit.mean()
    )


def sid_definition(theta, fixed, x_theta, x_fixed, **kw):
    """L2, and 2 (1 - alpha) times how ||y||^2 changes along x_t: the whole derivative at alpha =
    1/2.
    """
    path = squared(y_of(fixed, x_theta, **kw)).mean()
    return (
        divergence(squared)(theta, fixed, x_theta, x_fixed, **kw)
        + 2 * (1 - CONSTANTS.sid_alpha) * path
    )


def kl_definition(theta, fixed, x_theta, x_fixed, *, name, omega):
    """sigma_t KL(p_theta,t | p_ref,t); the entropy of N(theta, I) is constant."""
    del fixed, x_fixed
    return SIGMA * (log_normal(x_theta, ALPHA * theta) - log_ref(x_theta, name, omega)).mean()


def dmd_definition(theta, fixed, x_theta, x_fixed, *, name, omega):
    """KL's integrand along x_t, each sample over DMD's divisor: sigma_t^2 / alpha_t / (alpha_t
    mean|x_0 - x_ref|).
    """
    t = jnp.full(x_fixed.shape[:1], T)
    z, eps = noise(len(fixed))
    x0 = fixed[None] + z
    x_ref = diffusion.eps_to_x0(
        x_fixed,
        scores(fixed, name, omega)["guided"](x_fixed, t),
        SDXL.alpha[t],
        SDXL.sigma[t],
    )
    weight = SIGMA**2 / ALPHA**2 / jnp.maximum(jnp.abs(x0 - x_ref).mean(axis=-1), 1e-5)
    return (weight * (log_normal(x_theta, ALPHA * fixed) - log_ref(x_theta, name, omega))).mean()


DEFINITIONS = {
    "di_star": divergence(huber),
    "di_star_l2": divergence(squared),
    "di_star_outside": outside_definition,
    "sid": sid_definition,
    "kl": kl_definition,
    "dmd": dmd_definition,
    "reward_only": lambda theta, fixed, x_theta, x_fixed, **kw: 0.0 * theta.sum(),
}


def samples(dim):
    return SAMPLES if dim < 16 else SAMPLES // 4


@functools.lru_cache
def noise(dim):
    """z and eps [samples, dim], antithetic, so that terms of mean zero are zero."""
    half = [
        jax.random.normal(k, (samples(dim) // 2, dim))
        for k in jax.random.split(jax.random.key(dim))
    ]
    return tuple(jnp.concatenate([h, -h]) for h in half)


@functools.lru_cache
def gradients(objective, name, dim):
    """(gradient of the loss, derivative of the definition) with respect to theta, along the first
    axis and another direction.
    """
    theta = jnp.linspace(0.9, -0.6, dim) if dim > 1 else jnp.array([0.9])
    omega = 1.0 if objective == "di_star_outside" else 1.6
    z, eps = noise(dim)
    t = jnp.full((samples(dim),), T)

    @jax.jit
    def of_loss(theta):
        def loss(mean):
            return loss_of(objective, mean[None] + z, t, eps, scores(theta, name, omega)).mean()

        return jax.grad(loss)(theta)

    @jax.jit
    def definition(moved):
        x = functools.partial(add_noise, eps=eps, alpha_t=SDXL.alpha[t], sigma_t=SDXL.sigma[t])
        return DEFINITIONS[objective](
            moved, theta, x(moved[None] + z), x(theta[None] + z), name=name, omega=omega
        )

    h = 0.02
    directions = jnp.stack([jnp.eye(dim)[0], jnp.full((dim,), dim**-0.5)])[:dim]
    numerical = jnp.stack(
        [(definition(theta + h * e) - definition(theta - h * e)) / (2 * h) for e in directions]
    )
    return directions @ of_loss(theta), numerical


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_is_the_derivative_of_the_definition(objective, name, dim):
    gradient, numerical = gradients(objective, name, dim)
    error = jnp.linalg.norm(gradient - numerical) / max(float(jnp.linalg.norm(numerical)), 1e-6)
    assert error < 0.01, f"gradient {gradient}, derivative {numerical}, relative error {error:.4f}"


def batch(dim=4, size=64, t=None, seed=3):
    x0, eps = (jax.random.normal(k, (size, dim)) for k in jax.random.split(jax.random.key(seed)))
    return x0, jnp.full((size,), T if t is None else t), eps


def dx0(objective, x0, t, eps, networks, constants=CONSTANTS):
    return jax.grad(lambda x0: loss_of(objective, x0, t, eps, networks, constants).sum())(x0)


THETA = jnp.array([0.9, -0.6, 0.3, 0.0])


def test_kl_with_guidance_inside_equals_guidance_outside():
    x0, t, eps = batch()
    inside = dx0("kl", x0, t, eps, scores(THETA, "mixture", omega=1.0 + 2.5))

    def outside(x0):
        networks = scores(THETA, "mixture", omega=1.0)
        x_t = add_noise(x0, eps, SDXL.alpha[t], SDXL.sigma[t])
        extra = implicit_guidance(networks["cond"](x_t, t), networks["null"](x_t, t), x_t)
        return (loss_of("kl", x0, t, eps, networks) + 2.5 * extra).sum()

    np.testing.assert_allclose(inside, jax.grad(outside)(x0), rtol=1e-4, atol=1e-5)


def test_sid_at_alpha_one_equals_l2():
    x0, t, eps = batch()
    networks = scores(THETA, "mixture", omega=3.0)
    ours = dx0("sid", x0, t, eps, networks, CONSTANTS._replace(sid_alpha=1.0))
    np.testing.assert_allclose(ours, dx0("di_star_l2", x0, t, eps, networks), rtol=1e-4, atol=1e-4)
    half = dx0("sid", x0, t, eps, networks, CONSTANTS._replace(sid_alpha=0.5))
    assert not np.allclose(ours, half, rtol=0.05)


def test_kl_normalised_equals_dmd():
    x0, t, eps = batch()
    networks = scores(THETA, "mixture", omega=3.0)
    x_t = add_noise(x0, eps, SDXL.alpha[t], SDXL.sigma[t])
    x_ref = diffusion.eps_to_x0(x_t, networks["guided"](x_t, t), SDXL.alpha[t], SDXL.sigma[t])
    divisor = jnp.abs(x0 - x_ref).mean(axis=-1, keepdims=True)
    normalised = dx0("kl", x0, t, eps, networks) * SIGMA / ALPHA**2 / divisor
    np.testing.assert_allclose(dx0("dmd", x0, t, eps, networks), normalised, rtol=1e-4, atol=1e-5)


def test_diff_instructs_x0_form_is_kl_weighted_by_x0():
    # Its code sums (x_psi - x_ref)^T x_0: sigma_t / alpha_t^2 times eps-form, of which "x0" gives
    # sigma_t / alpha_t.
    x0, t, eps = batch()
    networks = scores(THETA, "mixture", omega=3.0)
    x_t = add_noise(x0, eps, SDXL.alpha[t], SDXL.sigma[t])
    difference = diffusion.eps_to_x0(
        x_t, networks["psi"](x_t, t), SDXL.alpha[t], SDXL.sigma[t]
    ) - diffusion.eps_to_x0(x_t, networks["guided"](x_t, t), SDXL.alpha[t], SDXL.sigma[t])
    weight = WEIGHTINGS["x0"](SDXL.alpha[t], SDXL.sigma[t])[:, None]
    np.testing.assert_allclose(
        difference * ALPHA, weight * dx0("kl", x0, t, eps, networks), rtol=1e-4, atol=1e-5
    )


def test_pseudo_huber_in_score_form_is_weighted_eps_form():
    # c -> 0: of differences over sigma_t the loss is 1 / sigma_t times that of eps-form.
    y, rest, t = *batch()[::2], jnp.full(64, 700)

    def product(y, rest):
        return jnp.sum(pseudo_huber_grad(y, c=1e-6) * rest, axis=-1)

    weighted = WEIGHTINGS["score"](SDXL.alpha[t], SDXL.sigma[t]) * product(y, rest)
    np.testing.assert_allclose(
        product(y / SDXL.sigma[700], rest / SDXL.sigma[700]), weighted, rtol=1e-4, atol=1e-5
    )


def test_reward_only_has_no_gradient():
    x0, t, eps = batch()
    np.testing.assert_array_equal(
        dx0("reward_only", x0, t, eps, scores(THETA, "gaussian")), 0.0 * x0
    )


@pytest.mark.parametrize("t", [0, 999])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_scores_have_finite_gradients_at_both_ends(objective, t):
    x0, t, eps = batch(t=t)
    same = eps_of(lambda x, alpha: log_normal(x, alpha * THETA))
    grad = dx0(objective, x0, t, eps, networks_of(same, same, same, same))
    np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_a_reference_that_predicts_x0_leaves_dmd_finite():
    x0, t, eps = batch()
    exact = networks_of(lambda x_t, t: 0.5 * eps, *(lambda x_t, t: eps,) * 3)
    assert np.isfinite(dx0("dmd", x0, t, eps, exact)).all()


@pytest.mark.parametrize("objective", ["di_star", "di_star_l2", "sid"])
def test_gradient_flows_through_x_t_into_both_score_networks(objective):
    x0, t, eps = batch()
    networks = scores(THETA, "mixture")
    full = dx0(objective, x0, t, eps, networks)
    for name in ("psi", "guided"):

        def cut(x_t, t, name=name):
            return networks[name](jax.lax.stop_gradient(x_t), t)

        assert not np.allclose(full, dx0(objective, x0, t, eps, networks | {name: cut}), rtol=1e-2)


@pytest.mark.parametrize("objective", ["kl", "dmd"])
def test_kl_asks_for_no_gradient_of_a_score_network(objective):
    @jax.custom_jvp
    def network(x_t):
        return 0.3 * x_t

    @network.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    x0, t, eps = batch()
    dx0(objective, x0, t, eps, networks_of(*(lambda x_t, t: network(x_t),) * 4))


def test_pseudo_huber_grad_is_the_derivative_of_the_distance():
    y = jax.random.normal(jax.random.key(2), (3, 4, 5, 2))
    c = 0.7

    def distance(y):  # Eq. 3.8
        return (jnp.sqrt(jnp.sum(y**2, axis=(1, 2, 3)) + c**2) - c).sum()

    np.testing.assert_allclose(pseudo_huber_grad(y, c=c), jax.grad(distance)(y), rtol=1e-5)


def test_l2_grad_is_the_derivative_of_the_square():
    y = jax.random.normal(jax.random.key(2), (3, 4))
    np.testing.assert_allclose(l2_grad(y), jax.grad(lambda y: (y**2).sum())(y), rtol=1e-6)


def test_assistant_loss_is_least_at_the_true_score():
    z, eps = noise(2)
    t = jnp.full((SAMPLES,), T)
    theta = jnp.array([0.9, -0.6])
    x_t = add_noise(theta[None] + z, eps, SDXL.alpha[t], SDXL.sigma[t])

    def loss(mean):
        psi = eps_of(lambda x, alpha: log_normal(x, alpha * mean))
        return denoising_score_matching(psi(x_t, t), eps).mean()

    assert jnp.linalg.norm(jax.grad(loss)(theta)) < 0.01 * jnp.linalg.norm(
        jax.grad(loss)(theta + 1.0)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_per_sample_losses_do_not_mix_samples(objective):
    x0, t, eps = batch(size=6)
    networks = scores(THETA, "mixture")
    whole = loss_of(objective, x0, t, eps, networks)
    assert whole.shape == (6,)
    np.testing.assert_allclose(
        whole[2:3], loss_of(objective, x0[2:3], t[2:3], eps[2:3], networks), rtol=1e-5
    )
