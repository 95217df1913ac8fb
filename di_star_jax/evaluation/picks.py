# SPDX-License-Identifier: Apache-2.0
"""Which pictures the page shows, of all that were scored: extremes, and a random draw."""

import random
from collections.abc import Iterator

import numpy as np

LISTED = 8  # entries of a list of extremes
BINS = 24  # of a histogram of differences, half of them below zero

Place = tuple[int, int]  # (prompt, sample)
Lists = dict[str, dict[str, list[Place]]]  # by metric, then "best", "worst", "gains", "losses"


def histogram(differences: np.ndarray) -> dict:
    """Differences over all prompts and samples, NaN left out.

    Zero is an edge, so that no bar holds gains and losses.
    """
    values = differences[np.isfinite(differences)]
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    return {"limit": limit, "counts": np.histogram(values, BINS, (-limit, limit))[0].tolist()}


def extremes(scores: np.ndarray, differences: np.ndarray) -> dict[str, list[Place]]:
    """The best and worst pictures and the largest gains and losses, each list equally long.

    Args: scores, and differences to a baseline, [P, K]: higher is better, NaN where there is none.
    """
    kinds = {
        "best": ranked(scores),
        "worst": ranked(-scores),
        "gains": ranked(np.where(differences > 0, differences, np.nan)),
        "losses": ranked(np.where(differences < 0, -differences, np.nan)),
    }
    length = min(LISTED, max(1, len(scores) // 2))  # few prompts are not best and worst at once
    return {kind: places[:length] for kind, places in kinds.items()}


def ranked(values: np.ndarray) -> list[Place]:
    """The best sample of each prompt, prompts by falling value; NaN is left out."""
    values = np.where(np.isfinite(values), values, -np.inf)
    samples = values.argmax(axis=1)
    best = values.max(axis=1)
    order = np.argsort(-best, kind="stable").tolist()
    return [(i, int(samples[i])) for i in order if np.isfinite(best[i])]


def pick(
    lists: Lists,
    count: int,
    max_prompts: int,
) -> tuple[list[int], set[int], Lists]:
    """Chooses the prompts to show: extremes for at most half the room, then a random draw.

    Extremes are taken rank by rank of all lists.

    Args: count, of all prompts. Returns: prompts, those of the random draw, and the lists cut to
      the ranks that all lists got.
    """
    picked, depth = _extremes_for(lists, max_prompts // 2 if count > max_prompts else count)
    drawn: set[int] = set()
    # Out of all prompts, the extremes too: so the draw alone is a fair sample.
    for i in random.Random(0).sample(range(count), count):
        if len(picked | drawn) >= max_prompts:
            break
        drawn.add(i)
    shown = picked | drawn
    cut = {
        metric: {
            kind: [place for place in places[:depth] if place[0] in shown]
            for kind, places in kinds.items()
        }
        for metric, kinds in lists.items()
    }
    return sorted(shown), drawn if len(shown) < count else shown, cut


def _extremes_for(lists: Lists, room: int) -> tuple[set[int], int]:
    """Prompts of as many ranks as there is room for, and how many ranks that is: one at least."""
    picked = list(dict.fromkeys(_at_rank(lists, 0)))[:room]
    for rank in range(1, LISTED):
        wider = list(dict.fromkeys([*picked, *_at_rank(lists, rank)]))
        if len(wider) > room:
            return set(picked), rank
        picked = wider
    return set(picked), LISTED


def _at_rank(lists: Lists, rank: int) -> Iterator[int]:
    for kinds in lists.values():
        for places in kinds.values():
            if rank < len(places):
                yield places[rank][0]
