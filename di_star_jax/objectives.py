# SPDX-License-Identifier: Apache-2.0
"""The losses that Diff-Instruct* (arXiv 2410.20898) and Diff-Instruct++ (2410.18881) compare, one
function each.

Everything is in eps-form: s = -eps / sigma_t turns scores into noise predictions, and the weight
w(t) = sigma_t of the papers' score form becomes 1 here; `WEIGHTINGS` has others. Arrays are [B,
...]; losses are [B], one per sample, summed over all other axes. A loss's gradient is what the name
says; its value mostly means nothing.

Score networks come as functions (x_t, t) -> [B, ...], so that a proof with exact scores and the
training of SDXL call the same code. The caller differentiates with respect to x_0 (or the
generator's parameters) and holds the networks' parameters fixed. The score divergences let the
gradient flow through x_t into every network; KL needs none there and stops it, so that no backward
pass of a score network is built.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from di_star_jax.diffusion import Schedule, add_noise, eps_to_x0, per_sample

EpsFn = Callable[[jax.Array, jax.Array], jax.Array]


class Scores(NamedTuple):
    """Scores as noise predictions (x_t [B, ...], t [B]) -> [B, ...]; an objective calls those it
    needs, once each.

    psi_and_guided: two at once, of the same x_t: the assistant, standing for the generator's own
      score, and the reference with guidance inside, eps_0 + omega (eps_c - eps_0).
    psi: the assistant alone.
    cond, null: the reference's two parts, for guidance outside.
    """

    psi_and_guided: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    psi: EpsFn
    cond: EpsFn
    null: EpsFn


def one_by_one(psi: EpsFn, guided: EpsFn, cond: EpsFn, null: EpsFn) -> Scores:
    """Scores whose assistant and guided reference are two calls."""
    return Scores(lambda x_t, t: (psi(x_t, t), guided(x_t, t)), psi, cond, null)


class Constants(NamedTuple):
    """Numbers of single objectives.

    huber_c: c / sqrt(d) of the pseudo-Huber distance with d = x0[0].size, in eps units; > 0.
    alpha_cfg: strength of guidance outside.
    sid_alpha: SiD's alpha.
    """

    huber_c: float
    alpha_cfg: float
    sid_alpha: float


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b over all but the batch axis: [B, ...], [B, ...] -> [B]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


# Eq. 3.8: d(y) = sqrt(||y||^2 + c^2) - c, of which the loss needs d'(y). c^2 inside the root keeps
# y = 0 finite.
def pseudo_huber_grad(y: jax.Array, *, c: float) -> jax.Array:
    """d'(y) = y / sqrt(||y||^2 + c^2).

    Args: y [B, ...]; c > 0, in the units of y. Returns: [B, ...].
    """
    return y / per_sample(jnp.sqrt(_dot(y, y) + c**2), y)


# Section 3.2: the plain choice d(y) = ||y||^2.
def l2_grad(y: jax.Array) -> jax.Array:
    """d'(y) = 2 y. Args: y [B, ...]. Returns: [B, ...]."""
    return 2.0 * y


# Eq. 3.4 without the reward; y_t = s_psi - s_ref and s_psi - grad log q_t(x_t | x_0), both times
# -sigma_t.
def score_divergence(
    eps_psi: jax.Array,
    eps_ref: jax.Array,
    eps: jax.Array,
    *,
    distance_grad: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """-d'(y_t)^T (eps_psi - eps), whose gradient is that of the score divergence (3.2).

    Args: [B, ...]. Returns: [B].
    """
    y_t = eps_psi - eps_ref
    return -_dot(distance_grad(y_t), eps_psi - eps)


# Eq. 3.6 (Theorem 3.2), times sigma_t: the implicit reward -log p_ref(x_t|c) / p_ref(x_t) of
# guidance outside.
def implicit_guidance(x_t: jax.Array, eps_cond: jax.Array, eps_null: jax.Array) -> jax.Array:
    """sg(eps_c - eps_0)^T x_t. Args: [B, ...]. Returns: [B]."""
    return _dot(jax.lax.stop_gradient(eps_cond - eps_null), x_t)


def di_star(
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    scores: Scores,
    constants: Constants,
    schedule: Schedule,
) -> jax.Array:
    """DI*'s regulariser (Algorithm 1): score divergence, pseudo-Huber distance, guidance inside.

    SIM without a reward.

    Args:
      x0: [B, ...] generated samples.
      t: [B] int32 timesteps.
      eps: [B, ...] standard normal.
      scores, constants, schedule: see there.
    Returns:
      [B] float32.
    """
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    return score_divergence(
        *scores.psi_and_guided(x_t, t),
        eps,
        distance_grad=lambda y: pseudo_huber_grad(y, c=constants.huber_c * x0[0].size ** 0.5),
    )


def di_star_l2(
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    scores: Scores,
    constants: Constants,
    schedule: Schedule,
) -> jax.Array:
    """`di_star` with the distance ||y||^2."""
    del constants
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    return score_divergence(*scores.psi_and_guided(x_t, t), eps, distance_grad=l2_grad)


def di_star_outside(
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    scores: Scores,
    constants: Constants,
    schedule: Schedule,
) -> jax.Array:
    """`di_star` against the unguided reference, plus alpha_cfg times the implicit reward (Theorem
    3.2).
    """
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    eps_cond = scores.cond(x_t, t)
    eps_null = scores.null(jax.lax.stop_gradient(x_t), t)  # without a backward pass
    regulariser = score_divergence(
        scores.psi(x_t, t),
        eps_cond,
        eps,
        distance_grad=lambda y: pseudo_huber_grad(y, c=constants.huber_c * x0[0].size ** 0.5),
    )
    return regulariser + constants.alpha_cfg * implicit_guidance(x_t, eps_cond, eps_null)


# SiD (arXiv 2404.04057): (x_ref - x_psi)^T ((x_ref - x_0) - a (x_ref - x_psi)), here times 2
# alpha_t^2 / sigma_t^2.
def sid(
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    scores: Scores,
    constants: Constants,
    schedule: Schedule,
) -> jax.Array:
    """Score identity distillation, equal to `di_star_l2` at sid_alpha = 1; SiD's divisor mean|x_ref
    - x_0| is left out.
    """
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    eps_psi, eps_ref = scores.psi_and_guided(x_t, t)
    y_t = eps_psi - eps_ref
    return -2.0 * _dot(y_t, eps_ref - eps + constants.sid_alpha * y_t)


# Diff-Instruct (arXiv 2305.18455): the gradient of integral KL is (s_psi - s_ref)^T d x_t / d
# theta.
def kl(
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    scores: Scores,
    constants: Constants,
    schedule: Schedule,
) -> jax.Array:
    """-sg(eps_psi - eps_ref)^T x_t: integral KL, of Diff-Instruct and (with a reward)
    Diff-Instruct++.
    """
    del constants
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    eps_psi, eps_ref = scores.psi_and_guided(jax.lax.stop_gradient(x_t), t)
    return -_dot(eps_psi - eps_ref, x_t)


# DMD (arXiv 2311.18828), per sample and summed; its own mean over pixels is
# objective.reduction="mean".
def dmd(
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    scores: Scores,
    constants: Constants,
    schedule: Schedule,
) -> jax.Array:
    """sg((x_psi - x_ref) / mean|x_0 - x_ref|)^T x_0: KL with DMD's normalised gradient.

    The divisor is at least 1e-5, as SiD's, so that a reference that predicts x_0 exactly leaves it
    finite.
    """
    del constants
    alpha_t, sigma_t = schedule.alpha[t], schedule.sigma[t]
    x_t = jax.lax.stop_gradient(add_noise(x0, eps, alpha_t, sigma_t))
    x_psi, x_ref = (eps_to_x0(x_t, eps, alpha_t, sigma_t) for eps in scores.psi_and_guided(x_t, t))
    distance = jnp.abs(jax.lax.stop_gradient(x0) - x_ref).mean(axis=tuple(range(1, x0.ndim)))
    return _dot((x_psi - x_ref) / per_sample(jnp.maximum(distance, 1e-5), x0), x0)


def reward_only(
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    scores: Scores,
    constants: Constants,
    schedule: Schedule,
) -> jax.Array:
    """No regulariser at all: the failure that the paper warns of."""
    del t, eps, scores, constants, schedule
    return jnp.zeros(x0.shape[:1])


OBJECTIVES = {
    "di_star": di_star,
    "di_star_l2": di_star_l2,
    "di_star_outside": di_star_outside,
    "sid": sid,
    "kl": kl,
    "dmd": dmd,
    "reward_only": reward_only,
}
OUTSIDE = ("di_star_outside",)  # take alpha_cfg, and a reference without guidance inside

# w(t) relative to eps-form: (alpha_t [B], sigma_t [B]) -> [B].
WEIGHTINGS = {
    "eps": lambda alpha_t, sigma_t: jnp.ones_like(sigma_t),
    "score": lambda alpha_t, sigma_t: (
        1.0 / sigma_t
    ),  # the papers' w(t) = 1, for distances of first degree
    "x0": lambda alpha_t, sigma_t: sigma_t / alpha_t,  # of differences of x_0 predictions
}


# Section 2.2, Eq. 2.2 with lambda(t) = sigma_t^2: plain noise prediction on generated samples.
def denoising_score_matching(eps_psi: jax.Array, eps: jax.Array) -> jax.Array:
    """||eps_psi(x_t, t) - eps||^2, the assistant's loss. Args: [B, ...]. Returns: [B]."""
    error = eps_psi - eps
    return _dot(error, error)
