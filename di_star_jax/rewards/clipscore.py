# SPDX-License-Identifier: Apache-2.0
"""CLIPScore: the cosine of a CLIP as it came, printed times 100. The number means little without the model's name.

OpenAI's ViT-B/32 is the likely one of the papers' tables. Source: transformers `CLIPModel`, Pillow's bicubic resize.
"""

from pathlib import Path

from di_star_jax import pipeline, weights
from di_star_jax.prompts import Tokenizer
from di_star_jax.rewards.open_clip import to_transformers
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.similarity import check_weights, read_config, reward_of

NEEDED = {"model.safetensors": "of a CLIPModel, such as openai/clip-vit-base-patch32 or "
                               "openai/clip-vit-large-patch14 on the Hub"}
_SIZES = {768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # by width


def model_name(config: dict) -> str:
    """Such as ViT-B/32; the width in place of the letter for others. Args: config, of a `CLIPModel`."""
    vision = pipeline.model_class(config)[1].vision_config
    size = _SIZES[vision.hidden_size] if vision.hidden_size in _SIZES else str(vision.hidden_size)
    return f"ViT-{size}/{vision.patch_size}"


def abstract(config: dict, **options) -> Reward:
    """Shapes alone. Args: config, of a `CLIPModel`; options, of `pipeline.abstract_model`."""
    return reward_of(pipeline.abstract_model(config, **options), None)


def load(folder: Path, *, tokenizer: str | Path, **options) -> Reward:
    """From a folder with a `CLIPModel`'s config.json and safetensors in transformers' or open_clip's names.

    Args: folder; tokenizer, a folder or Hub name; options, of `pipeline.load_model`.
    Raises: UserError for a folder without weights, or of another model.
    """
    config = read_config(folder)
    check_weights(folder, NEEDED)
    model = pipeline.load_model(folder, config=config, arrange=to_transformers, **options)
    return reward_of(model, Tokenizer(weights.resolve_tokenizer(tokenizer)))
