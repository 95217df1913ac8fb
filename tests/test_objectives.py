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
    DISTANCES,
    OBJECTIVES,
    OF_X0,
    Constants,
    Point,
    denoising_score_matching,
    regulariser,
)

SDXL = diffusion.make_schedule(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
SAMPLES = 200_000
T = 399
ALPHA, SIGMA = SDXL.alpha[T], SDXL.sigma[T]
CONSTANTS = Constants(huber_c=0.2, power=1.5, alpha_cfg=0.7, sid_alpha=1.2)
# Name, distance, weighting: every objective in every space (x0 below), every distance in one.
CASES = [(name, "pseudo_huber", space) for name in OBJECTIVES for space in ("eps", "score")]
CASES += [("di_star", distance, "x0") for distance in DISTANCES if distance != "pseudo_huber"]
CASES += [("di_star", "l2", "score"), ("kl", "pseudo_huber", "x0_normalised")]


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
    """The assistant, and the reference by the names that objectives want."""
    return psi, lambda x_t, t: {
        "guided": guided(x_t, t),
        "cond": cond(x_t, t),
        "null": null(x_t, t),
    }


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


def loss_of(objective, x0, t, eps, networks, constants=CONSTANTS, weighting="eps"):
    """An objective's loss [B], its scores evaluated as the step of SDXL does."""
    alpha_t, sigma_t = SDXL.alpha[t], SDXL.sigma[t]
    point = Point(x0, add_noise(x0, eps, alpha_t, sigma_t), eps, alpha_t, sigma_t)
    row = OBJECTIVES[objective]
    return regulariser(row, weighting, evaluate(row, networks, t, point.x_t), point, constants)


def log_ref(x, name, omega):
    """log of the guided reference's density, up to a constant: its score is the guided one."""
    cond, null = (log_density(name, x.shape[1], part)(x, ALPHA) for part in ("cond", "null"))
    return null + omega * (cond - null)


def y_of(theta, x, name, omega):
    """y_t = eps_psi - eps_ref at x [B, d]."""
    t = jnp.full(x.shape[:1], T)
    networks = scores(theta, name, omega)
    psi, reference = networks
    return psi(x, t) - reference(x, t)["guided"]


# What predictions of eps are times in each space, from its own definition: s = -eps / sigma and
# x_0 = (x_t - sigma eps) / alpha.
SCALES = {"eps": 1.0, "score": 1 / SIGMA, "x0": SIGMA / ALPHA, "x0_normalised": SIGMA / ALPHA}


def pseudo_huber(y):
    c = CONSTANTS.huber_c * y.shape[1] ** 0.5
    return jnp.sqrt(jnp.sum(y * y, axis=-1) + c**2) - c


def huber(y):
    """Over c, so that it rises with slope 1."""
    c, norm = CONSTANTS.huber_c * y.shape[1] ** 0.5, jnp.linalg.norm(y, axis=-1)
    return jnp.where(norm < c, norm**2 / (2 * c), norm - c / 2)


def squared(y):
    return jnp.sum(y * y, axis=-1)


def power(y):
    return jnp.linalg.norm(y, axis=-1) ** CONSTANTS.power


OF_DISTANCE = {"pseudo_huber": pseudo_huber, "huber": huber, "l2": squared, "power": power}


def divergence(theta, fixed, x_theta, x_fixed, *, distance, weighting, **kw):
    """Eq. 3.2 at one t: x_t from p_fixed whatever theta is; the distance of p_theta's score."""
    y = SCALES[weighting] * y_of(theta, x_fixed, **kw)
    return OF_DISTANCE[distance](y).mean()


def rate(weighting):
    """w(t) of KL: 1 in score space, as in the papers.

    In x_0 the differences of predictions are summed with x_0, not x_t.
    """
    return SCALES[weighting] * SIGMA / (ALPHA if weighting in OF_X0 else 1.0)


def implicit(theta, x_theta, *, name, weighting):
    """-alpha_cfg w(t) E log p(x|c) / p(x), with x_t ~ p_theta (Theorem 3.2)."""
    parts = [log_density(name, len(theta), part)(x_theta, ALPHA) for part in ("cond", "null")]
    return -CONSTANTS.alpha_cfg * rate(weighting) * (parts[0] - parts[1]).mean()


def outside_definition(theta, fixed, x_theta, x_fixed, *, name, weighting, **kw):
    return divergence(
        theta, fixed, x_theta, x_fixed, name=name, weighting=weighting, **kw
    ) + implicit(theta, x_theta, name=name, weighting=weighting)


def sid_definition(theta, fixed, x_theta, x_fixed, *, distance, weighting, **kw):
    """L2, and 2 (1 - alpha) times how ||y||^2 changes along x_t: the whole derivative at alpha =
    1/2.
    """
    path = squared(SCALES[weighting] * y_of(fixed, x_theta, **kw)).mean()
    given = dict(distance="l2", weighting=weighting, **kw)
    whole = divergence(theta, fixed, x_theta, x_fixed, **given)
    return whole + 2 * (1 - CONSTANTS.sid_alpha) * path


def kl_definition(theta, fixed, x_theta, x_fixed, *, name, omega, weighting, **kw):
    """w(t) KL(p_theta,t | p_ref,t); the entropy of N(theta, I) is constant.

    Normalised it is KL's integrand along x_t, each sample over DMD's divisor mean|x_0 - x_ref|.
    """
    weight = rate(weighting)
    if weighting == "x0_normalised":
        z, _ = noise(len(fixed))
        x_ref = x0_of_reference(x_fixed, fixed, name, omega)
        weight /= jnp.maximum(jnp.abs(fixed[None] + z - x_ref).mean(axis=-1), 1e-5)
    of_theta = log_normal(x_theta, ALPHA * (fixed if weighting == "x0_normalised" else theta))
    return (weight * (of_theta - log_ref(x_theta, name, omega))).mean()


def x0_of_reference(x_t, fixed, name, omega):
    t = jnp.full(x_t.shape[:1], T)
    _, reference = scores(fixed, name, omega)
    return diffusion.eps_to_x0(x_t, reference(x_t, t)["guided"], SDXL.alpha[t], SDXL.sigma[t])


def kl_outside_definition(theta, fixed, x_theta, x_fixed, *, name, weighting, **kw):
    inside = kl_definition(theta, fixed, x_theta, x_fixed, name=name, weighting=weighting, **kw)
    return inside + implicit(theta, x_theta, name=name, weighting=weighting)


DEFINITIONS = {
    "di_star": divergence,
    "di_star_outside": outside_definition,
    "sid": sid_definition,
    "kl": kl_definition,
    "kl_outside": kl_outside_definition,
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
def gradients(case, name, dim, omega):
    """(gradient of the loss, derivative of the definition) with respect to theta, along the first
    axis and another direction.
    """
    objective, distance, weighting = case
    constants = CONSTANTS._replace(distance=distance)
    theta = jnp.linspace(0.9, -0.6, dim) if dim > 1 else jnp.array([0.9])
    z, eps = noise(dim)
    t = jnp.full((samples(dim),), T)

    # z, eps and t are arguments: of constants XLA would fold what it can, for seconds.
    @jax.jit
    def of_loss(theta, z, eps, t):
        def loss(mean):
            networks = scores(theta, name, omega)
            return loss_of(objective, mean[None] + z, t, eps, networks, constants, weighting).mean()

        return jax.grad(loss)(theta)

    @jax.jit
    def definition(moved, z, eps, t):
        x = functools.partial(add_noise, eps=eps, alpha_t=SDXL.alpha[t], sigma_t=SDXL.sigma[t])
        return DEFINITIONS[objective](
            moved,
            theta,
            x(moved[None] + z),
            x(theta[None] + z),
            name=name,
            omega=omega,
            distance=distance,
            weighting=weighting,
        )

    h = 0.02
    directions = jnp.stack([jnp.eye(dim)[0], jnp.full((dim,), dim**-0.5)])[:dim]
    drawn = z, eps, t
    numerical = jnp.stack(
        [
            (definition(theta + h * e, *drawn) - definition(theta - h * e, *drawn)) / (2 * h)
            for e in directions
        ]
    )
    return directions @ of_loss(theta, *drawn), numerical


def check(case, name, dim, omega=1.6):
    gradient, numerical = gradients(case, name, dim, omega)
    error = jnp.linalg.norm(gradient - numerical) / max(float(jnp.linalg.norm(numerical)), 1e-6)
    assert error < 0.01, f"gradient {gradient}, derivative {numerical}, relative error {error:.4f}"


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradient_is_the_derivative_of_the_definition_in_every_space(case):
    check(case, "mixture", 2)


# Every objective on the mixture, and in more dimensions one whose loss depends on their number.
_TRIED = [(objective, "mixture", 2) for objective in OBJECTIVES] + [("di_star", "mixture", 16)]
_MORE = [
    (o, name, dim) for o in OBJECTIVES for name in ("gaussian", "mixture") for dim in (1, 2, 16)
]


@pytest.mark.parametrize(
    "objective, name, dim",
    _TRIED + [pytest.param(*c, marks=pytest.mark.long) for c in _MORE if c not in _TRIED],
)
def test_gradient_is_the_derivative_of_the_definition(objective, name, dim):
    check((objective, "pseudo_huber", "x0"), name, dim)


@pytest.mark.parametrize("objective", ["di_star_outside", "kl_outside"])
def test_guidance_outside_goes_with_none_inside_too(objective):
    check((objective, "pseudo_huber", "x0"), "mixture", 2, omega=1.0)


def batch(dim=4, size=64, t=None, seed=3):
    x0, eps = (jax.random.normal(k, (size, dim)) for k in jax.random.split(jax.random.key(seed)))
    return x0, jnp.full((size,), T if t is None else t), eps


def dx0(objective, x0, t, eps, networks, constants=CONSTANTS, weighting="eps"):
    return jax.grad(
        lambda x0: loss_of(objective, x0, t, eps, networks, constants, weighting).sum()
    )(x0)


THETA = jnp.array([0.9, -0.6, 0.3, 0.0])


def test_kl_with_guidance_inside_equals_guidance_outside():
    x0, t, eps = batch()
    inside = dx0("kl", x0, t, eps, scores(THETA, "mixture", omega=1.0 + 2.5))
    constants = CONSTANTS._replace(alpha_cfg=2.5)
    outside = dx0("kl_outside", x0, t, eps, scores(THETA, "mixture", omega=1.0), constants)
    np.testing.assert_allclose(inside, outside, rtol=1e-4, atol=1e-5)


def test_sid_at_alpha_one_equals_l2():
    x0, t, eps = batch()
    networks = scores(THETA, "mixture", omega=3.0)
    given = dict(weighting="x0_normalised")
    ours = dx0("sid", x0, t, eps, networks, CONSTANTS._replace(sid_alpha=1.0), **given)
    l2 = dx0("di_star", x0, t, eps, networks, CONSTANTS._replace(distance="l2"), **given)
    np.testing.assert_allclose(ours, l2, rtol=1e-4, atol=1e-4)
    half = dx0("sid", x0, t, eps, networks, CONSTANTS._replace(sid_alpha=0.5), **given)
    assert not np.allclose(ours, half, rtol=0.05)


def predictions(x0, t, eps, networks):
    """x_0 as assistant and reference predict it."""
    x_t = add_noise(x0, eps, SDXL.alpha[t], SDXL.sigma[t])
    psi, reference = networks
    return (
        diffusion.eps_to_x0(x_t, eps, SDXL.alpha[t], SDXL.sigma[t])
        for eps in (psi(x_t, t), reference(x_t, t)["guided"])
    )


def test_kl_in_x0_is_diff_instructs_and_normalised_dmds():
    # Their code sums sg(x_psi - x_ref)^T x_0, DMD's over mean|x_0 - x_ref|.
    x0, t, eps = batch()
    networks = scores(THETA, "mixture", omega=3.0)
    x_psi, x_ref = predictions(x0, t, eps, networks)
    given = (x0, t, eps, networks, CONSTANTS)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(dx0("kl", *given, "x0"), x_psi - x_ref)
    divisor = jnp.abs(x0 - x_ref).mean(axis=-1, keepdims=True)
    close(dx0("kl", *given, "x0_normalised"), (x_psi - x_ref) / divisor)


def test_normalised_sid_is_that_of_sids_code():
    # (x_ref - x_psi)^T ((x_ref - x_0) - a (x_ref - x_psi)) / sg(mean|x_0 - x_ref|), times 2.
    x0, t, eps = batch()
    networks = scores(THETA, "mixture", omega=3.0)

    def theirs(x0):
        x_psi, x_ref = predictions(x0, t, eps, networks)
        weight = jax.lax.stop_gradient(jnp.abs(x0 - x_ref).mean(axis=-1, keepdims=True))
        rest = (x_ref - x0) - CONSTANTS.sid_alpha * (x_ref - x_psi)
        return (2 * (x_ref - x_psi) * rest / weight).sum()

    ours = dx0("sid", x0, t, eps, networks, weighting="x0_normalised")
    np.testing.assert_allclose(ours, jax.grad(theirs)(x0), rtol=2e-3, atol=1e-3)


def test_reward_only_has_no_gradient():
    x0, t, eps = batch()
    np.testing.assert_array_equal(
        dx0("reward_only", x0, t, eps, scores(THETA, "gaussian")), 0.0 * x0
    )


# The score divergence at every distance; the others have it as a term, or no distance at all.
@pytest.mark.parametrize("t", [0, 999])
@pytest.mark.parametrize(
    "objective, distance",
    [
        (objective, distance)
        if objective == "di_star" or distance == "pseudo_huber"
        else pytest.param(objective, distance, marks=pytest.mark.long)
        for objective in OBJECTIVES
        for distance in DISTANCES
    ],
)
def test_equal_scores_have_finite_gradients_at_both_ends(objective, distance, t):
    x0, t, eps = batch(t=t)
    same = eps_of(lambda x, alpha: log_normal(x, alpha * THETA))
    constants = CONSTANTS._replace(distance=distance)
    grad = dx0(objective, x0, t, eps, networks_of(same, same, same, same), constants, "x0")
    np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_a_reference_that_predicts_x0_leaves_a_normalised_loss_finite():
    x0, t, eps = batch()
    exact = networks_of(lambda x_t, t: 0.5 * eps, *(lambda x_t, t: eps,) * 3)
    assert np.isfinite(dx0("kl", x0, t, eps, exact, weighting="x0_normalised")).all()


@pytest.mark.parametrize("objective", ["di_star", "di_star_outside", "sid"])
def test_gradient_flows_through_x_t_into_both_score_networks(objective):
    x0, t, eps = batch()
    psi, reference = scores(THETA, "mixture")
    still = jax.lax.stop_gradient
    full = dx0(objective, x0, t, eps, (psi, reference))
    for cut in (
        (lambda x_t, t: psi(still(x_t), t), reference),
        (psi, lambda x_t, t: reference(still(x_t), t)),
    ):
        assert not np.allclose(full, dx0(objective, x0, t, eps, cut), rtol=1e-2)


@pytest.mark.parametrize("objective", ["kl", "kl_outside"])
def test_kl_asks_for_no_gradient_of_a_score_network(objective):
    @jax.custom_jvp
    def network(x_t):
        return 0.3 * x_t

    @network.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    x0, t, eps = batch()
    dx0(objective, x0, t, eps, networks_of(*(lambda x_t, t: network(x_t),) * 4))


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_distances_gradient_is_its_derivative(distance):
    y = jax.random.normal(jax.random.key(2), (7, 4)) * jnp.logspace(-3, 0.5, 7)[:, None]
    found = DISTANCES[distance](y, CONSTANTS)
    np.testing.assert_allclose(
        found, jax.grad(lambda y: OF_DISTANCE[distance](y).sum())(y), rtol=1e-5, atol=1e-7
    )


def test_assistant_loss_is_the_squared_error_of_each_sample():
    eps_psi, eps = jnp.array([[1.0, 2.0], [0.5, 0.0]]), jnp.array([[1.0, -1.0], [0.0, 2.0]])
    np.testing.assert_allclose(denoising_score_matching(eps_psi, eps), [9.0, 4.25])


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
