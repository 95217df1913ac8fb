# SPDX-License-Identifier: Apache-2.0
"""LAION's aesthetic predictor v2: an affine map of CLIP ViT-L/14's image embedding; knows nothing
of the prompt.

Being free of the prompt it is the easiest reward to hack. Source:
christophschuhmann/improved-aesthetic-predictor.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax import models
from di_star_jax.errors import UserError
from di_star_jax.models.layers import ScoreHead
from di_star_jax.pipelines import folder as pipeline
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


def _reward(clip: pipeline.Model, head: nnx.GraphDef, head_params: dict, tokenize) -> Reward:
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


def _head(config: dict):
    return models.abstract(
        lambda rngs: ScoreHead(pipeline.model_class(config)[1].projection_dim, rngs=rngs)
    )


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


def abstract(config: dict, **options) -> Reward:
    """Shapes alone. Args: config, of a `CLIPModel`; options, of `pipeline.abstract_model`."""
    return _reward(pipeline.abstract_model(_tower(config), **options), *_head(_tower(config)), None)


def load(
    folder: Path, *, tokenizer: str | Path, shardings=None, param_dtype=jnp.float32, **options
) -> Reward:
    """From a `CLIPModel` folder (openai/clip-vit-large-patch14) with the head's file HEAD beside
    its own.

    Args: folder; tokenizer, not needed; options, of `pipeline.load_model`.
    Raises: UserError for a folder that lacks a file, or of another model.
    """
    del tokenizer
    config = _tower(read_config(folder))
    _check_files(folder)
    clip = pipeline.load_model(
        folder,
        config=config,
        arrange=_vision_half,
        shardings=shardings,
        param_dtype=param_dtype,
        **options,
    )
    graphdef, abstract_params = _head(config)
    params = weights.load(
        folder / HEAD,
        abstract_params,
        shardings=None if shardings is None else shardings(abstract_params),
    )
    return _reward(clip, graphdef, params, _no_prompts)
