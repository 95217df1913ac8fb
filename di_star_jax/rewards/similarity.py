# SPDX-License-Identifier: Apache-2.0
"""Cosines of a CLIP's image and text embeddings: what PickScore, HPSv2 and CLIPScore are."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax.errors import UserError
from di_star_jax.models.clip import CLIPConfig, CLIPModel
from di_star_jax.pipelines.folder import (
    Model,
    Options,
    Port,
    abstract_port,
    model_class,
)
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards.pixels import Pixels, clip_pixels, clip_pixels_rounded
from di_star_jax.rewards.reward import Entry, Reward, Tokenize, listed
from di_star_jax.storage import folders, weights

_PORT = Port(CLIPModel, CLIPConfig)
_LETTERS = {768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # of ViTs, by width


def normalise(features: jax.Array) -> jax.Array:
    """[B, P] -> [B, P] of length 1, float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def text_embeddings(
    graphdef: nnx.GraphDef,
    params: dict,
    token_ids: jax.Array,
) -> jax.Array:
    """The prompts' half of the score; it needs no gradient.

    Args:
      graphdef, params: a `CLIPModel`, as `models.init` or `models.abstract` give it.
      token_ids: int32 [B, L], padded to the model's max_position_embeddings.
    Returns:
      float32 [B, P], of length 1.
    """
    return normalise(nnx.merge(graphdef, params).text_features(token_ids))


def image_embeddings(
    graphdef: nnx.GraphDef,
    params: dict,
    images: jax.Array,
    *,
    pixels: Pixels = clip_pixels,
) -> jax.Array:
    """The pictures' half of the score.

    Args:
      graphdef, params: a `CLIPModel`, or its vision half.
      images: [B, H, W, 3] in [-1, 1].
      pixels: clip_pixels (training) or clip_pixels_rounded (evaluation).
    Returns: float32 [B, P], of length 1.
    """
    model = nnx.merge(graphdef, params)
    seen = pixels(images, size=model.config.vision_config.image_size)  # [B, S, S, 3]
    return normalise(model.image_features(seen))


def eight_bit_features(
    graphdef: nnx.GraphDef,
    params: dict,
    images: jax.Array,
) -> jax.Array:
    """`Reward.features` of a CLIP: the same view of an image for all, whatever they score by."""
    return image_embeddings(graphdef, params, images, pixels=clip_pixels_rounded)


def cosine(
    graphdef: nnx.GraphDef,
    pixels: Pixels,
    params: dict,
    images: jax.Array,
    token_ids: jax.Array,
) -> jax.Array:
    """Cosine between image and prompt, without the logit scale.

    Args: as of `image_embeddings` and `text_embeddings`.
    Returns: float32 [B] in [-1, 1]; differentiable with respect to the images, but for saturated
      pixels.
    """
    text = jax.lax.stop_gradient(text_embeddings(graphdef, params, token_ids))
    return jnp.sum(image_embeddings(graphdef, params, images, pixels=pixels) * text, axis=-1)


def read_config(folder: Path) -> dict:
    """config.json of a `CLIPModel`'s folder.

    Raises: UserError where it is missing, broken, or of another model.
    """
    config = folders.read_config(folder)
    found = model_class(config, str(folder / "config.json"))[0]
    if found is not CLIPModel:
        raise UserError(
            f"{folder} holds a {found.__name__}, expected a CLIPModel, with both towers; give the "
            "folder of one such as openai/clip-vit-base-patch32"
        )
    return config


def model_name(config: dict) -> str:
    """Such as ViT-B/32; the width in place of the letter for others.

    Args: config, of a `CLIPModel`.
    """
    vision = CLIPConfig.from_json(config).vision_config
    letter = _LETTERS.get(vision.hidden_size, vision.hidden_size)
    return f"ViT-{letter}/{vision.patch_size}"


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How one reward is read from a CLIP's folder and sees images.

    needed: the files of the folder, as `Entry.needed`.
    training, evaluation: from images to the model's pixels.
    arrange: of the stored tensors, for `weights.load`.
    config: of a folder without config.json; if None, there must be one.
    """

    needed: dict[str, str]
    training: Pixels = clip_pixels
    evaluation: Pixels = clip_pixels_rounded
    arrange: weights.Arrange = dict
    config: dict | None = None

    def read_config(self, folder: Path) -> dict:
        """As `Entry.read_config`."""
        if self.config is not None and not (folder / "config.json").is_file():
            return self.config
        return read_config(folder)

    def abstract(self, config: dict, options: Options) -> Reward:
        """As `Entry.abstract`. Args: config, of a `CLIPModel`."""
        return self._reward(abstract_port(_PORT, config, options))

    def load(
        self,
        folder: Path,
        options: Options,
    ) -> Reward:
        """As `Entry.load`.

        Raises: UserError for a folder without weights, or of another model.
        """
        config = self.read_config(folder)
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"no weights in {folder}; it must hold {listed(self.needed)}")
        model = abstract_port(_PORT, config, options)
        params = weights.load(folder, model.params, arrange=self.arrange)
        return self._reward(model._replace(params=params))

    def _reward(self, model: Model) -> Reward:
        length = CLIPConfig.from_json(model.config).text_config.max_position_embeddings
        return Reward(
            model.params,
            functools.partial(cosine, model.graphdef, self.training),
            functools.partial(cosine, model.graphdef, self.evaluation),
            None,
            jax.ShapeDtypeStruct((1, length), jnp.int32),
            functools.partial(eight_bit_features, model.graphdef),
        )


def _tokenizer(folder: Path, tokenizer: str) -> Tokenize:
    """As `Entry.tokenizer`."""
    del folder
    return Tokenizer(folders.resolve_tokenizer(tokenizer))


def entry(
    title: str,
    similarity: Similarity,
    **facts: Any,
) -> Entry:
    """The entry of a CLIP's cosine. Args: facts, others of `Entry`."""
    return Entry(
        title,
        load=similarity.load,
        abstract=similarity.abstract,
        tokenizer=_tokenizer,
        read_config=similarity.read_config,
        needed=similarity.needed,
        is_clip=True,
        uses_tokenizer=True,
        **facts,
    )
