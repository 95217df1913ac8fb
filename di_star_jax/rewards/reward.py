# SPDX-License-Identifier: Apache-2.0
"""What a reward is: parameters, what it makes of prompts, and a score of images, differentiable to
the pixels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Score = Callable[[Any, jax.Array, Any], jax.Array]
Tokenize = Callable[[list[str]], Any]


class Reward(NamedTuple):
    """One reward, as `abstract` or `load` of its file gives it.

    params: tree of arrays, or of `jax.ShapeDtypeStruct`.
    reward: (params, images [B, H, W, 3] in [-1, 1], prompts) -> [B] float32. Pure; has a gradient
      to the images.
    evaluate: the same for evaluation: of the images as 8-bit files, read as the published code
      reads them.
    tokenize: B texts -> prompts, a tree of NumPy arrays [B, ...]; None where only shapes are known.
    shapes: of prompts for one text, a tree like it of `jax.ShapeDtypeStruct` [1, ...].
    """

    params: Any
    reward: Score
    evaluate: Score
    tokenize: Tokenize | None
    shapes: Any
    features: Callable | None = None


def listed(needed: dict[str, str]) -> str:
    """The NEEDED of a reward's file, in words."""
    return "; ".join(f"{name} ({where})" for name, where in needed.items())
