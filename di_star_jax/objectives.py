# SPDX-License-Identifier: Apache-2.0
"""The losses of Diff-Instruct* (arXiv 2410.20898), one function per equation, in the paper's symbols.

Everything is in eps-form: s = -eps / sigma_t turns scores into noise predictions, and the weight w(t) = sigma_t of
the paper's score form becomes 1 here. Arrays are [B, ...]; losses are [B], one per sample.

Score networks come as functions eps(x_t, t) -> [B, ...], so that a proof with exact scores and the training of SDXL
call the same code. Nothing here stops a gradient: the caller differentiates with respect to x_0 (or the generator's
parameters) and holds the networks' parameters fixed, while the gradient flows through x_t into every network.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from di_star_jax.diffusion import Schedule, add_noise, per_sample

EpsFn = Callable[[jax.Array, jax.Array], jax.Array]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b over all but the batch axis: [B, ...], [B, ...] -> [B]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


# Eq. 3.8: d(y) = sqrt(||y||^2 + c^2) - c, of which the loss needs d'(y). c^2 inside the root keeps y = 0 finite.
def pseudo_huber_grad(y: jax.Array, *, c: float) -> jax.Array:
    """d'(y) = y / sqrt(||y||^2 + c^2). Args: y [B, ...]; c > 0, in the units of y. Returns: [B, ...]."""
    return y / per_sample(jnp.sqrt(_dot(y, y) + c**2), y)


# Section 3.2: the plain choice d(y) = ||y||^2.
def l2_grad(y: jax.Array) -> jax.Array:
    """d'(y) = 2 y. Args: y [B, ...]. Returns: [B, ...]."""
    return 2.0 * y


# Eq. 3.4 without the reward; y_t = s_psi - s_ref and s_psi - grad log q_t(x_t | x_0), both times -sigma_t.
def score_divergence(x0: jax.Array, t: jax.Array, eps: jax.Array, *, eps_psi: EpsFn, eps_ref: EpsFn,
                     distance_grad: Callable[[jax.Array], jax.Array], schedule: Schedule) -> jax.Array:
    """-d'(y_t)^T (eps_psi - eps): its gradient is that of the score divergence (3.2), its value means nothing.

    Args:
      x0: [B, ...] generated samples.
      t: [B] int32 timesteps.
      eps: [B, ...] standard normal.
      eps_psi: the assistant's noise prediction, standing for the generator's own score (parameters held fixed).
      eps_ref: the reference's noise prediction, with guidance inside if any.
      distance_grad: d'.
      schedule: alpha and sigma.
    Returns:
      [B] float32.
    """
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    eps_psi_t = eps_psi(x_t, t)
    y_t = eps_psi_t - eps_ref(x_t, t)
    return -_dot(distance_grad(y_t), eps_psi_t - eps)


# Section 2.2, Eq. 2.2 with lambda(t) = sigma_t^2: plain noise prediction on generated samples.
def denoising_score_matching(x0: jax.Array, t: jax.Array, eps: jax.Array, *, eps_psi: EpsFn,
                             schedule: Schedule) -> jax.Array:
    """||eps_psi(x_t, t) - eps||^2, the assistant's loss.

    Args: as in `score_divergence`; x0 carries no gradient for the assistant.
    Returns: [B] float32, summed over all but the batch axis.
    """
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    error = eps_psi(x_t, t) - eps
    return _dot(error, error)


def di_star(x0: jax.Array, t: jax.Array, eps: jax.Array, *, eps_psi: EpsFn, eps_ref: EpsFn, huber_c: float,
            schedule: Schedule) -> jax.Array:
    """DI*'s regulariser: score divergence with the pseudo-Huber distance (Algorithm 1), `score_divergence`'s contract.

    huber_c: the distance's c is huber_c * sqrt(d) with d = x0[0].size; 0.00054 as in improved consistency training.
    """
    distance_grad = functools.partial(pseudo_huber_grad, c=huber_c * x0[0].size ** 0.5)
    return score_divergence(x0, t, eps, eps_psi=eps_psi, eps_ref=eps_ref, distance_grad=distance_grad,
                            schedule=schedule)


OBJECTIVES = {"di_star": di_star}
