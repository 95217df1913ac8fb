# SPDX-License-Identifier: Apache-2.0
"""The shapes world: captioned scenes, their renderer, a taste that captions do not state, and an
oracle.

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
MAX_WORDS = 16
WHITE = np.array((0.97, 0.97, 0.97), np.float32)  # the other colour of stripes
BORDER, GAP = 3.0, 4.0  # pixels that stay free at the image's border and between two objects
GROUPS_1 = len(COUNTS) * len(SIZES) * len(TEXTURES) * len(COLOURS) * len(KINDS)
GROUPS_2 = (
    GROUPS_1 // len(COLOURS) * (len(COLOURS) - 1)
)  # the second group has another colour than the first
PALETTE = np.array(list(COLOURS.values()), np.float32)
TONES = np.array(list(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Group:
    """Objects that look alike: count 1 or 2; size "small", "large" or "" (either); texture
    "striped" or "" (plain).
    """

    count: int
    size: str
    texture: str
    colour: str
    kind: str

    @property
    def words(self) -> str:
        kind = KINDS[self.kind] if self.count > 1 else self.kind
        return " ".join(
            w for w in (COUNTS[self.count - 1], self.size, self.texture, self.colour, kind) if w
        )


@dataclass(frozen=True)
class Scene:
    """One group (relation "") or two groups and how the first lies to the second, on a background."""

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

    hue: shift of object colours in [-0.05, 0.05]. gain, tone: brightness factors of objects and
      background, about 1.
    margin: in [0, 0.9], the part of the free space that lies between objects and border (0.9:
      objects at the centre).
    light: in [0, 0.35], how much brighter the background gets from its middle to the lit border;
    angle: where the light comes from, radians, 0 is right and pi/2 is below; warmth: in [-0.5,
    0.5], how red (or blue) that light is. stripe, phase: direction in radians and offset in periods
    of stripes.
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
    """How many different captions the grammar has: those of one group and those of two groups of
    different colour.
    """
    return (GROUPS_1 + GROUPS_1 * len(RELATIONS) * GROUPS_2) * len(BACKGROUNDS)


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
    """The scene with this number; a bijection from [0, num_captions()) to captions, those of one
    group first.

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
    group = Group(COUNTS.index(count) + 1, size, texture, colour, kind)
    kinds = list(KINDS) if group.count == 1 else list(KINDS.values())
    if colour not in COLOURS:
        raise ValueError(colour)
    return Group(group.count, size, texture, colour, list(KINDS)[kinds.index(kind)])


def parse(caption: str) -> Scene:
    """The scene that a caption describes, so that `parse(scene.caption) == scene`.

    Raises: UserError if the caption is not one of the grammar's.
    """
    try:
        content, background = caption.removesuffix(" background").split(" on a ")
        relation = next((r for r in RELATIONS if f" {r} " in content), "")
        parts = content.split(f" {relation} ") if relation else [content]
        scene = Scene(tuple(_parse_group(part) for part in parts), relation, background)
    except (ValueError, IndexError):
        scene = None
    if (
        scene is None
        or scene.caption != caption
        or scene.background not in BACKGROUNDS
        or len(scene.groups) > 2
    ):
        raise UserError(
            f"cannot read the caption {caption!r}; write it like {scene_at(num_captions() // 2).caption!r}"
        )
    if len({group.colour for group in scene.groups}) < len(scene.groups):
        raise UserError(
            f"both groups of {caption!r} have one colour; give the second group another"
        )
    return scene


def is_held_out(caption: str) -> bool:
    """Whether a caption is kept from all training: about one in fifty, by a hash of its bytes,
    always the same.
    """
    return zlib.crc32(caption.encode()) % 50 == 0


def _draw_scene(rng: np.random.Generator) -> Scene:
    num_single = GROUPS_1 * len(BACKGROUNDS)
    if rng.random() < 1 / 3:
        return scene_at(int(rng.integers(num_single)))
    return scene_at(int(rng.integers(num_single, num_captions())))


def sample_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """A random scene, one third with one group, from the held-out captions or from all others."""
    while is_held_out((scene := _draw_scene(rng)).caption) != held_out:
        pass
    return scene


def sample_style(rng: np.random.Generator) -> Style:
    """A random style; every field is drawn on its own, so that no field says anything about a
    caption.
    """
    low = (-0.05, 0.92, 0.9, 0.0, 0.0, -np.pi, -0.5, np.pi / 5, 0.0)
    high = (0.05, 1.04, 1.1, 0.9, 0.35, np.pi, 0.5, 3 * np.pi / 10, 1.0)
    *fields, stripe, phase = rng.uniform(low, high).tolist()
    return Style(*fields, stripe if rng.random() < 0.5 else -stripe, phase)


def _place(lengths: list[float], margin: float, u: np.ndarray) -> list[float]:
    """Centres of intervals put one after another between the borders; u: random numbers that share
    out the slack.
    """
    slack = SIZE - 2 * BORDER - sum(lengths) - GAP * (len(lengths) - 1)
    shares = np.sort(u[: len(lengths)]) * slack * (1 - margin) + slack * margin / 2
    starts = np.cumsum([BORDER] + [length + GAP for length in lengths[:-1]]) + shares
    return (starts + np.array(lengths) / 2).tolist()


def _layout(
    scene: Scene, rng: np.random.Generator, margin: float
) -> list[tuple[Group, float, float, float]]:
    """(group, x, y, radius) per object: groups one after another along the relation's axis, members
    across it.
    """
    u = rng.random(24)
    groups = scene.groups if scene.relation in ("", "above", "left of") else scene.groups[::-1]
    sizes = [group.size or ("small" if v < 0.5 else "large") for group, v in zip(groups, u[:2])]
    radii = [
        [RADIUS[s] * (0.95 + 0.1 * v) for v in u[2 + 2 * i :][: g.count]]
        for i, (g, s) in enumerate(zip(groups, sizes))
    ]
    along = _place([2.1 * max(r) for r in radii], margin, u[6:])
    across = [_place([2.1 * v for v in r], margin, u[8 + 2 * i :]) for i, r in enumerate(radii)]
    if len(groups) == 2:
        # Side by side must not look like one above the other: the narrower group is moved towards
        # the wider one.
        centres = [sum(c) / len(c) for c in across]
        narrow = int(
            len(across[1]) < len(across[0])
            or (len(across[0]) == len(across[1]) and radii[1] < radii[0])
        )
        offset = centres[narrow] - centres[1 - narrow]
        excess = offset - np.clip(offset, -0.6 * (along[1] - along[0]), 0.6 * (along[1] - along[0]))
        across[narrow] = [c - excess for c in across[narrow]]
    upright = scene.relation in ("above", "below") or (not scene.relation and u[23] < 0.5)
    objects = [
        (g, c, a, r) for g, a, cs, rs in zip(groups, along, across, radii) for c, r in zip(cs, rs)
    ]
    return objects if upright else [(g, a, c, r) for g, c, a, r in objects]


def _distance(kind: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels to a kind's outline, negative inside, at offsets x, y from its
    centre.
    """
    if kind == "circle":
        return np.sqrt(x * x + y * y) - r
    if kind == "triangle":
        return np.maximum((1.85 * np.abs(x) - 1.05 * (y + 1.05 * r)) * 0.470, y - 0.8 * r)
    x, y = np.abs(x), np.abs(y)
    if kind == "square":
        return np.maximum(x, y) - 0.88 * r
    return np.minimum(np.maximum(x - 0.34 * r, y - r), np.maximum(y - 0.34 * r, x - r))


def _backdrop(background: str, style: Style, size: int) -> np.ndarray:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    ramp = style.light * (np.cos(style.angle) * axis[None, :] + np.sin(style.angle) * axis[:, None])
    tone = style.tone * np.array(BACKGROUNDS[background], np.float32)
    return tone + ramp[..., None] * tone * np.array(
        (1 + style.warmth, 1, 1 - style.warmth), np.float32
    )


def render(
    scene: Scene, rng: np.random.Generator, style: Style | None = None, size: int = SIZE
) -> np.ndarray:
    """An anti-aliased picture of a scene, float32 [size, size, 3] in [0, 1].

    Args: rng places the objects (they obey the relation, never touch, and keep BORDER pixels from
    the border) and draws the style if none is given; size: width in pixels, the same picture at
    another resolution.
    """
    style = style or sample_style(rng)
    scale = size / SIZE
    image = _backdrop(scene.background, style, size)
    for group, x, y, r in _layout(scene, rng, style.margin):
        x, y, r = x * scale, y * scale, r * scale
        left, top = int(x - 1.05 * r - 1), int(y - 1.05 * r - 1)
        box = image[max(top, 0) : int(y + 1.05 * r + 2), max(left, 0) : int(x + 1.05 * r + 2)]
        dx = np.arange(left, left + box.shape[1], dtype=np.float32)[None, :] + (0.5 - x)
        dy = np.arange(top, top + box.shape[0], dtype=np.float32)[:, None] + (0.5 - y)
        colour = np.array(COLOURS[group.colour], np.float32)
        colour = np.clip(
            (colour + style.hue * (np.roll(colour, 1) - np.roll(colour, -1))) * style.gain, 0, 1
        )
        if group.texture:
            period = 2 * scale + 0.55 * r
            along = (np.cos(style.stripe) * dx + np.sin(style.stripe) * dy) / period + style.phase
            white = np.clip(0.5 + period * (0.21 - np.abs(along % 1 - 0.5)), 0, 1)
            colour = colour + white[..., None] * (WHITE - colour)
        inside = np.clip(0.5 - _distance(group.kind, dx, dy, r), 0, 1)
        box += inside[..., None] * (colour - box)
    return image
