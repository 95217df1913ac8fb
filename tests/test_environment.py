# SPDX-License-Identifier: Apache-2.0
"""jaxlib releases that compute wrongly on CPU are excluded in setup.py; this tells when one slips
in.
"""

import os
import subprocess
import sys

import di_star_jax

REDUCTION = """
import jax, jax.numpy as jnp, numpy as np
n = 32_769
matrix, vector = np.random.default_rng(0).standard_normal((2, n, 3)).astype(np.float32)
matrix = matrix[:, None, :] * np.eye(3, dtype=np.float32)[None]
f = lambda m, v: jnp.sum(jax.vmap(lambda a, b: a @ b)(m, v) ** 2)
exact = np.einsum("nij,nj->ni", matrix.astype(np.float64), vector.astype(np.float64))
expected = np.sum(exact**2)
np.testing.assert_allclose(jax.jit(f)(matrix, vector), expected, rtol=1e-4)
np.testing.assert_allclose(f(matrix, vector), expected, rtol=1e-4)
"""


def test_jit_equals_eager_on_the_reduction_that_broke_jaxlib_0_10_2():
    env = dict(os.environ)
    env.pop("XLA_FLAGS")  # as users run it, not as tests do
    done = subprocess.run(
        [sys.executable, "-c", REDUCTION], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_a_command_on_a_cpu_starts_anew_with_huge_pages_once(monkeypatch):
    started = []
    monkeypatch.setattr(di_star_jax, "_on_cpu", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "di_star_jax", "sample", "--num=2"])
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    di_star_jax._use_huge_pages()
    assert started == [(sys.executable, sys.orig_argv)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    di_star_jax._use_huge_pages()
    assert len(started) == 1


def test_training_imports_neither_torch_nor_tensorflow_nor_diffusers():
    code = (
        "import sys, di_star_jax.train, di_star_jax.shapes.pretrain; "
        "import tensorflow_datasets, transformers; "
        "from transformers import CLIPTokenizer; "
        "print([m for m in ('torch', 'tensorflow', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
