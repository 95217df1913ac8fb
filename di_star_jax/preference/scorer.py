# SPDX-License-Identifier: Apache-2.0
"""The network that learns: what gives two pictures of a caption their scores, and how it is kept.

A `CLIPModel`, whose scores are exp(logit_scale) cos, or an ImageReward. B pairs; S, the network's
image size.
"""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax.errors import UserError
from di_star_jax.models import blip
from di_star_jax.models.blip import BLIPConfig, ImageReward
from di_star_jax.models.clip import CLIPConfig, CLIPModel
from di_star_jax.pipelines.folder import Model, Options, Port, abstract_port
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards import imagereward, similarity
from di_star_jax.rewards.pixels import CLIP_MEAN, CLIP_STD
from di_star_jax.storage import folders, weights

FILE = "model.safetensors"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Scorer(NamedTuple):
    """One network.

    model: params may be abstract.
    score: (params, pixels uint8 [B, 2, S, S, 3], prompts) -> float32 [B, 2].
    size: S.
    crop: which rows a centre crop cuts off, see preference/decode.py: "clip" or "torchvision".
    tokenize: B captions -> prompts, a tree of NumPy arrays [B, ...].
    config_name: of the file with `model.config`.
    beside: files that the folder of a reward has beside its weights.
    arrange: of the stored tensors, as of `weights.load`.
    """

    model: Model
    score: Callable[[Any, jax.Array, Any], jax.Array]
    size: int
    crop: str
    tokenize: Callable[[list[str]], Any]
    config_name: str = "config.json"
    beside: tuple[Path, ...] = ()
    arrange: weights.Arrange = dict


def normalised(pixels: jax.Array) -> jax.Array:
    """8-bit pixels as a CLIP or BLIP sees them: uint8 [..., 3] -> float32."""
    return (pixels.astype(jnp.float32) / 255.0 - CLIP_MEAN) / CLIP_STD


def both(pixels: jax.Array) -> jax.Array:
    """uint8 [B, 2, S, S, 3] -> float32 [2 B, S, S, 3], the pictures of a pair one after another."""
    return normalised(pixels).reshape(-1, *pixels.shape[2:])


def clip_scores(
    graphdef: nnx.GraphDef,
    params: dict,
    pixels: jax.Array,
    token_ids: jax.Array,
) -> jax.Array:
    """exp(logit_scale) cos of a `CLIPModel`, as `Scorer.score`. Args: token_ids, int32 [B, L].

    Source: PickScore's `clip_criterion.py`.
    """
    model = nnx.merge(graphdef, params)
    text = similarity.normalise(model.text_features(token_ids))  # [B, P]
    image = similarity.normalise(model.image_features(both(pixels)))  # [2 B, P]
    # A TPU would multiply in bfloat16, and exp(logit_scale) is 100.
    exact = jax.lax.Precision.HIGHEST
    cosine = jnp.einsum("bip,bp->bi", image.reshape(len(text), 2, -1), text, precision=exact)
    return jnp.exp(params["logit_scale"]) * cosine


def blip_scores(
    graphdef: nnx.GraphDef,
    params: dict,
    pixels: jax.Array,
    prompts: dict[str, jax.Array],
) -> jax.Array:
    """ImageReward's head, as `Scorer.score`, in the unit that it is trained in.

    Args: prompts, int32 [B, L] under token_ids and mask.
    """
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), prompts)
    scores = nnx.merge(graphdef, params)(both(pixels), twice["token_ids"], twice["mask"])
    return (scores * blip.STD + blip.MEAN).reshape(-1, 2)


def of_clip(
    model: Model,
    tokenize: Callable[[list[str]], Any],
    beside: tuple[Path, ...] = (),
) -> Scorer:
    """The scorer of a `CLIPModel`. Args: as of `Scorer`."""
    settings = CLIPConfig.from_json(model.config)
    score = functools.partial(clip_scores, model.graphdef)
    size = settings.vision_config.image_size
    return Scorer(model, score, size, "clip", tokenize, beside=beside)


def read(
    source: str,
    tokenizer: str,
    options: Options,
) -> Scorer:
    """The network in a folder, its parameters still abstract.

    Args: source, folder or Hub name of a `CLIPModel`, or folder of an ImageReward; tokenizer,
      folder or Hub name, of a CLIP.
    Raises: UserError for a folder that is neither, and a tokenizer that is not its.
    """
    folder = folders.resolve(source)
    if (folder / "med_config.json").is_file():
        return _read_imagereward(folder, options)
    config = similarity.read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"no weights in {folder}; it must hold model.safetensors of a CLIPModel, or give the "
            "folder of another one"
        )
    of_words = folders.resolve_tokenizer(tokenizer)
    tokenize = Tokenizer(of_words)
    tokenize.check_fits(CLIPConfig.from_json(config).text_config, "the text tower")
    model = abstract_port(Port(CLIPModel, CLIPConfig), config, options)
    return of_clip(model, tokenize, _there(of_words, _TOKENIZER))


def _read_imagereward(folder: Path, options: Options) -> Scorer:
    config = imagereward.read_config(folder)
    model = abstract_port(Port(ImageReward, BLIPConfig), config, options)
    settings = BLIPConfig.from_json(config)
    return Scorer(
        model,
        functools.partial(blip_scores, model.graphdef),
        settings.vision_config.image_size,
        "torchvision",
        imagereward.BertTokenizer(folder, settings.vocab_size),
        config_name="med_config.json",
        beside=_there(folder, ("vocab.txt",)),
        arrange=imagereward.used,
    )


def _there(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).is_file())


def load(
    scorer: Scorer,
    source: str,
    abstract: Any,
) -> Any:
    """Its parameters. Args: source, as of `read`; abstract, with dtypes and shardings."""
    return weights.load(folders.resolve(source), abstract, arrange=scorer.arrange)


def export(
    scorer: Scorer,
    params: Any,
    folder: Path,
    facts: str,
) -> None:
    """Writes a folder that is a reward: weights and config in transformers' layout.

    All processes must call it; the first one writes. Args: facts, what reward.json says.
    """
    whole = weights.whole_on_each_host(params)
    if jax.process_index() != 0:
        return
    with folders.new_folder(folder) as partial:
        weights.write_model(partial, whole, config=scorer.model.config, file_name=FILE)
        (partial / "config.json").rename(partial / scorer.config_name)
        (partial / "reward.json").write_text(facts, encoding="utf-8")
        for file in scorer.beside:
            shutil.copyfile(file, partial / file.name)


# What of it stays as it is.


def trainable(params: Any, fixed: float) -> Any:
    """1.0 where a parameter learns, else 0.0: a tree that broadcasts to `params`.

    Args: fixed, the share of each tower's blocks, from the pixels and words on, that stay; with
      them goes what is before the first block. 0 trains all.
    Source: ImageReward's `fix_rate`, HPSv2's locked groups.
    """

    def learns(path: tuple, leaf: Any) -> np.ndarray:
        names = [key.key for key in path]
        ones = np.ones([1] * len(leaf.shape), np.float32)
        if fixed and set(names) & _BEFORE:
            return 0.0 * ones
        blocks = weights.torch_keys(tuple(names), leaf)
        if not fixed or not isinstance(blocks, list):
            return ones
        rows = np.arange(len(blocks)) >= int(fixed * len(blocks))
        return rows.reshape(-1, *ones.shape[1:]) * ones

    return jax.tree_util.tree_map_with_path(learns, params)


_BEFORE = {"embeddings", "pre_layrnorm", "cls_token", "pos_embed", "patch_embed"}
