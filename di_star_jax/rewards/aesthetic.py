# SPDX-License-Identifier: Apache-2.0
"""LAION's aesthetic predictor v2: an affine map of CLIP ViT-L/14's image embedding.

It knows nothing of the prompt, and so is the easiest reward to hack. Source:
christophschuhmann/improved-aesthetic-predictor.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax import models
from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.models.clip import CLIPConfig, CLIPVisionModelWithProjection
from di_star_jax.models.heads import ScoreHead
from di_star_jax.pipelines.folder import Options, Port, abstract_port
from di_star_jax.rewards.pixels import Pixels, torchvision_pixels, torchvision_pixels_rounded
from di_star_jax.rewards.reward import NO_PROMPTS, Entry, Reward, listed, no_prompts
from di_star_jax.rewards.similarity import eight_bit_features, image_embeddings, read_config
from di_star_jax.storage import weights

HEAD = "sac+logos+ava1-l14-linearMSE.safetensors"  # the published .pth, converted once
NEEDED = {
    HEAD: "converted once from the .pth of christophschuhmann/improved-aesthetic-predictor on "
    "GitHub as README says",
    "model.safetensors": "of openai/clip-vit-large-patch14 on the Hub",
}


_TOWER = Port(CLIPVisionModelWithProjection, CLIPConfig)


class _Graphs(NamedTuple):
    clip: nnx.GraphDef
    head: nnx.GraphDef


def _score(
    graphs: _Graphs,
    pixels: Pixels,
    params: dict,
    images: jax.Array,
    prompts: jax.Array,
) -> jax.Array:
    del prompts
    embeddings = image_embeddings(graphs.clip, params["clip"], images, pixels=pixels)
    return nnx.merge(graphs.head, params["head"])(embeddings)


def _features(
    graphs: _Graphs,
    params: dict,
    images: jax.Array,
) -> jax.Array:
    return eight_bit_features(graphs.clip, params["clip"], images)


def abstract(config: dict, options: Options) -> Reward:
    """As `Entry.abstract`. Args: config, of a `CLIPModel`, of which it takes the vision half."""
    clip = abstract_port(_TOWER, config, options)
    width = CLIPConfig.from_json(config).projection_dim
    head, head_params = models.abstract(lambda rngs: ScoreHead(width, rngs=rngs))
    # The head is float32 whatever the tower is held in.
    in_float32 = dataclasses.replace(options, param_dtype=jnp.float32)
    graphs = _Graphs(clip.graphdef, head)
    return Reward(
        {"clip": clip.params, "head": in_float32.placed(head_params)},
        functools.partial(_score, graphs, torchvision_pixels),
        functools.partial(_score, graphs, torchvision_pixels_rounded),
        no_prompts,
        NO_PROMPTS,
        functools.partial(_features, graphs),
    )


def _vision_half(stored: dict[str, weights.Stored]) -> dict[str, weights.Stored]:
    halves = ("vision_model.", "visual_projection.")
    return {name: tensor for name, tensor in stored.items() if name.startswith(halves)}


def _check_files(folder: Path) -> None:
    files = {path.name for path in folder.glob("*.safetensors")}
    missing = {}
    if HEAD not in files:
        missing[HEAD] = NEEDED[HEAD]
    if not files - {HEAD}:
        missing["model.safetensors"] = NEEDED["model.safetensors"]
    if missing:
        raise UserError(f"{folder} lacks {listed(missing)}")


def load(
    folder: Path,
    options: Options,
) -> Reward:
    """As `Entry.load`, from a `CLIPModel`'s folder with the head's file HEAD beside its own.

    Raises: UserError for a folder that lacks a file, or of another model.
    """
    reward = abstract(read_config(folder), options)
    _check_files(folder)
    clip = weights.load(folder, reward.params["clip"], arrange=_vision_half)
    head = weights.load(folder / HEAD, reward.params["head"])
    return reward._replace(params={"clip": clip, "head": head})


ENTRY = Entry(
    "Aesthetic",
    load=load,
    abstract=abstract,
    read_config=read_config,
    needed=NEEDED,
    weights="./weights/aesthetic",
    published=published.CLIP_L14,
    digits=2,
    is_clip=True,
)
