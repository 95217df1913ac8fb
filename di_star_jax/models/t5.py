# SPDX-License-Identifier: Apache-2.0
"""T5 v1.1's encoder, PixArt's text encoder.

Dims: B batch, L tokens, D width of the tokens, H heads, K width of a head. Paths are the keys of
the hub's files, but for the relative bias: they keep it in the first block, whose weights it is
none of, and here it stands beside the blocks, see weights.torch_keys.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.models import layers
from di_star_jax.models.config import TRANSFORMERS, Fields, from_json, shown

_OTHERS = """
    classifier_dropout dropout_rate n_positions num_decoder_layers output_past
    scale_decoder_outputs
"""
FIELDS = Fields(
    fixed={
        "dense_act_fn": ("gelu_new",),
        "is_gated_act": (True,),
        "pad_token_id": (0,),  # see `mask_of`
        "eos_token_id": (1,),
    },
    harmless=TRANSFORMERS - {"pad_token_id"} | frozenset(_OTHERS.split()),
    file="T5 config.json",
)
_MOST_BUCKETS = 1024


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The fields of a T5 encoder's config.json that matter, with transformers' defaults for what it
    leaves out; the default feed_forward_proj is that of the first T5, which is not ported.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @property
    def tokens(self) -> int:
        """Of a prompt: PixArt-alpha's, for T5 itself knows no end."""
        return 120

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "T5Config":
        """Args: the parsed config.json; its path, for errors.

        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        model_type = config.get("model_type", "t5")
        if model_type != "t5":
            raise UserError(
                f"wrong architecture: {file} has model_type={shown(model_type)}, expected 't5'; "
                "give the folder of a T5 v1.1 encoder"
            )
        built = from_json(cls, config, FIELDS, file)
        _check(built, file)
        return built


def _check(config: T5Config, file: str) -> None:
    """Raises: UserError for settings that the port does not have, or that make no buckets."""
    if config.feed_forward_proj != "gated-gelu":
        raise UserError(
            f"{file} has feed_forward_proj={shown(config.feed_forward_proj)}, the port implements "
            "'gated-gelu' only, which is T5 v1.1's; give the folder of such a model"
        )
    count = config.relative_attention_num_buckets
    if not 4 <= count <= _MOST_BUCKETS:
        raise UserError(
            f"{file} has relative_attention_num_buckets={count}, expected 4..{_MOST_BUCKETS}; T5 "
            "has 32"
        )
    furthest = config.relative_attention_max_distance
    if furthest <= count // 4:
        raise UserError(
            f"{file} has relative_attention_max_distance={furthest}, expected more than the "
            f"{count // 4} distances that have buckets of their own; T5 has 128"
        )


def mask_of(token_ids: jax.Array) -> jax.Array:
    """Which of a prompt's tokens count: all up to the last that is no pad.

    A pad before that is none: it is a prompt that spells it.

    Args: token ids, int32 [B, L], each row ended by `</s>` and padded by 0. Returns: bool [B, L].
    """
    return jnp.flip(jnp.cumsum(jnp.flip(token_ids != 0, axis=1), axis=1) > 0, axis=1)


def relative_buckets(
    distances: np.ndarray,
    count: int,
    furthest: int,
) -> np.ndarray:
    """The bucket of each distance: half of them are for keys after the query, and of either half
    the first half holds one distance each, the others grow with the distance's logarithm.

    On the host: 16, 32 and 64 lie on edges, which another logarithm may miss by its rounding.
    Source: transformers `T5Attention._relative_position_bucket`, bidirectional.

    Args:
      distances: of a key from its query, in tokens, any integers.
      count: buckets. furthest: the distance from which on all share one.
    Returns: int32 in 0..count - 1, of the same shape.
    """
    half = count // 2
    exact = half // 2
    away = np.abs(distances)
    growth = np.log(np.maximum(away, exact) / exact) / math.log(furthest / exact) * (half - exact)
    # The nudge keeps a whole number one, whatever its rounding.
    far = np.minimum(exact + np.floor(growth + 1e-9).astype(int), half - 1)
    near = np.where(away < exact, away, far)
    return (near + np.where(distances > 0, half, 0)).astype(np.int32)


class T5LayerNorm(nnx.Module):
    """Divides [..., D] by its root mean square, in float32; no mean is taken off, nothing added.

    Source: transformers `T5LayerNorm`, which rounds to the weight's dtype before it multiplies.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: layers.Dtype,
        rngs: nnx.Rngs,
    ):
        del rngs  # every module's, but ones are not drawn
        self.epsilon = config.layer_norm_epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(config.d_model))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        scale = sharding.gather_param(self.scale[...], x.shape[-1:], self.dtype)
        return x.astype(self.dtype) * scale


class T5Attention(nnx.Module):
    """Multi-head self-attention of [B, L, D], its scores not scaled but biased.

    Source: transformers `T5Attention`.
    """

    def __init__(self, config: T5Config, **kw):
        self.heads = config.num_heads
        linear = functools.partial(layers.Linear, use_bias=False, **kw)
        inner = config.num_heads * config.d_kv
        # Scores are not scaled: what divides them is in the queries from the start, as in T5.
        small = nnx.initializers.normal((config.d_model * config.d_kv) ** -0.5)
        self.q = linear(config.d_model, inner, kernel_init=small)
        self.k = linear(config.d_model, inner)
        self.v = linear(config.d_model, inner)
        self.o = linear(inner, config.d_model)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        split = (*x.shape[:2], self.heads, -1)  # [B, L, H, K]
        q = self.q(x).reshape(split)
        k = self.k(x).reshape(split)
        v = self.v(x).reshape(split)
        # None of attention.py's kernels: they take neither a bias nor so few tokens.
        h = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        return self.o(h.reshape(*x.shape[:2], -1))


class T5LayerSelfAttention(nnx.Module):
    """[B, L, D] -> [B, L, D]: normalised before, residual."""

    def __init__(self, config: T5Config, **kw):
        self.SelfAttention = T5Attention(config, **kw)
        self.layer_norm = T5LayerNorm(config, **kw)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        return x + self.SelfAttention(self.layer_norm(x), bias, mask)


class T5DenseGatedActDense(nnx.Module):
    """[B, L, D] -> [B, L, D]: a linear map gated by the GELU (tanh) of another, and a third.

    Source: transformers `T5DenseGatedActDense`.
    """

    def __init__(self, config: T5Config, **kw):
        linear = functools.partial(layers.Linear, use_bias=False, **kw)
        self.wi_0 = linear(config.d_model, config.d_ff)
        self.wi_1 = linear(config.d_model, config.d_ff)
        self.wo = linear(config.d_ff, config.d_model)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = nnx.gelu(self.wi_0(x), approximate=True)
        return self.wo(gate * self.wi_1(x))


class T5LayerFF(nnx.Module):
    """[B, L, D] -> [B, L, D]: normalised before, residual."""

    def __init__(self, config: T5Config, **kw):
        self.DenseReluDense = T5DenseGatedActDense(config, **kw)
        self.layer_norm = T5LayerNorm(config, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nnx.Module):
    """Self-attention and feed-forward, which PyTorch keeps in one list.

    Source: transformers `T5Block`.
    """

    def __init__(self, config: T5Config, **kw):
        self.layer = nnx.List([T5LayerSelfAttention(config, **kw), T5LayerFF(config, **kw)])

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias, mask))


class T5Stack(nnx.Module):
    """Embedded tokens [B, L, D], mask bool [B, L] -> [B, L, D]. Source: transformers `T5Stack`."""

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        dtype: layers.Dtype,
        remat: str,
    ):
        self.remat = remat
        self.buckets = config.relative_attention_num_buckets
        self.furthest = config.relative_attention_max_distance
        self.relative_attention_bias = layers.embed(
            self.buckets, config.num_heads, rngs=rngs, dtype=dtype
        )
        self.block = layers.stacked(
            lambda rngs: T5Block(config, rngs=rngs, dtype=dtype), config.num_layers, rngs
        )
        self.final_layer_norm = T5LayerNorm(config, rngs=rngs, dtype=dtype)

    def _bias(self, length: int) -> jax.Array:
        """[1, H, L, L] added to every block's scores: of each head, by the key's distance."""
        positions = np.arange(length)
        distances = positions[None, :] - positions[:, None]  # [queries, keys]
        buckets = relative_buckets(distances, self.buckets, self.furthest)
        bias = self.relative_attention_bias(jnp.asarray(buckets))  # [L, L, H]
        return jnp.moveaxis(bias, -1, 0)[None]  # [1, H, L, L]

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        bias = self._bias(x.shape[1])
        keys = mask[:, None, None, :]  # [B, 1, 1, L]
        return self.final_layer_norm(
            layers.scan_blocks(self.block, x, bias, keys, remat=self.remat)
        )


class T5EncoderModel(nnx.Module):
    """PixArt's text encoder, in float32 or bfloat16: what its feed-forward adds up is beyond
    float16.

    Source: transformers `T5EncoderModel`.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
    ):
        if jnp.dtype(dtype) == jnp.float16:
            raise UserError(
                "the T5 encoder in float16 would overflow, expected bfloat16 or float32; use one "
                "of these"
            )
        self.config = config
        self.shared = layers.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
            dtype=dtype,
        )
        self.encoder = T5Stack(config, rngs=rngs, dtype=dtype, remat=remat)

    def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """The last hidden state.

        Args:
          token_ids: int32 [B, L].
          mask: bool, or integers that are 0 for pads, [B, L]; see `mask_of`.
        Returns: [B, L, D]; what stands at a pad means nothing, and is not 0.
        """
        return self.encoder(self.shared(token_ids), mask.astype(bool))  # [B, L, D]
