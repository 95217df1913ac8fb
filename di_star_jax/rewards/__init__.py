# SPDX-License-Identifier: Apache-2.0
"""Rewards, one file each.

A file of your own needs one line in REWARDS; README, "A reward of your own", has one.

A reward's file has three functions, and where there are weights NEEDED, {file in their folder:
  where it is from}: read_config(folder) -> dict: what its model is, of the weights' folder. Raises:
  UserError. abstract(config, options) -> Reward: shapes alone, for a dry run and for compiling
  without weights. load(folder, options, *, tokenizer) -> Reward: from the weights' folder;
  tokenizer is CLIP's, a folder or Hub name.
options: how its networks run and are held, `pipelines.folder.Options`.
"""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.pipelines.folder import PLAIN, Options
from di_star_jax.rewards import aesthetic, clipscore, hpsv2, hpsv2_legacy, imagereward, pickscore
from di_star_jax.rewards.reward import Reward, listed
from di_star_jax.storage import folders


class Entry(NamedTuple):
    """A line of REWARDS.

    file: the reward's module.
    label: of columns and axes.
    weights: folder or Hub name of the published weights; "" where there are none.
    published: what `read_config` gives for these.
    factor, digits: printed numbers are this times the reward, with so many digits.
    """

    file: ModuleType
    label: str
    weights: str = ""
    published: dict | None = None
    factor: float = 1.0
    digits: int = 4


REWARDS = {
    "pickscore": Entry(pickscore, "PickScore", "yuvalkirstain/PickScore_v1", published.CLIP_H14),
    "hpsv2": Entry(
        hpsv2, "HPSv2.0", "./weights/hpsv2.0", published.CLIP_H14, factor=100.0, digits=2
    ),
    "hpsv21": Entry(
        hpsv2, "HPSv2.1", "./weights/hpsv2.1", published.CLIP_H14, factor=100.0, digits=2
    ),
    "hpsv21_legacy": Entry(
        hpsv2_legacy,
        "HPSv2.1, not antialiased",
        "./weights/hpsv2.1",
        published.CLIP_H14,
        factor=100.0,
        digits=2,
    ),
    "clipscore": Entry(
        clipscore,
        "CLIPScore",
        "openai/clip-vit-base-patch32",
        published.CLIP_B32,
        factor=100.0,
        digits=2,
    ),
    "clipscore_l14": Entry(
        clipscore,
        "CLIPScore",
        "openai/clip-vit-large-patch14",
        published.CLIP_L14,
        factor=100.0,
        digits=2,
    ),
    "aesthetic": Entry(aesthetic, "Aesthetic", "./weights/aesthetic", published.CLIP_L14, digits=2),
    "imagereward": Entry(
        imagereward, "ImageReward", "./weights/imagereward", imagereward.PUBLISHED, digits=3
    ),
}


def sources_of(config) -> dict[str, str]:
    """Folder or Hub name of the weights of each reward that a run uses.

    Args: config, as configs/sdxl.py.
    """
    return {
        name: config.weights[name] if name in config.weights else REWARDS[name].weights
        for name in rewards_used(config)
    }


def load_rewards(
    sources: dict[str, str], tokenizer: str, options: Options = PLAIN
) -> dict[str, Reward]:
    """Rewards by name.

    Args:
      sources: folder or Hub name of the weights by reward; "" for one without.
      tokenizer: folder or Hub name of CLIP's tokenizer.
      options: of all their networks.
    Raises: UserError for weights or tokenizers that are missing or do not fit.
    """
    return {
        name: REWARDS[name].file.load(resolve(name, source), options, tokenizer=tokenizer)
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
            f"no folder {source} for {name}; it must hold {listed(REWARDS[name].file.NEEDED)}"
        )
    return folders.resolve(source)


def rewards_used(config) -> list[str]:
    """Names of the rewards that a run loads: those it trains on, and those it only measures."""
    return [name for name, scale in config.reward.items() if scale or name in config.eval.metrics]
