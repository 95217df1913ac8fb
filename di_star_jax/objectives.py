# SPDX-License-Identifier: Apache-2.0
"""The losses that Diff-Instruct* (2410.20898) and Diff-Instruct++ (2410.18881) compare.

A loss is made of noise predictions, each times what `WEIGHTINGS` says of its time: 1 / sigma_t
makes scores of them (times -1), sigma_t / alpha_t predictions of x_0 (times -1, less x_t /
alpha_t), and the signs cancel in every loss. So a weighting is the space in which a divergence is
taken, the same for all of them, and not a number of which each would need another. Arrays are
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

from di_star_jax.diffusion import per_sample

_FLOOR = 1e-5  # of a divisor, as SiD's


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b over all but the batch axis: [B, ...], [B, ...] -> [B]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


# ---- distances d(y), of which a loss needs d'(y): [B, ...] -> [B, ...] ----


# Eq. 3.8: d(y) = sqrt(||y||^2 + c^2) - c. c^2 inside the root keeps y = 0 finite.
def pseudo_huber_grad(y: jax.Array, *, c: float) -> jax.Array:
    """d'(y) = y / sqrt(||y||^2 + c^2). Args: y [B, ...]; c > 0, in the units of y."""
    return y / per_sample(jnp.sqrt(_dot(y, y) + c**2), y)


# Section 3.2: the plain choice d(y) = ||y||^2.
def l2_grad(y: jax.Array) -> jax.Array:
    """d'(y) = 2 y. Args: y [B, ...]."""
    return 2.0 * y


# SIM (2410.16794) tries it too: ||y||^2 / (2 c) up to c, then ||y|| - c / 2.
def huber_grad(y: jax.Array, *, c: float) -> jax.Array:
    """d'(y) = y / max(||y||, c). Args: as `pseudo_huber_grad`."""
    return y / per_sample(jnp.sqrt(jnp.maximum(_dot(y, y), c**2)), y)


# SIM's family d(y) = ||y||^p: p = 2 is `l2_grad`.
def power_grad(y: jax.Array, *, p: float) -> jax.Array:
    """d'(y) = p ||y||^(p - 2) y. Args: y [B, ...]; p >= 1. The norm counts as 1e-5 at least."""
    squared_norm = jnp.maximum(_dot(y, y), _FLOOR**2)
    return p * per_sample(squared_norm ** (p / 2 - 1), y) * y


# ---- losses ----


# Eq. 3.4 without the reward: -d'(y_t)^T (s_psi - grad log q_t(x_t | x_0)). Both factors are
# differences of predictions, whose signs cancel.
def di_star(
    psi: jax.Array,
    ref: jax.Array,
    eps: jax.Array,
    distance_grad: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """DI*'s regulariser (Algorithm 1): the score divergence (3.2) of a distance d.

    Its gradient is that of the divergence if it flows through x_t into both networks. With guidance
    inside the reference and without a reward it is SIM.

    Args: predictions of assistant and reference, and the noise, [B, ...], in one space;
      distance_grad, d'. Returns: [B].
    """
    return -_dot(distance_grad(psi - ref), psi - eps)


# Eq. 3.6 (Theorem 3.2): minus the implicit reward log p_ref(x_t|c) / p_ref(x_t).
def implicit_guidance(
    cond: jax.Array,
    null: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """sg(eps_c - eps_0)^T x: guidance outside. Args: as `kl`. Returns: [B]."""
    return _dot(jax.lax.stop_gradient(cond - null), x)


# SiD (arXiv 2404.04057): (x_ref - x_psi)^T ((x_ref - x_0) - a (x_ref - x_psi)), here times 2.
def sid(
    psi: jax.Array,
    ref: jax.Array,
    eps: jax.Array,
    *,
    alpha: float,
) -> jax.Array:
    """Score identity distillation, equal to `di_star` with `l2_grad` at alpha = 1.

    Args: as `di_star`; SiD's alpha. Returns: [B].
    """
    y_t = psi - ref
    return -2.0 * _dot(y_t, ref - eps + alpha * y_t)


# Diff-Instruct (arXiv 2305.18455): integral KL has the gradient (s_psi - s_ref)^T d x_t / d theta.
def kl(
    psi: jax.Array,
    ref: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """-sg(psi - ref)^T x: integral KL, of Diff-Instruct and Diff-Instruct++.

    Args: predictions, and what they predict in, [B, ...]: x_t, or x_0 for those of x_0, as in
      Diff-Instruct's code. Returns: [B].
    """
    return -_dot(jax.lax.stop_gradient(psi - ref), x)


class Point(NamedTuple):
    """A batch of samples and their noised selves: x0, x_t, eps [B, ...]; alpha_t, sigma_t [B]."""

    x0: jax.Array
    x_t: jax.Array
    eps: jax.Array
    alpha_t: jax.Array
    sigma_t: jax.Array


class Scores(NamedTuple):
    """Noise predictions at x_t, [B, ...]; None where the objective does not want one.

    psi: the assistant, standing for the generator's own score. guided: the reference with guidance
    inside, eps_0 + omega (eps_c - eps_0). cond, null: its two parts, for guidance outside.
    """

    psi: jax.Array | None = None
    guided: jax.Array | None = None
    cond: jax.Array | None = None
    null: jax.Array | None = None


class Terms(NamedTuple):
    """What a loss is made of, in the space of a weighting, [B, ...]; x as of `kl`."""

    psi: jax.Array | None
    guided: jax.Array | None
    cond: jax.Array | None
    null: jax.Array | None
    eps: jax.Array
    x: jax.Array


class Constants(NamedTuple):
    """Numbers of single objectives.

    distance: a key of DISTANCES, of the score divergences.
    huber_c: c / sqrt(d) of (pseudo-)Huber distances, in the units of the weighting; > 0.
    power: p of the distance "power".
    alpha_cfg: strength of guidance outside.
    sid_alpha: SiD's alpha.
    """

    distance: str = "pseudo_huber"
    huber_c: float = 0.00054
    power: float = 2.0
    alpha_cfg: float = 0.0
    sid_alpha: float = 1.0


DISTANCES = {
    "pseudo_huber": lambda y, k: pseudo_huber_grad(y, c=k.huber_c * y[0].size ** 0.5),
    "l2": lambda y, k: l2_grad(y),
    "huber": lambda y, k: huber_grad(y, c=k.huber_c * y[0].size ** 0.5),
    "power": lambda y, k: power_grad(y, p=k.power),
}

# (alpha_t [B], sigma_t [B]) -> [B], what noise predictions are times.
WEIGHTINGS = {
    "eps": lambda alpha_t, sigma_t: jnp.ones_like(sigma_t),
    # the papers' w(t) = 1
    "score": lambda alpha_t, sigma_t: 1.0 / sigma_t,
    # of the public code of Diff-Instruct, SiD and Uni-Instruct
    "x0": lambda alpha_t, sigma_t: sigma_t / alpha_t,
    # and over mean|x_0 - x_ref|, as SiD and DMD
    "x0_normalised": lambda alpha_t, sigma_t: sigma_t / alpha_t,
}
OF_X0 = ("x0", "x0_normalised")
_PLAIN = ("eps", "score", "x0")


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and what it wants.

    loss: (Terms, Constants) -> [B].
    scores: names of the noise predictions.
    through: those of them through which its gradient flows to x_t.
    weightings: those that it is defined with.
    """

    loss: Callable[[Terms, Constants], jax.Array]
    scores: tuple[str, ...]
    through: tuple[str, ...]
    weightings: tuple[str, ...] = tuple(WEIGHTINGS)


def _divergence(terms: Terms, k: Constants) -> jax.Array:
    """`di_star` with the distance that the constants name."""

    def distance_grad(y: jax.Array) -> jax.Array:
        return DISTANCES[k.distance](y, k)

    return di_star(terms.psi, terms.guided, terms.eps, distance_grad)


def _implicit(terms: Terms, k: Constants) -> jax.Array:
    return k.alpha_cfg * implicit_guidance(terms.cond, terms.null, terms.x)


_INSIDE = ("psi", "guided")
_BOTH = ("psi", "guided", "cond", "null")
# A divisor of the regulariser alone would change how strong the implicit reward beside it is: those
# with guidance outside have none.
OBJECTIVES = {
    "di_star": Objective(_divergence, scores=_INSIDE, through=_INSIDE),
    "di_star_outside": Objective(
        lambda terms, k: _divergence(terms, k) + _implicit(terms, k),
        scores=_BOTH,
        through=_INSIDE,
        weightings=_PLAIN,
    ),
    "sid": Objective(
        lambda terms, k: sid(terms.psi, terms.guided, terms.eps, alpha=k.sid_alpha),
        scores=_INSIDE,
        through=_INSIDE,
    ),
    "kl": Objective(
        lambda terms, k: kl(terms.psi, terms.guided, terms.x),
        scores=_INSIDE,
        through=(),
    ),
    "kl_outside": Objective(
        lambda terms, k: kl(terms.psi, terms.guided, terms.x) + _implicit(terms, k),
        scores=_BOTH,
        through=(),
        weightings=_PLAIN,
    ),
    # No regulariser at all: the failure that the paper warns of.
    "reward_only": Objective(
        lambda terms, k: jnp.zeros(terms.x.shape[:1]),
        scores=(),
        through=(),
        weightings=_PLAIN,
    ),
}
OUTSIDE = ("di_star_outside", "kl_outside")  # take alpha_cfg


def regulariser(
    objective: Objective,
    weighting: str,
    scores: Scores,
    point: Point,
    constants: Constants,
) -> jax.Array:
    """An objective's loss [B]. Args: weighting, one of the objective's."""
    scale = per_sample(WEIGHTINGS[weighting](point.alpha_t, point.sigma_t), point.x0)
    predictions = jax.tree.map(lambda eps: scale * eps, scores)
    x = point.x0 if weighting in OF_X0 else point.x_t
    terms = Terms(*predictions, eps=scale * point.eps, x=x)
    loss = objective.loss(terms, constants)
    return loss / _divisor(terms) if weighting == "x0_normalised" else loss


# SiD, and DMD (arXiv 2311.18828): KL in x_0 over it is DMD's normalised gradient.
def _divisor(terms: Terms) -> jax.Array:
    """mean|x_0 - x_ref| [B], without gradient; finite for a reference that predicts x_0 exactly."""
    distance = jnp.abs(terms.guided - terms.eps).mean(axis=tuple(range(1, terms.eps.ndim)))
    return jax.lax.stop_gradient(jnp.maximum(distance, _FLOOR))


# Section 2.2, Eq. 2.2 with lambda(t) = sigma_t^2: plain noise prediction on generated samples.
def denoising_score_matching(eps_psi: jax.Array, eps: jax.Array) -> jax.Array:
    """||eps_psi(x_t, t) - eps||^2, the assistant's loss. Args: [B, ...]. Returns: [B]."""
    error = eps_psi - eps
    return _dot(error, error)
