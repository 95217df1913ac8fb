# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL: two text encoders, whose states before the last stand side by side."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax.diffusion import FewStep
from di_star_jax.models.clip import CLIPTextConfig
from di_star_jax.models.config import Fields
from di_star_jax.models.unet import Condition, UNetConfig
from di_star_jax.models.vae import VAEConfig
from di_star_jax.pipelines import original
from di_star_jax.pipelines.family import DENOISER, Family, Fit, Guided, Part


def encode_text(
    graphdefs: dict[str, nnx.GraphDef],
    params: dict[str, Any],
    token_ids: dict[str, jax.Array],
) -> Condition:
    """SDXL's condition of a batch of prompts.

    Args:
      graphdefs, params: hold 'text_encoder' and 'text_encoder_2'.
      token_ids: int32 [B, L] under 'tokenizer' and 'tokenizer_2'.
    Returns: context [B, L, 768 + 1280] and pooled text [B, 1280].
    """
    first, second = (
        nnx.merge(graphdefs[part], params[part])(token_ids[tokenizer])
        for tokenizer, part in SDXL.tokenizers.items()
    )
    context = jnp.concatenate(
        [first.hidden_states_penultimate, second.hidden_states_penultimate], axis=-1
    )
    return Condition(context, second.pooled)


def time_ids(resolution: int) -> tuple[float, ...]:
    """Original size, no crop, target size."""
    return (resolution, resolution, 0, 0, resolution, resolution)


def width(config: dict) -> float:
    """As `Family.width`: by the channels of the first level."""
    return UNetConfig.from_json(config).block_out_channels[0] / 320


def rows(config: dict) -> int:
    """As `Family.rows`: each level but the last halves them."""
    return 2 ** (len(UNetConfig.from_json(config).block_out_channels) - 1)


def fits(configs: dict[str, dict]) -> list[Fit]:
    """As `Family.fits`."""
    unet = UNetConfig.from_json(configs[DENOISER])
    vae = VAEConfig.from_json(configs["vae"])
    first = CLIPTextConfig.from_json(configs["text_encoder"])
    second = CLIPTextConfig.from_json(configs["text_encoder_2"])
    latents = vae.latent_channels
    context = first.hidden_size + second.hidden_size
    added = 6 * (unet.addition_time_embed_dim or 0) + second.projection_dim
    return [
        Fit("addition_embed_type", unet.addition_embed_type, "text_time", "SDXL"),
        Fit("in_channels", unet.in_channels, latents, "the VAE's latent_channels"),
        Fit("out_channels", unet.out_channels, latents, "the VAE's latent_channels"),
        Fit("cross_attention_dim", unet.cross_attention_dim, context, "both text encoders' widths"),
        Fit(
            "projection_class_embeddings_input_dim",
            unet.projection_class_embeddings_input_dim,
            added,
            "six times addition_time_embed_dim and text_encoder_2's projection_dim",
        ),
    ]


SDXL = Family(
    name="SDXL",
    parts={
        DENOISER: Part("unet", ("UNet2DConditionModel",)),
        "vae": Part("vae", ("AutoencoderKL",)),
        "text_encoder": Part("text_encoder", ("CLIPTextModel",)),
        "text_encoder_2": Part("text_encoder_2", ("CLIPTextModelWithProjection",)),
    },
    index=Fields(
        fixed={
            "_class_name": (
                "StableDiffusionXLPipeline",
                "StableDiffusionXLImg2ImgPipeline",
                "StableDiffusionXLInpaintPipeline",
            ),
            "force_zeros_for_empty_prompt": (True,),  # see `Family.null_is_zero`
            "requires_aesthetics_score": (False,),
        },
        harmless=frozenset(
            {
                "add_watermarker",  # which cannot be seen
                "feature_extractor",  # of image prompts, as the next
                "image_encoder",
                "requires_safety_checker",
                "safety_checker",
                "watermark",
            }
        ),
        file="model_index.json",
    ),
    tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    encode_text=encode_text,
    null_is_zero=True,
    time_ids=time_ids,
    one_step=FewStep((399,)),  # DMD2's, whose generator the paper begins with
    # Of the paper's SDXL and SDXL-DPO, by its authors' notebook.
    teacher=Guided(steps=50, guidance_scale=7.5),
    width=width,
    rows=rows,
    fits=fits,
    original={
        DENOISER: ("model.diffusion_model.", original.UNET),
        "vae": ("first_stage_model.", original.VAE),
        "text_encoder": ("conditioner.embedders.0.transformer.", original.CLIP),
        "text_encoder_2": ("conditioner.embedders.1.model.", original.OPEN_CLIP),
    },
)
