# SPDX-License-Identifier: Apache-2.0
"""Cosines of a CLIP's image and text embeddings: what PickScore, HPSv2 and CLIPScore are."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax.errors import UserError
from di_star_jax.models.clip import CLIPModel
from di_star_jax.pipelines.folder import (
    PLAIN,
    Model,
    Options,
    abstract_model,
    load_model,
    model_class,
)
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards.pixels import Pixels, clip_pixels, clip_pixels_rounded
from di_star_jax.rewards.reward import Reward, Tokenize, listed
from di_star_jax.storage import folders, weights


def read_config(folder: Path) -> dict:
    """config.json of a `CLIPModel`'s folder.

    Raises: UserError where it is missing, broken, or of another model.
    """
    config = folders.read_config(folder)
    found = model_class(config)[0]
    if found is not CLIPModel:
        raise UserError(
            f"{folder} holds a {found.__name__}, expected a CLIPModel, with both towers; give the folder of one "
            "such as openai/clip-vit-base-patch32"
        )
    return config


def check_weights(folder: Path, needed: dict[str, str]) -> None:
    """Raises:

    UserError for a folder without safetensors. Args: needed, where the files it should have are
    from.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"no weights in {folder}; it must hold {listed(needed)}")


def normalise(features: jax.Array) -> jax.Array:
    """[B, P] -> [B, P] of length 1, float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def text_embeddings(graphdef: nnx.GraphDef, params: dict, token_ids: jax.Array) -> jax.Array:
    """The prompts' half of the score; it needs no gradient.

    Args:
      graphdef, params: a `CLIPModel`, as `models.init` or `models.abstract` give it.
      token_ids: int32 [B, L], padded to the model's max_position_embeddings.
    Returns:
      float32 [B, P], of length 1.
    """
    return normalise(nnx.merge(graphdef, params).text_features(token_ids))


def image_embeddings(
    graphdef: nnx.GraphDef, params: dict, images: jax.Array, *, pixels: Pixels = clip_pixels
) -> jax.Array:
    """The pictures' half of the score.

    Args:
      graphdef, params: a `CLIPModel`, or its vision half.
      images: [B, H, W, 3] in [-1, 1].
      pixels: clip_pixels (training) or clip_pixels_rounded (evaluation).
    Returns: float32 [B, P], of length 1.
    """
    model = nnx.merge(graphdef, params)
    return normalise(
        model.image_features(pixels(images, size=model.config.vision_config.image_size))
    )


def cosine(
    graphdef: nnx.GraphDef, pixels: Pixels, params: dict, images: jax.Array, token_ids: jax.Array
) -> jax.Array:
    """Cosine between image and prompt, without the logit scale.

    Args: as of `image_embeddings` and `text_embeddings`.
    Returns: float32 [B] in [-1, 1]; differentiable with respect to the images, but for saturated
      pixels.
    """
    text = jax.lax.stop_gradient(text_embeddings(graphdef, params, token_ids))
    return jnp.sum(image_embeddings(graphdef, params, images, pixels=pixels) * text, axis=-1)


def reward_of(
    model: Model,
    tokenize: Tokenize | None,
    *,
    training: Pixels = clip_pixels,
    evaluation: Pixels = clip_pixels_rounded,
) -> Reward:
    """A CLIP's cosine as a reward.

    Args:
      model: a `CLIPModel`.
      tokenize: B texts to token ids int32 [B, L], or None where only shapes are known.
      training, evaluation: from images to the model's pixels.
    """
    length = model_class(model.config)[1].text_config.max_position_embeddings
    return Reward(
        model.params,
        functools.partial(cosine, model.graphdef, training),
        functools.partial(cosine, model.graphdef, evaluation),
        tokenize,
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )


def abstract(config: dict, options: Options = PLAIN) -> Reward:
    """Shapes alone. Args: config, of a `CLIPModel`."""
    return reward_of(abstract_model(config, options), None)


def load(
    folder: Path,
    options: Options = PLAIN,
    *,
    tokenizer: str | Path,
    needed: dict[str, str],
    arrange: weights.Arrange = dict,
) -> Reward:
    """From a folder with a `CLIPModel`'s config.json and safetensors.

    Args:
      tokenizer: a folder or Hub name.
      needed: the NEEDED of the reward's file.
      arrange: of the stored tensors, as in `weights.load`.
    Raises: UserError for a folder without weights, or of another model.
    """
    config = read_config(folder)
    check_weights(folder, needed)
    model = load_model(folder, options, config=config, arrange=arrange)
    return reward_of(model, Tokenizer(folders.resolve_tokenizer(tokenizer)))
