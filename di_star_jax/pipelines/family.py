# SPDX-License-Identifier: Apache-2.0
"""What one family of models has of its own; a family is one file beside this one.

A new one also brings its networks to models/ and their classes to folder._PORTS, their published
sizes to models/published.py, a line to families.py, and a config.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from di_star_jax.diffusion import FewStep
from di_star_jax.models.config import Fields
from di_star_jax.models.unet import Condition

# The network that predicts eps is called so in all code; its folder is the family's to name.
DENOISER = "denoiser"

# (graphdefs, parameters, token ids [B, L] and those of "" [1, L], all by component; pixels)
# -> (condition, null condition) of B.
EncodeText = Callable[
    [dict[str, nnx.GraphDef], dict[str, Any], dict[str, jax.Array], dict[str, jax.Array], int],
    tuple[Condition, Condition],
]


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
    encode_text: a batch of prompts as the denoiser's condition, with what stands for 'no prompt'.
    one_step: the one-step generator's form where nobody says.
    teacher: how a pipeline that is no generator is drawn, where neither user nor folder says.
    width: of a denoiser's config.json, its activations over those of SDXL's UNet at the same
      pixels, for estimates.
    fits: of config.json by component, the fields by which the parts go together.
    keeps_offset: whether diffusers' pipeline draws with the scheduler's `steps_offset`, and does
      not put another in its place.
    call: an argument that a call of diffusers' pipeline needs to draw as we do, or "".
    """

    name: str
    parts: dict[str, Part]
    index: Fields
    tokenizers: dict[str, str]
    encode_text: EncodeText
    one_step: FewStep
    teacher: Guided
    width: Callable[[dict], float]
    fits: Callable[[dict[str, dict]], list[Fit]]
    keeps_offset: bool = True
    call: str = ""
