# SPDX-License-Identifier: Apache-2.0
"""The losses that Diff-Instruct* (2410.20898) and Diff-Instruct++ (2410.18881) compare.

Everything is in eps-form: s = -eps / sigma_t turns scores into noise predictions, and the weight
w(t) = sigma_t of the papers' score form (sigma_t^2 for `di_star_l2` and `sid`, which are of second
degree) becomes 1 here; `WEIGHTINGS` has others. `dmd` divides by its own scale. Arrays are
[B, ...]; losses are [B], one per sample, summed over all other axes. A loss's gradient is what the
name says; its value mostly means nothing.

Losses know no network: `OBJECTIVES` says which noise predictions each wants, and through which of
them its gradient flows to x_t (the networks' parameters are held fixed by whoever evaluates them,
see gradients.py). The score divergences let it flow through all; KL needs none, so that no backward
pass of a score network is built.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from di_star_jax.diffusion import eps_to_x0, per_sample


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b over all but the batch axis: [B, ...], [B, ...] -> [B]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


# Eq. 3.8: d(y) = sqrt(||y||^2 + c^2) - c, of which the loss needs d'(y). c^2 inside the root keeps
# y = 0 finite.
def pseudo_huber_grad(y: jax.Array, *, c: float) -> jax.Array:
    """d'(y) = y / sqrt(||y||^2 + c^2). Args: y [B, ...]; c > 0, in the units of y."""
    return y / per_sample(jnp.sqrt(_dot(y, y) + c**2), y)


# Section 3.2: the plain choice d(y) = ||y||^2.
def l2_grad(y: jax.Array) -> jax.Array:
    """d'(y) = 2 y. Args: y [B, ...]."""
    return 2.0 * y


# Eq. 3.4 without the reward: -d'(y_t)^T (s_psi - grad log q_t(x_t | x_0)). Of noise predictions,
# d' of first degree only changes its sign, and the other factor is -sigma_t times as large.
def di_star(
    eps_psi: jax.Array,
    eps_ref: jax.Array,
    eps: jax.Array,
    *,
    c: float,
) -> jax.Array:
    """DI*'s regulariser (Algorithm 1): score divergence with the pseudo-Huber distance.

    Its gradient is that of the divergence (3.2) if it flows through x_t into both networks. With
    guidance inside eps_ref and without a reward it is SIM.

    Args: noise predictions of assistant and reference, and the noise, [B, ...]; c of Eq. 3.8, > 0,
      in eps units. Returns: [B].
    """
    y_t = eps_psi - eps_ref
    return -_dot(pseudo_huber_grad(y_t, c=c), eps_psi - eps)


def di_star_l2(
    eps_psi: jax.Array,
    eps_ref: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    """`di_star` with the distance ||y||^2."""
    y_t = eps_psi - eps_ref
    return -_dot(l2_grad(y_t), eps_psi - eps)


# Eq. 3.6 (Theorem 3.2), times sigma_t: minus the implicit reward log p_ref(x_t|c) / p_ref(x_t).
def implicit_guidance(
    eps_cond: jax.Array,
    eps_null: jax.Array,
    x_t: jax.Array,
) -> jax.Array:
    """sg(eps_c - eps_0)^T x_t: guidance outside. Args: [B, ...]. Returns: [B]."""
    return _dot(jax.lax.stop_gradient(eps_cond - eps_null), x_t)


# SiD (arXiv 2404.04057): (x_ref - x_psi)^T ((x_ref - x_0) - a (x_ref - x_psi)), here times
# 2 alpha_t^2 / sigma_t^2.
def sid(
    eps_psi: jax.Array,
    eps_ref: jax.Array,
    eps: jax.Array,
    *,
    alpha: float,
) -> jax.Array:
    """Score identity distillation, equal to `di_star_l2` at alpha = 1.

    SiD's divisor mean|x_ref - x_0| is left out. Args: as `di_star`; SiD's alpha. Returns: [B].
    """
    y_t = eps_psi - eps_ref
    return -2.0 * _dot(y_t, eps_ref - eps + alpha * y_t)


# Diff-Instruct (arXiv 2305.18455): integral KL has the gradient (s_psi - s_ref)^T d x_t / d theta.
def kl(
    eps_psi: jax.Array,
    eps_ref: jax.Array,
    x_t: jax.Array,
) -> jax.Array:
    """-sg(eps_psi - eps_ref)^T x_t: integral KL, of Diff-Instruct and Diff-Instruct++.

    Args: [B, ...]. Returns: [B].
    """
    return -_dot(jax.lax.stop_gradient(eps_psi - eps_ref), x_t)


# DMD (arXiv 2311.18828), per sample and summed; its mean over pixels is objective.reduction="mean".
def dmd(
    x_psi: jax.Array,
    x_ref: jax.Array,
    x0: jax.Array,
) -> jax.Array:
    """sg((x_psi - x_ref) / mean|x_0 - x_ref|)^T x_0: KL with DMD's normalised gradient.

    The divisor is at least 1e-5, as SiD's, so that a reference that predicts x_0 exactly leaves it
    finite. Args: x_0 as assistant and reference predict it, and x_0, [B, ...]. Returns: [B].
    """
    distance = jnp.abs(x0 - x_ref).mean(axis=tuple(range(1, x0.ndim)))
    direction = (x_psi - x_ref) / per_sample(jnp.maximum(distance, 1e-5), x0)
    return _dot(jax.lax.stop_gradient(direction), x0)


class Point(NamedTuple):
    """A batch of samples and their noised selves: x0, x_t, eps [B, ...]; alpha_t, sigma_t [B]."""

    x0: jax.Array
    x_t: jax.Array
    eps: jax.Array
    alpha_t: jax.Array
    sigma_t: jax.Array

    @property
    def root_d(self) -> float:
        """sqrt(d), d the numbers in one sample."""
        return self.x0[0].size ** 0.5

    def x0_of(self, eps: jax.Array) -> jax.Array:
        """x_0 as a noise prediction has it, [B, ...]."""
        return eps_to_x0(self.x_t, eps, self.alpha_t, self.sigma_t)


class Scores(NamedTuple):
    """Noise predictions at x_t, [B, ...]; None where the objective does not want one.

    psi: the assistant, standing for the generator's own score. guided: the reference with guidance
    inside, eps_0 + omega (eps_c - eps_0). cond, null: its two parts, for guidance outside.
    """

    psi: jax.Array | None = None
    guided: jax.Array | None = None
    cond: jax.Array | None = None
    null: jax.Array | None = None


class Constants(NamedTuple):
    """Numbers of single objectives.

    huber_c: c / sqrt(d) of the pseudo-Huber distance, in eps units; > 0.
    alpha_cfg: strength of guidance outside.
    sid_alpha: SiD's alpha.
    """

    huber_c: float
    alpha_cfg: float
    sid_alpha: float


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and what it wants.

    loss: (Scores, Point, Constants) -> [B].
    scores: names of the noise predictions.
    through: those of them through which its gradient flows to x_t.
    """

    loss: Callable[[Scores, Point, Constants], jax.Array]
    scores: tuple[str, ...]
    through: tuple[str, ...]


def _outside(
    s: Scores,
    p: Point,
    k: Constants,
) -> jax.Array:
    """`di_star` against the unguided reference, and the implicit reward (Theorem 3.2)."""
    divergence = di_star(s.psi, s.cond, p.eps, c=k.huber_c * p.root_d)
    return divergence + k.alpha_cfg * implicit_guidance(s.cond, s.null, p.x_t)


_INSIDE = ("psi", "guided")
OBJECTIVES = {
    "di_star": Objective(
        lambda s, p, k: di_star(s.psi, s.guided, p.eps, c=k.huber_c * p.root_d),
        scores=_INSIDE,
        through=_INSIDE,
    ),
    "di_star_l2": Objective(
        lambda s, p, k: di_star_l2(s.psi, s.guided, p.eps),
        scores=_INSIDE,
        through=_INSIDE,
    ),
    "di_star_outside": Objective(
        _outside,
        scores=("psi", "cond", "null"),
        through=("psi", "cond"),
    ),
    "sid": Objective(
        lambda s, p, k: sid(s.psi, s.guided, p.eps, alpha=k.sid_alpha),
        scores=_INSIDE,
        through=_INSIDE,
    ),
    "kl": Objective(
        lambda s, p, k: kl(s.psi, s.guided, p.x_t),
        scores=_INSIDE,
        through=(),
    ),
    "dmd": Objective(
        lambda s, p, k: dmd(p.x0_of(s.psi), p.x0_of(s.guided), p.x0),
        scores=_INSIDE,
        through=(),
    ),
    # No regulariser at all: the failure that the paper warns of.
    "reward_only": Objective(
        lambda s, p, k: jnp.zeros(p.x0.shape[:1]),
        scores=(),
        through=(),
    ),
}
OUTSIDE = ("di_star_outside",)  # take alpha_cfg, and a reference without guidance inside

# w(t) relative to eps-form: (alpha_t [B], sigma_t [B]) -> [B].
WEIGHTINGS = {
    "eps": lambda alpha_t, sigma_t: jnp.ones_like(sigma_t),
    # the papers' w(t) = 1, for distances of first degree
    "score": lambda alpha_t, sigma_t: 1.0 / sigma_t,
    # of differences of x_0 predictions
    "x0": lambda alpha_t, sigma_t: sigma_t / alpha_t,
}


# Section 2.2, Eq. 2.2 with lambda(t) = sigma_t^2: plain noise prediction on generated samples.
def denoising_score_matching(eps_psi: jax.Array, eps: jax.Array) -> jax.Array:
    """||eps_psi(x_t, t) - eps||^2, the assistant's loss. Args: [B, ...]. Returns: [B]."""
    error = eps_psi - eps
    return _dot(error, error)
