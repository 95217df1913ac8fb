# SPDX-License-Identifier: Apache-2.0
"""CLIP: SDXL's text encoders, and the two-tower model that PickScore is.

Dims: B batch, L text tokens, N image tokens (1 + patches), D width, P width of the joint space, S
image size. Paths are the keys of the hub's files, which all begin with `text_model.`; transformers
>= 5 writes a plain CLIPTextModel without that prefix and reads both.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.models import layers
from di_star_jax.models.attention import attention
from di_star_jax.models.config import TRANSFORMERS, Fields, check_divides, from_json, shown


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * nnx.sigmoid(1.702 * x)


_ACTIVATIONS = {"gelu": layers.gelu, "quick_gelu": quick_gelu}


# What is made of the fields of config.json that the classes below do not have.
FIELDS = Fields(fixed={"pruned_heads": ({},)}, harmless=TRANSFORMERS, file="CLIP config.json")
# The vision tower's own is not that of the joint space, which the whole model's config has.
VISION_FIELDS = dataclasses.replace(FIELDS, harmless=TRANSFORMERS | {"projection_dim"})
# Read by `CLIPConfig.from_json`, see `_sub_config`.
JOINT_FIELDS = dataclasses.replace(
    FIELDS, harmless=TRANSFORMERS | {"text_config_dict", "vision_config_dict"}
)


def _check_model_type(
    config: dict,
    expected: str,
    file: str,
) -> None:
    found = config.get("model_type", expected)
    if found != expected:
        raise UserError(
            f"wrong architecture: {file} has model_type={shown(found)}, expected {expected!r}; "
            "give the folder of a CLIP model"
        )


def _check_tower(config: "CLIPTextConfig | CLIPVisionConfig", file: str) -> None:
    """Raises: UserError for a tower that the port does not have."""
    if config.hidden_act not in _ACTIVATIONS:
        raise UserError(
            f"{file} has hidden_act={config.hidden_act!r}, the port implements "
            f"{list(_ACTIVATIONS)} only"
        )
    check_divides(config, "hidden_size", "num_attention_heads", file)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of a text encoder's config.json that matter, with transformers' defaults for what
    it leaves out.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @property
    def tokens(self) -> int:
        """Of a prompt."""
        return self.max_position_embeddings

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "CLIPTextConfig":
        """Args: the parsed config.json; its path, for errors.

        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        _check_model_type(config, "clip_text_model", file)
        built = from_json(cls, config, FIELDS, file)
        _check_tower(built, file)
        return built


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The fields of a vision tower's config that matter, with transformers' defaults for what it
    leaves out.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "CLIPVisionConfig":
        """Args: the parsed dict; its file's path, for errors.

        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        for field in ("image_size", "patch_size"):
            sides = config.get(field)
            if isinstance(sides, list) and len(set(map(str, sides))) > 1:
                raise UserError(
                    f"{file} has {field}={shown(sides)}, the port implements squares only; "
                    "give one integer"
                )
        _check_model_type(config, "clip_vision_model", file)
        built = from_json(cls, config, VISION_FIELDS, file)
        _check_tower(built, file)
        if built.patch_size > built.image_size:
            raise UserError(
                f"{file} has patch_size={built.patch_size}, expected at most "
                f"image_size={built.image_size}"
            )
        return built


def _sub_config(
    config: dict,
    name: str,
    file: str,
) -> dict:
    """`text_config` or `vision_config`; where an old file also has a `*_dict`, transformers lets
    that one win.
    """
    field = name + "_dict" if config.get(name + "_dict") else name
    found = config.get(field)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{file} has {field}={shown(found)}, expected an object")
    return found


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The fields of a CLIPModel's config.json that matter, with transformers' defaults for what it
    leaves out.
    """

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "CLIPConfig":
        """Args: the parsed config.json; its path, for errors.

        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        _check_model_type(config, "clip", file)
        text, vision = (
            _sub_config(config, name, file) for name in ("text_config", "vision_config")
        )
        towers = {
            "text_config": CLIPTextConfig.from_json(text, f"text_config of {file}"),
            "vision_config": CLIPVisionConfig.from_json(vision, f"vision_config of {file}"),
        }
        return from_json(cls, config | towers, JOINT_FIELDS, file)


class TextOutput(NamedTuple):
    """What a text encoder returns.

    hidden_states_penultimate: [B, L, D] input of the last layer, before the final layer norm:
      torch's `hidden_states[-2]`, what SDXL's cross-attention sees.
    last_hidden_state: [B, L, D] after the final layer norm.
    pooled: [B, D] last_hidden_state at the end-of-text token; [B, P] where the model has a
      projection.
    """

    hidden_states_penultimate: jax.Array
    last_hidden_state: jax.Array
    pooled: jax.Array


class CLIPAttention(nnx.Module):
    """Multi-head self-attention of [B, N, D], with biases. Source: transformers `CLIPAttention`."""

    def __init__(self, config, **kw):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = layers.Linear(width, width, **kw)
        self.k_proj = layers.Linear(width, width, **kw)
        self.v_proj = layers.Linear(width, width, **kw)
        self.out_proj = layers.Linear(width, width, **kw)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        split = (*x.shape[:2], self.heads, -1)  # [B, N, heads, D / heads]
        q = self.q_proj(x).reshape(split)
        k = self.k_proj(x).reshape(split)
        v = self.v_proj(x).reshape(split)
        return self.out_proj(attention(q, k, v, mask=mask).reshape(x.shape))


class CLIPMLP(nnx.Module):
    """[B, N, D] -> [B, N, D] through the intermediate width. Source: transformers `CLIPMLP`."""

    def __init__(self, config, **kw):
        self.activation = config.hidden_act
        self.fc1 = layers.Linear(config.hidden_size, config.intermediate_size, **kw)
        self.fc2 = layers.Linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """Attention and MLP, each normalised before and residual.

    Source: transformers `CLIPEncoderLayer`.
    """

    def __init__(self, config, **kw):
        self.layer_norm1 = layers.layer_norm(config, **kw)
        self.self_attn = CLIPAttention(config, **kw)
        self.layer_norm2 = layers.layer_norm(config, **kw)
        self.mlp = CLIPMLP(config, **kw)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """The stacked layers: [B, N, D] -> (input of the last layer, its output), [B, N, D] each."""

    def __init__(
        self,
        config,
        *,
        rngs: nnx.Rngs,
        dtype,
        remat: str,
    ):
        self.remat = remat
        self.layers = layers.stacked(
            lambda rngs: CLIPEncoderLayer(config, rngs=rngs, dtype=dtype),
            config.num_hidden_layers,
            rngs,
        )

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        graphdef, params = nnx.split(self.layers)

        def body(carry, params, mask):
            _, x = carry
            layer = nnx.merge(graphdef, params)
            return x, layers.checkpointed(layer, x, mask, remat=self.remat)

        return layers.over_blocks(body, (x, x), params, mask, remat=self.remat)


class CLIPTextEmbeddings(nnx.Module):
    """[B, L] token ids -> [B, L, D]: token plus position.

    Source: transformers `CLIPTextEmbeddings`.
    """

    def __init__(self, config: CLIPTextConfig, **kw):
        width = config.hidden_size
        self.token_embedding = layers.embed(config.vocab_size, width, **kw)
        self.position_embedding = layers.embed(config.max_position_embeddings, width, **kw)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        length, limit = token_ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise UserError(
                f"got {length} token ids per prompt, the text encoder takes at most {limit}; "
                "truncate them"
            )
        return self.token_embedding(token_ids) + self.position_embedding(jnp.arange(length))[None]


class CLIPTextTransformer(nnx.Module):
    """[B, L] token ids -> TextOutput, without projection. Source: transformers' `text_model`."""

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        remat: str,
        **kw,
    ):
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config, **kw)
        self.encoder = CLIPEncoder(config, remat=remat, **kw)
        self.final_layer_norm = layers.layer_norm(config, **kw)

    def _end_of_text(self, token_ids: jax.Array) -> jax.Array:
        """[B] position to pool at.

        Old configs say 2, which no prompt holds: there, the largest id is the end.
        """
        if self.eos_token_id == 2:
            return jnp.argmax(token_ids, axis=1)
        # The first, for padding may be the same token.
        return jnp.argmax(token_ids == self.eos_token_id, axis=1)

    def __call__(self, token_ids: jax.Array) -> TextOutput:
        causal = jnp.tri(token_ids.shape[1], dtype=bool)[None, None]  # [1, 1, L, L]
        penultimate, last = self.encoder(self.embeddings(token_ids), causal)
        last = self.final_layer_norm(last)
        rows = jnp.arange(last.shape[0])
        pooled = last[rows, self._end_of_text(token_ids)]  # [B, D]
        return TextOutput(penultimate, last, pooled)


class CLIPVisionEmbeddings(nnx.Module):
    """[B, S, S, 3] -> [B, N, D]: class token, patches, positions.

    Source: transformers `CLIPVisionEmbeddings`.
    """

    def __init__(
        self,
        config: CLIPVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        width = config.hidden_size
        patch = config.patch_size
        channels = config.num_channels
        self.shape = (config.image_size, config.image_size, channels)
        self.dtype = dtype
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        self.patch_embedding = layers.Conv(
            channels, width, patch, stride=patch, use_bias=False, **kw
        )
        count = 1 + (config.image_size // patch) ** 2
        self.position_embedding = layers.embed(count, width, **kw)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        if pixels.shape[1:] != self.shape:
            raise UserError(
                f"got pixels {pixels.shape[1:]}, the CLIP model takes {self.shape}; "
                "resize them first"
            )
        batch = pixels.shape[0]
        width = self.patch_embedding.out_features
        patches = self.patch_embedding(pixels).reshape(batch, -1, width)  # [B, N-1, D]
        token = sharding.gather_param(self.class_embedding[...], (width,), self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), patches], axis=1)
        return x + self.position_embedding(jnp.arange(x.shape[1]))[None]  # [B, N, D]


class CLIPVisionTransformer(nnx.Module):
    """[B, S, S, 3] CLIP-normalised pixels -> [B, D]. Source: transformers' `vision_model`."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        *,
        remat: str,
        **kw,
    ):
        self.embeddings = CLIPVisionEmbeddings(config, **kw)
        self.pre_layrnorm = layers.layer_norm(config, **kw)
        self.encoder = CLIPEncoder(config, remat=remat, **kw)
        self.post_layernorm = layers.layer_norm(config, **kw)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        _, x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), None)
        return self.post_layernorm(x[:, 0])  # [B, D]


def _projection(
    tower: CLIPTextConfig | CLIPVisionConfig,
    width: int,
    **kw,
) -> layers.Linear:
    """From a tower's width to the joint space."""
    return layers.Linear(tower.hidden_size, width, use_bias=False, **kw)


class CLIPTextModel(nnx.Module):
    """SDXL's first text encoder; `pooled` is not projected.

    Source: transformers `CLIPTextModel`.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
    ):
        self.config = config
        self.text_model = CLIPTextTransformer(config, remat=remat, rngs=rngs, dtype=dtype)

    def __call__(self, token_ids: jax.Array) -> TextOutput:
        """Args: token_ids, int32 [B, L]. Raises: UserError for more tokens than positions."""
        return self.text_model(token_ids)


class CLIPTextModelWithProjection(nnx.Module):
    """SDXL's second text encoder; `pooled` is projected.

    Source: transformers `CLIPTextModelWithProjection`.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
    ):
        kw = {"rngs": rngs, "dtype": dtype}
        self.config = config
        self.text_model = CLIPTextTransformer(config, remat=remat, **kw)
        self.text_projection = _projection(config, config.projection_dim, **kw)

    def __call__(self, token_ids: jax.Array) -> TextOutput:
        """Args: token_ids, int32 [B, L]. Raises: UserError for more tokens than positions."""
        output = self.text_model(token_ids)
        return output._replace(pooled=self.text_projection(output.pooled))


class CLIPModel(nnx.Module):
    """Both towers with projections to one space, and the logarithm of the logits' scale.

    Source: transformers `CLIPModel`.
    """

    def __init__(
        self,
        config: CLIPConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
    ):
        kw = {"rngs": rngs, "dtype": dtype}
        width = config.projection_dim
        self.config = config
        self.text_model = CLIPTextTransformer(config.text_config, remat=remat, **kw)
        self.vision_model = CLIPVisionTransformer(config.vision_config, remat=remat, **kw)
        self.visual_projection = _projection(config.vision_config, width, **kw)
        self.text_projection = _projection(config.text_config, width, **kw)
        self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init_value))

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """CLIP-normalised pixels [B, S, S, 3] -> [B, P], not normalised.

        Raises: UserError for another size.
        """
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, token_ids: jax.Array) -> jax.Array:
        """Token ids, int32 [B, L] -> [B, P], not normalised.

        Raises: UserError for more tokens than positions.
        """
        return self.text_projection(self.text_model(token_ids).pooled)


class CLIPVisionModelWithProjection(nnx.Module):
    """The vision half of a `CLIPModel`. Source: transformers `CLIPVisionModelWithProjection`."""

    def __init__(
        self,
        config: CLIPConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
    ):
        kw = {"rngs": rngs, "dtype": dtype}
        vision = config.vision_config
        self.config = config
        self.vision_model = CLIPVisionTransformer(vision, remat=remat, **kw)
        self.visual_projection = _projection(vision, config.projection_dim, **kw)

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """As `CLIPModel.image_features`."""
        return self.visual_projection(self.vision_model(pixels))
