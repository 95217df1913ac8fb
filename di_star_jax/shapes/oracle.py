# SPDX-License-Identifier: Apache-2.0
"""Reads a scene back from pixels: the background, and what there is of each colour.

The renderer's backdrop is linear in x and y and the outermost BORDER pixels are always backdrop, so
a plane fitted to them tells what lies in front of it. Everything else is moments of the parts that
do.
"""

import collections
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from di_star_jax.shapes import scenes
from di_star_jax.shapes.scenes import Group, Scene

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
    """Objects of one colour: how many, kind and size of most, whether striped, mean place.

    size: "small" or "large".
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


class _Part(NamedTuple):
    """One object; white is how far its mean lies from its colour towards white."""

    kind: str
    radius: float
    white: float
    x: float
    y: float


def backdrop(image: np.ndarray) -> np.ndarray:
    """The plane behind the objects.

    Args: image [64, 64, 3] in [0, 1].
    Returns: its coefficients, [3, 3]: value at the centre, slope to the right and slope downwards
      (per half image), for each of RGB.
    """
    return _SOLVE @ image[_FRAME].astype(np.float64)


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts (4 neighbours) of a mask, in the order of their last pixels.

    The order decides which of two kinds wins that are seen equally often.

    Args: bool [H, W]. Returns: bool masks of SMALLEST pixels or more.
    """
    labels, count = scipy.ndimage.label(mask)
    found = [labels == label for label in range(1, count + 1)]
    found = [part for part in found if part.sum() >= SMALLEST]
    return sorted(found, key=_last_pixel)


def _last_pixel(mask: np.ndarray) -> int:
    return np.flatnonzero(mask)[-1]


def _kind_and_radius(mask: np.ndarray) -> tuple[str, float]:
    """The kind whose outline of the same area and centroid overlaps most."""
    area, x, y = mask.sum(), _X[mask].mean(), _Y[mask].mean()
    overlaps = {}
    for kind, (unit_area, below) in MOMENTS.items():
        r = np.sqrt(area / unit_area)
        outline = scenes.distance(kind, _X - x, _Y - (y - below * r), r) < 0
        overlaps[kind, r] = (mask & outline).sum() / (mask | outline).sum()
    return max(overlaps, key=overlaps.get)


def _colour_and_white(pixels: np.ndarray) -> tuple[str, float]:
    """Name of the colour of the most saturated pixels, and how far their mean is towards white.

    The most saturated, because half-white edges of red stripes look pink.
    """
    saturation = pixels.max(axis=1) - pixels.min(axis=1)
    vivid = pixels[saturation >= np.quantile(saturation, 0.7)].mean(axis=0)
    name = list(scenes.COLOURS)[_nearest(scenes.PALETTE, vivid)]
    towards = scenes.WHITE - vivid
    white = ((pixels - vivid) @ towards).mean() / (towards @ towards)
    return name, float(white)


def _nearest(rows: np.ndarray, value: np.ndarray) -> int:
    return int(np.argmin(((rows - value) ** 2).sum(axis=1)))


def _background(plane: np.ndarray) -> str:
    """The name of the tone whose direction in RGB is nearest; its brightness varies."""
    tones = scenes.TONES / np.linalg.norm(scenes.TONES, axis=1, keepdims=True)
    centre = plane[0] / max(np.linalg.norm(plane[0]), 1e-6)
    return list(scenes.BACKGROUNDS)[_nearest(tones, centre)]


def _inner(mask: np.ndarray) -> np.ndarray:
    """A part without its outermost ring, which is mixed with the backdrop; all of a thin part."""
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            inner &= np.roll(mask, shift, axis)
    return inner if inner.sum() >= 8 else mask


def _seen(found: list[_Part]) -> Seen:
    kinds, *moments = zip(*found, strict=True)
    radius, white, x, y = (float(np.mean(values)) for values in moments)
    return Seen(
        count=len(found),
        kind=max(kinds, key=kinds.count),
        size="small" if radius < 8.0 else "large",
        striped=white > 0.17,
        x=x,
        y=y,
    )


def read(image: np.ndarray) -> Reading:
    """What an image shows; never fails. Args: image float [64, 64, 3] in [0, 1]."""
    plane = backdrop(image)
    front = np.abs(image - _PLANE @ plane).max(axis=-1) > CONTRAST
    found = collections.defaultdict(list)
    for mask in parts(front):
        colour, white = _colour_and_white(image[_inner(mask)])
        kind, radius = _kind_and_radius(mask)
        found[colour].append(_Part(kind, radius, white, _X[mask].mean(), _Y[mask].mean()))
    groups = {colour: _seen(objects) for colour, objects in found.items()}
    return Reading(_background(plane), groups)


def attributes(scene: Scene, image: np.ndarray) -> tuple[int, int]:
    """How many of a caption's attributes an image shows.

    Counted: for each group colour (something of it is there), count, kind, texture and, where
    stated, size; the relation where there are two groups; the background. Of a group whose colour
    is missing, nothing is right.

    Args: scene; image float [64, 64, 3] in [0, 1]. Returns: (right, all).
    """
    reading = read(image)
    seen = [reading.groups.get(group.colour) for group in scene.groups]
    right = [reading.background == scene.background]
    for group, there in zip(scene.groups, seen, strict=True):
        right += _right_of_group(group, there)
    if scene.relation:
        right.append(None not in seen and _relation(*seen) == scene.relation)
    return sum(right), len(right)


def _right_of_group(group: Group, seen: Seen | None) -> list[bool]:
    if seen is None:
        return [False] * (5 if group.size else 4)
    right = [
        True,
        seen.count == group.count,
        seen.kind == group.kind,
        seen.striped == bool(group.texture),
    ]
    return [*right, seen.size == group.size] if group.size else right


def _relation(first: Seen, second: Seen) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"
