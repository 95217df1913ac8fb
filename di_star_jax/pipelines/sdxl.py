# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL: two text encoders, whose states before the last stand side by side."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax.models.unet import Condition
from di_star_jax.pipelines.family import Family


def encode_text(
    graphdefs: dict[str, nnx.GraphDef],
    params: dict[str, Any],
    token_ids: dict[str, jax.Array],
    resolution: int,
) -> tuple[Condition, Condition]:
    """SDXL's condition of a batch of prompts, and its null condition.

    Args:
      graphdefs, params: hold 'text_encoder' and 'text_encoder_2'.
      token_ids: int32 [B, L] under 'tokenizer' and 'tokenizer_2'.
      resolution: image height and width, pixels; also given as original and target size, with no
        crop.
    Returns:
      (condition, null): contexts [B, L, 768 + 1280] float32; null has zeros for context and pooled
      text, as SDXL's pipeline does when no negative prompt is given.
    """
    first, second = (
        nnx.merge(graphdefs[part], params[part])(token_ids[tokenizer])
        for tokenizer, part in SDXL.tokenizers.items()
    )
    context = jnp.concatenate(
        [first.hidden_states_penultimate, second.hidden_states_penultimate], axis=-1
    )
    sizes = jnp.array([resolution, resolution, 0, 0, resolution, resolution], jnp.float32)
    condition = Condition(
        context.astype(jnp.float32),
        second.pooled.astype(jnp.float32),
        jnp.broadcast_to(sizes[None], (context.shape[0], 6)),
    )
    return condition, null_of(condition)


def null_of(condition: Condition) -> Condition:
    """Zeros for context and pooled text, the same time ids: what SDXL takes for 'no prompt'."""
    return condition._replace(
        context=jnp.zeros_like(condition.context), pooled=jnp.zeros_like(condition.pooled)
    )


SDXL = Family(
    parts=("unet", "vae", "text_encoder", "text_encoder_2"),
    tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    encode_text=encode_text,
    one_step=399,  # DMD2's, whose generator the paper begins with
)
