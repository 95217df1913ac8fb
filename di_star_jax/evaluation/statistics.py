# SPDX-License-Identifier: Apache-2.0
"""Statistics over prompts: means with their error, categories, two runs compared.

NumPy in float64. P prompts with K images each; values are [P, K], or [P] for one image a prompt. A
value NaN is an image that is broken or was not scored: it is left out and counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from di_star_jax.errors import UserError

_CHUNK = 2**20  # prompts drawn at a time by the bootstrap: some 50 MB


class Summary(NamedTuple):
    """A mean over prompts; NaN where there is none."""

    mean: float
    stderr: float  # of the mean, over prompts; NaN for one prompt
    prompts: int  # with at least one readable image
    images: int  # readable
    left_out: int  # images


def _by_prompt(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the readable images of each prompt, NaN where none is; their number; [P] each."""
    values = np.asarray(values, np.float64)
    if values.ndim == 1:
        values = values[:, None]
    readable = ~np.isnan(values)
    number = readable.sum(axis=1)
    sums = np.where(readable, values, 0.0).sum(axis=1)
    none = np.full(len(values), np.nan)
    return np.divide(sums, number, out=none, where=number > 0), number


def summary(values: np.ndarray) -> Summary:
    """Mean over prompts of the mean over their images.

    Args: values [P, K] or [P], NaN where left out.

    The standard error is that of P independent means, for the images of one prompt are not
    independent of each other.
    """
    means, number = _by_prompt(values)
    used = means[number > 0]
    mean = float(used.mean()) if len(used) else np.nan
    stderr = float(used.std(ddof=1) / np.sqrt(len(used))) if len(used) > 1 else np.nan
    images = int(number.sum())
    return Summary(mean, stderr, len(used), images, int(np.size(values) - images))


def over_noise(values: np.ndarray) -> tuple[float, float] | None:
    """Least and largest mean of one image of each prompt; None for one image a prompt.

    Args: values [P, K], NaN where left out; a sample without any image does not count.
    """
    means = [column[~np.isnan(column)].mean() for column in values.T if np.isfinite(column).any()]
    return (float(min(means)), float(max(means))) if len(means) > 1 else None


def by_group(values: np.ndarray, groups: Sequence[str]) -> dict[str, Summary]:
    """The summary of each category, in order of appearance.

    Args: values [P, K] or [P]; groups: P names, such as the styles of HPSv2.
    Raises: UserError where they are not equally many.
    """
    values = np.asarray(values)
    names = np.array(groups, dtype=object)
    if len(values) != len(names):
        raise UserError(
            f"{len(values)} prompts and {len(names)} categories, expected one for each; give both "
            "lists in the same order"
        )
    return {name: summary(values[names == name]) for name in dict.fromkeys(groups)}


class Paired(NamedTuple):
    """Run a against run b; low and high bound a 95 % interval, NaN for fewer than two prompts."""

    difference: float  # mean over prompts of a - b
    low: float
    high: float
    win_rate: float  # share of prompts on which a is better; a tie is half of one
    win_low: float
    win_high: float
    prompts: int  # with at least one readable pair
    pairs: int  # of images, both readable
    left_out: int  # pairs


def paired(
    a: np.ndarray,
    b: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> Paired:
    """Compares two runs on the same prompts and noise; a pair counts where both are readable.

    Args:
      a, b: [P, K] or [P], higher is better; entry by entry of the same prompt and noise.
      seed, resamples: of the bootstrap, which draws prompts.
    Returns: differences, win rate, and the percentile intervals of both.
    Raises: UserError for different shapes. Source: Efron and Tibshirani 1993, chapter 13.
    """
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise UserError(
            f"scores of shapes {list(a.shape)} and {list(b.shape)}, expected the same; "
            "score both runs on the same prompts and seeds"
        )
    means, number = _by_prompt(a - b)
    difference = means[number > 0]
    pairs = int(number.sum())
    counts = (len(difference), pairs, a.size - pairs)
    if not len(difference):
        return Paired(*[np.nan] * 6, *counts)
    wins = (np.sign(difference) + 1.0) / 2.0
    (low, high), (win_low, win_high) = _intervals(np.stack([difference, wins]), seed, resamples)
    mean = float(difference.mean())
    return Paired(mean, low, high, float(wins.mean()), win_low, win_high, *counts)


def _intervals(
    values: np.ndarray,
    seed: int,
    resamples: int,
) -> list[list[float]]:
    """95 % intervals of the means of [V, P], the same prompts drawn for all: V of [low, high]."""
    prompts = values.shape[1]
    if prompts < 2:
        return [[np.nan, np.nan]] * len(values)
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(_CHUNK // prompts, 1),
        axis=1,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.stack(found.confidence_interval, axis=1).tolist()
