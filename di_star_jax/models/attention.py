# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention: the one place where a kernel is chosen."""

import jax


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, with float32 logits.

    Args:
      q: [B, N, H, D] queries.
      k: [B, M, H, D] keys.
      v: [B, M, H, D] values.
      mask: bool, broadcastable to [B, H, N, M]; True where attention is allowed. None allows all.
    Returns:
      [B, N, H, D], dtype of q.
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask)
