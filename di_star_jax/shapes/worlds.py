# SPDX-License-Identifier: Apache-2.0
"""The pipelines of the shapes world, one a family of models: what its pre-training must know."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax.models.t5 import mask_of
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines.family import DENOISER, Family, conditions
from di_star_jax.pipelines.pixart import PIXART
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.prompts.t5 import T5Tokenizer
from di_star_jax.prompts.tokens import Tokenizer, token_batch
from di_star_jax.shapes import networks, scenes, tokenizer
from di_star_jax.shapes.networks import RESOLUTION, TOKENS

# (graphdefs and parameters of the text encoders by component, token ids by tokenizer) -> by name,
# states [B, width] that each stand for a whole caption.
States = Callable[[dict, dict, dict[str, jax.Array]], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class World:
    """A pipeline of the shapes world.

    config: of its runs, by name.
    family: of its models.
    configs: config.json by component, of the text encoders without the tokenizer's numbers.
    numbers: what a vocabulary's size says of a text encoder's config.json.
    scheduler, index: scheduler_config.json and model_index.json.
    make_tokenizers: writes the tokenizers' folders into one; the vocabulary's size.
    tokenize: (that folder, captions) -> token ids [N, L] by tokenizer, as training reads them.
    states: of captions, see `States`.
    """

    config: str
    family: Family
    configs: dict[str, dict]
    numbers: Callable[[int], dict[str, int]]
    scheduler: dict[str, Any]
    index: dict[str, Any]
    make_tokenizers: Callable[[Path], int]
    tokenize: Callable[[Path, list[str]], dict[str, np.ndarray]]
    states: States

    def text_configs(self, vocab_size: int) -> dict[str, dict]:
        """config.json of the text encoders by component. Args: of `make_tokenizers`."""
        return {
            name: self.configs[name] | self.numbers(vocab_size)
            for name in self.family.tokenizers.values()
        }


class Reader(NamedTuple):
    """What a world's networks read of captions.

    graphdefs: by component. null_ids: int32 [1, L] of "", by tokenizer.
    """

    world: World
    graphdefs: dict[str, nnx.GraphDef]
    null_ids: dict[str, np.ndarray]

    def conditions(
        self,
        params: dict[str, Any],
        token_ids: dict[str, jax.Array],
    ) -> tuple[Condition, Condition]:
        """(condition, null condition) of B captions. Args: token_ids, [B, L] by tokenizer."""
        family = self.world.family
        text = family.encode_text(self.graphdefs, params, token_ids)
        of_empty = None
        if not family.null_is_zero:
            of_empty = family.encode_text(self.graphdefs, params, self.null_ids)
        return conditions(family, text, of_empty, RESOLUTION)

    def states(
        self,
        params: dict[str, Any],
        token_ids: dict[str, jax.Array],
    ) -> dict[str, jax.Array]:
        """As `States`."""
        return self.world.states(self.graphdefs, params, token_ids)


class Captions(NamedTuple):
    """A world's captions. ids, null_ids: int32 [N, L] and, of "", [1, L], by tokenizer."""

    world: World
    ids: dict[str, np.ndarray]
    null_ids: dict[str, np.ndarray]

    def reader(self, graphdefs: dict[str, nnx.GraphDef]) -> Reader:
        """Args: graphdefs, by component."""
        return Reader(self.world, graphdefs, self.null_ids)


def tokenized(
    world: World,
    folder: Path,
    captions: list[str],
) -> Captions:
    """Captions as the tokenizers in a folder make them."""
    return Captions(world, world.tokenize(folder, captions), world.tokenize(folder, [""]))


def _make_clip_tokenizers(folder: Path) -> int:
    words = scenes.words()
    for name, pad_token in (("tokenizer", tokenizer.END), ("tokenizer_2", "!")):
        size = tokenizer.make_word_tokenizer(
            words, folder / name, max_length=TOKENS, pad_token=pad_token
        )
    return size


def _clip_ids(folder: Path, captions: list[str]) -> dict[str, np.ndarray]:
    return token_batch(captions, {name: Tokenizer(folder / name) for name in SDXL.tokenizers})


def _clip_states(
    graphdefs: dict,
    params: dict,
    token_ids: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Both encoders' states of the end of text, and the second's pooled one."""
    states = {}
    for name, part in SDXL.tokenizers.items():
        out = nnx.merge(graphdefs[part], params[part])(token_ids[name])
        end = token_ids[name].argmax(axis=-1)  # the end-of-text token has the largest id
        states[part] = out.hidden_states_penultimate[jnp.arange(len(end)), end]
    return states | {"pooled": out.pooled}


def _make_t5_tokenizer(folder: Path) -> int:
    return tokenizer.make_word_pieces(scenes.words(), folder / "tokenizer")


def _t5_ids(folder: Path, captions: list[str]) -> dict[str, np.ndarray]:
    """Without the pads that all captions have: nothing sees them, and they are five of six."""
    ids = T5Tokenizer(folder / "tokenizer")(captions)
    longest = TOKENS - 1  # T5 has no token for the start
    assert not ids[:, longest:].any(), "a caption is longer than the longest"
    return {"tokenizer": ids[:, :longest]}


def _t5_states(
    graphdefs: dict,
    params: dict,
    token_ids: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """The state of the end of text."""
    ids = token_ids["tokenizer"]
    mask = mask_of(ids)
    out = nnx.merge(graphdefs["text_encoder"], params["text_encoder"])(ids, mask)
    return {"text_encoder": out[jnp.arange(len(ids)), mask.sum(axis=-1) - 1]}


SDXL_WORLD = World(
    config="shapes",
    family=SDXL,
    configs={
        DENOISER: networks.UNET,
        "text_encoder": networks.TEXT_ENCODER,
        "text_encoder_2": networks.TEXT_ENCODER_2,
    },
    numbers=networks.special,
    scheduler=networks.SCHEDULER,
    index=networks.MODEL_INDEX,
    make_tokenizers=_make_clip_tokenizers,
    tokenize=_clip_ids,
    states=_clip_states,
)
PIXART_WORLD = World(
    config="shapes_pixart",
    family=PIXART,
    configs={DENOISER: networks.PIXART, "text_encoder": networks.T5},
    numbers=lambda vocab_size: {"vocab_size": vocab_size},
    scheduler=networks.PIXART_SCHEDULER,
    index=networks.PIXART_INDEX,
    make_tokenizers=_make_t5_tokenizer,
    tokenize=_t5_ids,
    states=_t5_states,
)
WORLDS = {"sdxl": SDXL_WORLD, "pixart": PIXART_WORLD}
