# SPDX-License-Identifier: Apache-2.0
"""A diffusers folder as models: configs, graphs, parameters, tokenizers, schedule, and text to
Condition.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax import models
from di_star_jax.diffusion import Schedule, schedule_from_json
from di_star_jax.errors import UserError
from di_star_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)
from di_star_jax.models.unet import Condition, UNet2DConditionModel, UNetConfig
from di_star_jax.models.vae import AutoencoderKL, VAEConfig
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.storage import weights

_CLASSES = {
    "UNet2DConditionModel": (UNet2DConditionModel, UNetConfig),
    "AutoencoderKL": (AutoencoderKL, VAEConfig),
    "CLIPTextModel": (CLIPTextModel, CLIPTextConfig),
    "CLIPTextModelWithProjection": (CLIPTextModelWithProjection, CLIPTextConfig),
    "CLIPModel": (CLIPModel, CLIPConfig),
    "CLIPVisionModelWithProjection": (CLIPVisionModelWithProjection, CLIPConfig),
}


class Model(NamedTuple):
    """One network: `nnx.merge(graphdef, params)` runs it; `config` is its folder's config.json."""

    graphdef: nnx.GraphDef
    params: Any
    config: dict


class Pipeline(NamedTuple):
    """A diffusers pipeline folder.

    `models` holds unet, vae, text_encoder and, for SDXL, text_encoder_2.
    """

    folder: Path
    models: dict[str, Model]
    tokenizers: dict[str, Tokenizer]
    schedule: Schedule
    scheduler_config: dict

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return vae_scale(self.models["vae"].config)


def vae_scale(config: dict) -> int:
    """Image pixels per latent pixel, along one side. Args: the VAE's config.json."""
    return VAEConfig.from_json(config).scale


def model_class(config: dict) -> tuple[type, Any]:
    """The module's class and its frozen settings.

    Args: a parsed config.json. Raises: UserError for what is not ported.
    """
    name = config.get("_class_name") or (config.get("architectures") or ["nothing"])[0]
    if name not in _CLASSES:
        raise UserError(f"config.json describes {name}, expected one of {', '.join(_CLASSES)}")
    cls, config_cls = _CLASSES[name]
    return cls, config_cls.from_json(config)


def abstract_model(
    config: dict, *, dtype=jnp.float32, remat: str = "none", kernel: str = "xla"
) -> Model:
    """A model from its config.json without allocating it; params are `jax.ShapeDtypeStruct`.

    Args:
      config: with `_class_name` (diffusers) or `architectures` (transformers).
      dtype: compute dtype.
      remat: what blocks keep for the backward pass, a key of models.layers.REMAT.
      kernel: of long self-attention, see models/attention.py.
    Raises: UserError for a class or a setting that is not ported.
    """
    cls, settings = model_class(config)
    # CLIP's attention is short, and in the text encoders masked.
    options = (
        {"remat": remat} if cls.__name__.startswith("CLIP") else {"remat": remat, "kernel": kernel}
    )
    return Model(
        *models.abstract(lambda rngs: cls(settings, rngs=rngs, dtype=dtype, **options)), config
    )


def load_model(
    folder: Path,
    *,
    config: dict | None = None,
    arrange: weights.Arrange | None = None,
    shardings=None,
    param_dtype=jnp.float32,
    **options,
) -> Model:
    """Reads one model folder.

    Args:
      folder: with safetensors, and a config.json unless `config` is given.
      arrange: of the stored tensors, as in `weights.load`.
      shardings: function from the abstract parameter tree to a tree of shardings, or None for the
        default device.
      param_dtype: of the parameters in memory.
      options: dtype, remat, kernel, as in `abstract_model`.
    Raises: UserError for whatever is wrong with the folder.
    """
    model = abstract_model(weights.read_config(folder) if config is None else config, **options)
    params = weights.load(
        folder,
        model.params,
        dtype=param_dtype,
        arrange=arrange,
        shardings=None if shardings is None else shardings(model.params),
    )
    return model._replace(params=params)


def load_pipeline(folder: Path, *, options: dict[str, dict] | None = None, **common) -> Pipeline:
    """Reads a pipeline folder.

    Args: options, by component as in `abstract_model`; common: others of `load_model`.
    """
    index = weights.read_config(folder, name="model_index.json")
    parts = [
        p for p in ("unet", "vae", "text_encoder", "text_encoder_2") if index.get(p, [None])[0]
    ]
    loaded = {
        part: load_model(folder / part, **(options or {}).get(part, {}), **common) for part in parts
    }
    tokenizers = {
        p: Tokenizer(folder / p) for p in ("tokenizer", "tokenizer_2") if index.get(p, [None])[0]
    }
    scheduler = weights.read_config(folder, "scheduler", "scheduler_config.json")
    return Pipeline(folder, loaded, tokenizers, schedule_from_json(scheduler), scheduler)


def encode_text(
    graphdefs: dict[str, nnx.GraphDef],
    params: dict,
    token_ids: dict[str, jax.Array],
    resolution: int,
) -> tuple[Condition, Condition]:
    """SDXL's condition of a batch of prompts, and its null condition.

    Args:
      graphdefs, params: hold 'text_encoder' and 'text_encoder_2'.
      token_ids: int32 [B, L] under 'tokenizer' and 'tokenizer_2'.
      resolution: image height and width, pixels; also given as original and target size, with no
        crop.
    Returns:
      (condition, null): contexts [B, L, 768 + 1280] float32; null has zeros for context and pooled
      text, as SDXL's pipeline does when no negative prompt is given.
    """
    first = nnx.merge(graphdefs["text_encoder"], params["text_encoder"])(token_ids["tokenizer"])
    second = nnx.merge(graphdefs["text_encoder_2"], params["text_encoder_2"])(
        token_ids["tokenizer_2"]
    )
    context = jnp.concatenate(
        [first.hidden_states_penultimate, second.hidden_states_penultimate], axis=-1
    )
    sizes = jnp.array([resolution, resolution, 0, 0, resolution, resolution], jnp.float32)
    condition = Condition(
        context.astype(jnp.float32),
        second.pooled.astype(jnp.float32),
        jnp.broadcast_to(sizes[None], (context.shape[0], 6)),
    )
    return condition, null_of(condition)


def null_of(condition: Condition) -> Condition:
    """Zeros for context and pooled text, the same time ids: what SDXL takes for 'no prompt'."""
    return condition._replace(
        context=jnp.zeros_like(condition.context), pooled=jnp.zeros_like(condition.pooled)
    )
