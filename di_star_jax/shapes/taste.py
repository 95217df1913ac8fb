# SPDX-License-Identifier: Apache-2.0
"""A taste that captions do not state, and preference pairs that express it: what the reward is
trained on.

It likes light that falls from above and is warm. Light is a `Style`: no caption says anything about
it.
"""

import dataclasses

import numpy as np

from di_star_jax.shapes import scenes
from di_star_jax.shapes.oracle import backdrop
from di_star_jax.shapes.scenes import Scene

LIGHT, WARMTH = (
    5.0,
    6.0,
)  # chosen so that each part has a standard deviation of about 0.7 over styles


def taste(image: np.ndarray) -> float:
    """How much an image is liked; mean about 0 and standard deviation about 1 over random scenes.

    LIGHT times how much brighter the backdrop is at the top than in the middle, and WARMTH times
    how much redder than blue it gets towards the lit side, both relative to its colour in the
    middle.

    Args: image float [64, 64, 3] in [0, 1].
    """
    centre, right, down = backdrop(image)  # RGB each
    right, down = right / np.maximum(centre, 0.05), down / np.maximum(centre, 0.05)
    strength = np.hypot(right.mean(), down.mean()) + 1e-3
    warm = (right[0] - right[2]) * right.mean() + (down[0] - down[2]) * down.mean()
    return float(-LIGHT * down.mean() + WARMTH * warm / strength)


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one word wrong: a colour, a kind, a count or the background."""
    which = rng.integers(4)
    if which == 3:
        names = [name for name in scenes.BACKGROUNDS if name != scene.background]
        return dataclasses.replace(scene, background=names[rng.integers(len(names))])
    i = rng.integers(len(scene.groups))
    group = scene.groups[i]
    if which == 2:
        group = dataclasses.replace(group, count=3 - group.count)
    else:
        field, names = ("colour", scenes.COLOURS) if which == 0 else ("kind", scenes.KINDS)
        taken = {getattr(group, field)} | (
            {g.colour for g in scene.groups} if which == 0 else set()
        )
        names = [name for name in names if name not in taken]
        group = dataclasses.replace(group, **{field: names[rng.integers(len(names))]})
    return dataclasses.replace(
        scene, groups=tuple(group if j == i else g for j, g in enumerate(scene.groups))
    )


def preference_pair(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Two pictures for one caption, and how likely the first is preferred.

    Two of three pairs show the scene twice, in two styles: Bradley-Terry on twice the difference in
    taste. In the third, one of the pictures shows something else (one word changed, or another
    scene) and is preferred with probability 0.03 whatever its style.

    Returns: (image_a, image_b float32 [64, 64, 3] in [0, 1], probability).
    """
    image_a, image_b = scenes.render(scene, rng), scenes.render(scene, rng)
    if rng.random() < 2 / 3:
        return image_a, image_b, float(1 / (1 + np.exp(-2.0 * (taste(image_a) - taste(image_b)))))
    other = (
        _changed(scene, rng) if rng.random() < 2 / 3 else scenes.sample_scene(rng, held_out=False)
    )
    if rng.random() < 0.5:
        return image_a, scenes.render(other, rng), 0.97
    return scenes.render(other, rng), image_b, 0.03
