# SPDX-License-Identifier: Apache-2.0
"""Losses of preference pairs, and how often a reward prefers what people did.

Two pictures of a caption have scores [B, 2]. label_0 [B] says which is better: 1 the first, 0 the
second, 0.5 a tie, and what is between is how likely the first one is.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TIE = 0.5
THRESHOLDS = np.arange(11) / 10  # of which the paper chooses one


def pickscore(scores: jax.Array, label_0: jax.Array) -> jax.Array:
    """label_0 CE -> 0 + label_1 CE -> 1, and log(.5) for a tie, whose best is then 0: [B].

    Args: scores, exp(logit_scale) cos. Source: PickScore (arXiv 2305.01569), `clip_criterion.py`.
    """
    labels = jnp.stack([label_0, 1.0 - label_0], axis=-1)
    cross_entropy = -jnp.sum(labels * jax.nn.log_softmax(scores), axis=-1)
    return cross_entropy + jnp.where(label_0 == TIE, math.log(TIE), 0.0)


def imagereward(scores: jax.Array, label_0: jax.Array) -> jax.Array:
    """-log sigma(r_better - r_worse): [B]. Args: label_0, 0 or 1.

    Source: ImageReward (arXiv 2304.05977), Eq. 1.
    """
    return -jax.nn.log_sigmoid((2.0 * label_0 - 1.0) * (scores[:, 0] - scores[:, 1]))


class Loss(NamedTuple):
    """per_pair: (scores [B, 2], label_0 [B]) -> [B]. with_ties: whether ties are pairs.

    by_prompt: whether all pairs of a prompt weigh together what the pair of another one does.
    best_by: what the best parameters are chosen by, "accuracy" (highest) or "loss" (lowest).
    """

    per_pair: Callable[[jax.Array, jax.Array], jax.Array]
    with_ties: bool
    by_prompt: bool
    best_by: str


LOSSES = {
    "pickscore": Loss(pickscore, with_ties=True, by_prompt=True, best_by="accuracy"),
    "imagereward": Loss(imagereward, with_ties=False, by_prompt=False, best_by="loss"),
}


def weights_of(num_examples: jax.Array, loss: Loss) -> jax.Array:
    """What the pairs of a whole batch weigh, which sums to 1: [B].

    Args: num_examples [B], how many pairs the prompt of each has. Source: PickScore's
      `clip_criterion.py`, which sums over all devices.
    """
    weight = 1.0 / num_examples if loss.by_prompt else jnp.ones_like(num_examples)
    return weight / jnp.sum(weight)


def agreement(scores: jax.Array, label_0: jax.Array) -> jax.Array:
    """How far the order of the scores is the people's, half for a tie: [B] in [0, 1].

    Source: PickScore's `clip_task.py`.
    """
    return jnp.where(
        scores[:, 0] > scores[:, 1],
        label_0,
        jnp.where(scores[:, 0] < scores[:, 1], 1.0 - label_0, 0.5),
    )


# With ties, as the paper reports it.


def accuracy_with_ties(
    scores: np.ndarray,
    label_0: np.ndarray,
    threshold: float,
) -> float:
    """Mean of 1 where prediction and label are the same, 0.5 where just one of them is a tie.

    A tie is predicted where the two probabilities, the softmax of the scores, differ by `threshold`
    at most. Source: PickScore's `eval_preference_predictor.py`.
    """
    first = _probability(scores)
    apart = np.abs(2.0 * first - 1.0)
    predicted = np.where(apart <= threshold, TIE, (first > 0.5).astype(float))
    one_tie = (predicted == TIE) != (label_0 == TIE)
    return float(np.mean(np.where(predicted == label_0, 1.0, np.where(one_tie, 0.5, 0.0))))


def best_threshold(scores: np.ndarray, label_0: np.ndarray) -> tuple[float, float]:
    """(the threshold of ties that predicts best, its accuracy); the smallest of equals.

    To be chosen on other pairs than those it is reported on.
    """
    found = [accuracy_with_ties(scores, label_0, threshold) for threshold in THRESHOLDS]
    best = int(np.argmax(found))
    return float(THRESHOLDS[best]), found[best]


def _probability(scores: np.ndarray) -> np.ndarray:
    """That the first is preferred, float64 [B]."""
    difference = scores[:, 1].astype(np.float64) - scores[:, 0]
    return 1.0 / (1.0 + np.exp(np.clip(difference, -700.0, 700.0)))
