# SPDX-License-Identifier: Apache-2.0
"""What a reward is: a score of images for prompts, differentiable to the pixels, and the facts of
it that training, evaluation and cost plans ask for.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from di_star_jax.pipelines.folder import Options

Score = Callable[[Any, jax.Array, Any], jax.Array]
Features = Callable[[Any, jax.Array], jax.Array]
Tokenize = Callable[[list[str]], Any]


class Reward(NamedTuple):
    """One reward, as `abstract` or `load` of its entry gives it.

    params: tree of arrays, or of `jax.ShapeDtypeStruct`.
    reward: (params, images [B, H, W, 3] in [-1, 1], prompts) -> [B] float32. Pure; has a gradient
      to the images.
    evaluate: the same for evaluation: of the images as 8-bit files, read as the published code
      reads them.
    tokenize: B texts -> prompts, a tree of NumPy arrays [B, ...]; None where only shapes are known.
    shapes: of prompts for one text, a tree like it of `jax.ShapeDtypeStruct` [1, ...].
    features: (params, images) -> [B, D] float32, the CLIP's embeddings of length 1 of the images as
      its processor reads them from 8-bit files; None for what is no CLIP.
    """

    params: Any
    reward: Score
    evaluate: Score
    tokenize: Tokenize | None
    shapes: Any
    features: Features | None = None


def no_prompts(texts: list[str]) -> np.ndarray:
    """[B] zeros, what a reward makes of B texts that knows nothing of the prompt."""
    return np.zeros(len(texts), np.int32)


NO_PROMPTS = jax.ShapeDtypeStruct((1,), np.int32)  # the shapes of `no_prompts`


def _no_tokenizer(folder: Path, tokenizer: str) -> Tokenize:
    """Of a reward that knows nothing of the prompt."""
    del folder, tokenizer
    return no_prompts


def _no_config(folder: Path) -> dict:
    """Of a reward without a model."""
    del folder
    return {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a reward before it is loaded: a value of `REWARDS`.

    title: of columns and axes.
    load: (folder of the weights, Options) -> Reward without its tokenize. Raises: UserError for
      what is missing or does not fit.
    tokenizer: (folder of the weights, folder or Hub name of CLIP's tokenizer) -> Reward.tokenize.
      Raises: UserError.
    abstract: (config, Options) -> Reward of shapes alone, for a dry run and for compiling without
      weights.
    read_config: folder of the weights -> config, what its model is. Raises: UserError.
    needed: {file in the folder of the weights: where it is from}.
    weights: folder or Hub name of the published weights; "" where there are none.
    published: what `read_config` gives for these.
    factor, digits: printed numbers are this times the reward, with so many digits.
    is_clip: whether there are `Reward.features`.
    uses_tokenizer: whether prompts are token ids of CLIP's tokenizer.
    groups: categories of prompts, as prompts/sets.py names them, for which its authors give means.
    model_name: config -> the model's name, where the title means little without it; or None.
    in_torch: whether cost/peer.py has it in PyTorch.
    file: of a user's own function, whose content stands for weights; "" for all others.
    """

    title: str
    load: Callable[[Path, Options], Reward]
    abstract: Callable[[dict, Options], Reward]
    tokenizer: Callable[[Path, str], Tokenize] = _no_tokenizer
    read_config: Callable[[Path], dict] = _no_config
    needed: dict[str, str] = dataclasses.field(default_factory=dict)
    weights: str = ""
    published: dict | None = None
    factor: float = 1.0
    digits: int = 4
    is_clip: bool = False
    uses_tokenizer: bool = False
    groups: tuple[str, ...] = ()
    model_name: Callable[[dict], str] | None = None
    in_torch: bool = False
    file: str = ""


def listed(needed: dict[str, str]) -> str:
    """The files that an entry needs, in words."""
    return "; ".join(f"{name} ({where})" for name, where in needed.items())


def without_weights(title: str, score: Score) -> Entry:
    """The entry of a reward that is a function of the images alone.

    Args: title; score, as `Reward.reward`, of params {} and prompts that are zeros [B].
    """
    reward = Reward({}, score, score, no_prompts, NO_PROMPTS)
    return Entry(
        title,
        load=lambda folder, options: reward,
        abstract=lambda config, options: reward,
    )
