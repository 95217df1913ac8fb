# SPDX-License-Identifier: Apache-2.0
"""ImageReward v1.0 (arXiv 2304.05977): BLIP with a head that was trained on people's rankings.

Normalised, about -2 to 2. Source: THUDM/ImageReward.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax.errors import UserError
from di_star_jax.models.blip import BLIPConfig, ImageReward
from di_star_jax.pipelines.folder import Options, Port, abstract_port
from di_star_jax.prompts.tokens import read_tokenizer
from di_star_jax.rewards.pixels import Pixels, torchvision_pixels, torchvision_pixels_rounded
from di_star_jax.rewards.reward import Entry, Reward, listed
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


def _encoded(tokenizer: Any, prompts: list[str]) -> Any:
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH)


def _ids(tokenizer: Any, prompts: list[str]) -> np.ndarray:
    return np.array(_encoded(tokenizer, prompts)["input_ids"], np.int32)


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
        file = folder / "vocab.txt"
        try:
            with file.open(encoding="utf-8") as lines:
                tokens = [line.rstrip("\n") for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read {file} ({error}); take vocab.txt {NEEDED['vocab.txt']}"
            ) from None
        if len(tokens) != vocab_size - 2 or "[CLS]" not in tokens:
            raise UserError(
                f"{file} has {len(tokens)} tokens, expected the model's {vocab_size - 2} with "
                f"[CLS] among them; take vocab.txt {NEEDED['vocab.txt']}"
            )
        self._tokenizer = read_tokenizer("BertTokenizer", folder, _ids, do_lower_case=True)

    def __call__(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """Token ids and where they are no padding: int32 [B, 35] under token_ids and mask."""
        encoded = _encoded(self._tokenizer, prompts)
        return {
            "token_ids": np.array(encoded["input_ids"], np.int32),
            "mask": np.array(encoded["attention_mask"], np.int32),
        }


def score(
    graphdef: nnx.GraphDef,
    pixels: Pixels,
    params: dict,
    images: jax.Array,
    prompts: dict,
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
    seen = pixels(images, size=model.config.vision_config.image_size)  # [B, S, S, 3]
    return model(seen, prompts["token_ids"], prompts["mask"])


def abstract(config: dict, options: Options) -> Reward:
    """As `Entry.abstract`. Args: config, of `BLIPConfig.from_json`, such as PUBLISHED."""
    model = abstract_port(_PORT, config, options)
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return Reward(
        model.params,
        functools.partial(score, model.graphdef, torchvision_pixels),
        functools.partial(score, model.graphdef, torchvision_pixels_rounded),
        None,
        {"token_ids": ids, "mask": ids},
    )


def used(stored: dict) -> dict:
    """Leaves out the projections of BLIP's pretraining, which the score does not use."""
    return {name: tensor for name, tensor in stored.items() if name.startswith(_USED)}


def _check_files(folder: Path, names: Iterable[str]) -> None:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give one with {', '.join(NEEDED)}")
    missing = {name: NEEDED[name] for name in names if not (folder / name).is_file()}
    # `weights.load` knows what to say of weights under another name.
    if any(path.suffix in (".safetensors", ".pt") for path in folder.iterdir()):
        missing.pop("model.safetensors", None)
    if missing:
        raise UserError(f"{folder} lacks {listed(missing)}")


def read_config(folder: Path) -> dict:
    """The folder's med_config.json. Raises: UserError where it is missing or broken."""
    _check_files(folder, ["med_config.json"])
    config = folders.read_config(folder, name="med_config.json")
    BLIPConfig.from_json(config, str(folder / "med_config.json"))
    return config


def load(
    folder: Path,
    options: Options,
) -> Reward:
    """As `Entry.load`, from a folder with ImageReward.pt's tensors under their names.

    Raises: UserError for whatever is wrong with the folder.
    """
    _check_files(folder, NEEDED)
    reward = abstract(read_config(folder), options)
    return reward._replace(params=weights.load(folder, reward.params, arrange=used))


def load_tokenizer(folder: Path, tokenizer: str) -> BertTokenizer:
    """As `Entry.tokenizer`. Args: tokenizer, CLIP's, of other rewards."""
    del tokenizer
    _check_files(folder, NEEDED)
    return BertTokenizer(folder, BLIPConfig.from_json(read_config(folder)).vocab_size)


ENTRY = Entry(
    "ImageReward",
    load=load,
    tokenizer=load_tokenizer,
    abstract=abstract,
    read_config=read_config,
    needed=NEEDED,
    weights="./weights/imagereward",
    published=PUBLISHED,
    digits=3,
)
