# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test; set before jax is imported."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compiling is most of what the tests do; without LLVM's slow passes it takes half as long.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_optimization_level=0",
    ]
)

# What one process has compiled the other finds, and so does a later run.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"


def pytest_collection_modifyitems(items):
    """Whole runs first: xdist deals out long runs of tests, so one process gets them all."""
    items.sort(key=lambda item: item.module.__name__ != "test_train")
