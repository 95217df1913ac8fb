# SPDX-License-Identifier: Apache-2.0
"""What one family of models has of its own; a family is one file beside this one.

A new one also brings its networks to models/ and their classes to folder._PORTS, their published
sizes to models/published.py, and a config. Whoever names SDXL (grep) must then ask the pipeline.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from di_star_jax.models.config import Fields
from di_star_jax.models.unet import Condition

# (graphdefs, parameters, token ids, all by component; pixels) -> (condition, null condition).
EncodeText = Callable[
    [dict[str, nnx.GraphDef], dict[str, Any], dict[str, jax.Array], int],
    tuple[Condition, Condition],
]


class Guided(NamedTuple):
    """Of the samplers of many steps: how many, and omega."""

    steps: int
    guidance_scale: float


@dataclasses.dataclass(frozen=True)
class Family:
    """What a pipeline folder holds, and what its networks are told of a prompt.

    parts: names of the networks' folders, each with the network's class.
    index: what is made of the fields of model_index.json that are no components.
    tokenizers: name of the text encoder that reads a tokenizer's token ids, by the tokenizer's.
    encode_text: a batch of prompts as the UNet's condition, with what stands for 'no prompt'.
    one_step: time of the one-step generator's step, in [0, 999].
    teacher: how a pipeline that is no generator is drawn, where neither user nor folder says.
    check: (config.json of each part, the pipeline's folder), raises UserError where the parts do
      not go together.
    """

    parts: dict[str, str]
    index: Fields
    tokenizers: dict[str, str]
    encode_text: EncodeText
    one_step: int
    teacher: Guided
    check: Callable[[dict[str, dict], str], None]
