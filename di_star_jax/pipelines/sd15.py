# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.5: one text encoder, whose last states are the context."""

from typing import Any

import jax
from flax import nnx

from di_star_jax.diffusion import FewStep
from di_star_jax.models.clip import CLIPTextConfig
from di_star_jax.models.config import Fields
from di_star_jax.models.unet import Condition, UNetConfig
from di_star_jax.models.vae import VAEConfig
from di_star_jax.pipelines import original
from di_star_jax.pipelines.family import DENOISER, Family, Fit, Guided, Part
from di_star_jax.pipelines.sdxl import rows, width


def encode_text(
    graphdefs: dict[str, nnx.GraphDef],
    params: dict[str, Any],
    token_ids: dict[str, jax.Array],
) -> Condition:
    """SD 1.5's condition of a batch of prompts.

    Args:
      graphdefs, params: hold 'text_encoder'.
      token_ids: int32 [B, L] under 'tokenizer'.
    Returns: context [B, L, 768], the encoder's states after its last layer norm.
    """
    encoder = nnx.merge(graphdefs["text_encoder"], params["text_encoder"])
    return Condition(encoder(token_ids["tokenizer"]).last_hidden_state)


def time_ids(resolution: int) -> tuple[float, ...]:
    """None: the network is not told."""
    del resolution
    return ()


def fits(configs: dict[str, dict]) -> list[Fit]:
    """As `Family.fits`."""
    unet = UNetConfig.from_json(configs[DENOISER])
    vae = VAEConfig.from_json(configs["vae"])
    text = CLIPTextConfig.from_json(configs["text_encoder"])
    latents = vae.latent_channels
    return [
        Fit("addition_embed_type", unet.addition_embed_type, None, "SD 1.5"),
        Fit("in_channels", unet.in_channels, latents, "the VAE's latent_channels"),
        Fit("out_channels", unet.out_channels, latents, "the VAE's latent_channels"),
        Fit("cross_attention_dim", unet.cross_attention_dim, text.hidden_size, "the text's width"),
    ]


SD15 = Family(
    name="SD 1.5",
    parts={
        DENOISER: Part("unet", ("UNet2DConditionModel",)),
        "vae": Part("vae", ("AutoencoderKL",)),
        "text_encoder": Part("text_encoder", ("CLIPTextModel",)),
    },
    index=Fields(
        fixed={
            "_class_name": (
                "StableDiffusionPipeline",
                "StableDiffusionImg2ImgPipeline",
            ),
        },
        harmless=frozenset(
            {
                "feature_extractor",  # of the safety checker, and of image prompts
                "image_encoder",
                "requires_safety_checker",
                "safety_checker",
            }
        ),
        file="model_index.json",
    ),
    tokenizers={"tokenizer": "text_encoder"},
    encode_text=encode_text,
    null_is_zero=False,  # diffusers' `StableDiffusionPipeline` encodes ""
    time_ids=time_ids,
    one_step=FewStep((625,), "scaled"),  # SiD-LSG's; sigma / alpha is 2.5 there, as SIM's
    # diffusers' defaults for this pipeline.
    teacher=Guided(steps=50, guidance_scale=7.5),
    width=width,
    rows=rows,
    fits=fits,
    original={
        DENOISER: ("model.diffusion_model.", original.UNET),
        "vae": ("first_stage_model.", original.VAE),
        "text_encoder": ("cond_stage_model.transformer.", original.CLIP),
    },
    keeps_offset=False,  # StableDiffusionPipeline sets it to 1
)
