# SPDX-License-Identifier: Apache-2.0
"""UNet2DConditionModel of the SDXL and SD 1.5 families; the folder's config.json decides which.

Dims: B batch, H and W latent height and width, C channels, M text tokens, K text width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax import sharding
from di_star_jax.diffusion import Betas, v_to_eps
from di_star_jax.errors import UserError
from di_star_jax.models import layers
from di_star_jax.models.config import Fields, check_class, from_json, shown


class Condition(NamedTuple):
    """What a denoiser is conditioned on; what a model has no use for is None.

    context: [B, M, K] text states for cross-attention.
    pooled: [B, P] projected text embedding (SDXL).
    time_ids: float32 numbers about the image, in pixels. SDXL [B, 6]: original height and width,
      crop top and left, target height and width. PixArt of 1024 pixels [B, 3]: height, width,
      height / width.
    mask: [B, M] bool, true for the tokens of `context` that are seen, at least one of each row;
      None where all are (PixArt has one, the UNets have none). It belongs to its context.
    """

    context: jax.Array
    pooled: jax.Array | None = None
    time_ids: jax.Array | None = None
    mask: jax.Array | None = None


# Where config.json says that the network predicts v, with the fields of `Betas`: what the scheduler
# of its pipeline says is kept here once it is read, for the network goes places without it.
# diffusers passes over what begins with an underscore, and keeps it.
V_PREDICTION = "_v_prediction"
# What is made of the fields of config.json that `UNetConfig` does not have.
FIELDS = Fields(
    fixed={
        "act_fn": ("silu",),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    },
    harmless=frozenset(
        {
            "addition_embed_type_num_heads",  # of embeddings that are not ported
            "dropout",  # nothing is dropped, as in diffusers outside of its own training
            "num_attention_heads",  # read by `from_json` as `attention_head_dim`
            "upcast_attention",  # of half precision; softmax is float32 here
        }
    ),
    file="UNet config.json",
)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of a UNet's config.json that matter, with diffusers' defaults for what it leaves
    out; tuples have one value for each block.

    attention_head_dim is the number of heads: diffusers kept the wrong name for old files' sake.
    """

    # The network does not depend on it.
    sample_size: int | None = dataclasses.field(default=None, compare=False)
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    # Of a network that predicts v, by which schedule; it stands under V_PREDICTION.
    v_prediction: Betas | None = None

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "UNetConfig":
        """Args: the parsed config.json; its path, for errors.

        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        advice = "give the folder of an SDXL or SD 1.5 UNet"
        check_class(config, "UNet2DConditionModel", file, advice)
        widths = config.get("block_out_channels", cls.block_out_channels)
        count = len(widths) if isinstance(widths, list | tuple) else 1
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        depths = config.get("transformer_layers_per_block", 1)
        per_block = {
            "attention_head_dim": _per_block(heads, count),
            "transformer_layers_per_block": _per_block(depths, count),
        }
        built = from_json(cls, config | per_block, FIELDS, file)
        if V_PREDICTION in config:
            built = dataclasses.replace(built, v_prediction=_betas(config[V_PREDICTION], file))
        _check_blocks(built, file)
        _check_widths(built, file)
        return built


def _betas(note: Any, file: str) -> Betas:
    """What stands under V_PREDICTION. Raises: UserError for what no schedule is made of."""
    if not isinstance(note, dict):
        raise UserError(f"{file} has {V_PREDICTION}={shown(note)}, expected an object; remove it")
    return from_json(Betas, note, Fields({}, frozenset(), f"{file}: {V_PREDICTION}"))


def _per_block(value: Any, count: int) -> Any:
    return [value] * count if isinstance(value, int) else value


def _check_blocks(config: UNetConfig, file: str) -> None:
    """Raises: UserError for a block that the port does not have, or not as many as widths."""
    count = len(config.block_out_channels)
    for field, known in (
        ("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D")),
        ("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D")),
        ("attention_head_dim", None),
        ("transformer_layers_per_block", None),
    ):
        values = getattr(config, field)
        if len(values) != count:
            raise UserError(
                f"{file} has {len(values)} {field} for {count} block_out_channels; "
                "give as many of both"
            )
        for value in values:
            if known and value not in known:
                raise UserError(
                    f"{file} has {field} with {shown(value)}, the port implements "
                    f"{' and '.join(map(repr, known))} only"
                )


def _check_widths(config: UNetConfig, file: str) -> None:
    """Raises: UserError for sizes that do not divide, or an embedding without its sizes."""
    groups = config.norm_num_groups
    levels = zip(
        config.block_out_channels,
        config.attention_head_dim,
        config.down_block_types,
        config.up_block_types[::-1],
    )
    last = len(config.block_out_channels) - 1
    for i, (width, heads, *blocks) in enumerate(levels):
        if width % groups:
            raise UserError(
                f"{file} has block_out_channels with {width}, which is not divisible by "
                f"norm_num_groups={groups}; change one of them"
            )
        # The block in the middle has attention at the last level's width.
        attends = i == last or any(block.startswith("CrossAttn") for block in blocks)
        if attends and width % heads:
            raise UserError(
                f"{file} has block_out_channels with {width}, which is not divisible by "
                f"attention_head_dim={heads}, its number of heads; change one of them"
            )
    _check_embedded(config, "block_out_channels", config.block_out_channels[0], file)
    if config.addition_embed_type is None:
        return
    if config.addition_embed_type != "text_time":
        raise UserError(
            f"{file} has addition_embed_type={shown(config.addition_embed_type)}, "
            "the port implements null and 'text_time' only"
        )
    sizes = config.addition_time_embed_dim
    _check_embedded(config, "addition_time_embed_dim", sizes, file)
    total = config.projection_class_embeddings_input_dim
    if total is None or total <= 6 * sizes:
        raise UserError(
            f"{file} has projection_class_embeddings_input_dim={total}, expected more than six "
            f"times addition_time_embed_dim={sizes}, for the pooled text"
        )


def _check_embedded(
    config: UNetConfig,
    field: str,
    width: int | None,
    file: str,
) -> None:
    """Raises: UserError for a width that no sines and cosines fill."""
    if width is None or width % 2 or width // 2 <= config.freq_shift:
        raise UserError(
            f"{file} has {field}={width} and freq_shift={config.freq_shift}, expected an even "
            "width above twice the shift"
        )


def _resnet(
    config: UNetConfig,
    level: int,
    c_in: int,
    **kw,
) -> layers.ResnetBlock2D:
    return layers.ResnetBlock2D(
        c_in,
        config.block_out_channels[level],
        temb=4 * config.block_out_channels[0],
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        **kw,
    )


def _transformer(
    config: UNetConfig,
    level: int,
    *,
    remat: str,
    kernel: str,
    **kw,
) -> layers.Transformer2DModel:
    return layers.Transformer2DModel(
        layers.TransformerConfig(
            channels=config.block_out_channels[level],
            heads=config.attention_head_dim[level],
            depth=config.transformer_layers_per_block[level],
            context=config.cross_attention_dim,
            groups=config.norm_num_groups,
            linear_projection=config.use_linear_projection,
            remat=remat,
            kernel=kernel,
        ),
        **kw,
    )


def _transformers(
    config: UNetConfig,
    block: str,
    level: int,
    count: int,
    **kw,
) -> nnx.List | None:
    """Those of a block with cross-attention, None for another."""
    if not block.startswith("CrossAttn"):
        return None
    return nnx.List([_transformer(config, level, **kw) for _ in range(count)])


class DownBlock2D(nnx.Module):
    """Resnets, each followed by a transformer where the config says so, then a downsampling but at
    the last level.

    Source: diffusers `DownBlock2D` and `CrossAttnDownBlock2D`.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        *,
        remat: str,
        kernel: str,
        **kw,
    ):
        self.remat = remat
        widths = config.block_out_channels
        width = widths[level]
        count = config.layers_per_block
        inputs = [widths[max(level - 1, 0)]] + [width] * (count - 1)
        self.resnets = nnx.List([_resnet(config, level, c_in, **kw) for c_in in inputs])
        self.attentions = _transformers(
            config, config.down_block_types[level], level, count, remat=remat, kernel=kernel, **kw
        )
        self.downsamplers = (
            nnx.List([layers.Downsample2D(width, padding=((1, 1), (1, 1)), **kw)])
            if level < len(widths) - 1
            else None
        )

    def __call__(
        self,
        x: jax.Array,
        temb: jax.Array,
        context: jax.Array,
    ) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = layers.checkpointed(resnet, x, temb, remat=self.remat)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)  # [B, H/2, W/2, C]
            skips.append(x)
        return x, skips


class UNetMidBlock2DCrossAttn(nnx.Module):
    """Resnet, transformer, resnet. Source: diffusers `UNetMidBlock2DCrossAttn`."""

    def __init__(
        self,
        config: UNetConfig,
        *,
        remat: str,
        kernel: str,
        **kw,
    ):
        self.remat = remat
        level = len(config.block_out_channels) - 1
        channels = config.block_out_channels[level]
        self.attentions = nnx.List([_transformer(config, level, remat=remat, kernel=kernel, **kw)])
        self.resnets = nnx.List([_resnet(config, level, channels, **kw) for _ in range(2)])

    def __call__(
        self,
        x: jax.Array,
        temb: jax.Array,
        context: jax.Array,
    ) -> jax.Array:
        x = layers.checkpointed(self.resnets[0], x, temb, remat=self.remat)
        x = self.attentions[0](x, context)
        return layers.checkpointed(self.resnets[1], x, temb, remat=self.remat)


class UpBlock2D(nnx.Module):
    """Resnets that each take one skip in, with transformers where the config says so, then an
    upsampling.

    `level` counts as in the down path. Source: diffusers `UpBlock2D` and `CrossAttnUpBlock2D`.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        *,
        remat: str,
        kernel: str,
        **kw,
    ):
        self.remat = remat
        widths = config.block_out_channels
        width = widths[level]
        count = config.layers_per_block + 1
        inputs = [widths[min(level + 1, len(widths) - 1)]] + [width] * (count - 1)
        skips = [width] * (count - 1) + [widths[max(level - 1, 0)]]
        self.resnets = nnx.List(
            [_resnet(config, level, c_in + skip, **kw) for c_in, skip in zip(inputs, skips)]
        )
        block = config.up_block_types[len(widths) - 1 - level]
        self.attentions = _transformers(
            config, block, level, count, remat=remat, kernel=kernel, **kw
        )
        self.upsamplers = nnx.List([layers.Upsample2D(width, **kw)]) if level > 0 else None

    def __call__(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        temb: jax.Array,
        context: jax.Array,
        size: tuple[int, int] | None,
    ) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            x = jnp.concatenate([x, skips[-1 - i]], axis=-1)  # [B, H, W, C + C_skip]
            x = layers.checkpointed(resnet, x, temb, remat=self.remat)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)


class UNet2DConditionModel(nnx.Module):
    """eps(x_t, t | condition). Source: diffusers `UNet2DConditionModel`.

    Of a network that predicts v, this is the one place where that becomes eps: all else knows eps.

    Args:
      config: from the folder's config.json.
      rngs: for the initial parameters, which are float32.
      dtype: compute dtype.
      remat: what each resnet and transformer block keeps for the backward pass, a key of
        layers.REMAT.
      kernel: of self-attention, see attention.py.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
        kernel: str = "xla",
    ):
        self.config = config
        self.dtype = dtype
        kw = {"dtype": dtype, "rngs": rngs}
        block = {"remat": remat, "kernel": kernel, **kw}
        widths = config.block_out_channels
        first = widths[0]
        levels = range(len(widths))
        self.conv_in = layers.conv3x3(config.in_channels, first, **kw)
        self.time_embedding = layers.TimestepEmbedding(first, 4 * first, **kw)
        added = config.projection_class_embeddings_input_dim
        self.add_embedding = (
            layers.TimestepEmbedding(added, 4 * first, **kw) if config.addition_embed_type else None
        )
        self.down_blocks = nnx.List([DownBlock2D(config, i, **block) for i in levels])
        self.mid_block = UNetMidBlock2DCrossAttn(config, **block)
        self.up_blocks = nnx.List([UpBlock2D(config, i, **block) for i in reversed(levels)])
        # Of two close predictions the difference is what counts: it must not be rounded.
        last = kw | {"dtype": jnp.float32}
        self.conv_norm_out = layers.group_norm(
            first, config.norm_num_groups, config.norm_eps, **last
        )
        self.conv_out = layers.conv3x3(first, config.out_channels, **last)

    def _sinusoidal(self, values: jax.Array, dim: int) -> jax.Array:
        """[N] -> [N, dim] in the compute dtype."""
        embedding = layers.sinusoidal_embedding(
            values,
            dim,
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )
        return embedding.astype(self.dtype)

    def _embed(self, t: jax.Array, condition: Condition) -> jax.Array:
        """[B, T], of timestep and, where there is one, of the pooled text and the sizes."""
        temb = self.time_embedding(self._sinusoidal(t, self.config.block_out_channels[0]))
        if self.add_embedding is None:
            return temb
        time_ids = condition.time_ids.reshape(-1)  # [B * 6]
        sizes = self._sinusoidal(time_ids, self.config.addition_time_embed_dim)
        pooled = condition.pooled.astype(self.dtype)
        added = jnp.concatenate([pooled, sizes.reshape(len(pooled), -1)], axis=-1)
        return temb + self.add_embedding(added)

    def __call__(
        self,
        x_t: jax.Array,
        t: jax.Array,
        condition: Condition,
    ) -> jax.Array:
        """Predicts the noise in x_t.

        Args:
          x_t: [B, H, W, 4] noisy latents.
          t: [B] timesteps, integer or float, in [0, 999].
          condition: of the same batch.
        Returns:
          [B, H, W, 4] float32.
        """
        temb = self._embed(t, condition)
        context = condition.context.astype(self.dtype)
        x = self.conv_in(sharding.split_rows(x_t))
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, temb, context)
            skips += more
        x = self.mid_block(x, temb, context)
        count = self.config.layers_per_block + 1
        for block in self.up_blocks:
            used = skips[-count:]
            skips = skips[:-count]
            x = block(x, used, temb, context, skips[-1].shape[1:3] if skips else None)
        x = self.conv_out(nnx.silu(self.conv_norm_out(x)))
        predicted = sharding.join_rows(x.astype(jnp.float32))
        if self.config.v_prediction is None:
            return predicted
        levels = self.config.v_prediction.schedule().at(t)
        return v_to_eps(x_t.astype(jnp.float32), predicted, *levels)
