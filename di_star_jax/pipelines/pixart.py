# SPDX-License-Identifier: Apache-2.0
"""PixArt-alpha: a transformer that reads T5's states of the tokens that a prompt has."""

from typing import Any

import jax
import jax.numpy as jnp
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
    null_ids: dict[str, jax.Array],
    resolution: int,
) -> tuple[Condition, Condition]:
    """PixArt's condition of a batch of prompts, and its null condition.

    Args:
      graphdefs, params: hold 'text_encoder'.
      token_ids, null_ids: int32 [B, L] and [1, L] under 'tokenizer', the second of "".
      resolution: image height and width, pixels; only the network of 1024 pixels looks at it.
    Returns:
      (condition, null): contexts [B, L, 4096] float32, masks of the tokens that are no pads, and
      height, width and their ratio [B, 3]. Null is what T5 makes of "" with its own mask, one
      token, as in diffusers' `PixArtAlphaPipeline`. PixArt's own code has another null, which its
      published pipelines lack: a random embedding under the prompt's mask.
    """
    encoder = nnx.merge(graphdefs["text_encoder"], params["text_encoder"])
    batch = len(token_ids["tokenizer"])
    sizes = jnp.array([resolution, resolution, 1.0], jnp.float32)

    def encoded(ids: jax.Array) -> Condition:
        mask = mask_of(ids)
        context = encoder(ids, mask).astype(jnp.float32)
        parts = Condition(context, None, sizes[None], mask)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), parts)

    return encoded(token_ids["tokenizer"]), encoded(null_ids["tokenizer"])


def width(config: dict) -> float:
    """As `Family.width`: by the TPU compiler's figures for PixArt-XL of 1024 pixels."""
    return 0.4 * PixArtConfig.from_json(config).width / 1152


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
    one_step=FewStep((440,), "scaled"),  # SIM's: sigma / alpha is 2.5 there
    # diffusers' defaults for this pipeline.
    teacher=Guided(steps=20, guidance_scale=4.5),
    width=width,
    fits=fits,
    # Else a machine with beautifulsoup4 and ftfy would read other prompts than one without.
    call="clean_caption=False",
)
