# SPDX-License-Identifier: Apache-2.0
"""The shapes world: captioned scenes and their renderer.

A caption reads `GROUP on a BACKGROUND background` or `GROUP RELATION GROUP on a BACKGROUND
background`, where `GROUP` is `COUNT [SIZE] [striped] COLOUR KIND`: "two small red circles above a
striped blue square on a green background". The two groups of a scene always differ in colour. A
group without "striped" is plain; a group without a size may have either. What a caption leaves open
(light, margins, stripe direction, exact places) is a `Style`.

Coordinates are pixels of a 64x64 image, x to the right and y downwards; images are float32 RGB in
[0, 1].
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from di_star_jax.errors import UserError

COUNTS = ("a", "two")
SIZES = ("", "small", "large")
TEXTURES = ("", "striped")
COLOURS = {
    "red": (0.88, 0.13, 0.15),
    "yellow": (0.98, 0.82, 0.12),
    "green": (0.10, 0.74, 0.24),
    "cyan": (0.12, 0.80, 0.92),
    "blue": (0.12, 0.28, 0.90),
    "pink": (0.96, 0.36, 0.72),
}
KINDS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
RELATIONS = ("above", "below", "left of", "right of")
BACKGROUNDS = {
    "gray": (0.50, 0.50, 0.51),
    "brown": (0.46, 0.33, 0.22),
    "green": (0.31, 0.42, 0.31),
    "blue": (0.29, 0.36, 0.51),
    "purple": (0.43, 0.31, 0.50),
}
RADIUS = {"small": 6.0, "large": 10.0}  # pixels; half the width of the largest kind is 1.05 of it
SIZE = 64
WHITE = np.array((0.97, 0.97, 0.97), np.float32)  # the other colour of stripes
BORDER, GAP = 3.0, 4.0  # pixels that stay free at the image's border and between two objects
GROUPS_1 = len(COUNTS) * len(SIZES) * len(TEXTURES) * len(COLOURS) * len(KINDS)
# The second group has another colour than the first.
GROUPS_2 = GROUPS_1 // len(COLOURS) * (len(COLOURS) - 1)
PALETTE = np.array(list(COLOURS.values()), np.float32)
TONES = np.array(list(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Group:
    """Objects that look alike.

    count: 1 or 2. size: "small", "large" or "" (either). texture: "striped" or "" (plain).
    """

    count: int
    size: str
    texture: str
    colour: str
    kind: str

    @property
    def words(self) -> str:
        kind = KINDS[self.kind] if self.count > 1 else self.kind
        phrase = (COUNTS[self.count - 1], self.size, self.texture, self.colour, kind)
        return " ".join(word for word in phrase if word)


@dataclass(frozen=True)
class Scene:
    """One group (relation ""), or two and how the first lies to the second, on a background."""

    groups: tuple[Group, ...]
    relation: str
    background: str

    @property
    def caption(self) -> str:
        groups = f" {self.relation} ".join(group.words for group in self.groups)
        return f"{groups} on a {self.background} background"


@dataclass(frozen=True)
class Style:
    """What a caption leaves open, the same for all objects of an image.

    hue: shift of object colours in [-0.05, 0.05].
    gain, tone: brightness factors of objects and background, about 1.
    margin: in [0, 0.9], the part of the free space that lies between objects and border (0.9:
      objects at the centre).
    light: in [0, 0.35], how much brighter the background gets from its middle to the lit border.
    angle: where the light comes from, radians; 0 is right and pi/2 is below.
    warmth: in [-0.5, 0.5], how red (or blue) that light is.
    stripe, phase: direction in radians and offset in periods of stripes.
    """

    hue: float
    gain: float
    tone: float
    margin: float
    light: float
    angle: float
    warmth: float
    stripe: float
    phase: float


def num_captions() -> int:
    """How many different captions the grammar has: those of one group and those of two."""
    contents = GROUPS_1 + GROUPS_1 * len(RELATIONS) * GROUPS_2
    return contents * len(BACKGROUNDS)


def words() -> list[str]:
    """Every word of any caption, sorted."""
    phrases = (
        *COUNTS,
        *SIZES,
        *TEXTURES,
        *COLOURS,
        *KINDS,
        *KINDS.values(),
        *RELATIONS,
        *BACKGROUNDS,
        "on background",
    )
    return sorted({word for phrase in phrases for word in phrase.split()})


def _group_at(index: int, colours: tuple[str, ...]) -> Group:
    index, kind = divmod(index, len(KINDS))
    index, colour = divmod(index, len(colours))
    index, texture = divmod(index, len(TEXTURES))
    count, size = divmod(index, len(SIZES))
    return Group(count + 1, SIZES[size], TEXTURES[texture], colours[colour], tuple(KINDS)[kind])


def scene_at(index: int) -> Scene:
    """The scene with this number, those of one group first: a bijection to captions.

    Args: index, in [0, num_captions()).
    Raises: UserError for a number outside that range.
    """
    if not 0 <= index < num_captions():
        raise UserError(f"scene number {index} does not exist; use 0 to {num_captions() - 1}")
    index, background = divmod(index, len(BACKGROUNDS))
    background = tuple(BACKGROUNDS)[background]
    if index < GROUPS_1:
        return Scene((_group_at(index, tuple(COLOURS)),), "", background)
    index, relation = divmod(index - GROUPS_1, len(RELATIONS))
    first, second = divmod(index, GROUPS_2)
    first = _group_at(first, tuple(COLOURS))
    second = _group_at(second, tuple(c for c in COLOURS if c != first.colour))
    return Scene((first, second), RELATIONS[relation], background)


def _parse_group(text: str) -> Group:
    """Raises ValueError (wrong word) or IndexError (too few words)."""
    count, *rest = text.split()
    size = rest.pop(0) if rest[0] in SIZES else ""
    texture = rest.pop(0) if rest[0] in TEXTURES else ""
    colour, kind = rest
    if colour not in COLOURS:
        raise ValueError(colour)
    count = COUNTS.index(count) + 1
    kinds = list(KINDS) if count == 1 else list(KINDS.values())
    return Group(count, size, texture, colour, list(KINDS)[kinds.index(kind)])


def _parse_scene(caption: str) -> Scene:
    """Raises ValueError or IndexError for what is no caption."""
    content, background = caption.removesuffix(" background").split(" on a ")
    relation = next((r for r in RELATIONS if f" {r} " in content), "")
    parts = content.split(f" {relation} ") if relation else [content]
    scene = Scene(tuple(_parse_group(part) for part in parts), relation, background)
    if scene.caption != caption or background not in BACKGROUNDS or len(parts) > 2:
        raise ValueError(caption)
    return scene


def parse(caption: str) -> Scene:
    """The scene that a caption describes, so that `parse(scene.caption) == scene`.

    Raises: UserError if the caption is not one of the grammar's.
    """
    try:
        scene = _parse_scene(caption)
    except (ValueError, IndexError):
        example = scene_at(num_captions() // 2).caption
        raise UserError(f"cannot read the caption {caption!r}; write it like {example!r}") from None
    if len({group.colour for group in scene.groups}) < len(scene.groups):
        raise UserError(
            f"both groups of {caption!r} have one colour; give the second group another"
        )
    return scene


def is_held_out(caption: str) -> bool:
    """Whether a caption is kept from all training: about one in fifty, by a hash of its bytes."""
    return zlib.crc32(caption.encode()) % 50 == 0


def _draw_scene(rng: np.random.Generator) -> Scene:
    num_single = GROUPS_1 * len(BACKGROUNDS)
    if rng.random() < 1 / 3:
        return scene_at(int(rng.integers(num_single)))
    return scene_at(int(rng.integers(num_single, num_captions())))


def sample_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """A random scene, one third with one group, from the held-out captions or from all others."""
    scene = _draw_scene(rng)
    while is_held_out(scene.caption) != held_out:
        scene = _draw_scene(rng)
    return scene


def sample_style(rng: np.random.Generator) -> Style:
    """A random style, each field drawn on its own: none says anything about a caption."""
    low = (-0.05, 0.92, 0.9, 0.0, 0.0, -np.pi, -0.5, np.pi / 5, 0.0)
    high = (0.05, 1.04, 1.1, 0.9, 0.35, np.pi, 0.5, 3 * np.pi / 10, 1.0)
    *fields, stripe, phase = rng.uniform(low, high).tolist()
    return Style(*fields, stripe if rng.random() < 0.5 else -stripe, phase)


class _Object(NamedTuple):
    """Where one object of a group lies, in pixels."""

    group: Group
    x: float
    y: float
    radius: float


def _place(
    lengths: list[float],
    margin: float,
    u: np.ndarray,
) -> list[float]:
    """Centres of intervals one after another between the borders.

    u: random numbers that share out the slack.
    """
    slack = SIZE - 2 * BORDER - sum(lengths) - GAP * (len(lengths) - 1)
    shares = np.sort(u[: len(lengths)]) * slack * (1 - margin) + slack * margin / 2
    starts = np.cumsum([BORDER] + [length + GAP for length in lengths[:-1]]) + shares
    return (starts + np.array(lengths) / 2).tolist()


def _radii(
    group: Group,
    which: float,
    u: np.ndarray,
) -> list[float]:
    """Of a group's objects. which: of the two sizes, where the caption leaves it open."""
    size = group.size or ("small" if which < 0.5 else "large")
    return [RADIUS[size] * (0.95 + 0.1 * v) for v in u[: group.count]]


def _drawn_together(
    across: list[list[float]],
    radii: list[list[float]],
    distance: float,
) -> list[list[float]]:
    """Places of two groups across their axis, the narrower group moved towards the wider one.

    Side by side must not look like one above the other. distance: between the groups.
    """
    centres = [sum(places) / len(places) for places in across]
    narrow = int((len(radii[1]), radii[1]) < (len(radii[0]), radii[0]))
    offset = centres[narrow] - centres[1 - narrow]
    excess = offset - np.clip(offset, -0.6 * distance, 0.6 * distance)
    moved = list(across)
    moved[narrow] = [place - excess for place in across[narrow]]
    return moved


def _layout(
    scene: Scene,
    rng: np.random.Generator,
    margin: float,
) -> list[_Object]:
    """Groups one after another along the relation's axis, a group's members across it."""
    u = rng.random(24)
    backwards = scene.relation in ("below", "right of")
    groups = scene.groups[::-1] if backwards else scene.groups
    radii = [_radii(group, u[i], u[2 + 2 * i :]) for i, group in enumerate(groups)]
    along = _place([2.1 * max(sizes) for sizes in radii], margin, u[6:])
    across = [
        _place([2.1 * r for r in sizes], margin, u[8 + 2 * i :]) for i, sizes in enumerate(radii)
    ]
    if len(groups) == 2:
        across = _drawn_together(across, radii, along[1] - along[0])
    upright = scene.relation in ("above", "below") or (not scene.relation and u[23] < 0.5)
    objects = []
    for group, place, places, sizes in zip(groups, along, across, radii, strict=True):
        for other, radius in zip(places, sizes, strict=True):
            x, y = (other, place) if upright else (place, other)
            objects.append(_Object(group, x, y, radius))
    return objects


def distance(
    kind: str,
    x: np.ndarray,
    y: np.ndarray,
    r: float,
) -> np.ndarray:
    """Signed distance in pixels to a kind's outline, negative inside.

    Args: offsets x, y from its centre; r, its radius.
    """
    if kind == "circle":
        return np.sqrt(x * x + y * y) - r
    if kind == "triangle":
        return np.maximum((1.85 * np.abs(x) - 1.05 * (y + 1.05 * r)) * 0.470, y - 0.8 * r)
    x, y = np.abs(x), np.abs(y)
    if kind == "square":
        return np.maximum(x, y) - 0.88 * r
    return np.minimum(np.maximum(x - 0.34 * r, y - r), np.maximum(y - 0.34 * r, x - r))


def _backdrop(
    background: str,
    style: Style,
    size: int,
) -> np.ndarray:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    ramp = style.light * (np.cos(style.angle) * axis[None, :] + np.sin(style.angle) * axis[:, None])
    tone = style.tone * np.array(BACKGROUNDS[background], np.float32)
    warm = np.array((1 + style.warmth, 1, 1 - style.warmth), np.float32)
    return tone + ramp[..., None] * tone * warm


def _colour(group: Group, style: Style) -> np.ndarray:
    colour = np.array(COLOURS[group.colour], np.float32)
    shift = style.hue * (np.roll(colour, 1) - np.roll(colour, -1))
    return np.clip((colour + shift) * style.gain, 0, 1)


def _white(
    dx: np.ndarray,
    dy: np.ndarray,
    period: float,
    style: Style,
) -> np.ndarray:
    """How white stripes make each pixel, in [0, 1]."""
    along = (np.cos(style.stripe) * dx + np.sin(style.stripe) * dy) / period + style.phase
    return np.clip(0.5 + period * (0.21 - np.abs(along % 1 - 0.5)), 0, 1)


def _paint(
    image: np.ndarray,
    thing: _Object,
    style: Style,
    scale: float,
) -> None:
    """Draws one object into an image, `scale` times larger than its coordinates say."""
    x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
    left, top = int(x - 1.05 * r - 1), int(y - 1.05 * r - 1)
    right, bottom = int(x + 1.05 * r + 2), int(y + 1.05 * r + 2)
    box = image[max(top, 0) : bottom, max(left, 0) : right]
    dx = np.arange(left, left + box.shape[1], dtype=np.float32)[None, :] + (0.5 - x)
    dy = np.arange(top, top + box.shape[0], dtype=np.float32)[:, None] + (0.5 - y)
    colour = _colour(thing.group, style)
    if thing.group.texture:
        white = _white(dx, dy, 2 * scale + 0.55 * r, style)
        colour = colour + white[..., None] * (WHITE - colour)
    inside = np.clip(0.5 - distance(thing.group.kind, dx, dy, r), 0, 1)
    box += inside[..., None] * (colour - box)


def render(
    scene: Scene,
    rng: np.random.Generator,
    style: Style | None = None,
    size: int = SIZE,
) -> np.ndarray:
    """An anti-aliased picture of a scene, float32 [size, size, 3] in [0, 1].

    Args:
      rng: places the objects (they obey the relation, never touch, and keep BORDER pixels from the
        border) and draws the style if none is given.
      style: what the caption leaves open.
      size: width in pixels; the same picture at another resolution.
    """
    style = style or sample_style(rng)
    image = _backdrop(scene.background, style, size)
    for thing in _layout(scene, rng, style.margin):
        _paint(image, thing, style, size / SIZE)
    return image
