# SPDX-License-Identifier: Apache-2.0
"""An SD 1.5 and a PixArt-alpha of about the shapes world's size, as config.json files alone.

For the benchmark's rows in docs/performance.md: `python tests/small_pipelines.py FOLDER`.
"""

import sys
from pathlib import Path

from di_star_jax.models import published
from di_star_jax.shapes import networks
from di_star_jax.shapes.worlds import WORLDS
from di_star_jax.storage import folders

VOCAB = 64
TEXT = WORLDS["sdxl"].text_configs(VOCAB)["text_encoder"]
UNET = {
    **published.UNET_SD15,
    "sample_size": 16,
    "block_out_channels": [32, 96, 128],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT["hidden_size"],
}
T5 = {
    **published.T5_XXL,
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 160,
    "num_layers": 3,
    "num_heads": 4,
}
TRANSFORMER = {
    **published.PIXART_512,
    "num_attention_heads": 4,
    "attention_head_dim": 36,
    "cross_attention_dim": 4 * 36,
    "num_layers": 6,
    "sample_size": 16,
    "caption_channels": T5["d_model"],
}
PIPELINES = {
    "sd15": {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": UNET,
        "vae/config.json": networks.VAE,
        "text_encoder/config.json": TEXT,
    },
    "pixart": {
        "model_index.json": {"_class_name": "PixArtAlphaPipeline"},
        "transformer/config.json": TRANSFORMER,
        "vae/config.json": networks.VAE,
        "text_encoder/config.json": T5,
    },
}


def write(folder: Path, files: dict[str, dict]) -> Path:
    """Writes a pipeline's files. Returns: its folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        folders.write_object(folder / name, content)
    return folder


if __name__ == "__main__":
    for name, files in PIPELINES.items():
        print(write(Path(sys.argv[1]) / name, files))
