# SPDX-License-Identifier: Apache-2.0
"""Numbers of images: colour, attributes that show, and how much the images of a prompt differ.

NumPy in float64; NaN for an image that is broken.
"""

import numpy as np

from di_star_jax.shapes import oracle, scenes, taste


def _unit(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1], clipped as a saved picture is, and which of them are readable [B]."""
    readable = np.isfinite(images).all(axis=(1, 2, 3))
    images = np.where(readable[:, None, None, None], images, 0.0)
    return (np.clip(images.astype(np.float64), -1.0, 1.0) + 1.0) / 2.0, readable


def saturation(images: np.ndarray) -> np.ndarray:
    """Mean over pixels of HSV's saturation (max - min) / max of R, G, B; 0 for black.

    It is 0 for gray, 1 for red.

    Args: images float [B, H, W, 3] in [-1, 1], sRGB as it is.
    Returns: float64 [B] in [0, 1], NaN for a broken image.
    Source: Smith 1978, the hexcone model.
    """
    rgb, readable = _unit(images)
    top = rgb.max(axis=-1)
    spread = top - rgb.min(axis=-1)
    saturation = np.divide(spread, top, out=np.zeros_like(top), where=top > 0)  # [B, H, W]
    return np.where(readable, saturation.mean(axis=(1, 2)), np.nan)


def contrast(images: np.ndarray) -> np.ndarray:
    """RMS contrast: standard deviation over pixels of luma in [0, 1].

    Luma is Rec. 709's 0.2126 R + 0.7152 G + 0.0722 B.

    Args: images float [B, H, W, 3] in [-1, 1], sRGB as it is.
    Returns: float64 [B] in [0, 0.5], NaN for a broken image.
    Source: Peli 1990, the RMS definition; ITU-R BT.709, item 3.2.
    """
    rgb, readable = _unit(images)
    luma = rgb @ np.array([0.2126, 0.7152, 0.0722])  # [B, H, W]
    return np.where(readable, luma.std(axis=(1, 2)), np.nan)


def attributes_right(prompts: list[str], images: np.ndarray) -> np.ndarray:
    """Share of a prompt's attributes that the oracle of the shapes world reads back, [B].

    Args: prompts, B captions of that world; images uint8 [B, 64, 64, 3], as their files hold them.
    Raises: UserError for a prompt that is no such caption.
    """
    shares = []
    for prompt, image in zip(prompts, images, strict=True):
        right, total = oracle.attributes(scenes.parse(prompt), image / 255.0)
        shares.append(right / total)
    return np.array(shares)


def liked(images: np.ndarray) -> np.ndarray:
    """How much the taste of the shapes world likes each image: its warm light from above, [B].

    In standard deviations of that world's random scenes, whose mean is about 0; captions say
    nothing of it, and the reward knows it from preference pairs alone.

    Args: images uint8 [B, 64, 64, 3].
    """
    return np.array([taste.taste(image / 255.0) for image in images])


def diversity(features: np.ndarray) -> float:
    """Mean over pairs of 1 - cosine, between the images of one prompt: 0 where all are alike.

    Args: features [K, D] of K samples, of any length; a row with a NaN, or of zeros, is left out.
    Returns: NaN for fewer than two readable rows. derived: the sum over pairs is
      (|sum of u|^2 - K) / 2.
    """
    features = np.asarray(features, np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    readable = np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)
    u = features[readable] / norms[readable]
    if len(u) < 2:
        return np.nan
    return float(1.0 - ((u.sum(axis=0) ** 2).sum() - len(u)) / (len(u) * (len(u) - 1)))
