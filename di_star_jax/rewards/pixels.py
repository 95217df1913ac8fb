# SPDX-License-Identifier: Apache-2.0
"""Latents to what the reward sees of them; image to CLIP pixels to PickScore; all differentiable.

The resize is Pillow's bicubic as two small fixed matrices. Training keeps the values unrounded; evaluation rounds where
Pillow's 8-bit images do and so reproduces the scores of the published processor.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5, zero beyond 2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
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
    weight = _bicubic((pixel + 0.5 - centre) / stretch) * ((pixel >= first) & (pixel < last))
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def _resize_and_crop(n: int, shortest: int, size: int) -> np.ndarray:
    """[size, n]: brings the shortest side to `size` pixels and keeps the centre `size` of this one."""
    resized = int(size * n / shortest)  # rounds as transformers does
    start = (resized - size) // 2
    return resize_matrix(n, resized)[start:start + size]


def _unit_range(x: jax.Array) -> jax.Array:
    """Clips to [0, 1] as 8-bit images do; a saturated value gets no gradient."""
    return jnp.clip(x, 0.0, 1.0)


def _eight_bit(x: jax.Array) -> jax.Array:
    """Clips to [0, 1] and rounds to multiples of 1/255, halves up."""
    return jnp.floor(_unit_range(x) * 255 + 0.5) / 255


def _clip_pixels(image: jax.Array, size: int, settle: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Resizes width, then height, with `settle` before, between and after; crops; normalises."""
    h, w = image.shape[1:3]
    across, down = (_resize_and_crop(n, min(h, w), size) for n in (w, h))
    exact = jax.lax.Precision.HIGHEST  # a TPU would multiply in bfloat16, two digits short of an 8-bit image
    x = settle((image.astype(jnp.float32) + 1) / 2)
    x = settle(jnp.einsum("vw,bhwc->bhvc", across, x, precision=exact))  # [B, H, S, 3]
    x = settle(jnp.einsum("uh,bhvc->buvc", down, x, precision=exact))  # [B, S, S, 3]
    return (x - CLIP_MEAN[None, None, None]) / CLIP_STD[None, None, None]


def clip_pixels(image: jax.Array, *, size: int) -> jax.Array:
    """What the CLIP image processor makes of an image, without rounding: for training.

    Args:
      image: [B, H, W, 3] in [-1, 1], any float dtype; values outside are clipped.
      size: S, the reward model's image size.
    Returns:
      float32 [B, S, S, 3], CLIP-normalised: shortest side resized to S, centre kept. Saturated values, before or after
      a pass, get no gradient.
    Source: transformers `CLIPImageProcessor`; differs from it by what rounding to 8 bits does.
    """
    return _clip_pixels(image, size, _unit_range)


def clip_pixels_rounded(image: jax.Array, *, size: int) -> jax.Array:
    """What the CLIP image processor makes of an image, rounded where Pillow rounds: for evaluation, no gradient.

    Args:
      image: [B, H, W, 3] in [-1, 1], any float dtype; values outside are clipped.
      size: S, the reward model's image size.
    Returns:
      float32 [B, S, S, 3], CLIP-normalised: shortest side resized to S, centre kept.
    Source: transformers `CLIPImageProcessor` on the image saved with 8 bits.
    """
    return _clip_pixels(image, size, _eight_bit)


def _normalise(features: jax.Array) -> jax.Array:
    """[B, P] -> [B, P] of length 1, float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def text_embeddings(graphdef: nnx.GraphDef, params: dict, token_ids: jax.Array) -> jax.Array:
    """The prompts' half of the score; it needs no gradient and can be kept.

    Args:
      graphdef, params: a `CLIPModel`, as `models.init` or `models.abstract` give it.
      token_ids: int32 [B, L], padded to the model's max_position_embeddings.
    Returns:
      float32 [B, P], of length 1.
    """
    return _normalise(nnx.merge(graphdef, params).text_features(token_ids))


def image_embeddings(graphdef: nnx.GraphDef, params: dict, image: jax.Array) -> jax.Array:
    """The pictures' half of the score. Args: image [B, H, W, 3] in [-1, 1]. Returns: float32 [B, P], of length 1."""
    model = nnx.merge(graphdef, params)
    return _normalise(model.image_features(clip_pixels(image, size=model.config.vision_config.image_size)))


def _cosine(model: nnx.Module, pixels: jax.Array, text: jax.Array) -> jax.Array:
    return jnp.sum(_normalise(model.image_features(pixels)) * text, axis=-1)  # [B]


def pickscore(graphdef: nnx.GraphDef, params: dict, image: jax.Array, text: jax.Array) -> jax.Array:
    """The reward in training: cosine between image and prompt, without the logit scale.

    Args:
      graphdef, params: a `CLIPModel`, as `models.init` or `models.abstract` give it.
      image: [B, H, W, 3] in [-1, 1].
      text: float32 [B, P] from `text_embeddings`.
    Returns:
      float32 [B] in [-1, 1]; differentiable with respect to the image, but for saturated pixels.
    Source: yuvalkirstain/PickScore; its printed score is this times exp(logit_scale).
    """
    model = nnx.merge(graphdef, params)
    return _cosine(model, clip_pixels(image, size=model.config.vision_config.image_size), text)


def pickscore_rounded(graphdef: nnx.GraphDef, params: dict, image: jax.Array, text: jax.Array) -> jax.Array:
    """The reward in evaluation: `pickscore` of the image as an 8-bit file read by the published processor."""
    model = nnx.merge(graphdef, params)
    return _cosine(model, clip_pixels_rounded(image, size=model.config.vision_config.image_size), text)


def full_view(latents: jax.Array, crop: jax.Array, size: int) -> jax.Array:
    """All of the latents."""
    del crop, size
    return latents


def resized_view(latents: jax.Array, crop: jax.Array, size: int) -> jax.Array:
    """[B, h, w, C] -> [B, size, size, C], linear with antialiasing: a smaller picture of the whole."""
    del crop
    b, _, _, c = latents.shape
    return jax.image.resize(latents, (b, size, size, c), "linear")


def cropped_view(latents: jax.Array, crop: jax.Array, size: int) -> jax.Array:
    """[B, h, w, C] -> [B, size, size, C]: a window of each at its crop [B, 2] in [0, 1) of the places there are."""
    room = jnp.array(latents.shape[1:3]) - size + 1
    corner = (crop * room[None]).astype(jnp.int32)
    window = lambda x, yx: jax.lax.dynamic_slice(x, (yx[0], yx[1], 0), (size, size, x.shape[-1]))
    return jax.vmap(window)(latents, corner)


VIEWS = {"full": full_view, "resized": resized_view, "crop": cropped_view}


def in_slices(score: Callable[..., jax.Array], size: int) -> Callable[..., jax.Array]:
    """`score`(x0 [B, ...], *others) -> [B], computed with its gradient for `size` images after the other.

    A decoder's activations are then those of `size` images. Only x0 gets a gradient. 0 takes all images at once.
    """
    def slices(run, x0, others):
        split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (x0, others))
        return jax.lax.map(lambda part: run(part[0], *part[1]), split)

    def with_gradient(x0, *others):
        value, pull_back = jax.vjp(lambda x0: score(x0, *others), x0)
        return value, pull_back(jnp.ones_like(value))[0]

    @jax.custom_vjp
    def sliced(x0, *others):
        return slices(score, x0, others).reshape(-1)

    def forward(x0, *others):
        # The gradient is found with the value, slice by slice: later, every slice would have to be decoded again.
        value, grad = slices(with_gradient, x0, others)
        return value.reshape(-1), (grad.reshape(x0.shape), others)

    def backward(kept, g):
        grad, others = kept
        return g.reshape(-1, *(1,) * (grad.ndim - 1)) * grad, *jax.tree.map(jnp.zeros_like, others)

    sliced.defvjp(forward, backward)
    return lambda x0, *others: (score if size in (0, x0.shape[0]) else sliced)(x0, *others)
