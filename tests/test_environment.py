# SPDX-License-Identifier: Apache-2.0
"""jaxlib releases that compute wrongly on CPU are excluded in setup.py; this tells when one slips in."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np


def test_jit_equals_eager_on_the_reduction_that_broke_jaxlib_0_10_2():
    n = 32_769
    matrix, vector = np.random.default_rng(0).standard_normal((2, n, 3)).astype(np.float32)
    matrix = matrix[:, None, :] * np.eye(3, dtype=np.float32)[None]

    def f(m, v):
        return jnp.sum(jax.vmap(lambda a, b: a @ b)(m, v) ** 2)

    expected = np.sum(np.einsum("nij,nj->ni", matrix.astype(np.float64), vector.astype(np.float64)) ** 2)
    np.testing.assert_allclose(jax.jit(f)(matrix, vector), expected, rtol=1e-4)
    np.testing.assert_allclose(f(matrix, vector), expected, rtol=1e-4)


def test_training_imports_neither_torch_nor_tensorflow_nor_diffusers():
    code = ("import sys, di_star_jax.train, di_star_jax.shapes.pretrain, tensorflow_datasets, transformers; "
            "from transformers import CLIPTokenizer; "
            "print([m for m in ('torch', 'tensorflow', 'diffusers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
