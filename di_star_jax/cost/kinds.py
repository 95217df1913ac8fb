# SPDX-License-Identifier: Apache-2.0
"""What families of pipelines have of their own in PyTorch, for cost/peer.py: a row of KINDS each.

Images and latents are NCHW here; B is the batch, L tokens, h and w a latent's sides. Only the
functions of this module import torch, so that the package can be walked without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Prompts(NamedTuple):
    """Token ids, int64. ids: [B, L] by text encoder; null: of "", [1, L] by text encoder.

    reward: [B, L] of the reward's tokenizer, or None.
    """

    ids: list[Tensor]
    null: list[Tensor]
    reward: Tensor | None


class Condition(NamedTuple):
    """Of a denoiser: [B, L, D], [B, P], [B, S] float32, [B, L] bool; None for what it is not told.

    mask: true for the tokens that are no pads. sizes: of the image, as its network has them.
    """

    context: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    mask: Tensor | None = None


class Kind(NamedTuple):
    """What a family of pipelines has of its own.

    encode: (text encoders, Prompts, the image's side) -> (condition, null condition).
    predict: (denoiser, x_t, t, Condition) -> eps, all of the denoiser's dtype.
    betas: first and last of the schedule, and the power whose root rises evenly between them, as in
      its scheduler_config.json.
    """

    encode: Callable[[list[nn.Module], Prompts, int], tuple[Condition, Condition]]
    predict: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    betas: tuple[float, float, int]


def dtype_of(net: nn.Module) -> torch.dtype:
    """That of its parameters."""
    return next(net.parameters()).dtype


def encode_two(
    encoders: list[nn.Module],
    prompts: Prompts,
    pixels: int,
) -> tuple[Condition, Condition]:
    """As of `Kind`: two CLIPs' states before the last stand side by side, and zeros are null.

    Sizes: the image's as original and target size, with no crop. Source: diffusers
    `StableDiffusionXLPipeline`.
    """
    import torch

    with torch.no_grad():
        one, two = (
            encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, prompts.ids)
        )
    layers = [one.hidden_states[-2], two.hidden_states[-2]]
    context = torch.cat(layers, dim=-1).float()  # [B, L, 768 + 1280]
    pooled = two.text_embeds.float()
    sizes = pooled.new_tensor([pixels, pixels, 0, 0, pixels, pixels]).expand(len(pooled), 6)
    null = Condition(torch.zeros_like(context), torch.zeros_like(pooled), sizes)
    return Condition(context, pooled, sizes), null


def encode_one(
    encoders: list[nn.Module],
    prompts: Prompts,
    pixels: int,
) -> tuple[Condition, Condition]:
    """As of `Kind`: one CLIP's last states. Source: diffusers `StableDiffusionPipeline`."""
    import torch

    del pixels
    with torch.no_grad():
        context, null = (
            encoders[0](ids).last_hidden_state.float() for ids in (prompts.ids[0], prompts.null[0])
        )
    return Condition(context), Condition(null.expand_as(context))


def encode_t5(
    encoders: list[nn.Module],
    prompts: Prompts,
    pixels: int,
) -> tuple[Condition, Condition]:
    """As of `Kind`: T5's states with their mask. Source: diffusers `PixArtAlphaPipeline`.

    Sizes: height, width and their ratio.
    """
    import torch

    batch = len(prompts.ids[0])

    def encoded(ids: Tensor) -> Condition:
        mask = ids != encoders[0].config.pad_token_id
        context = encoders[0](ids, attention_mask=mask).last_hidden_state.float()
        sizes = context.new_tensor([pixels, pixels, 1]).expand(batch, 3)
        return Condition(context.expand(batch, -1, -1), sizes=sizes, mask=mask.expand(batch, -1))

    with torch.no_grad():
        return encoded(prompts.ids[0]), encoded(prompts.null[0])


def predict_by_unet(
    unet: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
) -> Tensor:
    """As of `Kind`."""
    added = None
    if condition.pooled is not None:
        pooled = condition.pooled.to(dtype_of(unet))
        added = {"text_embeds": pooled, "time_ids": condition.sizes}
    return unet(x_t, t, condition.context, added_cond_kwargs=added, return_dict=False)[0]


def predict_by_transformer(
    transformer: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
) -> Tensor:
    """As of `Kind`: the first channels, for those beyond the latents' are of a variance."""
    found = transformer(
        x_t,
        encoder_hidden_states=condition.context,
        timestep=t,
        added_cond_kwargs={
            "resolution": condition.sizes[:, :2],
            "aspect_ratio": condition.sizes[:, 2:],
        },
        encoder_attention_mask=condition.mask,
        return_dict=False,
    )[0]
    return found[:, : x_t.shape[1]]


_SCALED_LINEAR = (0.00085, 0.012, 2)
# By the classes of a pipeline's text encoders, in the order of its tokenizers.
KINDS = {
    ("CLIPTextModel", "CLIPTextModelWithProjection"): Kind(
        encode_two, predict_by_unet, _SCALED_LINEAR
    ),
    ("CLIPTextModel",): Kind(encode_one, predict_by_unet, _SCALED_LINEAR),
    ("T5EncoderModel",): Kind(encode_t5, predict_by_transformer, (0.0001, 0.02, 1)),
}
