# SPDX-License-Identifier: Apache-2.0
"""PixArtTransformer2DModel of PixArt-alpha, for 512 and 1024 pixels; config.json decides which.

Dims: B batch, H and W latent height and width, p patch size, h = H/p and w = W/p, N = h*w tokens,
C channels, M text tokens, K text width. H and h are this device's rows where a context splits them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from di_star_jax import sharding
from di_star_jax.errors import UserError
from di_star_jax.models import layers
from di_star_jax.models.config import Fields, check_class, from_json
from di_star_jax.models.unet import Condition

SINUSOID = 256  # channels of the timestep's and each size's sines and cosines
LAST_EPS = 1e-6  # of the last norm, whatever norm_eps says

# What is made of the fields of config.json that `PixArtConfig` does not have.
FIELDS = Fields(
    fixed={
        "activation_fn": ("gelu-approximate",),
        "attention_bias": (True,),
        "attention_type": ("default",),
        "double_self_attention": (False,),
        "norm_elementwise_affine": (False,),
        "norm_type": ("ada_norm_single",),
        "num_vector_embeds": (None,),
        "only_cross_attention": (False,),
    },
    harmless=frozenset(
        {
            "dropout",  # nothing is dropped, as in diffusers outside of its own training
            "norm_num_groups",  # there is no group norm
            "num_embeds_ada_norm",  # of norms with one embedding a timestep
            "upcast_attention",  # of half precision; softmax is float32 here
            "use_linear_projection",  # of inputs that are not cut in patches
        }
    ),
    file="PixArt config.json",
)


@dataclasses.dataclass(frozen=True)
class PixArtConfig:
    """The fields of a PixArt transformer's config.json that matter, with diffusers' defaults for
    what it leaves out.

    sample_size: latents' height and width in training; positions of others are stretched to it.
    interpolation_scale: divides positions. None, as where files lack it: sample_size // 64, or 1.
    use_additional_conditions: whether the network is told the image's sizes. None, as where files
      lack it: of sample_size 128 alone.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    cross_attention_dim: int = 1152
    sample_size: int = 128
    patch_size: int = 2
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None

    def __post_init__(self):
        """Replaces None, so that a file that has a default is equal to one that lacks it."""
        defaults = {
            "out_channels": self.in_channels,
            "interpolation_scale": float(max(self.sample_size // 64, 1)),
            "use_additional_conditions": self.sample_size == 128,
        }
        for field, value in defaults.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)

    @property
    def width(self) -> int:
        """C, of the image's tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, config: dict, file: str | None = None) -> "PixArtConfig":
        """Args: the parsed config.json; its path, for errors.

        Raises: UserError for a setting that the port does not implement.
        """
        file = file or FIELDS.file
        advice = (
            "or a Transformer2DModel with norm_type='ada_norm_single'; give the folder of a "
            "PixArt-alpha transformer"
        )
        # The published files' class was several networks; this field says which.
        is_old = config.get("_class_name") == "Transformer2DModel"
        if not is_old or config.get("norm_type") != "ada_norm_single":
            check_class(config, "PixArtTransformer2DModel", file, advice)
        built = from_json(cls, config, FIELDS, file)
        _check_widths(built, file)
        return built


def _check_widths(config: PixArtConfig, file: str) -> None:
    """Raises: UserError for sizes that do not divide or do not go together."""
    width = config.width
    parts = 12 if config.use_additional_conditions else 4
    if width % parts:
        raise UserError(
            f"{file} has num_attention_heads={config.num_attention_heads} x attention_head_dim="
            f"{config.attention_head_dim} = {width}, expected a multiple of {parts}, for sines and "
            "cosines of rows and columns, and three parts for the image's sizes where it is told "
            "them; change one of them"
        )
    if config.caption_channels is not None and config.cross_attention_dim != width:
        raise UserError(
            f"{file} has cross_attention_dim={config.cross_attention_dim}, expected {width} = "
            "num_attention_heads x attention_head_dim, which captions are projected to; use that"
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise UserError(
            f"{file} has out_channels={config.out_channels}, expected in_channels="
            f"{config.in_channels} for the noise, or twice that with its learned variance"
        )
    if config.sample_size < config.patch_size:
        raise UserError(
            f"{file} has sample_size={config.sample_size}, expected patch_size="
            f"{config.patch_size} at least, for one patch"
        )


def axis_table(
    count: int,
    base: int,
    scale: float,
    width: int,
) -> np.ndarray:
    """Sines, then cosines, of the positions of rows or of columns, made on the host.

    Args:
      count: how many there are; base: how many in training, which they are stretched to.
      scale: divides their positions.
      width: even, of which half is sines.
    Returns:
      [count, width] float32, of angles in float64.
    """
    # In float32, which diffusers rounds them to.
    position = np.arange(count, dtype=np.float32) / np.float32(count / base) / np.float32(scale)
    frequency = 1.0 / 10000.0 ** (np.arange(width // 2) / (width / 2))
    angle = position[:, None].astype(np.float64) * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class PatchEmbed(nnx.Module):
    """[B, H, W, 4] -> [B, h, w, C]: patches, and where they are. Source: diffusers `PatchEmbed`."""

    def __init__(self, config: PixArtConfig, **kw):
        self.config = config
        patch = config.patch_size
        self.proj = layers.Conv(config.in_channels, config.width, patch, stride=patch, **kw)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        """[1, own h, w, C] float32: the column's half of the channels first, then the row's.

        Args: rows, of all devices of a context.
        """
        config = self.config
        base, half = config.sample_size // config.patch_size, config.width // 2
        # As two small constants: of 1024 pixels the whole table is 19 MB.
        of_row, of_column = (
            jnp.asarray(axis_table(count, base, config.interpolation_scale, half))
            for count in (rows, columns)
        )
        of_row = sharding.split_rows(of_row[None, :, None])  # [1, h, 1, C/2]
        shape = (1, of_row.shape[1], columns, half)
        of_column = jnp.broadcast_to(of_column[None, None], shape)
        return jnp.concatenate([of_column, jnp.broadcast_to(of_row, shape)], axis=-1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Args: x, with the rows of all devices."""
        patch = self.config.patch_size
        _, height, width, _ = x.shape
        devices = sharding.size("context")
        if height % (patch * devices) or width % patch:
            raise UserError(
                f"latents of height {height} and width {width}, expected multiples of "
                f"{patch * devices} (patch_size={patch} x mesh.context={devices}) and {patch}; "
                "use another resolution"
            )
        tokens = self.proj(sharding.split_rows(x))
        tokens = tokens + self._positions(height // patch, width // patch)
        return tokens.astype(self.proj.dtype)


class CombinedTimestepSizeEmbeddings(nnx.Module):
    """[B] timesteps and, where the config says so, [B, 3] sizes -> [B, C].

    Source: diffusers `PixArtAlphaCombinedTimestepSizeEmbeddings`.
    """

    def __init__(
        self,
        config: PixArtConfig,
        *,
        dtype: layers.Dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        self.dtype = dtype
        has_sizes = config.use_additional_conditions
        self.timestep_embedder = layers.TimestepEmbedding(SINUSOID, config.width, **kw)
        self.resolution_embedder, self.aspect_ratio_embedder = (
            layers.TimestepEmbedding(SINUSOID, config.width // 3, **kw) if has_sizes else None
            for _ in range(2)
        )

    def _sinusoidal(self, values: jax.Array) -> jax.Array:
        """[n] -> [n, SINUSOID] in the compute dtype, made in float32: bfloat16 rounds times."""
        embedding = layers.sinusoidal_embedding(
            values, SINUSOID, flip_sin_to_cos=True, freq_shift=0.0
        )
        return embedding.astype(self.dtype)

    def __call__(self, t: jax.Array, sizes: jax.Array | None) -> jax.Array:
        embedded = self.timestep_embedder(self._sinusoidal(t))
        if self.resolution_embedder is None:
            return embedded
        assert sizes is not None, "the image's height, width and their ratio, as time_ids [B, 3]"
        # Height and width go one by one through the same embedder.
        resolution = self.resolution_embedder(self._sinusoidal(sizes[:, :2].reshape(-1)))
        ratio = self.aspect_ratio_embedder(self._sinusoidal(sizes[:, 2]))
        resolution = resolution.reshape(len(sizes), -1)  # [B, 2C/3]
        return embedded + jnp.concatenate([resolution, ratio], axis=-1)


class AdaLayerNormSingle(nnx.Module):
    """Times and sizes -> the shifts, scales and gates [B, 6, C] of all blocks, and e [B, C] itself.

    Source: diffusers `AdaLayerNormSingle`.
    """

    def __init__(self, config: PixArtConfig, **kw):
        self.emb = CombinedTimestepSizeEmbeddings(config, **kw)
        self.linear = layers.Linear(config.width, 6 * config.width, **kw)

    def __call__(self, t: jax.Array, sizes: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        embedded = self.emb(t, sizes)
        six = self.linear(nnx.silu(embedded))
        return six.reshape(len(embedded), 6, -1), embedded


class TextProjection(nnx.Module):
    """[B, M, K] -> [B, M, C]. Source: diffusers `PixArtAlphaTextProjection`."""

    def __init__(
        self,
        c_in: int,
        channels: int,
        **kw,
    ):
        self.linear_1 = layers.Linear(c_in, channels, **kw)
        self.linear_2 = layers.Linear(channels, channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(layers.tanh_gelu(self.linear_1(x)))


def modulated(
    x: jax.Array,
    shift: jax.Array,
    scale: jax.Array,
    eps: float,
) -> jax.Array:
    """Norm, then scale and shift, in float32. Args: x [B, N, C]; shift, scale [B, 1, C]."""
    return layers.standardised(x, eps) * (1 + scale) + shift


def _scale_shift(
    rows: int,
    channels: int,
    rngs: nnx.Rngs,
) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (rows, channels)) * channels**-0.5)


class PixArtBlock(nnx.Module):
    """Self-attention, attention on the text, feed-forward, each residual.

    Source: diffusers `BasicTransformerBlock` with norm_type "ada_norm_single".
    """

    def __init__(
        self,
        config: PixArtConfig,
        *,
        kernel: str,
        dtype: layers.Dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        width = config.width
        heads = {"heads": config.num_attention_heads, "bias": True, "kernel": kernel}
        self.eps = config.norm_eps
        self.dtype = dtype
        self.scale_shift_table = _scale_shift(6, width, rngs)
        self.attn1 = layers.Attention(width, **heads, **kw)
        self.attn2 = layers.Attention(width, context=config.cross_attention_dim, **heads, **kw)
        self.ff = layers.FeedForward(width, layers.TanhGELU, **kw)

    def __call__(
        self,
        x: jax.Array,
        six: jax.Array,
        context: jax.Array,
        mask: jax.Array | None,
    ) -> jax.Array:
        """Args: x [B, N, C]; six [B, 6, C]; context [B, M, C]; mask bool [B, M], or None."""
        shape = (6, x.shape[-1])
        table = sharding.gather_param(self.scale_shift_table[...], shape, jnp.float32)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(
            table[None] + six, 6, axis=1
        )
        h = modulated(x, shift_msa, scale_msa, self.eps)
        x = x + gate_msa.astype(self.dtype) * self.attn1(h)
        # With neither norm nor gate.
        x = x + self.attn2(x, context, mask)
        h = modulated(x, shift_mlp, scale_mlp, self.eps)
        return x + gate_mlp.astype(self.dtype) * self.ff(h)


class PixArtTransformer2DModel(nnx.Module):
    """eps(x_t, t | condition). Source: diffusers `PixArtTransformer2DModel`.

    Args:
      config: from the folder's config.json.
      rngs: for the initial parameters, which are float32.
      dtype: compute dtype.
      remat: what each block keeps for the backward pass, a key of layers.REMAT.
      kernel: of self-attention, see attention.py.
    """

    def __init__(
        self,
        config: PixArtConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: str = "none",
        kernel: str = "xla",
    ):
        self.config = config
        self.dtype = dtype
        self.remat = remat
        kw = {"dtype": dtype, "rngs": rngs}
        width, captions = config.width, config.caption_channels
        self.pos_embed = PatchEmbed(config, **kw)
        self.adaln_single = AdaLayerNormSingle(config, **kw)
        self.caption_projection = (
            None if captions is None else TextProjection(captions, width, **kw)
        )
        self.transformer_blocks = layers.stacked(
            lambda rngs: PixArtBlock(config, kernel=kernel, dtype=dtype, rngs=rngs),
            config.num_layers,
            rngs,
        )
        self.scale_shift_table = _scale_shift(2, width, rngs)
        # Of two close predictions the difference is what counts: it must not be rounded.
        self.proj_out = layers.Linear(
            width, config.patch_size**2 * config.out_channels, dtype=jnp.float32, rngs=rngs
        )

    def _predict(self, x: jax.Array, embedded: jax.Array) -> jax.Array:
        """Tokens [B, N, C] and e [B, C] -> [B, N, p*p*out_channels] float32."""
        shape = (2, x.shape[-1])
        table = sharding.gather_param(self.scale_shift_table[...], shape, jnp.float32)
        shift, scale = jnp.split(table[None] + embedded[:, None], 2, axis=1)
        return self.proj_out(modulated(x, shift, scale, LAST_EPS))

    def __call__(
        self,
        x_t: jax.Array,
        t: jax.Array,
        condition: Condition,
    ) -> jax.Array:
        """Predicts the noise in x_t; a learned variance, if there is one, is left out.

        Args:
          x_t: [B, H, W, 4] noisy latents, H and W multiples of the patch size.
          t: [B] timesteps, integer or float, in [0, 999].
          condition: of the same batch, without pooled text; time_ids where the config has
            use_additional_conditions.
        Returns:
          [B, H, W, 4] float32.
        Raises: UserError for latents that are not whole patches.
        """
        x = self.pos_embed(x_t)
        b, rows, columns, _ = x.shape
        six, embedded = self.adaln_single(t, condition.time_ids)
        context = condition.context.astype(self.dtype)
        if self.caption_projection is not None:
            context = self.caption_projection(context)  # [B, M, C]
        x = layers.scan_blocks(
            self.transformer_blocks,
            x.reshape(b, rows * columns, -1),
            six,
            context,
            condition.mask,
            remat=self.remat,
        )
        patch, channels = self.config.patch_size, self.config.out_channels
        x = self._predict(x, embedded).reshape(b, rows, columns, patch, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, h, p, w, p, channels]
        x = x.reshape(b, rows * patch, columns * patch, channels)
        return sharding.join_rows(x[..., : self.config.in_channels])
