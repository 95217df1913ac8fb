# SPDX-License-Identifier: Apache-2.0
"""AutoencoderKL: images to latents and back.

Dims: B batch, H and W image height and width, C channels, f = 2^(levels-1).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.models import layers
from di_star_jax.models.config import Fields, check_class, from_json, shown

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
# What is made of the fields of config.json that `VAEConfig` does not have.
FIELDS = Fields(
    fixed={
        "act_fn": ("silu",),
        "shift_factor": (None, 0),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    },
    harmless=frozenset(
        {
            "force_upcast",  # of half precision
            "sample_size",  # of diffusers' tiling, which is off unless asked for
        }
    ),
    file="VAE config.json",
)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The fields of a VAE's config.json that matter, with diffusers' defaults for what a file
    leaves out, but for the blocks: one for each width.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    down_block_types: tuple[str, ...] = (_DOWN,)
    up_block_types: tuple[str, ...] = (_UP,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "VAEConfig":
        """Args: the parsed config.json; its path, for errors.

        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        check_class(config, "AutoencoderKL", file, "give a VAE folder")
        widths = config.get("block_out_channels", cls.block_out_channels)
        count = len(widths) if isinstance(widths, list | tuple) else 1
        blocks = {"down_block_types": [_DOWN] * count, "up_block_types": [_UP] * count}
        built = from_json(cls, blocks | config, FIELDS, file)
        _check_blocks(built, file)
        return built

    @property
    def scale(self) -> int:
        """f: image pixels per latent pixel, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


def _check_blocks(config: VAEConfig, file: str) -> None:
    """Raises: UserError for blocks that the port does not have, or widths that do not divide."""
    count, groups = len(config.block_out_channels), config.norm_num_groups
    for field, only in (
        ("down_block_types", _DOWN),
        ("up_block_types", _UP),
    ):
        found = getattr(config, field)
        if found != (only,) * count:
            raise UserError(
                f"{file} has {field}={shown(list(found))}, the port implements {only!r} only, once "
                f"for each of the {count} block_out_channels"
            )
    for width in config.block_out_channels:
        if width % groups:
            raise UserError(
                f"{file} has block_out_channels with {width}, which is not divisible by "
                f"norm_num_groups={groups}; change one of them"
            )


def _resnet(
    config: VAEConfig,
    c_in: int,
    c_out: int,
    **kw,
) -> layers.ResnetBlock2D:
    groups = config.norm_num_groups
    return layers.ResnetBlock2D(c_in, c_out, temb=None, groups=groups, eps=1e-6, **kw)


def _resnets(
    config: VAEConfig,
    c_in: int,
    c_out: int,
    count: int,
    **kw,
) -> nnx.List:
    inputs = [c_in] + [c_out] * (count - 1)
    return nnx.List([_resnet(config, width, c_out, **kw) for width in inputs])


def _norm_out(
    config: VAEConfig,
    channels: int,
    **kw,
) -> layers.GroupNorm:
    return layers.group_norm(channels, config.norm_num_groups, 1e-6, **kw)


class MidBlock(nnx.Module):
    """Resnet, attention over all pixels with one head, resnet.

    Source: diffusers `UNetMidBlock2D`.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        remat: str,
        kernel: str,
        **kw,
    ):
        self.remat = remat
        channels = config.block_out_channels[-1]
        groups = config.norm_num_groups
        attention = layers.Attention(channels, heads=1, groups=groups, kernel=kernel, **kw)
        self.attentions = nnx.List([attention])
        self.resnets = _resnets(config, channels, channels, 2, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        for module in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = layers.checkpointed(module, x, remat=self.remat)
        return x


class DownBlock(nnx.Module):
    """Resnets, then a downsampling but at the last level.

    Source: diffusers `DownEncoderBlock2D`.
    """

    def __init__(
        self,
        config: VAEConfig,
        level: int,
        *,
        remat: str,
        **kw,
    ):
        self.remat = remat
        widths = config.block_out_channels
        width = widths[level]
        self.resnets = _resnets(
            config, widths[max(level - 1, 0)], width, config.layers_per_block, **kw
        )
        # PyTorch pads this one at the bottom and right only.
        self.downsamplers = (
            nnx.List([layers.Downsample2D(width, padding=((0, 1), (0, 1)), **kw)])
            if level < len(widths) - 1
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = layers.checkpointed(resnet, x, remat=self.remat)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpBlock(nnx.Module):
    """Resnets, then an upsampling but at the last level. Source: diffusers `UpDecoderBlock2D`."""

    def __init__(
        self,
        config: VAEConfig,
        level: int,
        *,
        remat: str,
        **kw,
    ):
        self.remat = remat
        widths = config.block_out_channels
        width = widths[level]
        c_in = widths[min(level + 1, len(widths) - 1)]
        self.resnets = _resnets(config, c_in, width, config.layers_per_block + 1, **kw)
        self.upsamplers = nnx.List([layers.Upsample2D(width, **kw)]) if level > 0 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = layers.checkpointed(resnet, x, remat=self.remat)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Encoder(nnx.Module):
    """[B, H, W, 3] -> [B, H/f, W/f, 2 * latent_channels]. Source: diffusers `Encoder`."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        remat: str,
        kernel: str,
        **kw,
    ):
        widths = config.block_out_channels
        self.conv_in = layers.conv3x3(config.in_channels, widths[0], **kw)
        self.down_blocks = nnx.List(
            [DownBlock(config, i, remat=remat, **kw) for i in range(len(widths))]
        )
        self.mid_block = MidBlock(config, remat=remat, kernel=kernel, **kw)
        self.conv_norm_out = _norm_out(config, widths[-1], **kw)
        self.conv_out = layers.conv3x3(widths[-1], 2 * config.latent_channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """[B, H/f, W/f, latent_channels] -> [B, H, W, 3]. Source: diffusers `Decoder`."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        remat: str,
        kernel: str,
        **kw,
    ):
        widths = config.block_out_channels
        self.conv_in = layers.conv3x3(config.latent_channels, widths[-1], **kw)
        self.mid_block = MidBlock(config, remat=remat, kernel=kernel, **kw)
        self.up_blocks = nnx.List(
            [UpBlock(config, i, remat=remat, **kw) for i in reversed(range(len(widths)))]
        )
        self.conv_norm_out = _norm_out(config, widths[0], **kw)
        self.conv_out = layers.conv3x3(widths[0], config.out_channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Source: diffusers `AutoencoderKL`, with the latents' scaling inside.

    Args:
      config: from the folder's config.json.
      rngs: for the initial parameters, which are float32.
      dtype: compute dtype; SDXL's own VAE overflows in float16.
      remat: what each resnet keeps for the backward pass, a key of layers.REMAT.
      kernel: of the one attention layer, see attention.py.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
        kernel: str = "xla",
    ):
        self.config = config
        self.dtype = dtype
        kw = {"dtype": dtype, "rngs": rngs}
        channels = config.latent_channels
        self.encoder = Encoder(config, remat=remat, kernel=kernel, **kw)
        self.decoder = Decoder(config, remat=remat, kernel=kernel, **kw)
        self.quant_conv = layers.conv1x1(2 * channels, 2 * channels, **kw)
        self.post_quant_conv = layers.conv1x1(channels, channels, **kw)

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Args: image [B, H, W, 3] in [-1, 1], H and W multiples of f.

        Returns: mean and standard deviation of the scaled latents, [B, H/f, W/f, latent_channels]
          float32 each.
        """
        moments = self.quant_conv(self.encoder(sharding.split_rows(image)))
        moments = sharding.join_rows(moments.astype(jnp.float32))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        std = jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))
        scaling = self.config.scaling_factor
        return scaling * mean, scaling * std

    def decode(self, latents: jax.Array) -> jax.Array:
        """Args: scaled latents [B, h, w, latent_channels].

        Returns: image [B, f h, f w, 3] float32, about [-1, 1].
        """
        x = self.post_quant_conv(sharding.split_rows(latents / self.config.scaling_factor))
        return sharding.join_rows(self.decoder(x).astype(jnp.float32))
