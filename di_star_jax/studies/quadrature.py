# SPDX-License-Identifier: Apache-2.0
"""Where an objective ends on mixtures of Gaussians in the plane, without a sample.

Eq. 3.3 by its own definition, in float64, and the point at which its gradient vanishes. Shares no
code with objectives.py, gradients.py or diffusion.py. K is the modes, T the times, N the nodes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NODES = 12  # a dimension, of Gauss and Hermite
TIMES = 20  # of Gauss and Legendre
APART = 1e-5  # of a difference
STAGES = 4  # of reward and guidance, on the way to the optimum
MOST, RENEWED = 60, 8  # steps, and those between two derivatives
LONGEST = 0.3  # of a step
PRECISION = 1e-9  # of the gradient's norm
_TINY = 1e-24  # in roots, whose derivative at 0 would not be finite


class Mixture(NamedTuple):
    """weight [K], mean [K, 2], factor [K, 3]: (l_11, l_21, l_22) of the covariances' L."""

    weight: jax.Array
    mean: jax.Array
    factor: jax.Array


class Reference(NamedTuple):
    """The exact mixtures: conditional, and unconditional."""

    cond: Mixture
    null: Mixture


class Definition(NamedTuple):
    """What Eq. 3.3 is made of.

    share, alpha, sigma: [T], of each time. rates: {name: [T]} of the terms that are there: "kl",
    w(t) of integral KL; "implicit", alpha_cfg w(t); "space", what scores are times in the score
    divergence; "path", 2 (1 - SiD's alpha). distances: [4], coefficients of DISTANCES. c, power: of
    them. omega: guidance inside. reward: the scale of -|x_0|^2 / 2.
    """

    share: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    rates: dict[str, np.ndarray]
    distances: np.ndarray
    c: float
    power: float
    omega: float
    reward: float


DISTANCES = ("pseudo_huber", "huber", "l2", "power")


def schedule(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma [T] of SDXL's scheduler, in float64, between its integers too."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    log_alpha_bar = np.cumsum(np.log1p(-beta))
    alpha_bar = np.exp(np.interp(times, np.arange(1000), log_alpha_bar))
    return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)


def thinned(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """(times [T], shares [T]) whose weighted sum is the mean over all integers first..last.

    The mean is the integral to half a step beyond both ends, which Gauss and Legendre take.
    """
    if last - first < TIMES:
        times = np.arange(first, last + 1.0)
        return times, np.full(len(times), 1 / len(times))
    points, weight = np.polynomial.legendre.leggauss(TIMES)
    return (first + last) / 2 + (last - first + 1) / 2 * points, weight / 2


def define(settings: Any, reward: float) -> Definition:
    """The definition that settings name. Args: gradients.Settings; reward, its scale."""
    times, share = thinned(*settings.generator_times)
    alpha, sigma = schedule(times)
    k = settings.constants
    space = {"eps": sigma, "score": np.ones_like(sigma), "x0": sigma**2 / alpha}
    space = space[settings.weighting]
    # KL's differences are summed with x_0 in x_0's space, and else with x_t.
    rate = space / alpha if settings.weighting == "x0" else space
    size = 2 if settings.reduction == "mean" else 1
    is_sid = settings.objective == "sid"
    distance = "l2" if is_sid else k.distance
    rates = {"kl": rate / size} if settings.objective.startswith("kl") else {"space": space}
    if settings.objective.endswith("outside"):
        rates["implicit"] = k.alpha_cfg * rate / size
    if is_sid:
        rates["path"] = np.full_like(rate, 2 * (1 - k.sid_alpha) / size)
    return Definition(
        share=share,
        alpha=alpha,
        sigma=sigma,
        rates=rates,
        distances=np.array([name == distance for name in DISTANCES]) / size,
        c=k.huber_c * 2**0.5,
        power=k.power,
        omega=settings.omega,
        reward=reward,
    )


def covariance(factor: jax.Array) -> jax.Array:
    """[..., 3] -> [..., 2, 2], L L^T."""
    a, b, c = jnp.moveaxis(factor, -1, 0)
    first = jnp.stack([a * a, a * b], axis=-1)
    return jnp.stack([first, jnp.stack([a * b, b * b + c * c], axis=-1)], axis=-2)


def noised(mixture: Mixture, alpha: float, sigma: float) -> tuple[jax.Array, jax.Array]:
    """Means [K, 2] and covariances [K, 2, 2] at one time."""
    return alpha * mixture.mean, alpha**2 * covariance(mixture.factor) + sigma**2 * jnp.eye(2)


def log_and_score(
    mixture: Mixture,
    alpha: float,
    sigma: float,
    x: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """log q_t [N] and its derivative [N, 2]. Args: x [N, 2]."""
    mean, cov = noised(mixture, alpha, sigma)
    det = cov[:, 0, 0] * cov[:, 1, 1] - cov[:, 0, 1] ** 2
    u, v = jnp.moveaxis(x[:, None] - mean, -1, 0)  # [N, K]
    pull_u = (cov[:, 0, 1] * v - cov[:, 1, 1] * u) / det
    pull_v = (cov[:, 0, 1] * u - cov[:, 0, 0] * v) / det
    height = jnp.log(mixture.weight) - 0.5 * jnp.log(det) - jnp.log(2 * jnp.pi)
    logs = height + 0.5 * (u * pull_u + v * pull_v)
    share = jax.nn.softmax(logs, axis=-1)
    score = jnp.stack([jnp.sum(share * pull_u, axis=-1), jnp.sum(share * pull_v, axis=-1)], axis=-1)
    return jax.nn.logsumexp(logs, axis=-1), score


def nodes(mixture: Mixture, alpha: float, sigma: float) -> tuple[jax.Array, jax.Array]:
    """x [N, 2] and their weights [N], whose sum over f(x) is E f(x_t)."""
    points, weight = np.polynomial.hermite_e.hermegauss(NODES)
    weight = weight / weight.sum()
    grid = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)
    mean, cov = noised(mixture, alpha, sigma)
    a, b = jnp.sqrt(cov[:, 0, 0]), cov[:, 0, 1] / jnp.sqrt(cov[:, 0, 0])
    c = jnp.sqrt(cov[:, 1, 1] - b * b)
    x = a[:, None] * grid[:, 0], b[:, None] * grid[:, 0] + c[:, None] * grid[:, 1]
    x = mean[:, None] + jnp.stack(x, axis=-1)
    each = mixture.weight[:, None] * np.outer(weight, weight).reshape(-1)
    return x.reshape(-1, 2), each.reshape(-1)


def distance(y: jax.Array, d: Definition) -> jax.Array:
    """d(y). Args: y [N, 2]. Returns: [N]."""
    square = jnp.sum(y * y, axis=-1)
    norm = jnp.sqrt(square + _TINY)
    pseudo = jnp.sqrt(square + d.c**2) - d.c
    huber = jnp.where(norm < d.c, square / (2 * d.c), norm - d.c / 2)
    return jnp.stack([pseudo, huber, square, norm**d.power], axis=-1) @ d.distances


def objective(
    moving: Mixture,
    fixed: Mixture,
    reference: Reference,
    d: Definition,
) -> jax.Array:
    """Eq. 3.3. Args: moving, theta; fixed, sg[theta] of Theorem 3.1. Returns: a scalar."""

    def at_time(time: tuple) -> jax.Array:
        share, alpha, sigma, rates = time
        x, weight = nodes(moving, alpha, sigma)
        own, cond, null, still = (
            log_and_score(m, alpha, sigma, x) for m in (moving, *reference, fixed)
        )
        total = jnp.zeros(())
        if "kl" in rates:
            log_guided = null[0] + d.omega * (cond[0] - null[0])
            total += weight @ (rates["kl"] * (own[0] - log_guided))
        if "implicit" in rates:
            total -= weight @ (rates["implicit"] * (cond[0] - null[0]))
        if "path" in rates:
            gap = rates["space"] * (still[1] - guided(cond[1], null[1], d.omega))
            total += rates["path"] * weight @ jnp.sum(gap**2, axis=-1)
        if "space" in rates:
            x, weight = nodes(fixed, alpha, sigma)
            own, cond, null = (log_and_score(m, alpha, sigma, x) for m in (moving, *reference))
            gap = rates["space"] * (own[1] - guided(cond[1], null[1], d.omega))
            total += weight @ distance(gap, d)
        return share * total

    squares = jnp.sum(moving.mean**2, axis=-1) + jnp.sum(moving.factor**2, axis=-1)
    of_times = jax.lax.map(at_time, (d.share, d.alpha, d.sigma, d.rates))
    return jnp.sum(of_times) + 0.5 * d.reward * moving.weight @ squares


def guided(cond: jax.Array, null: jax.Array, omega: float) -> jax.Array:
    """Scores with guidance inside, Section 3.3."""
    return null + omega * (cond - null)


def flat(mixture: Mixture) -> jax.Array:
    """[5 K] of what is trained."""
    return jnp.concatenate([mixture.mean.reshape(-1), mixture.factor.reshape(-1)])


def unflat(theta: jax.Array, weight: jax.Array) -> Mixture:
    """The reverse of `flat`."""
    count = len(weight)
    mean, factor = theta[: 2 * count], theta[2 * count :]
    return Mixture(weight, mean.reshape(count, 2), factor.reshape(count, 3))


@jax.jit
def field(
    theta: jax.Array,
    reference: Reference,
    d: Definition,
) -> jax.Array:
    """The derivative [5 K] of Eq. 3.3 at theta."""
    weight = reference.cond.weight
    fixed = unflat(theta, weight)
    return jax.grad(lambda theta: objective(unflat(theta, weight), fixed, reference, d))(theta)


def slope(
    theta: np.ndarray,
    reference: Reference,
    d: Definition,
) -> np.ndarray:
    """The derivative of `field`, [5 K, 5 K], by differences: quicker than to compile its own."""
    moves = APART * np.eye(len(theta))
    columns = [
        np.asarray(field(theta + move, reference, d) - field(theta - move, reference, d))
        for move in moves
    ]
    return np.stack(columns, axis=-1) / (2 * APART)


def optimum(reference: Reference, d: Definition) -> Mixture:
    """Where `field` vanishes, followed from the reference as reward and guidance grow.

    Raises: ArithmeticError where there is none, or one that descent would leave.
    """
    with jax.enable_x64(True):
        reference, d = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (reference, d))
        theta = np.asarray(flat(reference.cond))
        for part in np.arange(1, STAGES + 1) / STAGES:
            theta = root(theta, reference, weakened(d, part))
        least = np.linalg.eigvals(slope(theta, reference, d)).real.min()
        if least <= 0:
            raise ArithmeticError(f"a root that descent leaves: {least:.2g}")
        return jax.tree.map(np.asarray, unflat(theta, reference.cond.weight))


def weakened(d: Definition, part: float) -> Definition:
    """With a part of the reward, and of the guidance."""
    rates = {name: rate * (part if name == "implicit" else 1.0) for name, rate in d.rates.items()}
    return d._replace(reward=part * d.reward, omega=1 + part * (d.omega - 1), rates=rates)


def root(
    theta: np.ndarray,
    reference: Reference,
    d: Definition,
) -> np.ndarray:
    """Where `field` vanishes near theta [5 K]: Newton's steps, with Broyden's updates between.

    Raises: ArithmeticError.
    """
    value = np.asarray(field(theta, reference, d))
    for turn in range(MOST):
        if np.linalg.norm(value) < PRECISION:
            return theta
        if turn % RENEWED == 0:
            matrix = slope(theta, reference, d)
        step = -np.linalg.solve(matrix, value)
        step *= min(1.0, LONGEST / np.linalg.norm(step))
        theta = theta + step
        found = np.asarray(field(theta, reference, d))
        matrix = matrix + np.outer(found - value - matrix @ step, step) / (step @ step)
        value = found
    raise ArithmeticError(f"no root: the gradient stays {np.linalg.norm(value):.2g}")


def divergence(of: Mixture, to: Mixture) -> float:
    """KL(of | to)."""
    with jax.enable_x64(True):
        of, to = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (of, to))
        x, weight = nodes(of, 1.0, 0.0)
        logs = (log_and_score(mixture, 1.0, 0.0, x)[0] for mixture in (of, to))
        return float(weight @ (next(logs) - next(logs)))
