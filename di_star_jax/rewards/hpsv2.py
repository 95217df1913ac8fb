# SPDX-License-Identifier: Apache-2.0
"""HPSv2.0 and 2.1 (arXiv 2306.09341):

CLIP ViT-H/14 trained on people's rankings; the cosine, printed times 100.

The published code resizes a tensor. Which of two scales it then gives depends on torchvision's
version, which began to antialias tensors by itself: ours antialiases; hpsv2_legacy.py does not.
Source: tgxs002/HPSv2 `img_score.py`.
"""

from pathlib import Path

from di_star_jax.models.published import CLIP_H14
from di_star_jax.pipelines.folder import PLAIN, Options, abstract_model, load_model
from di_star_jax.prompts.files import Tokenizer
from di_star_jax.rewards.pixels import Pixels, tensor_pixels, tensor_pixels_rounded
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.similarity import check_weights, reward_of
from di_star_jax.rewards.similarity import read_config as read_clip_config
from di_star_jax.storage import folders
from di_star_jax.storage.open_clip import to_transformers

NEEDED = {
    "model.safetensors": "HPS_v2_compressed.pt (2.0) or HPS_v2.1_compressed.pt (2.1) of xswu/HPSv2 on the Hub, "
    "converted once as README says"
}


def read_config(folder: Path) -> dict:
    """Of a `CLIPModel`: the folder's, or ViT-H/14 where it has none, as the published file comes
    without.
    """
    return read_clip_config(folder) if (folder / "config.json").is_file() else CLIP_H14


def abstract(
    config: dict, options: Options = PLAIN, *, evaluation: Pixels = tensor_pixels_rounded
) -> Reward:
    """Shapes alone. Args: config, of a `CLIPModel`; evaluation, as of `load`."""
    return reward_of(
        abstract_model(config, options),
        None,
        training=tensor_pixels,
        evaluation=evaluation,
    )


def load(
    folder: Path,
    options: Options = PLAIN,
    *,
    tokenizer: str | Path,
    evaluation: Pixels = tensor_pixels_rounded,
) -> Reward:
    """From a folder with the published file converted to model.safetensors.

    Args: tokenizer, a folder or Hub name; evaluation, from images to pixels.
    Raises: UserError for a folder without weights, or of another model.
    """
    check_weights(folder, NEEDED)
    model = load_model(folder, options, config=read_config(folder), arrange=to_transformers)
    return reward_of(
        model,
        Tokenizer(folders.resolve_tokenizer(tokenizer)),
        training=tensor_pixels,
        evaluation=evaluation,
    )
