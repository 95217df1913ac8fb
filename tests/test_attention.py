# SPDX-License-Identifier: Apache-2.0
"""Every kernel against attention in float64, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from di_star_jax.models import attention


def float64_attention(q, k, v, weight):
    """Output and gradients of sum(weight * output), in NumPy. [B, N, H, D] each."""
    q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bnhd,bmhd->bhnm", weight, v)
    dlogits = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bhnm,bmhd->bnhd", p, v),
        np.einsum("bhnm,bmhd->bnhd", dlogits, k),
        np.einsum("bhnm,bnhd->bmhd", dlogits, q),
        np.einsum("bhnm,bnhd->bmhd", p, weight),
    )


PATHS = {
    "splash": functools.partial(attention.splash, interpret=True),
    "blocks": attention._by_blocks,
    "xla": attention.attention,
    "cudnn": attention.cudnn,
    "what cuDNN is given": functools.partial(attention.cudnn, implementation="xla"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n, m, d", [(256, 256, 64), (384, 128, 40), (256, 77, 64)])
def test_every_kernel_equals_float64_with_its_gradients(path, n, m, d, monkeypatch):
    if path == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU")
    if path == "splash" and m % 128:
        pytest.skip("of other lengths, XLA's")
    monkeypatch.setattr(attention, "BLOCK", 64 * m)  # blocks of 64 queries
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (
        jax.random.normal(key, (2, size, 2, d), jnp.bfloat16)
        for key, size in zip(keys, (n, m, m, n))
    )
    out, pull_back = jax.vjp(PATHS[path], q, k, v)
    for ours, exact in zip((out, *pull_back(weight)), float64_attention(q, k, v, weight)):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(np.asarray(ours, np.float64) - exact).max() / np.abs(exact).max() < 1e-2


def test_flash_kernels_take_long_unmasked_attention_that_fits_them():
    choose = functools.partial(attention.choose, dtype=jnp.bfloat16, masked=False)
    assert choose("splash", 4096, 4096, 64) == "splash"
    assert choose("cudnn", 4096, 4096, 64) == "cudnn"
    assert choose("xla", 4096, 4096, 64) == "xla"
    assert choose("splash", 4096, 77, 64) == "xla"  # the text's tokens
    assert choose("cudnn", 4096, 77, 64) == "cudnn"
    for kernel in ("splash", "cudnn"):
        assert choose(kernel, 257, 257, 80) == "xla"  # CLIP's
        assert choose(kernel, 16384, 16384, 512) == "xla"  # the VAE's one head
        assert choose(kernel, 4096, 4096, 64, masked=True) == "xla"
    assert choose("splash", 2500, 2500, 64) == "xla"  # no multiple of 128
    assert choose("cudnn", 4096, 4096, 64, dtype=jnp.float32) == "xla"


def test_the_choice_is_logged_once(caplog):
    attention._log.cache_clear()
    q = jnp.ones((1, 4, 2, 8))
    with caplog.at_level("INFO", logger="di_star_jax"):
        for _ in range(2):
            attention.attention(q, q, q)
    assert [record.getMessage() for record in caplog.records] == [
        "attention of 4 on 4 tokens, 2 heads of 8: xla"
    ]
