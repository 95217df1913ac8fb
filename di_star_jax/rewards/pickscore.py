# SPDX-License-Identifier: Apache-2.0
"""PickScore v1 (arXiv 2305.01569): CLIP ViT-H/14 trained on people's choices; the reward of Diff-Instruct*.

The cosine itself, 0.22 or so: the published score is this times exp(logit_scale). Source: yuvalkirstain/PickScore.
"""

from pathlib import Path

from di_star_jax import pipeline, weights
from di_star_jax.prompts import Tokenizer
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.similarity import check_weights, read_config, reward_of

NEEDED = {"model.safetensors": "of yuvalkirstain/PickScore_v1 on the Hub"}


def abstract(config: dict, **options) -> Reward:
    """Shapes alone. Args: config, of a `CLIPModel`; options, of `pipeline.abstract_model`."""
    return reward_of(pipeline.abstract_model(config, **options), None)


def load(folder: Path, *, tokenizer: str | Path, **options) -> Reward:
    """From a transformers `CLIPModel` folder.

    Args: folder; tokenizer, a folder or Hub name; options, of `pipeline.load_model`.
    Raises: UserError for a folder without weights, or of another model.
    """
    config = read_config(folder)
    check_weights(folder, NEEDED)
    model = pipeline.load_model(folder, config=config, **options)
    return reward_of(model, Tokenizer(weights.resolve_tokenizer(tokenizer)))
