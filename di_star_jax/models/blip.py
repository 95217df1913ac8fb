# SPDX-License-Identifier: Apache-2.0
"""ImageReward's network: BLIP's image encoder, a BERT that attends to the image, and a linear head.

Dims: B batch, L text tokens, N image tokens (1 + patches), D width of the text, E width of the
image, S image size. Attribute names, `self` and `LayerNorm` among them, are the keys of
ImageReward's published file.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.models import layers
from di_star_jax.models.attention import attention
from di_star_jax.models.config import TRANSFORMERS, Fields, check_divides, from_json, shown
from di_star_jax.models.heads import ScoreHead

# Of the head's output, which the score is normalised by.
MEAN = 0.16717362830052426
STD = 1.0333394966054072
# What is made of the fields of med_config.json that the classes below do not have.
FIELDS = Fields(
    fixed={
        "model_type": ("bert",),
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "pruned_heads": ({},),
    },
    harmless=TRANSFORMERS - {"model_type"}
    | {
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "eos_token_id",
        "encoder_width",  # ImageReward takes the image encoder's width
        "hidden_dropout_prob",
        "type_vocab_size",  # BLIP has no token types
    },
    file="med_config.json",
    advice="; take med_config.json of THUDM/ImageReward",
)
VISION_FIELDS = Fields({}, frozenset(), "vision_config of med_config.json")


@dataclasses.dataclass(frozen=True)
class BLIPVisionConfig:
    """BLIP's image encoder; the defaults are ImageReward's ViT-L/16 at 224 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "BLIPVisionConfig":
        """Args: the parsed dict; what to call it in errors.

        Raises: UserError for sizes that do not divide, or a field that is not known.
        """
        file = file or VISION_FIELDS.file
        built = from_json(cls, config, VISION_FIELDS, file)
        check_divides(built, "hidden_size", "num_attention_heads", file)
        check_divides(built, "image_size", "patch_size", file)
        return built


@dataclasses.dataclass(frozen=True)
class BLIPConfig:
    """BERT's fields and the image encoder's; the defaults are ImageReward's."""

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    vision_config: BLIPVisionConfig = BLIPVisionConfig()

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "BLIPConfig":
        """From the parsed med_config.json.

        Args:
          config: flat, with the fields of transformers' BertConfig. The published file says nothing
            of the image encoder, which ImageReward's code fixes; an object `vision_config` in it
            may, with the fields of `BLIPVisionConfig`. `encoder_width` is ignored as it is by
            ImageReward: the image encoder's width counts.
          file: its path, for errors.
        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        vision = config.get("vision_config", {})
        if not isinstance(vision, dict):
            raise UserError(f"{file} has vision_config={shown(vision)}, expected an object")
        tower = BLIPVisionConfig.from_json(vision, f"vision_config of {file}")
        built = from_json(cls, config | {"vision_config": tower}, FIELDS, file)
        check_divides(built, "hidden_size", "num_attention_heads", file)
        return built


# Image.


class ViTAttention(nnx.Module):
    """Multi-head self-attention of [B, N, E], with biases. Source: transformers `BlipAttention`."""

    def __init__(self, config: BLIPVisionConfig, **kw):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = layers.Linear(width, 3 * width, **kw)
        self.proj = layers.Linear(width, width, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)  # [B, N, 3, heads, E / heads]
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(h.reshape(x.shape))


class ViTMLP(nnx.Module):
    """[B, N, E] -> [B, N, E] through the intermediate width. Source: transformers `BlipMLP`."""

    def __init__(self, config: BLIPVisionConfig, **kw):
        self.fc1 = layers.Linear(config.hidden_size, config.intermediate_size, **kw)
        self.fc2 = layers.Linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(layers.gelu(self.fc1(x)))


class ViTBlock(nnx.Module):
    """Attention and MLP, each normalised before and residual.

    Source: transformers `BlipEncoderLayer`.
    """

    def __init__(self, config: BLIPVisionConfig, **kw):
        self.norm1 = layers.layer_norm(config, **kw)
        self.attn = ViTAttention(config, **kw)
        self.norm2 = layers.layer_norm(config, **kw)
        self.mlp = ViTMLP(config, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """[B, S, S, 3] -> [B, N-1, E]: one token for each patch, row by row."""

    def __init__(self, config: BLIPVisionConfig, **kw):
        patch = config.patch_size
        self.proj = layers.Conv(3, config.hidden_size, patch, stride=patch, **kw)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.proj(pixels).reshape(pixels.shape[0], -1, self.proj.out_features)


class VisionTransformer(nnx.Module):
    """[B, S, S, 3] CLIP-normalised pixels -> [B, N, E], class token first.

    Source: transformers `BlipVisionModel`.
    """

    def __init__(
        self,
        config: BLIPVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype,
        remat: str,
    ):
        kw = {"rngs": rngs, "dtype": dtype}
        width = config.hidden_size
        count = 1 + (config.image_size // config.patch_size) ** 2
        self.shape = (config.image_size, config.image_size, 3)
        self.dtype = dtype
        self.remat = remat
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, count, width)))
        self.patch_embed = PatchEmbed(config, **kw)
        self.blocks = layers.stacked(
            lambda rngs: ViTBlock(config, rngs=rngs, dtype=dtype), config.num_hidden_layers, rngs
        )
        self.norm = layers.layer_norm(config, **kw)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        if pixels.shape[1:] != self.shape:
            raise UserError(
                f"got pixels {pixels.shape[1:]}, the BLIP model takes {self.shape}; "
                "resize them first"
            )
        patches = self.patch_embed(pixels)  # [B, N-1, E]
        batch, count, width = patches.shape
        token = sharding.gather_param(self.cls_token[...], (1, 1, width), self.dtype)
        positions = sharding.gather_param(self.pos_embed[...], (1, count + 1, width), self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), patches], axis=1)
        x = x + positions  # [B, N, E]
        return self.norm(layers.scan_blocks(self.blocks, x, remat=self.remat))


# Text.


class BertEmbeddings(nnx.Module):
    """[B, L] token ids -> [B, L, D]: token plus position, normalised.

    Source: transformers `BlipTextEmbeddings`.
    """

    def __init__(self, config: BLIPConfig, **kw):
        width = config.hidden_size
        self.word_embeddings = layers.embed(config.vocab_size, width, **kw)
        self.position_embeddings = layers.embed(config.max_position_embeddings, width, **kw)
        self.LayerNorm = layers.layer_norm(config, **kw)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        length, limit = token_ids.shape[1], self.position_embeddings.num_embeddings
        if length > limit:
            raise UserError(
                f"got {length} token ids per prompt, the BLIP model takes at most {limit}; "
                "truncate them"
            )
        positions = self.position_embeddings(jnp.arange(length))[None]
        return self.LayerNorm(self.word_embeddings(token_ids) + positions)


class BertSelfAttention(nnx.Module):
    """Multi-head attention of [B, L, D] on a context [B, M, C].

    Source: transformers `BlipTextSelfAttention`.
    """

    def __init__(
        self,
        config: BLIPConfig,
        context: int,
        **kw,
    ):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = layers.Linear(width, width, **kw)
        self.key = layers.Linear(context, width, **kw)
        self.value = layers.Linear(context, width, **kw)

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)  # [B, L, heads, D / heads]

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        mask: jax.Array | None,
    ) -> jax.Array:
        q = self._split_heads(self.query(x))
        k = self._split_heads(self.key(context))
        v = self._split_heads(self.value(context))
        return attention(q, k, v, mask=mask).reshape(x.shape)


class BertOutput(nnx.Module):
    """([B, L, C], [B, L, D]) -> [B, L, D]: projected, residual, then normalised.

    Source: `BlipTextSelfOutput`.
    """

    def __init__(
        self,
        config: BLIPConfig,
        c_in: int,
        **kw,
    ):
        self.dense = layers.Linear(c_in, config.hidden_size, **kw)
        self.LayerNorm = layers.layer_norm(config, **kw)

    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(h) + x)


class BertAttention(nnx.Module):
    """Attention and its output. Source: transformers `BlipTextAttention`."""

    def __init__(
        self,
        config: BLIPConfig,
        context: int,
        **kw,
    ):
        self.self = BertSelfAttention(config, context, **kw)
        self.output = BertOutput(config, config.hidden_size, **kw)

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        mask: jax.Array | None,
    ) -> jax.Array:
        return self.output(self.self(x, context, mask), x)


class BertIntermediate(nnx.Module):
    """[B, L, D] -> [B, L, intermediate width]."""

    def __init__(self, config: BLIPConfig, **kw):
        self.dense = layers.Linear(config.hidden_size, config.intermediate_size, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return layers.gelu(self.dense(x))


class BertLayer(nnx.Module):
    """Text attends to itself, both ways, then to the image; then an MLP.

    Source: transformers `BlipTextLayer`.
    """

    def __init__(self, config: BLIPConfig, **kw):
        self.attention = BertAttention(config, config.hidden_size, **kw)
        self.crossattention = BertAttention(config, config.vision_config.hidden_size, **kw)
        self.intermediate = BertIntermediate(config, **kw)
        self.output = BertOutput(config, config.intermediate_size, **kw)

    def __call__(
        self,
        x: jax.Array,
        image: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image, None)
        return self.output(self.intermediate(x), x)


class BertEncoder(nnx.Module):
    """The stacked layers: ([B, L, D], image [B, N, E], mask [B, 1, 1, L]) -> [B, L, D]."""

    def __init__(
        self,
        config: BLIPConfig,
        *,
        rngs: nnx.Rngs,
        dtype,
        remat: str,
    ):
        self.remat = remat
        self.layer = layers.stacked(
            lambda rngs: BertLayer(config, rngs=rngs, dtype=dtype), config.num_hidden_layers, rngs
        )

    def __call__(
        self,
        x: jax.Array,
        image: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        return layers.scan_blocks(self.layer, x, image, mask, remat=self.remat)


class BertModel(nnx.Module):
    """([B, L] ids, [B, L] mask, image [B, N, E]) -> [B, L, D].

    Source: transformers `BlipTextModel`, no pooling layer.
    """

    def __init__(
        self,
        config: BLIPConfig,
        *,
        remat: str,
        **kw,
    ):
        self.embeddings = BertEmbeddings(config, **kw)
        self.encoder = BertEncoder(config, remat=remat, **kw)

    def __call__(
        self,
        token_ids: jax.Array,
        mask: jax.Array,
        image: jax.Array,
    ) -> jax.Array:
        return self.encoder(self.embeddings(token_ids), image, mask.astype(bool)[:, None, None, :])


# Reward.


class BLIP(nnx.Module):
    """(pixels [B, S, S, 3], ids [B, L], mask [B, L]) -> [B, L, D], the text seen with the image."""

    def __init__(self, config: BLIPConfig, **kw):
        self.visual_encoder = VisionTransformer(config.vision_config, **kw)
        self.text_encoder = BertModel(config, **kw)

    def __call__(
        self,
        pixels: jax.Array,
        token_ids: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        return self.text_encoder(token_ids, mask, self.visual_encoder(pixels))


class ImageReward(nnx.Module):
    """ImageReward v1.0 (arXiv 2304.05977).

    Source: THUDM/ImageReward; transformers' `Blip*` classes are its parts.

    Args:
      config: sizes.
      dtype: compute dtype; norms, softmax and the head are float32.
      remat: what blocks keep for the backward pass, a key of layers.REMAT.
    """

    def __init__(
        self,
        config: BLIPConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
    ):
        self.config = config
        self.blip = BLIP(config, rngs=rngs, dtype=dtype, remat=remat)
        self.mlp = ScoreHead(config.hidden_size, rngs=rngs)

    def __call__(
        self,
        pixels: jax.Array,
        token_ids: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        """The score of each image for its prompt.

        Args:
          pixels: [B, S, S, 3], CLIP-normalised.
          token_ids: int32 [B, L] of BERT's vocabulary, [CLS] first.
          mask: int32 or bool [B, L], nonzero where there is a token and no padding.
        Returns:
          float32 [B], about -2 to 2.
        Raises: UserError for another image size, or more tokens than positions.
        """
        h = self.blip(pixels, token_ids, mask)[:, 0]  # [B, D], at [CLS]
        return (self.mlp(h) - MEAN) / STD
