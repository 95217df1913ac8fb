# SPDX-License-Identifier: Apache-2.0
"""ImageReward v1.0 (arXiv 2304.05977): BLIP with a head that was trained on people's rankings.

Normalised, about -2 to 2. Source: THUDM/ImageReward.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax.errors import UserError
from di_star_jax.models.blip import BLIPConfig, ImageReward
from di_star_jax.pipelines.folder import PLAIN, Model, Options, Port, abstract_port
from di_star_jax.rewards.pixels import Pixels, torchvision_pixels, torchvision_pixels_rounded
from di_star_jax.rewards.reward import Reward, Tokenize
from di_star_jax.storage import folders, weights

LENGTH = 35  # tokens; ImageReward pads and cuts every prompt to it
# The published med_config.json, but for what concerns training.
PUBLISHED = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}
_PORT = Port(ImageReward, BLIPConfig)
_USED = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
NEEDED = {
    "model.safetensors": "ImageReward.pt of THUDM/ImageReward on the Hub, converted once with "
    "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')",
    "med_config.json": "from THUDM/ImageReward on the Hub",
    "vocab.txt": "from google-bert/bert-base-uncased on the Hub",
}


class BertTokenizer:
    """BERT's uncased WordPiece tokenizer, padded and cut to 35 tokens.

    Source: transformers `BertTokenizer`.

    Args:
      folder: with vocab.txt.
      vocab_size: of the model: BERT's and two, for BLIP added [DEC] and [ENC], which prompts never
        have.
    Raises: UserError for another vocabulary than the model's.
    """

    def __init__(self, folder: Path, vocab_size: int):
        from transformers import BertTokenizer as Tokenizer

        with (folder / "vocab.txt").open(encoding="utf-8") as file:
            tokens = [line.rstrip("\n") for line in file]
        if len(tokens) != vocab_size - 2 or "[CLS]" not in tokens:
            raise UserError(
                f"{folder / 'vocab.txt'} has {len(tokens)} tokens, expected the model's {vocab_size - 2} with "
                f"[CLS] among them; take vocab.txt {NEEDED['vocab.txt']}"
            )
        self._tokenizer = Tokenizer.from_pretrained(folder, do_lower_case=True)

    def __call__(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """Token ids and where they are no padding: int32 [B, 35] under token_ids and mask."""
        encoded = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH)
        return {
            "token_ids": np.array(encoded["input_ids"], np.int32),
            "mask": np.array(encoded["attention_mask"], np.int32),
        }

    def count_truncated(self, prompts: list[str]) -> int:
        """How many prompts lose words to the limit."""
        return sum(len(ids) > LENGTH for ids in self._tokenizer(prompts)["input_ids"])


def score(
    graphdef: nnx.GraphDef, pixels: Pixels, params: dict, images: jax.Array, prompts: dict
) -> jax.Array:
    """ImageReward of images for their prompts.

    Args:
      graphdef, params: an `ImageReward`, as `models.init` or `models.abstract` give it.
      pixels: torchvision_pixels (training) or torchvision_pixels_rounded (evaluation).
      images: [B, H, W, 3] in [-1, 1].
      prompts: int32 [B, 35] under token_ids and mask.
    Returns: float32 [B]; differentiable with respect to the images, but for saturated pixels.
    """
    model = nnx.merge(graphdef, params)
    return model(
        pixels(images, size=model.config.vision_config.image_size),
        prompts["token_ids"],
        prompts["mask"],
    )


def _reward_of(model: Model, tokenize: Tokenize | None) -> Reward:
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return Reward(
        model.params,
        functools.partial(score, model.graphdef, torchvision_pixels),
        functools.partial(score, model.graphdef, torchvision_pixels_rounded),
        tokenize,
        {"token_ids": ids, "mask": ids},
    )


def _used(stored: dict) -> dict:
    """Without the projections of BLIP's pretraining, which ImageReward's file has and its score
    does not use.
    """
    return {name: tensor for name, tensor in stored.items() if name.startswith(_USED)}


def _check_files(folder: Path, names: Iterable[str]) -> None:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give one with {', '.join(NEEDED)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if any(folder.glob("*.safetensors")) or any(
        folder.glob("*.pt")
    ):  # `weights.load` knows what to say of these
        missing = [name for name in missing if name != "model.safetensors"]
    if missing:
        raise UserError(
            f"{folder} lacks " + "; ".join(f"{name} ({NEEDED[name]})" for name in missing)
        )


def read_config(folder: Path) -> dict:
    """The folder's med_config.json. Raises: UserError where it is missing or broken."""
    _check_files(folder, ["med_config.json"])
    return folders.read_config(folder, name="med_config.json")


def abstract(config: dict, options: Options = PLAIN) -> Reward:
    """Shapes alone.

    Args: config, of `BLIPConfig.from_json`, such as PUBLISHED.
    Raises: UserError for a setting that is not ported.
    """
    return _reward_of(abstract_port(_PORT, config, options), None)


def load(folder: Path, options: Options = PLAIN, *, tokenizer: str | Path) -> Reward:
    """From a folder with ImageReward's weights as safetensors, its med_config.json, and BERT's
    vocab.txt.

    Args:
      folder: model.safetensors in it holds ImageReward.pt's tensors under their names.
      tokenizer: CLIP's, for other rewards.
    Raises: UserError for whatever is wrong with the folder.
    """
    del tokenizer
    _check_files(folder, NEEDED)
    model = abstract_port(_PORT, read_config(folder), options)
    tokenize = BertTokenizer(folder, nnx.merge(model.graphdef, model.params).config.vocab_size)
    params = weights.load(folder, model.params, arrange=_used)
    return _reward_of(model._replace(params=params), tokenize)
