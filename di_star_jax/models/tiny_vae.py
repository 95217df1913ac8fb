# SPDX-License-Identifier: Apache-2.0
"""AutoencoderTiny's decoder (TAESD, TAESDXL): latents to images by few and narrow convolutions.

Dims: B batch, h and w latent height and width, C channels, f = 2^(stages-1).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.models import layers
from di_star_jax.models.config import Fields, check_class, from_json, shown
from di_star_jax.models.vae import VAEConfig

_ADVICE = (
    "give the folder of a tiny decoder, or its name on the Hub: madebyollin/taesdxl for SDXL's "
    "latents, madebyollin/taesd for those of SD 1.5 and PixArt-alpha"
)
# What is made of the fields of config.json that `TinyVAEConfig` does not have.
FIELDS = Fields(
    fixed={
        "out_channels": (3,),
        "act_fn": ("relu",),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
        "scaling_factor": (1.0,),  # it takes latents as the denoiser has them
        "shift_factor": (0.0, None),
    },
    harmless=frozenset(
        {
            "in_channels",  # of the encoder, as the next two
            "encoder_block_out_channels",
            "num_encoder_blocks",
            "block_out_channels",  # a second name of the decoder's
            "latent_magnitude",  # of latents that are stored as bytes, as the next
            "latent_shift",
            "force_upcast",
        }
    ),
    file="tiny VAE config.json",
)


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """The decoder's fields of an AutoencoderTiny's config.json, with diffusers' defaults."""

    latent_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "TinyVAEConfig":
        """Args: the parsed config.json; its path, for errors.

        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        check_class(config, "AutoencoderTiny", file, _ADVICE)
        built = from_json(cls, config, FIELDS, file)
        widths, blocks = built.decoder_block_out_channels, built.num_decoder_blocks
        # PyTorch's own class has no layer between two widths.
        if len(set(widths)) > 1 or len(widths) != len(blocks):
            raise UserError(
                f"{file} has decoder_block_out_channels={shown(list(widths))}, expected one width, "
                f"once for each of the {len(blocks)} num_decoder_blocks; {_ADVICE}"
            )
        return built

    @property
    def scale(self) -> int:
        """f: image pixels per latent pixel, along one side."""
        return 2 ** (len(self.num_decoder_blocks) - 1)

    def check_stands_for(self, vae: VAEConfig, file: str) -> None:
        """Args: file, this config's, for errors. Raises: UserError where the VAE has other latents.

        Only sizes show: TAESD and TAESDXL have the same, and learnt other latents.
        """
        sizes = {
            "latent_channels": (self.latent_channels, vae.latent_channels),
            "pixels a latent": (self.scale, vae.scale),
        }
        for what, (ours, theirs) in sizes.items():
            if ours != theirs:
                raise UserError(
                    f"{file} has {what}={ours}, but the VAE of the reference has {theirs}; "
                    f"{_ADVICE}"
                )


class ReLU(nnx.Module):
    """Keeps its index of PyTorch's among the layers."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(x)


class Upsample(nnx.Module):
    """Doubles H and W by nearest neighbour; keeps its index among the layers."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return layers.doubled(x)


class Block(nnx.Module):
    """Three convolutions, residual. Source: diffusers `AutoencoderTinyBlock` of one width."""

    def __init__(self, channels: int, **kw):
        first, second, third = (layers.conv3x3(channels, channels, **kw) for _ in range(3))
        self.conv = nnx.List([first, ReLU(), second, ReLU(), third])

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for layer in self.conv:
            h = layer(h)
        return nnx.relu(h + x)


class Decoder(nnx.Module):
    """[B, h, w, latent_channels] -> [B, f h, f w, 3] float32. Source: diffusers `DecoderTiny`."""

    def __init__(
        self,
        config: TinyVAEConfig,
        *,
        remat: str,
        **kw,
    ):
        self.remat = remat
        width = config.decoder_block_out_channels[0]
        stages = [layers.conv3x3(config.latent_channels, width, **kw), ReLU()]
        for count in config.num_decoder_blocks[:-1]:
            stages += [Block(width, **kw) for _ in range(count)]
            stages += [Upsample(), layers.conv3x3(width, width, use_bias=False, **kw)]
        stages += [Block(width, **kw) for _ in range(config.num_decoder_blocks[-1])]
        self.layers = nnx.List([*stages, layers.conv3x3(width, 3, **kw)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = 3.0 * jnp.tanh(x / 3.0)
        for layer in self.layers:
            is_block = isinstance(layer, Block)
            x = layers.checkpointed(layer, x, remat=self.remat) if is_block else layer(x)
        return 2.0 * x.astype(jnp.float32) - 1.0  # it was trained on images in [0, 1]


class AutoencoderTiny(nnx.Module):
    """The decoder alone. Source: diffusers `AutoencoderTiny`.

    Args:
      config: from the folder's config.json.
      rngs: for the initial parameters, which are float32.
      dtype: compute dtype.
      remat: what each block keeps for the backward pass, a key of layers.REMAT.
    """

    def __init__(
        self,
        config: TinyVAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
    ):
        self.config = config
        self.decoder = Decoder(config, remat=remat, dtype=dtype, rngs=rngs)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Args: scaled latents [B, h, w, latent_channels], which `AutoencoderKL.decode` takes too.

        Returns: image [B, f h, f w, 3] float32, about [-1, 1].
        """
        return sharding.join_rows(self.decoder(sharding.split_rows(latents)))


def decoder_alone(tensors: Mapping) -> dict:
    """A file's tensors by name, without the encoder's."""
    return {name: x for name, x in tensors.items() if not name.startswith("encoder.")}
