# SPDX-License-Identifier: Apache-2.0
"""Blocks that UNet, VAE and CLIP share.

Dims: B batch, H height, W width, N = H*W tokens, M text tokens, C channels. `**kw` of a module or a
function is dtype, that of the computation, and rngs, for the initial parameters.

Attribute names are those of diffusers' PyTorch modules, so that a path in the parameter tree is a
key in its files. On a mesh each layer gathers its own weights (sharding.gather_param), and H is
this device's part of the rows (sharding.size).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from di_star_jax import sharding
from di_star_jax.models.attention import attention

Dtype = Any
Padding = tuple[tuple[int, int], tuple[int, int]]

# Convolutions and flash attention, by their names as JAX's primitives.
_PRODUCTS = {"conv_general_dilated", "dot_product_attention_fwd_wrapper", "pallas_call"}
_ROUNDED = "rounded kernel"
_SUM = "residual sum"


def _is_product(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Whether it multiplies, and what it gives is no map of attention."""
    is_dot = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name in _PRODUCTS or is_dot(primitive, *avals, **params)


# What a block keeps for its backward pass: everything, what its products give and the kernels that
# it rounded for them, or its input alone.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _is_product, jax.checkpoint_policies.save_only_these_names(_ROUNDED, _SUM)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def checkpointed(
    module: nnx.Module,
    *args,
    remat: str,
) -> jax.Array:
    """Runs `module(*args)`; the backward pass recomputes what `remat`, a key of REMAT, does not
    keep.
    """
    if remat == "none":
        return module(*args)
    graphdef, params = nnx.split(module)
    shared = any("adapter" in path for path, _ in nnx.to_flat_state(params))

    def run(params: nnx.State, *args) -> jax.Array:
        # With adapters the block has a base that networks of a loop share: what is made of it
        # alone, whole from its shards or wide from 8 bits, would be made outside of the loop, for
        # all blocks at once, and kept.
        if shared:
            params, _ = jax.lax.optimization_barrier((params, jax.lax.stop_gradient(args[0])))
        return nnx.merge(graphdef, params)(*args)

    return jax.checkpoint(run, policy=REMAT[remat])(params, *args)


def stacked(
    build: Callable[[nnx.Rngs], nnx.Module],
    depth: int,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """`depth` copies of one block as a single module whose leaves have a leading axis [depth]."""
    return nnx.vmap(build, in_axes=0)(rngs.split(depth))


def scan_blocks(
    blocks: nnx.Module,
    x: jax.Array,
    *args,
    remat: str,
) -> jax.Array:
    """Applies stacked blocks one after the other."""
    graphdef, params = nnx.split(blocks)

    def body(x, params, *args):
        return checkpointed(nnx.merge(graphdef, params), x, *args, remat=remat)

    return over_blocks(body, x, params, *args, remat=remat)


def over_blocks(
    body: Callable,
    carry: Any,
    params: Any,
    *args,
    remat: str,
) -> Any:
    """What `body(carry, params of a block, *args)` makes of a carry, one block after the other.

    In a loop, one traced body whatever the depth, where blocks keep their input alone, or are split
    over devices and gathered in turn. What else a loop keeps it copies into stacks and out of them,
    as it does with weights: there it costs more than what it spares.
    """
    if remat == "full" or sharding.size(*sharding.PARAMS) > 1:
        return jax.lax.scan(lambda x, block: (body(x, block, *args), None), carry, params)[0]
    for block in unstacked(params):
        # Else XLA joins what all blocks make of one text to a product that it cannot cut.
        carry, args = jax.lax.optimization_barrier((carry, args))
        carry = body(carry, block, *args)
    return carry


def unstacked(params: Any) -> list[Any]:
    """Trees of [...], of one of [depth, ...]."""
    leaves, structure = jax.tree.flatten(params)
    blocks = zip(*map(jnp.unstack, leaves))
    return [structure.unflatten(block) for block in blocks]


class Adapter(nnx.Module):
    """A low-rank map beside a frozen one, scale * (x A) B; see lora.py for shapes and scale."""

    def __init__(
        self,
        a: jax.Array,
        b: jax.Array,
        rank: int,
        scale: float,
    ):
        self.a = nnx.Param(a)
        self.b = nnx.Param(b)
        self.rank = rank
        self.scale = scale

    def down(self, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
        """A [*shape, r]. Args: shape, of the frozen kernel without its outputs."""
        return sharding.gather_param(self.a[...], (*shape, self.rank), dtype)

    def up(self, h: jax.Array, c_out: int) -> jax.Array:
        """[..., r] -> [..., c_out]."""
        b = sharding.gather_param(self.b[...], (self.rank, c_out), h.dtype)
        return (self.scale * h) @ b


def whole_kernel(layer: nnx.Module, shape: tuple[int, ...]) -> jax.Array:
    """A layer's kernel in its compute dtype; of one in 8 bits, see int8.py, without its scale."""
    stored = layer.kernel[...]
    if layer.kernel_scale is None:
        kernel = sharding.gather_param(stored, shape, layer.dtype)
        # What is gathered is not kept: whole kernels are what splitting them is to spare.
        is_rounded = stored.shape == kernel.shape and stored.dtype != kernel.dtype
        return checkpoint_name(kernel, _ROUNDED) if is_rounded else kernel
    return sharding.gather_param(stored, shape, stored.dtype).astype(layer.dtype)


def scaled(layer: nnx.Module, y: jax.Array) -> jax.Array:
    """What a kernel in 8 bits gave, times its scale."""
    if layer.kernel_scale is None:
        return y
    scale = sharding.gather_param(layer.kernel_scale[...], y.shape[-1:], jnp.float32)
    return (y * scale).astype(y.dtype)


class Linear(nnx.Linear):
    """`nnx.Linear` whose weights may be split over devices, with adapters or without.

    adapter, frozen_adapter: one that learns, and one that does not. kernel_scale: [C_out] float32,
    of a kernel in 8 bits.
    """

    adapter: Adapter | None = None
    frozen_adapter: Adapter | None = None
    kernel_scale: nnx.Param | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        y = scaled(self, x @ whole_kernel(self, (self.in_features, self.out_features)))
        for adapter in filter(None, (self.frozen_adapter, self.adapter)):
            h = x @ adapter.down((self.in_features,), self.dtype)
            y = y + adapter.up(h, self.out_features)
        return (
            y
            if self.bias is None
            else y + sharding.gather_param(self.bias[...], (self.out_features,), self.dtype)
        )


class Conv(nnx.Conv):
    """`nnx.Conv` of [B, H, W, C]; its weights and the image's rows may be split over devices.

    Adapters and kernel_scale are as of `Linear`.
    """

    adapter: Adapter | None = None
    frozen_adapter: Adapter | None = None
    kernel_scale: nnx.Param | None = None

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        use_bias: bool = True,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            c_in, c_out, (kernel, kernel), strides=stride, use_bias=use_bias, dtype=dtype, rngs=rngs
        )
        self.stride = stride
        self.pad = padding or ((0, 0), (0, 0))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = whole_kernel(self, self.kernel_shape)
        (above, below), across = self.pad
        x, rows = x.astype(self.dtype), self.pad[0]
        if above + below and sharding.size("context") > 1:
            x = sharding.with_halo(x, above, max(self.kernel_shape[0] - self.stride - above, 0))
            rows = (0, 0)
        convolve = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(self.stride, self.stride),
            padding=(rows, across),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = scaled(self, convolve(x, kernel))
        for adapter in filter(None, (self.frozen_adapter, self.adapter)):
            h = convolve(x, adapter.down(self.kernel_shape[:3], self.dtype))
            y = y + adapter.up(h, self.out_features)
        return (
            y
            if self.bias is None
            else y + sharding.gather_param(self.bias[...], (self.out_features,), self.dtype)
        )


class Embed(nnx.Embed):
    """`nnx.Embed` whose table may be split over devices."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        table = sharding.gather_param(
            self.embedding[...], (self.num_embeddings, self.features), self.dtype
        )
        return jnp.take(table, ids, axis=0)


def standardised(x: jax.Array, epsilon: float) -> jax.Array:
    """In float32, with mean 0 and variance 1 over the last axis: a layer norm without weights."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis, in float32, whose weights may be split over devices."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = standardised(x, self.epsilon)
        scale, bias = (
            sharding.gather_param(leaf[...], x.shape[-1:], jnp.float32)
            for leaf in (self.scale, self.bias)
        )
        return (x * scale + bias).astype(self.dtype)


class GroupNorm(nnx.GroupNorm):
    """`nnx.GroupNorm` of [B, H, W, C], in float32, over all rows of the image wherever they are."""

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (
            sharding.gather_param(leaf[...], x.shape[-1:], jnp.float32)
            for leaf in (self.scale, self.bias)
        )
        return group_normed(self.num_groups, self.epsilon, x, scale, bias).astype(self.dtype)


def _over_groups(groups: int, per_channel: jax.Array) -> jax.Array:
    """[B, C] means over the own pixels -> [B, 1, 1, C] means over the group's channels and all
    pixels.

    The image itself is never reshaped to groups: a TPU would pad their few channels to 128.
    """
    b, c = per_channel.shape
    per_group = sharding.mean_over_rows(per_channel.reshape(b, groups, -1).mean(-1, keepdims=True))
    return jnp.broadcast_to(per_group, (b, groups, c // groups)).reshape(b, 1, 1, c)


def _group_moments(
    groups: int,
    epsilon: float,
    x: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Means of [B, H, W, C] and inverse deviations, [B, 1, 1, C] float32 each, in one pass.

    Not by E[x^2] - E[x]^2, which loses digits where the mean is large, as it is in the VAE decoder,
    but by the same about a mean of every 64th pixel, which is near: no further off than eight
    deviations, whatever the image.
    """
    near = _over_groups(groups, x[:, ::8, ::8].astype(jnp.float32).mean((1, 2)))
    off = x.astype(jnp.float32) - near
    mean = _over_groups(groups, off.mean((1, 2)))
    variance = _over_groups(groups, (off * off).mean((1, 2))) - mean * mean
    return near + mean, jax.lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def group_normed(
    groups: int,
    epsilon: float,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    """[B, H, W, C], [C], [C] -> [B, H, W, C] float32.

    Its backward pass is the closed form: all that it sums it sums in one pass over the image, where
    JAX's own takes one for the deviation and then one for the mean.
    """
    return _group_normed_fwd(groups, epsilon, x, scale, bias)[0]


def _group_normed_fwd(
    groups: int,
    epsilon: float,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, Any]:
    mean, inverse = _group_moments(groups, epsilon, x)
    y = (x.astype(jnp.float32) - mean) * (inverse * scale) + bias
    return y, (x, mean, inverse, scale)


def _group_normed_bwd(
    groups: int,
    epsilon: float,
    kept: Any,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = kept
    normal = (x.astype(jnp.float32) - mean) * inverse
    pull, along = grad.mean((1, 2)), (grad * normal).mean((1, 2))  # [B, C], of the own pixels
    of_mean, of_deviation = (_over_groups(groups, scale * each) for each in (pull, along))
    of_x = inverse * (scale * grad - of_mean - normal * of_deviation)
    pixels = x.shape[1] * x.shape[2]
    return of_x.astype(x.dtype), pixels * along.sum(0), pixels * pull.sum(0)


group_normed.defvjp(_group_normed_fwd, _group_normed_bwd)


def group_norm(
    channels: int,
    groups: int,
    eps: float,
    **kw,
) -> GroupNorm:
    return GroupNorm(channels, num_groups=groups, epsilon=eps, **kw)


def layer_norm(config: Any, **kw) -> LayerNorm:
    """Of a transformer's config, with its width and epsilon."""
    return LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kw)


def embed(
    count: int,
    width: int,
    **kw,
) -> Embed:
    return Embed(count, width, embedding_init=nnx.initializers.normal(0.02), **kw)


def conv3x3(
    c_in: int,
    c_out: int,
    *,
    stride: int = 1,
    padding: Padding = ((1, 1), (1, 1)),
    **kw,
) -> Conv:
    return Conv(c_in, c_out, 3, stride=stride, padding=padding, **kw)


def conv1x1(
    c_in: int,
    c_out: int,
    **kw,
) -> Conv:
    return Conv(c_in, c_out, 1, **kw)


def gelu(x: jax.Array) -> jax.Array:
    """The exact one."""
    return nnx.gelu(x, approximate=False)


def tanh_gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh formula, 5e-4 off the exact one at most."""
    return nnx.gelu(x, approximate=True)


def sinusoidal_embedding(
    t: jax.Array,
    dim: int,
    *,
    flip_sin_to_cos: bool,
    freq_shift: float,
) -> jax.Array:
    """Sines and cosines of a scalar at `dim / 2` frequencies.

    Source: diffusers `get_timestep_embedding`.

    Args:
      t: [B] any real dtype.
      dim: even.
      flip_sin_to_cos: cosines first (SDXL) instead of sines first.
      freq_shift: subtracted from dim / 2 in the exponent.
    Returns:
      [B, dim] float32.
    """
    half = dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32)
    frequency = jnp.exp(-math.log(10000.0) / (half - freq_shift) * exponent)
    angle = t.astype(jnp.float32)[:, None] * frequency
    sines = jnp.sin(angle)
    cosines = jnp.cos(angle)
    parts = [cosines, sines] if flip_sin_to_cos else [sines, cosines]
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(nnx.Module):
    """[B, C_in] -> [B, C]: linear, SiLU, linear. Source: diffusers `TimestepEmbedding`."""

    def __init__(
        self,
        c_in: int,
        channels: int,
        **kw,
    ):
        self.linear_1 = Linear(c_in, channels, **kw)
        self.linear_2 = Linear(channels, channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """[B, H, W, C_in] (, [B, T]) -> [B, H, W, C_out].

    Source: diffusers `ResnetBlock2D`, time added before norm2.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        temb: int | None,
        groups: int,
        eps: float,
        **kw,
    ):
        self.norm1 = group_norm(c_in, groups, eps, **kw)
        self.conv1 = conv3x3(c_in, c_out, **kw)
        self.time_emb_proj = None if temb is None else Linear(temb, c_out, **kw)
        self.norm2 = group_norm(c_out, groups, eps, **kw)
        self.conv2 = conv3x3(c_out, c_out, **kw)
        self.conv_shortcut = None if c_in == c_out else conv1x1(c_in, c_out, **kw)

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(nnx.silu(temb))[:, None, None, :]
        h = self.conv2(nnx.silu(self.norm2(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h + shortcut


class Downsample2D(nnx.Module):
    """Halves H and W by a strided convolution. Source: diffusers `Downsample2D`."""

    def __init__(
        self,
        channels: int,
        *,
        padding: Padding,
        **kw,
    ):
        self.conv = conv3x3(channels, channels, stride=2, padding=padding, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


def doubled(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 2 H, 2 W, C] by nearest neighbour."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


class Upsample2D(nnx.Module):
    """Doubles H and W by nearest neighbour, crops to `size`, convolves.

    Source: diffusers `Upsample2D`.
    """

    def __init__(self, channels: int, **kw):
        self.conv = conv3x3(channels, channels, **kw)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        x = doubled(x)
        if size is not None:
            # An odd skip: for sizes 2n and 2n-1 nearest neighbour is doubling and cropping.
            height, width = size
            x = x[:, :height, :width]
        return self.conv(x)


class Attention(nnx.Module):
    """Multi-head attention of [B, N, C] on itself or on a context [B, M, K].

    With `groups` it is the VAE's attention: group norm before, residual after, biases in the
    projections, which `bias` gives to others too. Source: diffusers `Attention`.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        context: int | None = None,
        groups: int | None = None,
        bias: bool = False,
        kernel: str,
        **kw,
    ):
        self.heads = heads
        self.kernel = kernel
        self.group_norm = None if groups is None else group_norm(channels, groups, 1e-6, **kw)
        biased = bias or groups is not None
        c_in = channels if context is None else context
        self.to_q = Linear(channels, channels, use_bias=biased, **kw)
        self.to_k = Linear(c_in, channels, use_bias=biased, **kw)
        self.to_v = Linear(c_in, channels, use_bias=biased, **kw)
        self.to_out = nnx.List([Linear(channels, channels, **kw)])

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)  # [B, N, heads, C / heads]

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Args: mask, bool [B, M], true for the tokens that are seen; None shows all of them."""
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.reshape(h.shape[0], -1, h.shape[-1])  # [B, N, C]
        seen = h if context is None else context
        q = self._split_heads(self.to_q(h))
        k = self._split_heads(self.to_k(seen))
        v = self._split_heads(self.to_v(seen))
        if context is None:
            k = sharding.all_rows(k)
            v = sharding.all_rows(v)
        allowed = None if mask is None else mask[:, None, None, :]  # [B, heads, N, M]
        h = attention(q, k, v, mask=allowed, kernel=self.kernel)
        h = h.reshape(*h.shape[:2], -1)  # [B, N, C]
        h = self.to_out[0](h).reshape(x.shape)
        return h if self.group_norm is None else x + h


@jax.custom_vjp
def gated(both: jax.Array) -> jax.Array:
    """[..., 2 D] -> [..., D]: the first half times the exact GELU of the other.

    Its gradient is made in one pass over both halves; JAX's own is made by halves, which are then
    copied beside each other.
    """
    h, gate = jnp.split(both, 2, axis=-1)
    return h * gelu(gate)


def _gated_fwd(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gated(both), both


def _gated_bwd(both: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    own = both.reshape(*grad.shape[:-1], 2, -1)  # the first half, and the gate
    other = own[..., ::-1, :]
    grad = grad[..., None, :]
    # Both are made of either half: what is made twice is cheaper than what is written down.
    of_gate = jax.vjp(gelu, own)[1](grad * other)[0]
    of_first = grad * gelu(other)
    is_gate = jnp.arange(2)[:, None] == 1
    return (jnp.where(is_gate, of_gate, of_first).reshape(both.shape),)


gated.defvjp(_gated_fwd, _gated_bwd)


class GEGLU(nnx.Module):
    """[B, N, C] -> [B, N, D]: a linear map gated by the exact GELU of another.

    Source: diffusers `GEGLU`.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        **kw,
    ):
        self.proj = Linear(c_in, 2 * c_out, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return gated(self.proj(x))


class TanhGELU(nnx.Module):
    """[B, N, C] -> [B, N, D]: a linear map, then GELU by its tanh formula.

    Source: diffusers `GELU` with approximate="tanh".
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        **kw,
    ):
        self.proj = Linear(c_in, c_out, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return tanh_gelu(self.proj(x))


class Dropout(nnx.Module):
    """Keeps PyTorch's index 1 in `ff.net` occupied; it never drops."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class FeedForward(nnx.Module):
    """[B, N, C] -> [B, N, C] through width 4C, reached by `into`: GEGLU or TanhGELU.

    Source: diffusers `FeedForward`.
    """

    def __init__(
        self,
        channels: int,
        into: type[nnx.Module] = GEGLU,
        **kw,
    ):
        width = 4 * channels
        self.net = nnx.List([into(channels, width, **kw), Dropout(), Linear(width, channels, **kw)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.net:
            x = layer(x)
        return x


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and settings of a `Transformer2DModel`.

    channels, heads: C, and how many heads share them.
    depth: how many blocks.
    context: K, the width of the text.
    groups: of the group norm.
    linear_projection: whether the maps in and out are linear or convolutions of one pixel, which
      differ by the shape of their weights.
    remat, kernel: what blocks keep for the backward pass, a key of REMAT, and see attention.py.
    """

    channels: int
    heads: int
    depth: int
    context: int
    groups: int
    linear_projection: bool
    remat: str
    kernel: str


class BasicTransformerBlock(nnx.Module):
    """Self-attention, attention on the text, feed-forward, each residual.

    Source: diffusers `BasicTransformerBlock`.
    """

    def __init__(self, config: TransformerConfig, **kw):
        channels = config.channels
        heads = {"heads": config.heads, "kernel": config.kernel}
        self.norm1 = LayerNorm(channels, epsilon=1e-5, **kw)
        self.attn1 = Attention(channels, **heads, **kw)
        self.norm2 = LayerNorm(channels, epsilon=1e-5, **kw)
        self.attn2 = Attention(channels, context=config.context, **heads, **kw)
        self.norm3 = LayerNorm(channels, epsilon=1e-5, **kw)
        self.ff = FeedForward(channels, **kw)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        x = checkpoint_name(x + self.attn1(self.norm1(x)), _SUM)
        x = checkpoint_name(x + self.attn2(self.norm2(x), context), _SUM)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """[B, H, W, C] attends to itself and to a context [B, M, K].

    Source: diffusers `Transformer2DModel`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        channels = config.channels
        projection = Linear if config.linear_projection else conv1x1
        self.remat = config.remat
        # 1e-6 here, 1e-5 in the UNet's resnets.
        self.norm = group_norm(channels, config.groups, 1e-6, **kw)
        self.proj_in = projection(channels, channels, **kw)
        self.proj_out = projection(channels, channels, **kw)
        self.transformer_blocks = stacked(
            lambda rngs: BasicTransformerBlock(config, dtype=dtype, rngs=rngs), config.depth, rngs
        )

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        h = self.proj_in(self.norm(x))
        h = h.reshape(h.shape[0], -1, h.shape[-1])  # [B, N, C]
        h = scan_blocks(self.transformer_blocks, h, context, remat=self.remat)
        return self.proj_out(h.reshape(x.shape)) + x
