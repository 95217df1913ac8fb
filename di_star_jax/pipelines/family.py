# SPDX-License-Identifier: Apache-2.0
"""What one family of models has of its own; a family is one file beside this one.

A new one also brings its networks to models/ and their classes to folder._PORTS, their published
sizes to models/published.py, a line to families.py, and a config.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax.diffusion import FewStep
from di_star_jax.models.config import Fields
from di_star_jax.models.unet import Condition

# The network that predicts eps is called so in all code; its folder is the family's to name.
DENOISER = "denoiser"
# The decoder of decode.view="tiny", beside a pipeline's parts: it is none of them.
TINY_VAE = "tiny_vae"
# Of a batch of prompts: their states, which a cache has in place of token ids.
TEXT = "text"

# (graphdefs and parameters by component, token ids [B, L] by tokenizer) -> condition of B prompts,
# whose time_ids are missing yet.
EncodeText = Callable[[dict[str, nnx.GraphDef], dict[str, Any], dict[str, jax.Array]], Condition]


class Part(NamedTuple):
    """A network. folder: in the pipeline's. classes: of PyTorch's, first the one to write."""

    folder: str
    classes: tuple[str, ...]


class Guided(NamedTuple):
    """Of the samplers of many steps: how many, and omega."""

    steps: int
    guidance_scale: float


class Fit(NamedTuple):
    """A field of the denoiser's config.json: its value, what is expected, and as what."""

    field: str
    found: Any
    expected: Any
    of: str


@dataclasses.dataclass(frozen=True)
class Family:
    """What a pipeline folder holds, and what its networks are told of a prompt.

    name: in words. parts: the networks by component, DENOISER and "vae" among them.
    index: what is made of the fields of model_index.json that are no components.
    tokenizers: name of the text encoder that reads a tokenizer's token ids, by the tokenizer's.
    encode_text: a batch of prompts as the denoiser's condition, without time_ids.
    null_is_zero: whether 'no prompt' is a context of zeros, as SDXL's
      `force_zeros_for_empty_prompt` says; else it is what the text encoders make of "".
    time_ids: pixels -> `Condition.time_ids` of one image, () where there are none.
    one_step: the one-step generator's form where nobody says.
    teacher: how a pipeline that is no generator is drawn, where neither user nor folder says.
    width: of a denoiser's config.json, its activations over those of SDXL's UNet at the same
      pixels, for estimates.
    rows: of a denoiser's config.json, how many rows of latents stay on one device.
    fits: of config.json by component, the fields by which the parts go together.
    original: of the layout in one file (original.py), what stands before the names of each
      component's tensors, and its network there; empty where there is no such layout.
    keeps_offset: whether diffusers' pipeline draws with the scheduler's `steps_offset`, and does
      not put another in its place.
    call: an argument that a call of diffusers' pipeline needs to draw as we do, or "".
    """

    name: str
    parts: dict[str, Part]
    index: Fields
    tokenizers: dict[str, str]
    encode_text: EncodeText
    null_is_zero: bool
    time_ids: Callable[[int], tuple[float, ...]]
    one_step: FewStep
    teacher: Guided
    width: Callable[[dict], float]
    rows: Callable[[dict], int]
    fits: Callable[[dict[str, dict]], list[Fit]]
    original: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    keeps_offset: bool = True
    call: str = ""


def conditions(
    family: Family,
    text: Condition,
    of_empty: Condition | None,
    resolution: int,
) -> tuple[Condition, Condition]:
    """(condition, null condition) of B prompts, contexts in float32.

    Args:
      text: what `Family.encode_text` makes of the prompts.
      of_empty: what it makes of "", of one row; not used where null is zero.
      resolution: image height and width, pixels.
    """
    batch = len(text.context)
    null = of_empty
    if family.null_is_zero:
        context, pooled = jax.tree.map(jnp.zeros_like, (text.context, text.pooled))
        null = text._replace(context=context, pooled=pooled)
    numbers = family.time_ids(resolution)
    time_ids = jnp.array([numbers], jnp.float32) if numbers else None

    def whole(part: Condition) -> Condition:
        part = part._replace(context=part.context.astype(jnp.float32), time_ids=time_ids)
        if part.pooled is not None:
            part = part._replace(pooled=part.pooled.astype(jnp.float32))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), part)

    return whole(text), whole(null)
