# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention: the one place where a kernel is chosen.

Dims: B batch, N queries, M keys, H heads, D head width.
"""

import functools
import logging

import jax
import jax.numpy as jnp

KERNELS = ("splash", "cudnn", "xla")
LONG = 1024  # tokens; below this the flash kernels' overhead is not repaid
BLOCK = 2**26  # logits per image and head above which XLA's path computes them by blocks of queries
WIDEST = 128  # D of the flash kernels
_TILE = 64  # keys that cuDNN's kernel takes at a time


@functools.cache
def _log(
    kernel: str,
    n: int,
    m: int,
    h: int,
    d: int,
) -> None:
    logging.getLogger(__name__).info(
        "attention of %d on %d tokens, %d heads of %d: %s", n, m, h, d, kernel
    )


def choose(
    kernel: str,
    n: int,
    m: int,
    d: int,
    dtype,
    masked: bool,
) -> str:
    """What of KERNELS computes such an attention where `kernel` is preferred: flash kernels take
    unmasked ones of many queries.

    Both take head widths up to 128: the VAE's one head of 512 stays with XLA, for cuDNN refuses it
    and splash takes the TPU compiler four minutes. splash needs multiples of 128 tokens, and many
    keys to repay its overhead: those of the text stay with XLA. cuDNN takes any number of keys, but
    needs 16-bit floats and widths that 8 divides.
    """
    if masked or n < LONG or d > WIDEST:
        return "xla"
    if kernel == "splash" and m >= LONG and n % 128 == 0 and m % 128 == 0:
        return "splash"
    if kernel == "cudnn" and d % 8 == 0 and jnp.dtype(dtype).itemsize == 2:
        return "cudnn"
    return "xla"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    kernel: str = "xla",
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, with float32 logits.

    Args:
      q: [B, N, H, D] queries.
      k: [B, M, H, D] keys.
      v: [B, M, H, D] values.
      mask: bool, broadcastable to [B, H, N, M]; True where attention is allowed. None allows all.
      kernel: what is preferred: "splash" (Pallas, TPU), "cudnn" (flash, GPU) or "xla"; see
        `choose`.
    Returns:
      [B, N, H, D], dtype of q.
    """
    _, n, h, d = q.shape
    m = k.shape[1]
    chosen = choose(kernel, n, m, d, q.dtype, mask is not None)
    _log(chosen, n, m, h, d)
    if chosen == "splash":
        return splash(q, k, v)
    if chosen == "cudnn":
        return cudnn(q, k, v)
    if n * m > BLOCK and mask is None:
        return _by_blocks(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _by_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """Attention of some queries after the others, never all logits at once.

    Each block is computed again in the backward pass.
    """
    b, n, h, d = q.shape
    fewest = n * k.shape[1] // BLOCK
    count = next(count for count in range(fewest, n + 1) if n % count == 0)

    @jax.checkpoint
    def of_block(queries: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(queries, k, v)

    blocks = jnp.moveaxis(q.reshape(b, count, n // count, h, d), 1, 0)
    found = jax.lax.map(of_block, blocks)  # [count, B, N / count, H, D]
    return jnp.moveaxis(found, 0, 1).reshape(q.shape)


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """Flash attention by cuDNN; arguments as `attention`.

    Keys are filled up to a multiple of its tiles, for JAX lets no odd number of them through to it
    where gradients are wanted.

    Args: implementation, of `jax.nn.dot_product_attention`.
    """
    run = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    m = k.shape[1]
    more = -m % _TILE
    if not more:
        return run(q, k, v)
    filled = [jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (k, v)]
    seen = jnp.full(q.shape[0], m, jnp.int32)
    return run(q, *filled, key_value_seq_lengths=seen)


def _block(tokens: int) -> int:
    """The largest multiple of 128 that divides `tokens`, at most 1024.

    MaxDiffusion's limit, which fits the vector memory.
    """
    return next(size for size in range(1024, 0, -128) if tokens % size == 0)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Flash attention in Pallas for TPUs; arguments as `attention`, N and M multiples of 128.

    Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, n, h, d = q.shape
    m = k.shape[1]
    block_q = _block(n)
    block_kv = _block(m)
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = masks.MultiHeadMask([masks.FullMask((n, m))] * h)
    # A concrete mask's block table is made with NumPy: it must not become part of the trace.
    with jax.ensure_compile_time_eval():
        one_image = kernels.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
    q = jnp.swapaxes(q * d**-0.5, 1, 2)  # [B, H, N, D]
    k = jnp.swapaxes(k, 1, 2)
    v = jnp.swapaxes(v, 1, 2)
    return jnp.swapaxes(jax.vmap(one_image)(q, k, v), 1, 2)
