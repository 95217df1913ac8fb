# SPDX-License-Identifier: Apache-2.0
"""PixArt-alpha: a transformer that reads T5's states of the tokens that a prompt has."""

from typing import Any

import jax
from flax import nnx

from di_star_jax.diffusion import FewStep
from di_star_jax.models.config import Fields
from di_star_jax.models.pixart import PixArtConfig
from di_star_jax.models.t5 import T5Config, mask_of
from di_star_jax.models.unet import Condition
from di_star_jax.models.vae import VAEConfig
from di_star_jax.pipelines.family import DENOISER, Family, Fit, Guided, Part


def encode_text(
    graphdefs: dict[str, nnx.GraphDef],
    params: dict[str, Any],
    token_ids: dict[str, jax.Array],
) -> Condition:
    """PixArt's condition of a batch of prompts.

    Args:
      graphdefs, params: hold 'text_encoder'.
      token_ids: int32 [B, L] under 'tokenizer'.
    Returns: context [B, L, 4096] and the mask of the tokens that are no pads.
    """
    ids = token_ids["tokenizer"]
    mask = mask_of(ids)
    encoder = nnx.merge(graphdefs["text_encoder"], params["text_encoder"])
    return Condition(encoder(ids, mask), mask=mask)


def time_ids(resolution: int) -> tuple[float, ...]:
    """Height, width and their ratio; only the network of 1024 pixels looks at them."""
    return (resolution, resolution, 1.0)


def width(config: dict) -> float:
    """As `Family.width`: by the TPU compiler's figures for PixArt-XL of 1024 pixels."""
    return 0.4 * PixArtConfig.from_json(config).width / 1152


def rows(config: dict) -> int:
    """As `Family.rows`: a patch's."""
    return PixArtConfig.from_json(config).patch_size


def fits(configs: dict[str, dict]) -> list[Fit]:
    """As `Family.fits`."""
    transformer = PixArtConfig.from_json(configs[DENOISER])
    vae = VAEConfig.from_json(configs["vae"])
    text = T5Config.from_json(configs["text_encoder"])
    return [
        Fit(
            "in_channels", transformer.in_channels, vae.latent_channels, "the VAE's latent_channels"
        ),
        Fit("caption_channels", transformer.caption_channels, text.d_model, "the text's width"),
    ]


PIXART = Family(
    name="PixArt-alpha",
    parts={
        # The second is what published files say.
        DENOISER: Part("transformer", ("PixArtTransformer2DModel", "Transformer2DModel")),
        "vae": Part("vae", ("AutoencoderKL",)),
        "text_encoder": Part("text_encoder", ("T5EncoderModel",)),
    },
    index=Fields(
        fixed={"_class_name": ("PixArtAlphaPipeline",)},
        harmless=frozenset(),
        file="model_index.json",
    ),
    tokenizers={"tokenizer": "text_encoder"},
    encode_text=encode_text,
    # diffusers' `PixArtAlphaPipeline` encodes "", with its own mask of one token. PixArt's own code
    # has another null, which its published pipelines lack: a random embedding under the prompt's
    # mask.
    null_is_zero=False,
    time_ids=time_ids,
    one_step=FewStep((440,), "scaled"),  # SIM's: sigma / alpha is 2.5 there
    # diffusers' defaults for this pipeline.
    teacher=Guided(steps=20, guidance_scale=4.5),
    width=width,
    rows=rows,
    fits=fits,
    # Else a machine with beautifulsoup4 and ftfy would read other prompts than one without, and of
    # sizes that are none of PixArt's the nearest that is would be drawn, or nothing.
    call="clean_caption=False, use_resolution_binning=False",
)
