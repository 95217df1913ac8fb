# SPDX-License-Identifier: Apache-2.0
"""Rewards by name.

A CLIP's cosine is a row below; what has code of its own is a file that ends in its `Entry`. README,
"A reward of your own", has one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.pipelines.folder import PLAIN, Options
from di_star_jax.rewards import aesthetic, custom, imagereward, similarity
from di_star_jax.rewards.pixels import (
    Pixels,
    tensor_pixels,
    tensor_pixels_aliased,
    tensor_pixels_rounded,
)
from di_star_jax.rewards.reward import Entry, Reward, Tokenize, listed
from di_star_jax.rewards.similarity import Similarity
from di_star_jax.storage import folders
from di_star_jax.storage.open_clip import to_transformers

# arXiv 2305.01569, trained on people's choices; the reward of Diff-Instruct*. The cosine itself,
# 0.22 or so: the published score is this times exp(logit_scale). Source: yuvalkirstain/PickScore.
_PICKSCORE = Similarity({"model.safetensors": "of yuvalkirstain/PickScore_v1 on the Hub"})

# arXiv 2306.09341, trained on people's rankings. Its files come without a config.json, and its code
# resizes a tensor. Which of two scales that gives depends on torchvision's version, which began to
# antialias tensors by itself: HPSv2's README has the scale without. Source: tgxs002/HPSv2
# `img_score.py`.
_HPS_NEEDED = {
    "model.safetensors": "HPS_v2_compressed.pt (2.0) or HPS_v2.1_compressed.pt (2.1) of "
    "xswu/HPSv2 on the Hub, converted once as README says"
}


def _hps(
    title: str,
    evaluation: Pixels,
    source: str,
) -> Entry:
    return similarity.entry(
        title,
        Similarity(
            _HPS_NEEDED, tensor_pixels, evaluation, to_transformers, config=published.CLIP_H14
        ),
        weights=source,
        published=published.CLIP_H14,
        factor=100.0,
        digits=2,
        groups=("style",),
    )


# A CLIP as it came; OpenAI's ViT-B/32 is the likely one of the papers' tables. Source: transformers
# `CLIPModel`, Pillow's bicubic resize.
_CLIPSCORE = Similarity(
    {
        "model.safetensors": "of a CLIPModel, such as openai/clip-vit-base-patch32 or "
        "openai/clip-vit-large-patch14 on the Hub"
    },
    arrange=to_transformers,
)


def _clipscore(source: str, config: dict) -> Entry:
    return similarity.entry(
        "CLIPScore",
        _CLIPSCORE,
        weights=source,
        published=config,
        factor=100.0,
        digits=2,
        model_name=similarity.model_name,
    )


REWARDS = {
    "pickscore": similarity.entry(
        "PickScore",
        _PICKSCORE,
        weights="yuvalkirstain/PickScore_v1",
        published=published.CLIP_H14,
        in_torch=True,
    ),
    "hpsv2": _hps("HPSv2.0", tensor_pixels_rounded, "./weights/hpsv2.0"),
    "hpsv21": _hps("HPSv2.1", tensor_pixels_rounded, "./weights/hpsv2.1"),
    "hpsv21_legacy": _hps("HPSv2.1, not antialiased", tensor_pixels_aliased, "./weights/hpsv2.1"),
    "clipscore": _clipscore("openai/clip-vit-base-patch32", published.CLIP_B32),
    "clipscore_l14": _clipscore("openai/clip-vit-large-patch14", published.CLIP_L14),
    "aesthetic": aesthetic.ENTRY,
    "imagereward": imagereward.ENTRY,
}


def add(spec: str, pixels: int = 512) -> str:
    """Adds the function of a user's own file to REWARDS. Returns: its name there.

    Args: as of `custom.entry`. Raises: UserError.
    """
    name = custom.name_of(spec)
    if name in REWARDS and not REWARDS[name].file:
        raise UserError(f"reward {spec}: there is a reward {name} already; rename the function")
    REWARDS[name] = custom.entry(spec, pixels)
    return name


def scales_of(section: Mapping[str, Any]) -> dict[str, float]:
    """Scale of each reward, the user's own by its function's name. Args: config.reward."""
    own = {"custom", "custom_scale", "balance"}
    scales = {name: scale for name, scale in section.items() if name not in own}
    if section["custom"]:
        scales[custom.name_of(section["custom"])] = section["custom_scale"]
    return scales


def rewards_used(scales: Mapping[str, float], measured: Sequence[str]) -> list[str]:
    """Names of the rewards that a run loads.

    Args: scales, by name, 0 is off; measured, names of those that are loaded even so.
    """
    return [name for name, scale in scales.items() if scale or name in measured]


def load_rewards(
    sources: dict[str, str],
    tokenizer: str,
    options: Options = PLAIN,
) -> dict[str, Reward]:
    """Rewards by name.

    Args:
      sources: folder or Hub name of the weights by reward; "" for one without.
      tokenizer: folder or Hub name of CLIP's tokenizer.
      options: of all their networks.
    Raises: UserError for weights or tokenizers that are missing or do not fit.
    """
    tokenizers = load_tokenizers(sources, tokenizer)
    found = {
        name: REWARDS[name].load(resolve(name, source), options) for name, source in sources.items()
    }
    return {name: reward._replace(tokenize=tokenizers[name]) for name, reward in found.items()}


def load_tokenizers(sources: dict[str, str], tokenizer: str) -> dict[str, Tokenize]:
    """What rewards make of prompts, by name. Args, raises: as of `load_rewards`."""
    return {
        name: REWARDS[name].tokenizer(resolve(name, source), tokenizer)
        for name, source in sources.items()
    }


def resolve(name: str, source: str) -> Path:
    """The folder with a reward's weights.

    Raises: UserError that says what it must hold and where that is from.
    """
    if not source:
        return Path()
    if not Path(source).exists() and source.startswith((".", "/", "~")):
        raise UserError(
            f"no folder {source} for {name}; it must hold {listed(REWARDS[name].needed)}"
        )
    return folders.resolve(source)
