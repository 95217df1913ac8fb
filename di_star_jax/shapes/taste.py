# SPDX-License-Identifier: Apache-2.0
"""A taste that captions do not state, and preference pairs, which the reward is trained on.

It likes light that falls from above and is warm. Light is a `Style`: no caption says anything about
it.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from di_star_jax.shapes import scenes
from di_star_jax.shapes.oracle import backdrop
from di_star_jax.shapes.scenes import Group, Scene

# Chosen so that each part has a standard deviation of about 0.7 over styles.
LIGHT = 5.0
WARMTH = 6.0


def taste(image: np.ndarray) -> float:
    """How much an image is liked; mean about 0 and standard deviation about 1 over random scenes.

    LIGHT times how much brighter the backdrop is at the top than in the middle, and WARMTH times
    how much redder than blue it gets towards the lit side, both relative to its colour in the
    middle.

    Args: image float [64, 64, 3] in [0, 1].
    """
    centre, right, down = backdrop(image)  # RGB each
    right = right / np.maximum(centre, 0.05)
    down = down / np.maximum(centre, 0.05)
    strength = np.hypot(right.mean(), down.mean()) + 1e-3
    warm = (right[0] - right[2]) * right.mean() + (down[0] - down[2]) * down.mean()
    return float(-LIGHT * down.mean() + WARMTH * warm / strength)


def _other(
    names: Iterable[str],
    taken: set[str],
    rng: np.random.Generator,
) -> str:
    free = [name for name in names if name not in taken]
    return free[rng.integers(len(free))]


def _changed_group(
    scene: Scene,
    group: Group,
    which: int,
    rng: np.random.Generator,
) -> Group:
    if which == 0:
        taken = {other.colour for other in scene.groups}
        return dataclasses.replace(group, colour=_other(scenes.COLOURS, taken, rng))
    if which == 1:
        return dataclasses.replace(group, kind=_other(scenes.KINDS, {group.kind}, rng))
    return dataclasses.replace(group, count=3 - group.count)


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one word wrong: a colour, a kind, a count or the background."""
    which = rng.integers(4)
    if which == 3:
        background = _other(scenes.BACKGROUNDS, {scene.background}, rng)
        return dataclasses.replace(scene, background=background)
    i = rng.integers(len(scene.groups))
    groups = list(scene.groups)
    groups[i] = _changed_group(scene, groups[i], which, rng)
    return dataclasses.replace(scene, groups=tuple(groups))


def preferred(difference: float) -> float:
    """How likely a picture is preferred that is liked so much more: Bradley-Terry on twice it."""
    return float(1 / (1 + np.exp(-2.0 * difference)))


def preference_pair(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Two pictures for one caption, and how likely the first is preferred.

    Two of three pairs show the scene twice, in two styles: Bradley-Terry on twice the difference in
    taste. In the third, one of the pictures shows something else (one word changed, or another
    scene) and is preferred with probability 0.03 whatever its style.

    Returns: (image_a, image_b float32 [64, 64, 3] in [0, 1], probability).
    """
    image_a, image_b = scenes.render(scene, rng), scenes.render(scene, rng)
    if rng.random() < 2 / 3:
        return image_a, image_b, preferred(taste(image_a) - taste(image_b))
    one_word = rng.random() < 2 / 3
    other = _changed(scene, rng) if one_word else scenes.sample_scene(rng, held_out=False)
    if rng.random() < 0.5:
        return image_a, scenes.render(other, rng), 0.97
    return scenes.render(other, rng), image_b, 0.03
