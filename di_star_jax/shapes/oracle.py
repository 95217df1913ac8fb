# SPDX-License-Identifier: Apache-2.0
"""Reads a scene back from pixels: background, and for each colour how many objects, which kind,
size and texture.

The renderer's backdrop is linear in x and y and the outermost BORDER pixels are always backdrop, so
a plane fitted to them tells what lies in front of it. Everything else is moments of the parts that
do.
"""

from dataclasses import dataclass

import numpy as np

from di_star_jax.shapes import scenes
from di_star_jax.shapes.scenes import Scene

CONTRAST = 0.13  # from the backdrop, where an object begins
SMALLEST = 20  # pixels of a part; less is noise
# kind: area over r^2, and how far below its centre the centroid lies, over r
MOMENTS = {
    "circle": (3.1416, 0.0),
    "square": (3.0976, 0.0),
    "triangle": (1.9425, 0.1833),
    "cross": (2.2576, 0.0),
}
_Y, _X = np.mgrid[0 : scenes.SIZE, 0 : scenes.SIZE].astype(np.float64) + 0.5
_FRAME = np.minimum(np.minimum(_X, _Y), scenes.SIZE - np.maximum(_X, _Y)) < 2.0
_PLANE = np.stack([np.ones_like(_X), _X / 32 - 1, _Y / 32 - 1], axis=-1)  # [64, 64, 3]
_SOLVE = np.linalg.pinv(_PLANE[_FRAME])


@dataclass(frozen=True)
class Seen:
    """Objects of one colour: how many, kind and size ("small" or "large") of most, whether striped,
    mean place.
    """

    count: int
    kind: str
    size: str
    striped: bool
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What an image shows: the background's name, and what is seen of each colour."""

    background: str
    groups: dict[str, Seen]


def backdrop(image: np.ndarray) -> np.ndarray:
    """The plane behind the objects. Args: image [64, 64, 3] in [0, 1]. Returns: its coefficients,
    [3, 3]: value at the centre, slope to the right and slope downwards (per half image), for each
    of RGB.
    """
    return _SOLVE @ image[_FRAME].astype(np.float64)


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts (4 neighbours) of a mask.

    Args: bool [H, W]. Returns: bool masks of SMALLEST pixels or more.
    """
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # the largest number spreads through each part
        padded = np.pad(label, 1)
        spread = np.maximum.reduce(
            [label, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, label):
            break
        label = spread
    values, counts = np.unique(label[mask], return_counts=True)
    return [label == value for value, count in zip(values, counts) if count >= SMALLEST]


def _kind_and_radius(mask: np.ndarray) -> tuple[str, float]:
    """The kind whose outline of the same area and centroid overlaps most."""
    area, x, y = mask.sum(), _X[mask].mean(), _Y[mask].mean()
    best = ("", 0.0, -1.0)
    for kind, (unit_area, below) in MOMENTS.items():
        r = np.sqrt(area / unit_area)
        shape = scenes._distance(kind, _X - x, _Y - (y - below * r), r) < 0
        overlap = (mask & shape).sum() / (mask | shape).sum()
        if overlap > best[2]:
            best = (kind, r, overlap)
    return best[:2]


def _colour_and_whiteness(pixels: np.ndarray) -> tuple[str, float]:
    """Name of the colour of an object's most saturated pixels, and how far its mean lies towards
    white.

    The most saturated, because half-white edges of red stripes look pink.
    """
    saturation = pixels.max(axis=1) - pixels.min(axis=1)
    vivid = pixels[saturation >= np.quantile(saturation, 0.7)].mean(axis=0)
    name = list(scenes.COLOURS)[int(np.argmin(((scenes.PALETTE - vivid) ** 2).sum(axis=1)))]
    towards = scenes.WHITE - vivid
    return name, float(((pixels - vivid) @ towards).mean() / (towards @ towards))


def read(image: np.ndarray) -> Reading:
    """Args: image float [64, 64, 3] in [0, 1]. Returns: what it shows; never fails."""
    plane = backdrop(image)
    tones = scenes.TONES / np.linalg.norm(scenes.TONES, axis=1, keepdims=True)
    centre = plane[0] / max(np.linalg.norm(plane[0]), 1e-6)
    background = list(scenes.BACKGROUNDS)[int(np.argmin(((tones - centre) ** 2).sum(axis=1)))]
    found = {}
    for mask in parts(np.abs(image - _PLANE @ plane).max(axis=-1) > CONTRAST):
        # The outermost ring is mixed with the backdrop.
        inner = (
            mask
            & np.roll(mask, 1, 0)
            & np.roll(mask, -1, 0)
            & np.roll(mask, 1, 1)
            & np.roll(mask, -1, 1)
        )
        colour, white = _colour_and_whiteness(image[inner if inner.sum() >= 8 else mask])
        found.setdefault(colour, []).append(
            (*_kind_and_radius(mask), white, _X[mask].mean(), _Y[mask].mean())
        )
    groups = {}
    for colour, objects in found.items():
        kinds, radii, whites, xs, ys = zip(*objects)
        size = "small" if np.mean(radii) < 8.0 else "large"
        groups[colour] = Seen(
            len(objects),
            max(kinds, key=kinds.count),
            size,
            bool(np.mean(whites) > 0.17),
            float(np.mean(xs)),
            float(np.mean(ys)),
        )
    return Reading(background, groups)


def attributes(scene: Scene, image: np.ndarray) -> tuple[int, int]:
    """How many of a caption's attributes an image shows.

    Counted: for each group colour (something of it is there), count, kind, texture and, where
    stated, size; the relation where there are two groups; the background. Of a group whose colour
    is missing, nothing is right.

    Args: scene; image float [64, 64, 3] in [0, 1]. Returns: (right, all).
    """
    reading = read(image)
    right, total = int(reading.background == scene.background), 1
    for group in scene.groups:
        stated = 4 + bool(group.size)
        total += stated
        seen = reading.groups.get(group.colour)
        if seen is not None:
            right += (
                1
                + (seen.count == group.count)
                + (seen.kind == group.kind)
                + (seen.striped == bool(group.texture))
                + (bool(group.size) and seen.size == group.size)
            )
    if scene.relation:
        total += 1
        first, second = (reading.groups.get(group.colour) for group in scene.groups)
        right += (
            first is not None and second is not None and _relation(first, second) == scene.relation
        )
    return right, total


def _relation(first: Seen, second: Seen) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"
