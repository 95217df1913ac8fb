# SPDX-License-Identifier: Apache-2.0
"""LAION's aesthetic predictor v2: an affine map of CLIP ViT-L/14's image embedding; knows nothing
of the prompt.

Being free of the prompt it is the easiest reward to hack. Source:
christophschuhmann/improved-aesthetic-predictor.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax import models
from di_star_jax.errors import UserError
from di_star_jax.models.heads import ScoreHead
from di_star_jax.pipelines.folder import (
    PLAIN,
    Model,
    Options,
    abstract_model,
    load_model,
    model_class,
)
from di_star_jax.rewards.pixels import Pixels, torchvision_pixels, torchvision_pixels_rounded
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.similarity import image_embeddings, read_config
from di_star_jax.storage import weights

HEAD = "sac+logos+ava1-l14-linearMSE.safetensors"  # the published .pth, converted once
NEEDED = {
    HEAD: "converted once from the .pth of christophschuhmann/improved-aesthetic-predictor on GitHub as README says",
    "model.safetensors": "of openai/clip-vit-large-patch14 on the Hub",
}


class _Graphs(NamedTuple):
    clip: nnx.GraphDef
    head: nnx.GraphDef


def _score(
    graphs: _Graphs, pixels: Pixels, params: dict, images: jax.Array, prompts: jax.Array
) -> jax.Array:
    del prompts
    return nnx.merge(graphs.head, params["head"])(
        image_embeddings(graphs.clip, params["clip"], images, pixels=pixels)
    )


def _no_prompts(texts: list[str]) -> np.ndarray:
    """[B] zeros: only how many there are."""
    return np.zeros(len(texts), np.int32)


def _reward(clip: Model, head: nnx.GraphDef, head_params: dict, tokenize) -> Reward:
    graphs, params = _Graphs(clip.graphdef, head), {"clip": clip.params, "head": head_params}
    return Reward(
        params,
        functools.partial(_score, graphs, torchvision_pixels),
        functools.partial(_score, graphs, torchvision_pixels_rounded),
        tokenize,
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def _tower(config: dict) -> dict:
    return config | {"architectures": ["CLIPVisionModelWithProjection"]}


def _head(config: dict, options: Options) -> tuple[nnx.GraphDef, dict]:
    """The affine map, in float32 whatever the tower is held in."""
    width = model_class(config)[1].projection_dim
    graphdef, params = models.abstract(lambda rngs: ScoreHead(width, rngs=rngs))
    return graphdef, dataclasses.replace(options, param_dtype=jnp.float32).placed(params)


def _vision_half(stored: dict[str, weights.Stored]) -> dict[str, weights.Stored]:
    return {
        name: tensor
        for name, tensor in stored.items()
        if name.startswith(("vision_model.", "visual_projection."))
    }


def _check_files(folder: Path) -> None:
    files = {path.name for path in folder.glob("*.safetensors")}
    missing = [
        name
        for name, there in ((HEAD, HEAD in files), ("model.safetensors", files - {HEAD}))
        if not there
    ]
    if missing:
        raise UserError(
            f"{folder} lacks " + "; ".join(f"{name} ({NEEDED[name]})" for name in missing)
        )


def abstract(config: dict, options: Options = PLAIN) -> Reward:
    """Shapes alone. Args: config, of a `CLIPModel`."""
    config = _tower(config)
    return _reward(abstract_model(config, options), *_head(config, options), None)


def load(folder: Path, options: Options = PLAIN, *, tokenizer: str | Path) -> Reward:
    """From a `CLIPModel` folder (openai/clip-vit-large-patch14) with the head's file HEAD in it.

    Args: tokenizer, not needed.
    Raises: UserError for a folder that lacks a file, or of another model.
    """
    del tokenizer
    config = _tower(read_config(folder))
    _check_files(folder)
    clip = load_model(folder, options, config=config, arrange=_vision_half)
    graphdef, abstract_params = _head(config, options)
    return _reward(clip, graphdef, weights.load(folder / HEAD, abstract_params), _no_prompts)
