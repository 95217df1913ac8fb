# SPDX-License-Identifier: Apache-2.0
"""Rewards, one file each. A file of your own needs one line in REWARDS; README, "A reward of your own", has one.

A reward's file has three functions:
  read_config(folder) -> dict: what its model is, of the weights' folder. Raises: UserError.
  abstract(config, **options) -> Reward: shapes alone, for a dry run and for compiling without weights.
  load(folder, *, tokenizer, **options) -> Reward: from the weights' folder; tokenizer is CLIP's folder.
options: dtype, remat, kernel, of `pipeline.abstract_model`; with load also shardings and param_dtype, see
`pipeline.load_model`.
"""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from di_star_jax import weights
from di_star_jax.config import UserError, rewards_used
from di_star_jax.models import published
from di_star_jax.rewards import aesthetic, clipscore, hpsv2, hpsv2_legacy, imagereward, pickscore
from di_star_jax.rewards.reward import Reward


class Entry(NamedTuple):
    """A line of REWARDS.

    file: the reward's module.
    label: of columns and axes.
    weights: folder or Hub name of the published weights; "" where there are none.
    published: what `read_config` gives for these.
    needs: what the folder must hold and where that is from, for the error that asks for it.
    factor, digits: printed numbers are this times the reward, with so many digits.
    """
    file: ModuleType
    label: str
    weights: str = ""
    published: dict | None = None
    needs: str = ""
    factor: float = 1.0
    digits: int = 4


_HPS = "model.safetensors converted once from {} of xswu/HPSv2 on the Hub"
REWARDS = {
    "pickscore": Entry(pickscore, "PickScore", "yuvalkirstain/PickScore_v1", published.PICKSCORE,
                       "yuvalkirstain/PickScore_v1 of the Hub"),
    "hpsv2": Entry(hpsv2, "HPSv2.0", "./weights/hpsv2.0", published.PICKSCORE, _HPS.format("HPS_v2_compressed.pt"), 100.0, 2),
    "hpsv21": Entry(hpsv2, "HPSv2.1", "./weights/hpsv2.1", published.PICKSCORE, _HPS.format("HPS_v2.1_compressed.pt"),
                    100.0, 2),
    "hpsv21_legacy": Entry(hpsv2_legacy, "HPSv2.1, not antialiased", "./weights/hpsv2.1", published.PICKSCORE,
                           _HPS.format("HPS_v2.1_compressed.pt"), 100.0, 2),
    "clipscore": Entry(clipscore, "CLIPScore", "openai/clip-vit-base-patch32", published.CLIP_B32,
                       "a CLIPModel with safetensors, such as openai/clip-vit-base-patch32 of the Hub", 100.0, 2),
    "clipscore_l14": Entry(clipscore, "CLIPScore", "openai/clip-vit-large-patch14", published.CLIP_L14,
                           "openai/clip-vit-large-patch14 of the Hub", 100.0, 2),
    "aesthetic": Entry(aesthetic, "Aesthetic", "./weights/aesthetic", published.CLIP_L14,
                       f"openai/clip-vit-large-patch14 of the Hub, and {aesthetic.HEAD} converted once from the .pth of "
                       "christophschuhmann/improved-aesthetic-predictor on GitHub", digits=3),
    "imagereward": Entry(imagereward, "ImageReward", "./weights/imagereward", imagereward.PUBLISHED,
                         "model.safetensors converted once from ImageReward.pt of THUDM/ImageReward on the Hub, its "
                         "med_config.json, and vocab.txt of google-bert/bert-base-uncased", digits=3),
}


def sources_of(config) -> dict[str, str]:
    """Folder or Hub name of the weights of each reward that a run uses. Args: config, as configs/sdxl.py."""
    return {name: config.weights[name] if name in config.weights else REWARDS[name].weights
            for name in rewards_used(config)}


def load_rewards(sources: dict[str, str], tokenizer: str, **options) -> dict[str, Reward]:
    """Rewards by name.

    Args:
      sources: folder or Hub name of the weights by reward; "" for one without.
      tokenizer: folder or Hub name of CLIP's tokenizer.
      options: of `load` in the rewards' files.
    Raises: UserError for weights or tokenizers that are missing or do not fit.
    """
    folder = weights.resolve_tokenizer(tokenizer) if sources else None
    return {name: REWARDS[name].file.load(resolve(name, source), tokenizer=folder, **options)
            for name, source in sources.items()}


def resolve(name: str, source: str) -> Path:
    """The folder with a reward's weights. Raises: UserError that says what it must hold and where that is from."""
    if not source:
        return Path()
    if not Path(source).exists() and source.startswith((".", "/", "~")):
        raise UserError(f"no folder {source} for {name}; it must hold {REWARDS[name].needs}")
    return weights.resolve(source)
