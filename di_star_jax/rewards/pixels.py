# SPDX-License-Identifier: Apache-2.0
"""An image to what a CLIP or BLIP sees of it, differentiable.

The resize is Pillow's bicubic as two small fixed matrices. Training keeps the values unrounded;
evaluation rounds where Pillow's 8-bit images do and so reproduces the scores of the published
processor.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Pixels(Protocol):
    """`clip_pixels` or one of its siblings below."""

    def __call__(self, image: jax.Array, *, size: int) -> jax.Array: ...


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic, zero beyond 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Weights of an antialiased bicubic resize along one axis.

    Args:
      n_in: pixels before.
      n_out: pixels after.
    Returns:
      float32 [n_out, n_in], rows sum to 1; the identity for n_in = n_out.
    Source: Pillow `ImagingResample`, BICUBIC.
    """
    ratio = n_in / n_out
    stretch = max(ratio, 1.0)  # antialiasing: when shrinking, the filter covers more input pixels
    centre = (np.arange(n_out)[:, None] + 0.5) * ratio
    # Pillow cuts the filter at whole pixels.
    first = np.maximum(np.floor(centre - 2 * stretch + 0.5), 0)
    last = np.minimum(np.floor(centre + 2 * stretch + 0.5), n_in)
    pixel = np.arange(n_in)[None, :]
    weight = _cubic((pixel + 0.5 - centre) / stretch, a=-0.5)
    weight = weight * ((pixel >= first) & (pixel < last))
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def aliased_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Weights of a bicubic resize along one axis that looks at four pixels however much it shrinks.

    Args and returns: as `resize_matrix`. Source: PyTorch `interpolate(mode="bicubic",
      antialias=False)`, a = -0.75.
    """
    centre = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((n_out, n_in))
    for tap in range(4):
        weight = _cubic(centre - (first + tap), a=-0.75)
        pixel = np.clip(first + tap, 0, n_in - 1)
        np.add.at(matrix, (np.arange(n_out), pixel), weight)
    return matrix.astype(np.float32)


def _half(rows: int) -> int:
    """What transformers' centre crop cuts off first of an excess."""
    return rows // 2


def _half_even(rows: int) -> int:
    """What torchvision's cuts off first: a half goes to the even neighbour."""
    return round(rows / 2)


def _unit_range(x: jax.Array) -> jax.Array:
    """Clips to [0, 1] as 8-bit images do; a saturated value gets no gradient."""
    return jnp.clip(x, 0.0, 1.0)


def _eight_bit(x: jax.Array) -> jax.Array:
    """Clips to [0, 1] and rounds to multiples of 1/255, halves up."""
    return jnp.floor(_unit_range(x) * 255 + 0.5) / 255


def _as_is(x: jax.Array) -> jax.Array:
    """A tensor's resize, unlike an image's, leaves what the filter makes of it."""
    return x


Matrix = Callable[[int, int], np.ndarray]


def _resize_and_crop(
    n: int,
    shortest: int,
    size: int,
    matrix: Matrix,
    cut: Callable[[int], int],
) -> np.ndarray:
    """[size, n] for an axis of n pixels: the shortest gets `size` pixels, and the centre stays."""
    resized = int(size * n / shortest)  # rounded as transformers and torchvision do
    first = cut(resized - size)
    return matrix(n, resized)[first : first + size]


def _clip_pixels(
    image: jax.Array,
    size: int,
    settle: Callable[[jax.Array], jax.Array],
    *,
    between: Callable[[jax.Array], jax.Array] | None = None,
    matrix: Matrix = resize_matrix,
    cut: Callable[[int], int] = _half,
) -> jax.Array:
    """Resizes width, then height, and crops; normalises.

    Args: settle, of values before; between, after each pass, `settle` if None.
    """
    h, w = image.shape[1:3]
    shortest = min(h, w)
    across = _resize_and_crop(w, shortest, size, matrix, cut)  # [S, W]
    down = _resize_and_crop(h, shortest, size, matrix, cut)  # [S, H]
    between = between or settle
    # A TPU would multiply in bfloat16, two digits short of an 8-bit image.
    exact = jax.lax.Precision.HIGHEST
    x = settle((image.astype(jnp.float32) + 1) / 2)
    x = between(jnp.einsum("vw,bhwc->bhvc", across, x, precision=exact))  # [B, H, S, 3]
    x = between(jnp.einsum("uh,bhvc->buvc", down, x, precision=exact))  # [B, S, S, 3]
    return (x - CLIP_MEAN[None, None, None]) / CLIP_STD[None, None, None]


def clip_pixels(image: jax.Array, *, size: int) -> jax.Array:
    """What the CLIP image processor makes of an image, without rounding: for training.

    Args:
      image: [B, H, W, 3] in [-1, 1], any float dtype; values outside are clipped.
      size: S, the reward model's image size.
    Returns:
      float32 [B, S, S, 3], CLIP-normalised: shortest side resized to S, centre kept. Saturated
      values, before or after a pass, get no gradient.
    Source: transformers `CLIPImageProcessor`; differs from it by what rounding to 8 bits does.
    """
    return _clip_pixels(image, size, _unit_range)


def clip_pixels_rounded(image: jax.Array, *, size: int) -> jax.Array:
    """What the CLIP image processor makes of an image, rounded where Pillow rounds: for evaluation,
    no gradient.

    Args:
      image: [B, H, W, 3] in [-1, 1], any float dtype; values outside are clipped.
      size: S, the reward model's image size.
    Returns:
      float32 [B, S, S, 3], CLIP-normalised: shortest side resized to S, centre kept.
    Source: transformers `CLIPImageProcessor` on the image saved with 8 bits.
    """
    return _clip_pixels(image, size, _eight_bit)


def torchvision_pixels(image: jax.Array, *, size: int) -> jax.Array:
    """As `clip_pixels`, cropped as torchvision does: a pixel elsewhere on some images that are not
    square.

    Source: torchvision `Resize(size, BICUBIC)` of a Pillow image, `CenterCrop`, `Normalize`.
    """
    return _clip_pixels(image, size, _unit_range, cut=_half_even)


def torchvision_pixels_rounded(image: jax.Array, *, size: int) -> jax.Array:
    """`torchvision_pixels` rounded where Pillow rounds, for evaluation."""
    return _clip_pixels(image, size, _eight_bit, cut=_half_even)


def tensor_pixels(image: jax.Array, *, size: int) -> jax.Array:
    """As `clip_pixels`, resized as a tensor: what overshoots stays. For training with HPSv2.

    Source: torchvision `Resize(size, BICUBIC, antialias=True)` of a float tensor, `CenterCrop`,
      `Normalize`.
    """
    return _clip_pixels(image, size, _unit_range, between=_as_is, cut=_half_even)


def tensor_pixels_rounded(image: jax.Array, *, size: int) -> jax.Array:
    """`tensor_pixels` of the image as an 8-bit file, for evaluation."""
    return _clip_pixels(image, size, _eight_bit, between=_as_is, cut=_half_even)


def tensor_pixels_aliased(image: jax.Array, *, size: int) -> jax.Array:
    """`tensor_pixels_rounded` without antialiasing, as old torchvision resized tensors:

    HPSv2's older scale.
    """
    return _clip_pixels(
        image, size, _eight_bit, between=_as_is, matrix=aliased_matrix, cut=_half_even
    )
