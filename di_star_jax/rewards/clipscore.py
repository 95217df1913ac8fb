# SPDX-License-Identifier: Apache-2.0
"""CLIPScore: the cosine of a CLIP as it came, printed times 100.

The number means little without the model's name.

OpenAI's ViT-B/32 is the likely one of the papers' tables. Source: transformers `CLIPModel`,
Pillow's bicubic resize.
"""

import functools

from di_star_jax.pipelines.folder import model_class
from di_star_jax.rewards import similarity
from di_star_jax.storage.open_clip import to_transformers

NEEDED = {
    "model.safetensors": "of a CLIPModel, such as openai/clip-vit-base-patch32 or "
    "openai/clip-vit-large-patch14 on the Hub"
}
_SIZES = {768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # by width


def model_name(config: dict) -> str:
    """Such as ViT-B/32; the width in place of the letter for others.

    Args: config, of a `CLIPModel`.
    """
    vision = model_class(config)[1].vision_config
    size = _SIZES[vision.hidden_size] if vision.hidden_size in _SIZES else str(vision.hidden_size)
    return f"ViT-{size}/{vision.patch_size}"


read_config, abstract = similarity.read_config, similarity.abstract
load = functools.partial(similarity.load, needed=NEEDED, arrange=to_transformers)
